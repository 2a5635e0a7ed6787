"""Options beside the paper's reward, each against its formula: gate, normalization, border, control, newer rewards."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import PACKED, adapted
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import reward
from evaluate import EvaluateConfig, answer_examples
from reward import RewardConfig, memory_reward, region_reward, score_group, select_random, without_border
from rollout import Group, group_generator, sample_group
from sayo.extensions.ease import ease_layer, ease_loss, target_map
from sayo.model.families import PolicyError
from sayo.model.forward import attention_maps, token_statistics
from sayo.model.loading import load_policy
from sayo.model.prompts import base_model, encode_prompt, token_cells
from train_rl import AdaptiveBeta, Config, TrainState, train_step

masses = st.lists(st.tuples(st.floats(0.001, 0.9), st.floats(0, 1)), min_size=1, max_size=40)


@pytest.fixture
def group(policy, examples):
    """Five completions of which the second answers rightly."""
    found = sample_group(*policy, examples[0], num_generations=5, max_new_tokens=30, generator=group_generator(3))
    found.texts = [f"I look. <answer>{examples[0]['answer'] if number == 1 else 'no'}</answer>" for number in range(5)]
    return found


@given(masses)
def test_region_and_memory_rewards_against_numpy(rows):
    image = np.array([mass for mass, _ in rows])
    target = image * np.array([share for _, share in rows])
    late = np.arange(1, len(rows) + 1) / len(rows)
    expected = (late * target / (image + 1e-8)).sum() / late.sum()
    assert region_reward(torch.tensor(target), torch.tensor(image)) == pytest.approx(expected, abs=1e-6)
    third = max(1, len(rows) // 3)
    expected = 1 + image[len(rows) - third :].mean() - image[:third].mean()
    assert memory_reward(torch.tensor(image)) == pytest.approx(expected, abs=1e-6)


def test_region_reward_weighs_late_tokens_and_memory_reward_what_stays():
    image, nothing = torch.full((4,), 0.5), torch.zeros(0)
    assert region_reward(torch.tensor([0.5, 0.0, 0.0, 0.0]), image) == pytest.approx(0.1)
    assert region_reward(torch.tensor([0.0, 0.0, 0.0, 0.5]), image) == pytest.approx(0.4)
    assert memory_reward(torch.tensor([0.6, 0.3, 0.2])) == pytest.approx(0.6)
    assert region_reward(nothing, nothing) == 0 and memory_reward(nothing) == 0, "silence never pays"


def test_masses_are_those_of_the_attention_maps(policy, group, model_folders):
    """Means over weighted tokens times their number are sums: against the masses read from eager attentions."""
    scores = score_group(policy[0], group, RewardConfig())
    eager, _ = adapted(model_folders["qwen3_vl"], attn="eager")
    for number, (completion, length) in enumerate(zip(group.completions, group.lengths, strict=True)):
        with torch.no_grad():
            rows = eager_rows(eager, group.prompt, completion, -1)[:length]
        image, target = rows.sum(1), rows @ group.prompt.coverage
        assert float(scores["region"][number]) == pytest.approx(region_reward(target, image), abs=1e-5)
        assert float(scores["memory"][number]) == pytest.approx(memory_reward(image), abs=1e-5)


def eager_rows(model, prompt, completion, layer):
    """(n, N): attention of a completion's tokens on the image tokens, mean over heads, by output_attentions."""
    inputs = prompt.model_inputs | {"input_ids": torch.cat([prompt.input_ids, completion])[None]}
    for name in {"mm_token_type_ids"} & inputs.keys():
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(completion)))
    attention = base_model(model)(**inputs, output_attentions=True).attentions[layer][0].mean(0)  # (S, S)
    return attention[len(prompt.input_ids) :][:, prompt.image_token_index]


def test_the_region_reward_of_inner_tokens_alone(policy, group):
    """border_mask takes the edge out of the region and out of the picture, whose masses are sums over what is left."""
    scores = score_group(policy[0], group, RewardConfig(border_mask=True))
    inner = ~group.prompt.border
    assert 0 < group.prompt.coverage @ inner.float() < group.prompt.coverage.sum(), "the border is part of the region"
    for number, (completion, length) in enumerate(zip(group.completions, group.lengths, strict=True)):
        rows = attention_maps(policy[0], group.prompt, completion)[:length]  # (n, N)
        expected = region_reward(rows @ (group.prompt.coverage * inner), rows[:, inner].sum(1))
        assert float(scores["region"][number]) == pytest.approx(expected, abs=1e-5)


