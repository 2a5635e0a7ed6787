"""GRPO: the loss against TRL, the loop against itself: same seed, same metrics; stopped and resumed, the same too."""

import json
import math
from dataclasses import fields
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import GOOD, write_jsonl
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_run import run

from reward import COMPONENTS, RewardConfig, reward_weights
from rollout import Group
from sayo.examples.pictures import DataError
from sayo.model.forward import TokenStatistics
from sayo.model.loading import load_policy
from sayo.model.prompts import base_model
from sayo.run.metrics import advantage_parts, group_metrics, step_metrics, step_notes
from train_rl import LOSS_TYPES, Config, example_index, group_advantages, grpo_loss, top_entropy_tokens


@settings(max_examples=60)
@given(st.lists(st.floats(-2, 3, width=32), min_size=2, max_size=16))
def test_advantages_against_numpy(rewards):
    values = np.array(rewards)
    found = group_advantages(torch.tensor(values))
    np.testing.assert_allclose(found, (values - values.mean()) / (values.std(ddof=1) + 1e-4), atol=1e-6)
    others = [value - np.delete(values, index).mean() for index, value in enumerate(values)]
    np.testing.assert_allclose(group_advantages(torch.tensor(values), "none", "leave_one_out"), others, atol=1e-6)
    found = group_advantages(torch.tensor(values), "batch", batch_std=torch.tensor(0.5))
    np.testing.assert_allclose(found, (values - values.mean()) / 0.5001, atol=1e-6)
    np.testing.assert_allclose(group_advantages(torch.tensor(values), scale="none"), values - values.mean(), atol=1e-6)
    # Rounding in the mean of equal rewards, divided by 1e-4, was up to 5e-3: noise that became gradient.
    assert not group_advantages(torch.full((len(rewards),), rewards[0])).any()


def ragged(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [-torch.rand(length, generator=generator) * 2 for length in lengths]


def trl_loss(
    new, old, ref, advantages, *, beta, clip_low, clip_high, loss_type, max_new_tokens,
    importance_sampling_level="token", clip_dual=None, entropies=None, quantile=1.0, kept=None,
):  # fmt: skip
    """TRL's GRPOTrainer computing the loss of the same numbers, on a padded batch."""
    from trl import GRPOTrainer

    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones(len(part)) for part in new])
    mask = mask if kept is None else mask * kept[:, None]
    off = dict.fromkeys("use_vllm use_liger_kernel aux_loss_enabled use_adaptive_entropy".split(), False)
    trainer = MagicMock(beta=beta, epsilon_low=clip_low, epsilon_high=clip_high, loss_type=loss_type, **off)
    trainer.configure_mock(max_completion_length=max_new_tokens, top_entropy_quantile=quantile)
    trainer.configure_mock(importance_sampling_level=importance_sampling_level, off_policy_mask_threshold=None)
    trainer.configure_mock(_entropy_bonus_enabled=False)
    trainer.current_gradient_accumulation_steps = trainer.accelerator.num_processes = 1
    trainer.args.configure_mock(delta=clip_dual, steps_per_generation=1, use_bias_correction_kl=False)
    trainer.args.configure_mock(sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)
    trainer.model.training, trainer.accelerator.gather = True, lambda value: value
    trainer.accelerator.pad_across_processes = lambda value, **_: value
    trainer.get_high_entropy_mask = partial(GRPOTrainer.get_high_entropy_mask, trainer)
    padded_entropies = torch.zeros_like(mask) if entropies is None else pad(entropies)
    trainer._get_per_token_logps_and_entropies.return_value = (pad(new), padded_entropies, None)
    trainer._metrics = {"train": MagicMock()}
    inputs = {"prompt_ids": torch.zeros(len(new), 1, dtype=torch.long), "prompt_mask": torch.ones(len(new), 1)}
    inputs |= {"completion_ids": torch.zeros_like(mask, dtype=torch.long), "completion_mask": mask}
    inputs |= {"advantages": advantages, "num_items_in_batch": mask.sum()}
    inputs |= {"old_per_token_logps": pad(old), "ref_per_token_logps": pad(ref)}
    return GRPOTrainer._compute_loss(trainer, MagicMock(), inputs)


