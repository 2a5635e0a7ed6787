"""The mathematics of GRPO: advantages of a group, and the loss of its tokens. Pure functions of tensors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
LARGEST_BETA = 10.0  # of AdaptiveBeta: beside it, no reward is heard
LARGEST_EXPONENT = 20.0  # e^20 is 5e8: far beyond any ratio that training can use, and far from the end of float32


def group_advantages(rewards: Tensor, scale: str = "group") -> Tensor:
    """How much better than its group each completion is: (r - mean) / (std + 1e-4), or r - mean for scale "none".

    Example: rewards (1, 0, 0, 1) give about (0.87, -0.87, -0.87, 0.87).

    Args:
        rewards: (G,) of one group, G of at least 2.

    Raises:
        ValueError: G below 2, or another scale.
    """
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    if len(rewards) < 2:
        raise ValueError(f"a group of {len(rewards)} has nothing to compare: num_generations must be 2 or more")
    if scale not in ("group", "none"):
        raise ValueError(f'scale={scale!r}: valid are "group" and "none"')
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)  # exactly: rounding in the mean, divided by 1e-4, would become a gradient
    centered = rewards - rewards.mean()  # (G,)
    return centered / (rewards.std() + 1e-4) if scale == "group" else centered


def finite_exp(exponent: Tensor) -> Tensor:
    """exp, exactly, up to LARGEST_EXPONENT; from there on its tangent, so that values and gradients stay finite.

    A token that one of two policies rules out (log-prob -100 against -1) would make the whole step infinite.
    """
    bounded = exponent.clamp(max=LARGEST_EXPONENT)
    return bounded.exp() * (1 + (exponent - bounded))


class AdaptiveBeta:
    """A beta that follows a KL target: PPO's adaptive penalty (arXiv 1707.06347). Without a target it stays.

    Example: at a target of 0.05, 1e-3 becomes 2e-3 after a step with a KL of 0.08.
    """

    def __init__(self, beta: float, kl_target: float | None = None):
        self.value, self.smallest, self.kl_target = beta, beta, kl_target

    def step(self, kl: float | None) -> None:
        """Twice as much above 1.5 targets, half as much below 2/3 of one, never less than it began with.

        Args:
            kl: of the step, nats per token; None, of a step that has no number, changes nothing.
        """
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


def grpo_loss(
    logps: Sequence[Tensor],
    old_logps: Sequence[Tensor],
    ref_logps: Sequence[Tensor] | None,
    advantages: Tensor,
    *,
    beta: float,
    clip_low: float,
    clip_high: float,
    loss_type: str,
    max_new_tokens: int | None = None,
    num_items: float | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """GRPO loss of one group: PPO clipping of the ratio to the sampling policy, plus beta times the k3 KL to the base.

    Args:
        logps: G tensors (n_i,), differentiable. old_logps: of the policy that sampled. ref_logps: of the base;
            None when beta is 0.
        advantages: (G,).
        loss_type: how the token losses are weighted, with TRL's meaning: "grpo" 1 / (G n_i), the mean of each
            completion's mean; "bnpo" 1 / Σn, all tokens of the group alike; "dr_grpo" 1 / (G max_new_tokens), no
            length bias; "dapo" 1 / num_items, all tokens of the step alike.
        max_new_tokens: for "dr_grpo"; by default the longest completion.
        num_items: for "dapo"; by default Σn.

    Returns:
        (scalar loss, {"kl", "clip_fraction"}), the statistics as means over tokens; a KL that is not taken is NaN.

    Raises:
        ValueError: another loss_type, or beta without ref_logps.
    """
    if beta and ref_logps is None:
        raise ValueError(f"beta={beta} needs ref_logps, the log-probs of the base model; or give beta=0")
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: valid are {', '.join(map(repr, LOSS_TYPES))}")
    lengths = torch.tensor([len(logp) for logp in logps], device=logps[0].device)  # (G,)
    new, old = torch.cat(list(logps)), torch.cat(list(old_logps))  # (T,), T = Σ n_i
    advantage = advantages.to(new).repeat_interleave(lengths)  # (T,)
    ratio = finite_exp(new - old)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    token_loss = -torch.minimum(ratio * advantage, clipped * advantage)  # (T,)
    kl = None
    if beta:
        difference = torch.cat(list(ref_logps)) - new
        kl = finite_exp(difference) - difference - 1  # (T,)
        token_loss = token_loss + beta * kl
    if loss_type == "grpo":
        weight = (1 / (len(logps) * lengths.clamp(min=1).to(new))).repeat_interleave(lengths)  # (T,)
    elif loss_type == "bnpo":
        weight = 1 / max(1, len(new))
    elif loss_type == "dr_grpo":
        weight = 1 / (len(logps) * (max_new_tokens or max(1, int(lengths.max()))))
    else:
        weight = 1 / (num_items or max(1, len(new)))
    is_clipped = (ratio * advantage > clipped * advantage).float()
    count = max(1, len(new))
    stats = {"kl": math.nan if kl is None else kl.detach().sum().item() / count}
    stats["clip_fraction"] = is_clipped.sum().item() / count
    return (token_loss * weight).sum(), stats
