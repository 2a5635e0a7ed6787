"""See a run: a report to explore, where a policy looks before and after training, the paper's analyses, and curves.

python visualize.py --adapter runs/sayo/adapter --data scenes:heldout --limit 50 --out report.html
python visualize.py --adapter runs/sayo/adapter --data scenes:heldout --index 0 1 2 --out look.png
python visualize.py --adapter runs/sayo/adapter --data scenes:heldout --plots analysis
python visualize.py --evaluations 4b.json 8b.json --plots analysis
python visualize.py --metrics runs/a/metrics.jsonl runs/b/metrics.jsonl --plots analysis
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import torch

from answers import ask_all, switched_to
from config import ConfigError, PolicyConfig, at_least, option, run_command, writable
from data.examples import load_examples
from data.regions import regions_of
from plots import both, plot_curves, plot_entropy, plot_generation, plot_tas_accuracy, read_evaluations
from prompts import example_images, token_cells
from report import collect, page
from reward import RewardConfig, score_group, scored_tokens
from rollout import check_prompts, sample_group
from vlm import attention_maps, load_policy, resolve_layers

REPORT_LIMIT, PLOTS_LIMIT = 50, 200  # examples by default


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
        chosen = scored_tokens(group.completions[0][:length], group.statistics.entropies[0][:length], config)
        maps = attention_maps(
            model, group.prompt, group.completions[0], layers=config.attention_layers, query=config.attention_query
        )
        values = maps[chosen].mean(0)[: len(cells)].cpu()
    return paint_tokens(values, cells, picture.size), group.texts[0], tas


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
    """See a run: a report to explore (--out x.html), a picture of where a policy looks, curves, or plots (--plots).

    With --adapter the base model, the adapter switched off, stands beside it. The last letters of --out say what is
    made; --plots FOLDER writes the plots that its inputs allow, as PNG and SVG: of --metrics, of --evaluations, or,
    with neither, of what the policy says about the data.
    """

    data: str = option("scenes:heldout", "Examples: .jsonl, .parquet, a datasets folder, a Hub id, or scenes:heldout.")
    limit: int | None = option(
        None, f"Use only the first so many examples: by default {REPORT_LIMIT} in a report, {PLOTS_LIMIT} in plots."
    )
    metrics: list[str] | None = option(None, "metrics.jsonl of one run or several: draw their curves.")
    evaluations: list[str] | None = option(
        None, "With --plots: files that evaluate.py --json wrote, TAS against accuracy."
    )
    plots: str | None = option(None, "Folder to write the paper's analyses to, each as PNG and SVG.")
    index: list[int] | None = option(None, "Which examples, counted from 0; 0 1 2 by default in a picture.")
    max_new_tokens: int = option(128, "Longest completion in tokens.")
    megabytes: float = option(15.0, "Size of a report, which decides how many layers and how fine maps it has.")
    output: str = field(
        default="picture.png",
        metadata={"help": "File to write: .html a report, .png .jpg .pdf .svg a picture.", "aliases": ["--out"]},
    )

    def problems(self) -> list[str]:
        found = super().problems() + at_least(self, 1, "max_new_tokens", "megabytes")
        for name, made_by in (
            ("metrics", "the metrics.jsonl of a run"),
            ("evaluations", "what evaluate.py --json wrote"),
        ):
            for path in getattr(self, name) or []:
                if not Path(path).is_file():
                    found.append(f"{name}={path!r}: no such file; give {made_by}")
        if self.evaluations and not self.plots:
            found.append(f"evaluations={self.evaluations}: add --plots FOLDER, where the plots go")
        if self.plots and Path(self.plots).exists() and not Path(self.plots).is_dir():
            found.append(f"plots={self.plots!r}: give the name of a folder")
        suffixes = (".png", ".jpg", ".pdf", ".svg") + (".html",) * (not self.metrics)
        return found + writable(self, "output", suffixes=suffixes)


def load(config: VisualizeConfig, default_limit: int | None):
    """(model, processor, the examples that are asked for)."""
    arguments = config.data_arguments()
    if config.index is None:
        arguments["limit"] = config.limit or default_limit
    data = load_examples(config.data, **arguments, require_boxes=False)
    if config.index is not None and not all(0 <= index < len(data) for index in config.index):
        raise ConfigError(f"index={config.index}: {config.data} has the examples 0 to {len(data) - 1}")
    examples = data if config.index is None else [data[index] for index in config.index]
    model, processor = load_policy(**config.policy_arguments(lora_rank=0))
    model.requires_grad_(False)  # a frozen vision tower's features are kept from sampling to scoring
    resolve_layers(model, config.attention_layers)
    if config.index is None:  # few by index are checked when they are encoded
        check_prompts(model, processor, data, config, config.max_new_tokens)
    return model, processor, examples


def write_report(config: VisualizeConfig) -> None:
    model, processor, examples = load(config, REPORT_LIMIT)
    answers = ask_all(model, processor, examples, config)
    room = int(config.megabytes * 1e6) - len(page({}))
    text = page(collect(model, processor, examples, answers, config, room))
    Path(config.output).write_text(text, encoding="utf-8", newline="\n")
    if len(text) > config.megabytes * 1e6:
        print(
            f"{config.output} has {len(text) / 1e6:.1f} MB, more than megabytes={config.megabytes:g}, even with the "
            "coarsest maps of one layer: lower --limit or --max_new_tokens",
            file=sys.stderr,
        )


def write_plots(config: VisualizeConfig) -> None:
    folder = Path(config.plots)
    folder.mkdir(parents=True, exist_ok=True)
    if config.metrics:
        plot_curves(config.metrics, both(folder / "curves"))
    if config.evaluations:
        plot_tas_accuracy(read_evaluations(config.evaluations), both(folder / "tas_accuracy"))
    if config.metrics or config.evaluations:
        return
    model, processor, examples = load(config, PLOTS_LIMIT)
    answers = ask_all(model, processor, examples, config)
    rows = {name: [answer.scores for answer in own] for name, own in answers.items()}
    plot_tas_accuracy({Path(config.model).name: rows}, both(folder / "tas_accuracy"))
    plot_generation(answers, both(folder / "attention_over_generation"))
    plot_entropy(answers, both(folder / "attention_against_entropy"))


def write_picture(config: VisualizeConfig) -> None:
    config.index = [0, 1, 2] if config.index is None else config.index
    model, processor, examples = load(config, None)
    columns = {}
    for name in ("base", "adapter")[: 1 + bool(config.adapter)]:
        with switched_to(model, name, config), torch.no_grad():
            columns[name] = [look(model, processor, example, config, config.system_prompt) for example in examples]
    plot_attention(examples, columns, Path(config.output))


def main(config: VisualizeConfig) -> None:
    if config.plots:
        write_plots(config)
        print(f"-> {config.plots}")
        return
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    if config.metrics:
        plot_curves(config.metrics, Path(config.output))
    elif Path(config.output).suffix.lower() == ".html":
        write_report(config)
    else:
        write_picture(config)
    print(f"-> {config.output}")


if __name__ == "__main__":
    run_command(VisualizeConfig, main)
