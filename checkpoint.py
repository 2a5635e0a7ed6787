"""Checkpoints of a run: written aside and then renamed, so that a folder that is there is whole.

A checkpoint holds the adapter, the optimizer, the schedule and the loss scale. Nothing else is needed: the order of
the data and every random number are functions of (seed, step).
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import yaml

from config import ConfigError, read_jsonl

MAY_CHANGE = ("max_steps", "save_steps", "resume", "report_to", "sampling_tokens", "output_dir", "max_skipped_steps")
MAY_CHANGE += ("plan", "memory_gb", "try_biggest", "allowed_folders", "regions_folder")


def save_adapter(model, folder: Path) -> None:
    """The adapter alone, in PEFT's own form, without the README that PEFT writes: it names folders of this machine."""
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def save_checkpoint(output_dir: Path, step: int, model, optimizer, scheduler, scaler) -> Path:
    """Write checkpoints/step-000100 and return its path."""
    final = output_dir / "checkpoints" / f"step-{step:06d}"
    aside = final.with_name(final.name + ".partial")
    for stale in (aside, final):
        shutil.rmtree(stale, ignore_errors=True)
    save_adapter(model, aside / "adapter")
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    torch.save({"step": step} | {name: part.state_dict() for name, part in parts.items()}, aside / "state.pt")
    aside.rename(final)
    return final


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of the latest step, or None."""
    found = [path for path in output_dir.glob("checkpoints/step-*") if path.suffix != ".partial"]
    return max(found, default=None, key=step_of)


def step_of(checkpoint: Path) -> int:
    """How many steps a checkpoint's folder says were done."""
    return int(checkpoint.name.removeprefix("step-"))


def load_state(checkpoint: Path, optimizer, scheduler, scaler) -> int:
    """Give optimizer, schedule and loss scale their saved state; the number of steps that were done."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    scaler.load_state_dict(state["scaler"])
    return state["step"]


def keep_steps_until(path: Path, last_step: int) -> None:
    """Drop the rows of a JSONL file behind last_step: the steps that a resumed run does again."""
    if not path.exists():
        return
    kept = [line + "\n" for line, row in read_jsonl(path) if row["step"] <= last_step]
    path.write_text("".join(kept), encoding="utf-8")


def open_run(config) -> Path | None:
    """The checkpoint to resume from, or None to start at step 0.

    Raises:
        ConfigError: output_dir cannot be written to, holds a run that is not to be resumed, or none that could be; or
            settings that a resumed run must keep are not the same.
    """
    output_dir = Path(config.output_dir)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output_dir={config.output_dir!r}: {str(existing)!r} is no folder that can be written to")
    former = output_dir / "config.yaml"
    if config.resume and not former.exists():
        raise ConfigError(f"resume: {config.output_dir!r} holds no run; leave --resume out to start one there")
    if not config.resume and former.exists():
        raise ConfigError(
            f"output_dir={config.output_dir!r} holds a run already: go on with it by --resume, give another "
            "--output_dir, or delete the folder"
        )
    if not config.resume:
        return None
    before, now = yaml.safe_load(former.read_text()), asdict(config)
    changed = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
    if changed:
        listed = "; ".join(f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in changed)
        raise ConfigError(
            f"resume: {listed}. A resumed run keeps its settings: give --config {former}, and beside it at most "
            f"{', '.join(MAY_CHANGE)}"
        )
    checkpoint = newest_checkpoint(output_dir)  # None when the run stopped before its first one: it starts again
    if checkpoint and step_of(checkpoint) > config.max_steps:
        raise ConfigError(f"max_steps={config.max_steps}: {checkpoint} is further already; give more")
    return checkpoint
