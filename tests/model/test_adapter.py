"""What a run leaves for others: an adapter for plain PEFT, its card, and merging into full-precision weights."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from conftest import FAMILIES, adapted
from huggingface_hub import ModelCard
from oracle import encoded, logps, plain_logprobs
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

import train_rl
from evaluate import METRICS
from rollout import sample_group
from sayo.model.loading import load_policy
from sayo.model.prompts import encode_prompt
from sayo.run.card import place, write_model_card
from sayo.run.config import EMBEDDED_POLICY
from sayo.run.files import save_adapter
from sayo.settings import ConfigError, UserError, read_config
from tools import merge
from tools.merge import MergeConfig
from train_rl import Config

ABSOLUTE = re.compile(r"""(?:^|[\s"'`(=\[|])(/\w[\w./-]*|[A-Z]:\\)""", re.MULTILINE)


@pytest.fixture
def saved(model_folders, tmp_path):
    """(model, processor, flags of the merge): an adapter that changes much, in tmp_path/adapter."""
    model, processor = adapted(model_folders["qwen3_vl"], scale=0.05)
    save_adapter(model, tmp_path / "adapter")
    return model, processor, {"adapter": str(tmp_path / "adapter"), "output": str(tmp_path / "merged")}


# --- plain PEFT --------------------------------------------------------------------------------------------------


def test_dropout_that_an_adapter_brings_along_is_out_of_what_is_scored(saved, model_folders, examples, tmp_path):
    """In training mode, which gradient checkpointing needs, another policy was updated than the one that sampled."""
    model, processor, flags = saved
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.5}))
    loaded, _ = load_policy(model_folders["qwen3_vl"], adapter=flags["adapter"], lora_rank=4, dtype="float32")
    prompt, completions = encoded(processor, examples[0])
    expected = logps(model, prompt, completions)
    for training in (False, True):
        assert torch.equal(logps(loaded.train(training), prompt, completions), expected)


