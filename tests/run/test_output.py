"""No output ends a run: not a full log, a reader that is gone, a closed terminal, nor a character of another script."""

import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_run
from resumed_runs import SMALL

from sayo.run.files import whole_checkpoint

# Says much in every way that sayo has, then notes that it came to its end.
CHILD = '''
import os, sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tqdm import tqdm
from sayo.settings import ConfigError, Settings, no_bar, option, run_command

@dataclass
class Config(Settings):
    """Says much."""
    text: str = option("x", "What is said.")
    fail: bool = option(False, "End with a problem.")

def main(config):
    for number in tqdm(range(3), mininterval=0, disable=no_bar()):
        for stream in (sys.stdout, sys.stderr):
            print(config.text * 5000, file=stream, flush=True)
        tqdm.write(config.text)
    print("not yet flushed", config.text)
    with open(os.environ["DONE"], "w") as file:
        with suppress(OSError):
            os.write(2, b"what C code says")
        file.write("done")
    if config.fail:
        raise ConfigError(config.text)

run_command(Config, main)
'''


def run_child(folder: Path, *flags: str, redirect: str = "", **environment: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the child under a shell's redirection; asserts that it came to its end."""
    (folder / "child.py").write_text(CHILD, encoding="utf-8")
    known = os.environ | {"DONE": str(folder / "done"), "PYTHONPATH": os.getcwd()} | environment
    command = shlex.join([sys.executable, str(folder / "child.py"), *flags])
    shell = ["bash", "-c", f"set -o pipefail; {command} {redirect}"]
    found = subprocess.run(shell, capture_output=True, env=known, timeout=600)
    assert (folder / "done").read_text() == "done", found.stderr  # no stream's number was given to this file
    return found.returncode, *(part.decode("utf-8", "replace") for part in (found.stdout, found.stderr))


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize(
    "redirect",
    [">/dev/full", "2>/dev/full", ">/dev/full 2>&1", ">&-", "2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true"],
)
def test_a_command_ends_as_it_should_whatever_becomes_of_its_output(tmp_path, redirect, fail):
    code, out, err = run_child(tmp_path, *["--fail"] * fail, redirect=redirect)
    assert code == fail and "Traceback" not in out + err and "Exception" not in out + err
    if "2>" not in redirect:
        assert ("child.py: x\n" in err) == fail and "3/3" in err


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PYTHONIOENCODING": "ascii"}, r"\u7ea2 \xe9 \U0001f389"),
        ({"PYTHONIOENCODING": "cp1252"}, "\\u7ea2 \ufffd \\U0001f389"),  # its é is no UTF-8
        ({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, r"\u7ea2 \xe9 \U0001f389"),
        ({"PYTHONIOENCODING": "utf-8"}, "红 é 🎉"),
        ({"PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}, "红 é 🎉"),
    ],
)
def test_a_character_that_the_encoding_lacks_is_written_as_an_escape(tmp_path, environment, expected):
    (tmp_path / "text.yaml").write_text("text: 红 é 🎉\n", encoding="utf-8")
    code, out, err = run_child(tmp_path, f"--config={tmp_path}/text.yaml", "--fail", **environment)
    assert code == 1 and f"not yet flushed {expected}\n" in out and f"child.py: {expected}\n" in err


@pytest.mark.parametrize(("value", "hidden"), [("1", True), ("", False)])
def test_tqdm_disable_hides_bars_that_have_an_argument_of_their_own(tmp_path, value, hidden):
    assert ("3/3" not in run_child(tmp_path, TQDM_DISABLE=value)[2]) == hidden


def test_every_bar_heeds_tqdm_disable():
    """An argument `disable` wins over the variable: each one goes through no_bar."""
    files = [
        *Path().glob("*.py"),
        *(path for folder in ("sayo", "tools", "data") for path in Path(folder).rglob("*.py")),
    ]
    texts = {str(path): path.read_text(encoding="utf-8") for path in files}
    own = re.compile(r"""(?:\bdisable=|"disable": )(?!no_bar\()""")
    assert [path for path, text in texts.items() if own.search(text)] == []
    assert sum("disable=no_bar(" in text for text in texts.values()) > 4


# --- runs -------------------------------------------------------------------------------------------------------


def command_of(folder: Path, **settings) -> list[str]:
    settings = SMALL | {"output_dir": folder, "eval_data": "none"} | settings
    return [sys.executable, "train_rl.py", *(f"--{name}={value}" for name, value in settings.items())]


def wait_for_steps(folder: Path, count: int) -> None:
    end, rows = time.monotonic() + 300, folder / "metrics.jsonl"
    while not rows.exists() or rows.read_bytes().count(b"\n") < count:
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_saved_at_the_end(folder: Path) -> None:
    last = small_run.rows_of(folder)[-1]["step"]
    assert last > 1 and whole_checkpoint(folder)[0].name == f"step-{last:06d}"


def test_a_run_whose_log_is_full_is_finished(tmp_path):
    with open("/dev/full", "wb") as log:
        result = subprocess.run(command_of(tmp_path / "run", max_steps=2), stdout=log, stderr=log, timeout=2400)
    assert result.returncode == 0 and (tmp_path / "run/adapter/README.md").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_whose_log_reader_is_gone_saves_when_it_is_stopped(tmp_path, number):
    """`2>&1 | tee log` and Ctrl-C: the reader gets the signal, too."""
    folder = tmp_path / "run"
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    command = command_of(folder, max_steps=4000, save_steps=4000)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    try:
        wait_for_steps(folder, 1)
        process.stdout.close()
        wait_for_steps(folder, 3)  # goes on without a reader
        process.send_signal(number)
        assert process.wait(120) == 128 + number
    finally:
        process.kill()
    assert_saved_at_the_end(folder)


def test_a_run_whose_terminal_is_closed_saves(tmp_path):
    folder = tmp_path / "run"
    process, terminal = pty.fork()
    if process == 0:  # the child, whose terminal this is
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        command = command_of(folder, max_steps=4000, save_steps=4000)
        os.execv(command[0], command)
    status = None
    try:
        wait_for_steps(folder, 2)
        os.close(terminal)  # SIGHUP, and EIO for whatever is written
        end = time.monotonic() + 120
        while not status and time.monotonic() < end:
            time.sleep(0.05)
            status = os.waitpid(process, os.WNOHANG)[1]
        assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    finally:
        if not status:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    assert_saved_at_the_end(folder)
