"""Pictures of a run: its curves, and where a policy looks before and after training.

python visualize.py --metrics runs/sayo/metrics.jsonl --output curves.png
python visualize.py --adapter runs/sayo/adapter --data scenes:heldout --index 0 1 2 --output look.png
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import torch

from config import ConfigError, PolicyConfig, option, read_jsonl, run_command, writable
from data.examples import load_examples
from prompts import example_images, token_cells
from reward import RewardConfig, score_group, select_uncertain
from rollout import sample_group
from vlm import attention_maps, load_policy

PANELS = {
    "Rewards": ("reward/attention", "reward/format", "reward/accuracy"),
    "Target Attention Score": ("reward/tas", "reward/tas_selected"),
    "Share of the advantage": ("advantage_share/attention", "advantage_share/format", "advantage_share/accuracy"),
    "KL to the base": ("kl",),
    "Completion length (tokens)": ("completion_length",),
    "Entropy (nats)": ("entropy",),
}


def _smooth(values: list[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average without the bias of its start."""
    mean, norm, smoothed = 0.0, 0.0, []
    for value in values:
        mean, norm = weight * mean + (1 - weight) * value, weight * norm + (1 - weight)
        smoothed.append(mean / norm)
    return smoothed


def plot_curves(metrics_path: Path, output: Path) -> None:
    """Draw the metrics of a run, one panel per question one asks of it. A file without rows draws nothing."""
    rows = [row for _, row in read_jsonl(metrics_path)]
    if not rows:
        return
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                (line,) = axis.plot(steps, values, alpha=0.25)
                axis.plot(steps, _smooth(list(values)), color=line.get_color(), label=name.split("/")[-1])
        axis.set_title(title)
        axis.set_xlabel("step")
        if len(axis.lines) > 2:
            axis.legend()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def paint_tokens(values, cells, size: tuple[int, int], longest: int = 512) -> np.ndarray:
    """Values of image tokens as a picture: each is spread over its token's cell, and where cells overlap (tiles and a
    thumbnail) they add up.

    Args:
        values: (N,). cells: (N, 4) boxes in pixels of a picture. size: its (width, height).

    Returns:
        (rows, columns) float array of the picture's shape, its longest side at most `longest`.
    """
    scale = min(1.0, longest / max(size))
    canvas = np.zeros((max(1, round(size[1] * scale)), max(1, round(size[0] * scale))))
    for value, (x1, y1, x2, y2) in zip(np.asarray(values), np.asarray(cells) * scale, strict=True):
        left, top = min(round(x1), canvas.shape[1] - 1), min(round(y1), canvas.shape[0] - 1)
        cell = canvas[top : max(top + 1, round(y2)), left : max(left + 1, round(x2))]
        cell += value / cell.size
    return canvas


def look(model, processor, example: dict, config: RewardConfig, system_prompt: str | None = None):
    """Where the uncertain tokens of the greedy completion look.

    Returns:
        (heat over the first picture as an array (rows, columns), text, TAS of those tokens).
    """
    group = sample_group(
        model, processor, example, num_generations=1, max_new_tokens=128, temperature=0, system_prompt=system_prompt
    )
    tas = float(score_group(model, group, config)["tas_selected"][0])
    length = len(group.completions[0]) - (not group.truncated[0])
    picture = example_images(example)[0]
    cells = token_cells(processor, picture)
    values = torch.zeros(len(cells))
    if length:  # a completion that ends at once looks nowhere
        chosen = select_uncertain(group.statistics.entropies[0][:length], config.top_fraction)
        maps = attention_maps(
            model, group.prompt, group.completions[0], layers=config.attention_layers, query=config.attention_query
        )
        values = maps[chosen].mean(0)[: len(cells)].cpu()
    return paint_tokens(values, cells, picture.size), group.texts[0], tas


def regions_of(example: dict) -> list[tuple]:
    """(boxes, polygons, mask or None) of each picture of an example."""
    count = len(example["images"])
    boxes, polygons = (example.get(name) or [] for name in ("boxes", "polygons"))
    if count == 1:
        boxes, polygons = [boxes], [polygons]
    empty = [[] for _ in range(count)]
    return list(zip(boxes or empty, polygons or empty, example.get("masks") or [None] * count, strict=True))