@pytest.mark.parametrize(("family", "in_4bit"), [*((family, False) for family in FAMILIES), ("qwen3_vl", True)])
def test_an_adapter_loads_with_plain_peft_and_says_the_same(model_folders, examples, tmp_path, family, in_4bit):
    model, processor = adapted(model_folders[family], scale=0.05, load_in_4bit=in_4bit)
    save_adapter(model, tmp_path)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    bits = BitsAndBytesConfig(**nf4, llm_int8_skip_modules=["model.visual", "lm_head"]) if in_4bit else None
    named = PeftConfig.from_pretrained(tmp_path).base_model_name_or_path
    base = AutoModelForImageTextToText.from_pretrained(named, quantization_config=bits, device_map="cpu")
    # In eval mode bitsandbytes computes in bfloat16 on newer CPUs.
    plain = PeftModel.from_pretrained(base, str(tmp_path)).train(in_4bit)
    prompt, completions = encoded(processor, examples[0])
    found = torch.cat([plain_logprobs(plain, prompt, completion) for completion in completions])
    torch.testing.assert_close(found, logps(model, prompt, completions), atol=1e-4 if in_4bit else 1e-5, rtol=0)


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("name", ["data/tiny_policy", EMBEDDED_POLICY])
def test_an_adapter_names_its_base_model_not_a_folder_of_this_machine(tmp_path, name, load_in_4bit):
    """adapter_config.json and PEFT's own README held the path of the repository."""
    model, _ = load_policy(name, lora_rank=2, load_in_4bit=load_in_4bit)
    save_adapter(model, tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "data/tiny_policy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not ABSOLUTE.search((tmp_path / "adapter_config.json").read_text())


def test_an_adapter_names_the_revision_and_the_base_that_it_was_trained_on_last(model_folders, tmp_path):
    folder = shutil.copytree(model_folders["qwen3_vl"], tmp_path / "copy")
    model, _ = load_policy(str(folder), lora_rank=2, revision="v1")
    save_adapter(model, tmp_path / "first")
    first = PeftConfig.from_pretrained(tmp_path / "first")
    assert (first.base_model_name_or_path, first.revision) == (str(folder), "v1")
    model, _ = load_policy("data/tiny_policy", adapter=str(tmp_path / "first"))
    save_adapter(model, tmp_path / "second")
    second = PeftConfig.from_pretrained(tmp_path / "second")
    assert (second.base_model_name_or_path, second.revision) == ("data/tiny_policy", None)


def adapter_of(folder: Path, **settings) -> str:
    """The folder of a plain PEFT adapter of the embedded policy, of rank 4 and alpha 8, all of whose weights count."""
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(EMBEDDED_POLICY), LoraConfig(**settings))
    with torch.no_grad():
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.add_(0.02 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return str(folder)


KINDS = [  # settings of an adapter, whether it can be merged; None: it is refused
    ({}, True),
    ({"init_lora_weights": "gaussian"}, True),
    ({"init_lora_weights": "orthogonal"}, True),
    ({"use_dora": True, "use_rslora": True}, True),
    ({"rank_pattern": {"layers.0": 2}, "alpha_pattern": {"layers.1": 3}}, True),
    ({"target_modules": ["q_proj", "lm_head"]}, True),  # head and embeddings of this model are one tensor
    ({"target_modules": ["q_proj", "embed_tokens"]}, True),
    ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
    ({"modules_to_save": ["lm_head", "norm"]}, True),
    ({"trainable_token_indices": [5, 6]}, True),
    ({"lora_bias": True}, False),
    ({"init_lora_weights": "pissa"}, None),
    ({"init_lora_weights": "olora"}, None),
    ({"bias": "all"}, None),
    ({"bias": "lora_only", "target_modules": "all-linear"}, None),
]


@pytest.mark.parametrize(("settings", "is_mergeable"), KINDS)
def test_an_adapter_off_is_the_base_on_is_pefts_own_and_merged_says_the_same(
    policy, examples, tmp_path, settings, is_mergeable
):
    """With PiSSA, OLoRA and trained biases, KL and "before" were taken of another model than the base."""
    folder, (prompt, completions) = adapter_of(tmp_path / "adapter", **settings), encoded(policy[1], examples[0])
    if is_mergeable is None:
        with pytest.raises(UserError, match="would not be the base"):
            load_policy(EMBEDDED_POLICY, adapter=folder)
        return
    model, _ = load_policy(EMBEDDED_POLICY, adapter=folder, lora_rank=0)
    plain = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(EMBEDDED_POLICY), folder)
    expected = torch.cat([plain_logprobs(plain, prompt, completion) for completion in completions])
    torch.testing.assert_close(logps(model, prompt, completions), expected, atol=2e-5, rtol=1e-5)
    base = logps(load_policy(EMBEDDED_POLICY, lora_rank=0)[0], prompt, completions)
    with model.disable_adapter():
        torch.testing.assert_close(logps(model, prompt, completions), base, atol=1e-6, rtol=0)
    assert (expected - base).abs().max() > 0.01
    flags = MergeConfig(adapter=folder, model=EMBEDDED_POLICY, output=str(tmp_path / "merged"))
    if not is_mergeable:
        with pytest.raises(UserError, match="cannot be merged.*base layer has no bias"):
            merge.merge(flags)
        return
    merged = AutoModelForImageTextToText.from_pretrained(merge.merge(flags))
    found = torch.cat([plain_logprobs(merged, prompt, completion) for completion in completions])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    is_tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings == merged.config.get_text_config().tie_word_embeddings == is_tied


def test_a_merged_model_that_says_something_else_is_not_kept(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "merge_weights", lambda policy: policy.unload())
    with pytest.raises(ConfigError, match="merged model says something else.*log-probs differ by .*not kept"):
        merge.merge(MergeConfig(**saved[2]))
    assert not list(tmp_path.glob("merged*"))


