"""GRPO with attention rewards (SAYO, arXiv 2602.08241): rollout, reference, score, advantage, loss, step.

    python train_rl.py                                                # the embedded policy and scenes, on any machine
    python train_rl.py --config configs/rtx-24gb.yaml --model Qwen/Qwen3-VL-4B-Instruct --data mine.jsonl
    accelerate launch --num_processes 2 train_rl.py ...               # two GPUs share the groups of a step
    accelerate launch --config_file configs/accelerate_fsdp.yaml train_rl.py ...   # and the weights of the model

Departures from the paper's released script: a group is one packed sequence in every stage, one optimizer step sees
several groups, and every setting is a field of Config. docs/rewards.md says why the defaults differ from the paper's.
"""

import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib.util import find_spec

import torch
from accelerate.utils import set_seed
from torch import Tensor

from evaluate import BeforeAfter, load_held_out
from reward import COMPONENTS, RewardConfig, group_statistics, reward_weights, score_group, score_statistics
from rollout import Group, group_generator, sample_groups
from sayo.examples.load import load_examples
from sayo.examples.regions import BOX_FORMATS
from sayo.examples.rows import parse_fields
from sayo.extensions.attention_regions import RegionsConfig, attention_regions
from sayo.extensions.ease import ease_layer, ease_loss, target_map
from sayo.memory_plan.rehearsal import rehearse
from sayo.model.forward import compute_dtype, evaluating
from sayo.model.loading import fill_in_lora, lora_problems
from sayo.model.prompts import check_prompts
from sayo.run.config import PolicyConfig, SamplingConfig
from sayo.run.files import load_state
from sayo.run.folder import open_run
from sayo.run.metrics import StepLog, not_finite
from sayo.run.processes import average_gradients, load_for_training, make_accelerator, sync_forwards
from sayo.run.provenance import as_meant
from sayo.run.stopping import Stopped, StopSignals
from sayo.settings import option, run_command
from vlm import group_logprobs

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")
CLIPS = {"token": (0.2, 0.2), "sequence": (3e-4, 4e-4), "cispo": (1.0, 5.0)}  # defaults of clip_low and clip_high
UNREAD = {"sapo": ("clip_low", "clip_high", "clip_dual"), "cispo": ("clip_low", "clip_dual")}  # settings, by loss_type
SAPO_TEMPERATURES = (1.0, 1.05)  # of positive and of other advantages (SAPO, arXiv 2511.20347)
SCALES, BASELINES, LEVELS = ("group", "batch", "none"), ("mean", "leave_one_out"), ("token", "sequence")
OPTIMIZERS = ("adamw", "paged_adamw_8bit")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
LARGEST_BETA = 10.0  # of AdaptiveBeta: above it the KL term drowns every reward
LARGEST_EXPONENT = 20.0  # e^20 is 5e8: far above any ratio that training can use, far below the end of float32


