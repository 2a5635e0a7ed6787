"""What holds for any input: packing, coverage, advantages, answers and settings, each against its own definition."""

import os
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from oracle import boxes_in
from PIL import Image

from data.check import CheckConfig
from evaluate import EvaluateConfig
from rollout import RolloutConfig
from sayo.grader.grader import ANSWER_TYPES, MAX_CHARACTERS, extract_answer, is_correct
from sayo.model.packing import dense_mask, packed_layout, padded_layout
from sayo.model.prompts import Prompt, region_coverage
from sayo.settings import ConfigError, read_config
from train_rl import Config, group_advantages

# --- packing ------------------------------------------------------------------------------------------------------


class Bare(torch.nn.Module):
    """As much of a model as the layouts ask for: where it is, and that its positions are plain numbers."""

    def __init__(self):
        super().__init__()
        self.embeddings, self.model = torch.nn.Embedding(1, 1), SimpleNamespace()

    def get_input_embeddings(self):
        return self.embeddings


@st.composite
def any_groups(draw):
    """[(Prompt, [completion, ...]), ...]; every token has an id of its own, so that an id says where it came from."""
    groups, ids = [], iter(range(1, 10_000))

    def tokens(length: int) -> torch.Tensor:
        return torch.tensor([next(ids) for _ in range(length)], dtype=torch.long)

    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(1, 12))
        images = sorted(draw(st.sets(st.integers(0, length - 1))))
        coverage = draw(st.lists(st.floats(0, 1, width=32), min_size=len(images), max_size=len(images)))
        # An M-RoPE prompt has positions that stand still, or jump ahead, at its pictures.
        steps = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=length, max_size=length)))
        prompt = Prompt(tokens(length), torch.tensor(images, dtype=torch.long), torch.tensor(coverage), {})
        prompt.position_ids = torch.stack([steps.cumsum(0), steps.flip(0).cumsum(0), torch.arange(length)])  # (3, P)
        lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
        groups.append((prompt, [tokens(number) for number in lengths]))
    return groups


@given(any_groups())
def test_a_packed_row_is_every_prompt_once_and_its_completions_behind_it(groups):
    layout = packed_layout(Bare(), *zip(*groups, strict=True))
    # Token by token, from the definition: (id, positions, whose it is)
    row = []
    for number, (prompt, completions) in enumerate(groups):
        restart, places = prompt.position_ids.max().item() + 1, prompt.position_ids.T.tolist()
        row += [(token, at, (number, None)) for token, at in zip(prompt.input_ids.tolist(), places, strict=True)]
        for which, completion in enumerate(completions):
            row += [(token, [restart + place] * 3, (number, which)) for place, token in enumerate(completion.tolist())]
    assert layout.input_ids.tolist() == [[token for token, *_ in row]]
    assert layout.position_ids[:, 0].T.tolist() == [positions for _, positions, _ in row]

    mask = dense_mask(layout.groups)[0, 0]
    for query, (*_, asking) in enumerate(row):
        for key, (*_, asked) in enumerate(row):
            assert mask[query, key].item() == (key <= query and asked in (asking, (asking[0], None)))

    place_of = {token: place for place, (token, *_) in enumerate(row)}
    expected_ids = [token for _, completions in groups for completion in completions for token in completion.tolist()]
    assert layout.completion_ids.tolist() == expected_ids
    assert layout.token_rows.tolist() == [place_of[token] for token in expected_ids]
    before = []
    for prompt, completions in groups:
        for completion in completions:
            before += [prompt.input_ids[-1].item(), *completion.tolist()][: len(completion)]
    assert layout.predict_rows.tolist() == [place_of[token] for token in before]


