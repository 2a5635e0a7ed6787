"""What the runs of ablate.py say: a table, a figure, and a verdict on each claim of the paper (arXiv 2602.08241).

Every number is a mean over seeds with its 95 % interval by Student's t, and comparisons are paired by seed: the same
seed saw the same examples in the same order. The examples of a set are the same for all runs, so an interval says what
other seeds would change, not what other examples would.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import ConfigError
from plots import drawing

# 97.5 % quantiles of Student's t by degrees of freedom; scipy would be a dependency for one column of numbers.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
MARKERS = ("<!-- made by ablate.py: begin -->", "<!-- made by ablate.py: end -->")


@dataclass
class Claim:
    """That `metric` of one row is above that of another."""

    text: str
    paper: str
    better: str
    worse: str
    metric: str = "accuracy"


CLAIMS = (
    Claim("An attention reward without an accuracy reward raises accuracy", "63.96 > 59.64", "attention", "base"),
    Claim("and the attention on the region (TAS)", "Figure 2", "attention", "base", "tas"),
    Claim("It does so more than an accuracy reward", "63.96 > 60.92", "attention", "accuracy"),
    Claim("An accuracy reward raises accuracy", "60.92 > 59.64", "accuracy", "base"),
    Claim("The attention reward raises TAS more than an accuracy reward", "-", "attention", "accuracy", "tas"),
    Claim("Both together are better than attention alone", "64.27 > 63.96", "full", "attention"),
    Claim("Both together are better than accuracy alone", "64.27 > 60.92", "full", "accuracy"),
    Claim("The 30 % most uncertain tokens are better than all tokens", "63.96 > 60.51", "attention", "top-100"),
    Claim("30 % are better than 20 %", "on most of nine", "attention", "top-20"),
    Claim("30 % are better than 40 %", "on most of nine", "attention", "top-40"),
    Claim("Uncertain tokens are better than as many random ones", "(control)", "attention", "random-30"),
    Claim("The last layer is better than the first", "(chosen)", "attention", "layer-0"),
    Claim("The last layer is better than the one two thirds up", "(chosen)", "attention", "layer-2"),
    Claim("The last layer is better than the mean of all", "(chosen)", "attention", "layers-all"),
    Claim("The token's own position is better than the one that predicts it", "(chosen)", "attention", "predictor"),
    Claim("A KL term is better than none", "(replications)", "attention", "beta-0"),
    Claim("Its weight of 1e-3 is better than 1e-2", "(chosen)", "attention", "beta-1e-2"),
)
NOT_THE_PAPERS = (
    Claim("A fourth of the learning rate is worse", "", "attention", "lr-5e-5"),
    Claim("At five times the learning rate, attention + format loses accuracy", "", "attention", "fast"),
    Claim("there, an accuracy reward loses less", "", "fast-full", "fast"),
    Claim("and ends above where it began", "", "fast-full", "base"),
    Claim("there, the gate on right answers loses less", "", "fast-gate", "fast"),
    Claim("and ends above where it began", "", "fast-gate", "base"),
    Claim("there, the border mask loses less", "", "fast-border", "fast"),
    Claim("there, a KL target loses less", "", "fast-kl-target", "fast"),
    Claim("and ends above where it began", "", "fast-kl-target", "base"),
    Claim("there, normalizing the attention reward helps the full reward", "", "fast-full-normalized", "fast-full"),
    Claim("Remember-R1's region reward raises accuracy", "", "region", "base"),
    Claim("Remember-R1's memory reward raises accuracy", "", "memory", "base"),
    Claim("EASE's loss helps an accuracy reward", "", "ease", "accuracy"),
    Claim("Regions from the base model's own attention raise accuracy", "", "no-boxes", "base"),
    Claim("and annotated boxes are better than those", "", "attention", "no-boxes"),
)


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: infinite for a single value, 0 where nothing varies.

    Example: (1.0, 2.0, 3.0) gives 2.0 and 4.303 * 1 / sqrt(3) = 2.484.
    """
    count, mean = len(values), sum(values) / len(values)
    if count == 1:
        return mean, math.inf
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96 + 2.4 / (count - 1)
    return mean, quantile * deviation / math.sqrt(count)


