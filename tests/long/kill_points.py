"""Kill a training run wherever it can be killed, resume it, and compare all it leaves with an undisturbed run.

    python tests/long/kill_points.py --kills 50 --seed 0

Every run is started with --resume, ended up to --kills_per_run times, each time at another point, and left to finish.
Metrics (but for times), samples, evaluations, every checkpoint, the final adapter with its card and the curves must be
to the last bit those of an undisturbed run of the same seed. Linux; exit code 1 on any difference.

    moment     SIGKILL from outside after a random time, to `accelerate launch train_rl.py` and its child
    STAGES     SIGKILL so many milliseconds after the n-th call of a function
    line       SIGKILL before the n-th line that is executed of the files that write: between any two of them
    byte       the kernel ends the process when a file of an adapter grows beyond n bytes (RLIMIT_FSIZE, SIGXFSZ)
    damage     SIGKILL in a rollout, then the newest checkpoint is truncated, changed in one byte, robbed of a file or
               emptied
    SIGTERM, SIGINT    a clean stop from outside after a random time: the exit code must be 128 + signal
"""

import argparse
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib import import_module
from itertools import count
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from pytest import MonkeyPatch
from resumed_runs import differences, on_call, what_it_left
from small_run import SMALL

ROOT = Path(__file__).parents[2]
SETTINGS = SMALL | {"max_steps": 20, "lr_scheduler": "cosine"}
# name: (module and function whose call begins it, the call, from and to, most milliseconds after it); the first calls
# of a step's functions are those of the rehearsal.
STAGES = {
    "load": ("sayo.run.processes", "load_policy", 1, 1, 300),
    "biggest": ("train_rl", "rehearse", 1, 1, 300),
    "before": ("evaluate", "evaluate_shared", 1, 1, 150),
    "rollout": ("train_rl", "sample_groups", 2, 5, 60),
    "reference": ("train_rl", "logprobs", 3, 10, 15),
    "update": ("train_rl", "group_statistics", 3, 10, 40),
    "optimizer": ("train_rl", "optimizer", 1, 4, 2),
    "checkpoint": ("sayo.run.files", "save_checkpoint", 1, 2, 20),
    "adapter": ("sayo.run.files", "save_final_adapter", 1, 1, 10),
    "curves": ("sayo.run.folder", "draw_curves", 1, 1, 300),
    "after": ("sayo.show.tables", "before_and_after", 1, 1, 5),
    "card": ("sayo.run.folder", "write_model_card", 1, 1, 20),
}
WRITERS = {str(ROOT / "sayo/run" / name) for name in ("files.py", "folder.py")}
LINES = 1000  # about as many are executed in a start that saves three times
BYTES = 200_000  # of the largest file of a checkpoint, about
AT_THE_END = ("adapter", "curves", "after", "card")
KINDS = ("moment", *STAGES, "line", "line", "line", "byte", "byte", "damage", "SIGTERM", "SIGINT")


# --- in the process that is killed --------------------------------------------------------------------------------


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind: str, number: int, milliseconds: float) -> None:
    """Prepare the death of this process."""
    if kind in STAGES:
        module, name, *_ = STAGES[kind]
        place, name = (torch.optim.AdamW, "step") if name == "optimizer" else (import_module(module), name)

        def die() -> None:
            threading.Timer(milliseconds / 1000, kill_self).start() if milliseconds > 1 else kill_self()

        on_call(MonkeyPatch(), place, name, number, die)
    elif kind == "line":
        lines = Counter()

        def trace(frame, event, _):
            if WRITERS is None or frame.f_code.co_filename not in WRITERS:  # None: Python is ending
                return None
            if event == "line":
                lines["all"] += 1
                if lines["all"] == number:
                    print(f"line {Path(frame.f_code.co_filename).name}:{frame.f_lineno}", file=sys.stderr, flush=True)
                    kill_self()
            return trace

        sys.settrace(trace)
    elif kind == "byte":

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))

        on_call(MonkeyPatch(), import_module("sayo.run.files"), "save_adapter", 1, limit)


def be_killed(kind: str, number: int, milliseconds: float, arguments: list[str]) -> None:
    sys.argv = ["train_rl.py", *arguments]
    import train_rl

    arm(kind, number, milliseconds)
    train_rl.run_command(train_rl.Config, train_rl.main)


# --- in the process that kills ------------------------------------------------------------------------------------


def flags(folder: Path, seed: int) -> list[str]:
    return [f"--{name}={value}" for name, value in (SETTINGS | {"seed": seed, "output_dir": folder}).items()]


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    options = {"cwd": ROOT, "env": environment, "start_new_session": True}
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, **options)


