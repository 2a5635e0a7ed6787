"""What the tests of sayo/model compare with: transformers' own forward, and one policy's numbers with another's."""

import torch
from conftest import ragged_completions
from hypothesis import strategies as st

from sayo.model.forward import group_logprobs
from sayo.model.prompts import base_model, encode_prompt


def encoded(processor, example: dict, lengths=(7, 1, 12, 4)):
    """(prompt, random completions of these lengths)."""
    return encode_prompt(processor, example), ragged_completions(processor, lengths)


def plain_forward(model, prompt, completion, **options):
    """transformers' forward of one prompt with one completion, in its own layout, positions and masks."""
    input_ids = torch.cat([prompt.input_ids, completion])[None]
    inputs = dict(prompt.model_inputs)
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros(1, len(completion), dtype=types.dtype)], dim=1)
    base = base_model(model)
    base.model.rope_deltas = None
    return base(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **inputs, **options)


@torch.no_grad()
def plain_logits(model, prompt, completion):
    """(n, V) logits of the rows that predict the completion."""
    return plain_forward(model, prompt, completion).logits[0, len(prompt.input_ids) - 1 : -1]


def plain_logprobs(model, prompt, completion, temperature: float = 1.0):
    """(n,) log-probs of the completion."""
    logits = plain_logits(model, prompt, completion) / temperature
    return logits.log_softmax(-1).gather(-1, completion[:, None])[:, 0]


@torch.no_grad()
def logps(model, prompt, completions, **options):
    """(T,) log-probs of all completion tokens, without gradients."""
    return torch.cat(group_logprobs(model, prompt, completions, **options))


def logps_and_gradients(model, prompt, completions, **options):
    """(T,) log-probs, and the gradients of the adapter for a weighted sum of them."""
    model.zero_grad()
    found = torch.cat(group_logprobs(model, prompt, completions, **options))
    (found * torch.linspace(-1, 2, len(found))).sum().backward()
    return found.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def distances(found, expected):
    """Mean difference of log-probs and relative difference of gradients, of two results of logps_and_gradients."""
    return (found[0] - expected[0]).abs().mean(), (found[1] - expected[1]).norm() / expected[1].norm()


@st.composite
def boxes_in(draw, width: int, height: int, most: int = 3):
    """Up to so many boxes of integers in a picture."""
    boxes = []
    for _ in range(draw(st.integers(0, most))):
        x, y = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        boxes.append([x, y, draw(st.integers(x + 1, width)), draw(st.integers(y + 1, height))])
    return boxes
