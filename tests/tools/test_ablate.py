"""The grid: its settings, its runs through the real commands, what is made of their results, significance."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from sayo.settings import ConfigError, read_config
from tools import ablate, claims
from tools.ablate import GRID, SETS, AblateConfig
from tools.claims import CLAIMS, MARKERS, NOT_THE_PAPERS, Claim, holm, p_value, t_interval, verdict
from train_rl import Config


def test_every_row_is_a_valid_config_and_every_claim_compares_rows():
    for name, settings in GRID.items():
        if settings is not None:
            assert Config(**settings).problems() == [], name
    for claim in CLAIMS + NOT_THE_PAPERS:
        assert claim.better in GRID and claim.worse in GRID and claim.metric in ("accuracy", "tas", "length")
    compared = {row for claim in CLAIMS + NOT_THE_PAPERS for row in (claim.better, claim.worse)}
    assert len({json.dumps(settings, sort_keys=True) for settings in GRID.values()}) == len(GRID), "no row twice"
    assert compared == set(GRID), "every row is in a comparison"


def test_a_part_of_the_grid_is_a_whole_comparison():
    runs = AblateConfig(only=["attention", "base", "full"], seeds=3).runs()
    assert runs[:3] == [("base", 0), ("attention", 0), ("full", 0)], "every row of a seed before the next seed"
    assert runs[3:] == [("attention", 1), ("full", 1), ("attention", 2), ("full", 2)], "nothing of the base is random"


def test_what_cannot_be_is_named():
    with pytest.raises(ConfigError) as error:
        read_config(AblateConfig, ["--only", "atention", "--seeds", "0", "--run", "full", "--limit", "2001"])
    message = ("only='atention': rows of the grid are base, attention", "seeds=0", "run='full': give row/seed")
    assert all(words in str(error.value) for words in (*message, "limit=2001"))


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.02, 0.03, 0.025], ("holds", "+2.5 ± 1.2")),
        ([-0.02, -0.03, -0.025], ("does not hold", "-2.5 ± 1.2")),
        ([-0.02, 0.03, 0.01], ("undecided", "+0.7 ± 6.3")),
        ([0.04], ("undecided", "+4.0, one seed")),
        ([], ("not run", "-")),
    ],
)
def test_verdicts(differences, expected):
    assert verdict(differences) == expected


def result(row, seed, accuracy, tas=0.5):
    length = 20.0 if row == "base" else 22.0
    numbers = {"accuracy": accuracy, "tas": tas, "length": length, "format": 1.0, "examples": 1000}
    training = {"kl": 0.01, "advantage_share/attention": 0.75, "advantage_share/format": 0.25}
    training |= {"reward/attention": 0.2, "reward/format": 1.0, "advantage_share/accuracy": 0.0}
    found = {"row": row, "seed": seed, "settings": {}, "max_steps": 100, "training": training, "seconds": 1800}
    found |= {"settings": None, "max_steps": 0, "training": {}} if row == "base" else {}
    found |= {"sets": dict.fromkeys(SETS, numbers), "versions": {"torch": "2.14"}}
    return found | {"tokens": [["look", 0.5, 0.8], ["", 0.25, 0.1]]}


def write_result(row, seed, *numbers, **changed):
    content = json.dumps(result(row, seed, *numbers) | changed)
    Path(f"docs/ablation/runs/{row}-{seed}.json").write_text(content)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A grid of three rows as JSON files, and a page to write to."""
    monkeypatch.chdir(tmp_path)
    Path("docs/ablation/runs").mkdir(parents=True)
    write_result("base", 0, 0.5)
    for seed in range(3):
        write_result("attention", seed, 0.6 + 0.01 * seed, 0.7)
        write_result("accuracy", seed, 0.5 + 0.01 * seed, 0.6)
    Path("docs/results.md").write_text(f"# Page\n\n{MARKERS[0]}\nformer text\n{MARKERS[1]}\n\nThe end \\1.\n")
    return Path("docs/ablation")


