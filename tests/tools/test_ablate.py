"""The grid: its settings, its runs through the real commands, what is made of their results, significance."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
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


def test_verdicts():
    assert verdict([0.02, 0.03, 0.025]) == ("holds", "+2.5 ± 1.2")
    assert verdict([-0.02, -0.03, -0.025]) == ("does not hold", "-2.5 ± 1.2")
    assert verdict([-0.02, 0.03, 0.01]) == ("undecided", "+0.7 ± 6.3")
    assert verdict([0.04]) == ("undecided", "+4.0, one seed") and verdict([]) == ("not run", "-")


def result(row, seed, accuracy, tas=0.5):
    length = 20.0 if row == "base" else 22.0
    numbers = {"accuracy": accuracy, "tas": tas, "length": length, "format": 1.0, "examples": 1000}
    training = {"kl": 0.01, "advantage_share/attention": 0.75, "advantage_share/format": 0.25}
    training |= {"reward/attention": 0.2, "reward/format": 1.0, "advantage_share/accuracy": 0.0}
    found = {"row": row, "seed": seed, "sets": dict.fromkeys(SETS, numbers), "versions": {"torch": "2.14"}}
    found |= {"tokens": [["look", 0.5, 0.8], ["", 0.25, 0.1]], "seconds": 1800}
    steps = ({}, 100, training) if row != "base" else (None, 0, {})
    return found | dict(zip(("settings", "max_steps", "training"), steps, strict=True))


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
    rows = {}
    for n, tas in enumerate(places):
        accuracy = 0.5 + slope * (tas - 0.6) + noise[n]
        pair = (accuracy - 0.2, tas + 0.1), (accuracy + 0.2, tas - 0.1)
        rows[str(n)] = {seed: result("full", seed, *numbers) for seed, numbers in enumerate(pair)}
    assert word in claims.correlation(rows, list(rows), {"validation": "same"})
    assert claims.correlation(rows, ["0", "1"], {"validation": "same"}) == "", "two rows say nothing"


def test_a_run_whose_completions_have_no_tas_does_not_end_the_report(folder):
    write_result("fast", 0, 0.0, None)
    ablate.main(AblateConfig(report=True))
    assert "| `fast` | 1 | 0.0 | 0.0 | 0.0 | - |" in (folder / "table.md").read_text()
    assert (folder / "figure.png").stat().st_size > 10_000


def test_runs_that_fail_are_named_and_the_others_go_on(tmp_path, monkeypatch):
    """On a full disk, on which a log cannot be written, the grid went on for hours and could not be stopped."""
    folders = {"output_dir": str(tmp_path), "work_dir": str(tmp_path / "work")}
    (tmp_path / "work" / "base-0.log").mkdir(parents=True)
    popen, codes = subprocess.Popen, iter(("3", "0"))
    monkeypatch.setattr(
        ablate.subprocess, "Popen", lambda _, **more: popen(["sh", "-c", f"exit {next(codes)}"], **more)
    )
    said = (
        "^base/0 could not be started: .*\nfull/0 ended with exit code 3: see .*full-0.log\nthe same command runs what"
    )
    with pytest.raises(ConfigError, match=said):
        ablate.main(AblateConfig(only=["base", "full", "fast"], seeds=1, processes=1, **folders))
    assert (tmp_path / "work" / "fast-0.log").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "as it was, for what this process does next"


def test_the_grid_through_the_real_commands(tmp_path):
    command = [sys.executable, "-m", "tools.ablate", "--only", "base", "beta-0", "--seeds", "1", "--max_steps", "2"]
    command += ["--limit", "4", "--output_dir", str(tmp_path / "out"), "--work_dir", str(tmp_path / "work")]

    def run_grid():
        done = subprocess.run(command, capture_output=True, text=True, timeout=2000)
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


@pytest.mark.parametrize("content", ["", "[]", "{broken", '{"row": "base"}', '{"row": "base", "sets": {}}'])
def test_a_file_that_is_no_result_is_named(folder, content):
    Path("docs/ablation/runs/full-0.json").write_text(content)
    for settings in ({"report": True}, {"only": ["full"], "seeds": 1}):
        with pytest.raises(ConfigError, match="full-0.json' is no result of tools.ablate"):
            ablate.main(AblateConfig(**settings))


def test_results_of_other_settings_are_not_taken_for_these(folder, monkeypatch):
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
    folders = {"output_dir": str(tmp_path), "work_dir": str(tmp_path), name: f"{__file__}/below"}
    with pytest.raises(ConfigError, match=f"{name}='.*/below': give a folder that can be made"):
        ablate.main(AblateConfig(**folders))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_grid_that_is_stopped_stops_its_runs(tmp_path, number):
    command = [sys.executable, "-m", "tools.ablate", "--only", "base", "--output_dir", str(tmp_path / "out")]
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    process = subprocess.Popen([*command, "--work_dir", str(tmp_path / "work")], preexec_fn=heed)
    me = psutil.Process(process.pid)
    deadline = time.monotonic() + 100
    while not (children := me.children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(100) != 0
    _, alive = psutil.wait_procs(children, timeout=300)
    assert children and not alive


def test_a_grid_that_is_stopped_while_a_run_begins_stops_that_run(tmp_path, monkeypatch):
    begun = []

    def popen(*_, **__):
        begun.append(subprocess_popen(["sleep", "100"]))
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        return begun[0]

    subprocess_popen = subprocess.Popen
    monkeypatch.setattr(ablate.subprocess, "Popen", popen)
    with pytest.raises(KeyboardInterrupt):
        ablate.run_missing([("base", 0)], 0, AblateConfig(work_dir=str(tmp_path)))
    assert begun[0].wait(10) == -signal.SIGTERM


def test_intervals_and_p_values_of_students_t():
    for values, interval, p in (
        ((1.0, 2.0, 3.0), (2.0, 2.4841), 0.0742),  # as a table of Student's t gives it
        ((0.1, 0.1, 0.1, 0.1, 0.1), (0.1, 0.0), 0),
        ((0.0, 0.0), (0.0, 0.0), 1),
        ((1.0, 3.0), (2.0, 12.7062), 0.2952),
        ((4.0,), (4.0, float("inf")), 1),
    ):
        assert (*t_interval(values), p_value(values)) == pytest.approx((*interval, p), abs=1e-4)
    assert p_value(()) == 1


def test_an_interval_excludes_zero_where_the_p_value_is_below_five_percent():
    for values in np.random.default_rng(1).normal(1.0, 1.0, size=(300, 4)).tolist():
        mean, half = t_interval(values)
        assert (abs(mean) > half) == (p_value(values) < 0.05)


def test_holm_by_hand():
    # 0.01 <= 0.05 / 4 and 0.015 <= 0.05 / 3; 0.03 > 0.05 / 2 ends it, for what is behind it, too.
    assert holm({"a": 0.03, "b": 0.01, "c": 0.04, "d": 0.015}) == {"b", "d"}
    assert holm({}) == set() and holm({"a": 0.06}) == set() and holm({"a": 0.05}) == {"a"}
