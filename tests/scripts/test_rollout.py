"""Sampling: equal to generate when greedy, the right distribution when not, one cache for everybody."""

import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, GOOD, without, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import rollout
from rollout import RolloutConfig, group_generator, sample_group, sample_groups
from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError
from sayo.model.loading import load_policy
from sayo.model.prompts import _most_tokens, bad_prompts, base_model, check_prompts, encode_prompt
from sayo.model.sampling.tokens import choose_tokens, eos_token_ids, suppressed_token_ids
from sayo.run.files import keep_steps_until
from sayo.settings import ConfigError, read_jsonl


def generated(model, processor, example, **options) -> torch.Tensor:
    """The greedy completion by transformers."""
    prompt = encode_prompt(processor, example)
    inputs = {"input_ids": prompt.input_ids[None], "attention_mask": torch.ones_like(prompt.input_ids[None])}
    suppressed = suppressed_token_ids(model, processor).tolist()
    options |= {"do_sample": False, "suppress_tokens": suppressed, **inputs, **prompt.model_inputs}
    return base_model(model).generate(**options)[0, len(prompt.input_ids) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_packed_sampling_equals_generate(model_folders, examples, family):
    model, processor = load_policy(model_folders[family], lora_rank=0)
    lengths = {}
    for shortest in (0, 24):
        limits = {"min_new_tokens": shortest, "max_new_tokens": 40}
        groups = sample_groups(model, processor, examples[:6], num_generations=2, temperature=0, **limits)
        for group in groups:
            expected = generated(model, processor, group.example, **limits)
            assert all(torch.equal(completion, expected) for completion in group.completions)
        lengths[shortest] = {len(group.completions[0]) for group in groups}
    if family == "qwen3_vl":
        assert len(lengths[0]) > 1  # completions that end at different steps are the case worth testing
        assert min(lengths[0]) < 24 <= min(lengths[24])


@contextmanager
def preferred(model, tokens):
    """Inside the block the policy says nothing but these tokens."""
    head = base_model(model).get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[tokens] = 1e4
    hook = head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    yield
    hook.remove()


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_before_min_new_tokens_eos_is_not_sampled(policies, examples, family):
    """Not even by a policy that says nothing else."""
    model, processor = policies[family]
    with preferred(model, sorted(eos_token_ids(model, processor))):
        for shortest in (0, 4, 5):
            limits = {"min_new_tokens": shortest, "max_new_tokens": 5}
            group = sample_group(model, processor, examples[0], num_generations=3, **limits)
            assert group.lengths == [shortest] * 3 and group.truncated == [shortest == 5] * 3
            assert [len(ids) for ids in group.completions] == [min(shortest + 1, 5)] * 3


def test_a_group_does_not_depend_on_its_neighbours_in_the_cache(policy, examples):
    model, processor = policy
    options = {"num_generations": 3, "max_new_tokens": 20, "top_p": 0.9}

    def together(sampling_tokens):
        generators = [group_generator(0, "neighbours", number) for number in range(5)]
        more = options | {"generators": generators, "sampling_tokens": sampling_tokens}
        groups = sample_groups(model, processor, examples[:5], **more)
        return [[completion.tolist() for completion in group.completions] for group in groups]

    alone = together(1)
    assert together(10_000) == alone
    single = sample_group(model, processor, examples[3], generator=group_generator(0, "neighbours", 3), **options)
    assert [completion.tolist() for completion in single.completions] == alone[3]
    assert len({tuple(completion) for group in alone for completion in group}) > 10


def test_sampled_tokens_follow_the_softmax():
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, float("-inf")]])
    count = 20_000
    drawn = choose_tokens(logits.expand(count, -1), torch.rand(count, generator=group_generator(1)), temperature=0.8)
    frequencies = torch.bincount(drawn, minlength=5) / count
    torch.testing.assert_close(frequencies, (logits[0] / 0.8).softmax(-1), atol=0.015, rtol=0)
    assert frequencies[4] == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=12),
    st.floats(0.05, 1.0),
    st.floats(0, 1, exclude_max=True),
    st.none() | st.integers(1, 12),
    st.just(0.0) | st.floats(0.01, 1.0),
)
def test_top_k_top_p_and_min_p_keep_what_transformers_keeps(values, top_p, uniform, top_k, min_p):
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([values])
    kept = TopKLogitsWarper(top_k)(None, logits.clone()) if top_k else logits.clone()
    kept = MinPLogitsWarper(min_p)(None, TopPLogitsWarper(top_p)(None, kept)).isfinite()[0]
    token = choose_tokens(logits, torch.tensor([uniform]), top_p=top_p, top_k=top_k, min_p=min_p)
    smallest = logits[0][kept].min()
    # Equal logits at the edge may change places; and shares of the largest probability are rounded.
    assert kept[token] or logits[0, token] == smallest or (min_p and logits[0, token] >= smallest - 1e-5)


