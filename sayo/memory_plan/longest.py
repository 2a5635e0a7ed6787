"""The longest prompt of a data set, and how many groups of that size share a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from PIL import Image
from tqdm import tqdm

from sayo.examples.pictures import picture_size
from sayo.model.packing import split_by_tokens
from sayo.model.prompts import prompt_text
from sayo.run.config import EXAMPLES_AT_A_TIME
from sayo.settings import no_bar

NUM_SCENES = 64  # scenes are drawn by sayo itself: one size, questions of a few lengths


@cache
def _picture_tokens(processor, size: tuple[int, int]) -> int:
    """The number of prompt tokens of a picture of this (width, height)."""
    if hasattr(processor, "_get_num_multimodal_tokens"):  # from the size alone
        return processor._get_num_multimodal_tokens(image_sizes=[size[::-1]]).num_image_tokens[0]
    return len(processor(text=[processor.image_token], images=[Image.new("RGB", size)])["input_ids"][0])


def num_searched(examples: Sequence) -> int:
    """How many examples longest_prompt looks at: all, but of `scenes` only the first NUM_SCENES."""
    return min(NUM_SCENES, len(examples)) if examples.name.partition(":")[0] == "scenes" else len(examples)


def longest_prompt(processor, examples: Sequence, system_prompt: str | None) -> int:
    """Index of the example with the most prompt tokens, text and pictures; no picture is decoded."""
    lengths = []
    for index in tqdm(range(num_searched(examples)), "longest", disable=no_bar(None)):
        row = examples.raw(index)
        text = processor.tokenizer(prompt_text(processor, row, system_prompt), verbose=False).input_ids
        sizes = [image.size if isinstance(image, Image.Image) else picture_size(image) for image in row["images"]]
        lengths.append(len(text) + sum(_picture_tokens(processor, size) for size in sizes))
    return max(range(len(lengths)), key=lengths.__getitem__)


def side_by_side(group_tokens: int, num_groups: int, sampling_tokens: int) -> int:
    """How many groups of so many tokens share a cache while they are sampled."""
    return split_by_tokens([group_tokens] * num_groups, sampling_tokens)[0].stop


def evaluated_at_a_time(config) -> int:
    """Prompts that an evaluation has in memory; 0 without an evaluation."""
    return 0 if config.evaluated_data == "none" else min(EXAMPLES_AT_A_TIME, config.eval_limit or EXAMPLES_AT_A_TIME)
