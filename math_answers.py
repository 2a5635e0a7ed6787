"""Whether two LaTeX answers are equal, decided by math-verify in a process of its own that is ended when it takes long.

math-verify bounds its own work with signal.alarm, which needs the main thread and cannot stop one long operation on
integers: 9^(9^9) would hang a whole run. Here the work is done by a child that speaks one line of JSON at a time; a
child that does not answer within SECONDS is killed, the answer counts as wrong, and the next question starts another.
Answers are parsed as LaTeX alone, by a grammar: math-verify's other way, for plain expressions, would evaluate them.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

SECONDS = 5.0  # for one comparison
SECONDS_TO_START = 120.0  # importing sympy takes one or two, on a busy machine more
MEMORY = 4 * 2**30  # bytes of address space that the child may have, where the system can say so

_lock = threading.Lock()
_child: subprocess.Popen | None = None
_owner: int | None = None  # the process that started the child: after a fork its pipes are the parent's


@lru_cache(maxsize=10_000)
def same_value(gold: str, answer: str) -> bool:
    """Whether math-verify finds two pieces of LaTeX (without $ around them) equal; False when it cannot say in time.

    May be called from any thread and any process.

    Raises:
        RuntimeError: the child does not start, mostly because math-verify is not installed.
    """
    with _lock:
        child = _running_child()
        reply = ""
        try:
            reply = _within(SECONDS, child, json.dumps([gold, answer]))
        finally:
            if not reply:  # none in time, or interrupted: one that comes later would be taken for the next question's
                stop()
        return reply == "equal"


def stop() -> None:
    """End the child, if there is one."""
    global _child
    if _child is not None and _owner == os.getpid():
        _child.kill()
        _child.wait()
        _child.stdin.close(), _child.stdout.close()
    _child = None


def _running_child() -> subprocess.Popen:
    global _child, _owner
    if _child is None or _owner != os.getpid() or _child.poll() is not None:
        stop()
        command, pipe = [sys.executable, str(Path(__file__).resolve())], subprocess.PIPE
        _child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        if _owner is None:
            atexit.register(stop)
        _owner = os.getpid()
        if _within(SECONDS_TO_START, _child) != "ready":
            stop()
            raise RuntimeError("math-verify cannot be started: pip install -r requirements.txt")
    return _child


def _within(seconds: float, child: subprocess.Popen, question: str | None = None) -> str:
    """The child's next line; empty when it ended, or was killed here because it took longer."""
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    try:
        if question is not None:
            child.stdin.write(question + "\n")
            child.stdin.flush()
        return child.stdout.readline().strip()
    except OSError:
        return ""
    finally:
        timer.cancel()
        timer.join()  # a kill that began is over, so that poll() tells the truth


# --- the child ---------------------------------------------------------------------------------------------------


def _serve() -> None:
    sys.path.pop(0)  # the libraries must not import this repository's modules for their own
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever the libraries print is no answer
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass
    from math_verify import LatexExtractionConfig, parse, verify

    def write(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    write("ready")
    for line in sys.stdin:
        # Without a handler the alarm ends the process, whatever it is at: also when the parent is gone.
        if hasattr(signal, "alarm"):
            signal.alarm(int(SECONDS) + 5)
        try:
            sides = [
                parse(f"${side}$", [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None)
                for side in json.loads(line)
            ]
            equal = all(sides) and verify(*sides, timeout_seconds=None)
        except Exception:  # sympy raises nearly anything
            equal = False
        if hasattr(signal, "alarm"):
            signal.alarm(0)
        write("equal" if equal else "different")


if __name__ == "__main__":
    _serve()