def test_the_report_is_made_of_the_files_alone(folder):
    ablate.main(AblateConfig(report=True))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "as it was, for what this process does next"
    text = (folder / "table.md").read_text()
    for words in (
        "7 runs, 3.5 hours",
        "with torch 2.14",
        "| `attention` | 3 | 61.0 ± 2.5 | 61.0 ± 2.5 | 61.0 ± 2.5 | 70.0 ± 0.0 |",
        "| `base` | 1 | 50.0 | 50.0 |",
        "Not run yet: `full`, `top-20`, ",
        "| `attention` − `accuracy` | **holds** +10.0 ± 0.0 |",  # paired by seed: both rows spread alike
        "| `attention` − `base` | **holds** +11.0 ± 2.5 |",
        "| `accuracy` − `base` | undecided +1.0 ± 2.5 |",
        "| `base` − `attention` (tokens) | **does not hold** -2.0 ± 0.0 |",
        "| `attention` | 0.20 ± 0.00 | 1.00 ± 0.00 | - | 75 ± 0 | 25 ± 0 | 0 ± 0 | `look` 50 %, 0.80, ` ` 25 %",
    ):
        assert words in text
    page = Path("docs/results.md").read_text()
    assert text.strip() in page and "former text" not in page and page.endswith("The end \\1.\n")
    assert (folder / "figure.png").stat().st_size > 10_000
    ablate.main(AblateConfig(report=True))
    assert Path("docs/results.md").read_text() == page


def test_another_folder_leaves_the_page_alone_and_an_empty_one_is_said_to_be_empty(folder, tmp_path):
    folder.rename("other")
    ablate.main(AblateConfig(report=True, output_dir="other"))
    assert "former text" in Path("docs/results.md").read_text() and Path("other/table.md").exists()
    assert "no finished run" in claims.report_grid(tmp_path / "empty", list(GRID), SETS)


def test_seeds_that_only_one_row_has_are_left_out():
    claim, sets = Claim("It is better", "", "full", "fast"), {"validation": ""}
    results = {"full": {seed: result("full", seed, 0.6) for seed in (0, 1, 2)}}
    results["fast"] = {seed: result("fast", seed, 0.5) for seed in (1, 2, 3)}
    sure, tested = claims.sure_claims(results, [claim], sets)
    assert (sure, tested) == ({(claim, "validation")}, 1)
    assert "**holds** +10.0 ± 0.0" in claims.claims_table(results, [claim], sets, sure)
    assert claims.differences(results, claim, "validation") == pytest.approx([0.1, 0.1])
    turned = Claim("It is worse", "", "base", "full")
    results["base"] = {0: result("base", 0, 0.5)}
    assert claims.differences(results, turned, "validation") == pytest.approx([-0.1] * 3), "one base for every seed"


@pytest.mark.parametrize(("slope", "word"), [(1, ": holds, +"), (-1, ": does not hold, -")])
def test_correlation_of_tas_and_accuracy_over_rows(slope, word):
    places = np.linspace(0.4, 0.8, 12)
    noise = 0.02 * np.random.default_rng(0).normal(size=12)
    rows = {
        str(n): {
            seed: result("full", seed, 0.5 + slope * (tas - 0.6) + noise[n] + way * 0.2, tas - way * 0.1)
            for seed, way in enumerate((-1, 1))
        }
        for n, tas in enumerate(places)
    }
    assert word in claims.correlation(rows, list(rows), {"validation": "same"})
    assert claims.correlation(rows, ["0", "1"], {"validation": "same"}) == "", "two rows say nothing"


def test_a_run_whose_completions_have_no_tas_does_not_end_the_report(folder):
    """A policy that fell silent: the figure multiplied None by 100, behind hours of runs."""
    write_result("fast", 0, 0.0, None)
    ablate.main(AblateConfig(report=True))
    assert "| `fast` | 1 | 0.0 | 0.0 | 0.0 | - |" in (folder / "table.md").read_text()
    assert (folder / "figure.png").stat().st_size > 10_000


