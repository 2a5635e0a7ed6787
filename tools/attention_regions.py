"""Write a data set whose regions come from the base model's relative attention, or measure how good they are.

python -m tools.attention_regions --model Qwen/Qwen3-VL-4B-Instruct --data mine.jsonl --out mine_regions.jsonl
python -m tools.attention_regions --data scenes --limit 1000 --measure true
"""

import json
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sayo.examples.load import load_examples
from sayo.examples.pictures import load_picture
from sayo.extensions import attention_regions as regions
from sayo.extensions.relative_attention import choose_cells, per_picture, question_and_generic_attention
from sayo.model.forward import evaluating
from sayo.model.loading import adapter_off, load_policy
from sayo.model.prompts import check_prompts, region_coverage
from sayo.run.config import PolicyConfig
from sayo.settings import ConfigError, option, run_command, writable

COLUMNS = ("inside", "hit", "IoU", "precision", "recall", "area")
KEPT = ("id", "question", "answer", "answer_type", "choices", "kind")  # of a row, beside its pictures


def true_coverage(processor, example: dict) -> Tensor:
    """(N,) share of every image token that the example's own region covers."""
    own = (example.get(name) or [] for name in ("boxes", "polygons", "masks"))
    return region_coverage(processor, example["images"], *own)


def table(sums: dict[str, Counter], count: int) -> str:
    """The means of figures by name, one line each, "-" where it lacks a figure."""
    width = max(map(len, sums)) + 2
    lines = [" " * width + "".join(f"{column:>11}" for column in COLUMNS)]
    for name, row in sums.items():
        cells = (f"{row[column] / count:.3f}" if column in row else "-" for column in COLUMNS)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def agreement(coverage: Tensor, region: Tensor, values: Tensor | None = None) -> dict[str, float]:
    """IoU, precision, recall and area of a region, given like the true one as the covered share of each cell (n,).

    With the map (n,) that it was chosen from also inside, the map's share in the true region, and hit, whether its
    highest cell touches that, 0 or 1.
    """
    both, area, true = (float(part.sum()) for part in (torch.minimum(region, coverage), region, coverage))
    union, precision = float(torch.maximum(region, coverage).sum()), both / area if area else math.nan
    found = {"IoU": both / union, "precision": precision, "recall": both / true, "area": area / len(region)}
    if values is not None:
        found["inside"] = float((values * coverage).sum() / values.sum())
        found["hit"] = float(coverage[values.argmax()] > 0)
    return found


def measure(processor, examples: Sequence[dict], share: float, look: Callable) -> tuple[dict[str, Counter], int]:
    """Sums of the agreement of regions, and of baselines, with the true ones; the number of examples that have one.

    look(example) gives the maps of its pictures, and {name: (region (n,), and the map that it was chosen from)}.
    """
    sums, count = defaultdict(Counter), 0
    for example in tqdm(examples, desc="measure", unit="example"):
        coverage = true_coverage(processor, example)
        if not coverage.any():
            continue
        count += 1
        maps, found = look(example)
        coverage = coverage[torch.cat([one.is_tile for one in maps])]
        centers = [(one.cells[:, :2] + one.cells[:, 2:]) / 2 for one in maps]
        sizes = [torch.tensor(image.size) for image in example["images"]]
        distance = torch.cat([center / size - 0.5 for center, size in zip(centers, sizes, strict=True)]).norm(dim=-1)
        shuffled = torch.rand(len(distance), generator=torch.Generator().manual_seed(count))
        found |= {"random cells": [choose_cells(shuffled, share)], "centre": [choose_cells(-distance, share)]}
        for name, (region, *values) in (found | {"whole picture": [torch.ones_like(distance)]}).items():
            sums[name].update(agreement(coverage, region.float(), *values))
        sums["random cells"].update(hit=float((coverage > 0).float().mean()))  # of one of them
        sums["the true region"].update(area=float(coverage.mean()))
    return sums, count


def measure_regions(processor, found, examples: Sequence[dict], share: float) -> tuple[dict[str, Counter], int]:
    """measure() of the regions of a WithRegions."""

    def look(example: dict):
        covered = region_coverage(processor, example["images"], found.regions[example["id"]])
        maps = per_picture(processor, example["images"], *[torch.zeros(0, len(covered))] * 2)
        return maps, {"relative attention": [covered[torch.cat([one.is_tile for one in maps])]]}

    return measure(processor, examples, share, look)


