"""Rewards of a sampled group: region attention of the uncertain tokens, format, and accuracy, each a named component.

From SAYO (arXiv 2602.08241). One forward over the packed group gives, for every generated token, the entropy of the
distribution that it was drawn from and its attention on the image: averaged over the tokens that the boxes cover (a)
and over all image tokens (v). Departures from the released script: padding and EOS never compete for the top 30 %,
the region is a coverage in [0, 1] of each image token instead of a list of cells, and the layer is a setting.

    python reward.py --rollouts rollouts.jsonl --data scenes:heldout --output rewards.jsonl
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config import ConfigError, PolicyConfig, at_least, option, read_jsonl, run_command, writable
from data.examples import load_examples
from grader import answer_block, extract_answer, is_correct
from prompts import encode_prompt
from rollout import Group
from vlm import TokenStatistics, evaluating, load_policy, resolve_layers, token_statistics

__all__ = ["RewardConfig", "attention_reward", "extract_answer", "format_reward", "is_correct", "score_group"]

ATTENTION_OF_NOTHING = -1.0  # the attention reward of an empty completion: its lower bound, so silence never pays


@dataclass
class RewardConfig:
    """What is rewarded. The paper's main model is attention + format; its "full" one adds accuracy."""

    attention_weight: float = option(1.0, "Weight of the attention reward, tanh(log(a / v)) in (-1, 1).")
    format_weight: float = option(1.0, "Weight of the format reward, 0 to 1.")
    accuracy_weight: float = option(1.0, "Weight of the accuracy reward, 0 or 1; the paper's main model has 0.")
    top_fraction: float = option(0.3, "Share of a completion's tokens, the most uncertain ones, that is rewarded.")
    attention_eps: float = option(1e-8, "Epsilon in log((a + eps) / (v + eps)).")
    attention_layers: list[int] = option([-1], "Decoder layers whose attention is averaged; -1 is the last.")
    attention_query: str = option(
        "token", "Position whose attention counts: the token, or its predictor.", ("token", "predictor")
    )
    format_min_tokens: int | None = option(None, "Scale the format reward down below this length (the script: 60).")
    format_max_tokens: int | None = option(None, "Scale the format reward down above this length (the script: 100).")
    temperature: float = option(1.0, "Temperature of sampling, and of the entropies and log-probs that are taken.")

    def problems(self) -> list[str]:
        found = super().problems() + at_least(
            self, 0, "attention_weight", "format_weight", "accuracy_weight", "attention_eps"
        )
        found += at_least(self, 1, "format_min_tokens", "format_max_tokens")
        if self.temperature <= 0:
            found.append(f"temperature={self.temperature}: give more than 0 (1.0 samples from the policy itself)")
        if not 0 < self.top_fraction <= 1:
            found.append(f"top_fraction={self.top_fraction}: give more than 0, at most 1 (the paper: 0.3)")
        if not self.attention_layers:
            found.append("attention_layers=[]: give at least one layer number, -1 for the last")
        shortest, longest = self.format_min_tokens, self.format_max_tokens
        if shortest is not None and longest is not None and shortest > longest:
            found.append(f"format_min_tokens={shortest} is above format_max_tokens={longest}: swap them")
        return found


# --- attention --------------------------------------------------------------------------------------------------


def select_uncertain(entropy: Tensor, top_fraction: float = 0.3) -> Tensor:
    """Indices of the top_fraction tokens of highest entropy: max(1, int(top_fraction * n)) of them, earliest first.

    Example: entropies (0.1, 2.0, 0.3, 1.0) with top_fraction 0.5 give (1, 3).

    Args:
        entropy: (n,) of the completion's tokens, EOS and padding left out, n of at least 1.
    """
    count = max(1, int(top_fraction * len(entropy)))
    return entropy.argsort(descending=True, stable=True)[:count].sort().values  # (k,)


def _log_ratio(target: Tensor, image: Tensor, eps: float) -> float:
    target_mean, image_mean = float(target.double().mean()) + eps, float(image.double().mean()) + eps
    if target_mean == 0:  # only with eps 0
        return -math.inf if image_mean else 0.0
    return math.log(target_mean / image_mean) if image_mean else math.inf


