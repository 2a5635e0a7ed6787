"""The attention loss of EASE (arXiv 2605.30912): good completions are pulled to look at the annotated region.

A loss on attention itself, beside the policy gradient, where SAYO has a reward: lambda * 1[R >= 0.5] * KL(target map ||
attention map), at one layer two thirds up the model.
"""

import torch
from torch import Tensor

from data.regions import paint_region
from families import PolicyError
from packing import layer_types, model_layout
from prompts import example_images, regions_by_picture, token_cells

GOOD_REWARD = 0.5  # completions of at least so much accuracy reward have the loss: format alone does not open the gate
FLOOR = 0.1  # of the target map, whose highest point is 1: the background is not forbidden
WIDTH = 0.25  # standard deviation of a box's Gaussian, in sides of the box
NARROWEST = 0.5  # the same in sides of a token's cell: a narrower one would fall between the centers of cells


def ease_layer(model) -> int:
    """The decoder layer of EASE, floor(2 L / 3), counted from 0.

    Raises:
        PolicyError: the model takes the padded layout, whose attention is not kept.
    """
    if model_layout(model) == "padded":
        raise PolicyError("ease_weight: this model has linear attention, for which there is no such loss; leave it out")
    return 2 * len(layer_types(model)) // 3


def target_map(processor, example: dict) -> Tensor | None:
    """(N,) float32 over the image tokens, sums to 1: Gaussians on the boxes above a floor; None without a region.

    The value of a token is that at its cell's center, scaled so that each box has its 1; where boxes overlap, the
    largest counts. Of a picture's polygons and mask, the box around them counts.
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
    """Mean over the group of 1[R >= 0.5] * KL(target || attention on the picture, made to sum to 1), in nats.

    Args:
        maps: (G, N) attention of every completion on the image tokens, differentiable; a row of zeros (an empty
            completion) has no loss.
        target: (N,) sums to 1; None, of an example without boxes, has no loss. accuracy: (G,) accuracy rewards.
    """
    if target is None:
        return maps.sum() * 0  # still a part of the graph
    total = maps.sum(1, keepdim=True)  # (G, 1)
    log_attention = (maps / total.clamp(min=1e-20)).clamp(min=1e-20).log()  # (G, N)
    target = target.to(maps)
    divergence = (target * (target.log() - log_attention)).sum(1)  # (G,)
    is_good = (accuracy.to(maps.device) >= GOOD_REWARD) & (total[:, 0] > 0)
    return torch.where(is_good, divergence, 0.0).mean()
