"""Rewards of a sampled group, each a named component: attention of the uncertain tokens, format, accuracy, ...

From SAYO (arXiv 2602.08241). One forward over the packed group gives, for every generated token, the entropy of the
distribution that it was sampled from and its attention on the image: averaged over the tokens that the boxes cover (a)
and over all image tokens (v). Departures from the released script: padding and EOS never compete for the top 30 %,
the region is a coverage in [0, 1] of each image token instead of a list of cells, and the layer is a setting.

    python reward.py --rollouts rollouts.jsonl --data scenes:heldout --output rewards.jsonl
"""

import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rollout import Group
from sayo.examples.load import load_examples
from sayo.extensions.own_rewards import call_own_reward, own_rewards, parse_weight
from sayo.grader.grader import answer_block, extract_answer, is_correct
from sayo.model.forward import TokenStatistics, check_layers, evaluating, token_statistics
from sayo.model.loading import load_policy
from sayo.model.prompts import Prompt, encode_prompt
from sayo.run.config import LOWEST_TEMPERATURE, PolicyConfig
from sayo.settings import ConfigError, Settings, option, read_jsonl, run_command, writable

__all__ = ["RewardConfig", "attention_reward", "extract_answer", "format_reward", "is_correct", "score_group"]

ATTENTION_OF_NOTHING = -1.0  # the attention reward of an empty completion: its lower bound, so silence never pays


@dataclass
class RewardConfig(Settings):
    """What is rewarded. The paper's main model is attention + format; its "full" one adds accuracy."""

    attention_weight: float = option(1.0, "Weight of the attention reward, tanh(log(a / v)) in (-1, 1).", at_least=0)
    format_weight: float = option(1.0, "Weight of the format reward, 0 to 1.", at_least=0)
    accuracy_weight: float = option(1.0, "Weight of the accuracy reward, 0 or 1 (paper's main model: 0).", at_least=0)
    top_fraction: float = option(0.3, "Share of tokens scored for attention, most uncertain first.", above=0, at_most=1)
    attention_eps: float = option(1e-8, "Epsilon in log((a + eps) / (v + eps)).", at_least=0)
    attention_layers: list[int] = option([-1], "Decoder layers whose attention is averaged; -1 is the last.")
    attention_query: str = option("token", "Query position: the token's or its predictor's.", ("token", "predictor"))
    attention_tokens: str = option("uncertain", "Tokens that are scored; random is a control.", ("uncertain", "random"))
    attention_gate: bool = option(False, "A wrong completion gets the lowest attention reward, -1.")
    attention_normalized: bool = option(False, "Normalize attention rewards of a group to mean 0 and deviation 1.")
    border_mask: bool = option(False, "Exclude image tokens at the picture's edge, where attention sinks are.")
    region_weight: float = option(0.0, "Weight of Remember-R1's region reward, 0 to 1.", at_least=0)
    memory_weight: float = option(0.0, "Weight of Remember-R1's memory reward, 0 to 2.", at_least=0)
    reward_file: list[str] | None = option(None, "Your own rewards: FILE.py or FILE.py:function; see docs/rewards.md.")
    reward_weights: list[str] | None = option(None, "Weights of your own rewards, as name=number; 1 where not given.")
    format_min_tokens: int | None = option(None, "Lower the format reward below this length (paper: 60).", at_least=1)
    format_max_tokens: int | None = option(None, "Lower the format reward above this length (paper: 100).", at_least=1)
    temperature: float = option(1.0, "Temperature of sampling, entropies and log-probs.", at_least=LOWEST_TEMPERATURE)

    def problems(self) -> list[str]:
        found = super().problems()
        if not self.attention_layers:
            found.append("attention_layers=[]: give at least one layer number, -1 for the last")
        for entry in self.reward_weights or ():
            try:
                name, weight = parse_weight(entry)
            except ValueError:
                found.append(f"reward_weights={entry!r}: give name=number, such as brevity=0.5")
                continue
            if name in (*COMPONENTS, *NOT_REWARDED) or not math.isfinite(weight):
                found.append(f"reward_weights={entry!r}: give a finite weight of a reward in reward_file")
        try:
            own_rewards(tuple(self.reward_file or ()))
        except ConfigError as error:
            found.append(str(error))
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


