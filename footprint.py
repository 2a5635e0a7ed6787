"""How many bytes live, and when, in one step: this project's own functions, run on tensors without numbers.

Sampling, reference and update of rollout.py, vlm.py and reward.py run on the policy of fake_policy.py, backward pass
included, and every storage that appears is counted until it is freed. So there is no formula of a layer's activations
that the code could outgrow: what autograd really keeps is what is counted. plan.py makes sense of it.

Layers are alike, so a model is traced with a few of them, twice, and the rest is a straight line. What is not seen is
the memory that a kernel takes and gives back within one operation, but for 4-bit weights that are unpacked.
"""

import copy
import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import attention
import prompts
import rollout
import vlm
from ease import ease_layer
from fake_policy import weights_by_part
from families import LANGUAGE_MODULE
from prompts import Prompt, base_model
from reward import group_statistics

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is open, by part, and keeps the peaks.

    peaks[stage, part]: bytes of every part when the sum was highest while `part` was at work in `stage`.
    multiply_adds[stage]: of all matrix products, attention included.
    """

    def __init__(self):
        super().__init__()
        self.stage, self.part = "start", "other"
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peaks: dict[tuple[str, str], dict[str, int]] = {}
        self.multiply_adds: Counter[str] = Counter()
        self._storages: dict[int, tuple[weakref.ref, list]] = {}
        self._highest: Counter = Counter()

    def hold(self, part: str, tensors) -> None:
        """Count these tensors, seen before or not, as belonging to a part."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._count(tensor, part)
                _, owner = self._storages[tensor.untyped_storage()._cdata]
                self.live[owner[0]] -= owner[1]
                self.live[part] += owner[1]
                owner[0] = part

    def add(self, part: str, num_bytes: int) -> None:
        """Count bytes that no tensor here stands for."""
        self.live[part] += num_bytes
        self.total += num_bytes
        self._look()

    @contextmanager
    def at(self, stage: str | None = None, part: str | None = None) -> Iterator[None]:
        """What is made inside the block belongs to this stage and part."""
        before = self.stage, self.part
        self.stage, self.part = stage or self.stage, part or self.part
        self._look()
        try:
            yield
        finally:
            self.stage, self.part = before

    def _count(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        owner = [part, storage.nbytes()]
        self.live[part] += owner[1]
        self.total += owner[1]
        self._storages[key] = weakref.ref(storage, partial(self._free, key)), owner

    def _free(self, key: int, _) -> None:
        part, num_bytes = self._storages.pop(key)[1]
        self.live[part] -= num_bytes
        self.total -= num_bytes

    def _look(self, passing: int = 0) -> None:
        """`passing`: bytes that the operation took and gave back."""
        key = self.stage, self.part
        if self.total + passing > self._highest[key]:
            self._highest[key] = self.total + passing
            self.peaks[key] = dict(self.live) | ({"4-bit weights, unpacked": passing} if passing else {})

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # rollout asks whether activations are finite
        if operation in _INDEXING:
            args = args[0], _as_numbers(args[1]), *args[2:]
        output = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                self._count(tensor, self.part)
        is_packed = operation.namespace == "bitsandbytes" and "gemm_4bit" in operation.name()
        self._look(math.prod(args[2]) * args[0].element_size() if is_packed else 0)
        self.multiply_adds[self.stage] += multiply_adds(operation, args, kwargs or {}, output)
        return output


def _as_numbers(indices) -> list:
    """Boolean masks as the numbers of their rows: how many there are is not known of a fake tensor."""
    numbers = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        numbers += list(index.nonzero(as_tuple=True)) if is_mask else [index]
    return numbers


def multiply_adds(operation, args, kwargs, output) -> int:
    """Multiply-adds of one operation; 0 for what is no product of matrices."""
    name = operation.name()
    if "gemm_4bit" in name:
        return args[0].numel() * args[2][0]
    if "flash_attention_for_cpu" in name:  # not in torch's registry
        backward = "backward" in name
        query, key = args[1:3] if backward else args[:2]
        causal = (args[8] if backward else args[4]) if len(args) > (8 if backward else 4) else False
        count = query.numel() * key.shape[2] * (5 if backward else 2)
        return count // 2 if causal and query.shape[2] == key.shape[2] else count
    formula = flop_registry.get(operation._overloadpacket)
    return formula(*args, **kwargs, out_val=output) // 2 if formula else 0


# --- one step -----------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What a process does in one step.

    `prompt` is the largest there is. Of `groups` groups, `side_by_side` share a cache while they are sampled; of
    `evaluated` prompts with one completion each (0: there is no evaluation), `evaluated_side_by_side`.
    """

    prompt: Prompt
    groups: int
    side_by_side: int
    evaluated: int = 0
    evaluated_side_by_side: int = 0


class _Enough(Exception):
    """The last token was sampled."""


def _sample(live: LiveBytes, policy, work: Work, count: int, in_all: int, num_generations: int, settings) -> Prompt:
    """rollout.sample_completions for `count` of `in_all` prompts, first token and last: no cache gets longer.

    Returns the first prompt, with its picture's features; those of all others are counted.
    """
    calls = []

    class AtFullLength(rollout._TreeSampler):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            live.hold("prompt cache", list(self.cache.prompts.values()))

        def feed(self, tokens, alive, step):
            self.cache.length = settings.max_new_tokens - 2
            return super().feed(tokens, alive, step)

    def choose(logits: Tensor, uniforms: Tensor) -> Tensor:
        rollout.choose_tokens(logits, uniforms, temperature=settings.temperature, top_p=settings.top_p)
        calls.append(len(logits))
        if len(calls) == 2:
            raise _Enough
        live.stage = f"{live.stage}, one token"
        return torch.zeros(len(logits), dtype=torch.long)

    first, generators = replace(work.prompt), [torch.Generator() for _ in range(count)]
    with ExitStack() as stack:
        stack.enter_context(vlm.evaluating(policy))
        stack.enter_context(torch.no_grad())
        # One prompt's features are made, those of the others, which are alike, only counted.
        stack.enter_context(mock.patch.object(prompts, "vision_is_frozen", lambda _: True))
        prompts.image_features(policy, [first])
        features = [value for value in vars(first.image_features[1]).values() if value is not None]
        live.hold("vision features", features)
        live.add("vision features", live.live["vision features"] * (in_all - 1))
        stack.enter_context(mock.patch.object(rollout, "_TreeSampler", AtFullLength))
        stack.enter_context(mock.patch.object(rollout, "eos_token_ids", lambda *_: {1}))
        stack.enter_context(mock.patch.object(rollout, "suppressed_token_ids", lambda *_: torch.tensor([0])))
        same = [replace(first) for _ in range(count)]
        try:
            rollout.sample_completions(policy, None, same, num_generations, settings.max_new_tokens, choose, generators)
        except _Enough:
            pass
    return first


def trace_step(policy: nn.Module, work: Work, settings, on_gpu: bool) -> LiveBytes:
    """Everything that train_rl.train_step does, of one process, with its peaks.

    The update is traced twice: "update" as the settings say, "other update" with gradient_checkpointing the other way.

    Args:
        settings: anything with the fields of train_rl.Config.
    """
    live, settings = LiveBytes(), copy.copy(settings)
    num_layers = base_model(policy).config.get_text_config().num_hidden_layers
    settings.attention_layers = list(range(-min(num_layers, len(settings.attention_layers)), 0))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with _parts_named(live, policy, on_gpu), live:
        for part, tensors in weights_by_part(policy).items():
            live.hold(part, tensors)
        if not on_gpu:
            live.add("checkpoint file, mapped", _mapped(policy))
        optimizer = _optimizer(live, trained, settings, on_gpu)
        live.hold("pictures", list(work.prompt.model_inputs.values()))
        # On a GPU, pixels pass through, one prompt at a time; on a CPU they stay with the group.
        pixels = 0 if on_gpu else live.live["pictures"]
        live.add("pictures", pixels * (work.groups - 1))
        if work.evaluated:
            with live.at("evaluation"):
                live.add("pictures", pixels * (work.evaluated - work.groups))
                _sample(live, policy, work, work.evaluated_side_by_side, work.evaluated, 1, settings)
                live.add("pictures", pixels * (work.groups - work.evaluated))
            live.add("vision features", -live.live["vision features"])
        with live.at("sampling"):
            prompt = _sample(live, policy, work, work.side_by_side, work.groups, settings.num_generations, settings)
        if not prompts.vision_is_frozen(policy):  # every forward makes them again
            prompt.image_features = None
            live.add("vision features", -live.live["vision features"])
        completions = [torch.zeros(settings.max_new_tokens, dtype=torch.long) for _ in range(settings.num_generations)]
        group = rollout.Group({}, prompt, completions, [], [])
        if settings.beta:
            with live.at("reference"), torch.no_grad(), vlm.evaluating(policy), policy.disable_adapter():
                vlm.group_logprobs(policy, group.prompt, completions, temperature=settings.temperature)
        for checkpointing in (not settings.gradient_checkpointing, settings.gradient_checkpointing):
            for parameter in trained:  # from the second group on, the gradients of earlier ones are there
                parameter.grad = torch.zeros_like(parameter) if work.groups > 1 else None
            live.hold("gradients", [parameter.grad for parameter in trained])
            set_checkpointing(policy, checkpointing)
            name = "update" if checkpointing == settings.gradient_checkpointing else "other update"
            with live.at(name):
                map_layer = ease_layer(policy) if settings.ease_weight else None
                statistics = group_statistics(policy, group, settings, map_layer)
                loss = torch.cat(statistics.logps).sum()
                if map_layer is not None:
                    loss = loss + statistics.maps.sum()
                del statistics
                with live.at(name, "backward"):
                    loss.backward()
                del loss
        set_checkpointing(policy, False)
        live.hold("gradients", [parameter.grad for parameter in trained])
        if optimizer:
            with live.at("optimizer step", "optimizer"):
                optimizer.step()
    return live


def _mapped(policy: nn.Module) -> int:
    """Bytes of what 4-bit layers were made of. On a CPU the checkpoint is not copied but mapped, and stays, as the
    weights that keep their format lie in it; the system can drop these pages when it needs them."""
    states = [getattr(parameter, "quant_state", None) for parameter in policy.parameters()]
    return sum(state.shape.numel() * state.dtype.itemsize for state in states if state)


def set_checkpointing(policy: nn.Module, on: bool) -> None:
    """As train_rl.main sets it: non-reentrant, and training mode only where it is on."""
    if on:
        base_model(policy).activation_checkpointing_enable({"use_reentrant": False})
    else:
        base_model(policy).activation_checkpointing_disable()
    policy.train(on)


def _optimizer(live: LiveBytes, trained: list[Tensor], settings, on_gpu: bool):
    """AdamW with its state in place; of 8-bit AdamW, which works in place, only the bytes: None."""
    if getattr(settings, "optimizer", "adamw") != "adamw":
        large = sum(p.numel() for p in trained if p.numel() >= 4096)
        small = sum(p.numel() for p in trained) - large
        live.add("optimizer", 2 * (large + 4 * large // 256 + 4 * small))
        return None
    optimizer = torch.optim.AdamW(trained, foreach=on_gpu)
    with live.at(part="optimizer"):
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@contextmanager
def _parts_named(live: LiveBytes, policy: nn.Module, on_gpu: bool) -> Iterator[None]:
    """While open, what modules and functions make is counted under their names."""

    def named(part: str, function: Callable, keep: Callable | None = None) -> Callable:
        def call(*args, **kwargs):
            with live.at(part=part):
                output = function(*args, **kwargs)
            if keep:
                live.hold("prompt cache", keep(*args))
            return output

        return call

    inner = base_model(policy).model
    modules = {name: module for name, module in inner.named_children() if not re.search(LANGUAGE_MODULE, name)}
    parts = [(module, "vision tower") for module in modules.values()]
    for name, module in inner.named_modules():
        last = name.rpartition(".")[2]
        if re.search(LANGUAGE_MODULE, name) and last in ("self_attn", "linear_attn", "mlp"):
            parts.append((module, "feed-forward" if last == "mlp" else "attention"))
    with ExitStack() as stack:
        for module, part in parts:
            stack.enter_context(mock.patch.object(module, "forward", named(part, module.forward)))
        cache = attention.SamplingCache
        stack.enter_context(mock.patch.object(vlm, "_chunk_logprobs", named("logits", vlm._chunk_logprobs)))
        choose = named("logits", rollout.choose_tokens)
        stack.enter_context(mock.patch.object(rollout, "choose_tokens", choose))
        product = named("attention product", attention.packed_attention)
        stack.enter_context(mock.patch.object(attention, "packed_attention", product))
        attend = named("attention product", cache.attend, lambda self, layer, *_: self.completions[layer])
        stack.enter_context(mock.patch.object(cache, "attend", attend))
        if on_gpu:  # fake tensors say that they are on the CPU; this is the one place where devices differ
            copies = staticmethod(attention._attention_with_copies)
            stack.enter_context(mock.patch.object(attention._PackedAttention, "apply", copies))
            stack.enter_context(mock.patch.object(attention, "causal_lower_right", _lower_right))
        with live.at(part="hidden states"):
            yield


def _lower_right(rows: int, columns: int) -> Tensor:
    """The mask that torch's causal_lower_right stands for, which a GPU's kernel never makes: small, and no subclass."""
    return torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)


def straight_line(first, second, steps: int):
    """first + steps * (second - first), for numbers and dicts of numbers; what only one has is 0 in the other."""
    if isinstance(first, dict) or isinstance(second, dict):
        names = dict.fromkeys([*(first or {}), *(second or {})])
        return {name: straight_line((first or {}).get(name), (second or {}).get(name), steps) for name in names}
    return (first or 0) + steps * ((second or 0) - (first or 0))
