"""Training in 4-bit, float16 and bfloat16 on the CPU: optimizers, stop and resume to the bit, skipped updates."""

import gc
import json
from functools import partial

import process_scenarios
import pytest
import small_run
import torch
from conftest import ragged_completions
from resumed_runs import Killed, as_bytes, die, on_call

import train_rl
from sayo.model.forward import group_logprobs
from sayo.model.loading import load_policy
from sayo.model.prompts import base_model, encode_prompt
from sayo.run import processes
from sayo.run.files import whole_checkpoint
from sayo.settings import ConfigError
from train_rl import make_optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
SMALL = {"num_generations": 2, "max_new_tokens": 10, "eval_limit": 1, "warmup_steps": 0}


def run(folder, **settings) -> list[dict]:
    return small_run.run(folder, **SMALL | settings)


@pytest.fixture
def loaded(monkeypatch) -> list[tuple]:
    """The policies that training loads, (model, processor) each."""
    found, load = [], processes.load_policy
    monkeypatch.setattr(processes, "load_policy", lambda *a, **k: found.append(load(*a, **k)) or found[-1])
    return found


def test_eight_bit_steps_are_those_of_adamw_within_the_rounding_of_its_state():
    import bitsandbytes

    found = []
    for name in ("adamw", "paged_adamw_8bit"):
        torch.manual_seed(0)
        weight, target = torch.nn.Parameter(torch.zeros(64, 128)), torch.randn(64, 128)
        optimizer = make_optimizer(name, [weight], lr=1e-2, weight_decay=0.02)
        for _ in range(60):
            (weight - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((optimizer, weight.detach()))
    (plain, expected), (paged, rounded) = found
    assert 0 < (expected - rounded).norm() / expected.norm() < 0.05
    assert type(paged) is bitsandbytes.optim.PagedAdamW8bit and paged.is_paged and paged.args.optim_bits == 8
    assert paged.state[weight]["state1"].dtype == torch.uint8
    for name in ("lr", "weight_decay", "betas", "eps"):
        assert paged.param_groups[0][name] == plain.param_groups[0][name], name


@pytest.mark.parametrize(
    ("dtype", "load_in_4bit", "settings"),
    [
        ("float16", False, {"lora_targets": "all-linear"}),
        ("bfloat16", True, {}),
        ("float16", True, {"gradient_checkpointing": True, "optimizer": "paged_adamw_8bit", "lora_rank": 32}),
    ],
)
def test_a_run_trains_stops_resumes_saves_and_loads_to_the_bit(
    tmp_path, monkeypatch, loaded, model_folders, examples, dtype, load_in_4bit, settings
):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=1024.0, growth_interval=3))
    precision = {"dtype": dtype, "load_in_4bit": load_in_4bit}
    whole, stopped, settings = tmp_path / "whole", tmp_path / "stopped", settings | precision
    rows = run(whole, **settings)
    ((model, processor),) = loaded
    assert [row["skipped_updates"] for row in rows] == [0.0] * 4 and all(row["grad_norm"] > 0 for row in rows)
    assert all(value is None or abs(value) < 1e6 for row in rows for value in row.values())
    assert rows[-1]["kl"] > rows[0]["kl"]
    assert all(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)
    scales = [1024.0, 1024.0, 2048.0, 2048.0] if dtype == "float16" else [None] * 4
    assert [row.get("loss_scale") for row in rows] == scales
    for layer in base_model(model).model.language_model.layers if "gradient_checkpointing" in settings else ():
        assert layer._gradient_checkpointing_func.keywords == {"use_reentrant": False}

    with monkeypatch.context() as patch, pytest.raises(Killed):
        on_call(patch, train_rl, "train_step", 5, die)  # the first call rehearses: in step 4
        run(stopped, **settings)
    assert whole_checkpoint(stopped)[0].name == "step-000002" and len(small_run.rows_of(stopped)) == 3
    assert run(stopped, resume=True, **settings) == rows
    states = [torch.load(folder / "checkpoints/step-000004/state.pt") for folder in (whole, stopped)]
    assert as_bytes(states[0]) == as_bytes(states[1])
    if "optimizer" in settings:
        assert b"torch.uint8" in as_bytes(states[0]["optimizer"])
    if dtype == "float16":
        assert states[0]["scaler"]["scale"] == 2048.0 and states[0]["scaler"]["_growth_tracker"] == 1

    again, _ = load_policy(model_folders["qwen3_vl"], adapter=str(stopped / "adapter"), lora_rank=0, **precision)
    prompt, completions = encode_prompt(processor, examples[0]), ragged_completions(processor)
    model.eval()
    with torch.no_grad():
        expected, found = (torch.cat(group_logprobs(m, prompt, completions)) for m in (model, again))
    assert torch.equal(found, expected)