LENGTHS, ADVANTAGES = (7, 1, 12, 4), torch.tensor([1.2, -0.7, 0.4, -0.9])
VARIANTS = {  # of every loss type: what our loss and TRL's are given
    "plain": {},
    "GSPO": {"importance_sampling_level": "sequence"},
    "dual clip": {"clip_dual": 1.4},
    "80/20": {"quantile": 0.2},
    "truncated masked": {"kept": torch.tensor([True, False, True, True])},
}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_and_gradient_equal_trl(loss_type, variant, beta):
    old, ref, entropies = (ragged(LENGTHS, seed) for seed in (1, 2, 5))
    options = {"beta": beta, "clip_low": 0.1, "clip_high": 1.25 if loss_type == "cispo" else 0.25}
    options |= {"loss_type": loss_type, "max_new_tokens": 20} | VARIANTS[variant]
    own, theirs = dict(options), options | {"entropies": entropies}
    if quantile := own.pop("quantile", None):
        own["policy_tokens"] = top_entropy_tokens(entropies, quantile)
        assert own["policy_tokens"].sum() == 5  # of 24
    results = []
    for function, arguments in ((trl_loss, theirs), (lambda *a, **k: grpo_loss(*a, **k)[0], own)):
        new = [part.clone().requires_grad_() for part in ragged(LENGTHS, 3)]
        loss = function(new, old, ref, ADVANTAGES, **arguments)
        loss.backward()
        results.append((loss.detach(), torch.cat([part.grad for part in new])))
    torch.testing.assert_close(*results)
    assert results[0][1].abs().sum() > 0


@pytest.mark.parametrize("name", ["importance_sampling_level", "clip_dual", "cispo", "sapo"])
def test_where_every_ratio_is_one_the_variants_have_one_gradient(name):
    """With one update for each batch, which Config.notes says."""
    loss_type = {"cispo": "cispo", "sapo": "sapo"}.get(name, "grpo")
    given = {"importance_sampling_level": {name: "sequence"}, "clip_dual": {name: 3.0}}.get(name, {"loss_type": name})
    (note,) = Config(**given).notes()
    assert f"{next(iter(given))}={next(iter(given.values()))}" in note and "loss_type=" in note
    assert not Config(**given, num_iterations=2).notes() and not Config().notes()
    plain = note.rpartition("loss_type=")[2].split()[0]
    gradients = []
    for options in ({"loss_type": plain}, {"loss_type": loss_type} | given):
        new = [part.clone().requires_grad_() for part in ragged(LENGTHS, 3)]
        config = Config(**options)
        grpo_loss(new, ragged(LENGTHS, 3), None, ADVANTAGES, beta=0.0, **config.loss_arguments())[0].backward()
        gradients.append(torch.cat([part.grad for part in new]))
    torch.testing.assert_close(*gradients)


def test_clips_are_those_of_the_method_where_none_is_given():
    for options, clips in (
        ({}, (0.2, 0.2)),
        ({"importance_sampling_level": "sequence"}, (3e-4, 4e-4)),
        ({"loss_type": "cispo"}, (1.0, 5.0)),
        ({"importance_sampling_level": "sequence", "clip_high": 0.1}, (3e-4, 0.1)),
    ):
        config = Config(**options)
        assert (config.clip_low, config.clip_high) == clips


def test_clips_that_a_loss_does_not_read_are_noted():
    for options, names in (
        (
            {"loss_type": "sapo", "clip_low": 0.1, "clip_dual": 3.0},
            "clip_low, clip_dual: loss_type=sapo does not read it",
        ),
        ({"loss_type": "cispo", "clip_low": 0.3}, "clip_low: loss_type=cispo does not read it"),
    ):
        assert names in Config(**options).notes()[0]
    assert not Config(loss_type="cispo", clip_high=3.0, num_iterations=2).notes()


