"""The attention explorer: what policies answered, and where each token looked, as one HTML file.

It needs no network and opens from disk: page/report.html with its style, its script and its data inside. Questions,
answers and completions are untrusted. They travel as JSON without any "<", the script shows them as text nodes only,
and the Content-Security-Policy allows only that style and that script (by SHA-256) and pictures within the file, which
Pillow has encoded anew.
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

from sayo.examples.regions import regions_of
from sayo.grader.grader import extract_answer
from sayo.model.forward import attention_maps, resolve_layers
from sayo.model.loading import switched_to
from sayo.model.packing import layer_types
from sayo.model.prompts import encode_prompt, joined_cells, token_cells
from sayo.show.tables import bootstrap_interval

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


def merged_cells(cells: np.ndarray, size: tuple[int, int], most: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Merge cells (N, 4), boxes in pixels of a picture of this (width, height), into at most `most`.

    Returns (K, 4) cells and (N, K) weights, the share of each old cell's area in each new one; the cells themselves and
    None when they are few enough.
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


def quantize(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maps (..., K) >= 0 as bytes, 255 times the square root of a value's share of its map's largest; and those (...,).

    The root keeps small values: a value v of a map with the largest m comes back as m * (byte / 255)², within
    m * (sqrt(v / m) / 255 + 1 / 510²).
    """
    scales = values.max(-1, initial=0)
    shares = values / np.where(scales > 0, scales, 1)[..., None]
    return np.round(255 * np.sqrt(shares)).astype(np.uint8), scales


def choose_layers(sizes: Sequence[tuple[int, list[int]]], num_layers: int, room: int) -> tuple[int, int]:
    """(cells per picture, layers beside their mean) so that all maps fit in `room` bytes, or the coarsest and one.

    `sizes` has for each example the tokens of its completions together and the cells of each of its pictures.
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


def data_uri(picture: Image.Image, format: str, **options) -> str:
    """A picture, encoded anew, as a data URI."""
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
    counts = (len(boxes), "box", "boxes"), (len(polygons), "polygon", "polygons")
    named = [f"{count} {many if count > 1 else one}" for count, one, many in counts if count]
    named += ["a mask"] if mask is not None else []
    return {
        "src": data_uri(shown, "WEBP", quality=80, method=4),
        "width": picture.width,
        "height": picture.height,
        "boxes": [[float(edge) for edge in box] for box in boxes],
        "polygons": [[[float(place) for place in point] for point in polygon] for polygon in polygons],
        "mask": data_uri(mask_edge(mask, shown.size), "PNG", optimize=True) if mask is not None else None,
        "region": f"region: {' and '.join(named)}" if named else "no region",
    }


def answer_parts(answer) -> dict:
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

    Returns "maps" (base64 of (1 + chosen, n, K) bytes) and "scales", as quantize makes them; (1 + chosen, n)
    "on_picture", the share of a token's attention that the pictures get, and "on_region", the share of that on the
    region.
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
    """Nested lists of numbers of so many significant digits, which keeps the JSON short."""
    return [rounded(part, digits) for part in values] if values.ndim else float(f"{float(values):.{digits}g}")


@torch.no_grad()
def collect(model, processor, examples: Sequence[dict], answers: dict[str, list], config, room: int) -> dict:
    """All that the page shows, ready for JSON, from what answers_by_policy gives.

    `room` is the bytes for the data; it decides how many layers and how fine the maps are.
    """
    entries, cells, sizes = [], [], []
    for number, example in enumerate(examples):
        own = [of_policy[number] for of_policy in answers.values()]
        pairs = zip(example["images"], regions_of(example), strict=True)
        entry = {"question": example["question"], "answer": example["answer"]}
        entry["choices"] = [str(choice) for choice in example.get("choices") or []]
        entry["region_share"] = rounded(own[0].coverage.mean().numpy())
        entry["pictures"] = [picture_parts(picture, region) for picture, region in pairs]
        entry["answers"] = [answer_parts(answer) for answer in own]
        entries.append(entry)
        cells.append([joined_cells(token_cells(processor, picture).numpy()) for picture in example["images"]])
        sizes.append((sum(len(answer.tokens) for answer in own), [len(part) for part in cells[-1]]))
    attending = [layer for layer, kind in enumerate(layer_types(model)) if kind != "linear_attention"]
    rewarded = resolve_layers(model, config.attention_layers)
    most, count = choose_layers(sizes, len(attending), room - len(embedded(entries)))
    layers = spread_layers(attending, rewarded, count)
    chosen, merges = [attending.index(layer) for layer in layers], [[] for _ in entries]
    for entry, own, merge in zip(entries, cells, merges, strict=True):
        for picture, part in zip(entry["pictures"], own, strict=True):
            shown, weights = merged_cells(part, (picture["width"], picture["height"]), most)
            picture["cells"] = np.round(shown).astype(int).flatten().tolist()
            merge.append((len(part), weights))
    for place, (name, of_policy) in enumerate(answers.items()):
        with switched_to(model, name, config):
            for number, answer in enumerate(tqdm(of_policy, desc=f"{name}, maps", unit="example")):
                maps = np.zeros((len(attending), 0, len(answer.coverage)))
                if len(answer.completion):
                    prompt = encode_prompt(processor, examples[number], config.system_prompt)
                    options = {"layers": attending, "query": config.attention_query, "per_layer": True}
                    maps = attention_maps(model, prompt, answer.completion, **options).cpu().numpy()  # (L, n, N)
                entries[number]["answers"][place] |= map_parts(maps, answer.coverage.numpy(), chosen, merges[number])
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


def summary_table(answers: dict[str, list]) -> list[list[str]]:
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
    """JSON that can stand in a <script> element: ASCII, without the characters of HTML's markup."""
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
