"""Plots: what is drawn is what was measured, as PNG and SVG, and input that cannot be drawn is named."""

import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import visualize
from evaluate import Answer
from sayo.settings import ConfigError, read_config
from sayo.show import plots
from sayo.show.plots import both, plot_curves, plot_entropy, plot_generation, plot_tas_accuracy
from sayo.show.tables import bootstrap_interval
from visualize import VisualizeConfig, main


def write_metrics(folder, values: list[float], **more: list[float]):
    """metrics.jsonl with a TAS, and further metrics, of each step."""
    folder.mkdir(parents=True)
    rows = [{"step": step + 1, "reward/tas": value, "kl": None, "entropy": 1.0} for step, value in enumerate(values)]
    rows = [row | {name: own[step] for name, own in more.items()} for step, row in enumerate(rows)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "metrics.jsonl"


def answer_of(target: list[float], image: list[float], entropies: list[float], covered: float = 1.0) -> Answer:
    values = [torch.tensor(part, dtype=torch.float32) for part in (entropies, target, image)]
    count = len(target)
    return Answer(torch.zeros(count), ["x"] * count, *values, [], {}, "", False, torch.tensor([covered, 0.0]))


def texts_of(svg) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg.read_text(encoding="utf-8")))


def drawn(monkeypatch, method: str = "plot") -> list[tuple]:
    """(x, y, options) of every line that is drawn from here on."""
    from matplotlib.axes import Axes

    lines, draw = [], getattr(Axes, method)

    def spy(self, x, y, *args, **options):
        lines.append((np.atleast_1d(x), np.atleast_1d(y), options))
        return draw(self, x, y, *args, **options)

    monkeypatch.setattr(Axes, method, spy)
    return lines


def test_bins_hold_the_mean_of_each_completion():
    places = [np.array([0.05, 0.15, 0.95]), np.array([0.5]), np.array([0.1, 1.0])]
    values = [np.array([1.0, 3.0, 5.0]), np.array([7.0]), np.array([9.0, 11.0])]
    first, second = plots.bin_means(places, values, np.array([0, 0.5, 1]))
    assert first.tolist() == [2.0, 9.0] and second.tolist() == [5.0, 7.0, 11.0]


def test_attention_over_the_generation_is_the_mean_over_completions(monkeypatch, tmp_path):
    lines = drawn(monkeypatch)
    short = answer_of([0.1, 0.2], [0.05, 0.01], [1.0, 1.0])
    long = answer_of([0.3, 0.3, 0.4, 0.6], [0.01, 0.03, 0.05, 0.05], [1.0] * 4)
    nowhere = answer_of([9.0], [9.0], [1.0], covered=0.0)  # no region: no target
    plot_generation({"base": [short, long, nowhere]}, both(tmp_path / "plot"), num_bins=2)
    (x, target, _), (_, image, _) = lines
    assert x == pytest.approx([0.25, 0.75])
    assert target == pytest.approx([100 * (0.1 + 0.3) / 2, 100 * (0.2 + 0.5) / 2])  # percent
    assert image == pytest.approx([100 * (0.05 + 0.02) / 2, 100 * (0.01 + 0.05) / 2])
    words = texts_of(tmp_path / "plot.svg")
    assert "base (2 completions)" in words and "mean attention (%, log scale)" in words
    assert Image.open(tmp_path / "plot.png").size[0] > 400


def test_attention_against_entropy_has_equally_many_tokens_in_a_bin(monkeypatch, tmp_path):
    lines = drawn(monkeypatch)
    one = answer_of([0.1, 0.2, 0.3, 0.4], [0.1] * 4, [0.0, 0.01, 1.0, 2.0])
    plot_entropy({"base": [one], "adapter": [one]}, both(tmp_path / "plot"), num_bins=2)
    assert len(lines) == 4
    x, target, _ = lines[0]
    # Entropies below 1e-4 are drawn at 1e-4; a bin stands at the geometric mean of its tokens.
    assert x == pytest.approx([math.sqrt(1e-4 * 0.01), math.sqrt(2.0)])
    assert target == pytest.approx([15.0, 35.0])


