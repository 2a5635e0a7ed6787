"""Visual-CoT: metadata files as on the Hub, pictures as in its archive."""

import json
from pathlib import Path

import pytest
from prepare_folders import HEIGHT, WIDTH, contents, encoded, read_lines

from config import ConfigError, read_config
from data import prepare_visual_cot
from data.examples import load_examples
from data.prepare_rows import Dropped, Picture
from data.prepare_visual_cot import VisualCotConfig, convert, main

BOX = [1.5, 2.0, 20.0, 14.25]


def line(dataset: str, image: str, question: str, answer="Yes", bboxs=None, **more) -> dict:
    row = {"question": question, "answer": answer, "image": image, "width": WIDTH, "height": HEIGHT}
    return row | {"bboxs": [BOX] if bboxs is None else bboxs, "dataset": dataset, "split": "train"} | more


@pytest.fixture
def folders(tmp_path) -> tuple[str, str]:
    """(metadata, images)"""
    pictures = ["cub/001.Albatross/a.jpg", "cot/vsr/1.jpg", "gqa/2.jpg", "textvqa/3.jpg"]
    for path in [tmp_path / "images" / name for name in pictures]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(form="JPEG"))
    (tmp_path / "images" / "gqa" / "cut.jpg").write_bytes(encoded(form="JPEG")[:60])
    files = {
        "cub": [
            line("cub", "001.Albatross/a.jpg", "Grey forehead?"),
            line("cub", "001.Albatross/a.jpg", "Blue?", "No"),
        ],
        "vsr": [line("vsr", "1.jpg", "Under?", bboxs=[BOX, [0, 0, 40, 30]]), line("vsr", "1.jpg", "Under?")],
        "textcap": [line("textcap", "3.jpg", "What is written?", "stop", ocr=["stop"])],
        "gqa": [
            line("gqa", "2.jpg", "Where?", "left", full_answer="It is left."),
            line("gqa", "missing.jpg", "A?"),
            line("gqa", "cut.jpg", "B?"),
            line("gqa", "2.jpg", "C?", bboxs=[]),
            line("gqa", "2.jpg", "D?", bboxs=[[30, 4, 70, 9]]),
            line("gqa", "2.jpg", "E?", width=500),
            line("gqa", "2.jpg", "F?", answer=None),
            line("gqa", "2.jpg", "G?", bboxs=3),
            "not JSON",
        ],
    }
    metadata = tmp_path / "hub" / "metadata"
    metadata.mkdir(parents=True)
    for name, rows in files.items():
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (metadata / f"{name}_cot_train.jsonl").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "hub"), str(tmp_path / "images")


def test_rows_and_boxes(folders, tmp_path):
    metadata, images = folders
    settings = {"metadata": metadata, "images": images}
    report = main(VisualCotConfig(**settings, out=str(tmp_path / "out"), num_processes=2))
    rows = {row["id"]: row for row in read_lines(tmp_path / "out")}
    under = "vsr_cot_train:1" if "vsr_cot_train:1" in rows else "vsr_cot_train:2"  # the same question twice
    expected = {
        "cub_cot_train:1": ("cub/001.Albatross/a.jpg", "Yes", [BOX]),
        "cub_cot_train:2": ("cub/001.Albatross/a.jpg", "No", [BOX]),
        under: ("cot/vsr/1.jpg", "Yes", [BOX, [0, 0, 40, 30]] if under.endswith("1") else [BOX]),
        "textcap_cot_train:1": ("textvqa/3.jpg", "stop", [BOX]),
        "gqa_cot_train:1": ("gqa/2.jpg", "left", [BOX]),
    }
    found = {key: (row["image"].removeprefix("../images/"), row["answer"], row["boxes"]) for key, row in rows.items()}
    assert found == expected and {row["source"] for row in rows.values()} == {"visual_cot"}
    assert report["dropped"] == dict.fromkeys(
        [
            "picture missing",
            "picture unreadable",
            "no box",
            "box outside of its picture",
            "picture of another size than annotated",
            "no answer",
            "box is not four numbers",
            "line is not JSON",
            "duplicate (picture, question, answer)",
        ],
        1,
    )
    assert len(load_examples(str(tmp_path / "out" / "train.jsonl"), allowed_folders=[images])) == len(expected)
    main(VisualCotConfig(**settings, out=str(tmp_path / "one"), num_processes=1))
    assert contents(tmp_path / "one") == contents(tmp_path / "out")


