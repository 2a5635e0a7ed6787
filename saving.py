"""What a run writes while it trains, and what a disk that is full for a while, or for good, does to it.

Rows that it does not take wait in memory; a checkpoint that it does not take is due again after the next step; what no
step comes after is tried several times, and then the run ends with what to do. No attempt leaves half a file.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from tqdm import tqdm

from checkpoint import drop_old, save_checkpoint, whole_checkpoint
from config import ConfigError
from visualize import plot_curves

ERRORS = (OSError, RuntimeError, SafetensorError)  # of a disk: torch.save and safetensors have their own
WAITS = (2, 10, 30, 60)  # seconds between attempts to write what no step comes after


class RowFile:
    """A JSONL file that rows are appended to. What a full disk refuses is kept, and written when there is space."""

    def __init__(self, path: Path):
        self._file = open(path, "ab", buffering=0)
        self._size, self._pending = self._file.seek(0, os.SEEK_END), b""

    def add(self, row: dict) -> None:
        self._pending += (json.dumps(row, ensure_ascii=False) + "\n").encode()

    def write(self) -> None:
        """Append what is pending.

        Raises:
            OSError: it could not be; the next attempt begins with what half a line it left.
        """
        if os.fstat(self._file.fileno()).st_size > self._size:
            self._file.truncate(self._size)
        rest = memoryview(self._pending)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size, self._pending = self._size + len(self._pending), b""

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def write_rows(run, rows: dict[str, dict]) -> None:
    """Append a row to each file. A disk that takes none is told of; the rows wait, and the run goes on."""
    for name, row in rows.items():
        run.rows[name].add(row)
        try:
            run.rows[name].write()
        except OSError as error:
            tqdm.write(f"step {row['step']}: {name} could not be written ({error}); its rows wait in memory")


def save(run, config, step: int, model, parts: dict, skipped_in_a_row: int) -> bool:
    """Save a checkpoint, all rows up to it first; False where the disk does not take it: then it is due again."""
    try:
        _save(run, config, step, model, parts, skipped_in_a_row)
    except ERRORS as error:
        tqdm.write(
            f"step {step}: the checkpoint could not be saved ({_words(error)}); it is tried again after the next step"
        )
        return False
    return True


def save_for_certain(run, config, step: int, model, parts: dict, skipped_in_a_row: int) -> None:
    """Save what no step comes after, with several attempts; errors as in insist."""
    insist(run, f"the checkpoint of step {step}", lambda: _save(run, config, step, model, parts, skipped_in_a_row))


def _save(run, config, step: int, model, parts: dict, skipped_in_a_row: int) -> None:
    for file in run.rows.values():
        file.write()
        file.sync()
    newest = save_checkpoint(run.folder, step, model, parts, skipped_in_a_row)
    try:
        drop_old(run.folder, newest, config.save_total_limit)
    except OSError as error:  # the new one stands: to save it again would make the disk no emptier
        tqdm.write(f"step {step}: an old checkpoint could not be deleted ({error})")


def insist(run, what: str, write: Callable[[], None]) -> None:
    """Write with several attempts, since there is no later one.

    Raises:
        ConfigError: none succeeded; it names the checkpoint that the run can go on from.
    """
    for wait in (*WAITS, None):
        try:
            return write()
        except ERRORS as error:
            if wait is None:
                newest = whole_checkpoint(run.folder)[0]
                raise ConfigError(
                    f"{what} could not be written to {str(run.folder)!r}: {_words(error)}. Free some space there and "
                    f"go on with --resume, which begins at {newest or 'step 0'}"
                ) from error
            tqdm.write(f"{what} could not be written ({_words(error)}); again in {wait} s")
            time.sleep(wait)


def _words(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def draw_curves(output_dir: Path) -> None:
    """curves.png of a run, there whole or not at all."""
    aside = output_dir / "curves.partial.png"
    plot_curves(output_dir / "metrics.jsonl", aside)
    aside.replace(output_dir / "curves.png")