def test_merging_takes_a_revision_of_the_hub_and_checks_the_adapter_first(saved, tmp_path):
    broken = shutil.copytree(tmp_path / "adapter", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"")
    flags = MergeConfig(**saved[2] | {"adapter": "owner/adapter@c0ffee"})
    with mock.patch.object(huggingface_hub, "snapshot_download", return_value=str(broken)) as download:
        with mock.patch.object(merge, "load_policy") as load, pytest.raises(UserError, match="is damaged"):
            merge.merge(flags)
    load.assert_not_called()
    assert download.call_args.args == ("owner/adapter",) and download.call_args.kwargs["revision"] == "c0ffee"
    with mock.patch.object(huggingface_hub, "snapshot_download", return_value=str(tmp_path / "adapter")):
        assert merge.merge(flags).is_dir()


LORA_FLAGS = [  # flags beside an adapter of rank 4 and alpha 8, what the config then says, or words of the error
    ([], (4, 8, None)),
    (["--lora_rank", "4", "--lora_alpha", "8"], (4, 8, None)),
    (["--lora_rank", "16"], "lora_rank=16: adapter=.* has 4; leave lora_rank out"),  # the default without an adapter
    (["--lora_rank", "8", "--lora_alpha", "32"], "lora_rank=8: .*\nlora_alpha=32: .* has 8"),
]


@pytest.mark.parametrize(("flags", "expected"), LORA_FLAGS)
def test_flags_beside_an_adapter_must_be_what_it_is(tmp_path, flags, expected):
    """They did nothing, and config.yaml and the card said them."""
    words = ["--adapter", adapter_of(tmp_path), *flags]
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            read_config(Config, words)
    else:
        config = read_config(Config, words)
        assert (config.lora_rank, config.lora_alpha, config.lora_targets) == expected
    alone = read_config(Config, flags)
    assert (alone.lora_targets, alone.lora_rank) == ("language", alone.lora_rank or 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_targets_beside_an_adapter_must_be_its_layers(model_folders, tmp_path, family):
    for targets, other in (("language", "all-linear"), ("all-linear", "language")):
        model, _ = load_policy(model_folders[family], lora_rank=2, lora_targets=targets)
        save_adapter(model, tmp_path / targets)
        flags = {"adapter": str(tmp_path / targets), "lora_rank": 2}
        load_policy(model_folders[family], **flags, lora_targets=targets)
        with pytest.raises(ConfigError, match=f"lora_targets='{other}': .* adapts other layers; leave it out"):
            load_policy(model_folders[family], **flags, lora_targets=other)


# --- the card ----------------------------------------------------------------------------------------------------

SMALL = {"limit": 8, "max_steps": 1, "groups_per_step": 1, "num_generations": 2, "max_new_tokens": 10, "eval_limit": 3}
SMALL |= {"lora_rank": 2, "report_to": "none"}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "look-first"
    train_rl.main(Config(**SMALL, output_dir=str(folder), learning_rate=0.00123))
    return folder


def test_a_run_writes_a_card_with_base_data_settings_and_what_it_measured(finished_run):
    card = ModelCard.load(finished_run / "adapter" / "README.md")
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "image-text-to-text"
    assert {"lora", "grpo"} <= set(card.data.tags) and card.data.base_model is None  # a folder is no Hub id
    assert "`data/tiny_policy`" in card.text and "8 examples of `scenes`" in card.text
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", card.text, re.MULTILINE))
    assert rows["learning_rate"] == "0.00123" and rows["max_steps"] == "1" and rows["beta"] == "0.001"
    assert "warmup_steps" not in rows and "output_dir" not in rows
    summary = json.loads((finished_run / "evaluation.json").read_text())["summary"]
    assert "3 examples of `scenes:heldout`" in card.text
    for metric in METRICS:
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(*part[metric]) for part in summary.values()]
        assert len(cells) == 3 and f"| {metric} | {' | '.join(cells)} |" in card.text
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["accuracy"] == pytest.approx(summary["after"]["accuracy"][0], abs=1e-4)
    assert "Look at the part of the image" in card.text


def test_a_card_holds_no_folder_of_this_machine(finished_run, tmp_path):
    assert not ABSOLUTE.search((finished_run / "adapter" / "README.md").read_text())
    checkpoints = list(finished_run.glob("checkpoints/*/adapter/*"))
    assert len(checkpoints) == 2 and not any(path.name == "README.md" for path in checkpoints)
    places = {"data": "/somewhere/else/mine.jsonl", "adapter": "/somewhere/runs/first/adapter"}
    text = card_of(tmp_path, {}, model=EMBEDDED_POLICY, eval_data="../up/test.jsonl", **places)
    assert not ABSOLUTE.search(text) and "somewhere" not in text and ".." not in text
    assert "`data/tiny_policy`" in text and "`mine.jsonl`" in text


