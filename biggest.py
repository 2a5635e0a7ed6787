"""The biggest packed group of a data set: which one it is, and whether it runs, before anything long starts.

Out of memory in the third hour, because the longest prompt came late, loses the run; tried first it costs seconds.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, lru_cache

import torch
from PIL import Image
from tqdm import tqdm

from config import ConfigError
from data.pictures import picture_size
from ease import ease_layer
from evaluate import EXAMPLES_AT_A_TIME
from grpo import grpo_loss
from packing import split_by_tokens
from processes import is_shared_out
from prompts import Prompt, encode_prompt, image_features, model_device, prompt_text, vision_is_frozen
from reward import group_statistics
from rollout import Group, choose_tokens, eos_token_ids, is_packed, sample_completions
from vlm import evaluating, group_logprobs

NUM_SCENES = 64  # scenes are drawn by sayo itself: one size, questions of a few lengths
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")  # what torch says of a CPU's


@lru_cache(maxsize=2)
def _picture_counter(processor):
    """A function of (width, height): how many tokens of the prompt such a picture becomes."""

    @cache
    def count(size: tuple[int, int]) -> int:
        if hasattr(processor, "_get_num_multimodal_tokens"):  # from the size alone
            return processor._get_num_multimodal_tokens(image_sizes=[size[::-1]]).num_image_tokens[0]
        blank = processor(text=[processor.image_token], images=[Image.new("RGB", size)])
        return len(blank["input_ids"][0])

    return count


def longest_prompt(processor, examples: Sequence, system_prompt: str | None) -> int:
    """Index of the example with the longest prompt: tokens of its text and, by their sizes, of its pictures.

    No picture is decoded. Of `scenes`, the first NUM_SCENES speak for all.
    """
    is_drawn = examples.name.partition(":")[0] == "scenes"
    count, lengths = _picture_counter(processor), []
    for index in tqdm(range(min(NUM_SCENES, len(examples)) if is_drawn else len(examples)), "longest", disable=None):
        row = examples.peek(index)
        text = processor.tokenizer(prompt_text(processor, row, system_prompt), verbose=False).input_ids
        sizes = [image.size if isinstance(image, Image.Image) else picture_size(image) for image in row["images"]]
        lengths.append(len(text) + sum(map(count, sizes)))
    return max(range(len(lengths)), key=lengths.__getitem__)


def side_by_side(group_tokens: int, num_groups: int, sampling_tokens: int) -> int:
    """How many groups of so many tokens share a cache while they are sampled."""
    return split_by_tokens([group_tokens] * num_groups, sampling_tokens)[0].stop


def evaluated_side_by_side(prompt_tokens: int, config, is_packed: bool) -> tuple[int, int]:
    """(prompts that an evaluation has in memory, how many of them share a cache); (0, 0) where there is none."""
    if config.eval_data == "none" or (not config.eval_data and config.data != "scenes"):
        return 0, 0
    in_all = min(EXAMPLES_AT_A_TIME, config.eval_limit or EXAMPLES_AT_A_TIME)
    return in_all, side_by_side(prompt_tokens + config.max_new_tokens, in_all, config.sampling_tokens * is_packed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a card or the machine has no memory left."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error).lower() for words in OUT_OF_MEMORY))


def run_group(model, processor, example: dict, groups: int, config) -> None:
    """One group with all completions at max_new_tokens through every stage of train_rl.train_step but the optimizer's.

    Args:
        example: the one with the longest prompt. groups: groups that this process has in a step.
        config: anything with the fields of train_rl.Config.
    """
    G, device = config.num_generations, model_device(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prompt = encode_prompt(processor, example, config.system_prompt)
    size = len(prompt.input_ids) + G * config.max_new_tokens
    count = side_by_side(size, groups, config.sampling_tokens * is_packed(model))
    ends = torch.tensor(sorted(eos_token_ids(model, processor)), device=device)

    def never_ending(logits, uniforms):
        logits[:, ends] = float("-inf")
        return choose_tokens(logits, uniforms, temperature=config.temperature, top_p=config.top_p)

    # Nothing of AdamW's two moments is there yet, which a step will have from the first one on.
    moments = [torch.empty_like(parameter) for parameter in trained for _ in range(2)]
    evaluated, together = evaluated_side_by_side(len(prompt.input_ids), config, is_packed(model))
    if evaluated:  # two tokens: an evaluation's memory goes into reading its prompts
        others = _with_features(model, prompt, evaluated)
        _sample_some(model, processor, others, together, 1, min(2, config.max_new_tokens), never_ending)
        del others
    prompts = _with_features(model, prompt, groups)
    completions = _sample_some(model, processor, prompts, count, G, config.max_new_tokens, never_ending)
    group = Group(example, prompts[0], completions[:G], [""] * G, [True] * G)
    reference = None
    if config.beta:
        with torch.no_grad(), evaluating(model), model.disable_adapter():
            reference = group_logprobs(model, group.prompt, group.completions, temperature=config.temperature)
    statistics = group_statistics(model, group, config, ease_layer(model) if config.ease_weight else None)
    advantages = torch.linspace(-1, 1, G)
    options = {name: getattr(config, name) for name in ("beta", "clip_low", "clip_high", "loss_type", "max_new_tokens")}
    loss, _ = grpo_loss(statistics.logps, statistics.detached().logps, reference, advantages, **options)
    if config.ease_weight:
        loss = loss + config.ease_weight * statistics.maps.sum()
    loss.backward()
    del moments


def _with_features(model, prompt: Prompt, count: int) -> list[Prompt]:
    """Prompts with what a frozen vision tower says of their pictures, which stays until their step ends."""
    prompts = [replace(prompt) for _ in range(count)]
    if vision_is_frozen(model):
        with torch.no_grad(), evaluating(model):
            for one in prompts:
                image_features(model, [one])
    return prompts


def _sample_some(model, processor, prompts, count: int, num_generations: int, max_new_tokens: int, choose) -> list:
    """The completions of the first `count` prompts."""
    generators = [torch.Generator().manual_seed(number) for number in range(count)]
    with torch.no_grad(), evaluating(model):
        return sample_completions(
            model, processor, prompts[:count], num_generations, max_new_tokens, choose, generators
        )


@contextmanager
def _left_as_it_was(model) -> Iterator[None]:
    """Gradients, random numbers and, as far as it goes, memory are afterwards what they were before."""
    device = model_device(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def try_biggest(model, processor, examples, config, accelerator) -> None:
    """Run the biggest group of a data set before training starts; every process tries, and all of them stop together.

    Raises:
        ConfigError: a process ran out of memory; with the plan's advice.
    """
    groups = config.groups_per_step // accelerator.num_processes
    example = examples[longest_prompt(processor, examples, config.system_prompt)]
    failure = None
    try:
        with _left_as_it_was(model):
            run_group(model, processor, example, groups, config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Only its words: the error itself would keep the stack's tensors in memory.
        failure = str(error).partition("\n")[0] or type(error).__name__
    if failure is None or not is_shared_out(model):  # with shares, the others are in a forward, and wait for this one
        failures = accelerator.reduce(torch.tensor(float(failure is not None), device=accelerator.device), "sum")
    if failure is None and failures == 0:
        return
    if failure is None:
        raise ConfigError("another process ran out of memory in the biggest group of the data; see its message")
    from plan import advice_for  # which takes train_rl's config for its own command

    prompt = encode_prompt(processor, example, config.system_prompt)
    raise ConfigError(
        f"the biggest group of {examples.name} does not fit: example {example.get('id')!r}, a prompt of "
        f"{len(prompt.input_ids)} tokens and {config.num_generations} completions of {config.max_new_tokens}. torch "
        f"says: {failure[:200]}\n" + advice_for(config, processor, example, groups)
    )
