"""Sample a group of completions per prompt with the current policy.

The prompt (picture included) is read once. From then on every step feeds one new token per unfinished completion:
finished completions cost nothing, and the keys of the prompt exist once, not num_generations times. Several groups may
be sampled side by side. Models with linear attention cannot be packed: there, every completion has a row of its own,
after one reading of the prompt.

    python rollout.py --data scenes:heldout --limit 8 --output rollouts.jsonl
    python rollout.py --model Qwen/Qwen3-VL-4B-Instruct --load_in_4bit --data mine.jsonl --output rollouts.jsonl
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from attention import PROBED_ATTENTION, SamplingCache
from checkpoint import write_whole
from config import ConfigError, PolicyConfig, SamplingConfig, option, read_jsonl, run_command, writable
from data.examples import DataError, load_examples
from families import PolicyError, pictures_of
from fingerprints import example_names, hold_to_examples, hold_to_settings, loaded_from
from loading import eos_token_ids, suppressed_token_ids
from packing import Tokens, model_layout, packed_layout, split_by_tokens
from prompts import (
    Prompt,
    base_model,
    encode_prompt,
    model_device,
    placeholders_in,
    prompt_positions,
    prompt_text,
    question_text,
)
from vlm import (
    TokenStatistics,
    attention_name,
    autocast,
    evaluating,
    forward_hidden,
    load_policy,
)


@dataclass
class Group:
    """One prompt and its G sampled completions."""

    example: dict
    prompt: Prompt
    completions: list[Tensor]  # G of (n_i,) ids on the CPU, EOS included when reached
    texts: list[str]  # decoded, without special tokens
    truncated: list[bool]  # True where max_new_tokens came before EOS
    statistics: TokenStatistics | None = None  # of the policy that sampled, filled in by reward.score_group


def choose_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution at a given uniform number.

    Example: probabilities (0.5, 0.3, 0.2) and uniform 0.6 give token 1, with top_p=0.4 token 0.

    Args:
        logits: (m, V); -inf is never drawn.
        uniforms: (m,) in [0, 1), one random number per row, so that a group's draws do not depend on its neighbours.
        temperature: 0 takes the most probable token.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p.

    Returns:
        (m,) token ids.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)  # (m, V)
    # A token stays as long as the more probable ones before it have not reached top_p; the first always stays.
    probabilities = probabilities.where(cumulative - probabilities < top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding must not carry the threshold up to the total: behind it stand only tokens of probability zero.
    threshold = torch.minimum(uniforms.to(total)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return order.gather(-1, torch.searchsorted(cumulative, threshold, right=True))[:, 0]


@torch.no_grad()
def sample_groups(
    model,
    processor,
    examples: Sequence[dict],
    *,
    num_generations: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generators: Sequence[torch.Generator] | None = None,
    system_prompt: str | None = None,
    sampling_tokens: int = 8192,
) -> list[Group]:
    """Sample one group for each example, as many of them side by side in one packed cache as sampling_tokens holds.

    Args:
        examples: see data/examples.py.
        num_generations: completions per example, G.
        max_new_tokens: longest completion in tokens, EOS included.
        temperature: 0 is greedy. top_p: 1 keeps every token.
        generators: one CPU generator per example; a group's draws then depend on its own only.
        sampling_tokens: prompts and completions at full length of the groups that share a cache; never splits one.

    Raises:
        ValueError: num_generations or max_new_tokens below 1, a negative temperature, top_p outside (0, 1], or a
            prompt that leaves no room for max_new_tokens in the model's positions.
    """
    problems = []
    if num_generations < 1:
        problems.append(f"num_generations={num_generations}: give 1 or more")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens={max_new_tokens}: give 1 or more")
    if temperature < 0:
        problems.append(f"temperature={temperature}: give 0 (greedy) or more")
    if not 0 < top_p <= 1:
        problems.append(f"top_p={top_p}: give more than 0, at most 1")
    if problems:
        raise ValueError("; ".join(problems))
    prompts = [encode_prompt(processor, example, system_prompt) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        check_prompt_length(max_positions(model), len(prompt.input_ids), max_new_tokens, example)
    generators = generators or [None] * len(prompts)
    sizes = [len(prompt.input_ids) + num_generations * max_new_tokens for prompt in prompts]
    completions: list[Tensor] = []
    with evaluating(model), autocast(model):  # around all tokens: what it casts is kept until its end
        for part in split_by_tokens(sizes, sampling_tokens if is_packed(model) else 0):
            choose = partial(choose_tokens, temperature=temperature, top_p=top_p)
            completions += sample_completions(
                model, processor, prompts[part], num_generations, max_new_tokens, choose, generators[part]
            )
    texts = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
    ends = eos_token_ids(model, processor)
    truncated = [int(completion[-1]) not in ends for completion in completions]
    groups = []
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        own = slice(number * num_generations, (number + 1) * num_generations)
        groups.append(Group(example, prompt, completions[own], texts[own], truncated[own]))
    return groups


def max_positions(model) -> int:
    return base_model(model).config.get_text_config().max_position_embeddings


def check_prompt_length(positions: int, num_tokens: int, max_new_tokens: int, example: dict) -> None:
    """Raises DataError when a prompt of num_tokens and a completion do not fit in the model's positions."""
    if num_tokens + max_new_tokens > positions:
        raise DataError(
            f"example {example.get('id')!r}: prompt of {num_tokens} tokens + max_new_tokens={max_new_tokens} "
            f"are more than the model's {positions} positions: lower "
            "--max_pixels or --max_new_tokens, or shorten the question"
        )


