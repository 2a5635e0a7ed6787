"""Whose a folder is: a run touches its own files alone, is found wherever it lies, and never shares a folder."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import small_run
from accelerate.utils import LoggerType
from filelock import FileLock
from resumed_runs import SMALL, assert_equal, copy_until, on_call, run

import train_rl
from data.scenes import write_scenes
from sayo.examples.scenes.scenes import Scenes
from sayo.run import folder as run_folder
from sayo.run.files import keep_steps_until
from sayo.run.provenance import as_meant
from sayo.settings import ConfigError, read_config
from train_rl import Config


def everything_in(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def put(folder: Path, *names: str, text: str = "{}") -> dict[str, bytes]:
    """Write files into a folder; everything in it."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return everything_in(folder)


# --- folders of others ----------------------------------------------------------------------------------------------

STRANGERS = ("notes.txt", "notes.partial", "notes.partial.png", "deep/config.yaml", "deep/x.partial")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", "max_steps: 3\n"),
        ("run.json", '{"name": "somebody else\'s"}'),
        ("run.json", "[1]"),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("samples.jsonl", ""),
        ("evaluation.json", "{}"),
        ("evaluation_before.json", "{}"),
        ("curves.png", "a picture"),
        ("curves.partial.png", "a picture"),
        ("adapter/adapter_config.json", "{}"),
        ("adapter.partial/weights", "x"),
        ("adapter.former.partial/weights", "x"),
        ("checkpoints/step-000100/weights", "of another trainer"),
        ("checkpoints/step-000100/manifest.json", "[]"),
        ("metrics.jsonl.partial", "x"),
        ("run.json.partial", "x"),
        ("sayo/__init__.py", "the package, where TensorBoard files would go"),
    ],
)
def test_files_of_others_are_left_alone_and_named(tmp_path, monkeypatch, name, text, resume):
    put(tmp_path, name, text=text)
    before = put(tmp_path, *STRANGERS)
    monkeypatch.setattr(train_rl, "train", None)
    with pytest.raises(ConfigError, match=rf"holds .*{name.split('/')[0]}.*: no run made them.*another --output_dir"):
        run(tmp_path, resume=resume)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_may_begin_beside_files_that_it_does_not_write(tmp_path, resume):
    before = put(tmp_path, *STRANGERS)
    (tmp_path / ".lock").touch()
    (tmp_path / "run.json.partial").write_text("")  # with .lock: a first start that was killed
    run(tmp_path, resume=resume, max_steps=1, eval_data="none")
    assert before.items() <= everything_in(tmp_path).items() and not (tmp_path / "run.json.partial").exists()


@pytest.mark.parametrize("settings", [{}, {"resume": True, "learning_rate": 0.1}, {"resume": True, "max_steps": 1}])
def test_a_refused_command_deletes_nothing(undisturbed, tmp_path, settings):
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    before = put(folder, "checkpoints/step-000003.partial/state.pt", "config.yaml.partial", "mine.partial")
    with pytest.raises(ConfigError):
        run(folder, **settings)
    assert everything_in(folder) == before


def test_a_resumed_run_deletes_its_own_leftovers_alone(undisturbed, tmp_path, monkeypatch):
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    before = everything_in(folder)
    own = "checkpoints/step-000003.partial/state.pt", "config.yaml.partial", "adapter.partial/x", "curves.partial.png"
    before |= {name: b"{}" for name in ("mine.partial", "checkpoints/mine.partial", "deep/config.yaml.partial")}
    put(folder, *own, "mine.partial", "checkpoints/mine.partial", "deep/config.yaml.partial")
    monkeypatch.setattr(train_rl, "train", lambda *_: None)
    run(folder, resume=True)
    assert everything_in(folder) == before