def select_random(completion_ids: Tensor, top_fraction: float = 0.3) -> Tensor:
    """As many random indices as select_uncertain gives, its control: a function of the completion's ids (n,) alone."""
    count = max(1, int(top_fraction * len(completion_ids)))
    drawn = random.Random(str(completion_ids.tolist())).sample(range(len(completion_ids)), count)
    return torch.tensor(sorted(drawn), device=completion_ids.device)  # (k,)


def scored_tokens(completion_ids: Tensor, entropies: Tensor, config) -> Tensor:
    """Indices (k,) of the tokens whose attention a RewardConfig rewards, from a completion's (n,) without EOS."""
    if config.attention_tokens == "random":
        return select_random(completion_ids, config.top_fraction)
    return select_uncertain(entropies, config.top_fraction)


def without_border(prompt: Prompt) -> Prompt:
    """The prompt without the image tokens at its pictures' edges, where attention sinks sit; a region that has no other
    tokens keeps them."""
    inner = ~prompt.border  # (N,)
    if not (prompt.coverage * inner).any():
        return prompt
    return replace(prompt, coverage=prompt.coverage * inner, counted=inner)


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
        found = f"target has {len(target)} tokens, image {len(image)}, entropy {len(entropy)}"
        raise ValueError(f"{found}: give one length")
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


def format_reward(text: str, num_tokens: int, min_tokens: int | None = None, max_tokens: int | None = None) -> float:
    """1 for exactly one <answer>...</answer> behind any thinking, with text in it and reasoning before it, else 0.

    Empty tags, such as <think></think>, are no reasoning.

    With a window, length scales it as in SAYO's released script: 0.6 * n / min_tokens below it, 0.6 * max_tokens / n
    above it.
    """
    block = answer_block(text)
    if block is None or not re.sub(r"</?\w+>", "", text[: block[0]]).strip():
        return 0.0
    if min_tokens is not None and num_tokens < min_tokens:
        return 0.6 * num_tokens / min_tokens
    if max_tokens is not None and num_tokens > max_tokens:
        return 0.6 * max_tokens / num_tokens
    return 1.0


def region_reward(target_mass: Tensor, image_mass: Tensor, eps: float = 1e-8) -> float:
    """Share of the attention on the picture that is in the region, later tokens weighing more, 0 to 1.

    Remember-R1 (arXiv 2608.01314): sum over t of (t / T) * B(t) / (O(t) + eps), divided by the sum of t / T.

    Args:
        target_mass: (T,) B(t), attention of each token on the region, summed over tokens, mean over heads.
        image_mass: (T,) O(t), the same of the whole picture. 0 when T is 0.
    """
    late = torch.arange(1, len(image_mass) + 1, device=image_mass.device) / max(1, len(image_mass))  # (T,)
    share = target_mass / (image_mass + eps)
    return float((late * share).sum() / late.sum()) if len(late) else 0.0


