"""Will a run fit, and if not, what to lower: planned from shapes before any weight is loaded.

A GB is 10^9 bytes. footprint.py counts the bytes. The CUDA context and the allocator's gaps cannot be counted: they are
assumed, and labelled so. `train_rl.py --plan` and `python -m tools.plan` print the plan.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

from sayo.examples.load import load_examples
from sayo.memory_plan.fake_policy import WEIGHTS, depths, fake_policy, shallow, weights_by_part
from sayo.memory_plan.footprint import Work, straight_line, trace_step
from sayo.memory_plan.longest import evaluated_at_a_time, longest_prompt, num_searched, side_by_side
from sayo.model.families import PatchRows, pictures_of
from sayo.model.forward import compute_dtype
from sayo.model.loading import load_processor
from sayo.model.prompts import Prompt, encode_prompt
from sayo.model.sampling.cache import CPU_SAMPLING_TOKENS, groups_that_fit
from sayo.run.processes import launched
from sayo.settings import ConfigError

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
    """Planned bytes: the peak of every stage by part, and the memory that there is."""

    config: object  # with the fields of train_rl.Config
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
        """The stage with the highest peak."""
        return max((name for name in self.stages if name != "other update"), key=self.bytes_of)

    @property
    def total(self) -> int:
        return self.bytes_of(self.highest) + sum(self.overhead.values())

    @property
    def group_tokens(self) -> int:
        return len(self.prompt.input_ids) + self.config.num_generations * self.config.max_new_tokens


def prompt_of_picture(model_config, processor, size: tuple[int, int], text_tokens: int) -> tuple[Prompt, str]:
    """A prompt of one picture and so many text tokens; Qwen's processors need only their files about pictures."""
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
    """The prompt without features, and with positions of the right shape only, so that no family must compute them."""
    axes = 3 if model_config.model_type.startswith("qwen") else 1
    positions = torch.arange(len(prompt.input_ids)).expand(axes, -1)
    return replace(prompt, position_ids=positions, image_features=None)


def make_plan(config, model_config, prompt: Prompt, origin: str, groups: int, with_evaluation: bool) -> Plan:
    """Plan a step of one process with so many groups of this prompt."""
    on_gpu = config.memory_gb is not None or torch.cuda.is_available()
    text_config, traced = model_config.get_text_config(), depths(model_config)
    policies = [fake_policy(shallow(model_config, depth), config) for depth in traced]
    layers_left = text_config.num_hidden_layers - traced[0]

    def together(num_groups: int, num_generations: int) -> int:
        """Groups that share a cache while they are sampled, as rollout.sample_groups will choose."""
        if set(getattr(text_config, "layer_types", None) or []) - {"full_attention"}:
            return 1
        sizes, tokens = (len(prompt.input_ids), num_generations, config.max_new_tokens), config.sampling_tokens
        if on_gpu and not tokens:
            taken = [sum(part.nbytes for parts in weights_by_part(one).values() for part in parts) for one in policies]
            free = _card(config)[0] - straight_line(taken[0], taken[-1], layers_left)
            dtype = compute_dtype(policies[0])
            return min(num_groups, groups_that_fit(text_config, max(0, free), *sizes, dtype, config.load_in_4bit))
        return side_by_side(sizes[0] + sizes[1] * sizes[2], num_groups, tokens or CPU_SAMPLING_TOKENS)

    evaluated = evaluated_at_a_time(config) if with_evaluation else 0
    sampled = together(groups, config.num_generations), evaluated, together(evaluated, 1) if evaluated else 0
    work = Work(shaped_prompt(prompt, model_config), groups, *sampled)
    lives = [trace_step(policy, work, config, on_gpu) for policy in policies]
    first, last = lives[0], lives[-1]
    stages: dict[str, dict] = {}
    for (stage, _), parts in straight_line(first.peaks, last.peaks, layers_left).items():
        stage = stage.partition(",")[0]
        if stage != "start" and sum(parts.values()) > sum(stages.get(stage, {}).values()):
            stages[stage] = parts
    counts = straight_line(first.multiply_adds, last.multiply_adds, layers_left)
    # Each sampled token is taken to see its completion at full length.
    sampled = counts["sampling"] + counts.get("sampling, one token", 0) * (config.max_new_tokens - 1)
    multiply_adds = {
        "sampling": sampled * groups // work.side_by_side,
        "reference": groups * counts.get("reference", 0),
        "update": groups * config.num_iterations * counts["update"],
    }
    return Plan(config, prompt, origin, work, stages, multiply_adds, *_machine(config, on_gpu, stages))