@given(any_groups())
def test_packed_and_padded_are_the_same_tokens_in_the_same_order(groups):
    prompts, completions = zip(*groups, strict=True)
    packed, padded = packed_layout(Bare(), prompts, completions), padded_layout(Bare(), prompts, completions)
    assert packed.lengths == padded.lengths
    for name in ("token_rows", "predict_rows"):
        rows = [(layout, getattr(layout, name)) for layout in (packed, padded)]
        assert torch.equal(*(layout.input_ids.flatten()[own] for layout, own in rows))
        assert torch.equal(*(layout.position_ids.flatten(1)[:, own] for layout, own in rows))
    assert packed.completion_ids.tolist() == padded.completion_ids.tolist()
    # What a prompt's keys weigh does not depend on how it is laid out; completions and padding weigh nothing.
    rows, start = zip(padded.key_weights, padded.attention_mask, strict=True), 0
    for prompt, group in groups:
        length, end = len(prompt.input_ids), start + len(prompt.input_ids) + sum(map(len, group))
        own, behind = packed.key_weights[0, start:end].split([length, end - start - length])
        for completion, (weights, mask) in zip(group, rows, strict=False):
            torch.testing.assert_close(weights[:length], own)
            assert not weights[length:].any()
            assert mask.tolist() == [1] * (length + len(completion)) + [0] * (len(mask) - length - len(completion))
        assert not behind.any()
        assert own[:, 1].sum().item() == pytest.approx(1 if len(prompt.image_token_index) else 0)
        assert own[:, 0].sum().item() == pytest.approx(1 if prompt.coverage.sum() > 0 else 0, abs=1e-5)
        start = end


# --- coverage -----------------------------------------------------------------------------------------------------

CELL = {"qwen3_vl": 32, "qwen2_5_vl": 28}  # pixels of a token's side: a patch of 16 or 14, merged 2 x 2
GRIDS = st.tuples(st.integers(2, 6), st.integers(2, 6))  # tokens across and down; such a picture is not resized


def exact(boxes, columns: int, rows: int, cell: int) -> np.ndarray:
    """The share of every cell that boxes of integers cover, by counting pixels."""
    pixels = np.zeros((rows * cell, columns * cell))
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] = 1
    return pixels.reshape(rows, cell, columns, cell).mean((1, 3)).flatten()


@pytest.mark.parametrize("family", CELL)
@settings(max_examples=40)
@given(data=st.data())
def test_coverage_of_several_pictures_is_the_exact_area_of_each_cell_in_order(policies, family, data):
    cell = CELL[family]
    pictures, boxes, expected = [], [], []
    for _ in range(data.draw(st.integers(1, 3))):
        columns, rows = data.draw(GRIDS)
        pictures.append(Image.new("RGB", (columns * cell, rows * cell)))
        boxes.append(data.draw(boxes_in(*pictures[-1].size)))
        expected.append(exact(boxes[-1], columns, rows, cell))
    coverage = region_coverage(policies[family][1], pictures, boxes if len(boxes) > 1 else boxes[0])
    np.testing.assert_allclose(coverage.numpy(), np.concatenate(expected), atol=1e-6)


@settings(max_examples=40)
@given(data=st.data())
def test_coverage_grows_with_the_region_and_stays_within_bounds(policy, data):
    """At any size, resized or not: a larger box, or one more, takes nothing away from any token."""
    width, height = data.draw(st.integers(20, 300)), data.draw(st.integers(20, 300))
    boxes = data.draw(boxes_in(width, height))
    assume(boxes)
    x1, y1, x2, y2 = boxes[0]
    larger = [data.draw(st.integers(0, x1)), data.draw(st.integers(0, y1))]
    larger += [data.draw(st.integers(x2, width)), data.draw(st.integers(y2, height))]
    picture = Image.new("RGB", (width, height))
    small, one_larger, one_more = (
        region_coverage(policy[1], [picture], region)
        for region in (boxes, [larger, *boxes[1:]], [*boxes, *data.draw(boxes_in(width, height))])
    )
    for grown in (one_larger, one_more):
        # Bicubic resizing rings beside an edge by a few hundredths.
        assert (grown >= small - 0.06).all() and grown.sum() >= small.sum() - 0.06
    for coverage in (small, one_larger, one_more):
        assert coverage.min() >= 0 and coverage.max() <= 1 and coverage.sum() > 0


# --- advantages ---------------------------------------------------------------------------------------------------

REWARDS = st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=16)


