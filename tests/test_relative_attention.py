"""Relative attention against NumPy, and cells of pictures as boxes."""

import numpy as np
import pytest
import torch
from conftest import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from prompts import prompt_text, region_coverage
from relative_attention import (
    GENERIC_QUESTION,
    choose_cells,
    merge_cells,
    overlap,
    per_picture,
    question_and_generic_attention,
)
from vlm import load_policy

TILED = ("internvl", "smolvlm", "smolvlm_2b")
LAYERS = {"qwen3_vl": [0, 1, 2, 3], "qwen3_5": [3]}


# --- the formula -------------------------------------------------------------------------------------------------


def eager_attention(model, processor, example, question) -> np.ndarray:
    """(L, N) of transformers' own output_attentions, averaged over heads by NumPy, in float64."""
    text = prompt_text(processor, example | {"question": question}, "Look.")
    inputs = processor(text=[text], images=[example["image"]], return_tensors="pt")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    is_image = (inputs["input_ids"][0] == processor.image_token_id).numpy()
    rows = [layer[0, :, -1].double().numpy() for layer in attentions if layer is not None]  # (H, S) each
    return np.stack([row.mean(0)[is_image] for row in rows])


@pytest.mark.parametrize("family", FAMILIES)
def test_relative_attention_is_that_of_eager_output_attentions(model_folders, examples, family):
    probed, processor = load_policy(model_folders[family], lora_rank=0, dtype="float32")
    probed.requires_grad_(False)
    eager, _ = load_policy(model_folders[family], lora_rank=0, dtype="float32", attn="eager")
    example, layers = examples[2], LAYERS.get(family, [0, 1, 2])
    found = question_and_generic_attention(probed, processor, example, "Look.", layers)
    expected = [eager_attention(eager, processor, example, text) for text in (example["question"], GENERIC_QUESTION)]
    for part, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(part.numpy(), other, rtol=1e-4, atol=1e-7)
    assert abs(found[0] - found[1]).max() > 1e-5  # the question matters
    (one,) = per_picture(processor, example["images"] if "images" in example else [example["image"]], *found)
    if family not in TILED:  # no thumbnail: one cell for each token
        np.testing.assert_allclose(one.relative().numpy(), expected[0] / expected[1], rtol=3e-4)


@pytest.mark.parametrize("family", ["qwen3_vl", "internvl", "smolvlm"])
def test_attention_on_a_thumbnail_is_spread_over_what_it_shows(policies, family):
    """The attention of all tokens is there again, and a thumbnail's last row lies on the lowest cells."""
    processor, picture = policies[family][1], Image.new("RGB", (252, 168))
    count = len(region_coverage(processor, [picture], []))
    attention = torch.rand(2, count, generator=torch.Generator().manual_seed(0))
    (one,) = per_picture(processor, [picture], attention, torch.zeros_like(attention))
    areas = (one.cells[:, 2:] - one.cells[:, :2]).prod(-1).float()
    assert areas.sum().item() == pytest.approx(252 * 168, rel=0.01)
    torch.testing.assert_close((one.asked * areas).sum(-1), attention.sum(-1), rtol=0.02, atol=0)
    assert int(one.is_tile.sum()) == len(one.cells) == (count if family == "qwen3_vl" else len(areas))
    assert (one.is_tile.all() == (family == "qwen3_vl")).item()
    last = torch.zeros(1, count)
    last[0, -1] = 1
    (one,) = per_picture(processor, [picture], last, last)
    reached = one.cells[one.asked[0] > one.asked.max() / 2]
    assert reached[:, 0].min() > 126 and reached[:, 1].min() > 84


# --- cells and boxes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 96), (333, 222), (50, 400), (1300, 700)], ids=str)
@pytest.mark.parametrize("family", [*FAMILIES, "smolvlm_2b"])
def test_the_coverage_of_the_boxes_of_cells_is_those_cells(model_folders, policies, family, size):
    processor, picture = policies[family][1], Image.new("RGB", size)
    count = len(region_coverage(processor, [picture], []))
    (one,) = per_picture(processor, [picture], torch.zeros(0, count), torch.zeros(0, count))
    chosen = torch.rand(len(one.cells), generator=torch.Generator().manual_seed(1)) < 0.35
    boxes = merge_cells(one.cells[chosen])
    assert len(boxes) <= chosen.sum()
    for x1, y1, x2, y2 in boxes:
        assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
    coverage = region_coverage(processor, [picture], boxes)[one.is_tile]
    # Painted edges are whole pixels: half of one is a lot where a token sees less than three.
    most = 0.2 if (one.cells[:, 2:] - one.cells[:, :2]).min() > 8 else 0.4
    assert coverage[chosen].min() > 1 - most and coverage[~chosen].max() < most
    assert torch.equal(coverage > 0.5, chosen)


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_merged_cells_are_the_same_region_without_overlap(rows, columns, data):
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=rows * columns, max_size=rows * columns)))
    chosen = chosen.reshape(rows, columns)
    cells = [[5 * x, 7 * y, 5 * x + 5, 7 * y + 7] for y, x in np.argwhere(chosen)]
    boxes = merge_cells(torch.tensor(cells, dtype=torch.float).view(-1, 4))
    painted = np.zeros((7 * rows, 5 * columns), dtype=int)
    for x1, y1, x2, y2 in np.array(boxes, dtype=int).reshape(-1, 4):
        painted[y1:y2, x1:x2] += 1
    assert (painted == chosen.repeat(7, 0).repeat(5, 1)).all()
    assert len(boxes) <= chosen.sum()


def test_a_block_of_cells_is_one_box():
    cells = [[x, y, x + 10, y + 10] for y in (0, 10, 20) for x in (10, 20)]
    assert merge_cells(torch.tensor(cells, dtype=torch.float)) == [[10, 0, 30, 30]]


@pytest.mark.parametrize(
    ("share", "chosen"),
    [
        (0.5, [1, 2]),
        (1.0, [0, 1, 2, 3]),
        (0.01, [1]),  # at least one
        (0.63, [1, 2, 0]),  # 2.5 of 4 rounds to 2, 2.52 to 3
    ],
)
def test_the_highest_cells_are_chosen(share, chosen):
    assert choose_cells(torch.tensor([0.2, 0.9, 0.4, 0.1]), share).nonzero().flatten().tolist() == sorted(chosen)


def test_overlap_against_hand_made_numbers():
    found = overlap(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.5, 0.0, 1.0, 0.0]))
    expected = {"IoU": 0.5 / 3, "precision": 0.5 / 2, "recall": 0.5 / 1.5, "area": 0.5}
    assert found == pytest.approx(expected)