def outline_region(axis, boxes, polygons, mask) -> None:
    """Draw the edges of a region, in pixels of the picture that the axis shows."""
    from matplotlib.patches import Polygon, Rectangle

    for x1, y1, x2, y2 in boxes:
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime", linewidth=1.6))
    for polygon in polygons:
        axis.add_patch(Polygon(polygon, fill=False, edgecolor="cyan", linewidth=1.6))
    if mask is not None:
        axis.contour(np.asarray(mask) > 0, levels=[0.5], colors="yellow", linewidths=1.6)


@contextmanager
def panels(rows: int, columns: int, size: tuple[float, float], output: Path):
    """Axes (rows, columns) without ticks, each of `size` in inches, saved behind the block."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"text.parse_math": False}):  # a dollar in a question or a completion is a dollar
        shape = size[0] * columns, size[1] * rows
        figure, axes = plt.subplots(rows, columns, figsize=shape, layout="constrained", squeeze=False)
        for axis in axes.flat:
            axis.axis("off")
        yield axes
        figure.savefig(output, dpi=110, bbox_inches="tight")
        plt.close(figure)


def plot_attention(examples: list[dict], columns: dict[str, list], output: Path) -> None:
    """One row per example: the picture with its region, then a heat map for each named list of look() results."""
    with panels(len(examples), 1 + len(columns), (3.4, 3.4), output) as axes:
        for example, row in zip(examples, axes, strict=True):
            for axis in row:
                axis.imshow(example["images"][0])
                outline_region(axis, *regions_of(example)[0])
            row[0].set_title(f"{fill(example['question'], 44)}\n{example['answer']}", fontsize=8)
        for place, (name, looks) in enumerate(columns.items(), 1):
            for axis, example, (heat, text, tas) in zip(axes[:, place], examples, looks, strict=True):
                width, height = example["images"][0].size
                # Where the policy does not look, the picture stays as it is.
                options = {"alpha": 0.85 * heat / (heat.max() or 1.0), "interpolation": "nearest", "vmin": 0}
                axis.imshow(heat, extent=(0, width, height, 0), cmap="autumn_r", **options)
                axis.set_title(f"{name}, TAS {tas:.2f}\n{fill(text, 44)}", fontsize=8)


@dataclass
class VisualizeConfig(RewardConfig, PolicyConfig):
    """Draw the curves of a run, or where a policy looks: the base, and beside it the adapter if one is given."""

    data: str = option("scenes:heldout", "Examples: .jsonl, .parquet, a datasets folder, a Hub id, or scenes:heldout.")
    metrics: str | None = option(None, "metrics.jsonl of a run: draw its curves instead.")
    index: list[int] = option([0, 1, 2], "Which examples.")
    output: str = option("picture.png", "Picture to write.")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.metrics and not Path(self.metrics).is_file():
            found.append(f"metrics={self.metrics!r}: no such file; give the metrics.jsonl of a run")
        return found + writable(self, "output", suffixes=(".png", ".jpg", ".pdf", ".svg"))


def main(config: VisualizeConfig) -> None:
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    if config.metrics:
        plot_curves(Path(config.metrics), Path(config.output))
    else:
        data = load_examples(config.data, **config.data_arguments(), require_boxes=False)
        if not all(0 <= index < len(data) for index in config.index):
            raise ConfigError(f"index={config.index}: {config.data} has the examples 0 to {len(data) - 1}")
        examples = [data[index] for index in config.index]
        model, processor = load_policy(**config.policy_arguments(lora_rank=0))
        columns = {}
        for name in ("base", "adapter")[: 1 + bool(config.adapter)]:
            switched_off = model.disable_adapter() if config.adapter and name == "base" else nullcontext()
            with switched_off, torch.no_grad():
                columns[name] = [look(model, processor, example, config, config.system_prompt) for example in examples]
        plot_attention(examples, columns, Path(config.output))
    print(f"-> {config.output}")


if __name__ == "__main__":
    run_command(VisualizeConfig, main)
