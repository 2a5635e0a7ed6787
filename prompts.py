"""One prompt: the model's own processor and chat template, boxes to image tokens, positions, picture features.

Everything in which model families differ is here, in FAMILIES. A further family is one entry there; the tests of
tests/test_vlm.py say whether it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from data.examples import DataError, load_picture

SYSTEM_PROMPT = (
    "Look at the part of the image that the question is about, reason briefly, then answer in <answer></answer>."
)

# --- what differs between model families ------------------------------------------------------------------------


def _patch_sequence_shares(processed: dict, image_processor) -> Tensor:
    """Qwen: patches come as rows, the merge_size² patches of one visual token next to each other."""
    patches = processed["pixel_values"].float()  # (num_patches, channels * time * patch * patch)
    return patches.mean(-1).view(-1, image_processor.merge_size**2).mean(-1)  # (N,)


class PolicyError(ValueError):
    """A model, adapter or processor that cannot be used. The message names it, what is valid, and the fix."""


@dataclass(frozen=True)
class Family:
    """One model family. `token_shares` turns processed mask pixels into one share per image token, in prompt order."""

    processor: str
    token_shares: Callable[[dict, object], Tensor]
    multimodal_rope: bool


FAMILIES = {
    "qwen3_vl": Family("Qwen3VLProcessor", _patch_sequence_shares, multimodal_rope=True),
    "qwen2_5_vl": Family("Qwen2_5_VLProcessor", _patch_sequence_shares, multimodal_rope=True),
}


def supported_families() -> str:
    return f"supported are {', '.join(sorted(FAMILIES))}; to support another, add its entry to FAMILIES in prompts.py"


def _processor_family(processor) -> Family:
    for family in FAMILIES.values():
        if family.processor == type(processor).__name__:
            return family
    raise PolicyError(f"processor {type(processor).__name__} belongs to no known model family: {supported_families()}")


def set_max_pixels(processor, max_pixels: int) -> None:
    """Let pictures become at most `max_pixels` pixels (area). Raises PolicyError when that is not a token's worth."""
    image_processor = processor.image_processor
    cell = image_processor.patch_size * image_processor.merge_size
    if max_pixels < cell * cell:
        raise PolicyError(
            f"max_pixels={max_pixels} is less than one image token: give {cell * cell} ({cell} x {cell}) or more"
        )
    size = dict(image_processor.size)
    size["longest_edge"] = max_pixels  # the processor's name for the largest area
    size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
    image_processor.size = size