def _machine(config, on_gpu: bool, stages: dict) -> tuple[dict[str, int], int, str]:
    """(overhead in bytes by name, bytes that there are, name of the device)."""
    steps = [parts for stage, parts in stages.items() if stage != "other update"]
    coming = max(sum(size for part, size in parts.items() if part not in WEIGHTS) for parts in steps)
    gaps = {"gaps between tensors (assumed)": int(GAPS * coming)}
    if on_gpu:
        free, context, name = _card(config)
        return context | gaps, free + sum(context.values()), name
    used = resident("VmRSS")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"Python and libraries (measured)": used}, memory, "the CPU, whole memory of the machine"


def _card(config) -> tuple[int, dict[str, int], str]:
    """Bytes that a card has for tensors, what else there is on it, and its name."""
    if config.memory_gb is None:
        free, _ = torch.cuda.mem_get_info()  # the context is in place by then
        return free, {}, f"{torch.cuda.get_device_name()}, free memory"
    context = int(CUDA_CONTEXT)
    name = f"a GPU of {config.memory_gb:g} GB (memory_gb)"
    return int(config.memory_gb * GB) - context, {"CUDA context (assumed)": context}, name


def resident(name: str) -> int:
    """Resident bytes of this process: "VmRSS" now, "VmHWM" at the peak (the peak for both without Linux' /proc).

    getrusage alone would not do: the peak of a new process begins with that of its parent.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status.read_text(encoding="utf-8")).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lower(config, plan: Plan, halve: bool) -> list[tuple[str, object]]:
    """What lowers the peak: settings not set yet, the harmless ones first; or the sizes of the work, halved."""
    if halve:
        pictures, G, C = len(plan.prompt.image_token_index), config.num_generations, config.max_new_tokens
        pixels = config.max_pixels or 32 * 32 * pictures
        sizes = (pictures > 64, "max_pixels", pixels), (G >= 4, "num_generations", G), (C >= 32, "max_new_tokens", C)
        return [(name, size // 2) for is_large, name, size in sizes if is_large]
    is_sampling = plan.highest in ("sampling", "evaluation")
    options = (
        (not config.gradient_checkpointing, "gradient_checkpointing", True),
        (is_sampling and _side_by_side(plan) > 1, "sampling_tokens", plan.group_tokens),
        (config.optimizer == "adamw", "optimizer", "paged_adamw_8bit"),
        (not config.load_in_4bit, "load_in_4bit", True),
    )
    return [(name, value) for helps, name, value in options if helps]


def _side_by_side(plan: Plan) -> int:
    return max(plan.work.side_by_side, plan.work.evaluated_side_by_side)


def advice(plan: Plan, plan_again: Callable[..., Plan]) -> str:
    """What to lower until it fits, each line on top of those above, each planned anew by plan_again(config)."""
    lines, config, now = ["what to lower, each line on top of those above (planned):"], plan.config, plan
    for halve in (False, True, True, True):
        if halve and sum(now.stages["update"].get(part, 0) for part in WEIGHTS) > now.capacity:
            break
        for name, value in lower(config, now, halve):
            if now.total <= now.capacity:
                break
            lowered = plan_again(replace(config, **{name: value}))
            if lowered.bytes_of(lowered.highest) > 0.99 * now.bytes_of(now.highest):
                continue  # this is not what takes the memory
            config, now = lowered.config, lowered
            shown = str(value).lower() if isinstance(value, bool) else value
            lines.append(f"  --{name} {shown}".ljust(38) + f"{now.total / GB:8.2f} GB in all, in the {now.highest}")
    fits = now.total <= now.capacity
    lines.append("then it fits" if fits else "and it still does not fit: take a smaller model or a larger card")
    return "\n".join(lines)


def planner(
    groups: int, picture=None, text_tokens: int = 0, example: dict | None = None, with_evaluation: bool = True
) -> Callable[..., Plan]:
    """A function that plans a config: for a picture, an example, or the longest prompt of the config's data."""
    longest = [(example, f"example {example.get('id')!r}")] if example else []  # else searched once

    def plan(config) -> Plan:
        model = config.policy_arguments(1)["model"]
        names = ("revision", "max_pixels", "chat_template_kwargs")
        model_config, processor = load_processor(model, **{name: getattr(config, name) for name in names})
        if picture:
            prompt, origin = prompt_of_picture(model_config, processor, picture, text_tokens)
        elif not processor.chat_template:
            raise ConfigError(f"model={config.model!r} holds no chat template, so no prompt is counted: give --picture")
        else:
            if not longest:
                examples = load_examples(config.data, **config.data_arguments(), require_boxes=config.needs_boxes)
                shown = examples[longest_prompt(processor, examples, config.system_prompt)]
                sizes = ", ".join(f"{image.width} x {image.height}" for image in shown["images"])
                searched = f"the longest of {num_searched(examples):,} of {config.data}"
                longest.append((shown, f"example {shown['id']!r}, picture {sizes}; {searched}"))
            ((shown, origin),) = longest
            prompt = encode_prompt(processor, shown, config.system_prompt)
        return make_plan(config, model_config, prompt, origin, groups, with_evaluation)

    return plan