def attention_reward(
    target: Tensor, image: Tensor, entropy: Tensor, *, top_fraction: float = 0.3, eps: float = 1e-8
) -> float:
    """tanh(log((a + eps) / (v + eps))) over the most uncertain tokens (SAYO, arXiv 2602.08241).

    Example: with attention on the target three times that on the image, tanh(log 3) = (9 - 1) / (9 + 1) = 0.8.

    Args:
        target: (n,) attention of each generated token on the target, mean over heads and target tokens.
        image: (n,) the same over all image tokens.
        entropy: (n,) of the distribution each token was drawn from.

    Returns:
        A number in (-1, 1): above 0 where the target gets more than its share; -1 for a completion without tokens.

    Raises:
        ValueError: different lengths, or top_fraction outside (0, 1].
    """
    if not len(target) == len(image) == len(entropy):
        raise ValueError(
            f"target has {len(target)} tokens, image {len(image)}, entropy {len(entropy)}: give one length"
        )
    if not 0 < top_fraction <= 1:
        raise ValueError(f"top_fraction={top_fraction}: give more than 0, at most 1")
    if len(entropy) == 0:
        return ATTENTION_OF_NOTHING
    chosen = select_uncertain(entropy, top_fraction)
    return math.tanh(_log_ratio(target[chosen], image[chosen], eps))


def target_attention_score(target: Tensor, image: Tensor, eps: float = 1e-8) -> float:
    """TAS = (1 + tanh(log((a + eps) / (v + eps)))) / 2 = a² / (a² + v²), in (0, 1); 0.5 means no preference.

    Args:
        target, image: (n,) as in attention_reward. NaN when n is 0.
    """
    if len(target) == 0:
        return math.nan
    return (1 + math.tanh(_log_ratio(target, image, eps))) / 2


# --- format -----------------------------------------------------------------------------------------------------


def format_reward(text: str, num_tokens: int, min_tokens: int | None = None, max_tokens: int | None = None) -> float:
    """1 for exactly one <answer>...</answer> with text in it and reasoning before it, else 0.

    With a window, length scales it as in SAYO's released script: 0.6 * n / min_tokens below it, 0.6 * max_tokens / n
    above it.
    """
    block = answer_block(text)
    if block is None or not text[: block[0]].strip():
        return 0.0
    if min_tokens is not None and num_tokens < min_tokens:
        return 0.6 * num_tokens / min_tokens
    if max_tokens is not None and num_tokens > max_tokens:
        return 0.6 * max_tokens / num_tokens
    return 1.0


# --- a group ----------------------------------------------------------------------------------------------------

COMPONENTS = ("attention", "format", "accuracy")


def score_group(model, group: Group, config) -> dict[str, Tensor]:
    """Every reward component of a group's completions.

    Args:
        group: its `statistics` are filled in (log-probs and entropies of the policy that sampled it).
        config: anything with the fields of RewardConfig.

    Returns:
        (G,) float32 tensors on the CPU: "attention" in [-1, 1] (0 when the example has no boxes), "format" and
        "accuracy" in [0, 1], "total" (weighted sum), "tas" over all tokens and "tas_selected" over the uncertain ones
        (both NaN without boxes or without tokens).
    """
    with evaluating(model), torch.no_grad():
        group.statistics = group_statistics(model, group, config)
    return score_statistics(group, config)


def group_statistics(model, group: Group, config) -> TokenStatistics:
    """token_statistics of a group with the settings of a RewardConfig."""
    options = {"temperature": config.temperature, "layers": config.attention_layers, "query": config.attention_query}
    return token_statistics(model, group.prompt, group.completions, **options)


