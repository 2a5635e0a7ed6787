"""Attention of packed groups without a mask, against plain softmax under the dense tree mask."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from sayo.model import attention
from sayo.model.attention import AttentionProbe, PackedGroup, packed_attention
from sayo.model.packing import dense_mask
from sayo.model.sampling.cache import SamplingCache

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
HALVES = (torch.bfloat16, torch.float16)
HALF = {"of_output": (2e-2, 2e-2), "of_gradients": (5e-2, 5e-2)}
# The copies are what other devices than the CPU take.
RUNS = [(name, case, PRECISE) for name in ("packed_attention", "_attention_with_copies") for case in CASES]
RUNS += [("packed_attention", [(20, (9, 4, 12))], HALF | {"dtype": dtype}) for dtype in HALVES]


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
    """Token by token, two prompts, rows that leave after the third: the rows of one dense computation."""
    groups, (query, key, value) = make([(6, (5, 5, 5)), (9, (5, 5, 5))])
    expected = plain(query, key, value, dense_mask(groups))
    cache, first = SamplingCache([6, 9], 3, 5), torch.tensor([[6, 11, 16], [30, 35, 40]])  # where completions begin
    prompts = torch.cat([torch.arange(6), 21 + torch.arange(9)])
    cache.store_prompts(0, key[:, :, prompts], value[:, :, prompts])
    for step in range(5):
        if step == 3:
            cache.keep(torch.tensor([1]), torch.tensor([[0, 2]]))
            first = first[1:, [0, 2]]
        at = (first + step).flatten()
        cache.begin_token(torch.tensor([step]), window=step + 1 if step < 2 else 5)
        with torch.no_grad():
            token = (part[0, :, at].transpose(0, 1) for part in (query, key, value))
            found = cache.attend(0, *token, SCALING)
        torch.testing.assert_close(found.double(), expected[0, :, at].transpose(0, 1), atol=1e-5, rtol=1e-5)


def plain_kernel(query, key, value, causal, scaling):
    """Output and log-sum-exp of the scores, from public operations; differentiable."""
    scores = query.float() @ key.float().mT * scaling
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    return (scores.softmax(-1) @ value.float()).to(query.dtype), scores.logsumexp(-1)


def plain_backward(gradient, query, key, value, output, sums, causal, scaling):
    """What a fused backward pass computes from the output and log-sum-exp that it is given, whatever they are of."""
    scores = query @ key.mT * scaling
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), float("-inf"))
    weights = (scores - sums[..., None]).exp()
    of_scores = weights * (gradient @ value.mT - (gradient * output).sum(-1, keepdim=True)) * scaling
    return of_scores @ key, of_scores.mT @ query, weights.mT @ gradient


class PlainOperations:
    """torch.ops.aten with CUDA's two kernels written in plain torch, their signatures and padding as documented."""

    def __init__(self):
        self.calls = []

    def _scaled_dot_product_flash_attention(self, query, key, value, dropout_p, is_causal, *, scale):
        assert dropout_p == 0 and query.shape[1] % key.shape[1] == 0
        repeats, (seed, nothing) = query.shape[1] // key.shape[1], (torch.zeros(2), torch.zeros(0))
        key, value = (part.repeat_interleave(repeats, 1) for part in (key, value))
        output, sums = plain_kernel(query, key, value, is_causal, scale)
        return output, sums, None, None, query.shape[2], key.shape[2], seed, torch.zeros(()), nothing

    def _scaled_dot_product_flash_attention_backward(
        self,
        gradient,
        query,
        key,
        value,
        output,
        sums,
        cum_q,
        cum_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        seed,
        offset,
        *,
        scale,
    ):
        assert (cum_q, cum_k, max_q, max_k, dropout_p) == (None, None, query.shape[2], key.shape[2], 0)
        assert seed.shape == (2,) and offset.shape == () and sums.is_contiguous()
        repeats = query.shape[1] // key.shape[1]
        repeated = (part.repeat_interleave(repeats, 1) for part in (key, value))
        of_query, *others = plain_backward(gradient, query, *repeated, output, sums, is_causal, scale)
        return of_query, *(part.unflatten(1, (-1, repeats)).sum(2) for part in others)

    def _scaled_dot_product_efficient_attention(
        self, query, key, value, bias, with_sums, dropout_p, is_causal, *, scale
    ):
        assert bias is None and with_sums and dropout_p == 0 and query.shape[1] == key.shape[1] == value.shape[1]
        output, sums = plain_kernel(query, key, value, is_causal, scale)
        padded = torch.nn.functional.pad(sums, (0, -sums.shape[2] % 32), value=float("inf"))
        return output, padded, torch.zeros(()), torch.zeros(())

    def _scaled_dot_product_efficient_attention_backward(
        self, gradient, query, key, value, bias, output, sums, seed, offset, dropout_p, wanted, is_causal, *, scale
    ):
        assert bias is None and sums.shape[2] % 32 == 0 and wanted == [True, True, True, False]
        rows = query.shape[2]
        return *plain_backward(gradient, query, key, value, output, sums[:, :, :rows], is_causal, scale), None


