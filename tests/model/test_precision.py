"""4-bit, float16 and bfloat16, on the CPU: what is quantized, what is float32, packed against padded, the loss."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, LAYOUTS, PACKED, adapted
from oracle import distances, encoded, logps, logps_and_gradients

from reward import RewardConfig, score_group
from rollout import sample_group, sample_groups
from sayo.model import attention, loading
from sayo.model.forward import group_logprobs, set_checkpointing, token_statistics
from sayo.model.loading import choose_dtype, load_policy
from sayo.model.prompts import base_model
from train_rl import LARGEST_EXPONENT, finite_exp, grpo_loss

HALF = ("bfloat16", "float16")
# Largest mean difference of log-probs, and of adapter gradients relative to their norm: about twice what was measured.
TOLERANCE = {"float32": (1e-5, 1e-5), "bfloat16": (0.06, 0.05), "float16": (0.008, 0.008)}
RECURRENT = {"qwen3_5": 10}  # its recurrence carries a rounding error from token to token


@pytest.mark.parametrize(
    ("asked", "stored", "device", "native", "expected"),
    [
        ("auto", torch.bfloat16, "cuda", True, torch.bfloat16),
        ("auto", torch.bfloat16, "cuda", False, torch.float16),
        ("auto", torch.float16, "cuda", True, torch.float16),
        ("auto", torch.float32, "cuda", False, torch.float32),
        ("auto", None, "cuda", True, torch.bfloat16),
        ("auto", None, "cuda", False, torch.float16),
        ("auto", torch.bfloat16, "cpu", False, torch.bfloat16),
        ("auto", None, "cpu", False, torch.float32),
        ("bfloat16", torch.float32, "cuda", False, torch.bfloat16),  # asked for outright
    ],
)
def test_a_t4_gets_float16_although_torch_says_that_it_has_bfloat16(
    monkeypatch, capsys, asked, stored, device, native, expected
):
    """torch.cuda.is_bf16_supported() counts emulation, and so is true of every card."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    config = SimpleNamespace(dtype=stored, get_text_config=lambda: SimpleNamespace(dtype=None))
    assert choose_dtype(asked, config, torch.device(device)) == expected
    said = capsys.readouterr().err
    assert ("has no bfloat16" in said) == (expected == torch.float16 and not native)
    assert said.count("\n") <= 1


def test_weights_of_a_model_to_be_shared_out_have_the_format_of_the_card(model_folders, monkeypatch):
    """Its weights are read on the CPU, for which "auto" chose bfloat16 on cards that have none."""
    asked = []
    monkeypatch.setattr(loading, "choose_dtype", lambda *arguments: asked.append(arguments[2]) or torch.float16)
    model, _ = load_policy(model_folders["qwen3_vl"], lora_rank=0, device="cuda", load_on="cpu")
    assert asked == [torch.device("cuda")]
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("cpu", torch.float16)}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_linear_layers_of_the_language_model_are_quantized(model_folders, family):
    plain, _ = load_policy(model_folders[family], lora_rank=0, dtype="bfloat16")
    model, _ = load_policy(model_folders[family], load_in_4bit=True, lora_rank=2, dtype="bfloat16")
    decoder = plain.model.get_decoder()
    in_language_model = {id(module) for module in decoder.modules() if isinstance(module, torch.nn.Linear)}
    expected = {name for name, module in plain.named_modules() if id(module) in in_language_model}
    found = set()
    for name, module in base_model(model).named_modules():
        name = name.removesuffix(".base_layer")
        if type(module).__name__ == "Linear4bit" and not hasattr(module, "lora_A"):
            found.add(name)
            assert module.weight.dtype == torch.uint8
            assert module.weight.quant_state.quant_type == "nf4" and module.weight.quant_state.nested
            assert module.compute_dtype == torch.bfloat16
    assert found == expected and len(found) > 0
    weights = {name.replace(".base_layer", ""): weight for name, weight in base_model(model).named_parameters()}
    for name, weight in plain.named_parameters():
        if name.removesuffix(".weight") not in found and not name.endswith(".bias"):
            assert weights[name].dtype == torch.bfloat16 and torch.equal(weights[name], weight), name


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_adapter_weights_are_float32_when_made_saved_and_loaded(model_folders, tmp_path, dtype, load_in_4bit):
    options = {"dtype": dtype, "load_in_4bit": load_in_4bit}
    model, _ = adapted(model_folders["qwen3_vl"], **options)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again, _ = load_policy(model_folders["qwen3_vl"], adapter=str(tmp_path), **options)
    for policy in (model, again):
        assert {weight.dtype for weight in policy.parameters() if weight.requires_grad} == {torch.float32}
        assert base_model(policy).dtype == getattr(torch, dtype)
    for (name, weight), (_, saved) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(weight, saved), name