def measure_layers(model, processor, examples: Sequence[dict], config) -> tuple[dict[str, Counter], int]:
    """measure() of plain and relative attention of every layer, and of the mean of the layers."""
    layers = regions.region_layers(model, config)

    def look(example: dict):
        both = question_and_generic_attention(model, processor, example, config.system_prompt, layers)
        maps, rows = per_picture(processor, example["images"], *both), {}
        for kind, parts in (("plain", [one.asked for one in maps]), ("relative", [one.relative() for one in maps])):
            values = torch.cat(parts, dim=-1)  # (L, n)
            rows |= {f"layer {layer}, {kind}": row for layer, row in zip(layers, values, strict=True)}
            rows[f"mean of layers, {kind}"] = values.mean(0)
        return maps, {name: [choose_cells(row, config.region_share), row] for name, row in rows.items()}

    with torch.no_grad(), evaluating(model), adapter_off(model):
        return measure(processor, examples, config.region_share, look)


def write_data(examples, output: Path, settings: dict) -> list[str]:
    """Write a WithRegions as a JSONL file, with the pictures that are in no file yet beside it.

    Returns the folders of pictures that are outside of the JSONL file's own.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    aside, root, outside = output.with_name(output.name + ".partial"), output.parent.resolve(), {}
    with aside.open("w", encoding="utf-8") as file:
        for index in tqdm(range(len(examples)), desc="write", unit="example"):
            row, paths = examples.raw(index), []
            for number, image in enumerate(row["images"]):
                if isinstance(image, str | Path):
                    path = Path(image).resolve()
                    if not path.is_relative_to(root):
                        outside[str(path.parent)] = None
                else:
                    path = root / f"{output.stem}_images" / f"{index:06d}-{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    load_picture(image).save(path)
                paths.append(path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path))
            many = {"images": paths, "boxes": row["boxes"]}
            line = {name: row[name] for name in KEPT if name in row}
            line |= many if len(paths) > 1 else {"image": paths[0], "boxes": row["boxes"][0]}
            line["regions"] = settings
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    aside.replace(output)
    return list(outside)


@dataclass
class AttentionRegionsConfig(regions.RegionsConfig, PolicyConfig):
    """Make regions from the base model's relative attention, or measure how good they are on data that has regions."""

    out: str | None = option(None, "JSONL file to write: the data with these regions, for --data of any script.")
    measure: bool = option(False, "Print how well each layer's attention agrees with the data's own regions.")

    def problems(self) -> list[str]:
        found = super().problems() + writable(self, "out", suffixes=(".jsonl",))
        if not self.out and not self.measure:
            found.append("out: give a JSONL file to write, or --measure true")
        if self.out and Path(self.out).resolve() == Path(self.data).resolve():
            found.append(f"out={self.out!r} is the data itself, whose own regions would be lost: give another name")
        if self.adapter:
            found.append(f"adapter={self.adapter!r}: regions are made by the base model; leave it out")
        return found


def main(config: AttentionRegionsConfig) -> None:
    examples = load_examples(config.data, **config.data_arguments(), require_boxes=False)
    model, processor = load_policy(**config.policy_arguments(lora_rank=0))
    model.requires_grad_(False)  # features of a frozen vision tower serve both the question and the generic one
    regions.region_layers(model, config)  # raises for a layer that the model lacks
    check_prompts(model, processor, examples, config, 1)
    taken = f"{config.data}, regions of {config.region_share:.0%} of the cells"
    if config.measure:
        sums, count = measure_layers(model, processor, examples, config)
        if not count:
            raise ConfigError(f"measure: {config.data!r} has no regions to compare with; leave --measure out")
        print(f"{count} examples of {taken}\n{table(sums, count)}")
    if config.out:
        found = regions.attention_regions(model, processor, examples, range(len(examples)), config)
        outside = write_data(found, Path(config.out), regions.region_settings(model, config))
        sums, count = measure_regions(processor, found, examples, config.region_share)
        if count:
            print(f"against the data's own regions, {count} examples of {taken}\n{table(sums, count)}")
        print(f"-> {config.out}")
        if outside:
            print(f"its pictures stay where they are: give --allowed_folders {shlex.join(outside)} with it")


if __name__ == "__main__":
    run_command(AttentionRegionsConfig, main)
