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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from sayo.examples.load import load_examples
from sayo.model.forward import TokenStatistics, autocast, evaluating
from sayo.model.loading import load_policy
from sayo.model.packing import split_by_tokens
from sayo.model.prompts import (
    Prompt,
    base_model,
    check_prompt_length,
    check_prompts,
    completion_texts,
    encode_prompt,
    max_positions,
    model_device,
)
from sayo.model.sampling.cache import default_sampling_tokens
from sayo.model.sampling.samplers import WINDOW, Decoding, is_packed, look_every, make_sampler
from sayo.model.sampling.tokens import choose_tokens, eos_token_ids, suppressed_token_ids
from sayo.run.config import PolicyConfig, SamplingConfig
from sayo.run.files import write_whole
from sayo.run.provenance import ensure_same_examples, ensure_same_settings, example_names, loaded_from
from sayo.settings import ConfigError, option, read_jsonl, run_command, writable


@dataclass
class Group:
    """One prompt and its G sampled completions."""

    example: dict
    prompt: Prompt
    completions: list[Tensor]  # G of (n_i,) ids on the CPU, EOS included when reached
    texts: list[str]  # decoded, without special tokens
    truncated: list[bool]  # True where max_new_tokens came before EOS
    statistics: TokenStatistics | None = None  # of the policy that sampled, filled in by reward.score_group

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion without its EOS, which rewards and metrics leave out."""
        return [len(ids) - (not cut) for ids, cut in zip(self.completions, self.truncated, strict=True)]


@torch.no_grad()
def sample_groups(
    model,
    processor,
    examples: Sequence[dict],
    *,
    num_generations: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    generators: Sequence[torch.Generator] | None = None,
    system_prompt: str | None = None,
    sampling_tokens: int | None = None,
) -> list[Group]:
    """Sample one group for each example, as many of them side by side in one packed cache as sampling_tokens holds.

    Args:
        examples: see sayo/examples/load.py.
        num_generations: completions per example, G.
        max_new_tokens: longest completion in tokens, EOS included. min_new_tokens: tokens before which none ends.
        temperature: 0 is greedy. top_p: 1 keeps every token. top_k, min_p: see choose_tokens.
        repetition_penalty: above 1, tokens that prompt or completion hold become less likely, as in transformers.
        generators: one CPU generator per example; a group's draws then depend on its own only.
        sampling_tokens: prompts and completions at full length of the groups that share a cache; never splits one.
            None: 8192 on a CPU, on a card what its free memory holds.

    Raises:
        ValueError: num_generations or max_new_tokens below 1, min_new_tokens outside [0, max_new_tokens], a negative
            temperature, top_p outside (0, 1], or a prompt that leaves no room for max_new_tokens in the model's
            positions.
    """
    problems = []
    if num_generations < 1:
        problems.append(f"num_generations={num_generations}: give 1 or more")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens={max_new_tokens}: give 1 or more")
    if not 0 <= min_new_tokens <= max_new_tokens:
        problems.append(f"min_new_tokens={min_new_tokens}: give 0 to max_new_tokens={max_new_tokens}")
    if temperature < 0:
        problems.append(f"temperature={temperature}: give 0 (greedy) or more")
    if not 0 < top_p <= 1:
        problems.append(f"top_p={top_p}: give more than 0, at most 1")
    if top_k is not None and top_k < 1:
        problems.append(f"top_k={top_k}: give 1 or more, or none for every token")
    if not 0 <= min_p <= 1:
        problems.append(f"min_p={min_p}: give 0 to 1")
    if repetition_penalty <= 0:
        problems.append(f"repetition_penalty={repetition_penalty}: give more than 0; 1 changes nothing")
    if problems:
        raise ValueError("; ".join(problems))
    prompts = [encode_prompt(processor, example, system_prompt) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        check_prompt_length(max_positions(model), len(prompt.input_ids), max_new_tokens, example)
    generators = generators or [None] * len(prompts)
    longest = max((len(prompt.input_ids) for prompt in prompts), default=0)
    tokens = sampling_tokens or default_sampling_tokens(model, longest, num_generations, max_new_tokens)
    sizes = [longest + num_generations * max_new_tokens] * len(prompts)  # prompts are padded to the longest
    completions: list[Tensor] = []
    with evaluating(model), autocast(model):  # around all tokens: what it casts is kept until its end
        choose = partial(choose_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
        lengths = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
        options = lengths | {"choose": choose, "repetition_penalty": repetition_penalty}
        for part in split_by_tokens(sizes, tokens if is_packed(model) else 0):
            sampled = (model, processor, prompts[part], num_generations)
            completions += sample_completions(*sampled, generators=generators[part], **options)
    texts = completion_texts(processor, completions)
    ends = eos_token_ids(model, processor)
    truncated = [int(completion[-1]) not in ends for completion in completions]
    groups = []
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        own = slice(number * num_generations, (number + 1) * num_generations)
        groups.append(Group(example, prompt, completions[own], texts[own], truncated[own]))
    return groups


def sample_group(model, processor, example: dict, *, generator: torch.Generator | None = None, **options) -> Group:
    """Sample one group. Options: those of sample_groups."""
    return sample_groups(model, processor, [example], generators=[generator], **options)[0]


def sample_completions(
    model,
    processor,
    prompts,
    num_generations,
    *,
    max_new_tokens,
    choose,
    generators,
    min_new_tokens=0,
    repetition_penalty=1.0,
) -> list[Tensor]:
    """The completions of all prompts one after the other, each (n_i,) on the CPU.

    Args:
        choose: (logits (m, V), uniforms (m,)) -> ids (m,), as choose_tokens. generators: one for each prompt.

    Raises:
        PolicyError: activations are not finite in the model's number format.
    """
    device, head = model_device(model), base_model(model).get_output_embeddings()
    ends = torch.tensor(sorted(eos_token_ids(model, processor)), device=device)
    never = suppressed_token_ids(model, processor).to(device)
    sampler = make_sampler(model, prompts, num_generations, max_new_tokens)
    # A number for every completion and token, ended or not: a group's stream does not depend on who has ended.
    uniforms = [torch.rand(max_new_tokens, num_generations, generator=generator) for generator in generators]
    seen = seen_tokens(prompts, num_generations, head) if repetition_penalty != 1 else None
    uniforms = torch.cat(uniforms, dim=1).to(device)
    decoding = Decoding(sampler, head, choose, uniforms, ends, never, seen, repetition_penalty)
    decoding.banned[ends] = float("-inf") if min_new_tokens else 0.0
    decoding.draw(sampler.hidden)
    for step in range(1, max_new_tokens):
        if step == min_new_tokens:
            decoding.banned[ends] = 0.0
        if step % look_every(device) == 0 and not decoding.unfinished():
            break
        decoding.step(min(-(-step // WINDOW) * WINDOW, max_new_tokens))
    decoding.unfinished()  # raises where activations are not finite
    return decoding.completions()


def seen_tokens(prompts, num_generations: int, head) -> Tensor:
    """(B * G, V) boolean: the tokens of each row's prompt."""
    seen = torch.zeros(len(prompts), head.weight.shape[0], dtype=torch.bool, device=head.weight.device)
    for row, prompt in zip(seen, prompts, strict=True):
        row[prompt.input_ids.to(row.device)] = True
    return seen.repeat_interleave(num_generations, dim=0)


