"""Attention of packed groups without a mask, against plain softmax under the dense tree mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sayo.model import attention
from sayo.model.attention import AttentionProbe, PackedGroup, SamplingCache, packed_attention
from sayo.model.packing import dense_mask

SCALING = 0.3


def random_heads(num_tokens, heads, width=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, num_tokens, width, generator=generator).to(dtype)


def plain(query, key, value, mask):
    """Softmax attention in float64, one line each."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(repeats, 1) for part in (key, value))
    scores = (query.double() @ key.mT * SCALING).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ value


def make(prompt_and_lengths, heads=4, kv_heads=2, dtype=torch.float32):
    groups = [PackedGroup(prompt, lengths) for prompt, lengths in prompt_and_lengths]
    total = sum(group.prompt_length + group.num_tokens for group in groups)
    shapes = ((heads, 1), (kv_heads, 2), (kv_heads, 3))
    return groups, [random_heads(total, count, dtype=dtype, seed=seed).requires_grad_() for count, seed in shapes]


CASES = [  # (prompt, lengths of its completions) of each group
    [(9, (4, 1, 7, 3))],
    [(1, (1,))],
    [(5, (6, 6, 6))],
    [(30, (1, 40))],
    [(7, ())],
    [(6, (3, 0, 2))],
    [(4, (2, 5)), (8, ()), (3, (1, 1, 9))],
]
PRECISE = {"dtype": torch.float32, "of_output": (2e-6, 1e-5), "of_gradients": (2e-6, 1e-5)}
HALF = {"of_output": (2e-2, 2e-2), "of_gradients": (5e-2, 5e-2)}
# The copies are what other devices than the CPU take.
RUNS = [(name, case, PRECISE) for name in ("packed_attention", "_attention_with_copies") for case in CASES]
RUNS += [("packed_attention", [(20, (9, 4, 12))], HALF | {"dtype": dtype}) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("name", "case", "precision"), RUNS)
def test_output_and_gradients_equal_softmax_under_the_dense_mask(name, case, precision):
    groups, heads = make(case, dtype=precision["dtype"])
    weights = random_heads(heads[0].shape[2], 4, seed=4)
    output = getattr(attention, name)(*heads, groups, SCALING)
    exact = plain(*heads, dense_mask(groups))
    assert output.dtype == precision["dtype"]
    atol, rtol = precision["of_output"]
    torch.testing.assert_close(output.double(), exact, atol=atol, rtol=rtol)
    atol, rtol = precision["of_gradients"]
    gradients = (torch.autograd.grad((part * weights).sum(), heads) for part in (output, exact))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), atol=atol, rtol=rtol)


@given(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_any_group(prompt_length, lengths):
    groups, heads = make([(prompt_length, lengths)])
    found = packed_attention(*heads, groups, SCALING)
    torch.testing.assert_close(found.double(), plain(*heads, dense_mask(groups)), atol=2e-6, rtol=1e-5)


def test_scores_that_overflow_a_plain_exponential():
    groups, heads = make([(12, (5, 8))])
    with torch.no_grad():
        heads[0].mul_(200)
    expected = plain(*heads, dense_mask(groups))
    found = packed_attention(*heads, groups, SCALING)
    assert found.isfinite().all()
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(found.sum(), heads)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("query", ["token", "predictor"])
@pytest.mark.parametrize("lengths", [(4, 1, 7, 3), (5,), (1, 1)], ids=str)
def test_rows_read_packed_equal_rows_read_under_the_dense_mask(lengths, query):
    groups, (queries, keys, _) = make([(9, lengths)])
    rows = torch.arange(9, 9 + sum(lengths))
    if query == "predictor":
        starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
        rows = rows - 1
        rows[starts] = 8  # the prompt's last token
    weights = torch.zeros(1, 9 + sum(lengths), 2)
    weights[:, 2:6] = torch.rand(1, 4, 2, generator=torch.Generator().manual_seed(0))
    probe = AttentionProbe([0, 1], rows, weights)
    probe.read(0, queries, keys, dense_mask(groups), SCALING)
    probe.read_packed(1, queries, keys, groups[0], SCALING)
    torch.testing.assert_close(probe.results[1], probe.results[0], atol=1e-6, rtol=1e-5)


def test_sampling_attends_as_the_packed_row_does():
    """Token by token, completions ending at different steps, two prompts: the rows of one dense computation."""
    lengths = [(3, 5, 2), (4, 4)]
    groups, (query, key, value) = make([(6, lengths[0]), (9, lengths[1])])
    expected = plain(query, key, value, dense_mask(groups))
    cache = SamplingCache([6, 9], max_new_tokens=5)
    prompts = torch.cat([torch.arange(6), 16 + torch.arange(9)])
    cache.prompts[0] = key[:, :, prompts], value[:, :, prompts]
    first = [6, 9, 14, 25, 29]  # where each completion begins in the row
    flat, parent = [*lengths[0], *lengths[1]], torch.tensor([0, 0, 0, 1, 1])
    rows = torch.arange(5)
    for step in range(5):
        alive = torch.tensor([number for number in range(5) if flat[number] > step])
        kept = torch.searchsorted(rows, alive) if len(alive) < len(rows) else None
        rows = alive
        cache.begin_token(kept, parent[alive].bincount(minlength=2).tolist())
        at = torch.tensor([first[number] + step for number in alive.tolist()])
        with torch.no_grad():
            found = cache.attend(0, query[:, :, at], key[:, :, at], value[:, :, at], SCALING)
        torch.testing.assert_close(found.double(), expected[:, :, at], atol=1e-5, rtol=1e-5)
