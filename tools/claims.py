"""What the runs of tools.ablate show: a table, a figure, and a verdict on each claim of the paper (arXiv 2602.08241).

Every number is a mean over seeds with its 95 % interval by Student's t. Comparisons are paired by seed: the same seed
sees the same examples in the same order. All runs answer the same examples, so intervals cover other seeds, not other
examples. Comparisons that stay significant under Holm's correction are marked.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from sayo.settings import ConfigError
from sayo.show.plots import drawing
from sayo.show.tables import markdown

SIGNIFICANCE = 0.05  # intervals are of 1 - SIGNIFICANCE
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
    """One run of tools.ablate. Raises ConfigError where the file holds something else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        named = {name: result[name] for name in ("row", "seed", "settings", "max_steps", "seconds", "tokens")}
        training, sets = result["training"].get, result["sets"].values()
        numbers = [training("kl"), *(part[name] for part in sets for name in ("accuracy", "tas", "length", "format"))]
        if not sets or not all(isinstance(value, int | float | None) for value in numbers):
            raise ValueError("numbers are missing")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        found = f"is no result of tools.ablate ({type(error).__name__}: {error})"
        raise ConfigError(f"{str(path)!r} {found}: delete it, and the run is repeated") from error
    return named | {"training": result["training"], "sets": result["sets"], "versions": result.get("versions", {})}


def differences(results: dict[str, dict[int, dict]], claim: Claim, name: str) -> list[float]:
    """Better row minus worse row of a claim on the set `name`, by seed; the base has one run for all seeds."""
    better, worse = results.get(claim.better, {}), results.get(claim.worse, {})
    if claim.worse == "base" and worse:
        worse = dict.fromkeys(better, worse[0])
    elif claim.better == "base" and better:
        better = dict.fromkeys(worse, better[0])
    of_both = ((better[seed]["sets"][name], worse[seed]["sets"][name]) for seed in sorted(better.keys() & worse.keys()))
    pairs = [(first[claim.metric], second[claim.metric]) for first, second in of_both]
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


def _cell(values: list[float | None], digits: int = 1, scale: float = 100) -> str:
    if not values or None in values:
        return "-"
    mean, half = (f"{scale * value:.{digits}f}" for value in t_interval(values))
    return mean if half == "inf" else f"{mean} ± {half}"


def table(results: dict[str, dict[int, dict]], rows: Sequence[str], sets: dict[str, str]) -> str:
    """Markdown: accuracy and TAS in percent and length on every set, then format on the first, and KL in training."""
    scales = {"accuracy": 100, "TAS": 100, "length": 1}
    head, lines = ["row", "seeds", *(f"{title}, {name}" for title in scales for name in sets), "format", "KL"], []
    for row in rows:
        runs = results[row].values()
        lines.append([f"`{row}`", str(len(runs))])
        for title, scale in scales.items():
            lines[-1] += [_cell([run["sets"][name][title.lower()] for run in runs], scale=scale) for name in sets]
        lines[-1].append(_cell([run["sets"][next(iter(sets))]["format"] for run in runs]))
        lines[-1].append(_cell([run["training"].get("kl") for run in runs], digits=3, scale=1))
    return markdown(head, lines)


def sure_claims(results, claims: Sequence[Claim], sets: dict[str, str]) -> tuple[set, int]:
    """({(claim, set)} that are significant when all claims on all sets are tested together, number of tests)."""
    found = {(claim, name): differences(results, claim, name) for claim in claims for name in sets}
    tested = {key: p_value(values) for key, values in found.items() if len(values) > 1}
    return holm(tested), len(tested)


def claims_table(results, claims: Sequence[Claim], sets: dict[str, str], sure: set) -> str:
    """Markdown: each claim, its verdict on every set and the difference; bold where it is in `sure`."""
    lines = []
    for claim in claims:
        metric = {"accuracy": "", "tas": " (TAS)", "length": " (tokens)"}[claim.metric]
        cells = [claim.text, claim.paper or "-", f"`{claim.better}` − `{claim.worse}`{metric}"]
        for name in sets:
            word, size = verdict(differences(results, claim, name), 1 if claim.metric == "length" else 100)
            mark = "**" if (claim, name) in sure else ""
            cells.append(f"{mark}{word}{mark} {size}")
        lines.append(cells)
    return markdown(["claim", "paper, %", "rows", *sets], lines)


