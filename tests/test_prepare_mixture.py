"""The paper's mixture: rows of both sources, shuffled, with ids and paths that hold in the common folder."""

from pathlib import Path

import pytest
from prepare_folders import build_gqa, build_refocus, contents, read_lines, read_report

from config import ConfigError, read_config
from data import prepare, prepare_gqa, prepare_mixture
from data.examples import DataError, load_examples
from data.prepare_mixture import MixtureConfig, main


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_ROWS", 7)


@pytest.fixture
def sources(tmp_path) -> tuple[dict, dict, dict]:
    """Settings of the sources, boxes by id of GQA and of ReFocus_Data."""
    files, gqa_boxes, _ = build_gqa(tmp_path / "gqa")
    refocus, refocus_boxes, _, _ = build_refocus(tmp_path / "refocus")
    return {f"gqa_{name}": path for name, path in files.items()} | {"refocus": refocus}, gqa_boxes, refocus_boxes


def config(sources, out: Path, **more) -> MixtureConfig:
    settings = sources[0] | {"num_processes": 1, "gqa_rows": 24, "refocus_rows": 6} | more
    return MixtureConfig(out=str(out), **settings)


def test_the_mixture(sources, tmp_path, monkeypatch):
    out = tmp_path / "out"
    report = main(config(sources, out, num_processes=2))
    rows = read_lines(out)
    assert report["rows"] == len(rows) == len({row["id"] for row in rows}) == 30
    parts = [row["id"].split(":")[0] for row in rows]
    assert parts == [row["source"] for row in rows] and (parts.count("gqa"), parts.count("refocus")) == (24, 6)
    assert parts != sorted(parts)  # shuffled
    for row in rows:
        part, _, key = row["id"].partition(":")
        if row["question"] != "Another question?":
            assert row["boxes"] == sources[1 if part == "gqa" else 2][key]
        assert row["image"].startswith("../gqa/images/" if part == "gqa" else "refocus/images/")
        assert (out / row["image"]).is_file()
    monkeypatch.chdir(tmp_path.parent)
    examples = load_examples(str(out / "train.jsonl"), allowed_folders=[str(tmp_path / "gqa" / "images")])
    assert [example["id"] for example in examples] == [row["id"] for row in rows]


def test_processes_stops_and_seeds(sources, tmp_path, monkeypatch):
    main(config(sources, tmp_path / "whole", copy_images=True))
    whole = contents(tmp_path / "whole")
    assert any(name.startswith("gqa/images/") for name in whole)
    main(config(sources, tmp_path / "two", copy_images=True, num_processes=2))
    assert contents(tmp_path / "two") == whole
    main(config(sources, tmp_path / "seed", copy_images=True, seed=1))
    assert read_lines(tmp_path / "seed") != read_lines(tmp_path / "whole")

    def stop(*_):
        raise OSError("stop")

    for stage in ((prepare_gqa, "convert"), (prepare, "inspect_picture"), (prepare_mixture, "merge")):
        with monkeypatch.context() as patched, pytest.raises(DataError, match="stop"):
            patched.setattr(*stage, stop)
            main(config(sources, tmp_path / stage[1], copy_images=True))
        main(config(sources, tmp_path / stage[1], copy_images=True))
        assert contents(tmp_path / stage[1]) == whole, stage


def test_fewer_rows_than_asked_for(sources, tmp_path, capsys):
    report = main(config(sources, tmp_path / "out", gqa_rows=16_000, refocus_rows=4_000))
    assert report["rows"] == len(sources[1]) + len(sources[2])
    said = capsys.readouterr().out
    assert "fewer than the 16,000 rows asked for" in said and "fewer than the 4,000 rows asked for" in said
    assert read_report(tmp_path / "out")["parts"]["gqa"]["dropped"]["no annotated object"] == 1


def test_defaults_are_those_of_the_paper():
    assert (MixtureConfig().gqa_rows, MixtureConfig().refocus_rows) == (16_000, 4_000)


def test_other_settings_are_refused_by_name(sources, tmp_path):
    main(config(sources, tmp_path / "out"))
    with pytest.raises(ConfigError, match="gqa_rows was 24, now it is 23"):
        main(config(sources, tmp_path / "out", gqa_rows=23))
    main(config(sources, tmp_path / "out", gqa_rows=23, overwrite=True))
    assert len(read_lines(tmp_path / "out")) == 29


def test_a_folder_that_cannot_be_made_is_said(sources, tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="file/x' cannot be made or written: .*; give a new or an empty folder"):
        main(config(sources, tmp_path / "file" / "x"))


def test_all_problems_at_once(tmp_path):
    arguments = ["--gqa_questions", "gone.json", "--gqa_images", str(tmp_path), "--seed=-1", "--refocus_rows", "0"]
    with pytest.raises(ConfigError) as caught:
        read_config(MixtureConfig, arguments)
    assert str(caught.value).splitlines() == [
        "out is missing: give --out",
        "seed=-1: give 0 or more",
        "refocus_rows=0: give 1 or more",
        "gqa_scene_graphs is missing: give --gqa_scene_graphs",
        "gqa_questions='gone.json': there is no such file",
        f"gqa_images='{tmp_path}': the folder holds no .jpg; give the one with <imageId>.jpg in it",
    ]


def test_a_hub_that_cannot_be_reached_is_said_before_gqa_is_worked_on(sources, tmp_path):
    with pytest.raises(ConfigError, match="no Hub dataset that can be loaded"):
        main(config(sources, tmp_path / "out", refocus="ReFocus/ReFocus_Data"))
    assert not (tmp_path / "out" / "gqa").exists()