@pytest.mark.parametrize("plot", [plot_generation, plot_entropy])
def test_nothing_to_draw_is_an_empty_plot(plot, tmp_path):
    answers = {"base": [answer_of([], [], []), answer_of([0.1], [0.1], [0.0], covered=0.0)], "adapter": []}
    plot(answers, both(tmp_path / "plot"))
    plot({"base": [answer_of([0.1], [0.1], [0.3])]}, both(tmp_path / "one"))
    assert (tmp_path / "plot.svg").exists() and (tmp_path / "one.png").exists()


def rows_of(tas, accuracy) -> list[dict]:
    return [{"tas": one, "accuracy": other} for one, other in zip(tas, accuracy, strict=True)]


def test_points_and_bins_of_tas_and_accuracy(monkeypatch, tmp_path):
    points = drawn(monkeypatch, "errorbar")
    rng = np.random.default_rng(0)
    tas, accuracy = rng.random(50).tolist(), rng.integers(0, 2, 50).astype(float).tolist()
    columns = {"base": rows_of([*tas, None, math.nan], [*accuracy, 1.0, 1.0]), "adapter": rows_of([0.9], [1.0])}
    plot_tas_accuracy({"tiny": columns, "no regions": {"base": rows_of([None], [1.0])}}, both(tmp_path / "plot"))
    assert len(points) == 4
    (x, y, options), (bins_x, bins_y, bin_options) = points[:2]
    mean, low, high = bootstrap_interval(accuracy, resamples=plots.RESAMPLES)
    assert (x[0], y[0]) == pytest.approx((np.mean(tas), mean))
    assert np.ravel(options["yerr"]) == pytest.approx([mean - low, high - mean])
    order = np.argsort(tas)
    assert bins_x == pytest.approx([np.mean(np.array(tas)[part]) for part in np.split(order, 5)])
    assert bins_y == pytest.approx([np.mean(np.array(accuracy)[part]) for part in np.split(order, 5)])
    assert np.shape(bin_options["yerr"]) == (2, 5)
    words = texts_of(tmp_path / "plot.svg")
    assert "tiny: base (n = 50)" in words and "tiny: adapter (n = 1)" in words and "no regions" not in words


def test_evaluations_are_read_and_others_are_named(tmp_path):
    good = tmp_path / "good.json"
    good.write_text(json.dumps({"rows": {"base": rows_of([0.5, None], [1.0, 0.0])}}), encoding="utf-8")
    (tmp_path / "more").mkdir()
    twin = tmp_path / "more" / "good.json"
    twin.write_text(good.read_text())
    found = plots.read_evaluations([good, twin])
    assert list(found) == ["good", str(twin)] and found["good"]["base"][0] == {"tas": 0.5, "accuracy": 1.0}
    texts = "[]", "not json", '{"rows": {}}', '{"rows": {"base": [{"tas": 1}]}}', '{"rows": []}'
    for number, text in enumerate(texts):
        bad = tmp_path / f"bad{number}.json"
        bad.write_text(text)
        with pytest.raises(ConfigError, match=rf"bad{number}\.json.*evaluate\.py --json"):
            plots.read_evaluations([bad])


def test_several_runs_share_the_panels(tmp_path, monkeypatch):
    paths = [write_metrics(tmp_path / name, [0.5, 0.6, value]) for name, value in (("a", 0.7), ("b", 0.9))]
    paths.append(tmp_path / "empty" / "metrics.jsonl")
    paths[-1].parent.mkdir()
    paths[-1].write_text("")
    lines = drawn(monkeypatch)
    plot_curves(paths, both(tmp_path / "curves"))
    assert [values.tolist() for _, values, _ in lines if 0.9 in values] == [[0.5, 0.6, 0.9]]
    words = texts_of(tmp_path / "curves.svg").split()
    assert {"a", "b", "Target"} <= set(words) and "empty" not in words
    plot_curves(paths, both(tmp_path / "again"))
    for name in ("curves", "again"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 1000
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "curves.svg").read_bytes()  # same data, same file