def image_grids(processor, prompt: Prompt) -> list[tuple[int, int]]:
    """(rows, columns) of the image tokens of every picture of a prompt, in order."""
    merge = processor.image_processor.merge_size
    return [(int(height) // merge, int(width) // merge) for _, height, width in prompt.model_inputs["image_grid_thw"]]


def max_image_tokens(processor) -> int:
    """Most tokens that one picture can become."""
    image_processor = processor.image_processor
    return image_processor.size["longest_edge"] // (image_processor.patch_size * image_processor.merge_size) ** 2


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper (LoRA layers are in place there), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_device(model: nn.Module) -> torch.device:
    return base_model(model).get_input_embeddings().weight.device


# --- one prompt -------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """An encoded question. P prompt tokens, N of them image tokens.

    `coverage` is the share of each image token's picture cell inside the boxes, in [0, 1].
    """

    input_ids: Tensor  # (P,)
    image_token_index: Tensor  # (N,) positions in input_ids
    coverage: Tensor  # (N,)
    model_inputs: dict = field(repr=False)  # pixels, grids: whatever the model's vision side takes
    image_features: object = field(default=None, repr=False)  # (whose, what): a frozen vision tower's output, kept
    position_ids: Tensor | None = field(default=None, repr=False)  # (axes, P), see prompt_positions


def question_text(example: dict) -> str:
    """The user's turn: the question, and the choices on lines of their own, lettered from A."""
    lines = [example["question"]]
    for number, choice in enumerate(example.get("choices") or []):
        lines.append(f"{chr(ord('A') + number)}. {choice}")
    return "\n".join(lines)


def placeholders_in(processor, example: dict) -> list[str]:
    """The model's picture and video placeholders that stand in the text of an example, where they must not."""
    return [token for token in (processor.image_token, processor.video_token) if token in question_text(example)]


def example_images(example: dict) -> list[Image.Image]:
    images = example.get("images") or [example["image"]]
    return [load_picture(image) for image in images]


def prompt_text(processor, example: dict, system_prompt: str | None = None) -> str:
    """The chat as the model's own template renders it, up to where the assistant begins."""
    num_images = len(example.get("images") or [example["image"]])
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question_text(example)}]
    messages = [{"role": "user", "content": content}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode_prompt(processor, example: dict, system_prompt: str | None = None) -> Prompt:
    """Encode an example with the model's own processor and chat template.

    Args:
        example: the schema of data/examples.py; without `boxes` the coverage is zero everywhere.
        system_prompt: text of a system turn, or None for no such turn.

    Returns:
        A Prompt on the CPU.

    Raises:
        DataError: the question contains the model's image placeholder. PolicyError: a processor of no known family.
    """
    placeholders = placeholders_in(processor, example)
    if placeholders:
        raise DataError(
            f"example {example.get('id')!r}: remove {', '.join(placeholders)}, which stands for a picture or a video, "
            f"from the question or the choices: {question_text(example)[:80]!r}"
        )
    images = example_images(example)
    text = prompt_text(processor, example, system_prompt)
    encoded = processor(text=[text], images=images, return_tensors="pt")
    input_ids = encoded.pop("input_ids")[0]  # (P,)
    encoded.pop("attention_mask", None)
    image_token_index = (input_ids == processor.image_token_id).nonzero().flatten()  # (N,)
    coverage = region_coverage(processor, images, example.get("boxes") or [])  # (N,)
    return Prompt(input_ids, image_token_index, coverage, dict(encoded))


def region_coverage(processor, images: Sequence[Image.Image], boxes: Sequence) -> Tensor:
    """Share of every image token's cell that lies inside the boxes.

    The boxes are painted white on a black picture of the original's size, and that picture goes through the model's
    own image processor: whatever it does to a photograph (resize, tile, pad, thumbnail), it does to the mask.

    Args:
        images: the pictures of one prompt, or their paths.
        boxes: for one picture a list of [x1, y1, x2, y2] in its pixels (or a tensor); for several, a list of lists.

    Returns:
        (N,) float tensor in [0, 1], in the order of the prompt's image tokens. A box smaller than a cell keeps its
        share; boxes that vanish altogether when a huge picture is shrunk are grown until they show, so that no region
        is ever empty.

    Raises:
        ValueError: the number of box lists is not the number of pictures, or a box has no area or lies outside.
    """
    family = _processor_family(processor)
    images = [image if isinstance(image, Image.Image) else load_picture(image) for image in images]
    boxes = boxes.tolist() if hasattr(boxes, "tolist") else boxes
    if not boxes:
        boxes = [[] for _ in images]
    elif any(entry and not isinstance(entry[0], Iterable) for entry in boxes):
        boxes = [boxes]  # the flat form of a single picture
    if len(boxes) != len(images):
        raise ValueError(
            f"{len(boxes)} lists of boxes for {len(images)} pictures: give one list (it may be empty) for each"
        )
    masks = []
    for image, image_boxes in zip(images, boxes, strict=True):
        mask = Image.new("RGB", image.size)
        for x1, y1, x2, y2 in image_boxes:
            if x2 <= x1 or y2 <= y1 or x2 <= 0 or y2 <= 0 or x1 >= image.width or y1 >= image.height:
                raise ValueError(
                    f"box {[x1, y1, x2, y2]}: give x1 < x2 and y1 < y2 in pixels of its {image.width} x {image.height} "
                    "picture"
                )
            left, top = round(x1), round(y1)
            # Pillow's rectangle includes its last pixel; a box, like a slice, does not. At least one pixel is painted.
            right, bottom = max(left + 1, round(x2)) - 1, max(top + 1, round(y2)) - 1
            left, top = min(left, image.width - 1), min(top, image.height - 1)
            ImageDraw.Draw(mask).rectangle((left, top, max(left, right), max(top, bottom)), fill="white")
        masks.append(mask)
    processed = processor.image_processor(images=masks, do_normalize=False, return_tensors="pt")
    # Bicubic resizing overshoots beside an edge.
    coverage = family.token_shares(processed, processor.image_processor).clamp(0, 1)  # (N,)
    if any(boxes) and not coverage.any():
        grown = [
            [(2 * x1 - x2, 2 * y1 - y2, 2 * x2 - x1, 2 * y2 - y1) for x1, y1, x2, y2 in image_boxes]
            for image_boxes in boxes
        ]
        return region_coverage(processor, images, grown)
    return coverage


def prompt_positions(model: nn.Module, prompt: Prompt) -> Tensor:
    """Position ids of the prompt, (axes, P): three axes for M-RoPE (Qwen), one for all others. Kept on the prompt."""
    if prompt.position_ids is None:
        base = base_model(model)
        if FAMILIES[base.config.model_type].multimodal_rope:
            wanted = ("mm_token_type_ids", "image_grid_thw")
            inputs = {name: prompt.model_inputs[name].cpu() for name in wanted}
            prompt.position_ids = base.model.get_rope_index(prompt.input_ids[None].cpu(), **inputs)[0][:, 0]
        else:
            prompt.position_ids = torch.arange(len(prompt.input_ids))[None]
    return prompt.position_ids


def vision_is_frozen(model: nn.Module) -> bool:
    """True when no adapter and no trained weight sits outside the language model, so features may be kept."""
    return not any(
        parameter.requires_grad or "lora_" in name
        for name, parameter in base_model(model).model.named_parameters()
        if "language_model" not in name
    )


def image_features(model: nn.Module, prompts: Sequence[Prompt]):
    """The vision tower's output for the pictures of all prompts, in their order, in the class's own record.

    A frozen tower runs once per prompt; what it said stays on the prompt for the later stages.
    """
    inner, frozen, outputs = base_model(model).model, vision_is_frozen(model), []
    for prompt in prompts:
        owner, output = prompt.image_features or (None, None)
        if owner is not inner or not frozen:
            inputs = {
                name: prompt.model_inputs[name].to(model_device(model)) for name in ("pixel_values", "image_grid_thw")
            }
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                output = inner.get_image_features(**inputs, return_dict=True)
            if frozen:
                prompt.image_features = inner, output
        outputs.append(output)
    merged = type(outputs[0])(pooler_output=tuple(part for output in outputs for part in output.pooler_output))
    if getattr(outputs[0], "deepstack_features", None) is not None:
        layers = zip(*(output.deepstack_features for output in outputs), strict=True)
        merged.deepstack_features = [tuple(part for layer in same for part in layer) for same in layers]
    return merged
