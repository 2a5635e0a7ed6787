"""Time and memory of one GRPO step: sayo, its padded layout, and TRL's GRPOTrainer on the same work.

    python -m tools.bench                              # one comparison: a table, bench.json and bench.png
    python -m tools.bench --shape deep                 # a deeper, narrower model and a smaller group
    python -m tools.bench --device cuda --shape 2B     # on a card: real sizes with random weights, 16-bit
    python -m tools.bench --device cuda --shape 8B --load_in_4bit
    python -m tools.bench --sweep --variants packed trl --output sweep.json       # how the cost grows, and sweep.png
    python -m tools.bench --sampling --image_tokens 64 --num_generations 8 --max_new_tokens 32    # groups side by side
    python -m tools.bench --probe --repeats 9          # what reading the attention costs
    python -m tools.bench --launches --num_layers 36 --hidden_size 128 --image_tokens 64    # kernels of a token

Every variant runs in its own process with one thread, on the same random Qwen3-VL-class model, picture, group size and
completion length (no completion ends early), LoRA on the language model and KL term. sayo's step includes the attention
reward; TRL's reward is a constant. sayo's stages are rollout, reference, score (the forward that serves rewards and
loss) and update (loss, backward, optimizer). The floor is the step's multiply-adds at the speed of one large matrix
product on this machine, measured between the steps; that of decoding is its matrix products alone or, on a card, the
memory that they read.
"""

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sayo.memory_plan.plan import planner
from sayo.model.sampling.cache import CPU_SAMPLING_TOKENS
from sayo.settings import Settings, no_bar, option, run_command
from sayo.show.plots import drawing
from sayo.show.tables import markdown
from tools.workloads import (
    PROMPT_TEXT,
    RANK,
    STAGES,
    build_model,
    example,
    fixed_lengths,
    in_child,
    matrix_speed,
    multiply_adds,
)

VARIANTS = ("packed", "padded", "trl", "trl with vLLM")
SIZES = ("hidden_size", "num_layers", "vocab_size", "image_tokens", "num_generations", "max_new_tokens")
SHAPES = {
    name: dict(zip(SIZES, sizes, strict=True))
    for name, sizes in {
        "wide": (384, 8, 480, 1024, 16, 110),
        "deep": (576, 30, 480, 324, 8, 64),
        "2B": (2048, 28, 151936, 928, 16, 110),
        "4B": (2560, 36, 151936, 928, 16, 110),
        "8B": (4096, 36, 151936, 928, 16, 110),
    }.items()
}
SWEEPS = {
    "image_tokens": (64, 128, 256, 512, 1024, 2048),
    "num_generations": (2, 4, 8, 16, 32),
    "max_new_tokens": (16, 32, 64, 110, 256),
}


@dataclass
class BenchConfig(Settings):
    """Measure time and memory of one GRPO step of sayo and of TRL on a small random model."""

    variants: list[str] = option(
        ["packed", "padded", "trl"], "What to measure: packed and padded (both sayo), trl, 'trl with vLLM'."
    )
    shape: str = option("wide", "Sizes of model and work, from which the options below differ.", choices=SHAPES)
    device: str = option("cpu", "Where to measure; cuda computes in 16-bit.", choices=("cpu", "cuda"))
    load_in_4bit: bool = option(False, "NF4 weights for the language model.")
    image_tokens: int = option(0, "Image tokens of the prompt; 0 takes the shape's, here and below.", at_least=0)
    num_generations: int = option(0, "Completions of the group.", at_least=0)
    max_new_tokens: int = option(0, "Tokens of each completion.", at_least=0)
    hidden_size: int = option(0, "Width of the language model, a multiple of 64.", at_least=0)
    num_layers: int = option(0, "Layers of the language model.", at_least=0)
    vocab_size: int = option(0, "Rows of the head; the embedded tokenizer uses 480.", at_least=0)
    repeats: int = option(3, "Timed steps, after one that is not timed; medians are reported.", at_least=1)
    threads: int = option(1, "Threads of each process.", at_least=1)
    sweep: bool = option(False, "Vary image tokens, group size and completion length one at a time instead.")
    sampling: bool = option(False, "Sample 1 to 32 groups side by side instead: sampled tokens per second.")
    probe: bool = option(False, "Time the scoring forward with and without the attention probe instead.")
    launches: bool = option(False, "Count the kernels of a decoding step, here and in transformers, instead.")
    output: str = option("bench.json", "JSON file to write; except for the probe, a plot of it is written beside it.")

    def __post_init__(self):
        for name, size in SHAPES.get(self.shape, {}).items():
            setattr(self, name, getattr(self, name) or size)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.device == "cuda" and not torch.cuda.is_available():
            found.append("device='cuda': torch sees no card here")
        if self.num_generations == 1:
            found.append("num_generations=1: give 2 or more")
        if "trl with vLLM" in self.variants and not find_spec("vllm"):
            found.append("variants=trl with vLLM: pip install vllm")
        if wrong := [name for name in self.variants if name not in VARIANTS]:
            found.append(f"variants={' '.join(wrong)}: valid are {' '.join(VARIANTS)}")
        if self.hidden_size % 64:
            found.append(f"hidden_size={self.hidden_size}: give a multiple of 64")
        return found


