"""A long run: does memory stay flat, do steps stay as fast, how fast do the logs grow?

    OMP_NUM_THREADS=1 python tests/long/endurance.py --steps 2000 --output_dir runs/endurance

Trains the embedded policy on the scenes with small groups, through train_rl.main and all that it writes. Memory is
the process's resident set after each step; time is the processor time of a step, which other programs on the machine
disturb least. The learning rate is so low that completions stay as long as they are: otherwise a policy that learns to
say more makes slower steps, which is no fault. Exit code 1 where memory grows by more than 5 % from the second tenth
of the run to the last, or the median step becomes more than 10 % slower.
"""

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_rl

SETTINGS = {"num_generations": 4, "groups_per_step": 2, "save_steps": 100, "save_total_limit": 3, "learning_rate": 1e-6}
SECONDS = "processor seconds a step, median"


def watch(rows: np.ndarray):
    """train_step that also notes (MB in memory, processor seconds, completion length) in rows (steps, 3)."""
    step, process = train_rl.train_step, psutil.Process()

    def watched(*arguments):
        begin = time.process_time()
        metrics, sample = step(*arguments)
        seconds = time.process_time() - begin
        rows[arguments[4]] = process.memory_info().rss / 1e6, seconds, metrics["completion_length"]
        return metrics, sample

    return watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output_dir", default="runs/endurance")
    arguments = parser.parse_args()
    folder, rows = Path(arguments.output_dir), np.zeros((arguments.steps, 3))
    shutil.rmtree(folder, ignore_errors=True)
    train_rl.train_step = watch(rows)
    train_rl.main(train_rl.Config(**SETTINGS, eval_data="none", max_steps=arguments.steps, output_dir=str(folder)))

    memory, seconds, lengths = rows.T  # (steps,) each
    tenth = max(1, len(rows) // 10)
    slope = np.polyfit(np.arange(len(rows) - tenth), memory[tenth:], 1)[0]
    parts = {"second tenth": slice(tenth, 2 * tenth), "last tenth": slice(-tenth, None)}
    found = {"steps": len(rows), "memory slope, kB a step": round(1000 * slope, 3)}
    for name, part in parts.items():
        found[f"memory, MB, {name}"] = round(float(np.median(memory[part])), 1)
        found[f"{SECONDS}, {name}"] = round(float(np.median(seconds[part])), 4)
        found[f"completion length, median, {name}"] = round(float(np.median(lengths[part])), 1)
        found[f"slowest step, seconds, {name}"] = round(float(seconds[part].max()), 3)
    for path in sorted(path for path in folder.glob("*") if path.is_file()):
        found[f"bytes a step, {path.name}"] = round(path.stat().st_size / len(rows), 1)
    found["checkpoints kept"] = len(list((folder / "checkpoints").iterdir()))
    found["megabytes in all"] = round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6, 1)
    (folder / "endurance.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    for name, value in found.items():
        print(f"{name:52} {value}")

    first, last = parts
    growth = [found[f"{what}, {last}"] / found[f"{what}, {first}"] - 1 for what in ("memory, MB", SECONDS)]
    print(f"memory {growth[0]:+.1%}, time of a step {growth[1]:+.1%}")
    sys.exit(int(growth[0] > 0.05 or growth[1] > 0.10))


if __name__ == "__main__":
    main()
