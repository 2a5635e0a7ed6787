"""Training in which something goes wrong, in one process or several: what the tests of several processes launch.

    accelerate launch --multi_gpu --num_processes 2 tests/process_scenarios.py trouble --max_steps 8 ...

The first argument names what happens, the others are flags of train_rl.py. Scenarios count the groups of a step, not
processes: one process with two groups has the same trouble as two with one each.
"""

import json
import os
import signal
import socket
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

import evaluate
import train_rl
from sayo.extensions import attention_regions
from sayo.model.prompts import base_model
from sayo.run import processes
from sayo.settings import ConfigError, run_command

RANK = int(os.environ.get("RANK", 0))
ONE = ("--num_machines", "1", "--num_processes", "1")  # --multi_gpu is refused for one process
SMALL = small_run.SMALL | {"eval_limit": 3, "warmup_steps": 0, "try_biggest": False}


def launch(scenario: str, folder: Path, *, launcher: tuple = ("--num_processes", "2"), **settings):
    """A started `accelerate launch`; settings are those of train_rl.Config, SMALL by default."""
    flags = [f"--{name}={value}" for name, value in (SMALL | {"output_dir": folder} | settings).items()]
    multi_gpu = ["--multi_gpu"] * ("--config_file" not in launcher and launcher != ONE)
    port = [] if "--main_process_port" in launcher else ["--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *multi_gpu, *port, *launcher]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([*command, __file__, scenario, *flags], env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch_machines(scenario: str, folder: Path, **settings) -> list[subprocess.Popen]:
    """Two launchers that meet at an address, as on two machines, with the folders FOLDER-0 and FOLDER-1."""
    common = ("--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1")
    common += ("--main_process_port", str(free_port()), "--machine_rank")
    return [launch(scenario, Path(f"{folder}-{n}"), launcher=(*common, str(n)), **settings) for n in (0, 1)]


def finished(process: subprocess.Popen, timeout: float = 300) -> subprocess.CompletedProcess:
    """What a launched run said, once it has ended."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its own processes
        out, err = process.communicate(timeout=300)
        raise AssertionError(f"still running after {timeout} s: {err[-3000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def succeeded(process: subprocess.Popen, timeout: float = 300) -> subprocess.CompletedProcess:
    result = finished(process, timeout)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def existing(folder: str) -> Path:
    Path(folder).mkdir(exist_ok=True)  # on a second machine there is none
    return Path(folder)


def watch() -> None:
    """Write the mean gradient of every step and the trained weights before it, of this process, to watched-RANK.pt."""
    average, seen = train_rl.average_gradients, []

    def watching(parameters, accelerator):
        before = torch.cat([parameter.detach().flatten() for parameter in parameters])
        average(parameters, accelerator)
        seen.append((before, torch.cat([parameter.grad.flatten() for parameter in parameters])))
        torch.save(seen, existing(accelerator.project_dir) / f"watched-{RANK}.pt")

    train_rl.average_gradients = watching


# By step, counted from 1: what happens to the step's second group.
TROUBLE = {2: "identical", 3: "empty", 4: "no region", 5: "one token", 6: "reward nan", 7: "loss inf", 8: "reward inf"}
NO_GRADIENT = 9  # the step in which the second process has no gradient at all


def trouble() -> None:
    """A second group in every step of TROUBLE that is not as others are."""
    average, state = train_rl.average_gradients, {}

    def averaging(parameters, accelerator):
        if RANK == 1 and state["step"] == NO_GRADIENT:
            for parameter in parameters:
                parameter.grad = None
        average(parameters, accelerator)

    train_rl.average_gradients = averaging
    watch()
    sample, score, loss = train_rl.sample_groups, train_rl.score_statistics, train_rl.grpo_loss
    step = train_rl.train_step

    def numbered(*arguments):
        state["step"] = arguments[4] + 1
        return step(*arguments)

    def sampled(model, processor, batch, **options):
        groups = sample(model, processor, batch, **options)
        for number, group in enumerate(groups, RANK * len(groups)):
            name, size = TROUBLE.get(state["step"]) if number == 1 else None, len(group.texts)
            group.example, ids = group.example | {"trouble": name}, group.completions
            if name == "identical":
                group.completions, group.texts = ids[:1] * size, group.texts[:1] * size
                group.truncated = group.truncated[:1] * size
            elif name == "empty":
                eos = torch.tensor([processor.tokenizer.eos_token_id])
                group.completions, group.texts, group.truncated = [eos] * size, [""] * size, [False] * size
            elif name == "one token":  # beside a group of whole completions
                group.completions, group.truncated = [completion[:1] for completion in ids], [True] * size
            elif name == "no region":
                group.prompt.coverage.zero_()
        return groups

    def scored(group, config):
        scores, state["trouble"] = score(group, config), group.example["trouble"] or ""
        if state["trouble"].startswith("reward"):
            scores["total"][0] = float(state["trouble"].split()[1])
        return scores

    def lost(*arguments, **options):
        value, stats = loss(*arguments, **options)
        return value + (float("inf") if state["trouble"] == "loss inf" else 0.0), stats  # its gradient is finite

    train_rl.train_step, train_rl.sample_groups = numbered, sampled
    train_rl.score_statistics, train_rl.grpo_loss = scored, lost


def break_gradients(places) -> list[str]:
    """Make the gradients of the examples at these places of the stream infinite (seed 0, 20 scenes); their ids."""
    statistics, scenes = train_rl.group_statistics, train_rl.load_examples("scenes", limit=20)
    ids = [scenes[train_rl.example_index(0, place, 20)]["id"] for place in places]

    def breaking(model, group, *more):
        result = statistics(model, group, *more)
        if group.example["id"] in ids:
            result.logps[0].register_hook(lambda gradient: gradient * float("inf"))
        return result

    train_rl.group_statistics = breaking
    return ids


def in_step(number: int, process: int, action) -> None:
    """Do something in one process at the beginning of a step, counted from 1."""
    step = train_rl.train_step

    def stepping(model, *arguments):
        if arguments[3] + 1 == number and process == RANK:
            (existing(arguments[4].output_dir) / "when").write_text(str(time.time()), encoding="utf-8")
            action(model)
        return step(model, *arguments)

    train_rl.train_step = stepping


def raising(error: Exception):
    def action(*_, **__):
        raise error

    return action


def drift(model) -> None:
    """One weight changes in its last bit."""
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    weight.data.view(torch.int32).flatten()[0] += 1


def bytes_of(weights) -> int:
    """Bytes of what this process holds of weights."""
    return sum((weight.to_local() if isinstance(weight, DTensor) else weight).nbytes for weight in weights)


def shares() -> None:
    """Write shares-RANK.json: bytes of the model, of its layers' frozen weights, and those held here at two times."""
    watch()
    step, sample, sizes = train_rl.train_step, train_rl.sample_groups, {}

    def sampled(model, *arguments, **options):
        groups = sample(model, *arguments, **options)
        sizes["sampling"] = bytes_of(model.parameters())
        return groups

    def measured(model, *arguments):
        result = step(model, *arguments)
        layers = base_model(model).model.get_decoder().layers.parameters()
        sizes["layers"] = sum(weight.nbytes for weight in layers if not weight.requires_grad)
        sizes["whole"] = sum(weight.nbytes for weight in model.parameters())
        sizes["here"] = bytes_of(model.parameters())
        (Path(arguments[4].output_dir) / f"shares-{RANK}.json").write_text(json.dumps(sizes))
        return result

    train_rl.train_step, train_rl.sample_groups = measured, sampled


def shares_without_waiting() -> None:
    """Processes that have finished sampling leave the others alone."""
    processes.TIMEOUT.timeout = timedelta(seconds=20)
    train_rl.sync_forwards = evaluate.sync_forwards = lambda model: None


def other_disk() -> None:
    """A second machine, whose disk has nothing of what decides how much is still to be done."""
    if RANK == 1:
        for place, name in ((evaluate.BeforeAfter, "_stored"), (attention_regions, "stored_regions")):
            assert callable(getattr(place, name))
            setattr(place, name, raising(RuntimeError("read another disk")))


def hang() -> None:
    processes.TIMEOUT.timeout = timedelta(seconds=20)
    in_step(2, 1, lambda _: time.sleep(300))


SCENARIOS = {
    "plain": lambda: None,
    "watch": watch,
    "trouble": trouble,
    "overflow": lambda: break_gradients((3, 5)),  # of the second process, in steps 2 and 3
    "raise": lambda: in_step(2, 1, raising(RuntimeError("this process fails"))),
    "mistake": lambda: in_step(2, 1, raising(ConfigError("this process has a problem"))),
    "exit": lambda: in_step(2, 1, lambda _: os._exit(7)),
    "kill": lambda: in_step(2, 1, lambda _: os.kill(os.getpid(), signal.SIGKILL)),
    "hang": hang,
    "drift": lambda: in_step(2, 1, drift),
    "same_mistake": lambda: setattr(train_rl, "load_examples", raising(ConfigError("every process has this problem"))),
    "other_disk": other_disk,
    "shares": shares,
    "shares_without_waiting": shares_without_waiting,
}

if __name__ == "__main__":
    SCENARIOS[sys.argv.pop(1)]()
    run_command(train_rl.Config, train_rl.main)