@pytest.mark.parametrize("dtype", HALF)
def test_log_probs_entropies_and_attention_rows_are_float32_arithmetic(model_folders, examples, monkeypatch, dtype):
    """Attention rows against softmax in float64 of the very queries and keys; none of it was rounded to half."""
    model, processor = adapted(model_folders["qwen3_vl"], dtype=dtype)
    prompt, completions = encoded(processor, examples[0])
    seen, read = {}, attention.AttentionProbe.read_packed

    def spy(self, layer, query, key, group, scaling):
        seen["query"], seen["key"] = query, key
        read(self, layer, query, key, group, scaling)

    monkeypatch.setattr(attention.AttentionProbe, "read_packed", spy)
    with torch.no_grad():
        found = token_statistics(model, prompt, completions)
    assert seen["query"].dtype == getattr(torch, dtype)
    query, key = (seen[name][0].double() for name in ("query", "key"))  # (H, S, d), (H_kv, S, d)
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    num_prompt, start = len(prompt.input_ids), len(prompt.input_ids)
    for completion, attended in zip(completions, found.image_attention, strict=True):
        own = slice(start, start + len(completion))
        keys = torch.cat([key[:, :num_prompt], key[:, own]], dim=1)
        scores = query[:, own] @ keys.mT * query.shape[-1] ** -0.5  # (H, n, P + n)
        scores += torch.full(scores.shape[1:], float("-inf")).triu(num_prompt + 1)
        expected = scores.softmax(-1)[..., prompt.image_token_index].mean((0, 2))
        torch.testing.assert_close(attended.double(), expected, rtol=1e-5, atol=1e-9)
        start += len(completion)
    for parts in (found.logps, found.entropies, found.target_attention, found.image_attention):
        values = torch.cat(parts)
        assert values.dtype == torch.float32 and not torch.equal(values, values.to(getattr(torch, dtype)).float())


@pytest.mark.parametrize("dtype", HALF)
def test_rewards_of_a_half_precision_policy_are_float32(model_folders, examples, dtype):
    model, processor = adapted(model_folders["qwen3_vl"], dtype=dtype)
    group = sample_group(model, processor, examples[0], num_generations=3, max_new_tokens=24)
    scores = score_group(model, group, RewardConfig())
    assert {values.dtype for values in scores.values()} == {torch.float32}
    assert all(values.isfinite().all() for values in scores.values())


MODES = [(dtype, mode) for dtype in HALF for mode in ("plain", "4bit")]
MODES += [("float32", "plain"), ("float32", "checkpointing")]


