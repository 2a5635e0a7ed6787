"""How fast and how lean one GRPO step is: this project, its padded layout, and TRL's GRPOTrainer on the same work.

    python bench.py                              # one comparison, a table and bench.json
    python bench.py --sweep --variants packed trl --output docs/bench.json      # how the cost grows, and a plot
    python bench.py --sampling --image_tokens 64 --num_generations 8 --max_new_tokens 32    # groups side by side

Every variant runs in a process of its own: the same random Qwen3-VL-class model (about 15 M parameters), the same
picture, group size and completion length (no completion ends early), the same LoRA on the language model, a KL term,
one thread. This project's step includes the attention reward; TRL's reward is a constant. The floor is the step's own
multiply-adds at the speed that this machine reaches in one large matrix product.
"""

import gc
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import torch
from PIL import Image
from tqdm import tqdm

from config import EMBEDDED_POLICY, ConfigError, at_least, option, run_command

VARIANTS = ("packed", "padded", "trl")
RANK = 16  # of LoRA
PROMPT_TEXT = 22  # tokens of the prompt beside those of the picture
SWEEPS = {
    "image_tokens": (64, 128, 256, 512, 1024, 2048),
    "num_generations": (2, 4, 8, 16, 32),
    "max_new_tokens": (16, 32, 64, 110, 256),
}


@dataclass
class BenchConfig:
    """Measure one GRPO step of this project beside others."""

    variants: list[str] = option(list(VARIANTS), "What to measure: packed, padded (both this project) and trl.")
    image_tokens: int = option(1024, "Image tokens of the prompt.")
    num_generations: int = option(16, "Completions of the group.")
    max_new_tokens: int = option(110, "Tokens of each completion.")
    hidden_size: int = option(384, "Width of the language model.")
    num_layers: int = option(8, "Layers of the language model.")
    vocab_size: int = option(480, "Rows of the head; the embedded tokenizer uses the first 480.")
    repeats: int = option(3, "Steps that are timed, after one that is not; the median counts.")
    threads: int = option(1, "Threads of each process.")
    sweep: bool = option(False, "Vary image tokens, group size and completion length one at a time instead.")
    sampling: bool = option(False, "Sample 1 to 32 groups side by side instead: sampled tokens per second.")
    output: str = option("bench.json", "JSON to write; a sweep writes a .png beside it.")
    worker: str | None = option(None, "Internal: measure this variant in this process, on the model in this folder.")

    def problems(self) -> list[str]:
        found = at_least(self, 1, "image_tokens", "max_new_tokens", "num_layers", "repeats", "threads")
        found += at_least(self, 2, "num_generations") + at_least(self, 480, "vocab_size")
        if wrong := [name for name in self.variants if name not in VARIANTS]:
            found.append(f"variants={' '.join(wrong)}: valid are {' '.join(VARIANTS)}")
        if self.hidden_size < 64 or self.hidden_size % 64:
            found.append(f"hidden_size={self.hidden_size}: give a multiple of 64")
        return found


# --- the work ----------------------------------------------------------------------------------------------------


def build_model(config: BenchConfig, folder: Path) -> dict[str, int]:
    """Save a random model and its processor; return its parameters by part."""
    from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(EMBEDDED_POLICY)
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 4096}
    heads = config.hidden_size // 64
    text = {"hidden_size": config.hidden_size, "intermediate_size": 3 * config.hidden_size, "head_dim": 64}
    text |= {"num_hidden_layers": config.num_layers, "num_attention_heads": heads, "vocab_size": config.vocab_size}
    text |= {"num_key_value_heads": math.gcd(heads, 2), "max_position_embeddings": 32768}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]}}
    vision = {"depth": 4, "hidden_size": 192, "intermediate_size": 768, "num_heads": 3, "patch_size": 16}
    vision |= {"out_hidden_size": config.hidden_size, "deepstack_visual_indexes": [1], "num_position_embeddings": 48**2}
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    torch.manual_seed(0)
    made = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    model = Qwen3VLForConditionalGeneration(made)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    layers = model.model.language_model.layers
    parts = {"text": layers, "vision": model.model.visual, "head": model.lm_head}
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    linears = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    return counts | {"lora": sum(RANK * (linear.in_features + linear.out_features) for linear in linears)}