def test_advantages_of_tokens_weigh_each_token():
    new, old = (ragged((3, 2), seed) for seed in (1, 2))
    options = WITHOUT_KL | {"loss_type": "grpo"}
    by_completion, _ = grpo_loss(new, old, None, torch.tensor([1.0, -0.5]), **options)
    by_token, _ = grpo_loss(new, old, None, [torch.ones(3), torch.full((2,), -0.5)], **options)
    assert by_completion == by_token
    first_only, _ = grpo_loss(new, old, None, [torch.tensor([1.0, 0, 0]), torch.zeros(2)], **options)
    ratio = (new[0][0] - old[0][0]).exp()
    assert first_only == pytest.approx(-min(ratio, ratio.clamp(0.8, 1.2)).item() / 6)


WITHOUT_KL = {"beta": 0, "clip_low": 0.2, "clip_high": 0.2}


def test_loss_statistics():
    new, old, ref = (ragged((3, 2), seed) for seed in (1, 1, 2))
    _, stats = grpo_loss(new, old, ref, torch.ones(2), beta=0.1, clip_low=0.2, clip_high=0.2, loss_type="grpo")
    difference = torch.cat(ref) - torch.cat(new)
    assert stats["kl"] == pytest.approx((difference.exp() - difference - 1).mean().item(), rel=1e-5)
    assert stats["clip_fraction"] == 0  # on-policy
    moved = [logp + 0.5 for logp in old]  # ratio 1.65 everywhere: clipped where the advantage is positive
    _, stats = grpo_loss(moved, old, None, torch.tensor([1.0, -1.0]), loss_type="grpo", **WITHOUT_KL)
    assert stats["clip_fraction"] == pytest.approx(3 / 5)


def test_wrong_arguments_are_refused():
    loss = partial(grpo_loss, ragged((3, 2), 1), ragged((3, 2), 1), None, torch.ones(2), clip_low=0.2, clip_high=0.2)
    for function, words in (
        (partial(group_advantages, torch.ones(1)), "num_generations must be 2 or more"),
        (partial(group_advantages, torch.ones(2), "batch"), "scale='batch'"),
        (partial(group_advantages, torch.ones(2), baseline="rloo"), "baseline='rloo'.*leave_one_out"),
        (partial(loss, beta=0, loss_type="ppo"), "loss_type='ppo'.*'dr_grpo'"),
        (partial(loss, beta=0.1, loss_type="grpo"), "beta=0.1 needs ref_logps"),
    ):
        with pytest.raises(ValueError, match=words):
            function()


def test_dapo_weighs_all_tokens_of_a_step_alike():
    """Two groups with the step's token count give the loss of one group that holds all their completions."""
    lengths, advantages = (4, 9, 2, 5), torch.tensor([1.0, -0.5, 0.3, -0.8])
    new, old = ragged(lengths, 4), ragged(lengths, 5)
    options = WITHOUT_KL | {"loss_type": "dapo"}
    whole, _ = grpo_loss(new, old, None, advantages, **options)
    halves = (slice(0, 2), slice(2, 4))
    parts = [grpo_loss(new[h], old[h], None, advantages[h], num_items=20, **options)[0] for h in halves]
    torch.testing.assert_close(sum(parts), whole)


def test_empty_completions_have_no_loss():
    empty = [torch.zeros(0), torch.zeros(0)]
    for loss_type in LOSS_TYPES:
        loss, stats = grpo_loss(empty, empty, None, torch.tensor([1.0, -1.0]), **WITHOUT_KL, loss_type=loss_type)
        assert loss == 0 and math.isnan(stats["kl"]) and stats["clip_fraction"] == 0, loss_type


STATISTICS = TokenStatistics([], [torch.tensor([1.0, 3.0]), torch.tensor([2.0])], [], [])
ONE_GROUP = Group({}, None, [torch.tensor([1, 2]), torch.tensor([3])], ["", ""], [True, False], STATISTICS)


def with_total(scores: dict, weights: dict) -> dict:
    return scores | {"total": sum(weight * scores[name] for name, weight in weights.items())}


