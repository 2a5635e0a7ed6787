"""What several processes add to training: averaged gradients, equal weights, and a sharded model.

Every rank has a copy of the policy and some of the groups of a step. A model that does not fit on one card is started
with `accelerate launch --config_file configs/accelerate_fsdp.yaml`: then each rank holds a shard of the decoder layers'
frozen weights (torch's fully_shard, FSDP2), all-gathered layer by layer in every forward and backward pass. LoRA
weights, embeddings, head and vision tower stay whole in every rank, so that gradients, optimizer, checkpoints and
adapter are the same as without shards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs, broadcast_object_list, reduce
from torch import Tensor, nn

from sayo.model.forward import autocast, check_layers, set_checkpointing
from sayo.model.loading import load_policy
from sayo.model.prompts import base_model, model_device
from sayo.settings import ConfigError

# How long a rank waits for the others before it gives up. NCCL's own ten minutes are less than one rank may need for
# a longer share of an evaluation; a rank that dies ends the run at once, through the launcher.
TIMEOUT = InitProcessGroupKwargs(timeout=timedelta(minutes=30))


# What `accelerate launch`, or a profile that sets it up, may leave in the environment.
LAUNCH_VARIABLES = re.compile(
    r"(ACCELERATE|FSDP|PARALLELISM_CONFIG|MEGATRON_LM|DEEPSPEED)_\w+|(LOCAL_)?(RANK|WORLD_SIZE)"
)
OTHER_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG")


def use_fsdp() -> bool:
    """Whether `accelerate launch` was asked to shard the model."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" and int(os.environ.get("WORLD_SIZE", 1)) > 1


@contextmanager
def launched():
    """ConfigError, where Accelerate's objects are made, instead of its own errors about the environment."""
    try:
        if engines := [name for name in OTHER_ENGINES if os.environ.get(name, "false").lower() in ("true", "1")]:
            raise ValueError(f"{engines[0]} is set; models are sharded by FSDP only")
        yield
    except Exception as error:  # of Accelerate's many settings, each raises another
        left = ", ".join(f"{name}={value}" for name, value in os.environ.items() if LAUNCH_VARIABLES.fullmatch(name))
        raise ConfigError(
            f"the processes cannot be set up with what the environment says ({left[:500] or 'nothing'}): start with "
            f"accelerate launch, or unset what an earlier launch left. Accelerate says: {str(error)[:300]}"
        ) from error


def make_accelerator(config) -> Accelerator:
    """Accelerate's own object for a run: its tracker, and how long ranks wait for each other.

    Mixed precision stays off: autocast and the run's own loss scaling work on every device, where Accelerate's float16
    refuses a CPU.

    Raises:
        ConfigError: the processes that were started cannot run with these settings.
    """
    with launched():
        started = int(os.environ.get("WORLD_SIZE", 1))
        accelerator = Accelerator(
            cpu=started > 1 and not torch.accelerator.is_available(),  # or every process would train alone
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=config.output_dir,
            mixed_precision="no",
            kwargs_handlers=[TIMEOUT],
        )
    number, found = accelerator.num_processes, []
    if number != started:
        known = f"of which Accelerate knows {number} on this device"
        found.append(f"{started} processes were started, {known}: give --num_processes 1")
    if config.groups_per_step % number:
        found.append(f"groups_per_step={config.groups_per_step} is not a multiple of the number of processes, {number}")
    if use_fsdp():
        if config.load_in_4bit:
            found.append("load_in_4bit: 4-bit weights cannot be sharded (FSDP); leave one of the two out")
        if os.environ.get("FSDP_VERSION") != "2":
            found.append(f"fsdp_version={os.environ.get('FSDP_VERSION')}: give 2, as configs/accelerate_fsdp.yaml does")
        if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
            found.append("fsdp_cpu_ram_efficient_loading=true: give false; every process reads the checkpoint itself")
    if found:
        raise ConfigError("\n".join(found))
    return accelerator


def load_for_training(config, accelerator, checkpoint) -> tuple:
    """(model, processor) of a run on this rank's device, sharded where asked, with a checkpoint's adapter if given.

    Raises:
        PolicyError: as load_policy, or attention_layers names a layer that the model does not have.
    """
    arguments = config.policy_arguments(config.lora_rank)
    if checkpoint:
        arguments["adapter"] = str(checkpoint / "adapter")
    arguments |= {"lora_alpha": config.lora_alpha, "lora_targets": config.lora_targets}
    arguments |= {"device": accelerator.device, "load_on": "cpu" if use_fsdp() else None}
    model, processor = load_policy(**arguments)
    if use_fsdp():
        shard_model(model, accelerator)
    check_layers(model, config.attention_layers)
    set_checkpointing(model, config.gradient_checkpointing)
    return model, processor


