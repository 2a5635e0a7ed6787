"""How fast and how lean one GRPO step is: this project, its padded layout, and TRL's GRPOTrainer on the same work.

    python bench.py                              # one comparison, a table and bench.json
    python bench.py --sweep --variants packed trl --output sweep.json       # how the cost grows, and sweep.png
    python bench.py --sampling --image_tokens 64 --num_generations 8 --max_new_tokens 32    # groups side by side
    python bench.py --probe --repeats 9         # what reading the attention costs

Every variant runs in a process of its own: the same random Qwen3-VL-class model (18 M parameters), the same
picture, group size and completion length (no completion ends early), the same LoRA on the language model, a KL term,
one thread. This project's step includes the attention reward; TRL's reward is a constant. The floor is the step's own
multiply-adds at the speed that this machine reaches in one large matrix product.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from tqdm import tqdm

from config import ConfigError, PolicyConfig, at_least, option, run_command
from workloads import (
    PROMPT_TEXT,
    build_model,
    matrix_speed,
    measure_probe,
    measure_sampling,
    measure_sayo,
    measure_trl,
    multiply_adds,
)

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (a backend without a window has to be chosen first)

VARIANTS = ("packed", "padded", "trl")
SWEEPS = {
    "image_tokens": (64, 128, 256, 512, 1024, 2048),
    "num_generations": (2, 4, 8, 16, 32),
    "max_new_tokens": (16, 32, 64, 110, 256),
}


@dataclass
class BenchConfig:
    """Measure one GRPO step of this project beside others."""

    variants: list[str] = option(list(VARIANTS), "What to measure: packed, padded (both this project) and trl.")
    image_tokens: int = option(1024, "Image tokens of the prompt.")
    num_generations: int = option(16, "Completions of the group.")
    max_new_tokens: int = option(110, "Tokens of each completion.")
    hidden_size: int = option(384, "Width of the language model.")
    num_layers: int = option(8, "Layers of the language model.")
    vocab_size: int = option(480, "Rows of the head; the embedded tokenizer uses the first 480.")
    repeats: int = option(3, "Steps that are timed, after one that is not; the median counts.")
    threads: int = option(1, "Threads of each process.")
    sweep: bool = option(False, "Vary image tokens, group size and completion length one at a time instead.")
    sampling: bool = option(False, "Sample 1 to 32 groups side by side instead: sampled tokens per second.")
    probe: bool = option(False, "Time the scoring forward with and without the attention probe instead.")
    output: str = option("bench.json", "JSON to write; a picture of it (but of the probe) is written beside it.")
    worker: str | None = option(None, "Internal: measure this variant in this process, on the model in this folder.")

    def problems(self) -> list[str]:
        found = at_least(self, 1, "image_tokens", "max_new_tokens", "num_layers", "repeats", "threads")
        found += at_least(self, 2, "num_generations") + at_least(self, 480, "vocab_size")
        known = (*VARIANTS, *(("probe", "sampling") if self.worker else ()))
        if wrong := [name for name in self.variants if name not in known]:
            found.append(f"variants={' '.join(wrong)}: valid are {' '.join(VARIANTS)}")
        if self.hidden_size < 64 or self.hidden_size % 64:
            found.append(f"hidden_size={self.hidden_size}: give a multiple of 64")
        return found


# --- command line ------------------------------------------------------------------------------------------------


def measure(config: BenchConfig, variant: str, folder: Path) -> dict:
    """Run one variant (or "probe", "sampling") in a process of its own; of steps, the medians."""
    fields = asdict(replace(config, worker=str(folder), variants=[variant], sweep=False))
    flags = []
    for name, value in fields.items():
        if value is not None and name != "output":
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ConfigError(f"variant {variant} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "steps" not in found:
        return found
    timed = found["steps"][1:]
    seconds = {name: statistics.median(step[name] for step in timed) for name in timed[0]}
    sampled = config.num_generations * config.max_new_tokens
    speed = {"matrix_speed": seconds.pop("matrix_speed")} if "matrix_speed" in seconds else {}
    return (
        {"seconds": seconds, "tokens_per_second": sampled / seconds["step"]}
        | speed
        | {name: found[name] for name in ("baseline_megabytes", "peak_megabytes")}
    )


def compare(config: BenchConfig, folder: Path, parameters: dict) -> dict:
    """All variants at one setting, and the floor at the speed that the machine had beside the first of them."""
    results = {variant: measure(config, variant, folder) for variant in config.variants}
    speed = results[config.variants[0]].get("matrix_speed") or matrix_speed()
    prompt_tokens = config.image_tokens + PROMPT_TEXT
    floor = {name: count / speed for name, count in multiply_adds(config, parameters, prompt_tokens).items()}
    setting = {name: getattr(config, name) for name in SWEEPS}
    return {"setting": setting, "matrix_speed": speed, "floor_seconds": floor, "results": results}


def table(compared: dict) -> str:
    """The comparison as text."""
    setting = ", ".join(f"{name}={value}" for name, value in compared["setting"].items())
    results = compared["results"]
    lines = [setting, f"{'':10}{'s / step':>10}{'tokens / s':>12}{'peak MB':>9}{'above start':>12}   by stage"]
    for variant, found in results.items():
        stages = {name: value for name, value in found["seconds"].items() if name != "step"}
        above = found["peak_megabytes"] - found["baseline_megabytes"]
        lines.append(
            f"{variant:10}{found['seconds']['step']:10.2f}{found['tokens_per_second']:12.1f}"
            f"{found['peak_megabytes']:9.0f}{above:12.0f}   "
            + ", ".join(f"{name} {value:.2f}" for name, value in stages.items())
        )
    floor = compared["floor_seconds"]
    lines.append(
        f"{'floor':10}{sum(floor.values()):10.2f}{'':31}   "
        + ", ".join(f"{k} {v:.2f}" for k, v in floor.items())
        + f" at {compared['matrix_speed'] / 1e9:.0f} G multiply-adds / s"
    )
    if "packed" in results:
        ours = sum(results["packed"]["seconds"][stage] for stage in ("reference", "update"))
        apart = floor["scoring"] + floor["reference"] + floor["update"]
        lines.append(
            f"scoring, reference and update: {ours / apart:.2f} x the multiply-adds of the three, "
            f"{ours / (apart - floor['scoring']):.2f} x those of the two forwards that are made"
        )
    if {"packed", "trl"} <= results.keys():
        time_ratio = results["trl"]["seconds"]["step"] / results["packed"]["seconds"]["step"]
        memory_ratio = results["trl"]["peak_megabytes"] / results["packed"]["peak_megabytes"]
        lines.append(f"trl / packed: {time_ratio:.1f} x the time, {memory_ratio:.1f} x the peak memory")
    return "\n".join(lines)


def linearity(points: list[dict]) -> str:
    """How well a straight line over all packed tokens, P + G C, says what the points of a sweep took."""
    tokens = [point["setting"] for point in points]
    tokens = np.array([one["image_tokens"] + one["num_generations"] * one["max_new_tokens"] for one in tokens])
    stages = [point["results"]["packed"]["seconds"] for point in points]
    lines = []
    for name, parts in (("reference + update", ("reference", "update")), ("whole step", ("step",))):
        seconds = np.array([sum(one[part] for part in parts) for one in stages])
        slope, start = np.polyfit(tokens, seconds, 1)
        explained = 1 - np.var(seconds - slope * tokens - start) / np.var(seconds)
        lines.append(f"{name}: {start:.2f} s + {1000 * slope:.2f} ms a packed token, R² {explained:.3f}")
    return "\n".join(lines)


def plot_comparison(compared: dict, output: Path) -> None:
    """Seconds of one step by stage, and its peak memory, a bar for every variant."""
    results = compared["results"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 1.2 + 0.5 * len(results)), layout="constrained")
    for variant, found in results.items():
        begin, stages = 0.0, {name: value for name, value in found["seconds"].items() if name != "step"}
        for name, value in (stages or {"step": found["seconds"]["step"]}).items():
            color = {"rollout": "#4477aa", "reference": "#ccbb44", "update": "#228833"}.get(name, "#888888")
            left.barh(variant, value, left=begin, color=color, label=f"{variant}: {name} {value:.1f} s")
            begin += value
        right.barh(variant, found["peak_megabytes"] / 1000, color="#888888")
    left.axvline(sum(compared["floor_seconds"].values()), color="black", linestyle="--", label="multiply-adds")
    left.set(xlabel="seconds / step"), right.set(xlabel="peak memory, GB")
    left.invert_yaxis(), right.invert_yaxis()
    left.legend(fontsize=7)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def plot_sweep(points: list[dict], output: Path) -> None:
    """Seconds and peak memory against each of the three sizes, and the floor."""
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(4.2 * len(SWEEPS), 6.4), layout="constrained", squeeze=False)
    for column, name in enumerate(SWEEPS):
        chosen = sorted((p for p in points if p["sweep"] == name), key=lambda p: p["setting"][name])
        sizes = [point["setting"][name] for point in chosen]
        for variant in chosen[0]["results"]:
            found = [point["results"][variant] for point in chosen]
            axes[0, column].plot(sizes, [one["seconds"]["step"] for one in found], marker="o", label=variant)
            axes[1, column].plot(sizes, [one["peak_megabytes"] for one in found], marker="o", label=variant)
        floors = [sum(point["floor_seconds"].values()) for point in chosen]
        axes[0, column].plot(sizes, floors, "k--", label="multiply-adds")
        axes[0, column].set(ylabel="seconds / step", xscale="log", yscale="log")
        axes[1, column].set(xlabel=name.replace("_", " "), ylabel="peak MB", xscale="log", ylim=(0, None))
        for row in (0, 1):
            axes[row, column].set_xticks(sizes, sizes)
            axes[row, column].minorticks_off()
        axes[0, column].legend()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def plot_sampling(points: list[dict], output: Path) -> None:
    """Sampled tokens per second against the packed tokens of all groups, each point with its number of groups."""
    figure, axis = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    axis.plot([point["packed_tokens"] for point in points], [point["tokens_per_second"] for point in points], "o-")
    for point in points:
        place = point["packed_tokens"], point["tokens_per_second"]
        axis.annotate(point["groups"], place, textcoords="offset points", xytext=(4, -11), fontsize=8)
    axis.axvline(PolicyConfig.sampling_tokens, color="black", linestyle="--", label="default of sampling_tokens")
    axis.set(
        xlabel="packed tokens of the groups side by side", ylabel="sampled tokens / s", xscale="log", ylim=(0, None)
    )
    axis.legend(fontsize=8, loc="lower right")
    figure.savefig(output, dpi=110)
    plt.close(figure)


def measured_before(config: BenchConfig) -> list[dict]:
    """The points that a stopped sweep with the same settings has left in its output."""
    path = Path(config.output)
    former = json.loads(path.read_text(encoding="utf-8")) if config.sweep and path.exists() else {}
    return former["points"] if former.get("config") == asdict(config) else []


def main(config: BenchConfig) -> None:
    torch.set_num_threads(config.threads)
    if config.worker:
        (variant,) = config.variants
        others = {"trl": measure_trl, "probe": measure_probe, "sampling": measure_sampling}
        run = others.get(variant)
        found = run(config, config.worker) if run else measure_sayo(config, config.worker, variant)
        print("\n" + json.dumps(found))
        return
    output, points = Path(config.output), measured_before(config)
    settings = [(None, config)]
    if config.sweep:
        settings = [(name, replace(config, **{name: size})) for name, sizes in SWEEPS.items() for size in sizes]
    with tempfile.TemporaryDirectory() as folder:
        parameters = build_model(config, Path(folder))
        print(f"{sum(parameters[name] for name in ('text', 'vision', 'head')) / 1e6:.1f} M parameters")
        if config.sampling or config.probe:
            name = "sampling" if config.sampling else "probe"
            found = measure(config, name, Path(folder))
            output.write_text(json.dumps({"config": asdict(config)} | found, indent=1), encoding="utf-8")
            print(found.get("text", ""))
            if config.sampling:
                plot_sampling(found["points"], output.with_suffix(".png"))
            print(f"-> {output}" + f", {output.with_suffix('.png')}" * config.sampling)
            return
        for name, setting in tqdm(settings[len(points) :], desc="bench", disable=len(settings) == 1):
            points.append(compare(setting, Path(folder), parameters) | {"sweep": name})
            print(table(points[-1]), flush=True)
            output.write_text(json.dumps({"config": asdict(config), "points": points}, indent=1), encoding="utf-8")
    if config.sweep:
        plot_sweep(points, output.with_suffix(".png"))
    else:
        plot_comparison(points[0], output.with_suffix(".png"))
    if config.sweep and "packed" in config.variants:
        print(linearity(points))
    print(f"-> {output}, {output.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(BenchConfig, main)
