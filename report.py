"""The attention explorer: what policies said about examples, and where each token looked, as one HTML file.

visualize.py writes it. The file needs no network and opens from disk: page/report.html with its style, its script and
its data inside. Questions, answers and completions are untrusted. They travel as JSON in which no "<" is left, the
script shows them as text nodes only, and the page's Content-Security-Policy allows nothing but that one style, that
one script (by their SHA-256) and pictures of the file itself, which Pillow has drawn anew.
"""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter
from tqdm import tqdm

from answers import Answer, switched_to
from data.regions import regions_of
from evaluate import bootstrap_interval
from packing import layer_types
from prompts import encode_prompt, token_cells
from reward import extract_answer
from vlm import attention_maps, resolve_layers

PAGE = Path(__file__).parent / "page"
LONGEST = 512  # pixels of a picture's longest side
FINEST = (10_000, 1024, 576, 256, 144, 64)  # cells that a picture may have; beyond it, neighbours are merged
FEWEST_LAYERS = 3  # before fewer are left, cells are merged
NUMBERS, CELL = 28, 20  # bytes of JSON that a layer has for each token beside its map, and of a cell's edges
TERMS = (
    "Scored are the {percent:.0f} % of a completion's tokens with the highest entropy, at temperature {temperature}. "
    "The attention reward is tanh(log(a / v)), with a their mean attention on the region and v on the whole picture. "
    "TAS is a² / (a² + v²): 0.5 means no preference. The numbers below a completion come from the rewarded layers; "
    "layers are counted from 0."
)

# --- attention maps that fit ------------------------------------------------------------------------------------


def merged_cells(cells: np.ndarray, size: tuple[int, int], most: int) -> tuple[np.ndarray, np.ndarray | None]:
    """At most `most` cells instead of a picture's own, and how attention is shared out among them.

    Args:
        cells: (N, 4) boxes in pixels of a picture of this size (width, height).

    Returns:
        (K, 4) cells, and (N, K) weights that are the share of each own cell's area in each new one; when there are no
        more than `most`, the cells themselves and None.
    """
    if len(cells) <= most:
        return cells, None
    columns = min(most, max(1, round(math.sqrt(most * size[0] / size[1]))))
    rows = max(1, most // columns)
    overlaps = []
    for count, side, low, high in ((columns, size[0], 0, 2), (rows, size[1], 1, 3)):
        edges = np.linspace(0, side, count + 1)
        overlap = np.minimum(cells[:, high, None], edges[1:]) - np.maximum(cells[:, low, None], edges[:-1])
        overlap = overlap.clip(min=0)  # (N, columns or rows)
        overlaps.append((overlap / overlap.sum(1, keepdims=True), edges))
    (across, x), (down, y) = overlaps
    weights = (down[:, :, None] * across[:, None]).reshape(len(cells), -1)  # (N, rows * columns)
    grid = [(x[column], y[row], x[column + 1], y[row + 1]) for row in range(rows) for column in range(columns)]
    return np.array(grid), weights


def joined_cells(cells: np.ndarray) -> np.ndarray:
    """The same cells (N, 4) without seams: edges that nearly meet become one, so that a drawing has no gaps."""
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


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps as bytes: 255 times the square root of each value's share of its map's largest.

    A square root keeps small values: one step is 1/255 of the root, so a value v of a map with the largest m comes
    back as m * (byte / 255)² within m * (sqrt(v / m) / 255 + 1 / 510²).

    Args:
        values: (..., K), none negative.

    Returns:
        (..., K) uint8 and (...,) the largest values.
    """
    scales = values.max(-1, initial=0)
    shares = values / np.where(scales > 0, scales, 1)[..., None]
    return np.round(255 * np.sqrt(shares)).astype(np.uint8), scales


def choose_layers(sizes: Sequence[tuple[int, list[int]]], num_layers: int, room: int) -> tuple[int, int]:
    """(cells that a picture may have, number of layers beside their mean) so that all maps fit in `room` bytes.

    When nothing fits, it is the coarsest map of one layer.

    Args:
        sizes: for each example, the tokens of its completions together and the cells of each of its pictures.
    """
    for most in FINEST:
        one_layer, cells = 0, 0
        for tokens, counts in sizes:
            merged = sum(min(most, count) for count in counts)
            one_layer += math.ceil(tokens * merged * 4 / 3) + NUMBERS * tokens  # base64 makes four bytes of three
            cells += merged
        fits = (room - CELL * cells) // max(1, one_layer) - 1
        if fits >= min(num_layers, FEWEST_LAYERS):
            return most, min(num_layers, fits)
    return FINEST[-1], max(1, min(num_layers, fits))


def spread_layers(attending: Sequence[int], rewarded: Sequence[int], count: int) -> list[int]:
    """`count` layers in rising order: those that the reward reads first, then evenly spaced ones, the last included."""
    spaced = [attending[place] for place in np.linspace(len(attending) - 1, 0, count).round().astype(int)]
    return sorted(list(dict.fromkeys([*reversed(rewarded), *spaced]))[:count])


# --- the parts of an example ------------------------------------------------------------------------------------


def data_uri(picture: Image.Image, format: str, **options) -> str:
    """A picture, encoded anew, as an address that holds it."""
    buffer = io.BytesIO()
    picture.save(buffer, format=format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def mask_edge(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The outline of a mask, cyan within black, on a transparent picture of this size."""
    inside = Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)
    wide, narrow = (ImageChops.difference(inside.filter(ImageFilter.MaxFilter(k)), inside) for k in (9, 5))
    edge = Image.new("RGBA", size)
    edge.paste((0, 0, 0, 165), mask=wide)
    edge.paste((111, 242, 255, 255), mask=narrow)
    return edge


