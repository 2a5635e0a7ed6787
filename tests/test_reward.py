"""Rewards as tables, each row with its reason; group scores against an independent computation."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reward
import rollout
from config import ConfigError, read_config
from prompts import base_model
from reward import (
    COMPONENTS,
    RewardConfig,
    ScoreConfig,
    attention_reward,
    extract_answer,
    format_reward,
    score_group,
    select_uncertain,
    target_attention_score,
)
from rollout import Group, RolloutConfig, group_generator, sample_group
from vlm import token_statistics


def tensor(*values):
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("target", "image", "entropy", "top_fraction", "expected", "reason"),
    [
        ([0.3] * 4, [0.1] * 4, [1.0] * 4, 1.0, 0.8, "three times its share: (9 - 1) / (9 + 1)"),
        ([0.1] * 4, [0.1] * 4, [1.0] * 4, 0.3, 0.0, "no preference"),
        ([0.1] * 4, [0.3] * 4, [1.0] * 4, 0.3, -0.8, "a third of its share is the mirror image"),
        ([0.0] * 4, [0.1] * 4, [1.0] * 4, 0.3, -1.0, "nothing on the target"),
        ([0.0] * 2, [0.0] * 2, [1.0] * 2, 0.5, 0.0, "no attention on the image at all: epsilon keeps it defined"),
        ([0.9, 0.3], [0.1, 0.1], [0.0, 5.0], 0.5, 0.8, "only the uncertain second token counts"),
        (
            [0.9, 0.3, 0.9],
            [0.1, 0.1, 0.1],
            [0.0, 5.0, 1.0],
            0.3,
            0.8,
            "int(0.3 * 3) is 0, but one is always taken",
        ),
        ([0.2, 0.4], [0.1, 0.1], [1.0, 1.0], 1.0, 0.8, "the mean over tokens comes before the ratio: 0.3 / 0.1"),
    ],
)
def test_attention_reward(target, image, entropy, top_fraction, expected, reason):
    found = attention_reward(tensor(*target), tensor(*image), tensor(*entropy), top_fraction=top_fraction)
    assert found == pytest.approx(expected, abs=1e-5), reason


def test_attention_reward_edges():
    empty = torch.zeros(0)
    assert attention_reward(empty, empty, empty) == -1.0, "a completion of EOS alone must not beat one that speaks"
    assert math.isnan(target_attention_score(empty, empty))
    with pytest.raises(ValueError, match="target has 2 tokens, image 2, entropy 3"):
        attention_reward(torch.ones(2), torch.ones(2), torch.ones(3))
    with pytest.raises(ValueError, match="top_fraction=0"):
        attention_reward(torch.ones(2), torch.ones(2), torch.ones(2), top_fraction=0)


@settings(max_examples=80, deadline=None)
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
    assert target_attention_score(*arguments[:2]) == pytest.approx(a**2 / (a**2 + v**2), abs=1e-9)


def test_the_uncertain_tokens_are_the_top_fraction_and_ties_go_to_the_earlier():
    assert select_uncertain(tensor(0.1, 2.0, 0.3, 1.0), 0.5).tolist() == [1, 3]
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
    ("I look.\n<answer>\nred\n</answer>\n", 1.0, "on lines of their own"),
    ("I <b>look</b>. <answer>a < b</answer>", 1.0, "other tags and signs are text"),
]


@pytest.mark.parametrize(("text", "expected", "reason"), FORMAT_TABLE)
def test_format_reward(text, expected, reason):
    assert format_reward(text, 50) == expected, reason


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(30, 0.3), (59, 0.59), (60, 1.0), (100, 1.0), (120, 0.5), (200, 0.3)]
)
def test_format_reward_in_the_length_window_of_the_released_script(num_tokens, expected):
    assert format_reward("I look. <answer>red</answer>", num_tokens, 60, 100) == pytest.approx(expected)
    assert format_reward("no answer", num_tokens, 60, 100) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I look. <answer> two words\n</answer> done", "two words"),
        ("<answer>x</answer>", "x"),
        ("<answer></answer>", None),
        ("<answer>a</answer><answer>b</answer>", None),
        ("answer: a", None),
        ("", None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


# --- a group ----------------------------------------------------------------------------------------------------


@pytest.fixture
def group(policy, examples):
    return sample_group(*policy, examples[0], num_generations=5, max_new_tokens=30, generator=group_generator(3))


def test_scores_are_the_weighted_named_components(policy, group):
    config = RewardConfig(attention_weight=0.5, format_weight=2.0, accuracy_weight=3.0)
    scores = score_group(policy[0], group, config)
    assert set(scores) == {*COMPONENTS, "tas", "tas_selected", "total"}
    assert all(values.shape == (5,) for values in scores.values())
    expected = 0.5 * scores["attention"] + 2 * scores["format"] + 3 * scores["accuracy"]
    torch.testing.assert_close(scores["total"], expected)
    torch.testing.assert_close(scores["tas_selected"], (1 + scores["attention"]) / 2)
    assert [len(logps) for logps in group.statistics.logps] == [len(completion) for completion in group.completions]


def test_padding_and_eos_never_compete_for_the_top_fraction(policy, examples):
    """The released script takes the top 30 % over padded positions too: a completion's reward must not depend on its
    neighbours' lengths, nor on its own closing EOS."""
    model, processor = policy
    eos = processor.tokenizer.eos_token_id
    words = processor.tokenizer("The red circle is at the top left.").input_ids
    short = torch.tensor([*words, eos])
    longer = torch.tensor(words * 4)
    prompt = rollout.encode_prompt(processor, examples[0])
    config = RewardConfig()

    def rewards(completions, truncated):
        group = Group(examples[0], prompt, completions, ["x"] * len(completions), truncated)
        return score_group(model, group, config)["attention"]

    alone = rewards([short, short], [False, False])[0]
    beside = rewards([short, longer], [False, True])[0]
    cut = rewards([short[:-1], longer], [True, True])[0]
    torch.testing.assert_close(beside, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(cut, alone, atol=1e-5, rtol=0)


def test_the_region_follows_prompts_of_different_length(policy, examples):
    """The released script finds image offsets in the unpadded prompt and reads left-padded attention."""
    model, processor = policy
    words = torch.tensor(processor.tokenizer("The red circle is at the top left.").input_ids)
    for question in ("Where?", "Where is the circle that is small and red, and at the left of the star?"):
        example = examples[0] | {"question": question}
        prompt = rollout.encode_prompt(processor, example)
        packed = token_statistics(model, prompt, [words, words[:3]])
        padded = token_statistics(model, prompt, [words, words[:3]], layout="padded")
        for name in ("target_attention", "image_attention"):
            found, expected = torch.cat(getattr(packed, name)), torch.cat(getattr(padded, name))
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_a_region_of_the_whole_picture_gets_its_share_and_no_region_gets_nothing(policy, examples):
    width, height = examples[0]["image"].size
    for boxes, expected in (([[0, 0, width, height]], 0.0), ([], 0.0)):
        example = examples[0] | {"boxes": boxes}
        group = sample_group(*policy, example, num_generations=2, max_new_tokens=6)
        scores = score_group(policy[0], group, RewardConfig())
        torch.testing.assert_close(scores["attention"], torch.full((2,), expected), atol=1e-5, rtol=0)
        assert scores["tas"].isnan().all() == (not boxes)


def test_an_empty_completion_gets_the_lowest_attention_reward(policy, examples):
    model, processor = policy
    eos = torch.tensor([processor.tokenizer.eos_token_id])
    prompt = rollout.encode_prompt(processor, examples[0])
    scores = score_group(model, Group(examples[0], prompt, [eos, eos], ["", ""], [False, False]), RewardConfig())
    assert scores["attention"].tolist() == [-1.0, -1.0] and scores["total"].tolist() == [-1.0, -1.0]


def test_every_attention_setting_changes_the_reward(policy, group):
    model = policy[0]
    usual = score_group(model, group, RewardConfig())["attention"]
    depth = base_model(model).config.get_text_config().num_hidden_layers
    for setting in (
        {"top_fraction": 1.0},
        {"attention_layers": [0]},
        {"attention_layers": list(range(depth))},
        {"attention_query": "predictor"},
        {"attention_eps": 0.1},
    ):
        assert not torch.allclose(score_group(model, group, RewardConfig(**setting))["attention"], usual), setting


def test_the_command_scores_what_rollout_wrote(tmp_path, capsys):
    rollouts, output = tmp_path / "rollouts.jsonl", tmp_path / "rewards.jsonl"
    data = {"data": "scenes:heldout", "limit": 3}
    rollout.main(RolloutConfig(**data, output=str(rollouts), num_generations=2, max_new_tokens=40))
    reward.main(ScoreConfig(**data, rollouts=str(rollouts), output=str(output)))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        formats = [format_reward(text, len(ids)) for text, ids in zip(row["texts"], row["completion_ids"], strict=True)]
        assert row["rewards"]["format"] == formats
    assert "attention" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="system_prompt"):
        reward.main(ScoreConfig(**data, rollouts=str(rollouts), output=str(output), system_prompt="Something else."))
    with pytest.raises(ConfigError, match="about no example"):
        reward.main(ScoreConfig(data="scenes:heldout", limit=1, rollouts=str(rollouts), output=str(output)))
    before = rollouts.read_bytes()
    with pytest.raises(ConfigError, match="is what is read"):
        read_config(ScoreConfig, ["--rollouts", str(rollouts), "--output", f"{tmp_path}/./rollouts.jsonl"])
    assert rollouts.read_bytes() == before
    with pytest.raises(ConfigError, match="no such file"):
        reward.main(ScoreConfig(**data, rollouts=str(tmp_path / "nothing.jsonl"), output=str(output)))
