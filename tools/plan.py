"""Plan the memory of a training run, and check the plan against real steps, measured in a process of their own.

    python train_rl.py --config configs/t4-16gb.yaml --data mine.jsonl --plan             # your data's longest prompt
    python -m tools.plan --config configs/t4-16gb.yaml --picture 1024x768                 # no data yet: one picture
    python -m tools.plan --config configs/rtx-24gb.yaml --picture 1024x768 --memory_gb 24 # another card
    python -m tools.plan --config configs/t4-16gb.yaml --data mine.jsonl --measure        # against two real steps
    python -m tools.plan --check                                                          # seven small models

On a GPU the peak is torch.cuda.max_memory_allocated. On a CPU it is the largest resident set of the process, minus that
before the policy was loaded; a lower threshold of glibc's malloc returns freed memory to the system at once.
"""

import gc
import re
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from sayo.examples.load import load_examples
from sayo.memory_plan.longest import longest_prompt
from sayo.memory_plan.plan import GB, Plan, planner, resident, show_plan
from sayo.model.forward import set_checkpointing
from sayo.model.loading import load_policy
from sayo.settings import option, run_command
from sayo.show.tables import markdown
from tools.bench import BenchConfig
from tools.workloads import build_model, example, in_child
from train_rl import Config, TrainState, train_step

STEPS = 2  # the second one starts with the optimizer's state in memory
MODEL_FIELDS = ("image_tokens", "hidden_size", "num_layers", "vocab_size")  # of BenchConfig; all others are Config's
SIZES = ("image_tokens", "hidden_size", "num_layers", "num_generations", "max_new_tokens")
SHAPES = (  # values of SIZES, and other settings
    ((512, 384, 8, 8, 64), {}),
    ((1024, 384, 12, 16, 64), {"gradient_checkpointing": True}),
    ((64, 256, 6, 16, 64), {"vocab_size": 60_000}),
    ((256, 1024, 6, 4, 48), {"load_in_4bit": True, "lora_rank": 8}),
    ((64, 256, 16, 24, 96), {}),
    ((1024, 256, 6, 4, 32), {"lora_targets": "all-linear", "groups_per_step": 2}),
    ((512, 512, 8, 4, 16), {"groups_per_step": 6, "gradient_checkpointing": True, "load_in_4bit": True}),
)


def measure(config: Config, bench: dict | None = None) -> int:
    """Peak bytes of STEPS steps on the longest prompt of config.data, in a process of their own.

    bench   fields of BenchConfig: the steps are on a random picture of its size instead
    """
    settings = {entry.name: getattr(config, entry.name) for entry in fields(Config)}
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    return in_child("tools.plan", "run_steps", settings, bench, **malloc)


def run_steps(settings: dict, bench: dict | None) -> int:
    """What the child process of measure runs; no completion ends early."""
    import bitsandbytes  # noqa: F401  load libraries before anything is measured
    import peft  # noqa: F401
    from accelerate import Accelerator

    accelerator, config = Accelerator(), Config(**settings)
    small = Config(num_generations=2, max_new_tokens=2, groups_per_step=1, load_in_4bit=config.load_in_4bit)
    _take_steps(small, load_examples("scenes", limit=1), accelerator)  # load what torch imports on first use
    if bench:
        examples = [example(BenchConfig(**bench))]
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
    """STEPS steps on the example with the longest prompt."""
    options = {"lora_alpha": config.lora_alpha, "lora_targets": config.lora_targets, "device": accelerator.device}
    model, processor = load_policy(**config.policy_arguments(config.lora_rank), **options)
    longest = 0 if len(examples) == 1 else longest_prompt(processor, examples, config.system_prompt)
    batch = [examples[longest]] * config.groups_per_step
    set_checkpointing(model, config.gradient_checkpointing)
    config = replace(config, learning_rate=1e-6, min_new_tokens=config.max_new_tokens)
    state = TrainState(model, config)
    for step in range(STEPS):
        train_step(model, processor, state, batch, step, config, accelerator)


def compared(plan: Plan, measured: int) -> dict[str, float]:
    """Planned and measured GB, and the plan's relative error; without the assumed overhead, which no tensor holds."""
    planned = plan.bytes_of(plan.highest)
    return {"planned": planned / GB, "measured": measured / GB, "off": planned / measured - 1}


def measure_one(config) -> str:
    """Plan one process's step on the longest prompt of config.data, run it, and report both."""
    config = replace(config, groups_per_step=max(1, config.groups_per_step // config.processes), memory_gb=None)
    plan = planner(config.groups_per_step, with_evaluation=False)(config)
    found = compared(plan, measure(config))
    planned, measured = (f"{found[name]:.3f} GB" for name in ("planned", "measured"))
    return f"planned {planned} (in the {plan.highest}), measured {measured}: the plan is {found['off']:+.1%} off"


def plan_and_measure(shape: dict) -> tuple[Plan, dict[str, float]]:
    """Build the model of one of SHAPES, plan it from its config alone, and run it."""
    bench = {name: shape[name] for name in MODEL_FIELDS if name in shape}
    settings = {"groups_per_step": 1, "dtype": "float32", "top_p": 1.0}
    settings |= {name: value for name, value in shape.items() if name not in MODEL_FIELDS}
    with tempfile.TemporaryDirectory() as folder:
        build_model(BenchConfig(**bench), Path(folder))
        config = Config(model=folder, data="measured", **settings)
        plan = planner(config.groups_per_step, example=example(BenchConfig(**bench)))(config)
        return plan, compared(plan, measure(config, bench))


def check_plans() -> str:
    """A Markdown table of planned and measured peaks; each row also goes to stderr as soon as it is known."""
    rows = []
    for sizes, more in SHAPES:
        shape = dict(zip(SIZES, sizes, strict=True)) | more
        plan, found = plan_and_measure(shape)
        peaks = (f"{1000 * found[name]:.0f} MB" for name in ("planned", "measured"))
        shown = ", ".join(f"{name}={value}" for name, value in shape.items())
        rows.append([shown, *peaks, f"{found['off']:+.1%}", plan.highest])
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return markdown(["shape", "planned", "measured", "plan is off by", "highest in"], rows)


@dataclass
class PlanConfig(Config):
    """Plan the memory of a training run with the settings of train_rl.py, and check the plan by measuring."""

    picture: str | None = option(None, "Plan for one picture of this size, such as 1024x768, instead of for the data.")
    text_tokens: int = option(160, "Text tokens beside the picture: system prompt, question and template.", at_least=1)
    processes: int = option(1, "Processes that share the groups of a step, one per card.", at_least=1)
    measure: bool = option(False, "Load the policy, run two steps on the largest prompt, and compare peak and plan.")
    check: bool = option(False, "Plan and measure small models of seven shapes on this machine.")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.picture is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.picture):
            found.append(f"picture={self.picture!r}: give width and height in pixels, such as 1024x768")
        if self.measure and self.picture:
            found.append("measure runs on real examples: give --data and leave --picture out")
        return found


def main(config: PlanConfig) -> None:
    if config.check:
        print(check_plans())
    elif config.measure:
        print(measure_one(config))
    else:
        size = config.picture and tuple(map(int, config.picture.split("x")))
        show_plan(config, size, config.text_tokens, config.processes)


if __name__ == "__main__":
    run_command(PlanConfig, main)