def score_statistics(group: Group, config) -> dict[str, Tensor]:
    """What score_group gives, from a group whose `statistics` are there."""
    statistics = group.statistics
    has_region = bool(group.prompt.coverage.sum() > 0)
    rewards = {name: [] for name in (*COMPONENTS, "tas", "tas_selected")}
    for index, text in enumerate(group.texts):
        # The closing EOS is no part of what was said: it never competes for the top fraction.
        length = max(0, len(group.completions[index]) - (not group.truncated[index]))
        target = statistics.target_attention[index][:length]
        image = statistics.image_attention[index][:length]
        entropy = statistics.entropies[index][:length]
        attention, tas, tas_selected = 0.0, math.nan, math.nan
        if has_region:
            options = {"top_fraction": config.top_fraction, "eps": config.attention_eps}
            attention = attention_reward(target, image, entropy, **options)
            tas = target_attention_score(target, image, config.attention_eps)
            tas_selected = (1 + attention) / 2 if length else math.nan
        shape = format_reward(text, length, config.format_min_tokens, config.format_max_tokens)
        values = (attention, shape, float(is_correct(text, group.example)), tas, tas_selected)
        for name, value in zip(rewards, values, strict=True):
            rewards[name].append(value)
    scores = {name: torch.tensor(values) for name, values in rewards.items()}  # (G,) each
    scores["total"] = sum(getattr(config, f"{name}_weight") * scores[name] for name in COMPONENTS)
    return scores


# --- command line -----------------------------------------------------------------------------------------------


WRITTEN_BY_ROLLOUT = ("id", "prompt_tokens", "texts", "truncated", "completion_ids")


@dataclass
class ScoreConfig(RewardConfig, PolicyConfig):
    """Score the completions that rollout.py wrote; model, data and system prompt must be the same as there."""

    rollouts: str = option("rollouts.jsonl", "What rollout.py wrote.")
    output: str = option("rewards.jsonl", "JSONL file to write: each row of rollouts with its rewards.")

    def problems(self) -> list[str]:
        return super().problems() + writable(self, "output")


def main(config: ScoreConfig) -> None:
    path = Path(config.rollouts)
    if not path.is_file():
        raise ConfigError(f"rollouts={config.rollouts!r}: no such file; make it with python rollout.py --output {path}")
    rows = {}
    for _, row in read_jsonl(path):
        if missing := [name for name in WRITTEN_BY_ROLLOUT if name not in row]:
            raise ConfigError(
                f"rollouts={config.rollouts!r}: a row has no {', '.join(missing)}; give what rollout.py wrote"
            )
        rows[row["id"]] = row
    examples = load_examples(config.data, **config.data_arguments(), require_boxes=False)
    model, processor = load_policy(**config.policy_arguments(lora_rank=0))
    resolve_layers(model, config.attention_layers)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    sums, scored = {}, 0
    with Path(config.output).open("w", encoding="utf-8") as file:
        for example in tqdm(examples, desc="reward", unit="group"):
            row = rows.pop(example["id"], None)
            if row is None:
                continue
            prompt = encode_prompt(processor, example, config.system_prompt)
            if len(prompt.input_ids) != row["prompt_tokens"]:
                raise ConfigError(
                    f"{row['id']}: its prompt has {len(prompt.input_ids)} tokens here, but {row['prompt_tokens']} "
                    f"in {path}: give the same model, max_pixels and system_prompt as to rollout.py"
                )
            completions = [torch.tensor(ids) for ids in row["completion_ids"]]
            group = Group(example, prompt, completions, row["texts"], row["truncated"])
            row["rewards"] = {name: values.tolist() for name, values in score_group(model, group, config).items()}
            for name, values in row["rewards"].items():
                sums.setdefault(name, []).extend(value for value in values if not math.isnan(value))
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            scored += 1
    for name, values in sums.items():
        print(f"{name:>12} {sum(values) / max(1, len(values)):7.4f}")
    print(f"{scored} groups -> {config.output}")
    if rows:
        raise ConfigError(
            f"{len(rows)} groups of {path} are about no example of data={config.data!r}, the first with id "
            f"{next(iter(rows))!r}: give the data and limit that rollout.py had"
        )


if __name__ == "__main__":
    run_command(ScoreConfig, main)
