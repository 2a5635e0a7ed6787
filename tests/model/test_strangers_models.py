"""Weights, code and downloads that come from anyone."""

import json
import shutil
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch
from conftest import GOOD, Opens
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from evaluate import EvaluateConfig
from sayo.examples.benchmarks import load_benchmark
from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError
from sayo.model.families import PolicyError
from sayo.model.loading import ADAPTER_FILES, load_policy
from sayo.settings import ConfigError, read_config


def as_pickle(folder: Path, name: str, marker: Path | None = None) -> None:
    """Replace the safetensors in a folder by a pickle of them that, with a marker, also makes a file."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    file.unlink()
    torch.save({**weights, **({"evil": Opens(marker)} if marker else {})}, folder / name)


@pytest.fixture
def copied(model_folders, tmp_path) -> Path:
    return Path(shutil.copytree(model_folders["qwen3_vl"], tmp_path / "model"))


@pytest.mark.parametrize("harmless", [True, False])
def test_weights_as_a_pickle_are_refused(copied, tmp_path, harmless):
    as_pickle(copied, "pytorch_model.bin", None if harmless else tmp_path / "ran")
    with pytest.raises(PolicyError, match="as safetensors. Pickles can run code .*pytorch_model.bin, convert it"):
        load_policy(str(copied))
    settings = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(settings | {"transformers_weights": "pytorch_model.bin"}))
    with pytest.raises(PolicyError, match="cannot be loaded"):
        load_policy(str(copied))
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_is_not_run(copied, tmp_path):
    """Neither that of its config, nor of its model class, nor of its processor."""
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    (copied / "evil.py").write_text(code)
    classes = {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil", "AutoProcessor": "evil.Evil"}
    classes |= {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoImageProcessor": "evil.Evil"}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        settings = json.loads((copied / name).read_text())
        (copied / name).write_text(json.dumps(settings | {"auto_map": classes}))
    try:
        load_policy(str(copied), lora_rank=0)
    except PolicyError:
        pass  # refused is as good as loaded by the library's own classes
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def adapter(policy, tmp_path) -> Path:
    policy[0].save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


@pytest.mark.parametrize("harmless", [True, False])
def test_an_adapter_as_a_pickle_is_refused(model_folders, adapter, tmp_path, harmless):
    as_pickle(adapter, "adapter_model.bin", None if harmless else tmp_path / "ran")
    with pytest.raises(PolicyError, match="holds no adapter_model.safetensors.*Pickles .*convert them"):
        load_policy(model_folders["qwen3_vl"], adapter=str(adapter))
    assert not (tmp_path / "ran").exists()


OTHER_KINDS = [
    {"megatron_config": {"a": 1}, "megatron_core": "this"},
    {"peft_type": "PREFIX_TUNING"},
    {"peft_type": None},
]


@pytest.mark.parametrize("change", OTHER_KINDS)
def test_an_adapter_of_another_kind_is_refused(model_folders, adapter, change):
    """With a megatron_config PEFT imports whatever module the file names."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | change))
    with pytest.raises(PolicyError, match="only LORA without the latter is read"):
        load_policy(model_folders["qwen3_vl"], adapter=str(adapter))
    assert "this" not in sys.modules


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{", '{"peft_type": ['])
def test_an_adapter_config_that_is_no_object_is_named(model_folders, adapter, text):
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(PolicyError, match="adapter_config.json is not a JSON object"):
        load_policy(model_folders["qwen3_vl"], adapter=str(adapter))


def test_damaged_adapter_weights_are_named(model_folders, adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(PolicyError, match="cannot be put on this model"):
        load_policy(model_folders["qwen3_vl"], adapter=str(adapter))


def recorded(monkeypatch, owner, name: str, result, calls: list):
    """Replace owner.name by a function that notes its arguments and gives `result` (or what it gives for them)."""
    known = getattr(owner, name)

    def call(*arguments, **options):
        calls.append((name, arguments, options))
        return result(known, *arguments, **options) if callable(result) else result

    monkeypatch.setattr(owner, name, call)


def test_a_revision_reaches_config_processor_and_weights(model_folders, monkeypatch):
    calls, folder = [], model_folders["qwen3_vl"]

    def local(known, model, **options):
        return known(folder, **options | {"revision": None}) if model == "owner/policy" else known(model, **options)

    for owner in (AutoConfig, AutoProcessor, AutoModelForImageTextToText):
        recorded(monkeypatch, owner, "from_pretrained", local, calls)
    load_policy("owner/policy", revision="c0ffee", lora_rank=0)
    asked = [options for _, (model,), options in calls if model == "owner/policy"]
    assert [(options["revision"], options["trust_remote_code"]) for options in asked] == [("c0ffee", False)] * 3
    assert asked[-1]["use_safetensors"] is True


@pytest.mark.parametrize(("given", "revision"), [("owner/adapter@c0ffee", "c0ffee"), ("owner/adapter", None)])
def test_an_adapters_revision_is_its_own(model_folders, adapter, monkeypatch, given, revision):
    calls, options = [], {"revision": revision, "allow_patterns": list(ADAPTER_FILES)}
    recorded(monkeypatch, huggingface_hub, "snapshot_download", str(adapter), calls)
    load_policy(model_folders["qwen3_vl"], adapter=given, revision="of the model")
    assert calls == [("snapshot_download", ("owner/adapter",), options)]


@pytest.mark.parametrize(("given", "revision"), [("owner/rows@c0ffee", "c0ffee"), ("owner/rows", None)])
def test_the_revision_of_a_data_set(folder, monkeypatch, given, revision):
    calls, picture = [], {"bytes": (folder / "a.png").read_bytes(), "path": None}
    table = datasets.Dataset.from_list([GOOD | {"image": picture}])
    recorded(monkeypatch, datasets, "load_dataset", table, calls)
    assert len(load_examples(given, split="test")) == 1
    assert calls == [("load_dataset", ("owner/rows",), {"split": "test", "revision": revision})]


@pytest.mark.parametrize("given", ["owner/rows@", "owner/rows@a@b", "@c0ffee", "../rows@c0ffee"])
def test_a_revision_that_is_none_is_no_hub_id(given, monkeypatch):
    recorded(monkeypatch, datasets, "load_dataset", lambda *_, **__: pytest.fail("it was asked for"), [])
    with pytest.raises(DataError, match="there is no such file or folder.*owner/name@revision"):
        load_examples(given)


def test_the_revision_of_a_benchmark(monkeypatch):
    calls, rows = [], {"index": [1], "question": ["Q? Options: A: x, B: y"], "image": [None], "answer": ["A"]}
    recorded(monkeypatch, datasets, "load_dataset", datasets.Dataset.from_dict(rows), calls)
    with pytest.raises(DataError, match="no picture"):
        load_benchmark("mmstar", revision="c0ffee")
    assert calls == [("load_dataset", ("Lin-Chen/MMStar",), {"split": "val", "revision": "c0ffee"})]


@pytest.mark.parametrize("entry", ["mmstar=", "ai2d=x", "x"])
def test_benchmark_revisions_name_benchmarks_that_are_evaluated(entry):
    flags = ["--benchmarks", "mmstar", "--benchmark_revisions"]
    assert read_config(EvaluateConfig, [*flags, "mmstar=c0ffee"]).benchmark_revisions == ["mmstar=c0ffee"]
    with pytest.raises(ConfigError, match="benchmark_revisions=.*give name=revision"):
        read_config(EvaluateConfig, [*flags, entry])