def card_of(folder, columns, skipped=0.0, num_evaluated=0, **settings) -> str:
    config = replace(Config(output_dir=str(folder)), **settings)
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "skipped_updates": skipped}) + "\n")
    write_model_card(folder, config, columns, num_evaluated, 20)
    return (folder / "adapter" / "README.md").read_text()


def test_a_card_of_hub_models_and_data_names_them_where_the_hub_looks(tmp_path):
    settings = {"model": "Qwen/Qwen3-VL-4B-Instruct", "revision": "abc", "load_in_4bit": True}
    columns = {"after": {name: (0.5, 0.25, 0.75) for name in METRICS}}
    text = card_of(tmp_path, columns, 3.0, 40, data="someone/pictures", eval_data="someone/test", **settings)
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-VL-4B-Instruct" and card.data.base_model_relation == "adapter"
    assert card.data.datasets == "someone/pictures" or card.data.datasets == ["someone/pictures"]
    assert "revision='abc'" in text and "4 bits" in text and "| tas | 0.500 [0.250, 0.750] |" in text
    assert "3 updates were skipped" in text and "difference is" not in text


def test_a_card_without_evaluation_or_attention_reward_says_so(tmp_path):
    text = card_of(tmp_path, {}, system_prompt="", attention_weight=0.0)
    assert "without the attention reward" in text and "are rewarded" not in text
    assert "made no evaluation" in text and "without a system turn" in text and "model-index" not in text


def test_places_are_named_without_the_machine():
    assert place("/home/me/mine.jsonl") == place("../mine.jsonl") == "mine.jsonl"
    for name in ("Qwen/Qwen3-VL-4B-Instruct", "scenes:heldout", "data/tiny_policy", "mine.jsonl"):
        assert place(name) == name


# --- merging -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_and_adapter_say_the_same_in_float32(model_folders, examples, tmp_path, family):
    model, processor = adapted(model_folders[family], scale=0.05, lora_targets="all-linear")
    save_adapter(model, tmp_path / "adapter")
    flags = {"adapter": str(tmp_path / "adapter"), "output": str(tmp_path / "merged")}
    output = merge.merge(MergeConfig(**flags, model=model_folders[family]))
    merged, its_processor = load_policy(str(output), lora_rank=0)
    assert type(its_processor) is type(processor) and not isinstance(merged, PeftModel)
    for example in examples[:2]:
        prompt, completions = encoded(its_processor, example)
        assert torch.equal(prompt.input_ids, encode_prompt(processor, example).input_ids)
        expected = logps(model, prompt, completions)
        # Log-probs of -14 are themselves rounded to 1e-6.
        torch.testing.assert_close(logps(merged, prompt, completions), expected, atol=1e-5, rtol=1e-6)
        greedy = {"num_generations": 1, "max_new_tokens": 16, "temperature": 0}
        texts = [sample_group(policy, processor, example, **greedy).texts for policy in (model, merged)]
        assert texts[0] == texts[1]
        with model.disable_adapter():
            assert (logps(model, prompt, completions) - expected).abs().max() > 0.01
    plain = AutoModelForImageTextToText.from_pretrained(output)
    AutoProcessor.from_pretrained(output)
    base, _ = load_policy(model_folders[family], lora_rank=0)
    shapes = [{name: weight.shape for name, weight in policy.named_parameters()} for policy in (plain, base)]
    assert shapes[0] == shapes[1]