def bad_prompts(
    positions: int, processor, examples, system_prompt: str | None, max_new_tokens: int
) -> list[tuple[int, str]]:
    """(index, what is wrong) of examples whose prompts are too long or have a picture's placeholder in them.

    `positions` is max_positions(model). Only the prompts that could be too long, by their text and by the most tokens
    a picture may have, are encoded.

    Raises:
        DataError: the system prompt itself holds a placeholder.
    """
    placeholders = placeholders_in(processor, system_prompt or "")
    if placeholders:
        raise DataError(f"system_prompt: remove {', '.join(placeholders)}, which stands for a picture or a video")
    most_tokens = pictures_of(processor).max_image_tokens(processor)
    # Scenes are drawn by sayo itself, all of one small size: one of them speaks for all.
    num_checked = 1 if examples.name.partition(":")[0] == "scenes" else len(examples)
    found = []
    for index in tqdm(range(num_checked), desc="prompts", disable=num_checked <= 2000, leave=False):
        row = examples.peek(index)
        text = prompt_text(processor, row, system_prompt)
        longest = len(processor.tokenizer(text, verbose=False).input_ids) + len(row["images"]) * most_tokens
        is_short = longest + max_new_tokens <= positions
        if is_short and not placeholders_in(processor, question_text(row)):
            continue
        try:
            num_tokens = len(encode_prompt(processor, examples[index], system_prompt).input_ids)
            check_prompt_length(positions, num_tokens, max_new_tokens, row)
        except DataError as error:
            found.append((index, str(error)))
    return found


def check_prompts(model, processor, examples, config, max_new_tokens: int) -> None:
    """Find prompts that cannot be used before any long work starts; with bad_rows "skip", drop them from `examples`.

    Args:
        config: anything with system_prompt and bad_rows.

    Raises:
        DataError: names every such example, what fits, and the fix; or no example is left.
    """
    found = bad_prompts(max_positions(model), processor, examples, config.system_prompt, max_new_tokens)
    if found and config.bad_rows == "skip" and len(found) < len(examples):
        examples.drop(found)
        print(f"{len(found)} examples of {examples.name} skipped, first: {found[0][1]}", file=sys.stderr)
    elif found:
        more = [f"and {len(found) - 20} more"] if len(found) > 20 else []
        hint = "--bad_rows skip drops them" if len(found) < len(examples) else "no example is left"
        raise DataError("\n".join([message for _, message in found[:20]] + more + [hint]))


def sample_group(
    model,
    processor,
    example: dict,
    *,
    num_generations: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    system_prompt: str | None = None,
) -> Group:
    """Sample one group: sample_groups for a single example."""
    return sample_groups(
        model,
        processor,
        [example],
        num_generations=num_generations,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        generators=None if generator is None else [generator],
        system_prompt=system_prompt,
    )[0]