@pytest.mark.parametrize(("dtype", "mode"), MODES)
@pytest.mark.parametrize("family", PACKED)
def test_packed_equals_padded_within_the_tolerance_of_the_dtype(model_folders, examples, family, dtype, mode):
    """And where both stand in for float32, the packed layout is no further from it than the padded one."""
    options = {"load_in_4bit": mode == "4bit"}
    model, processor = adapted(model_folders[family], dtype=dtype, **options)
    set_checkpointing(model, mode == "checkpointing")
    group = encoded(processor, examples[1], (9, 3, 14, 1, 6))
    packed, padded = (logps_and_gradients(model, *group, layout=layout) for layout in ("packed", "padded"))
    assert packed[0].dtype == packed[1].dtype == torch.float32 and padded[1].norm() > 0
    for distance, tolerance in zip(distances(packed, padded), TOLERANCE[dtype], strict=True):
        assert 0 < distance < tolerance
    if dtype == "float32":
        torch.testing.assert_close(packed[0], padded[0], atol=1e-5, rtol=0)
    else:
        exact = logps_and_gradients(adapted(model_folders[family], **options)[0], *group)
        for distance, of_padded in zip(distances(packed, exact), distances(padded, exact), strict=True):
            assert distance < 2 * of_padded


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_eager_attention_under_an_additive_mask_is_close_to_float32(model_folders, examples, family, layout, dtype):
    """A boolean mask would be silently wrong; a row of nothing but float16's lowest number added to scores is NaN."""
    model, processor = adapted(model_folders[family], dtype=dtype, attn="eager")
    exact, _ = adapted(model_folders[family], dtype="float32")
    group = encoded(processor, examples[0])
    found, expected = (logps(policy, *group, layout=layout) for policy in (model, exact))
    assert (found - expected).abs().mean() < RECURRENT.get(family, 1) * TOLERANCE[dtype][0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_four_bit_gradients_after_sampling_are_those_of_the_dequantized_weights(model_folders, examples, family, dtype):
    """In eval mode bitsandbytes repacks weights for newer CPUs; the backward of what follows was silently wrong."""
    from bitsandbytes.functional import dequantize_4bit

    model, processor = adapted(model_folders[family], load_in_4bit=True, dtype=dtype)
    dense, _ = adapted(model_folders[family], dtype=dtype)
    group = encoded(processor, examples[0])
    logps(model, *group)
    quantized = {name: m for name, m in model.named_modules() if name.endswith("base_layer")}
    wrapped = [module for module in base_model(model).model.get_decoder().modules() if hasattr(module, "lora_A")]
    assert len(quantized) == len(wrapped) > 0
    with torch.no_grad():
        for name, module in dense.named_modules():
            if name in quantized:
                weight = quantized[name].weight
                module.weight.copy_(dequantize_4bit(weight.data, weight.quant_state).view_as(module.weight))
    pair = [logps_and_gradients(policy, *group) for policy in (model, dense)]
    for distance, tolerance in zip(distances(*pair), TOLERANCE[dtype], strict=True):
        assert distance < RECURRENT.get(family, 1) * tolerance


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_sampling_takes_tokens_that_the_scoring_forward_finds_most_probable(
    model_folders, examples, family, dtype, load_in_4bit
):
    """The sampling cache and the scoring forward round differently: a choice may differ only between near equals."""
    model, processor = adapted(model_folders[family], dtype=dtype, load_in_4bit=load_in_4bit)
    options = {"num_generations": 2, "max_new_tokens": 10, "temperature": 0}
    groups = sample_groups(model, processor, examples[:2], **options)
    for group in groups:
        assert group.completions[0].tolist() == group.completions[1].tolist()
        with torch.no_grad():
            sharp = group_logprobs(model, group.prompt, group.completions[:1], temperature=0.01)[0]
        # At temperature 0.01 a token that trails the best by x has a log-prob of about -100 x.
        assert (sharp > -100 * 10 * TOLERANCE[dtype][0]).all() and (sharp > -0.7).float().mean() > 0.7


def test_activations_beyond_float16_stop_sampling_with_a_name(model_folders, examples):
    """Not-a-number logits drew tokens that do not exist."""
    model, processor = adapted(model_folders["qwen3_vl"], dtype="float16")
    with torch.no_grad():
        base_model(model).model.language_model.layers[0].mlp.down_proj.base_layer.weight.mul_(1e4)
    with pytest.raises(ValueError, match="not finite in float16.*--dtype bfloat16"):
        sample_group(model, processor, examples[0], num_generations=2, max_new_tokens=4)


def test_the_bounded_exponential_is_exact_below_its_bound_and_finite_above():
    below = torch.linspace(-90, LARGEST_EXPONENT, 4001)
    results = []
    for function in (finite_exp, torch.exp):
        exponent = below.clone().requires_grad_()
        value = function(exponent)
        value.sum().backward()
        results.append((value.detach(), exponent.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    above = torch.tensor([21.0, 100.0, 1e5], requires_grad=True)
    value = finite_exp(above)
    value.sum().backward()
    assert value.isfinite().all() and (value.diff() > 0).all()
    assert torch.equal(above.grad, torch.tensor(LARGEST_EXPONENT).exp().expand(3))


def test_a_token_that_one_policy_rules_out_does_not_make_the_step_infinite():
    """exp(ref - new) of log-probs -1 and -200 is infinite in float32, and so was the gradient of every weight."""
    new = [torch.tensor([-200.0, -0.5]).requires_grad_(), torch.tensor([-0.1]).requires_grad_()]
    old = [torch.tensor([-200.0, -0.5]), torch.tensor([-110.0])]
    ref = [torch.tensor([-1.0, -0.4]), torch.tensor([-3.0])]
    settings = {"beta": 1e-3, "clip_low": 0.2, "clip_high": 0.2, "loss_type": "grpo"}
    loss, stats = grpo_loss(new, old, ref, torch.tensor([1.0, -1.0]), **settings)
    loss.backward()
    assert loss.isfinite() and all(part.grad.isfinite().all() for part in new)
    assert torch.tensor(list(stats.values())).isfinite().all()