@pytest.mark.parametrize("family", ["internvl", "qwen3_5"])
def test_a_repetition_penalty_gives_what_generate_gives(policies, examples, family):
    model, processor = policies[family]
    plain, penalized = (
        sample_group(model, processor, examples[0], **GREEDY, repetition_penalty=penalty) for penalty in (1.0, 1.7)
    )
    inputs = plain.prompt.model_inputs | {"input_ids": plain.prompt.input_ids[None]}
    never = suppressed_token_ids(model, processor).tolist()
    options = {"max_new_tokens": 16, "do_sample": False, "repetition_penalty": 1.7, "suppress_tokens": never}
    found = model.generate(**inputs, **options)[0, len(plain.prompt.input_ids) :]
    assert penalized.completions[0].tolist() == found.tolist()
    assert penalized.completions[0].tolist() != plain.completions[0].tolist()


GREEDY = {"num_generations": 1, "max_new_tokens": 16, "temperature": 0}


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_the_ends_of_the_uniform_interval_draw_possible_tokens(uniform):
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, 500:700] = torch.linspace(-1, 1, 200)
    token = choose_tokens(logits, torch.tensor([uniform]), top_p=0.7).item()
    assert 500 <= token < 700


def test_a_sampled_image_token_cannot_happen(policy, examples):
    """A placeholder token in a completion breaks the next forward: features and tokens no longer match."""
    wanted = suppressed_token_ids(*policy)
    with preferred(policy[0], wanted):
        group = sample_group(*policy, examples[0], num_generations=4, max_new_tokens=12)
    assert not torch.isin(torch.cat(group.completions), wanted).any()


def test_completions_end_at_eos_or_are_marked_as_truncated(model_folders, examples):
    model, processor = load_policy(model_folders["qwen3_vl"], lora_rank=0)
    ends, seen = eos_token_ids(model, processor), set()
    for limit in (3, 60):
        options = {"num_generations": 6, "max_new_tokens": limit, "generator": group_generator(2)}
        group = sample_group(model, processor, examples[0], **options)
        rows = zip(group.completions, group.truncated, group.texts, group.lengths, strict=True)
        for completion, truncated, text, length in rows:
            is_end = [int(token) in ends for token in completion]
            assert truncated == (not is_end[-1]) and not any(is_end[:-1]) and length == is_end.count(False)
            assert len(completion) == limit if truncated else len(completion) <= limit
            assert "<|im_end|>" not in text
            seen.add(truncated)
    assert seen == {True, False}


