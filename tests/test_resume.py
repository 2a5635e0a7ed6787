"""A run survives what happens to it: kills, damaged checkpoints, signals, full disks, other data of the same name.

tests/kill_points.py does the same to the real command, many times; here are the points that take seconds.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from kill_points import differences, what_it_left
from safetensors import SafetensorError

import checkpoint
import saving
import train_rl
from checkpoint import drop_old, keep_steps_until, newest_checkpoint, save_checkpoint
from config import ConfigError, read_jsonl, stored_config
from run_folder import check_space
from saving import RowFile
from stopping import Stopped, StopSignals
from train_rl import Config

SMALL = {
    "data": "scenes",
    "limit": 20,
    "max_steps": 4,
    "groups_per_step": 2,
    "num_generations": 3,
    "max_new_tokens": 24,
    "save_steps": 1,
    "eval_limit": 4,
    "lora_rank": 2,
    "learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "report_to": "none",
    "try_biggest": False,
}


def run(folder, **settings):
    train_rl.main(Config(**(SMALL | {"output_dir": str(folder)} | settings)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    run(folder)
    return folder


def assert_equal(folder, undisturbed):
    assert differences(what_it_left(undisturbed), what_it_left(folder)) == []


def copy_until(undisturbed, folder, step, *, finished=False) -> Path:
    """The run as it was when a kill came behind the checkpoint of a step."""
    shutil.copytree(undisturbed, folder)
    for path in folder.glob("checkpoints/step-*"):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    for name in () if finished else ("adapter", "evaluation.json", "curves.png"):
        checkpoint.remove(folder / name)
    made = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(made | {"finished": None}))
    return folder


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
    assert __import__("re").search(f"step-.* is skipped: .*{problem}", passed_over[0]), passed_over


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
        seen.append(newest_checkpoint(tmp_path))
        result = rename(path, target)
        seen.append(newest_checkpoint(tmp_path))
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
    assert newest_checkpoint(tmp_path) == newest  # by number, not by name
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
        (checkpoint, "remove_leftovers", 1),
        ("run_folder", "write_whole", 1),  # config.yaml
        ("run_folder", "write_whole", 2),  # run.json
        ("run_folder", "keep_steps_until", 2),
        (train_rl, "evaluate_shared", 1),
        (train_rl, "write_whole", 1),  # evaluation_before.json
        (train_rl, "train_step", 3),
        (checkpoint, "put_in_place", 2),
        (saving, "drop_old", 2),
        (train_rl, "save_final_adapter", 1),
        (train_rl, "draw_curves", 1),
        (train_rl, "before_and_after", 1),
        (train_rl, "write_model_card", 1),
        (train_rl, "mark_finished", 1),
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_run_killed_in_between_ends_as_if_nothing_had_been(undisturbed, tmp_path, monkeypatch, module, name, call):
    import run_folder

    module = run_folder if module == "run_folder" or name == "remove_leftovers" else module
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
    assert 0 < (partial / "state.pt").stat().st_size < 190_000 and newest_checkpoint(tmp_path / "run") is None
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


def test_two_processes_do_not_write_in_one_folder(undisturbed, tmp_path):
    """A launcher that is killed leaves its child at work, and the next start went to work beside it."""
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    lock = f"fcntl.flock(os.open({str(folder)!r}, os.O_RDONLY), fcntl.LOCK_EX)"
    code = f"import fcntl, os, time; {lock}; print(flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another process is at work in it"):
            run(folder, resume=True)
    finally:
        other.kill()
        other.wait()
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


# --- what a run was made from ---------------------------------------------------------------------------------------


def some_rows(folder, count=6, **changed):
    scenes = train_rl.load_examples("scenes", limit=count)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, scene in enumerate(scenes):
        scene["image"].save(folder / f"{index}.png")
        row = {"image": f"{index}.png", **{name: scene[name] for name in ("question", "answer", "boxes")}}
        rows.append(row | (changed if index == 3 else {}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_other_data_under_the_same_name_is_noticed_and_moved_data_is_not_other_data(tmp_path):
    data, eval_data = some_rows(tmp_path / "data"), some_rows(tmp_path / "eval", 2)
    settings = {"limit": None, "max_steps": 2, "data": data, "eval_data": eval_data}
    run(tmp_path / "run", **settings)
    go_on = settings | {"max_steps": 3, "resume": True}
    for harm in ({"answer": "seven"}, {"question": "What?"}, {"boxes": [[0, 0, 5, 5]]}):
        some_rows(tmp_path / "data", **harm)
        with pytest.raises(ConfigError, match=r"data='.*rows\.jsonl': 6, SHA-256 .* then, 6, SHA-256 .* now"):
            run(tmp_path / "run", **go_on)
    some_rows(tmp_path / "data", 5)
    with pytest.raises(ConfigError, match=r"6, SHA-256 .* then, 5, SHA-256"):
        run(tmp_path / "run", **go_on)
    some_rows(tmp_path / "data")
    shutil.copyfile(tmp_path / "data/1.png", tmp_path / "data/0.png")
    with pytest.raises(ConfigError, match="data="):
        run(tmp_path / "run", **go_on)
    some_rows(tmp_path / "eval", 2, answer="x")
    some_rows(tmp_path / "moved")
    run(tmp_path / "run", **(go_on | {"data": str(tmp_path / "moved/rows.jsonl")}))
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("model", "0123456789abcdef", True),
        ("number_format", "torch.bfloat16", True),
        ("versions", {"torch": "1"}, False),
    ],
)
def test_another_model_or_number_format_is_refused_and_another_version_said(
    undisturbed, tmp_path, capsys, name, value, is_refused
):
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    made = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(made | {name: value}))
    if is_refused:
        with pytest.raises(ConfigError, match=f"{name}: {value} then, .* now. The run would no longer be that of its"):
            run(folder, resume=True)
    else:
        run(folder, resume=True)
        assert f"{name}: {value} then" in capsys.readouterr().out
        assert_equal(folder, undisturbed)


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


# --- signals --------------------------------------------------------------------------------------------------------


def test_a_signal_gives_up_a_step_before_its_update_and_finishes_it_behind(undisturbed, tmp_path, monkeypatch, capfd):

    folder = tmp_path / "run"
    for name, function, steps in (("sample_groups", train_rl.sample_groups, 1), ("clip_grad_norm_", None, 2)):
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
        assert newest_checkpoint(folder).name == f"step-{steps:06d}"
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
        (1, "group", signal.SIGINT),
        (2, "one", signal.SIGTERM),
        (2, "group", signal.SIGINT),
    ],
    ids=["launcher alone", "Ctrl-C", "one of two processes", "Ctrl-C, two processes"],
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
    assert newest_checkpoint(folder).name == f"step-{last:06d}"
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


# --- disks ------------------------------------------------------------------------------------------------------------


class FullDisk:
    """Writes of checkpoints fail the first `count` times, as they do on a full disk, with half of a file written."""

    def __init__(self, monkeypatch, count, error):
        self.left, save = count, checkpoint.save_adapter

        def failing(model, folder):
            if ".partial" in str(folder) and self.left:
                self.left -= 1
                folder.mkdir(parents=True)
                (folder / "adapter_model.safetensors").write_bytes(b"half")
                raise error
            save(model, folder)

        monkeypatch.setattr(checkpoint, "save_adapter", failing)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
    ids=["ENOSPC", "EIO", "safetensors", "torch"],
)
def test_a_save_that_fails_is_tried_again_after_the_next_step(undisturbed, tmp_path, monkeypatch, capfd, error):
    FullDisk(monkeypatch, 2, error)
    run(tmp_path / "run")
    out = "".join(capfd.readouterr())
    assert out.count("could not be saved") == 2 and "it is tried again after the next step" in out
    left = differences(what_it_left(undisturbed), what_it_left(tmp_path / "run"))
    assert {name.split("/")[1] for name in left} == {"step-000001", "step-000002"}  # of these steps alone there is none


def test_the_last_save_is_tried_several_times_and_then_says_what_to_do(undisturbed, tmp_path, monkeypatch):
    folder = copy_until(undisturbed, tmp_path / "run", 3)
    waits = []
    monkeypatch.setattr(saving.time, "sleep", waits.append)
    with monkeypatch.context() as patch:
        FullDisk(patch, 100, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(ConfigError, match=r"No space left.*Free some space.*--resume.*step-000003"):
            run(folder, resume=True)
    assert waits == list(saving.WAITS) and list(folder.rglob("*.partial")) == []
    FullDisk(monkeypatch, 3, OSError(errno.ENOSPC, "No space left on device"))
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


def test_rows_that_the_disk_does_not_take_wait_and_no_half_line_stays(tmp_path):
    """With a real limit of the kernel: half a row is written, and the rest is refused."""
    code = f"""
