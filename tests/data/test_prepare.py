"""What every preparation script promises: its rows, its report, resuming with the same bytes, and refused settings."""

import multiprocessing
import os
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import prepare_folders as folders
import pytest

from data.prepare import folder as shared
from data.prepare import mixture
from data.prepare.folder import FolderConfig, prepare
from data.prepare.gqa import GqaConfig
from data.prepare.mixture import MixtureConfig
from data.prepare.refocus import RefocusConfig
from data.prepare.rows import fit_boxes
from data.prepare.saliency_r1 import SaliencyConfig
from data.prepare.visual_cot import VisualCotConfig
from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError
from sayo.settings import ConfigError


@dataclass
class Dataset:
    """A dataset, what is to come of it, and one complete run; relative paths hold for all folders beside that one."""

    root: Path
    config: type[FolderConfig]
    fields: dict
    rows: dict
    dropped: dict
    whole: dict[str, bytes] | None = None

    @property
    def is_mixture(self) -> bool:
        return self.config is MixtureConfig

    @property
    def elsewhere(self) -> str | None:
        """Folder of pictures that stay where they are."""
        return None if "copy_images" in self.fields else self.fields.get("images", self.fields.get("gqa_images"))

    def settings(self, name: str, again: bool = False, **more) -> FolderConfig:
        """Those of a run into a new folder, unless `again`."""
        if not again:
            shutil.rmtree(self.root / name, ignore_errors=True)
        return self.config(**self.fields | {"out": str(self.root / name), "num_processes": 1} | more)

    def run(self, config: FolderConfig) -> dict:
        return mixture.main(config) if self.is_mixture else prepare(config)

    def prepare(self, name: str, **more) -> dict[str, bytes]:
        """The files of OUT."""
        self.run(self.settings(name, **more))
        return folders.contents(self.root / name)


DATASETS = {"gqa": (GqaConfig, folders.build_gqa), "gqa copied": (GqaConfig, folders.build_gqa)}
DATASETS |= {"refocus": (RefocusConfig, folders.build_refocus), "saliency_r1": (SaliencyConfig, folders.build_saliency)}
DATASETS |= {
    "visual_cot": (VisualCotConfig, folders.build_visual_cot),
    "mixture": (MixtureConfig, folders.build_mixture),
}


@pytest.fixture(scope="module", params=DATASETS)
def dataset(request, tmp_path_factory) -> Dataset:
    root, (config, build) = tmp_path_factory.mktemp("prepared"), DATASETS[request.param]
    fields, *expected = build(root / "source")
    found = Dataset(root, config, fields | ({"copy_images": True} if "copied" in request.param else {}), *expected)
    found.whole = found.prepare("whole")
    return found


def logged(out: Path) -> list[str]:
    """The whole lines of all logs below, without their headers."""
    logs = [path.read_text().split("\n")[1:-1] for path in sorted(out.glob("**/.work/records.jsonl"))]
    return [line for lines in logs for line in lines]


def test_rows_and_pictures(dataset):
    out = dataset.root / "whole"
    rows = folders.read_lines(out)
    texts = ("question", "answer", "boxes")
    found = {row["id"]: (*(row[name] for name in texts), (out / row["image"]).read_bytes()) for row in rows}
    assert found == dataset.rows and len(rows) == len(found)
    for row in rows:
        assert list(row) == ["id", "image", "question", "answer", "boxes", "source"]
        assert row["source"] == (row["id"].split(":")[0] if dataset.is_mixture else dataset.config.source)
    stored = {str(path.relative_to(out)) for path in out.glob("**/images/*")}
    assert stored == {row["image"] for row in rows if not row["image"].startswith("..")}
    if "copy_images" in dataset.fields:  # under their own names
        assert {Path(name).name for name in stored} < set(os.listdir(dataset.fields["images"]))
    assert bool(dataset.elsewhere) == any(row["image"].startswith("..") for row in rows)
    expected = {"report.json", "settings.json", "train.jsonl"}
    expected |= {"gqa", "refocus"} if dataset.is_mixture else set() if dataset.elsewhere else {"images"}
    assert {path.name for path in out.iterdir()} == expected