def measure(config: BenchConfig, variant: str, folder: Path) -> dict:
    """One variant (or "probe", "sampling") measured in its own process; medians over the steps."""
    job = asdict(config), str(folder), variant
    found = in_child("tools.workloads", "measure_variant", *job, OMP_NUM_THREADS=str(config.threads))
    if "steps" not in found:
        return found
    timed = found["steps"][1:]
    seconds = {name: statistics.median(step[name] for step in timed) for name in timed[0]}
    result = {"matrix_speed": seconds.pop("matrix_speed")} if "matrix_speed" in seconds else {}
    result |= {name: found[name] for name in ("baseline_megabytes", "peak_megabytes", "least_step") if name in found}
    sampled = config.num_generations * config.max_new_tokens
    return result | {"seconds": seconds, "tokens_per_second": sampled / seconds["step"]}


def compare(config: BenchConfig, folder: Path, parameters: dict) -> dict:
    """All variants at one setting, and the floor at the machine's speed while the first of them ran."""
    results = {variant: measure(config, variant, folder) for variant in config.variants}
    speed = results[config.variants[0]].get("matrix_speed") or matrix_speed(config.device)
    counts = multiply_adds(config, parameters, config.image_tokens + PROMPT_TEXT)
    floor = {name: count / speed for name, count in counts.items()}
    setting = {name: getattr(config, name) for name in SWEEPS}
    found = {"setting": setting, "device": config.device, "matrix_speed": speed, "floor_seconds": floor}
    if config.device == "cuda":
        found["planned_megabytes"] = planned(config, folder) / 1e6
    return found | {"results": results}


def planned(config: BenchConfig, folder: Path) -> int:
    """Bytes of tensors at the peak of the step, as tools.plan counts them for a card of 80 GB."""
    from train_rl import Config

    options = {"load_in_4bit": config.load_in_4bit, "lora_rank": RANK, "groups_per_step": 1, "memory_gb": 80}
    settings = Config(model=str(folder), top_p=1.0, **options, **fixed_lengths(config))
    plan = planner(1, example=example(config), with_evaluation=False)(settings)
    return plan.bytes_of(plan.highest)


def stages(seconds: dict[str, float]) -> list[str]:
    """Cells of the table for each stage: its seconds, and those of the rollout's parts."""
    parts = [f"{name.removeprefix('rollout: ')} {value:.2f}" for name, value in seconds.items() if ": " in name]
    cells = [f"{seconds[name]:.2f}" if name in seconds else "" for name in STAGES]
    return [cells[0] + f" ({', '.join(parts)})" * bool(parts), *cells[1:]]


