"""Sampling from a model: one token of every row at a time.

After a model's first token, only Decoding.unfinished reads from the device.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sayo.model.attention import PROBED_ATTENTION
from sayo.model.families import not_finite
from sayo.model.forward import attention_name, forward_hidden
from sayo.model.packing import Tokens, model_layout, packed_layout
from sayo.model.prompts import base_model, prompt_positions
from sayo.model.sampling.cache import SamplingCache
from sayo.model.sampling.decoder import Decoder
from sayo.model.sampling.tokens import may_wait

WINDOW = 32  # a completion's buffer is attended to in multiples of this many tokens
DECODES = weakref.WeakKeyDictionary()  # by model, whether a Decoder gave what its layers give


class TreeSampler:
    """Groups side by side in a SamplingCache, through a Decoder where the model has its form."""

    def __init__(self, model, prompts, num_generations: int, max_new_tokens: int):
        self.model, lengths = model, [len(prompt.input_ids) for prompt in prompts]
        self.cache = SamplingCache(lengths, num_generations, max_new_tokens)
        layout = packed_layout(model, prompts, [[] for _ in prompts])
        hidden = forward_hidden(model, layout, self.cache)[0]  # (sum of P, D)
        last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        self.hidden = hidden[last].repeat_interleave(num_generations, dim=0)  # (B * G, D), each prompt's last token
        starts = torch.stack([prompt_positions(model, prompt).max() + 1 for prompt in prompts]).to(hidden.device)
        places = starts[:, None] + torch.arange(max_new_tokens, device=hidden.device)  # (B, T)
        self.positions = places.expand(len(layout.position_ids), -1, -1)  # (axes, B, T)
        self.decoder = Decoder(model) if DECODES.get(base_model(model), True) and Decoder.fits(model) else None
        if self.decoder:
            self.angles = self.decoder.angles(model, self.positions)

    def feed(self, tokens: Tensor, position: Tensor, window: int) -> Tensor:
        """Feed a token (m,) to each row, all at one place (1,) of their completions: last hidden states (m, D)."""
        self.cache.begin_token(position, window)
        # The first token of a model goes through its own layers, too. They come first: what the cache keeps is the
        # Decoder's, whichever token is the first in a process.
        is_known = base_model(self.model) in DECODES
        expected = None if self.decoder and is_known else self._through_layers(tokens, position)
        if self.decoder is None:
            return expected
        rows = self.grid[1]
        angles = [part.index_select(1, position).expand(-1, rows, -1).flatten(0, 1)[:, None] for part in self.angles]
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = self.decoder(tokens, *angles, self.cache)
        if not is_known and not self._agrees(hidden, expected):
            self.decoder = None
            return self._through_layers(tokens, position)
        return hidden

    def _agrees(self, hidden: Tensor, expected: Tensor) -> bool:
        """Whether the Decoder's hidden states (m, D) are those of the layers; remembered by model."""
        bound = 1e-3 if hidden.dtype == torch.float32 else 0.1
        is_equal = (hidden - expected).float().norm() <= bound * expected.float().norm()
        if not expected.isfinite().all():
            return True  # nothing is known of the layers yet
        DECODES[base_model(self.model)] = agrees = bool(is_equal)
        if not agrees:
            print(
                "sampling: the model's layers are not plain ones: transformers' own are used (slower)", file=sys.stderr
            )
        return agrees

    def _through_layers(self, tokens: Tensor, position: Tensor) -> Tensor:
        positions = self.positions.index_select(2, position).expand(-1, -1, self.grid[1])
        return forward_hidden(self.model, Tokens(tokens[None], positions.reshape(len(positions), 1, -1)), self.cache)[0]

    @property
    def grid(self) -> tuple[int, int]:
        """Groups and rows of each, B and G."""
        return self.cache.grid

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Keep these groups (B',), and of each these rows (B', G')."""
        self.cache.keep(groups, rows)
        self.positions = self.positions[:, groups]
        if self.decoder:
            self.angles = [part[groups] for part in self.angles]


class RowSampler:
    """One row per completion of one prompt, which is prefilled once: for models that cannot be packed."""

    decoder = None

    def __init__(self, model, prompts, num_generations: int, _):
        from transformers import DynamicCache

        (prompt,) = prompts
        layout = packed_layout(model, [prompt], [[]])
        self.model, self.cache = model, DynamicCache(config=base_model(model).config.get_text_config())
        hidden = forward_hidden(model, Tokens(layout.input_ids, layout.position_ids, prompts=[prompt]), self.cache)
        self.hidden = hidden[0, -1].repeat(num_generations, 1)  # (G, D)
        self.start, self.axes = layout.position_ids.max() + 1, len(layout.position_ids)
        self.grid = 1, num_generations
        self.cache.reorder_cache(torch.zeros(num_generations, dtype=torch.long, device=hidden.device))

    def feed(self, tokens: Tensor, position: Tensor, window: int) -> Tensor:
        """As TreeSampler.feed; transformers' cache needs no window."""
        positions = (self.start + position).expand(self.axes, len(tokens), 1)  # (axes, m, 1)
        return forward_hidden(self.model, Tokens(tokens[:, None], positions), self.cache)[:, 0]

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Keep these rows (1, G') of the one group."""
        self.cache.reorder_cache(rows[0])
        self.grid = tuple(rows.shape)


def make_sampler(model, prompts, num_generations: int, max_new_tokens: int) -> TreeSampler | RowSampler:
    """The sampler for this model, after the prefill: its `hidden` (B * G, D) predicts the first tokens."""
    return (TreeSampler if is_packed(model) else RowSampler)(model, prompts, num_generations, max_new_tokens)


class Decoding:
    """The rows of a sampler while tokens are drawn for them."""

    def __init__(
        self,
        sampler,
        head: nn.Module,
        choose: Callable,
        uniforms: Tensor,
        ends: Tensor,
        never: Tensor,
        seen: Tensor | None = None,
        penalty: float = 1.0,
    ):
        """Args: uniforms (T, m); ends: ids that end a completion; never: ids that are not sampled.

        seen: (m, V) boolean, the tokens that `penalty` (transformers' repetition_penalty) makes less likely.
        """
        (length, count), device = uniforms.shape, uniforms.device
        self.sampler, self.head, self.choose, self.uniforms, self.ends = sampler, head, choose, uniforms, ends
        self.banned = torch.zeros(head.weight.shape[0], device=device).index_fill_(0, never, float("-inf"))
        self.all_tokens = torch.zeros(count, length, dtype=torch.long, device=device)
        self.rows, self.tokens = torch.arange(count, device=device), self.all_tokens.clone()  # rows that are left
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.finite = torch.ones_like(self.ended)
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the next token
        self.seen, self.penalty = seen, penalty
        self.captures, self.shape, self.graph = device.type == "cuda", None, None

    def draw(self, hidden: Tensor) -> None:
        """Draw every row's next token from its hidden state (m, D)."""
        logits = self.head(hidden).float()
        if self.seen is not None:
            less = torch.where(logits < 0, logits * self.penalty, logits / self.penalty)
            logits = torch.where(self.seen, less, logits)
        drawn = self.choose(logits + self.banned, self.uniforms.index_select(0, self.position)[0])
        self.finite &= hidden.isfinite().all(-1) | self.ended
        self.ended |= torch.isin(drawn, self.ends)
        self.tokens.index_copy_(1, self.position, drawn[:, None])
        if self.seen is not None:
            self.seen.scatter_(1, drawn[:, None], True)
        self.position += 1

    def step(self, window: int) -> None:
        """Feed every row its last token and draw the next; `window` as in SamplingCache.begin_token.

        On a card, the second step of each shape is captured as a CUDA graph, which later steps replay.
        """
        shape = len(self.rows), window
        if self.shape != shape or not self.captures or self.sampler.decoder is None:
            self.shape, self.graph = shape, None
            self._step(window)
            return
        if self.graph is None:
            try:
                self.graph = self._captured(window)
            except RuntimeError as error:
                self.captures = False
                print(f"sampling: steps are not replayed as a CUDA graph (slower): {error}", file=sys.stderr)
                self._step(window)
                return
        self.graph.replay()

    def _step(self, window: int) -> None:
        before = self.position - 1
        self.draw(self.sampler.feed(self.tokens.index_select(1, before)[:, 0], before, window))

    def _captured(self, window: int) -> torch.cuda.CUDAGraph:
        graph, dtype = torch.cuda.CUDAGraph(), torch.get_autocast_dtype("cuda")
        uncached = torch.autocast("cuda", dtype, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)
        with uncached, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(window)
        return graph

    def unfinished(self) -> bool:
        """Whether a completion goes on; ended rows leave once few enough others are left.

        Raises PolicyError: activations are not finite in the model's number format.
        """
        ended, finite = torch.stack([self.ended, self.finite]).cpu()
        if not finite.all():
            raise not_finite(self.sampler.model)
        if (alive := ~ended).any():
            self._drop_ended(alive.view(self.sampler.grid))
        return bool(alive.any())

    def _drop_ended(self, alive: Tensor) -> None:
        """Keep groups of `alive` (B, G) with unfinished completions, and as many rows as the one with the most has."""
        counts = alive.sum(1)
        groups, width = counts.nonzero()[:, 0], int(counts.max())
        # Every new number of rows is a new graph on a card, and a little less work on a CPU.
        if len(groups) * width > (0.75 if may_wait(self.rows.device) else 0.5) * alive.numel():
            return
        rows = alive[groups].int().argsort(dim=1, descending=True, stable=True)[:, :width]  # (B', G')
        kept = (groups[:, None] * alive.shape[1] + rows).flatten().to(self.rows.device)
        self.all_tokens[self.rows] = self.tokens
        self.sampler.keep(groups.to(kept.device), rows.to(kept.device))
        for name in ("rows", "tokens", "ended", "finite", *(["seen"] if self.seen is not None else [])):
            setattr(self, name, getattr(self, name)[kept])
        self.uniforms = self.uniforms[:, kept]

    def completions(self) -> list[Tensor]:
        """Every row's ids up to its first EOS, each (n_i,) on the CPU."""
        self.all_tokens[self.rows] = self.tokens
        found, ends = self.all_tokens.cpu(), torch.isin(self.all_tokens, self.ends).cpu()
        counts = torch.where(ends.any(1), ends.int().argmax(1) + 1, found.shape[1])
        return [row[:count] for row, count in zip(found, counts.tolist(), strict=True)]


def look_every(device: torch.device) -> int:
    """Tokens between two looks at which rows have ended."""
    return 1 if may_wait(device) else 8


def is_packed(model) -> bool:
    """Whether groups can be sampled side by side: with neither linear nor eager attention."""
    return model_layout(model) == "packed" and attention_name(model) == PROBED_ATTENTION
