"""Pictures of a run: its curves, and where a policy looks before and after training.

python visualize.py --metrics runs/sayo/metrics.jsonl --output curves.png
python visualize.py --adapter runs/sayo/adapter --data scenes:heldout --index 0 1 2 --output look.png
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

import matplotlib
import torch

from config import PolicyConfig
from data.examples import load_examples
from prompts import image_grids
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
    rows = [json.loads(line) for line in Path(metrics_path).read_text().splitlines()]
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


def look(model, processor, example: dict, config: RewardConfig, system_prompt: str | None = None):
    """Where the uncertain tokens of the greedy completion look.

    Returns:
        (heat over the first picture (rows, columns), text, TAS of those tokens).
    """
    group = sample_group(
        model, processor, example, num_generations=1, max_new_tokens=128, temperature=0, system_prompt=system_prompt
    )
    tas = float(score_group(model, group, config)["tas_selected"][0])
    length = len(group.completions[0]) - (not group.truncated[0])
    chosen = select_uncertain(group.statistics.entropies[0][:length], config.top_fraction)
    maps = attention_maps(
        model, group.prompt, group.completions[0], layers=config.attention_layers, query=config.attention_query
    )
    rows, columns = image_grids(processor, group.prompt)[0]
    return maps[chosen].mean(0)[: rows * columns].view(rows, columns).cpu(), group.texts[0], tas


def plot_attention(examples: list[dict], columns: dict[str, list], output: Path) -> None:
    """One row per example: the picture with its boxes, then a heat map for each named list of look() results."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    figure, axes = plt.subplots(
        len(examples),
        1 + len(columns),
        figsize=(3.4 * (1 + len(columns)), 3.4 * len(examples)),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes.flat:
        axis.axis("off")
    for example, row in zip(examples, axes, strict=True):
        picture = example["images"][0]
        boxes = example["boxes"] if len(example["images"]) == 1 else example["boxes"][0]
        for axis in row:
            axis.imshow(picture)
            for x1, y1, x2, y2 in boxes:
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="black", linewidth=1.5))
        row[0].set_title(f"{example['question']}\n{example['answer']}", fontsize=8, wrap=True)
    for place, (name, looks) in enumerate(columns.items(), 1):
        for axis, example, (heat, text, tas) in zip(axes[:, place], examples, looks, strict=True):
            width, height = example["images"][0].size
            # Where the policy does not look, the picture stays as it is.
            options = {"alpha": 0.85 * heat / heat.max(), "interpolation": "nearest", "vmin": 0}
            axis.imshow(heat, extent=(0, width, height, 0), cmap="autumn_r", **options)
            axis.set_title(f"{name}, TAS {tas:.2f}\n{text}", fontsize=8, wrap=True)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of a run, or where a policy looks.")
    parser.add_argument("--metrics", help="metrics.jsonl of a run: draw its curves")
    parser.add_argument("--model", default="data/tiny_policy", help="policy (default: the embedded one)")
    parser.add_argument("--adapter", help="LoRA adapter: draw the base and the adapter side by side")
    parser.add_argument("--data", default="scenes:heldout", help="examples (default: scenes:heldout)")
    parser.add_argument("--index", type=int, nargs="+", default=[0, 1, 2], help="which examples (default: 0 1 2)")
    parser.add_argument("--output", default="picture.png", help="picture to write (default: picture.png)")
    arguments = parser.parse_args()
    if arguments.metrics:
        plot_curves(Path(arguments.metrics), Path(arguments.output))
    else:
        settings = PolicyConfig(model=arguments.model, adapter=arguments.adapter)
        data = load_examples(arguments.data, require_boxes=False)
        # As a dict of the loader's form: `images` and boxes.
        examples = [data[index] for index in arguments.index]
        model, processor = load_policy(**settings.policy_arguments(lora_rank=0))
        columns = {}
        for name in ("base", "adapter")[: 1 + bool(arguments.adapter)]:
            switched_off = model.disable_adapter() if arguments.adapter and name == "base" else nullcontext()
            with switched_off, torch.no_grad():
                columns[name] = [
                    look(model, processor, example, RewardConfig(), settings.system_prompt) for example in examples
                ]
        plot_attention(examples, columns, Path(arguments.output))
    print(f"-> {arguments.output}")


if __name__ == "__main__":
    main()
