"""Load a policy and its processor: number format, 4-bit weights, the probed attention function, the LoRA adapter."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from sayo.model.attention import use_probed_attention
from sayo.model.families import FAMILIES, LANGUAGE_MODULE, PolicyError, not_finite, pictures_of, unsupported
from sayo.model.forward import group_logprobs
from sayo.model.lora import add_in_place
from sayo.model.prompts import base_model, encode_prompt, set_template_arguments
from sayo.model.sampling.tokens import eos_token_ids, suppressed_token_ids
from sayo.settings import ConfigError, UserError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# PEFT's settings of adapters that only add to a frozen base: with the adapter off, the model is the base again.
ADDING = """r lora_alpha lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern
alpha_pattern use_rslora use_dora lora_bias modules_to_save trainable_token_indices target_parameters fan_in_fan_out
ensure_weight_tying eva_config corda_config lora_ga_config loftq_config runtime_config megatron_core inference_mode
peft_type task_type auto_mapping peft_version base_model_name_or_path revision""".split()
# Other initial values (PiSSA, OLoRA, LoftQ, CorDA, LoRA-GA) are taken out of the base's weights.
ADDING_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# A config that says more than this is damaged, and would take hours or all memory to build.
LARGEST = {"num_hidden_layers": 1000, "depth": 1000}
LARGEST |= dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size", "num_position_embeddings"), 2**20)
SECONDS = 30  # that the template, or the regular expressions of an adapter, may take
SMALL_EXAMPLE = {"id": "of a gray picture", "image": Image.new("RGB", (90, 50), "gray"), "question": "What is this?"}
# It warns that optional CPU kernels are missing.
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)


@contextmanager
def refusing(what: str, seconds: float | None = None):
    """PolicyError, which begins with `what`, instead of any error of a library, or after so many seconds.

    The time is measured in the main thread, and not on Windows, which has no such signal.
    """
    is_timed = seconds and hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def stop(*_) -> None:
        raise TimeoutError(f"it took more than {seconds:g} seconds")

    try:
        if is_timed:
            handler, before = signal.signal(signal.SIGALRM, stop), signal.setitimer(signal.ITIMER_REAL, seconds, 1)
        try:
            yield
        finally:
            if is_timed:
                signal.setitimer(signal.ITIMER_REAL, *before)
                signal.signal(signal.SIGALRM, handler)
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise nearly anything on a file that is odd enough
        raise PolicyError(f"{what} The library says: {type(error).__name__}: {str(error)[:300]}") from error


def load_policy(
    model: str,
    *,
    load_in_4bit: bool = False,
    lora_rank: int = 16,
    adapter: str | None = None,
    attn: str = "sdpa",
    dtype: str = "auto",
    device: str | torch.device | None = None,
    load_on: str | torch.device | None = None,
    lora_alpha: int = 32,
    lora_targets: str | None = None,
    max_pixels: int | None = None,
    revision: str | None = None,
    chat_template_kwargs: list[str] | None = None,
):
    """Load a multimodal LLM: (model, processor), the model in eval mode and without dropout in either mode.

    Args:
        model: a local folder or a Hub id, e.g. "data/tiny_policy" or "Qwen/Qwen3-VL-4B-Instruct".
        load_in_4bit: NF4 with double quantization for the language model; vision tower, embeddings and head keep
            their dtype.
        lora_rank: rank of the LoRA adapter; 0 gives the plain model.
        adapter: folder or Hub id of a PEFT adapter (see adapter_folder), trainable unless lora_rank is 0.
        attn: "sdpa" (with the attention probe) or "eager" (for comparison; has no attention rewards).
        dtype: "float32", "bfloat16", "float16" or "auto" (see choose_dtype). LoRA weights are always float32.
        device: by default the first GPU, else the CPU.
        load_on: where to put the weights instead; dtype="auto" still follows `device`. For models that are sharded
            later and do not fit on one GPU.
        lora_targets: "language" for the linear layers of the language model (the default), "all-linear" for vision as
            well; given beside `adapter`, it must be what that adapts.
        max_pixels: pictures with more pixels are shrunk to this many before they become tokens.
        revision: branch, tag or commit of a Hub model.
        chat_template_kwargs: arguments of the chat template, see set_template_arguments.

    Raises:
        PolicyError (a ValueError): no such model, an unsupported family, weights that are not those of the config, or
            an argument out of its range. ConfigError (another): the adapter has other lora_targets.
    """
    from transformers import AutoModelForImageTextToText

    if lora_rank < 0:
        raise PolicyError(f"lora_rank={lora_rank}: give 1 or more, or 0 for the plain model")
    given = ("attn", attn, ("sdpa", "eager")), ("lora_targets", lora_targets, ("language", "all-linear"))
    given = [entry for entry in given if entry[1] is not None]
    for name, value, valid in (*given, ("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))):
        if value not in valid:
            raise PolicyError(f"{name}={value!r}: valid are {', '.join(valid)}")
    adapter = adapter and adapter_folder(adapter)
    options = {"revision": revision, "max_pixels": max_pixels, "chat_template_kwargs": chat_template_kwargs}
    config, processor = load_processor(model, **options)
    if getattr(config, "quantization_config", None) is not None and not load_in_4bit:
        raise PolicyError(
            f"model={model!r} is stored in quantized form: give --load_in_4bit where these are 4-bit weights of "
            "bitsandbytes, else the checkpoint that it was made from"
        )
    ensure_plain_shards(model, config, revision)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    weights_dtype = choose_dtype(dtype, config, device)
    quantization = four_bits(weights_dtype) if load_in_4bit else None
    safely = {"use_safetensors": True, "trust_remote_code": False, "revision": revision}
    options = {"dtype": weights_dtype, "attn_implementation": attn, "quantization_config": quantization}
    options["device_map"] = {"": torch.device(load_on or device)}
    options["output_loading_info"] = True
    with refusing(
        f"model={model!r} cannot be loaded: it must hold weights, as safetensors. Pickles can run code and are not "
        "read: where you trust pytorch_model.bin, convert it by from_pretrained and save_pretrained."
    ):
        policy, found = AutoModelForImageTextToText.from_pretrained(model, **safely, **options)
    ensure_whole(f"model={model!r}", found["missing_keys"], found["unexpected_keys"])
    if attn == "sdpa":
        use_probed_attention(policy)
    if adapter is not None or lora_rank > 0:
        policy = with_adapter(policy, adapter, lora_rank, lora_alpha, lora_targets, load_in_4bit)
        for entry in policy.peft_config.values():  # written to adapter_config.json
            entry.base_model_name_or_path, entry.revision = portable_name(model), revision
    for module in policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In eval mode bitsandbytes would repack weights for newer CPUs; its backward pass is silently wrong then.
            module.support_avx512bf16_for_cpu = False
        # An adapter may bring dropout, but the policy that is updated must be the one that sampled.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif getattr(module, "attention_dropout", 0.0):
            module.attention_dropout = 0.0
    check_forward(policy.eval(), processor, model)
    return policy, processor


def ensure_plain_shards(model: str, config, revision: str | None = None) -> None:
    """Raise PolicyError where weights would come from elsewhere than from safetensors beside config.json.

    An index of shards may name any file, and a folder that holds an adapter_config.json stands for the model named in
    there.
    """
    from transformers.utils import cached_file

    quietly = {name: False for name in ("missing_entries", "gated_repo", "connection_errors")}
    quietly = {f"_raise_exceptions_for_{name}": value for name, value in quietly.items()}
    if cached_file(model, ADAPTER_FILES[0], revision=revision, **quietly):
        raise PolicyError(f"model={model!r} holds an {ADAPTER_FILES[0]}: give its base model, and this as --adapter")
    explicit = str(getattr(config, "transformers_weights", None) or "")
    for name in {"model.safetensors.index.json", explicit if explicit.endswith(".index.json") else ""} - {""}:
        path = cached_file(model, name, revision=revision, **quietly)
        with refusing(f"model={model!r}: its {name} is no index of shards."):
            shards = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values() if path else []
            odd = [shard for shard in shards if not re.fullmatch(r"[\w.-]+\.safetensors", shard)]
        if odd:
            raise PolicyError(
                f"model={model!r}: its {name} names {odd[0]!r:.200}; shards are safetensors in the model's folder. "
                "Pickles can run code and are not read"
            )


def ensure_whole(what: str, missing, surplus) -> None:
    """Raise PolicyError that names tensors which a file lacks (they would be random), or which have no place."""
    named = [("it lacks", missing), ("there is no place for", surplus)]
    named = [f"{how} {len(names)} tensors, the first is {min(names)!r:.200}" for how, names in named if names]
    if named:
        raise PolicyError(
            f"{what} holds other weights than its config says: {'; '.join(named)}. Give files that belong together"
        )


@torch.no_grad()
def check_forward(policy, processor, model: str) -> None:
    """Score one token after a small prompt: raises PolicyError where config, weights and processor do not fit."""
    with refusing(f"model={model!r} cannot be run: its config and its processor do not fit."):
        prompt = encode_prompt(processor, SMALL_EXAMPLE)
        size = base_model(policy).get_input_embeddings().weight.shape[0]
        ids = {"the prompt": prompt.input_ids.tolist(), "the end of a completion": eos_token_ids(policy, processor)}
        ids |= {"config.json": suppressed_token_ids(policy, processor).tolist()}
        for where, numbers in ids.items():
            if not 0 <= min(numbers, default=0) <= max(numbers, default=0) < size:
                raise IndexError(
                    f"the ids of {where}, {min(numbers)} to {max(numbers)}, are not those of {size} tokens"
                )
        (logps,) = group_logprobs(policy, prompt, [prompt.input_ids[-1:]])
    if not logps.isfinite().all():
        raise not_finite(policy)


def load_processor(
    model: str,
    *,
    revision: str | None = None,
    max_pixels: int | None = None,
    chat_template_kwargs: list[str] | None = None,
) -> tuple:
    """(config, processor) of a model, without its weights. Args and Raises: as load_policy."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.utils.import_utils import is_torchvision_greater_or_equal

    seconds = SECONDS if os.path.isdir(model) else None  # a download may take long
    with refusing(
        f"model={model!r} cannot be loaded: give a folder that holds config.json or the id of a model on the Hub "
        "(with a network, or already downloaded), of InternVL one whose name ends in -HF.",
        seconds,
    ):
        # Without trust_remote_code=False, transformers would ask on the terminal whether to run a checkpoint's code.
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    if config.model_type not in FAMILIES:
        raise unsupported(f"model={model!r} is of type {config.model_type!r}")
    if config.model_type == "smolvlm" and not is_torchvision_greater_or_equal("0.27"):
        # transformers would resize with Pillow, in 8 bits: too coarse to locate a token.
        raise PolicyError(
            f"model={model!r} is of type 'smolvlm', which needs torchvision 0.27 or newer: pip install -U torch "
            "torchvision, or give a model of another family"
        )
    for part in (config.get_text_config(), config.vision_config):
        for name, most in LARGEST.items():
            if not isinstance(value := getattr(part, name, 0), int | None) or (value or 0) > most:
                raise PolicyError(
                    f"model={model!r}: its config.json has {name}={value!r:.60}; up to {most} can be built"
                )
    needed = f"model={model!r} cannot be loaded: it must hold a tokenizer and a processor."
    with refusing(needed, seconds):  # SmolVLM's processor needs num2words, too
        processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
    pictures = pictures_of(processor)
    set_template_arguments(processor, chat_template_kwargs or [])
    if processor.chat_template:  # without one, a plan can still be made
        with refusing(f"model={model!r}: its processor and chat template cannot encode a prompt.", SECONDS):
            encode_prompt(processor, SMALL_EXAMPLE)
    if max_pixels is not None:
        pictures.set_max_pixels(processor, max_pixels)
    return config, processor


