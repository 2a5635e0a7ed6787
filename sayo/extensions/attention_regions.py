"""Regions for data without boxes: where the base model attends for a question more than for a generic instruction.

`train_rl.py --regions attention` computes them (see relative_attention.py) for the examples that it trains on, and
`python -m tools.attention_regions` for a whole data set. Both store them in --regions_folder, in a JSONL file per data
set, model and settings with one row per example, so that nothing is computed twice.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from sayo.examples.load import Examples
from sayo.extensions.relative_attention import GENERIC_QUESTION, attention_boxes
from sayo.model.forward import compute_dtype, evaluating, resolve_layers
from sayo.model.loading import adapter_off, portable_name
from sayo.model.packing import layer_types
from sayo.model.prompts import base_model, question_text
from sayo.run.processes import launched, read_by_main, sync_forwards
from sayo.run.provenance import digest
from sayo.settings import ConfigError, no_bar, option, read_jsonl

AT_A_TIME = 16  # examples of each process between two writes to the file


@dataclass
class RegionsConfig:
    """How regions are made from attention, and where they are stored."""

    regions_folder: str = option("runs/regions", "Folder of stored attention regions, shared by all runs.")
    region_layers: list[int] | None = option(
        None, "Decoder layers whose relative attention makes regions, -1 the last; all by default."
    )
    region_share: float = option(0.2, "Share of a picture's cells that an attention region covers.", above=0, at_most=1)

    def problems(self) -> list[str]:
        found = super().problems()
        if Path(self.regions_folder).exists() and not Path(self.regions_folder).is_dir():
            found.append(f"regions_folder={self.regions_folder!r}: give the name of a folder")
        return found


class WithRegions(Sequence):
    """Examples with `regions`, {id: one list of boxes per picture}, in place of their own; none for other ids."""

    def __init__(self, examples: Examples, regions: dict[str, list]):
        self.name, self.skipped, self.regions, self._examples = examples.name, examples.skipped, regions, examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self._changed(self._examples[index])
        return example | ({"boxes": example["boxes"][0]} if len(example["images"]) == 1 else {})

    def raw(self, index: int) -> dict:
        """The example in the form of Examples.raw, with these regions."""
        return self._changed(self._examples.raw(index))

    def _changed(self, example: dict) -> dict:
        kept = {name: value for name, value in example.items() if name not in ("polygons", "masks")}
        return kept | {"boxes": self.regions.get(example["id"]) or [[] for _ in example["images"]]}


def region_settings(model, config) -> dict:
    """Everything that regions depend on, except the examples."""
    name = config.policy_arguments(0)["model"]
    names = ("revision", "load_in_4bit", "max_pixels", "system_prompt", "region_share")
    commit = getattr(base_model(model).config, "_commit_hash", None)
    found = {"model": portable_name(name), "files": digest(Path(name)) if Path(name).is_dir() else commit}
    found |= {"dtype": str(compute_dtype(model)).removeprefix("torch."), "region_layers": region_layers(model, config)}
    if config.chat_template_kwargs:
        names += ("chat_template_kwargs",)
    return found | {"generic_question": GENERIC_QUESTION} | {name: getattr(config, name) for name in names}


def region_layers(model, config) -> list[int]:
    """The layers in config, by default all with softmax attention. Raises ConfigError for one the model lacks."""
    if config.region_layers is None:
        return [layer for layer, kind in enumerate(layer_types(model)) if kind != "linear_attention"]
    try:
        return resolve_layers(model, config.region_layers)
    except ValueError as error:
        raise ConfigError(str(error).replace("attention_layers", "region_layers")) from error


def short_hash(value) -> str:
    """Eight hex digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def fingerprint(row: dict) -> str:
    """Identifies the question and pictures of an example (of Examples.raw), which its region depends on."""
    found = hashlib.sha256(question_text(row).encode())
    for image in row["images"]:
        if isinstance(image, Image.Image):
            image = str((image.mode, image.size)).encode() + image.tobytes()
        found.update(hashlib.sha256(image if isinstance(image, bytes) else Path(image).read_bytes()).digest())
    return found.hexdigest()[:16]


