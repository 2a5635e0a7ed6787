"""Pictures: the heat map is the attention that the reward saw, and both pictures get drawn."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from prompts import encode_prompt, image_grids, region_coverage
from reward import RewardConfig
from rollout import sample_group
from visualize import look, plot_attention, plot_curves
from vlm import attention_maps, token_statistics


def test_the_maps_average_to_the_statistics(policy, examples):
    model, processor = policy
    group = sample_group(model, processor, examples[0], num_generations=2, max_new_tokens=12)
    statistics = token_statistics(model, group.prompt, group.completions, layers=(0, -1))
    weights = group.prompt.coverage / group.prompt.coverage.sum()
    for index, completion in enumerate(group.completions):
        maps = attention_maps(model, group.prompt, completion, layers=(0, -1))
        assert maps.shape == (len(completion), len(group.prompt.image_token_index))
        torch.testing.assert_close(maps @ weights, statistics.target_attention[index], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(maps.mean(-1), statistics.image_attention[index], atol=1e-6, rtol=1e-4)


def test_the_grid_of_a_picture_is_that_of_its_tokens(policy):
    processor = policy[1]
    example = {"images": [Image.new("RGB", (96, 64)), Image.new("RGB", (64, 128))], "question": "Which?"}
    assert image_grids(processor, encode_prompt(processor, example)) == [(2, 3), (4, 2)]
    left = region_coverage(processor, example["images"][:1], [[0, 0, 32, 64]]).view(2, 3)
    assert left.tolist() == [[1, 0, 0], [1, 0, 0]]


def test_a_picture_of_where_it_looks(policy, examples, tmp_path):
    model, processor = policy
    shown = [example | {"images": [example["image"]]} for example in examples[:2]]
    found = [look(model, processor, example, RewardConfig()) for example in shown]
    for (heat, text, tas), example in zip(found, shown, strict=True):
        assert tuple(heat.shape) == image_grids(processor, encode_prompt(processor, example))[0]
        assert text and 0 < tas < 1
    plot_attention(shown, {"base": found, "adapter": found}, tmp_path / "look.png")
    pixels = np.asarray(Image.open(tmp_path / "look.png"))
    assert pixels.std() > 10


def test_curves_are_drawn_from_what_there_is(tmp_path):
    rows = [{"step": step, "reward/tas": 0.5 + step / 100, "kl": None, "entropy": 1.0} for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    (tmp_path / "metrics.jsonl").write_text("")
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(FileNotFoundError):
        plot_curves(tmp_path / "gone.jsonl", tmp_path / "none.png")
