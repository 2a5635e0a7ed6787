"""Where a model looks for a question more than for any other: its relative attention, and a region made of it.

From "MLLMs Know Where to Look" (arXiv 2502.17422): the attention of the answer's starting position on the image tokens
for the question, divided by the same for a generic instruction. What attracts attention whatever is asked (borders,
sinks) cancels out. Departures: the paper takes one layer and cuts one window out to look closer; here the relative
attention of several layers is averaged, and the cells that stand out most are the region, as boxes in pixels of the
original picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from families import PolicyError, pictures_of
from loading import eos_token_ids
from prompts import LARGE_PICTURE, Prompt, encode_prompt, example_images, token_cells
from report import joined_cells
from vlm import attention_maps

GENERIC_QUESTION = "Write a general description of the image."  # the paper's own
EPS = 1e-12  # attention that is divided by: a millionth of what a token has when a million share it


# --- attention of the answer's start -------------------------------------------------------------------------------


def start_attention(model, processor, prompt: Prompt, layers: Sequence[int]) -> Tensor:
    """Attention of the prompt's last token, where the answer starts, on every image token, mean over heads.

    Args:
        layers: decoder layers, see vlm.resolve_layers.

    Returns:
        (L, N) float32 on the CPU, in rising order of the layers.
    """
    first = torch.tensor([min(eos_token_ids(model, processor))])  # any token: the row is that of its predictor
    return attention_maps(model, prompt, first, layers=layers, query="predictor", per_layer=True)[:, 0].cpu()


@torch.no_grad()
def question_and_generic_attention(
    model, processor, example: dict, system_prompt: str | None, layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """start_attention of an example's question (with its choices), and of GENERIC_QUESTION on the same pictures.

    Returns:
        Two (L, N) tensors.

    Raises:
        PolicyError: attention is not finite in the model's number format.
    """
    bare = {name: example[name] for name in ("id", "image", "images") if name in example}  # regions are not looked at
    asked = {name: example[name] for name in ("question", "choices") if name in example}
    prompt = encode_prompt(processor, bare | asked, system_prompt)
    generic = encode_prompt(processor, bare | {"question": GENERIC_QUESTION}, system_prompt)
    found = start_attention(model, processor, prompt, layers)
    generic.image_features = prompt.image_features  # a frozen vision tower has seen these pictures already
    both = found, start_attention(model, processor, generic, layers)
    if not all(part.isfinite().all() for part in both):
        raise PolicyError(
            f"dtype: the attention of example {example.get('id')!r} is not finite; give --dtype bfloat16, or float32 "
            "where the GPU has no bfloat16"
        )
    return both


# --- from image tokens to pictures ---------------------------------------------------------------------------------


@dataclass
class PictureMap:
    """Attention on one picture, on those of its cells that lie side by side: all but a thumbnail's.

    cells     (n, 4) boxes in pixels of the picture, edges that meet equal
    is_tile   (N,) which of the picture's image tokens these are
    asked     (L, n) attention per pixel for the question
    generic   (L, n) the same for GENERIC_QUESTION
    """

    cells: Tensor
    is_tile: Tensor
    asked: Tensor
    generic: Tensor

    def relative(self) -> Tensor:
        """(L, n): above 1 where the question draws more attention than a description would."""
        return self.asked / (self.generic + EPS)


def per_picture(processor, images: Sequence[Image.Image], asked: Tensor, generic: Tensor) -> list[PictureMap]:
    """(L, N) attention on a prompt's image tokens as one map for each picture.

    Attention on a thumbnail's token is spread over the cells that it shows, by their area.
    """
    maps, start = [], 0
    for image in images:
        cells = token_cells(processor, image)
        own = slice(start, start + len(cells))
        start += len(cells)
        areas = (cells[:, 2:] - cells[:, :2]).prod(-1)  # (N,)
        is_tile = torch.arange(len(cells)) < len(cells) - _thumbnail_tokens(processor, len(cells))  # (N,)
        low = torch.maximum(cells[is_tile, None, :2], cells[None, ~is_tile, :2])  # (n, N - n, 2)
        high = torch.minimum(cells[is_tile, None, 2:], cells[None, ~is_tile, 2:])
        below = (high - low).clamp(min=0).prod(-1) / areas[is_tile, None]  # share of a cell below a thumbnail's
        densities = [attention[:, own] / areas for attention in (asked, generic)]  # (L, N)
        on_tiles = [density[:, is_tile] + density[:, ~is_tile] @ below.T for density in densities]
        maps.append(PictureMap(without_seams(cells[is_tile], image.size), is_tile, *on_tiles))
    return maps


def _thumbnail_tokens(processor, num_tokens: int) -> int:
    """How many of a picture's tokens, the last of them, show all of it again: one tile's, where it has several."""
    attribute = getattr(pictures_of(processor), "tokens_per_tile", None)
    tokens_per_tile = getattr(processor, attribute) if attribute else num_tokens
    return tokens_per_tile if num_tokens > tokens_per_tile else 0


def without_seams(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Cells (n, 4) that lie side by side in a picture of (width, height), with edges that meet equal: (n, 4).

    In a large picture token_cells is coarser than its cells may be; there they are taken for a grid of equal ones.
    """
    if size[0] * size[1] <= LARGE_PICTURE:
        return torch.from_numpy(joined_cells(cells.numpy()))
    height = (cells[:, 3] - cells[:, 1]).median()
    columns = int(((cells[:, 1] - cells[:, 1].min()).abs() < height / 2).sum())
    side = torch.tensor(size) / torch.tensor([columns, len(cells) // columns])  # (2,)
    corner = ((cells[:, :2] + cells[:, 2:]) / 2 / side).floor() * side  # (n, 2)
    return torch.cat([corner, corner + side], dim=1)


def choose_cells(values: Tensor, share: float) -> Tensor:
    """The max(1, round(share * n)) highest of some values (n,), the earlier of equal ones first: (n,) boolean.

    Example: values (0.2, 0.9, 0.4, 0.1) with share 0.5 give (False, True, True, False).
    """
    count = min(len(values), max(1, round(share * len(values))))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def merge_cells(cells: Tensor) -> list[list[float]]:
    """Some cells (k, 4) of a grid as few boxes of the same union: runs in a row, then equal runs below each other."""
    boxes = [[round(number, 1) for number in cell] for cell in cells.tolist()]
    for low in (0, 1):
        merged: list[list[float]] = []
        for box in sorted(boxes, key=lambda box: (box[1 - low], box[3 - low], box[low])):
            last = merged[-1] if merged else None
            same_line = last and (last[1 - low], last[3 - low]) == (box[1 - low], box[3 - low])
            if same_line and math.isclose(last[low + 2], box[low], abs_tol=0.05):
                last[low + 2] = box[low + 2]
            else:
                merged.append(box)
        boxes = merged
    return boxes


def attention_boxes(
    model, processor, example: dict, system_prompt: str | None, *, layers: Sequence[int], share: float
) -> list[list[list[float]]]:
    """The region that a model's relative attention gives a question: for each picture a list of boxes.

    Args:
        example: see data/examples.py; its own regions are not looked at.
        layers: decoder layers whose relative attention is averaged.
        share: of all cells of the example's pictures, those of highest relative attention; at least one.

    Returns:
        Boxes [x1, y1, x2, y2] in pixels of the original pictures, of whole cells; [] for a picture without any.
    """
    images = example_images(example)
    asked, generic = question_and_generic_attention(model, processor, example, system_prompt, layers)
    maps = per_picture(processor, images, asked, generic)
    chosen = choose_cells(torch.cat([one.relative().mean(0) for one in maps]), share)
    parts = chosen.split([len(one.cells) for one in maps])
    return [merge_cells(one.cells[part]) for one, part in zip(maps, parts, strict=True)]


# --- how good it is, against boxes that are known -------------------------------------------------------------------


def overlap(region: Tensor, coverage: Tensor) -> dict[str, float]:
    """How a region agrees with the true one, both the share of each cell that they cover, (n,) in [0, 1].

    precision is the share of the region that is true, recall the share of the true one that it holds, area its share
    of all cells.
    """
    both = float(torch.minimum(region, coverage).sum())
    sums = float(region.sum()), float(coverage.sum())
    return {
        "IoU": both / float(torch.maximum(region, coverage).sum()),
        "precision": both / sums[0] if sums[0] else math.nan,
        "recall": both / sums[1],
        "area": sums[0] / len(region),
    }


def pointing(values: Tensor, coverage: Tensor) -> dict[str, float]:
    """inside: share of a map (n,) that lies in the true region; hit: whether its highest cell touches it, 0 or 1."""
    hit = float(coverage[values.argmax()] > 0)
    return {"inside": float((values * coverage).sum() / values.sum()), "hit": hit}


def baselines(maps: Sequence[PictureMap], sizes: Sequence[tuple[int, int]], share: float, seed: int) -> dict:
    """{name: values (n,), how many to take} of regions that no model was asked for."""
    centres = [
        (cells[:, :2] + cells[:, 2:]) / 2 / torch.tensor(size) - 0.5
        for cells, size in zip([one.cells for one in maps], sizes, strict=True)
    ]
    distance = torch.cat(centres).norm(dim=-1)  # (n,)
    shuffled = torch.rand(len(distance), generator=torch.Generator().manual_seed(seed))
    return {"random cells": (shuffled, share), "centre": (-distance, share), "whole picture": (-distance, 1.0)}
