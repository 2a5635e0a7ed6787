"""Pictures: the heat map is the attention that the reward saw, and both pictures get drawn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_jsonl
from PIL import Image

import visualize
from reward import RewardConfig
from rollout import Group, sample_group
from sayo.model.forward import attention_maps, token_statistics
from sayo.model.prompts import encode_prompt, token_cells
from sayo.show.heat import paint_tokens, plot_attention
from sayo.show.plots import plot_curves
from visualize import look


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


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl"])
def test_a_painted_token_is_where_it_looks_and_weighs_what_it_is_given(policies, family):
    cells = token_cells(policies[family][1], Image.new("RGB", (96, 64)))
    values = torch.rand(len(cells), generator=torch.Generator().manual_seed(0))
    heat = paint_tokens(values, cells, (96, 64))
    assert heat.shape == (64, 96) and heat.sum() == pytest.approx(values.sum().item())
    second = torch.nn.functional.one_hot(torch.tensor(1), len(cells)).float()
    rows, columns = np.nonzero(paint_tokens(second, cells, (96, 64)))
    x1, y1, x2, y2 = cells[1].round().int().tolist()
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (y1, y2, x1, x2)
    assert paint_tokens(values, cells, (9600, 6400)).shape == (341, 512)


def test_a_picture_of_where_it_looks(policy, examples, tmp_path):
    model, processor = policy
    shown = [example | {"images": [example["image"]]} for example in examples[:2]]
    found = [look(model, processor, example, RewardConfig()) for example in shown]
    for (heat, text, tas), example in zip(found, shown, strict=True):
        assert heat.shape == example["image"].size[::-1] and heat.max() > 0 and text and 0 < tas < 1
    found[0] = (found[0][0], "pay $5 or $\\frac{", found[0][2])  # such text was taken for a formula, and failed
    plot_attention(shown, {"base": found, "adapter": found}, tmp_path / "look.png")
    assert np.asarray(Image.open(tmp_path / "look.png")).std() > 10


def test_curves_are_drawn_from_what_there_is(tmp_path):
    rows = [{"step": step, "reward/tas": 0.5 + step / 100, "kl": None, "entropy": 1.0} for step in range(1, 9)]
    plot_curves(Path(write_jsonl(tmp_path, *rows)), tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000
    plot_curves(Path(write_jsonl(tmp_path)), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(FileNotFoundError):
        plot_curves(tmp_path / "gone.jsonl", tmp_path / "none.png")


def test_a_completion_that_ends_at_once_looks_nowhere(policy, examples, monkeypatch, tmp_path):
    model, processor = policy
    eos = torch.tensor([processor.tokenizer.eos_token_id])
    sampled = Group(examples[0], encode_prompt(processor, examples[0]), [eos], [""], [False])
    monkeypatch.setattr(visualize, "sample_group", lambda *_, **__: sampled)
    shown = examples[0] | {"images": [examples[0]["image"]]}
    heat, text, tas = visualize.look(model, processor, shown, RewardConfig())
    assert heat.max() == 0 and np.isnan(tas) and text == ""
    plot_attention([shown], {"base": [(heat, text, tas)]}, tmp_path / "empty.png")
