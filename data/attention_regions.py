"""Regions for data without boxes: where the base model itself looks for a question more than for any other.

    python -m data.attention_regions --model Qwen/Qwen3-VL-4B-Instruct --data mine.jsonl --out mine_regions.jsonl
    python -m data.attention_regions --data scenes --limit 1000 --measure true     # how good they are, layer by layer

relative_attention.py says how. The first command writes a data set that every script takes as --data; where the data
has regions of its own, it prints how well the two agree. `train_rl.py --regions attention` computes the same for the
examples that it will use. Both keep what they computed in --regions_folder and read it there, so that nothing is
computed twice: a file for each data set, model and settings, with a line for each example.
"""

import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm

from config import ConfigError, PolicyConfig, option, read_jsonl, run_command, writable
from data.examples import Examples, load_examples
from data.pictures import load_picture
from fingerprints import digest
from loading import portable_name
from packing import layer_types
from processes import read_by_main, wait_for_forwards
from prompts import base_model, question_text, region_coverage
from relative_attention import (
    GENERIC_QUESTION,
    attention_boxes,
    baselines,
    choose_cells,
    overlap,
    per_picture,
    pointing,
    question_and_generic_attention,
)
from rollout import check_prompts
from vlm import compute_dtype, evaluating, load_policy, resolve_layers

AT_A_TIME = 16  # examples of each process between two writes to the file
COLUMNS = ("inside", "hit", "IoU", "precision", "recall", "area")
KEPT = ("id", "question", "answer", "answer_type", "choices", "kind")  # of a row, beside its pictures


@dataclass
class RegionsConfig:
    """How regions are made of attention, and where they are kept."""

    regions_folder: str = option("runs/regions", "Folder that keeps regions made of attention, for all runs.")
    region_layers: list[int] | None = option(
        None, "Decoder layers whose relative attention makes regions, -1 the last; all by default."
    )
    region_share: float = option(0.2, "Share of a picture's cells that a region made of attention has.")

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0 < self.region_share <= 1:
            found.append(f"region_share={self.region_share}: give more than 0, at most 1")
        if Path(self.regions_folder).exists() and not Path(self.regions_folder).is_dir():
            found.append(f"regions_folder={self.regions_folder!r}: give the name of a folder")
        return found


class WithRegions(Sequence):
    """Examples with other regions than their own: boxes made of attention, and no polygons and masks.

    regions   lists of boxes for each picture by id; an example that is not there has no region
    """

    def __init__(self, examples: Examples, regions: dict[str, list]):
        self.name, self.skipped, self.regions, self._examples = examples.name, examples.skipped, regions, examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self._changed(self._examples[index])
        return example | ({"boxes": example["boxes"][0]} if len(example["images"]) == 1 else {})

    def peek(self, index: int) -> dict:
        """The example as Examples.peek gives it, with these regions."""
        return self._changed(self._examples.peek(index))

    def _changed(self, example: dict) -> dict:
        kept = {name: value for name, value in example.items() if name not in ("polygons", "masks")}
        return kept | {"boxes": self.regions.get(example["id"]) or [[] for _ in example["images"]]}


# --- what was computed before ------------------------------------------------------------------------------------


def region_settings(model, config) -> dict:
    """All that regions depend on, beside the examples."""
    name = config.policy_arguments(0)["model"]
    commit = getattr(base_model(model).config, "_commit_hash", None)
    names = ("revision", "load_in_4bit", "max_pixels", "system_prompt", "region_share")
    return {
        "model": portable_name(name),
        "files": digest(Path(name)) if Path(name).is_dir() else commit,
        "dtype": str(compute_dtype(model)).removeprefix("torch."),
        "region_layers": region_layers(model, config),
        "generic_question": GENERIC_QUESTION,
    } | {name: getattr(config, name) for name in names}


def region_layers(model, config) -> list[int]:
    """The layers that config names, all with softmax attention by default. Raises ConfigError for one it lacks."""
    if config.region_layers is None:
        return [layer for layer, kind in enumerate(layer_types(model)) if kind != "linear_attention"]
    try:
        return resolve_layers(model, config.region_layers)
    except ValueError as error:
        raise ConfigError(str(error).replace("attention_layers", "region_layers")) from error