def test_the_reference_is_the_quantized_base_and_no_second_copy(tmp_path, monkeypatch, loaded, model_folders):
    from bitsandbytes.nn import Linear4bit

    options = {"lora_rank": 0, "dtype": "float16"}
    base, full = (load_policy(model_folders["qwen3_vl"], load_in_4bit=bits, **options)[0] for bits in (True, False))
    gc.collect()
    before = {id(module) for module in gc.get_objects() if type(module) is Linear4bit}
    references, groups, loss, sample = [], [], train_rl.grpo_loss, train_rl.sample_groups

    def spy(logps, old_logps, ref_logps, *arguments, **options):
        references.append(torch.cat(ref_logps))
        own = {id(module) for module in loaded[0][0].modules()}
        alive = {id(module) for module in gc.get_objects() if type(module) is Linear4bit} - before
        assert alive and alive <= own
        return loss(logps, old_logps, ref_logps, *arguments, **options)

    monkeypatch.setattr(train_rl, "grpo_loss", spy)
    monkeypatch.setattr(train_rl, "sample_groups", lambda *a, **k: groups.extend(made := sample(*a, **k)) or made)
    rows = run(tmp_path / "run", load_in_4bit=True, dtype="float16", max_steps=2, try_biggest=False)
    assert rows[-1]["kl"] > 0 and len(loaded) == 1 and len(references) == len(groups) == 4
    for group, reference in zip(groups, references, strict=True):
        with torch.no_grad():
            alone, exact = (torch.cat(group_logprobs(m, group.prompt, group.completions)) for m in (base, full))
        assert torch.equal(reference, alone)
        assert not torch.allclose(alone, exact, atol=1e-2)  # the quantized base is another model than the full one


def test_an_overflow_at_the_loss_scale_skips_the_update_lowers_the_scale_and_goes_on(tmp_path, monkeypatch, capfd):
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**60, backoff_factor=2.0**-24)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    adapters, step = [], train_rl.train_step

    def remembering(model, *arguments):
        result = step(model, *arguments)
        adapters.append(as_bytes({n: weight.detach() for n, weight in model.named_parameters() if "lora_" in n}))
        return result

    monkeypatch.setattr(train_rl, "train_step", remembering)
    rows = run(tmp_path / "run", dtype="float16", try_biggest=False)
    assert [row["skipped_updates"] for row in rows] == [1.0, 1.0, 0.0, 0.0]
    assert [row["loss_scale"] for row in rows] == [2.0**36, 2.0**12, 2.0**12, 2.0**12]
    assert [row["grad_norm"] is None for row in rows] == [True, True, False, False]
    assert adapters[0] == adapters[1] != adapters[2]
    skipped = [row.get("skipped_examples") for row in small_run.rows_of(tmp_path / "run", "samples.jsonl")]
    assert [names and len(names) for names in skipped] == [1, 1, None, None]
    out = "".join(capfd.readouterr())
    assert out.count("update skipped, the gradient is not finite; it began with 'scenes-train") == 2
    assert "2 updates were skipped" in (tmp_path / "run" / "adapter" / "README.md").read_text()


@pytest.fixture
def break_gradients(monkeypatch):
    """process_scenarios.break_gradients, undone after the test."""
    monkeypatch.setattr(train_rl, "group_statistics", train_rl.group_statistics)
    return process_scenarios.break_gradients


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_example_is_named_and_costs_one_step_in_any_dtype(tmp_path, break_gradients, dtype):
    expected = run(tmp_path / "before", dtype=dtype, max_steps=1)
    broken = break_gradients([3])  # the second group of the second step
    rows = run(tmp_path / "run", dtype=dtype, warmup_steps=3)
    assert [row["skipped_updates"] for row in rows] == [0.0, 1.0, 0.0, 0.0]
    assert rows[0]["reward/total"] == expected[0]["reward/total"]
    samples = small_run.rows_of(tmp_path / "run", "samples.jsonl")
    assert [row.get("skipped_examples") for row in samples] == [None, broken, None, None]
    assert [round(row["learning_rate"], 6) for row in rows] == [0.0, 0.000333, 0.000333, 0.000667]
    json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1], parse_constant=pytest.fail)


def test_only_several_skipped_steps_in_a_row_stop_the_run_also_over_a_stop(tmp_path, monkeypatch, break_gradients):
    settings = {"max_skipped_steps": 3, "save_steps": 1}
    break_gradients(range(20))
    run(tmp_path / "run", **settings, max_steps=2)
    with pytest.raises(ConfigError, match=r"max_skipped_steps=3.*in a row, the last one step 3; lower learning_rate"):
        run(tmp_path / "run", **settings, resume=True)
    assert len(small_run.rows_of(tmp_path / "run")) == 3
    monkeypatch.undo()
    rows = run(tmp_path / "run", **settings, resume=True)
    assert [row["skipped_updates"] for row in rows] == [1.0, 1.0, 1.0, 0.0]
