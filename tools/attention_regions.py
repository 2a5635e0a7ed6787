"""Write a data set whose regions come from the base model's relative attention, or measure how good they are.

python -m tools.attention_regions --model Qwen/Qwen3-VL-4B-Instruct --data mine.jsonl --out mine_regions.jsonl
python -m tools.attention_regions --data scenes --limit 1000 --measure true
"""

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sayo.examples.load import Examples, load_examples
from sayo.examples.pictures import load_picture
from sayo.extensions import attention_regions as regions
from sayo.extensions import relative_attention as relative
from sayo.model.forward import evaluating
from sayo.model.loading import adapter_off, load_policy
from sayo.model.prompts import check_prompts, region_coverage
from sayo.run.config import PolicyConfig
from sayo.settings import ConfigError, option, run_command, writable

COLUMNS = ("inside", "hit", "IoU", "precision", "recall", "area")
KEPT = ("id", "question", "answer", "answer_type", "choices", "kind")  # of a row, beside its pictures


def true_coverage(processor, example: dict) -> torch.Tensor:
    """(N,) share of every image token that the example's own region covers."""
    own = (example.get(name) or [] for name in ("boxes", "polygons", "masks"))
    return region_coverage(processor, example["images"], *own)


class Means:
    """Sums of figures by name over `count` examples, and the table of their means."""

    def __init__(self):
        self.sums, self.count = defaultdict(Counter), 0

    def table(self) -> str:
        """One line per name, "-" where it lacks a figure."""
        width = max(map(len, self.sums)) + 2
        lines = [" " * width + "".join(f"{column:>11}" for column in COLUMNS)]
        for name, row in self.sums.items():
            cells = [f"{row[column] / self.count:.3f}" if column in row else "-" for column in COLUMNS]
            lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells))
        return "\n".join(lines)


def _add_baselines(means: Means, maps: list, coverage: torch.Tensor, example: dict, share: float) -> None:
    sizes = [image.size for image in example["images"]]
    for name, (values, taken) in relative.baselines(maps, sizes, share, seed=means.count).items():
        if name == "random cells":  # one of them hits with the share of cells that are covered
            means.sums[name].update(hit=float((coverage > 0).float().mean()))
        means.sums[name].update(relative.overlap(relative.choose_cells(values, taken).float(), coverage))
    means.sums["the true region"].update(area=float(coverage.mean()))


def measure_regions(processor, examples, own: Examples, indices: Iterable[int], share: float) -> Means:
    """Overlap of the regions of `examples` (a WithRegions), and of baselines, with the data's own where it has some."""
    means = Means()
    for index in tqdm(indices, desc="overlap", unit="example"):
        coverage = true_coverage(processor, own[index])
        if not coverage.any():
            continue
        example, nothing = examples[index], torch.zeros(0, len(coverage))
        maps = relative.per_picture(processor, example["images"], nothing, nothing)
        tiles = torch.cat([one.is_tile for one in maps])
        means.count += 1
        found = relative.overlap(true_coverage(processor, example)[tiles], coverage[tiles])
        means.sums["relative attention"].update(found)
        _add_baselines(means, maps, coverage[tiles], example, share)
    return means


def measure_layers(model, processor, examples: Sequence[dict], config) -> Means:
    """The same for plain and relative attention of every layer, and for the mean of the layers."""
    layers, means = regions.region_layers(model, config), Means()
    with torch.no_grad(), evaluating(model), adapter_off(model):
        for example in tqdm(examples, desc="measure", unit="example"):
            coverage = true_coverage(processor, example)
            if not coverage.any():
                continue
            both = relative.question_and_generic_attention(model, processor, example, config.system_prompt, layers)
            maps = relative.per_picture(processor, example["images"], *both)
            coverage = coverage[torch.cat([one.is_tile for one in maps])]
            means.count += 1
            kinds = {"plain": [one.asked for one in maps], "relative": [one.relative() for one in maps]}
            for kind, parts in kinds.items():
                values = torch.cat(parts, dim=-1)  # (L, n)
                named = {f"layer {layer}, {kind}": row for layer, row in zip(layers, values, strict=True)}
                for name, row in (named | {f"mean of layers, {kind}": values.mean(0)}).items():
                    chosen = relative.choose_cells(row, config.region_share).float()
                    means.sums[name].update(relative.pointing(row, coverage) | relative.overlap(chosen, coverage))
            _add_baselines(means, maps, coverage, example, config.region_share)
    return means


def write_data(examples, output: Path, settings: dict) -> list[str]:
    """Write a WithRegions as a JSONL file, with the pictures that are in no file yet beside it.

    Returns the folders of pictures that are outside of the JSONL file's own.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures, outside = output.with_name(f"{output.stem}_images"), {}
    root = output.parent.resolve()
    aside = output.with_name(output.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        for index in tqdm(range(len(examples)), desc="write", unit="example"):
            row, paths = examples.raw(index), []
            for number, image in enumerate(row["images"]):
                if isinstance(image, str | Path):
                    path = Path(image).resolve()
                    if not path.is_relative_to(root):
                        outside[str(path.parent)] = None
                else:
                    path = pictures.resolve() / f"{index:06d}-{number}.png"
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
        means = measure_layers(model, processor, examples, config)
        if not means.count:
            raise ConfigError(f"measure: {config.data!r} has no regions to compare with; leave --measure out")
        print(f"{means.count} examples of {taken}\n{means.table()}")
    if config.out:
        indices = range(len(examples))
        found = regions.attention_regions(model, processor, examples, indices, config)
        outside = write_data(found, Path(config.out), regions.region_settings(model, config))
        means = measure_regions(processor, found, examples, indices, config.region_share)
        if means.count:
            print(f"against the data's own regions, {means.count} examples of {taken}\n{means.table()}")
        print(f"-> {config.out}")
        if outside:
            print(f"its pictures stay where they are: give --allowed_folders {shlex.join(outside)} with it")


if __name__ == "__main__":
    run_command(AttentionRegionsConfig, main)
