"""Look at a data set before training: what is in it, everything wrong with it, and a sheet of examples.

    python -m data.check mine.jsonl
    python -m data.check mine.jsonl --model Qwen/Qwen3-VL-4B-Instruct --sheet sheet.png
    python -m data.check BCCD/train.json --box_format xywh --fields image=file_name boxes=bbox

Every row is read and every picture decoded, as training would do it. With a model (only its processor is loaded, no
weights) prompts are measured and the sheet shows, beside the boxes, the image tokens that they cover: what the
attention reward will take for the region.
"""

import itertools
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

from sayo.examples.load import Examples, load_examples
from sayo.examples.pictures import DataError, load_mask, picture_size
from sayo.examples.regions import fit_regions, paint_region, regions_of
from sayo.grader.grader import choice_labels, compared_as
from sayo.grader.notation import normalized
from sayo.model.loading import load_processor
from sayo.model.prompts import bad_prompts, encode_prompt, token_cells
from sayo.run.config import PolicyConfig
from sayo.settings import no_bar, option, run_command, writable
from sayo.show.heat import outline_region
from sayo.show.plots import drawing

THUMBNAIL = 256  # longest side, in pixels, of the canvas on which regions are measured
PANEL = 800  # longest side, in pixels, of a picture on the sheet
KINDS = ("pictures", "boxes", "polygons", "masks", "choices")  # that a row has some of
FIGURES = ("picture width", "picture height", "share of a picture in its region", "characters of a question")
READ_OTHERWISE = "have an answer that is not read as it is written"
NOTES = (  # on rows that training takes
    "have a region of more than half of a picture: attention on it says little about looking",
    "have a region of less than a thousandth of a picture: less than a token for most models",
    "have no region: give --regions attention to train on them, --attention_weight 0, or --bad_rows skip to drop them",
    "repeat the question, answer and picture of an earlier row",
    "have an answer in LaTeX and no answer_type: it is compared as mathematics, too",
    READ_OTHERWISE,
    "have an answer that is the text of one choice and the label or index of another: the text counts",
    "have an answer of more than 200 characters, which only the same text matches",
)


@dataclass
class CheckConfig(PolicyConfig):
    """Report what is in a data set and everything wrong with it, and draw some of it. The file may come first."""

    model: str | None = option(None, "Model whose processor cuts the pictures into tokens; none is needed.")
    sheet: str | None = option(None, "PNG to draw: examples with their regions and, with a model, covered tokens.")
    num_examples: int = option(12, "Examples on the sheet, spread evenly over the data.", at_least=1)
    num_measured: int = option(200, "Prompts whose tokens are counted, spread evenly over the data.", at_least=1)
    max_new_tokens: int = option(64, "Longest completion in training: prompts must leave room for it.", at_least=1)
    report: str | None = option(None, "JSON file to write: all figures, and all bad rows however many.")

    def problems(self) -> list[str]:
        return super().problems() + writable(self, "report") + writable(self, "sheet", suffixes=(".png",))


def spread(values: Sequence[float]) -> dict[str, float]:
    """{"min", "median", "max"} of some numbers."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def region_share(boxes, polygons, mask, size: tuple[int, int]) -> float:
    """How much of a picture its region takes, in [0, 1], to about a thousandth. Sizes and points are in pixels."""
    scale = min(1.0, THUMBNAIL / max(size))
    small = math.ceil(size[0] * scale), math.ceil(size[1] * scale)  # not less, or the last edge would be outside
    region = paint_region(small, *_scaled(boxes, polygons, scale), mask and mask.resize(small))
    return np.asarray(region).mean() / 255


def _scaled(boxes, polygons, scale: float) -> tuple[list, list]:
    outlines = [[[number * scale for number in point] for point in polygon] for polygon in polygons]
    return [[number * scale for number in box] for box in boxes], outlines


def describe(examples: Examples, box_format: str) -> dict:
    """Figures of the good rows, and `notes`: what is allowed but worth a look, with the first id of each."""
    kinds, figures = ({name: [] for name in names} for names in (KINDS, FIGURES))
    answers, compared, seen, notes = Counter(), Counter(), {}, {note: [] for note in NOTES}
    for index in tqdm(range(len(examples)), desc="figures", disable=no_bar(len(examples) <= 200)):
        example = examples.raw(index)
        own_sizes = [picture_size(image) for image in example["images"]]
        regions = fit_regions(example, own_sizes, box_format)
        masks = [mask and load_mask(mask) for mask in example.get("masks", [None] * len(own_sizes))]
        polygons = regions.get("polygons", [[] for _ in own_sizes])
        of_pictures = zip(regions["boxes"], polygons, masks, own_sizes, strict=True)
        own_shares = [region_share(*region, size) for *region, size in of_pictures if any(region)]
        measured = (*zip(*own_sizes, strict=True), own_shares, [len(example["question"])])
        for values, more in zip(figures.values(), measured, strict=True):
            values += more
        answers[example["answer"].strip().lower()] += 1
        way, written = compared_as(example), examples.written(index)["answer"]
        compared[way] += 1
        counts = (len(own_sizes), *(sum(map(len, part)) for part in (regions["boxes"], polygons)))
        counts += (len([mask for mask in masks if mask]), len(example.get("choices") or []))
        for kind, count in zip(kinds.values(), counts, strict=True):
            kind += [count] if count else []
        asked = (str(example["images"])[:2000], example["question"], example["answer"])
        large, small = any(share > 0.5 for share in own_shares), any(share < 0.001 for share in own_shares)
        applies = (large, small, not own_shares, seen.setdefault(asked, index) != index)
        applies += (way == "math" and "answer_type" not in example, is_read_otherwise(written, example))
        applies += (is_ambiguous(example), way != "choices" and len(example["answer"]) > 200)
        for note in itertools.compress(NOTES, applies):
            read = f": {written!r:.60} as {example['answer']!r:.60}" if note is READ_OTHERWISE else ""
            notes[note].append(f"{example['id']!r}{read}")
    top = [(answer, count / len(examples)) for answer, count in answers.most_common(5)]
    found = {f"{name} of a row": spread(counts) | {"rows": len(counts)} for name, counts in kinds.items() if counts}
    found |= {name: spread(values) for name, values in figures.items() if values}
    listed = [f"{len(ids)} rows {note}, first {ids[0]}" for note, ids in notes.items() if ids]
    if len(examples) >= 20 and top[0][1] > 0.5:
        listed.append(f"{top[0][1]:.0%} of the answers are {top[0][0]!r}: always saying so would be right as often")
    of_answers = {"distinct": len(answers), "most common": top, "compared as": dict(compared.most_common())}
    return {"figures": found, "answers": of_answers, "notes": listed}


def is_read_otherwise(written, example: dict) -> bool:
    """Whether an answer was taken out of tags or a solution, or names a choice by its index or in other words."""
    first = written[0] if isinstance(written, list) and written else written
    return str(first).strip() != example["answer"].strip() and example.get("answer_type") != "list"


def is_ambiguous(example: dict) -> bool:
    """Whether the answer is a choice's text and could be the label, or the index from 0, of another one."""
    choices, said = example.get("choices") or [], normalized(example["answer"])
    texts = [normalized(choice) for choice in choices]
    labels = [name.lower() for name in choice_labels(choices)]
    places = [names.index(said) for names in (labels, list(map(str, range(len(choices))))) if said in names]
    return said in texts and any(place != texts.index(said) for place in places)


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


