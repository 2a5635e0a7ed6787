"""The tables of an evaluation: means with bootstrap intervals, paired differences, the paper's figures beside ours.

A row is what evaluate.evaluate_policy gives for one example; a summary is {metric: (mean, low, high)}.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

METRICS = ("accuracy", "format", "tas", "tas_selected", "length", "truncated")  # in every row
# What is summarized: TAS also of the examples whose answers are all right, and of those whose answers are all wrong.
REPORTED = ("accuracy", "format", "tas", "tas_correct", "tas_wrong", "tas_selected", "length", "truncated")


def metric_of(row: dict, name: str) -> float:
    """The number of one of REPORTED in a row; NaN where the example has none."""
    if name in ("tas_correct", "tas_wrong"):
        return row["tas"] if row["accuracy"] == (name == "tas_correct") else math.nan
    return row[name]


def bootstrap_interval(
    values: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high): the mean of the (n,) values that are not NaN and its 95 % percentile bootstrap interval.

    Without a value, three NaN. For a paired comparison, give the differences.
    """
    known = np.asarray([value for value in values if not math.isnan(value)], dtype=np.float64)  # (n,)
    if len(known) < 2:  # scipy refuses these
        return (float(known[0]) if len(known) else math.nan,) * 3
    from scipy.stats import bootstrap  # slow: not when a script is imported

    batch = max(1, 2_000_000 // len(known))
    sampled = bootstrap((known,), np.mean, n_resamples=resamples, batch=batch, method="percentile", rng=seed)
    low, high = np.percentile(sampled.bootstrap_distribution, [2.5, 97.5])  # its own ends differ in the last bit
    return float(known.mean()), float(low), float(high)


def summarize(rows: Sequence[dict]) -> dict[str, tuple[float, float, float]]:
    """(mean, low, high) of every metric."""
    return {name: bootstrap_interval([metric_of(row, name) for row in rows]) for name in REPORTED}


def pass_at_k(rows: Sequence[dict]) -> dict[str, tuple[float, float, float]]:
    """{"pass@k": (mean, low, high)} for k = 1, 2, 4, ... up to the samples of a row; {} where rows have one.

    1 - C(n - c, k) / C(n, k) of each example with c right samples of n, the unbiased estimate (arXiv 2107.03374).
    """
    samples = [row["right"] for row in rows if "right" in row]
    number = min(map(len, samples), default=0)
    found = {}
    for k in sorted({2**power for power in range(number.bit_length()) if 2**power <= number} | {number} - {0}):
        values = [1 - math.comb(right.count(0), k) / math.comb(len(right), k) for right in samples]
        found[f"pass@{k}"] = bootstrap_interval(values)
    return found


def compare(before: Sequence[dict], after: Sequence[dict]) -> dict[str, tuple[float, float, float]]:
    """(mean, low, high) of the paired difference after - before of every metric.

    tas_correct compares the examples that both answered right, tas_wrong those that both answered wrong. Raises
    ValueError where the rows are not about the same examples in the same order.
    """
    if [row["id"] for row in before] != [row["id"] for row in after]:
        raise ValueError(f"{len(before)} and {len(after)} rows that are not about the same examples cannot be paired")
    columns = {name: [[metric_of(row, name) for row in rows] for rows in (after, before)] for name in REPORTED}
    return {name: bootstrap_interval(np.subtract(*pair, dtype=float)) for name, pair in columns.items()}


def compare_policies(
    before: Sequence[dict], after: Sequence[dict] | None = None, names: Sequence[str] = ("base", "adapter")
):
    """Columns for format_table and JSON: before alone, or before, after and their paired difference."""
    columns = {names[0]: summarize(before)}
    if after is not None:
        columns |= {names[1]: summarize(after), "difference": compare(before, after)}
    return columns


def before_and_after(before: Sequence[dict] | None, after: Sequence[dict]) -> dict:
    """Columns of compare_policies; after alone where before is missing or about other examples."""
    if before is None or [row["id"] for row in before] != [row["id"] for row in after]:
        return {"after": summarize(after)}
    return compare_policies(before, after, ("before", "after"))


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

    By benchmark: reports of compare_policies, counts of examples, the paper's (base, trained) in percent; without any
    of these, the two columns are left out.
    """
    names = list(next(iter(reports.values())))
    signs = ["+" if name == "difference" else "" for name in names]
    width = max(map(len, (*reports, "mean of 10")))

    def line(label: str, count: int | str, cells: Sequence[str], figures: Sequence[float | str] | None) -> str:
        known = [figure if isinstance(figure, str) else f"{figure:.2f}" for figure in figures or ("-", "-")]
        shown = "".join(f"{figure:>15}" for figure in known if paper)
        return f"{label:{width}}{count:>8}" + "".join(f"{cell:>24}" for cell in cells) + shown

    lines = [line("accuracy, %", "n", names, ("paper, base", "paper, SAYO"))]
    for benchmark, columns in reports.items():
        cells = []
        for name, sign in zip(names, signs, strict=True):
            mean, low, high = (100 * value for value in columns[name]["accuracy"])
            cells.append(f"{mean:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]")
        lines.append(line(benchmark, counts[benchmark], cells, paper.get(benchmark)))
    if len(reports) > 1:
        means = [100 * float(np.mean([columns[name]["accuracy"][0] for columns in reports.values()])) for name in names]
        cells = [f"{mean:{sign}.2f}" for mean, sign in zip(means, signs, strict=True)]
        known = [paper.get(benchmark) for benchmark in reports]
        figures = None if None in known else [np.mean(side) for side in zip(*known, strict=True)]
        lines.append(line(f"mean of {len(reports)}", sum(counts.values()), cells, figures))
    return "\n".join(lines)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def nan_to_none(value):
    """Rows or summaries with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: nan_to_none(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_none(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def none_to_nan(rows: list[dict]) -> list[dict]:
    """Rows read back from JSON, NaN again where a metric is null."""
    return [{name: math.nan if name in METRICS and v is None else v for name, v in row.items()} for row in rows]
