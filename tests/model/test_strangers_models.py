"""Weights, code and downloads that come from anyone."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import pytest
import torch
from conftest import GOOD, Opens
from safetensors.torch import load_file, save_file
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


def with_settings(**settings):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def with_weights(change):
    return lambda path: save_file(dict(change(*pair) for pair in load_file(path).items()), path)


CONFIG, WEIGHTS = ADAPTER_FILES
NO_WEIGHTS = "holds no adapter_model.safetensors.*Pickles .*convert them"
DAMAGES = [  # file, what is done to it, words of the message
    (WEIGHTS, lambda path: as_pickle(path.parent, "adapter_model.bin"), NO_WEIGHTS),
    (WEIGHTS, lambda path: as_pickle(path.parent, "adapter_model.bin", path.parents[1] / "ran"), NO_WEIGHTS),
    # With a megatron_config PEFT imports whatever module the file names.
    (CONFIG, with_settings(megatron_config={"a": 1}, megatron_core="this"), "only LORA without the latter is read"),
    (CONFIG, with_settings(peft_type="PREFIX_TUNING"), "only LORA without the latter is read"),
    (CONFIG, with_settings(peft_type=None), "only LORA without the latter is read"),
    *(
        (CONFIG, partial(Path.write_text, data=text), "adapter_config.json is not a JSON object")
        for text in ("", "[]", "[" * 100_000, "{", '{"peft_type": [')
    ),
    (WEIGHTS, partial(Path.write_bytes, data=b"\xff" * 100), "cannot be put on this model"),
    # peft only warns when no key fits, and training would go on from an adapter that does nothing.
    (WEIGHTS, with_weights(lambda key, value: (key.replace("layers", "blocks"), value)), "cannot be put on this model"),
    (WEIGHTS, with_weights(lambda key, value: (key, torch.cat([value, value]))), "cannot be put on this model"),
]


@pytest.mark.parametrize(("file", "damage", "words"), DAMAGES)
def test_an_adapter_that_is_unsafe_or_does_not_fit_is_refused(model_folders, adapter, file, damage, words):
    damage(adapter / file)
    with pytest.raises(PolicyError, match=words):
        load_policy(model_folders["qwen3_vl"], adapter=str(adapter))
    assert "this" not in sys.modules and not (adapter.parent / "ran").exists()


def test_a_revision_reaches_config_processor_and_weights(model_folders, monkeypatch):
    loaders, folder = [], model_folders["qwen3_vl"]

    def local(known, model, **options):
        return known(folder, **options | {"revision": None}) if model == "owner/policy" else known(model, **options)

    for owner in (AutoConfig, AutoProcessor, AutoModelForImageTextToText):
        loaders.append(mock.Mock(side_effect=partial(local, owner.from_pretrained)))
        monkeypatch.setattr(owner, "from_pretrained", loaders[-1])
    load_policy("owner/policy", revision="c0ffee", lora_rank=0)
    for loader in loaders:
        (options,) = [options for (model,), options in loader.call_args_list if model == "owner/policy"]
        assert options["revision"] == "c0ffee" and options["trust_remote_code"] is False
    assert options["use_safetensors"] is True


@pytest.mark.parametrize(("given", "revision"), [("owner/adapter@c0ffee", "c0ffee"), ("owner/adapter", None)])
def test_an_adapters_revision_is_its_own(model_folders, adapter, given, revision):
    with mock.patch.object(huggingface_hub, "snapshot_download", return_value=str(adapter)) as download:
        load_policy(model_folders["qwen3_vl"], adapter=given, revision="of the model")
    download.assert_called_once_with("owner/adapter", revision=revision, allow_patterns=list(ADAPTER_FILES))


@pytest.mark.parametrize(("given", "revision"), [("owner/rows@c0ffee", "c0ffee"), ("owner/rows", None)])
def test_the_revision_of_a_data_set(folder, given, revision):
    picture = {"bytes": (folder / "a.png").read_bytes(), "path": None}
    table = datasets.Dataset.from_list([GOOD | {"image": picture}])
    with mock.patch.object(datasets, "load_dataset", return_value=table) as load:
        assert len(load_examples(given, split="test")) == 1
    load.assert_called_once_with("owner/rows", split="test", revision=revision)


@pytest.mark.parametrize("given", ["owner/rows@", "owner/rows@a@b", "@c0ffee", "../rows@c0ffee"])
def test_a_revision_that_is_none_is_no_hub_id(given):
    words = "there is no such file or folder.*owner/name@revision"
    with mock.patch.object(datasets, "load_dataset") as load, pytest.raises(DataError, match=words):
        load_examples(given)
    load.assert_not_called()


def test_the_revision_of_a_benchmark():
    rows = {"index": [1], "question": ["Q? Options: A: x, B: y"], "image": [None], "answer": ["A"]}
    table = datasets.Dataset.from_dict(rows)
    with mock.patch.object(datasets, "load_dataset", return_value=table) as load:
        with pytest.raises(DataError, match="no picture"):
            load_benchmark("mmstar", revision="c0ffee")
    load.assert_called_once_with("Lin-Chen/MMStar", split="val", revision="c0ffee")


@pytest.mark.parametrize("entry", ["mmstar=", "ai2d=x", "x"])
def test_benchmark_revisions_name_benchmarks_that_are_evaluated(entry):
    flags = ["--benchmarks", "mmstar", "--benchmark_revisions"]
    assert read_config(EvaluateConfig, [*flags, "mmstar=c0ffee"]).benchmark_revisions == ["mmstar=c0ffee"]
    with pytest.raises(ConfigError, match="benchmark_revisions=.*give name=revision"):
        read_config(EvaluateConfig, [*flags, entry])
