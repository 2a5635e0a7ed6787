"""Look at a data set before training: what is in it, everything wrong with it, and a sheet of examples.

    python -m data.check mine.jsonl
    python -m data.check mine.jsonl --model Qwen/Qwen3-VL-4B-Instruct --sheet sheet.png
    python -m data.check BCCD/train.json --box_format xywh --fields image=file_name boxes=bbox

Every row is read and every picture decoded, as training would do it. With a model (only its processor is loaded, no
weights) prompts are measured and the sheet shows, beside the boxes, the image tokens that they cover: what the
attention reward will take for the region.
"""

import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill, shorten

import numpy as np
import torch
from tqdm import tqdm

from config import EMBEDDED_POLICY, PolicyConfig, at_least, option, run_command, writable
from data.examples import DataError, Examples, load_examples
from data.pictures import load_mask, picture_size
from data.regions import fit_regions, paint_region, regions_of
from prompts import encode_prompt, token_cells
from rollout import bad_prompts
from visualize import outline_region, panels
from vlm import load_processor

THUMBNAIL = 256  # longest side, in pixels, of the canvas on which regions are measured
PANEL = 800  # longest side, in pixels, of a picture on the sheet


@dataclass
class CheckConfig(PolicyConfig):
    """Report what is in a data set and everything wrong with it, and draw some of it. The file may come first."""

    model: str | None = option(None, "Model whose processor cuts the pictures into tokens; none is needed.")
    sheet: str | None = option(None, "PNG to draw: examples with their regions and, with a model, covered tokens.")
    num_examples: int = option(12, "Examples on the sheet, spread evenly over the data.")
    num_measured: int = option(200, "Prompts that are encoded to count their tokens, spread evenly over the data.")
    max_new_tokens: int = option(64, "Longest completion of the training to come: prompts must leave room for it.")
    report: str | None = option(None, "JSON file to write: all figures, and all bad rows however many.")

    def problems(self) -> list[str]:
        found = super().problems() + at_least(self, 1, "num_examples", "num_measured", "max_new_tokens")
        return found + writable(self, "report") + writable(self, "sheet", suffixes=(".png",))


# --- figures -----------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """{"min", "median", "max"} of some numbers."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def region_share(boxes, polygons, mask, size: tuple[int, int]) -> float:
    """How much of a picture its region takes, in [0, 1], to about a thousandth. Sizes and points are in pixels."""
    scale = min(1.0, THUMBNAIL / max(size))
    small = math.ceil(size[0] * scale), math.ceil(size[1] * scale)  # not less, or the last edge would be outside
    scaled, outlines = _scaled(boxes, polygons, scale)
    region = paint_region(small, scaled, outlines, mask and mask.resize(small))
    return np.asarray(region).mean() / 255


def _scaled(boxes, polygons, scale: float) -> tuple[list, list]:
    outlines = [[[number * scale for number in point] for point in polygon] for polygon in polygons]
    return [[number * scale for number in box] for box in boxes], outlines


