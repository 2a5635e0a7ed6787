"""Merge an adapter into its base model: one plain model folder that needs neither PEFT nor this repository.

    python -m tools.merge --adapter runs/sayo/adapter --output merged/sayo
    python -m tools.merge --model Qwen/Qwen3-VL-8B-Instruct --adapter runs/qwen8b/adapter --output merged/qwen8b

The sum W + BA is written in the checkpoint's own precision, even if the adapter was trained on 4-bit weights. Rounding
the sum to 4 bits would lose most of the LoRA update, which is far smaller than the steps between 16 values. To use the
merged model in 4 bits, quantize it when you load it.
"""

import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from sayo.model.loading import load_policy, load_processor, portable_name
from sayo.run.config import DTYPES, PolicyConfig
from sayo.settings import ConfigError, Settings, option, run_command

REASON = "merging happens into full-precision weights, because rounding the sum again changes what the model says"


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
        ConfigError: a missing adapter, one whose weights are not finite, or a quantized base.
        PolicyError: the base cannot be loaded, or the adapter does not fit it.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # imported by peft, not used here
    from peft import PeftConfig

    try:
        named = PeftConfig.from_pretrained(config.adapter)
    except (OSError, ValueError) as error:
        fix = "give the adapter/ folder of a run, or a Hub id"
        raise ConfigError(f"adapter={config.adapter!r}: {fix}; {str(error)[:200]}") from error
    model, revision = config.model or named.base_model_name_or_path, config.revision
    if model is None:
        raise ConfigError(f"adapter={config.adapter!r} names no base model: give it with --model")
    if config.model is None:
        revision = revision or named.revision
    elif portable_name(config.model) != named.base_model_name_or_path:
        print(f"model={config.model!r}: the adapter was made for {named.base_model_name_or_path!r}", file=sys.stderr)
    named = PolicyConfig(model=model, revision=revision, adapter=config.adapter, dtype=config.dtype)
    arguments = named.policy_arguments(lora_rank=0)
    if getattr(load_processor(arguments["model"], revision=revision)[0], "quantization_config", None) is not None:
        fix = "give the checkpoint that it was made from"
        raise ConfigError(f"model={model!r} is stored in quantized form; {REASON}: {fix}")
    policy, processor = load_policy(**arguments, attn="eager", device="cpu")
    if not all(weight.isfinite().all() for name, weight in policy.named_parameters() if "lora_" in name):
        raise ConfigError(f"adapter={config.adapter!r} holds weights that are not finite: take an earlier checkpoint's")
    final = Path(config.output)
    aside = final.with_name(f"{final.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    with torch.no_grad():
        policy.merge_and_unload().save_pretrained(aside)
    processor.save_pretrained(aside)
    return aside.rename(final)


def main(config: MergeConfig) -> None:
    print(f"merged model and processor -> {merge(config)}")


if __name__ == "__main__":
    run_command(MergeConfig, main)
