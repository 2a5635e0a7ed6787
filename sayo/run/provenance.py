"""Fingerprints of models, data and settings, so that a resumed job continues with the same inputs."""

import glob
import hashlib
import json
import os
import re
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from sayo.model.forward import compute_dtype
from sayo.model.loading import adapter_folder
from sayo.model.prompts import base_model
from sayo.run.config import PolicyConfig
from sayo.run.files import is_run, stored_json, write_whole
from sayo.settings import ConfigError

MUST_STAY = ("examples", "eval_examples", "model", "adapter", "number_format", "reward_file")  # of run.json
PLACES = ("model", "adapter", "data", "eval_data", "regions_folder", "allowed_folders", "reward_file")  # may be paths
SHOULD_STAY = ("device", "processes", "versions")  # of run.json: where they change, the last bits may differ


def digest(folder: Path) -> str:
    """Fingerprint of a folder: files by their bytes, those of a GB or more by their size."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size}\n".encode())
        if size < 2**30:
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def picture_name(image) -> list:
    """Fingerprint of a picture: a file by its name and size, bytes and pixels by their content."""
    if isinstance(image, Image.Image):
        return [*image.size, hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return [hashlib.sha256(image).hexdigest()]
    return [None if image is None else [Path(image).name, Path(image).stat().st_size]]


def example_bytes(row: dict) -> bytes:
    """Everything in an example as Examples.raw gives it, with pictures and masks by picture_name."""
    kept = {name: value for name, value in row.items() if name not in ("image", "images", "mask", "masks")}
    pictures = [picture_name(image) for name in ("images", "masks") for image in row.get(name) or ()]
    return json.dumps([kept, pictures], sort_keys=True, default=str).encode()


def example_names(examples) -> dict[str, str]:
    """Fingerprint of each example by its id, in their order."""
    rows = (examples.raw(index) for index in range(len(examples)))
    return {row["id"]: hashlib.sha256(example_bytes(row)).hexdigest()[:16] for row in rows}


def ensure_same_examples(rows: Path, asked: dict[str, str], names: dict[str, str]) -> None:
    """Raise ConfigError unless the examples that a file of rows is about are unchanged.

    Args:
        asked: {id: fingerprint} of the rows. names: the same of the data now; an id that it lacks is ignored.
    """
    other = [identifier for identifier, name in asked.items() if names.get(identifier, name) != name]
    if other:
        raise ConfigError(
            f"{str(rows)!r}: {len(other)} examples are not what they were, the first is {other[0]!r}: the data "
            "changed; give the former data, or write elsewhere"
        )


def loaded_from(arguments: dict, policy) -> dict:
    """{"model", "adapter", "number_format"} of a loaded policy: folders by their files, Hub ids by their commit.

    Args:
        arguments: those of load_policy.
    """
    model, adapter = Path(arguments["model"]), arguments["adapter"]
    commit = getattr(base_model(policy).config, "_commit_hash", None)
    found = {"model": digest(model) if model.is_dir() else commit, "adapter": None}
    if adapter:
        folder = Path(adapter_folder(adapter))  # of a Hub adapter: .../snapshots/COMMIT
        found["adapter"] = digest(folder) if os.path.isdir(os.path.expanduser(adapter)) else folder.name
    return found | {"number_format": str(compute_dtype(policy))}


def ensure_same_settings(rows: Path, settings: dict, defaults: dict) -> None:
    """Note beside a file of rows (as NAME.settings.json) the settings that they come from; rows that exist must fit it.

    Args:
        settings: may have "loaded", what is known when the policy is loaded; without it, that of the note stays.
        defaults: of fields, for a note that is older than a field.

    Raises:
        ConfigError: they were made with other settings, which are named.
    """
    note = rows.with_suffix(".settings.json")
    has_rows = rows.exists() and rows.stat().st_size > 0  # a start that failed before its first row binds nobody
    if has_rows and not note.exists():
        raise ConfigError(f"{str(rows)!r} has no {note.name} beside it: give another place, or restore that file")
    before = (stored_json(note) if has_rows else None) or settings
    before = {name: value for name, value in defaults.items() if name in settings} | before
    if "loaded" in before:
        settings = settings | {"loaded": settings.get("loaded", before["loaded"])}
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if "loaded" not in before:  # noted now
        names = [name for name in names if name != "loaded"]
    if names:
        changed = "; ".join(f"{name} was {before.get(name)!r}, is {settings.get(name)!r}" for name in names)
        fix = "Give those again, or write elsewhere"
        raise ConfigError(f"{str(rows)!r} was made with other settings: {changed}. {fix}")
    rows.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(settings, indent=1, ensure_ascii=False))


def as_meant(path: Path, values: dict) -> dict:
    """The values of a YAML file; those of a run's own config.yaml mean that run, wherever it lies and one stands.

    Its relative paths count from the folder that the run was started in: the one that output_dir counts from, else the
    one that run.json names, else the present one, whichever has them.
    """
    folder, given = Path(os.path.abspath(path)).parent, str(values.get("output_dir"))
    if path.name != "config.yaml" or not is_run(folder):
        return values
    parts = Path(os.path.normpath(given)).parts
    counts = not os.path.isabs(given) and folder.parts[-len(parts) :] == parts
    bases = [folder.parents[len(parts) - 1]] if counts else []
    note = stored_json(folder / "run.json")
    bases += [started] if isinstance(started := (note or {}).get("started_in"), str) else []
    is_here = os.path.exists(given) and os.path.samefile(given, folder)
    found = values if is_here else values | {"output_dir": str(folder)}
    return found | {name: _placed(values[name], bases) for name in PLACES if values.get(name)}


def _placed(value, bases: list):
    """A relative path (or each of a list) as the absolute one where it exists; anything else as it is."""
    if isinstance(value, list):
        return [_placed(entry, bases) for entry in value]
    if not isinstance(value, str) or value in (PolicyConfig.model, "none") or value.partition(":")[0] == "scenes":
        return value
    for base in bases:
        place = os.path.join(base, value)
        if not os.path.isabs(os.path.expanduser(value)) and (os.path.exists(place) or glob.glob(place)):
            return value if os.path.samefile(base, os.curdir) else place
    return value


def is_same_place(before, now) -> bool:
    """Whether two values of a setting that may be a path name the same place."""
    texts = isinstance(before, str) and isinstance(now, str)
    return texts and len({os.path.abspath(os.path.expanduser(value)) for value in (before, now)}) == 1


def built_from(config, examples, held_out, model, accelerator) -> dict:
    """The content of run.json: what a run is built from beside its settings. held_out may be None."""
    files = [Path(re.sub(r"(?<=\.py):.*", "", name)).expanduser() for name in config.reward_file or ()]
    rewards = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files}
    return loaded_from(config.policy_arguments(0), model) | {
        "reward_file": rewards or None,
        "examples": _name_of(examples),
        "eval_examples": _name_of(held_out) if held_out else None,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def _name_of(examples) -> str:
    """How many examples there are, and their fingerprint."""
    if examples.name.partition(":")[0] == "scenes":  # drawn by sayo itself
        return f"{len(examples)} of {examples.name}"
    found = hashlib.sha256()
    for index in range(len(examples)):
        found.update(example_bytes(examples.raw(index)))
    return f"{len(examples)}, SHA-256 {found.hexdigest()[:16]}"


def check_built_from(former: dict, config, now: dict) -> list[str]:
    """Compare a resumed run with what it was built from; returns sentences about what may change its last bits.

    Raises:
        ConfigError: examples, model, adapter or number format changed.
    """
    called = {"examples": f"data={config.data!r}", "eval_examples": f"eval_data={config.eval_data!r}"}
    differ = [name for name in (*MUST_STAY, *SHOULD_STAY) if name in former and former[name] != now.get(name)]
    said = {name: f"{called.get(name, name)}: {former[name]} then, {now.get(name)} now" for name in differ}
    if "number_format" in said:
        said["number_format"] += f", --dtype {former['number_format'].removeprefix('torch.')} is that of then"
    refused = [said[name] for name in differ if name in MUST_STAY]
    if refused:
        fix = "The run would no longer be that of its settings: give what it began with, or another --output_dir"
        raise ConfigError(f"resume: {'; '.join(refused)}. {fix}")
    return [f"resume: {said[name]}; the last bits may differ from those of an undisturbed run" for name in differ]
