"""Merge an adapter into its base model: one plain model folder that needs neither PEFT nor this repository.

    python -m tools.merge --adapter runs/sayo/adapter --output merged/sayo
    python -m tools.merge --model Qwen/Qwen3-VL-8B-Instruct --adapter runs/qwen8b/adapter --output merged/qwen8b

The sum W + BA is written in the checkpoint's own precision, even if the adapter was trained on 4-bit weights. Rounding
the sum to 4 bits would lose most of the LoRA update, which is far smaller than the steps between 16 values. To use the
merged model in 4 bits, quantize it when you load it.
"""

import gc
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from sayo.model.forward import compute_dtype, group_logprobs
from sayo.model.loading import (
    SMALL_EXAMPLE,
    adapter_folder,
    adapter_settings,
    adapter_weights,
    load_policy,
    load_processor,
    portable_name,
    refusing,
)
from sayo.model.prompts import base_model, encode_prompt
from sayo.run.config import DTYPES, PolicyConfig
from sayo.settings import ConfigError, Settings, option, run_command

REASON = "merging happens into full-precision weights, because rounding the sum again changes what the model says"

# How far log-probs of merged model and adapter may differ on average, in float32 and in half precision.
TOLERANCE, HALF_TOLERANCE = 0.01, 0.3
SENTENCE = "In the middle of this picture there is a large red circle, and below it a small blue square."


@dataclass
class MergeConfig(Settings):
    """Merge an adapter into the full-precision weights of its base model."""

    adapter: str = option("runs/sayo/adapter", "Folder or Hub id of the adapter.")
    model: str | None = option(None, "Base model, a folder or Hub id; by default the one that the adapter names.")
    revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    output: str = option("merged", "Folder to write; it must not exist yet.")
    dtype: str = option("auto", "Number format of the merged weights; auto takes the checkpoint's own.", DTYPES)
    load_in_4bit: bool = option(False, "Refused: rounding the sum to 4 bits changes what the model says.")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.load_in_4bit:
            found.append(f"load_in_4bit: leave it out; {REASON}. Quantize the merged folder when you load it")
        if Path(self.output).exists():
            found.append(f"output={self.output!r} exists: give another name, nothing is overwritten")
        return found


def merge(config: MergeConfig) -> Path:
    """Write the merged model and its processor to config.output, and return that path.

    Raises:
        ConfigError: a quantized base, or a merged model that says something else than base and adapter.
        PolicyError: the base or the adapter cannot be loaded, or they do not fit.
    """
    folder = adapter_folder(config.adapter)
    named = adapter_settings(folder)
    adapter_weights(folder)  # before the base, which takes long
    model, revision = config.model or named.get("base_model_name_or_path"), config.revision
    if not isinstance(model, str):
        raise ConfigError(f"adapter={config.adapter!r} names no base model: give it with --model")
    if config.model is None:
        revision = revision or named.get("revision")
    elif portable_name(config.model) != named.get("base_model_name_or_path"):
        made_for = named.get("base_model_name_or_path")
        print(f"model={config.model!r}: the adapter was made for {made_for!r}", file=sys.stderr)
    arguments = PolicyConfig(model=model, revision=revision, adapter=folder, dtype=config.dtype).policy_arguments(0)
    if getattr(load_processor(arguments["model"], revision=revision)[0], "quantization_config", None) is not None:
        fix = "give the checkpoint that it was made from"
        raise ConfigError(f"model={model!r} is stored in quantized form; {REASON}: {fix}")
    policy, processor = load_policy(**arguments, attn="eager", device="cpu")
    expected, largest = said(policy, processor), TOLERANCE if compute_dtype(policy) == torch.float32 else HALF_TOLERANCE
    final = Path(config.output)
    aside = final.with_name(f"{final.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    with torch.no_grad(), refusing(f"adapter={config.adapter!r} cannot be merged into model={model!r}."):
        merge_weights(policy).save_pretrained(aside)
    processor.save_pretrained(aside)
    del policy
    gc.collect()  # before there is a second one
    merged, _ = load_policy(str(aside), lora_rank=0, attn="eager", device="cpu")
    difference = float((said(merged, processor) - expected).abs().mean())
    if not difference < largest:
        shutil.rmtree(aside)
        raise ConfigError(
            f"adapter={config.adapter!r}: the merged model says something else than base and adapter, log-probs differ "
            f"by {difference:.2g}: it is not kept"
        )
    return aside.rename(final)


@torch.no_grad()
def said(policy, processor) -> torch.Tensor:
    """(n,) log-probs of a sentence after a small prompt."""
    sentence = processor.tokenizer(SENTENCE, add_special_tokens=False, return_tensors="pt").input_ids[0]
    return group_logprobs(policy, encode_prompt(processor, SMALL_EXAMPLE), [sentence])[0]


def merge_weights(policy) -> torch.nn.Module:
    """The base with the adapter's part in its weights.

    Where the adapter changes the embeddings or the head, and both are one tensor, the head gets a tensor of its own:
    merged into the shared one, an update would change both.
    """
    inner = base_model(policy)
    ends = inner.get_input_embeddings(), inner.get_output_embeddings()
    bases = [end.get_base_layer() if hasattr(end, "get_base_layer") else end for end in ends]
    if bases != list(ends) and bases[0].weight is bases[1].weight:
        bases[1].weight = torch.nn.Parameter(bases[1].weight.clone(), requires_grad=False)
    merged = policy.merge_and_unload()
    if merged.get_input_embeddings().weight is not merged.get_output_embeddings().weight:
        for part in (merged.config, merged.config.get_text_config()):
            part.tie_word_embeddings = False
    return merged


def main(config: MergeConfig) -> None:
    print(f"merged model and processor -> {merge(config)}")


if __name__ == "__main__":
    run_command(MergeConfig, main)
