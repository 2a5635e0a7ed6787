"""Will a run fit, and if not, what to lower: planned from shapes before any weight is loaded, and checked by a step.

    python train_rl.py --config configs/t4-16gb.yaml --data mine.jsonl --plan       # the largest prompt of your data
    python plan.py --config configs/t4-16gb.yaml --picture 1024x768                 # no data yet: one picture instead
    python plan.py --config configs/rtx-24gb.yaml --picture 1024x768 --memory_gb 24 # for a card you have not got
    python plan.py --config configs/t4-16gb.yaml --data mine.jsonl --measure        # one real step: planned, measured
    python plan.py --check                                                          # the same for seven small models

A GB is 10^9 bytes. footprint.py counts the bytes. What a plan cannot know is assumed, and said to be: the CUDA context,
and the gaps that the allocator leaves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState
from PIL import Image

import footprint
from biggest import NUM_SCENES, evaluated_side_by_side, longest_prompt, side_by_side
from config import ConfigError, at_least, option, run_command
from data.examples import load_examples
from fake_policy import WEIGHTS, depths, fake_policy, shallow
from families import PatchRows, pictures_of
from footprint import Work
from loading import load_processor
from prompts import Prompt, encode_prompt
from train_rl import Config
from workloads import resident

GB = 10**9
CUDA_CONTEXT = 0.7 * GB  # assumed: PyTorch's users report 0.4 to 0.8 GB, by card and version
GAPS = 0.05  # assumed: share of what comes and goes that the allocator cannot use again
PARTS = (
    *("language model", "vision tower weights", "embeddings", "head", "adapter", "optimizer", "gradients"),
    *("pictures", "vision features", "prompt cache", "vision tower", "attention", "attention product"),
    *("feed-forward", "hidden states", "logits", "4-bit weights, unpacked", "backward", "checkpoint file, mapped"),
)
STAGES = ("evaluation", "sampling", "reference", "update", "optimizer step")


@dataclass
class Plan:
    """Planned bytes: of every stage the highest moment by part, and what it is held against."""

    config: Config
    prompt: Prompt
    prompt_origin: str
    work: Work
    stages: dict[str, dict[str, int]]  # "other update": gradient_checkpointing the other way
    multiply_adds: dict[str, int]  # of this process in one step, by stage
    overhead: dict[str, int]
    capacity: int
    device: str

    def bytes_of(self, stage: str) -> int:
        return sum(self.stages[stage].values())

    @property
    def highest(self) -> str:
        """The stage that wants most."""
        return max((name for name in self.stages if name != "other update"), key=self.bytes_of)

    @property
    def total(self) -> int:
        return self.bytes_of(self.highest) + sum(self.overhead.values())

    @property
    def group_tokens(self) -> int:
        return len(self.prompt.input_ids) + self.config.num_generations * self.config.max_new_tokens


# --- the largest prompt -------------------------------------------------------------------------------------------


def longest_example(config: Config, processor, examples) -> tuple[dict, str]:
    """The example with the longest prompt of a data set, and what to say about it."""
    example = examples[longest_prompt(processor, examples, config.system_prompt)]
    sizes = ", ".join(f"{image.width} x {image.height}" for image in example["images"])
    looked_at = min(len(examples), NUM_SCENES) if config.data.startswith("scenes") else len(examples)
    return example, f"example {example['id']!r}, picture {sizes}; the longest of {looked_at:,} of {config.data}"


def prompt_of_picture(model_config, processor, size: tuple[int, int], text_tokens: int) -> tuple[Prompt, str]:
    """A prompt of one picture and so many text tokens. Of Qwen's processors, the files about pictures are enough."""
    blank = Image.new("RGB", size)
    if processor.chat_template:
        encoded = encode_prompt(processor, {"image": blank, "question": "?", "boxes": []})
        inputs, count = encoded.model_inputs, len(encoded.image_token_index)
    elif pictures_of(processor) is PatchRows:
        inputs = dict(processor.image_processor(images=[blank], return_tensors="pt"))
        count = int(inputs["image_grid_thw"].prod()) // processor.image_processor.merge_size**2
    else:
        raise ConfigError(f"model of type {model_config.model_type!r}: give a folder that holds a tokenizer, too")
    ids = torch.tensor([model_config.image_token_id] * count + [0] * text_tokens)
    prompt = Prompt(ids, torch.arange(count), torch.ones(count), inputs)
    return prompt, f"one picture of {size[0]} x {size[1]} and {text_tokens} tokens of text"


