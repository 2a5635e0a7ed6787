"""One prompt: the model's own processor and chat template, boxes to image tokens, positions, picture features."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor, nn

from data.examples import DataError, load_picture
from data.regions import paint_region
from families import LANGUAGE_MODULE, PolicyError, pictures_of
from grader import choice_labels

LARGE_PICTURE = 2**23  # pixels
SYSTEM_PROMPT = (
    "Look at the part of the image that the question is about, reason briefly, then answer in <answer></answer>."
)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper (LoRA layers are in place there), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_device(model: nn.Module) -> torch.device:
    return base_model(model).get_input_embeddings().weight.device


# --- one prompt -------------------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """An encoded question. P prompt tokens, N of them image tokens.

    `coverage` is the share of each image token's picture cell inside the boxes, in [0, 1]; `border` says which cells
    touch the edge of their picture; `counted` which image tokens the attention on the image is averaged over (None:
    all).
    """

    input_ids: Tensor  # (P,)
    image_token_index: Tensor  # (N,) positions in input_ids
    coverage: Tensor  # (N,)
    model_inputs: dict = field(repr=False)  # pixels, grids: whatever the model's vision side takes
    border: Tensor | None = None  # (N,) boolean
    counted: Tensor | None = None  # (N,) boolean
    image_features: object = field(default=None, repr=False)  # (whose, what): a frozen vision tower's output, kept
    position_ids: Tensor | None = field(default=None, repr=False)  # (axes, P), see prompt_positions


def question_text(example: dict) -> str:
    """The user's turn: the question, and the choices on lines of their own, each with its letter or number."""
    choices = example.get("choices") or []
    lines = [f"{label}. {text}" for label, text in zip(choice_labels(choices), choices, strict=True)]
    return "\n".join([example["question"], *lines])


def placeholders_in(processor, text: str) -> list[str]:
    """The model's picture and video placeholders that stand in a text, where they must not."""
    tokens = (processor.image_token, getattr(processor, "video_token", None))
    return [token for token in tokens if token and token in text]


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
    placeholders = placeholders_in(processor, question_text(example))
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
    regions = {name: example.get(name) or [] for name in ("boxes", "polygons", "masks")}
    coverage, border = _coverage_and_border(processor, images, **regions)  # (N,) each
    if len(coverage) != len(image_token_index):
        raise PolicyError(
            f"example {example.get('id')!r}: its pictures are {len(coverage)} tokens by FAMILIES in families.py, but "
            f"{len(image_token_index)} in the prompt; correct the entry of {type(processor).__name__}"
        )
    return Prompt(input_ids, image_token_index, coverage, dict(encoded), border)


def _per_picture(name: str, regions, num_pictures: int, is_flat) -> list[list]:
    """One list of boxes or polygons for each picture; `is_flat` tells the form that a single picture may have."""
    regions = regions.tolist() if hasattr(regions, "tolist") else regions
    if not regions:
        return [[] for _ in range(num_pictures)]
    if any(entry and is_flat(entry) for entry in regions):
        regions = [regions]
    if len(regions) != num_pictures:
        raise ValueError(
            f"{len(regions)} lists of {name} for {num_pictures} pictures: give one list (it may be empty) for each"
        )
    return regions


def regions_by_picture(num_pictures: int, boxes: Sequence, polygons: Sequence = (), masks: Sequence = ()) -> list:
    """(boxes, polygons, mask) of each picture, from the forms that region_coverage takes."""
    boxes = _per_picture("boxes", boxes, num_pictures, lambda box: not isinstance(box[0], Iterable))
    polygons = _per_picture("polygons", polygons, num_pictures, lambda polygon: not isinstance(polygon[0][0], Iterable))
    return list(zip(boxes, polygons, masks or [None] * num_pictures, strict=True))


def region_coverage(
    processor, images: Sequence[Image.Image], boxes: Sequence, polygons: Sequence = (), masks: Sequence = ()
) -> Tensor:
    """Share of every image token's cell that lies inside the region: the boxes, polygons and masks together.

    The region is painted white on a black picture of the original's size, and that picture goes through the model's
    own processor: whatever it does to a photograph (resize, tile, pad, thumbnail), it does to the region.

    Args:
        images: the pictures of one prompt, or their paths.
        boxes: for one picture a list of [x1, y1, x2, y2] in its pixels (or a tensor); for several, a list of lists.
        polygons: for one picture a list of [[x, y], ...]; for several, a list of such lists.
        masks: one for each picture, of its size, not zero where the region is; None for none.

    Returns:
        (N,) float tensor in [0, 1], in the order of the prompt's image tokens; with tiles and a thumbnail, the region
        is in both. A box smaller than a cell keeps its share; a region that vanishes altogether when a huge picture is
        shrunk is grown until it shows, so that none is ever empty.

    Raises:
        ValueError: the number of box lists is not the number of pictures, or a box has no area or lies outside.
        PolicyError: a processor of no known family.
    """
    return _coverage_and_border(processor, images, boxes, polygons, masks)[0]