@dataclass
class Config(RegionsConfig, RewardConfig, SamplingConfig, PolicyConfig):
    """Train a multimodal LLM with GRPO, an attention reward, a format reward and an accuracy reward."""

    regions: str = option("boxes", "Regions: the data's, or from the base model's attention.", ("boxes", "attention"))
    output_dir: str = option("runs/sayo", "Folder of the run: config, metrics, samples, checkpoints, adapter, curves.")
    max_steps: int = option(100, "Training steps, each over groups_per_step groups.", at_least=1)
    groups_per_step: int = option(8, "Prompts per step, over all processes; their gradients add up.", at_least=1)
    dynamic_sampling: int = option(1, "Prompts tried, at most, for a group whose rewards are all equal.", at_least=1)
    dynamic_sampling_reward: str = option("total", "The reward that must differ in a group.", (*COMPONENTS, "total"))
    num_iterations: int = option(1, "Updates per batch of completions; clipping matters only above 1.", at_least=1)
    loss_type: str = option("grpo", "How token losses are averaged (and, in cispo and sapo, bounded).", LOSS_TYPES)
    advantage_scale: str = option("group", "Divide advantages by the deviation of these rewards.", SCALES)
    advantage_baseline: str = option("mean", "Subtract the group's mean, or that of the others (RLOO).", BASELINES)
    importance_sampling_level: str = option("token", "Probability ratio of a token, or of a completion (GSPO).", LEVELS)
    clip_low: float | None = option(None, "A ratio below 1 - clip_low is clipped; none: 0.2, 3e-4 in GSPO.", at_least=0)
    clip_high: float | None = option(None, "A ratio above 1 + clip_high is; none: 0.2, GSPO 4e-4, CISPO 5.", at_least=0)
    clip_dual: float | None = option(None, "Bound the ratio of negative advantages, too (TRL's delta).", above=1)
    top_entropy_quantile: float = option(1.0, "Policy gradient on this share of tokens only.", above=0, at_most=1)
    mask_truncated: bool = option(False, "Leave truncated completions out of the loss; they still count as rewards.")
    beta: float = option(1e-3, "Weight of the KL term (k3 estimator) to the base model; 0 disables it.", at_least=0)
    kl_target: float | None = option(None, "Double beta far above this KL (nats per token), halve it below.", above=0)
    ease_weight: float = option(0.0, "Weight of EASE's attention loss on right answers (its paper: 1e-3).", at_least=0)
    optimizer: str = option("adamw", "AdamW of torch, or of bitsandbytes with 8-bit paged state.", OPTIMIZERS)
    learning_rate: float = option(2e-4, "AdamW's peak learning rate; large models want less (paper: 5e-6).", above=0)
    lr_scheduler: str = option("constant_with_warmup", "Learning-rate schedule, as in transformers.", SCHEDULERS)
    warmup_steps: int = option(5, "Steps over which the learning rate rises from 0.", at_least=0)
    weight_decay: float = option(0.01, "AdamW's weight decay.", at_least=0)
    max_grad_norm: float = option(0.8, "Clip gradients to this norm.", above=0)
    max_skipped_steps: int = option(10, "Stop after this many consecutive steps with non-finite gradients.", at_least=1)
    lora_rank: int | None = option(None, "Rank of LoRA, by default 16 or that of --adapter.", at_least=1)
    lora_alpha: int | None = option(None, "LoRA's alpha, by default 32 or that of --adapter.", at_least=0)
    lora_targets: str | None = option(
        None, "Linear layers that LoRA adapts, by default language or those of --adapter.", ("language", "all-linear")
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in backward: slower, much less memory.")
    save_steps: int = option(50, "Steps between checkpoints.", at_least=1)
    save_total_limit: int | None = option(None, "Keep only the newest N checkpoints; none keeps all.", at_least=1)
    resume: bool = option(False, "Resume from output_dir's newest whole checkpoint; without a run there, start one.")
    eval_data: str | None = option(None, "Data to evaluate before and after, or none; scenes:heldout for scenes.")
    eval_split: str = option("test", "Split of eval_data.")
    eval_box_format: str = option("same", "Box format of eval_data; same: box_format.", ("same", *BOX_FORMATS))
    eval_fields: list[str] | None = option(
        None, "Columns of eval_data, by default as in fields; the word none: sayo's own."
    )
    eval_limit: int | None = option(512, "Evaluate on the first N examples of eval_data.", at_least=1)
    report_to: str = option("tensorboard", "Where to log: an Accelerate tracker.", ("tensorboard", "wandb", "none"))
    plan: bool = option(False, "Print how much memory the run will take, by stage, and stop before weights are loaded.")
    memory_gb: float | None = option(None, "Plan for a GPU of this many GB (10^9 bytes), not this machine.", above=0)
    try_biggest: bool = option(True, "Rehearse the data's largest step first: a lack of memory shows at once.")

    def __post_init__(self):
        clips = CLIPS.get("cispo" if self.loss_type == "cispo" else self.importance_sampling_level, CLIPS["token"])
        for name, value in zip(("clip_low", "clip_high"), clips, strict=True):
            if getattr(self, name) is None:
                setattr(self, name, value)
        fill_in_lora(self)

    @classmethod
    def from_file(cls, path, values: dict) -> dict:
        return as_meant(path, values)

    def problems(self) -> list[str]:
        found = super().problems() + lora_problems(self)
        if self.num_generations < 2:
            found.append(f"num_generations={self.num_generations}: give 2 or more; advantages compare completions")
        if self.report_to in ("tensorboard", "wandb") and find_spec(self.report_to) is None:
            found.append(f"report_to={self.report_to!r} is not installed: pip install {self.report_to}, or give none")
        if not any(getattr(self, f"{name}_weight") for name in COMPONENTS) and not self.reward_file:
            found.append(f"{', '.join(f'{name}_weight' for name in COMPONENTS)} are all 0: nothing would be rewarded")
        if self.kl_target and not self.beta:
            found.append(f"kl_target={self.kl_target} with beta=0.0: give a beta above 0, where it starts (1e-3)")
        if self.dynamic_sampling > 1 and self.regions == "attention":
            fix = "give 1; other prompts have no region yet"
            found.append(f"dynamic_sampling={self.dynamic_sampling} with regions='attention': {fix}")
        if self.ease_weight and self.num_iterations > 1:
            fix = "give 1; the loss is taken on the policy that sampled"
            found.append(f"ease_weight={self.ease_weight} with num_iterations={self.num_iterations}: {fix}")
        return found + [f"eval_fields: {problem}" for problem in parse_fields(self.evaluated_fields)[1]]

    @property
    def evaluated_fields(self) -> list[str]:
        """The columns of eval_data."""
        own = self.fields if self.eval_fields is None else self.eval_fields
        return [] if own == ["none"] else own or []

    @property
    def needs_boxes(self) -> bool:
        """Whether an example without boxes cannot be trained on."""
        return self.regions == "boxes" and any((self.attention_weight, self.region_weight, self.ease_weight))

    @property
    def evaluated_data(self) -> str:
        """What is evaluated before and after training, "none" for nothing."""
        return self.eval_data or ("scenes:heldout" if self.data == "scenes" else "none")

    def loss_arguments(self) -> dict:
        """Keyword arguments for grpo_loss."""
        names = ("clip_low", "clip_high", "clip_dual", "loss_type", "max_new_tokens", "importance_sampling_level")
        return {name: getattr(self, name) for name in names}

    def notes(self) -> list[str]:
        """What settings mean together, where that may surprise."""
        found, temperature = [], self.sampling_temperature
        if temperature not in (None, self.temperature):
            taken = f"log-probs of the ratio are taken at temperature={self.temperature}"
            found.append(f"sampling_temperature={temperature}: {taken}; the update is off-policy by the difference")
        usual = Config(loss_type=self.loss_type, importance_sampling_level=self.importance_sampling_level)
        if given := [name for name in UNREAD.get(self.loss_type, ()) if getattr(self, name) != getattr(usual, name)]:
            found.append(f"{', '.join(given)}: loss_type={self.loss_type} does not read it")
        moved = ["importance_sampling_level"] * (self.importance_sampling_level != "token")
        moved += ["clip_dual"] * (self.clip_dual is not None) + ["loss_type"] * (self.loss_type in ("cispo", "sapo"))
        if moved and self.num_iterations == 1:
            same = {"cispo": "dapo", "sapo": "grpo"}.get(self.loss_type, self.loss_type)
            values = ", ".join(f"{name}={getattr(self, name)}" for name in moved)
            ratio = "with num_iterations=1 every ratio is 1, and the gradient is that of"
            found.append(f"{values}: {ratio} loss_type={same} alone")
        return found


# --- advantages and loss -----------------------------------------------------------------------------------------


def group_advantages(
    rewards: Tensor, scale: str = "group", baseline: str = "mean", batch_std: Tensor | None = None
) -> Tensor:
    """How much better than its group each completion is: (r - mean) / (std + 1e-4), or r - mean for scale "none".

    Example: rewards (1, 0, 0, 1) give about (0.87, -0.87, -0.87, 0.87).

    Args:
        rewards: (G,) of one group, G of at least 2.
        scale: "group"; "batch" divides by `batch_std`, that of all rewards of the step; "none".
        baseline: "mean" of the group, or "leave_one_out", of the other completions (RLOO, arXiv 2402.14740).

    Raises:
        ValueError: G below 2, another scale or baseline, or "batch" without batch_std.
    """
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)} has nothing to compare: num_generations must be 2 or more")
    if scale not in SCALES or (scale == "batch" and batch_std is None):
        raise ValueError(f'scale={scale!r}: valid are "group", "none", and "batch" with batch_std')
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}: valid are {', '.join(map(repr, BASELINES))}")
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)  # exactly: rounding in the mean, divided by 1e-4, would become a gradient
    centered = rewards - rewards.mean()  # (G,)
    if baseline == "leave_one_out":
        centered = centered * (len(rewards) / (len(rewards) - 1))
    return centered if scale == "none" else centered / ((rewards.std() if scale == "group" else batch_std) + 1e-4)


