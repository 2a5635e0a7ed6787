"""The choice of a token, the ids that end a completion, and those that are never sampled."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from sayo.model.prompts import base_model

SORTED = 4096  # tokens of a vocabulary that are sorted for every draw
MAY_WAIT = ("cpu",)  # devices whose results the host may read at every token


def may_wait(device: torch.device) -> bool:
    """Whether the host may read from this device at every token: a CPU has nothing to wait for."""
    return device.type in MAY_WAIT


def choose_tokens(
    logits: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    min_p: float = 0.0,
) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution, the most probable first: (m, V) to ids (m,).

    Example: probabilities (0.5, 0.3, 0.2) and uniform 0.6 give token 1, with top_p=0.4 token 0. Of a large vocabulary,
    only the SORTED most probable tokens are sorted. A CPU sorts the others when a draw needs them; a card, which would
    have to wait for that, takes them in the order of the vocabulary.

    Args:
        uniforms: (m,) in [0, 1), one per row, so that a group's draws do not depend on its neighbours.
        temperature: 0 takes the most probable token.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p.
        top_k: keep so many of the most probable tokens. min_p: keep tokens of at least this share of the largest
            probability. Each is applied to what the one before leaves, as in transformers: top_k, top_p, min_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    all_probabilities = logits.softmax(-1)
    probabilities, order = _most_probable(all_probabilities, SORTED)
    if SORTED < logits.shape[-1]:
        needed = uniforms.to(logits) if top_p == 1 else top_p
        if may_wait(logits.device) and (probabilities.sum(-1) <= needed).any():
            probabilities, order = _most_probable(all_probabilities, logits.shape[-1])
        else:
            others = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
            probabilities = torch.cat([probabilities, all_probabilities.scatter(-1, order, 0.0)], dim=-1)
            order = torch.cat([order, others], dim=-1)
    cumulative = probabilities.cumsum(-1)
    # A token stays while the more probable ones before it have not reached top_p; the first always stays.
    is_kept = cumulative - probabilities < top_p
    if min_p:
        is_kept &= probabilities >= min_p * probabilities[:, :1]
    probabilities = probabilities.where(is_kept, 0.0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding must not carry the threshold up to the total: only tokens of probability zero come after it.
    threshold = torch.minimum(uniforms.to(total)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    places = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=order.shape[-1] - 1)  # NaN has no place
    return order.gather(-1, places)[:, 0]


def _most_probable(probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row in descending order, equal ones in the order of the vocabulary, and their ids."""
    if count >= probabilities.shape[-1]:
        return probabilities.sort(dim=-1, descending=True, stable=True)
    ids = probabilities.topk(count, sorted=False).indices.sort(dim=-1).values
    values, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def eos_token_ids(model: nn.Module, processor) -> set[int]:
    """Ids that end a completion: the generation config's and the tokenizer's own."""
    configured = base_model(model).generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    return (ids | {processor.tokenizer.eos_token_id}) - {None}


def suppressed_token_ids(model: nn.Module, processor) -> Tensor:
    """Ids (K,) that are never sampled: vision placeholders and delimiters, and rows of the head without a token.

    A sampled image token would break the next forward.
    """
    base, tokenizer = base_model(model), processor.tokenizer
    vision = re.compile(r"image|img|vision|video|<row_", re.IGNORECASE)
    special = {*tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {getattr(base.config, name, None) for name in names} - {None}
    ids |= set(tokenizer.convert_tokens_to_ids([token for token in special if vision.search(token)]))
    ids |= set(range(len(tokenizer), base.get_output_embeddings().weight.shape[0]))
    return torch.tensor(sorted(ids - eos_token_ids(model, processor)), dtype=torch.long)
