"""Training with something the matter, in one process or several: what the tests of several processes launch.

    accelerate launch --multi_gpu --num_processes 2 tests/process_scenarios.py trouble --max_steps 8 ...

The first argument names what happens, the others are those of train_rl.py. A scenario speaks of the numbers of groups
within a step, not of processes, so that one process with two groups has the same trouble as two with one each.
"""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import small_run
import torch
from torch.distributed.tensor import DTensor

import data.attention_regions
import processes
import train_rl
from config import ConfigError, run_command
from prompts import base_model

RANK = int(os.environ.get("RANK", 0))
ONE = ("--num_machines", "1", "--num_processes", "1")  # --multi_gpu is refused for one process
SMALL = small_run.SMALL | {"eval_limit": 3, "warmup_steps": 0, "try_biggest": False}


def launch(scenario: str, folder: Path, *, launcher: tuple = ("--num_processes", "2"), env=None, **settings):
    """A started `accelerate launch`; settings are those of train_rl.Config, SMALL by default."""
    flags = [f"--{name}={value}" for name, value in (SMALL | {"output_dir": folder} | settings).items()]
    if "--config_file" not in launcher and launcher != ONE:
        launcher = ("--multi_gpu", *launcher)
    if "--main_process_port" not in launcher:
        launcher = ("--main_process_port", "0", *launcher)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launcher, __file__, scenario]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *flags], env=environment, text=True, encoding="utf-8", **pipes)


def finished(process: subprocess.Popen, timeout: float = 300) -> subprocess.CompletedProcess:
    """What a launched run said, once it has ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its own processes
        out, err = process.communicate(timeout=60)
        raise AssertionError(f"still running after {timeout} s: {err[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The rows of a run, without times."""
    rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


# --- what happens ---------------------------------------------------------------------------------------------------


def watch() -> None:
    """Write the mean gradient of every step and the trained weights before it, of this process, to watched-RANK.pt."""
    average, seen = train_rl.average_gradients, []

    def watching(parameters, accelerator):
        before = torch.cat([parameter.detach().flatten() for parameter in parameters])
        average(parameters, accelerator)
        seen.append((before, torch.cat([parameter.grad.flatten() for parameter in parameters])))
        folder = Path(accelerator.project_dir)
        folder.mkdir(exist_ok=True)  # on a second machine there is none
        torch.save(seen, folder / f"watched-{RANK}.pt")

    train_rl.average_gradients = watching


TROUBLE = {  # by step, counted from 1: what happens to the step's second group
    2: "identical",
    3: "empty",
    4: "no region",
    5: "one token",
    6: "reward nan",
    7: "loss inf",
    8: "reward inf",
}


NO_GRADIENT = 9  # the step in which the second process has no gradient at all


def trouble() -> None:
    """A second group in every step of TROUBLE that is not as others are."""
    average = train_rl.average_gradients

    def averaging(parameters, accelerator):
        if RANK == 1 and state["step"] == NO_GRADIENT:
            for parameter in parameters:
                parameter.grad = None
        average(parameters, accelerator)

    train_rl.average_gradients = averaging
    watch()
    sample, score, loss = train_rl.sample_groups, train_rl.score_statistics, train_rl.grpo_loss
    step, state = train_rl.train_step, {}

    def numbered(*arguments):
        state["step"] = arguments[4] + 1
        return step(*arguments)

    def sampled(model, processor, batch, **options):
        groups = sample(model, processor, batch, **options)
        end = processor.tokenizer.eos_token_id
        for number, group in enumerate(groups, RANK * len(groups)):
            group.trouble = TROUBLE.get(state["step"]) if number == 1 else None
            if group.trouble == "identical":
                first = group.completions[0]
                group.completions, group.texts = [first] * len(group.texts), [group.texts[0]] * len(group.texts)
                group.truncated = [group.truncated[0]] * len(group.texts)
            if group.trouble == "empty":
                group.completions, group.texts = [torch.tensor([end])] * len(group.texts), [""] * len(group.texts)
                group.truncated = [False] * len(group.texts)
            if group.trouble == "one token":  # beside a group of whole completions
                group.completions = [completion[:1] for completion in group.completions]
                group.truncated = [True] * len(group.texts)
            if group.trouble == "no region":
                group.prompt.coverage.zero_()
        return groups

    def scored(group, config):
        scores, state["group"] = score(group, config), group
        if group.trouble and group.trouble.startswith("reward"):
            scores["total"][0] = float(group.trouble.split()[1])
        return scores

    def lost(*arguments, **options):
        value, stats = loss(*arguments, **options)
        return value + (float("inf") if state["group"].trouble == "loss inf" else 0.0), stats  # its gradient is finite

    train_rl.train_step, train_rl.sample_groups = numbered, sampled
    train_rl.score_statistics, train_rl.grpo_loss = scored, lost


