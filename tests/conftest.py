"""Tiny models of the real classes with the real processors, made or loaded once for all tests."""

import json
import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Sums over two threads are not those over one, and processes of several threads each wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import datasets
import pytest
import resumed_runs
import tiny_models
import torch
from browser import open_browser, set_screen
from hypothesis import settings
from PIL import Image

from sayo.examples.scenes.scenes import Scenes
from sayo.model.loading import load_policy
from sayo.model.prompts import encode_prompt
from sayo.show.report import page

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


def adapted(folder, scale: float = 0.02, **options):
    """(model, processor) with a LoRA adapter that is not the identity."""
    torch.manual_seed(0)  # of LoRA's own random half
    model, processor = load_policy(folder, **({"lora_rank": 4, "dtype": "float32"} | options))
    return randomize_adapter(model, scale=scale), processor


FAMILIES = ("qwen3_vl", "qwen2_5_vl", "internvl", "smolvlm", "qwen3_5")
PACKED = FAMILIES[:4]  # Qwen3.5 has linear attention
LAYOUTS = [(family, "padded") for family in FAMILIES] + [(family, "packed") for family in PACKED]


class _Lazy(dict):
    """A dict that makes what is missing, once."""

    def __init__(self, make):
        self.make = make

    def __missing__(self, key):
        return self.setdefault(key, self.make(key))


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, str]:
    """A loadable folder for every model family."""
    return _Lazy(lambda family: tiny_models.build(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def policies(model_folders):
    """What `adapted` gives, by family. Shared: leave it as it is."""
    return _Lazy(lambda family: adapted(model_folders[family]))


@pytest.fixture(scope="session")
def policy(policies):
    return policies["qwen3_vl"]


@pytest.fixture(scope="session")
def saved_adapter(model_folders, tmp_path_factory) -> str:
    """The folder of an adapter of the embedded policy that says other things than it."""
    folder = tmp_path_factory.mktemp("adapter")
    adapted(model_folders["qwen3_vl"], 0.3, lora_rank=2)[0].save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="session")
def examples() -> list[dict]:
    return Scenes("heldout", 12)[:]


def ragged_completions(processor, lengths=(7, 1, 12, 4), seed: int = 0) -> list[torch.Tensor]:
    """Random ordinary tokens, one completion for each length."""
    generator = torch.Generator().manual_seed(seed)
    special = processor.tokenizer.added_tokens_decoder
    chosen = torch.tensor([token for token in range(len(processor.tokenizer)) if token not in special])
    return [chosen[torch.randint(len(chosen), (length,), generator=generator)] for length in lengths]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a whole run of resumed_runs.SMALL. Shared: leave it as it is."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    resumed_runs.run(folder)
    return folder


@pytest.fixture
def group_of(policies, examples):
    """group_of(family, index) -> (model, processor, prompt, completions of unequal lengths)."""

    def make(family: str = "qwen3_vl", index: int = 0, lengths=(7, 1, 12, 4)):
        processor = policies[family][1]
        return *policies[family], encode_prompt(processor, examples[index]), ragged_completions(processor, lengths)

    return make


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


class Opens:
    """A pickle of this makes a file when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def show(browser, tmp_path):
    """show(report) opens its page at a desktop's size; afterwards nothing may have been logged or asked for."""

    def open_page(data: dict | str, *, width: int = 1200, height: int = 800, **screen):
        path = tmp_path / "report.html"
        path.write_text(data if isinstance(data, str) else page(data), encoding="utf-8")
        set_screen(browser, width, height, **screen)
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(path.as_uri())
        return browser

    yield open_page
    messages = [entry["message"] for entry in browser.get_log("browser")]
    # No error, and no violation of the page's policy; willReadFrequently is advice for these tests.
    assert [message for message in messages if "willReadFrequently" not in message] == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [entry["params"]["request"]["url"] for entry in asked if entry["method"] == "Network.requestWillBeSent"]
    assert asked and all(re.match(r"data:image/|file://.*/report\.html$|about:blank$", url) for url in asked)