@pytest.mark.parametrize(
    ("attention", "accuracy", "shares", "reason"),
    [
        ([0.0, 1.0], [0.0, 1.0], [0.5, 0, 0.5, 0, 0], "both say the same"),
        ([0.1, 0.4], [1.0, 1.0], [1, 0, 0, 0, 0], "accuracy does not tell the completions apart"),
        ([1.0, 1.0], [1.0, 1.0], [0, 0, 0, 0, 0], "nothing does"),
    ],
)
def test_advantage_shares_say_which_reward_drives_the_group(attention, accuracy, shares, reason):
    weights = reward_weights(Config()) | {"attention": 1.0, "format": 1.0, "accuracy": 1.0}
    scores = dict.fromkeys(COMPONENTS, torch.ones(2))
    scores = with_total(scores | {"attention": torch.tensor(attention), "accuracy": torch.tensor(accuracy)}, weights)
    scores |= {"tas": torch.tensor([0.5, math.nan])}
    found = step_metrics([group_metrics(ONE_GROUP, scores, group_advantages(scores["total"]), weights)])
    assert [found[f"advantage_share/{name}"] for name in COMPONENTS] == pytest.approx(shares), reason
    known = {"reward/tas": 0.5, "entropy": 2.0, "completion_length": 1.5, "truncated": 0.5, "empty_completions": 0.5}
    assert known.items() <= found.items() and found["zero_advantage_groups"] == (not any(shares))
    assert found["reward_std/accuracy"] == pytest.approx(np.std(accuracy))


@settings(max_examples=60)
@given(st.lists(st.tuples(*[st.integers(-8, 8)] * len(COMPONENTS)), min_size=2, max_size=8), st.integers(0, 2))
def test_the_parts_of_any_advantage_add_up_to_its_squares(rows, kind):
    scores = {name: torch.tensor(row) / 8.0 for name, row in zip(COMPONENTS, zip(*rows, strict=True), strict=True)}
    weights = dict(zip(COMPONENTS, (1.0, 0.5, 2.0, 0.25, 1.5), strict=True))
    scores = with_total(scores, weights)
    total = scores["total"]
    ranks = (total - total.mean()).argsort().argsort().sub((len(rows) - 1) / 2).clamp(-1, 1)  # an invented advantage
    advantages = (group_advantages(total), group_advantages(total, "none"), ranks)[kind]
    parts = advantage_parts(advantages, scores, weights)
    assume(kind < 2 or abs(float((total - total.mean()) @ advantages)) > 1e-2)
    assert sum(parts.values()) == pytest.approx(advantages.square().sum().item(), rel=1e-3, abs=1e-6)
    if kind == 0:  # the formula of the paper: each component's own share of the advantage
        for name, weight in weights.items():
            own = weight * (scores[name] - scores[name].mean()) / (total.std() + 1e-4)
            assert parts[name] == pytest.approx((own * advantages).sum().item(), rel=1e-3, abs=1e-4), name


def test_every_component_has_a_weight():
    assert {f"{name}_weight" for name in COMPONENTS} == {
        f.name for f in fields(RewardConfig) if f.name.endswith("_weight")
    }
    assert list(reward_weights(Config())) == list(COMPONENTS)


def test_a_note_about_groups_that_teach_nothing_is_given_once():
    metrics, warned = {"empty_completions": 0.75, "identical_groups": 0.5}, set()
    (first,) = step_notes(3, metrics, {}, warned)
    metrics["identical_groups"] = 1.0
    (second,), third = step_notes(4, metrics, {}, warned), step_notes(5, metrics, {}, warned)
    assert first.startswith("step 3: 75% of the completions are empty") and third == []
    assert second.startswith("step 4: 100% of the groups hold the same completion")


def test_unknown_values_are_null_in_json():
    row = {"reward/tas": math.nan, "square/tas": math.nan, "variance/total": 0.0}
    row |= {f"variance/{name}": 0.0 for name in COMPONENTS}
    assert "NaN" not in json.dumps(step_metrics([row]))
    assert step_metrics([row, row | {"reward/tas": 0.25, "square/tas": 0.25**2}])["reward/tas"] == 0.25


