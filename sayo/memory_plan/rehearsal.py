"""Rehearse the largest step of a data set: a run that cannot fit fails in its first minute, not in its third hour."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from sayo.memory_plan.longest import evaluated_at_a_time, longest_prompt, side_by_side
from sayo.model.forward import autocast, evaluating
from sayo.model.prompts import base_model, encode_prompt, image_features, model_device, vision_is_frozen
from sayo.model.sampling.cache import default_sampling_tokens
from sayo.model.sampling.samplers import is_packed, make_sampler
from sayo.run.processes import is_sharded
from sayo.settings import ConfigError

OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")  # torch's words for a CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the GPU or the machine is out of memory."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY))


def run_largest(train_step: Callable, state, model, processor, example: dict, groups: int, config) -> None:
    """The peak of training: an evaluation's prompts, then a step of `groups` times this example at full length."""
    prompt = encode_prompt(processor, example, config.system_prompt)
    moments = [torch.empty_like(parameter) for parameter in state.parameters for _ in range(2)]  # AdamW's, from step 1
    if evaluated := evaluated_at_a_time(config):  # its peak is the prefill
        sizes = len(prompt.input_ids), 1, config.max_new_tokens
        tokens = config.sampling_tokens or default_sampling_tokens(model, *sizes)
        together = side_by_side(sizes[0] + sizes[2], evaluated, tokens * is_packed(model))
        prompts = [replace(prompt) for _ in range(evaluated)]
        with torch.no_grad(), evaluating(model), autocast(model):
            for one in prompts if vision_is_frozen(model) else ():  # their features are kept
                image_features(model, [one])
            sampler = make_sampler(model, prompts[:together], 1, config.max_new_tokens)
            base_model(model).get_output_embeddings()(sampler.hidden)
        del prompts, sampler

    def backward(loss: Tensor, fault: str | None = None) -> str | None:
        loss.backward()
        return fault

    once = {"groups_per_step": groups, "num_iterations": 1, "dynamic_sampling": 1}
    config = replace(config, **once, min_new_tokens=config.max_new_tokens)
    no_update = SimpleNamespace(beta=state.beta, backward=backward, update=lambda _: 0.0)
    # No collectives: a rank that runs out of memory must not leave the others waiting in one.
    alone = SimpleNamespace(device=model_device(model), process_index=0, num_processes=1)
    alone.reduce, alone.gather = lambda tensor, _: tensor, lambda tensor: tensor
    train_step(model, processor, no_update, [example] * groups, 0, config, alone)
    del moments


def rehearse(train_step: Callable, state, model, processor, examples, config, accelerator) -> None:
    """Run the largest step of a data set by train_rl.train_step before training starts; `state` is left unchanged.

    Every rank tries it. Raises ConfigError with the plan's advice where one runs out of memory.
    """
    groups = config.groups_per_step // accelerator.num_processes
    example = examples[longest_prompt(processor, examples, config.system_prompt)]
    failure, device = None, model_device(model)
    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):
            run_largest(train_step, state, model, processor, example, groups, config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = str(error).partition("\n")[0] or type(error).__name__  # the error itself keeps the stack's tensors
    finally:
        model.zero_grad(set_to_none=True)
        gc.collect()
        if gpus:
            torch.cuda.empty_cache()
    if failure is None or not is_sharded(model):  # the other ranks of a sharded model wait for this one in a forward
        failures = accelerator.reduce(torch.tensor(float(failure is not None), device=accelerator.device), "sum")
    if failure is None:
        if failures:
            raise ConfigError("another process ran out of memory in the biggest group of the data; see its message")
        return
    from sayo.memory_plan.plan import advice_for  # traces with fake tensors: slow to import

    prompt = encode_prompt(processor, example, config.system_prompt)
    raise ConfigError(
        f"the biggest group of {examples.name} does not fit: example {example.get('id')!r}, a prompt of "
        f"{len(prompt.input_ids)} tokens and {config.num_generations} completions of {config.max_new_tokens}. torch "
        f"says: {failure[:200]}\n" + advice_for(config, processor, example, groups)
    )
