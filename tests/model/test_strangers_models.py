"""Weights, code and downloads that come from anyone."""

import json
import shutil
import subprocess
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
from sayo.model import loading
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


def more_weights(name):
    """With one more tensor in the language model."""
    name = f"base_model.model.model.language_model.{name}"
    return lambda path: save_file(load_file(path) | {name: torch.ones(64)}, path)


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
    # Whatever an adapter takes out of the base, or changes in it, is missing or left when the adapter is off.
    *(
        (CONFIG, with_settings(**settings), words)
        for settings, words in (
            *(
                ({"init_lora_weights": start}, "init_lora_weights=.*out of the base's weights.*Convert it by PEFT's")
                for start in ("pissa", "pissa_niter_4", "olora", "OLORA", "loftq", "corda", "lora_ga", "soon_invented")
            ),
            ({"bias": "all"}, "bias='all'.*would not be the base.*merge_and_unload"),
            ({"bias": "lora_only"}, "bias='lora_only'.*would not be the base"),
            ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication.*would not be the base"),
            ({"kasa_config": {}, "alora_invocation_tokens": [1]}, "alora_invocation_tokens=.*more than add to layers"),
            ({"r": 0}, "r=0; give 1 or more"),
            ({"r": "8"}, "r='8'; give 1 or more"),
            ({"r": 10**9}, "r=1000000000, but no weight has so many rows"),
            ({"rank_pattern": {"q_proj": 10**9}}, "no weight has so many rows"),
            ({"target_modules": ["nope"]}, "cannot be put on this model"),
            ({"target_modules": "("}, "cannot be put on this model"),
            ({"target_modules": "(.*.*.*.*.*.*)*X"}, "it took more than 1 seconds"),
            ({"exclude_modules": "(([a-z.0-9_]+)+)+X"}, "it took more than 1 seconds"),
            ({"rank_pattern": {"(([a-z.0-9]+)+)+X": 3}}, "it took more than 1 seconds"),
            ({"modules_to_save": 7}, "cannot be put on this model"),
        )
    ),
    (WEIGHTS, with_weights(lambda key, value: (key, value * float("nan"))), "weights that are not finite .*earlier"),
    (WEIGHTS, more_weights("layers.9.mlp.up_proj.lora_A.weight"), "there is no place for 1 tensors, .*layers.9"),
    (WEIGHTS, more_weights("norm.weight"), "norm.weight is a weight of the base, and another than the model's"),
    # peft only warns when no key fits, and training would go on from an adapter that does nothing.
    (WEIGHTS, with_weights(lambda key, value: (key.replace("layers", "blocks"), value)), "cannot be put on this model"),
    (WEIGHTS, with_weights(lambda key, value: (key, torch.cat([value, value]))), "cannot be put on this model"),
]


@pytest.mark.parametrize(("file", "damage", "words"), DAMAGES)
def test_an_adapter_that_is_unsafe_or_does_not_fit_is_refused(model_folders, adapter, monkeypatch, file, damage, words):
    monkeypatch.setattr(loading, "SECONDS", 1)
    damage(adapter / file)
    with pytest.raises(PolicyError, match=words):
        load_policy(model_folders["qwen3_vl"], adapter=str(adapter))
    assert "this" not in sys.modules and not (adapter.parent / "ran").exists()


