"""The folder of a training run: who may start or resume in it, its rows and checkpoints, and a full disk.

config.yaml holds the settings of the run, run.json what they led to (examples, model, number format, versions): a run
is not resumed with other examples under the same name. Rows that a full disk refuses are buffered, a failed checkpoint
is retried after the next step, and final files are retried with back-off before the run stops with instructions.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from uuid import uuid4

import yaml
from accelerate.utils import set_seed
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from tqdm import tqdm

from sayo.run import files
from sayo.run.card import write_model_card
from sayo.run.metrics import show_step
from sayo.run.processes import check_same_weights, read_by_main
from sayo.run.provenance import PLACES, built_from, check_built_from, is_same_place
from sayo.run.stopping import Stopped, StopSignals
from sayo.settings import ConfigError, no_bar, stored_config

MAY_CHANGE = ("max_steps", "save_steps", "save_total_limit", "resume", "report_to", "sampling_tokens", "output_dir")
MAY_CHANGE += ("max_skipped_steps", "plan", "memory_gb", "try_biggest", "allowed_folders", "regions_folder")
WHEN_EXAMPLES_ARE_THE_SAME = ("data", "eval_data")  # data may be moved, to another disk of another machine
FILES = ("metrics.jsonl", "samples.jsonl")
PATIENCE = 60  # seconds for a process that was asked to stop, or whose launcher is gone, to save and end
ERRORS = (OSError, RuntimeError, SafetensorError)  # of a disk: torch.save and safetensors have their own
WAITS = (2, 10, 30, 60)  # seconds between attempts to write a final file
HOW_TO_WATCH = (
    "A GRPO loss hovers around zero: advantages of a group add up to zero and the ratio starts at 1, so it is\n"
    "its gradient that counts, not its value. Watch the rewards, TAS, KL and advantage shares instead."
)


class RowFile:
    """A JSONL file that rows are appended to. What a full disk refuses is kept, and written when there is space."""

    def __init__(self, path: Path):
        self.file = open(path, "ab", buffering=0)
        self._size, self._pending = self.file.seek(0, os.SEEK_END), b""

    def add(self, row: dict) -> None:
        self._pending += (json.dumps(row, ensure_ascii=False) + "\n").encode()

    def write(self) -> None:
        """Append what is pending.

        Raises:
            OSError: it could not be; the next attempt begins with what half a line it left.
        """
        if os.fstat(self.file.fileno()).st_size > self._size:
            self.file.truncate(self._size)
        rest = memoryview(self._pending)
        while rest:
            rest = rest[self.file.write(rest) :]
        self._size, self._pending = self._size + len(self._pending), b""


@dataclass
class Run:
    """An opened run folder, and what a training loop does with it.

    checkpoint   what to resume from, or None: step 0
    finished     whether all its steps were done and everything was written
    former       run.json of the run that is resumed, {} for a new one
    seen         names of a run's files that were there when the folder was looked at
    """

    config: object  # train_rl.Config
    accelerator: object
    stop: StopSignals
    checkpoint: Path | None = None
    finished: bool = False
    former: dict = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    rows: dict[str, RowFile] = field(default_factory=dict)
    inputs: dict = field(default_factory=dict)  # what run.json will say
    notes: list[str] = field(default_factory=list)  # for the screen, when the run begins
    warned: set[str] = field(default_factory=set)
    first_step: int = 0
    is_due: bool = False  # a checkpoint; one that could not be saved stays due
    progress: tqdm | None = None

    def __post_init__(self):
        self.folder = Path(self.config.output_dir)
        self.lock = FileLock(self.folder / ".lock")

    def hold(self) -> None:
        """Keep others out as long as this process lives: a launcher that is killed leaves its child at work."""
        try:
            try:
                self.lock.acquire(timeout=0)
            except Timeout:
                if not self.config.resume:
                    raise
                print(f"output_dir: another process is at work in {self.folder}; waiting {PATIENCE} s for its end")
                self.lock.acquire(timeout=PATIENCE, poll_interval=0.2)
        except Timeout as error:
            busy = "another process is at work in it, perhaps of a launcher that was killed: wait for it, or end it"
            raise ConfigError(f"output_dir={str(self.folder)!r}: {busy}") from error
        except (OSError, NotImplementedError):
            pass  # a file system without locks, or one that takes nothing, which is said next

    # --- before the first step ---

    def check_inputs(self, examples, held_out, model) -> None:
        """Note what the run is built from; ConfigError where a resumed one began with something else."""
        self.inputs = built_from(self.config, examples, held_out, model, self.accelerator)
        self.inputs |= {"started_in": os.getcwd()} | self._tracked_as()
        self.notes += check_built_from(self.former, self.config, self.inputs)

    def _tracked_as(self) -> dict:
        """{"wandb": id} for a run that is logged there, so that one that is resumed goes on in it."""
        return {"wandb": self.former.get("wandb") or uuid4().hex[:8]} if self.config.report_to == "wandb" else {}

    def begin(self, state, examples, notes: Sequence[str]) -> None:
        """Make the folder ready: settings, inputs, and rows up to the step that the run resumes from. ConfigError where
        it cannot be written to or has no space for a checkpoint."""
        self.first_step = self.stop.last_step = state.step
        self.notes += check_space(self.config, self.folder, state.parameters, state.step) + list(notes)
        state.optimizer.register_step_pre_hook(self.stop.defer)  # a step is abandoned before its first update, or done
        self.accelerator.wait_for_everyone()  # every process has read the checkpoint before one of them writes
        if not self.accelerator.is_main_process:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.hold()
            if files.names_in(self.folder) != self.seen:  # by a start that was faster
                fix = "give another --output_dir, or the same command with --resume"
                raise ConfigError(f"output_dir={self.config.output_dir!r}: another run has begun in it: {fix}")
            settings = yaml.safe_dump(asdict(self.config), sort_keys=False, allow_unicode=True)
            files.write_whole(self.folder / "run.json", json.dumps(self.inputs, indent=1))  # first: see files.is_run
            files.write_whole(self.folder / "config.yaml", settings)
            for name in FILES:
                kept = files.keep_steps_until(self.folder / name, state.step)
                if missing := sorted(set(range(1, state.step + 1)) - set(kept)):
                    print(f"resume: {name} lacks {len(missing)} steps before {state.step}, the first is {missing[0]}")
                self.rows[name] = RowFile(self.folder / name)
        except OSError as error:
            raise ConfigError(f"output_dir={self.config.output_dir!r} cannot be written to: {error}") from error
        known = {name: value for name, value in asdict(self.config).items() if isinstance(value, int | float | str)}
        # Steps that are repeated replace those of the former start.
        of_trackers = {"tensorboard": {"purge_step": state.step + 1}}
        of_trackers["wandb"] = {"id": self.inputs.get("wandb"), "resume": "allow"}
        self.accelerator.init_trackers("sayo", config=known, init_kwargs=of_trackers)
        trained, number = sum(p.numel() for p in state.parameters), self.accelerator.num_processes
        processes = "1 process" if number == 1 else f"{number} processes"
        print(f"{len(examples)} examples of {self.config.data}; {trained:,} trained parameters; {processes}")
        print(*self.notes, *(f"skipped {message}" for message in examples.skipped), HOW_TO_WATCH, sep="\n")

    def check_same_weights(self, model) -> None:
        """Raises ConfigError when the processes' trained weights differ."""
        step = self.stop.last_step
        check_same_weights(model, self.accelerator, f"after step {step}" if step > self.first_step else "at the start")

    # --- the loop ---

    def steps(self, state) -> Iterator[int]:
        """The steps that are left, under a progress bar and with seeded random numbers, until a signal asks to stop.

        Raises:
            ConfigError: the gradient was not finite in max_skipped_steps steps in a row.
        """
        config, accelerator = self.config, self.accelerator
        interval = 0.1 if sys.stderr.isatty() else 15
        bar = {
            "desc": "train",
            "unit": "step",
            "mininterval": interval,
            "disable": no_bar(not accelerator.is_main_process),
        }
        with tqdm(range(state.step, config.max_steps), **bar) as self.progress:
            for step in self.progress:
                # Nothing here draws from Python's, numpy's and torch's own random numbers, but a change of yours may.
                name = f"{config.seed}/step/{step}/{accelerator.process_index}"
                set_seed(random.Random(name).getrandbits(32))
                yield step
                if state.skipped_in_a_row >= config.max_skipped_steps:
                    fix = f"lower learning_rate (now {config.learning_rate}) or give --dtype bfloat16 or float32"
                    raise ConfigError(
                        f"max_skipped_steps={config.max_skipped_steps}: the gradient was not finite in so many steps "
                        f"in a row, the last one step {step + 1}; {fix}; the last checkpoint is untouched"
                    )
                if self.stop.any_process_stopped(accelerator):
                    return

    @contextmanager
    def interruptible(self, state) -> Iterator[None]:
        """Inside the block a signal abandons the step by Stopped, until its first update begins.

        Of several processes none abandons a step: they finish it and agree at its end.
        """
        scale = state.scaler.state_dict()
        try:
            with self.stop.interruptible(self.accelerator.num_processes == 1):
                yield
        except Stopped:
            if state.scaler.is_enabled():
                state.scaler.load_state_dict(scale)
            raise

    def log(self, metrics: dict, sample: dict) -> None:
        """Append a step's rows and show it. Rows that the disk refuses wait in memory."""
        self.stop.last_step = step = metrics["step"]
        if not self.accelerator.is_main_process:
            return
        for name, row in zip(FILES, (metrics, {"step": step} | sample), strict=True):
            self.rows[name].add(row)
            try:
                self.rows[name].write()
            except OSError as error:
                tqdm.write(f"step {step}: {name} could not be written ({error}); its rows wait in memory")
        show_step(metrics, sample, self.progress, self.accelerator, self.warned)

    def save(self, model, state) -> None:
        """Save a checkpoint when one is due; one that the disk refuses is due again after the next step."""
        if state.step % self.config.save_steps == 0:
            self.check_same_weights(model)
            self.is_due = True
        if not self.is_due or state.step >= self.config.max_steps or not self.accelerator.is_main_process:
            return
        try:
            self._save(model, state)
            self.is_due = False
        except ERRORS as error:
            again = "it is tried again after the next step"
            tqdm.write(f"step {state.step}: the checkpoint could not be saved ({_words(error)}); {again}")

    def _save(self, model, state) -> None:
        for rows in self.rows.values():
            rows.write()
            os.fsync(rows.file.fileno())
        newest = files.save_checkpoint(self.folder, state.step, model, state.parts(), state.skipped_in_a_row)
        try:
            files.drop_old(self.folder, newest, self.config.save_total_limit)
        except OSError as error:  # the new one stands: to save it again would make the disk no emptier
            tqdm.write(f"step {state.step}: an old checkpoint could not be deleted ({error})")

    # --- behind the last step ---

    def save_last(self, model, state) -> None:
        """Save the last checkpoint; after a signal end here by Stopped, else write adapter and curves."""
        self.check_same_weights(model)
        if self.accelerator.is_main_process and state.step > self.first_step:
            self.write_with_retries(f"the checkpoint of step {state.step}", lambda: self._save(model, state))
        self.accelerator.wait_for_everyone()
        if self.stop.number:
            self.accelerator.end_training()
        self.stop.raise_if_stopped()
        if self.accelerator.is_main_process:
            self.write_with_retries("adapter", lambda: files.save_final_adapter(self.folder, model))
            self.write_with_retries("curves.png", lambda: draw_curves(self.folder))

    def finish(self, columns: dict, examples, held_out) -> None:
        """Write the model card and mark the run finished. columns: of the evaluations, {} without any."""
        if self.accelerator.is_main_process:
            card = self.folder, self.config, columns, len(held_out or ()), len(examples)
            self.write_with_retries("the model card", lambda: write_model_card(*card))
            done = json.dumps(self.inputs | {"finished": self.config.max_steps}, indent=1)
            self.write_with_retries("run.json", lambda: files.write_whole(self.folder / "run.json", done))
            print(f"adapter, metrics, samples and curves.png -> {self.folder}")
        self.accelerator.end_training()

    def write_with_retries(self, what: str, write: Callable[[], None]) -> None:
        """Write a final file in several attempts; ConfigError with the checkpoint to resume from if none succeeds."""
        for wait in (*WAITS, None):
            try:
                return write()
            except ERRORS as error:
                if wait is None:
                    newest = files.whole_checkpoint(self.folder)[0]
                    raise ConfigError(
                        f"{what} could not be written to {str(self.folder)!r}: {_words(error)}. Free some space there "
                        f"and give --resume, which begins at {newest or 'step 0'}"
                    ) from error
                tqdm.write(f"{what} could not be written ({_words(error)}); again in {wait} s")
                time.sleep(wait)


