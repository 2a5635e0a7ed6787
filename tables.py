"""What an evaluation says: means with bootstrap intervals, paired differences, tables, the paper's figures beside ours.

A row is what evaluate.evaluate_policy gives for one example; a summary is {metric: (mean, low, high)}.
"""

import math
from collections.abc import Sequence

import numpy as np

METRICS = ("accuracy", "format", "tas", "tas_selected", "length", "truncated")  # in every row
# What is summarized: TAS also of the examples that were answered right, and of those answered wrong.
REPORTED = ("accuracy", "format", "tas", "tas_correct", "tas_wrong", "tas_selected", "length", "truncated")


def metric_of(row: dict, name: str) -> float:
    """The number of one of REPORTED in a row; NaN where the example has none."""
    if name in ("tas_correct", "tas_wrong"):
        return row["tas"] if row["accuracy"] == (name == "tas_correct") else math.nan
    return row[name]


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
    return {name: bootstrap_interval([metric_of(row, name) for row in rows]) for name in REPORTED}


def compare(before: Sequence[dict], after: Sequence[dict]) -> dict[str, tuple[float, float, float]]:
    """(mean, low, high) of the paired difference after - before of every metric.

    tas_correct compares the examples that both answered right, tas_wrong those that both answered wrong.

    Raises:
        ValueError: the rows are not about the same examples in the same order.
    """
    if [row["id"] for row in before] != [row["id"] for row in after]:
        raise ValueError(f"{len(before)} and {len(after)} rows that are not about the same examples cannot be paired")
    pairs = list(zip(before, after, strict=True))
    return {
        name: bootstrap_interval([metric_of(last, name) - metric_of(first, name) for first, last in pairs])
        for name in REPORTED
    }


def report(before: Sequence[dict], after: Sequence[dict] | None = None, names: Sequence[str] = ("base", "adapter")):
    """(columns for format_table and JSON): before alone, or before, after and their paired difference."""
    columns = {names[0]: summarize(before)}
    if after is not None:
        columns |= {names[1]: summarize(after), "difference": compare(before, after)}
    return columns


def before_and_after(before: Sequence[dict] | None, after: Sequence[dict]) -> dict:
    """Columns as of report: before, after and difference; after alone where before is not about the same examples."""
    if before is None or [row["id"] for row in before] != [row["id"] for row in after]:
        return {"after": summarize(after)}
    return report(before, after, ("before", "after"))


def format_table(columns: dict[str, dict[str, tuple[float, float, float]]]) -> str:
    """Named summaries side by side, one line per metric; metrics that no column knows are left out."""
    lines = [f"{'':12} " + "".join(f"{name:>28}" for name in columns)]
    for metric in REPORTED:
        values = [column[metric] for column in columns.values()]
        if all(math.isnan(mean) for mean, _, _ in values):
            continue
        cells = ["-" if math.isnan(mean) else f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in values]
        lines.append(f"{metric:12} " + "".join(f"{cell:>28}" for cell in cells))
    return "\n".join(lines)


def format_overview(reports: dict[str, dict], counts: dict[str, int], paper: dict[str, tuple[float, float]]) -> str:
    """Accuracy in percent, a line for each benchmark and one for their mean, the paper's figures beside them.

    Args:
        reports: what report() gave, by benchmark. counts: of examples, by benchmark.
        paper: (base, trained) in percent by benchmark; the two columns are left out when it is empty.
    """
    names = list(next(iter(reports.values())))
    width = max(map(len, (*reports, "mean of 10")))
    head = f"{'accuracy, %':{width}}{'n':>8}" + "".join(f"{name:>24}" for name in names)
    lines = [head + ("".join(f"{name:>15}" for name in ("paper, base", "paper, SAYO")) if paper else "")]
    for benchmark, columns in reports.items():
        line = f"{benchmark:{width}}{counts[benchmark]:>8}"
        for name in names:
            mean, low, high = (100 * value for value in columns[name]["accuracy"])
            sign = "+" if name == "difference" else ""
            line += f"{f'{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]':>24}"
        if paper:
            line += "".join(f"{value:>15.2f}" for value in paper[benchmark]) if benchmark in paper else f"{'-':>15}" * 2
        lines.append(line)
    if len(reports) > 1:
        line = f"{f'mean of {len(reports)}':{width}}{sum(counts.values()):>8}"
        for name in names:
            mean = 100 * float(np.mean([columns[name]["accuracy"][0] for columns in reports.values()]))
            line += f"{f'{mean:+.2f}' if name == 'difference' else f'{mean:.2f}':>24}"
        if paper:
            known = [paper.get(benchmark) for benchmark in reports]
            line += "".join(
                f"{'-':>15}" if None in known else f"{np.mean([figures[side] for figures in known]):>15.2f}"
                for side in (0, 1)
            )
        lines.append(line)
    return "\n".join(lines)


def without_nan(value):
    """The same rows and summaries with null for what is unknown, since JSON has neither NaN nor infinity."""
    if isinstance(value, dict):
        return {name: without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def with_nan(rows: list[dict]) -> list[dict]:
    """Rows read back from JSON, NaN again where a metric is null."""
    return [{name: math.nan if name in METRICS and v is None else v for name, v in row.items()} for row in rows]