class _TreeSampler:
    """The prompts side by side in one row, each once; every step feeds one token of each completion behind them."""

    def __init__(self, model, prompts, num_generations, max_new_tokens):
        self.model, device = model, model_device(model)
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
        self.cache = SamplingCache(lengths.tolist(), max_new_tokens)
        layout = packed_layout(model, prompts, [[] for _ in prompts])
        hidden = forward_hidden(model, layout, self.cache)[0]  # (sum of P, D)
        self.parent = torch.arange(len(prompts)).repeat_interleave(num_generations)  # (B * G,)
        self.rows = torch.arange(len(self.parent), device=device)  # completions that have keys
        starts = torch.stack([prompt_positions(model, prompt).max() + 1 for prompt in prompts])
        self.start, self.axes = starts[self.parent].to(device), len(layout.position_ids)
        self.hidden = hidden[(lengths.cumsum(0) - 1)[self.parent].to(device)]  # (B * G, D), each prompt's last token

    def feed(self, tokens: Tensor, alive: Tensor, step: int) -> Tensor:
        """The tokens (m,) of the completions `alive` (m,) to their last hidden states (m, D)."""
        kept = torch.searchsorted(self.rows, alive) if len(alive) < len(self.rows) else None
        self.rows = alive
        of_prompts = self.parent[alive.cpu()].bincount(minlength=len(self.cache.prompt_lengths))
        self.cache.begin_token(kept, of_prompts.tolist())
        positions = (self.start[alive] + step).expand(self.axes, 1, -1)  # (axes, 1, m)
        return forward_hidden(self.model, Tokens(tokens[None], positions), self.cache)[0]


class _RowSampler:
    """One row for each completion of one prompt, which is read once: for models that cannot be packed."""

    def __init__(self, model, prompts, num_generations, _):
        (prompt,) = prompts
        layout = packed_layout(model, [prompt], [[]])
        self.model, self.cache = model, DynamicCache(config=base_model(model).config.get_text_config())
        hidden = forward_hidden(model, Tokens(layout.input_ids, layout.position_ids, prompts=[prompt]), self.cache)
        self.hidden = hidden[0, -1].expand(num_generations, -1)  # (G, D)
        self.start, self.axes = layout.position_ids.max() + 1, len(layout.position_ids)
        self.rows = torch.arange(num_generations, device=self.start.device)  # completions that have a row
        self.cache.reorder_cache(torch.zeros_like(self.rows))

    def feed(self, tokens: Tensor, alive: Tensor, step: int) -> Tensor:
        if len(alive) < len(self.rows):  # rows of finished completions cost nothing more
            self.cache.reorder_cache(torch.searchsorted(self.rows, alive))
            self.rows = alive
        positions = (self.start + step).expand(self.axes, len(alive), 1)  # (axes, m, 1)
        return forward_hidden(self.model, Tokens(tokens[:, None], positions), self.cache)[:, 0]


def is_packed(model) -> bool:
    """Whether groups can be sampled side by side: not with linear attention, and not with eager attention."""
    return model_layout(model) == "packed" and attention_name(model) == PROBED_ATTENTION


