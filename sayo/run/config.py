"""The settings that several scripts share: which policy, which data, and how completions are sampled."""

import os
from dataclasses import dataclass
from pathlib import Path

from sayo.examples.regions import BOX_FORMATS
from sayo.examples.rows import parse_fields
from sayo.model.prompts import SYSTEM_PROMPT
from sayo.settings import Settings, option

DTYPES = ("auto", "float32", "bfloat16", "float16")
EMBEDDED_POLICY = str(Path(__file__).parents[2] / "data" / "tiny_policy")
LOWEST_TEMPERATURE = 1e-6  # below it, logits divided by it could leave float32
EXAMPLES_AT_A_TIME = 16  # of an evaluation: the pixels of so many pictures are in memory together


@dataclass
class PolicyConfig(Settings):
    """Which policy, on which data: the fields that every script has."""

    model: str = option("data/tiny_policy", "Policy: a local folder or a Hub id such as Qwen/Qwen3-VL-4B-Instruct.")
    revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    adapter: str | None = option(None, "Folder or Hub id (or owner/name@revision) of a LoRA adapter to start from.")
    load_in_4bit: bool = option(False, "Load the language model in 4 bits (NF4, bitsandbytes).")
    dtype: str = option("auto", "Number format of the weights; auto takes the checkpoint's own.", DTYPES)
    max_pixels: int | None = option(None, "Shrink pictures to about this area, not counting a thumbnail.", at_least=1)
    chat_template_kwargs: list[str] | None = option(
        None, "Arguments of the model's chat template, as name=value: enable_thinking=false."
    )
    system_prompt: str = option(SYSTEM_PROMPT, "System prompt; an empty one omits the system turn.")
    data: str = option(
        "scenes",
        "A .jsonl, .json, .csv, .parquet, datasets folder, Hub id (owner/name@revision), scenes, scenes:heldout.",
    )
    split: str = option("train", "Split of a datasets folder or a Hub dataset.")
    limit: int | None = option(None, "Use only the first N examples.", at_least=1)
    bad_rows: str = option("error", "What to do with invalid examples.", ("error", "skip"))
    box_format: str = option("xyxy", "How boxes are written; polygons are in the same unit.", BOX_FORMATS)
    allowed_folders: list[str] | None = option(None, "More folders to read pictures and masks from; / allows all.")
    fields: list[str] | None = option(None, "Columns of other names, as name=column: question=query answer=label.text.")
    sampling_tokens: int | None = option(
        None, "Token budget of groups sampled together; none: 8192 on a CPU, what fits on a card.", at_least=1
    )
    seed: int = option(0, "Random seed.", at_least=0, at_most=2**32 - 1)

    def policy_arguments(self, lora_rank: int) -> dict:
        """Keyword arguments for vlm.load_policy."""
        model = EMBEDDED_POLICY if Path(self.model) == Path("data/tiny_policy") else self.model
        names = ("revision", "adapter", "load_in_4bit", "dtype", "max_pixels", "chat_template_kwargs")
        return {"model": model, "lora_rank": lora_rank} | {name: getattr(self, name) for name in names}

    def data_arguments(self) -> dict:
        """Keyword arguments for sayo.examples.load.load_examples."""
        names = ("split", "limit", "bad_rows", "box_format", "fields", "allowed_folders")
        return {name: getattr(self, name) for name in names}

    def problems(self) -> list[str]:
        missing = [name for name in self.allowed_folders or () if not os.path.isdir(os.path.expanduser(name))]
        found = super().problems() + [f"allowed_folders={name!r:.200}: there is no such folder" for name in missing]
        return found + [f"fields: {problem}" for problem in parse_fields(self.fields or [])[1]]


@dataclass
class SamplingConfig(Settings):
    """How completions are sampled."""

    num_generations: int = option(8, "Completions per prompt (the group size G).", at_least=1)
    max_new_tokens: int = option(64, "Maximum completion length in tokens.", at_least=1)
    min_new_tokens: int = option(0, "Minimum completion length: EOS is not sampled before it.", at_least=0)
    temperature: float = option(
        1.0,
        "Temperature of sampling, entropies and log-probs.",
        at_least=1e-6,
        hint="1.0 samples from the policy itself",
    )
    sampling_temperature: float | None = option(None, "Temperature of sampling alone; none: temperature.", above=0)
    top_p: float = option(0.9, "Nucleus sampling: the fewest tokens of this probability; 1: all.", above=0, at_most=1)
    top_k: int | None = option(None, "Sample from the k most probable tokens; none: all.", at_least=1)
    min_p: float = option(0.0, "Leave out tokens below this share of the largest probability.", at_least=0, at_most=1)
    repetition_penalty: float = option(1.0, "Above 1, tokens that the text holds become less likely.", above=0)

    def sampling_arguments(self) -> dict:
        """Keyword arguments for rollout.sample_groups."""
        names = ("num_generations", "max_new_tokens", "min_new_tokens", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: getattr(self, name) for name in (*names, "system_prompt", "sampling_tokens")}
        return found | {"temperature": self.sampling_temperature or self.temperature}

    def problems(self) -> list[str]:
        found = super().problems()
        if self.min_new_tokens > self.max_new_tokens:
            found.append(f"min_new_tokens={self.min_new_tokens}: give at most max_new_tokens={self.max_new_tokens}")
        return found
