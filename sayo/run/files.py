"""Files that exist whole or not at all, and the checkpoints of a run.

A checkpoint holds the adapter, the optimizer, the schedule, the loss scale, beta and the count of skipped steps. The
order of the data and every random number are functions of (seed, step). After a power cut a file system may remember a
rename but not what was in the files, so they are synced first, and a manifest of sizes and SHA-256 is written last.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from sayo.settings import ConfigError

MANIFEST, PARTIAL, NAME = "manifest.json", ".partial", re.compile("step-[0-9]{6,}")
# What a run puts in its folder; "sayo" holds the TensorBoard files.
OF_A_RUN = ("run.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "evaluation_before.json", "evaluation.json")
OF_A_RUN += ("adapter", "checkpoints", "curves.png", "sayo")
ASIDE = (*(f"{name}{PARTIAL}" for name in OF_A_RUN), f"adapter.former{PARTIAL}", "curves.partial.png")
NEEDED = {"state.pt", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


# --- whole files ------------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk itself."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows syncs what it may write alone
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_names(folder: Path) -> None:
    """Flush the names in a folder to the disk, where the file system can."""
    with suppress(OSError):
        sync(folder)


def write_whole(path: Path, text: str) -> None:
    """Write a file aside and rename it, so that it never exists in part."""
    aside = path.with_name(path.name + PARTIAL)
    aside.write_text(text, encoding="utf-8", newline="")
    sync(aside)
    aside.replace(path)
    sync_names(path.parent)


def put_in_place(aside: Path, final: Path) -> None:
    """Rename a folder; a former one of that name is moved aside first, and deleted at the end."""
    for path in sorted(aside.rglob("*")):
        sync(path) if path.is_file() else sync_names(path)
    sync_names(aside)
    former = final.with_name(f"{final.name}.former{PARTIAL}")
    if final.exists():
        remove(former)
        final.rename(former)
    aside.rename(final)
    sync_names(final.parent)
    remove(former)


def stored_json(path: Path):
    """The content of a JSON file; None where it is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_run(folder: Path) -> bool:
    """Whether a run has begun in a folder: it holds run.json, which is written first, or a checkpoint of a run."""
    note = stored_json(folder / "run.json")
    if isinstance(note, dict) and "examples" in note:
        return True
    manifests = (stored_json(path) for path in folder.glob(f"checkpoints/step-*/{MANIFEST}"))
    return any(isinstance(manifest, dict) and "files" in manifest for manifest in manifests)


def names_in(folder: Path) -> list[str]:
    """Which names that a run would write exist in a folder; half of a first run.json is that of a start, or lost."""
    known = [name for name in (*OF_A_RUN, *ASIDE) if os.path.lexists(folder / name)]
    return [name for name in known if name != f"run.json{PARTIAL}" or not (folder / ".lock").exists()]


def remove_leftovers(folder: Path) -> None:
    """Delete what was being written in the folder of a run when it was killed."""
    for pattern in (*ASIDE, f"adapter/README.md{PARTIAL}", f"checkpoints/step-*{PARTIAL}"):
        for path in folder.glob(pattern):
            remove(path)


def keep_steps_until(path: Path, last_step: int) -> list[int]:
    """Drop the rows of a JSONL file after last_step, which a resumed run repeats; returns the steps that stay.

    Damage behind those rows (a power cut leaves zeros, or half a character) goes with them.

    Raises:
        ConfigError: a line is damaged before one that stays.
    """
    kept, damaged = [], 0
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        step = _step_of_row(line)
        if step is None:
            damaged = damaged or number * bool(line.strip())
        elif step <= last_step and damaged:
            fix = f"restore or delete the line; --resume goes on behind step {last_step}"
            raise ConfigError(f"{str(path)!r}, line {damaged} is not the row of a step: {fix}")
        elif step <= last_step:
            kept.append((line.decode().rstrip("\r") + "\n", step))
    if lines:
        write_whole(path, "".join(line for line, _ in kept))
    return [step for _, step in kept]


def _step_of_row(line: bytes) -> int | None:
    """The step of a row of metrics.jsonl or samples.jsonl; None for anything else."""
    with suppress(ValueError, RecursionError, TypeError, KeyError):
        step = json.loads(line.decode())["step"]
        return step if type(step) is int else None
    return None


# --- one checkpoint ---------------------------------------------------------------------------------------------


