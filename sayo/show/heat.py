"""Heat maps: where image tokens lie in a picture, and how much attention each of them gets."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

import numpy as np

from sayo.examples.regions import regions_of
from sayo.show.plots import drawing


def paint_tokens(values, cells, size: tuple[int, int], longest: int = 512) -> np.ndarray:
    """Spread each value over its token's cell; where cells overlap (tiles and a thumbnail), they add up.

    From values (N,) and cells (N, 4), boxes in pixels of a picture of this (width, height), to a (rows, columns) float
    array of the picture's shape, its longest side at most `longest`.
    """
    scale = min(1.0, longest / max(size))
    canvas = np.zeros((max(1, round(size[1] * scale)), max(1, round(size[0] * scale))))
    for value, (x1, y1, x2, y2) in zip(np.asarray(values), np.asarray(cells) * scale, strict=True):
        left, top = min(round(x1), canvas.shape[1] - 1), min(round(y1), canvas.shape[0] - 1)
        cell = canvas[top : max(top + 1, round(y2)), left : max(left + 1, round(x2))]
        cell += value / cell.size
    return canvas


def outline_region(axis, boxes, polygons, mask) -> None:
    """Draw the edges of a region, in pixels of the picture on the axis."""
    from matplotlib.patches import Polygon, Rectangle

    for x1, y1, x2, y2 in boxes:
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor="lime", linewidth=1.6))
    for polygon in polygons:
        axis.add_patch(Polygon(polygon, fill=False, edgecolor="cyan", linewidth=1.6))
    if mask is not None:
        axis.contour(np.asarray(mask) > 0, levels=[0.5], colors="yellow", linewidths=1.6)


def plot_attention(examples: list[dict], columns: dict[str, list], output: Path) -> None:
    """One row per example: the picture with its region, then a heat map for each named list of look() results."""
    with drawing(output, len(examples), 1 + len(columns), (3.4, 3.4), pictures=True) as axes:
        for example, row in zip(examples, axes, strict=True):
            for axis in row:
                axis.imshow(example["images"][0])
                outline_region(axis, *regions_of(example)[0])
            row[0].set_title(f"{fill(example['question'], 44)}\n{example['answer']}", fontsize=8)
        for place, (name, looks) in enumerate(columns.items(), 1):
            for axis, example, (heat, text, tas) in zip(axes[:, place], examples, looks, strict=True):
                width, height = example["images"][0].size
                # The picture stays as it is where the policy does not look.
                options = {"alpha": 0.85 * heat / (heat.max() or 1.0), "interpolation": "nearest", "vmin": 0}
                axis.imshow(heat, extent=(0, width, height, 0), cmap="autumn_r", **options)
                axis.set_title(f"{name}, TAS {tas:.2f}\n{fill(text, 44)}", fontsize=8)
