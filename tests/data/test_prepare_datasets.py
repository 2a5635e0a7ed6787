"""Each public dataset in its own format: rows and boxes in special cases, and everything wrong with files and flags."""

import json
from pathlib import Path

import datasets
import prepare_folders as folders
import pytest
from PIL import Image

from data.prepare import mixture, visual_cot
from data.prepare.folder import prepare
from data.prepare.gqa import GqaConfig
from data.prepare.mixture import MixtureConfig
from data.prepare.refocus import RefocusConfig
from data.prepare.rows import Dropped, Picture, inspect_picture
from data.prepare.saliency_r1 import SaliencyConfig
from data.prepare.visual_cot import VisualCotConfig
from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError, load_picture
from sayo.settings import ConfigError, read_config

GRAPH = {"width": 8, "height": 8, "objects": {"7": {"x": 1, "y": 2, "w": 3, "h": 4}}}
GQA = {"question": "Q?", "answer": 3, "imageId": "1", "annotations": {"answer": {"0": "7"}}, "graph": GRAPH}
CHART = {"question": "Q?", "answer": "3"}
TAGGED = {"problem": "Q?", "solution": "Let me see. <answer> 3 </answer>"}
LINE = folders.visual_cot_line("vsr", "1.jpg", "Q?", "3", bboxs=[[1, 2, 4, 6]], width="8", height="8.0")


@pytest.mark.parametrize(
    ("config_class", "row", "expected"),
    [
        (GqaConfig, GQA, [[1, 2, 4, 6]]),
        (GqaConfig, GQA | {"graph": GRAPH | {"objects": {"7": {"x": 1}}}}, "scene graph of another form"),
        (RefocusConfig, CHART | {"focus_areas_bbox": [{"x1": 1, "y1": 2, "x2": 3, "y2": 4}]}, [[1, 2, 3, 4]]),
        (RefocusConfig, CHART | {"focus_areas_bbox": None}, "no focus area"),
        (RefocusConfig, CHART | {"focus_areas_bbox": [{"x1": 1}]}, "another form"),
        (RefocusConfig, CHART | {"focus_areas_bbox": {"x1": 3, "y1": 1}}, "another form"),
        (SaliencyConfig, TAGGED | {"bbox": [0, 0, 1, 0.5]}, [[0, 0, 8, 4]]),  # the answer loses its tags
        (SaliencyConfig, TAGGED | {"bbox": "[" * 3000}, "box is not four numbers"),  # no JSON
        (SaliencyConfig, TAGGED | {"bbox": "[" * 900 + "]" * 900}, "box is not four numbers"),  # JSON
        (VisualCotConfig, LINE, [[1, 2, 4, 6]]),  # a size as text
        (VisualCotConfig, LINE | {"width": "wide"}, "(?s)boxes or size of another form.*'wide'"),
    ],
)
def test_one_row(config_class, row, expected):
    if isinstance(expected, list):
        assert config_class().convert(row, Picture(8, 8)) == {"question": "Q?", "answer": "3", "boxes": expected}
    else:
        with pytest.raises(Dropped, match=expected):
            config_class().convert(row, Picture(8, 8))