def stored_regions(path: Path, settings: dict) -> dict[str, dict]:
    """{fingerprint: row} of a regions file, {} when there is none; a last line that was cut off is dropped.

    Raises ConfigError for rows that were made with other settings or are no regions.
    """
    rows = [row for _, row in read_jsonl(path)] if path.exists() else []
    wrong = [row for row in rows if row.get("settings") != short_hash(settings) or not {"example", "boxes"} <= {*row}]
    if wrong:
        said = f"{len(wrong)} of {len(rows)} lines were made with other settings, the first is {wrong[0].get('id')!r}"
        raise ConfigError(f"{str(path)!r}: {said}; delete the file, or give another --regions_folder")
    return {row["example"]: row for row in rows}


def _open_store(path: Path, settings: dict) -> None:
    """Write the settings beside the regions file, and remove a last line that an interrupted run left incomplete."""
    readable = json.dumps(settings, indent=1, ensure_ascii=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".settings.json").write_text(readable, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"regions_folder={str(path.parent)!r} cannot be written to: {error}") from error
    content = path.read_bytes() if path.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def attention_regions(model, processor, examples: Examples, indices: Iterable[int], config) -> WithRegions:
    """The examples with regions from the base model's relative attention for those at `indices`.

    Stored regions of the same model, settings and examples are read; the others are computed by all processes together
    and stored as they come. The model runs without its adapter; config has RegionsConfig's and PolicyConfig's fields.

    Raises ConfigError where region_layers names a layer that the model lacks, or the file holds something else.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    with launched():
        state, settings = PartialState(), region_settings(model, config)
    stamp = short_hash(settings)
    parts = [re.sub(r"[^\w.-]+", "-", part)[-60:].strip("-.") for part in (config.data, config.model)]
    path = Path(config.regions_folder) / f"{'+'.join([*parts, stamp])}.jsonl"
    stored = read_by_main(lambda: stored_regions(path, settings), state.is_main_process)
    names, identifiers = {}, {}
    for index in tqdm(sorted(set(indices)), desc="pictures", disable=no_bar(None), leave=False, delay=5):
        row = examples.raw(index)
        names[index], identifiers[index] = fingerprint(row), row["id"]
    missing = [index for index, name in names.items() if name not in stored]
    if missing and state.is_main_process:
        _open_store(path, settings)
        known = {row["id"] for row in stored.values()}
        if changed := [identifiers[index] for index in missing if identifiers[index] in known]:
            print(f"{path}: {len(changed)} examples changed, the first is {changed[0]!r}; computed again")
    shown = {"total": len(names), "initial": len(names) - len(missing), "desc": "regions", "unit": "example"}
    shown |= {"disable": no_bar(not missing or not state.is_main_process)}
    shown["mininterval"] = 0.1 if sys.stderr.isatty() else 15
    progress = tqdm(**shown)
    options = {"layers": settings["region_layers"], "share": config.region_share}
    block_size = AT_A_TIME * state.num_processes
    with torch.no_grad(), evaluating(model), adapter_off(model):
        for start in range(0, len(missing), block_size):
            rows = []
            for index in missing[start : start + block_size][state.process_index :: state.num_processes]:
                example = examples[index]
                boxes = attention_boxes(model, processor, example, config.system_prompt, **options)
                row = {"id": example["id"], "question": example["question"], "boxes": boxes}
                rows.append(row | {"model": settings["model"], "settings": stamp, "example": names[index]})
                progress.update(state.num_processes)
            sync_forwards(model)
            rows = gather_object(rows)
            stored |= {row["example"]: row for row in rows}
            if state.is_main_process:
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                with path.open("ab", buffering=0) as file:  # one write, as another run may append to the same file
                    file.write(lines.encode())
    progress.close()
    if state.is_main_process:
        print(f"regions of {len(names)} examples, {len(missing)} of them computed now: {path}")
    return WithRegions(examples, {identifiers[index]: stored[name]["boxes"] for index, name in names.items()})
