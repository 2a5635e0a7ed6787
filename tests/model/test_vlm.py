"""One forward for a group: log-probs, gradients, entropies and attention against transformers' own plain forward."""

import json

import pytest
import torch
from conftest import FAMILIES, LAYOUTS, PACKED, ragged_completions
from oracle import encoded, logps, plain_forward, plain_logits, plain_logprobs

from sayo.model import forward as vlm
from sayo.model.forward import evaluating, group_logprobs, resolve_layers, row_logprobs, token_statistics
from sayo.model.loading import load_policy
from sayo.model.packing import packed_layout, split_by_tokens
from sayo.model.prompts import base_model, encode_prompt
from sayo.model.sampling.tokens import eos_token_ids, suppressed_token_ids


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_logprobs_equal_the_plain_forward_of_each_completion(group_of, family, layout):
    model, _, prompt, completions = group_of(family)
    found = group_logprobs(model, prompt, completions, layout=layout, temperature=0.7)
    assert [len(part) for part in found] == [7, 1, 12, 4]
    expected = [plain_logprobs(model, prompt, completion, 0.7) for completion in completions]
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("query", ["token", "predictor"])
@pytest.mark.parametrize(
    ("family", "layers"), [(family, layers) for family in PACKED for layers in [(-1,), (0, 2)]] + [("qwen3_5", (-1,))]
)
def test_attention_rows_equal_eager_output_attentions(model_folders, examples, family, layers, query):
    probed, processor = load_policy(model_folders[family], lora_rank=0, dtype="float32")
    eager, _ = load_policy(model_folders[family], lora_rank=0, dtype="float32", attn="eager")
    prompt, completions = encoded(processor, examples[2])
    weights = prompt.coverage / prompt.coverage.sum()
    for layout in [layout for name, layout in LAYOUTS if name == family]:
        found = token_statistics(probed, prompt, completions, layers=layers, query=query, layout=layout)
        for index, completion in enumerate(completions):
            with torch.no_grad():
                attentions = plain_forward(eager, prompt, completion, output_attentions=True).attentions
            maps = torch.stack([attentions[layer][0] for layer in layers]).mean((0, 1))  # (S, S)
            first = len(prompt.input_ids) - (query == "predictor")
            rows = maps[first : first + len(completion), prompt.image_token_index]  # (n, N)
            expected = rows @ weights, rows.mean(-1)
            torch.testing.assert_close(found.target_attention[index], expected[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(found.image_attention[index], expected[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_entropies_equal_those_of_the_distribution_at_the_temperature(group_of, family):
    model, _, prompt, completions = group_of(family)
    found = token_statistics(model, prompt, completions, temperature=1.3)
    for completion, entropies in zip(completions, found.entropies, strict=True):
        expected = torch.distributions.Categorical(logits=plain_logits(model, prompt, completion) / 1.3).entropy()
        torch.testing.assert_close(entropies, expected, atol=1e-5, rtol=1e-5)


def test_several_groups_in_one_sequence_do_not_see_each_other(policy, examples):
    model, processor = policy
    prompts = [encode_prompt(processor, example) for example in examples[:3]]
    completions = [ragged_completions(processor, lengths, seed=i) for i, lengths in enumerate([(3, 5), (), (2, 9, 1)])]
    layout = packed_layout(model, prompts, completions)
    with torch.no_grad():
        hidden = vlm.forward_hidden(model, layout)
        head = base_model(model).get_output_embeddings()
        together, _ = row_logprobs(head, hidden[0, layout.predict_rows], layout.completion_ids, 1.0)
        alone = [group_logprobs(model, prompts[i], completions[i]) for i in (0, 2)]
    torch.testing.assert_close(together, torch.cat([logp for group in alone for logp in group]), atol=1e-5, rtol=0)


def test_stale_rope_deltas_of_generate_do_not_move_positions(policy, examples):
    """transformers keeps rope_deltas on the model between calls; positions must not depend on what ran before."""
    model, processor = policy
    base, other = base_model(model), encode_prompt(processor, examples[5])
    base.model.rope_deltas = None
    before = logps(model, *encoded(processor, examples[0]))
    base.generate(input_ids=other.input_ids[None], **other.model_inputs, max_new_tokens=3, do_sample=False)
    assert base.model.rope_deltas is not None
    assert torch.equal(before, logps(model, *encoded(processor, examples[0])))


def test_row_chunks_change_neither_values_nor_gradients(monkeypatch):
    torch.manual_seed(0)
    head, ids = torch.nn.Linear(8, 50, bias=False), torch.randint(50, (23,))
    results = {}
    for chunk in (50 * 1000, 50 * 4, 1):
        monkeypatch.setattr(vlm, "LOGIT_CHUNK_ELEMENTS", chunk)
        hidden = torch.linspace(-1, 1, 23 * 8).view(23, 8).requires_grad_()
        logps, entropies = row_logprobs(head, hidden, ids, 0.9, with_entropy=True)
        (logps.sum() + entropies.sum()).backward()
        results[chunk] = torch.cat([logps.detach(), entropies.detach(), hidden.grad.flatten()])
    expected = torch.distributions.Categorical(logits=head(hidden) / 0.9)
    torch.testing.assert_close(results[1][:23], expected.log_prob(ids).detach())
    torch.testing.assert_close(results[1][23:46], expected.entropy().detach())
    torch.testing.assert_close(results[50 * 1000], results[50 * 4])
    torch.testing.assert_close(results[50 * 1000], results[1])


def test_frozen_vision_runs_once_per_prompt_and_trained_vision_every_time(model_folders, examples, monkeypatch):
    calls = []
    for targets, expected in (("language", 1), ("all-linear", 3)):
        model, processor = load_policy(model_folders["qwen3_vl"], lora_rank=2, lora_targets=targets)
        inner = base_model(model).model
        original = inner.get_image_features
        monkeypatch.setattr(inner, "get_image_features", lambda *a, _f=original, **k: calls.append(1) or _f(*a, **k))
        group = encoded(processor, examples[0])
        calls.clear()
        group_logprobs(model, *group)
        token_statistics(model, *group)
        torch.cat(group_logprobs(model, *group)).sum().backward()
        assert len(calls) == expected
        trained = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert any("visual" in name for name in trained) is (targets == "all-linear")
        assert any("language_model" in name for name in trained)


def test_split_by_tokens_never_splits_a_group():
    assert split_by_tokens([30, 30, 50, 90], 80) == [slice(0, 2), slice(2, 3), slice(3, 4)]
    assert split_by_tokens([100], 80) == [slice(0, 1)]
    assert split_by_tokens([], 80) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_language_lora_adapts_every_linear_of_the_language_model_and_nothing_else(model_folders, family):
    model, _ = load_policy(model_folders[family], lora_rank=2)
    decoder = base_model(model).model.get_decoder()
    wrapped = [name for name, module in decoder.named_modules() if hasattr(module, "lora_A")]
    plain, _ = load_policy(model_folders[family], lora_rank=0)
    linears = [n for n, m in plain.model.get_decoder().named_modules() if isinstance(m, torch.nn.Linear)]
    assert linears and wrapped == linears
    assert len(linears) == len([module for module in model.modules() if hasattr(module, "lora_A")])
    everything, _ = load_policy(model_folders[family], lora_rank=2, lora_targets="all-linear")
    assert len([module for module in everything.modules() if hasattr(module, "lora_A")]) > len(linears)


LLAMA = {"model_type": "llama"}
# transformers asks on the terminal whether it may run such code; a run in the background would wait for an answer.
OWN_CODE = {"model_type": "internvl_chat", "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "no/such/folder"}, ["no/such/folder", "config.json", "Hub"]),
        ({"attn": "flash"}, ["flash", "sdpa", "eager"]),
        ({"lora_targets": "vision"}, ["vision", "language", "all-linear"]),
        ({"dtype": "int8"}, ["int8", "bfloat16"]),
        ({"adapter": "tests"}, ["tests", "adapter_config.json"]),
        ({"adapter": "gone"}, ["gone", "adapter/ folder of a run"]),
        ({"max_pixels": 10}, ["10", "1024"]),
        ({"model": LLAMA}, ["'llama'", "internvl, qwen2_5_vl, qwen3_5, qwen3_vl, smolvlm", "families.py"]),
        ({"model": OWN_CODE}, ["InternVL one whose name ends in -HF"]),
    ],
)
def test_what_cannot_be_loaded_is_named(model_folders, tmp_path, arguments, words):
    if isinstance(config := arguments.get("model"), dict):
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "configuration_internvl_chat.py").write_text("raise SystemExit('ran')")
        arguments = {"model": str(tmp_path)}
    with pytest.raises(ValueError) as error:
        load_policy(**({"model": model_folders["qwen3_vl"]} | arguments))
    assert all(word in str(error.value) for word in words)


def test_layers_count_from_both_ends(policy):
    model, _ = policy
    depth = base_model(model).config.get_text_config().num_hidden_layers
    assert resolve_layers(model, [-1, 0]) == [0, depth - 1]
    with pytest.raises(ValueError, match=rf"attention_layers=\[{depth}\].*0 to {depth - 1} \(or {-depth} to -1"):
        resolve_layers(model, [depth])


def test_suppressed_tokens_are_the_vision_tokens_and_never_the_end(policy):
    model, processor = policy
    suppressed = set(suppressed_token_ids(model, processor).tolist())
    for token in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
        assert processor.tokenizer.convert_tokens_to_ids(token) in suppressed
    assert not suppressed & eos_token_ids(model, processor)
    ordinary = processor.tokenizer("The red circle <answer>3</answer>").input_ids
    assert not suppressed & set(ordinary)


def test_evaluating_restores_the_mode(model_folders):
    model = load_policy(model_folders["qwen3_vl"], lora_rank=0)[0].train()
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training


@pytest.mark.parametrize("layout", ["rows", ""])
def test_an_unknown_layout_is_named(group_of, layout):
    model, _, prompt, completions = group_of()
    with pytest.raises(ValueError, match=r"layout=.*'packed', 'padded'"):
        group_logprobs(model, prompt, completions, layout=layout)


def test_attention_needs_the_probed_kernel_and_a_known_query(model_folders, group_of):
    model, _, prompt, completions = group_of()
    eager, _ = load_policy(model_folders["qwen3_vl"], lora_rank=0, attn="eager")
    for policy, options, words in ((eager, {}, 'attn="sdpa"'), (model, {"query": "key"}, "attention_query='key'")):
        with pytest.raises(ValueError, match=words):
            token_statistics(policy, prompt, completions, **options)


def test_kept_picture_features_belong_to_the_model_that_made_them(policies, model_folders, examples):
    """A prompt that had been through one model gave its features to the next one."""
    _, processor = policies["qwen3_vl"]
    other, _ = load_policy(model_folders["qwen3_vl"], lora_rank=2)
    with torch.no_grad():
        for parameter in base_model(other).model.visual.parameters():
            parameter.mul_(1.5)
    group = encoded(processor, examples[0])
    logps(policies["qwen3_vl"][0], *group)
    assert torch.equal(logps(other, *group), logps(other, *encoded(processor, examples[0])))
