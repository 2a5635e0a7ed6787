"""Evaluation: intervals against known statistics, rows against the stages they come from."""

import json
import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

import evaluate
from evaluate import EvaluateConfig, evaluate_policy
from reward import is_correct
from rollout import sample_group
from sayo.settings import ConfigError
from sayo.show import tables
from sayo.show.tables import METRICS, REPORTED, compare, compare_policies, format_table


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=900)
    mean, low, high = tables.bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(900)
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert tables.bootstrap_interval(values) == (mean, low, high)  # the same numbers every time
    assert tables.bootstrap_interval([1.0, math.nan, 1.0]) == (1.0, 1.0, 1.0)  # without what is unknown
    assert all(math.isnan(value) for value in tables.bootstrap_interval([math.nan]))


def test_pairing_sees_a_small_difference_in_a_wide_spread():
    generator = np.random.default_rng(1)
    spread = generator.normal(0, 1, size=300)
    metrics = {name: 0.0 for name in METRICS}
    before = [metrics | {"id": i, "tas": value} for i, value in enumerate(spread)]
    after = [row | {"tas": row["tas"] + 0.05 + 0.01 * generator.normal()} for row in before]
    mean, low, high = compare(before, after)["tas"]
    assert low > 0.04 and high < 0.06 and low < mean < high
    assert tables.summarize(before)["tas"][1] < 0 < tables.summarize(after)["tas"][2]
    with pytest.raises(ValueError, match="cannot be paired"):
        compare(before, after[::-1])


def test_rows_are_greedy_answers_with_their_scores(policy, examples):
    model, processor = policy
    config = EvaluateConfig(max_new_tokens=40, system_prompt="")
    rows = evaluate_policy(model, processor, examples[:5], config)
    assert [row["id"] for row in rows] == [example["id"] for example in examples[:5]]
    for row, example in zip(rows, examples, strict=False):
        group = sample_group(model, processor, example, num_generations=1, max_new_tokens=40, temperature=0)
        expected = group.texts[0], is_correct(group.texts[0], example), group.lengths[0]
        assert (row["text"], row["accuracy"], row["length"]) == expected and 0 < row["tas"] < 1


def test_the_command_compares_base_and_adapter(tmp_path, saved_adapter, capsys):
    output = tmp_path / "result.json"
    config = EvaluateConfig(limit=12, max_new_tokens=40, adapter=saved_adapter, json=str(output))
    evaluate.main(config)
    result = json.loads(output.read_text())
    assert set(result["summary"]) == {"base", "adapter", "difference"}
    base, adapter = result["rows"]["base"], result["rows"]["adapter"]
    assert [row["text"] for row in base] != [row["text"] for row in adapter]
    for name in METRICS:
        expected = np.mean([row[name] for row in adapter]) - np.mean([row[name] for row in base])
        assert result["summary"]["difference"][name][0] == pytest.approx(expected)
    assert "difference" in capsys.readouterr().out

    # The base beside an adapter is the base on its own.
    evaluate.main(replace(config, adapter=None))
    assert [row["text"] for row in json.loads(output.read_text())["rows"]["base"]] == [row["text"] for row in base]


def test_the_table_has_a_line_for_every_metric_that_is_known():
    rows = [{"id": 0} | {name: 1.0 for name in METRICS}, {"id": 1} | {name: 0.0 for name in METRICS}]
    lines = format_table(compare_policies(rows, rows)).splitlines()
    assert len(lines) == 1 + len(REPORTED) and "difference" in lines[0] and len(set(map(len, lines))) == 1
    for row in rows:
        row["tas"] = row["tas_selected"] = math.nan  # no boxes
    assert not any("tas" in line for line in format_table(compare_policies(rows)).splitlines())


def test_tas_of_right_and_of_wrong_answers():
    def row(identifier, accuracy, tas):
        return {name: 0.0 for name in METRICS} | {"id": identifier, "accuracy": accuracy, "tas": tas}

    before = [row(0, 1.0, 0.8), row(1, 1.0, 0.6), row(2, 0.0, 0.3), row(3, 0.0, math.nan)]
    after = [row(0, 1.0, 0.9), row(1, 0.0, 0.1), row(2, 0.0, 0.5), row(3, 1.0, math.nan)]
    # Paired: examples that both got right, that both got wrong.
    expected = {"base": (0.7, 0.3), "adapter": (0.9, 0.3), "difference": (0.1, 0.2)}
    for name, column in compare_policies(before, after).items():
        assert (column["tas_correct"][0], column["tas_wrong"][0]) == pytest.approx(expected[name]), name


def test_several_samples_give_mean_and_pass_at_k_and_are_drawn_again_by_seed(tmp_path, capsys):
    options = {"data": "scenes:heldout", "limit": 6, "max_new_tokens": 40, "num_samples": 5}
    out = tmp_path / "out.json"
    evaluate.main(EvaluateConfig(**options, json=str(out)))
    found, said = json.loads(out.read_text()), capsys.readouterr().out
    rows, summary = found["rows"]["base"], found["summary"]["base"]
    assert "5 samples at temperature 1.0" in said and "pass@5" in said
    for row in rows:
        assert len(row["right"]) == len(row["texts"]) == 5 and row["accuracy"] == pytest.approx(sum(row["right"]) / 5)
    assert len({text for row in rows for text in row["texts"]}) > len(rows)
    for k in (1, 2, 4, 5):  # by counting the sets of k samples
        sets = [[any(chosen) for chosen in combinations(row["right"], k)] for row in rows]
        assert summary[f"pass@{k}"][0] == pytest.approx(np.mean([np.mean(values) for values in sets]))
    assert summary["pass@1"][0] == pytest.approx(summary["accuracy"][0])
    again = tmp_path / "again.json"
    evaluate.main(EvaluateConfig(**options, json=str(again), sampling_tokens=1))
    assert [row["texts"] for row in json.loads(again.read_text())["rows"]["base"]] == [row["texts"] for row in rows]
    other = tmp_path / "folder"
    evaluate.main(EvaluateConfig(**options | {"limit": 1}, output_dir=str(other)))
    with pytest.raises(ConfigError, match="seed was 0, is 1"):
        evaluate.main(EvaluateConfig(**options | {"limit": 1}, output_dir=str(other), seed=1))