def test_sampling_works_in_training_mode_with_checkpointing(model_folders, examples):
    """Gradient checkpointing switches the cache off in training mode; sampling must not notice."""
    model, processor = load_policy(model_folders["qwen3_vl"], lora_rank=2)
    options = {"num_generations": 1, "max_new_tokens": 10, "temperature": 0}
    before = sample_group(model, processor, examples[0], **options).texts
    base_model(model).activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert sample_group(model, processor, examples[0], **options).texts == before
    assert model.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_generations": 0, "temperature": -1}, ["num_generations=0", "temperature=-1"]),
        ({"max_new_tokens": 0, "top_p": 0}, ["max_new_tokens=0", "top_p=0"]),
        ({"top_p": 1.5}, ["top_p=1.5", "at most 1"]),
        ({"min_new_tokens": -1}, ["min_new_tokens=-1"]),
        ({"min_new_tokens": 5}, ["min_new_tokens=5", "max_new_tokens"]),
    ],
)
def test_all_wrong_options_are_said_at_once(policy, examples, options, words):
    options = {"num_generations": 2, "max_new_tokens": 4} | options
    with pytest.raises(ValueError) as error:
        sample_group(*policy, examples[0], **options)
    assert all(word in str(error.value) for word in words)


def test_prompt_longer_than_the_model_allows(policy, examples):
    example = examples[0] | {"question": "Where is the star? " * 600, "id": "long-one"}
    with pytest.raises(DataError, match=r"long-one.*positions.*max_pixels"):
        sample_group(*policy, example, num_generations=2, max_new_tokens=8)


def write_rows(folder, examples, questions) -> str:
    """A .jsonl file with a row for each question, all about one picture; its path."""
    folder.mkdir(exist_ok=True)
    examples[0]["image"].save(folder / "a.png")
    return write_jsonl(folder, *(without("boxes") | {"id": f"row {i}", "question": q} for i, q in enumerate(questions)))


@pytest.mark.parametrize(
    ("questions", "settings", "max_new_tokens", "words"),
    [
        (["Where? " * count for count in (1, 900, 2, 1500)], {}, 16, "(?s)^((?!row [02]).)*row 1((?!row [02]).)*row 3"),
        (["Where?", "<|image_pad|>?"], {}, 16, r"^((?!row 0).)*row 1.*<\|image_pad\|>"),
        (["Where?"], {"system_prompt": "Look at <|image_pad|>."}, 16, "system_prompt"),
        (["Where?"], {}, 100_000, "max_new_tokens=100000"),
        (["Where? " * 900, "<|image_pad|>?"], {"bad_rows": "skip"}, 16, "no example is left"),
    ],
)
@pytest.mark.parametrize("folder", ["data", "scenes_mine"])
def test_prompts_that_cannot_be_used_are_all_found_before_work_starts(
    policy, examples, tmp_path, folder, questions, settings, max_new_tokens, words
):
    """Data in a folder called scenes_... was taken for the embedded scenes and not checked."""
    data = load_examples(write_rows(tmp_path / folder, examples, questions), require_boxes=False)
    data.name = f"{folder}/train.jsonl"
    with pytest.raises(DataError, match=words):
        check_prompts(*policy, data, RolloutConfig(**{"system_prompt": None} | settings), max_new_tokens)


def test_prompts_that_cannot_be_used_are_skipped_like_bad_rows(policy, examples, tmp_path, capsys):
    """--bad_rows skip left out bad rows, but one prompt of 20,000 that was too long stopped the run."""
    questions = ["Where?", "Where? " * 900, "<|image_pad|>?", "Who?"]
    data = load_examples(write_rows(tmp_path, examples, questions), require_boxes=False)
    check_prompts(*policy, data, RolloutConfig(bad_rows="skip"), 16)
    assert [example["id"] for example in data] == ["row 0", "row 3"] and len(data.skipped) == 2
    assert "2 examples of" in capsys.readouterr().err
    check_prompts(*policy, data, RolloutConfig(system_prompt=None), 16)  # what is left can be used


@pytest.mark.parametrize("text", ["first\u2028second", "one\u0085two", "a\x0bb\x0cc"])
def test_line_breaks_of_unicode_in_texts_do_not_break_files(tmp_path, text):
    """str.splitlines took them for the ends of lines, and a run could not be resumed."""
    rows = [json.dumps({"step": step, "text": text}, ensure_ascii=False) for step in (1, 2, 3)]
    path = Path(write_jsonl(tmp_path, *rows))
    assert [row["text"] for _, row in read_jsonl(path)] == [text] * 3
    keep_steps_until(path, 2)
    assert [row["step"] for _, row in read_jsonl(path)] == [1, 2]


