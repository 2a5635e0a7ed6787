"""One decoding step: the numbers of a whole row, few operations, no reads, and nothing that moves."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PACKED
from transformers import AutoConfig

import rollout
from rollout import group_generator, sample_groups
from sayo.model.loading import load_policy
from sayo.model.prompts import base_model, encode_prompt
from sayo.model.sampling import cache, tokens
from sayo.model.sampling.samplers import DECODES, Decoding, TreeSampler
from sayo.model.sampling.tokens import choose_tokens
from tools.workloads import build_model, example, generate, step_launches


@pytest.fixture
def decoding_of(policies, examples):
    """decoding_of(family, count) -> (model, Decoding after its first draw), two groups of three rows, 40 tokens."""

    def make(family="qwen3_vl"):
        model, processor = policies[family]
        sampler = TreeSampler(model, [encode_prompt(processor, row) for row in examples[:2]], 3, 40)
        nothing = torch.zeros(0, dtype=torch.long)
        uniforms = torch.rand(40, 6, generator=torch.Generator().manual_seed(0))
        head = base_model(model).get_output_embeddings()
        decoding = Decoding(sampler, head, partial(choose_tokens, top_p=0.9), uniforms, nothing, torch.tensor([0]))
        decoding.draw(sampler.hidden)
        return model, decoding

    with torch.no_grad():
        yield make


@pytest.mark.parametrize("family", PACKED)
def test_the_decoder_gives_what_the_layers_of_every_packed_family_give(decoding_of, family):
    model, decoding = decoding_of(family)
    sampler = decoding.sampler
    for step in range(3):
        position, tokens = torch.tensor([step]), decoding.tokens[:, step]
        decoding.step(32)
        found = sampler.feed(tokens, position, 32)
        torch.testing.assert_close(found, sampler._through_layers(tokens, position), atol=1e-5, rtol=1e-5)
    assert sampler.decoder is not None and DECODES[base_model(model)]


def test_a_step_is_one_graph_that_is_compiled_once_and_whose_buffers_stay(decoding_of):
    _, plain = decoding_of()
    _, compiled = decoding_of()
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(compiled._step, fullgraph=True, backend=counter, dynamic=False)
    held, own = compiled.sampler.cache, [compiled.tokens, compiled.ended, compiled.finite, compiled.position]
    buffers = [part for parts in (*held.prompts.values(), *held.completions.values(), own) for part in parts]
    addresses = [buffer.data_ptr() for buffer in buffers]
    for number in range(1, 40):
        window = 32 if number <= 32 else 40
        plain.step(window)
        step(window)
        assert counter.frame_count == (1 if number <= 32 else 2)
    assert [buffer.data_ptr() for buffer in buffers] == addresses
    assert torch.equal(torch.stack(plain.completions()), torch.stack(compiled.completions()))


def test_what_the_host_reads_less_often_changes_no_draw(policies, examples, monkeypatch):
    model, processor = policies["internvl"]
    looks, unfinished = [], Decoding.unfinished
    monkeypatch.setattr(Decoding, "unfinished", lambda self: looks.append(len(self.rows)) or unfinished(self))
    monkeypatch.setattr(rollout, "eos_token_ids", lambda *_: set(range(3, 40)))

    def sampled():
        looks.clear()
        generators = [group_generator("looks", number) for number in range(3)]
        options = {"num_generations": 6, "max_new_tokens": 40, "min_new_tokens": 2}
        groups = sample_groups(model, processor, examples[:3], generators=generators, **options)
        return [ids.tolist() for group in groups for ids in group.completions]

    expected, often = sampled(), list(looks)
    monkeypatch.setattr(tokens, "MAY_WAIT", ())
    assert sampled() == expected and 1 < len(looks) <= 6 < len(often)
    assert len({len(ids) for ids in expected}) > 3
    assert len(set(often)) > 2, "rows that have ended leave"


def test_launches_do_not_grow_with_the_number_of_groups_and_are_fewer_than_those_of_generate(tmp_path):
    sizes = {"hidden_size": 128, "num_layers": 12, "vocab_size": 480, "image_tokens": 64}
    build_model(SimpleNamespace(**sizes), tmp_path)
    model, processor = load_policy(str(tmp_path), lora_rank=16, dtype="float32")
    row = example(SimpleNamespace(**sizes))

    def sample(groups, rows, length):
        options = dict.fromkeys(("max_new_tokens", "min_new_tokens"), length) | {"system_prompt": ""}
        sample_groups(model, processor, [row] * groups, num_generations=rows, sampling_tokens=10**9, **options)

    one, eight = (step_launches(partial(sample, *shape)).total() for shape in ((1, 16), (8, 2)))
    prompt = encode_prompt(processor, row, "")
    assert one <= 0.8 * step_launches(partial(generate, model, prompt, 16)).total()
    assert eight <= 1.05 * one


def test_layers_that_only_look_plain_are_run_by_transformers(model_folders, examples, capsys):
    """Known names, other arithmetic: as in models that scale what a layer adds."""

    def sampled(model, processor):
        options = {"num_generations": 2, "max_new_tokens": 12, "generators": [group_generator("plain")]}
        return sample_groups(model, processor, examples[:1], **options)[0].texts

    def scaled():
        model, processor = load_policy(model_folders["qwen3_vl"], lora_rank=2, dtype="float32")
        mlp = base_model(model).model.language_model.layers[0].mlp
        plain = type(mlp).forward
        mlp.__class__ = type("ScaledMLP", (type(mlp),), {"forward": lambda self, x: 3 * plain(self, x)})
        return model, processor

    found = sampled(*scaled())
    assert "transformers' own are used" in capsys.readouterr().err
    model, processor = scaled()
    DECODES[base_model(model)] = False
    assert found == sampled(model, processor)
    assert "transformers' own are used" not in capsys.readouterr().err


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_a_large_vocabulary_is_not_sorted_and_draws_the_same_tokens(monkeypatch, top_p, spread):
    logits = spread * torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    logits[:, 100:120] = logits[:, :20]  # equal ones come in the order of the vocabulary
    uniforms = torch.linspace(0, 0.9999, 40)
    whole = choose_tokens(logits, uniforms, top_p=top_p)
    monkeypatch.setattr(tokens, "SORTED", 60)
    assert torch.equal(choose_tokens(logits, uniforms, top_p=top_p), whole)
    largest = logits.softmax(-1).topk(60).values
    if top_p == 1 or (largest.sum(-1) > top_p).all():  # else a card's set is another one, as likely
        monkeypatch.setattr(tokens, "MAY_WAIT", ())
        found = choose_tokens(logits, uniforms, top_p=top_p)
        is_sorted = logits.softmax(-1).gather(-1, whole[:, None])[:, 0] > largest[:, -1]
        assert torch.equal(found[is_sorted], whole[is_sorted]) and is_sorted.sum() >= 10


def test_tokens_after_the_sorted_ones_keep_their_probability_on_a_card(monkeypatch):
    monkeypatch.setattr(tokens, "SORTED", 3)
    monkeypatch.setattr(tokens, "MAY_WAIT", ())
    logits, count = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)), 30_000
    drawn = choose_tokens(logits.expand(count, -1), torch.rand(count, generator=group_generator(1)))
    torch.testing.assert_close(torch.bincount(drawn, minlength=12) / count, logits[0].softmax(-1), atol=0.012, rtol=0)


@pytest.mark.parametrize(
    ("free", "num_generations", "in_4bit", "groups"),
    [(0, 8, False, 1), (4, 8, False, 4), (20, 8, False, 16), (200, 8, False, 64), (20, 8, True, 8), (20, 100, True, 1)],
)
def test_groups_that_share_a_cache_on_a_card_follow_its_free_memory(
    policy, monkeypatch, free, num_generations, in_4bit, groups
):
    """Of Qwen3-VL-4B: 147 kB of keys and values for a token, 6 MB of logits for a row."""
    text = AutoConfig.from_pretrained(Path(__file__).parents[1] / "qwen3_vl" / "4b").get_text_config()
    sizes = 928, num_generations, 110
    assert cache.groups_that_fit(text, free * 10**9, *sizes, torch.bfloat16, in_4bit) == groups
    model = SimpleNamespace(config=text, is_loaded_in_4bit=in_4bit)
    text.get_text_config = lambda: text
    monkeypatch.setattr(cache, "model_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(cache, "compute_dtype", lambda _: torch.bfloat16)
    memory = {"mem_get_info": (free * 10**9 - 100, None), "memory_reserved": 300, "memory_allocated": 200}
    for name, value in memory.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert cache.default_sampling_tokens(model, *sizes) == groups * (928 + num_generations * 110)
    monkeypatch.undo()
    assert cache.default_sampling_tokens(policy[0], *sizes) == 8192
