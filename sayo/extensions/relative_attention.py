"""Relative attention: where a model attends for a question more than for any other, and a region made from it.

From "MLLMs Know Where to Look" (arXiv 2502.17422): attention of the answer's first position on the image tokens for the
question, divided by the same for a generic instruction. What attracts attention under any question (borders, sinks)
cancels out. Unlike the paper, which takes one layer and crops one window, several layers are averaged, and the highest
cells are the region, as boxes in pixels of the original picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from sayo.model.families import PolicyError, pictures_of
from sayo.model.forward import attention_maps
from sayo.model.prompts import LARGE_PICTURE, encode_prompt, example_images, joined_cells, token_cells
from sayo.model.sampling.tokens import eos_token_ids

GENERIC_QUESTION = "Write a general description of the image."  # as in the paper
EPS = 1e-12  # keeps the division finite: a millionth of a token's share among a million tokens


@torch.no_grad()
def question_and_generic_attention(
    model, processor, example: dict, system_prompt: str | None, layers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Attention of the prompt's last token for an example's question (and choices), and for GENERIC_QUESTION.

    Each is the mean over heads on every image token, (L, N) float32 on the CPU. Raises PolicyError where attention is
    not finite in the model's dtype.
    """
    bare = {name: example[name] for name in ("id", "image", "images") if name in example}  # no regions
    asked = {name: example[name] for name in ("question", "choices") if name in example}
    prompts = [encode_prompt(processor, bare | text, system_prompt) for text in (asked, {"question": GENERIC_QUESTION})]
    first, both = torch.tensor([min(eos_token_ids(model, processor))]), []  # any token: its predictor's row is read
    for prompt in prompts:
        prompt.image_features = prompts[0].image_features  # of a frozen vision tower, so that it runs once
        found = attention_maps(model, prompt, first, layers=layers, query="predictor", per_layer=True)
        both.append(found[:, 0].cpu())
    if not all(part.isfinite().all() for part in both):
        fix = "give --dtype bfloat16, or float32 where the GPU has no bfloat16"
        raise PolicyError(f"dtype: the attention of example {example.get('id')!r} is not finite; {fix}")
    return tuple(both)


@dataclass
class PictureMap:
    """Attention on one picture's cells, without a thumbnail's: n of its N image tokens."""

    cells: Tensor  # (n, 4) boxes in pixels of the picture, with equal edges where they meet
    is_tile: Tensor  # (N,) which of the picture's image tokens these are
    asked: Tensor  # (L, n) attention per pixel for the question
    generic: Tensor  # (L, n) the same for GENERIC_QUESTION

    def relative(self) -> Tensor:
        """(L, n): above 1 where the question draws more attention than a description would."""
        return self.asked / (self.generic + EPS)


def per_picture(processor, images: Sequence[Image.Image], asked: Tensor, generic: Tensor) -> list[PictureMap]:
    """Attention (L, N) on a prompt's image tokens as one map per picture.

    Attention on a thumbnail's token is spread over the cells that it shows, by area.
    """
    maps, start, attribute = [], 0, getattr(pictures_of(processor), "tokens_per_tile", None)
    for image in images:
        cells = token_cells(processor, image)
        per_tile = getattr(processor, attribute) if attribute else len(cells)
        num_tiled = len(cells) - per_tile if len(cells) > per_tile else len(cells)  # the last tile is a thumbnail
        own = slice(start, start + len(cells))
        start += len(cells)
        areas = (cells[:, 2:] - cells[:, :2]).prod(-1)  # (N,)
        is_tile = torch.arange(len(cells)) < num_tiled  # (N,)
        low = torch.maximum(cells[is_tile, None, :2], cells[None, ~is_tile, :2])  # (n, N - n, 2)
        high = torch.minimum(cells[is_tile, None, 2:], cells[None, ~is_tile, 2:])
        below = (high - low).clamp(min=0).prod(-1) / areas[is_tile, None]  # share of each cell under a thumbnail's
        densities = [attention[:, own] / areas for attention in (asked, generic)]  # (L, N)
        on_tiles = [density[:, is_tile] + density[:, ~is_tile] @ below.T for density in densities]
        maps.append(PictureMap(without_seams(cells[is_tile], image.size), is_tile, *on_tiles))
    return maps


def without_seams(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """The cells (n, 4) of a picture of (width, height) without a thumbnail, with equal edges where they meet.

    In a large picture token_cells is too coarse; the cells are taken for a regular grid.
    """
    if size[0] * size[1] <= LARGE_PICTURE:
        return torch.from_numpy(joined_cells(cells.numpy()))
    height = (cells[:, 3] - cells[:, 1]).median()
    columns = int(((cells[:, 1] - cells[:, 1].min()).abs() < height / 2).sum())
    side = torch.tensor(size) / torch.tensor([columns, len(cells) // columns])  # (2,)
    corner = ((cells[:, :2] + cells[:, 2:]) / 2 / side).floor() * side  # (n, 2)
    return torch.cat([corner, corner + side], dim=1)


def choose_cells(values: Tensor, share: float) -> Tensor:
    """(n,) boolean: the max(1, round(share * n)) highest of the values (n,), of equal ones the earlier.

    Example: values (0.2, 0.9, 0.4, 0.1) with share 0.5 give (False, True, True, False).
    """
    count = min(len(values), max(1, round(share * len(values))))
    chosen = torch.zeros(len(values), dtype=torch.bool)
    chosen[values.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def merge_cells(cells: Tensor) -> list[list[float]]:
    """Cells (k, 4) of a grid as few boxes with the same union: runs in a row, then equal runs in adjacent rows."""
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
    """The region of highest relative attention: per picture a list of boxes [x1, y1, x2, y2] in its pixels.

    It covers a share of all cells of the example's pictures, at least one. Relative attention is averaged over layers,
    and the example's own regions are ignored.
    """
    images = example_images(example)
    asked, generic = question_and_generic_attention(model, processor, example, system_prompt, layers)
    maps = per_picture(processor, images, asked, generic)
    chosen = choose_cells(torch.cat([one.relative().mean(0) for one in maps]), share)
    parts = chosen.split([len(one.cells) for one in maps])
    return [merge_cells(one.cells[part]) for one, part in zip(maps, parts, strict=True)]
