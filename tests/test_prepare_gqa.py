"""GQA: which rows and boxes come out, and everything that all preparation scripts have in common."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from prepare_folders import HEIGHT, WIDTH, build_gqa, contents, gqa_question, read_lines, read_report

from config import ConfigError, read_config
from data import prepare, prepare_gqa
from data.examples import DataError, load_examples, load_picture
from data.prepare_gqa import GqaConfig, convert, main
from data.prepare_rows import Dropped, Picture, inspect_picture


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_ROWS", 7)


@pytest.fixture
def gqa(tmp_path):
    return build_gqa(tmp_path / "gqa")


def config(gqa, out, **more) -> GqaConfig:
    return GqaConfig(**gqa[0], out=str(out), **{"num_processes": 1} | more)


def test_rows_and_boxes(gqa, tmp_path):
    files, boxes, reasons = gqa
    report = main(config(gqa, tmp_path / "out", num_processes=2))
    rows = read_lines(tmp_path / "out")
    assert {row["id"]: row["boxes"] for row in rows} == boxes
    assert report["dropped"] == {reason: len(keys) for reason, keys in reasons.items()}
    for reason, keys in reasons.items():
        if reason != "no imageId":  # that row's id is read together with its picture
            assert [named.split(":")[0] for named in report["examples_of_dropped"][reason]] == keys
    assert report["kept"] == len(boxes) and report["read"] == report["rows_of_source"] == len(boxes) + len(reasons)
    questions = json.loads(Path(files["questions"]).read_text(encoding="utf-8"))
    for row in rows:
        assert list(row) == ["id", "image", "question", "answer", "boxes", "source"] and row["source"] == "gqa"
        assert (row["question"], row["answer"]) == (questions[row["id"]]["question"], questions[row["id"]]["answer"])
        assert row["image"] == f"../gqa/images/{questions[row['id']]['imageId']}.jpg"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "settings.json", "train.jsonl"]


def test_the_loader_takes_the_folder(gqa, tmp_path, monkeypatch, capsys):
    """The pictures are elsewhere: the command, the loader's message and its argument name the same flag."""
    main(config(gqa, tmp_path / "out"))
    assert f"give --allowed_folders {gqa[0]['images']} beside it" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(DataError, match=f"lies outside of(?s:.*)--allowed_folders {gqa[0]['images']}$"):
        load_examples(str(tmp_path / "out" / "train.jsonl"))
    examples = load_examples(str(tmp_path / "out" / "train.jsonl"), allowed_folders=[gqa[0]["images"]])
    assert {example["id"]: example["boxes"] for example in examples} == gqa[1] and not examples.skipped


def test_copied_pictures_keep_their_bytes(gqa, tmp_path):
    main(config(gqa, tmp_path / "out", copy_images=True, num_processes=2))
    rows = read_lines(tmp_path / "out")
    assert {row["image"] for row in rows} == {f"images/{p.name}" for p in (tmp_path / "out" / "images").iterdir()}
    for row in rows:
        name = Path(row["image"]).name
        assert (tmp_path / "out" / row["image"]).read_bytes() == (Path(gqa[0]["images"]) / name).read_bytes()
    assert len(load_examples(str(tmp_path / "out" / "train.jsonl"))) == len(gqa[1])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("annotated", ["stored", "shown"])
