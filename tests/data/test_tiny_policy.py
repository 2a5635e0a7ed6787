"""The embedded policy is a real Qwen3-VL, loads quietly, knows something; its build script runs in small."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from data import build_tiny_policy as build
from data.build_tiny_policy import EXTENTS, NAMES, PAINTS, SPECIAL_TOKENS, Batches, cell_labels, measure
from sayo.examples.scenes.scenes import Scenes
from sayo.model.prompts import SYSTEM_PROMPT
from sayo.run.provenance import digest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "data" / "tiny_policy"


@pytest.fixture(scope="module")
def policy():
    model = AutoModelForImageTextToText.from_pretrained(FOLDER).eval()
    return model, AutoProcessor.from_pretrained(FOLDER)


def test_the_fingerprint_stays_so_that_former_runs_resume():
    assert digest(FOLDER) == "184aef48ceda5da5"  # of every byte, and so of 8 MB at most


def test_loads_offline_without_a_warning():
    code = (  # in a process of its own, because libraries print many warnings only once
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(FOLDER)!r})\n"
        f"processor = AutoProcessor.from_pretrained({str(FOLDER)!r})\n"
        "print(*(type(part).__name__ for part in (model, processor, processor.tokenizer, processor.image_processor)))\n"
    )
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | quiet)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Qwen3VLForConditionalGeneration Qwen3VLProcessor Qwen2Tokenizer Qwen2VLImageProcessor\n"
    assert not [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("Loading weights")]


def test_weights_are_finite_float32_and_the_tokenizer_fits(policy):
    model, processor = policy
    tokenizer = processor.tokenizer
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    assert model.config.text_config.vocab_size == len(tokenizer)
    assert 1e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.image_token_id == processor.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert set(SPECIAL_TOKENS) <= set(tokenizer.all_special_tokens)
    assert all(len(tokenizer(token)["input_ids"]) == 1 for token in SPECIAL_TOKENS)
    for text in ("What color is the small cross?", "Grüße, 日本 — 2024!\n\ttabs", "</answer> x<answer>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_template_renders_system_turn_picture_and_answer(policy):
    processor = policy[1]
    picture_and_text = [{"type": "image"}, {"type": "text", "text": "What color is the star?"}]
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": picture_and_text}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What color is the star?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "It is red."}]})
    whole = processor.apply_chat_template(messages, tokenize=False)
    assert whole == prompt + "It is red.<|im_end|>\n"


def test_a_picture_becomes_as_many_tokens_as_it_has_cells(policy):
    processor = policy[1]
    text = "<|vision_start|><|image_pad|><|vision_end|>"
    encoded = processor(text=[text], images=[Image.new("RGB", (150, 110))], return_tensors="pt")
    assert encoded["image_grid_thw"].tolist() == [[1, 6, 10]]  # 3 x 5 cells of 32 pixels, the nearest
    assert (encoded["input_ids"] == processor.image_token_id).sum() == 15
    assert encoded["pixel_values"].shape == (60, 3 * 2 * 16 * 16)


def test_answers_heldout_questions_by_plain_generate(policy):
    figures = measure(*policy, "heldout", 48)
    assert 0.3 < figures["accuracy"] < 0.95, figures
    assert 10 <= figures["tokens"] <= 40, figures


def test_sampling_at_temperature_one_is_diverse_and_keeps_the_format(policy):
    torch.manual_seed(0)
    first = measure(*policy, "validation", 32, temperature=1.0)["texts"]
    second = measure(*policy, "validation", 32, temperature=1.0)["texts"]
    assert sum(a != b for a, b in zip(first, second, strict=True)) >= 8
    assert sum(text.endswith("</answer>") for text in first + second) >= 56


def test_cell_labels_say_what_a_visual_token_holds():
    thing = {"name": "star", "color": "red", "size": "small", "letter": "", "box": (40, 4, 60, 24)}
    entry = {"name": "legend", "color": "blue", "size": "", "letter": "B", "box": (0, 32, 26, 46)}
    example = {"image": Image.new("RGB", (96, 64)), "objects": [thing, entry]}
    classes, boxes = cell_labels(example, rows=2, columns=3)
    assert [NAMES[name] for name in classes[:, 0]] == ["nothing", "star", "nothing", "B", "nothing", "nothing"]
    assert [PAINTS[classes[cell, 1]] for cell in (1, 3)] == ["red", "blue"]
    assert [EXTENTS[classes[cell, 2]] for cell in (1, 3)] == ["small", ""] and classes[[1, 3], 3].tolist() == [2, 4]
    assert boxes[1].tolist() == pytest.approx([40 / 96, 4 / 64, 60 / 96, 24 / 64])


def test_labels_are_the_completion_and_nothing_else(policy):
    processor = policy[1]
    batches = Batches(processor, first=3, count=1, batch_size=4)
    with_system, without = batches[0]
    examples = Scenes("train", 100, seed=build.BUILD_SEED)
    for half, pair in ((with_system, examples[12:14]), (without, examples[14:16])):
        for labels, ids, example in zip(half["labels"], half["input_ids"], pair, strict=True):
            assert processor.tokenizer.decode(labels[labels != -100]) == f"{example['reasoning']}<|im_end|>"
            assert (SYSTEM_PROMPT in processor.tokenizer.decode(ids)) is (half is with_system)


def test_smoke_build(tmp_path):
    small = {"vision_steps": 2, "steps": 3, "looking_steps": 1, "evaluate_every": 3, "look_at": 16, "batch_size": 8}
    small |= {"seed": 0, "target": 0.9, "muon_rate": 4e-3, "adam_rate": 2e-3, "tokenizer_examples": 200}
    (tmp_path / "policy").mkdir()
    for name in ("README.md", "stale.bin"):
        (tmp_path / "policy" / name).write_text(name)
    build.build(tmp_path / "policy", Namespace(**small, checkpoints=tmp_path / "looks"))
    assert (tmp_path / "policy" / "README.md").exists() and not (tmp_path / "policy" / "stale.bin").exists()
    folders = (tmp_path / "looks" / "vision", tmp_path / "policy")
    before, after = (AutoModelForImageTextToText.from_pretrained(folder) for folder in folders)
    for (name, weight), other in zip(before.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(weight, other) is ("visual" in name), name
    assert after.config.model_type == "qwen3_vl"
    assert AutoProcessor.from_pretrained(tmp_path / "policy").tokenizer.eos_token == "<|im_end|>"


def test_vision_stage_changes_every_weight_of_the_tower_the_same_way_for_the_same_seed(policy):
    processor, runs = policy[1], []
    for _ in range(2):
        torch.manual_seed(0)
        model = build.build_model(processor.tokenizer)
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        shares = build.train_vision(model, DataLoader(Batches(processor, 0, 2, 8), batch_size=None))
        assert len(shares) == 4 and all(0 <= share <= 1 for share in shares)
        runs.append(dict(model.named_parameters()))
    for name, weight in runs[0].items():
        assert torch.equal(before[name], weight) is ("visual" not in name), name
        assert torch.equal(runs[1][name], weight), name
