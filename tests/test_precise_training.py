"""Training in 4-bit, float16 and bfloat16 on the CPU: optimizers, stop and resume to the bit, skipped updates."""

import gc
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ragged_completions

import train_rl
from checkpoint import whole_checkpoint
from config import ConfigError
from loading import load_policy
from prompts import base_model, encode_prompt
from train_rl import Config, make_optimizer
from vlm import group_logprobs

# --- optimizers --------------------------------------------------------------------------------------------------


def test_the_paged_optimizer_is_bitsandbytes_own_with_the_settings_of_the_run():
    import bitsandbytes

    weight = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = make_optimizer("paged_adamw_8bit", [weight], lr=3e-4, weight_decay=0.02)
    assert type(optimizer) is bitsandbytes.optim.PagedAdamW8bit
    assert optimizer.is_paged and optimizer.args.optim_bits == 8
    (group,), (other,) = (
        optimizer.param_groups,
        make_optimizer("adamw", [weight], lr=3e-4, weight_decay=0.02).param_groups,
    )
    for name in ("lr", "weight_decay", "betas", "eps"):
        assert group[name] == other[name], name
    with pytest.raises(ConfigError, match="optimizer='sgd'.*adamw,paged_adamw_8bit"):
        train_rl.main(checked(optimizer="sgd"))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_eight_bit_steps_are_those_of_adamw_within_the_rounding_of_its_state():
    paths = {}
    for name in ("adamw", "paged_adamw_8bit"):
        torch.manual_seed(0)
        weight, target = torch.nn.Parameter(torch.zeros(64, 128)), torch.randn(64, 128)
        optimizer = make_optimizer(name, [weight], lr=1e-2, weight_decay=0.01)
        for _ in range(60):
            (weight - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        paths[name] = weight.detach()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    difference = (paths["adamw"] - paths["paged_adamw_8bit"]).norm() / paths["adamw"].norm()
    assert 0 < difference < 0.05


# --- training ----------------------------------------------------------------------------------------------------

SMALL = {
    "data": "scenes",
    "limit": 20,
    "max_steps": 4,
    "groups_per_step": 2,
    "num_generations": 2,
    "max_new_tokens": 10,
    "save_steps": 2,
    "eval_limit": 1,
    "lora_rank": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "report_to": "none",
}


def checked(**settings) -> Config:
    config = Config(**(SMALL | settings))
    if found := config.problems():
        raise ConfigError("\n".join(found))
    return config


def run(folder, **settings):
    train_rl.main(checked(output_dir=str(folder), **settings))
    return metrics_of(folder)


def metrics_of(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def same(first, second) -> bool:
    """Whether two saved states are equal to the last bit."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def stop_in_step(monkeypatch, number):
    step = train_rl.train_step

    def stopping(*arguments):
        if arguments[4] == number:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(train_rl, "train_step", stopping)


@pytest.fixture
def lively_scaler(monkeypatch):
    """A loss scale that grows every third update, so that a few steps show whether it is kept."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**10, growth_interval=3))


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float16", "lora_targets": "all-linear"},
        {"dtype": "bfloat16", "load_in_4bit": True},
        {
            "dtype": "float16",
            "load_in_4bit": True,
            "gradient_checkpointing": True,
            "optimizer": "paged_adamw_8bit",
            "lora_rank": 32,
        },
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_a_run_trains_stops_resumes_saves_and_loads_to_the_bit(
    tmp_path, monkeypatch, lively_scaler, model_folders, examples, settings
):
    policies, load = [], train_rl.load_policy

    def remembering(*arguments, **options):
        policies.append(load(*arguments, **options))
        return policies[-1]

    monkeypatch.setattr(train_rl, "load_policy", remembering)
    rows = run(tmp_path / "whole", **settings)
    (model, processor) = policies[0]
    assert len(policies) == 1
    assert [row["skipped_updates"] for row in rows] == [0.0] * 4 and all(row["grad_norm"] > 0 for row in rows)
    assert all(value is None or abs(value) < 1e6 for row in rows for value in row.values())
    assert rows[-1]["kl"] > rows[0]["kl"]
    moved = [weight.abs().max() for name, weight in model.named_parameters() if "lora_B" in name]
    assert min(moved) > 0
    if settings["dtype"] == "float16":
        assert [row["loss_scale"] for row in rows] == [1024.0, 1024.0, 2048.0, 2048.0]
    else:
        assert "loss_scale" not in rows[0]
    if settings.get("gradient_checkpointing"):
        layers = base_model(model).model.language_model.layers
        assert all(layer._gradient_checkpointing_func.keywords == {"use_reentrant": False} for layer in layers)

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        stop_in_step(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(stopped, **settings)
    assert whole_checkpoint(stopped)[0].name == "step-000002"
    assert run(stopped, resume=True, **settings) == rows
    states = [torch.load(folder / "checkpoints/step-000004/state.pt") for folder in (tmp_path / "whole", stopped)]
    assert same(*states)
    if settings.get("optimizer") == "paged_adamw_8bit":
        first = states[0]["optimizer"]["state"].values()
        assert any(torch.uint8 in {part.dtype for part in tensors(entry)} for entry in first)
    if settings["dtype"] == "float16":
        assert states[0]["scaler"]["scale"] == 2048.0 and states[0]["scaler"]["_growth_tracker"] == 1

    options = {name: settings[name] for name in ("dtype", "load_in_4bit") if name in settings}
    again, _ = load_policy(model_folders["qwen3_vl"], adapter=str(stopped / "adapter"), lora_rank=0, **options)
    prompt, completions = encode_prompt(processor, examples[0]), ragged_completions(processor)
    model.eval()
    with torch.no_grad():
        expected, found = (torch.cat(group_logprobs(m, prompt, completions)) for m in (model, again))
    assert torch.equal(found, expected)


def tensors(state) -> list[torch.Tensor]:
    parts = state.values() if isinstance(state, dict) else [state]
    nested = [tensors(part) if isinstance(part, dict) else [part] for part in parts]
    return [part for group in nested for part in group if isinstance(part, torch.Tensor)]


def test_the_reference_is_the_quantized_base_with_the_adapter_off_and_no_second_copy(
    tmp_path, monkeypatch, model_folders
):
    """Reference log-probs equal those of the quantized base alone, and every 4-bit layer there is is the policy's."""
    from bitsandbytes.nn import Linear4bit

    options = {"lora_rank": 0, "dtype": "float16"}
    (base, _), (full, _) = (
        load_policy(model_folders["qwen3_vl"], load_in_4bit=bits, **options) for bits in (True, False)
    )
    gc.collect()
    before = {id(module) for module in gc.get_objects() if type(module) is Linear4bit}
    references, policies, groups = [], [], []
    load, loss, sample = train_rl.load_policy, train_rl.grpo_loss, train_rl.sample_groups

    def remembering(*arguments, **options):
        policies.append(load(*arguments, **options))
        return policies[-1]

    def spy(logps, old_logps, ref_logps, *arguments, **options):
        references.append(torch.cat(ref_logps))
        own = {id(module) for module in policies[0][0].modules()}
        alive = {id(module) for module in gc.get_objects() if type(module) is Linear4bit} - before
        assert alive and alive <= own
        return loss(logps, old_logps, ref_logps, *arguments, **options)

    monkeypatch.setattr(train_rl, "load_policy", remembering)
    monkeypatch.setattr(train_rl, "grpo_loss", spy)
    monkeypatch.setattr(train_rl, "sample_groups", lambda *a, **k: groups.extend(made := sample(*a, **k)) or made)
    rows = run(tmp_path / "run", load_in_4bit=True, dtype="float16", max_steps=2)
    assert rows[-1]["kl"] > 0 and len(policies) == 1 and len(references) == len(groups) == 4
    for group, reference in zip(groups, references, strict=True):
        with torch.no_grad():
            alone, exact = (torch.cat(group_logprobs(m, group.prompt, group.completions)) for m in (base, full))
        assert torch.equal(reference, alone)
        assert not torch.allclose(alone, exact, atol=1e-2)  # the quantized base is another model than the full one


# --- updates that cannot be made ---------------------------------------------------------------------------------


def test_an_overflow_at_the_loss_scale_skips_the_update_lowers_the_scale_and_goes_on(tmp_path, monkeypatch, capfd):
    """It stopped the run."""
    monkeypatch.setattr(
        torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60, backoff_factor=2.0**-24)
    )
    adapters, step = [], train_rl.train_step

    def remembering(model, *arguments):
        result = step(model, *arguments)
        adapters.append([weight.clone() for name, weight in model.named_parameters() if "lora_" in name])
        return result

    monkeypatch.setattr(train_rl, "train_step", remembering)
    rows = run(tmp_path / "run", dtype="float16")
    assert [row["skipped_updates"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert [row["loss_scale"] for row in rows] == [2.0**36, 2.0**12, 2.0**12, 2.0**12]
    assert [row["grad_norm"] is None for row in rows] == [True, True, False, False]
    assert same(adapters[0], adapters[1]) and not same(adapters[1], adapters[2])
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    for row in samples[:2]:
        assert len(row["skipped_examples"]) == 1 and row["skipped_examples"][0].startswith("scenes-train")
    assert all("skipped_examples" not in row for row in samples[2:])
    out, err = capfd.readouterr()
    assert (out + err).count("update skipped, the gradient is not finite; it began with 'scenes-train") == 2
    assert "2 updates were skipped" in (tmp_path / "run" / "adapter" / "README.md").read_text()


def break_gradients(monkeypatch, when):
    """Gradients of the groups for which when(example) is true become infinite."""
    statistics = train_rl.group_statistics

    def breaking(model, group, config, map_layer=None):
        result = statistics(model, group, config, map_layer)
        if when(group.example):
            result.logps[0].register_hook(lambda gradient: gradient * float("inf"))
        return result

    monkeypatch.setattr(train_rl, "group_statistics", breaking)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_example_is_named_and_costs_one_step_in_any_dtype(tmp_path, monkeypatch, dtype):
    expected = run(tmp_path / "before", dtype=dtype, max_steps=1)
    ids = [train_rl.load_examples("scenes", limit=20)[train_rl.example_index(0, place, 20)]["id"] for place in range(8)]
    break_gradients(monkeypatch, lambda example: example["id"] == ids[3])  # the second group of the second step
    rows = run(tmp_path / "run", dtype=dtype, warmup_steps=3)
    assert [row["skipped_updates"] for row in rows] == [0.0, 1.0, 0.0, 0.0]
    assert rows[0]["reward/total"] == expected[0]["reward/total"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row.get("skipped_examples") for row in samples] == [None, [ids[3]], None, None]
    assert [round(row["learning_rate"], 6) for row in rows] == [0.0, 0.000333, 0.000333, 0.000667]
    json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_only_several_skipped_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    break_gradients(monkeypatch, lambda example: True)
    with pytest.raises(ConfigError, match=r"max_skipped_steps=3.*in a row, the last one step 3; lower learning_rate"):
        run(tmp_path / "run", max_skipped_steps=3, save_steps=1)
    assert len(metrics_of(tmp_path / "run")) == 3
    monkeypatch.undo()
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    rows = run(tmp_path / "again", max_skipped_steps=3, save_steps=1, resume=True)
    assert [row["skipped_updates"] for row in rows] == [1.0, 1.0, 1.0, 0.0]


def test_two_processes_skip_the_same_updates_and_keep_one_loss_scale(tmp_path):
    """An overflow in one process alone must not let the others go on with an update of their own."""
    script = tmp_path / "script.py"
    script.write_text(
        f"""import os, sys
sys.path[:0] = [{str(Path.cwd())!r}, {str(Path(__file__).parent)!r}]
import pytest, train_rl
from test_precise_training import break_gradients, checked
ids = [train_rl.load_examples("scenes", limit=20)[train_rl.example_index(0, place, 20)]["id"] for place in range(6)]
break_gradients(pytest.MonkeyPatch(), lambda example: example["id"] in (ids[3], ids[5]))  # of the second process
train_rl.main(checked(output_dir={str(tmp_path / "run")!r}, dtype="float16"))
"""
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = metrics_of(tmp_path / "run")
    assert [row["skipped_updates"] for row in rows] == [0.0, 1.0, 1.0, 0.0]
    assert [row["loss_scale"] for row in rows] == [65536.0, 32768.0, 16384.0, 16384.0]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [len(row.get("skipped_examples", ())) for row in samples] == [0, 1, 1, 0]
