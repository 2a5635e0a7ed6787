"""Runs of a few seconds, and what is left of them when something happens."""

import json
import shutil
from pathlib import Path

import small_run
from kill_points import differences, what_it_left

import checkpoint
import train_rl
from train_rl import Config

SMALL = small_run.SMALL | {"max_new_tokens": 12, "save_steps": 1, "eval_limit": 2}
SMALL |= {"lr_scheduler": "cosine", "try_biggest": False}


def run(folder, **settings):
    train_rl.main(Config(**(SMALL | {"output_dir": str(folder)} | settings)))


def assert_equal(folder, undisturbed):
    assert differences(what_it_left(undisturbed), what_it_left(folder)) == []


def copy_until(undisturbed, folder, step) -> Path:
    """The run as it was when a kill came behind the checkpoint of a step."""
    shutil.copytree(undisturbed, folder)
    for path in folder.glob("checkpoints/step-*"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    for name in ("adapter", "evaluation.json", "curves.png"):
        checkpoint.remove(folder / name)
    made = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(made | {"finished": None}))
    return folder