def launched(folder: Path, seed: int, log: Path) -> subprocess.Popen:
    """The command that users type."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    accelerate += ["--mixed_precision=no", "--dynamo_backend=no", "--cpu", "train_rl.py"]
    return start([*accelerate, *flags(folder, seed), "--resume"], log)


def disturb(kind: str, folder: Path, seed: int, log: Path, rng: random.Random, seconds: float) -> str:
    """One start that is ended; what happened: "ended", "finished" (it did not get there) or an error."""
    if kind in ("moment", "SIGTERM", "SIGINT"):
        begin = log.stat().st_size if log.exists() else 0
        command = [sys.executable, "train_rl.py", *flags(folder, seed), "--resume"]
        process = launched(folder, seed, log) if kind == "moment" else start(command, log)
        delay = rng.uniform(0, seconds)
        if kind != "moment":  # a process that is not there yet cannot end in order
            while b"resume:" not in log.read_bytes()[begin:]:
                time.sleep(0.02)
            delay = rng.uniform(0, seconds / 6)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL if kind == "moment" else getattr(signal, kind))
        code, expected = process.wait(120), [-signal.SIGKILL if kind == "moment" else 128 + getattr(signal, kind)]
    else:
        at = "rollout" if kind == "damage" else kind
        _, _, fewest, most, longest = STAGES.get(at) or (None, None, 1, {"line": LINES, "byte": BYTES}[at], 0.0)
        number, milliseconds = rng.randint(fewest, most), rng.uniform(0, longest)
        command = [sys.executable, __file__, "--be_killed", at, str(number), str(milliseconds), *flags(folder, seed)]
        process = start([*command, "--resume"], log)
        code, expected = process.wait(300), [-signal.SIGKILL, -signal.SIGXFSZ]
    if code in expected and kind == "damage":
        damage_newest(folder, rng)
    return "ended" if code in expected else "finished" if code == 0 else f"exit code {code}"


def damage_newest(folder: Path, rng: random.Random) -> None:
    checkpoints = sorted(path for path in folder.glob("checkpoints/step-*") if path.suffix != ".partial")
    if not checkpoints:
        return
    files = sorted(path for path in checkpoints[-1].rglob("*") if path.is_file())
    victim, how = rng.choice(files), rng.choice(("truncated", "changed", "missing", "emptied"))
    content = victim.read_bytes()
    place = rng.randrange(len(content))
    for path in {"missing": [victim], "emptied": files}.get(how, []):
        path.unlink()
    if how in ("truncated", "changed"):
        rest = bytes([content[place] ^ 1]) + content[place + 1 :]
        victim.write_bytes(content[:place] + rest * (how == "changed"))


def finish(folder: Path, seed: int, log: Path) -> float:
    """One start that nobody disturbs; its seconds."""
    begin = time.monotonic()
    code = launched(folder, seed, log).wait(600)
    if code:
        sys.exit(f"an undisturbed start ended with exit code {code}: see {log}\n{log.read_text()[-2000:]}")
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="ends in all")
    parser.add_argument("--kills_per_run", type=int, default=6, help="ends of a run before it may finish")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the runs, from 0 on")
    parser.add_argument("--seed", type=int, default=0, help="of where and when they are killed")
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="kill points, all by default")
    options = parser.parse_args()
    # A shell's background job ignores Ctrl-C, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    base, rng = Path(tempfile.mkdtemp(prefix="kill-points-")), random.Random(options.seed)
    order, expected, seconds = [], {}, 0.0
    for seed in range(options.seeds):
        folder = base / f"undisturbed-{seed}" / "run"
        seconds = finish(folder, seed, base / "undisturbed.log")
        expected[seed] = what_it_left(folder)
        print(f"seed {seed}: undisturbed in {seconds:.0f} s, {len(expected[seed])} files", flush=True)
    starts, ended, survived, failed = Counter(), Counter(), Counter(), []
    for number in count():
        if ended.total() >= options.kills:
            break
        seed, folder, log = number % options.seeds, base / str(number) / "run", base / f"{number}.log"
        while len(order) < options.kills_per_run:
            order += rng.sample(options.kinds, len(options.kinds))
        chosen, order = order[: options.kills_per_run], order[options.kills_per_run :]
        # Taken from its end: behind a kill at the end of a run, no step is left to be killed in.
        waiting = sorted(chosen, key=lambda kind: kind not in AT_THE_END)
        story = []
        while waiting and not (story and story[-1][1] == "finished"):
            kind = waiting.pop()
            story.append((kind, disturb(kind, folder, seed, log, rng, seconds)))
            starts[kind] += 1
        order = waiting + order
        finish(folder, seed, log)
        found = differences(expected[seed], what_it_left(folder))
        found += [f"{kind}: {end}" for kind, end in story if end.startswith("exit code")]
        ended.update(kind for kind, end in story if end == "ended")
        survived.update(kind for kind, end in story if end == "ended" and not found)
        failed += [number] if found else []
        told = ", ".join(kind if end == "ended" else f"{kind} ({end})" for kind, end in story)
        print(f"run {number}, seed {seed}: {told}: {'; '.join(found) or 'equal'}", flush=True)
        if not found:
            shutil.rmtree(folder.parent)
    counters = starts, ended, survived
    lines = [(kind, *(counter[kind] for counter in counters)) for kind in dict.fromkeys(options.kinds) if starts[kind]]
    for line in [("kill point", "starts", "ended there", "survived"), *lines, ("all", *map(Counter.total, counters))]:
        print("{:12}{:>8}{:>13}{:>10}".format(*line))
    print(f"{number} runs of {SETTINGS['max_steps']} steps, {len(expected)} seeds, {len(failed)} with differences")
    if failed:
        sys.exit(f"differences in runs {failed}: see {base}")
    shutil.rmtree(base)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--be_killed"]:
        be_killed(sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5:])
    else:
        main()
