"""The paper's claims in miniature: a grid of settings x seeds through train_rl.py and evaluate.py, on the scenes.

    python -m tools.ablate                          # the missing runs, two at a time; then table and figure
    python -m tools.ablate --only attention full    # some rows of the grid
    python -m tools.ablate --report                 # table, figure and claims again, from the JSON files alone

Every run trains as train_rl.main does, then answers examples of three sets greedily. A finished run is one JSON file in
OUTPUT_DIR/runs and is not repeated; a stopped one resumes from its last checkpoint. Rows are measured alike: TAS of the
last layer, whatever the row was rewarded for.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from reward import COMPONENTS
from sayo.examples.scenes.scenes import DEFAULT_SIZES
from sayo.run.files import write_whole
from sayo.settings import ConfigError, Settings, option, read_jsonl, run_command
from tools.claims import read_result, report_grid

ROOT = Path(__file__).parents[1]
ATTENTION = {"accuracy_weight": 0.0}  # attention + format, the paper's main model
FAST = {"learning_rate": 1e-3}  # where attention + format is gamed
# {row: settings that differ from train_rl.py's defaults, or None for the policy before training}
GRID: dict[str, dict | None] = {
    "base": None,
    "attention": ATTENTION,
    "accuracy": {"attention_weight": 0.0},
    "full": {},
    "top-20": ATTENTION | {"top_fraction": 0.2},
    "top-40": ATTENTION | {"top_fraction": 0.4},
    "top-100": ATTENTION | {"top_fraction": 1.0},
    "random-30": ATTENTION | {"attention_tokens": "random"},
    "layer-0": ATTENTION | {"attention_layers": [0]},
    "layer-2": ATTENTION | {"attention_layers": [2]},
    "layers-all": ATTENTION | {"attention_layers": [0, 1, 2, 3]},
    "predictor": ATTENTION | {"attention_query": "predictor"},
    "beta-0": ATTENTION | {"beta": 0.0},
    "beta-1e-2": ATTENTION | {"beta": 1e-2},
    "lr-5e-5": ATTENTION | {"learning_rate": 5e-5},
    "accuracy-lr-5e-5": {"attention_weight": 0.0, "learning_rate": 5e-5},
    "fast": ATTENTION | FAST,
    "fast-gate": ATTENTION | FAST | {"attention_gate": True},
    "fast-border": ATTENTION | FAST | {"border_mask": True},
    "fast-kl-target": ATTENTION | FAST | {"kl_target": 0.05},
    "fast-accuracy": {"attention_weight": 0.0} | FAST,
    "fast-full": FAST,
    "fast-full-normalized": FAST | {"attention_normalized": True},
    "region": {"attention_weight": 0.0, "accuracy_weight": 0.0, "region_weight": 1.0},
    "memory": {"attention_weight": 0.0, "accuracy_weight": 0.0, "memory_weight": 1.0},
    "ease": {"attention_weight": 0.0, "ease_weight": 1e-3},
    "no-boxes": ATTENTION | {"regions": "attention"},
}
SETS = {
    "validation": "same distribution",
    "heldout": "held-out combinations of attributes",
    "newtype": "a question type never trained on",
}
LOGGED = ("kl", "entropy", "completion_length", "reward/tas", "reward/attention", "reward/format", "reward/accuracy")
LOGGED += tuple(f"advantage_share/{name}" for name in COMPONENTS)
LAST_STEPS = 10  # training figures are means over the last steps
TOKENS_OF = 200  # examples whose scored tokens are counted
NUM_TOKENS = 12  # the most frequent ones that are stored


@dataclass
class AblateConfig(Settings):
    """Run the missing runs of a grid of settings and seeds, then write its table, figure and claims."""

    output_dir: str = option("docs/ablation", "Folder of the finished runs' JSON files, the table and the figure.")
    work_dir: str = option("runs/ablation", "Folder of checkpoints and logs; delete it when the grid is done.")
    only: list[str] | None = option(None, "Rows of the grid: some of tools.ablate.GRID. All by default.")
    seeds: int = option(5, "Seeds of each row, 0 and up; the base has one, since nothing of it is random.", at_least=1)
    max_steps: int = option(100, "Optimizer steps of each run.", at_least=1)
    limit: int = option(1000, "Examples of each set.", at_least=1, at_most=min(map(DEFAULT_SIZES.get, SETS)))
    processes: int = option(2, "Runs at a time, one thread each.", at_least=1)
    report: bool = option(False, "Only write table, figure and claims, from the finished runs.")
    run: str | None = option(None, "Do this one run in this process: row/seed, such as attention/3.")

    def problems(self) -> list[str]:
        found, known = super().problems(), ", ".join(GRID)
        found += [f"only={name!r}: rows of the grid are {known}" for name in self.only or () if name not in GRID]
        name, _, seed = (self.run or "base/0").partition("/")
        if name not in GRID or not seed.isdecimal():
            found.append(f"run={self.run!r}: give row/seed, such as attention/0; rows are {known}")
        return found

    def runs(self) -> list[tuple[str, int]]:
        """Every (row, seed), seed by seed, so that an unfinished grid already compares all rows."""
        rows = [name for name in GRID if name in (self.only or GRID)]
        return [(name, seed) for seed in range(self.seeds) for name in rows if GRID[name] is not None or seed == 0]

    def result(self, name: str, seed: int) -> Path:
        return Path(self.output_dir) / "runs" / f"{name}-{seed}.json"

    def log(self, name: str, seed: int) -> Path:
        return Path(self.work_dir) / f"{name}-{seed}.log"


def train(name: str, seed: int, config: AblateConfig) -> tuple[str, dict, float]:
    """(adapter, training figures, seconds of all steps) of a run; trains it or resumes it if it is not finished.

    Figures are means over the last steps, and curves of every tenth step.
    """
    import train_rl

    folder = Path(config.work_dir) / f"{name}-{seed}"
    settings = GRID[name] | {"seed": seed, "max_steps": config.max_steps, "output_dir": str(folder)}
    settings |= {"eval_data": "none", "report_to": "none", "try_biggest": False}
    train_rl.main(train_rl.Config(**settings, resume=True))
    rows = [row for _, row in read_jsonl(folder / "metrics.jsonl")]
    figures = {}
    for metric in LOGGED:
        values = [row[metric] for row in rows[-LAST_STEPS:] if row.get(metric) is not None]
        figures[metric] = round(sum(values) / len(values), 5) if values else None
    every = [row for row in rows if row["step"] % 10 == 0 or row["step"] == 1]
    figures["curves"] = {metric: [_rounded(row.get(metric)) for row in every] for metric in ("step", *LOGGED)}
    times = (row[metric] for row in rows for metric in row if re.fullmatch("time/.*_seconds", metric))
    return str(folder / "adapter"), figures, sum(times)


def evaluate_sets(adapter: str | None, limit: int) -> tuple[dict, list]:
    """({set: {metric: mean}}, the most frequent scored tokens as [text, share of all, mean TAS]) of a policy."""
    from evaluate import METRICS, EvaluateConfig, answer_examples, evaluate_policy
    from reward import target_attention_score
    from sayo.examples.load import load_examples
    from sayo.model.loading import load_policy
    from sayo.show.tables import summarize

    config = EvaluateConfig(adapter=adapter)
    model, processor = load_policy(**config.policy_arguments(lora_rank=0))
    model.requires_grad_(False)
    found = {}
    for name in SETS:
        examples = load_examples(f"scenes:{name}", **config.data_arguments() | {"limit": limit}, require_boxes=False)
        rows = evaluate_policy(model, processor, examples, config, description=name)
        summary = summarize(rows)
        found[name] = {metric: _rounded(summary[metric][0]) for metric in METRICS} | {"examples": len(rows)}
    examples = load_examples("scenes:validation", **config.data_arguments() | {"limit": min(limit, TOKENS_OF)})
    counts, scores = Counter(), {}
    for answer in answer_examples(model, processor, examples, config, "tokens"):
        for at in answer.scored:
            text = answer.tokens[at].strip()
            counts[text] += 1
            target, image = answer.target_attention[at : at + 1], answer.image_attention[at : at + 1]
            scores.setdefault(text, []).append(target_attention_score(target, image))
    frequent, total = counts.most_common(NUM_TOKENS), counts.total()
    return found, [[text, round(n / total, 4), round(sum(scores[text]) / n, 4)] for text, n in frequent]


def do_run(name: str, seed: int, config: AblateConfig) -> None:
    """Train and evaluate one run, and write its JSON file."""
    adapter, figures, seconds = (None, {}, 0.0) if GRID[name] is None else train(name, seed, config)
    begin = time.time()
    sets, tokens = evaluate_sets(adapter, config.limit)
    result = {"row": name, "seed": seed, "settings": GRID[name], "max_steps": config.max_steps if adapter else 0}
    result |= {"seconds": round(seconds + time.time() - begin), "training": figures, "sets": sets, "tokens": tokens}
    result["versions"] = {package: version(package) for package in ("torch", "transformers", "peft")}
    path = config.result(name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    write_whole(path, "{" + ",\n ".join(lines) + "}\n")


def _rounded(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, 5)


def start_run(name: str, seed: int, config: AblateConfig) -> subprocess.Popen:
    """Begin one run in a child process with one thread. Raises OSError where its log cannot be written."""
    command = [sys.executable, "-m", "tools.ablate", "--run", f"{name}/{seed}", "--output_dir", config.output_dir]
    command += ["--work_dir", config.work_dir, "--max_steps", str(config.max_steps), "--limit", str(config.limit)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    with config.log(name, seed).open("a", encoding="utf-8") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def check_finished(runs: list[tuple[str, int]], config: AblateConfig) -> None:
    """Raises ConfigError that names all finished runs with other settings."""
    found = []
    for path, name in ((config.result(name, seed), name) for name, seed in runs):
        if not path.exists():
            continue
        result = read_result(path)
        sizes = {part["examples"] for part in result["sets"].values()}
        steps = config.max_steps if GRID[name] is not None else 0
        if (result["settings"], result["max_steps"], sizes) != (GRID[name], steps, {config.limit}):
            made = f"max_steps={result['max_steps']}, limit={min(sizes)}, settings {result['settings']}"
            found.append(f"{path} is of {made}: give those, or another output_dir and work_dir, or delete it")
    if found:
        raise ConfigError("\n".join(found))


def run_missing(missing: list[tuple[str, int]], done: int, config: AblateConfig) -> list[str]:
    """Do runs in child processes, config.processes at a time; returns a message for each that failed.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; the child processes are terminated, and save a checkpoint first.
    """
    waiting, at_work, failed, stopped = list(missing), {}, [], []
    heeded = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    # A handler that raises could do so while a child is being started, and nobody would terminate that one.
    former = {number: signal.signal(number, lambda *_: stopped.append(True)) for number in heeded}
    try:
        with tqdm(total=done + len(missing), initial=done, desc="grid", unit="run") as progress:
            while (waiting or at_work) and not stopped:
                ended = {}  # {run: what went wrong, or None}
                while waiting and len(at_work) < config.processes:
                    run = waiting.pop(0)
                    try:
                        at_work[run] = start_run(*run, config)
                    except OSError as error:  # such as a full disk; go on with the other runs
                        ended[run] = f"could not be started: {error}"
                for run in [run for run, process in at_work.items() if process.poll() is not None]:
                    code = at_work.pop(run).returncode
                    ended[run] = f"ended with exit code {code}: see {config.log(*run)}" if code else None
                for (name, seed), problem in ended.items():
                    if problem:
                        failed.append(f"{name}/{seed} {problem}")
                        progress.write(failed[-1])
                    progress.set_postfix_str(f"{name}/{seed}", refresh=False)
                    progress.update()
                time.sleep(0.1)
    finally:  # whatever happened, leave no child process behind
        for number, handler in former.items():
            signal.signal(number, handler)
        for process in at_work.values():
            process.terminate()
        for process in at_work.values():
            process.wait()
    if stopped:
        raise KeyboardInterrupt
    return failed


def main(config: AblateConfig) -> None:
    if config.run:
        name, seed = config.run.split("/")
        do_run(name, int(seed), config)
        return
    failed = []
    for name in ("output_dir", "work_dir"):
        try:
            Path(getattr(config, name)).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{name}={getattr(config, name)!r}: give a folder that can be made ({error})") from error
    if not config.report:
        check_finished(runs := config.runs(), config)
        missing = [run for run in runs if not config.result(*run).exists()]
        failed = run_missing(missing, len(runs) - len(missing), config)
    print(report_grid(Path(config.output_dir), list(GRID), SETS))
    if failed:
        raise ConfigError("\n".join([*failed, "the same command runs what is missing"]))


if __name__ == "__main__":
    run_command(AblateConfig, main)
