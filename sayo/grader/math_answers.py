"""Whether two LaTeX answers are equal, by math-verify in a child process with a time limit.

math-verify limits its time with signal.alarm, which needs the main thread and cannot interrupt a long operation on
integers: 9^(9^9) would hang a run. Here a child reads one line of JSON per comparison; if it does not reply within
SECONDS, it is killed, the answer counts as wrong, and the next comparison starts a new child. Answers are parsed by the
LaTeX grammar only, because math-verify evaluates plain expressions.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

SECONDS = 5.0  # for one comparison
SECONDS_TO_START = 120.0  # importing sympy takes one or two, longer on a busy machine
MEMORY = 4 * 2**30  # bytes of address space for the child, where the system supports a limit

_lock = threading.Lock()
_child: subprocess.Popen | None = None
_owner: int | None = None  # process id that started the child: after a fork, the pipes belong to the parent


@lru_cache(maxsize=10_000)
def same_value(gold: str, answer: str) -> bool:
    """Whether two pieces of LaTeX (without $) are equal; False when that takes too long. Thread-safe and fork-safe.

    Raises RuntimeError when the child does not start, mostly because math-verify is not installed.
    """
    with _lock:
        child, reply = _running_child(), ""
        try:
            reply = _within(SECONDS, child, json.dumps([gold, answer]))
        finally:
            if not reply:  # timed out or interrupted: a late reply would be taken for that of the next comparison
                stop()
        return reply == "equal"


def stop() -> None:
    """Kill the child, if there is one."""
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
    """The child's next line; "" when it ended, or was killed for taking longer."""
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
        timer.join()  # wait for a kill in progress, so that poll() is right


def _tiny_and_different(gold: list, said: list) -> bool:
    """Whether two sides that math-verify calls equal are so only because they round to zero, as 1e-30 and 1e-20 do."""
    from sympy import Rational

    try:
        values = []
        for side in (gold[0].doit(), said[0].doit()):
            symbols = enumerate(sorted(side.free_symbols, key=str), 3)
            values.append(complex(side.subs({symbol: Rational(place, 2) for place, symbol in symbols}).evalf(30)))
        largest = max(map(abs, values))
        return largest < 1e-3 and abs(values[0] - values[1]) > largest / 1000
    except Exception:  # sets, relations and words have no value
        return False


def _serve() -> None:
    """The child."""
    sys.path.pop(0)  # libraries must not import modules of this folder
    answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print is no reply
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    from math_verify import LatexExtractionConfig, parse, verify

    unlimited = {"fallback_mode": "no_fallback", "parsing_timeout": None}  # alarms are set here, not by math-verify
    alarm = getattr(signal, "alarm", lambda seconds: 0)  # without a handler, it ends the process, parent gone or not
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        alarm(int(SECONDS) + 5)
        try:
            sides = [parse(f"${side}$", [LatexExtractionConfig()], **unlimited) for side in json.loads(line)]
            equal = all(sides) and verify(*sides, timeout_seconds=None) and not _tiny_and_different(*sides)
        except Exception:  # sympy raises nearly anything
            equal = False
        alarm(0)
        print("equal" if equal else "different", file=answers, flush=True)


if __name__ == "__main__":
    _serve()