def test_a_foreign_output_file_is_left_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    for content in ("my notes\nno newline at the end", '{"id": "7"}\n'):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"notes\.txt"):
            rollout.main(RolloutConfig(data="scenes", limit=1, output=str(path), resume=True))
        assert path.read_text() == content


def test_the_command_writes_rows_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    output = tmp_path / "rollouts.jsonl"
    config = RolloutConfig(data="scenes:heldout", limit=3, output=str(output), num_generations=2, max_new_tokens=8)
    rollout.main(config)
    whole = output.read_text()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [len(row["texts"]) for row in rows] == [2, 2, 2] and len({row["id"] for row in rows}) == 3
    with pytest.raises(ConfigError, match="--resume"):
        rollout.main(config)
    lines = whole.splitlines(keepends=True)
    output.write_text(lines[0] + lines[1][:20])  # interrupted in the middle of a row
    config.resume = True
    with pytest.raises(ConfigError, match="temperature was 1.0, is 0.5. Give those again, or write elsewhere"):
        rollout.main(replace(config, temperature=0.5))
    rollout.main(config)
    assert output.read_text() == whole
    note = output.with_suffix(".settings.json")
    noted = {name: value for name, value in json.loads(note.read_text()).items() if name != "min_new_tokens"}
    note.write_text(json.dumps(noted))  # of a version before that flag
    rollout.main(config)
    with pytest.raises(ConfigError, match="min_new_tokens was .*, is 2"):
        rollout.main(replace(config, min_new_tokens=2))
    note.write_text(note.read_text().replace("torch.float32", "torch.float16"))
    with pytest.raises(ConfigError, match="loaded was {'model': .* 'torch.float16'}, is {'model': .* 'torch.float32'}"):
        rollout.main(config)  # "auto" on another card
    note.write_text(note.read_text().replace("torch.float16", "torch.float32"))
    output.write_text(whole.replace(rows[1]["asked"], "0123456789abcdef"))
    with pytest.raises(ConfigError, match=f"1 examples are not what they were, the first is '{rows[1]['id']}'"):
        rollout.main(config)  # its question or its picture was another one
    output.write_text(lines[0][:20])  # in the middle of the first one
    rollout.main(config)
    assert output.read_text() == whole


def test_modules_import_silently():
    """Importing any module of the repository runs nothing and prints nothing."""
    paths = [path for room in ("sayo", "tools", "data") for path in sorted(Path(room).rglob("*.py"))]
    paths = sorted(path for path in [*Path().glob("*.py"), *paths] if path.stem != "__init__")
    code = "\n".join(f"import {'.'.join(path.with_suffix('').parts)}" for path in paths)
    assert "import train_rl\n" in code and "import sayo.run.folder\n" in code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_short_prompts_are_not_tokenized(folder, policy, monkeypatch):
    """38,575 prompts took minutes; the bytes of a text bound its tokens, also where a tokenizer takes letters apart."""
    texts = ["What color?", "什么颜色？🚀", "\ufdfa" * 50, "\u1e9b\u0323" * 50]
    lengths = [len(policy[1].tokenizer(text).input_ids) for text in texts]
    assert all(_most_tokens(text) >= length for text, length in zip(texts, lengths, strict=True))
    data = load_examples(write_jsonl(folder, *(GOOD | {"question": text} for text in [*texts, "long " * 3000])))
    called, tokenizer = [], policy[1].tokenizer
    monkeypatch.setattr(type(tokenizer), "__call__", counted(type(tokenizer).__call__, called))
    found = bad_prompts(2000, policy[1], data, None, 16)
    assert [index for index, _ in found] == [4] and 0 < len(called) < 5


def counted(function, called: list):
    def count(*arguments, **options):
        called.append(1)
        return function(*arguments, **options)

    return count