def test_merged_and_adapter_agree_in_bfloat16_within_its_rounding(saved, model_folders, examples):
    exact, processor, flags = saved
    merge.main(MergeConfig(**flags, dtype="bfloat16"))
    merged, _ = load_policy(flags["output"], lora_rank=0)
    model, _ = load_policy(model_folders["qwen3_vl"], adapter=flags["adapter"], lora_rank=0, dtype="bfloat16")
    assert merged.dtype == torch.bfloat16
    prompt, completions = encoded(processor, examples[0])
    expected = logps(exact, prompt, completions)
    errors = [(logps(policy, prompt, completions) - expected).abs().mean() for policy in (merged, model)]
    assert errors[0] < 2 * errors[1] < 0.2  # against float32 the merged weights are about as good as the adapter


def test_merging_into_four_bit_weights_would_change_what_the_model_says(model_folders, examples, tmp_path):
    """Why tools.merge does not do it: the rounding of the sum takes away as much as the adapter had changed."""
    model, processor = adapted(model_folders["qwen3_vl"], scale=0.003, load_in_4bit=True)
    save_adapter(model, tmp_path / "adapter")
    merge.main(MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "merged")))
    full, _ = load_policy(model_folders["qwen3_vl"], adapter=str(tmp_path / "adapter"), lora_rank=0, dtype="float32")
    merged, _ = load_policy(str(tmp_path / "merged"), lora_rank=0)
    prompt, completions = encoded(processor, examples[0])
    in_full = (logps(merged, prompt, completions) - logps(full, prompt, completions)).abs().mean()
    before = logps(model, prompt, completions)
    with model.disable_adapter():
        learned = (logps(model, prompt, completions) - before).abs().mean()
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):
        model.merge_adapter()
    in_four_bit = (logps(model, prompt, completions) - before).abs().mean()
    print(f"mean change of log-probs: by the adapter {learned:.1e}, by merging it into full precision {in_full:.1e}, ")
    print(f"by merging it into 4 bits {in_four_bit:.1e}")
    assert in_full < 1e-5 and in_four_bit > 0.5 * learned > 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_in_4bit": True}, ["load_in_4bit", "full-precision", "changes what the model says"]),
        ({"output": "data"}, ["output='data' exists", "another name"]),
        ({"dtype": "int4"}, ["int4", "bfloat16"]),
    ],
)
def test_what_merging_refuses_is_said_at_once(settings, words):
    flags = [f"--{name}={value}" for name, value in settings.items()]
    with pytest.raises(ConfigError) as error:
        read_config(MergeConfig, flags)
    assert all(word in str(error.value) for word in words)


def test_merging_refuses_a_quantized_base_a_missing_adapter_and_weights_that_are_broken(saved, model_folders, tmp_path):
    model, _, flags = saved
    quantized = shutil.copytree(model_folders["qwen3_vl"], tmp_path / "quantized")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantized' is stored in quantized form.*full-precision"):
        merge.merge(MergeConfig(**flags, model=str(quantized)))
    with pytest.raises(UserError, match=r"gone.*adapter/ folder of a run"):
        merge.merge(MergeConfig(**flags | {"adapter": str(tmp_path / "gone")}))
    next(weight for name, weight in model.named_parameters() if "lora_B" in name).data[0, 0] = float("nan")
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="weights that are not finite"):
        merge.merge(MergeConfig(**flags))
    assert not (tmp_path / "merged").exists()


def test_an_interrupted_merge_leaves_no_folder_that_looks_whole(saved, tmp_path, monkeypatch):
    config = MergeConfig(adapter=saved[2]["adapter"], output=str(tmp_path / "deep" / "merged"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge.merge(config)
    assert not Path(config.output).exists()
    merge.merge(config)
    assert [path.name for path in Path(config.output).parent.iterdir()] == ["merged"]


def test_the_merge_command_says_where_the_model_is_and_that_another_base_was_given(saved, model_folders, tmp_path):
    other = shutil.copytree(model_folders["qwen3_vl"], tmp_path / "other")
    command = [sys.executable, "-m", "tools.merge", *(f"--{name}={value}" for name, value in saved[2].items())]
    result = subprocess.run([*command, "--model", str(other)], capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr
    assert f"merged model and processor -> {tmp_path / 'merged'}" in result.stdout
    assert "the adapter was made for 'data/tiny_policy'" in result.stderr
    again = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert again.returncode == 1 and "exists: give another name" in again.stderr