def test_an_empty_completion_has_the_lowest_reward_and_no_attention_score(policy, group):
    """EOS at once: -1 is what it gets; as a TAS, 0 would be a measurement of no token."""
    group.completions[0], group.truncated[0] = torch.tensor([policy[1].tokenizer.eos_token_id]), False
    scores = score_group(policy[0], group, RewardConfig())
    assert group.lengths[0] == 0 and scores["attention"][0] == -1
    assert scores["tas"][0].isnan() and scores["tas_selected"][0].isnan()
    assert not scores["tas"][1:].isnan().any() and not scores["tas_selected"][1:].isnan().any()


def test_an_end_at_the_very_last_allowed_token_is_an_end(policy, examples):
    """The same random numbers with a limit that the completion's EOS meets exactly, and one token less."""
    options = {"num_generations": 8, "generator": None, "temperature": 1.5}

    def sampled(limit: int):
        return sample_group(
            *policy, examples[0], **options | {"max_new_tokens": limit, "generator": group_generator(3)}
        )

    free = sampled(40)
    ended = [number for number in range(8) if not free.truncated[number]]
    assert ended, "some completion ends by itself"
    for number in ended:
        length = len(free.completions[number])
        exact, shorter = sampled(length), sampled(length - 1) if length > 1 else None
        torch.testing.assert_close(exact.completions[number], free.completions[number])
        assert not exact.truncated[number] and exact.lengths[number] == length - 1
        assert shorter is None or (shorter.truncated[number] and shorter.lengths[number] == length - 1)


def test_a_reward_sees_the_fields_that_every_script_has(policy, group, monkeypatch):
    """One that reads max_new_tokens would train, and break `python reward.py`: it fails in both."""
    monkeypatch.setitem(reward.COMPONENTS, "format", lambda completion: float(completion.config.max_new_tokens))
    with pytest.raises(AttributeError, match="max_new_tokens"):
        score_group(policy[0], group, Config(max_new_tokens=30))


def test_the_gate_gives_wrong_completions_the_lowest_attention_reward(policy, group):
    usual = score_group(policy[0], group, RewardConfig())
    gated = score_group(policy[0], group, RewardConfig(attention_gate=True))
    assert usual["accuracy"].tolist() == [0, 1, 0, 0, 0]
    assert gated["attention"].tolist() == [-1, usual["attention"][1], -1, -1, -1]
    torch.testing.assert_close(gated["tas_selected"], usual["tas_selected"])  # still what was measured


