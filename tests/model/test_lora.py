"""LoRA's part added in place, against PEFT's own arithmetic with the same adapter."""

import pytest
import torch
from conftest import adapted
from oracle import distances, encoded, logps, logps_and_gradients

from sayo.model.forward import group_logprobs, set_checkpointing
from sayo.model.loading import load_policy
from sayo.model.lora import AddedLora, add_in_place


def lora_layers(model):
    return [module for module in model.modules() if getattr(module, "lora_variant", None)]


def as_peft_has_it(model):
    for layer in lora_layers(model):
        layer.lora_variant, layer.cast_input_dtype_enabled = {}, True


@pytest.fixture
def adapted_group(model_folders, examples):
    """adapted_group(options of load_policy) -> (model, prompt, completions)."""

    def make(**options):
        model, processor = adapted(model_folders["qwen3_vl"], **options)
        return model, *encoded(processor, examples[0])

    return make


CASES = {
    "float32": {},
    "all-linear": {"lora_targets": "all-linear"},
    "4 bits": {"load_in_4bit": True},
    "bfloat16": {"dtype": "bfloat16"},
    "4 bits, bfloat16": {"load_in_4bit": True, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("case", CASES)
def test_log_probs_and_gradients_are_those_of_peft(case, checkpointing, adapted_group):
    model, *group = adapted_group(**CASES[case])
    set_checkpointing(model, checkpointing)
    assert len(lora_layers(model)) > 7
    found = logps_and_gradients(model, *group)
    as_peft_has_it(model)
    expected = logps_and_gradients(model, *group)
    half = "dtype" in CASES[case]
    tolerance = {"atol": 0.05, "rtol": 0.05} if half else {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].dtype == expected[1].dtype == torch.float32
    assert distances(found, expected)[1] <= (0.1 if half else 1e-4)


def test_half_precision_gradients_are_as_near_to_the_exact_ones_as_those_of_peft(adapted_group):
    """A tolerance against PEFT's bfloat16 says little, since both round: against float32, ours must not be worse."""
    found = []
    for dtype, of_peft in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        model, *group = adapted_group(dtype=dtype)
        if of_peft:
            as_peft_has_it(model)
        found.append(logps_and_gradients(model, *group)[1])
    exact, ours, theirs = found
    assert 0 < (ours - exact).norm() < 1.1 * (theirs - exact).norm() < 0.2 * exact.norm()


def test_merging_gives_what_the_adapter_gives_and_can_be_undone(adapted_group):
    model, *group = adapted_group()
    expected = logps(model, *group)
    with model.disable_adapter():
        assert (logps(model, *group) - expected).abs().max() > 1e-4
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        torch.testing.assert_close(logps(model, *group), expected)
        model.unmerge_adapter()
        torch.testing.assert_close(logps(model, *group), expected)


def test_fewer_and_smaller_tensors_are_kept_for_the_backward_pass(adapted_group):
    """In half precision PEFT keeps a copy of x for every layer that reads it; here they share the one of the model."""
    model, *group = adapted_group(dtype="bfloat16")

    def kept_bytes():
        kept = {}

        def pack(tensor):
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            graph = group_logprobs(model, *group)
        assert graph[0].requires_grad
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

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
