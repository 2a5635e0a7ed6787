"""Checkpoints of a run: written aside and then renamed, so that a folder that is there is whole.

A checkpoint holds the adapter, the optimizer and the schedule. Nothing else is needed: the order of the data and every
random number are functions of (seed, step).
"""

import json
import shutil
from pathlib import Path

import torch


def save_checkpoint(output_dir: Path, step: int, model, optimizer, scheduler) -> Path:
    """Write checkpoints/step-000100 and return its path."""
    final = output_dir / "checkpoints" / f"step-{step:06d}"
    aside = final.with_name(final.name + ".partial")
    for stale in (aside, final):
        shutil.rmtree(stale, ignore_errors=True)
    model.save_pretrained(aside / "adapter", save_embedding_layers=False)
    state = {"step": step, "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(state, aside / "state.pt")
    aside.rename(final)
    return final


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The checkpoint of the latest step, or None."""
    found = [path for path in output_dir.glob("checkpoints/step-*") if path.suffix != ".partial"]
    return max(found, default=None, key=lambda path: int(path.name.removeprefix("step-")))


def load_state(checkpoint: Path, optimizer, scheduler) -> int:
    """Give optimizer and schedule their saved state; the number of steps that were done."""
    state = torch.load(checkpoint / "state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    return state["step"]


def keep_steps_until(path: Path, last_step: int) -> None:
    """Drop the rows of a JSONL file behind last_step: the steps that a resumed run does again."""
    if not path.exists():
        return
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(line for line in whole if json.loads(line)["step"] <= last_step))