# --- two starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_of_two_starts_at_once_the_slower_is_refused(undisturbed, tmp_path, monkeypatch, resume):
    """The other one begins, and here even ends, between this one's look at the folder and its first write."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_call(patch, train_rl, "load_for_training", 1, lambda: run(folder))
        with pytest.raises(ConfigError, match="another run has begun in it: .*--resume"):
            run(folder, resume=resume)
    assert_equal(folder, undisturbed)


def test_a_start_in_a_folder_where_another_begins_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(train_rl, "train", None)
    begin = time.monotonic()
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another process is at work in it"):
        run(tmp_path)
    assert time.monotonic() - begin < run_folder.PATIENCE / 2


# --- a run that is resumed from another folder, or was moved ----------------------------------------------------------


def train(*arguments: str) -> None:
    """The command line in this process."""
    flags = [f"--{name}={value}" for name, value in (SMALL | {"limit": 6, "eval_data": "none"}).items()]
    given = {argument.partition("=")[0] for argument in arguments}
    asked = [] if any(name == "--config" for name in given) else [f for f in flags if f.partition("=")[0] not in given]
    train_rl.main(read_config(Config, [*asked, *arguments]))


@pytest.mark.parametrize("moved", ["not", "run", "all"])
def test_a_config_in_the_folder_of_a_run_means_that_run(tmp_path, monkeypatch, moved):
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    write_scenes(Scenes("train", 6), start / "scenes_here")
    elsewhere.mkdir()
    monkeypatch.chdir(start)
    train("--data=scenes_here/train.jsonl", "--output_dir=runs/a", "--max_steps=2")
    folder = start / "runs/a"
    if moved == "run":
        folder = shutil.move(folder, tmp_path / "moved")
    elif moved == "all":
        folder = shutil.move(start, tmp_path / "other") / "runs/a"
    for place, steps in ((elsewhere, 3), (tmp_path, 4)):  # the second start reads what the first has written
        monkeypatch.chdir(place)
        train("--config", os.path.relpath(folder / "config.yaml"), "--resume", f"--max_steps={steps}")
        assert [row["step"] for row in small_run.rows_of(Path(folder))] == [*range(1, steps + 1)]
    assert list(elsewhere.iterdir()) == [] and not (tmp_path / "runs").exists()
    assert (start / "runs/a").exists() == (moved == "not")


HERE = "data/tiny_policy"  # the embedded policy, wherever one stands
MEANT = [
    ("in the same folder nothing changes", "start", "runs/a", {"data": "d"}, {"data": "d"}),
    ("a path that counts from the start", "other", "runs/a", {"data": "d"}, {"data": "{start}/d"}),
    (
        "each path of a list",
        "other",
        "runs/a",
        {"allowed_folders": ["d", "/x"]},
        {"allowed_folders": ["{start}/d", "/x"]},
    ),
    ("a pattern", "other", "runs/a", {"data": "[cd]"}, {"data": "{start}/[cd]"}),
    ("a Hub id", "other", "runs/a", {"model": "owner/name"}, {"model": "owner/name"}),
    ("sayo's own names", "other", "runs/a", {"model": HERE, "data": "scenes", "eval_data": "none"}, {}),
    ("text that is no path", "other", "runs/a", {"seed": "d", "system_prompt": "d"}, {}),
    ("not given", "other", "runs/a", {"adapter": None}, {}),
    ("from home", "other", "runs/a", {"data": "~/d"}, {}),
    ("an absolute output_dir: by run.json", "other", "{start}/runs/a", {"data": "d"}, {"data": "{start}/d"}),
    ("a moved run: by run.json", "other", "runs/b", {"data": "d"}, {"data": "{start}/d"}),
    ("what is only here is meant here", "other", "runs/a", {"data": "e"}, {"data": "e"}),
]


@pytest.mark.parametrize(("reason", "place", "output_dir", "values", "expected"), MEANT, ids=[row[0] for row in MEANT])
def test_relative_paths_of_a_run_count_from_where_they_were_meant(
    tmp_path, monkeypatch, reason, place, output_dir, values, expected
):
    start, folder = tmp_path / "start", tmp_path / "start/runs/a"
    put(start, "d", "data/tiny_policy/config.json", "scenes", "none")
    put(tmp_path / "other", "e")
    put(folder, "run.json", text=json.dumps({"examples": "6", "started_in": str(start)}))
    monkeypatch.chdir(tmp_path / place)

    def filled(value):
        return [filled(part) for part in value] if isinstance(value, list) else value.format(start=start)

    values = values | {"output_dir": filled(output_dir)}
    found = as_meant(folder / "config.yaml", values)
    stays = place == "start" or os.path.isabs(values["output_dir"])
    expected = {name: filled(value) for name, value in expected.items()}
    assert found == values | expected | ({} if stays else {"output_dir": str(folder)})


@pytest.mark.parametrize("name", ["mine.yaml", "config.yaml"])
def test_a_config_that_lies_in_no_run_is_read_as_it_is(tmp_path, monkeypatch, name):
    values = {"output_dir": "runs/a", "data": "d"}
    put(tmp_path / "start", "d")
    if name == "mine.yaml":
        put(tmp_path / "start", "run.json", text='{"examples": "6"}')
    monkeypatch.chdir(tmp_path)
    assert as_meant(tmp_path / "start" / name, values) == values


def test_a_new_run_may_take_its_settings_from_another(undisturbed, tmp_path):
    config = read_config(Config, [f"--config={undisturbed}/config.yaml", f"--output_dir={tmp_path}/new"])
    assert config == Config(**SMALL, output_dir=f"{tmp_path}/new")
    with pytest.raises(ConfigError, match="holds a run already"):
        train_rl.main(read_config(Config, [f"--config={undisturbed}/config.yaml"]))


@pytest.mark.parametrize("change", [False, True])
def test_a_model_that_was_moved_is_the_model(model_folders, tmp_path, change):
    model = Path(shutil.copytree(model_folders["qwen3_vl"], tmp_path / "model"))
    run(tmp_path / "run", model=str(model), max_steps=1, eval_data="none")
    other = shutil.move(model, tmp_path / "other")
    if change:
        put(other, "more.json")
        with pytest.raises(ConfigError, match="resume: model: .* then"):
            run(tmp_path / "run", model=str(other), max_steps=2, eval_data="none", resume=True)
    else:
        run(tmp_path / "run", model=str(other), max_steps=2, eval_data="none", resume=True)
        assert len(small_run.rows_of(tmp_path / "run")) == 2


# --- rows, trackers, adapter ------------------------------------------------------------------------------------------

ROW = '{"step": 3, "text": "größer"}\n'.encode()
DAMAGE = {
    "zeros": b"\0" * 4096,
    "zeros and a line break": b"\0" * 40 + b"\n",
    "half a character": ROW[:24] + b"\n",
    "half a row": ROW[:12],
    "a row without a step": b'{"text": "x"}\n',
    "a step that is text": b'{"step": "2"}\n',
    "a step that is true": b'{"step": true}\n',
    "a list": b"[2]\n",
    "a number": b"2\n",
    "many brackets": b"[" * 100_000 + b"\n",
    "another encoding": b"\xff\xfe\n",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_behind_the_checkpoint_is_cut_off_and_damage_before_it_is_named(tmp_path, damage):
    path, kept = tmp_path / "rows.jsonl", ROW.replace(b"3", b"1") + b"\n" + ROW.replace(b"3", b"2")
    for behind in (damage, damage + b"\n" + ROW, ROW + damage, ROW + damage + b"\n" + ROW):
        path.write_bytes(kept + behind)
        assert keep_steps_until(path, 2) == [1, 2]
        assert path.read_bytes() == kept.replace(b"\n\n", b"\n")
    path.write_bytes(before := kept + damage + b"\n" + ROW)
    with pytest.raises(ConfigError, match="line 4 is not the row of a step: restore or delete"):
        keep_steps_until(path, 3)
    assert path.read_bytes() == before


def test_a_run_with_damaged_rows_behind_its_checkpoint_is_resumed(undisturbed, tmp_path):
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (folder / name).open("ab") as file:
            file.write(b"".join(DAMAGE.values()))
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


def cut_back(folder: Path, step: int) -> None:
    """As after a crash behind the checkpoint of a step."""
    for path in folder.glob("checkpoints/step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"report_to": "tensorboard", "eval_data": "none"}
    for steps in (2, 3, 4):
        run(tmp_path / "run", max_steps=steps, resume=True, **settings)
        cut_back(tmp_path / "run", 1)
    events = EventAccumulator(str(tmp_path / "run/sayo"), size_guidance={"scalars": 0}).Reload()
    rows = small_run.rows_of(tmp_path / "run")
    found = {event.step: event.value for event in events.Scalars("reward/total")}
    assert [event.step for event in events.Scalars("reward/total")] == [1, 2, 3, 4]
    assert found == pytest.approx({row["step"]: row["reward/total"] for row in rows})


def test_a_resumed_run_goes_on_in_its_run_of_wandb(tmp_path, monkeypatch):
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])  # decided when it was imported
    for name, steps in (("a", 1), ("a", 2), ("b", 1)):
        run(tmp_path / name, max_steps=steps, resume=True, report_to="wandb", eval_data="none")
    first, resumed, other = (call.kwargs for call in wandb.init.call_args_list)
    assert first["project"] == "sayo" and first["resume"] == "allow"
    assert first["id"] == resumed["id"] != other["id"]


def test_an_adapters_config_is_the_same_from_start_to_start(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sayo.model.loading import load_policy; from sayo.run import files\n"
        "model, _ = load_policy('data/tiny_policy', lora_rank=1, lora_targets='all-linear')\n"
        "files.save_adapter(model, Path(sys.argv[1]))"
    )
    for seed in "12":
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd()}, check=True)
    first, second = ((tmp_path / seed / "adapter_config.json").read_bytes() for seed in "12")
    assert first == second and len(json.loads(first)["target_modules"]) > 3