def group_generator(*key) -> torch.Generator:
    """A CPU generator from a key such as (seed, step, number of the group): a resumed run builds the same again."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, key))).getrandbits(63))


# --- command line -----------------------------------------------------------------------------------------------


# What completions do not depend on, or in part only.
MAY_CHANGE = ("output", "resume", "limit", "bad_rows", "sampling_tokens", "allowed_folders")


@dataclass
class RolloutConfig(SamplingConfig, PolicyConfig):
    """Sample completions for every example and write them as JSONL, one object per example."""

    output: str = option("rollouts.jsonl", "JSONL file to write; --resume continues an interrupted one.")
    num_generations: int = option(4, "Completions per example.", at_least=1)
    resume: bool = option(False, "Keep the rows already in the output file and sample the missing ones.")

    def problems(self) -> list[str]:
        return super().problems() + writable(self, "output")


def main(config: RolloutConfig) -> None:
    output, done = Path(config.output), {}
    if output.exists() and not config.resume:
        raise ConfigError(f"output={config.output!r} exists: add --resume to continue it, or give another name")
    if output.exists():
        rows = read_jsonl(output, skip_damage=True)
        if any("completion_ids" not in row for _, row in rows):
            raise ConfigError(f"output={config.output!r} was not written by rollout.py: give another name")
        done = {row["id"]: row.get("asked") for _, row in rows}
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    ensure_same_settings(output, settings, asdict(RolloutConfig()))
    if output.exists():
        write_whole(output, "".join(line + "\n" for line, _ in rows))  # without a line that was being written
    examples = load_examples(config.data, **config.data_arguments(), require_boxes=False)
    names = example_names(examples)
    ensure_same_examples(output, {identifier: name for identifier, name in done.items() if name}, names)
    model, processor = load_policy(**config.policy_arguments(lora_rank=0))
    loaded = {"loaded": loaded_from(config.policy_arguments(0), model)}
    ensure_same_settings(output, settings | loaded, asdict(RolloutConfig()))
    check_prompts(model, processor, examples, config, config.max_new_tokens)
    with output.open("a", encoding="utf-8") as file:
        for index in tqdm(range(len(examples)), desc="rollout", unit="group"):
            example = examples[index]
            if example["id"] in done:
                continue
            generator = group_generator(config.seed, "rollout", index)
            group = sample_group(model, processor, example, generator=generator, **config.sampling_arguments())
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