def test_a_log_that_cannot_be_written_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    """A full disk: the pool went on for hours without a bar, and could not be stopped."""
    config = AblateConfig(output_dir=str(tmp_path / "out"), work_dir=str(tmp_path / "work"))
    (tmp_path / "work" / "base-0.log").mkdir(parents=True)
    popen = subprocess.Popen
    monkeypatch.setattr(ablate.subprocess, "Popen", lambda _, **more: popen(["true"], **more))
    (problem,) = ablate.run_missing([("base", 0), ("full", 0)], 0, config)
    assert problem.startswith("base/0 could not be started: ")
    assert (tmp_path / "work" / "full-0.log").exists()


def test_the_grid_through_the_real_commands(tmp_path):
    """Two rows in two processes; then a run whose file is gone is evaluated again, and not trained again."""
    command = [sys.executable, "-m", "tools.ablate", "--only", "base", "beta-0", "--seeds", "1", "--max_steps", "2"]
    command += ["--limit", "4", "--output_dir", str(tmp_path / "out"), "--work_dir", str(tmp_path / "work")]

    def run_grid():
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads((runs / "beta-0-0.json").read_text())

    runs, work = tmp_path / "out" / "runs", tmp_path / "work" / "beta-0-0" / "metrics.jsonl"
    found = run_grid()
    assert sorted(path.name for path in runs.iterdir()) == ["base-0.json", "beta-0-0.json"]
    assert found["settings"] == {"accuracy_weight": 0.0, "beta": 0.0} and found["max_steps"] == 2
    assert {part["examples"] for part in found["sets"].values()} == {4} and set(found["sets"]) == set(SETS)
    assert found["training"]["advantage_share/accuracy"] == 0 and 0 < len(found["tokens"]) <= ablate.NUM_TOKENS
    rows = [json.loads(line) for line in work.read_text().splitlines()]
    metrics = "".join(json.dumps(row | {"time/update_seconds": 500.0}) + "\n" for row in rows).encode()
    work.write_bytes(metrics)
    before = (runs / "base-0.json").read_bytes()

    (runs / "beta-0-0.json").unlink()
    again = run_grid()
    assert again | {"seconds": 0} == found | {"seconds": 0}
    assert again["seconds"] > 1000 > found["seconds"], "the steps of a start that was stopped count, too"
    assert (work.read_bytes(), (runs / "base-0.json").read_bytes()) == (metrics, before)


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "start_run", lambda name, seed, *more: "full/0 ended" if name == "full" else None)
    with pytest.raises(ConfigError, match="full/0 ended\nthe same command runs what is missing"):
        ablate.main(AblateConfig(only=["full", "fast"], seeds=1, output_dir=str(tmp_path)))


@pytest.mark.parametrize("content", ["", "[]", "{broken", '{"row": "base"}', '{"row": "base", "sets": {}}'])
def test_a_file_that_is_no_result_is_named(folder, content):
    """Such a file ended the report with a traceback, behind hours of runs."""
    Path("docs/ablation/runs/full-0.json").write_text(content)
    for settings in ({"report": True}, {"only": ["full"], "seeds": 1}):
        with pytest.raises(ConfigError, match="full-0.json' is no result of tools.ablate"):
            ablate.main(AblateConfig(**settings))


def test_results_of_other_settings_are_not_taken_for_these(folder, monkeypatch):
    """A grid with more steps reported the runs of fewer."""
    write_result("attention", 0, 0.6, settings=ablate.ATTENTION)
    monkeypatch.setattr(ablate, "start_run", lambda *arguments: pytest.fail("nothing is missing"))
    settings = {"only": ["attention"], "seeds": 1}
    ablate.main(AblateConfig(**settings))
    for name in ("max_steps", "limit"):
        with pytest.raises(ConfigError, match="attention-0.json is of max_steps=100, limit=1000"):
            ablate.main(AblateConfig(**settings, **{name: 7}))
    monkeypatch.setitem(GRID, "attention", {})
    with pytest.raises(ConfigError, match="settings {'accuracy_weight': 0.0}"):
        ablate.main(AblateConfig(**settings))