def picture(image_tokens: int) -> Image.Image:
    """A random picture that becomes so many tokens of 32 x 32 pixels."""
    rows = max(divisor for divisor in range(1, math.isqrt(image_tokens) + 1) if image_tokens % divisor == 0)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (32 * rows, 32 * image_tokens // rows, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def example(config: BenchConfig) -> dict:
    image = picture(config.image_tokens)
    boxes = [[image.width // 4, image.height // 4, image.width // 2, image.height // 2]]
    return {"id": "bench", "image": image, "question": "What is it?", "answer": "red", "boxes": boxes}


def measure_sayo(config: BenchConfig, folder: str, layout: str) -> dict:
    """Seconds of each stage of train_step, one dict per step."""
    from accelerate import Accelerator

    import rollout
    import vlm
    from train_rl import Config, train_step

    model, processor = vlm.load_policy(folder, lora_rank=RANK, dtype="float32")
    settings = Config(
        groups_per_step=1, num_generations=config.num_generations, max_new_tokens=config.max_new_tokens, top_p=1.0
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, accelerator = torch.optim.AdamW(trained, lr=1e-6), Accelerator(cpu=True)
    steps = []
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(rollout, "eos_token_ids", lambda *_: set()))  # nothing ends early
        for module in (rollout, vlm):
            patches.enter_context(mock.patch.object(module, "model_layout", lambda *_: layout))
        baseline = _peak_megabytes()
        for step in range(config.repeats + 1):
            begin = time.perf_counter()
            metrics, _ = train_step(model, processor, optimizer, [example(config)], step, settings, accelerator)
            seconds = {"step": time.perf_counter() - begin}
            assert metrics["completion_length"] == config.max_new_tokens
            suffix = "_seconds"
            stages = {name: value for name, value in metrics.items() if name.startswith("time/") and suffix in name}
            steps.append(seconds | {name[5 : -len(suffix)]: value for name, value in stages.items()})
    return {"steps": steps, "baseline_megabytes": baseline, "peak_megabytes": _peak_megabytes()}


def measure_trl(config: BenchConfig, folder: str) -> dict:
    """The same step with TRL's trainer and a constant reward."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    steps, begin = [], [0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begin[0] = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps.append({"step": time.perf_counter() - begin[0]})

    row = example(config)
    rows = [{"prompt": [{"role": "user", "content": row["question"]}], "image": row["image"]}] * (config.repeats + 1)
    lengths = []

    def constant(completion_ids, **_):
        lengths.extend(len(ids) for ids in completion_ids)
        return [float(number % 2) for number in range(len(completion_ids))]

    arguments = GRPOConfig(
        output_dir=str(Path(folder) / "trl"),
        per_device_train_batch_size=config.num_generations,
        num_generations=config.num_generations,
        max_completion_length=config.max_new_tokens,
        # No early end; and a sampled image placeholder would stop the trainer with an error.
        generation_kwargs={"suppress_tokens": processor.tokenizer.all_special_ids},
        max_steps=config.repeats + 1,
        temperature=1.0,
        beta=1e-3,
        learning_rate=1e-6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        logging_strategy="no",
    )
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    baseline = _peak_megabytes()
    GRPOTrainer(
        model=model,
        reward_funcs=constant,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()),
        processing_class=processor,
        peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    ).train()
    assert set(lengths) == {config.max_new_tokens}
    return {"steps": steps, "baseline_megabytes": baseline, "peak_megabytes": _peak_megabytes()}


def measure_sampling(config: BenchConfig, folder: str) -> list[dict]:
    """Sampled tokens per second with ever more groups side by side."""
    import rollout
    from vlm import load_policy

    model, processor = load_policy(folder, lora_rank=RANK, dtype="float32")
    points = []
    with mock.patch.object(rollout, "eos_token_ids", lambda *_: set()):
        for count in (1, 2, 4, 8, 16, 32):
            seconds = []
            for _ in range(config.repeats):
                begin = time.perf_counter()
                rollout.sample_groups(
                    model,
                    processor,
                    [example(config)] * count,
                    num_generations=config.num_generations,
                    max_new_tokens=config.max_new_tokens,
                    sampling_tokens=10**9,
                )
                seconds.append(time.perf_counter() - begin)
            tokens = config.num_generations * config.max_new_tokens
            packed = count * (config.image_tokens + PROMPT_TEXT + tokens)
            rate = count * tokens / statistics.median(seconds)
            points.append({"groups": count, "packed_tokens": packed, "tokens_per_second": rate})
            print(f"{count:3} groups, {packed:6} packed tokens: {rate:8.1f} sampled tokens / s", flush=True)
    return points


def _peak_megabytes() -> float:
    gc.collect()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the floor ---------------------------------------------------------------------------------------------------


def matrix_speed(threads: int) -> float:
    """Multiply-adds per second of one large float32 matrix product, the best of several."""
    torch.set_num_threads(threads)
    matrix, best = torch.randn(1536, 1536), math.inf
    for _ in range(8):
        begin = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - begin)
    return 1536**3 / best


def multiply_adds(config: BenchConfig, parameters: dict[str, int], prompt_tokens: int) -> dict[str, float]:
    """What the stages of a packed step cannot do without, in multiply-adds.

    A forward over P + G C tokens; its backward, which makes the gradients of activations and, for the adapter alone,
    of weights; the reference's forward, without the adapter. In attention, prompt tokens see the prompt, completion
    tokens the prompt and their own past.
    """
    group, length = config.num_generations, config.max_new_tokens
    tokens = prompt_tokens + group * length
    pairs = prompt_tokens**2 / 2 + group * length * prompt_tokens + group * length**2 / 2
    heads_width = config.hidden_size
    attention = 2 * pairs * heads_width * config.num_layers
    head = group * length * parameters["head"]
    forward = tokens * parameters["text"] + attention + head
    backward = tokens * parameters["text"] + 2 * attention + 2 * head  # the head's rows are computed again
    adapter = tokens * parameters["lora"]
    patches = 4 * config.image_tokens
    vision = patches * parameters["vision"] + 4 * 192 * patches**2
    sampling = forward - attention + group * length * prompt_tokens * 2 * heads_width * config.num_layers
    return {"vision": vision, "sampling": sampling, "reference + update": 2 * forward + backward + 3 * adapter}


# --- command line ------------------------------------------------------------------------------------------------


def measure(config: BenchConfig, variant: str, folder: Path) -> dict:
    """Run one variant in a process of its own; medians over its steps."""
    fields = asdict(replace(config, worker=str(folder), variants=[variant], sweep=False))
    flags = []
    for name, value in fields.items():
        if value is not None and name != "output":
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise ConfigError(f"variant {variant} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    timed = found["steps"][1:]
    seconds = {name: statistics.median(step[name] for step in timed) for name in timed[0]}
    sampled = config.num_generations * config.max_new_tokens
    return {"seconds": seconds, "tokens_per_second": sampled / seconds["step"]} | {
        name: found[name] for name in ("baseline_megabytes", "peak_megabytes")
    }


def compare(config: BenchConfig, folder: Path, parameters: dict, speed: float) -> dict:
    """All variants at one setting, and the floor."""
    results = {variant: measure(config, variant, folder) for variant in config.variants}
    prompt_tokens = config.image_tokens + PROMPT_TEXT
    floor = {name: count / speed for name, count in multiply_adds(config, parameters, prompt_tokens).items()}
    setting = {name: getattr(config, name) for name in SWEEPS}
    return {"setting": setting, "floor_seconds": floor, "results": results}


def table(compared: dict) -> str:
    """The comparison as text."""
    setting = ", ".join(f"{name}={value}" for name, value in compared["setting"].items())
    results = compared["results"]
    lines = [setting, f"{'':10}{'s / step':>10}{'tokens / s':>12}{'peak MB':>9}{'above start':>12}   by stage"]
    for variant, found in results.items():
        stages = {name: value for name, value in found["seconds"].items() if name != "step"}
        above = found["peak_megabytes"] - found["baseline_megabytes"]
        lines.append(
            f"{variant:10}{found['seconds']['step']:10.2f}{found['tokens_per_second']:12.1f}"
            f"{found['peak_megabytes']:9.0f}{above:12.0f}   "
            + ", ".join(f"{name} {value:.2f}" for name, value in stages.items())
        )
    floor = compared["floor_seconds"]
    lines.append(
        f"{'floor':10}{sum(floor.values()):10.2f}{'':33}   " + ", ".join(f"{k} {v:.2f}" for k, v in floor.items())
    )
    if {"packed", "trl"} <= results.keys():
        time_ratio = results["trl"]["seconds"]["step"] / results["packed"]["seconds"]["step"]
        memory_ratio = results["trl"]["peak_megabytes"] / results["packed"]["peak_megabytes"]
        lines.append(f"trl / packed: {time_ratio:.1f} x the time, {memory_ratio:.1f} x the peak memory")
    return "\n".join(lines)


def plot(points: list[dict], output: Path) -> None:
    """Seconds and peak memory against each of the three sizes, and the floor."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(4.2 * len(SWEEPS), 6.4), layout="constrained", squeeze=False)
    for column, name in enumerate(SWEEPS):
        chosen = sorted((p for p in points if p["sweep"] == name), key=lambda p: p["setting"][name])
        sizes = [point["setting"][name] for point in chosen]
        for variant in chosen[0]["results"]:
            found = [point["results"][variant] for point in chosen]
            axes[0, column].plot(sizes, [one["seconds"]["step"] for one in found], marker="o", label=variant)
            axes[1, column].plot(sizes, [one["peak_megabytes"] for one in found], marker="o", label=variant)
        floors = [sum(point["floor_seconds"].values()) for point in chosen]
        axes[0, column].plot(sizes, floors, "k--", label="multiply-adds")
        axes[0, column].set(ylabel="seconds / step", xscale="log", yscale="log")
        axes[1, column].set(xlabel=name.replace("_", " "), ylabel="peak MB", xscale="log", ylim=(0, None))
        axes[0, column].legend()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main(config: BenchConfig) -> None:
    torch.set_num_threads(config.threads)
    if config.worker:
        run = {"trl": measure_trl}.get(config.variants[0])
        found = run(config, config.worker) if run else measure_sayo(config, config.worker, config.variants[0])
        print("\n" + json.dumps(found))
        return
    settings = [(None, config)]
    if config.sweep:
        settings = [(name, replace(config, **{name: size})) for name, sizes in SWEEPS.items() for size in sizes]
    points, speed = [], matrix_speed(config.threads)
    with tempfile.TemporaryDirectory() as folder:
        parameters = build_model(config, Path(folder))
        total = sum(parameters[name] for name in ("text", "vision", "head"))
        print(f"{total / 1e6:.1f} M parameters, {speed / 1e9:.0f} G multiply-adds a second")
        if config.sampling:
            curve = measure_sampling(config, folder)
            Path(config.output).write_text(json.dumps({"config": asdict(config), "sampling": curve}, indent=1))
            return
        for name, setting in tqdm(settings, desc="bench", disable=len(settings) == 1):
            compared = compare(setting, Path(folder), parameters, speed) | {"sweep": name}
            points.append(compared)
            print(table(compared), flush=True)
            Path(config.output).write_text(json.dumps({"config": asdict(config), "points": points}, indent=1))
    if config.sweep:
        plot(points, Path(config.output).with_suffix(".png"))
        print(f"-> {Path(config.output).with_suffix('.png')}")
    print(f"-> {config.output}")


if __name__ == "__main__":
    run_command(BenchConfig, main)