def test_every_epoch_is_a_new_permutation():
    first, second = ([example_index(7, start + place, 10) for place in range(10)] for start in (0, 10))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second and first != [example_index(8, position, 10) for position in range(10)]


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
    promised = "kl entropy clip_fraction grad_norm completion_length truncated zero_advantage_groups".split()
    promised += [f"{kind}/{name}" for kind in ("reward", "reward_std", "advantage_share") for name in COMPONENTS]
    assert all(isinstance(row[name], float) for row in rows for name in promised)
    times = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    for stage in ("rollout", "reference", "score", "update"):
        assert times[f"time/{stage}_seconds"] > 0 and times[f"time/{stage}_tokens_per_second"] > 0
    assert rows[0]["kl"] < 1e-9 < rows[-1]["kl"]  # the policy starts as its reference and moves away
    shares = [sum(row[f"advantage_share/{name}"] for name in COMPONENTS) for row in rows]
    assert shares == pytest.approx([1.0] * 4, abs=1e-3)


def test_the_weights_change_and_the_base_does_not(finished_run, model_folders):
    adapter = str(finished_run[0] / "adapter")
    trained, plain = (load_policy(model_folders["qwen3_vl"], adapter=a, lora_rank=0)[0] for a in (adapter, None))
    assert all(weight.any() for name, weight in trained.named_parameters() if "lora_B" in name)
    base = {name.replace(".base_layer", ""): weight for name, weight in base_model(trained).named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, base[name]), name


def test_the_same_seed_gives_the_same_metrics_and_another_gives_others(finished_run, tmp_path):
    folder, rows = finished_run
    assert run(tmp_path / "again") == rows
    assert (tmp_path / "again" / "samples.jsonl").read_text() == (folder / "samples.jsonl").read_text()
    assert run(tmp_path / "other", seed=1, max_steps=1, eval_limit=1) != rows[:1]


@pytest.mark.parametrize(
    "settings",
    [
        # Further updates on the same completions are off-policy: ratios are clipped.
        {"loss_type": "dapo", "num_iterations": 3, "beta": 0.0, "advantage_scale": "none", "learning_rate": 2e-2},
        {"loss_type": "dr_grpo", "load_in_4bit": True, "dtype": "float32"},
        {"loss_type": "bnpo", "lora_targets": "all-linear", "lr_scheduler": "cosine"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_settings_that_change_the_way_run_through(tmp_path, settings):
    rows = run(tmp_path / "run", max_steps=2, eval_limit=1, **settings)
    assert len(rows) == 2 and rows[-1]["grad_norm"] > 0
    assert (rows[-1]["clip_fraction"] > 0) == ("num_iterations" in settings)


def test_gradient_checkpointing_changes_memory_not_numbers(finished_run, tmp_path):
    rows = run(tmp_path / "run", max_steps=2, eval_limit=1, gradient_checkpointing=True)
    for name in ("grad_norm", "reward/total", "loss"):
        expected = [row[name] for row in finished_run[1][:2]]
        assert [row[name] for row in rows] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_resuming_nothing_starts_and_says_so(finished_run, tmp_path, capsys):
    assert run(tmp_path / "empty", resume=True, max_steps=1, eval_limit=1) == finished_run[1][:1]
    assert "holds no run yet: it starts at step 0" in capsys.readouterr().out


def test_bad_data_stops_the_run_before_it_starts(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png"):
        run(tmp_path / "run", data=write_jsonl(tmp_path, GOOD | {"image": "gone.png"}))
    assert not (tmp_path / "run").exists()


def test_groups_of_equal_rewards_give_way_to_other_prompts_and_a_resumed_run_is_the_same(tmp_path):
    """DAPO's dynamic sampling, of answers that are equally right or wrong."""
    options = {"dynamic_sampling": 3, "dynamic_sampling_reward": "accuracy", "num_generations": 2}
    whole, plain = run(tmp_path / "whole", **options), run(tmp_path / "plain", num_generations=2)
    counts = [row["resampled_groups"] for row in whole]
    assert max(counts) > 0 and max(counts) <= 2 and "resampled_groups" not in plain[0]
    run(tmp_path / "stopped", **options, max_steps=2)
    assert run(tmp_path / "stopped", **options, resume=True) == whole
    (problem,) = Config(dynamic_sampling=2, regions="attention").problems()
    assert "dynamic_sampling=2" in problem