def _words(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def draw_curves(output_dir: Path) -> None:
    """Draw curves.png of a run."""
    from sayo.show.plots import plot_curves  # matplotlib: not when a script is imported

    aside = output_dir / "curves.partial.png"
    plot_curves(output_dir / "metrics.jsonl", aside)
    aside.replace(output_dir / "curves.png")


# --- opening it -------------------------------------------------------------------------------------------------


@contextmanager
def open_run(config, accelerator, stop: StopSignals) -> Iterator[Run]:
    """Look at config.output_dir and hold it; no run is begun in it yet. The main process looks, and tells the others.

    Raises:
        ConfigError: output_dir cannot be written to, is another process's, holds a run that is not to be resumed; or
            settings that a resumed run must keep are not the same.
    """
    run = Run(config, accelerator, stop)
    try:
        found = read_by_main(lambda: _look(run), accelerator.is_main_process)
        run.checkpoint, run.finished, run.former, run.seen = found
        yield run
    finally:
        for rows in run.rows.values():
            rows.file.close()
        run.lock.release(force=True)


def _look(run: Run) -> tuple[Path | None, bool, dict, list[str]]:
    """(checkpoint, finished, former, seen) of the run."""
    config, folder = run.config, run.folder
    _check_whose(folder, config)
    if folder.exists():
        run.hold()
        _check_whose(folder, config)  # again: it may have been another's until now
    found = _resumed_from(folder, config) if files.is_run(folder) else (None, False, {})
    if files.is_run(folder):
        with suppress(OSError):  # of a disk that takes nothing: that is said next
            files.remove_leftovers(folder)  # first, since they may be what fills it
    elif config.resume:
        print(f"resume: {config.output_dir!r} holds no run yet: it starts at step 0")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    for place in {existing, *folder.glob("checkpoints")}:
        try:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"x" * 4096)
        except OSError as error:
            problem = f"{str(place)!r} is no folder that can be written to: {error}"
            raise ConfigError(f"output_dir={config.output_dir!r}: {problem}") from error
    return *found, files.names_in(folder)


