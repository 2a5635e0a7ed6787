"""The attention loss of EASE (arXiv 2605.30912), which pulls the attention of good completions to the annotated region.

A loss on attention itself where SAYO has a reward: lambda * 1[R >= 0.5] * KL(target map || attention map), at one layer
two thirds up the model.
"""

import torch
from torch import Tensor

from sayo.examples.regions import paint_region
from sayo.model.families import PolicyError
from sayo.model.packing import layer_types, model_layout
from sayo.model.prompts import example_images, regions_by_picture, token_cells

GOOD_REWARD = 0.5  # least accuracy reward of a completion that has the loss; format does not count
FLOOR = 0.1  # of the target map, whose maximum is 1: the background is allowed, too
WIDTH = 0.25  # standard deviation of a box's Gaussian, in sides of the box
NARROWEST = 0.5  # its lower bound, in sides of a cell: a narrower Gaussian could fall between cell centers


def ease_layer(model) -> int:
    """The decoder layer of EASE, floor(2 L / 3). Raises PolicyError for the padded layout, which keeps no attention."""
    if model_layout(model) == "padded":
        raise PolicyError("ease_weight: this model has linear attention, for which there is no such loss; leave it out")
    return 2 * len(layer_types(model)) // 3


def target_map(processor, example: dict) -> Tensor | None:
    """(N,) float32 over the image tokens, sums to 1: Gaussians on the boxes above a floor; None without a region.

    A token has the value at its cell's center, scaled so that each box reaches 1; the maximum where boxes overlap. A
    picture's polygons and mask count as the box around them.
    """
    images, parts, is_empty = example_images(example), [], True
    regions = (example.get(name) or [] for name in ("boxes", "polygons", "masks"))
    for image, (boxes, *others) in zip(images, regions_by_picture(len(images), *regions), strict=True):
        around = paint_region(image.size, [], *others).getbbox()
        boxes = boxes + [around] * (around is not None)
        is_empty = is_empty and not boxes
        cells = token_cells(processor, image)  # (n, 4)
        centers = (cells[:, :2] + cells[:, 2:]) / 2  # (n, 2)
        narrowest = NARROWEST * (cells[:, 2:] - cells[:, :2]).median(0).values  # (2,)
        values = torch.full((len(cells),), FLOOR)
        for box in torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4):
            middle, deviation = (box[:2] + box[2:]) / 2, (WIDTH * (box[2:] - box[:2])).maximum(narrowest)
            exponent = -0.5 * ((centers - middle) / deviation).square().sum(1)  # (n,)
            values = values.maximum((exponent - exponent.max()).exp())
        parts.append(values)
    whole = torch.cat(parts)
    return None if is_empty else whole / whole.sum()


def ease_loss(maps: Tensor, target: Tensor | None, accuracy: Tensor) -> Tensor:
    """Mean over the group of 1[R >= 0.5] * KL(target || normalized attention on the image tokens), in nats.

    maps (G, N), differentiable: attention of each completion; a row of zeros (an empty completion) has no loss.
    target (N,) sums to 1; None gives no loss. accuracy (G,): accuracy rewards.
    """
    if target is None:
        return maps.sum() * 0  # stays in the graph
    total = maps.sum(1, keepdim=True)  # (G, 1)
    log_attention = (maps / total.clamp(min=1e-20)).clamp(min=1e-20).log()  # (G, N)
    target = target.to(maps)
    divergence = (target * (target.log() - log_attention)).sum(1)  # (G,)
    is_good = (accuracy.to(maps.device) >= GOOD_REWARD) & (total[:, 0] > 0)
    return torch.where(is_good, divergence, 0.0).mean()
