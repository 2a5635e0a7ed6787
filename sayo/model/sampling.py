"""Sampling from a model: caches, one token of every row at a time, the choice of a token, ids that end or never come.

A step has the same number of operations for any number of groups, fixed shapes and fixed addresses, and asks the device
for nothing. So a card can replay it as one CUDA graph.
"""

from __future__ import annotations

import math
import re
import sys
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from sayo.model.attention import PROBED_ATTENTION
from sayo.model.families import PolicyError
from sayo.model.forward import attention_name, compute_dtype, forward_hidden
from sayo.model.lora import JoinedLinears
from sayo.model.packing import Tokens, model_layout, packed_layout
from sayo.model.prompts import base_model, model_device, prompt_positions

WINDOW = 32  # a completion's buffer is attended to in multiples of this many tokens
SORTED = 4096  # tokens of a vocabulary that are sorted for every draw
CPU_SAMPLING_TOKENS = 8192
MAY_WAIT = ("cpu",)  # devices whose results the host may read at every token
DECODES = weakref.WeakKeyDictionary()  # by model, whether a Decoder gave what its layers give


class SamplingCache:
    """Keys and values while B groups of G rows are sampled: a prompt's once, padded to the longest; a completion's own.

    The prefill fills it through store_prompts. From then on one token of every row is fed at a time, into buffers that
    stay where they are.
    """

    def __init__(self, prompt_lengths: Sequence[int], num_generations: int, max_new_tokens: int):
        self.lengths, self.max_new_tokens = list(prompt_lengths), max_new_tokens
        self.grid = len(self.lengths), num_generations  # B, G
        self.prompts: dict[int, list[Tensor]] = {}  # by layer, keys and values (B, H_kv, P, d)
        self.completions: dict[int, list[Tensor]] = {}  # by layer, (B, H_kv, G, max_new_tokens, d)
        self.prompt_mask = self.own_mask = self.position = None
        self.window = 0

    def store_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep a prefill's keys and values, (1, H_kv, sum of P, d) each."""
        (groups, rows), num_kv, width = self.grid, key.shape[1], key.shape[3]
        parts = [part[0].transpose(0, 1).split(self.lengths) for part in (key, value)]  # B of (P, H_kv, d)
        self.prompts[layer] = [pad_sequence(part, True).transpose(1, 2).contiguous() for part in parts]
        own = (groups, num_kv, rows, self.max_new_tokens, width)
        self.completions[layer] = [key.new_zeros(own), key.new_zeros(own)]
        if self.prompt_mask is None:
            lengths = torch.tensor(self.lengths, device=key.device).repeat_interleave(num_kv)
            padding = torch.arange(max(self.lengths), device=key.device) >= lengths[:, None, None]
            self.prompt_mask = key.new_zeros(padding.shape).masked_fill_(padding, float("-inf"))  # (B * H_kv, 1, P)

    def begin_token(self, position: Tensor, window: int) -> None:
        """Before each token: its place (1,) in its completion, and how much of the buffers is attended to."""
        self.position, self.window = position, window
        later = torch.arange(window, device=position.device) > position
        self.own_mask = torch.zeros_like(later, dtype=self.prompt_mask.dtype).masked_fill_(later, float("-inf"))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """One token of each of the m = B * G rows: query (m, H, d), key and value (m, H_kv, d) to (m, H, d)."""
        (groups, rows), (_, heads, width), num_kv = self.grid, query.shape, key.shape[1]
        for buffer, part in zip(self.completions[layer], (key, value), strict=True):
            buffer.index_copy_(3, self.position, part.view(groups, rows, num_kv, 1, width).transpose(1, 2))
        keys, values = (part.flatten(0, 2)[:, : self.window] for part in self.completions[layer])  # (B H_kv G, t, d)
        prompt_keys, prompt_values = (part.flatten(0, 1) for part in self.prompts[layer])  # (B H_kv, P, d)
        repeats, num_prompt = heads // num_kv, prompt_keys.shape[1]
        queries = query.view(groups, rows, num_kv, repeats, width).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        beta = int(len(set(self.lengths)) > 1)  # without padding there is nothing to mask
        on_prompt = torch.baddbmm(self.prompt_mask, queries, prompt_keys.mT, beta=beta, alpha=scaling)
        on_own = torch.baddbmm(self.own_mask, queries.reshape(-1, repeats, width), keys.mT, alpha=scaling)
        scores = torch.cat([on_prompt, on_own.view(len(on_prompt), -1, self.window)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)  # (B H_kv, G H / H_kv, P + t)
        output = torch.bmm(weights[..., :num_prompt], prompt_values)  # (B H_kv, G H / H_kv, d)
        own = weights[..., num_prompt:].unflatten(1, (rows, repeats)).flatten(0, 1)  # (B H_kv G, H / H_kv, t)
        output = output.view(-1, repeats, width).baddbmm_(own, values)
        return output.view(groups, num_kv, rows, repeats, width).transpose(1, 2).reshape(-1, heads, width)

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        """Keep these groups (B',), and of each these rows (B', G')."""
        num_kv = len(self.prompt_mask) // self.grid[0]
        self.prompt_mask = self.prompt_mask.unflatten(0, (-1, num_kv))[groups].flatten(0, 1)
        self.lengths, self.grid = [self.lengths[group] for group in groups.tolist()], tuple(rows.shape)
        for layer, parts in self.completions.items():
            self.completions[layer] = [part[groups[:, None], :, rows].transpose(1, 2).contiguous() for part in parts]
            if len(groups) < len(self.prompts[layer][0]):
                self.prompts[layer] = [part[groups] for part in self.prompts[layer]]


class _Norm:
    """transformers' RMSNorm in fewer operations: weight * x / sqrt(mean of x² + eps), float32 up to the product."""

    def __init__(self, weight: Tensor, eps: float):
        self.weight, self.eps = weight, torch.tensor(eps, device=weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return self.weight * (x * scale).to(x.dtype)


class Decoder:
    """A Llama-like language model for one token of every row, in about two thirds of transformers' operations.

    It holds no weights but joined copies of LoRA's. `check` compares it with transformers' own layers.
    """

    def __init__(self, model: nn.Module):
        text, dtype = base_model(model).model.get_decoder(), compute_dtype(model)
        self.embed, self.norm, self.layers = text.embed_tokens, _Norm(text.norm.weight, text.norm.variance_epsilon), []
        for layer in text.layers:
            attention, mlp, heads_norm = layer.self_attn, layer.mlp, None
            sizes = [
                projection.out_features // attention.head_dim for projection in (attention.q_proj, attention.k_proj)
            ]
            if hasattr(attention, "q_norm"):
                weights = [attention.q_norm.weight.expand(sizes[0], -1), attention.k_norm.weight.expand(sizes[1], -1)]
                heads_norm = _Norm(torch.cat(weights), attention.q_norm.variance_epsilon)
            norms = [_Norm(norm.weight, norm.variance_epsilon) for norm in _norms(layer)]
            joined = [(attention.q_proj, attention.k_proj, attention.v_proj), (attention.o_proj,)]
            joined += [(mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)]
            linears = [JoinedLinears(dtype, *layers) for layers in joined]
            self.layers.append((attention, sizes, heads_norm, norms, linears, mlp.act_fn))

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether the layers have the parts of Llama's and no others, and nothing hooks into their forward."""
        text = base_model(model).model.get_decoder()
        rotary, attention = getattr(text, "rotary_emb", None), {"q_proj", "k_proj", "v_proj", "o_proj"}
        if getattr(rotary, "rope_type", "dynamic") in ("dynamic", "longrope"):  # angles depend on the longest row
            return False
        for layer in text.layers:
            parts = {name: set(dict(module.named_children())) for name, module in layer.named_children()}
            norms = parts.keys() - {"self_attn", "mlp"}
            known = norms == {"input_layernorm", "post_attention_layernorm"} and hasattr(layer.self_attn, "head_dim")
            known &= parts.get("self_attn", set()) - {"rotary_emb"} in (attention, attention | {"q_norm", "k_norm"})
            known &= parts.get("mlp") == {"gate_proj", "up_proj", "down_proj", "act_fn"}
            known &= all(hasattr(norm, "variance_epsilon") for norm in (*_norms(layer), text.norm))
            known = known and {norm.weight.dtype for norm in (*_norms(layer), text.norm)} == {compute_dtype(model)}
            if not known or any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules()):
                return False
        return True

    def angles(self, model: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines (B, T, d) of text positions (axes, B, T), which are alike in all axes."""
        rotary, places = base_model(model).model.get_decoder().rotary_emb, positions.squeeze(0)
        found = rotary(self.embed.weight.new_zeros(1), places)
        cosine, sine = (part[0] if part.dim() == 4 else part for part in found)
        left, right = sine.chunk(2, dim=-1)
        return cosine, torch.cat([-left, right], dim=-1)

    def __call__(self, tokens: Tensor, cosine: Tensor, sine: Tensor, cache: SamplingCache) -> Tensor:
        """Feed a token (m,) to each row, at angles (m, 1, d): the last hidden states (m, D)."""
        hidden = self.embed(tokens)
        for attention, sizes, heads_norm, norms, (inputs, output, gates, down), activation in self.layers:
            *query_key, value = inputs(norms[0](hidden))
            heads = torch.cat(query_key, dim=-1).unflatten(-1, (sum(sizes), -1))  # (m, H + H_kv, d)
            heads = heads if heads_norm is None else heads_norm(heads)
            heads = heads * cosine + heads.roll(heads.shape[-1] // 2, -1) * sine
            query, key = heads.split(sizes, dim=1)
            value = value.unflatten(-1, (sizes[1], -1))
            attended = cache.attend(attention.layer_idx, query, key, value, attention.scaling)  # (m, H, d)
            (hidden,) = output(attended.flatten(1), hidden)
            gate, up = gates(norms[1](hidden))
            (hidden,) = down(activation(gate) * up, hidden)
        return self.norm(hidden)


def _norms(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    return layer.input_layernorm, layer.post_attention_layernorm


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
        bound = 1e-3 if hidden.dtype == torch.float32 else 0.1
        is_equal = (hidden - expected).float().norm() <= bound * expected.float().norm()
        DECODES[base_model(self.model)] = agrees = bool(is_equal | ~expected.isfinite().all())
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
        positions = (self.start + position).expand(self.axes, len(tokens), 1)  # (axes, m, 1)
        return forward_hidden(self.model, Tokens(tokens[:, None], positions), self.cache)[:, 0]

    def keep(self, groups: Tensor, rows: Tensor) -> None:
        self.cache.reorder_cache(rows[0])
        self.grid = tuple(rows.shape)


def make_sampler(model, prompts, num_generations: int, max_new_tokens: int) -> TreeSampler | RowSampler:
    """The sampler for this model, after the prefill: its `hidden` (B * G, D) predicts the first tokens."""
    return (TreeSampler if is_packed(model) else RowSampler)(model, prompts, num_generations, max_new_tokens)


class Decoding:
    """The rows of a sampler while tokens are drawn for them. Only `unfinished` reads from the device."""

    def __init__(self, sampler, head: nn.Module, choose: Callable, uniforms: Tensor, ends: Tensor, never: Tensor):
        """Args: uniforms (T, m); ends: ids that end a completion; never: ids that are not sampled."""
        (length, count), device = uniforms.shape, uniforms.device
        self.sampler, self.head, self.choose, self.uniforms, self.ends = sampler, head, choose, uniforms, ends
        self.banned = torch.zeros(head.weight.shape[0], device=device).index_fill_(0, never, float("-inf"))
        self.all_tokens = torch.zeros(count, length, dtype=torch.long, device=device)
        self.rows, self.tokens = torch.arange(count, device=device), self.all_tokens.clone()  # rows that are left
        self.ended = torch.zeros(count, dtype=torch.bool, device=device)
        self.finite = torch.ones_like(self.ended)
        self.position = torch.zeros(1, dtype=torch.long, device=device)  # of the next token
        self.captures, self.shape, self.graph = device.type == "cuda", None, None

    def draw(self, hidden: Tensor) -> None:
        """Draw every row's next token from its hidden state (m, D)."""
        drawn = self.choose(self.head(hidden).float() + self.banned, self.uniforms.index_select(0, self.position)[0])
        self.finite &= hidden.isfinite().all(-1) | self.ended
        self.ended |= torch.isin(drawn, self.ends)
        self.tokens.index_copy_(1, self.position, drawn[:, None])
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
            dtype = str(self.sampler.hidden.dtype).removeprefix("torch.")
            raise PolicyError(
                f"dtype: the model's activations are not finite in {dtype}; give --dtype bfloat16, or float32 where "
                "the GPU has no bfloat16"
            )
        if (alive := ~ended).any():
            self._drop_ended(alive.view(self.sampler.grid))
        return bool(alive.any())

    def _drop_ended(self, alive: Tensor) -> None:
        """Keep groups of `alive` (B, G) with unfinished completions, and as many rows as the one with the most has."""
        counts = alive.sum(1)
        groups, width = counts.nonzero()[:, 0], int(counts.max())
        # Every new number of rows is a new graph on a card, and a little less work on a CPU.
        if len(groups) * width > (0.75 if self.rows.device.type in MAY_WAIT else 0.5) * alive.numel():
            return
        rows = alive[groups].int().argsort(dim=1, descending=True, stable=True)[:, :width]  # (B', G')
        kept = (groups[:, None] * alive.shape[1] + rows).flatten().to(self.rows.device)
        self.all_tokens[self.rows] = self.tokens
        self.sampler.keep(groups.to(kept.device), rows.to(kept.device))
        for name in ("rows", "tokens", "ended", "finite"):
            setattr(self, name, getattr(self, name)[kept])
        self.uniforms = self.uniforms[:, kept]

    def completions(self) -> list[Tensor]:
        """Every row's ids up to its first EOS, each (n_i,) on the CPU."""
        self.all_tokens[self.rows] = self.tokens
        found, ends = self.all_tokens.cpu(), torch.isin(self.all_tokens, self.ends).cpu()
        counts = torch.where(ends.any(1), ends.int().argmax(1) + 1, found.shape[1])
        return [row[:count] for row, count in zip(found, counts.tolist(), strict=True)]


def groups_that_fit(
    text_config,
    free: int,
    prompt_tokens: int,
    num_generations: int,
    max_new_tokens: int,
    dtype: torch.dtype,
    in_4bit: bool,
) -> int:
    """How many groups share a cache on a card with so many free bytes: a power of two, so that it seldom changes.

    Half of the memory is for keys and values, the prefill's activations and logits. bitsandbytes multiplies 4-bit
    weights without unpacking them up to about 64 rows on a T4, and fewer on larger cards.
    """
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    kept = 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_dim
    activations = 8 * text_config.hidden_size + 3 * text_config.intermediate_size
    of_prompt = prompt_tokens * (kept + activations) * dtype.itemsize
    of_row = max_new_tokens * kept * dtype.itemsize + 10 * 4 * text_config.vocab_size
    groups = min(free // 2 // (of_prompt + num_generations * of_row), (64 if in_4bit else 512) // num_generations)
    return 2 ** int(math.log2(max(1, groups)))


def default_sampling_tokens(model, prompt_tokens: int, num_generations: int, max_new_tokens: int) -> int:
    """Tokens of the groups that share a cache: 8192 on a CPU, on a card what its free memory holds."""
    device = model_device(model)
    if device.type != "cuda":
        return CPU_SAMPLING_TOKENS
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    base, sizes = base_model(model), (prompt_tokens, num_generations, max_new_tokens)
    free, in_4bit = torch.cuda.mem_get_info(device)[0] + unused, bool(getattr(base, "is_loaded_in_4bit", False))
    groups = groups_that_fit(base.config.get_text_config(), free, *sizes, compute_dtype(model), in_4bit)
    return groups * (prompt_tokens + num_generations * max_new_tokens)


def look_every(device: torch.device) -> int:
    """Tokens between two looks at which rows have ended."""
    return 1 if device.type in MAY_WAIT else 8


def is_packed(model) -> bool:
    """Whether groups can be sampled side by side: with neither linear nor eager attention."""
    return model_layout(model) == "packed" and attention_name(model) == PROBED_ATTENTION


def choose_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution, the most probable first: (m, V) to ids (m,).

    Example: probabilities (0.5, 0.3, 0.2) and uniform 0.6 give token 1, with top_p=0.4 token 0. Of a large vocabulary,
    only the SORTED most probable tokens are sorted. A CPU sorts the others when a draw needs them; a card, which would
    have to wait for that, takes them in the order of the vocabulary.

    Args:
        uniforms: (m,) in [0, 1), one per row, so that a group's draws do not depend on its neighbours.
        temperature: 0 takes the most probable token.
        top_p: keep the smallest set of most probable tokens whose probability reaches top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    all_probabilities = (logits.float() / temperature).softmax(-1)
    probabilities, order = _most_probable(all_probabilities, SORTED)
    if SORTED < logits.shape[-1]:
        needed = uniforms.to(logits) if top_p == 1 else top_p
        if logits.device.type in MAY_WAIT and (probabilities.sum(-1) <= needed).any():
            probabilities, order = _most_probable(all_probabilities, logits.shape[-1])
        else:
            others = torch.arange(logits.shape[-1], device=logits.device).expand_as(logits)
            probabilities = torch.cat([probabilities, all_probabilities.scatter(-1, order, 0.0)], dim=-1)
            order = torch.cat([order, others], dim=-1)
    cumulative = probabilities.cumsum(-1)
    # A token stays while the more probable ones before it have not reached top_p; the first always stays.
    probabilities = probabilities.where(cumulative - probabilities < top_p, 0.0)
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
