"""Several processes: the numbers of one, no deadlock, equal weights, one voice, sharded models."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import process_scenarios
import pytest
import small_run
import torch
from process_scenarios import SMALL, finished, launch, launch_machines, succeeded
from resumed_runs import as_bytes
from safetensors.torch import load_file
from small_run import rows_of

import train_rl
from sayo.run.files import whole_checkpoint
from sayo.settings import ConfigError, run_command
from train_rl import Config


@pytest.fixture
def run_alone(monkeypatch):
    """run_alone(scenario, folder, **settings): the run of one process, here."""
    for name in "train_step sample_groups group_statistics score_statistics grpo_loss average_gradients".split():
        monkeypatch.setattr(train_rl, name, getattr(train_rl, name))  # and back after the test

    def run(scenario, folder, **settings):
        scenario()
        return small_run.run(folder, **SMALL | settings)

    return run


def watched(folder, process: int) -> list[tuple]:
    """(weights before, mean gradient) of every step of one process."""
    return torch.load(folder / f"watched-{process}.pt")


def assert_close_adapters(folder, other, tolerance: float):
    both = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (folder, other))
    torch.testing.assert_close(*both, atol=tolerance, rtol=0)


def evaluated(folder) -> list[dict]:
    return json.loads((folder / "evaluation.json").read_text())["rows"]["after"]


def assert_same_rows(found: list[dict], expected: list[dict]):
    for pair in zip(found, expected, strict=True):
        row, other = ({name: math.nan if value is None else value for name, value in one.items()} for one in pair)
        assert row == pytest.approx(other, rel=1e-6, abs=1e-6, nan_ok=True)


def test_two_processes_with_trouble_in_one_make_the_updates_of_one_and_speak_once(tmp_path, run_alone):
    settings = {"max_new_tokens": 16, "eval_limit": 1, "save_steps": 3, "report_to": "tensorboard"}
    two = launch("trouble", tmp_path / "two", max_steps=9, **settings)
    expected = run_alone(process_scenarios.trouble, tmp_path / "one", max_steps=8, **settings)
    result = succeeded(two)
    rows, samples = rows_of(tmp_path / "two"), rows_of(tmp_path / "two", "samples.jsonl")
    assert_same_rows(rows[:8], expected)
    alone, *both = watched(tmp_path / "one", 0), watched(tmp_path / "two", 0), watched(tmp_path / "two", 1)
    torch.testing.assert_close(both[0][:8], alone, atol=1e-6, rtol=0, equal_nan=True)
    assert as_bytes(both[0]) == as_bytes(both[1])
    assert [row["skipped_updates"] for row in rows] == [0, 0, 0, 0, 0, 1, 1, 1, 0]
    assert rows[1]["identical_groups"] >= 0.5 and rows[2]["empty_completions"] == 0.5
    assert rows[8]["grad_norm"] > 0
    assert torch.equal(both[1][5][0], both[1][8][0])  # three skipped steps, in the process where nothing was wrong, too
    names, kinds = ([row.get(name) for row in samples] for name in ("skipped_examples", "not_finite"))
    assert names[:5] == [None] * 5 and kinds == [None] * 5 + [["reward"], ["loss"], ["reward"], None]
    for step, (kind,) in enumerate(kinds[5:8], 6):
        line = f"step {step}: update skipped, the gradient is not finite; it began with {names[step - 1][0]!r} (its"
        assert (result.stdout + result.stderr).count(f"{line} {kind})") == 1
    assert "Infinity" not in (tmp_path / "two" / "samples.jsonl").read_text()

    out, err = result.stdout, result.stderr
    for text in ("20 examples of scenes", "2 processes", "A GRPO loss hovers", "1 examples of scenes:heldout, greedy"):
        assert out.count(text) == 1, text
    # As it is first drawn, as wide as the screen that COLUMNS names: later it has numbers behind the rate.
    assert len(re.findall(r"train:   0%\| *\| 0/9 \[00:00<\?, \?step/s\]", err)) == 1
    for text in ("before, scenes:heldout:   0%", "after, scenes:heldout:   0%", "Loading weights:   0%"):
        assert err.count(text) == 1, text
    assert [row["step"] for row in rows] == [row["step"] for row in samples] == list(range(1, 10))
    (tmp_path / "two/watched-1.pt").unlink()
    files = [filter(Path.is_file, (tmp_path / name).rglob("*")) for name in ("one", "two")]
    one, two = (sorted(path.name[:20] for path in paths) for paths in files)
    assert one == two  # but for the time in the name of TensorBoard's file


def test_two_machines_share_a_step_and_get_the_numbers_of_one(tmp_path, run_alone):
    """Sums of two groups are rounded in another order, and AdamW divides small gradients by their own size."""
    settings = {"groups_per_step": 4, "max_steps": 3, "eval_limit": 5, "loss_type": "dapo"}
    machines = launch_machines("watch", tmp_path / "machine", **settings)
    expected = run_alone(process_scenarios.watch, tmp_path / "one", **settings)
    for machine in machines:
        succeeded(machine)
    assert_same_rows(rows_of(tmp_path / "machine-0"), expected)
    assert_close_adapters(tmp_path / "machine-0", tmp_path / "one", 1e-5)
    for step, alone in zip(watched(tmp_path / "machine-0", 0), watched(tmp_path / "one", 0), strict=True):
        torch.testing.assert_close(step[1], alone[1], atol=1e-6, rtol=1e-5)
    ids = [row["id"] for row in evaluated(tmp_path / "machine-0")]
    assert ids == [f"scenes-heldout-0-{index}" for index in range(5)]
    assert [path.name for path in (tmp_path / "machine-1").iterdir()] == ["watched-1.pt"]


def test_what_is_left_to_do_is_decided_by_one_process(tmp_path):
    settings = {"limit": 3, "eval_limit": 1, "max_steps": 1, "regions": "attention"}
    succeeded(launch("other_disk", tmp_path / "run", regions_folder=tmp_path / "kept", **settings))
    assert len(rows_of(tmp_path / "run")) == 1


ENDS = {
    "kill": ["Signal 9 (SIGKILL)", "rank      : 1"],
    "drift": ["after step 2 the processes [1] have other weights than process 0, first in base_model.model."],
}


@pytest.mark.parametrize("scenario", ENDS)
def test_what_happens_to_one_process_ends_the_run_within_a_minute_and_leaves_the_checkpoint(tmp_path, scenario):
    result = finished(launch(scenario, tmp_path / "run", eval_limit=1, save_steps=1))
    seconds = time.time() - float((tmp_path / "run" / "when").read_text())
    assert result.returncode != 0 and seconds < 240  # a minute, on a machine four times slower
    assert all(result.stderr.count(text) == 1 for text in ENDS[scenario]), result.stderr[-3000:]
    assert whole_checkpoint(tmp_path / "run")[0].name == "step-000001"
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_model_in_shares_trains_saves_and_goes_on_as_a_whole_one(tmp_path, run_alone):
    settings = {"gradient_checkpointing": True, "groups_per_step": 2, "eval_limit": 3, "save_steps": 1}
    launcher, run, alone = ("--config_file", "configs/accelerate_fsdp.yaml"), tmp_path / "run", tmp_path / "one"
    first = launch("shares", run, launcher=launcher, max_steps=1, **settings)
    expected = run_alone(process_scenarios.watch, alone, max_steps=2, **settings)
    succeeded(first)
    for process in (0, 1):
        size = json.loads((run / f"shares-{process}.json").read_text())
        assert size["here"] == size["whole"] - size["layers"] / 2 and size["layers"] > size["whole"] / 4
    succeeded(launch("shares", run, launcher=launcher, resume=True, max_steps=2, **settings))
    assert_same_rows(rows_of(run), expected)
    (found,) = watched(run, 0)
    torch.testing.assert_close(found, watched(alone, 0)[1], atol=1e-6, rtol=0)
    for step in ("step-000001", "step-000002"):
        checkpoints = [folder / "checkpoints" / step for folder in (run, alone)]
        assert_close_adapters(*checkpoints, 1e-6)
        states = [torch.load(checkpoint / "state.pt")["optimizer"]["state"] for checkpoint in checkpoints]
        torch.testing.assert_close(*states, atol=1e-6, rtol=1e-6)
    texts = [[row["text"] for row in evaluated(folder)] for folder in (run, alone)]
    assert texts[0] == texts[1]


def test_two_processes_skip_the_same_updates_and_keep_one_loss_scale(tmp_path):
    succeeded(launch("overflow", tmp_path / "run", dtype="float16", eval_limit=1))
    rows, samples = rows_of(tmp_path / "run"), rows_of(tmp_path / "run", "samples.jsonl")
    assert [row["skipped_updates"] for row in rows] == [0.0, 1.0, 1.0, 0.0]
    assert [row["loss_scale"] for row in rows] == [65536.0, 32768.0, 16384.0, 16384.0]
    assert [len(row.get("skipped_examples", ())) for row in samples] == [0, 1, 1, 0]


@pytest.mark.parametrize("number", [0, 1])
def test_the_first_process_speaks_and_another_waits_before_it_tells_of_a_problem(monkeypatch, capsys, number):
    slept = []
    monkeypatch.setattr("sayo.settings.time.sleep", slept.append)
    monkeypatch.setattr(sys, "argv", ["train_rl.py"])
    monkeypatch.setenv("LOCAL_RANK", str(number))
    monkeypatch.setenv("RANK", str(number + 4))

    def main(_):
        print("said")
        print("warned", file=sys.stderr)
        raise ConfigError("seed=-1: give 0 or more")

    with pytest.raises(SystemExit) as stopped:
        run_command(Config, main)
    assert tuple(capsys.readouterr()) == (("", "") if number else ("said\n", "warned\n")) and len(slept) == number
    name = "train_rl.py, process 5" if number else "train_rl.py"
    assert stopped.value.code == f"{name}: seed=-1: give 0 or more"


UNFIT = [
    ({"FSDP_VERSION": "1"}, {}, "fsdp_version=1: give 2"),
    ({"FSDP_VERSION": "2"}, {"load_in_4bit": True}, "load_in_4bit: 4-bit weights cannot be"),
    ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, {}, "fsdp_cpu_ram_efficient_loading=true: give false"),
    ({}, {}, "2 processes were started, of which Accelerate knows 1"),
    ({}, {"groups_per_step": 3}, "groups_per_step=3 is not a multiple of the number of processes, 2"),
]


LEFT = ["FSDP_SHARDING_STRATEGY=foo", "ACCELERATE_USE_DEEPSPEED=true", "WORLD_SIZE=x", "LOCAL_RANK=x"]


@pytest.mark.parametrize(("left", "flag"), [*((left, "--resume") for left in LEFT), ("LOCAL_RANK=0", "--plan")])
def test_what_another_launch_left_in_the_environment_is_named(left, flag):
    """Each ended in a traceback of another kind."""
    environment = {**os.environ, "ACCELERATE_USE_FSDP": "true", **dict([left.split("=")])}
    command = [sys.executable, "train_rl.py", "--output_dir", "/tmp/not/made", "--report_to", "none", flag]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2400)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.search(rf"what the environment says \(.*{left}.*unset what an earlier launch left", result.stderr)


@pytest.mark.parametrize(("environment", "settings", "message"), UNFIT)
def test_processes_that_cannot_work_together_are_refused(monkeypatch, tmp_path, environment, settings, message):
    number = 2 if "groups_per_step" in settings else 1
    monkeypatch.setattr("sayo.run.processes.Accelerator", lambda **_: type("Some", (), {"num_processes": number}))
    for name, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        small_run.run(tmp_path / "run", **SMALL | settings)