def four_bits(compute_dtype: torch.dtype):
    """transformers' settings: NF4 with double quantization for the language model's layers and no others."""
    from transformers import BitsAndBytesConfig

    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute_dtype}
    return BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[f"(?!.*{LANGUAGE_MODULE}).*"], **nf4)


def with_adapter(policy, adapter, lora_rank, lora_alpha, lora_targets, load_in_4bit):
    """The policy with a stored or a new LoRA adapter that adds in place. Raises PolicyError as load_policy."""
    if not load_in_4bit:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by peft, not used
    from peft import LoraConfig, get_peft_model

    layers = [name for name, module in base_model(policy).named_modules() if isinstance(module, nn.Linear)]
    language = [name for name in layers if re.search(LANGUAGE_MODULE, name)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        if adapter is not None:
            policy = _with_stored_adapter(policy, adapter, is_trainable=lora_rank > 0)
            wanted = {"language": language, "all-linear": [name for name in layers if name != "lm_head"]}
            names = {name for name, module in base_model(policy).named_modules() if hasattr(module, "lora_A")}
            if lora_targets is not None and names != set(wanted[lora_targets]):
                raise ConfigError(
                    f"lora_targets={lora_targets!r}: adapter={adapter!r:.200} adapts other layers; leave it out"
                )
            return add_in_place(policy)
        if lora_targets in (None, "language"):
            names = sorted({name.rpartition(".")[2] for name in language})
            lora_targets = rf".*{LANGUAGE_MODULE}.*\.({'|'.join(names)})"
        lora = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=lora_targets, task_type="CAUSAL_LM")
        return add_in_place(get_peft_model(policy, lora))