COMPONENTS = {  # reward, share of the advantage and deviation in two steps
    "attention": ([0.1, 0.2], [0.5, 0.0], [0.3, 0.3]),
    "format": ([1.0, 1.0], [0.0, 0.0], [0.0, 1e-4]),  # always right: no share, although it is rewarded
    "accuracy": ([0.3, 0.4], [0.0, 0.0], [0.4, 0.4]),  # always shown
    "region": ([0.5, 0.6], [0.0, 0.0], [0.2, 0.2]),  # varies without a share: no weight
    "memory": ([0.7, 0.8], [0.0, -0.1], [0.2, 0.2]),
    "brevity": ([0.85, 0.95], [None, 0.2], [None, 0.1]),  # known to no other file
}


def test_every_component_that_was_rewarded_is_drawn(monkeypatch, tmp_path):
    kinds = ("reward", "advantage_share", "reward_std")
    more = {
        f"{kind}/{name}": own for name, values in COMPONENTS.items() for kind, own in zip(kinds, values, strict=True)
    }
    path, lines = write_metrics(tmp_path / "run", [0.55, 0.65], **more), drawn(monkeypatch)
    plot_curves(path, both(tmp_path / "curves"))
    ys = [y.tolist() for _, y, _ in lines]
    for name, (reward, share, _) in COMPONENTS.items():
        assert (reward in ys) == (name != "region")
        assert name == "region" or [value for value in share if value is not None] in ys
    words = texts_of(tmp_path / "curves.svg").split()
    assert [words.count(name) for name in COMPONENTS] == [2, 2, 2, 0, 2, 2]  # two legends
    looks = {(str(look["color"]), str(look["linestyle"])) for *_, look in lines if "linestyle" in look}
    assert len(looks) == 5 and len(set(plots.COLORS)) == len(set(map(str, plots.STYLES))) == 7


def test_runs_are_called_by_what_tells_them_apart(tmp_path):
    assert plots.run_names([tmp_path / "a" / "metrics.jsonl"]) == ["a"]
    same = [tmp_path / "x" / "sayo" / "metrics.jsonl", tmp_path / "y" / "sayo" / "metrics.jsonl"]
    assert plots.run_names(same) == ["x/sayo", "y/sayo"]


def test_the_command_writes_what_its_inputs_allow(tmp_path, monkeypatch):
    metrics = [str(write_metrics(tmp_path / name, [0.5, 0.6])) for name in "ab"]
    evaluation = tmp_path / "good.json"
    evaluation.write_text(json.dumps({"rows": {"base": rows_of([0.5, 0.7], [1.0, 0.0])}}), encoding="utf-8")
    monkeypatch.setattr(visualize, "load_policy", None)  # no model is needed
    folder = tmp_path / "new" / "analysis"
    main(VisualizeConfig(metrics=metrics, evaluations=[str(evaluation)], plots=str(folder)))
    expected = ["curves.png", "curves.svg", "tas_accuracy.png", "tas_accuracy.svg"]
    assert sorted(path.name for path in folder.iterdir()) == expected
    main(VisualizeConfig(metrics=metrics, output=str(tmp_path / "curves.pdf")))
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_the_command_asks_the_policy_when_there_is_nothing_else(tmp_path):
    main(VisualizeConfig(plots=str(tmp_path / "analysis"), limit=3, max_new_tokens=12))
    found = sorted(path.name for path in (tmp_path / "analysis").glob("*.svg"))
    assert found == ["attention_against_entropy.svg", "attention_over_generation.svg", "tas_accuracy.svg"]
    assert "base (3 completions)" in texts_of(tmp_path / "analysis" / "attention_over_generation.svg")


def test_out_is_output_and_what_cannot_be_is_said_at_once(tmp_path):
    assert read_config(VisualizeConfig, ["--out", "x.html"]).output == "x.html"
    assert read_config(VisualizeConfig, ["--output", "x.png", "--index", "3", "4"]).index == [3, 4]
    metrics = str(write_metrics(tmp_path / "run", [0.5]))
    wrong = ["--metrics", metrics, "gone.jsonl", "--evaluations", "gone.json", "--out", "x.html", "--megabytes", "0"]
    with pytest.raises(ConfigError) as error:
        read_config(VisualizeConfig, wrong)
    for part in ("metrics='gone.jsonl'", "evaluations='gone.json'", "--plots FOLDER", "output='x.html'", "megabytes"):
        assert part in str(error.value)
    with pytest.raises(ConfigError, match="plots=.*folder"):
        read_config(VisualizeConfig, ["--plots", metrics])