def advantages(rewards, scale="group") -> np.ndarray:
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), scale=scale).numpy()


@given(REWARDS, st.sampled_from(["group", "none"]), st.randoms(use_true_random=False))
def test_advantages_have_mean_zero_the_order_of_the_rewards_and_no_memory_of_places(rewards, scale, random):
    found = advantages(rewards, scale)
    assert abs(found.mean()) < 1e-9
    order = np.argsort(rewards, kind="stable")
    assert (np.diff(found[order]) >= -1e-12).all()
    shuffled = list(range(len(rewards)))
    random.shuffle(shuffled)
    np.testing.assert_allclose(advantages([rewards[place] for place in shuffled], scale), found[shuffled], atol=1e-9)


@given(REWARDS, st.floats(-5, 5), st.floats(0.1, 10), st.sampled_from(["group", "none"]))
def test_advantages_ignore_a_shift_and_follow_a_scale(rewards, shift, factor, scale):
    values = np.array(rewards)
    found = advantages(rewards, scale)
    np.testing.assert_allclose(advantages(values + shift, scale), found, atol=1e-6)
    if scale == "none":
        np.testing.assert_allclose(advantages(values * factor, scale), found * factor, atol=1e-9)
    else:
        # (f r - f m) / (f s + 1e-4): the same but for the epsilon, whose part is known.
        spread = values.std(ddof=1)
        expected = found * factor * (spread + 1e-4) / (factor * spread + 1e-4)
        np.testing.assert_allclose(advantages(values * factor, scale), expected, atol=1e-9)


@given(st.floats(-3, 3, width=32), st.integers(2, 16), st.floats(-1e6, 1e6), st.sampled_from(["group", "none"]))
def test_equal_rewards_have_no_advantage_wherever_they_are(reward, count, shift, scale):
    assert (advantages([reward + shift] * count, scale) == 0).all()


# --- answers ------------------------------------------------------------------------------------------------------

PIECES = st.one_of(
    st.sampled_from(["<answer>", "</answer>", "A", "B", "(C)", "red", "7", "7.0", " ", "\n", "\\boxed{", "}", "$", "**",
                     "or", "The answer is ", "½", "\u200b", "１", "-", ",", "%", "[", "]", "1e9", "/", "\\frac{1}{2}"]),
    st.text(max_size=6),
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=14).map("".join)
SAID = st.one_of(st.sampled_from(["red", "7", "A", "B", "yes"]), TEXTS)
ANSWERS = st.sampled_from(["red", "7", "45%", "yes", "B", "[1, 2]", "1/2", "$3"]) | TEXTS.filter(str.strip)
KINDS = {"answer_type": st.sampled_from([kind for kind in ANSWER_TYPES if kind != "math"])}
EXAMPLES = st.one_of(
    st.fixed_dictionaries({"answer": st.sampled_from(["A", "B", "red", "7"]), "choices": st.just(["red", "7"])}),
    st.fixed_dictionaries({"answer": ANSWERS}, optional=KINDS),
)


@settings(max_examples=400)
@given(TEXTS, EXAMPLES)
@example("<answer><answer>red</answer>", {"answer": "red"})
@example("<answer>red</answer></answer>", {"answer": "red"})
@example("<answer>" + "9" * MAX_CHARACTERS + "</answer>", {"answer": "9", "answer_type": "number"})
@example("<answer>1e" + "9" * 99 + "</answer>", {"answer": "1", "answer_type": "number"})
@example("<answer>" + "(" * MAX_CHARACTERS + "</answer>", {"answer": "(", "answer_type": "list"})
@example("<answer>" + "\\boxed{" * 70 + "</answer>", {"answer": "7"})
def test_the_answer_check_never_raises_and_never_takes_long(text, row):
    began = time.perf_counter()
    verdict = is_correct(text, row)
    assert time.perf_counter() - began < 5
    assert isinstance(verdict, bool)
    block = extract_answer(text)
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        assert block is None
    if block is None:
        assert verdict is False
    else:
        assert block == text.partition("<answer>")[2].partition("</answer>")[0].strip() != ""


