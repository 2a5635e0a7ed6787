"""`python -m data.check`: figures of a data set, everything wrong with it, and a sheet that shows the alignment."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import GOOD, two, without, write_jsonl
from PIL import Image

from data.check import NOTES, CheckConfig, describe, draw_sheet, evenly, main, region_share
from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError
from sayo.model import prompts
from sayo.model.prompts import token_cells
from sayo.settings import ConfigError, read_config


def test_figures_of_a_small_data_set(folder):
    rows = [
        GOOD | {"id": "half", "boxes": [[0, 0, 20, 30]]},
        GOOD | {"id": "again", "question": "What color?", "answer": "Red", "boxes": [[0, 0, 40, 30]]},
        GOOD | {"id": "same", "boxes": [[0, 0, 4, 3], [36, 27, 40, 30]]},
        two([[], [[0, 0, 10, 50]]], id="two", answer="blue", choices=["red", "blue"]),
        without("boxes") | {"id": "bare", "question": "Why?"},
        without("boxes") | {"id": "triangle", "question": "Who?", "polygons": [[[0, 0], [40, 0], [0, 30]]]},
    ]
    found = describe(load_examples(write_jsonl(folder, *rows), require_boxes=False), "xyxy")
    figures = found["figures"]
    assert figures["pictures of a row"] == {"min": 1, "median": 1.0, "max": 2, "rows": 6}
    assert figures["boxes of a row"] == {"min": 1, "median": 1.0, "max": 2, "rows": 4}
    assert figures["polygons of a row"]["rows"] == 1 and figures["choices of a row"]["max"] == 2
    assert figures["picture width"] == {"min": 20, "median": 40, "max": 40}
    shares = figures["share of a picture in its region"]
    assert shares["min"] == pytest.approx(2 * 12 / 1200, abs=1e-3) and shares["max"] == 1
    assert shares["median"] == pytest.approx(0.5, abs=0.02)
    assert found["answers"] == {"distinct": 2, "most common": [("red", 5 / 6), ("blue", 1 / 6)]} | {
        "compared as": {"text": 5, "choices": 1}
    }
    large, small, missing, repeated = NOTES[:4]
    assert found["notes"] == [
        f"1 rows {large}, first 'again'",
        f"1 rows {missing}, first 'bare'",
        f"1 rows {repeated}, first 'same'",
    ]
    assert "more than half" in large and "no region: give --regions attention" in missing and "repeat" in repeated


ANSWERS = [  # what a row has beside its picture, the notes about it
    ({"answer": "Red"}, ()),
    ({"answer": "\\frac12"}, ("in LaTeX and no answer_type",)),
    ({"answer": "\\frac12", "answer_type": "math"}, ()),
    ({"answer": "So 6. #### 6"}, ("not read as it is written, first 'row': 'So 6. #### 6' as '6'",)),
    ({"answer": 1, "choices": ["red", "blue"]}, ("not read as it is written, first 'row': 1 as 'blue'",)),
    ({"answer": "A", "choices": ["red", "blue"]}, ()),
    ({"answer": "A", "choices": ["B", "A", "2"]}, ("the text counts",)),
    ({"answer": 3, "choices": [1, 2, 3, 4]}, ("the text counts",)),
    ({"answer": 3, "choices": [0, 1, 2, 3]}, ()),
    ({"answer": "D", "choices": ["D", "B", "A", "C"]}, ()),  # the prompt numbers them
    ({"answer": "long " * 50}, ("only the same text matches",)),
    ({"answer": ["red", "crimson"]}, ()),
]


@pytest.mark.parametrize(("row", "words"), ANSWERS)
def test_how_an_answer_is_read_and_compared_is_said(folder, row, words):
    notes = describe(load_examples(write_jsonl(folder, GOOD | {"id": "row"} | row)), "xyxy")["notes"]
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize("size", [(100, 80), (4000, 3000), (1, 200)])
def test_the_share_of_a_region_is_its_area(size):
    width, height = size
    box = [0, height // 4, width, height // 2]
    assert region_share([box], [], None, size) == pytest.approx(0.25, abs=0.01)
    triangle = [[[0, 0], [width, 0], [0, height]]]
    assert width == 1 or region_share([], triangle, None, size) == pytest.approx(0.5, abs=0.02)
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, width, height // 2))
    assert region_share([box], [], mask, size) == pytest.approx(0.5, abs=0.01)


def test_evenly_has_both_ends_and_no_index_twice():
    assert evenly(10, 3) == [0, 4, 9] and evenly(3, 10) == [0, 1, 2] and evenly(1, 5) == [0]
    assert len(evenly(20_000, 200)) == 200


def test_everything_wrong_is_printed_and_the_exit_says_so(folder, capsys):
    bad = [GOOD | {"boxes": [[1, 2, 500, 600]]}, without("answer"), GOOD | {"image": "cut.jpg"}]
    data = write_jsonl(folder, GOOD, *bad)
    config = CheckConfig(data=data, report=str(folder / "report.json"))
    with pytest.raises(DataError, match="3 bad rows"):
        main(config)
    printed = capsys.readouterr().out
    assert "1 good rows, 3 bad" in printed
    assert [f"train.jsonl:{line}" in printed for line in (1, 2, 3, 4)] == [False, True, True, True]
    report = json.loads((folder / "report.json").read_text())
    assert len(report["bad_rows"]) == 3 and "500, 600" in report["bad_rows"][0]
    main(CheckConfig(data=write_jsonl(folder, GOOD)))
    assert "1 good rows, 0 bad" in capsys.readouterr().out


def test_prompts_are_measured_with_a_models_processor(folder, capsys, model_folders):
    config = CheckConfig(data=write_jsonl(folder, GOOD), model=model_folders["internvl"])
    main(config)
    printed = capsys.readouterr().out
    assert "image tokens in the region (1 prompts)" in printed
    data = write_jsonl(folder, GOOD, GOOD | {"question": "Is it <IMG_CONTEXT>?"})
    with pytest.raises(DataError, match="1 bad rows"):
        main(CheckConfig(data=data, model=model_folders["internvl"]))
    assert "remove <IMG_CONTEXT>" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "smolvlm"])
def test_the_sheet_is_red_where_the_boxes_are(folder, policies, family):
    Image.new("RGB", (168, 168), (128, 128, 128)).save(folder / "gray.png")
    row = GOOD | {"image": "gray.png", "boxes": [[0, 0, 84, 168]], "question": "Costs $5 or $6?", "id": "a $ b"}
    examples = load_examples(write_jsonl(folder, row))
    draw_sheet(examples[:1], policies[family][1], None, folder / "sheet.png")
    pixels = np.asarray(Image.open(folder / "sheet.png").convert("RGB")).astype(int)
    gray = (abs(pixels - 128) <= 2).all(-1)
    tinted = (pixels[..., 0] > pixels[..., 1] + 40) & (abs(pixels[..., 1] - pixels[..., 2]) < 20)
    columns = np.nonzero(gray.sum(0) > 100)[0], np.nonzero(tinted.sum(0) > 100)[0]
    assert len(columns[0]) > 50 and len(columns[1]) > 50
    assert columns[1].mean() < columns[0].mean()  # the left half is covered
    draw_sheet(examples[:1], None, None, folder / "plain.png")
    plain = np.asarray(Image.open(folder / "plain.png").convert("RGB")).astype(int)
    assert not ((plain[..., 0] > plain[..., 1] + 40) & (abs(plain[..., 1] - plain[..., 2]) < 20)).any()


def test_the_command_takes_the_file_first(folder):
    write_jsonl(folder, GOOD, two([[[1, 1, 9, 9]], [[2, 2, 8, 8]]], id="two"))
    Image.new("L", (40, 30), 255).save(folder / "mask.png")
    write_jsonl(folder, GOOD, without("boxes") | {"mask": "mask.png", "id": "m"}, name="more.jsonl")
    for name in ("train.jsonl", "more.jsonl"):
        command = [sys.executable, "-m", "data.check", str(folder / name), "--sheet", str(folder / "sheet.png")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert "2 good rows, 0 bad" in done.stdout
        assert Image.open(folder / "sheet.png").size[0] >= 800


@pytest.mark.parametrize("size", [(4000, 1007), (1007, 4000), (333, 5000), (257, 256)])
def test_a_strip_at_the_far_edge_has_a_share(size):
    width, height = size
    for box in ([0, height - 2, width, height], [width - 2, 0, width, height]):
        assert 0 < region_share([box], [], None, size) < 0.06


def test_pictures_one_pixel_wide_are_drawn(folder, policies):
    for number, size in enumerate([(1, 1), (1, 100), (100, 1)]):
        Image.new("RGB", size, "gray").save(folder / f"{number}.png")
        row = GOOD | {"image": f"{number}.png", "boxes": [[0, 0, *size]]}
        examples = load_examples(write_jsonl(folder, row))
        for family in ("qwen3_vl", "internvl", "smolvlm"):
            draw_sheet(examples[:1], policies[family][1], None, folder / "thin.png")
            assert Image.open(folder / "thin.png").size[0] > 100


def test_cells_of_a_large_picture_are_the_same_up_to_the_steps_of_its_ramp(policies, monkeypatch):
    picture = Image.new("RGB", (500, 300))
    fine = token_cells(policies["internvl"][1], picture)
    monkeypatch.setattr(prompts, "LARGE_PICTURE", 1000)
    coarse = token_cells(policies["internvl"][1], picture)
    assert (fine - coarse).abs().max() < 2 * 500 / 255


def test_problems_of_the_settings_are_named_before_the_work(folder):
    (folder / "file").write_text("")
    for sheet, said in [("sheet.jpg", ""), (str(folder), "can be written"), (f"{folder}/file/x.png", "can be written")]:
        with pytest.raises(ConfigError, match=f"(?s)num_examples=0.*sheet='{sheet}'.*{said}"):
            read_config(CheckConfig, ["--sheet", sheet, "--num_examples", "0"])


def test_letters_that_no_font_has_are_named_and_those_of_other_fonts_are_drawn(folder, capsys, monkeypatch):
    from matplotlib import font_manager

    plain = [entry for entry in font_manager.fontManager.ttflist if entry.style == "normal" and entry.weight == 400]
    has = {
        entry.name: set(font_manager.get_font(entry.fname).get_charmap()) for entry in plain if "Last" not in entry.name
    }
    stix = sorted(has["STIXGeneral"] - set().union(*(letters for name, letters in has.items() if "STIX" not in name)))
    letter = next(chr(code) for code in stix if chr(code).isprintable() and code > 126)
    nobody = "\U00013000"  # an Egyptian hieroglyph
    monkeypatch.setattr(
        font_manager.fontManager, "ttflist", [entry for entry in plain if ord(nobody) not in has.get(entry.name, ())]
    )
    sheets = []
    for text in ("What?", f"What{letter}", f"What{letter}{nobody}"):
        examples = load_examples(write_jsonl(folder, GOOD | {"question": text, "id": "a"}))
        draw_sheet(examples[:1], None, None, folder / "sheet.png")
        sheets.append((folder / "sheet.png").read_bytes())
        said = capsys.readouterr().err
        assert (f"no installed font has the 1 letters {nobody}: " in said) == (nobody in text)
        assert nobody in text or not said
    assert len(set(sheets)) == 3