@pytest.mark.parametrize("name", ["output_dir", "work_dir"])
def test_folders_that_cannot_be_made_are_named_first(tmp_path, name):
    (tmp_path / "file").touch()
    folders = {"output_dir": str(tmp_path / "out"), "work_dir": str(tmp_path / "work")}
    with pytest.raises(ConfigError, match=f"{name}='.*/below': give a folder that can be made"):
        ablate.main(AblateConfig(**folders | {name: str(tmp_path / "file" / "below")}))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_grid_that_is_stopped_stops_its_runs(tmp_path, number):
    """SIGTERM left the runs at work, beside those of the next start."""
    command = [sys.executable, "-m", "tools.ablate", "--only", "base", "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--work_dir", str(tmp_path / "work")], preexec_fn=heed_interrupts)
    me = psutil.Process(process.pid)
    deadline = time.monotonic() + 100
    while not (children := me.children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(100) != 0
    _, alive = psutil.wait_procs(children, timeout=60)
    assert children and not alive


def test_a_grid_that_is_stopped_while_a_run_begins_stops_that_run(tmp_path, monkeypatch):
    """A process that was there, and not yet known to be, was waited for to its end."""
    begun = []

    def popen(*_, **__):
        begun.append(subprocess_popen(["sleep", "100"]))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return begun[0]

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(ablate.subprocess, "Popen", popen)
    config = AblateConfig(output_dir=str(tmp_path / "out"), work_dir=str(tmp_path / "work"))
    with pytest.raises(KeyboardInterrupt):
        ablate.run_missing([("base", 0)], 0, config)
    assert begun[0].wait(10) == -signal.SIGTERM


def heed_interrupts():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it


# --- significance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "interval", "p"),
    [
        ((1.0, 2.0, 3.0), (2.0, 2.484), 0.0742),  # as a table of Student's t gives it
        ((0.1, 0.1, 0.1, 0.1, 0.1), (0.1, 0.0), 0),
        ((0.0, 0.0), (0.0, 0.0), 1),
        ((1.0, 3.0), (2.0, 12.706), 0.2952),
        ((4.0,), (4.0, float("inf")), 1),
    ],
)
def test_intervals_and_p_values_of_students_t(values, interval, p):
    assert t_interval(values) == pytest.approx(interval, abs=1e-3) and p_value(values) == pytest.approx(p, abs=1e-4)
    assert p_value(()) == 1


def test_an_interval_holds_the_mean_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3.0, 2.0, size=(4000, 5))
    held = [abs(mean - 3.0) <= half for mean, half in map(t_interval, draws.tolist())]
    assert 0.94 < np.mean(held) < 0.96


def test_an_interval_excludes_zero_where_the_p_value_is_below_five_percent():
    for values in np.random.default_rng(1).normal(1.0, 1.0, size=(300, 4)).tolist():
        mean, half = t_interval(values)
        assert (abs(mean) > half) == (p_value(values) < 0.05)


def test_holm_by_hand():
    # 0.01 <= 0.05 / 4 and 0.015 <= 0.05 / 3; 0.03 > 0.05 / 2 ends it, for what is behind it, too.
    assert holm({"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.015}) == {"b", "d"}
    assert holm({}) == set() and holm({"a": 0.06}) == set() and holm({"a": 0.05}) == {"a"}


def test_holm_is_seldom_wrong_about_any_of_twenty_true_nulls():
    generator = np.random.default_rng(2)
    wrong = [bool(holm(dict(enumerate(map(p_value, draw.tolist()))))) for draw in generator.normal(size=(400, 20, 5))]
    assert 0.01 < np.mean(wrong) < 0.09


def test_spearman_sees_order_alone():
    points = np.array([[1.0, 1.0], [2.0, 10.0], [3.0, 100.0], [4.0, 1000.0]])
    assert claims._spearman(points) == pytest.approx(1.0)
    assert claims._spearman(points * [1, -1]) == pytest.approx(-1.0)
    # Ranks 1, 2, 3, 4 and, with a tie, 1, 2.5, 2.5, 4: by hand 4.5 / sqrt(5 * 4.5).
    assert claims._spearman(np.array([[1.0, 5], [2, 7], [3, 7], [4, 9]])) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