def _with_stored_adapter(policy, adapter: str, is_trainable: bool):
    """The policy with an adapter's weights: all those of its file, and none of the base that differ from the policy's.

    Raises PolicyError.
    """
    from peft import PeftModel

    settings, weights = adapter_settings(adapter), adapter_weights(adapter)
    widest = max((side for weight in weights.values() for side in weight.shape), default=0)
    policy.requires_grad_(False)
    what = (
        f"adapter={adapter!r:.200} cannot be put on this model: give the adapter/ folder of a run with the same model."
    )
    with refusing(what, SECONDS):
        if max(settings["r"], *(settings.get("rank_pattern") or {}).values(), 0) > widest:
            raise ValueError(f"r={settings['r']}, but no weight has so many rows")
        own, saved = dict(policy.named_parameters()), [f"{name}." for name in settings.get("modules_to_save") or []]
        for key, weight in weights.items():  # PEFT would overwrite the base's own weights with these
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            is_own = name in own and not any(part in name for part in saved)
            if is_own and (own[name].shape != weight.shape or not torch.equal(weight.to(own[name]), own[name])):
                raise ValueError(f"{key} is a weight of the base, and another than the model's")
        warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
        policy = PeftModel.from_pretrained(policy, adapter, is_trainable=is_trainable)
        surplus = policy.load_adapter(adapter, "default", is_trainable=is_trainable).unexpected_keys
    ensure_whole(f"adapter={adapter!r:.200}", [], surplus)
    return policy


