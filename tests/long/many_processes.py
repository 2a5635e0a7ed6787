"""What several processes do, measured, on a CPU with gloo and the real `accelerate launch`. Minutes; prints tables.

python tests/long/many_processes.py updates     # the update of two processes beside that of one, three seeds
python tests/long/many_processes.py deaths      # processes that die, fail or hang: seconds until the run has ended
python tests/long/many_processes.py shares      # a model in shares: bytes, seconds, and a stage without waiting
python tests/long/many_processes.py machines    # two launchers, as on two machines, one of which loses its process
python tests/long/many_processes.py all
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import tiny_models
import torch
from process_scenarios import ONE, SMALL, finished, free_port, launch, launch_machines, succeeded
from safetensors.torch import load_file
from small_run import rows_of

FSDP = ("--config_file", "configs/accelerate_fsdp.yaml")


def largest_difference(first, second) -> float:
    """Over pairs of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(first, second, strict=True))


def updates(folder: Path) -> None:
    steps, settings = 5, {"max_steps": 5, "eval_limit": 5, "save_steps": 5, "num_generations": 4, "warmup_steps": 1}
    print("| seed | gradient, 5 steps | weights after 1 step | after 5 | largest weight | processes | evaluation |")
    print("|---|---|---|---|---|---|---|")
    for seed in range(3):
        one, two = (folder / f"{name}-{seed}" for name in ("one", "two"))
        for path, launcher in ((one, ONE), (two, ("--num_processes", "2"))):
            succeeded(launch("watch", path, launcher=launcher, seed=seed, **settings), 600)
        alone, *both = (torch.load(path) for path in (one / "watched-0.pt", two / "watched-0.pt", two / "watched-1.pt"))
        assert [len(part) for part in (alone, *both)] == [steps] * 3
        gradient = largest_difference([step[1] for step in alone], [step[1] for step in both[0]])
        adapters = [torch.load(path / "checkpoints" / "step-000005" / "state.pt")["optimizer"] for path in (one, two)]
        moments = [[entry["exp_avg_sq"] for entry in state["state"].values()] for state in adapters]
        first = (alone[1][0] - both[0][1][0]).abs().max().item()
        weights = [load_adapter(path) for path in (one, two)]
        last = largest_difference(*(list(part.values()) for part in weights))
        assert largest_difference(*moments) < 1e-6
        same = all(torch.equal(a, b) for pair in zip(*both, strict=True) for a, b in zip(*pair, strict=True))
        rows = [json.loads((path / "evaluation.json").read_text())["rows"]["after"] for path in (one, two)]
        largest = max(part.abs().max().item() for part in weights[0].values())
        verdict = f"{'equal to the bit' if same else 'DIFFER'} | {'the same rows' if rows[0] == rows[1] else 'DIFFERS'}"
        print(f"| {seed} | {gradient:.1e} | {first:.1e} | {last:.1e} | {largest:.2f} | {verdict} |", flush=True)


def load_adapter(run: Path) -> dict:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def _outcome(process, run: Path, expected: str) -> str:
    """Exit code, seconds since it happened, and how often the launcher's streams have what was expected."""
    result = finished(process, 600)
    when = run / "when"
    seconds = f"{time.time() - float(when.read_text()):.1f}" if when.exists() else "–"
    return f"{result.returncode} | {seconds} | {(result.stdout + result.stderr).count(expected)} times `{expected}`"