def describe(examples: Examples, box_format: str) -> dict:
    """Figures of the good rows, and `notes`: what is allowed but worth a look, with the first id of each."""
    kinds = {name: [] for name in ("pictures", "boxes", "polygons", "masks", "choices")}
    shares, sizes, questions, answers = [], [], [], Counter()
    seen, notes = {}, {name: [] for name in ("large", "small", "none", "repeated")}
    for index in tqdm(range(len(examples)), desc="figures", disable=len(examples) <= 200):
        example = examples.peek(index)
        own_sizes = [picture_size(image) for image in example["images"]]
        regions = fit_regions(example, own_sizes, box_format)
        masks = [mask and load_mask(mask) for mask in example.get("masks", [None] * len(own_sizes))]
        polygons = regions.get("polygons", [[] for _ in own_sizes])
        own_shares = [
            region_share(*region, size)
            for *region, size in zip(regions["boxes"], polygons, masks, own_sizes, strict=True)
            if any(region)
        ]
        sizes += own_sizes
        shares += own_shares
        questions.append(len(example["question"]))
        answers[example["answer"].strip().lower()] += 1
        counts = {"pictures": len(own_sizes), "boxes": sum(map(len, regions["boxes"]))}
        counts |= {"polygons": sum(map(len, polygons)), "masks": len([mask for mask in masks if mask])}
        for name, count in (counts | {"choices": len(example.get("choices") or [])}).items():
            if count:
                kinds[name].append(count)
        asked = (str(example["images"])[:2000], example["question"], example["answer"])
        for name, applies in {
            "large": any(share > 0.5 for share in own_shares),
            "small": any(share < 0.001 for share in own_shares),
            "none": not own_shares,
            "repeated": seen.setdefault(asked, index) != index,
        }.items():
            if applies:
                notes[name].append(example["id"])
    top = [(answer, count / len(examples)) for answer, count in answers.most_common(5)]
    said = {
        "large": "have a region of more than half of a picture: attention on it says little about looking",
        "small": "have a region of less than a thousandth of a picture: less than a token for most models",
        "none": "have no region: training refuses them unless --bad_rows skip or --attention_weight 0 is given",
        "repeated": "repeat the question, answer and picture of an earlier row",
    }
    figures = {f"{name} of a row": spread(counts) | {"rows": len(counts)} for name, counts in kinds.items() if counts}
    figures["picture width"] = spread([width for width, _ in sizes])
    figures["picture height"] = spread([height for _, height in sizes])
    if shares:
        figures["share of a picture in its region"] = spread(shares)
    figures["characters of a question"] = spread(questions)
    listed = [f"{len(ids)} rows {said[name]}, first {ids[0]!r}" for name, ids in notes.items() if ids]
    if len(examples) >= 20 and top[0][1] > 0.5:
        listed.append(f"{top[0][1]:.0%} of the answers are {top[0][0]!r}: always saying so would be right as often")
    return {"figures": figures, "answers": {"distinct": len(answers), "most common": top}, "notes": listed}


def evenly(num_rows: int, count: int) -> list[int]:
    """`count` indices spread over range(num_rows), both ends among them. Example: (10, 3) gives 0, 4, 9."""
    return sorted({int(place) for place in np.linspace(0, num_rows - 1, min(count, num_rows))})


def measure_prompts(examples: Examples, processor, config: CheckConfig) -> dict:
    """Tokens of some prompts: all of them, those of pictures, and those that the region covers."""
    counts = {"prompt tokens": [], "image tokens": [], "image tokens in the region": []}
    for index in tqdm(evenly(len(examples), config.num_measured), desc="prompts", leave=False):
        prompt = encode_prompt(processor, examples[index], config.system_prompt)
        counts["prompt tokens"].append(len(prompt.input_ids))
        counts["image tokens"].append(len(prompt.image_token_index))
        counts["image tokens in the region"].append(int((prompt.coverage > 0).sum()))
    return {f"{name} ({len(values)} prompts)": spread(values) for name, values in counts.items()}


# --- pictures ----------------------------------------------------------------------------------------------------


