"""What is counted on tensors without numbers is what real ones take: weights, saved activations, every family."""

import pytest
import torch
from conftest import FAMILIES, PACKED
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from reward import group_statistics
from rollout import Group
from sayo.memory_plan.fake_policy import fake_policy, weights_by_part
from sayo.memory_plan.footprint import LiveBytes, Work, trace_step
from sayo.memory_plan.plan import shaped_prompt
from sayo.model.loading import load_policy, load_processor
from sayo.model.prompts import encode_prompt
from train_rl import Config

SMALL = {"num_generations": 3, "max_new_tokens": 5, "lora_rank": 4, "dtype": "float32"}


def prompt_and_fake(folder, processor, examples, settings):
    config = AutoConfig.from_pretrained(folder)
    prompt = encode_prompt(processor, examples[0])
    return prompt, shaped_prompt(prompt, config), fake_policy(config, settings)


def size(tensors) -> int:
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_weights_are_those_of_a_loaded_policy(model_folders, family, load_in_4bit):
    settings = Config(**SMALL, load_in_4bit=load_in_4bit)
    fake = fake_policy(AutoConfig.from_pretrained(model_folders[family]), settings)
    real, _ = load_policy(model_folders[family], lora_rank=4, dtype="float32", load_in_4bit=load_in_4bit)
    fake_names, names = (
        {name for name, module in model.named_modules() if "4bit" in type(module).__name__} for model in (fake, real)
    )
    assert fake_names == names and bool(names) == load_in_4bit
    planned, loaded = weights_by_part(fake), weights_by_part(real)
    for part, tensors in loaded.items():
        assert sum(tensor.nbytes for tensor in planned[part]) == sum(tensor.nbytes for tensor in tensors), part
    fake_sizes, sizes = ([p.numel() for p in model.parameters() if p.requires_grad] for model in (fake, real))
    assert fake_sizes == sizes and size(loaded["language model"]) > 0


@pytest.mark.parametrize("family", PACKED)
def test_what_is_kept_for_the_backward_is_what_autograd_saves(model_folders, examples, family):
    """The oracle: the tensors that autograd hands to its hooks in a forward of the real policy."""
    settings = Config(**SMALL)
    real, processor = load_policy(model_folders[family], lora_rank=4, dtype="float32")
    prompt, fake_prompt, fake = prompt_and_fake(model_folders[family], processor, examples, settings)
    completions = [torch.full((5,), 7) for _ in range(3)]
    saved, known = [], {p.untyped_storage().data_ptr() for p in [*real.parameters(), *real.buffers()]}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            saved.append(tensor)
        return tensor

    with torch.no_grad():
        group_statistics(real, Group({}, prompt, completions, [], []), settings)  # the picture's features, kept
    known |= {p.untyped_storage().data_ptr() for p in tree_leaves(dict(prompt.image_features[1])) if p is not None}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        group_statistics(real, Group({}, prompt, completions, [], []), settings)

    group = Group({}, fake_prompt, completions, [], [])
    with LiveBytes() as live:
        with torch.no_grad():
            group_statistics(fake, group, settings)
        before = live.total
        logps = group_statistics(fake, group, settings).logps
        kept = live.total - before
    assert len(logps) == 3 and kept == pytest.approx(size(saved), rel=0.02)


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_every_family_has_a_plan(model_folders, examples, family, load_in_4bit):
    """Every stage is there, gradients are as large as the adapter, and checkpointing keeps less."""
    settings = Config(**SMALL, load_in_4bit=load_in_4bit, max_pixels=None)
    processor = load_processor(model_folders[family])[1]
    _, prompt, fake = prompt_and_fake(model_folders[family], processor, examples, settings)
    packed = family in PACKED
    live = trace_step(fake, Work(prompt, 3, 2 if packed else 1, 4, 4 if packed else 1), settings, on_gpu=True)
    stages = {stage for stage, _ in live.peaks}
    assert {"evaluation", "sampling", "reference", "update", "other update", "optimizer step"} <= stages
    adapter = sum(tensor.nbytes for tensor in weights_by_part(fake)["adapter"])
    last = live.peaks["optimizer step", "optimizer"]
    assert last["gradients"] == last["adapter"] == adapter and last["optimizer"] >= 2 * adapter
    update, other = (
        max(sum(parts.values()) for (stage, _), parts in live.peaks.items() if stage == name)
        for name in ("update", "other update")
    )
    assert other < update  # the other one is checkpointed
    assert live.multiply_adds["update"] > 2 * live.multiply_adds["reference"] > 0
    assert live.total == sum(live.live.values()) and min(live.live.values()) >= 0