def choose_dtype(dtype: str, config, device: torch.device) -> torch.dtype:
    """The dtype asked for or, by "auto", the checkpoint's own.

    A GPU without bfloat16 (T4, V100) gets float16 instead, with a message. A checkpoint without a dtype gets the GPU's
    half precision, or float32 on the CPU.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    stored = config.dtype or config.get_text_config().dtype
    if device.type != "cuda":
        return stored or torch.float32
    # By default torch also counts emulated bfloat16, which a T4 has and which is many times slower.
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if stored in (None, torch.bfloat16) and not has_bfloat16:
        print("dtype: this GPU has no bfloat16, float16 is used instead", file=sys.stderr)
        return torch.float16
    return stored or torch.bfloat16


def portable_name(model: str) -> str:
    """How an adapter names its base model: as given, or relative to the repository's root when inside it."""
    folder, root = Path(model).resolve(), Path(__file__).resolve().parents[2]
    return folder.relative_to(root).as_posix() if folder.is_dir() and folder.is_relative_to(root) else model


def adapter_off(model):
    """A context in which a model runs without its adapter, if it has one."""
    return model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()


def switched_to(model, name: str, config):
    """A context in which the model is the base (name "base") or the adapter."""
    return adapter_off(model) if config.adapter and name == "base" else nullcontext()