def picture_parts(picture: Image.Image, region) -> dict:
    """What the page draws of a picture: itself, and its region in pixels, (boxes, polygons, mask or None)."""
    boxes, polygons, mask = region
    shown = picture.convert("RGB")
    shown.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    counts = {("box", "boxes"): len(boxes), ("polygon", "polygons"): len(polygons)}
    named = [f"{count} {words[count > 1]}" for words, count in counts.items() if count] + ["a mask"] * (
        mask is not None
    )
    return {
        "src": data_uri(shown, "WEBP", quality=80, method=4),
        "width": picture.width,
        "height": picture.height,
        "boxes": [[float(edge) for edge in box] for box in boxes],
        "polygons": [[[float(place) for place in point] for point in polygon] for polygon in polygons],
        "mask": data_uri(mask_edge(mask, shown.size), "PNG", optimize=True) if mask is not None else None,
        "region": f"region: {' and '.join(named)}" if named else "no region",
    }


def answer_parts(answer: Answer) -> dict:
    """What the page shows of an answer beside its maps."""
    return {
        "tokens": answer.tokens,
        "entropies": rounded(answer.entropies.numpy()),
        "scored": answer.scored,
        "scores": {name: None if math.isnan(value) else round(value, 4) for name, value in answer.scores.items()},
        "answer": extract_answer(answer.text),
        "correct": answer.scores["accuracy"] == 1,
        "truncated": answer.truncated,
    }


def map_parts(maps: np.ndarray, coverage: np.ndarray, chosen: Sequence[int], merges: Sequence) -> dict:
    """The maps of an answer as bytes: the mean of all layers, then each chosen layer.

    Args:
        maps: (L, n, N) attention of each layer. coverage: (N,). chosen: places in L.
        merges: for each picture the number of its cells and the weights (cells, K) that merge them, or None.

    Returns:
        "maps" (base64 of (1 + chosen, n, K) bytes) and "scales", as quantize makes them; "on_picture", the share of a
        token's attention that the pictures get, and "on_region", the share of that on the region, (1 + chosen, n).
    """
    maps = np.concatenate([maps.mean(0, keepdims=True), maps[list(chosen)]])  # (1 + chosen, n, N)
    on_picture = maps.sum(-1)
    on_region = (maps @ coverage) / np.where(on_picture > 0, on_picture, 1)
    parts = np.split(maps, np.cumsum([count for count, _ in merges])[:-1], axis=-1)
    parts = [part if weights is None else part @ weights for part, (_, weights) in zip(parts, merges, strict=True)]
    levels, scales = quantize(np.concatenate(parts, axis=-1))
    return {
        "maps": base64.b64encode(levels.tobytes()).decode(),
        "scales": rounded(scales, 6),
        "on_picture": rounded(on_picture),
        "on_region": rounded(on_region),
    }


def rounded(values: np.ndarray, digits: int = 4):
    """Nested lists of numbers of so many significant digits, which are much shorter in JSON."""
    return [rounded(part, digits) for part in values] if values.ndim else float(f"{float(values):.{digits}g}")


# --- a whole report ---------------------------------------------------------------------------------------------


