"""Runs of a few seconds, what disturbs them, and what is left of them."""

import json
import shutil
from pathlib import Path

import small_run
import torch

from sayo.run.files import damage, remove, step_of

SMALL = small_run.SMALL | {"max_new_tokens": 12, "save_steps": 1, "eval_limit": 2}
SMALL |= {"lr_scheduler": "cosine", "try_biggest": False}


class Killed(BaseException):
    """What a kill is to the code of the same process: nothing behind it is executed."""


def run(folder, **settings):
    small_run.run(folder, **SMALL | settings)


def compare(undisturbed, folder) -> list[str]:
    return differences(what_it_left(undisturbed), what_it_left(folder))


def assert_equal(folder, undisturbed):
    assert compare(undisturbed, folder) == []


def on_call(patch, place, name: str, number: int, act, *, after: bool = False) -> None:
    """Act before the n-th call of a function, or after it; `place` is what the callers look the name up in."""
    function, calls = getattr(place, name), []

    def watched(*arguments, **options):
        calls.append(name)
        if len(calls) == number and not after:
            act()
        result = function(*arguments, **options)
        if len(calls) == number and after:
            act()
        return result

    patch.setattr(place, name, watched)


def die() -> None:
    raise Killed


def copy_until(undisturbed, folder, step) -> Path:
    """The run as it was when a kill came after the checkpoint of a step."""
    shutil.copytree(undisturbed, folder)
    for path in folder.glob("checkpoints/step-*"):
        if step_of(path) > step:
            shutil.rmtree(path)
    for name in ("adapter", "evaluation.json", "curves.png"):
        remove(folder / name)
    update_json(folder / "run.json", finished=None)
    return folder


def update_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def what_it_left(folder: Path) -> dict[str, bytes]:
    """Every file of a run but what must differ: config.yaml holds the folder and --resume, metrics.jsonl times."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name == "metrics.jsonl":
            files[name] = json.dumps(small_run.rows_of(folder)).encode()
        elif path.name == "state.pt":
            files[name] = as_bytes(torch.load(path, weights_only=True))
        elif path.name == "manifest.json":  # has the sum of state.pt
            files[name] = str(damage(path.parent)).encode()
        elif name not in ("config.yaml", ".lock"):
            files[name] = path.read_bytes()
    return files


def as_bytes(state) -> bytes:
    """All bits of a saved state. Not those of its file: a pickle tells a string that was loaded from a constant."""
    if isinstance(state, torch.Tensor):
        return f"{state.dtype}{list(state.shape)}".encode() + state.contiguous().view(-1).numpy().tobytes()
    if isinstance(state, dict | list | tuple):
        parts = state.items() if isinstance(state, dict) else state
        return b"[" + b",".join(map(as_bytes, parts)) + b"]"
    return repr(state).encode()


def differences(expected: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """Names of files that differ, are missing or too many; a clean stop may leave checkpoints of further steps."""
    extra = {name for name in found.keys() - expected.keys() if not name.startswith("checkpoints/step-")}
    extra |= {name for name in found if ".partial" in name}
    return sorted(extra | {name for name in expected if found.get(name) != expected[name]})