def shaped_prompt(prompt: Prompt, model_config) -> Prompt:
    """The prompt without features and with positions that are of the right shape only: those of no family are asked."""
    axes = 3 if model_config.model_type.startswith("qwen") else 1
    positions = torch.arange(len(prompt.input_ids)).expand(axes, -1)
    return replace(prompt, position_ids=positions, image_features=None)


# --- planning -----------------------------------------------------------------------------------------------------


def make_plan(
    config: Config, model_config, prompt: Prompt, origin: str, groups: int, with_evaluation: bool, full: bool = False
) -> Plan:
    """Plan one process's step.

    Args:
        prompt, origin: the largest prompt, and where it comes from.
        groups: groups of this process in a step.
        full: trace every layer, instead of drawing a line through two depths.
    """
    on_gpu = config.memory_gb is not None or torch.cuda.is_available()
    size = len(prompt.input_ids) + config.num_generations * config.max_new_tokens
    is_packed = set(getattr(model_config.get_text_config(), "layer_types", None) or []) <= {"full_attention"}
    together = config.sampling_tokens * is_packed
    work = Work(shaped_prompt(prompt, model_config), groups, side_by_side(size, groups, together))
    if with_evaluation:
        counts = evaluated_side_by_side(len(prompt.input_ids), config, is_packed)
        work.evaluated, work.evaluated_side_by_side = counts
    layers = model_config.get_text_config().num_hidden_layers
    traced = [layers] if full else depths(model_config)
    found = []
    for depth in traced:
        policy = fake_policy(shallow(model_config, depth), config)
        live = footprint.trace_step(policy, work, config, on_gpu)
        found.append((live.peaks, dict(live.multiply_adds)))
    peaks, operations = found[0]
    if len(found) == 2:
        peaks, operations = (footprint.straight_line(*pair, layers - traced[0]) for pair in zip(*found, strict=True))
    stages: dict[str, dict] = {}
    for (stage, _), parts in peaks.items():
        stage = stage.partition(",")[0]
        if stage != "start" and sum(parts.values()) > sum(stages.get(stage, {}).values()):
            stages[stage] = parts
    multiply_adds = _per_step(operations, work, config)
    overhead, capacity, device = _machine(config, on_gpu, stages)
    return Plan(config, prompt, origin, work, stages, multiply_adds, overhead, capacity, device)


def _per_step(operations: dict[str, int], work: Work, config: Config) -> dict[str, int]:
    """Multiply-adds of a step's stages; a sampled token is taken to see its completion at full length."""
    token = operations.get("sampling, one token", 0) * (config.max_new_tokens - 1)
    return {
        "sampling": (operations["sampling"] + token) * work.groups // work.side_by_side,
        "reference": work.groups * operations.get("reference", 0),
        "update": work.groups * config.num_iterations * operations["update"],
    }


def _machine(config: Config, on_gpu: bool, stages: dict) -> tuple[dict[str, int], int, str]:
    """(overhead in bytes by name, bytes that there are, what the device is called)."""
    steps = [parts for stage, parts in stages.items() if stage != "other update"]
    coming = max(sum(size for part, size in parts.items() if part not in WEIGHTS) for parts in steps)
    gaps = {"gaps between tensors (assumed)": int(GAPS * coming)}
    if config.memory_gb is not None:
        size = f"a GPU of {config.memory_gb:g} GB (memory_gb)"
        return {"CUDA context (assumed)": int(CUDA_CONTEXT)} | gaps, int(config.memory_gb * GB), size
    if on_gpu:
        free, _ = torch.cuda.mem_get_info()  # the context is in place by then
        return gaps, free, f"{torch.cuda.get_device_name()}, free memory"
    used = resident("VmRSS")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"Python and libraries (measured)": used}, memory, "the CPU, whole memory of the machine"


# --- what to lower ------------------------------------------------------------------------------------------------