def short_hash(value) -> str:
    """Eight letters that name a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def store_path(config, settings: dict) -> Path:
    """The file of a data set, model and settings."""
    parts = [re.sub(r"[^\w.-]+", "-", part)[-60:].strip("-.") for part in (config.data, config.model)]
    return Path(config.regions_folder) / f"{'+'.join(parts)}+{short_hash(settings)}.jsonl"


def fingerprint(row: dict) -> str:
    """A name for what an example (of Examples.peek) asks about which pictures: what its region depends on."""
    found = hashlib.sha256(question_text(row).encode())
    for image in row["images"]:
        if isinstance(image, Image.Image):
            image = str((image.mode, image.size)).encode() + image.tobytes()
        found.update(hashlib.sha256(image if isinstance(image, bytes) else Path(image).read_bytes()).digest())
    return found.hexdigest()[:16]


def stored_regions(path: Path, settings: dict) -> dict[str, dict]:
    """{fingerprint: row} of a file of regions, {} when there is none yet; a line that was cut off is dropped.

    Raises:
        ConfigError: the file, or a line of it, was made with other settings, or is no file of regions.
    """
    if not path.exists():
        return {}
    rows = [row for _, row in read_jsonl(path)]
    wrong = [row for row in rows if row.get("settings") != short_hash(settings) or not {"example", "boxes"} <= {*row}]
    if wrong:
        raise ConfigError(
            f"{str(path)!r}: {len(wrong)} of {len(rows)} lines were made with other settings, the first is "
            f"{wrong[0].get('id')!r}; delete the file, or give another --regions_folder"
        )
    return {row["example"]: row for row in rows}


# --- computed now ------------------------------------------------------------------------------------------------


def attention_regions(model, processor, examples: Examples, indices: Iterable[int], config) -> WithRegions:
    """The examples with the regions that the base model's relative attention gives those at `indices`.

    Regions that a former run with the same model and settings made of the same examples are read; the others are
    computed, shared out over the processes, and written as they come.

    Args:
        model: with an adapter or without; an adapter is switched off.
        config: anything with the fields of RegionsConfig and PolicyConfig.

    Raises:
        ConfigError: region_layers names a layer that the model does not have, or the file holds something else.
    """
    state, settings = PartialState(), region_settings(model, config)
    path, layers = store_path(config, settings), settings["region_layers"]
    stored = read_by_main(lambda: stored_regions(path, settings), state.is_main_process)
    names, identifiers = {}, {}
    for index in tqdm(sorted(set(indices)), desc="pictures", disable=None, leave=False, delay=5):
        row = examples.peek(index)
        names[index], identifiers[index] = fingerprint(row), row["id"]
    missing = [index for index, name in names.items() if name not in stored]
    if missing and state.is_main_process:
        readable = json.dumps(settings, indent=1, ensure_ascii=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".settings.json").write_text(readable, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"regions_folder={config.regions_folder!r} cannot be written to: {error}") from error
        _drop_cut_line(path)
        known = {row["id"] for row in stored.values()}
        changed = [identifiers[index] for index in missing if identifiers[index] in known]
        if changed:
            print(f"{path}: {len(changed)} examples changed, the first is {changed[0]!r}; computed again")
    progress = tqdm(
        total=len(names),
        initial=len(names) - len(missing),
        desc="regions",
        unit="example",
        mininterval=0.1 if sys.stderr.isatty() else 15,
        disable=not missing or not state.is_main_process,
    )
    with torch.no_grad(), evaluating(model), _base(model):
        for start in range(0, len(missing), AT_A_TIME * state.num_processes):
            block = missing[start : start + AT_A_TIME * state.num_processes]
            rows = []
            for index in block[state.process_index :: state.num_processes]:
                example = examples[index]
                options = {"layers": layers, "share": config.region_share}
                boxes = attention_boxes(model, processor, example, config.system_prompt, **options)
                row = {"id": example["id"], "question": example["question"], "boxes": boxes}
                row |= {"model": settings["model"], "settings": short_hash(settings), "example": names[index]}
                rows.append(row)
                progress.update(state.num_processes)
            wait_for_forwards(model)
            rows = gather_object(rows)
            stored |= {row["example"]: row for row in rows}
            if state.is_main_process:
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                with path.open("ab", buffering=0) as file:  # in one piece, beside another run that does the same
                    file.write(lines.encode())
    progress.close()
    if state.is_main_process:
        print(f"regions of {len(names)} examples, {len(missing)} of them computed now: {path}")
    return WithRegions(examples, {identifiers[index]: stored[name]["boxes"] for index, name in names.items()})


def _base(model):
    """A context in which an adapter is switched off."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def _drop_cut_line(path: Path) -> None:
    """A file that ends within a line, because its run was stopped there, ends before it afterwards."""
    content = path.read_bytes() if path.exists() else b""
    if not content.endswith(b"\n") and content:
        os.truncate(path, content.rfind(b"\n") + 1)


# --- measured ----------------------------------------------------------------------------------------------------


def true_coverage(processor, example: dict) -> torch.Tensor:
    """(N,) share of every image token that the example's own region covers."""
    regions = [example.get(name) or [] for name in ("boxes", "polygons", "masks")]
    return region_coverage(processor, example["images"], *regions)


class Means:
    """Means of named figures over examples, in the order in which names come first."""

    def __init__(self):
        self.sums: dict[str, dict[str, float]] = {}
        self.count = 0

    def add(self, name: str, figures: dict[str, float]) -> None:
        row = self.sums.setdefault(name, {})
        for key, value in figures.items():
            row[key] = row.get(key, 0.0) + value

    def table(self) -> str:
        """One line for each name, "-" where it has no such figure."""
        width = max(map(len, self.sums)) + 2
        lines = [" " * width + "".join(f"{column:>11}" for column in COLUMNS)]
        for name, row in self.sums.items():
            cells = [f"{row[column] / self.count:.3f}" if column in row else "-" for column in COLUMNS]
            lines.append(f"{name:{width}}" + "".join(f"{cell:>11}" for cell in cells))
        return "\n".join(lines)