class Saved(SimpleNamespace):
    """What autograd hands from forward to backward."""

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors


CUDA_KERNELS = {"flash": attention.CudaFlash, "efficient": attention.RepeatedHeads(attention.CudaEfficient)}


@pytest.mark.parametrize("kernel", CUDA_KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_of_cuda_merged_equal_softmax_under_the_dense_mask(monkeypatch, kernel, case):
    """Their semantics in plain torch: there is no card here."""
    groups, heads = make(case)
    weights, exact = random_heads(heads[0].shape[2], 4, seed=4), plain(*heads, dense_mask(groups))
    expected = torch.autograd.grad((exact * weights).sum(), heads)
    monkeypatch.setattr(torch.ops, "aten", PlainOperations())
    output = attention._PackedAttention.apply(*heads, groups, SCALING, CUDA_KERNELS[kernel])
    found = torch.autograd.grad((output * weights).sum(), heads)
    torch.testing.assert_close(output.double(), exact, atol=2e-6, rtol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kernel", "dtypes"), [("flash", HALVES), ("efficient", (*HALVES, torch.float32))])
def test_the_kernels_of_cuda_take_what_they_are_given(kernel, dtypes):
    """Signatures, shapes and number formats of this torch, by the meta functions of a fake card."""
    for dtype in dtypes:
        with FakeTensorMode():
            groups = [PackedGroup(37, (5, 18), torch.device("cuda")), PackedGroup(9, (), torch.device("cuda"))]
            index = torch.arange(18, device="cuda").expand(2, -1)
            vars(groups[0]).update(index=index, places=torch.arange(23, device="cuda"), real=index < 9)
            heads = [torch.empty(1, count, 69, 64, device="cuda", dtype=dtype) for count in (8, 2, 2)]
            saved = Saved()  # the engine that would pass it on wants a real card
            output = attention._PackedAttention.forward(saved, *heads, groups, SCALING, CUDA_KERNELS[kernel])
            gradients = attention._PackedAttention.backward(saved, torch.empty_like(output))[:3]
            assert (output.shape, output.dtype, output.device.type) == (heads[0].shape, dtype, "cuda")
            assert [(one.shape, one.dtype) for one in gradients] == [(part.shape, dtype) for part in heads]


def test_a_kernel_that_is_off_or_missing_on_a_card_is_not_used(monkeypatch, capsys):
    card, bfloat16 = torch.device("cuda", 0), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.version, "hip", None)

    def kernel_where(difference):
        attention.kernel_for.cache_clear()
        monkeypatch.setattr(attention, "difference_to_copies", difference)
        found = attention.kernel_for(card, bfloat16, 4, 2, 64), attention.kernel_for(card, bfloat16, 4, 2, 64)
        assert found[0] is found[1]
        return found[0], capsys.readouterr().err.splitlines()

    def missing(*_):
        raise RuntimeError("no kernel image is available")

    assert kernel_where(lambda *_: 0.004) == (attention.CudaFlash, [])
    for difference, words in (
        (lambda *_: 0.3, "0.3 off"),
        (lambda *_: float("nan"), "nan off"),
        (missing, "no kernel image"),
    ):
        found, (line,) = kernel_where(difference)
        assert found is None and "keys are copied instead" in line and words in line
    attention.kernel_for.cache_clear()


@pytest.mark.parametrize("kernel", [attention.CpuFlash, attention.RepeatedHeads(attention.CpuFlash)])
def test_the_comparison_on_a_card_finds_what_is_off(kernel):
    options = (torch.device("cpu"), torch.float32, 4, 2, 16)
    assert attention.difference_to_copies(kernel, *options) < 1e-5

    class Off(attention.CpuFlash):
        @staticmethod
        def backward(gradient, *others):
            return attention.CpuFlash.backward(gradient * 1.5, *others)

    assert attention.difference_to_copies(Off, *options) > 0.2


def test_padding_stays_hidden_when_the_group_with_the_longest_prompt_has_left():
    """The buffers keep the length of the longest prompt of the prefill."""
    groups, (query, key, value) = make([(3, (2, 2)), (10, (2, 2))])
    expected = plain(query, key, value, dense_mask(groups))
    cache, prompts = SamplingCache([3, 10], 2, 2), torch.cat([torch.arange(3), 7 + torch.arange(10)])
    cache.store_prompts(0, key[:, :, prompts], value[:, :, prompts])
    cache.keep(torch.tensor([0]), torch.tensor([[0, 1]]))
    at = torch.tensor([3, 5])  # the first token of each completion of the short prompt
    cache.begin_token(torch.tensor([0]), window=2)
    with torch.no_grad():
        found = cache.attend(0, *(part[0, :, at].transpose(0, 1) for part in (query, key, value)), SCALING)
    torch.testing.assert_close(found.double(), expected[0, :, at].transpose(0, 1), atol=1e-5, rtol=1e-5)