def sample_completions(model, processor, prompts, num_generations, max_new_tokens, choose, generators) -> list[Tensor]:
    """The completions of all prompts one after the other, each (n_i,) on the CPU.

    Args:
        choose: (logits (m, V), uniforms (m,)) -> ids (m,), as choose_tokens. generators: one for each prompt.

    Raises:
        PolicyError: activations are not finite in the model's number format.
    """
    device, head = model_device(model), base_model(model).get_output_embeddings()
    ends = torch.tensor(sorted(eos_token_ids(model, processor)), device=device)
    suppressed = suppressed_token_ids(model, processor).to(device)
    sampler = (_TreeSampler if is_packed(model) else _RowSampler)(model, prompts, num_generations, max_new_tokens)
    hidden = sampler.hidden  # (B * G, D)

    tokens = torch.zeros(len(hidden), max_new_tokens, dtype=torch.long, device=device)
    counts = torch.full((len(hidden),), max_new_tokens)
    alive = torch.arange(len(hidden), device=device)  # (m,) completions that go on
    for step in range(max_new_tokens):
        if not hidden.isfinite().all():
            raise PolicyError(
                f"dtype: the model's activations are not finite in {str(hidden.dtype).removeprefix('torch.')}; give "
                "--dtype bfloat16, or float32 where the GPU has no bfloat16"
            )
        logits = head(hidden).float()  # (m, V)
        logits[:, suppressed] = float("-inf")
        # A number for every completion, finished or not: a group's stream does not depend on who has finished.
        uniforms = torch.cat([torch.rand(num_generations, generator=generator) for generator in generators])
        drawn = choose(logits, uniforms[alive.cpu()])  # (m,)
        tokens[alive, step] = drawn
        ended = torch.isin(drawn, ends)
        counts[alive[ended].cpu()] = step + 1
        alive, drawn = alive[~ended], drawn[~ended]
        if len(alive) == 0 or step + 1 == max_new_tokens:
            break
        hidden = sampler.feed(drawn, alive, step)  # (m, D)
    tokens = tokens.cpu()
    return [row[:count] for row, count in zip(tokens, counts.tolist(), strict=True)]


def group_generator(*key) -> torch.Generator:
    """A CPU generator that is a function of the key alone, e.g. (seed, step, number of the group).

    Nothing about random numbers needs to be saved: a resumed run builds the same generators again.
    """
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


# --- command line -----------------------------------------------------------------------------------------------


# What completions do not depend on, or in part only.
MAY_CHANGE = ("output", "resume", "limit", "bad_rows", "sampling_tokens", "allowed_folders")


@dataclass
class RolloutConfig(SamplingConfig, PolicyConfig):
    """Sample completions for every example and write them as JSONL, one object per example."""

    output: str = option("rollouts.jsonl", "JSONL file to write; an interrupted one goes on with --resume.")
    num_generations: int = option(4, "Completions per example.")
    resume: bool = option(False, "Keep the rows that the output file has and sample the missing ones.")

    def problems(self) -> list[str]:
        return super().problems() + writable(self, "output")


def main(config: RolloutConfig) -> None:
    output, done = Path(config.output), {}
    if output.exists() and not config.resume:
        raise ConfigError(f"output={config.output!r} exists: add --resume to go on with it, or give another name")
    if output.exists():
        rows = read_jsonl(output)
        if any("completion_ids" not in row for _, row in rows):
            raise ConfigError(f"output={config.output!r} was not written by rollout.py: give another name")
        done = {row["id"]: row.get("asked") for _, row in rows}
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    hold_to_settings(output, settings)
    if output.exists():
        write_whole(output, "".join(line + "\n" for line, _ in rows))  # without a line that was being written
    examples = load_examples(config.data, **config.data_arguments(), require_boxes=False)
    names = example_names(examples)
    hold_to_examples(output, {identifier: name for identifier, name in done.items() if name}, names)
    model, processor = load_policy(**config.policy_arguments(lora_rank=0))
    hold_to_settings(output, settings | {"loaded": loaded_from(config.policy_arguments(0), model)})
    check_prompts(model, processor, examples, config, config.max_new_tokens)
    with output.open("a", encoding="utf-8") as file:
        for index in tqdm(range(len(examples)), desc="rollout", unit="group"):
            example = examples[index]
            if example["id"] in done:
                continue
            group = sample_group(
                model,
                processor,
                example,
                num_generations=config.num_generations,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                generator=group_generator(config.seed, "rollout", index),
                system_prompt=config.system_prompt,
            )
            row = {
                "id": example["id"],
                "asked": names[example["id"]],
                "question": example["question"],
                "answer": example["answer"],
                "prompt_tokens": len(group.prompt.input_ids),
                "texts": group.texts,
                "truncated": group.truncated,
                "completion_ids": [completion.tolist() for completion in group.completions],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(examples)} groups of {config.num_generations} -> {output}")


if __name__ == "__main__":
    run_command(RolloutConfig, main)
