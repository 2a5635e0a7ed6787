"""The folder of a training run: who may begin or go on in it, and what it was made from.

config.yaml holds the settings of the run, run.json what they led to (examples, model, number format, versions): a run
that goes on with other examples under the same name would follow nobody's settings, and is refused.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import yaml

from checkpoint import (
    all_checkpoints,
    checkpoint_bytes,
    keep_steps_until,
    remove_leftovers,
    step_of,
    stored_json,
    whole_checkpoint,
    write_whole,
)
from config import ConfigError, stored_config
from fingerprints import example_bytes, loaded_from
from processes import read_by_main
from saving import RowFile, insist
from tables import METRICS, with_nan

try:
    import fcntl
except ImportError:  # Windows: nothing keeps a second process out there
    fcntl = None

MAY_CHANGE = ("max_steps", "save_steps", "save_total_limit", "resume", "report_to", "sampling_tokens", "output_dir")
MAY_CHANGE += ("max_skipped_steps", "plan", "memory_gb", "try_biggest", "allowed_folders", "regions_folder")
WHEN_EXAMPLES_ARE_THE_SAME = ("data", "eval_data")  # data may be moved, to another disk of another machine
MUST_STAY = ("examples", "eval_examples", "model", "adapter", "number_format")  # of run.json
SHOULD_STAY = ("device", "processes", "versions")  # of run.json: where they change, the last bits may differ
FILES = ("metrics.jsonl", "samples.jsonl")
PATIENCE = 60  # seconds for a process that was told to stop, or whose launcher is gone, to save and end


@dataclass
class Run:
    """An opened run folder.

    checkpoint   what to go on from, or None: step 0
    finished     whether all its steps were done and everything was written
    former       run.json of the run that goes on, {} for a new one
    """

    folder: Path
    checkpoint: Path | None = None
    finished: bool = False
    former: dict = field(default_factory=dict)
    rows: dict[str, RowFile] = field(default_factory=dict)
    lock: int | None = None


# --- opening it -------------------------------------------------------------------------------------------------


@contextmanager
def open_run(config, accelerator) -> Iterator[Run]:
    """Look at config.output_dir and hold it; nothing is made in it yet. The main process looks, all of them are told.

    Raises:
        ConfigError: output_dir cannot be written to, is another process's, holds a run that is not to be resumed; or
            settings that a resumed run must keep are not the same.
    """
    run = Run(Path(config.output_dir))
    try:
        run.checkpoint, run.finished, run.former = read_by_main(lambda: _look(run, config), accelerator.is_main_process)
        yield run
    finally:
        for file in run.rows.values():
            file.close()
        if run.lock is not None:
            os.close(run.lock)


def _look(run: Run, config) -> tuple[Path | None, bool, dict]:
    """(checkpoint, finished, former) of the run."""
    former = run.folder / "config.yaml"
    has_run = former.exists() or any(all_checkpoints(run.folder))
    if has_run and not config.resume:
        raise ConfigError(
            f"output_dir={config.output_dir!r} holds a run already: go on with it by --resume, give another "
            "--output_dir, or delete the folder"
        )
    if run.folder.exists():
        _hold(run)
        with suppress(OSError):  # of a disk that takes nothing: that is said next
            remove_leftovers(run.folder)  # first, since they may be what fills it
    existing = next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())
    for place in {existing, *(folder for folder in (run.folder / "checkpoints",) if folder.exists())}:
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"x" * 4096)
        except OSError as error:
            raise ConfigError(
                f"output_dir={config.output_dir!r}: {str(place)!r} is no folder that can be written to: {error}"
            ) from error
    if not config.resume:
        return None, False, {}
    if not former.exists():
        if has_run:
            raise ConfigError(f"resume: {config.output_dir!r} holds checkpoints, but no config.yaml of their run")
        print(f"resume: {config.output_dir!r} holds no run yet: it starts at step 0")
        return None, False, {}
    made = stored_json(run.folder / "run.json")  # without it, nothing can be compared
    made = made if isinstance(made, dict) else {}
    _compare_settings(former, made, config)
    if _is_finished(run.folder, made, config):
        print(
            f"resume: the run in {config.output_dir!r} is finished, at step {config.max_steps}; give more --max_steps"
        )
        return None, True, made
    checkpoint, passed_over = whole_checkpoint(run.folder)
    print("".join(f"resume: {sentence}\n" for sentence in passed_over), end="")
    if checkpoint and step_of(checkpoint) > config.max_steps:
        raise ConfigError(f"max_steps={config.max_steps}: {checkpoint} is further already; give more")
    print(f"resume: from {checkpoint}" if checkpoint else "resume: no whole checkpoint, so from step 0")
    return checkpoint, False, made


def _hold(run: Run) -> None:
    """Keep others out as long as this process lives: a launcher that is killed leaves its child at work."""
    if fcntl is None or run.lock is not None:
        return
    run.lock, end, is_told = os.open(run.folder, os.O_RDONLY), time.monotonic() + PATIENCE, False
    while True:
        try:
            return fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system that has no locks
            if time.monotonic() >= end:
                raise ConfigError(
                    f"output_dir={str(run.folder)!r}: another process is at work in it, which may be one whose "
                    "launcher was killed; wait for it, or end it"
                ) from error
        if not is_told:
            print(f"output_dir: another process is at work in {str(run.folder)!r}; waiting {PATIENCE} s for its end")
        is_told = True
        time.sleep(0.2)


def _compare_settings(path: Path, made: dict, config) -> None:
    """Say which settings changed, and refuse those that a run must keep; `made` is its run.json."""
    before, now = asdict(stored_config(path, type(config))), asdict(config)
    changed = [name for name in now if name != "resume" and before[name] != now[name]]
    movable = WHEN_EXAMPLES_ARE_THE_SAME if "examples" in made else ()
    movable += ("dtype",) if "number_format" in made else ()  # which says what "auto" was
    refused = [name for name in changed if name not in MAY_CHANGE + movable]
    if refused:
        listed = "; ".join(f"{name} was {before[name]!r}, is {now[name]!r}" for name in refused)
        raise ConfigError(
            f"resume: {listed}. A resumed run keeps its settings: give --config {path}, and beside it at most "
            f"{', '.join(MAY_CHANGE)}, or another place of the same data"
        )
    for name in changed:
        shaped = name == "max_steps" and config.lr_scheduler in ("linear", "cosine")
        more = f"; from here on the {config.lr_scheduler} schedule is that of the new length" if shaped else ""
        print(f"resume: {name} was {before[name]!r}, is {now[name]!r}{more}")


def _is_finished(folder: Path, made: dict, config) -> bool:
    names = ["adapter/adapter_model.safetensors", "adapter/README.md", "metrics.jsonl", "samples.jsonl", "curves.png"]
    names += ["evaluation.json"] if made.get("eval_examples") else []
    return made.get("finished") == config.max_steps and all((folder / name).exists() for name in names)


# --- what a run was made from -----------------------------------------------------------------------------------


def made_from(config, examples, held_out, model, accelerator) -> dict:
    """What run.json says of a run: what it rests on beside its settings.

    Args:
        examples, held_out: data.examples.Examples behind every check; held_out may be None.
    """
    return loaded_from(config.policy_arguments(0), model) | {
        "examples": _name_of(examples),
        "eval_examples": _name_of(held_out) if held_out else None,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
    }


def _name_of(examples) -> str:
    """How many examples, and a name for all that is written about them and the sizes of their pictures' files."""
    if examples.name.partition(":")[0] == "scenes":  # drawn by sayo itself
        return f"{len(examples)} of {examples.name}"
    found = hashlib.sha256()
    for index in range(len(examples)):
        found.update(example_bytes(examples.peek(index)))
    return f"{len(examples)}, SHA-256 {found.hexdigest()[:16]}"


