"""All that differs between model families: which processor, and how its pixels become image tokens.

The rest is asked of the model itself: M-RoPE where it has `get_rope_index`, the padded layout where a layer is not
plain attention, the inputs of the vision tower by the signature of `get_image_features`.

To add a family (a transformers class with `get_image_features` and `mm_encoder_outputs`):

1. Add an entry to FAMILIES: the config's `model_type`, the name of the processor class, and its kind of pictures. Pixel
   rows as Qwen makes them are PatchRows; square tiles of equally many tokens are Tiles. Anything else is a further
   class with the same three functions.
2. Add a builder of a tiny random model with the real processor class to tests/tiny_models.py.
3. `pytest tests/test_families.py -k NAME` changes pixels and looks at which features change, and compares log-probs,
   gradients, sampling and attention with transformers' own: it says whether the entry is right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


class PolicyError(ValueError):
    """A model, adapter or processor that cannot be used. The message names it, what is valid, and the fix."""


class PatchRows:
    """Qwen: a picture keeps its shape; its patches are rows of `pixel_values`, merge_size² of them to a token."""

    @staticmethod
    def token_pixels(processed: dict, processor) -> Tensor:
        patches, image_processor = processed["pixel_values"], processor.image_processor
        size, merge = image_processor.patch_size, image_processor.merge_size
        patches = patches.view(-1, merge**2, 3, image_processor.temporal_patch_size, size**2)
        return patches[:, :, :, 0].transpose(1, 2).flatten(2)  # every frame of a photograph is the same

    @staticmethod
    def set_max_pixels(processor, max_pixels: int) -> None:
        image_processor = processor.image_processor
        cell = image_processor.patch_size * image_processor.merge_size
        _at_least_one_token(max_pixels, cell)
        size = dict(image_processor.size)
        size["longest_edge"] = max_pixels  # the processor's name for the largest area
        size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
        image_processor.size = size

    @staticmethod
    def max_image_tokens(processor) -> int:
        image_processor = processor.image_processor
        cells = image_processor.size["longest_edge"] // (image_processor.patch_size * image_processor.merge_size) ** 2
        # A picture too flat for a whole row of cells gets one all the same: up to 200 times as long as it is high.
        return max(cells, math.isqrt(200 * cells))


class Tiles:
    """InternVL: a picture is resized to a grid of square tiles; several tiles are followed by a thumbnail of all."""

    tokens_per_tile = "image_seq_length"  # the processor's attribute

    @classmethod
    def token_pixels(cls, processed: dict, processor) -> Tensor:
        tiles = processed["pixel_values"].flatten(0, -4)  # (tiles, 3, H, W)
        side = math.isqrt(getattr(processor, cls.tokens_per_tile))
        # Rounded down: no token sees what is left of a tile behind its last whole patch (6 of SmolVLM2-2.2B's 384).
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
    """SmolVLM: the longest side is resized to a fixed length; every tile has a marker, and the thumbnail comes last."""

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
        # Around a tile's tokens stand a delimiter, its row and column, and at most one line break.
        return (tiles**2 + 1) * (getattr(processor, cls.tokens_per_tile) + 3) + 3


def _at_least_one_token(max_pixels: int, side: int) -> None:
    if max_pixels < side * side:
        raise PolicyError(
            f"max_pixels={max_pixels} is less than this model's smallest piece of a picture: give {side * side} "
            f"({side} x {side}) or more"
        )


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        processor: name of its processor class.
        pictures: how a picture becomes tokens, three functions:
            token_pixels(processed, processor): the processor's output to (N, 3, pixels), the pixels in the square cell
            of every image token, in the order of the prompt; set_max_pixels(processor, max_pixels): let pictures
            become at most so large (area), PolicyError when that is too little; max_image_tokens(processor): most
            tokens of a prompt that one picture can become.
    """

    processor: str
    pictures: type


FAMILIES = {
    "qwen3_vl": Family("Qwen3VLProcessor", PatchRows),
    "qwen2_5_vl": Family("Qwen2_5_VLProcessor", PatchRows),
    "qwen3_5": Family("Qwen3VLProcessor", PatchRows),
    "internvl": Family("InternVLProcessor", Tiles),
    "smolvlm": Family("SmolVLMProcessor", SplitTiles),
}

# Names of the module that is the language model: what is quantized, and what "language" LoRA adapts.
LANGUAGE_MODULE = r"(language_model|text_model)"


def unsupported(what: str) -> PolicyError:
    """The error about a model or processor of no known family: what is supported, and how to add one."""
    return PolicyError(
        f"{what}: supported are {', '.join(sorted(FAMILIES))} (InternVL in its -HF form); to support another, add its "
        "entry to FAMILIES in families.py, whose first lines say how"
    )


def pictures_of(processor) -> type:
    """How this processor's pictures become tokens. Raises PolicyError for one of no known family."""
    for family in FAMILIES.values():
        if family.processor == type(processor).__name__:
            return family.pictures
    raise unsupported(f"processor {type(processor).__name__} belongs to no known model family")