# --- equal in all processes ---------------------------------------------------------------------------------------


def read_by_main(read: Callable[[], Any], is_main: bool) -> Any:
    """What the main process reads from its disk, in every process: another machine's disk may hold something else.

    What decides how often ranks meet (is there an evaluation already?) must be equal in all of them, or they deadlock.

    Raises:
        ConfigError: that of `read`, in every process.
    """
    found, problem = None, None
    if is_main:
        try:
            found = read()
        except ConfigError as error:
            problem = str(error)
    found, problem = broadcast_object_list([found, problem])
    if problem is not None:
        raise ConfigError(problem)
    return found


def average_gradients(parameters: Sequence[Tensor], accelerator) -> None:
    """Average the ranks' gradients in one message; a value that is not finite in one rank is not in any."""
    if accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    mean = accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
    for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def check_same_weights(model: nn.Module, accelerator, when: str) -> None:
    """Compare the trained weights of all ranks by the sum of their bits: one number for each, one message.

    Raises:
        ConfigError: names the ranks whose weights differ from those of rank 0, and the first such weight.
    """
    if accelerator.num_processes == 1:
        return
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    sums = torch.stack([weight.detach().view(torch.int32).sum(dtype=torch.int64) for weight in trained.values()])
    differs = accelerator.gather(sums[None]).cpu()  # (processes, weights)
    differs = differs != differs[0]
    if differs.any():
        others = differs.any(1).nonzero().flatten().tolist()
        raise ConfigError(
            f"{when} the processes {others} have other weights than process 0, first in "
            f"{list(trained)[int(differs.any(0).nonzero()[0])]}: every machine needs the same versions, the same model "
            "and, with --resume, the same output_dir; the last checkpoint is untouched"
        )


# --- a sharded model ----------------------------------------------------------------------------------------------


class ForwardSync:
    """Forward passes of a sharded decoder, equally many in every rank.

    Each all-gathers weights. A rank that finishes sampling early runs dummy one-token forwards until every rank is
    done; otherwise the all-gathers would deadlock.
    """

    def __init__(self, decoder: nn.Module, device: torch.device):
        self.decoder, self.device, self.is_waiting = decoder, device, False
        decoder.register_forward_pre_hook(self._announce)

    def _announce(self, *_) -> None:
        if not self.is_waiting:
            self._count(1.0)

    def _count(self, here: float) -> float:
        return reduce(torch.tensor(here, device=self.device), "sum").item()

    @torch.no_grad()
    def wait(self, model: nn.Module) -> None:
        """Returns when no rank has a forward left."""
        embedding = base_model(model).get_input_embeddings().weight
        dummy = torch.zeros(1, 1, embedding.shape[1], dtype=embedding.dtype, device=self.device)
        self.is_waiting = True
        with autocast(model):
            while self._count(0.0):
                self.decoder(inputs_embeds=dummy, use_cache=False)
        self.is_waiting = False


def shard_model(model: nn.Module, accelerator) -> None:
    """Leave this rank its shard of every decoder layer's frozen weights, and move the rest to its device.

    Two settings of Accelerate's plugin count: fsdp_reshard_after_forward and fsdp_offload_params.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow to import
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    plugin, decoder = FullyShardedDataParallelPlugin(), base_model(model).model.get_decoder()
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    options = {"reshard_after_forward": plugin.reshard_after_forward, "offload_policy": plugin.cpu_offload}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained, **options)
    whole = [tensor for tensor in chain(model.parameters(), model.buffers()) if not isinstance(tensor, DTensor)]
    fully_shard(decoder, mesh=mesh, ignored_params=set(whole))  # shards nothing more, but lets layers prefetch
    for tensor in whole:
        tensor.data = tensor.data.to(accelerator.device)
    decoder.forward_sync = ForwardSync(decoder, model_device(model))


def is_sharded(model: nn.Module) -> bool:
    return hasattr(base_model(model).model.get_decoder(), "forward_sync")


def sync_forwards(model: nn.Module) -> None:
    """After a stage whose number of forwards differs between ranks; nothing where each has a copy of the model."""
    if is_sharded(model):
        base_model(model).model.get_decoder().forward_sync.wait(model)