def _check_whose(folder: Path, config) -> None:
    """Raise ConfigError for a folder with a run that is not to be resumed, or with files of others that a run has."""
    if files.is_run(folder):
        if not config.resume:
            fix = "add --resume to continue it, give another --output_dir, or delete the folder"
            raise ConfigError(f"output_dir={config.output_dir!r} holds a run already: {fix}")
    elif names := files.names_in(folder):
        fix = "no run made them, and one would replace them: give another --output_dir, or move them"
        raise ConfigError(f"output_dir={config.output_dir!r} holds {', '.join(names)}: {fix}")


def _resumed_from(folder: Path, config) -> tuple[Path | None, bool, dict]:
    """(checkpoint, finished, former) of the run that a folder holds."""
    former, made = folder / "config.yaml", files.stored_json(folder / "run.json")
    made = made if isinstance(made, dict) else {}  # without it, nothing can be compared
    if not former.exists():
        if any(files.all_checkpoints(folder)):
            raise ConfigError(f"resume: {config.output_dir!r} holds checkpoints, but no config.yaml of their run")
        print(f"resume: the run in {config.output_dir!r} was stopped before its first step: it starts at step 0")
        return None, False, {}
    _compare_settings(former, made, config)
    if _is_finished(folder, made, config):
        print(f"resume: the run in {folder} is finished, at step {config.max_steps}; give more --max_steps")
        return None, True, made
    checkpoint, passed_over = files.whole_checkpoint(folder)
    print("".join(f"resume: {sentence}\n" for sentence in passed_over), end="")
    if checkpoint and files.step_of(checkpoint) > config.max_steps:
        raise ConfigError(f"max_steps={config.max_steps}: {checkpoint} is further already; give more")
    print(f"resume: from {checkpoint}" if checkpoint else "resume: no whole checkpoint, so from step 0")
    return checkpoint, False, made