def deaths(folder: Path) -> None:
    print("| in the second process | exit code | seconds until the run had ended | what was said |")
    print("|---|---|---|---|")
    said = {"raise": "RuntimeError: this process fails", "mistake": "process 1: this process has a problem"}
    said |= {"exit": "exitcode  : 7", "kill": "Signal 9 (SIGKILL)", "same_mistake": "every process has this problem"}
    said |= {"drift": "after step 2 the processes [1] have other weights than process 0", "hang": "Timed out"}
    for name, expected in said.items():
        run = folder / name
        print(f"| {name} | {_outcome(launch(name, run, eval_limit=1, save_steps=1), run, expected)} |", flush=True)
    for name in ("raise", "kill", "hang"):
        run = folder / f"bare-{name}"
        flags = [f"--{key}={value}" for key, value in (SMALL | {"output_dir": run, "eval_limit": 1}).items()]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment |= {"MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}
        command = [sys.executable, Path(__file__).parents[1] / "process_scenarios.py", name, *flags]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks = [environment | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        processes = [subprocess.Popen(command, env=rank, **pipes) for rank in ranks]
        outcome = _outcome(processes[0], run, "Connection closed by peer" if name != "hang" else "Timed out")
        processes[1].kill()
        processes[1].communicate()
        print(f"| {name}, without a launcher: the first process | {outcome} |", flush=True)


def shares(folder: Path) -> None:
    tiny_models.TEXT |= {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "head_dim": 128}
    model = tiny_models.build("internvl", folder / "model")
    settings = {"model": model, "max_steps": 3, "save_steps": 3, "eval_limit": 3, "max_new_tokens": 48}
    print("| | bytes of weights in a process | of the whole | seconds of sampling | of reference and update |")
    print("|---|---|---|---|---|")
    launchers = {"every process a copy": ("--num_processes", "2"), "shares, gathered in every forward": FSDP}
    launchers["shares, gathered once before sampling"] = (*FSDP, "--fsdp_reshard_after_forward", "false")
    runs = {name: folder / name.replace(" ", "-") for name in launchers}
    for name, run in runs.items():
        succeeded(launch("shares", run, launcher=launchers[name], dtype="float32", **settings), 900)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
        stages = ("rollout", "reference", "update")
        times = [sum(row[f"time/{stage}_seconds"] for row in rows) / len(rows) for stage in stages]
        size = json.loads((run / "shares-0.json").read_text())
        held = f"{size['here']:,} between steps, {size['sampling']:,} after sampling | {size['whole']:,}"
        print(f"| {name} | {held} | {times[0]:.2f} | {times[1] + times[2]:.2f} |", flush=True)
    whole, *others = runs.values()
    for run in others:
        pairs = zip(rows_of(run), rows_of(whole), strict=True)
        known = [(a[name], b[name]) for a, b in pairs for name in a.keys() & b.keys() if None not in (a[name], b[name])]
        metric = max(abs(first - second) for first, second in known)
        adapter = largest_difference(*(list(load_adapter(path).values()) for path in (run, whole)))
        print(f"{run.name} against copies: metrics differ by {metric:.1e}, adapters by {adapter:.1e}")
    run = folder / "no-waiting"
    # The embedded policy: its completions end by themselves, so that processes sample for different numbers of tokens.
    started = launch("shares_without_waiting", run, launcher=FSDP, max_new_tokens=64, eval_limit=1)
    outcome = _outcome(started, run, "Timed out waiting")
    print(f"shares, and no waiting for forwards of others (timeout 20 s): exit code | seconds | said: {outcome}")


def machines(folder: Path) -> None:
    print("| two machines | exit code | seconds until it had ended | what was said |")
    print("|---|---|---|---|")
    for name, expected in (("plain", ("-> ", "-> ")), ("kill", ("Connection closed by peer", "Signal 9 (SIGKILL)"))):
        started = launch_machines(name, folder / name)
        for rank in (1, 0):
            outcome = _outcome(started[rank], folder / f"{name}-1", expected[rank])
            print(f"| {name}: machine {rank} | {outcome} |", flush=True)


if __name__ == "__main__":
    parts = {"updates": updates, "deaths": deaths, "shares": shares, "machines": machines}
    chosen = sys.argv[1:]
    if not chosen or any(name not in (*parts, "all") for name in chosen):
        sys.exit(__doc__)
    for name, part in parts.items():
        if name in chosen or "all" in chosen:
            with tempfile.TemporaryDirectory() as temporary:
                begin = time.time()
                part(Path(temporary))
                print(f"{name}: {time.time() - begin:.0f} s\n", flush=True)
