"""GRPO: the loss against TRL, the loop against itself: same seed, same metrics; stopped and resumed, the same too."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import SMALL

import train_rl
from checkpoint import whole_checkpoint
from config import ConfigError
from data.examples import DataError
from metrics import group_metrics, step_metrics
from prompts import base_model
from reward import COMPONENTS
from rollout import Group
from train_rl import LOSS_TYPES, Config, example_index, group_advantages, grpo_loss
from vlm import TokenStatistics, load_policy

# --- advantages and loss ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-2, 3, width=32), min_size=2, max_size=16))
def test_advantages_against_numpy(rewards):
    values = np.array(rewards)
    found = group_advantages(torch.tensor(values))
    np.testing.assert_allclose(found, (values - values.mean()) / (values.std(ddof=1) + 1e-4), atol=1e-6)
    np.testing.assert_allclose(group_advantages(torch.tensor(values), scale="none"), values - values.mean(), atol=1e-6)


def test_advantages_edges():
    assert group_advantages(torch.ones(4)).tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="num_generations must be 2 or more"):
        group_advantages(torch.ones(1))
    with pytest.raises(ValueError, match="scale='batch'"):
        group_advantages(torch.ones(2), scale="batch")


def ragged(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [-torch.rand(length, generator=generator) * 2 for length in lengths]


def trl_loss(new, old, ref, advantages, *, beta, clip_low, clip_high, loss_type, max_new_tokens):
    """TRL's GRPOTrainer computing the loss of the same numbers, on a padded batch."""
    from unittest.mock import MagicMock

    from trl import GRPOTrainer

    def pad(parts):
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    mask = pad([torch.ones(len(part)) for part in new])
    trainer = MagicMock()
    trainer.configure_mock(
        beta=beta,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        loss_type=loss_type,
        max_completion_length=max_new_tokens,
        top_entropy_quantile=1.0,
        importance_sampling_level="token",
        use_vllm=False,
        use_liger_kernel=False,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
    )
    trainer.args.delta, trainer.args.steps_per_generation = None, 1
    trainer.args.use_bias_correction_kl = False
    trainer.model.training = True
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather = lambda value: value
    trainer._get_per_token_logps_and_entropies.return_value = (pad(new), torch.zeros_like(mask), None)
    trainer._metrics = {"train": MagicMock()}
    inputs = {
        "prompt_ids": torch.zeros(len(new), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(new), 1),
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": pad(old),
        "ref_per_token_logps": pad(ref),
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, MagicMock(), inputs)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_equal_trl(loss_type, beta):
    lengths = (7, 1, 12, 4)
    old, ref = ragged(lengths, 1), ragged(lengths, 2)
    advantages = torch.tensor([1.2, -0.7, 0.4, -0.9])
    options = {"beta": beta, "clip_low": 0.1, "clip_high": 0.25, "loss_type": loss_type, "max_new_tokens": 20}
    results = []
    for function in (trl_loss, lambda *a, **k: grpo_loss(*a, **k)[0]):
        new = [part.clone().requires_grad_() for part in ragged(lengths, 3)]
        loss = function(new, old, ref, advantages, **options)
        loss.backward()
        results.append((loss.detach(), torch.cat([part.grad for part in new])))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][1].abs().sum() > 0


def test_loss_statistics():
    new, old, ref = (ragged((3, 2), seed) for seed in (1, 1, 2))
    _, stats = grpo_loss(new, old, ref, torch.ones(2), beta=0.1, clip_low=0.2, clip_high=0.2, loss_type="grpo")
    difference = torch.cat(ref) - torch.cat(new)
    assert stats["kl"] == pytest.approx((difference.exp() - difference - 1).mean().item(), rel=1e-5)
    assert stats["clip_fraction"] == 0  # on-policy
    moved = [logp + 0.5 for logp in old]  # ratio 1.65 everywhere: clipped where the advantage is positive
    options = {"beta": 0, "clip_low": 0.2, "clip_high": 0.2}
    _, stats = grpo_loss(moved, old, None, torch.tensor([1.0, -1.0]), loss_type="grpo", **options)
    assert stats["clip_fraction"] == pytest.approx(3 / 5)
    with pytest.raises(ValueError, match="loss_type='ppo'.*'dr_grpo'"):
        grpo_loss(new, old, ref, torch.ones(2), loss_type="ppo", **options)


def test_dapo_weighs_all_tokens_of_a_step_alike():
    """Two groups with the step's token count give the loss of one group that holds all their completions."""
    lengths, advantages = (4, 9, 2, 5), torch.tensor([1.0, -0.5, 0.3, -0.8])
    new, old = ragged(lengths, 4), ragged(lengths, 5)
    options = {"beta": 0, "clip_low": 0.2, "clip_high": 0.2, "loss_type": "dapo"}
    whole, _ = grpo_loss(new, old, None, advantages, **options)
    parts = [
        grpo_loss(new[half], old[half], None, advantages[half], num_items=20, **options)[0]
        for half in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts), whole)