def _compare_settings(path: Path, made: dict, config) -> None:
    """Say which settings changed, and refuse those that a run must keep; `made` is its run.json."""
    before, now = asdict(stored_config(path, type(config))), asdict(config)
    changed = [name for name in now if name != "resume" and before[name] != now[name]]
    changed = [name for name in changed if name not in PLACES or not is_same_place(before[name], now[name])]
    movable = WHEN_EXAMPLES_ARE_THE_SAME if "examples" in made else ()
    movable += ("dtype",) if "number_format" in made else ()  # which says what "auto" was
    gone = [name for name in ("model", "adapter") if made.get(name) and not os.path.exists(str(before[name]))]
    movable += tuple(name for name in gone if Path(now[name] or "").is_dir())  # moved: run.json knows their files
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


def check_space(config, folder: Path, parameters: Sequence, start: int) -> list[str]:
    """Whether the checkpoints that are to come fit on the disk; a sentence where they may not.

    Raises:
        ConfigError: there is no space for a single one beside the final adapter.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    one, free = files.checkpoint_bytes(parameters, config.optimizer), shutil.disk_usage(existing).free
    due = config.max_steps // config.save_steps - start // config.save_steps
    due += config.max_steps % config.save_steps > 0
    count = min(due, (config.save_total_limit or due) + 1)  # the old one goes when the new one stands
    advice = f"{free / 1e6:,.1f} MB are free in {str(existing)!r}, a checkpoint takes {one / 1e6:,.1f} MB"
    if start < config.max_steps and free < 2 * one:
        raise ConfigError(f"output_dir={config.output_dir!r}: {advice}, and the final adapter comes on top; free some")
    fix = f"raise save_steps (now {config.save_steps}) or give --save_total_limit 2"
    return [f"output_dir: {advice}, and {count} of them are to come: {fix}"] * (free < (count + 1) * one)