def read_result(path: Path) -> dict:
    """One run of ablate.py.

    Raises:
        ConfigError: the file is not what ablate.py writes.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        named = {name: result[name] for name in ("row", "seed", "settings", "max_steps", "seconds", "tokens")}
        training, sets = result["training"].get, result["sets"].values()
        numbers = [training("kl"), *(part[name] for part in sets for name in ("accuracy", "tas", "length", "format"))]
        if not sets or not all(isinstance(value, int | float | None) for value in numbers):
            raise ValueError("numbers are missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{str(path)!r} is no result of ablate.py ({type(error).__name__}: {error}): delete it, and the run is "
            "done again"
        ) from error
    return named | {"training": result["training"], "sets": result["sets"]}


def read_results(folder: Path) -> dict[str, dict[int, dict]]:
    """{row: {seed: result}} of the JSON files in a folder."""
    results: dict[str, dict[int, dict]] = {}
    for path in sorted(Path(folder).glob("*.json")):
        result = read_result(path)
        results.setdefault(result["row"], {})[result["seed"]] = result
    return results


def number(result: dict, *path: str) -> float | None:
    """A number of a result by the names that lead to it; None where it is not."""
    for name in path:
        result = (result or {}).get(name)
    return result


def differences(better: dict[int, dict], worse: dict[int, dict], *path: str) -> list[float]:
    """number(better) - number(worse) by seed. The base has one run for all seeds: nothing of it is random."""
    if any(result["settings"] is None for result in worse.values()):
        worse = dict.fromkeys(better, next(iter(worse.values())))
    pairs = [(number(better[seed], *path), number(worse[seed], *path)) for seed in sorted(better) if seed in worse]
    return [first - second for first, second in pairs if first is not None and second is not None]


def verdict(found: Sequence[float]) -> tuple[str, str]:
    """("holds", "does not hold" or "undecided", the difference in points of percent), from differences by seed."""
    if not found:
        return "not run", "-"
    mean, half = t_interval(found)
    if len(found) == 1:
        return "undecided", f"{100 * mean:+.1f}, one seed"
    word = "undecided" if abs(mean) <= half else "holds" if mean > 0 else "does not hold"
    return word, f"{100 * mean:+.1f} ± {100 * half:.1f}"


# --- as text ------------------------------------------------------------------------------------------------------


def _cell(results: dict[int, dict], *path: str, digits: int = 1, scale: float = 100) -> str:
    values = [number(result, *path) for result in results.values()]
    if not values or None in values:
        return "-"
    mean, half = t_interval(values)
    margin = f" ± {scale * half:.{digits}f}" if half < math.inf else ""
    return f"{scale * mean:.{digits}f}{margin}"


def table(results: dict[str, dict[int, dict]], rows: Sequence[str], sets: dict[str, str]) -> str:
    """Markdown: accuracy and TAS on every set in percent, then length and format on the first, and KL in training."""
    first = next(iter(sets))
    head = ["row", "seeds", *(f"accuracy, {name}" for name in sets), *(f"TAS, {name}" for name in sets)]
    head += ["length", "format", "KL"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        found = results.get(row, {})
        cells = [f"`{row}`", str(len(found))]
        for metric in ("accuracy", "tas"):
            cells += [_cell(found, "sets", name, metric) for name in sets]
        cells += [_cell(found, "sets", first, "length", scale=1), _cell(found, "sets", first, "format")]
        cells.append(_cell(found, "training", "kl", digits=3, scale=1))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def claims_table(results, claims: Sequence[Claim], sets: dict[str, str]) -> str:
    """Markdown: a line for each claim, its verdict on every set and the difference in points of percent."""
    head = ["claim", "paper, %", "rows", *sets]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for claim in claims:
        metric = "" if claim.metric == "accuracy" else f" ({claim.metric.upper()})"
        cells = [claim.text, claim.paper or "-", f"`{claim.better}` − `{claim.worse}`{metric}"]
        for name in sets:
            pair = (results.get(claim.better, {}), results.get(claim.worse, {}))
            word, size = verdict(differences(*pair, "sets", name, claim.metric))
            cells.append(f"**{word}** {size}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def correlation(results, sets: dict[str, str]) -> str:
    """Whether runs with more TAS are more often right, over all runs of the grid, as in the paper's Figure 2."""
    lines = []
    for name, title in sets.items():
        runs = [result["sets"][name] for found in results.values() for result in found.values()]
        pairs = np.array([(run["tas"], run["accuracy"]) for run in runs if run["tas"] is not None])
        if len(pairs) < 4 or not pairs.std(0).all():
            continue
        generator = np.random.default_rng(0)
        drawn = [pairs[generator.integers(len(pairs), size=len(pairs))] for _ in range(2000)]
        values = [np.corrcoef(sample.T)[0, 1] for sample in drawn if sample.std(0).all()]
        low, high = np.percentile(values, [2.5, 97.5])
        word = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        lines.append(
            f"- {title}: **{word}**, correlation {np.corrcoef(pairs.T)[0, 1]:+.2f} [{low:+.2f}, {high:+.2f}] over "
            f"{len(pairs)} runs"
        )
    return "\n".join(lines)


