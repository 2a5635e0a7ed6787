"""What is measured in a training step: every reward component, what drives the advantages, and time by stage."""

import math
import time
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from reward import COMPONENTS
from rollout import Group

MOSTLY = {
    "empty_completions": "completions are empty: an end at once and nothing to reward; look at the chat template and "
    "the answers in samples.jsonl",
    "identical_groups": "groups have one and the same completion G times: nothing to compare; raise temperature, top_p "
    "or num_generations",
}


def group_metrics(group: Group, scores: dict[str, Tensor], advantages: Tensor, config) -> dict[str, float]:
    """What is logged about one group; the means over all groups of a step are that step's metrics.

    `variance/…` are sums of squared advantages, in total and by component (they add up to the total): together they
    say which reward the policy is really following. `square/…` turn into standard deviations in step_metrics.
    """
    metrics = {}
    for name, values in scores.items():
        known = values[~values.isnan()]
        metrics[f"reward/{name}"] = known.mean().item() if len(known) else math.nan
        metrics[f"square/{name}"] = known.square().mean().item() if len(known) else math.nan
    scale = scores["total"].std().item() + 1e-4 if config.advantage_scale == "group" else 1.0
    metrics["variance/total"] = advantages.square().sum().item()
    for name in COMPONENTS:
        part = getattr(config, f"{name}_weight") * (scores[name] - scores[name].mean()) / scale  # (G,)
        metrics[f"variance/{name}"] = (part * advantages).sum().item()
    lengths = torch.tensor([float(len(completion)) for completion in group.completions])
    metrics["zero_advantage_groups"] = float(advantages.abs().max() < 1e-6)
    metrics["entropy"] = torch.cat(group.statistics.entropies).mean().item()
    metrics["completion_length"] = lengths.mean().item()
    metrics["truncated"] = sum(group.truncated) / len(group.truncated)
    spoken = [len(ids) - (not cut) for ids, cut in zip(group.completions, group.truncated, strict=True)]
    metrics["empty_completions"] = spoken.count(0) / len(spoken)  # an end and nothing before it
    metrics["identical_groups"] = float(len({tuple(ids.tolist()) for ids in group.completions}) == 1)
    return metrics


def step_metrics(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its groups: means over the groups that have a value, deviations, shares."""
    metrics = {}
    for name in rows[0]:
        known = [row[name] for row in rows if math.isfinite(row[name])]
        metrics[name] = sum(known) / len(known) if known else None  # JSON has neither NaN nor infinity
    for name in [name for name in metrics if name.startswith("square/")]:
        square, mean = metrics.pop(name), metrics[name.replace("square/", "reward/")]
        deviation = None if mean is None else math.sqrt(max(0.0, square - mean**2))
        metrics[name.replace("square/", "reward_std/")] = deviation
    total = metrics.pop("variance/total")
    for name in COMPONENTS:
        part = metrics.pop(f"variance/{name}")
        metrics[f"advantage_share/{name}"] = part / total if total else 0.0
    return metrics


def not_finite(**values: Tensor) -> str | None:
    """The name of the first of the tensors in which a number is NaN or infinite; None when all are finite."""
    return next((name for name, value in values.items() if not value.isfinite().all()), None)


def step_notes(step: int, metrics: dict, sample: dict, told: set[str]) -> list[str]:
    """Lines for the screen about a step: an update that was skipped, and, once in a run, groups that teach nothing.

    Args:
        metrics, sample: what train_rl.train_step gives. told: names of the warnings that were given before.
    """
    notes = []
    if "skipped_examples" in sample:
        pairs = zip(sample["skipped_examples"], sample["not_finite"], strict=True)
        names = ", ".join(repr(name) if fault == "gradient" else f"{name!r} (its {fault})" for name, fault in pairs)
        notes.append(f"step {step}: update skipped, the gradient is not finite; it began with {names or 'their sum'}")
    for name, message in MOSTLY.items():
        if metrics[name] > 0.5 and name not in told:
            told.add(name)
            notes.append(f"step {step}: {metrics[name]:.0%} of the {message} (said once; {name} in metrics.jsonl)")
    return notes


class StageClock:
    """Seconds and tokens of each stage of a step."""

    def __init__(self):
        self.seconds, self.tokens = {}, {}

    @contextmanager
    def stage(self, name: str, device: torch.device):
        begin = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # else the time of queued kernels would go to the next stage
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        seconds = {f"time/{name}_seconds": value for name, value in self.seconds.items()}
        return seconds | {
            f"time/{name}_tokens_per_second": self.tokens[name] / value for name, value in self.seconds.items()
        }


def show_step(metrics: dict, sample: dict, progress, accelerator, told: set[str]) -> None:
    """Tell the tracker and the terminal about a step; `told` as in step_notes."""
    known = {name: value for name, value in metrics.items() if value is not None and name != "step"}
    try:
        accelerator.log(known, step=metrics["step"])
    except OSError as error:  # a full disk: metrics.jsonl has the same
        progress.write(f"step {metrics['step']}: the tracker could not be told ({error})")
    shown = {name: metrics[f"reward/{name}"] for name in ("total", "accuracy", "tas")} | {"kl": metrics["kl"]}
    progress.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if value is not None}, refresh=False)
    for note in step_notes(metrics["step"], metrics, sample, told):
        progress.write(note)