def check_made_from(run: Run, config, now: dict) -> list[str]:
    """Compare a run that goes on with what it was made from; sentences about what may only change its last bits.

    Raises:
        ConfigError: examples, model, adapter or number format are others.
    """
    called = {"examples": f"data={config.data!r}", "eval_examples": f"eval_data={config.eval_data!r}"}
    differ = [name for name in (*MUST_STAY, *SHOULD_STAY) if name in run.former and run.former[name] != now[name]]
    said = {name: f"{called.get(name, name)}: {run.former[name]} then, {now[name]} now" for name in differ}
    if "number_format" in said:
        said["number_format"] += f", --dtype {run.former['number_format'].removeprefix('torch.')} is that of then"
    refused = [said[name] for name in differ if name in MUST_STAY]
    if refused:
        raise ConfigError(
            f"resume: {'; '.join(refused)}. The run would no longer be that of its settings: give it what it began "
            "with, or start another --output_dir"
        )
    return [f"resume: {said[name]}; the last bits may differ from those of an undisturbed run" for name in differ]


def check_space(config, run: Run, parameters: Sequence, start: int) -> list[str]:
    """Whether the checkpoints that are to come fit on the disk; a sentence where they may not.

    Raises:
        ConfigError: there is no space for a single one beside the final adapter.
    """
    existing = next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())
    one, free = checkpoint_bytes(parameters, config.optimizer), shutil.disk_usage(existing).free
    due = config.max_steps // config.save_steps - start // config.save_steps
    due += config.max_steps % config.save_steps > 0
    count = min(due, (config.save_total_limit or due) + 1)  # the old one goes when the new one stands
    advice = f"{free / 1e6:,.1f} MB are free in {str(existing)!r}, a checkpoint takes {one / 1e6:,.1f} MB"
    if start < config.max_steps and free < 2 * one:
        raise ConfigError(f"output_dir={config.output_dir!r}: {advice}, and the final adapter comes on top; free some")
    if free >= (count + 1) * one:
        return []
    return [
        f"output_dir: {advice}, and {count} of them are to come: raise save_steps (now {config.save_steps}) or give "
        "--save_total_limit 2"
    ]


