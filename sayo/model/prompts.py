"""Encode prompts: chat template and processor, regions to image tokens, positions, features of the vision tower."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from sayo.examples.pictures import DataError, load_picture
from sayo.examples.regions import paint_region
from sayo.grader.grader import TAGS, choice_labels
from sayo.model.families import LANGUAGE_MODULE, PolicyError, pictures_of
from sayo.settings import ConfigError, no_bar

LARGE_PICTURE = 2**23  # pixels
# What public data writes where a picture belongs: LLaVA's, Qwen's, Llama's, Phi's, InternLM's, Gemma's, Pixtral's.
_MARK = r"(?:<image>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|image(?:_\d+)?\|>|<ImageHere>|"
_MARK += r"<start_of_image>|\[IMG\])"
PICTURE_MARK = re.compile(rf"{_MARK}[ \t]?")
MARKS_AT_AN_EDGE = re.compile(rf"^(?:[ \t]*{_MARK})+[ \t]*|[ \t]*(?:{_MARK}[ \t]*)+$", re.MULTILINE)
OWN_ARGUMENTS = ("messages", "add_generation_prompt", "tokenize")  # of the chat template, which sayo gives
SYSTEM_PROMPT = (
    "Look at the part of the image that the question is about, reason briefly, then answer in <answer></answer>."
)


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper (with its LoRA layers), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_device(model: nn.Module) -> torch.device:
    return base_model(model).get_input_embeddings().weight.device


@dataclass
class Prompt:
    """An encoded question: P prompt tokens, N of them image tokens."""

    input_ids: Tensor  # (P,)
    image_token_index: Tensor  # (N,) positions in input_ids
    coverage: Tensor  # (N,) share of each image token's cell inside the region, in [0, 1]
    model_inputs: dict = field(repr=False)  # pixels, grids: what the vision tower takes
    border: Tensor | None = None  # (N,) boolean: the cell touches the edge of its picture
    counted: Tensor | None = None  # (N,) boolean: image tokens that image attention averages over; None for all
    image_features: object = field(default=None, repr=False)  # (model, output) of a frozen vision tower
    position_ids: Tensor | None = field(default=None, repr=False)  # (axes, P), see prompt_positions


def question_text(example: dict) -> str:
    """The user's turn: the question without picture marks and, one per line, the choices with letter or number."""
    choices = example.get("choices") or []
    lines = [f"{label}. {text}" for label, text in zip(choice_labels(choices), choices, strict=True)]
    return "\n".join([without_marks(example["question"], len(example.get("images") or [None])), *lines])


def without_marks(question: str, num_pictures: int) -> str:
    """A question without marks such as "<image>", which say where its pictures belong: they stand before it anyway.

    Marks at the start or end of a line are left out and, when there are as many as pictures, those inside one, too.
    """
    if len(PICTURE_MARK.findall(question)) == num_pictures:
        return PICTURE_MARK.sub("", question).strip()
    shorter = MARKS_AT_AN_EDGE.sub("", question)
    return question if shorter == question else shorter.strip()


def control_tokens_in(processor, text: str) -> list[str]:
    """What a text must not hold: control tokens of the model (the end of a turn, its pictures), and picture marks."""
    tokenizer, found = processor.tokenizer, [match.strip() for match in PICTURE_MARK.findall(text)]
    control, unknown = _control_tokens(tokenizer), tokenizer.unk_token_id  # which any character may become
    folded = unicodedata.normalize("NFKC", text).casefold()
    may_hold = any(token.strip().casefold() in folded for token in control.values())  # most texts: not tokenized
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids if may_hold else []
    found += [control[token] for token in ids if token in control and (token != unknown or control[token] in text)]
    placeholders = (processor.image_token, getattr(processor, "video_token", None))
    return list(dict.fromkeys(found + [token for token in placeholders if token and token in text]))


@lru_cache(maxsize=4)
def _control_tokens(tokenizer) -> dict[int, str]:
    """Texts of the tokens that structure a chat, by id."""
    added = {number: (str(token), token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    return {n: text for n, (text, special) in added.items() if (special or text[:2] == "<|") and text not in TAGS}


def example_images(example: dict) -> list[Image.Image]:
    images = example.get("images") or [example["image"]]
    return [load_picture(image) for image in images]


def prompt_text(processor, example: dict, system_prompt: str | None = None) -> str:
    """The chat in the model's own template, up to the assistant's turn."""
    num_images = len(example.get("images") or [example["image"]])
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question_text(example)}]
    messages = [{"role": "user", "content": content}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    arguments = getattr(processor, "template_arguments", {})
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **arguments)


