"""SIGTERM (Slurm, a closing machine), Ctrl-C and a closed terminal end a run in order: save, say how to resume, exit.

The process exits with 128 + the signal's number, as shells and Slurm expect. While a run is loading or evaluating,
there is nothing to save and it ends at once. A step is abandoned if its optimizer update has not started (Slurm allows
30 seconds), and finished otherwise. With several ranks, of which only some may get the signal, the step is always
finished, and all ranks agree at its end.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from sayo.settings import resume_command

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
SAME_SIGNAL_SECONDS = 1.0  # a launcher forwards the Ctrl-C that the terminal has sent to its children already


class Stopped(SystemExit):
    """A signal asked the run to end; the process's exit code is 128 + signal."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number


class StopSignals:
    """While the block is open, signals stop the run in order: at once where `may_raise`, else `number` says so.

    number     the signal that came, or 0
    may_raise  whether a signal raises Stopped wherever the program is
    last_step  the last whole step, for the message at the end
    """

    def __init__(self, is_speaker: bool = True):
        self.number, self.may_raise, self.last_step = 0, True, 0
        self._is_speaker, self._since, self._former = is_speaker, 0.0, {}
        self._resume = resume_command()  # while the launcher, which has its own flags, is there
        # A launcher that is killed leaves its child running.
        started_by = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
        self._launcher = os.getppid() if any(name in os.environ for name in started_by) else None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup does with SIGHUP
                    self._former[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if isinstance(error, Stopped) and self._is_speaker:
            place = f"after step {self.last_step}" if self.last_step else "before the first step"
            _say(f"stopped by {signal.Signals(error.number).name} {place}; resume with: {self._resume}")

    def _came(self, number: int, frame) -> None:
        now = time.monotonic()
        if self.number:
            if number == signal.SIGINT and now - self._since > SAME_SIGNAL_SECONDS:
                _say(f"stopped at once; the last checkpoint is whole; resume with: {self._resume}")
                os._exit(128 + number)
            return
        self.number, self._since = number, now
        if self.may_raise:
            raise Stopped(number)
        if self._is_speaker:
            _say(f"{signal.Signals(number).name}: saving after this step" + " (Ctrl-C again leaves at once)")

    def defer(self, *_) -> None:
        """From now on signals wait. It is registered as the hook before an optimizer's step."""
        self.may_raise = False

    @contextmanager
    def interruptible(self, may_raise: bool = True) -> Iterator[None]:
        """Inside the block a signal raises Stopped, until defer()."""
        self.may_raise = may_raise
        try:
            if may_raise and self.number:
                raise Stopped(self.number)
            yield
        finally:
            self.may_raise = False

    def raise_if_stopped(self) -> None:
        """From now on a signal raises Stopped, and one that has waited does."""
        self.may_raise = True
        if self.number:
            raise Stopped(self.number)

    def any_process_stopped(self, accelerator) -> int:
        """The signal that any of the processes got, or 0; the same in all of them. Once a step."""
        if self._launcher is not None and os.getppid() != self._launcher and not self.number:
            self.number = signal.SIGTERM
            _say("the launcher is gone: saving")
        if accelerator.num_processes > 1:
            numbers = accelerator.gather(torch.tensor([self.number], device=accelerator.device))
            self.number = int(numbers.max())
        return self.number


def _say(text: str) -> None:
    """One line on stderr, if it is still there. Not by print: inside of a handler, another print may be half done."""
    with suppress(OSError):
        os.write(2, f"\ntrain_rl.py: {text}\n".encode(errors="backslashreplace"))
