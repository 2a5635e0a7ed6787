"""Everything that differs between model families: the processor, and how its pixels become image tokens.

The rest is read off the model: M-RoPE where it has `get_rope_index`, the padded layout where a layer is not plain
attention, the vision tower's inputs from the signature of `get_image_features`.

To add a family (a transformers class with `get_image_features` and `mm_encoder_outputs`):

1. Add an entry to FAMILIES: the config's `model_type`, the name of the processor class, and how pictures become tokens:
   PatchRows for rows of patches as in Qwen, Tiles for square tiles of equally many tokens, or a new class with the same
   three functions.
2. Add a builder of a tiny random model with the real processor class to tests/tiny_models.py.
3. Run `pytest tests/model/test_families.py -k NAME`. It changes pixels and checks which features change, and compares
   log-probs, gradients, sampling and attention with transformers' own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sayo.settings import UserError


class PolicyError(UserError):
    """A model, adapter or processor that cannot be used."""


class PatchRows:
    """Qwen: a picture keeps its aspect ratio; merge_size² patches, rows of `pixel_values`, make one token."""

    @staticmethod
    def token_pixels(processed: dict, processor) -> Tensor:
        """The processor's output to (N, 3, pixels), the pixels of each image token's square cell, in prompt order."""
        patches, image_processor = processed["pixel_values"], processor.image_processor
        size, merge = image_processor.patch_size, image_processor.merge_size
        patches = patches.view(-1, merge**2, 3, image_processor.temporal_patch_size, size**2)
        return patches[:, :, :, 0].transpose(1, 2).flatten(2)  # all frames of a still picture are equal

    @staticmethod
    def set_max_pixels(processor, max_pixels: int) -> None:
        """Shrink larger pictures to this area. Raises PolicyError when that is less than one token."""
        image_processor = processor.image_processor
        cell = image_processor.patch_size * image_processor.merge_size
        _at_least_one_token(max_pixels, cell)
        shortest = min(image_processor.size["shortest_edge"], max_pixels)
        image_processor.size = dict(image_processor.size) | {"longest_edge": max_pixels, "shortest_edge": shortest}

    @staticmethod
    def max_image_tokens(processor) -> int:
        """The most prompt tokens that one picture can become."""
        image_processor = processor.image_processor
        cells = image_processor.size["longest_edge"] // (image_processor.patch_size * image_processor.merge_size) ** 2
        # A picture too flat for one row of cells still gets one, at an aspect ratio of up to 200.
        return max(cells, math.isqrt(200 * cells))


class Tiles:
    """InternVL: a picture is resized to a grid of square tiles; several tiles are followed by a thumbnail."""

    tokens_per_tile = "image_seq_length"  # the processor's attribute

    @classmethod
    def token_pixels(cls, processed: dict, processor) -> Tensor:
        tiles = processed["pixel_values"].flatten(0, -4)  # (tiles, 3, H, W)
        side = math.isqrt(getattr(processor, cls.tokens_per_tile))
        # Rounded down: no token sees the pixels after a tile's last whole patch (6 of 384 in SmolVLM2-2.2B).
        cell = tiles.shape[-1] // side
        tiles = tiles[..., : side * cell, : side * cell].reshape(-1, 3, side, cell, side, cell)
        return tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, cell * cell)  # tile by tile, row by row

    @staticmethod
    def set_max_pixels(processor, max_pixels: int) -> None:
        image_processor = processor.image_processor
        tile = image_processor.size["height"]
        _at_least_one_token(max_pixels, tile)
        image_processor.max_patches = max_pixels // tile**2
        image_processor.min_patches = min(image_processor.min_patches, image_processor.max_patches)

    @classmethod
    def max_image_tokens(cls, processor) -> int:
        return (processor.image_processor.max_patches + 1) * getattr(processor, cls.tokens_per_tile) + 2


class SplitTiles(Tiles):
    """SmolVLM: the longest side is resized to a fixed length; each tile has a marker, and the thumbnail comes last."""

    tokens_per_tile = "image_seq_len"

    @staticmethod
    def set_max_pixels(processor, max_pixels: int) -> None:
        image_processor = processor.image_processor
        tile = image_processor.max_image_size["longest_edge"]
        _at_least_one_token(max_pixels, tile)
        longest = math.isqrt(max_pixels) // tile * tile
        image_processor.size = {"longest_edge": min(image_processor.size["longest_edge"], longest)}

    @classmethod
    def max_image_tokens(cls, processor) -> int:
        image_processor = processor.image_processor
        tiles = math.ceil(image_processor.size["longest_edge"] / image_processor.max_image_size["longest_edge"])
        # Each tile adds a delimiter, its row and column, and at most one line break.
        return (tiles**2 + 1) * (getattr(processor, cls.tokens_per_tile) + 3) + 3


def _at_least_one_token(max_pixels: int, side: int) -> None:
    if max_pixels < side * side:
        smallest = f"{side * side} ({side} x {side}, one token or tile of this model)"
        raise PolicyError(f"max_pixels={max_pixels}: give {smallest} or more")


# model_type of the config: name of the processor class, and how its pictures become tokens
FAMILIES = {
    "qwen3_vl": ("Qwen3VLProcessor", PatchRows),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", PatchRows),
    "qwen3_5": ("Qwen3VLProcessor", PatchRows),
    "internvl": ("InternVLProcessor", Tiles),
    "smolvlm": ("SmolVLMProcessor", SplitTiles),
}
# The language model's module: what is quantized, and what lora_targets="language" adapts.
LANGUAGE_MODULE = r"(language_model|text_model)"


def unsupported(what: str) -> PolicyError:
    """The error about a model or processor of an unknown family."""
    return PolicyError(
        f"{what}: supported are {', '.join(sorted(FAMILIES))} (InternVL in its -HF form); to support another, add its "
        "entry to FAMILIES in families.py, whose first lines say how"
    )


def pictures_of(processor) -> type:
    """How this processor's pictures become tokens. Raises PolicyError for an unknown family."""
    for name, pictures in FAMILIES.values():
        if name == type(processor).__name__:
            return pictures
    raise unsupported(f"processor {type(processor).__name__} belongs to no known model family")


def not_finite(model: nn.Module) -> PolicyError:
    """The error about activations that are not finite: of what, and what to do about it."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        of = "the adapter" if "lora_" in broken[0] else "the model"
        return PolicyError(
            f"weights of {of} are not finite ({broken[0]}): give an earlier checkpoint, or load it again"
        )
    dtype = next(model.parameters()).dtype
    if dtype == torch.float32:
        return PolicyError("the model's activations are not finite in float32: its weights are broken; load it again")
    return PolicyError(
        f"dtype: the model's activations are not finite in {str(dtype).removeprefix('torch.')}; give --dtype bfloat16, "
        "or float32 where the GPU has no bfloat16"
    )
