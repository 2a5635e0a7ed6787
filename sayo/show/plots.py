"""The paper's analyses as plots: TAS against accuracy, attention over the generation and against entropy, curves.

From SAYO (arXiv 2602.08241), figures 2, 4 and 9. visualize.py --plots writes them; a run draws its curves.png with
plot_curves. Colors are Okabe and Ito's, safe for any color vision, and lines differ in shape, too. A point that is a
mean of several has its 95 % bootstrap interval.
"""

import json
import math
import sys
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np

from sayo.settings import ConfigError, read_jsonl
from sayo.show.tables import bootstrap_interval

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (1, 3)), (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX"
LOWEST_ENTROPY = 1e-4  # nats; less is drawn there, on an axis without a zero
RESAMPLES = 2000  # of an interval in a plot, where nobody sees the third digit
_interval = partial(bootstrap_interval, resamples=RESAMPLES)
PANELS = {  # {}: each reward component
    "Rewards": ("reward/{}",),
    "Target Attention Score": ("reward/tas", "reward/tas_selected"),
    "Share of the advantage": ("advantage_share/{}",),
    "KL to the base (nats)": ("kl",),
    "Completion length (tokens)": ("completion_length",),
    "Entropy (nats)": ("entropy",),
}


def both(stem: Path) -> list[Path]:
    """The two files of a plot: PNG and SVG."""
    return [Path(f"{stem}.png"), Path(f"{stem}.svg")]


@contextmanager
def drawing(outputs: Path | Sequence[Path], rows: int, columns: int, size: tuple[float, float], pictures: bool = False):
    """Axes (rows, columns) of `size` in inches each, saved at the end of the block to every output.

    Same data, same bytes. Text is never read as math. For `pictures`, axes have no ticks and margins are cut off.
    """
    import matplotlib  # slow: not when a script is imported

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    settings = {"text.parse_math": False, "svg.hashsalt": "sayo", "svg.fonttype": "none"}
    settings |= {"axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(settings):
        shape = size[0] * columns, size[1] * rows
        figure, axes = plt.subplots(rows, columns, figsize=shape, layout="constrained", squeeze=False)
        for axis in axes.flat if pictures else ():
            axis.axis("off")
        yield axes
        _use_fonts(figure)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # said above
            for output in [outputs] if isinstance(outputs, str | Path) else outputs:
                dateless = {"metadata": {"Date": None}} if Path(output).suffix.lower() == ".svg" else {}
                figure.savefig(output, dpi=110, bbox_inches="tight" if pictures else None, **dateless)
        plt.close(figure)


def _use_fonts(figure) -> None:
    """Let letters that the font lacks be drawn with installed fonts that have them; names those that none has."""
    from matplotlib import font_manager  # slow: not when a script is imported
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    missing = {letter for text in texts for letter in text.get_text() if letter.isprintable() and letter > "~"}
    own, families = font_manager.findfont(font_manager.FontProperties()), []
    plain = [entry for entry in font_manager.fontManager.ttflist if entry.style == "normal" and entry.weight == 400]
    candidates = sorted((entry.name != "DejaVu Sans", entry.name, entry.fname) for entry in plain)
    for _, name, path in candidates if missing else ():
        font = font_manager.get_font(path)  # bitmap fonts of emoji cannot be drawn; the last resort has only boxes
        found = missing & set(map(chr, font.get_charmap())) if font.scalable and "Last" not in name else set()
        families += [name] if found and path != own else []
        missing -= found
    for text in texts if families else ():
        text.set_fontfamily([*text.get_fontfamily(), *families])
    if missing:
        shown = "".join(sorted(missing)[:20])
        fix = "boxes stand for them; install a font that has them, such as Noto Sans CJK"
        print(f"no installed font has the {len(missing)} letters {shown}: {fix}", file=sys.stderr)


def _smooth(values: Sequence[float], weight: float = 0.9) -> np.ndarray:
    """Exponential moving average, corrected for its start."""
    from scipy.signal import lfilter  # slow: not when a script is imported

    return lfilter([1 - weight], [1, -weight], values) / (1 - weight ** np.arange(1, len(values) + 1))


def run_names(paths: Sequence[Path]) -> list[str]:
    """Short names of runs: their folders, with as many parent folders as it takes to tell them apart."""
    parts = [Path(path).absolute().parent.parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return names


def reward_components(rows: Sequence[dict]) -> list[str]:
    """Components that were rewarded, in the order of the metrics; accuracy always.

    One that varied, but never had a share of the advantages, has no weight. One that never varied, such as a format
    that is always right, may have a weight, and is shown.
    """
    known = dict.fromkeys(name for row in rows for name in row)
    every = {name: [row[name] for row in rows if row.get(name) is not None] for name in known}
    names = [name.partition("/")[2] for name in every if name.startswith("advantage_share/")]
    constant = {name for name in names if max(every.get(f"reward_std/{name}") or [1]) < 1e-3}  # rounding is below
    return [name for name in names if any(every[f"advantage_share/{name}"]) or name in constant | {"accuracy"}]


def plot_curves(metrics: str | Path | Sequence[str | Path], output: Path | Sequence[Path]) -> None:
    """Draw the metrics of one run or several, one panel per question; every step faintly, and smoothed.

    For one run, colors tell metrics apart; for several, colors are runs and line styles metrics. Runs without rows are
    left out; without any rows, nothing is drawn.
    """
    paths = [metrics] if isinstance(metrics, str | Path) else metrics
    runs = dict(zip(run_names(paths), ([row for _, row in read_jsonl(path)] for path in paths), strict=True))
    runs = {name: rows for name, rows in runs.items() if rows}
    if not runs:
        return
    from matplotlib.lines import Line2D

    components = reward_components([row for rows in runs.values() for row in rows]) or ["accuracy"]
    with drawing(output, 2, 3, (4.4, 3.3)) as axes:
        for axis, (title, patterns) in zip(axes.flat, PANELS.items(), strict=True):
            names = dict.fromkeys(pattern.format(component) for pattern in patterns for component in components)
            shown = {}  # a sample of each metric's line, for the legend
            for place, rows in enumerate(runs.values()):
                for number, name in enumerate(names):
                    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
                    if not points:
                        continue
                    steps, values = zip(*points, strict=True)
                    color = COLORS[(number if len(runs) == 1 else place) % len(COLORS)]
                    style = {"color": color, "linestyle": STYLES[number % len(STYLES)]}
                    axis.plot(steps, values, color=color, alpha=0.2, linewidth=1)
                    axis.plot(steps, _smooth(values), **style)
                    shown[name.split("/")[-1]] = Line2D([], [], **style | ({"color": "gray"} if len(runs) > 1 else {}))
            axis.set_title(title)
            axis.set_xlabel("step")
            if len(shown) > 1:
                axis.legend(shown.values(), shown.keys(), fontsize=8)
        if len(runs) > 1:
            lines = [Line2D([], [], color=COLORS[place % len(COLORS)]) for place in range(len(runs))]
            axes[0, 0].figure.legend(lines, runs.keys(), loc="outside lower center", ncols=min(6, len(runs)))


def read_evaluations(paths: Sequence[str | Path]) -> dict[str, dict[str, list[dict]]]:
    """Rows by evaluation (of each benchmark, where a file has several) and policy ("base", "adapter").

    Raises ConfigError for a file that is not what evaluate.py --json writes.
    """
    found = {}
    for path in paths:
        name = Path(path).stem
        name = str(path) if any(other.split(": ")[0] == name for other in found) else name
        try:
            rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
            nested = all(isinstance(own, dict) for own in rows.values())
            parts = {f"{name}: {benchmark}": own for benchmark, own in rows.items()} if nested else {name: rows}
            every = [row for columns in parts.values() for own in columns.values() for row in own]
            usable = rows and all({"tas", "accuracy"} <= row.keys() for row in every)
        except (ValueError, KeyError, TypeError, AttributeError):
            usable = False
        if not usable:
            raise ConfigError(
                f"evaluations={str(path)!r} has no rows with tas and accuracy: give what evaluate.py --json wrote"
            )
        found |= parts
    return found


def plot_tas_accuracy(evaluations: dict[str, dict[str, list[dict]]], outputs, num_bins: int = 5) -> None:
    """Left: every policy at its mean TAS and accuracy, an arrow from base to adapter. Right: within each, by TAS.

    Examples without a region have no TAS and are left out. The right side cuts each policy's examples into num_bins
    bins of equal size.
    """
    with drawing(outputs, 1, 2, (5.6, 4.2)) as (axes,):
        styles = zip(cycle(COLORS), cycle(MARKERS), strict=False)
        for name, columns in evaluations.items():
            places = []
            for column, rows in columns.items():
                pairs = [(row["tas"], row["accuracy"]) for row in rows]
                pairs = np.array([pair for pair in pairs if None not in pair and not any(map(math.isnan, pair))])
                if not len(pairs):
                    continue
                color, marker = next(styles)
                label = (f"{name}: " if len(evaluations) > 1 else "") + f"{column} (n = {len(pairs)})"
                style = {"capsize": 3, "color": color, "marker": marker, "label": label}
                point, low, high = np.array([_interval(values) for values in pairs.T]).T  # (2,) each
                x_error, y_error = np.array([point - low, high - point]).T[:, :, None]  # (2, 1) each
                axes[0].errorbar(*point, xerr=x_error, yerr=y_error, linestyle="none", **style)
                places.append(point)
                order = pairs[pairs[:, 0].argsort(kind="stable")]
                bins = [part for part in np.array_split(order, num_bins) if len(part)]
                x = [part[:, 0].mean() for part in bins]
                y = np.array([_interval(part[:, 1]) for part in bins])  # (bins, 3)
                errors = [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]]
                axes[1].errorbar(x, y[:, 0], yerr=errors, **style)
            for start, end in zip(places, places[1:], strict=False):
                arrow = {"arrowstyle": "->", "color": "gray", "shrinkA": 8, "shrinkB": 8}
                axes[0].annotate("", end, start, arrowprops=arrow)
        axes[0].set_title("Each policy", fontsize=11)
        axes[1].set_title(f"Within a policy: {num_bins} equal bins of examples by TAS", fontsize=11)
        for axis in axes:
            axis.set_xlabel("Target Attention Score (0.5: no preference)")
            axis.set_ylabel("accuracy (share of answers)")
            axis.axvline(0.5, color="gray", linewidth=0.8, linestyle=":")
        axes[1].set_xlim(0, 1)
        axes[1].set_ylim(-0.03, 1.03)
        axes[0].legend(fontsize=9)


def bin_means(places: Sequence[np.ndarray], values: Sequence[np.ndarray], edges: np.ndarray) -> list[np.ndarray]:
    """For each bin, the mean of each completion's tokens in it, where it has any.

    Tokens of one completion are not independent, so intervals are over completions. places and values are (n,) for
    each completion, edges (bins + 1,); the last edge belongs to the last bin.
    """
    means = [[] for _ in edges[1:]]
    for place, value in zip(places, values, strict=True):
        which = (np.searchsorted(edges, place, side="right") - 1).clip(0, len(means) - 1)
        for number in np.unique(which):
            means[number].append(value[which == number].mean())
    return [np.array(own) for own in means]


def _with_region(answers: Sequence) -> list:
    return [answer for answer in answers if len(answer.tokens) and answer.coverage.sum() > 0]


def _plot_binned(axis, centers, groups: Sequence[np.ndarray], shape: str, **style) -> None:
    """A line of means with a band for their intervals; empty bins are left out."""
    points = [(center, *_interval(own)) for center, own in zip(centers, groups, strict=True) if len(own)]
    if points:
        x, mean, low, high = zip(*points, strict=True)
        (line,) = axis.plot(x, mean, shape, markersize=4, **style)
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.18, linewidth=0)


def _plain_log(axis) -> None:
    """A logarithmic axis whose ticks are 1, 2, 5, 10, ... in plain digits."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _plot_target_and_image(answers, outputs, places_of, edges, centers, label: str, log_places: bool = False) -> None:
    """One panel per policy: mean attention on target and on image tokens, in percent, by bins of something."""
    with drawing(outputs, 1, len(answers), (5.2, 4.0)) as (axes,):
        for axis, (name, own) in zip(axes, answers.items(), strict=True):
            own = _with_region(own)
            places = [places_of(answer) for answer in own]
            parts = ("target", "target", COLORS[1], "o-"), ("image", "whole image", COLORS[0], "s--")
            for part, words, color, shape in parts:
                values = [100 * getattr(answer, f"{part}_attention").numpy() for answer in own]
                groups = bin_means(places, values, edges)
                _plot_binned(axis, centers, groups, shape, color=color, label=f"on each token of the {words}")
            axis.set_title(f"{name} ({len(own)} completions)", fontsize=11)
            axis.set_xlabel(label)
            axis.set_ylabel("mean attention (%, log scale)")
            axis.set_yscale("log")
            _plain_log(axis.yaxis)
            if log_places:
                axis.set_xscale("log")
                _plain_log(axis.xaxis)
                axis.xaxis.get_major_locator().set_params(subs=(1,))
            axis.legend(fontsize=9)
        lows, highs = zip(*(axis.get_ylim() for axis in axes), strict=True)
        for axis in axes:
            axis.set_ylim(min(lows), max(highs))


def plot_generation(answers: dict[str, list], outputs, num_bins: int = 10) -> None:
    """Attention on target and image tokens by relative position in the completion, for each policy."""
    edges = np.linspace(0, 1, num_bins + 1)

    def places(answer):
        return (np.arange(len(answer.tokens)) + 0.5) / len(answer.tokens)

    label = "place in the completion (0: begin, 1: end)"
    _plot_target_and_image(answers, outputs, places, edges, (edges[1:] + edges[:-1]) / 2, label)


def plot_entropy(answers: dict[str, list], outputs, num_bins: int = 8) -> None:
    """Attention on target and image tokens by a token's entropy, in bins of equally many tokens of all policies."""

    def places(answer):
        return answer.entropies.numpy().clip(min=LOWEST_ENTROPY)

    pooled = [places(answer) for own in answers.values() for answer in _with_region(own)]
    pooled = np.concatenate(pooled or [np.ones(1)])
    edges = np.unique(np.quantile(pooled, np.linspace(0, 1, num_bins + 1)))
    if len(edges) == 1:
        edges = np.array([edges[0], edges[0] + 1])
    centers = [np.exp(own.mean()) for own in bin_means([pooled], [np.log(pooled)], edges)]
    label = f"entropy of the token (nats, log scale, at least {LOWEST_ENTROPY:g})"
    _plot_target_and_image(answers, outputs, places, edges, centers, label, log_places=True)