def test_report(dataset):
    report = folders.read_report(dataset.root / "whole")
    parts = report["parts"] if dataset.is_mixture else {None: report}
    for name, part in parts.items():
        reasons = dataset.dropped[name] if name else dataset.dropped
        assert part["dropped"] == {reason: len(ids) for reason, ids in reasons.items()}
        assert part["examples_of_dropped"].keys() == reasons.keys()
        for reason, lines in part["examples_of_dropped"].items():
            assert {line.split(": ")[0] for line in lines} == set(reasons[reason])
        assert part["read"] == part["rows_of_source"] == part["kept"] + sum(part["dropped"].values())
    assert sum(part["kept"] for part in parts.values()) == len(dataset.rows) == report.get("rows", len(dataset.rows))


def test_the_loader_takes_the_folder(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    dataset.prepare("loaded")
    flag, data = f"--allowed_folders {dataset.elsewhere}", str(dataset.root / "loaded" / "train.jsonl")
    assert (f"give {flag} beside it" in capsys.readouterr().out) == bool(dataset.elsewhere)
    if dataset.elsewhere:
        with pytest.raises(DataError, match=f"lies outside of(?s:.*){flag}$"):
            load_examples(data)
    examples = load_examples(data, allowed_folders=[dataset.elsewhere] if dataset.elsewhere else [])
    assert {example["id"]: example["boxes"] for example in examples} == {k: row[2] for k, row in dataset.rows.items()}
    assert not examples.skipped


@pytest.mark.parametrize("threads", [2, 3, None])
def test_the_number_of_threads_changes_no_byte(dataset, threads):
    assert dataset.prepare("threads", num_processes=threads) == dataset.whole


def test_a_subset_is_the_beginning_of_the_order_of_its_seed(dataset, capsys):
    fields = ("gqa_rows", "refocus_rows") if dataset.is_mixture else ("limit",)
    for seed in (0, 4):
        some, whole = ({"seed": seed} | dict.fromkeys(fields, limit) for limit in (3, 1000))
        assert dataset.prepare("some", **some) == dataset.prepare("some too", num_processes=3, **some)
        capsys.readouterr()
        dataset.prepare("all", **whole)
        assert capsys.readouterr().out.count("fewer than the 1,000 rows asked for") == len(fields)
        some, whole = folders.read_lines(dataset.root / "some"), folders.read_lines(dataset.root / "all")
        report = folders.read_report(dataset.root / "some")
        if dataset.is_mixture:  # shuffled once more
            assert len(some) == 6 and len([row for row in some if row["source"] == "gqa"]) == 3
            assert all(row in whole for row in some)
        else:
            assert some == whole[:3] and report["kept"] == 3 == report["asked_for"]
            assert report["read"] == 3 + sum(report["dropped"].values()) < report["rows_of_source"]
    assert len(whole) == len(dataset.rows) and whole != folders.read_lines(dataset.root / "whole")


def count_rows(monkeypatch, fails_after: int | None = None) -> list:
    """Has an entry for each row that gets as far as its boxes; after so many the disk is full."""
    calls = []

    def fitted(*arguments):
        if len(calls) == fails_after:
            raise OSError(28, "No space left on device")
        calls.append(1)
        return fit_boxes(*arguments)

    monkeypatch.setattr(shared, "fit_boxes", fitted)
    return calls


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_failed_run_resumes(dataset, monkeypatch, share):
    total = count_rows(monkeypatch)
    dataset.prepare("counted")
    before = count_rows(monkeypatch, fails_after=int(share * len(total)))
    with pytest.raises(DataError, match="No space left on device; run the same command again to resume"):
        dataset.prepare("out")
    assert not (dataset.root / "out" / "train.jsonl").exists()
    after = count_rows(monkeypatch)
    assert dataset.prepare("out", again=True) == dataset.whole
    assert len(before) + len(after) == len(total)


@pytest.mark.parametrize(("threads", "lines"), [(1, 1), (3, 5)])
def test_a_killed_run_resumes(dataset, threads, lines):
    def slow(config):
        shared.fit_boxes = lambda *arguments: time.sleep(0.02) or fit_boxes(*arguments)
        dataset.run(config)

    out, config = dataset.root / "killed", dataset.settings("killed", num_processes=threads)
    run = multiprocessing.get_context("fork").Process(target=slow, args=(config,))
    run.start()
    while len(before := logged(out)) < lines:
        assert run.is_alive()
        time.sleep(0.002)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    assert not (out / "report.json").exists() and not (out / "train.jsonl").exists()
    assert logged(out)[: len(before)] == before
    assert dataset.prepare("killed", again=True, num_processes=4 - threads) == dataset.whole


def interrupt(dataset, monkeypatch, name: str) -> Path:
    """Stop a run of which all rows were read; its log, or the one of its first part."""
    with monkeypatch.context() as patched, pytest.raises(DataError, match="stop"):
        patched.setattr(shared, "_write_results", Mock(side_effect=OSError("stop")))
        dataset.prepare(name)
    return next((dataset.root / name).glob("**/.work/records.jsonl"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda log: log[:-1],  # no end of the last line
        lambda log: log[:-20],
        lambda log: log[: log.index(b"\n") - 1],  # not even the header is whole
        lambda log: b"",
        lambda log: log[:-20] + b"\0" * 20 + b"\n" + log,  # after a power cut
    ],
)
def test_a_log_that_was_written_in_part_is_mended(dataset, monkeypatch, damage):
    log = interrupt(dataset, monkeypatch, "torn")
    log.write_bytes(damage(log.read_bytes()))
    assert dataset.prepare("torn", again=True) == dataset.whole


@pytest.mark.parametrize("stage", [(shared, "write_json"), (shared.shutil, "rmtree"), (mixture, "merge")])
def test_a_stop_between_the_last_files(dataset, monkeypatch, stage):
    module, name = stage
    former, reached = getattr(module, name), []

    def stop(path, *more, **options):
        if name != "write_json" or path.name == "report.json":
            reached.append(path)
            raise KeyboardInterrupt
        return former(path, *more, **options)

    config = dataset.settings("stopped")
    with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
        patched.setattr(module, name, stop)
        dataset.run(config)
    assert len(reached) == (name != "merge" or dataset.is_mixture)
    assert dataset.prepare("stopped", again=True) == dataset.whole


def test_a_complete_folder_is_not_worked_on_again(dataset, monkeypatch, capsys):
    for config in (dataset.config, GqaConfig, RefocusConfig):
        monkeypatch.setattr(config, "open_rows", None, raising=False)
    monkeypatch.setattr(mixture, "merge", None)
    assert dataset.prepare("whole", again=True) == dataset.whole and "kept" in capsys.readouterr().out


def test_other_settings_are_refused_by_name(dataset):
    said = "(?s)other settings.*--overwrite to start again:.*seed was 0, now it is 1.*tolerance was"
    with pytest.raises(ConfigError, match=said):
        dataset.prepare("whole", again=True, seed=1, tolerance=0.5)
    assert folders.contents(dataset.root / "whole") == dataset.whole
    other = dataset.prepare("other", seed=1)
    dataset.prepare("again")
    assert dataset.prepare("again", again=True, seed=1, overwrite=True) == other != dataset.whole


def test_a_source_that_changed_is_refused(dataset, monkeypatch):
    log = interrupt(dataset, monkeypatch, "changed")
    log.write_bytes(b'{"rows": 7}' + log.read_bytes()[log.read_bytes().index(b"\n") :])
    with pytest.raises(DataError, match="had 7 rows before the stop and has [0-9]+ now; start again: --overwrite"):
        dataset.prepare("changed", again=True)
    assert dataset.prepare("changed", again=True, overwrite=True) == dataset.whole


def test_a_folder_of_something_else_is_left_alone(dataset):
    (dataset.root / "thesis").mkdir()
    (dataset.root / "thesis" / "chapter.tex").write_text("precious")
    for name in ("thesis", "thesis/chapter.tex/x", "thesis/chapter.tex", "/proc/x"):
        for overwrite in (False, True):
            with pytest.raises(
                ConfigError, match="(?s)^out=.*(holds something else|cannot be made or written).*give a"
            ):
                dataset.prepare(name, again=True, overwrite=overwrite)
    assert folders.contents(dataset.root / "thesis") == {"chapter.tex": b"precious"}
