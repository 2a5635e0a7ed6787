"""What is measured in a training step: every reward component, what drives the advantages, and time by stage."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import Tensor

from sayo.show.tables import nan_to_none

MOSTLY = {
    "empty_completions": "completions are empty: EOS is the first token and there is nothing to reward; look at the "
    "chat template and the answers in samples.jsonl",
    "identical_groups": "groups hold the same completion G times: there is nothing to compare; raise temperature, "
    "top_p or num_generations",
}


def group_metrics(group, scores: dict[str, Tensor], advantages: Tensor, weights: dict[str, float]) -> dict[str, float]:
    """What is logged about one group; the means over all groups of a step are that step's metrics.

    `variance/…` are sums of squared advantages, in total and by component (they add up to the total): together they
    say which reward the policy is really following. `square/…` turn into standard deviations in step_metrics.

    Args:
        group: a rollout.Group with statistics. scores: (G,) by name, of reward.score_group. advantages: (G,), those
            of the loss. weights: of the reward components.
    """
    metrics = {}
    for name, values in scores.items():
        known = values[~values.isnan()]
        metrics[f"reward/{name}"] = known.mean().item() if len(known) else math.nan
        metrics[f"square/{name}"] = known.square().mean().item() if len(known) else math.nan
    metrics["variance/total"] = advantages.square().sum().item()
    metrics |= {f"variance/{name}": part for name, part in advantage_parts(advantages, scores, weights).items()}
    metrics["zero_advantage_groups"] = float(advantages.abs().max() < 1e-6)
    metrics["entropy"] = torch.cat(group.statistics.entropies).mean().item()
    metrics["completion_length"] = torch.tensor([float(len(ids)) for ids in group.completions]).mean().item()
    metrics["truncated"] = sum(group.truncated) / len(group.truncated)
    metrics["empty_completions"] = group.lengths.count(0) / len(group.lengths)  # EOS and nothing before it
    metrics["identical_groups"] = float(len({tuple(ids.tolist()) for ids in group.completions}) == 1)
    return metrics


def advantage_parts(advantages: Tensor, scores: dict[str, Tensor], weights: dict[str, float]) -> dict[str, float]:
    """How much of the sum of squared advantages comes from each component; together they are that sum.

    However advantages are computed from the total reward, the scale between the two is read off the advantages
    themselves: sum(centered total * A) / sum(A²).

    Args:
        advantages: (G,). scores: (G,) rewards by name, with "total". weights: of the components.
    """
    square = (advantages.double() @ advantages.double()).item()
    if not square:
        return dict.fromkeys(weights, 0.0)
    total = scores["total"]
    scale = ((total - total.mean()).double() @ advantages.double()).item() / square
    centered = {name: weight * (scores[name] - scores[name].mean()) for name, weight in weights.items()}  # (G,) each
    return {name: (part / scale * advantages).sum().item() for name, part in centered.items()}


def step_metrics(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Metrics of a step from those of its groups: means over the groups that have a value, deviations, shares."""
    metrics = {}
    for name in rows[0]:
        known = [row[name] for row in rows if math.isfinite(row[name])]
        metrics[name] = sum(known) / len(known) if known else None  # JSON has neither NaN nor infinity
    for name in [name for name in metrics if name.startswith("square/")]:
        square, mean = metrics.pop(name), metrics[name.replace("square/", "reward/")]
        metrics[f"reward_std/{name[7:]}"] = None if mean is None else math.sqrt(max(0.0, square - mean**2))
    total = metrics.pop("variance/total")
    for name in [name for name in metrics if name.startswith("variance/")]:
        part = metrics.pop(name)
        metrics[name.replace("variance/", "advantage_share/")] = part / total if total else 0.0
    return metrics


def not_finite(**values: Tensor) -> str | None:
    """The name of the first of the tensors in which a number is NaN or infinite; None when all are finite."""
    return next((name for name, value in values.items() if not value.isfinite().all()), None)


