"""Run, disturb, resume, compare: a resumed run leaves to the bit what an undisturbed one leaves, or is refused.

tests/long/kill_points.py does the same to the real command, many times; here are the points that take seconds.
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
import small_run
import torch
from conftest import write_jsonl
from resumed_runs import SMALL, Killed, assert_equal, compare, copy_until, die, on_call, run, update_json

import evaluate
import train_rl
from sayo.run import files
from sayo.run import folder as run_folder
from sayo.run.files import drop_old, keep_steps_until, save_checkpoint, whole_checkpoint
from sayo.settings import ConfigError, read_jsonl, stored_config
from train_rl import Config


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_a_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])


def empty(path: Path, by_file: bool = False) -> None:
    shutil.rmtree(path)
    path.write_text("not a folder") if by_file else path.mkdir()


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
        ("", lambda path: empty(path, by_file=True), "it is no folder"),
        ("", lambda path: path.rename(path.with_name("step-last")), "name is not step- and a number"),
        ("", lambda path: path.rename(path.with_name("step-000009")), "manifest.json is that of step 3"),
    ],
)
def test_a_damaged_checkpoint_is_named_skipped_and_the_one_before_is_used(undisturbed, tmp_path, name, harm, problem):
    folder = copy_until(undisturbed, tmp_path / "run", 3)
    harm(folder / "checkpoints" / "step-000003" / name)
    newest, (passed_over,) = whole_checkpoint(folder)
    assert newest.name == "step-000002" and re.search(f"step-.* is skipped: .*{problem}", passed_over), passed_over


class TinyModel:
    def save_pretrained(self, place, save_embedding_layers):
        place.mkdir(parents=True)
        for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
            (place / name).write_text("{}")


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(folder, step, TinyModel(), {"optimizer": torch.optim.SGD([torch.zeros(3)])})


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_replacing_a_damaged_checkpoint_never_leaves_fewer_whole_ones(tmp_path, monkeypatch):
    first = save(tmp_path, 1)
    inode = (first / "state.pt").stat().st_ino
    assert save(tmp_path, 1) == first and (first / "state.pt").stat().st_ino == inode
    second = save(tmp_path, 2)
    truncate(second / "state.pt")
    rename, seen = Path.rename, []

    def watching(path, target):
        seen.append(whole_checkpoint(tmp_path)[0])
        rename(path, target)
        seen.append(whole_checkpoint(tmp_path)[0])

    monkeypatch.setattr(Path, "rename", watching)
    save(tmp_path, 2)
    assert seen == [first, first, first, second]
    assert names_of(tmp_path) == ["step-000001", "step-000002"]


def test_every_file_is_synced_before_the_rename_and_the_names_behind_it(tmp_path, monkeypatch):
    events, rename, fsync = [], Path.rename, os.fsync
    opened = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.readlink(opened(handle))) or fsync(handle))
    monkeypatch.setattr(Path, "rename", lambda path, target: events.append("rename") or rename(path, target))
    save(tmp_path, 7)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    names = "state.pt manifest.json adapter_config.json adapter_model.safetensors adapter step-000007.partial".split()
    assert set(names) <= {Path(path).name for path in before}
    assert after == [str(tmp_path / "checkpoints")]


def test_only_the_oldest_checkpoints_go_and_never_the_newest(tmp_path):
    for step in (1, 2, 3, 1_000_000):
        newest = save(tmp_path, step)
    assert whole_checkpoint(tmp_path)[0] == newest  # by number, not by name
    names = ["step-000001", "step-000002", "step-000003", "step-1000000"]
    for limit, kept in ((None, names), (2, names[2:]), (1, names[3:])):
        drop_old(tmp_path, newest, limit)
        assert names_of(tmp_path) == kept


def test_a_limit_of_checkpoints_changes_nothing_else(undisturbed, tmp_path):
    run(tmp_path / "run", save_total_limit=2)
    missing = compare(undisturbed, tmp_path / "run")
    assert {name.split("/")[1] for name in missing} == {"step-000001", "step-000002", "README.md"}, "the card lists it"


nothing = Path.exists  # leaves the folder as it is


def at(name: str, harm):
    return lambda folder: harm(folder / name)


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def note(**values):
    """Change what run.json says the run was built from."""
    return lambda folder: update_json(folder / "run.json", **values)


def newest_two(folder: Path) -> None:
    truncate(folder / "checkpoints/step-000003/state.pt")
    empty(folder / "checkpoints/step-000002")


def the_only_one(folder: Path) -> None:
    (folder / "checkpoints/step-000001/state.pt").unlink()
    (folder / "checkpoints/.ipynb_checkpoints").mkdir()


def half_written(folder: Path) -> None:
    for name in ("step-000003.partial", "step-000002.former.partial"):
        shutil.copytree(folder / "checkpoints/step-000002", folder / "checkpoints" / name)


NO_BEFORE = "from .*step-000004\n"
DISTURBED = [
    (2, half_written, {}, "from .*step-000002\n", "killed while a checkpoint was written and another one replaced"),
    (3, newest_two, {}, "(?s)000003 is skipped: state.pt has.*000002 is skipped: manifest.*from .*000001\n", "damaged"),
    (1, the_only_one, {}, "(?s)state.pt is missing((?!ipynb).)*no whole checkpoint, so from step 0", "none is whole"),
    (2, note(versions={"torch": "1"}), {}, "versions: {'torch': '1'} then", "another version is only a warning"),
    (2, nothing, {"dtype": "float32"}, "resume: dtype was 'auto', is 'float32'", "what auto was, by its name"),
    (4, write("evaluation.json", ""), {}, NO_BEFORE, "a damaged evaluation is repeated"),
    (4, write("evaluation.json", '[{"id": 1}]'), {}, NO_BEFORE, "an evaluation of another form"),
    (4, write("evaluation.json", '{"step": 4, "rows": {"after": [3]}}'), {}, NO_BEFORE, "rows that are none"),
]


@pytest.mark.parametrize(("step", "harm", "settings", "words", "reason"), DISTURBED, ids=[row[-1] for row in DISTURBED])
def test_a_disturbed_run_ends_as_an_undisturbed_one(undisturbed, tmp_path, capsys, step, harm, settings, words, reason):
    folder = copy_until(undisturbed, tmp_path / "run", step)
    harm(folder)
    run(folder, resume=True, **settings)
    assert re.search(words, capsys.readouterr().out), reason
    shutil.rmtree(folder / "checkpoints/.ipynb_checkpoints", ignore_errors=True)
    assert compare(undisturbed, folder) == (["adapter/README.md"] if settings else [])  # which lists the settings


NOT_THAT = "then, .* now.*. The run would no longer be that"
REFUSED = [
    (note(model="0123456789abcdef"), {}, f"model: 0123456789abcdef {NOT_THAT}"),
    (note(number_format="torch.bfloat16"), {}, f"number_format: torch.bfloat16 {NOT_THAT}"),
    (note(number_format="torch.float16"), {}, "torch.float16 then, torch.float32 now, --dtype float16 is"),
    (write("config.yaml", "max_steps: &a 3\nsave_steps: *a\n"), {}, "aliases"),
    (write("config.yaml", "learning_rat: 3\n"), {}, "did you mean learning_rate"),
    (at("config.yaml", Path.unlink), {}, "holds checkpoints, but no config.yaml"),
    (at("config.yaml", Path.unlink), {"resume": False}, "holds a run already"),
    (nothing, {"resume": False}, "holds a run already.*--resume"),
    (nothing, {"learning_rate": 0.1, "lora_rank": 4}, r"learning_rate was 0\.001, is 0\.1; lora_rank was 2, is 4"),
    (nothing, {"max_steps": 1}, "max_steps=1.*further already"),
]


@pytest.mark.parametrize(("harm", "settings", "words"), REFUSED, ids=[words[:40] for *_, words in REFUSED])
def test_what_would_be_another_run_is_refused(undisturbed, tmp_path, harm, settings, words):
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    harm(folder)
    with pytest.raises(ConfigError, match=words):
        run(folder, **{"resume": True} | settings)


@pytest.mark.parametrize(
    ("place", "name", "call"),
    [
        (files, "write_whole", 1),  # run.json
        (files, "write_whole", 2),  # config.yaml
        (files, "keep_steps_until", 2),
        (evaluate, "write_whole", 1),  # evaluation_before.json
        (train_rl, "train_step", 3),
        (files, "put_in_place", 1),  # a row, but no checkpoint: neither resumed nor started again
        (files, "put_in_place", 2),
        (files, "drop_old", 2),
        (files, "save_final_adapter", 1),
        (run_folder, "draw_curves", 1),
        (evaluate, "write_whole", 2),  # evaluation.json
        (run_folder, "write_model_card", 1),
        (files, "write_whole", 3),  # run.json: finished
    ],
    ids=lambda value: str(getattr(value, "__name__", value)),
)
def test_a_run_killed_in_between_ends_as_an_undisturbed_one(undisturbed, tmp_path, monkeypatch, place, name, call):
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        on_call(patch, place, name, call, die)
        run(tmp_path / "run", resume=True)
    run(tmp_path / "run", resume=True)
    assert_equal(tmp_path / "run", undisturbed)


def test_a_process_killed_by_the_kernel_while_it_writes_a_checkpoint_goes_on(undisturbed, tmp_path):
    arguments = [f"--{name}={value}" for name, value in (SMALL | {"output_dir": tmp_path / "run"}).items()]
    command = [sys.executable, "tests/long/kill_points.py", "--be_killed", "byte", "150000", "0", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode == -signal.SIGXFSZ, result.stderr[-2000:]
    partial = tmp_path / "run/checkpoints/step-000001.partial"
    assert 0 < (partial / "state.pt").stat().st_size < 190_000 and whole_checkpoint(tmp_path / "run")[0] is None
    run(tmp_path / "run", resume=True)
    assert_equal(tmp_path / "run", undisturbed)


def test_half_a_last_line_is_dropped_also_within_a_character(tmp_path):
    path, whole = tmp_path / "rows.jsonl", '{"step": 1, "text": "größer"}\n'.encode()
    for end in range(len(whole), 2 * len(whole)):
        path.write_bytes((whole + whole)[:end])
        assert keep_steps_until(path, 5) == ([1, 1] if end == 2 * len(whole) - 1 else [1]), end
    path.write_bytes(whole + b"\0" * 50)  # what a power cut leaves
    assert keep_steps_until(path, 5) == [1] and path.read_bytes() == whole
    path.write_bytes(b"\xff\xfe" + whole)
    with pytest.raises(ConfigError, match="not a text file"):
        read_jsonl(path)


def test_the_run_that_others_are_compared_with_learns_something(undisturbed):
    rows = small_run.rows_of(undisturbed)
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all(row["grad_norm"] > 0 for row in rows)
    assert len({row["learning_rate"] for row in rows}) == 4
    assert stored_config(undisturbed / "config.yaml", Config) == Config(**SMALL, output_dir=str(undisturbed))


def test_a_finished_run_says_so_and_does_again_only_what_is_missing(undisturbed, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(train_rl, "train", None)  # nothing is loaded
        run(folder, resume=True)
    assert "is finished, at step 4; give more --max_steps" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    (folder / "curves.png").unlink()
    for place, name in ((evaluate, "evaluate_policy"), (train_rl, "train_step")):
        on_call(monkeypatch, place, name, 1, die)
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


def test_two_processes_do_not_write_in_one_folder(undisturbed, tmp_path, monkeypatch, capsys):
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    code = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]).acquire(); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    other = subprocess.Popen([sys.executable, "-c", code, str(folder / ".lock")], **pipes)
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
def test_an_evaluation_before_that_is_lost_is_reported(undisturbed, tmp_path, capsys, content):
    folder = copy_until(undisturbed, tmp_path / "run", 3)
    (folder / "evaluation_before.json").write_text(content)
    run(folder, resume=True)
    assert "evaluation_before.json is missing or damaged" in capsys.readouterr().out
    assert list(json.loads((folder / "evaluation.json").read_text())["summary"]) == ["after"]


def test_a_finished_run_goes_on_to_more_steps_with_the_beta_that_kl_gave_it(tmp_path, capsys):
    whole, resumed = (tmp_path / name / "run" for name in ("whole", "resumed"))  # the card has the folder's name
    settings = {"kl_target": 1e-6, "beta": 1e-3, "lr_scheduler": "constant", "eval_limit": 1}
    run(whole, **settings)
    betas = [row["beta"] for row in small_run.rows_of(whole)]
    assert betas[2:] == [2e-3, 4e-3], "doubled after step 3, whose checkpoint must say so"
    run(resumed, **settings, max_steps=3)
    capsys.readouterr()
    run(resumed, **settings, resume=True)
    assert "max_steps was 3, is 4" in capsys.readouterr().out
    assert_equal(resumed, whole)


def some_rows(folder, count=6, **changed) -> str:
    """A .jsonl file of scenes with their pictures; the fourth row has what is `changed`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, scene in enumerate(train_rl.load_examples("scenes", limit=count)):
        scene["image"].save(folder / f"{index}.png")
        row = {name: scene[name] for name in ("question", "answer", "boxes")} | {"image": f"{index}.png"}
        rows.append(row | (changed if index == 3 else {}))
    return write_jsonl(folder, *rows)


def test_other_data_under_the_same_name_is_noticed_and_moved_data_is_not_other_data(tmp_path):
    data, eval_data = some_rows(tmp_path / "data"), some_rows(tmp_path / "eval", 2)
    settings = {"limit": None, "data": data, "eval_data": eval_data}
    run(tmp_path / "run", max_steps=2, **settings)

    for change in ({"answer": "seven"}, {"question": "What?"}, {"boxes": [[0, 0, 5, 5]]}, {"count": 5}, {}):
        some_rows(tmp_path / "data", **change)
        if not change:
            shutil.copyfile(tmp_path / "data/1.png", tmp_path / "data/0.png")
        count = change.get("count", 6)
        with pytest.raises(ConfigError, match=rf"data='.*train\.jsonl': 6, SHA-256 .* then, {count}, SHA-256 .* now"):
            run(tmp_path / "run", max_steps=3, resume=True, **settings)
    some_rows(tmp_path / "eval", 2, answer="x")
    settings["data"] = some_rows(tmp_path / "moved")
    run(tmp_path / "run", max_steps=3, resume=True, **settings)
    assert len(small_run.rows_of(tmp_path / "run")) == 3
