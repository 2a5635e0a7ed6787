"""Boxes to image tokens, and prompts through the model's own processor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sayo.model.families import PatchRows
from sayo.model.loading import load_policy
from sayo.model.prompts import encode_prompt, prompt_text, question_text, region_coverage

ROW_FAMILIES = ("qwen3_vl", "qwen2_5_vl")


def blank(width, height):
    return Image.new("RGB", (width, height), "gray")


@pytest.mark.parametrize("family", ROW_FAMILIES)
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
    with pytest.raises(ValueError, match="3 lists of boxes for 2 pictures"):
        region_coverage(policy[1], [blank(64, 64), blank(96, 64)], [[], [], []])


@pytest.mark.parametrize("family", ROW_FAMILIES)
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


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "What is <|image_pad|>?"}, r"row-7.*<\|image_pad\|>"),
        ({"question": "What?", "choices": ["a", "<|video_pad|>"]}, r"row-7.*<\|video_pad\|>.*choices"),
    ],
)
def test_a_placeholder_in_the_text_is_named(policy, row, words):
    with pytest.raises(ValueError, match=words):
        encode_prompt(policy[1], row | {"image": blank(64, 64), "id": "row-7"})


def test_a_box_that_vanishes_when_a_huge_picture_is_shrunk_keeps_its_place(model_folders):
    _, processor = load_policy(model_folders["qwen3_vl"], lora_rank=0)
    PatchRows.set_max_pixels(processor, 128 * 128)
    coverage = region_coverage(processor, [blank(2000, 2000)], [[1500, 300, 1501, 301]]).view(4, 4)
    assert 0 < coverage.sum() <= 1 and coverage[:2, 2:].sum() == coverage.sum()


@pytest.mark.parametrize("box", [[500, 500, 600, 600], [50, 10, 20, 40], [10, 10, 10, 20], [-20, 0, -5, 30]])
def test_a_box_that_is_none_is_named(policy, box):
    with pytest.raises(ValueError, match=r"box \[.*100 x 80"):
        region_coverage(policy[1], [blank(100, 80)], [box])


def test_regions_of_paths_and_of_tensors_are_the_same(policy, tmp_path):
    blank(96, 64).save(tmp_path / "picture.png")
    expected = region_coverage(policy[1], [blank(96, 64)], [[0, 0, 40, 30]])
    assert torch.equal(region_coverage(policy[1], [str(tmp_path / "picture.png")], [[0, 0, 40, 30]]), expected)
    assert torch.equal(region_coverage(policy[1], [blank(96, 64)], torch.tensor([[0, 0, 40, 30]])), expected)