import resource, signal
from saving import RowFile
file = RowFile({str(tmp_path / "rows.jsonl")!r})
file.add({{"step": 1}}), file.write()
resource.setrlimit(resource.RLIMIT_FSIZE, (20, resource.RLIM_INFINITY))
file.add({{"step": 2, "text": "x" * 100}})
for _ in range(2):
    try:
        file.write()
        raise SystemExit("it was written")
    except OSError:
        pass
file.add({{"step": 3}})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.write()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert [row["step"] for _, row in read_jsonl(tmp_path / "rows.jsonl")] == [1, 2, 3]


def test_no_checkpoint_is_saved_of_a_step_whose_row_is_not_on_the_disk(undisturbed, tmp_path, monkeypatch, capfd):
    write, failures = RowFile.write, []

    def failing(file):
        if b'"step": 2' in file._pending and len(failures) < 3:
            failures.append(file)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file)

    monkeypatch.setattr(RowFile, "write", failing)
    run(tmp_path / "run")
    assert "metrics.jsonl could not be written" in "".join(capfd.readouterr())
    left = differences(what_it_left(undisturbed), what_it_left(tmp_path / "run"))
    assert {name.split("/")[1] for name in left} == {"step-000002"}


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes) -> a folder that is a file system of that size, where the test may mount one."""
    mounted = []

    def mount(size: int) -> Path | None:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            return None
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_little_space_is_an_error_or_a_warning_before_training(tmp_path, monkeypatch):
    from collections import namedtuple

    from run_folder import Run

    space = namedtuple("space", "total used free")
    parameters = [torch.nn.Parameter(torch.zeros(1000, 1000))]  # a checkpoint of 12 MB
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space(0, 0, 40_000_000))
    config, place = Config(max_steps=100, save_steps=10, output_dir=str(tmp_path)), Run(tmp_path)
    (warning,) = check_space(config, place, parameters, 0)
    assert "40.0 MB are free" in warning and "takes 12.0 MB" in warning and "--save_total_limit" in warning
    config.save_total_limit = 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space(0, 0, 48_000_000))
    assert check_space(config, place, parameters, 0) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space(0, 0, 20_000_000))
    with pytest.raises(ConfigError, match="20.0 MB are free .* takes 12.0 MB"):
        check_space(config, place, parameters, 0)
    assert check_space(config, place, parameters, 100) == []  # nothing is left to be saved but the adapter


def test_the_planned_size_of_a_checkpoint_is_that_on_the_disk(undisturbed):
    from vlm import load_policy

    model, _ = load_policy(str(Path("data/tiny_policy").resolve()), lora_rank=2)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = sum(path.stat().st_size for path in (undisturbed / "checkpoints/step-000004").rglob("*") if path.is_file())
    assert 0.8 * found < checkpoint.checkpoint_bytes(parameters, "adamw") < 1.5 * found


def test_a_real_full_disk_in_the_middle_of_a_run(undisturbed, small_disk, monkeypatch, capfd):
    """A file system that takes two checkpoints, and is given space while the last one is tried for the second time."""
    disk = small_disk(1_200_000)
    if disk is None:  # no right to mount: the kernel's limit of a file's size is met in two other tests
        return
    folder = disk / "run"
    folder.mkdir()
    ballast = disk / "ballast"

    def make_room(seconds):
        ballast.unlink(missing_ok=True)

    step = train_rl.train_step

    def filling(*arguments):
        if arguments[4] == 2:
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(b"x" * 4096):
                        pass
                except OSError:
                    pass
        return step(*arguments)

    monkeypatch.setattr(train_rl, "train_step", filling)
    monkeypatch.setattr(saving.time, "sleep", make_room)
    run(folder)
    out = "".join(capfd.readouterr())
    assert "could not be saved" in out or "could not be written" in out
    left = differences(what_it_left(undisturbed), what_it_left(folder))
    assert {name.split("/")[1] for name in left} == {"step-000003"}