@pytest.fixture
def gqa(tmp_path) -> tuple[GqaConfig, dict]:
    """(config, rows that are kept)"""
    fields, rows, _ = folders.build_gqa(tmp_path / "gqa")
    return GqaConfig(**fields, out=str(tmp_path / "out"), num_processes=2), rows


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("annotated", ["stored", "shown"])
def test_boxes_turn_with_their_picture(tmp_path, orientation, annotated):
    picture = Image.new("RGB", (folders.WIDTH, folders.HEIGHT), "white")
    picture.paste((255, 0, 0), (4, 6, 14, 11))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "1.png", exif=exif)
    shown = load_picture(tmp_path / "1.png")
    expected = list(shown.point(lambda value: 255 - value).getchannel("G").getbbox())
    if annotated == "shown" or orientation <= 4:  # a mirrored picture has the same size: nothing tells which is meant
        (x1, y1, x2, y2), (width, height) = expected, shown.size
    else:
        (x1, y1, x2, y2), (width, height) = (4, 6, 14, 11), (folders.WIDTH, folders.HEIGHT)
    graph = {"width": width, "height": height, "objects": {"11": {"x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1}}}
    row = folders.gqa_question("1", question={"0": "11"}) | {"graph": graph}
    assert GqaConfig().convert(row, inspect_picture(tmp_path / "1.png"))["boxes"] == [expected]


def test_repeated_and_unreadable_questions_are_dropped(gqa):
    config, rows = gqa
    path = Path(config.questions)
    questions = json.loads(path.read_text(encoding="utf-8"))
    twin = json.dumps({"twin": questions["00"]})[1:-1]
    again = json.dumps({"01": questions["02"] | {"question": "Another one?"}})[1:-1]  # a key that is there already
    half = json.dumps({"half": folders.gqa_question("n1", "\ud800?", question={"0": "11"})})[1:-1]  # of a character
    path.write_text(path.read_text(encoding="utf-8")[:-1] + f", {twin}, {again}, {half}}}", encoding="utf-8")
    report = prepare(config)
    reasons = ("duplicate (picture, question, answer)", "duplicate id", "question that is not text")
    assert [report["dropped"][reason] for reason in reasons] == [1, 1, 1] and report["kept"] == len(rows)


def test_no_row_left(gqa):
    config, _ = gqa
    Path(config.questions).write_text(json.dumps({"1": folders.gqa_question("n1")}))
    for _ in range(2):
        with pytest.raises(DataError, match="no row of gqa can be used"):
            prepare(config)
    assert folders.read_report(config.folder)["dropped"] == {"no annotated object": 1}


def test_the_size_of_a_file_is_a_setting(gqa):
    config, _ = gqa
    prepare(config)
    Path(config.questions).write_bytes(Path(config.questions).read_bytes() + b" ")
    with pytest.raises(ConfigError, match="size of questions was"):
        prepare(config)


def test_pictures_through_a_link(gqa, tmp_path):
    config, rows = gqa
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    (tmp_path / "store").mkdir()
    picture = Path(config.images) / "0.jpg"
    picture.rename(tmp_path / "store" / "blob")
    picture.symlink_to(tmp_path / "store" / "blob")
    config.out = str(tmp_path / "link" / "out")
    prepare(config)
    assert {row["image"] for row in folders.read_lines(config.folder)} >= {"../../../gqa/images/0.jpg"}
    assert len(load_examples(str(config.folder / "train.jsonl"), allowed_folders=[str(tmp_path)])) == len(rows)


def test_rows_with_one_picture_share_its_file(tmp_path):
    config = RefocusConfig(**folders.build_refocus(tmp_path / "hub")[0], out=str(tmp_path / "out"))
    prepare(config)
    images = {row["id"]: row["image"] for row in folders.read_lines(config.folder)}
    assert images["plain 0"] == images["same picture"] and images["jpeg"].endswith(".jpg")


def test_a_wrong_column_does_not_claim_the_folder(tmp_path):
    table = datasets.Dataset.from_list([{"id": "1", "query": "?", "image": {"bytes": folders.encoded(), "path": None}}])
    data = folders.push_to_folder(table.cast_column("image", datasets.Image()), tmp_path / "other", num_shards=1)
    with pytest.raises(ConfigError, match="no column question, answer, focus_areas_bbox; columns present: id, query"):
        prepare(RefocusConfig(data=data, out=str(tmp_path / "out")))
    prepare(RefocusConfig(**folders.build_refocus(tmp_path / "right")[0], out=str(tmp_path / "out")))
    assert (tmp_path / "out" / "train.jsonl").exists()


def test_settings_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    data = folders.build_refocus(tmp_path / "refocus")[0]["data"]
    config = RefocusConfig(data=data, out=str(tmp_path / "out"), revision="main")
    before = config.settings()
    for name in ("train", "main"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert config.settings() == before and before["split"] == "train"
    monkeypatch.chdir(tmp_path)
    assert RefocusConfig(data="refocus", out="out").settings()["data"] == data


def test_saliency_with_lists_and_other_names(tmp_path):
    names = {"problem": "query", "solution": "label", "bbox": "region", "image": "photo"}
    data, rows, _ = folders.build_saliency(tmp_path / "hub", list, **names)
    with pytest.raises(ConfigError, match="no column problem, solution, bbox, image; columns present: dataset, split"):
        prepare(SaliencyConfig(**data, out=str(tmp_path / "out")))
    columns = {"question_column": "query", "answer_column": "label", "box_column": "region", "image_column": "photo"}
    report = prepare(SaliencyConfig(**data, out=str(tmp_path / "out"), **columns))
    assert report["kept"] == len(rows) == 4 and folders.read_lines(tmp_path / "out")[0]["answer"] == "Yes"


def test_a_hostile_row_does_not_stop_the_run(tmp_path):
    line, (fields, _, _) = folders.visual_cot_line, folders.build_visual_cot(tmp_path)
    rows = [line("vsr", "x" * 5000, "A?"), line("x" * 5000, "1.jpg", "B?")]
    rows += [line(["vsr"], "1.jpg", "C?"), line("vsr", "a\0b", "D?")]
    lines = [*map(json.dumps, rows), "[" * 3000, json.dumps(line("vsr", "1.jpg", "E?"))]
    (Path(fields["metadata"]) / "metadata" / "vsr_cot_train.jsonl").write_text("\n".join(lines) + "\n")
    report = prepare(VisualCotConfig(**fields, subsets=["vsr"], out=str(tmp_path / "out")))
    assert report["kept"] == 1 and report["dropped"] == {"picture missing": 4, "line is not JSON": 1}


def test_subsets(tmp_path):
    fields, _, _ = folders.build_visual_cot(tmp_path)
    arguments = ["--metadata", f"{fields['metadata']}/metadata", "--images", fields["images"]]
    config = read_config(VisualCotConfig, [*arguments, "--out", str(tmp_path / "out"), "--subsets", "vsr", "cub"])
    assert prepare(config)["rows_of_source"] == 4


def test_metadata_from_the_hub(tmp_path, monkeypatch):
    (fields, rows, _), asked = folders.build_visual_cot(tmp_path), []
    config = VisualCotConfig(images=fields["images"], out=str(tmp_path / "out"), revision="main")
    with pytest.raises(ConfigError, match="no folder here, and no Hub dataset"):
        prepare(config)
    monkeypatch.setattr(visual_cot, "snapshot_download", lambda *a, **b: asked.append((a, b)) or fields["metadata"])
    assert prepare(config)["kept"] == len(rows)
    options = {"repo_type": "dataset", "revision": "main", "allow_patterns": "metadata/*.jsonl"}
    assert asked == [(("deepcs233/Visual-CoT",), options)]


def test_the_mixture_is_shuffled_and_as_large_as_in_the_paper(tmp_path):
    fields = folders.build_mixture(tmp_path)[0] | {"out": str(tmp_path / "out"), "refocus_rows": 6}
    report = mixture.main(MixtureConfig(**fields, gqa_rows=24))
    sources = [row["source"] for row in folders.read_lines(tmp_path / "out")]
    assert (sources.count("gqa"), sources.count("refocus"), report["rows"]) == (24, 6, 30)
    assert sources != sorted(sources)
    with pytest.raises(ConfigError, match="gqa_rows was 24, now it is 23"):
        mixture.main(MixtureConfig(**fields, gqa_rows=23))
    assert (MixtureConfig().gqa_rows, MixtureConfig().refocus_rows) == (16_000, 4_000)
    # A Hub that cannot be reached shows before the work on GQA.
    with pytest.raises(ConfigError, match="no Hub dataset that can be loaded"):
        mixture.main(MixtureConfig(**fields | {"refocus": MixtureConfig().refocus, "out": str(tmp_path / "new")}))
    assert not (tmp_path / "new" / "gqa").exists()


PROBLEMS = {  # flags, and words in each line of the message
    (
        GqaConfig,
        "--questions TMP/testdev.json --scene_graphs TMP/broken.json --images TMP --limit 0 --seed=-1 --tolerance 2",
    ): """
        out is missing: give --out
        seed=-1: give 0 or more
        tolerance=2.0: give 0 to 1
        limit=0: give 1 or more
        entry '1' has no answer, annotations; it has question, imageId
        is not one JSON object, or is cut off: the entry at byte 1
        the folder holds no .jpg""",
    (GqaConfig, "--questions gone.json --scene_graphs TMP/testdev.json --images gone --out x"): """
        images='gone': there is no such folder
        questions='gone.json': there is no such file
        has no width, height, objects; it has question, imageId""",
    (GqaConfig, "--questions TMP/empty.json --scene_graphs TMP/text.json --images TMP/hub --out x"): """
        there is nothing in it
        entry '1' has no width, height, objects; it is 'Q?'
        the folder holds no .jpg""",
    (RefocusConfig, "--data= --split="): """
        out is missing
        data is missing: give --data
        split is missing""",
    (SaliencyConfig, "--split= --box_column= --num_processes 0 --out x"): """
        split is missing
        box_column is missing
        num_processes=0: give 1 or more""",
    (VisualCotConfig, "--metadata TMP/hub --images TMP/none --subsets vsr coco"): """
        out is missing
        there is no such folder
        there is no coco; there are cub, gqa, textcap, vsr
        has no answer, image, width, height, bboxs, dataset; it has question, bbox""",
    (VisualCotConfig, "--metadata TMP --images TMP --out x"): """
        there is no *_cot_train.jsonl in it""",
    (MixtureConfig, "--gqa_questions gone.json --gqa_images TMP --seed=-1 --refocus_rows 0"): """
        out is missing: give --out
        seed=-1: give 0 or more
        refocus_rows=0: give 1 or more
        gqa_scene_graphs is missing: give --gqa_scene_graphs
        gqa_questions='gone.json': there is no such file
        gqa_images='TMP': the folder holds no .jpg; give the one with <imageId>.jpg in it""",
}


@pytest.mark.parametrize(("config_class", "flags", "said"), [(*key, said) for key, said in PROBLEMS.items()])
def test_all_problems_at_once(tmp_path, config_class, flags, said):
    contents = {"broken": '{"1": {"question": ', "testdev": '{"1": {"question": "Q?", "imageId": "n1"}}'}
    for name, content in (contents | {"empty": "{}", "text": '{"1": "Q?"}'}).items():
        (tmp_path / f"{name}.json").write_text(content)
    metadata = Path(folders.build_visual_cot(tmp_path)[0]["metadata"]) / "metadata"
    (metadata / "vsr_cot_train.jsonl").write_text('{"question": "Q?", "bbox": [1, 2, 3, 4]}\n')
    with pytest.raises(ConfigError) as caught:
        read_config(config_class, flags.replace("TMP", str(tmp_path)).split())
    for words, line in zip(said.strip().splitlines(), str(caught.value).splitlines(), strict=True):
        assert words.strip().replace("TMP", str(tmp_path)) in line


def test_the_tables_are_read_from_the_hub_by_default():
    assert read_config(SaliencyConfig, ["--out", "x"]).data == "peterant330/saliency-r1-8k"
    assert read_config(RefocusConfig, ["--out", "x"]).data == "ReFocus/ReFocus_Data"