def test_normalized_attention_has_mean_0_and_deviation_1(policy, group):
    usual = score_group(policy[0], group, RewardConfig())
    config = RewardConfig(attention_normalized=True, attention_weight=0.5, accuracy_weight=2.0)
    scores = score_group(policy[0], group, config)
    values = usual["attention"].double().numpy()
    expected = (values - values.mean()) / (values.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(scores["attention"], expected, atol=1e-4)
    alone = Group(group.example, group.prompt, group.completions[:1], group.texts[:1], group.truncated[:1])
    assert score_group(policy[0], alone, config)["attention"] == usual["attention"][0], "a group of one stays"


@given(st.lists(st.integers(0, 400), min_size=1, max_size=60), st.floats(0.05, 1))
def test_random_tokens_are_as_many_as_the_uncertain_and_the_same_every_time(ids, top_fraction):
    chosen, again = (select_random(torch.tensor(ids), top_fraction).tolist() for _ in range(2))
    assert len(chosen) == len(reward.select_uncertain(torch.rand(len(ids)), top_fraction))
    assert chosen == sorted({*range(len(ids))}.intersection(chosen)) == again


def test_random_tokens_are_spread_evenly():
    chosen = [select_random(torch.tensor([number, *range(9)])) for number in range(3000)]
    counts = torch.cat(chosen).bincount(minlength=10)
    assert counts.min() > 800 and counts.max() < 1000  # 900 expected, deviation 25


def test_a_reward_of_random_tokens(policy, group):
    statistics = token_statistics(policy[0], group.prompt, group.completions)
    scores = score_group(policy[0], group, RewardConfig(attention_tokens="random"))
    for number, (completion, length) in enumerate(zip(group.completions, group.lengths, strict=True)):
        chosen = select_random(completion[:length])
        a, v = (part[number][chosen].mean() for part in (statistics.target_attention, statistics.image_attention))
        expected = (a**2 - v**2) / (a**2 + v**2)  # tanh(log x)
        assert float(scores["attention"][number]) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("tokens", ["uncertain", "random"])
def test_an_answer_marks_the_tokens_that_were_rewarded(policy, examples, tokens):
    config = EvaluateConfig(attention_tokens=tokens, max_new_tokens=30)
    for answer in answer_examples(*policy, examples[:3], config):
        chosen = (part[answer.scored] for part in (answer.target_attention, answer.image_attention))
        found = reward.target_attention_score(*chosen)
        assert found == pytest.approx(answer.scores["tas_selected"], abs=1e-4)


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("size", [(208, 160), (900, 300)])
def test_the_border_is_where_cells_touch_the_edge(policies, family, size):
    processor = policies[family][1]
    image = Image.new("RGB", size, "gray")
    prompt = encode_prompt(processor, {"image": image, "question": "What?", "answer": "a", "boxes": [[9, 9, 80, 80]]})
    cells = token_cells(processor, image)
    near = 1.5  # resizing moves a cell's edges by a fraction of a pixel
    touches = (cells[:, :2] < near).any(1) | (cells[:, 2:] > torch.tensor(size) - near).any(1)
    assert prompt.border.tolist() == touches.tolist()
    assert prompt.border.any() and len(prompt.border) == len(prompt.coverage)


def test_a_border_is_seen_in_huge_pictures(policy):
    """Shrunk by 20, a frame of one pixel would be too faint."""
    processor = load_policy("data/tiny_policy", lora_rank=0, max_pixels=200 * 200)[1]
    prompt = encode_prompt(processor, {"image": Image.new("RGB", (4000, 4000)), "question": "What?", "answer": "a"})
    side = math.isqrt(len(prompt.border))
    inner = torch.nn.functional.pad(torch.zeros(side - 2, side - 2), (1, 1, 1, 1), value=1.0)
    assert torch.equal(prompt.border.view(side, side), inner.bool())


def test_a_border_mask_takes_the_edge_out_of_region_and_picture(policy, examples):
    model, processor = policy
    example = examples[0] | {"boxes": [[0, 0, examples[0]["image"].width, 70]]}
    group = sample_group(model, processor, example, num_generations=2, max_new_tokens=12, generator=group_generator(1))
    prompt = group.prompt
    masked = token_statistics(model, without_border(prompt), group.completions)
    only, inner = torch.zeros_like(prompt.coverage), ~prompt.border
    for token in inner.nonzero().flatten():  # one token at a time, as a region of its own
        alone = encode_prompt(processor, example)
        alone.coverage = torch.nn.functional.one_hot(token, len(only)).float()
        only[token] = token_statistics(model, alone, group.completions).target_attention[0][3]
    assert float(masked.image_attention[0][3]) == pytest.approx(float(only[inner].mean()), rel=1e-4)
    weights = prompt.coverage * inner / (prompt.coverage * inner).sum()
    assert float(masked.target_attention[0][3]) == pytest.approx(float(only @ weights), rel=1e-4)
    scores = [score_group(model, group, RewardConfig(border_mask=mask))["attention"] for mask in (False, True)]
    assert not torch.allclose(*scores)
    prompt = encode_prompt(processor, examples[0] | {"boxes": [[0, 0, 10, 10]]})
    assert without_border(prompt) is prompt, "a region of edge tokens alone keeps them"


def test_the_target_map_against_its_formula(policy, examples):
    processor, example = policy[1], examples[0] | {"boxes": [[20, 30, 100, 90], [90, 10, 130, 60]]}
    x1, y1, x2, y2 = token_cells(processor, example["image"]).double().numpy().T
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    values, half_cell = np.full(len(x), 0.1), (np.median(x2 - x1) / 2, np.median(y2 - y1) / 2)
    for left, top, right, bottom in example["boxes"]:
        distance = ((x - (left + right) / 2) / max(0.25 * (right - left), half_cell[0])) ** 2
        distance += ((y - (top + bottom) / 2) / max(0.25 * (bottom - top), half_cell[1])) ** 2
        values = np.maximum(values, np.exp((distance.min() - distance) / 2))
    np.testing.assert_allclose(target_map(processor, example), values / values.sum(), rtol=1e-4)
    assert target_map(processor, {"image": example["image"], "question": "What?", "answer": "a"}) is None
    two = target_map(processor, {"images": [example["image"]] * 2, "boxes": [[], example["boxes"]], "question": "?"})
    assert two[: len(x)].unique().numel() == 1 and float(two.sum()) == pytest.approx(1), "a floor alone, then boxes"


@pytest.mark.parametrize("box", [[40, 40, 46, 46], [62, 62, 66, 66], [0, 60, 118, 63]])
def test_a_region_smaller_than_a_cell_was_a_uniform_target(policy, examples, box):
    processor, example = policy[1], examples[0] | {"boxes": [box]}
    target = target_map(processor, example)
    assert float(target.max()) == pytest.approx(10 * float(target.min()), rel=0.2)
    cells = token_cells(processor, example["image"])[target.argmax()]
    assert cells[0] < box[2] and cells[2] > box[0] and cells[1] < box[3] and cells[3] > box[1], "highest on the box"


def test_polygons_and_masks_have_the_box_around_them(policy, examples):
    bare = {name: examples[0][name] for name in ("image", "question", "answer")}
    expected = target_map(policy[1], bare | {"boxes": [[20, 30, 100, 90]]})
    polygon = [[20, 30], [100, 30], [100, 90], [20, 90]]
    assert torch.allclose(target_map(policy[1], bare | {"polygons": [polygon]}), expected, atol=1e-3)
    mask = Image.new("1", bare["image"].size)
    mask.paste(1, (20, 30, 100, 90))
    assert torch.equal(target_map(policy[1], bare | {"masks": [mask]}), expected)


def test_the_loss_against_its_formula():
    maps, rewards = torch.rand(4, 6) * 0.1, torch.tensor([0.5, 0.4, 2.0, 1.0])
    maps[3] = 0  # an empty completion
    target = torch.softmax(torch.rand(6), 0)
    attention = maps[[0, 2]].double() / maps[[0, 2]].double().sum(1, keepdim=True)
    expected = torch.nn.functional.kl_div(attention.log(), target.double().expand(2, 6), reduction="sum") / 4
    assert float(ease_loss(maps, target, rewards)) == pytest.approx(float(expected), rel=1e-5)
    assert float(ease_loss(maps, None, rewards)) == 0


@pytest.mark.parametrize("family", PACKED)
def test_maps_and_their_gradients_equal_eager_attentions(model_folders, examples, family):
    torch.manual_seed(0)
    completions = [torch.randint(5, 90, (length,)) for length in (7, 1, 4)]
    results = []
    for attn in ("sdpa", "eager"):
        model, processor = adapted(model_folders[family], attn=attn)
        prompt, layer = encode_prompt(processor, examples[0]), ease_layer(model)
        if attn == "sdpa":
            maps = token_statistics(model, prompt, completions, map_layer=layer).maps
        else:
            maps = torch.stack([eager_rows(model, prompt, completion, layer).mean(0) for completion in completions])
        loss = ease_loss(maps, target_map(processor, examples[0]), torch.ones(3))
        loss.backward()
        results.append((maps.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(*(maps for maps, _ in results), atol=1e-6, rtol=1e-4)
    found, expected = (gradients for _, gradients in results)
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-5
    for name, gradient in expected.items():
        torch.testing.assert_close(found.get(name, torch.zeros_like(gradient)), gradient, atol=2e-6, rtol=1e-3)


def test_a_step_with_the_loss_moves_attention_to_the_boxes(model_folders, examples, monkeypatch):
    torch.manual_seed(0)
    model, processor = load_policy(model_folders["qwen3_vl"], lora_rank=4, dtype="float32")
    settings = {"num_generations": 2, "max_new_tokens": 6, "groups_per_step": 1, "max_steps": 20, "beta": 0.0}
    settings |= {"max_grad_norm": 1e9, "learning_rate": 3e-3, "weight_decay": 0.0, "lr_scheduler": "constant"}
    config = Config(**settings, ease_weight=100.0, attention_weight=0.0, memory_weight=1.0)
    monkeypatch.setattr("sayo.extensions.ease.GOOD_REWARD", 0.0)  # this policy is never right
    state, accelerator = TrainState(model, config), Accelerator(cpu=True)
    arguments = model, processor, state, examples[:1]
    values = [train_step(*arguments, step, config, accelerator)[0]["ease"] for step in range(20)]
    assert all(value > 0 for value in values) and np.mean(values[-5:]) < 0.8 * np.mean(values[:5]), values


def test_a_model_with_linear_attention_has_no_such_loss(policies):
    with pytest.raises(PolicyError, match="ease_weight: this model has linear attention"):
        ease_layer(policies["qwen3_5"][0])


@pytest.mark.parametrize(
    ("beta", "kl", "target", "expected", "reason"),
    [
        (1e-3, 0.08, 0.05, 2e-3, "above 1.5 targets"),
        (1e-3, 0.07, 0.05, 1e-3, "near the target nothing changes"),
        (4e-3, 0.03, 0.05, 2e-3, "below two thirds of it"),
        (4e-3, 0.04, 0.05, 4e-3, "below the target, but not far"),
        (1e-3, 0.0, 0.05, 1e-3, "never below the beta of the settings"),
        (8.0, 9.0, 0.05, 10.0, "never above 10"),
        (1e-3, 9.0, None, 1e-3, "no target"),
        (1e-3, None, 0.05, 1e-3, "a step without a number"),
    ],
)
def test_beta_follows_the_kl_target(beta, kl, target, expected, reason):
    adaptive, resumed = AdaptiveBeta(1e-3, target), AdaptiveBeta(1e-3, target)
    adaptive.value = beta
    resumed.load_state_dict(adaptive.state_dict())
    for one in (adaptive, resumed):
        one.step(kl)
        assert one.value == pytest.approx(expected), reason