def table(compared: dict) -> str:
    """The comparison in Markdown, and what it means relative to the machine."""
    floor, results, setting = compared["floor_seconds"], compared["results"], compared["setting"]
    rows = []
    for variant, found in results.items():
        whole, peak = found["seconds"]["step"], found["peak_megabytes"]
        memory = f"{peak / 1000:.2f} (+{(peak - found['baseline_megabytes']) / 1000:.2f})"
        rows.append([variant, f"{whole:.2f}", *stages(found["seconds"]), f"{found['tokens_per_second']:.0f}", memory])
    rows.append(["floor", f"{sum(floor[stage] for stage in STAGES):.2f}", *stages(floor), "", ""])
    head = ["", "s a step", *STAGES, "tokens / s", "peak GB (above start)"]
    lines = [", ".join(f"{name}={value}" for name, value in setting.items()), "", markdown(head, rows), ""]
    lines.append(f"floor: multiply-adds at {compared['matrix_speed'] / 1e9:.0f} G a second")
    if "packed" in results:
        seconds, found = results["packed"]["seconds"], results["packed"]
        ours, least = (sum(part[stage] for stage in STAGES[1:]) for part in (seconds, floor))
        lines.append(
            f"reference, score and update: {ours / (least + floor['separate scoring']):.2f} x the multiply-adds of "
            f"three forwards and a backward, {ours / least:.2f} x those of the two forwards and the backward that run"
        )
        if "least_step" in found:
            step = seconds["rollout: decoding"] / setting["max_new_tokens"]
            kind = "memory that it reads" if compared["device"] == "cuda" else "matrix products"
            ratio = step / found["least_step"]
            lines.append(f"a decoding step: {1000 * step:.1f} ms, {ratio:.2f} x its {kind} at this machine's speed")
    for variant in set(results) & {"trl", "trl with vLLM"} if "packed" in results else ():
        time_ratio = results[variant]["seconds"]["step"] / results["packed"]["seconds"]["step"]
        memory_ratio = results[variant]["peak_megabytes"] / results["packed"]["peak_megabytes"]
        lines.append(f"{variant} / packed: {time_ratio:.1f} x the time, {memory_ratio:.1f} x the peak memory")
    if "planned_megabytes" in compared:
        lines.append(f"peak planned by tools.plan: {compared['planned_megabytes'] / 1000:.2f} GB")
    return "\n".join(lines)


def linearity(points: list[dict]) -> str:
    """How well a straight line over packed tokens, P + G C, fits the times of a sweep."""
    sizes, lines = [point["setting"] for point in points], []
    tokens = np.array([size["image_tokens"] + size["num_generations"] * size["max_new_tokens"] for size in sizes])
    for name, parts in ((" + ".join(STAGES[1:]), STAGES[1:]), ("whole step", ("step",))):
        seconds = [point["results"]["packed"]["seconds"] for point in points]
        seconds = np.array([sum(one[part] for part in parts) for one in seconds])
        slope, start = np.polyfit(tokens, seconds, 1)
        explained = 1 - np.var(seconds - slope * tokens - start) / np.var(seconds)
        lines.append(f"{name}: {start:.2f} s + {1000 * slope:.2f} ms a packed token, R² {explained:.3f}")
    return "\n".join(lines)


def plot_comparison(compared: dict, output: Path) -> None:
    """Bars of every variant: seconds of a step by stage, and peak memory."""
    results = compared["results"]
    colors = dict(zip(STAGES, ("#4477aa", "#ccbb44", "#66ccee", "#228833"), strict=True))
    with drawing(output, 1, 2, (4.5, 1.2 + 0.5 * len(results))) as ((left, right),):
        for variant, found in results.items():
            begin, parts = 0.0, {name: found["seconds"][name] for name in STAGES if name in found["seconds"]}
            for name, value in (parts or {"step": found["seconds"]["step"]}).items():
                color, label = colors.get(name, "#888888"), f"{variant}: {name} {value:.1f} s"
                left.barh(variant, value, left=begin, color=color, label=label)
                begin += value
            right.barh(variant, found["peak_megabytes"] / 1000, color="#888888")
        left.axvline(
            sum(compared["floor_seconds"][stage] for stage in STAGES),
            color="black",
            linestyle="--",
            label="multiply-adds",
        )
        for axis, label in ((left, "seconds / step"), (right, "peak memory, GB")):
            axis.set_xlabel(label)
            axis.invert_yaxis()
        left.legend(fontsize=7)