def with_part(part: str, **settings):
    """Of config.json or processor_config.json: settings inside a part."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {part: content[part] | settings}))

    return change


def as_shard(name: str):
    """The weights in a shard of this name, which an index names."""

    def change(path: Path) -> None:
        weights = load_file(path)
        path.unlink()
        shard = path.parent / name
        save_file(weights, shard) if name.endswith(".safetensors") else torch.save(weights, shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (path.parent / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def without_weight(path: Path) -> None:
    weights = load_file(path)
    save_file({name: value for name, value in weights.items() if "layers.1.mlp.up_proj" not in name}, path)


MODEL, FEW_WORDS = "model.safetensors", "cannot be loaded"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ODD_MODELS = [  # file, what is done to it, words of the message
    (MODEL, as_shard("pytorch_model.bin"), r"names 'pytorch_model.bin'; shards are safetensors .*Pickles"),
    (MODEL, as_shard("../w.safetensors"), r"names '../w.safetensors'; shards are safetensors in the model's folder"),
    (MODEL, lambda path: (path.parent / "model.safetensors.index.json").write_text("[]"), "is no index of shards"),
    (MODEL, without_weight, "it lacks 1 tensors, .*layers.1.mlp.up_proj"),
    (MODEL, more_weights("norm.extra"), "there is no place for 1 tensors, .*norm.extra"),
    (MODEL, with_weights(lambda key, value: (key, value[:1])), FEW_WORDS),
    (MODEL, with_weights(lambda key, value: (key, value * float("nan"))), "weights of the model are not finite"),
    ("config.json", with_part("text_config", num_hidden_layers=10**6), "num_hidden_layers=1000000; up to 1000"),
    ("config.json", with_part("vision_config", depth=10**6), "=1000000; up to 1000 can be built"),
    ("config.json", with_part("text_config", num_hidden_layers=1), "there is no place for .* tensors, .*layers.1"),
    ("config.json", with_part("text_config", intermediate_size=10**9), "intermediate_size=1000000000; up to"),
    ("config.json", with_part("text_config", num_attention_heads=0), FEW_WORDS),
    ("config.json", with_part("text_config", rope_parameters={"rope_type": "other"}), FEW_WORDS),
    ("config.json", with_settings(quantization_config={"quant_method": "gptq", "bits": 4}), "stored in quantized form"),
    ("config.json", with_settings(video_token_id=10**6), "ids of config.json, .* to 1000000, are not those of 480"),
    (
        "generation_config.json",
        with_settings(eos_token_id=10**6),
        "ids of the end of a completion, .*1000000, are not those of 480",
    ),
    ("generation_config.json", with_settings(eos_token_id="x"), "cannot be run"),
    ("processor_config.json", with_part("image_processor", patch_size=0), "cannot encode a prompt"),
    ("processor_config.json", with_part("image_processor", do_resize=False), "cannot encode a prompt"),
    ("tokenizer.json", partial(Path.write_text, data="{}"), "must hold a tokenizer and a processor"),
    ("chat_template.jinja", partial(Path.write_text, data="{% if %}"), "cannot encode a prompt"),
    ("chat_template.jinja", partial(Path.write_text, data=LOOP), "it took more than 1 seconds"),
    ("chat_template.jinja", Path.unlink, "cannot be run"),
    ("adapter_config.json", partial(Path.write_text, data="{}"), "holds an adapter_config.json: give its base model"),
]


@pytest.mark.parametrize(("file", "damage", "words"), ODD_MODELS)
def test_an_odd_model_folder_is_refused_in_one_message_and_bounded_time(copied, monkeypatch, file, damage, words):
    monkeypatch.setattr(loading, "SECONDS", 1)
    damage(copied / file)
    with pytest.raises(PolicyError, match=words) as error:
        load_policy(str(copied))
    assert len(str(error.value)) < 1000


def test_bitsandbytes_says_nothing_of_kernels_that_it_does_not_need():
    code = "import sayo.model.loading, bitsandbytes"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_folder_of_four_bit_weights_is_read_as_such(policy, model_folders, tmp_path):
    load_policy(model_folders["qwen3_vl"], lora_rank=0, load_in_4bit=True)[0].save_pretrained(tmp_path)
    policy[1].save_pretrained(tmp_path)
    assert load_policy(str(tmp_path), load_in_4bit=True)[0].is_loaded_in_4bit


def test_shards_with_plain_names_are_read(copied, policy):
    as_shard("model-00001-of-00001.safetensors")(copied / MODEL)
    assert isinstance(load_policy(str(copied), lora_rank=0)[0], type(policy[0].get_base_model()))


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
