"""Sampling from a model: caches, the choice of a token, ids that end a completion, ids that are never sampled."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from sayo.model.attention import PROBED_ATTENTION, SamplingCache
from sayo.model.forward import attention_name, forward_hidden
from sayo.model.packing import Tokens, model_layout, packed_layout
from sayo.model.prompts import base_model, model_device, prompt_positions


class TreeSampler:
    """All prompts side by side in one row; each step feeds one token per unfinished completion."""

    def __init__(self, model, prompts, num_generations, max_new_tokens):
        self.model, device = model, model_device(model)
        lengths = torch.tensor([len(prompt.input_ids) for prompt in prompts])
        self.cache = SamplingCache(lengths.tolist(), max_new_tokens)
        layout = packed_layout(model, prompts, [[] for _ in prompts])
        hidden = forward_hidden(model, layout, self.cache)[0]  # (sum of P, D)
        self.parent = torch.arange(len(prompts)).repeat_interleave(num_generations)  # (B * G,)
        self.rows = torch.arange(len(self.parent), device=device)  # completions that have keys
        starts = torch.stack([prompt_positions(model, prompt).max() + 1 for prompt in prompts])
        self.start, self.axes = starts[self.parent].to(device), len(layout.position_ids)
        self.hidden = hidden[(lengths.cumsum(0) - 1)[self.parent].to(device)]  # (B * G, D), each prompt's last token

    def feed(self, tokens: Tensor, alive: Tensor, step: int) -> Tensor:
        """Feed a token (m,) to each completion in `alive` (m,): their last hidden states (m, D)."""
        kept = torch.searchsorted(self.rows, alive) if len(alive) < len(self.rows) else None
        self.rows = alive
        of_prompts = self.parent[alive.cpu()].bincount(minlength=len(self.cache.prompt_lengths))
        self.cache.begin_token(kept, of_prompts.tolist())
        positions = (self.start[alive] + step).expand(self.axes, 1, -1)  # (axes, 1, m)
        return forward_hidden(self.model, Tokens(tokens[None], positions), self.cache)[0]


class RowSampler:
    """One row per completion of one prompt, which is prefilled once: for models that cannot be packed."""

    def __init__(self, model, prompts, num_generations, _):
        from transformers import DynamicCache

        (prompt,) = prompts
        layout = packed_layout(model, [prompt], [[]])
        self.model, self.cache = model, DynamicCache(config=base_model(model).config.get_text_config())
        hidden = forward_hidden(model, Tokens(layout.input_ids, layout.position_ids, prompts=[prompt]), self.cache)
        self.hidden = hidden[0, -1].expand(num_generations, -1)  # (G, D)
        self.start, self.axes = layout.position_ids.max() + 1, len(layout.position_ids)
        self.rows = torch.arange(num_generations, device=self.start.device)  # completions that have a row
        self.cache.reorder_cache(torch.zeros_like(self.rows))

    def feed(self, tokens: Tensor, alive: Tensor, step: int) -> Tensor:
        if len(alive) < len(self.rows):  # drop the rows of finished completions
            self.cache.reorder_cache(torch.searchsorted(self.rows, alive))
            self.rows = alive
        positions = (self.start + step).expand(self.axes, len(alive), 1)  # (axes, m, 1)
        return forward_hidden(self.model, Tokens(tokens[:, None], positions), self.cache)[:, 0]


def make_sampler(model, prompts, num_generations: int, max_new_tokens: int) -> TreeSampler | RowSampler:
    """The sampler for this model, after the prefill: its `hidden` (B * G, D) predicts the first tokens."""
    return (TreeSampler if is_packed(model) else RowSampler)(model, prompts, num_generations, max_new_tokens)


def is_packed(model) -> bool:
    """Whether groups can be sampled side by side: with neither linear nor eager attention."""
    return model_layout(model) == "packed" and attention_name(model) == PROBED_ATTENTION


def choose_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution: logits (m, V) to ids (m,).

    Example: probabilities (0.5, 0.3, 0.2) and uniform 0.6 give token 1, with top_p=0.4 token 0.

    Args:
        uniforms: (m,) in [0, 1), one per row, so that a group's draws do not depend on its neighbours.
        temperature: 0 takes the most probable token.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.cumsum(-1)  # (m, V)
    # A token stays while the more probable ones before it have not reached top_p; the first always stays.
    probabilities = probabilities.where(cumulative - probabilities < top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding must not carry the threshold up to the total: only tokens of probability zero come after it.
    threshold = torch.minimum(uniforms.to(total)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    return order.gather(-1, torch.searchsorted(cumulative, threshold, right=True))[:, 0]


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
