"""Tiny models of the real classes with the real processors, made or loaded once for all tests."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import pytest
import torch
from hypothesis import settings
from PIL import Image
from transformers import (
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from config import EMBEDDED_POLICY
from data.scenes import Scenes
from prompts import encode_prompt
from vlm import load_policy

settings.register_profile("same examples every time", derandomize=True, deadline=None)
settings.load_profile("same examples every time")


def randomize_adapter(model, seed: int = 0, scale: float = 0.02):
    """LoRA starts as the identity; give it weights, so that base and adapter differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def build_qwen2_5_vl(folder):
    """A random Qwen2.5-VL with the embedded policy's tokenizer and chat template, saved to a folder."""
    qwen3 = AutoProcessor.from_pretrained(EMBEDDED_POLICY)
    tokenizer = qwen3.tokenizer
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 200}
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=14, merge_size=2),
        chat_template=qwen3.chat_template,
    )
    id_of = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, str]:
    """A loadable folder for every model family."""
    return {"qwen3_vl": EMBEDDED_POLICY, "qwen2_5_vl": build_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"))}


@pytest.fixture(scope="session")
def policies(model_folders):
    """(model, processor) by family, with a LoRA adapter that is not the identity. Shared: leave it as it is."""
    loaded = {}
    for family, folder in model_folders.items():
        model, processor = load_policy(folder, lora_rank=4, dtype="float32")
        loaded[family] = randomize_adapter(model), processor
    return loaded


@pytest.fixture(scope="session")
def policy(policies):
    return policies["qwen3_vl"]


@pytest.fixture(scope="session")
def examples() -> list[dict]:
    return Scenes("heldout", 12)[:]


def ragged_completions(processor, lengths=(7, 1, 12, 4), seed: int = 0) -> list[torch.Tensor]:
    """Random ordinary tokens, one completion for each length."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = [
        token for token in range(len(processor.tokenizer)) if token not in processor.tokenizer.added_tokens_decoder
    ]
    chosen = torch.tensor(vocabulary)
    return [chosen[torch.randint(len(chosen), (length,), generator=generator)] for length in lengths]


@pytest.fixture
def group_of(policies, examples):
    """group_of(family, index) -> (model, processor, prompt, completions of unequal lengths)."""

    def make(family: str = "qwen3_vl", index: int = 0, lengths=(7, 1, 12, 4)):
        model, processor = policies[family]
        prompt = encode_prompt(processor, examples[index])
        return model, processor, prompt, ragged_completions(processor, lengths)

    return make


# --- rows of example files ---------------------------------------------------------------------------------------

WIDTH, HEIGHT = 40, 30
GOOD = {"image": "a.png", "question": "What color?", "answer": "red", "boxes": [[1, 2, 30, 20]]}
BOX_LISTS = [[[1, 2, 3, 4]], [[5, 6, 7, 8]]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`datasets` keeps its copies of Parquet files in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a red a.png, a blue b.png, a truncated cut.jpg and a text called fake.png."""
    folder = tmp_path / "data"
    folder.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT), "red").save(folder / "a.png")
    Image.new("RGB", (20, 50), "blue").save(folder / "b.png")
    Image.effect_noise((WIDTH, HEIGHT), 50).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:-200])
    (folder / "fake.png").write_text("not a picture")
    return folder


def write_jsonl(folder: Path, *rows, name: str = "train.jsonl") -> str:
    """A .jsonl file of the rows (dicts, or str and bytes for a line as it is)."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def without(key: str) -> dict:
    return {other: value for other, value in GOOD.items() if other != key}


def two(boxes, **more) -> dict:
    """A row with two images, a.png and b.png."""
    return without("image") | {"images": ["a.png", "b.png"], "boxes": boxes} | more
