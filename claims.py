"""What the runs of ablate.py say: a table, a figure, and a verdict on each claim of the paper (arXiv 2602.08241).

Every number is a mean over seeds with its 95 % interval by Student's t, and comparisons are paired by seed: the same
seed saw the same examples in the same order. The examples of a set are the same for all runs, so an interval says what
other seeds would change, not what other examples would. So many comparisons have some by chance: those that stay when
all are tested together (Holm) are told apart.
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
from significance import SIGNIFICANCE, holm, p_value, rank_correlation, t_interval

MARKERS = ("<!-- made by ablate.py: begin -->", "<!-- made by ablate.py: end -->")


@dataclass(frozen=True)
class Claim:
    """That `metric` of one row is above that of another."""

    text: str
    paper: str
    better: str
    worse: str
    metric: str = "accuracy"


CLAIMS = (
    Claim("An attention reward without an accuracy reward raises accuracy", "63.96 > 59.64", "attention", "base"),
    Claim("and the attention on the region (TAS)", "(its aim)", "attention", "base", "tas"),
    Claim("and shortens answers", "(replications)", "base", "attention", "length"),
    Claim("It does so more than an accuracy reward", "63.96 > 60.92", "attention", "accuracy"),
    Claim("An accuracy reward raises accuracy", "60.92 > 59.64", "accuracy", "base"),
    Claim("The attention reward raises TAS more than an accuracy reward", "-", "attention", "accuracy", "tas"),
    Claim("Both together raise accuracy", "64.27 > 59.64", "full", "base"),
    Claim("Both together are better than attention alone", "64.27 > 63.96", "full", "attention"),
    Claim("Both together are better than accuracy alone", "64.27 > 60.92", "full", "accuracy"),
    Claim("An attention reward of all tokens raises accuracy", "60.51 > 59.64", "top-100", "base"),
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
    Claim("There, an attention reward does more than an accuracy reward", "", "lr-5e-5", "accuracy-lr-5e-5"),
    Claim("At five times the learning rate, attention + format loses accuracy", "", "attention", "fast"),
    Claim("there, accuracy + format loses accuracy, too", "", "accuracy", "fast-accuracy"),
    Claim("there, accuracy + format loses less than attention + format", "", "fast-accuracy", "fast"),
    Claim("there, an accuracy reward beside attention loses less", "", "fast-full", "fast"),
    Claim("and ends above where it began", "", "fast-full", "base"),
    Claim("there, the gate on right answers loses less", "", "fast-gate", "fast"),
    Claim("and ends above where it began", "", "fast-gate", "base"),
    Claim("there, the border mask loses less", "", "fast-border", "fast"),
    Claim("there, a KL target loses less", "", "fast-kl-target", "fast"),
    Claim("and ends above where it began", "", "fast-kl-target", "base"),
    Claim("there, normalizing the attention reward helps the full reward", "", "fast-full-normalized", "fast-full"),
    Claim("Remember-R1's region reward raises accuracy", "", "region", "base"),
    Claim("and more than the attention reward", "", "region", "attention"),
    Claim("Remember-R1's memory reward raises accuracy", "", "memory", "base"),
    Claim("EASE's loss helps an accuracy reward", "", "ease", "accuracy"),
    Claim("Regions from the base model's own attention raise accuracy", "", "no-boxes", "base"),
    Claim("and annotated boxes are better than those", "", "attention", "no-boxes"),
)


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
    return named | {"training": result["training"], "sets": result["sets"], "versions": result.get("versions", {})}


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


def differences(results: dict[str, dict[int, dict]], claim: Claim, name: str) -> list[float]:
    """What one row of a claim has more than the other on the set `name`, by seed.

    The base has one run for all seeds: nothing of it is random.
    """
    better, worse = results.get(claim.better, {}), results.get(claim.worse, {})
    if claim.worse == "base" and worse:
        worse = dict.fromkeys(better, worse[0])
    elif claim.better == "base" and better:
        better = dict.fromkeys(worse, better[0])
    seeds = [seed for seed in sorted(better) if seed in worse]
    pairs = [tuple(number(row[seed], "sets", name, claim.metric) for row in (better, worse)) for seed in seeds]
    return [first - second for first, second in pairs if first is not None and second is not None]


def verdict(found: Sequence[float], scale: float = 100) -> tuple[str, str]:
    """("holds", "does not hold" or "undecided", the difference times `scale`), from differences by seed."""
    if not found:
        return "not run", "-"
    mean, half = t_interval(found)
    if len(found) == 1:
        return "undecided", f"{scale * mean:+.1f}, one seed"
    word = "undecided" if abs(mean) <= half else "holds" if mean > 0 else "does not hold"
    return word, f"{scale * mean:+.1f} ± {scale * half:.1f}"


# --- as text ------------------------------------------------------------------------------------------------------


def _cell(results: dict[int, dict], *path: str, digits: int = 1, scale: float = 100) -> str:
    values = [number(result, *path) for result in results.values()]
    if not values or None in values:
        return "-"
    mean, half = t_interval(values)
    margin = f" ± {scale * half:.{digits}f}" if half < math.inf else ""
    return f"{scale * mean:.{digits}f}{margin}"


def table(results: dict[str, dict[int, dict]], rows: Sequence[str], sets: dict[str, str]) -> str:
    """Markdown: accuracy and TAS in percent and length on every set, then format on the first, and KL in training."""
    first = next(iter(sets))
    head = ["row", "seeds", *(f"{metric}, {name}" for metric in ("accuracy", "TAS", "length") for name in sets)]
    head += ["format", "KL"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        found = results.get(row, {})
        cells = [f"`{row}`", str(len(found))]
        for metric, scale in (("accuracy", 100), ("tas", 100), ("length", 1)):
            cells += [_cell(found, "sets", name, metric, scale=scale) for name in sets]
        cells += [_cell(found, "sets", first, "format"), _cell(found, "training", "kl", digits=3, scale=1)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sure_claims(results, claims: Sequence[Claim], sets: dict[str, str]) -> tuple[set, int]:
    """({(claim, set)} that stay when all claims on all sets are tested together, how many were tested)."""
    found = {(claim, name): differences(results, claim, name) for claim in claims for name in sets}
    tested = {key: p_value(values) for key, values in found.items() if len(values) > 1}
    return holm(tested), len(tested)


def claims_table(results, claims: Sequence[Claim], sets: dict[str, str], sure: set) -> str:
    """Markdown: a line for each claim, its verdict on every set and the difference; in bold where it is in `sure`."""
    head = ["claim", "paper, %", "rows", *sets]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for claim in claims:
        metric = {"accuracy": "", "tas": " (TAS)", "length": " (tokens)"}[claim.metric]
        cells = [claim.text, claim.paper or "-", f"`{claim.better}` − `{claim.worse}`{metric}"]
        for name in sets:
            word, size = verdict(differences(results, claim, name), 1 if claim.metric == "length" else 100)
            mark = "**" if (claim, name) in sure else ""
            cells.append(f"{mark}{word}{mark} {size}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def correlation(results, rows: Sequence[str], sets: dict[str, str]) -> str:
    """Whether rows with more TAS are right more often, as models are in the paper's Figure 2: rank correlation.

    A row is one point, the mean of its seeds; the interval is that of a bootstrap of rows.
    """
    lines = []
    for name, title in sets.items():
        points = []
        for row in rows:
            runs = [result["sets"][name] for result in results.get(row, {}).values()]
            known = [(run["tas"], run["accuracy"]) for run in runs if run["tas"] is not None]
            points += [np.mean(known, 0)] if known else []
        points = np.array(points).reshape(-1, 2)
        if len(points) < 4 or not points.std(0).all():
            continue
        generator = np.random.default_rng(0)
        drawn = [points[generator.integers(len(points), size=len(points))] for _ in range(2000)]
        low, high = np.percentile([rank_correlation(sample) for sample in drawn if sample.std(0).all()], [2.5, 97.5])
        word = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        lines.append(f"- {title}: {word}, {rank_correlation(points):+.2f} [{low:+.2f}, {high:+.2f}]")
    return "\n".join(lines)


def mechanism(results, rows: Sequence[str]) -> str:
    """Markdown: by row, what is rewarded at the end, and the most frequent uncertain tokens.

    The tokens are those of seed 0, each with its share of all uncertain tokens and the mean TAS of its own attention.
    """
    rewards = ("attention", "format", "accuracy")
    head = ["row", *(f"{name} reward" for name in rewards), *(f"share of {name}, %" for name in rewards)]
    head += ["uncertain tokens: share, TAS"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        found = results.get(row, {})
        if not found:
            continue
        cells = [f"`{row}`", *(_cell(found, "training", f"reward/{name}", digits=2, scale=1) for name in rewards)]
        first = found[min(found)]
        is_other = any((first["settings"] or {}).get(name) for name in ("region_weight", "memory_weight"))
        shares = [_cell(found, "training", f"advantage_share/{name}", digits=0) for name in rewards]
        cells += ["another reward", "", ""] if is_other else shares
        cells.append(
            ", ".join(f"`{text or ' '}` {100 * share:.0f} %, {score:.2f}" for text, share, score in first["tokens"][:6])
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- as a figure --------------------------------------------------------------------------------------------------


def figure(results, rows: Sequence[str], sets: dict[str, str], outputs: Sequence[Path]) -> None:
    """Accuracy and TAS: means with intervals, seeds as ticks, the base as lines; `fast` rows have their own axes."""
    base, shown = results.get("base", {}), [row for row in rows if results.get(row) and row != "base"]
    blocks = [block for block in (ordinary(shown), [row for row in shown if row not in ordinary(shown)]) if block]
    if not blocks:
        return
    with drawing(outputs, len(blocks), 2, (5.5, 0.6 + 0.32 * max(map(len, blocks)))) as axes:
        for block, pair in zip(blocks, axes, strict=True):
            for axis, metric, title in zip(pair, ("accuracy", "tas"), ("accuracy, %", "TAS, %"), strict=True):
                for place, name in enumerate(sets):
                    color = f"C{place}"
                    if (before := number(base.get(0), "sets", name, metric)) is not None:
                        axis.axvline(100 * before, color=color, linestyle=":", linewidth=1)
                    for line, row in enumerate(block):
                        values = [run["sets"][name][metric] for run in results[row].values()]
                        _draw_row(axis, values, line + 0.22 * (place - 1), color)
                    axis.plot([], [], "o", color=color, markersize=4, label=name)
                axis.set_xlim(max(0, axis.dataLim.x0 - 2), min(100, axis.dataLim.x1 + 2))  # of percent
                counts = [f"{row} ({len(results[row])})" for row in block]
                axis.set_yticks(range(len(block)), counts)
                axis.set_ylim(len(block) - 0.4, -0.6)
                axis.set_xlabel(title)
                axis.grid(alpha=0.3)
        axes[0, 0].legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        axes[0, 1].set_title("dotted: before training; ticks: seeds; bars: 95 % intervals", fontsize=8, loc="left")


def ordinary(rows: Sequence[str]) -> list[str]:
    """The rows that are not trained at the high learning rate."""
    return [row for row in rows if not row.startswith("fast")]


def _draw_row(axis, values: Sequence[float | None], y: float, color: str) -> None:
    known = [100 * value for value in values if value is not None]
    if known:
        mean, half = t_interval(known)
        axis.errorbar(mean, y, xerr=half if half < math.inf else 0, fmt="o", markersize=4, color=color)
        axis.plot(known, [y] * len(known), "|", color=color, markersize=7, alpha=0.6)


def report_grid(folder: Path, rows: Sequence[str], sets: dict[str, str]) -> str:
    """Write FOLDER/table.md and figure.png from FOLDER/runs, and the same tables into RESULTS.md; returns a summary.

    RESULTS.md is the page of the project: it is rewritten between its two markers, where it is in this folder.
    """
    results = read_results(folder / "runs")
    if not results:
        return f"no finished run in {folder / 'runs'}"
    runs = [result for found in results.values() for result in found.values()]
    not_run = [row for row in rows if row not in results]
    later = f" Not run yet: {', '.join(f'`{row}`' for row in not_run)}." if not_run else ""
    made_with = {" ".join(f"{name} {value}" for name, value in sorted(run.get("versions", {}).items())) for run in runs}
    sure, tested = sure_claims(results, CLAIMS + NOT_THE_PAPERS, sets)
    there = [row for row in rows if row in results]
    text = "\n\n".join(
        [
            f"{len(runs)} runs, {sum(run['seconds'] for run in runs) / 3600:.1f} hours on one core each"
            f"{', with ' + ' or '.join(sorted(made_with)) if any(made_with) else ''}.{later}",
            table(results, there, sets),
            "### The paper's claims",
            "A claim holds where the 95 % interval of its difference is above 0, does not hold where that is below 0, "
            f"and is undecided otherwise. Of {tested} comparisons, {SIGNIFICANCE * tested:.0f} would be decided by "
            f"chance alone; the {len(sure)} **in bold** are decided when all are tested together (Holm's method, 5 %).",
            claims_table(results, CLAIMS, sets, sure),
            "Rows with more TAS are right more often (Figure 2, there of models). Rank correlation over the rows "
            "without `fast`, the base among them:",
            correlation(results, ordinary(there), sets),
            "and over all rows:",
            correlation(results, there, sets),
            "### Beyond the paper",
            claims_table(results, NOT_THE_PAPERS, sets, sure),
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
    return f"{len(runs)} runs of {len(results)} rows -> {folder / 'table.md'}, {folder / 'figure.png'}"