def correlation(results, rows: Sequence[str], sets: dict[str, str]) -> str:
    """Spearman's correlation of TAS and accuracy over rows (means of seeds), with its bootstrap interval over rows.

    The paper's Figure 2 shows the same over models.
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
        found = [stats.spearmanr(sample).statistic for sample in drawn if sample.std(0).all()]
        low, high = np.percentile(found, [2.5, 97.5])
        word = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        lines.append(f"- {title}: {word}, {stats.spearmanr(points).statistic:+.2f} [{low:+.2f}, {high:+.2f}]")
    return "\n".join(lines)


def mechanism(results, rows: Sequence[str]) -> str:
    """Markdown: by row, the rewards at the end of training, and the most frequent uncertain tokens of the first seed.

    Each token has its share of all uncertain tokens and the mean TAS of its own attention.
    """
    rewards, lines = ("attention", "format", "accuracy"), []
    head = ["row", *(f"{name} reward" for name in rewards), *(f"share of {name}, %" for name in rewards)]
    for row in rows:
        training, first = [run["training"] for run in results[row].values()], results[row][min(results[row])]
        shares = [_cell([run.get(f"advantage_share/{name}") for run in training], digits=0) for name in rewards]
        if any((first["settings"] or {}).get(name) for name in ("region_weight", "memory_weight")):
            shares = ["another reward", "", ""]
        tokens = [f"`{text or ' '}` {100 * share:.0f} %, {score:.2f}" for text, share, score in first["tokens"][:6]]
        totals = [_cell([run.get(f"reward/{name}") for run in training], digits=2, scale=1) for name in rewards]
        lines.append([f"`{row}`", *totals, *shares, ", ".join(tokens)])
    return markdown([*head, "uncertain tokens: share, TAS"], lines)


def figure(results, rows: Sequence[str], sets: dict[str, str], output: Path) -> None:
    """Accuracy and TAS: means with intervals, seeds as ticks, the base as lines; `fast` rows have their own axes."""
    slow, fast = ordinary(rows), [row for row in rows if row not in ordinary(rows)]
    blocks = [block for block in ([row for row in slow if row != "base"], fast) if block]
    if not blocks:
        return
    with drawing(output, len(blocks), 2, (5.5, 0.6 + 0.32 * max(map(len, blocks)))) as axes:
        for block, pair in zip(blocks, axes, strict=True):
            for axis, metric, title in zip(pair, ("accuracy", "tas"), ("accuracy, %", "TAS, %"), strict=True):
                for place, name in enumerate(sets):
                    color = f"C{place}"
                    for run in results.get("base", {}).values():
                        if (before := run["sets"][name][metric]) is not None:
                            axis.axvline(100 * before, color=color, linestyle=":", linewidth=1)
                    for line, row in enumerate(block):
                        values = [run["sets"][name][metric] for run in results[row].values()]
                        known, y = [100 * value for value in values if value is not None], line + 0.22 * (place - 1)
                        if known:
                            mean, half = t_interval(known)
                            error = half if half < math.inf else 0
                            axis.errorbar(mean, y, xerr=error, fmt="o", markersize=4, color=color)
                            axis.plot(known, [y] * len(known), "|", color=color, markersize=7, alpha=0.6)
                    axis.plot([], [], "o", color=color, markersize=4, label=name)
                axis.set_xlim(max(0, axis.dataLim.x0 - 2), min(100, axis.dataLim.x1 + 2))  # of percent
                axis.set_yticks(range(len(block)), [f"{row} ({len(results[row])})" for row in block])
                axis.set(ylim=(len(block) - 0.4, -0.6), xlabel=title)
                axis.grid(alpha=0.3)
        axes[0, 0].legend(fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
        axes[0, 1].set_title("dotted: before training; ticks: seeds; bars: 95 % intervals", fontsize=8, loc="left")


def ordinary(rows: Sequence[str]) -> list[str]:
    """All rows but those that are trained at the high learning rate."""
    return [row for row in rows if not row.startswith("fast")]


def report_grid(folder: Path, rows: Sequence[str], sets: dict[str, str]) -> str:
    """Write FOLDER/table.md and figure.png from FOLDER/runs, and return a one-line summary.

    For docs/ablation, also rewrite the tables between the two markers of docs/results.md, if that file exists.
    """
    runs, results = [read_result(path) for path in sorted((folder / "runs").glob("*.json"))], {}
    for run in runs:
        results.setdefault(run["row"], {})[run["seed"]] = run
    if not runs:
        return f"no finished run in {folder / 'runs'}"
    there, missing = [row for row in rows if row in results], [f"`{row}`" for row in rows if row not in results]
    later = f" Not run yet: {', '.join(missing)}." if missing else ""
    versions = {" ".join(f"{name} {value}" for name, value in sorted(run["versions"].items())) for run in runs} - {""}
    made_with = f", with {' or '.join(sorted(versions))}" if versions else ""
    hours = sum(run["seconds"] for run in runs) / 3600
    sure, tested = sure_claims(results, CLAIMS + NOT_THE_PAPERS, sets)
    text = "\n\n".join(
        [
            f"{len(runs)} runs, {hours:.1f} hours on one core each{made_with}.{later}",
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
            mechanism(results, there),
        ]
    )
    (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    figure(results, there, sets, folder / "figure.png")
    page = Path("docs/results.md")
    if page.exists() and folder.resolve() == Path("docs/ablation").resolve():
        before, _, rest = page.read_text(encoding="utf-8").partition(MARKERS[0])
        _, end, after = rest.partition(MARKERS[1])
        if end:
            page.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}", encoding="utf-8")
    return f"{len(runs)} runs of {len(results)} rows -> {folder / 'table.md'}, {folder / 'figure.png'}"


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval: infinite for a single value, 0 where nothing varies.

    Example: (1.0, 2.0, 3.0) gives 2.0 and 4.303 / sqrt(3) = 2.484.
    """
    known = len(values) > 1
    half = stats.t.ppf(1 - SIGNIFICANCE / 2, len(values) - 1) * stats.sem(values) if known else math.inf
    return float(np.mean(values)), float(half)


def p_value(values: Sequence[float]) -> float:
    """Two-sided p-value of a t-test that the mean is 0; 1 for fewer than two values."""
    if len(values) < 2 or not any(values):
        return 1.0
    error = stats.sem(values)
    return float(2 * stats.t.sf(abs(np.mean(values)) / error, len(values) - 1)) if error else 0.0


def holm(p_values: dict) -> set:
    """Keys whose p-values are significant when all are tested together, by Holm's step-down method (1979)."""
    sure = set()
    for place, (key, value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        if value > SIGNIFICANCE / (len(p_values) - place):
            break
        sure.add(key)
    return sure