def memory_reward(image_mass: Tensor) -> float:
    """How well the attention on the picture lasts: 1 + its mean at the end - its mean at the start, in (0, 2).

    Remember-R1 (arXiv 2608.01314). Start and end are the first and the last third of the tokens, our choice: at least
    one token each, and 0 for a completion of none, so that silence never pays.

    Args:
        image_mass: (T,) attention of each token on the picture, summed over image tokens, mean over heads.
    """
    third = max(1, len(image_mass) // 3)
    return float(1 + image_mass[-third:].mean() - image_mass[:third].mean()) if len(image_mass) else 0.0


@dataclass
class Completion:
    """What the rewards of one completion look at; n tokens, the closing EOS left out."""

    text: str
    example: dict  # the row that it answers, with all of its columns
    token_ids: Tensor  # (n,)
    truncated: bool  # max_new_tokens came before EOS
    logps: Tensor  # (n,) of the policy that sampled, in nats, as entropies
    entropies: Tensor  # (n,)
    target_attention: Tensor  # (n,) attention on the region: mean over heads, layers and covered image tokens
    image_attention: Tensor  # (n,) the same over all image tokens
    chosen: Tensor  # (k,) the tokens whose attention is rewarded
    num_target: float  # image tokens that the region covers, by coverage; 0 without a region
    num_image: int
    is_right: bool
    config: object  # with the fields of RewardConfig

    def attention(self) -> float:
        """attention_reward of the chosen tokens, before the gate."""
        target, image = self.target_attention[self.chosen], self.image_attention[self.chosen]
        return attention_reward(target, image, image, top_fraction=1.0, eps=self.config.attention_eps)


def _attention(completion: Completion) -> float:
    if completion.num_target == 0:
        return 0.0
    gated = completion.config.attention_gate and not completion.is_right
    return ATTENTION_OF_NOTHING if gated else completion.attention()


def _format(completion: Completion) -> float:
    window = completion.config.format_min_tokens, completion.config.format_max_tokens
    return format_reward(completion.text, len(completion.token_ids), *window)


def _region(completion: Completion) -> float:
    if completion.num_target == 0:
        return 0.0
    target_mass = completion.target_attention * completion.num_target
    return region_reward(
        target_mass, completion.image_attention * completion.num_image, completion.config.attention_eps
    )


# A component is a function here and a weight in RewardConfig. Metrics, plots and tables follow from the two.
COMPONENTS = {
    "attention": _attention,
    "format": _format,
    "accuracy": lambda completion: float(completion.is_right),
    "region": _region,
    "memory": lambda completion: memory_reward(completion.image_attention * completion.num_image),
}
NOT_REWARDED = ("tas", "tas_selected", "total")  # what score_group gives beside the components


def rewards_of(completion: Completion) -> dict[str, float]:
    """Every component of a completion: sayo's, then those of reward_file.

    Raises ConfigError with file, function and example where one of the latter fails or returns no number.
    """
    row = {name: reward(completion) for name, reward in COMPONENTS.items()}
    for place, function in own_rewards(tuple(completion.config.reward_file or ())).items():
        row |= call_own_reward(place, function, completion, taken=(*row, *NOT_REWARDED))
    return row


def reward_weights(config, names: Iterable[str] = ()) -> dict[str, float]:
    """The weight of every component, from anything with the fields of RewardConfig; of the user's own among `names`.

    Raises ConfigError for a weight of a name that is not among `names`, where these are given.
    """
    given = dict(parse_weight(entry) for entry in config.reward_weights or ())
    own = {name: given.get(name, 1.0) for name in names if name not in (*COMPONENTS, *NOT_REWARDED)}
    if names and (unknown := given.keys() - own.keys()):
        there = ", ".join(own) or "none"
        raise ConfigError(
            f"reward_weights: no reward is called {', '.join(sorted(unknown))}; reward_file gives {there}"
        )
    return {name: getattr(config, f"{name}_weight") for name in COMPONENTS} | own


def score_group(model, group: Group, config) -> dict[str, Tensor]:
    """Every reward component of a group's completions.

    Args:
        group: its `statistics` are filled in (log-probs and entropies of the policy that sampled it).
        config: anything with the fields of RewardConfig.

    Returns:
        (G,) float32 tensors on the CPU: "attention" in [-1, 1] (0 when the example has no boxes; after
        attention_gate, and of any size after attention_normalized), "format", "accuracy" and "region" in [0, 1],
        "memory" in [0, 2], "tas" over all tokens and "tas_selected" over the rewarded ones (both NaN without boxes or
        without tokens), "total" (weighted sum).
    """
    with evaluating(model), torch.no_grad():
        group.statistics = group_statistics(model, group, config)
    return score_statistics(group, config)


def group_statistics(model, group: Group, config, map_layer: int | None = None) -> TokenStatistics:
    """token_statistics of a group with the settings of a RewardConfig."""
    options = {"temperature": config.temperature, "layers": config.attention_layers, "query": config.attention_query}
    return token_statistics(model, scored_prompt(group, config), group.completions, map_layer=map_layer, **options)


def scored_prompt(group: Group, config) -> Prompt:
    """The group's prompt with the region and the picture that attention is rewarded on."""
    return without_border(group.prompt) if config.border_mask else group.prompt


def score_statistics(group: Group, config) -> dict[str, Tensor]:
    """What score_group gives, from a group whose `statistics` are there."""
    statistics, prompt = group.statistics, scored_prompt(group, config)
    num_target = float(prompt.coverage.sum())
    num_image = len(prompt.coverage) if prompt.counted is None else int(prompt.counted.sum())
    # No more than these fields: a reward that needed one of training alone would break this file's own command.
    rewarded = RewardConfig(**{entry.name: getattr(config, entry.name) for entry in fields(RewardConfig)})
    rows = []
    for index, (text, length) in enumerate(zip(group.texts, group.lengths, strict=True)):
        target, image = (part[index][:length] for part in (statistics.target_attention, statistics.image_attention))
        chosen = torch.zeros(0, dtype=torch.long)
        if length:
            chosen = scored_tokens(group.completions[index][:length], statistics.entropies[index][:length], config)
        is_right = is_correct(text, group.example)
        tokens = (part[index][:length] for part in (statistics.logps, statistics.entropies))
        parts = *tokens, target, image, chosen.to(target.device), num_target, num_image, is_right, rewarded
        sampled = group.completions[index][:length], group.truncated[index]
        completion = Completion(text, group.example, *sampled, *parts)
        row = rewards_of(completion)
        has_tas = num_target > 0 and length > 0
        row["tas"] = target_attention_score(target, image, config.attention_eps) if has_tas else math.nan
        row["tas_selected"] = (1 + completion.attention()) / 2 if has_tas else math.nan
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    if missing := {name for row in rows for name in names if name not in row}:
        listed = ", ".join(sorted(missing))
        raise ConfigError(
            f"reward_file: {listed} for some completions of {group.example.get('id')!r} only; give it for all"
        )
    scores = {name: torch.tensor([row[name] for row in rows]) for name in names}  # (G,)
    if config.attention_normalized and len(rows) > 1:
        scores["attention"] = normalized(scores["attention"])
    scores["total"] = sum(weight * scores[name] for name, weight in reward_weights(config, scores).items())
    return scores


def normalized(rewards: Tensor) -> Tensor:
    """(G,) rewards of a group with mean 0 and deviation 1; all 0 where they are equal."""
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std() + 1e-4)


