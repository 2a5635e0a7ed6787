"""Names for what something was made from, so that what goes on after a stop goes on with the same.

A run, an evaluation and a file of rollouts are all finished in parts. What they rest on is noted beside them: settings
as they are, folders and pictures by a short name that changes when they do.
"""

import hashlib
import json
import os
from pathlib import Path

from PIL import Image

from checkpoint import stored_json, write_whole
from config import ConfigError
from lora import adapter_folder
from prompts import base_model
from vlm import compute_dtype


def digest(folder: Path) -> str:
    """A name for what a folder holds: files by their bytes (an adapter's weights, too), those of a GB by their size."""
    found = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)} {size}\n".encode())
        if size < 2**30:
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()[:16]


def picture_name(image) -> list:
    """A picture by what is cheap: a file by its name and size, bytes and pixels by their content."""
    if isinstance(image, Image.Image):
        return [*image.size, hashlib.sha256(image.tobytes()).hexdigest()]
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return [hashlib.sha256(image).hexdigest()]
    return [None if image is None else [Path(image).name, Path(image).stat().st_size]]


def example_bytes(row: dict) -> bytes:
    """All that is written about an example (as Examples.peek gives it), its pictures and masks by picture_name."""
    kept = {name: value for name, value in row.items() if name not in ("image", "images", "mask", "masks")}
    pictures = [picture_name(image) for name in ("images", "masks") for image in row.get(name) or ()]
    return json.dumps([kept, pictures], sort_keys=True, default=str).encode()


def example_names(examples) -> dict[str, str]:
    """A short name for all that each example holds (see example_bytes), by its id, in their order."""
    rows = (examples.peek(index) for index in range(len(examples)))
    return {row["id"]: hashlib.sha256(example_bytes(row)).hexdigest()[:16] for row in rows}


def hold_to_examples(rows: Path, asked: dict[str, str], names: dict[str, str]) -> None:
    """That the examples of a file of rows are still what they were.

    Args:
        asked: {id: name by example_names} of the rows. names: the same of the data now; what it has no more is let be.

    Raises:
        ConfigError: says how many are others now, and the first of them.
    """
    other = [identifier for identifier, name in asked.items() if names.get(identifier, name) != name]
    if other:
        raise ConfigError(
            f"{str(rows)!r}: {len(other)} examples are not what they were, the first is {other[0]!r}: the data "
            "changed; give the former data, or write elsewhere"
        )


def loaded_from(arguments: dict, policy) -> dict:
    """{"model": ..., "adapter": ..., "number_format": ...}: what a loaded policy is, where names alone may come to mean
    another.

    Args:
        arguments: those of load_policy. A folder is named by its files, what is from the Hub by its commit.
    """
    model, adapter = Path(arguments["model"]), arguments["adapter"]
    commit = getattr(base_model(policy).config, "_commit_hash", None)
    found = {"model": digest(model) if model.is_dir() else commit, "adapter": None}
    if adapter:
        folder = Path(adapter_folder(adapter))  # of a Hub adapter: .../snapshots/COMMIT
        found["adapter"] = digest(folder) if os.path.isdir(os.path.expanduser(adapter)) else folder.name
    return found | {"number_format": str(compute_dtype(policy))}


def hold_to_settings(rows: Path, settings: dict) -> None:
    """Note beside a file of rows (as NAME.settings.json) what they are made with; rows that are there must fit it.

    `settings` may have "loaded", what is known when the policy is loaded; without it, that of the note stays.

    Raises:
        ConfigError: they were made with other settings, which are named.
    """
    note = rows.with_suffix(".settings.json")
    has_rows = rows.exists() and rows.stat().st_size > 0  # a start that failed before its first row binds nobody
    before = (stored_json(note) if has_rows else None) or settings
    if "loaded" in before:
        settings = settings | {"loaded": settings.get("loaded", before["loaded"])}
    names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if "loaded" not in before:  # noted now
        names = [name for name in names if name != "loaded"]
    if names:
        changed = "; ".join(f"{name} was {before.get(name)!r}, is {settings.get(name)!r}" for name in names)
        raise ConfigError(
            f"{str(rows)!r} was made with other settings: {changed}. Give those again, or write elsewhere"
        )
    rows.parent.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(settings, indent=1, ensure_ascii=False))