# --- its files --------------------------------------------------------------------------------------------------


def mark_finished(run: Run, config, made: dict) -> None:
    """Say in run.json that all was done and written."""
    insist(
        run, "run.json", lambda: write_whole(run.folder / "run.json", _as_json(made | {"finished": config.max_steps}))
    )


def _as_json(made: dict) -> str:
    return json.dumps(made, indent=1)


def begin(run: Run, config, made: dict, start: int) -> None:
    """Make the folder ready: settings, what the run is made from, and rows up to the step that it goes on from.

    Raises:
        ConfigError: it cannot be written to.
    """
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        _hold(run)
        write_whole(run.folder / "config.yaml", yaml.safe_dump(asdict(config), sort_keys=False, allow_unicode=True))
        write_whole(run.folder / "run.json", _as_json(made))
        for name in FILES:
            kept = keep_steps_until(run.folder / name, start)
            if missing := sorted(set(range(1, start + 1)) - set(kept)):
                print(f"resume: {name} lacks {len(missing)} steps before {start}, the first is {missing[0]}")
            run.rows[name] = RowFile(run.folder / name)
    except OSError as error:
        raise ConfigError(f"output_dir={config.output_dir!r} cannot be written to: {error}") from error


def former_evaluations(run: Run, max_steps: int) -> tuple[list[dict] | None, list[dict] | None]:
    """Rows of the evaluations before and after that a former start of the run wrote; None for what is to be done.

    Of this machine's disk: several processes take those of the main one (processes.read_by_main).
    """
    if not run.former and not run.checkpoint:
        return None, None
    before, after = (stored_json(run.folder / name) for name in ("evaluation_before.json", "evaluation.json"))
    is_at_the_end = run.checkpoint is not None and step_of(run.checkpoint) == max_steps
    if not is_at_the_end or not isinstance(after, dict) or after.get("step") != max_steps:
        after = {}
    rows = before, after["rows"].get("after") if isinstance(after.get("rows"), dict) else None
    return tuple(with_nan(part) if isinstance(part, list) and all(map(_is_row, part)) else None for part in rows)


def _is_row(value) -> bool:
    """Whether a value can be an evaluation's row."""
    return isinstance(value, dict) and {"id", *METRICS} <= value.keys()
