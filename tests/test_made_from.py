"""A run that goes on is held to what it was made from: examples, model, number format."""

import json
import shutil

import pytest
from resumed_runs import assert_equal, copy_until, run

import train_rl
from config import ConfigError


def some_rows(folder, count=6, **changed):
    scenes = train_rl.load_examples("scenes", limit=count)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, scene in enumerate(scenes):
        scene["image"].save(folder / f"{index}.png")
        row = {"image": f"{index}.png", **{name: scene[name] for name in ("question", "answer", "boxes")}}
        rows.append(row | (changed if index == 3 else {}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_other_data_under_the_same_name_is_noticed_and_moved_data_is_not_other_data(tmp_path):
    data, eval_data = some_rows(tmp_path / "data"), some_rows(tmp_path / "eval", 2)
    settings = {"limit": None, "max_steps": 2, "data": data, "eval_data": eval_data}
    run(tmp_path / "run", **settings)
    go_on = settings | {"max_steps": 3, "resume": True}
    for harm in ({"answer": "seven"}, {"question": "What?"}, {"boxes": [[0, 0, 5, 5]]}):
        some_rows(tmp_path / "data", **harm)
        with pytest.raises(ConfigError, match=r"data='.*rows\.jsonl': 6, SHA-256 .* then, 6, SHA-256 .* now"):
            run(tmp_path / "run", **go_on)
    some_rows(tmp_path / "data", 5)
    with pytest.raises(ConfigError, match=r"6, SHA-256 .* then, 5, SHA-256"):
        run(tmp_path / "run", **go_on)
    some_rows(tmp_path / "data")
    shutil.copyfile(tmp_path / "data/1.png", tmp_path / "data/0.png")
    with pytest.raises(ConfigError, match="data="):
        run(tmp_path / "run", **go_on)
    some_rows(tmp_path / "eval", 2, answer="x")
    some_rows(tmp_path / "moved")
    run(tmp_path / "run", **(go_on | {"data": str(tmp_path / "moved/rows.jsonl")}))
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("model", "0123456789abcdef", True),
        ("number_format", "torch.bfloat16", True),
        ("versions", {"torch": "1"}, False),
    ],
)
def test_another_model_or_number_format_is_refused_and_another_version_said(
    undisturbed, tmp_path, capsys, name, value, is_refused
):
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    made = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(made | {name: value}))
    if is_refused:
        with pytest.raises(ConfigError, match=f"{name}: {value} then, .* now.*. The run would no longer be that"):
            run(folder, resume=True)
    else:
        run(folder, resume=True)
        assert f"{name}: {value} then" in capsys.readouterr().out
        assert_equal(folder, undisturbed)


def test_a_run_goes_on_in_its_number_format_where_auto_means_another(undisturbed, tmp_path, capsys):
    """A disconnected T4 that comes back as an L4: the message asked for what the next one refused."""
    folder = copy_until(undisturbed, tmp_path / "run", 2)
    made = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(made | {"number_format": "torch.float16"}))
    with pytest.raises(ConfigError, match="number_format: torch.float16 then, torch.float32 now, --dtype float16 is"):
        run(folder, resume=True)
    (folder / "run.json").write_text(json.dumps(made))
    run(folder, resume=True, dtype="float32")
    assert "resume: dtype was 'auto', is 'float32'" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text().count("\n") == 4
