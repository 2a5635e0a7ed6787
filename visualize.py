"""Pictures of a run: reward, accuracy, TAS and what drives the advantages, over the steps.

python visualize.py --metrics runs/sayo/metrics.jsonl --output curves.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

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
        if len(names) > 1:
            axis.legend()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the curves of a run.")
    parser.add_argument("--metrics", required=True, help="metrics.jsonl of a run")
    parser.add_argument("--output", default="curves.png", help="picture to write (default: curves.png)")
    arguments = parser.parse_args()
    plot_curves(Path(arguments.metrics), Path(arguments.output))
    print(f"-> {arguments.output}")


if __name__ == "__main__":
    main()
