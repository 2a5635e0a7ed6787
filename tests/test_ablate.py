"""The grid: its settings, its runs through the real commands, and what is made of their results."""

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

import ablate
import claims
from ablate import GRID, SETS, AblateConfig
from claims import CLAIMS, MARKERS, NOT_THE_PAPERS, Claim, claims_table, correlation, sure_claims, verdict
from config import ConfigError, read_config
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
    for words in (
        "only='atention': rows of the grid are base, attention",
        "seeds=0",
        "run='full': give row/seed",
        "limit=2001",
    ):
        assert words in str(error.value)


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
    training |= {"reward/attention": 0.2, "reward/format": 1.0}
    return {
        "row": row,
        "seed": seed,
        "settings": None if row == "base" else {},
        "max_steps": 0 if row == "base" else 100,
        "seconds": 1800,
        "training": {} if row == "base" else training | {"advantage_share/accuracy": 0.0},
        "sets": {name: numbers for name in SETS},
        "tokens": [["look", 0.5, 0.8], ["", 0.25, 0.1]],
        "versions": {"torch": "2.14"},
    }


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A grid of three rows as JSON files, and a page to write to."""
    monkeypatch.chdir(tmp_path)
    Path("ablation/runs").mkdir(parents=True)
    found = [result("base", 0, 0.5)]
    found += [result("attention", seed, 0.6 + 0.01 * seed, 0.7) for seed in range(3)]
    found += [result("accuracy", seed, 0.5 + 0.01 * seed, 0.6) for seed in range(3)]
    for one in found:
        Path(f"ablation/runs/{one['row']}-{one['seed']}.json").write_text(json.dumps(one))
    Path("RESULTS.md").write_text(f"# Page\n\n{MARKERS[0]}\nformer text\n{MARKERS[1]}\n\nThe end \\1.\n")
    return Path("ablation")


def test_the_report_is_made_of_the_files_alone(folder):
    ablate.main(AblateConfig(report=True))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "as it was, for what this process does next"
    text = (folder / "table.md").read_text()
    assert "7 runs, 3.5 hours" in text
    assert "with torch 2.14" in text
    assert "| `attention` | 3 | 61.0 ± 2.5 | 61.0 ± 2.5 | 61.0 ± 2.5 | 70.0 ± 0.0 |" in text
    assert "| `base` | 1 | 50.0 | 50.0 |" in text and "Not run yet: `full`, `top-20`, " in text
    # Paired by seed: the same spread in both rows leaves no doubt about their difference.
    assert "| `attention` − `accuracy` | **holds** +10.0 ± 0.0 |" in text
    assert "| `attention` − `base` | **holds** +11.0 ± 2.5 |" in text
    assert "| `accuracy` − `base` | undecided +1.0 ± 2.5 |" in text
    assert "| `base` − `attention` (tokens) | **does not hold** -2.0 ± 0.0 |" in text
    assert (
        "| `attention` | 0.20 ± 0.00 | 1.00 ± 0.00 | - | 75 ± 0 | 25 ± 0 | 0 ± 0 | `look` 50 %, 0.80, ` ` 25 %" in text
    )
    page = Path("RESULTS.md").read_text()
    assert text.strip() in page and "former text" not in page and page.endswith("The end \\1.\n")
    assert (folder / "figure.png").stat().st_size > 10_000
    ablate.main(AblateConfig(report=True))
    assert Path("RESULTS.md").read_text() == page


def test_another_folder_leaves_the_page_alone(folder):
    folder.rename("other")
    ablate.main(AblateConfig(report=True, output_dir="other"))
    assert "former text" in Path("RESULTS.md").read_text() and Path("other/table.md").exists()


def test_an_empty_folder_is_said_to_be_empty(tmp_path):
    assert "no finished run" in claims.report_grid(tmp_path, list(GRID), SETS)


def test_seeds_that_only_one_row_has_are_left_out():
    claim, sets = Claim("It is better", "", "full", "fast"), {"validation": ""}
    results = {"full": {seed: result("full", seed, 0.6) for seed in (0, 1, 2)}}
    results["fast"] = {seed: result("fast", seed, 0.5) for seed in (1, 2, 3)}
    sure, tested = sure_claims(results, [claim], sets)
    assert (sure, tested) == ({(claim, "validation")}, 1)
    assert "**holds** +10.0 ± 0.0" in claims_table(results, [claim], sets, sure)
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
    assert word in correlation(rows, list(rows), {"validation": "same"})
    assert correlation(rows, ["0", "1"], {"validation": "same"}) == "", "two rows say nothing"


def test_a_run_whose_completions_have_no_tas_does_not_end_the_report(folder):
    """A policy that fell silent: the figure multiplied None by 100, behind hours of runs."""
    Path("ablation/runs/fast-0.json").write_text(json.dumps(result("fast", 0, 0.0, None)))
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
    command = [sys.executable, "ablate.py", "--only", "base", "beta-0", "--seeds", "1", "--max_steps", "2"]
    command += ["--limit", "4", "--output_dir", str(tmp_path / "out"), "--work_dir", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "out" / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["base-0.json", "beta-0-0.json"]
    found = json.loads((runs / "beta-0-0.json").read_text())
    assert found["settings"] == {"accuracy_weight": 0.0, "beta": 0.0} and found["max_steps"] == 2
    assert {part["examples"] for part in found["sets"].values()} == {4} and set(found["sets"]) == set(SETS)
    assert found["training"]["advantage_share/accuracy"] == 0 and 0 < len(found["tokens"]) <= ablate.NUM_TOKENS
    rows = [json.loads(line) for line in (tmp_path / "work" / "beta-0-0" / "metrics.jsonl").read_text().splitlines()]
    metrics = "".join(json.dumps(row | {"time/update_seconds": 500.0}) + "\n" for row in rows).encode()
    (tmp_path / "work" / "beta-0-0" / "metrics.jsonl").write_bytes(metrics)
    before = (runs / "base-0.json").read_bytes()

    (runs / "beta-0-0.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    again = json.loads((runs / "beta-0-0.json").read_text())
    assert again | {"seconds": 0} == found | {"seconds": 0}
    assert again["seconds"] > 1000 > found["seconds"], "the steps of a start that was stopped count, too"
    assert (tmp_path / "work" / "beta-0-0" / "metrics.jsonl").read_bytes() == metrics
    assert (runs / "base-0.json").read_bytes() == before


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(ablate, "start_run", lambda name, seed, *more: "full/0 ended" if name == "full" else None)
    with pytest.raises(ConfigError, match="full/0 ended\nthe same command does again what is missing"):
        ablate.main(AblateConfig(only=["full", "fast"], seeds=1, output_dir=str(tmp_path)))


@pytest.mark.parametrize("content", ["", "[]", "{broken", '{"row": "base"}', '{"row": "base", "sets": {}}'])
def test_a_file_that_is_no_result_is_named(folder, content):
    """Such a file ended the report with a traceback, behind hours of runs."""
    Path("ablation/runs/full-0.json").write_text(content)
    for settings in ({"report": True}, {"only": ["full"], "seeds": 1}):
        with pytest.raises(ConfigError, match="full-0.json' is no result of ablate.py"):
            ablate.main(AblateConfig(**settings))


def test_results_of_other_settings_are_not_taken_for_these(folder, monkeypatch):
    """A grid with more steps reported the runs of fewer."""
    Path("ablation/runs/attention-0.json").write_text(
        json.dumps(result("attention", 0, 0.6) | {"settings": ablate.ATTENTION})
    )
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
    command = [sys.executable, "ablate.py", "--only", "base", "--output_dir", str(tmp_path / "out")]
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