def set_template_arguments(processor, arguments: Sequence[str]) -> None:
    """Let prompt_text pass arguments to the chat template: name=value, the value in JSON or else text.

    Example: ["enable_thinking=false"]. Raises ConfigError: one of another form, or a name that the template lacks.
    """
    processor.template_arguments = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not (name.isidentifier() and value) or name in OWN_ARGUMENTS:
            raise ConfigError(f"chat_template_kwargs={argument!r:.200}: give name=value, such as enable_thinking=false")
        if not re.search(rf"\b{name}\b", str(processor.chat_template)):
            raise ConfigError(f"chat_template_kwargs={argument!r:.200}: the model's chat template reads no {name}")
        try:
            processor.template_arguments[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except ValueError:
            processor.template_arguments[name] = value


def encode_prompt(processor, example: dict, system_prompt: str | None = None) -> Prompt:
    """Encode an example (see sayo/examples/load.py) with the model's own processor and chat template, on the CPU.

    Without a region the coverage is zero. Raises DataError where the question or a choice holds a control token of the
    model, PolicyError for an unknown family.
    """
    question = question_text(example)
    if tokens := control_tokens_in(processor, question):
        raise DataError(
            f"example {example.get('id')!r}: remove {', '.join(tokens)}, which stands for a picture or a video, or "
            f"controls the chat, from the question or the choices: {question[:80]!r}"
        )
    if not question.strip():
        raise DataError(f"example {example.get('id')!r}: nothing is asked but {example['question'][:80]!r}")
    images = example_images(example)
    encoded = processor(text=[prompt_text(processor, example, system_prompt)], images=images, return_tensors="pt")
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
    """One list of boxes or polygons per picture; `is_flat` recognizes an entry of a single picture's plain list."""
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
    """Share of each image token's cell that lies inside the region: boxes, polygons and masks together.

    The region is painted white on a black picture of the original's size, which goes through the model's own processor:
    whatever it does to a photograph (resize, tile, pad, thumbnail) happens to the region.

    Args:
        images: the pictures of one prompt, or their paths.
        boxes: for one picture a list of [x1, y1, x2, y2] in its pixels (or a tensor); for several, a list of lists.
        polygons: for one picture a list of [[x, y], ...]; for several, a list of such lists.
        masks: one per picture and of its size, nonzero inside the region; None for none.

    Returns:
        (N,) float tensor in [0, 1], in the order of the prompt's image tokens; a thumbnail shows the region again. A
        box smaller than a cell keeps its share. A region that vanishes when a huge picture is shrunk is grown until
        it shows, so that none is empty.

    Raises:
        ValueError: box lists and pictures differ in number, or a box has no area or lies outside.
        PolicyError: an unknown family.
    """
    return _coverage_and_border(processor, images, boxes, polygons, masks)[0]


def _coverage_and_border(processor, images, boxes, polygons=(), masks=()) -> tuple[Tensor, Tensor]:
    """region_coverage, and which cells touch the edge of their picture: the painting's green channel is a frame."""
    pictures = pictures_of(processor)
    images = [image if isinstance(image, Image.Image) else load_picture(image) for image in images]
    parts, borders = [], []
    for image, own in zip(images, regions_by_picture(len(images), boxes, polygons, masks), strict=True):
        region, frame = paint_region(image.size, *own), Image.new("1", image.size, 1)
        x, y = (max(1, round(side / 256)) for side in image.size)  # survives shrinking to 256 pixels a side
        frame.paste(0, (x, y, max(x, image.width - x), max(y, image.height - y)))
        while True:
            painting = Image.merge("RGB", [band.convert("L") for band in (region, frame, region)])
            pixels = pictures.token_pixels(_processed(processor, painting), processor).float()  # (n, 3, pixels)
            part = pixels[:, 0].mean(1).clamp(0, 1)  # (n,); resizing overshoots at edges
            if region.getbbox() is None or part.any():
                break
            x1, y1, x2, y2 = region.getbbox()
            region = paint_region(image.size, [(2 * x1 - x2, 2 * y1 - y2, 2 * x2 - x1, 2 * y2 - y1)])
        parts.append(part)
        borders.append(pixels[:, 1].amax(1) > 0.1)
    return torch.cat(parts), torch.cat(borders)


def _processed(processor, picture, **options) -> dict:
    """One picture, not normalized, through the whole processor, which may pass its image processor more settings."""
    return processor(text=[processor.image_token], images=[picture], do_normalize=False, return_tensors="pt", **options)


def token_cells(processor, image: Image.Image) -> Tensor:
    """Where each token of a picture comes from: (N, 4) boxes [x1, y1, x2, y2] in its pixels, for drawing.

    Two ramps, x and y of every pixel, go through the model's own processor; the values in a token's cell locate it. A
    thumbnail's cells overlap those of the tiles. Above LARGE_PICTURE pixels the ramps have 256 steps to save memory.
    """
    is_large, limit = image.width * image.height > LARGE_PICTURE, torch.tensor([image.width, image.height])
    ramps = [torch.arange(side) + 0.5 for side in (image.width, image.height)]
    if is_large:
        ramps = [(ramp * 255 / len(ramp)).round().to(torch.uint8) for ramp in ramps]
    x, y = ramps[0].expand(image.height, -1), ramps[1][:, None].expand(-1, image.width)
    ramps = torch.stack([x, y, x])  # (3, H, W)
    processed = _processed(processor, ramps, do_rescale=False, input_data_format="channels_first")
    pixels = pictures_of(processor).token_pixels(processed, processor)[:, :2].float()  # (N, 2, pixels)
    if is_large:
        pixels = pixels * limit[:, None] / 255
    low, high = pixels.min(-1).values, pixels.max(-1).values  # (N, 2)
    # From the centers of the outermost pixels to their edges.
    margin = (high - low) / (2 * max(1, math.isqrt(pixels.shape[-1]) - 1))
    margin = margin.where(high > low, 0.5)  # one pixel wide: no slope
    return torch.cat([(low - margin).clamp(min=0), torch.minimum(high + margin, limit)], dim=1)


def prompt_positions(model: nn.Module, prompt: Prompt) -> Tensor:
    """Position ids (axes, P), stored on the prompt: three axes for M-RoPE (Qwen), else one."""
    if prompt.position_ids is None:
        inner = base_model(model).model
        if hasattr(inner, "get_rope_index"):
            inputs = {name: prompt.model_inputs[name].cpu() for name in ("mm_token_type_ids", "image_grid_thw")}
            prompt.position_ids = inner.get_rope_index(prompt.input_ids[None].cpu(), **inputs)[0][:, 0]
        else:
            prompt.position_ids = torch.arange(len(prompt.input_ids))[None]
    return prompt.position_ids


def vision_is_frozen(model: nn.Module) -> bool:
    """Whether neither adapter nor trained weights lie outside the language model, so that features can be reused."""
    return not any(
        parameter.requires_grad or "lora_" in name or "modules_to_save" in name
        for name, parameter in base_model(model).model.named_parameters()
        if not re.search(LANGUAGE_MODULE, name)
    )


def image_features(model: nn.Module, prompts: Sequence[Prompt]):
    """The vision tower's output for the pictures of all prompts, in the model class's own record.

    A frozen tower runs once per prompt; its output stays on the prompt for later forwards.
    """
    inner, device, frozen, outputs = base_model(model).model, model_device(model), vision_is_frozen(model), []
    wanted = inspect.signature(type(inner).get_image_features).parameters
    for prompt in prompts:
        owner, output = prompt.image_features or (None, None)
        if owner is not inner or not frozen:
            inputs = {name: value.to(device) for name, value in prompt.model_inputs.items() if name in wanted}
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                output = inner.get_image_features(**inputs, return_dict=True)
            if frozen:
                prompt.image_features = inner, output
        outputs.append(output)
    parts = [part for output in outputs for part in output.pooler_output]  # one per picture, tile or prompt
    whole = isinstance(outputs[0].pooler_output, Tensor)  # (tiles, tokens, D)
    merged = type(outputs[0])(pooler_output=torch.stack(parts) if whole else tuple(parts))
    if getattr(outputs[0], "deepstack_features", None) is not None:
        layers = zip(*(output.deepstack_features for output in outputs), strict=True)
        merged.deepstack_features = [tuple(part for layer in same for part in layer) for same in layers]
    return merged


def max_positions(model) -> int:
    return base_model(model).config.get_text_config().max_position_embeddings


def check_prompt_length(positions: int, num_tokens: int, max_new_tokens: int, example: dict) -> None:
    """Raise DataError when a prompt of num_tokens and a completion exceed the model's positions."""
    if num_tokens + max_new_tokens > positions:
        raise DataError(
            f"example {example.get('id')!r}: prompt of {num_tokens} tokens + max_new_tokens={max_new_tokens} are more "
            f"than the model's {positions} positions: lower --max_pixels or --max_new_tokens, or shorten the question"
        )


def _most_tokens(text: str) -> int:
    """No tokenizer makes more: a token is a byte or more of the text, composed or decomposed, beside start and end."""
    return max(len(text.encode()), len(unicodedata.normalize("NFKD", text).encode())) + 16


def bad_prompts(positions: int, processor, examples, system_prompt: str | None, max_new_tokens: int) -> list:
    """(index, problem) of each example whose prompt is too long or contains a control token.

    Only prompts that may be too long, by their text and the largest possible pictures, are encoded. `positions` is
    max_positions(model). Notes picture marks that are left out. Raises DataError for a control token in the system
    prompt.
    """
    if tokens := control_tokens_in(processor, system_prompt or ""):
        what = "which stands for a picture or a video, or controls the chat"
        raise DataError(f"system_prompt: remove {', '.join(tokens)}, {what}")
    most_tokens = pictures_of(processor).max_image_tokens(processor)
    # sayo draws all scenes at one small size, so one stands for all.
    num_checked = 1 if examples.name.partition(":")[0] == "scenes" else len(examples)
    found, marked, frames = [], [], {}  # the chat around a question, by the number of pictures: to render it takes long
    for index in tqdm(range(num_checked), desc="prompts", disable=no_bar(num_checked <= 2000), leave=False):
        row = examples.raw(index)
        question, pictures = question_text(row), len(row["images"])
        marked += PICTURE_MARK.findall(row["question"])[:1] if not PICTURE_MARK.search(question) else []
        if question.strip() and not control_tokens_in(processor, question):
            if pictures not in frames:
                frames[pictures] = prompt_text(processor, {"images": row["images"], "question": "?"}, system_prompt)
            room = positions - max_new_tokens - pictures * most_tokens
            if _most_tokens(frames[pictures] + question) <= room:
                continue
            text = prompt_text(processor, row, system_prompt)
            if len(processor.tokenizer(text, verbose=False).input_ids) <= room:
                continue
        try:
            num_tokens = len(encode_prompt(processor, examples[index], system_prompt).input_ids)
            check_prompt_length(positions, num_tokens, max_new_tokens, row)
        except DataError as error:
            found.append((index, str(error)))
    if marked:
        where = f"the questions of {len(marked)} examples of {examples.name}"
        print(f"picture marks such as {marked[0].strip()!r} are left out of {where}", file=sys.stderr)
    return found


def check_prompts(model, processor, examples, config, max_new_tokens: int) -> None:
    """Find unusable prompts before any long work starts; bad_rows="skip" drops them from `examples`.

    `config` has system_prompt and bad_rows. Raises DataError that lists these examples, or when none is left.
    """
    found = bad_prompts(max_positions(model), processor, examples, config.system_prompt, max_new_tokens)
    if found and config.bad_rows == "skip" and len(found) < len(examples):
        examples.drop(found)
        print(f"{len(found)} examples of {examples.name} skipped, first: {found[0][1]}", file=sys.stderr)
    elif found:
        more = [f"and {len(found) - 20} more"] if len(found) > 20 else []
        hint = "--bad_rows skip drops them" if len(found) < len(examples) else "no example is left"
        raise DataError("\n".join([message for _, message in found[:20]] + more + [hint]))


def completion_texts(processor, completions: Sequence[Tensor]) -> list[str]:
    """Completions, each (n_i,) ids, as text without special tokens, but with the tags that an answer is found by.

    Fine-tuned tokenizers may have the tags as special tokens.
    """
    tokenizer = processor.tokenizer
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tags = special & {tokenizer.convert_tokens_to_ids(tag) for tag in TAGS}
    if not tags:
        return tokenizer.batch_decode(completions, skip_special_tokens=True)
    kept = [[number for number in ids.tolist() if number in tags or number not in special] for ids in completions]
    return tokenizer.batch_decode(kept)


def joined_cells(cells: np.ndarray) -> np.ndarray:
    """Cells (N, 4) whose nearly equal edges are made equal, so that a drawing has no gaps."""
    cells = cells.astype(float)
    for low, high in ((0, 2), (1, 3)):
        edges = cells[:, [low, high]].flatten()
        order = edges.argsort(kind="stable")
        near = np.diff(edges[order], prepend=edges[order[0]]) < (cells[:, high] - cells[:, low]).min() / 4
        group = np.cumsum(~near)
        means = np.bincount(group, edges[order]) / np.maximum(1, np.bincount(group))
        edges[order] = means[group]
        cells[:, [low, high]] = edges.reshape(-1, 2)
    return cells