def advice_for(config, processor, example: dict, groups: int) -> str:
    """Plan and advice for a run whose largest step, of this example, ran out of memory."""
    plan_again = planner(groups, example=example)
    plan = plan_again(config)
    if plan.total <= plan.capacity:  # others use the card, or the plan is wrong: lower it all the same
        plan.capacity = int(plan.total - 0.2 * plan.bytes_of(plan.highest))
    return f"{table(plan)}\n{advice(plan, lambda other: replace(plan_again(other), capacity=plan.capacity))}"


def table(plan: Plan) -> str:
    """The plan as text, in GB."""
    config, prompt, work, P = plan.config, plan.prompt, plan.work, len(plan.prompt.input_ids)
    stages = [name for name in STAGES if name in plan.stages]
    bits = "4-bit language model, " if config.load_in_4bit else ""
    unit, name = (GB, "GB") if plan.bytes_of(plan.highest) >= GB else (GB // 1000, "MB")

    def row(label: str, *sizes: int) -> str:
        return label.ljust(28) + "".join(f"{max(0, size) / unit:16.3f}" for size in sizes)

    lines = [
        f"plan of {config.model} ({bits}dtype {config.dtype}) on {plan.device}; computed from shapes, nothing measured",
        f"largest prompt  {P:,} tokens, {len(prompt.image_token_index):,} of pictures: {plan.prompt_origin}",
        f"largest group   {P:,} + {config.num_generations} x {config.max_new_tokens} = {plan.group_tokens:,} tokens; "
        f"{work.side_by_side} of {work.groups} groups side by side while sampling",
        "",
        name.ljust(28) + "".join(f"{stage:>16}" for stage in stages),
    ]
    for part in (*PARTS, *sorted({part for stage in stages for part in plan.stages[stage]} - {*PARTS})):
        sizes = [plan.stages[stage].get(part, 0) for stage in stages]
        if max(sizes) >= 0.0005 * unit:
            lines.append(row(part, *sizes))
    lines += [row("in all", *map(plan.bytes_of, stages)), ""]
    lines += [row(name, size) for name, size in plan.overhead.items()]
    lines.append(row(f"highest, in the {plan.highest}", plan.total) + f"  of {plan.capacity / unit:.3f}")
    names = ("update", "other update") if config.gradient_checkpointing else ("other update", "update")
    with_it, without = (plan.bytes_of(stage) / unit for stage in names)
    lines.append(f"update with gradient_checkpointing {with_it:.3f}, without {without:.3f}")
    tokens = plan.group_tokens * config.groups_per_step
    counts = {name: count * config.groups_per_step / work.groups / 10**12 for name, count in plan.multiply_adds.items()}
    by_stage = ", ".join(f"{name} {count:,.3g}" for name, count in counts.items())
    packed = f"{tokens:,} packed tokens in {config.groups_per_step} groups"
    lines.append(f"a step: {packed}, {sum(counts.values()):,.4g} x 10^12 multiply-adds ({by_stage})")
    left = plan.capacity - plan.total
    lines.append(f"fits: {left / GB:.2f} GB are left" if left >= 0 else f"does not fit: {-left / GB:.2f} GB too much")
    return "\n".join(lines)


def show_plan(config, picture: tuple[int, int] | None = None, text_tokens: int = 0, processes: int = 0) -> Plan:
    """Print the plan of one process, and what to lower where it does not fit."""
    with launched():
        state = PartialState()
    groups = max(1, config.groups_per_step // (processes or state.num_processes))
    plan_again = planner(groups, picture, text_tokens)
    plan = plan_again(config)
    if state.is_main_process:
        print(table(plan))
        if plan.total > plan.capacity:
            print(advice(plan, plan_again))
    return plan