def test_a_hostile_row_does_not_stop_the_run(folders, tmp_path):
    metadata, images = folders
    deep = "[" * 3000
    rows = [
        line("vsr", "x" * 5000, "A?"),
        line("x" * 5000, "1.jpg", "B?"),
        line(["vsr"], "1.jpg", "C?"),
        line("vsr", "a\0b", "D?"),
    ]
    lines = [*map(json.dumps, rows), deep, json.dumps(line("vsr", "1.jpg", "E?"))]
    (Path(metadata) / "metadata" / "vsr_cot_train.jsonl").write_text("\n".join(lines) + "\n")
    settings = {"metadata": metadata, "images": images, "subsets": ["vsr"], "num_processes": 1}
    report = main(VisualCotConfig(**settings, out=str(tmp_path / "out")))
    assert report["kept"] == 1 and report["dropped"] == {"picture missing": 4, "line is not JSON": 1}


def test_size_written_as_text():
    row = line("vsr", "1.jpg", "A?", width=str(WIDTH), height=f"{HEIGHT}.0")
    assert convert(row, Picture(WIDTH, HEIGHT))["boxes"] == [BOX]
    with pytest.raises(Dropped, match="(?s)boxes or size of another form.*'wide'"):
        convert(row | {"width": "wide"}, Picture(WIDTH, HEIGHT))


def test_subsets(folders, tmp_path):
    metadata, images = folders
    arguments = ["--metadata", f"{metadata}/metadata", "--images", images, "--out", str(tmp_path / "out")]
    config = read_config(VisualCotConfig, [*arguments, "--subsets", "vsr", "cub", "--num_processes", "1"])
    assert main(config)["rows_of_source"] == 4


def test_all_problems_at_once(folders, tmp_path):
    metadata, _ = folders
    (Path(metadata) / "metadata" / "vsr_cot_train.jsonl").write_text('{"question": "Q?", "bbox": [1, 2, 3, 4]}\n')
    with pytest.raises(ConfigError) as caught:
        read_config(
            VisualCotConfig, ["--metadata", metadata, "--images", f"{tmp_path}/none", "--subsets", "vsr", "coco"]
        )
    for said in (
        "out is missing",
        "there is no such folder",
        "there is no coco; there are cub, gqa, textcap, vsr",
        "has no answer, image, width, height, bboxs, dataset; it has question, bbox",
    ):
        assert said in str(caught.value), said
    with pytest.raises(ConfigError, match="there is no .*_cot_train.jsonl in it"):
        read_config(VisualCotConfig, ["--metadata", str(tmp_path), "--images", str(tmp_path), "--out", "x"])


def test_metadata_from_the_hub(folders, tmp_path, monkeypatch):
    """The Hub is asked for the metadata alone: everything is 143 GB."""
    metadata, images = folders
    asked = []

    def download(repository, **options):
        asked.append((repository, options))
        return metadata

    config = VisualCotConfig(images=images, out=str(tmp_path / "out"), num_processes=1, revision="main")
    with pytest.raises(ConfigError, match="no folder here, and no Hub dataset"):
        main(config)
    monkeypatch.setattr(prepare_visual_cot, "snapshot_download", download)
    assert main(config)["kept"] == 5
    options = {"repo_type": "dataset", "revision": "main", "allow_patterns": "metadata/*.jsonl"}
    assert asked == [("deepcs233/Visual-CoT", options)]