def save_adapter(model, folder: Path) -> None:
    """The adapter in PEFT's own form, without the README that PEFT writes: it names folders of this machine.

    PEFT keeps names of layers as sets, whose order differs from start to start.
    """
    for config in getattr(model, "peft_config", {}).values():
        for name in ("target_modules", "exclude_modules"):
            if isinstance(layers := getattr(config, name, None), set):
                setattr(config, name, sorted(layers))
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def save_final_adapter(output_dir: Path, model) -> None:
    """Write adapter/ of a run, without its card; errors as in save_checkpoint."""
    aside = output_dir / f"adapter{PARTIAL}"
    remove(aside)
    try:
        save_adapter(model, aside)
        put_in_place(aside, output_dir / "adapter")
    finally:
        remove(aside)


def save_checkpoint(output_dir: Path, step: int, model, parts: dict, skipped_in_a_row: int = 0) -> Path:
    """Write checkpoints/step-000100 and return its path; a whole one of that step stays, since it would be the same.

    Args:
        parts: {"optimizer": ..., "scheduler": ..., ...}, each with a state_dict.

    Raises:
        OSError, RuntimeError, SafetensorError: it could not be written; nothing of it is left.
    """
    final = output_dir / "checkpoints" / f"step-{step:06d}"
    if damage(final) is None:
        return final
    aside = final.with_name(final.name + PARTIAL)
    remove(aside)
    try:
        save_adapter(model, aside / "adapter")
        state = {"step": step, "skipped_in_a_row": skipped_in_a_row}
        torch.save(state | {name: part.state_dict() for name, part in parts.items()}, aside / "state.pt")
        manifest = {"step": step, "files": {name: _seal(aside / name) for name in _files(aside)}}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        put_in_place(aside, final)
    finally:
        remove(aside)
    return final


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _seal(path: Path) -> list:
    """[bytes, SHA-256] of a file."""
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used; None where it is whole. Every byte is read."""
    if not NAME.fullmatch(checkpoint.name):
        return "its name is not step- and a number"
    if not checkpoint.is_dir():
        return "it is no folder"
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if manifest["step"] != step_of(checkpoint):
            return f"its {MANIFEST} is that of step {manifest['step']!r:.20}"
        if lacking := NEEDED - {*manifest["files"]}:
            return f"its {MANIFEST} lacks {min(lacking)}"
        for name, (size, digest) in manifest["files"].items():
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            found = _seal(checkpoint / name)
            if found[0] != size:
                return f"{name} has {found[0]:,} bytes instead of {size:,}"
            if found[1] != digest:
                return f"{name} has other content than was written (SHA-256)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"it cannot be read: {type(error).__name__}: {error}"
    return None


def step_of(checkpoint: Path) -> int:
    """The number of steps in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def load_state(checkpoint: Path, parts: dict) -> tuple[int, int]:
    """Load the saved state into each part; returns (steps done, skipped steps in a row at their end)."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["skipped_in_a_row"]


# --- all of them ------------------------------------------------------------------------------------------------


def all_checkpoints(output_dir: Path) -> list[Path]:
    """Everything in checkpoints/ but hidden and partial files: by step, then the rest."""
    found = [path for path in output_dir.glob("checkpoints/*") if path.suffix != PARTIAL and path.name[0] != "."]
    return sorted(found, key=lambda path: (not NAME.fullmatch(path.name), len(path.name), path.name))


def whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, or None; and a sentence about each newer one, which is damaged."""
    passed_over = []
    for path in reversed(all_checkpoints(output_dir)):
        if (problem := damage(path)) is None:
            return path, passed_over
        passed_over.append(f"{path} is skipped: {problem}")
    return None, passed_over


def drop_old(output_dir: Path, newest: Path, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; `newest`, which was just written, stays."""
    steps = [path for path in all_checkpoints(output_dir) if NAME.fullmatch(path.name)]
    former = [path for path in steps if step_of(path) < step_of(newest)]
    for path in former[: max(0, len(former) - limit + 1)] if limit else []:
        aside = path.with_name(path.name + PARTIAL)  # so that a deletion cut short leaves no damaged checkpoint
        remove(aside)
        path.rename(aside)
        remove(aside)


def checkpoint_bytes(parameters: Sequence[torch.Tensor], optimizer: str) -> int:
    """Size of a checkpoint, computed: the trained weights and AdamW's two moments of each, in 32 or 8 bits."""
    total = 2048 * len(parameters)  # names and headers
    for parameter in parameters:  # bitsandbytes holds the moments of tensors below 4,096 elements in 32 bits
        moment = 4 if optimizer == "adamw" or parameter.numel() < 4096 else 1
        total += parameter.numel() * (parameter.element_size() + 2 * moment)
    return total