def grpo_loss(
    logps: Sequence[Tensor],
    old_logps: Sequence[Tensor],
    ref_logps: Sequence[Tensor] | None,
    advantages: Tensor | Sequence[Tensor],
    *,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
    max_new_tokens: int | None = None,
    num_items: float | None = None,
    importance_sampling_level: str = "token",
    clip_dual: float | None = None,
    policy_tokens: Tensor | None = None,
    kept: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """GRPO loss of one group: PPO clipping of the ratio to the sampling policy, plus beta times the k3 KL to the base.

    Args:
        logps: G tensors (n_i,), differentiable. old_logps: of the policy that sampled. ref_logps: of the base;
            None when beta is 0.
        advantages: (G,), or G tensors (n_i,) where tokens differ.
        loss_type: how the token losses are weighted, with TRL's meaning: "grpo" 1 / (G n_i), the mean of each
            completion's mean; "bnpo" 1 / Σn, all tokens of the group alike; "dr_grpo" 1 / (G max_new_tokens), no
            length bias; "dapo" 1 / num_items, all tokens of the step alike. "cispo" (arXiv 2506.13585) weighs as
            dapo, and bounds the ratio's weight at clip_high instead of dropping gradients; "sapo" (arXiv 2511.20347)
            weighs as grpo, with a sigmoid of the ratio in place of the clip.
        max_new_tokens: for "dr_grpo"; by default the longest completion.
        num_items: for "dapo"; by default Σn.
        importance_sampling_level: "sequence" takes the geometric mean of a completion's ratios (GSPO, 2507.18071).
        clip_dual: bound of the ratio from above, which clipping leaves open for negative advantages (1912.09729).
        policy_tokens: (T,) boolean, tokens with a policy gradient; the KL term is taken on all.
        kept: (G,) boolean, completions that have a loss.

    Returns:
        (scalar loss, {"kl", "clip_fraction"}), the statistics as means over tokens; a KL that is not taken is NaN.

    Raises:
        ValueError: another loss_type or level, or beta without ref_logps.
    """
    if beta and ref_logps is None:
        raise ValueError(f"beta={beta} needs ref_logps, the log-probs of the base model; or give beta=0")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: valid are {', '.join(map(repr, LOSS_TYPES))}")
    if importance_sampling_level not in LEVELS:
        raise ValueError(f"importance_sampling_level={importance_sampling_level!r}: valid are 'token' and 'sequence'")
    lengths = torch.tensor([len(logp) for logp in logps], device=logps[0].device)  # (G,)
    new, old = torch.cat(list(logps)), torch.cat(list(old_logps))  # (T,), T = Σ n_i
    if isinstance(advantages, Tensor):
        advantage = advantages.to(new).repeat_interleave(lengths)  # (T,)
    else:
        advantage = torch.cat(list(advantages)).to(new)
    log_ratio = new - old
    if importance_sampling_level == "sequence":
        means = torch.stack([part.sum() / max(1, len(part)) for part in log_ratio.split(lengths.tolist())])  # (G,)
        log_ratio = means.repeat_interleave(lengths)
    ratio = finite_exp(log_ratio)
    if loss_type == "cispo":
        token_loss = -ratio.clamp(max=clip_high).detach() * advantage * new  # (T,)
        is_clipped = (ratio > clip_high) & (advantage > 0)
    elif loss_type == "sapo":
        steepness = torch.where(advantage > 0, *SAPO_TEMPERATURES)
        token_loss = -torch.sigmoid(steepness * (ratio - 1)) * 4 / steepness * advantage
        is_clipped = torch.zeros_like(ratio)
    else:
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        bounded = ratio if clip_dual is None else ratio.clamp(max=clip_dual)
        token_loss = -torch.minimum(bounded * advantage, clipped * advantage)
        is_clipped = ratio * advantage > clipped * advantage
    if policy_tokens is not None:
        token_loss = token_loss * policy_tokens
    kl = None
    if beta:
        difference = torch.cat(list(ref_logps)) - new
        kl = finite_exp(difference) - difference - 1  # (T,)
        token_loss = token_loss + beta * kl
    is_kept = torch.ones_like(new) if kept is None else kept.to(new).repeat_interleave(lengths)  # (T,)
    if loss_type in ("grpo", "sapo"):
        weight = is_kept / (len(logps) * lengths.clamp(min=1).to(new)).repeat_interleave(lengths)  # (T,)
    elif loss_type == "bnpo":
        weight = is_kept / is_kept.sum().clamp(min=1)
    elif loss_type == "dr_grpo":
        weight = is_kept / (len(logps) * (max_new_tokens or max(1, int(lengths.max()))))
    else:
        weight = is_kept / (num_items or is_kept.sum().clamp(min=1))
    count = max(1, len(new))
    stats = {"kl": math.nan if kl is None else kl.detach().sum().item() / count}
    stats["clip_fraction"] = is_clipped.float().sum().item() / count
    return (token_loss * weight).sum(), stats


def top_entropy_tokens(entropies: Sequence[Tensor], quantile: float) -> Tensor:
    """(T,) boolean: the tokens of a group whose entropy is in its top `quantile` (arXiv 2506.01939: 0.2)."""
    together = torch.cat(list(entropies)).float()
    return together >= together.quantile(1 - quantile) if len(together) else together.bool()


def finite_exp(exponent: Tensor) -> Tensor:
    """exp, exactly, up to LARGEST_EXPONENT; from there on its tangent, so that values and gradients stay finite.

    A token that one of two policies rules out (log-prob -100 against -1) would make the whole step infinite.
    """
    bounded = exponent.clamp(max=LARGEST_EXPONENT)
    return bounded.exp() * (1 + (exponent - bounded))


# --- one step ---------------------------------------------------------------------------------------------------


def train_step(model, processor, state, examples, step: int, config: Config, accelerator) -> tuple[dict, dict]:
    """One step: this process's share of the groups through all stages, then one update per iteration.

    Args:
        state: a TrainState; its backward and update change the weights. examples: of the whole data set.

    Returns:
        (metrics of the step over all processes, a sample of this process for samples.jsonl).
    """
    log = StepLog(accelerator, partial(reward_weights, config))
    batch, generators = share_of_step(examples, step, config, accelerator)
    with log.stage("rollout"):
        groups = sample_groups(model, processor, batch, generators=generators, **config.sampling_arguments())
        more = replace_equal_groups(groups, model, processor, examples, step, config, accelerator)
        sync_forwards(model)
    references: list = [None] * len(groups)
    if state.beta.value:
        with log.stage("reference"), torch.no_grad(), evaluating(model), model.disable_adapter():
            references = [logprobs(model, group, config) for group in groups]
    tokens_per_group = tokens_of_step(groups, config, accelerator) / config.groups_per_step
    # Gradients are the mean over groups, for all loss types alike.
    options = config.loss_arguments() | {"beta": state.beta.value, "num_items": tokens_per_group}
    map_layer = ease_layer(model) if config.ease_weight else None
    scores, advantages, batch_std = [], [], None
    if config.advantage_scale == "batch":
        with log.stage("score"):
            rewards = [score_group(model, replace(group), config)["total"] for group in groups]
            batch_std = accelerator.gather(torch.cat(rewards).to(accelerator.device)).std().cpu()

    for iteration in range(config.num_iterations):
        for number, reference in enumerate(references):
            with log.stage("score"):
                if iteration == 0:  # still the policy that sampled: one forward gives the rewards and the loss
                    statistics = group_statistics(model, groups[number], config, map_layer)
                    groups[number] = replace(groups[number], statistics=statistics.detached())
                    scores.append(score_statistics(groups[number], config))
                    scaling = config.advantage_scale, config.advantage_baseline, batch_std
                    advantages.append(group_advantages(scores[number]["total"], *scaling))
                logps = logprobs(model, groups[number], config) if iteration else statistics.logps
            group, advantage, score = groups[number], advantages[number], scores[number]
            with log.stage("update"):
                tokens = tokens_of_loss(group, config)
                loss, stats = grpo_loss(logps, group.statistics.logps, reference, advantage, **options, **tokens)
                if config.ease_weight:
                    ease = ease_loss(statistics.maps, target_map(processor, group.example), score["accuracy"])
                    loss, stats = loss + config.ease_weight * ease, stats | {"ease": ease.item()}
                fault = state.backward(loss / len(groups), not_finite(reward=score["total"], loss=loss))
                log.add(group, score, advantage, stats | {"loss": loss.item()}, fault)
        with log.stage("update"):
            log.updated(state.update(accelerator))
    return log.result(**more)


def share_of_step(examples, step: int, config: Config, accelerator) -> tuple[list[dict], list[torch.Generator]]:
    """This process's examples of a step, and a generator for each: functions of (seed, step, number of the group)."""
    groups_here = config.groups_per_step // accelerator.num_processes
    numbers = range(accelerator.process_index * groups_here, (accelerator.process_index + 1) * groups_here)
    positions = [step * config.groups_per_step + number for number in numbers]
    batch = [examples[example_index(config.seed, position, len(examples))] for position in positions]
    return batch, [group_generator(config.seed, step, number) for number in numbers]


def replace_equal_groups(
    groups: list[Group], model, processor, examples, step: int, config: Config, accelerator
) -> dict:
    """DAPO's dynamic sampling (arXiv 2503.14476): groups of equal rewards give way to those of other prompts.

    Each is tried config.dynamic_sampling - 1 times; prompts and draws depend on (seed, step, number, try) alone.
    Returns {"resampled_groups": groups sampled in addition, of all processes, for each group of the step}.
    """
    if config.dynamic_sampling == 1:
        return {}
    waiting, count, first = list(range(len(groups))), 0, accelerator.process_index * len(groups)
    for number_of_try in range(1, config.dynamic_sampling):
        rewards = [score_group(model, replace(groups[number]), config) for number in waiting]
        pairs = zip(waiting, (scores[config.dynamic_sampling_reward] for scores in rewards), strict=True)
        waiting = [number for number, values in pairs if values.max() == values.min()]
        keys = [(config.seed, step, first + number, number_of_try) for number in waiting]
        batch = [examples[random.Random("/".join(map(str, key))).randrange(len(examples))] for key in keys]
        generators = [group_generator(*key) for key in keys]
        sampled = sample_groups(model, processor, batch, generators=generators, **config.sampling_arguments())
        for number, group in zip(waiting, sampled, strict=True):
            groups[number] = group
        count += len(waiting)
    sync_forwards(model)  # other ranks may still sample
    total = accelerator.reduce(torch.tensor(float(count), device=accelerator.device), "sum").item()
    return {"resampled_groups": total / config.groups_per_step}


def logprobs(model, group: Group, config: Config) -> list[Tensor]:
    """G tensors (n_i,) under the model as it is now."""
    return group_logprobs(model, group.prompt, group.completions, temperature=config.temperature)


def tokens_of_step(groups: Sequence[Group], config: Config, accelerator) -> float:
    """Completion tokens that have a loss, of all groups of all processes."""
    pairs = [pair for group in groups for pair in zip(group.completions, group.truncated, strict=True)]
    here = sum(len(completion) for completion, cut in pairs if not (cut and config.mask_truncated))
    return accelerator.reduce(torch.tensor(float(here), device=accelerator.device), "sum").item()


def tokens_of_loss(group: Group, config: Config) -> dict:
    """Keyword arguments for grpo_loss: the tokens with a policy gradient, and the completions with a loss."""
    found = {"kept": ~torch.tensor(group.truncated)} if config.mask_truncated else {}
    if config.top_entropy_quantile < 1:
        found["policy_tokens"] = top_entropy_tokens(group.statistics.entropies, config.top_entropy_quantile)
    return found


class TrainState:
    """All that a step changes beside the weights. It is saved with them, so that a resumed run is the same run."""

    def __init__(self, model, config: Config):
        from transformers import get_scheduler  # imports peft and bitsandbytes: not when a script is imported

        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
        self.optimizer = make_optimizer(config.optimizer, self.parameters, **settings)
        self.scheduler = get_scheduler(config.lr_scheduler, self.optimizer, config.warmup_steps, config.max_steps)
        device = self.parameters[0].device.type
        self.scaler = torch.amp.GradScaler(device, enabled=compute_dtype(model) == torch.float16)
        self.beta = AdaptiveBeta(config.beta, config.kl_target)
        self.config, self.step, self.skipped_in_a_row = config, 0, 0

    def parts(self) -> dict:
        """What a checkpoint holds beside the adapter and two counts, each with a state_dict."""
        return {name: getattr(self, name) for name in ("optimizer", "scheduler", "scaler", "beta")}

    def load(self, checkpoint) -> None:
        """Continue from a checkpoint's state; None starts at step 0."""
        if checkpoint:
            self.step, self.skipped_in_a_row = load_state(checkpoint, self.parts())

    def backward(self, loss: Tensor, fault: str | None = None) -> str | None:
        """Add a loss's gradients, and say what is not finite: the `fault` that was found before, "gradient", or None.

        A fault makes the gradients NaN, too, so that all processes skip the update.
        """
        self.scaler.scale(loss * math.nan if fault else loss).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        return fault or not_finite(gradient=norm)

    def update(self, accelerator) -> float:
        """Average gradients over processes, clip, step. Returns their norm; one that is not finite skips the step."""
        average_gradients(self.parameters, accelerator)
        self.scaler.unscale_(self.optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).item()
        if math.isfinite(grad_norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return grad_norm

    def advance(self, metrics: dict) -> dict:
        """End a step: schedule, adaptive beta, count of skipped steps. Returns the metrics with what the step used."""
        used = {"step": self.step + 1, "learning_rate": self.scheduler.get_last_lr()[0], "beta": self.beta.value}
        scale = {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}
        is_skipped = metrics["skipped_updates"] == self.config.num_iterations
        self.step, self.skipped_in_a_row = self.step + 1, self.skipped_in_a_row + 1 if is_skipped else 0
        if not is_skipped:
            self.scheduler.step()
            self.beta.step(metrics["kl"])
        return used | metrics | scale


class AdaptiveBeta:
    """A beta that follows a KL target: PPO's adaptive penalty (arXiv 1707.06347). Without a target it stays."""

    def __init__(self, beta: float, kl_target: float | None = None):
        self.value, self.smallest, self.kl_target = beta, beta, kl_target

    def step(self, kl: float | None) -> None:
        """Double above 1.5 targets, halve below 2/3 of one, never below the start. kl: nats per token, or None."""
        if self.kl_target is None or kl is None:
            return
        if kl > 1.5 * self.kl_target:
            self.value = min(2 * self.value, LARGEST_BETA)
        elif kl < self.kl_target / 1.5:
            self.value = max(self.value / 2, self.smallest)

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


def make_optimizer(name: str, parameters: Sequence[Tensor], **settings) -> torch.optim.Optimizer:
    """AdamW of torch, or of bitsandbytes with its state in 8 bits (32 for tensors below 4,096 elements), which the GPU
    driver pages out when the card is full; on a CPU, and in a resumed run, it is not paged."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes  # prints about its optional kernels: not when a script is imported

    return bitsandbytes.optim.PagedAdamW8bit(parameters, **settings)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> list[int]:
    return random.Random(f"{seed}/epoch/{epoch}").sample(range(num_examples), num_examples)


def example_index(seed: int, position: int, num_examples: int) -> int:
    """Which example stands at a position of the endless stream of shuffled epochs."""
    epoch, place = divmod(position, num_examples)
    return _epoch_order(seed, epoch, num_examples)[place]


# --- the loop ---------------------------------------------------------------------------------------------------


def train(config: Config, accelerator, run) -> None:
    """A run from load to evaluation, or what a former start of it left to do."""
    set_seed(config.seed)
    examples = load_examples(config.data, **config.data_arguments(), require_boxes=config.needs_boxes)
    held_out = load_held_out(config)
    model, processor = load_for_training(config, accelerator, run.checkpoint)
    for data in filter(None, (examples, held_out)):
        check_prompts(model, processor, data, config, config.max_new_tokens)
    run.check_inputs(examples, held_out, model)
    if config.regions == "attention":  # held-out data keeps its own: TAS is measured against those
        positions = range(config.max_steps * config.groups_per_step)
        used = {example_index(config.seed, position, len(examples)) for position in positions}
        examples = attention_regions(model, processor, examples, used, config)
    state = TrainState(model, config)
    state.load(run.checkpoint)
    evaluation = BeforeAfter(run, model, processor, held_out, config, accelerator)
    run.begin(state, examples, [*evaluation.notes, *config.notes()])
    run.check_same_weights(model)
    if config.try_biggest and state.step < config.max_steps:
        rehearse(train_step, state, model, processor, examples, config, accelerator)
    evaluation.before()

    with suppress(Stopped):  # by a signal in a step that has changed nothing yet: what was done before is saved
        for step in run.steps(state):
            with run.interruptible(state):
                metrics, sample = train_step(model, processor, state, examples, step, config, accelerator)
            metrics = state.advance(metrics)
            run.log(metrics, sample)
            run.save(model, state)
    run.save_last(model, state)
    run.finish(evaluation.after(), examples, held_out)


def main(config: Config) -> None:
    if config.plan:
        from sayo.memory_plan.plan import show_plan

        show_plan(config)
        return
    accelerator = make_accelerator(config)
    with StopSignals(accelerator.is_main_process) as stop, open_run(config, accelerator, stop) as run:
        if not run.finished:
            train(config, accelerator, run)


if __name__ == "__main__":
    run_command(Config, main)
