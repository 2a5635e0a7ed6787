"""Disks that are full for a while, or for good: no run is lost to them, and no half file stays."""

import errno
import resource
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from resumed_runs import assert_equal, compare, copy_until, on_call, run
from safetensors import SafetensorError

import train_rl
from sayo.model.loading import load_policy
from sayo.run import files
from sayo.run import folder as run_folder
from sayo.run.folder import RowFile, check_space
from sayo.settings import ConfigError, read_jsonl
from train_rl import Config

FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(patch, place, name: str, when, errors: list) -> None:
    """Calls of a function for which when(*arguments) is true raise the errors, one each, until none is left."""
    function = getattr(place, name)

    def failing(*arguments):
        if errors and when(*arguments):
            raise errors.pop()
        function(*arguments)

    patch.setattr(place, name, failing)


def write_half(model, folder: Path) -> bool:
    folder.mkdir(parents=True)
    return bool((folder / "adapter_model.safetensors").write_bytes(b"half"))


SAVE, ROW = (files, "save_adapter", write_half), (RowFile, "write", lambda file: b'"step": 2' in file._pending)


def fill(path: Path) -> None:
    """A file that takes all the space that is left."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass


def steps_that_differ(undisturbed, folder) -> set[str]:
    return {name.split("/")[1] for name in compare(undisturbed, folder)}


@pytest.mark.parametrize(
    ("write", "error", "count", "lost"),
    [
        (SAVE, FULL, 2, {"step-000001", "step-000002"}),
        (SAVE, OSError(errno.EIO, "Input/output error"), 1, {"step-000001"}),
        (SAVE, SafetensorError("I/O error: No space left (os error 28)"), 1, {"step-000001"}),
        (SAVE, RuntimeError("[enforce fail] unexpected pos 576 vs 534"), 1, {"step-000001"}),
        (ROW, FULL, 3, {"step-000002"}),
    ],
    ids=["ENOSPC", "EIO", "safetensors", "torch", "a step whose row is not on the disk has no checkpoint"],
)
def test_a_failed_write_is_retried_after_the_next_step(
    undisturbed, tmp_path, monkeypatch, capfd, write, error, count, lost
):
    fail(monkeypatch, *write, [error] * count)
    run(tmp_path / "run")
    out = "".join(capfd.readouterr())
    assert ("metrics.jsonl could not be written" if write is ROW else "could not be saved") in out
    assert out.count("it is tried again after the next step") == len(lost)
    assert steps_that_differ(undisturbed, tmp_path / "run") == lost


def test_the_last_save_is_tried_several_times_and_then_says_what_to_do(undisturbed, tmp_path, monkeypatch):
    folder, waits = copy_until(undisturbed, tmp_path / "run", 3), []
    monkeypatch.setattr(run_folder.time, "sleep", waits.append)
    with monkeypatch.context() as patch:
        fail(patch, *SAVE, [FULL] * 100)
        with pytest.raises(ConfigError, match=r"No space left.*Free some space.*--resume.*step-000003"):
            run(folder, resume=True)
    assert waits == list(run_folder.WAITS) and list(folder.rglob("*.partial")) == []
    fail(monkeypatch, *SAVE, [FULL] * 3)
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


def test_rows_that_the_disk_does_not_take_wait_and_no_half_line_stays(tmp_path):
    former, file = resource.getrlimit(resource.RLIMIT_FSIZE), RowFile(tmp_path / "rows.jsonl")
    file.add({"step": 1})
    file.write()
    file.add({"step": 2, "text": "x" * 100})
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, former[1]))
    try:
        for _ in range(2):
            with pytest.raises(OSError):
                file.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    file.add({"step": 3})
    file.write()
    assert [row["step"] for _, row in read_jsonl(tmp_path / "rows.jsonl")] == [1, 2, 3]


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
    parameters = [torch.zeros(1000, 1000)]  # a checkpoint of 12 MB
    config = Config(max_steps=100, save_steps=10)

    def notes(free: int, start: int = 0) -> list[str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        return check_space(config, tmp_path, parameters, start)

    (warning,) = notes(40_000_000)
    assert "40.0 MB are free" in warning and "takes 12.0 MB" in warning and "--save_total_limit" in warning
    config.save_total_limit = 1
    assert notes(48_000_000) == []
    with pytest.raises(ConfigError, match="20.0 MB are free .* takes 12.0 MB"):
        notes(20_000_000)
    assert notes(20_000_000, start=100) == []  # nothing is left to be saved but the adapter


def test_the_planned_size_of_a_checkpoint_is_that_on_the_disk(undisturbed):
    parameters = [p for p in load_policy("data/tiny_policy", lora_rank=2)[0].parameters() if p.requires_grad]
    found = sum(path.stat().st_size for path in (undisturbed / "checkpoints/step-000004").rglob("*") if path.is_file())
    assert 0.8 * found < files.checkpoint_bytes(parameters, "adamw") < 1.5 * found


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_a_disk_that_takes_nothing_is_an_error_before_training(undisturbed, small_disk, monkeypatch, kind):
    disk = small_disk(4_000_000)
    folder = copy_until(undisturbed, disk / "run", 2)
    if kind == "full":
        fill(disk / "ballast")
    else:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    monkeypatch.setattr(train_rl, "train", None)  # nothing is loaded
    for place, settings in ((folder, {"resume": True}), (disk / "new" / "run", {})):
        with pytest.raises(ConfigError, match="is no folder that can be written to: .*(Read-only|No space left)"):
            run(place, **settings)


def test_an_output_dir_that_cannot_be_is_named_first():
    for place in (__file__, f"{__file__}/below"):
        with pytest.raises(ConfigError, match="is no folder that can be written to"):
            run(place)


def test_what_a_killed_save_left_does_not_fill_the_disk_for_the_next_start(undisturbed, small_disk):
    folder = copy_until(undisturbed, small_disk(4_000_000) / "run", 3)
    (folder / "checkpoints/step-000004.partial").mkdir()
    fill(folder / "checkpoints/step-000004.partial/state.pt")
    run(folder, resume=True)
    assert_equal(folder, undisturbed)


def test_a_real_full_disk_in_the_middle_of_a_run(undisturbed, small_disk, monkeypatch, capfd):
    disk = small_disk(1_200_000)
    on_call(monkeypatch, train_rl, "train_step", 3, lambda: fill(disk / "ballast"))
    monkeypatch.setattr(run_folder.time, "sleep", lambda seconds: (disk / "ballast").unlink(missing_ok=True))
    run(disk / "run")
    out = "".join(capfd.readouterr())
    assert "could not be saved" in out or "could not be written" in out
    assert steps_that_differ(undisturbed, disk / "run") == {"step-000003"}