@torch.no_grad()
def collect(model, processor, examples: Sequence[dict], answers: dict[str, list[Answer]], config, room: int) -> dict:
    """All that the page shows, as JSON can hold it.

    Args:
        answers: of ask_all. room: bytes that the file may have; it decides how many layers and how fine the maps are.
    """
    entries, cells = [], []
    for number, example in enumerate(examples):
        own = [of_policy[number] for of_policy in answers.values()]
        pairs = zip(example["images"], regions_of(example), strict=True)
        entries.append(
            {
                "question": example["question"],
                "answer": example["answer"],
                "choices": [str(choice) for choice in example.get("choices") or []],
                "region_share": rounded(own[0].coverage.mean().numpy()),
                "pictures": [picture_parts(picture, region) for picture, region in pairs],
                "answers": [answer_parts(answer) for answer in own],
            }
        )
        cells.append([joined_cells(token_cells(processor, picture).numpy()) for picture in example["images"]])
    attending = [layer for layer, kind in enumerate(layer_types(model)) if kind != "linear_attention"]
    rewarded = resolve_layers(model, config.attention_layers)
    sizes = [
        (sum(len(answer["tokens"]) for answer in entry["answers"]), [len(part) for part in own])
        for entry, own in zip(entries, cells, strict=True)
    ]
    most, count = choose_layers(sizes, len(attending), room - len(embedded(entries)))
    layers = spread_layers(attending, rewarded, count)
    chosen = [attending.index(layer) for layer in layers]
    merges = []
    for entry, own in zip(entries, cells, strict=True):
        merges.append([])
        for picture, part in zip(entry["pictures"], own, strict=True):
            shown, weights = merged_cells(part, (picture["width"], picture["height"]), most)
            picture["cells"] = np.round(shown).astype(int).flatten().tolist()
            merges[-1].append((len(part), weights))
    for place, (name, of_policy) in enumerate(answers.items()):
        with switched_to(model, name, config):
            for number, answer in enumerate(tqdm(of_policy, desc=f"{name}, maps", unit="example")):
                maps = np.zeros((len(attending), 0, len(answer.coverage)))
                if len(answer.completion):
                    prompt = encode_prompt(processor, examples[number], config.system_prompt)
                    options = {"layers": attending, "query": config.attention_query, "per_layer": True}
                    maps = attention_maps(model, prompt, answer.completion, **options).cpu().numpy()  # (L, n, N)
                parts = map_parts(maps, answer.coverage.numpy(), chosen, merges[number])
                entries[number]["answers"][place] |= parts
    names = [f"layer {layer}{' (rewarded)' * (layer in rewarded)}" for layer in layers]
    entropies = [entropy for of_policy in answers.values() for answer in of_policy for entropy in answer.entropies]
    adapter = f" with {config.adapter}" if config.adapter else ""
    return {
        "about": f"{config.model}{adapter}, {len(entries)} examples of {config.data}, greedy completions.",
        "terms": TERMS.format(percent=100 * config.top_fraction, temperature=config.temperature),
        "summary": summary_table(answers),
        "policies": list(answers),
        "layers": [f"mean of all {len(attending)}", *names],
        "first_layer": 1 + layers.index(rewarded[-1]),
        "most_entropy": rounded(max(entropies, default=torch.tensor(0.0)).numpy()),
        "examples": entries,
    }


def summary_table(answers: dict[str, list[Answer]]) -> list[list[str]]:
    """Rows of text: accuracy and TAS of each policy, and the paired difference of two, with bootstrap intervals."""
    rows = [["", "accuracy", "TAS", "TAS, scored tokens", "tokens"]]
    values = {
        name: [[*(a.scores[key] for key in ("accuracy", "tas", "tas_selected")), float(len(a.tokens))] for a in own]
        for name, own in answers.items()
    }
    if len(values) == 2:
        base, adapter = (np.array(own) for own in values.values())
        values["difference"] = (adapter - base).tolist()
    for name, own in values.items():
        row = [name]
        for column in zip(*own, strict=True):
            mean, low, high = bootstrap_interval(column)
            row.append("–" if math.isnan(mean) else f"{mean:.3f} [{low:.3f}, {high:.3f}]")
        rows.append(row)
    return rows


def embedded(value) -> str:
    """JSON that can stand in a <script> element: ASCII, and without the characters that HTML reads as markup."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(report: dict) -> str:
    """The HTML file of what collect() gave."""
    style, script = ((PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    parts = {"policy": policy, "style": style, "script": script, "data": embedded(report)}
    template = (PAGE / "report.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)  # in one go: data may look like a slot