def adapter_folder(adapter: str) -> str:
    """The folder of an adapter: the one given, or a download of owner/name or owner/name@revision from the Hub.

    Only ADAPTER_FILES are downloaded, so that PEFT finds no pickle to fall back to. Raises PolicyError where there is
    no adapter, none in safetensors, or one that adapter_settings refuses.
    """
    folder = Path(os.path.expanduser(adapter))
    if not os.path.isdir(folder):
        from huggingface_hub import snapshot_download

        name, _, revision = adapter.partition("@")
        try:
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(ADAPTER_FILES)))
        except (OSError, ValueError) as error:  # huggingface_hub's errors derive from these
            raise PolicyError(
                f"adapter={adapter!r:.200} is no folder, nor can it be downloaded: give the adapter/ folder of a run, "
                f"or a Hub id (owner/name, or owner/name@revision). huggingface_hub says: {str(error)[:300]}"
            ) from error
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise PolicyError(
                f"adapter={adapter!r:.200} holds no {name}: give the adapter/ folder of a run. Pickles "
                "(adapter_model.bin) can run code and are not read: convert them with PEFT where you trust them"
            )
    adapter_settings(folder)
    return str(folder)


def adapter_settings(folder: str | Path) -> dict:
    """What an adapter's adapter_config.json says. Raises PolicyError unless it is LoRA that adds to a frozen base."""
    what = f"adapter={str(folder)!r:.200}: its {ADAPTER_FILES[0]}"
    try:
        settings = json.loads((Path(folder) / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
        kind, module = settings.get("peft_type"), settings.get("megatron_config")
    except (ValueError, AttributeError, RecursionError) as error:
        raise PolicyError(f"{what} is not a JSON object: {error}") from error
    if kind != "LORA" or module:  # with a megatron_config, PEFT imports any module that the file names
        raise PolicyError(
            f"{what} has peft_type {kind!r:.60} and megatron_config {module!r:.60}; only LORA without the latter "
            "is read"
        )
    for name, least in (("r", 1), ("lora_alpha", 0)):
        if not isinstance(settings.setdefault(name, 8), int | float) or not settings[name] >= least:
            raise PolicyError(f"{what} has {name}={settings[name]!r:.60}; give {least} or more")
    if (start := settings.get("init_lora_weights")) not in ADDING_STARTS:
        raise PolicyError(
            f"{what} has init_lora_weights={start!r:.60}, which takes a part out of the base's weights: with the "
            "adapter off, the model would not be the base. Convert it by PEFT's save_pretrained, with its argument "
            "path_initial_model_for_weight_conversion"
        )
    from peft import LoraConfig

    plain = {entry.name: entry.default for entry in fields(LoraConfig) if entry.name not in ADDING}
    for name in plain.keys() - {"init_lora_weights"}:
        if settings.get(name) and settings[name] != plain[name]:
            raise PolicyError(
                f"{what} has {name}={settings[name]!r:.60}: with the adapter off, the model would not be the base, or "
                "the adapter does more than add to layers. Merge it by PEFT's merge_and_unload, and give the result as "
                "--model"
            )
    return settings


def fill_in_lora(config) -> None:
    """Give a config whose lora_rank, lora_alpha and lora_targets are None those of its adapter, or else the usual ones.

    Targets of an adapter may be anything, and stay None.
    """
    usual = {"lora_rank": 16, "lora_alpha": 32, "lora_targets": None if config.adapter else "language"}
    missing = [name for name in usual if getattr(config, name) is None]
    values = usual | (_lora_of(config.adapter) if missing else {})
    for name in missing:
        setattr(config, name, values[name])


def lora_problems(config) -> list[str]:
    """A sentence for lora_rank and lora_alpha where a config and the adapter that it starts from differ."""
    return [
        f"{name}={getattr(config, name)}: adapter={config.adapter!r:.200} has {value}; leave {name} out"
        for name, value in _lora_of(config.adapter).items()
        if getattr(config, name) != value
    ]


def _lora_of(adapter: str | None) -> dict:
    """Nothing where there is no adapter, or none that load_policy will take."""
    with suppress(PolicyError):
        settings = adapter_settings(adapter_folder(adapter)) if adapter else None
        return {"lora_rank": settings["r"], "lora_alpha": settings["lora_alpha"]} if settings else {}
    return {}


def adapter_weights(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter. Raises PolicyError where one is not finite."""
    from safetensors.torch import load_file

    what = f"adapter={str(folder)!r:.200}"
    with refusing(f"{what} cannot be put on this model: its {ADAPTER_FILES[1]} is damaged."):
        weights = load_file(Path(folder) / ADAPTER_FILES[1])
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise PolicyError(f"{what} holds weights that are not finite ({name}): take an earlier checkpoint's")
    return weights
