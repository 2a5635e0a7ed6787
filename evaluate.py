"""Greedy accuracy, format, length and Target Attention Score of a policy, beside its base model.

Every number comes with its 95 % bootstrap interval. With --adapter both the base (the adapter switched off) and the
adapter answer the same questions, and the paired difference has its interval too: that is the one to look at.

    python evaluate.py --data scenes:heldout --limit 512
    python evaluate.py --data scenes:heldout --limit 512 --adapter runs/sayo/adapter --json result.json
"""

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object
from torch.utils.data import Subset
from tqdm import tqdm

from config import PolicyConfig, at_least, option, run_command
from data.examples import load_examples
from reward import RewardConfig, score_group
from rollout import check_prompts, sample_groups
from vlm import load_policy, resolve_layers

METRICS = ("accuracy", "format", "tas", "tas_selected", "length", "truncated")
EXAMPLES_AT_A_TIME = 16  # pixels of so many pictures are in memory together


@dataclass
class EvaluateConfig(RewardConfig, PolicyConfig):
    """Evaluate a model, and its adapter if there is one, with greedy decoding."""

    data: str = option("scenes:heldout", "Examples: .jsonl, .parquet, a datasets folder, a Hub id, or scenes:heldout.")
    max_new_tokens: int = option(64, "Longest completion in tokens.")
    json: str | None = option(None, "JSON file for the summary and every completion.")

    def problems(self) -> list[str]:
        found = super().problems() + at_least(self, 1, "max_new_tokens")
        if self.json and (not Path(self.json).absolute().parent.is_dir() or Path(self.json).is_dir()):
            found.append(f"json={self.json!r}: give the name of a file in a folder that exists")
        return found


def evaluate_policy(model, processor, examples: Sequence[dict], config, *, description: str = "evaluate") -> list[dict]:
    """One row per example: id, text, and a number for each of METRICS.

    Args:
        config: anything with the fields of RewardConfig and PolicyConfig, and max_new_tokens.

    Returns:
        Rows in the order of the examples. `tas` is NaN for an example without boxes; `length` is in tokens, EOS left
        out.
    """
    rows, progress = [], tqdm(total=len(examples), desc=description, unit="example")
    for start in range(0, len(examples), EXAMPLES_AT_A_TIME):
        groups = sample_groups(
            model,
            processor,
            [examples[index] for index in range(start, min(start + EXAMPLES_AT_A_TIME, len(examples)))],
            num_generations=1,
            max_new_tokens=config.max_new_tokens,
            temperature=0,
            system_prompt=config.system_prompt,
            sampling_tokens=config.sampling_tokens,
        )
        for group in groups:
            scores = score_group(model, group, config)
            row = {name: float(scores[name][0]) for name in ("accuracy", "format", "tas", "tas_selected")}
            row["length"] = len(group.completions[0]) - (not group.truncated[0])
            row["truncated"] = float(group.truncated[0])
            row |= {"id": group.example.get("id"), "kind": group.example.get("kind"), "text": group.texts[0]}
            rows.append(row)
            progress.update()
    progress.close()
    return rows


def evaluate_shared(model, processor, examples, config, accelerator, description: str) -> list[dict]:
    """evaluate_policy with the examples shared out over the processes; rows in the order of the examples."""
    share = range(accelerator.process_index, len(examples), accelerator.num_processes)
    rows = evaluate_policy(model, processor, Subset(examples, share), config, description=description)
    return [row for _, row in sorted(gather_object(list(zip(share, rows, strict=True))), key=lambda pair: pair[0])]


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of the values that are not NaN, and the ends of its 95 % percentile bootstrap interval.

    Args:
        values: (n,) one per example; for a paired comparison, the differences.

    Returns:
        (mean, low, high); three NaN when there is no value.
    """
    known = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)  # (n,)
    if len(known) == 0:
        return math.nan, math.nan, math.nan
    generator = np.random.default_rng(seed)
    rows_at_a_time = max(1, 2_000_000 // len(known))
    means = []
    for start in range(0, resamples, rows_at_a_time):
        rows = min(rows_at_a_time, resamples - start)
        means.append(known[generator.integers(len(known), size=(rows, len(known)))].mean(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(known.mean()), float(low), float(high)


def summarize(rows: Sequence[dict]) -> dict[str, tuple[float, float, float]]:
    """(mean, low, high) of every metric."""
    return {name: bootstrap_interval([row[name] for row in rows]) for name in METRICS}


def compare(before: Sequence[dict], after: Sequence[dict]) -> dict[str, tuple[float, float, float]]:
    """(mean, low, high) of the paired difference after - before of every metric.

    Raises:
        ValueError: the rows are not about the same examples in the same order.
    """
    if [row["id"] for row in before] != [row["id"] for row in after]:
        raise ValueError(f"{len(before)} and {len(after)} rows that are not about the same examples cannot be paired")
    pairs = list(zip(before, after, strict=True))
    return {name: bootstrap_interval([last[name] - first[name] for first, last in pairs]) for name in METRICS}


def format_table(columns: dict[str, dict[str, tuple[float, float, float]]]) -> str:
    """Named summaries side by side, one line per metric."""
    lines = [f"{'':12} " + "".join(f"{name:>28}" for name in columns)]
    for metric in METRICS:
        cells = [
            f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in (column[metric] for column in columns.values())
        ]
        lines.append(f"{metric:12} " + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def report(before: Sequence[dict], after: Sequence[dict] | None = None, names: Sequence[str] = ("base", "adapter")):
    """(columns for format_table and JSON): before alone, or before, after and their paired difference."""
    columns = {names[0]: summarize(before)}
    if after is not None:
        columns |= {names[1]: summarize(after), "difference": compare(before, after)}
    return columns


def without_nan(value):
    """The same rows and summaries with null for what is unknown, since JSON has no NaN."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def with_nan(rows: list[dict]) -> list[dict]:
    """Rows read back from JSON, NaN again where a metric is null."""
    return [{name: math.nan if name in METRICS and v is None else v for name, v in row.items()} for row in rows]


def main(config: EvaluateConfig) -> None:
    examples = load_examples(config.data, **config.data_arguments(), require_boxes=False)
    model, processor = load_policy(**config.policy_arguments(lora_rank=0))
    model.requires_grad_(False)  # a frozen vision tower's features are kept from sampling to scoring
    resolve_layers(model, config.attention_layers)
    check_prompts(model, processor, examples, config, config.max_new_tokens)
    with model.disable_adapter() if config.adapter else nullcontext():
        base = evaluate_policy(model, processor, examples, config, description="base")
    adapter = None
    if config.adapter:
        adapter = evaluate_policy(model, processor, examples, config, description="adapter")
    columns = report(base, adapter)
    print(f"{len(examples)} examples of {config.data}, greedy; mean [95 % bootstrap interval]")
    print(format_table(columns))
    if config.json:
        rows = {"base": base} | ({"adapter": adapter} if adapter else {})
        result = {
            "model": config.model,
            "adapter": config.adapter,
            "data": config.data,
            "summary": columns,
            "rows": rows,
        }
        Path(config.json).write_text(json.dumps(without_nan(result), indent=1, ensure_ascii=False))
        print(f"-> {config.json}")


if __name__ == "__main__":
    run_command(EvaluateConfig, main)