def in_step(number: int, process: int, action) -> None:
    """Do something in one process at the beginning of a step, counted from 1."""
    step = train_rl.train_step

    def stepping(model, *arguments):
        if arguments[3] + 1 == number and process == RANK:
            folder = Path(arguments[4].output_dir)
            folder.mkdir(exist_ok=True)  # on a second machine there is none
            (folder / "when").write_text(str(time.time()), encoding="utf-8")
            action(model)
        return step(model, *arguments)

    train_rl.train_step = stepping


def fail(_) -> None:
    raise RuntimeError("this process fails")


def mistake(_) -> None:
    raise ConfigError("this process has a problem")


def drift(model) -> None:
    """One weight changes in its last bit."""
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        weight.view(torch.int32).flatten()[0] += 1


def same_mistake() -> None:
    """A problem that every process finds before training."""

    def loading(*_, **__):
        raise ConfigError("every process has this problem")

    train_rl.load_examples = loading


def bytes_here(model) -> int:
    """Bytes of the weights that this process holds."""
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters()]
    return sum(weight.nbytes for weight in local)


def shares() -> None:
    """Write bytes of weights to shares-RANK.json: the whole model, its layers' frozen ones, what this process holds
    when it has sampled, and after a step."""
    watch()
    step, sample, sizes = train_rl.train_step, train_rl.sample_groups, {}

    def sampled(model, *arguments, **options):
        groups = sample(model, *arguments, **options)
        sizes["sampling"] = bytes_here(model)
        return groups

    def measured(model, *arguments):
        result = step(model, *arguments)
        layers = base_model(model).model.get_decoder().layers.parameters()
        sizes["layers"] = sum(weight.nbytes for weight in layers if not weight.requires_grad)
        sizes["whole"] = sum(weight.nbytes for weight in model.parameters())
        sizes["here"] = bytes_here(model)
        path = Path(arguments[4].output_dir) / f"shares-{RANK}.json"
        path.write_text(json.dumps(sizes), encoding="utf-8")
        return result

    train_rl.train_step, train_rl.sample_groups = measured, sampled


def shares_without_waiting() -> None:
    """Processes that have finished sampling leave the others alone."""
    processes.TIMEOUT.timeout = timedelta(seconds=20)
    train_rl.wait_for_forwards = lambda model: None


def other_disk() -> None:
    """A second machine, whose disk has nothing of what decides how much is still to be done."""
    if RANK == 1:
        train_rl.former_evaluations = data.attention_regions.stored_regions = lambda *_: fail("read another disk")


def hang() -> None:
    processes.TIMEOUT.timeout = timedelta(seconds=20)
    in_step(2, 1, lambda _: time.sleep(300))


SCENARIOS = {
    "plain": lambda: None,
    "watch": watch,
    "trouble": trouble,
    "raise": lambda: in_step(2, 1, fail),
    "mistake": lambda: in_step(2, 1, mistake),
    "exit": lambda: in_step(2, 1, lambda _: os._exit(7)),
    "kill": lambda: in_step(2, 1, lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "hang": hang,
    "drift": lambda: in_step(2, 1, drift),
    "same_mistake": same_mistake,
    "other_disk": other_disk,
    "shares": shares,
    "shares_without_waiting": shares_without_waiting,
}

if __name__ == "__main__":
    SCENARIOS[sys.argv.pop(1)]()
    run_command(train_rl.Config, train_rl.main)