class StepLog:
    """Collects the metrics of one training step, and a sample of this process for samples.jsonl.

    Args:
        accelerator: its device and its reduce and gather are used.
        weights: gives those of the reward components, from a group's scores.
    """

    def __init__(self, accelerator, weights: Callable[[dict], dict[str, float]]):
        self.accelerator, self.weights = accelerator, weights
        self.seconds: dict[str, float] = {}
        self.tokens: Counter[str] = Counter()
        self.rows: list[dict[str, float]] = []  # of each group, of the last update
        self.broken: list[tuple] = []  # (id, fault) of this process's groups, of the update at hand
        self.skipped: list[tuple] = []  # the first of each process, of all skipped updates
        self.num_updates, self.num_skipped, self.grad_norm, self.sample = 0, 0, 0.0, {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to a stage: rollout, reference, score or update."""
        begin = time.perf_counter()
        yield
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize(self.accelerator.device)  # else the next stage is charged for queued kernels
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def add(self, group, scores: dict[str, Tensor], advantages: Tensor, stats: dict, fault: str | None) -> None:
        """One group of the update at hand.

        Args:
            stats: further numbers about it, such as its loss. fault: the first thing that was not finite, or None.
        """
        self.rows.append(group_metrics(group, scores, advantages, self.weights(scores)) | stats)
        sampled = sum(map(len, group.completions))
        packed = len(group.prompt.input_ids) + sampled
        self.tokens.update({"score": packed, "update": packed})
        if self.num_updates == 0:
            self.tokens.update({"rollout": sampled, "reference": packed})
        if fault:
            self.broken.append((group.example.get("id"), fault))
        if not self.sample:
            self.sample = {name: group.example.get(name) for name in ("id", "question", "answer")}
            self.sample |= {"texts": group.texts, "advantages": advantages.tolist()}
            self.sample |= {name: values.tolist() for name, values in scores.items()}

    def updated(self, grad_norm: float) -> None:
        """The groups that were added make one update; one whose gradient norm is not finite was skipped."""
        self.grad_norm = grad_norm
        if not math.isfinite(grad_norm):
            self.skipped += gather_object(self.broken[:1])
            self.num_skipped += 1
        self.num_updates, self.broken = self.num_updates + 1, []

    def result(self, **more: float) -> tuple[dict, dict]:
        """(metrics of the step over all processes with `more` in front, a sample of this process)."""
        rows = self.rows[-(len(self.rows) // max(1, self.num_updates)) :]
        table = torch.tensor([list(row.values()) for row in rows], device=self.accelerator.device)  # (groups, metrics)
        gathered = self.accelerator.gather(table).tolist()  # (groups_per_step, metrics)
        metrics = more | step_metrics([dict(zip(rows[0], values, strict=True)) for values in gathered])
        metrics["grad_norm"] = self.grad_norm if math.isfinite(self.grad_norm) else None
        metrics["skipped_updates"] = float(self.num_skipped)
        metrics |= {f"time/{name}_seconds": seconds for name, seconds in self.seconds.items()}
        metrics |= {f"time/{name}_tokens_per_second": self.tokens[name] / spent for name, spent in self.seconds.items()}
        if self.num_skipped:
            names, faults = ([entry[place] for entry in self.skipped] for place in (0, 1))
            self.sample |= {"skipped_examples": names, "not_finite": faults}
        return metrics, nan_to_none(self.sample)


def step_notes(step: int, metrics: dict, sample: dict, warned: set[str]) -> list[str]:
    """Lines for the screen about a step: an update that was skipped, and, once in a run, groups that teach nothing.

    Args:
        metrics, sample: what train_rl.train_step gives. warned: names of the warnings that were given before.
    """
    notes = []
    if "skipped_examples" in sample:
        pairs = zip(sample["skipped_examples"], sample["not_finite"], strict=True)
        names = ", ".join(repr(name) if fault == "gradient" else f"{name!r} (its {fault})" for name, fault in pairs)
        notes.append(f"step {step}: update skipped, the gradient is not finite; it began with {names or 'their sum'}")
    for name, message in MOSTLY.items():
        if metrics[name] > 0.5 and name not in warned:
            warned.add(name)
            notes.append(f"step {step}: {metrics[name]:.0%} of the {message} (said once; {name} in metrics.jsonl)")
    return notes


def show_step(metrics: dict, sample: dict, progress, accelerator, warned: set[str]) -> None:
    """Send a step to the tracker and the terminal; `warned` as in step_notes."""
    known = {name: value for name, value in metrics.items() if value is not None and name != "step"}
    try:
        accelerator.log(known, step=metrics["step"])
    except OSError as error:  # a full disk: metrics.jsonl has the same
        progress.write(f"step {metrics['step']}: the tracker could not be written ({error})")
    shown = {name: metrics[f"reward/{name}"] for name in ("total", "accuracy", "tas")} | {"kl": metrics["kl"]}
    progress.set_postfix({name: f"{value:.3f}" for name, value in shown.items() if value is not None}, refresh=False)
    for note in step_notes(metrics["step"], metrics, sample, warned):
        progress.write(note)