def changes(config: Config, plan: Plan) -> list[tuple[str, object]]:
    """What can be lowered, the harmless first; what a change leaves as it is does not appear."""
    found = []
    if not config.gradient_checkpointing:
        found.append(("gradient_checkpointing", True))
    if plan.highest in ("sampling", "evaluation") and config.sampling_tokens > plan.group_tokens:
        found.append(("sampling_tokens", plan.group_tokens))
    if getattr(config, "optimizer", "") == "adamw":
        found.append(("optimizer", "paged_adamw_8bit"))
    if not config.load_in_4bit:
        found.append(("load_in_4bit", True))
    return found


def halved(config: Config, plan: Plan) -> list[tuple[str, object]]:
    """The sizes of the work, each at half of what it is."""
    pixels = config.max_pixels or 32 * 32 * len(plan.prompt.image_token_index)
    found = [("max_pixels", pixels // 2)] if len(plan.prompt.image_token_index) > 64 else []
    if config.num_generations >= 4:
        found.append(("num_generations", config.num_generations // 2))
    if config.max_new_tokens >= 32:
        found.append(("max_new_tokens", config.max_new_tokens // 2))
    return found


def advice(plan: Plan, plan_again) -> str:
    """What to lower until it fits, every line on top of those above, each planned anew.

    plan_again: a function of a Config that gives a Plan.
    """
    lines, config, now = ["what to lower, each line on top of those above (planned):"], plan.config, plan
    for options in (changes, halved, halved, halved):
        if options is halved and sum(now.stages["update"].get(part, 0) for part in WEIGHTS) > now.capacity:
            break
        for name, value in options(config, now):
            if now.total <= now.capacity:
                break
            lower = plan_again(replace(config, **{name: value}))
            if lower.bytes_of(lower.highest) > 0.99 * now.bytes_of(now.highest):
                continue  # this is not what takes the memory
            config, now = replace(config, **{name: value}), lower
            shown = str(value).lower() if isinstance(value, bool) else value
            lines.append(f"  --{name} {shown}".ljust(38) + f"{now.total / GB:8.2f} GB in all, in the {now.highest}")
    fits = now.total <= now.capacity
    lines.append("then it fits" if fits else "and it still does not fit: take a smaller model or a larger card")
    return "\n".join(lines)


def planner(
    groups: int, picture=None, text_tokens: int = 0, example: dict | None = None, with_evaluation: bool = True
) -> Callable[[Config], Plan]:
    """A function that plans a Config: for a picture, an example, or the longest prompt of the config's data."""
    known = {}

    def plan(config: Config) -> Plan:
        model = config.policy_arguments(1)["model"]
        model_config, processor = load_processor(model, revision=config.revision, max_pixels=config.max_pixels)
        if picture:
            prompt, origin = prompt_of_picture(model_config, processor, picture, text_tokens)
        elif not processor.chat_template:
            raise ConfigError(
                f"model={config.model!r} holds no chat template, so no prompt can be counted: give --picture"
            )
        elif example or known:
            shown = example or known["example"]
            prompt, origin = encode_prompt(processor, shown, config.system_prompt), f"example {shown.get('id')!r}"
        else:
            examples = load_examples(config.data, **config.data_arguments(), require_boxes=config.needs_boxes)
            known["example"], origin = longest_example(config, processor, examples)
            prompt = encode_prompt(processor, known["example"], config.system_prompt)
        return make_plan(config, model_config, prompt, origin, groups, with_evaluation)

    return plan


def advice_for(config: Config, processor, example: dict, groups: int) -> str:
    """The plan's table and advice for a run whose biggest group, of this example, ran out of memory."""
    plan_again = planner(groups, example=example)
    plan = plan_again(config)
    if plan.total <= plan.capacity:  # others use the card, or the plan is wrong: lower it all the same
        plan.capacity = int(plan.total - 0.2 * plan.bytes_of(plan.highest))
    lowered = advice(plan, lambda other: replace(plan_again(other), capacity=plan.capacity))
    return f"{table(plan)}\n{lowered}"


# --- what is shown ------------------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """The plan as text, in GB."""
    config, prompt, work = plan.config, plan.prompt, plan.work
    G, C, P = config.num_generations, config.max_new_tokens, len(prompt.input_ids)
    stages = [name for name in STAGES if name in plan.stages]
    bits = "4-bit language model, " if config.load_in_4bit else ""
    unit, name = (GB, "GB") if plan.bytes_of(plan.highest) >= GB else (GB // 1000, "MB")
    lines = [
        f"plan of {config.model} ({bits}dtype {config.dtype}) on {plan.device}; computed from shapes, nothing measured",
        f"largest prompt  {P:,} tokens, {len(prompt.image_token_index):,} of pictures: {plan.prompt_origin}",
        f"largest group   {P:,} + {G} x {C} = {plan.group_tokens:,} tokens; {work.side_by_side} of {work.groups} "
        "groups side by side while sampling",
        "",
        name.ljust(28) + "".join(f"{stage:>16}" for stage in stages),
    ]
    for part in (*PARTS, *sorted({part for stage in stages for part in plan.stages[stage]} - {*PARTS})):
        sizes = [plan.stages[stage].get(part, 0) / unit for stage in stages]
        if max(sizes) >= 0.0005:
            lines.append(part.ljust(28) + "".join(f"{max(0, size):16.3f}" for size in sizes))
    lines.append("in all".ljust(28) + "".join(f"{plan.bytes_of(stage) / unit:16.3f}" for stage in stages))
    lines.append("")
    lines += [f"{name.ljust(28)}{size / unit:16.3f}" for name, size in plan.overhead.items()]
    highest = f"highest, in the {plan.highest}".ljust(28)
    lines.append(f"{highest}{plan.total / unit:16.3f}  of {plan.capacity / unit:.3f}")
    names = ("update", "other update") if config.gradient_checkpointing else ("other update", "update")
    with_it, without = (plan.bytes_of(stage) / unit for stage in names)
    lines.append(f"update with gradient_checkpointing {with_it:.3f}, without {without:.3f}")
    tokens = plan.group_tokens * config.groups_per_step
    counts = {name: count * config.groups_per_step / work.groups / 10**12 for name, count in plan.multiply_adds.items()}
    lines.append(
        f"a step: {tokens:,} packed tokens in {config.groups_per_step} groups, {sum(counts.values()):,.4g} x 10^12 "
        f"multiply-adds ({', '.join(f'{name} {count:,.3g}' for name, count in counts.items())})"
    )
    left = plan.capacity - plan.total
    lines.append(f"fits: {left / GB:.2f} GB are left" if left >= 0 else f"does not fit: {-left / GB:.2f} GB too much")
    return "\n".join(lines)


def show_plan(config: Config, picture: tuple[int, int] | None = None, text_tokens: int = 0, processes: int = 0) -> Plan:
    """Print the plan of one process, and what to lower where it does not fit."""
    state = PartialState()
    num_processes = processes or state.num_processes
    groups = max(1, config.groups_per_step // num_processes)
    plan_again = planner(groups, picture, text_tokens)
    plan = plan_again(config)
    if state.is_main_process:
        print(table(plan))
        if plan.total > plan.capacity:
            print(advice(plan, plan_again))
    return plan


# --- command line -------------------------------------------------------------------------------------------------


@dataclass
class PlanConfig(Config):
    """Plan the memory of a training run, whose settings are those of train_rl.py, and check the plan by measuring."""

    picture: str | None = option(None, "Plan for one picture of this size, such as 1024x768, instead of for the data.")
    text_tokens: int = option(160, "Beside the picture: tokens of the system prompt, the question and the template.")
    processes: int = option(1, "Processes that share a step's groups, one to a card.")
    measure: bool = option(False, "Load the policy, run two steps on the largest prompt, and compare peak and plan.")
    check: bool = option(False, "Plan and measure small models of seven shapes on this machine.")

    def problems(self) -> list[str]:
        found = super().problems() + at_least(self, 1, "text_tokens", "processes")
        if self.picture is not None and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", self.picture):
            found.append(f"picture={self.picture!r}: give width and height in pixels, such as 1024x768")
        if self.measure and self.picture:
            found.append("measure runs on real examples: give --data and leave --picture out")
        return found


def main(config: PlanConfig) -> None:
    from measure_plan import check_plans, measure_one  # which plans, too

    if config.check:
        print(check_plans())
    elif config.measure:
        print(measure_one(config))
    else:
        size = config.picture and tuple(map(int, config.picture.split("x")))
        show_plan(config, size, config.text_tokens, config.processes)


if __name__ == "__main__":
    run_command(PlanConfig, main)
