"""SIGTERM, Ctrl-C and a launcher that is gone end a run in order, and it goes on from where it was."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from resumed_runs import SMALL, assert_equal, run

import train_rl
from checkpoint import whole_checkpoint
from stopping import Stopped, StopSignals


@pytest.fixture(autouse=True)
def ctrl_c_is_heeded():
    """A shell's background job ignores Ctrl-C, and so would all that these tests start in one."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_a_signal_gives_up_a_step_before_its_update_and_finishes_it_behind(undisturbed, tmp_path, monkeypatch, capfd):

    folder = tmp_path / "run"
    for name, function, steps in (("sample_groups", train_rl.sample_groups, 1), ("AdamW.step", None, 2)):
        calls = []
        with monkeypatch.context() as patch:
            if function:

                def signalled(*arguments, function=function, calls=calls, **options):
                    calls.append(1)
                    if len(calls) == 2:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return function(*arguments, **options)

                patch.setattr(train_rl, name, signalled)
            else:
                step = torch.optim.AdamW.step

                def signalled(*arguments, step=step, **options):
                    result = step(*arguments, **options)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return result

                patch.setattr(torch.optim.AdamW, "step", signalled)
            with pytest.raises(Stopped) as stopped:
                run(folder, resume=True)
        assert stopped.value.code == 128 + signal.SIGTERM
        assert whole_checkpoint(folder)[0].name == f"step-{steps:06d}"
        assert f"stopped by SIGTERM after step {steps}: go on with --resume" in capfd.readouterr().err
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


def test_a_second_signal_of_the_same_key_is_one_and_a_later_one_leaves_at_once():
    code = """
import os, signal, sys, time
from stopping import StopSignals
with StopSignals() as stop:
    stop.may_raise = False
    for wait in (0, 0.1, 0.1, 1.2):
        time.sleep(wait)
        os.kill(os.getpid(), signal.SIGTERM if wait == 0 else signal.SIGINT)
    time.sleep(1)
    print("still here")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
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
    failures = []

    def elsewhere():
        try:
            with StopSignals():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert failures == []


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines=1", "--mixed_precision=no"]
LAUNCH += ["--dynamo_backend=no"]


@pytest.mark.parametrize(
    ("processes", "target", "number"),
    [
        (1, "launcher", signal.SIGTERM),
        (2, "one", signal.SIGTERM),
        (2, "group", signal.SIGINT),
    ],
    ids=["launcher alone", "one of two processes", "Ctrl-C, two processes"],
)
def test_accelerate_launch_and_its_processes_end_in_order(tmp_path, processes, target, number):
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = SMALL | {"max_steps": 4000, "save_steps": 4000, "eval_limit": 2, "output_dir": folder}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    command = [*LAUNCH, f"--num_processes={processes}", "--cpu" if processes == 1 else "--multi_gpu", "train_rl.py"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            [*command, *arguments], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_for(lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size, log)
        children = [
            int(child) for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ]
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
    name = "SIGTERM" if number == signal.SIGTERM else "SIGINT"
    assert log.read_text().count(f"stopped by {name} after step {last}: go on with --resume") == 1


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
