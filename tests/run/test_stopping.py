"""SIGTERM, Ctrl-C and a launcher that is gone end a run in order, and it is resumed from where it was."""

import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from resumed_runs import SMALL, assert_equal, on_call, run

import train_rl
from sayo.run.files import whole_checkpoint
from sayo.run.stopping import Stopped, StopSignals


@pytest.fixture(autouse=True)
def ctrl_c_is_heeded():
    """A shell's background job ignores Ctrl-C, and so would all that these tests start in one."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.parametrize("after", [False, True], ids=["before its update, abandoned", "after its update, finished"])
def test_a_signal_in_the_second_step(undisturbed, tmp_path, monkeypatch, capfd, after):
    place, name, step = (torch.optim.AdamW, "step", 2) if after else (train_rl, "sample_groups", 1)
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train_rl.py", "--seed=0"])
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        on_call(patch, place, name, 2, lambda: os.kill(os.getpid(), signal.SIGTERM), after=after)
        run(folder)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert whole_checkpoint(folder)[0].name == f"step-{step:06d}"
    words = f"stopped by SIGTERM after step {step}; resume with: python train_rl.py --seed=0 --resume\n"
    assert words in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


def test_a_second_signal_of_the_same_key_is_one_and_a_later_one_leaves_at_once():
    code = """
import os, signal, sys, time
from sayo.run.stopping import StopSignals
with StopSignals() as stop:
    stop.defer()
    for wait in (0, 0.1, 0.1, 1.2):
        time.sleep(wait)
        os.kill(os.getpid(), signal.SIGTERM if wait == 0 else signal.SIGINT)
    time.sleep(1)
    print("still here")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert result.returncode == 130 and "still here" not in result.stdout
    assert "SIGTERM: saving after this step" in result.stderr and "stopped at once" in result.stderr


def test_what_nohup_ignores_stays_ignored_and_other_threads_set_no_handlers():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, former)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(StopSignals().__enter__).result()


@pytest.mark.parametrize(
    ("processes", "target", "number"),
    [(1, "launcher", signal.SIGTERM), (2, "one", signal.SIGTERM), (2, "group", signal.SIGINT)],
    ids=["launcher alone", "one of two processes", "Ctrl-C, two processes"],
)
def test_accelerate_launch_and_its_processes_end_in_order(tmp_path, processes, target, number):
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = SMALL | {"max_steps": 4000, "save_steps": 4000, "output_dir": folder}
    command = ["launch", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    command += [f"--num_processes={processes}", "--cpu" if processes == 1 else "--multi_gpu", "train_rl.py"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    options = {"env": os.environ | {"ACCELERATE_USE_CPU": "true"}, "start_new_session": True}
    with log.open("wb") as output:
        accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli"]
        launcher = subprocess.Popen([*accelerate, *command], stdout=output, stderr=output, **options)
    try:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size, log)
        listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
        children = [int(child) for child in listed.split()]
        assert len(children) == processes
        if target == "group":
            os.killpg(launcher.pid, number)
        else:
            os.kill(launcher.pid if target == "launcher" else children[-1], number)
        assert launcher.wait(120) != 0
        wait_for(lambda: not any(is_alive(child) for child in children), log)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    last = len((folder / "metrics.jsonl").read_text().splitlines())
    assert whole_checkpoint(folder)[0].name == f"step-{last:06d}"
    words = f"stopped by {signal.Signals(number).name} after step {last}; resume with: accelerate"
    (line,) = [line for line in log.read_text().splitlines() if words in line]
    assert shlex.split(line.partition("accelerate ")[2]) == [*command, "--resume"]


def test_two_processes_whose_log_reader_dies_of_the_same_ctrl_c_save(tmp_path):
    """`accelerate launch ... 2>&1 | tee log`: handlers, launcher and bars write to a pipe that nobody reads."""
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = SMALL | {"max_steps": 4000, "save_steps": 4000, "output_dir": folder, "eval_data": "none"}
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", "--num_processes=2", "--multi_gpu", "train_rl.py"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    shell = ["bash", "-c", f"{shlex.join(command)} 2>&1 | tee {shlex.quote(str(log))}"]
    options = {"env": os.environ | {"ACCELERATE_USE_CPU": "true"}, "start_new_session": True}
    pipeline = subprocess.Popen(shell, stdout=subprocess.DEVNULL, **options)
    try:
        rows = folder / "metrics.jsonl"
        wait_for(lambda: rows.exists() and rows.stat().st_size, log)
        os.killpg(pipeline.pid, signal.SIGINT)
        pipeline.wait(120)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=600)  # the processes have ended
        lock.release()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(pipeline.pid, signal.SIGKILL)
    assert whole_checkpoint(folder)[0].name == f"step-{len(rows.read_text().splitlines()):06d}"


def wait_for(condition, log: Path, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.1)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
