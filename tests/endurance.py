"""A long run: does memory stay flat, do steps stay as fast, how fast do the logs grow?

    OMP_NUM_THREADS=1 python tests/endurance.py --steps 2000 --output_dir runs/endurance

Trains the embedded policy on the scenes with small groups, through train_rl.main and all that it writes. Memory is
the process's resident set after each step, with the garbage collector left to itself; time is processor time, which
other programs on the machine disturb least, for each token that went through the update. Exit code 1 where memory
grows by more than 5 % from the second tenth of the run to the last, or steps become more than 10 % slower.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_rl

SETTINGS = {"num_generations": 4, "groups_per_step": 2, "save_steps": 100, "save_total_limit": 3, "eval_data": "none"}


def watch(rows: list[tuple[float, float, float]]):
    """train_step that also notes (MB in memory, processor seconds, tokens of the update) in rows."""
    step, process = train_rl.train_step, psutil.Process()

    def watched(*arguments):
        begin = time.process_time()
        metrics, sample = step(*arguments)
        tokens = metrics["time/update_tokens_per_second"] * metrics["time/update_seconds"]
        rows.append((process.memory_info().rss / 1e6, time.process_time() - begin, tokens))
        return metrics, sample

    return watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output_dir", default="runs/endurance")
    arguments = parser.parse_args()
    folder, rows = Path(arguments.output_dir), []
    shutil.rmtree(folder, ignore_errors=True)
    train_rl.train_step = watch(rows)
    train_rl.main(train_rl.Config(**SETTINGS, max_steps=arguments.steps, output_dir=str(folder)))

    memory, seconds, tokens = np.array(rows).T  # (steps,) each
    tenth = max(1, len(rows) // 10)
    slope = np.polyfit(np.arange(len(rows) - tenth), memory[tenth:], 1)[0]
    parts = {"second tenth": slice(tenth, 2 * tenth), "last tenth": slice(-tenth, None)}
    found = {"steps": len(rows), "memory slope, kB a step": round(1000 * slope, 3)}
    for name, part in parts.items():
        found[f"memory, MB, {name}"] = round(float(np.median(memory[part])), 1)
        found[f"processor seconds a step, median, {name}"] = round(float(np.median(seconds[part])), 4)
        found[f"microseconds a token, median, {name}"] = round(1e6 * float(np.median(seconds[part] / tokens[part])), 1)
        found[f"slowest step, seconds, {name}"] = round(float(seconds[part].max()), 3)
    for path in sorted(path for path in folder.glob("*") if path.is_file()):
        found[f"bytes a step, {path.name}"] = round(path.stat().st_size / len(rows), 1)
    checkpoints = list((folder / "checkpoints").iterdir())
    found["checkpoints kept"] = len(checkpoints)
    found["megabytes in all"] = round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6, 1)
    lengths = [len(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found["bytes of a row of metrics.jsonl, first and last"] = lengths[0], lengths[-1]
    (folder / "endurance.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    for name, value in found.items():
        print(f"{name:52} {value}")

    names = [f"memory, MB, {name}" for name in parts], [f"microseconds a token, median, {name}" for name in parts]
    growth = [found[last] / found[first] - 1 for first, last in names]
    print(f"memory {growth[0]:+.1%}, time a token {growth[1]:+.1%}, median row {statistics.median(lengths):.0f} bytes")
    sys.exit(int(growth[0] > 0.05 or growth[1] > 0.10))


if __name__ == "__main__":
    main()