def _add_baselines(means: Means, maps: list, coverage: torch.Tensor, example: dict, share: float) -> None:
    sizes = [image.size for image in example["images"]]
    for name, (values, taken) in baselines(maps, sizes, share, seed=means.count).items():
        # A cell drawn at random hits as often as cells are covered.
        hit = {"hit": float((coverage > 0).float().mean())} if name == "random cells" else {}
        means.add(name, hit | overlap(choose_cells(values, taken).float(), coverage))
    means.add("the true region", {"area": float(coverage.mean())})


def measure_regions(processor, examples: WithRegions, own: Examples, indices: Iterable[int], share: float) -> Means:
    """How the regions of `examples` agree with the data's own, where it has some; and how others would."""
    means = Means()
    for index in tqdm(indices, desc="overlap", unit="example"):
        coverage = true_coverage(processor, own[index])
        if not coverage.any():
            continue
        example, nothing = examples[index], torch.zeros(0, len(coverage))
        maps = per_picture(processor, example["images"], nothing, nothing)
        tiles = torch.cat([one.is_tile for one in maps])
        means.count += 1
        means.add("relative attention", overlap(true_coverage(processor, example)[tiles], coverage[tiles]))
        _add_baselines(means, maps, coverage[tiles], example, share)
    return means


def measure_layers(model, processor, examples: Sequence[dict], config) -> Means:
    """The same of every layer, its attention as it is and divided, and of the mean of the layers."""
    layers, means = region_layers(model, config), Means()
    with torch.no_grad(), evaluating(model), _base(model):
        for example in tqdm(examples, desc="measure", unit="example"):
            coverage = true_coverage(processor, example)
            if not coverage.any():
                continue
            both = question_and_generic_attention(model, processor, example, config.system_prompt, layers)
            maps = per_picture(processor, example["images"], *both)
            coverage = coverage[torch.cat([one.is_tile for one in maps])]
            means.count += 1
            kinds = {"plain": [one.asked for one in maps], "relative": [one.relative() for one in maps]}
            for kind, parts in kinds.items():
                values = torch.cat(parts, dim=-1)  # (L, n)
                named = {f"layer {layer}, {kind}": row for layer, row in zip(layers, values, strict=True)}
                for name, row in (named | {f"mean of layers, {kind}": values.mean(0)}).items():
                    chosen = choose_cells(row, config.region_share).float()
                    means.add(name, pointing(row, coverage) | overlap(chosen, coverage))
            _add_baselines(means, maps, coverage, example, config.region_share)
    return means


# --- command line ------------------------------------------------------------------------------------------------


def write_data(examples: WithRegions, output: Path, settings: dict) -> list[str]:
    """Write examples with their regions as a data set: a JSONL file, and beside it pictures that were in no file.

    Returns:
        Folders outside of the file's own that its pictures lie in.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    pictures, outside = output.with_name(f"{output.stem}_images"), {}
    root = output.parent.resolve()
    aside = output.with_name(output.name + ".partial")
    with aside.open("w", encoding="utf-8") as file:
        for index in tqdm(range(len(examples)), desc="write", unit="example"):
            row, paths = examples.peek(index), []
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
            kept = {name: row[name] for name in KEPT if name in row}
            boxes = row["boxes"][0] if len(paths) == 1 else row["boxes"]
            pair = {"image": paths[0]} if len(paths) == 1 else {"images": paths}
            line = kept | pair | {"boxes": boxes, "regions": settings}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    aside.replace(output)
    return list(outside)


@dataclass
class AttentionRegionsConfig(RegionsConfig, PolicyConfig):
    """Make regions of the base model's relative attention, or measure how good they are on data that has regions."""

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
    model.requires_grad_(False)  # a frozen vision tower's features are kept from the question to the generic one
    region_layers(model, config)
    check_prompts(model, processor, examples, config, 1)
    taken = f"{config.data}, regions of {config.region_share:.0%} of the cells"
    if config.measure:
        means = measure_layers(model, processor, examples, config)
        if not means.count:
            raise ConfigError(f"measure: {config.data!r} has no regions to compare with; leave --measure out")
        print(f"{means.count} examples of {taken}\n{means.table()}")
    if config.out:
        indices = range(len(examples))
        found = attention_regions(model, processor, examples, indices, config)
        outside = write_data(found, Path(config.out), region_settings(model, config))
        means = measure_regions(processor, found, examples, indices, config.region_share)
        if means.count:
            print(f"against the data's own regions, {means.count} examples of {taken}\n{means.table()}")
        print(f"-> {config.out}")
        if outside:
            print(f"its pictures stay where they are: give --allowed_folders {shlex.join(outside)} with it")


if __name__ == "__main__":
    run_command(AttentionRegionsConfig, main)