def plot_sweep(points: list[dict], output: Path) -> None:
    """Seconds, floor and peak memory against each of the three sizes."""
    with drawing(output, 2, len(SWEEPS), (4.2, 3.2)) as axes:
        for name, (top, bottom) in zip(SWEEPS, axes.T, strict=True):
            chosen = sorted((p for p in points if p["sweep"] == name), key=lambda p: p["setting"][name])
            sizes = [point["setting"][name] for point in chosen]
            for variant in chosen[0]["results"]:
                found = [point["results"][variant] for point in chosen]
                top.plot(sizes, [one["seconds"]["step"] for one in found], marker="o", label=variant)
                bottom.plot(sizes, [one["peak_megabytes"] for one in found], marker="o", label=variant)
            floors = [sum(point["floor_seconds"][stage] for stage in STAGES) for point in chosen]
            top.plot(sizes, floors, "k--", label="multiply-adds")
            top.set(ylabel="seconds / step", xscale="log", yscale="log")
            bottom.set(xlabel=name.replace("_", " "), ylabel="peak MB", xscale="log", ylim=(0, None))
            for axis in (top, bottom):
                axis.set_xticks(sizes, sizes)
                axis.minorticks_off()
            top.legend()


def plot_sampling(points: list[dict], output: Path) -> None:
    """Sampled tokens per second against packed tokens; each point is labelled with its number of groups."""
    with drawing(output, 1, 1, (5.6, 3.4)) as ((axis,),):
        axis.plot([point["packed_tokens"] for point in points], [point["tokens_per_second"] for point in points], "o-")
        for point in points:
            place = point["packed_tokens"], point["tokens_per_second"]
            axis.annotate(point["groups"], place, textcoords="offset points", xytext=(4, -11), fontsize=8)
        axis.axvline(CPU_SAMPLING_TOKENS, color="black", linestyle="--", label="default of sampling_tokens")
        axis.set(xlabel="packed tokens of the groups side by side", ylabel="sampled tokens / s")
        axis.set(xscale="log", ylim=(0, None))
        axis.legend(fontsize=8, loc="lower right")


def measured_before(config: BenchConfig) -> list[dict]:
    """The points that an interrupted sweep with the same settings has left in its output."""
    path = Path(config.output)
    former = json.loads(path.read_text(encoding="utf-8")) if config.sweep and path.exists() else {}
    is_same = former.get("config", {}) | asdict(config) == former.get("config")  # which may have further fields
    return former["points"] if is_same else []


def main(config: BenchConfig) -> None:
    torch.set_num_threads(config.threads)
    output, points = Path(config.output), measured_before(config)
    settings = [(None, config)]
    if config.sweep:
        settings = [(name, replace(config, **{name: size})) for name, sizes in SWEEPS.items() for size in sizes]
    with tempfile.TemporaryDirectory() as folder:
        parameters = build_model(config, Path(folder))
        print(f"{sum(parameters[name] for name in ('text', 'vision', 'head')) / 1e6:.1f} M parameters")
        if only := next((name for name in ("sampling", "probe", "launches") if getattr(config, name)), None):
            found = measure(config, only, Path(folder))
            output.write_text(json.dumps({"config": asdict(config)} | found, indent=1), encoding="utf-8")
            if config.sampling:
                plot_sampling(found["points"], output.with_suffix(".png"))
            print(f"{found['text']}\n-> {output}" + f", {output.with_suffix('.png')}" * config.sampling)
            return
        for name, setting in tqdm(settings[len(points) :], desc="bench", disable=no_bar(len(settings) == 1)):
            points.append(compare(setting, Path(folder), parameters) | {"sweep": name})
            print(table(points[-1]), flush=True)
            output.write_text(json.dumps({"config": asdict(config), "points": points}, indent=1), encoding="utf-8")
    if not config.sweep:
        plot_comparison(points[0], output.with_suffix(".png"))
    else:
        plot_sweep(points, output.with_suffix(".png"))
        if "packed" in config.variants:
            print(linearity(points))
    print(f"-> {output}, {output.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(BenchConfig, main)