def _coverage_and_border(processor, images, boxes, polygons=(), masks=()) -> tuple[Tensor, Tensor]:
    """region_coverage, and which cells touch the edge of their picture: a frame in another color of the painting."""
    pictures = pictures_of(processor)
    images = [image if isinstance(image, Image.Image) else load_picture(image) for image in images]
    parts, borders = [], []
    for image, own in zip(images, regions_by_picture(len(images), boxes, polygons, masks), strict=True):
        region, frame = paint_region(image.size, *own), _frame(image.size)
        while True:
            painting = Image.merge("RGB", [band.convert("L") for band in (region, frame, region)])
            pixels = pictures.token_pixels(_processed(processor, painting), processor).float()  # (n, 3, pixels)
            # Resizing overshoots beside an edge.
            part = pixels[:, 0].mean(1).clamp(0, 1)  # (n,)
            bounds = region.getbbox()
            if bounds is None or part.any():
                break
            x1, y1, x2, y2 = bounds
            region = paint_region(image.size, [(2 * x1 - x2, 2 * y1 - y2, 2 * x2 - x1, 2 * y2 - y1)])
        parts.append(part)
        borders.append(pixels[:, 1].amax(1) > 0.1)
    return torch.cat(parts), torch.cat(borders)


def _frame(size: tuple[int, int]) -> Image.Image:
    """The outermost pixels of a picture, as many as are still seen when it is shrunk to some 256 pixels a side."""
    frame = Image.new("1", size, 1)
    x, y = (max(1, round(side / 256)) for side in size)
    frame.paste(0, (x, y, max(x, size[0] - x), max(y, size[1] - y)))
    return frame


def _processed(processor, picture, **options) -> dict:
    """One picture, not normalized, through the whole processor: it may give its image processor further settings."""
    return processor(text=[processor.image_token], images=[picture], do_normalize=False, return_tensors="pt", **options)


def token_cells(processor, image: Image.Image) -> Tensor:
    """Where each token of a picture comes from: (N, 4) boxes [x1, y1, x2, y2] in its pixels, for drawing.

    Two ramps, x and y of every pixel, go through the model's own processor; what arrives in a token's cell says where
    it was. With tiles and a thumbnail, cells lie on top of each other. For pictures of more than LARGE_PICTURE pixels
    the ramps have 256 steps, which is all that memory allows and finer than a drawing shows.
    """
    is_large, limit = image.width * image.height > LARGE_PICTURE, torch.tensor([image.width, image.height])
    ramps = [torch.arange(side) + 0.5 for side in (image.width, image.height)]
    if is_large:
        ramps = [(ramp * 255 / len(ramp)).round().to(torch.uint8) for ramp in ramps]
    x, y = ramps[0].expand(image.height, -1), ramps[1][:, None].expand(-1, image.width)
    options = {"do_rescale": False, "input_data_format": "channels_first"}
    processed = _processed(processor, torch.stack([x, y, x]), **options)  # (3, H, W) in
    pixels = pictures_of(processor).token_pixels(processed, processor)[:, :2].float()  # (N, 2, pixels)
    if is_large:
        pixels = pixels * limit[:, None] / 255
    side = math.isqrt(pixels.shape[-1])
    # From the centres of the outermost pixels to their edges.
    low, high = pixels.min(-1).values, pixels.max(-1).values  # (N, 2)
    margin = (high - low) / (2 * max(1, side - 1))
    margin = margin.where(high > low, 0.5)  # a picture one pixel wide has no slope
    return torch.cat([(low - margin).clamp(min=0), torch.minimum(high + margin, limit)], dim=1)


def prompt_positions(model: nn.Module, prompt: Prompt) -> Tensor:
    """Position ids of the prompt, (axes, P): three axes for M-RoPE (Qwen), one for all others. Kept on the prompt."""
    if prompt.position_ids is None:
        inner = base_model(model).model
        if hasattr(inner, "get_rope_index"):
            wanted = ("mm_token_type_ids", "image_grid_thw")
            inputs = {name: prompt.model_inputs[name].cpu() for name in wanted}
            prompt.position_ids = inner.get_rope_index(prompt.input_ids[None].cpu(), **inputs)[0][:, 0]
        else:
            prompt.position_ids = torch.arange(len(prompt.input_ids))[None]
    return prompt.position_ids


def vision_is_frozen(model: nn.Module) -> bool:
    """True when no adapter and no trained weight sits outside the language model, so features may be kept."""
    return not any(
        parameter.requires_grad or "lora_" in name
        for name, parameter in base_model(model).model.named_parameters()
        if not re.search(LANGUAGE_MODULE, name)
    )


def image_features(model: nn.Module, prompts: Sequence[Prompt]):
    """The vision tower's output for the pictures of all prompts, in their order, in the class's own record.

    A frozen tower runs once per prompt; what it said stays on the prompt for the later stages.
    """
    inner, frozen, outputs = base_model(model).model, vision_is_frozen(model), []
    wanted = inspect.signature(type(inner).get_image_features).parameters
    for prompt in prompts:
        owner, output = prompt.image_features or (None, None)
        if owner is not inner or not frozen:
            inputs = {
                name: value.to(model_device(model)) for name, value in prompt.model_inputs.items() if name in wanted
            }
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                output = inner.get_image_features(**inputs, return_dict=True)
            if frozen:
                prompt.image_features = inner, output
        outputs.append(output)
    parts = [part for output in outputs for part in output.pooler_output]  # one for each picture, tile or prompt
    whole = isinstance(outputs[0].pooler_output, Tensor)  # (tiles, tokens, D)
    merged = type(outputs[0])(pooler_output=torch.stack(parts) if whole else tuple(parts))
    if getattr(outputs[0], "deepstack_features", None) is not None:
        layers = zip(*(output.deepstack_features for output in outputs), strict=True)
        merged.deepstack_features = [tuple(part for layer in same for part in layer) for same in layers]
    return merged