def mechanism(results, rows: Sequence[str]) -> str:
    """Markdown: by row, the share of each reward in the advantages at the end, and the most frequent scored tokens.

    The tokens are those of seed 0, each with its share of all scored tokens and the mean TAS of its own attention.
    """
    rewards = ("attention", "format", "accuracy")
    head = ["row", *(f"{name}, %" for name in rewards), "scored tokens: share of all, TAS"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        found = results.get(row, {})
        if not found:
            continue
        cells = [f"`{row}`"]
        for name in rewards:
            cells.append(_cell(found, "training", f"advantage_share/{name}", digits=0))
        tokens = found[min(found)]["tokens"][:6]
        cells.append(", ".join(f"`{text or ' '}` {100 * share:.0f} %, {score:.2f}" for text, share, score in tokens))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- as a figure --------------------------------------------------------------------------------------------------


def figure(results, rows: Sequence[str], sets: dict[str, str], outputs: Sequence[Path]) -> None:
    """Accuracy and TAS of every row with their intervals, one color for each set."""
    shown = [row for row in rows if results.get(row)]
    with drawing(outputs, 1, 2, (5.5, 1.2 + 0.32 * len(shown))) as axes:
        for axis, metric, title in zip(np.ravel(axes), ("accuracy", "tas"), ("accuracy, %", "TAS, %"), strict=True):
            for number, name in enumerate(sets):
                for place, row in enumerate(shown):
                    values = [result["sets"][name][metric] for result in results[row].values()]
                    mean, half = t_interval([100 * value for value in values])
                    axis.errorbar(
                        mean,
                        place + 0.22 * (number - 1),
                        xerr=half if half < math.inf else None,
                        fmt="o",
                        markersize=4,
                        color=f"C{number}",
                        label=name if place == 0 else None,
                    )
            axis.set_yticks(range(len(shown)), shown)
            axis.set_ylim(len(shown) - 0.4, -0.6)
            axis.set_xlabel(title)
            axis.grid(alpha=0.3)
            means = [result["sets"][name][metric] for row in shown for result in results[row].values() for name in sets]
            axis.set_xlim(100 * min(means) - 5, 100 * max(means) + 5)  # wide intervals of a few seeds are cut off
        np.ravel(axes)[0].legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))


def report_grid(folder: Path, rows: Sequence[str], sets: dict[str, str]) -> str:
    """Write FOLDER/table.md and figure.png from FOLDER/runs, and the same tables into RESULTS.md; returns a summary.

    RESULTS.md is the page of the project: it is rewritten between its two markers, where it is in this folder.
    """
    results = read_results(folder / "runs")
    if not results:
        return f"no finished run in {folder / 'runs'}"
    count, seconds = 0, 0
    for found in results.values():
        count += len(found)
        seconds += sum(result["seconds"] for result in found.values())
    not_run = [row for row in rows if row not in results]
    later = f" Not run yet: {', '.join(f'`{row}`' for row in not_run)}." if not_run else ""
    text = "\n\n".join(
        [
            f"{count} runs, {seconds / 3600:.1f} hours on one core each.{later}",
            table(results, [row for row in rows if row in results], sets),
            "### The paper's claims",
            claims_table(results, CLAIMS, sets),
            "More TAS goes with more accuracy (Figure 2):",
            correlation(results, sets),
            "### Beyond the paper",
            claims_table(results, NOT_THE_PAPERS, sets),
            "### Where it is gamed",
            mechanism(results, rows),
        ]
    )
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    figure(results, rows, sets, [folder / "figure.png"])
    page = Path("RESULTS.md")
    if page.exists() and folder.resolve() == Path("ablation").resolve():
        between = re.escape(MARKERS[0]) + ".*?" + re.escape(MARKERS[1])
        whole = f"{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}"
        page.write_text(
            re.sub(between, lambda _: whole, page.read_text(encoding="utf-8"), flags=re.S), encoding="utf-8"
        )
    return f"{count} runs of {len(results)} rows -> {folder / 'table.md'}, {folder / 'figure.png'}"
