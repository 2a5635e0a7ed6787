"""Rewards in files of the user's own, those of docs/rewards.md among them."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from small_run import rows_of, run

import reward
from reward import RewardConfig, score_group
from rollout import group_generator, sample_group
from sayo.settings import ConfigError
from train_rl import Config

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


@pytest.fixture
def page_file(tmp_path) -> Path:
    """The worked examples of the page, in one file."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    file = tmp_path / "mine.py"
    file.write_text("\n\n".join(block for block in blocks if "def " in block), encoding="utf-8")
    return file


@pytest.fixture
def group(policy, examples):
    example = dict(examples[0], hint="a column of the row")
    return sample_group(*policy, example, generator=group_generator("own"), num_generations=4, max_new_tokens=30)


def test_the_rewards_of_the_page(policy, group, page_file):
    (left, top, right, bottom) = group.example["boxes"][0]
    group.texts[0] = f"I see it at [{left}, {top}, {right}, {bottom}]."
    config = RewardConfig(reward_file=[str(page_file)], reward_weights=["brevity=0.5", "sure=0"])
    scores = score_group(policy[0], group, config)
    for index, length in enumerate(group.lengths):
        attention, logps = group.statistics.image_attention[index][:length], group.statistics.logps[index][:length]
        share = attention / attention.sum()
        assert scores["steady"][index] == pytest.approx(
            -float((share * share.log()).sum()) / math.log(length), rel=1e-5
        )
        assert scores["sure"][index] == pytest.approx(float(logps.mean().exp()), rel=1e-5)
        assert scores["brevity"][index] == pytest.approx(min(1, max(0, (80 - length) / 40)))
    assert scores["written_box"][0] == pytest.approx(1) and not scores["written_box"][1:].any()
    plain = score_group(policy[0], group, RewardConfig())["total"]
    own = 0.5 * scores["brevity"] + scores["written_box"] + scores["steady"]
    torch.testing.assert_close(scores["total"], plain + own)


def test_a_completion_has_what_the_page_says(policy, group, tmp_path):
    table = PAGE[PAGE.index("| field of `completion`") :].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    names = re.findall(r"`(\w+)`", " ".join(rows))
    assert {"text", "example", "token_ids", "truncated"} <= set(names)
    file = tmp_path / "mine.py"
    file.write_text(
        f"def seen(c):\n    [getattr(c, n) for n in {names}]\n    return len(c.example['hint']) * c.truncated"
    )
    scores = score_group(policy[0], group, RewardConfig(reward_file=[f"{file}:seen"]))
    assert scores["seen"].tolist() == [19.0 * cut for cut in group.truncated]


def test_a_run_logs_plots_and_keeps_its_own_rewards_and_refuses_another_file(page_file, tmp_path):
    options = {"reward_file": [f"{page_file}:brevity", f"{page_file}:looking"], "reward_weights": ["brevity=2"]}
    rows = run(tmp_path / "run", **options, max_steps=2)
    for name in ("brevity", "steady", "sure"):
        assert all(0 <= row[f"reward/{name}"] <= 1 and math.isfinite(row[f"advantage_share/{name}"]) for row in rows)
    shares = [sum(value for name, value in row.items() if name.startswith("advantage_share/")) for row in rows]
    assert shares == pytest.approx([1, 1], abs=1e-4)
    assert {"brevity", "steady"} <= rows_of(tmp_path / "run", "samples.jsonl")[0].keys()
    page_file.write_text(page_file.read_text() + "\n# changed\n")
    reward.own_rewards.cache_clear()
    with pytest.raises(ConfigError, match=r"resume: reward_file.*mine\.py.*another --output_dir"):
        run(tmp_path / "run", **options, max_steps=3, resume=True)


def test_reward_py_scores_with_own_rewards(policy, examples, page_file, tmp_path):
    import rollout

    options = {"data": "scenes:heldout", "limit": 2}
    rollouts, output = str(tmp_path / "rollouts.jsonl"), tmp_path / "rewards.jsonl"
    rollout.main(rollout.RolloutConfig(**options, output=rollouts, num_generations=2, max_new_tokens=8))
    files = {"rollouts": rollouts, "output": str(output), "reward_file": [f"{page_file}:brevity"]}
    reward.main(reward.ScoreConfig(**options, **files))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["rewards"]["brevity"] for row in rows] == [[1.0, 1.0]] * 2


@pytest.mark.parametrize(
    ("code", "entry", "words"),
    [
        (None, "none.py", "reward_file='none.py': there is no such file; give FILE.py or FILE.py:function"),
        ("def f(c): return 1", "m.py:g", "its public ones are f"),
        ("x = 1", "m.py", "its public ones are none"),
        ("from math import *\ndef _hidden(c): return 1", "m.py", "its public ones are none"),
        ("def f(c) return 1", "m.py", "SyntaxError"),
        ("import no_such_package", "m.py", "ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_problem_of_the_settings(tmp_path, monkeypatch, code, entry, words):
    monkeypatch.chdir(tmp_path)
    if code:
        Path("m.py").write_text(code)
    (problem,) = RewardConfig(reward_file=[entry]).problems()
    assert "reward_file" in problem and words in problem
    assert RewardConfig(reward_weights=["brevity"]).problems() == [
        "reward_weights='brevity': give name=number, such as brevity=0.5"
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("None", "TypeError"),
        ("float('nan')", "f is nan"),
        ("{'accuracy': 1}", "accuracy is a reward of sayo or of another file"),
        ("{'tas': 1}", "tas is a reward"),
        ("'high'", "could not convert"),
    ],
)
def test_what_a_function_does_wrong_names_it_and_the_example(policy, group, tmp_path, value, words):
    file = tmp_path / "m.py"
    file.write_text(f"def f(c): return {value}")
    with pytest.raises(ConfigError) as error:
        score_group(policy[0], group, RewardConfig(reward_file=[str(file)]))
    assert all(part in str(error.value) for part in (f"{file}:f", repr(group.example["id"]), words, "return a number"))


def test_weights_that_would_do_nothing_are_problems(policy, group, page_file):
    config = RewardConfig(reward_file=[f"{page_file}:brevity"], reward_weights=["brevty=0.5"])
    with pytest.raises(ConfigError, match="no reward is called brevty; reward_file gives brevity"):
        score_group(policy[0], group, config)
    for entry in ("accuracy=0", "tas=1", "brevity=nan", "brevity=inf"):
        assert Config(reward_weights=[entry]).problems() == [
            f"reward_weights={entry!r}: give a finite weight of a reward in reward_file"
        ]
    assert "give name=number" in Config(reward_weights=["brevity"]).problems()[0]


def test_a_file_is_a_module_like_any_other(policy, group, tmp_path):
    """With annotations that are read later, dataclasses, and a path of its own."""
    file = tmp_path / "m.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom pathlib import Path\n"
        "@dataclass\nclass Part:\n    value: float\nHERE = Path(__file__).name\n"
        "def f(c) -> float:\n    return Part(len(HERE)).value\n"
    )
    assert score_group(policy[0], group, RewardConfig(reward_file=[str(file)]))["f"].tolist() == [4.0] * 4


def test_a_number_that_only_some_completions_get_is_named(policy, group, tmp_path):
    file = tmp_path / "m.py"
    file.write_text(f"def f(c): return {{'one': 1, **({{'more': 2}} if c.text == {group.texts[0]!r} else {{}})}}")
    group.texts[1] += " other"
    with pytest.raises(ConfigError, match="reward_file: more for some completions of .* only; give it for all"):
        score_group(policy[0], group, RewardConfig(reward_file=[str(file)]))
