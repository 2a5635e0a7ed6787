"""Counts the live bytes of one training step by running this project's own functions on tensors without data.

Sampling, reference and update run on the policy of fake_policy.py, backward pass included, and every storage counts
from its allocation until it is freed. No formula for a layer's activations can go stale: what autograd keeps is what
is counted. Layers are alike, so a model is traced at two small depths, and the rest is a straight line. The workspace
of a kernel stays invisible, except for 4-bit weights that are unpacked.
"""

import math
import re
import weakref
from collections import Counter
from collections.abc import Iterator
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

from sayo.extensions.ease import ease_layer
from sayo.memory_plan.fake_policy import weights_by_part
from sayo.model import attention, forward, prompts
from sayo.model.families import LANGUAGE_MODULE
from sayo.model.prompts import Prompt, base_model
from sayo.model.sampling.cache import SamplingCache
from sayo.model.sampling.samplers import DECODES, Decoding, TreeSampler, make_sampler
from sayo.model.sampling.tokens import choose_tokens

_aten = torch.ops.aten
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is made while it is open, by part, and keeps the peaks.

    peaks[stage, part]: bytes by part when the sum was highest while `part` was at work in `stage`.
    multiply_adds[stage]: of all matrix products, attention included.
    """

    def __init__(self):
        super().__init__()
        self.stage, self.part, self.total = "start", "other", 0
        self.live, self.multiply_adds, self._highest = Counter(), Counter(), Counter()
        self.peaks: dict[tuple[str, str], dict[str, int]] = {}
        self._storages: dict[int, tuple[weakref.ref, list]] = {}

    def hold(self, part: str, tensors) -> None:
        """Count these tensors, seen before or not, as belonging to a part."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self._count(tensor, part)
                _, owner = self._storages[tensor.untyped_storage()._cdata]
                self._change(owner[0], -owner[1])
                owner[0] = part
                self._change(*owner)

    def add(self, part: str, num_bytes: int) -> None:
        """Count bytes that no tensor here stands for."""
        self._change(part, num_bytes)
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

    def _change(self, part: str, num_bytes: int) -> None:
        self.live[part] += num_bytes
        self.total += num_bytes

    def _count(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            owner = [part, storage.nbytes()]
            self._change(*owner)
            self._storages[key] = weakref.ref(storage, partial(self._free, key)), owner

    def _free(self, key: int, _) -> None:
        part, num_bytes = self._storages.pop(key)[1]
        self._change(part, -num_bytes)

    def _look(self, workspace: int = 0) -> None:
        """Keep a new peak; `workspace` is what the operation allocated and freed itself."""
        key = self.stage, self.part
        if self.total + workspace > self._highest[key]:
            self._highest[key] = self.total + workspace
            self.peaks[key] = dict(self.live) | ({"4-bit weights, unpacked": workspace} if workspace else {})

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # whether activations are finite
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
    """Boolean masks as row numbers: how many are True is unknown of a fake tensor."""
    numbers = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        numbers += list(index.nonzero(as_tuple=True)) if is_mask else [index]
    return numbers


def multiply_adds(operation, args, kwargs, output) -> int:
    """Multiply-adds of one operation; 0 where no matrices are multiplied."""
    name = operation.name()
    if "gemm_4bit" in name:
        return args[0].numel() * args[2][0]
    if "flash_attention_for_cpu" in name:  # not in torch's registry
        backward = "backward" in name
        (query, key), place = (args[1:3], 8) if backward else (args[:2], 4)
        causal = len(args) > place and args[place]
        count = query.numel() * key.shape[2] * (5 if backward else 2)
        return count // 2 if causal and query.shape[2] == key.shape[2] else count
    formula = flop_registry.get(operation._overloadpacket)
    return formula(*args, **kwargs, out_val=output) // 2 if formula else 0


@dataclass
class Work:
    """What a process does in one step, all with the largest prompt; evaluated is 0 where there is no evaluation."""

    prompt: Prompt
    groups: int
    side_by_side: int  # groups that share a cache while they are sampled
    evaluated: int = 0  # prompts of an evaluation, with one completion each
    evaluated_side_by_side: int = 0


def _sample(live: LiveBytes, policy, work: Work, count: int, in_all: int, num_generations: int, settings) -> Prompt:
    """rollout.sample_completions for `count` of `in_all` prompts: first token, and last, where the cache is longest.

    Returns the first prompt, with its picture's features; those of all others are counted.
    """
    first, length = replace(work.prompt), settings.max_new_tokens

    def choose(logits: Tensor, uniforms: Tensor) -> Tensor:
        with live.at(part="logits"):
            return choose_tokens(logits, uniforms, temperature=settings.temperature, top_p=settings.top_p)

    # The features of the other prompts, which are alike, are only counted.
    with forward.evaluating(policy), torch.no_grad(), mock.patch.object(prompts, "vision_is_frozen", lambda _: True):
        prompts.image_features(policy, [first])
        live.hold("vision features", list(vars(first.image_features[1]).values()))
        live.add("vision features", live.live["vision features"] * (in_all - 1))
        DECODES[base_model(policy)] = True  # the comparison at the first token is small, and not of every run
        sampler = make_sampler(policy, [replace(first) for _ in range(count)], num_generations, length)
        if isinstance(sampler, TreeSampler):
            live.hold("prompt cache", [*sampler.cache.prompts.values(), *sampler.cache.completions.values()])
        uniforms, ids = torch.rand(length, len(sampler.hidden)), torch.tensor([0])
        head = base_model(policy).get_output_embeddings()
        decoding = Decoding(sampler, head, choose, uniforms, ends=ids, never=ids)
        decoding.draw(sampler.hidden)
        live.stage = f"{live.stage}, one token"
        decoding.step(length)
    return first


def trace_step(policy: nn.Module, work: Work, settings, on_gpu: bool) -> LiveBytes:
    """What train_rl.train_step does in one process under these settings (a train_rl.Config), with its peaks.

    The update is traced twice: "update" as the settings say, "other update" with gradient_checkpointing the other way.
    """
    live, layers = LiveBytes(), base_model(policy).config.get_text_config().num_hidden_layers
    options = {"temperature": settings.temperature, "query": settings.attention_query}
    options["layers"] = list(range(-min(layers, len(settings.attention_layers)), 0))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with _parts_named(live, policy, on_gpu), live:
        for part, tensors in weights_by_part(policy).items():
            live.hold(part, tensors)
        if not on_gpu:  # a CPU maps the file behind 4-bit layers for as long as other weights lie in it
            states = [getattr(parameter, "quant_state", None) for parameter in policy.parameters()]
            sizes = [state.shape.numel() * state.dtype.itemsize for state in states if state]
            live.add("checkpoint file, mapped", sum(sizes))
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
        if settings.beta:
            with live.at("reference"), torch.no_grad(), forward.evaluating(policy), policy.disable_adapter():
                forward.group_logprobs(policy, prompt, completions, temperature=settings.temperature)
        for name, flipped in (("other update", True), ("update", False)):
            for parameter in trained:  # from the second group on, those of earlier ones are there
                parameter.grad = torch.zeros_like(parameter) if work.groups > 1 else None
            live.hold("gradients", [parameter.grad for parameter in trained])
            forward.set_checkpointing(policy, settings.gradient_checkpointing != flipped)
            with live.at(name):
                map_layer = ease_layer(policy) if settings.ease_weight else None
                statistics = forward.token_statistics(policy, prompt, completions, map_layer=map_layer, **options)
                loss = torch.cat(statistics.logps).sum()
                if map_layer is not None:
                    loss = loss + statistics.maps.sum()
                del statistics
                with live.at(part="backward"):
                    loss.backward()
                del loss
        forward.set_checkpointing(policy, False)
        live.hold("gradients", [parameter.grad for parameter in trained])
        if optimizer:
            with live.at("optimizer step", "optimizer"):
                optimizer.step()
    return live


def _optimizer(live: LiveBytes, trained: list[Tensor], settings, on_gpu: bool):
    """AdamW with its state in place. 8-bit AdamW works in place: its bytes are counted, and None is returned."""
    if settings.optimizer != "adamw":
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

    def named(part: str, owner, name: str):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            with live.at(part=part):
                return function(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    inner = base_model(policy).model
    others = [module for name, module in inner.named_children() if not re.search(LANGUAGE_MODULE, name)]
    patches = [
        *(named("vision tower", module, "forward") for module in others),
        named("logits", forward, "_chunk_logprobs"),
        named("attention product", attention, "packed_attention"),
        named("attention product", SamplingCache, "attend"),
    ]
    parts = {"self_attn": "attention", "linear_attn": "attention", "mlp": "feed-forward"}
    for name, module in inner.named_modules():
        part = parts.get(name.rpartition(".")[2])
        if part and re.search(LANGUAGE_MODULE, name):
            patches.append(named(part, module, "forward"))
    if on_gpu:  # fake tensors say that they are on the CPU, whose kernel needs as much memory as CUDA's flash kernel
        kernel = attention.CpuFlash
        if forward.compute_dtype(policy) != torch.bfloat16:  # float16 is for cards before sm80
            kernel = attention.RepeatedHeads(kernel)
        patches.append(mock.patch.object(attention, "kernel_for", lambda *_: kernel))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        with live.at(part="hidden states"):
            yield


def straight_line(first, second, steps: int):
    """first + steps * (second - first), for numbers and dicts of numbers; what only one has is 0 in the other."""
    if isinstance(first, dict) or isinstance(second, dict):
        first, second = first or {}, second or {}
        return {name: straight_line(first.get(name), second.get(name), steps) for name in first | second}
    return (first or 0) + steps * ((second or 0) - (first or 0))