# --- metrics ----------------------------------------------------------------------------------------------------


def test_advantage_shares_say_which_reward_drives_the_group():
    config = Config(attention_weight=1.0, format_weight=1.0, accuracy_weight=1.0)
    statistics = TokenStatistics([], [torch.tensor([1.0, 3.0]), torch.tensor([2.0])], [], [])
    completions = [torch.tensor([1, 2]), torch.tensor([3])]
    group = Group({}, None, completions, ["", ""], [True, False], statistics)

    def shares(attention, accuracy):
        scores = dict.fromkeys(COMPONENTS, torch.ones(2)) | {"attention": attention, "accuracy": accuracy}
        scores["total"] = sum(scores.values())
        scores |= {"tas": torch.tensor([0.5, math.nan])}
        return step_metrics([group_metrics(group, scores, group_advantages(scores["total"]), config)])

    half = shares(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert [half[f"advantage_share/{name}"] for name in COMPONENTS] == pytest.approx([0.5, 0, 0.5, 0, 0])
    alone = shares(torch.tensor([0.1, 0.4]), torch.tensor([1.0, 1.0]))
    assert [alone[f"advantage_share/{name}"] for name in COMPONENTS] == pytest.approx([1, 0, 0, 0, 0])
    nothing = shares(torch.ones(2), torch.ones(2))
    assert nothing["zero_advantage_groups"] == 1 and nothing["advantage_share/attention"] == 0
    assert half["reward/tas"] == 0.5 and half["entropy"] == 2.0
    assert half["completion_length"] == 1.5 and half["truncated"] == 0.5
    assert half["reward_std/accuracy"] == pytest.approx(0.5)


def test_unknown_values_are_null_in_json():
    row = {"reward/tas": math.nan, "square/tas": math.nan, "variance/total": 0.0}
    row |= {f"variance/{name}": 0.0 for name in COMPONENTS}
    assert "NaN" not in json.dumps(step_metrics([row]))
    assert step_metrics([row, row | {"reward/tas": 0.25, "square/tas": 0.25**2}])["reward/tas"] == 0.25


def test_every_epoch_is_a_new_permutation():
    first = [example_index(7, position, 10) for position in range(10)]
    second = [example_index(7, position, 10) for position in range(10, 20)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != [example_index(8, position, 10) for position in range(10)]


# --- the loop ---------------------------------------------------------------------------------------------------


def run(folder, **settings):
    train_rl.main(Config(**(SMALL | {"output_dir": str(folder)} | settings)))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "first"
    return folder, run(folder)


def test_a_run_leaves_what_it_promises(finished_run):
    folder, rows = finished_run
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in ("config.yaml", "samples.jsonl", "curves.png", "adapter/adapter_model.safetensors", "evaluation.json"):
        assert (folder / name).stat().st_size > 0
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    promised = [
        "kl",
        "entropy",
        "clip_fraction",
        "grad_norm",
        "completion_length",
        "truncated",
        "zero_advantage_groups",
    ]
    promised += [f"{kind}/{name}" for kind in ("reward", "reward_std", "advantage_share") for name in COMPONENTS]
    assert all(isinstance(row[name], float) for row in rows for name in promised)
    times = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    for stage in ("rollout", "reference", "update"):
        assert times[f"time/{stage}_seconds"] > 0 and times[f"time/{stage}_tokens_per_second"] > 0
    assert rows[0]["kl"] < 1e-9 < rows[-1]["kl"]  # the policy starts as its reference and moves away
    shares = [sum(row[f"advantage_share/{name}"] for name in COMPONENTS) for row in rows]
    assert shares == pytest.approx([1.0] * 4, abs=1e-3)


def test_the_weights_change_and_the_base_does_not(finished_run, model_folders):
    folder, _ = finished_run
    trained, _ = load_policy(model_folders["qwen3_vl"], adapter=str(folder / "adapter"), lora_rank=0)
    plain, _ = load_policy(model_folders["qwen3_vl"], lora_rank=0)
    moved = [parameter.abs().max() for name, parameter in trained.named_parameters() if "lora_B" in name]
    assert min(moved) > 0
    base = {
        name.replace(".base_layer", ""): p for name, p in base_model(trained).named_parameters() if "lora_" not in name
    }
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, base[name]), name


def test_the_same_seed_gives_the_same_metrics_and_another_gives_others(finished_run, tmp_path):
    folder, rows = finished_run
    assert run(tmp_path / "again") == rows
    assert (tmp_path / "again" / "samples.jsonl").read_text() == (folder / "samples.jsonl").read_text()
    assert run(tmp_path / "other", seed=1, max_steps=1, eval_limit=1) != rows[:1]


def test_a_stopped_run_resumed_gives_the_metrics_of_one_that_was_not_stopped(finished_run, tmp_path, monkeypatch):
    folder, rows = finished_run
    stopped = tmp_path / "stopped"
    step = train_rl.train_step

    def stop_in_step_four(model, processor, optimizer, examples, number, config, accelerator):
        if number == 3:
            raise KeyboardInterrupt
        return step(model, processor, optimizer, examples, number, config, accelerator)

    monkeypatch.setattr(train_rl, "train_step", stop_in_step_four)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    monkeypatch.undo()
    assert whole_checkpoint(stopped)[0].name == "step-000002"
    assert len((stopped / "metrics.jsonl").read_text().splitlines()) == 3  # step 3 is done again
    shutil.copytree(stopped / "checkpoints" / "step-000002", stopped / "checkpoints" / "step-000003.partial")
    assert run(stopped, resume=True) == rows
    assert (stopped / "samples.jsonl").read_text() == (folder / "samples.jsonl").read_text()
    before = json.loads((stopped / "evaluation.json").read_text())["summary"]
    assert before == json.loads((folder / "evaluation.json").read_text())["summary"]


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"loss_type": "dapo", "num_iterations": 2, "beta": 0.0, "advantage_scale": "none"},
        {"loss_type": "dr_grpo", "load_in_4bit": True, "dtype": "float32"},
        {"loss_type": "bnpo", "lora_targets": "all-linear", "lr_scheduler": "cosine"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_that_change_the_way_run_through(tmp_path, settings):
    rows = run(tmp_path / "run", max_steps=2, eval_limit=1, **settings)
    assert len(rows) == 2 and rows[-1]["grad_norm"] > 0


def test_gradient_checkpointing_changes_memory_not_numbers(finished_run, tmp_path):
    rows = run(tmp_path / "run", max_steps=2, eval_limit=1, gradient_checkpointing=True)
    for found, expected in zip(rows, finished_run[1], strict=False):
        for name in ("grad_norm", "reward/total", "loss"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)


def test_a_second_update_on_the_same_completions_is_off_policy(tmp_path):
    rows = run(tmp_path / "run", max_steps=1, eval_limit=1, num_iterations=6, learning_rate=2e-2, warmup_steps=0)
    assert rows[0]["clip_fraction"] > 0


def test_nothing_is_overwritten_and_resuming_nothing_starts_and_says_so(finished_run, tmp_path, capsys):
    """A job that is queued again has one command; killed early, it left a folder that --resume refused."""
    with pytest.raises(ConfigError, match="holds a run already.*--resume"):
        run(finished_run[0])
    assert run(tmp_path / "empty", resume=True, max_steps=1, eval_limit=1) == finished_run[1][:1]
    assert "holds no run yet: it starts at step 0" in capsys.readouterr().out


def test_bad_data_stops_the_run_before_it_starts(tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        '{"image": "gone.png", "question": "Where?", "answer": "x", "boxes": [[0,0,2,2]]}\n'
    )
    with pytest.raises(DataError, match=r"gone\.png"):
        run(tmp_path / "run", data=str(tmp_path / "rows.jsonl"))
    assert not (tmp_path / "run").exists()


def test_a_run_that_stopped_before_its_first_checkpoint_starts_again(finished_run, tmp_path, monkeypatch):
    """It could be neither resumed ("no checkpoint") nor started again ("holds a run already")."""
    stopped = tmp_path / "stopped"
    step = train_rl.train_step

    def stop_in_step_two(*arguments):
        if arguments[4] == 1:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(train_rl, "train_step", stop_in_step_two)
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    monkeypatch.undo()
    assert whole_checkpoint(stopped)[0] is None
    assert run(stopped, resume=True) == finished_run[1]


def test_a_resumed_run_keeps_its_settings(finished_run):
    """config.yaml said what the resumed run did not use: the optimizer's state and the adapter win."""
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.001, is 0\.1; lora_rank was 2, is 4"):
        run(finished_run[0], resume=True, lora_rank=4, learning_rate=0.1)
    with pytest.raises(ConfigError, match="max_steps=1.*further already"):
        run(finished_run[0], resume=True, max_steps=1)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_dir_that_cannot_be_is_named_first(tmp_path, place):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is no folder that can be written to"):
        run(tmp_path / place)


@settings(max_examples=100, deadline=None)
@given(st.floats(-3, 3, width=32), st.integers(2, 16))
def test_equal_rewards_give_exactly_zero_advantages(reward, num_generations):
    """Rounding in the mean, divided by 1e-4, was up to 5e-3: noise that became gradient."""
    assert group_advantages(torch.full((num_generations,), reward)).tolist() == [0.0] * num_generations


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_empty_completions_have_no_loss_and_a_missing_reference_is_named(loss_type):
    options = {"clip_low": 0.2, "clip_high": 0.2, "loss_type": loss_type}
    empty = [torch.zeros(0), torch.zeros(0)]
    loss, stats = grpo_loss(empty, empty, None, torch.tensor([1.0, -1.0]), beta=0, **options)
    assert loss == 0 and math.isnan(stats["kl"]) and stats["clip_fraction"] == 0
    with pytest.raises(ValueError, match="beta=0.1 needs ref_logps"):
        grpo_loss(empty, empty, None, torch.tensor([1.0, -1.0]), beta=0.1, **options)