# --- command line -----------------------------------------------------------------------------------------------

WRITTEN_BY_ROLLOUT = ("id", "prompt_tokens", "texts", "truncated", "completion_ids")


@dataclass
class ScoreConfig(RewardConfig, PolicyConfig):
    """Score the completions that rollout.py wrote; model, data and system prompt must be the same as there."""

    rollouts: str = option("rollouts.jsonl", "JSONL file written by rollout.py.")
    output: str = option("rewards.jsonl", "JSONL file to write: each row of rollouts with its rewards.")

    def problems(self) -> list[str]:
        found = super().problems() + writable(self, "output")
        if Path(self.output).resolve() == Path(self.rollouts).resolve():
            found.append(f"output={self.output!r} is what is read: give another name, the rows would be lost")
        return found


def main(config: ScoreConfig) -> None:
    path = Path(config.rollouts)
    if not path.is_file():
        raise ConfigError(f"rollouts={config.rollouts!r}: no such file; make it with python rollout.py --output {path}")
    rows = {}
    for _, row in read_jsonl(path):
        if missing := [name for name in WRITTEN_BY_ROLLOUT if name not in row]:
            lacks = f"a row has no {', '.join(missing)}"
            raise ConfigError(f"rollouts={config.rollouts!r}: {lacks}; give what rollout.py wrote")
        rows[row["id"]] = row
    examples = load_examples(config.data, **config.data_arguments(), require_boxes=False)
    model, processor = load_policy(**config.policy_arguments(lora_rank=0))
    check_layers(model, config.attention_layers)
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    scored: list[dict] = []  # the rewards of each group
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
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            scored.append(row["rewards"])
    for name in scored[0] if scored else ():
        known = [value for rewards in scored for value in rewards[name] if not math.isnan(value)]
        print(f"{name:>12} {sum(known) / max(1, len(known)):7.4f}")
    print(f"{len(scored)} groups -> {config.output}")
    if rows:
        first = f"the first with id {next(iter(rows))!r}: give the data and limit that rollout.py had"
        raise ConfigError(f"{len(rows)} groups of {path} are about no example of data={config.data!r}, {first}")


if __name__ == "__main__":
    run_command(ScoreConfig, main)
