"""Planned memory against measured: real steps in a process of their own. plan.py --measure and --check call this.

On a GPU the peak is torch.cuda.max_memory_allocated. On a CPU it is the process's largest resident set, less what the
libraries had taken before the policy was loaded; there, freed memory goes back at once (glibc's threshold for that is
lowered), as otherwise malloc would keep an unknown part of it.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch

import rollout
from biggest import longest_prompt
from config import ConfigError
from data.examples import load_examples
from footprint import set_checkpointing
from loading import load_policy
from plan import GB, Plan, PlanConfig, planner
from train_rl import Config, make_optimizer, train_step
from workloads import resident

STEPS = 2  # the second has the optimizer's state from its beginning
# image_tokens, hidden_size, num_layers and vocab_size are bench.py's; all others fields of train_rl.Config.
SHAPES = (
    {"image_tokens": 512, "hidden_size": 384, "num_layers": 8, "num_generations": 8, "max_new_tokens": 64},
    {"image_tokens": 1024, "hidden_size": 384, "num_layers": 12, "num_generations": 16, "max_new_tokens": 64}
    | {"gradient_checkpointing": True},
    {"image_tokens": 64, "hidden_size": 256, "num_layers": 6, "num_generations": 16, "max_new_tokens": 64}
    | {"vocab_size": 60_000},
    {"image_tokens": 256, "hidden_size": 1024, "num_layers": 6, "num_generations": 4, "max_new_tokens": 48}
    | {"load_in_4bit": True, "lora_rank": 8},
    {"image_tokens": 64, "hidden_size": 256, "num_layers": 16, "num_generations": 24, "max_new_tokens": 96},
    {"image_tokens": 1024, "hidden_size": 256, "num_layers": 6, "num_generations": 4, "max_new_tokens": 32}
    | {"lora_targets": "all-linear", "groups_per_step": 2},
    {"image_tokens": 512, "hidden_size": 512, "num_layers": 8, "num_generations": 4, "max_new_tokens": 16}
    | {"groups_per_step": 6, "gradient_checkpointing": True, "load_in_4bit": True},
)


def measure(config: Config, examples_of: dict) -> int:
    """Peak bytes of two steps on the largest prompt, in a process of its own.

    Args:
        config: of train_rl. examples_of: {"bench": fields of BenchConfig} for a random picture, {} for config.data.
    """
    names = {entry.name for entry in Config.__dataclass_fields__.values()}
    fields = {name: value for name, value in asdict(config).items() if name in names}
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"config": fields, "examples": examples_of}), encoding="utf-8")
        command = [sys.executable, __file__, str(job)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ConfigError(f"the measured steps failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def run_steps(config: Config, examples_of: dict) -> int:
    """The same in this process; completions never end early."""
    import bitsandbytes  # noqa: F401  libraries are in memory before anything is measured
    import peft  # noqa: F401
    from accelerate import Accelerator

    accelerator = Accelerator()
    small = Config(num_generations=2, max_new_tokens=2, groups_per_step=1, load_in_4bit=config.load_in_4bit)
    _take_steps(small, load_examples("scenes", limit=1), accelerator)  # what torch loads when it is first used
    if "bench" in examples_of:
        from bench import BenchConfig
        from workloads import example

        examples = [example(BenchConfig(**examples_of["bench"]))]
    else:
        examples = load_examples(config.data, **config.data_arguments(), require_boxes=config.needs_boxes)
    gc.collect()
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _take_steps(config, examples, accelerator)
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    _take_steps(config, examples, accelerator)
    return resident("VmHWM") - before


def _take_steps(config: Config, examples, accelerator) -> None:
    """STEPS steps of the example with the longest prompt."""
    arguments = config.policy_arguments(config.lora_rank)
    options = {"lora_alpha": config.lora_alpha, "lora_targets": config.lora_targets, "device": accelerator.device}
    model, processor = load_policy(**arguments, **options)
    longest = 0 if len(examples) == 1 else longest_prompt(processor, examples, config.system_prompt)
    batch = [examples[longest]] * config.groups_per_step
    set_checkpointing(model, config.gradient_checkpointing)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(config.optimizer, trained, lr=1e-6)
    with mock.patch.object(rollout, "eos_token_ids", lambda *_: set()):
        for step in range(STEPS):
            train_step(model, processor, optimizer, batch, step, config, accelerator)


def compared(plan: Plan, measured: int) -> dict[str, float]:
    """Planned and measured GB, and how far the plan is off. The plan's assumed parts are no tensors: left out."""
    planned = plan.bytes_of(plan.highest)
    return {"planned": planned / GB, "measured": measured / GB, "off": planned / measured - 1}


def measure_one(config: PlanConfig) -> str:
    """Plan one process's step on the largest prompt of config.data, run it, and say both."""
    config = replace(config, groups_per_step=max(1, config.groups_per_step // config.processes), memory_gb=None)
    plan = planner(config.groups_per_step, with_evaluation=False)(config)
    found = compared(plan, measure(config, {}))
    return (
        f"planned {found['planned']:.3f} GB (in the {plan.highest}), measured {found['measured']:.3f} GB: the plan is "
        f"{found['off']:+.1%} off"
    )


def plan_and_measure(shape: dict) -> tuple[Plan, dict[str, float]]:
    """One of SHAPES: its model is made, planned from its config alone, and then run."""
    from bench import BenchConfig
    from workloads import build_model, example

    names = ("image_tokens", "hidden_size", "num_layers", "vocab_size")
    bench = {name: shape[name] for name in names if name in shape}
    settings = {"groups_per_step": 1, "dtype": "float32", "top_p": 1.0} | shape
    settings = {name: value for name, value in settings.items() if name not in names}
    with tempfile.TemporaryDirectory() as folder:
        build_model(BenchConfig(**bench), Path(folder))
        config = Config(model=folder, data="measured", **settings)
        plan = planner(config.groups_per_step, example=example(BenchConfig(**bench)))(config)
        return plan, compared(plan, measure(config, {"bench": bench}))


def check_plans(shapes=SHAPES) -> str:
    """A table of planned and measured peaks, as Markdown; a line appears on stderr when it is done."""
    lines = ["| shape | planned | measured | plan is off by | highest in |", "|---|---|---|---|---|"]
    for shape in shapes:
        plan, found = plan_and_measure(shape)
        shown = ", ".join(f"{name}={value}" for name, value in shape.items())
        lines.append(
            f"| {shown} | {found['planned'] * 1000:.0f} MB | {found['measured'] * 1000:.0f} MB | {found['off']:+.1%} | "
            f"{plan.highest} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print("\n" + json.dumps({"peak_bytes": run_steps(Config(**job["config"]), job["examples"])}))