@settings(max_examples=300)
@given(SAID, EXAMPLES, TEXTS, TEXTS, st.sampled_from(["{}", " {}\n", "**{}**", '"{}"', "{}.", "The answer is {}"]))
def test_what_stands_around_an_answer_changes_nothing(said, row, before, after, wrapping):
    """Reasoning before it, words behind it, blanks, bold, quotes, a final period and an introduction in it."""
    marks = ("<answer>", "</answer>")
    assume(not any(mark in part for mark in marks for part in (said, before, after, before + said, said + after)))
    # Only plain words: what wraps an answer that has marks of its own may belong to it.
    plain = said.replace(" ", "").isalnum() and said.isascii()
    verdict = is_correct(f"<answer>{said}</answer>", row)
    assert is_correct(f"{before}<answer>{said}</answer>{after}", row) == verdict
    if plain:
        assert is_correct(f"<answer>{wrapping.format(said)}</answer>", row) == verdict


@settings(max_examples=200)
@given(EXAMPLES)
def test_the_right_answer_is_right_and_two_blocks_of_it_are_not(row):
    said = row["answer"]
    assume("<answer>" not in said and "</answer>" not in said)
    twice = f"<answer>{said}</answer>" * 2
    assert not is_correct(twice, row) and not is_correct(said, row)
    if said.isascii() and said.isalnum() and row.get("answer_type", "text") == "text":
        assert is_correct(f"<answer>{said}</answer>", row)


# --- settings -----------------------------------------------------------------------------------------------------

CONFIGS = (Config, EvaluateConfig, RolloutConfig, CheckConfig)
VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.integers(-(10**400), 10**400),
        st.sampled_from([0, 1, 2, 0.5, "auto", "none", "scenes", "-1", "--model", "--", "=", "~", "null", "no", "007",
                         "1e-5", "x" * 5000, "a\0", "\ud800", "%s", "{", "@file"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)  # fmt: skip


# Values of a field's type, so that whole files are valid often enough.
TYPED = {int: st.integers(-2, 50), float: st.floats(-1, 2), bool: st.booleans()}
TYPED |= {str: st.text("ab/.: -#'\"é\n", max_size=8)}
TYPED |= {kind | None: st.none() | values for kind, values in TYPED.items()}


@st.composite
def any_settings(draw):
    config_class = draw(st.sampled_from(CONFIGS))
    kinds = get_type_hints(config_class)
    names = draw(st.lists(st.sampled_from(sorted(kinds)), max_size=4, unique=True))
    chosen = {name: draw(TYPED.get(kinds[name], VALUES) | VALUES) for name in names}
    return config_class, chosen | draw(st.dictionaries(st.text(max_size=5), VALUES, max_size=1))


@settings(max_examples=250)
@given(any_settings())
def test_any_fields_are_a_config_that_comes_back_from_yaml_or_an_error_that_names_one(case):
    config_class, chosen = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        text = yaml.safe_dump(chosen, allow_unicode=False)
        assume("&id" not in text)  # the same list twice is written as an alias
        path.write_text(text, encoding="utf-8")
        try:
            config = read_config(config_class, ["--config", os.fspath(path)])
        except ConfigError as error:
            message = str(error)
            assert any(str(name)[:50] in message or repr(name)[:50] in message for name in chosen) or not chosen
            return
        for name, value in chosen.items():
            found = getattr(config, name)  # an unknown field would have been an error
            if value is None and found is not None:
                continue  # filled in, by what else is given
            if isinstance(value, str) and name != "system_prompt":
                value = os.path.expanduser(value)
            if not isinstance(value, str) and isinstance(found, str):
                assert found == yaml.safe_dump(value).split("\n")[0]  # as it was written
            elif isinstance(value, float) or isinstance(found, float):
                assert found == float(value)
            elif isinstance(found, str) or not isinstance(value, str | list):
                assert found == value
        assert {entry.name for entry in fields(config)} == set(asdict(config))
        path.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")
        assert read_config(config_class, ["--config", os.fspath(path)]) == config