def draw_sheet(examples: Iterable[dict], processor, system_prompt: str | None, output: Path) -> None:
    """One panel for each picture of the examples: its region in outline, covered tokens (with a processor) in red."""
    shown = []
    for example in examples:
        coverage = encode_prompt(processor, example, system_prompt).coverage if processor else ()
        for number, (image, region) in enumerate(zip(example["images"], regions_of(example), strict=True)):
            cells = token_cells(processor, image) if processor else torch.zeros(0, 4)
            own, coverage = coverage[: len(cells)], coverage[len(cells) :]
            of = f" (picture {number + 1})" if len(example["images"]) > 1 else ""
            title = [shorten(f"{example['id']}{of}", 50), fill(shorten(example["question"], 120), 44)]
            scale = min(1.0, PANEL / max(image.size))
            small = math.ceil(image.width * scale), math.ceil(image.height * scale)
            boxes, polygons, mask = region
            region = *_scaled(boxes, polygons, scale), mask and mask.resize(small, 0)
            picture = image.resize(small)
            shown.append(([*title, shorten(example["answer"], 44)], picture, region, (cells * scale).tolist(), own))
    columns = min(4, len(shown))
    height = min(8.0, 3.8 * max(image.height / image.width for _, image, *_ in shown)) + 1.3  # inches of a panel
    with panels(-(-len(shown) // columns), columns, (4.0, height), output) as axes:
        for axis, panel in zip(axes.flat, shown, strict=False):
            _draw_panel(axis, *panel)


def _draw_panel(axis, title: list[str], image, region: tuple, cells: list, coverage) -> None:
    from matplotlib.patches import Rectangle

    axis.imshow(image)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in cells]
    for (x1, y1, x2, y2), share, area in zip(cells, map(float, coverage), areas, strict=True):
        if share > 0:  # a thumbnail's cells are larger and lie on those of the tiles: they get less color
            color = (1, 0, 0, 0.55 * share * min(areas) / area)
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, facecolor=color, edgecolor="red", linewidth=0.4))
    outline_region(axis, *region)
    covered = [f"{int((coverage > 0).sum())} of {len(cells)} tokens covered"] if cells else []
    axis.set_title("\n".join(title + covered), fontsize=8)


# --- command line ------------------------------------------------------------------------------------------------


def _row(name: str, values: dict) -> str:
    numbers = [f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()]
    return f"  {name:<34} {', '.join(numbers)}"


def main(config: CheckConfig) -> None:
    loaded = load_examples(config.data, **config.data_arguments() | {"bad_rows": "skip"}, require_boxes=False)
    processor = None
    if config.model:
        model = EMBEDDED_POLICY if Path(config.model) == Path("data/tiny_policy") else config.model
        arguments = {"revision": config.revision, "max_pixels": config.max_pixels}
        model_config, processor = load_processor(model, **arguments)
        positions = model_config.get_text_config().max_position_embeddings
        wrong = bad_prompts(positions, processor, loaded, config.system_prompt, config.max_new_tokens)
        loaded.drop(wrong)
    if not len(loaded):
        raise DataError(f"{config.data}: no row is left; the first: {loaded.skipped[0]}")
    report = {"data": config.data, "good_rows": len(loaded), "bad_rows": loaded.skipped}
    report |= describe(loaded, config.box_format)
    if processor:
        report["figures"] |= measure_prompts(loaded, processor, config)
    print(f"{config.data}: {len(loaded)} good rows, {len(loaded.skipped)} bad")
    for name, values in report["figures"].items():
        print(_row(name, values))
    common = ", ".join(f"{shorten(answer, 30)!r} {share:.1%}" for answer, share in report["answers"]["most common"])
    print(f"  {'answers':<34} {report['answers']['distinct']} distinct: {common}")
    for note in report["notes"]:
        print(f"  note: {note}")
    for line in loaded.skipped[:50]:
        print(f"  bad: {line}")
    if len(loaded.skipped) > 50:
        print(f"  and {len(loaded.skipped) - 50} more bad rows; --report FILE.json lists all")
    if config.report:
        Path(config.report).parent.mkdir(parents=True, exist_ok=True)
        Path(config.report).write_text(json.dumps(report, ensure_ascii=False, indent=1))
    if config.sheet:
        Path(config.sheet).parent.mkdir(parents=True, exist_ok=True)
        drawn = (loaded[index] for index in evenly(len(loaded), config.num_examples))
        draw_sheet(drawn, processor, config.system_prompt, Path(config.sheet))
        print(f"-> {config.sheet}")
    if loaded.skipped:
        raise DataError(
            f"{len(loaded.skipped)} bad rows; correct them, or train with --bad_rows skip, which leaves them out"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--data")
    run_command(CheckConfig, main)
