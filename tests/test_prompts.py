"""Boxes to image tokens, and prompts through the model's own processor."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from families import PatchRows
from prompts import encode_prompt, prompt_text, question_text, region_coverage
from vlm import load_policy

CELL = {"qwen3_vl": 32, "qwen2_5_vl": 28}


def blank(width, height):
    return Image.new("RGB", (width, height), "gray")


@pytest.mark.parametrize("family", CELL)
def test_coverage_is_exact_where_the_picture_is_whole_cells(policies, family):
    """The right cells in the right order: an independent NumPy grid of covered pixels."""
    processor, cell = policies[family][1], CELL[family]
    width, height, boxes = (
        5 * cell,
        3 * cell,
        [[cell // 2, 0, 2 * cell, cell], [3 * cell, cell, 4 * cell, 3 * cell - 7]],
    )
    pixels = np.zeros((height, width))
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] = 1
    expected = pixels.reshape(3, cell, 5, cell).mean((1, 3)).flatten()
    found = region_coverage(processor, [blank(width, height)], boxes)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("family", CELL)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_covered_share_is_the_area_of_the_box(policies, family, data):
    """Whatever resizing happens to a picture, its box keeps its share of it."""
    processor = policies[family][1]
    width, height = data.draw(st.integers(60, 400)), data.draw(st.integers(60, 400))
    x1, y1 = data.draw(st.integers(0, width - 20)), data.draw(st.integers(0, height - 20))
    x2, y2 = data.draw(st.integers(x1 + 16, width)), data.draw(st.integers(y1 + 16, height))
    coverage = region_coverage(processor, [blank(width, height)], [[x1, y1, x2, y2]])
    assert coverage.min() >= 0 and coverage.max() <= 1
    share = (x2 - x1) * (y2 - y1) / (width * height)
    assert coverage.mean().item() == pytest.approx(share, abs=0.004 + 0.05 * share)


@pytest.mark.parametrize(
    ("boxes", "check"),
    [
        ([], lambda c: c.sum() == 0),
        ([[0, 0, 100, 70]], lambda c: (c == 1).all()),
        ([[50, 35, 51, 36]], lambda c: c.sum() > 0),  # one pixel keeps its share
        ([[50.2, 35.1, 50.3, 35.2]], lambda c: c.sum() > 0),  # and so does a part of a pixel
        ([[99.6, 69.6, 100, 70]], lambda c: c.sum() > 0),  # and the last corner
        ([[10, 10, 60, 60], [10, 10, 60, 60]], lambda c: c.max() <= 1),  # a pixel counts once
    ],
)
def test_coverage_of_special_boxes(policy, boxes, check):
    assert check(region_coverage(policy[1], [blank(100, 70)], boxes))


def test_every_picture_needs_its_list_of_boxes(policy):
    pictures = [blank(64, 64), blank(96, 64)]
    coverage = region_coverage(policy[1], pictures, [[], [[0, 0, 96, 64]]])
    assert coverage.tolist() == [0.0] * 4 + [1.0] * 6
    assert region_coverage(policy[1], pictures, [[[0, 0, 64, 64]], []]).tolist() == [1.0] * 4 + [0.0] * 6
    with pytest.raises(ValueError, match="3 lists of boxes for 2 pictures"):
        region_coverage(policy[1], pictures, [[], [], []])


@pytest.mark.parametrize("family", CELL)
def test_a_prompt_is_what_the_processor_makes_of_the_chat(policies, examples, family):
    processor = policies[family][1]
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Look."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": examples[0]["question"]}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(text=[text], images=[examples[0]["image"]], return_tensors="pt")
    prompt = encode_prompt(processor, examples[0], "Look.")
    assert torch.equal(prompt.input_ids, expected["input_ids"][0])
    assert torch.equal(prompt.model_inputs["pixel_values"], expected["pixel_values"])
    assert (prompt.input_ids[prompt.image_token_index] == processor.image_token_id).all()
    assert len(prompt.image_token_index) == len(prompt.coverage) == (prompt.input_ids == processor.image_token_id).sum()
    assert "Look." not in prompt_text(processor, examples[0], None)


def test_choices_are_lettered_below_the_question():
    example = {"image": blank(64, 64), "question": "Which?", "choices": ["cat", "dog"]}
    assert question_text(example) == "Which?\nA. cat\nB. dog"


def test_a_placeholder_in_the_question_is_named(policy):
    example = {"image": blank(64, 64), "question": "What is <|image_pad|>?", "id": "row-7"}
    with pytest.raises(ValueError, match=r"row-7.*<\|image_pad\|>"):
        encode_prompt(policy[1], example)


def test_fewer_pixels_make_fewer_tokens_and_the_region_follows(model_folders):
    _, processor = load_policy(model_folders["qwen3_vl"], lora_rank=0)
    picture, boxes = blank(320, 320), [[0, 0, 160, 320]]
    full = region_coverage(processor, [picture], boxes)
    PatchRows.set_max_pixels(processor, 160 * 160)
    small = region_coverage(processor, [picture], boxes)
    assert len(full) == 100 and len(small) == 25 <= PatchRows.max_image_tokens(processor)
    assert small.view(5, 5).mean(0).tolist() == pytest.approx([1, 1, 0.5, 0, 0], abs=0.06)


def test_a_box_that_vanishes_when_a_huge_picture_is_shrunk_keeps_its_place(model_folders):
    _, processor = load_policy(model_folders["qwen3_vl"], lora_rank=0)
    PatchRows.set_max_pixels(processor, 128 * 128)
    coverage = region_coverage(processor, [blank(2000, 2000)], [[1500, 300, 1501, 301]]).view(4, 4)
    assert 0 < coverage.sum() <= 1 and coverage[:2, 2:].sum() == coverage.sum()


@pytest.mark.parametrize("box", [[500, 500, 600, 600], [50, 10, 20, 40], [10, 10, 10, 20], [-20, 0, -5, 30]])
def test_a_box_that_is_none_is_named(policy, box):
    with pytest.raises(ValueError, match=r"box \[.*100 x 80"):
        region_coverage(policy[1], [blank(100, 80)], [box])


def test_a_placeholder_in_the_choices_is_named(policy):
    example = {"image": blank(64, 64), "question": "What?", "choices": ["a", "<|video_pad|>"], "id": "row-8"}
    with pytest.raises(ValueError, match=r"row-8.*<\|video_pad\|>.*choices"):
        encode_prompt(policy[1], example)


def test_regions_of_paths_and_of_tensors_are_the_same(policy, tmp_path):
    blank(96, 64).save(tmp_path / "picture.png")
    expected = region_coverage(policy[1], [blank(96, 64)], [[0, 0, 40, 30]])
    assert torch.equal(region_coverage(policy[1], [str(tmp_path / "picture.png")], [[0, 0, 40, 30]]), expected)
    assert torch.equal(region_coverage(policy[1], [blank(96, 64)], torch.tensor([[0, 0, 40, 30]])), expected)