def test_boxes_turn_with_their_picture(tmp_path, orientation, annotated):
    """A red patch in a picture that EXIF turns: its box, in pixels of either version, is where a viewer shows it."""
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    picture.paste((255, 0, 0), (4, 6, 14, 11))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "1.png", exif=exif)
    shown = load_picture(tmp_path / "1.png")
    expected = list(shown.point(lambda value: 255 - value).getchannel("G").getbbox())
    if annotated == "shown" or orientation <= 4:  # a mirrored picture has the same size: nothing tells which is meant
        (x1, y1, x2, y2), (width, height) = expected, shown.size
    else:
        (x1, y1, x2, y2), (width, height) = (4, 6, 14, 11), (WIDTH, HEIGHT)
    graph = {"width": width, "height": height, "objects": {"11": {"x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1}}}
    row = gqa_question("1", question={"0": "11"}) | {"graph": graph}
    assert convert(row, inspect_picture(tmp_path / "1.png"))["boxes"] == [expected]


def test_convert_is_a_function_of_one_row():
    graph = {"width": 8, "height": 8, "objects": {"7": {"x": 1, "y": 2, "w": 3, "h": 4}}}
    row = {"question": "Q?", "answer": 3, "imageId": "1", "annotations": {"answer": {"0": "7"}}, "graph": graph}
    assert convert(row, Picture(8, 8)) == {"question": "Q?", "answer": "3", "boxes": [[1, 2, 4, 6]]}
    with pytest.raises(Dropped, match="another form"):
        convert(row | {"graph": {"objects": {"7": {"x": 1}}, "width": 8, "height": 8}}, Picture(8, 8))


# --- subset, order, processes ------------------------------------------------------------------------------------


def test_a_subset_is_the_beginning_of_the_whole_order(gqa, tmp_path):
    main(config(gqa, tmp_path / "all", seed=3))
    report = main(config(gqa, tmp_path / "some", seed=3, limit=20, num_processes=2))
    assert read_lines(tmp_path / "some") == read_lines(tmp_path / "all")[:20]
    assert report["kept"] == 20 and report["read"] == 20 + sum(report["dropped"].values()) < report["rows_of_source"]
    main(config(gqa, tmp_path / "other", seed=4, limit=20))
    assert read_lines(tmp_path / "other") != read_lines(tmp_path / "some")


def test_fewer_rows_than_asked_for_are_said(gqa, tmp_path, capsys):
    report = main(config(gqa, tmp_path / "out", limit=1000))
    assert (report["kept"], report["asked_for"]) == (len(gqa[1]), 1000)
    assert "fewer than the 1,000 rows asked for" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [None, 25])
def test_several_processes_give_the_same_bytes(gqa, tmp_path, limit):
    for processes in (1, 2, 3):
        main(config(gqa, tmp_path / str(processes), copy_images=True, limit=limit, num_processes=processes))
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")


def test_no_more_processes_than_shards(gqa, tmp_path, monkeypatch):
    started, executor = [], prepare.ProcessPoolExecutor
    monkeypatch.setattr(
        prepare, "ProcessPoolExecutor", lambda number, **more: started.append(number) or executor(number, **more)
    )
    report = main(config(gqa, tmp_path / "out", num_processes=60))
    assert started == [-(-report["rows_of_source"] // prepare.SHARD_ROWS)]
    monkeypatch.setattr(prepare, "SHARD_ROWS", 1000)
    main(config(gqa, tmp_path / "one", num_processes=60))
    assert len(started) == 1  # one shard is worked on without another process


def test_duplicates(gqa, tmp_path):
    path = Path(gqa[0]["questions"])
    questions = json.loads(path.read_text(encoding="utf-8"))
    twin = json.dumps({"twin": questions["00"]})[1:-1]
    again = json.dumps({"01": questions["02"] | {"question": "Another one?"}})[1:-1]  # a key that is there already
    path.write_text(path.read_text(encoding="utf-8")[:-1] + f", {twin}, {again}}}", encoding="utf-8")
    report = main(config(gqa, tmp_path / "out"))
    assert report["dropped"]["duplicate (picture, question, answer)"] == report["dropped"]["duplicate id"] == 1
    assert report["kept"] == len(gqa[1])


# --- stops -------------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(gqa, tmp_path):
    main(config(gqa, tmp_path / "whole", copy_images=True, limit=40))
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("after", [0, 1, 10, 39])
def test_a_run_that_failed_goes_on(gqa, tmp_path, whole, monkeypatch, after):
    """An error in the middle of a shard, as when the disk is full; then the same command with other processes."""
    calls = iter(range(after))

    def failing(row, picture):
        if next(calls, None) is None:
            raise OSError(28, "No space left on device")
        return convert(row, picture)

    monkeypatch.setattr(prepare_gqa, "convert", failing)
    with pytest.raises(DataError, match="No space left.*run the same command again"):
        main(config(gqa, tmp_path / "out", copy_images=True, limit=40))
    before = len(list((tmp_path / "out" / ".work").glob("0?????")))
    assert before == len([path for path in (tmp_path / "out" / ".work").iterdir() if path.name.isdigit()])
    counted = []
    monkeypatch.setattr(prepare_gqa, "convert", lambda row, picture: counted.append(1) or convert(row, picture))
    main(config(gqa, tmp_path / "out", copy_images=True, limit=40))
    assert contents(tmp_path / "out") == whole
    assert len(counted) <= 7 * -(-52 // 7) - 7 * before + 7  # finished shards were not worked on again


def slow_main(config: GqaConfig) -> None:
    def slow(row, picture):
        time.sleep(0.01)
        return convert(row, picture)

    os.setpgrp()
    prepare_gqa.convert = slow
    main(config)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_run_that_was_killed_goes_on(gqa, tmp_path, whole, processes, shards):
    out = tmp_path / "out"
    settings = {"copy_images": True, "limit": 40}
    run = multiprocessing.get_context("fork").Process(
        target=slow_main, args=(config(gqa, out, num_processes=processes, **settings),)
    )
    run.start()
    while len([path for path in out.glob(".work/*") if path.name.isdigit()]) < shards:
        assert run.is_alive()
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.join()
    assert not (out / "report.json").exists() and not (out / "train.jsonl").exists()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # its workers end, too
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.02)
    else:
        pytest.fail("workers outlived their parent")
    main(config(gqa, out, num_processes=3 - processes, **settings))
    assert contents(out) == whole


def test_a_stop_between_the_last_two_files(gqa, tmp_path, whole, monkeypatch):
    def stop(path, value):
        if path.name == "report.json":
            raise KeyboardInterrupt
        return write_json(path, value)

    write_json = prepare.write_json
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare, "write_json", stop)
        main(config(gqa, tmp_path / "out", copy_images=True, limit=40))
    main(config(gqa, tmp_path / "out", copy_images=True, limit=40))
    assert contents(tmp_path / "out") == whole


def test_a_complete_folder_is_not_worked_on_again(gqa, tmp_path, whole, monkeypatch, capsys):
    monkeypatch.setattr(prepare_gqa, "open_rows", None)
    monkeypatch.setattr(prepare_gqa, "convert", None)
    report = main(config(gqa, tmp_path / "whole", copy_images=True, limit=40))
    assert report["kept"] == 40 and "kept" in capsys.readouterr().out
    assert contents(tmp_path / "whole") == whole


def test_a_killed_worker_is_said(gqa, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_gqa, "convert", lambda row, picture: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="a worker process was killed; run the same command again"):
        main(config(gqa, tmp_path / "out", num_processes=2))


def test_a_source_that_changed_is_refused(gqa, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "write_shard", lambda *_: (_ for _ in ()).throw(OSError("stop")))
    with pytest.raises(DataError, match="stop"):
        main(config(gqa, tmp_path / "out"))
    monkeypatch.setattr(prepare_gqa.Questions, "__len__", lambda self: 3)
    with pytest.raises(DataError, match="before the stop and has 3 now; start again: --overwrite"):
        main(config(gqa, tmp_path / "out"))


# --- settings and errors -----------------------------------------------------------------------------------------


def test_other_settings_are_refused_by_name(gqa, tmp_path, whole):
    with pytest.raises(ConfigError, match="(?s)other settings.*limit was 40, now it is 20.*seed was 0, now it is 1"):
        main(config(gqa, tmp_path / "whole", copy_images=True, limit=20, seed=1))
    assert contents(tmp_path / "whole") == whole
    with pytest.raises(ConfigError, match="size of questions was"):
        Path(gqa[0]["questions"]).write_bytes(Path(gqa[0]["questions"]).read_bytes() + b" ")
        main(config(gqa, tmp_path / "whole", copy_images=True, limit=40))
    main(config(gqa, tmp_path / "whole", limit=20, overwrite=True))
    assert len(read_lines(tmp_path / "whole")) == 20 and not (tmp_path / "whole" / "images").exists()


def test_a_folder_of_something_else_is_left_alone(gqa, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds something else already"):
            main(config(gqa, out, overwrite=overwrite))
    assert contents(out) == {"chapter.tex": b"precious"}


@pytest.mark.parametrize("where", ["file/x", "file", "/proc/x"])
def test_a_folder_that_cannot_be_made_is_said(gqa, tmp_path, where):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ConfigError, match="(?s)^out=.*(holds something else|cannot be made or written).*give a"):
        main(config(gqa, tmp_path / where))
    assert (tmp_path / "file").read_text() == "precious"


def test_no_row_left(gqa, tmp_path):
    Path(gqa[0]["questions"]).write_text(json.dumps({"1": gqa_question("n1")}))
    for _ in range(2):
        with pytest.raises(DataError, match="no row of gqa can be used"):
            main(config(gqa, tmp_path / "out"))
    assert read_report(tmp_path / "out")["dropped"] == {"no annotated object": 1}


def test_all_problems_at_once(gqa, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken.json"
    broken.write_text('{"1": {"question": ')
    (tmp_path / "testdev.json").write_text('{"1": {"question": "Q?", "imageId": "n1"}}')
    arguments = f"--questions {tmp_path}/testdev.json --scene_graphs {broken} --images {tmp_path}/empty --limit 0"
    with pytest.raises(ConfigError) as caught:
        read_config(GqaConfig, [*arguments.split(), "--seed=-1", "--tolerance", "2"])
    for said in (
        "out is missing: give --out",
        "limit=0: give 1 or more",
        "seed=-1: give 0 or more",
        "tolerance=2.0: give 0 to 1",
        "entry '1' has no answer, annotations; it has question, imageId",
        "is not one JSON object, or is cut off: the entry at byte 1",
        "the folder holds no .jpg",
    ):
        assert said in str(caught.value), said
    with pytest.raises(
        ConfigError, match="(?s)questions='gone.json': there is no such file.*images='gone': there is no"
    ):
        read_config(GqaConfig, ["--questions", "gone.json", "--images", "gone", "--scene_graphs", str(broken)])


def test_files_that_hold_something_else(tmp_path):
    (tmp_path / "list.json").write_text('[{"question": "Q?"}]')
    (tmp_path / "none.json").write_text("{}")
    (tmp_path / "odd.json").write_text('{"1": "Q?"}')
    assert "is not one JSON object" in prepare_gqa.entry_problems("questions", f"{tmp_path}/list.json", ["a"])[0]
    assert "there is nothing in it" in prepare_gqa.entry_problems("questions", f"{tmp_path}/none.json", ["a"])[0]
    assert "has no a; it is 'Q?'" in prepare_gqa.entry_problems("questions", f"{tmp_path}/odd.json", ["a"])[0]


def test_pictures_through_a_link(gqa, tmp_path):
    """The paths count from where OUT really is, and keep the names that the pictures have."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    (tmp_path / "store").mkdir()
    picture = Path(gqa[0]["images"]) / "0.jpg"
    picture.rename(tmp_path / "store" / "blob")
    picture.symlink_to(tmp_path / "store" / "blob")
    main(config(gqa, tmp_path / "link" / "out"))
    assert {row["image"] for row in read_lines(tmp_path / "link" / "out")} >= {"../../../gqa/images/0.jpg"}
    assert len(load_examples(str(tmp_path / "link" / "out" / "train.jsonl"), allowed_folders=[str(tmp_path)])) == len(
        gqa[1]
    )


def test_half_a_character_is_dropped(gqa, tmp_path):
    path = Path(gqa[0]["questions"])
    question = json.dumps(gqa_question("n1", "what \ud800?", question={"0": "11"}))
    path.write_text('{"half": ' + question + "," + path.read_text(encoding="utf-8")[1:], encoding="utf-8")
    report = main(config(gqa, tmp_path / "out"))
    assert report["dropped"]["question that is not text"] == 1 and report["kept"] == len(gqa[1])
