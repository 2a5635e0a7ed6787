"""Disks that are full for a while, or for good: no run is lost to them, and no half file stays."""

import errno
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from kill_points import differences, what_it_left
from resumed_runs import assert_equal, copy_until, run
from safetensors import SafetensorError

import checkpoint
import saving
import train_rl
from config import ConfigError, read_jsonl
from run_folder import Run, check_space
from saving import RowFile
from train_rl import Config
from vlm import load_policy


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
    """small_disk(bytes) -> a folder that is a file system of that size; a test is skipped where none may be made."""
    mounted = []

    def mount(size: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("only root may mount a small file system; the limit of a file's size is met in other tests")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_too_little_space_is_an_error_or_a_warning_before_training(tmp_path, monkeypatch):
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
    model, _ = load_policy(str(Path("data/tiny_policy").resolve()), lora_rank=2)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = sum(path.stat().st_size for path in (undisturbed / "checkpoints/step-000004").rglob("*") if path.is_file())
    assert 0.8 * found < checkpoint.checkpoint_bytes(parameters, "adamw") < 1.5 * found


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_a_disk_that_takes_nothing_is_an_error_before_training(undisturbed, small_disk, monkeypatch, kind):
    disk = small_disk(4_000_000)
    folder = copy_until(undisturbed, disk / "run", 2)
    if kind == "full":
        with suppress(OSError):
            (disk / "ballast").write_bytes(b"x" * 4_000_000)
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    monkeypatch.setattr(train_rl, "train", None)  # nothing is loaded
    for place, settings in ((folder, {"resume": True}), (disk / "new" / "run", {})):
        with pytest.raises(ConfigError, match="is no folder that can be written to: .*(Read-only|No space left)"):
            run(place, **settings)


def test_what_a_killed_save_left_does_not_fill_the_disk_for_the_next_start(undisturbed, small_disk):
    """The folder was asked whether it can be written to before its leftovers were gone."""
    disk = small_disk(4_000_000)
    folder = copy_until(undisturbed, disk / "run", 3)
    (folder / "checkpoints/step-000004.partial").mkdir()
    with suppress(OSError):
        (folder / "checkpoints/step-000004.partial/state.pt").write_bytes(b"x" * 4_000_000)
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


def test_a_real_full_disk_in_the_middle_of_a_run(undisturbed, small_disk, monkeypatch, capfd):
    """A file system that takes two checkpoints, and is given space while the last one is tried for the second time."""
    disk = small_disk(1_200_000)
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