def draw_sheet(examples: Iterable[dict], processor, system_prompt: str | None, output: Path) -> None:
    """One panel for each picture of the examples: its region in outline, covered tokens (with a processor) in red."""
    shown = []
    for example in examples:
        coverage = encode_prompt(processor, example, system_prompt).coverage if processor else ()
        for number, (image, region) in enumerate(zip(example["images"], regions_of(example), strict=True)):
            cells = token_cells(processor, image) if processor else torch.zeros(0, 4)
            own, coverage = coverage[: len(cells)], coverage[len(cells) :]
            of = f" (picture {number + 1})" if len(example["images"]) > 1 else ""
            question, answer = fill(shorten(example["question"], 120), 44), shorten(example["answer"], 44)
            title = [shorten(f"{example['id']}{of}", 50), question, answer]
            scale = min(1.0, PANEL / max(image.size))
            small = math.ceil(image.width * scale), math.ceil(image.height * scale)
            boxes, polygons, mask = region
            region = *_scaled(boxes, polygons, scale), mask and mask.resize(small, 0)
            shown.append((title, image.resize(small), region, (cells * scale).tolist(), own))
    columns = min(4, len(shown))
    height = min(8.0, 3.8 * max(image.height / image.width for _, image, *_ in shown)) + 1.3  # inches of a panel
    with drawing(output, -(-len(shown) // columns), columns, (4.0, height), pictures=True) as axes:
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


def main(config: CheckConfig) -> None:
    loaded = load_examples(config.data, **config.data_arguments() | {"bad_rows": "skip"}, require_boxes=False)
    processor = None
    if config.model:
        model = config.policy_arguments(lora_rank=0)["model"]
        names = ("revision", "max_pixels", "chat_template_kwargs")
        model_config, processor = load_processor(model, **{name: getattr(config, name) for name in names})
        positions = model_config.get_text_config().max_position_embeddings
        loaded.drop(bad_prompts(positions, processor, loaded, config.system_prompt, config.max_new_tokens))
    if not len(loaded):
        raise DataError(f"{config.data}: no row is left; the first: {loaded.skipped[0]}")
    report = {"data": config.data, "good_rows": len(loaded), "bad_rows": loaded.skipped}
    report |= describe(loaded, config.box_format)
    if processor:
        report["figures"] |= measure_prompts(loaded, processor, config)
    print(f"{config.data}: {len(loaded)} good rows, {len(loaded.skipped)} bad")
    for name, values in report["figures"].items():
        shown = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in values.items()}
        print(f"  {name:<34} {', '.join(f'{key} {value}' for key, value in shown.items())}")
    common = ", ".join(f"{shorten(answer, 30)!r} {share:.1%}" for answer, share in report["answers"]["most common"])
    print(f"  {'answers':<34} {report['answers']['distinct']} distinct: {common}")
    compared = ", ".join(f"{kind} {count}" for kind, count in report["answers"]["compared as"].items())
    print(f"  {'answers compared as':<34} {compared}")
    for note in report["notes"]:
        print(f"  note: {note}")
    for line in loaded.skipped[:50]:
        print(f"  bad: {line}")
    if len(loaded.skipped) > 50:
        print(f"  and {len(loaded.skipped) - 50} more bad rows; --report FILE.json lists all")
    for path in (config.report, config.sheet):
        Path(path or ".").parent.mkdir(parents=True, exist_ok=True)
    if config.report:
        Path(config.report).write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    if config.sheet:
        drawn = (loaded[index] for index in evenly(len(loaded), config.num_examples))
        draw_sheet(drawn, processor, config.system_prompt, Path(config.sheet))
        print(f"-> {config.sheet}")
    if loaded.skipped:
        fix = "correct them, or train with --bad_rows skip, which leaves them out"
        raise DataError(f"{len(loaded.skipped)} bad rows; {fix}")


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--data")
    run_command(CheckConfig, main)
