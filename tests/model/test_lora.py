"""LoRA's part added in place, against PEFT's own arithmetic with the same adapter."""

from contextlib import nullcontext

import pytest
import torch
from conftest import adapted, ragged_completions

from sayo.model.forward import group_logprobs
from sayo.model.loading import load_policy
from sayo.model.lora import AddedLora, add_in_place
from sayo.model.prompts import encode_prompt


def lora_layers(model):
    return [module for module in model.modules() if getattr(module, "lora_variant", None)]


def as_peft_has_it(model):
    for layer in lora_layers(model):
        layer.lora_variant, layer.cast_input_dtype_enabled = {}, True


def logprobs_and_gradients(model, prompt, completions):
    dtype = model.get_input_embeddings().weight.dtype
    context = nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with context:
        logps = torch.cat(group_logprobs(model, prompt, completions))
    return logps.detach(), torch.autograd.grad(logps.sum(), parameters)


CASES = {
    "float32": {},
    "all-linear": {"lora_targets": "all-linear"},
    "4 bits": {"load_in_4bit": True},
    "bfloat16": {"dtype": "bfloat16"},
    "4 bits, bfloat16": {"load_in_4bit": True, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_gradients_are_those_of_peft(case, checkpointing, model_folders, examples):
    model, processor = adapted(model_folders["qwen3_vl"], **CASES[case])
    half = "dtype" in CASES[case]
    if checkpointing:
        model.train()
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    prompt, completions = encode_prompt(processor, examples[0]), ragged_completions(processor)
    assert len(lora_layers(model)) > 7
    found = logprobs_and_gradients(model, prompt, completions)
    as_peft_has_it(model)
    expected = logprobs_and_gradients(model, prompt, completions)
    tolerance = {"atol": 0.05, "rtol": 0.05} if half else {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert all(one.dtype == torch.float32 for one in (*found[1], *expected[1]))
    ours, theirs = (torch.cat([part.flatten() for part in parts]) for parts in (found[1], expected[1]))
    assert (ours - theirs).norm() <= (0.1 if half else 1e-4) * theirs.norm()


def test_half_precision_gradients_are_as_near_to_the_exact_ones_as_those_of_peft(model_folders, examples):
    """A tolerance against PEFT's bfloat16 says little, since both round: against float32, ours must not be worse."""

    def gradients(dtype, of_peft=False):
        model, processor = adapted(model_folders["qwen3_vl"], dtype=dtype)
        if of_peft:
            as_peft_has_it(model)
        prompt, completions = encode_prompt(processor, examples[0]), ragged_completions(processor)
        return torch.cat([part.flatten() for part in logprobs_and_gradients(model, prompt, completions)[1]])

    exact = gradients("float32")
    ours, theirs = gradients("bfloat16"), gradients("bfloat16", of_peft=True)
    assert 0 < (ours - exact).norm() < 1.1 * (theirs - exact).norm() < 0.2 * exact.norm()


def test_merging_gives_what_the_adapter_gives_and_can_be_undone(model_folders, examples):
    model, processor = adapted(model_folders["qwen3_vl"])
    prompt, completions = encode_prompt(processor, examples[0]), ragged_completions(processor)
    with torch.no_grad():
        expected = torch.cat(group_logprobs(model, prompt, completions))
        with model.disable_adapter():
            assert (torch.cat(group_logprobs(model, prompt, completions)) - expected).abs().max() > 1e-4
        for safe_merge in (False, True):
            model.merge_adapter(safe_merge=safe_merge)
            torch.testing.assert_close(torch.cat(group_logprobs(model, prompt, completions)), expected)
            model.unmerge_adapter()
            torch.testing.assert_close(torch.cat(group_logprobs(model, prompt, completions)), expected)


def test_fewer_and_smaller_tensors_are_kept_for_the_backward_pass(model_folders, examples):
    """In half precision PEFT keeps a copy of x for every layer that reads it; here they share the one of the model."""
    model, processor = adapted(model_folders["qwen3_vl"], dtype="bfloat16")
    prompt, completions = encode_prompt(processor, examples[0]), ragged_completions(processor)

    def kept_bytes():
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        context = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with context, torch.autocast("cpu", dtype=torch.bfloat16):
            logps = torch.cat(group_logprobs(model, prompt, completions))
            total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        del logps
        return total

    ours = kept_bytes()
    as_peft_has_it(model)
    assert ours < 0.98 * kept_bytes()


def test_variants_of_peft_and_layers_with_a_bias_stay_as_they_are(model_folders):
    from peft import LoraConfig, get_peft_model

    plain, _ = load_policy(model_folders["qwen3_vl"], lora_rank=0)
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    before = [layer.lora_variant for layer in lora_layers(model)]
    add_in_place(model)
    assert before and [layer.lora_variant for layer in lora_layers(model)] == before
    assert not any(AddedLora in layer.lora_variant.values() for layer in lora_layers(model))
