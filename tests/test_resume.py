"""A run survives what happens to it: kills, damaged checkpoints, other data of the same name.

tests/kill_points.py does the same to the real command, many times; here are the points that take seconds.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kill_points import differences, what_it_left
from resumed_runs import SMALL, assert_equal, copy_until, run

import checkpoint
import run_folder
import saving
import train_rl
from checkpoint import drop_old, keep_steps_until, save_checkpoint, whole_checkpoint
from config import ConfigError, read_jsonl, stored_config
from train_rl import Config


class Killed(BaseException):
    """What a kill does, as far as code of the same process can tell: nothing behind it is executed."""


# --- checkpoints --------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_a_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder")


@pytest.mark.parametrize(
    ("name", "harm", "problem"),
    [
        ("state.pt", truncate, "state.pt has .* bytes instead of"),
        ("state.pt", change_a_byte, "state.pt has other content"),
        ("adapter/adapter_model.safetensors", truncate, "adapter_model.safetensors has .* bytes instead of"),
        ("adapter/adapter_model.safetensors", Path.unlink, "adapter_model.safetensors is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", truncate, "cannot be read: JSONDecodeError"),
        ("manifest.json", lambda path: path.write_text('{"step": 3, "files": {}}'), "manifest.json lacks"),
        ("manifest.json", lambda path: path.write_text("[1]"), "cannot be read: TypeError"),
        ("", empty, "manifest.json is missing"),
        ("", replace_by_file, "it is no folder"),
        ("", lambda path: path.rename(path.with_name("step-last")), "name is not step- and a number"),
        ("", lambda path: path.rename(path.with_name("step-000009")), "manifest.json is that of step 3"),
    ],
)
def test_a_damaged_checkpoint_is_named_skipped_and_the_one_before_is_used(
    undisturbed, tmp_path, capsys, name, harm, problem
):
    folder = copy_until(undisturbed, tmp_path / "run", 3)
    harm(folder / "checkpoints" / "step-000003" / name)
    newest, passed_over = checkpoint.whole_checkpoint(folder)
    assert newest.name == "step-000002" and len(passed_over) == 1
    assert re.search(f"step-.* is skipped: .*{problem}", passed_over[0]), passed_over


def test_a_run_whose_newest_checkpoints_are_damaged_ends_as_if_nothing_had_been(undisturbed, tmp_path, capsys):
    folder = copy_until(undisturbed, tmp_path / "run", 3)
    truncate(folder / "checkpoints/step-000003/state.pt")
    empty(folder / "checkpoints/step-000002")
    run(folder, resume=True)
    out = capsys.readouterr().out
    assert "step-000003 is skipped: state.pt has" in out and "step-000002 is skipped: manifest.json is missing" in out
    assert "resume: from " in out and "step-000001\n" in out
    assert_equal(folder, undisturbed)


def test_where_no_checkpoint_is_whole_a_run_starts_again_and_says_so(undisturbed, tmp_path, capsys):
    folder = copy_until(undisturbed, tmp_path / "run", 1)
    (folder / "checkpoints/step-000001/state.pt").unlink()
    (folder / "checkpoints/.ipynb_checkpoints").mkdir()
    run(folder, resume=True)
    out = capsys.readouterr().out
    assert "state.pt is missing" in out and "no whole checkpoint, so from step 0" in out and "ipynb" not in out
    shutil.rmtree(folder / "checkpoints/.ipynb_checkpoints")
    assert_equal(folder, undisturbed)


def a_model(folder):
    """What save_checkpoint asks of a model and its parts."""

    class Model:
        def save_pretrained(self, place, save_embedding_layers):
            place.mkdir(parents=True)
            (place / "README.md").write_text("x")
            (place / "adapter_config.json").write_text("{}")
            (place / "adapter_model.safetensors").write_bytes(b"weights")

    parameter = torch.nn.Parameter(torch.zeros(3))
    return Model(), {"optimizer": torch.optim.SGD([parameter], lr=0.1)}


def test_replacing_a_damaged_checkpoint_never_leaves_fewer_whole_ones(tmp_path, monkeypatch):
    """The old one was deleted before the new one stood."""
    model, parts = a_model(tmp_path)
    first = save_checkpoint(tmp_path, 1, model, parts)
    content = (first / "state.pt").stat().st_ino
    assert save_checkpoint(tmp_path, 1, model, parts) == first and (first / "state.pt").stat().st_ino == content
    second = save_checkpoint(tmp_path, 2, model, parts)
    truncate(second / "state.pt")
    rename, seen = Path.rename, []

    def watching(path, target):
        seen.append(whole_checkpoint(tmp_path)[0])
        result = rename(path, target)
        seen.append(whole_checkpoint(tmp_path)[0])
        return result

    monkeypatch.setattr(Path, "rename", watching)
    save_checkpoint(tmp_path, 2, model, parts)
    assert seen == [first, first, first, second]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_every_file_is_synced_before_the_rename_and_the_names_behind_it(tmp_path, monkeypatch):
    events, rename, fsync = [], Path.rename, os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}")) or fsync(handle)
    )
    monkeypatch.setattr(Path, "rename", lambda path, target: events.append("rename") or rename(path, target))
    model, parts = a_model(tmp_path)
    save_checkpoint(tmp_path, 7, model, parts)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    for name in (
        "state.pt",
        "manifest.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter",
        "step-000007.partial",
    ):
        assert any(path.endswith(f"/{name}") for path in before), name
    assert after == [str(tmp_path / "checkpoints")]


def test_only_the_oldest_checkpoints_go_and_never_the_newest(tmp_path):
    model, parts = a_model(tmp_path)
    for step in (1, 2, 3, 1_000_000):
        newest = save_checkpoint(tmp_path, step, model, parts)
    assert whole_checkpoint(tmp_path)[0] == newest  # by number, not by name
    drop_old(tmp_path, newest, None)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
    drop_old(tmp_path, newest, 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-1000000"]
    drop_old(tmp_path, newest, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1000000"]


def test_a_limit_of_checkpoints_changes_nothing_else(undisturbed, tmp_path):
    run(tmp_path / "run", save_total_limit=2)
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004"]
    missing = differences(what_it_left(undisturbed), what_it_left(tmp_path / "run"))
    assert {name.split("/")[1] for name in missing if name.startswith("checkpoints")} == {"step-000001", "step-000002"}
    assert [name for name in missing if not name.startswith("checkpoints")] == [
        "adapter/README.md"
    ]  # it lists the limit


# --- killed in the middle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (run_folder, "write_whole", 1),  # config.yaml
        (run_folder, "keep_steps_until", 2),
        (train_rl, "write_whole", 1),  # evaluation_before.json
        (train_rl, "train_step", 3),
        (checkpoint, "put_in_place", 2),
        (saving, "drop_old", 2),
        (train_rl, "save_final_adapter", 1),
        (train_rl, "write_model_card", 1),
        (train_rl, "mark_finished", 1),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_run_killed_in_between_ends_as_if_nothing_had_been(undisturbed, tmp_path, monkeypatch, module, name, call):
    function, calls = getattr(module, name), []

    def doomed(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            raise Killed
        return function(*arguments, **options)

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, doomed)
        with pytest.raises(Killed):
            run(tmp_path / "run", resume=True)
    run(tmp_path / "run", resume=True)
    assert_equal(tmp_path / "run", undisturbed)


def test_a_process_killed_by_the_kernel_while_it_writes_a_checkpoint_goes_on(undisturbed, tmp_path):
    """The real end of a real process, in the middle of state.pt of the first step."""
    arguments = [f"--{name}={value}" for name, value in (SMALL | {"output_dir": tmp_path / "run"}).items()]
    command = [sys.executable, "tests/kill_points.py", "--be_killed", "byte", "150000", "0", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGXFSZ, result.stderr[-2000:]
    partial = tmp_path / "run/checkpoints/step-000001.partial"
    assert 0 < (partial / "state.pt").stat().st_size < 190_000 and whole_checkpoint(tmp_path / "run")[0] is None
    run(tmp_path / "run", resume=True)
    assert_equal(tmp_path / "run", undisturbed)


def test_half_a_last_line_is_dropped_also_within_a_character(tmp_path):
    """A line cut within a character was "not a text file", and the run could not go on."""
    whole = json.dumps({"step": 1, "text": "größer"}, ensure_ascii=False).encode() + b"\n"
    for end in range(len(whole), 2 * len(whole)):
        (tmp_path / "rows.jsonl").write_bytes((whole + whole)[:end])
        assert keep_steps_until(tmp_path / "rows.jsonl", 5) == ([1, 1] if end == 2 * len(whole) - 1 else [1]), end
    (tmp_path / "rows.jsonl").write_bytes(whole + b"\0" * 50)  # what a power cut leaves
    assert keep_steps_until(tmp_path / "rows.jsonl", 5) == [1]
    assert (tmp_path / "rows.jsonl").read_bytes() == whole
    (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe" + whole)
    with pytest.raises(ConfigError, match="not a text file"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_the_run_that_others_are_compared_with_learns_something(undisturbed):
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["grad_norm"] > 0 for row in rows)
    assert len({row["learning_rate"] for row in rows}) == 4


def test_a_finished_run_says_so_and_does_again_only_what_is_missing(undisturbed, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(train_rl, "train", None)  # nothing is loaded
    run(folder, resume=True)
    assert "is finished, at step 4; give more --max_steps" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.undo()
    (folder / "curves.png").unlink()
    monkeypatch.setattr(train_rl, "evaluate_shared", None)
    monkeypatch.setattr(train_rl, "train_step", None)
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


def test_a_finished_run_goes_on_to_more_steps(tmp_path, capsys):
    settings = {"lr_scheduler": "constant", "eval_limit": 1}
    run(tmp_path / "whole" / "run", **settings)
    run(tmp_path / "two" / "run", **settings, max_steps=2)
    capsys.readouterr()
    run(tmp_path / "two" / "run", **settings, resume=True)
    assert "max_steps was 2, is 4" in capsys.readouterr().out
    assert_equal(tmp_path / "two" / "run", tmp_path / "whole" / "run")


def test_two_processes_do_not_write_in_one_folder(undisturbed, tmp_path, monkeypatch, capsys):
    """A launcher that is killed leaves its child at work, and the next start went to work beside it."""
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    lock = f"fcntl.flock(os.open({str(folder)!r}, os.O_RDONLY), fcntl.LOCK_EX)"
    code = f"import fcntl, os, sys; {lock}; print(flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match="another process is at work in it"):
            patch.setattr(run_folder, "PATIENCE", 0)
            run(folder, resume=True)
        monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: (other.stdin.close(), other.wait()))
        run(folder, resume=True)  # waits for its end
    finally:
        other.kill()
        other.wait()
    assert "waiting 60 s for its end" in capsys.readouterr().out
    assert_equal(folder, undisturbed)


@pytest.mark.parametrize("content", ["", '[{"id": 1}]', '{"step": 4, "rows": {"after": [3]}}'])
def test_a_damaged_evaluation_is_made_again_or_told_of(undisturbed, tmp_path, capsys, content):
    folder = copy_until(undisturbed, tmp_path / "run", 4)
    (folder / "evaluation.json").write_text(content)
    run(folder, resume=True)
    assert_equal(folder, undisturbed)
    folder = copy_until(undisturbed, tmp_path / "again" / "run", 3)
    (folder / "evaluation_before.json").write_text(content)
    run(folder, resume=True)
    assert "evaluation_before.json is missing or damaged" in capsys.readouterr().out
    assert list(json.loads((folder / "evaluation.json").read_text())["summary"]) == ["after"]


# --- settings -----------------------------------------------------------------------------------------------------


def test_the_settings_of_a_run_are_read_as_they_were_written(undisturbed, tmp_path):
    """They were read without the bounds that other YAML files have."""
    assert stored_config(undisturbed / "config.yaml", Config) == Config(**(SMALL | {"output_dir": str(undisturbed)}))
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    for text, problem in (
        ("max_steps: &a 3\nsave_steps: *a\n", "aliases"),
        ("learning_rat: 3\n", "did you mean learning_rate"),
    ):
        (folder / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=problem):
            run(folder, resume=True)
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="holds checkpoints, but no config.yaml"):
        run(folder, resume=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        run(folder)


def test_skipped_steps_are_counted_over_a_stop(undisturbed, tmp_path, monkeypatch):
    """The count began at 0 again with each start, so that a run which is restarted over and over never ended."""
    step = train_rl.train_step

    def skipping(*arguments):
        metrics, sample = step(*arguments)
        return metrics | {"skipped_updates": 1.0}, sample

    monkeypatch.setattr(train_rl, "train_step", skipping)
    settings = {"max_skipped_steps": 3, "eval_limit": 1}
    run(tmp_path / "run", **settings, max_steps=2)
    with pytest.raises(ConfigError, match="the last one step 3"):
        run(tmp_path / "run", **settings, resume=True)


def test_a_beta_that_follows_kl_goes_on_from_where_it_was(tmp_path):
    whole, resumed = (tmp_path / name / "run" for name in ("whole", "resumed"))  # the card has the folder's name
    settings = {"kl_target": 1e-6, "beta": 1e-3}
    run(whole, **settings)
    betas = [row["beta"] for _, row in read_jsonl(whole / "metrics.jsonl")]
    assert betas[2:] == [1e-3, 2e-3], "doubled behind step 3, whose checkpoint must say so"
    copy_until(whole, resumed, 3)
    run(resumed, resume=True, **settings)
    assert_equal(resumed, whole)
