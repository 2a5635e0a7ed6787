"""Rewards as tables, each row with its reason; group scores against an independent computation."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reward
import rollout
from reward import COMPONENTS, RewardConfig, ScoreConfig, attention_reward, format_reward, score_group, select_uncertain
from rollout import Group, RolloutConfig, group_generator, sample_group
from sayo.model.prompts import base_model, encode_prompt
from sayo.settings import ConfigError


@pytest.mark.parametrize(
    ("target", "image", "entropy", "top_fraction", "expected", "reason"),
    [
        ([0.3] * 4, [0.1] * 4, [1.0] * 4, 1.0, 0.8, "three times its share: (9 - 1) / (9 + 1)"),
        ([0.1] * 4, [0.1] * 4, [1.0] * 4, 0.3, 0.0, "no preference"),
        ([0.1] * 4, [0.3] * 4, [1.0] * 4, 0.3, -0.8, "a third of its share is the mirror image"),
        ([0.0] * 4, [0.1] * 4, [1.0] * 4, 0.3, -1.0, "nothing on the target"),
        ([0.0] * 2, [0.0] * 2, [1.0] * 2, 0.5, 0.0, "no attention on the image at all: epsilon keeps it defined"),
        ([0.9, 0.3], [0.1, 0.1], [0.0, 5.0], 0.5, 0.8, "only the uncertain second token counts"),
        ([0.9, 0.3, 0.9], [0.1] * 3, [0.0, 5.0, 1.0], 0.3, 0.8, "int(0.3 * 3) is 0, but one is always taken"),
        ([0.2, 0.4], [0.1, 0.1], [1.0, 1.0], 1.0, 0.8, "the mean over tokens comes before the ratio: 0.3 / 0.1"),
    ],
)
def test_attention_reward(target, image, entropy, top_fraction, expected, reason):
    arguments = map(torch.tensor, (target, image, entropy))
    found = attention_reward(*arguments, top_fraction=top_fraction)
    assert found == pytest.approx(expected, abs=1e-5), reason


def test_attention_reward_edges():
    empty = torch.zeros(0)
    assert attention_reward(empty, empty, empty) == -1.0, "a completion of EOS alone must not beat one that speaks"
    assert math.isnan(reward.target_attention_score(empty, empty))
    for tokens, fraction, words in ((3, 0.3, "target has 2 tokens, image 2, entropy 3"), (2, 0, "top_fraction=0")):
        with pytest.raises(ValueError, match=words):
            attention_reward(torch.ones(2), torch.ones(2), torch.ones(tokens), top_fraction=fraction)


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.floats(0, 0.02), st.floats(1e-6, 0.02), st.floats(0, 6)), min_size=1, max_size=40),
    st.floats(0.05, 1.0),
)
def test_reward_and_tas_against_the_algebraic_forms(rows, top_fraction):
    """tanh(log x) = (x² - 1) / (x² + 1), and TAS = a² / (a² + v²)."""
    target, image, entropy = (np.array(column) for column in zip(*rows, strict=True))
    count = max(1, int(top_fraction * len(rows)))
    chosen = np.argsort(-torch.tensor(entropy).numpy(), kind="stable")[:count]
    a, v = target[chosen].mean() + 1e-8, image[chosen].mean() + 1e-8
    arguments = torch.tensor(target), torch.tensor(image), torch.tensor(entropy)
    found = attention_reward(*arguments, top_fraction=top_fraction)
    assert found == pytest.approx(((a / v) ** 2 - 1) / ((a / v) ** 2 + 1), abs=1e-9)
    a, v = target.mean() + 1e-8, image.mean() + 1e-8
    assert reward.target_attention_score(*arguments[:2]) == pytest.approx(a**2 / (a**2 + v**2), abs=1e-9)


def test_the_uncertain_tokens_are_the_top_fraction_and_ties_go_to_the_earlier():
    assert select_uncertain(torch.tensor([0.1, 2.0, 0.3, 1.0]), 0.5).tolist() == [1, 3]
    assert select_uncertain(torch.ones(10), 0.3).tolist() == [0, 1, 2]
    assert len(select_uncertain(torch.rand(110), 0.3)) == 33


FORMAT_TABLE = [
    ("I look. <answer>red</answer>", 1.0, "reasoning, then the answer"),
    ("<answer>red</answer>", 0.0, "no reasoning before it"),
    ("  \n<answer>red</answer>", 0.0, "white space is no reasoning"),
    ("I look. red", 0.0, "no tags"),
    ("I look. <answer></answer>", 0.0, "nothing in it"),
    ("I look. <answer>  </answer>", 0.0, "white space is no answer"),
    ("I look. <answer>red", 0.0, "never closed"),
    ("I look. </answer>red<answer>", 0.0, "the wrong way round"),
    ("I look. <answer>red</answer> <answer>blue</answer>", 0.0, "two answers"),
    ("I look. <answer><answer>red</answer></answer>", 0.0, "nested"),
    ("I look.\n<answer>\ntwo words\n</answer>\n", 1.0, "on lines of their own"),
    ("", 0.0, "nothing at all"),
    ("<think></think>\n<answer>red</answer>", 0.0, "empty thinking is no reasoning"),
    ("<think>\n\n</think>\n\n<answer>red</answer>", 0.0, "white space in it neither"),
    ("</think><answer>red</answer>", 0.0, "nor its end alone"),
    ("<think>It is red.</think>\n<answer>red</answer>", 1.0, "thinking is reasoning"),
    ("It is red.</think>\n<answer>red</answer>", 1.0, "thinking that the prompt began"),
    ("<think></think> It is red. <answer>red</answer>", 1.0, "reasoning behind empty thinking"),
    ("<think>I end with <answer></answer>.</think>\n<answer>red</answer>", 1.0, "tags quoted in the thinking"),
    ("<think>It is <answer>red</answer></think>", 0.0, "no answer behind the thinking"),
    ("<think>A</think> <answer>red</answer> <answer>blue</answer>", 0.0, "two answers behind the thinking"),
    ("I <b>look</b>. <answer>a < b</answer>", 1.0, "other tags and signs are text"),
]


@pytest.mark.parametrize(("text", "expected", "reason"), FORMAT_TABLE)
def test_format_reward(text, expected, reason):
    assert format_reward(text, 50) == expected, reason
    if expected:
        assert reward.extract_answer(text) == text.split("answer>")[-2].removesuffix("</").strip()


def test_format_reward_in_the_length_window_of_the_released_script():
    for num_tokens, expected in ((30, 0.3), (59, 0.59), (60, 1.0), (100, 1.0), (120, 0.5), (200, 0.3)):
        assert format_reward("I look. <answer>red</answer>", num_tokens, 60, 100) == pytest.approx(expected)
        assert format_reward("no answer", num_tokens, 60, 100) == 0


@pytest.fixture
def group(policy, examples):
    return sample_group(*policy, examples[0], num_generations=5, max_new_tokens=30, generator=group_generator(3))


def test_scores_are_the_weighted_named_components(policy, group):
    weights = {name: 0.5 + number for number, name in enumerate(COMPONENTS)}
    options = {f"{name}_weight": weight for name, weight in weights.items()}
    for normalized in (False, True):
        scores = score_group(policy[0], group, RewardConfig(**options, attention_normalized=normalized))
        assert set(scores) == {*COMPONENTS, "tas", "tas_selected", "total"}
        assert all(values.shape == (5,) for values in scores.values())
        torch.testing.assert_close(scores["total"], sum(weight * scores[name] for name, weight in weights.items()))
    scores = score_group(policy[0], group, RewardConfig())
    torch.testing.assert_close(scores["tas_selected"], (1 + scores["attention"]) / 2)
    assert [len(logps) for logps in group.statistics.logps] == [len(completion) for completion in group.completions]


def test_padding_and_eos_never_compete_for_the_top_fraction(policy, examples):
    model, processor = policy
    words = processor.tokenizer("The red circle is at the top left.").input_ids
    short, longer = torch.tensor([*words, processor.tokenizer.eos_token_id]), torch.tensor(words * 4)
    prompt = encode_prompt(processor, examples[0])

    def reward_of_first(completions, truncated, name="attention"):
        group = Group(examples[0], prompt, completions, ["x"] * len(completions), truncated)
        return float(score_group(model, group, RewardConfig())[name][0])

    alone = reward_of_first([short, short], [False, False])
    assert reward_of_first([short, longer], [False, True]) == pytest.approx(alone, abs=1e-5)
    assert reward_of_first([short[:-1], longer], [True, True]) == pytest.approx(alone, abs=1e-5)
    for name in ("attention", "total"):
        assert reward_of_first([short[-1:], short[-1:]], [False, False], name) == -1.0


def test_a_region_of_the_whole_picture_gets_its_share_and_no_region_gets_nothing(policy, examples):
    for boxes in ([[0, 0, *examples[0]["image"].size]], []):
        group = sample_group(*policy, examples[0] | {"boxes": boxes}, num_generations=2, max_new_tokens=6)
        scores = score_group(policy[0], group, RewardConfig())
        torch.testing.assert_close(scores["attention"], torch.zeros(2), atol=1e-5, rtol=0)
        assert scores["tas"].isnan().all() == (not boxes)


def test_every_attention_setting_changes_the_reward(policy, group):
    model = policy[0]
    usual = score_group(model, group, RewardConfig())["attention"]
    depth = base_model(model).config.get_text_config().num_hidden_layers
    layers = {"attention_layers": [0]}, {"attention_layers": list(range(depth))}
    for setting in ({"top_fraction": 1.0}, *layers, {"attention_query": "predictor"}, {"attention_eps": 0.1}):
        assert not torch.allclose(score_group(model, group, RewardConfig(**setting))["attention"], usual), setting


def test_the_command_scores_what_rollout_wrote(tmp_path, capsys):
    rollouts, output = tmp_path / "rollouts.jsonl", tmp_path / "rewards.jsonl"
    data = {"data": "scenes:heldout", "limit": 3}
    rollout.main(RolloutConfig(**data, output=str(rollouts), num_generations=2, max_new_tokens=40))
    config = ScoreConfig(**data, rollouts=str(rollouts), output=str(output))
    reward.main(config)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        formats = [format_reward(text, len(ids)) for text, ids in zip(row["texts"], row["completion_ids"], strict=True)]
        assert row["rewards"]["format"] == formats
    assert "attention" in capsys.readouterr().out
    refused = {"system_prompt": ("Something else.", "system_prompt"), "limit": (1, "about no example")}
    for name, (value, words) in (refused | {"rollouts": (f"{tmp_path}/nothing.jsonl", "no such file")}).items():
        with pytest.raises(ConfigError, match=words):
            reward.main(replace(config, **{name: value}))
