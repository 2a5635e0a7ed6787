"""What tools.bench measures, each in its own process: one GRPO step of sayo or of TRL on one model, picture and group.

The floor is the step's multiply-adds at the speed of one large matrix product, which is timed between the steps.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from PIL import Image

from sayo.memory_plan.plan import resident
from sayo.model.loading import load_policy
from sayo.run.config import EMBEDDED_POLICY
from sayo.settings import ConfigError

RANK = 16  # of LoRA
STAGES = ("rollout", "reference", "score", "update")  # of train_step
PROMPT_TEXT = 15  # text tokens of the prompt; there is no system turn, as TRL adds none


CHILD = "import json, sys; from {} import {} as call; print('\\n' + json.dumps(call(*json.load(sys.stdin))))"


def in_child(module: str, function: str, *arguments, **environment: str):
    """Call a function in a child process; arguments and result travel as JSON.

    Raises:
        ConfigError: the child failed; quotes the end of its stderr.
    """
    known = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"} | environment
    options = {"capture_output": True, "text": True, "env": known, "input": json.dumps(arguments)}
    done = subprocess.run([sys.executable, "-c", CHILD.format(module, function)], **options)
    if done.returncode:
        raise ConfigError(f"{function} of {module} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def build_model(config, folder: Path) -> dict[str, int]:
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
    """A random picture of this many tokens of 32 x 32 pixels."""
    rows = max(divisor for divisor in range(1, math.isqrt(image_tokens) + 1) if image_tokens % divisor == 0)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (32 * rows, 32 * image_tokens // rows, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def example(config) -> dict:
    """The example that all variants are measured on."""
    image = picture(config.image_tokens)
    boxes = [[image.width // 4, image.height // 4, image.width // 2, image.height // 2]]
    return {"id": "bench", "image": image, "question": "What is it?", "answer": "red", "boxes": boxes}


def fixed_lengths(config) -> dict:
    """Sampling arguments of a group whose completions all have max_new_tokens tokens."""
    sizes = dict.fromkeys(("max_new_tokens", "min_new_tokens"), config.max_new_tokens)
    return sizes | {"num_generations": config.num_generations, "system_prompt": ""}


def measure_variant(fields: dict, folder: str, variant: str) -> dict:
    """What a child process of tools.bench measures, with the fields of its BenchConfig."""
    config = SimpleNamespace(**fields)
    torch.set_num_threads(config.threads)
    others = {"trl": measure_trl, "probe": measure_probe, "sampling": measure_sampling}
    return others[variant](config, folder) if variant in others else measure_sayo(config, folder, variant)


def measure_sayo(config, folder: str, layout: str) -> dict:
    """Seconds of each stage of train_step, one dict per step, and the speed of the machine after it."""
    from accelerate import Accelerator

    from sayo.model import forward, sampling
    from train_rl import Config, TrainState, train_step

    model, processor = load_policy(folder, lora_rank=RANK, dtype="float32")
    settings = Config(groups_per_step=1, top_p=1.0, learning_rate=1e-6, **fixed_lengths(config))
    state, accelerator = TrainState(model, settings), Accelerator(cpu=True)
    steps = []
    with ExitStack() as patches:
        for module in (sampling, forward):
            patches.enter_context(mock.patch.object(module, "model_layout", lambda *_: layout))
        baseline = resident("VmHWM") / 1e6
        for step in range(config.repeats + 1):
            begin = time.perf_counter()
            metrics, _ = train_step(model, processor, state, [example(config)], step, settings, accelerator)
            seconds = {"step": time.perf_counter() - begin, "matrix_speed": matrix_speed()}
            assert metrics["completion_length"] == config.max_new_tokens
            steps.append(seconds | {name: metrics[f"time/{name}_seconds"] for name in STAGES})
    return {"steps": steps, "baseline_megabytes": baseline, "peak_megabytes": resident("VmHWM") / 1e6}


def measure_trl(config, folder: str) -> dict:
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

    row, lengths = example(config), []
    rows = [{"prompt": [{"role": "user", "content": row["question"]}], "image": row["image"]}] * (config.repeats + 1)

    def constant(completion_ids, **_):
        lengths.extend(len(ids) for ids in completion_ids)
        return [float(number % 2) for number in range(len(completion_ids))]

    group = dict.fromkeys(("per_device_train_batch_size", "num_generations"), config.num_generations)
    sizes = group | {"max_completion_length": config.max_new_tokens, "max_steps": config.repeats + 1}
    # No completion ends early; and a sampled image placeholder would stop the trainer with an error.
    sampling = {"temperature": 1.0, "generation_kwargs": {"suppress_tokens": processor.tokenizer.all_special_ids}}
    training = {"beta": 1e-3, "learning_rate": 1e-6, "use_cpu": True, "disable_tqdm": True}
    training |= dict.fromkeys(("bf16", "gradient_checkpointing", "shuffle_dataset"), False)
    training |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    arguments = GRPOConfig(output_dir=str(Path(folder) / "trl"), **sizes, **sampling, **training)
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    baseline = resident("VmHWM") / 1e6
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
    return {"steps": steps, "baseline_megabytes": baseline, "peak_megabytes": resident("VmHWM") / 1e6}


def measure_sampling(config, folder: str) -> dict:
    """Sampled tokens per second with 1 to 32 groups side by side."""
    from rollout import sample_groups

    model, processor = load_policy(folder, lora_rank=RANK, dtype="float32")
    tokens, points, lines = config.num_generations * config.max_new_tokens, [], []
    for count in (1, 2, 4, 8, 16, 32):
        seconds = []
        for _ in range(config.repeats):
            begin = time.perf_counter()
            batch = [example(config)] * count
            sample_groups(model, processor, batch, sampling_tokens=10**9, **fixed_lengths(config))
            seconds.append(time.perf_counter() - begin)
        packed = count * (config.image_tokens + PROMPT_TEXT + tokens)
        rate = count * tokens / statistics.median(seconds)
        points.append({"groups": count, "packed_tokens": packed, "tokens_per_second": rate})
        lines.append(f"{count:3} groups, {packed:6} packed tokens: {rate:8.1f} sampled tokens / s")
    return {"points": points, "text": "\n".join(lines)}


def measure_probe(config, folder: str) -> dict:
    """Median seconds of the scoring forward with and without the attention probe, measured in turn."""
    from sayo.model.attention import AttentionProbe
    from sayo.model.forward import token_statistics
    from sayo.model.prompts import encode_prompt

    model, processor = load_policy(folder, lora_rank=RANK, dtype="float32")
    prompt = encode_prompt(processor, example(config), system_prompt="")
    completions = [torch.arange(config.max_new_tokens) % 256 + 3] * config.num_generations

    def nothing(probe, layer, *_):
        probe.results[layer] = torch.zeros(len(probe.rows), 2)

    seconds = {True: [], False: []}
    for _ in range(config.repeats + 1):
        for probed, timed in seconds.items():
            patch = nullcontext() if probed else mock.patch.object(AttentionProbe, "read_packed", nothing)
            with patch, torch.no_grad():
                begin = time.perf_counter()
                token_statistics(model, prompt, completions)
                timed.append(time.perf_counter() - begin)
    with_probe, without = (statistics.median(timed[1:]) for timed in seconds.values())
    share = with_probe / without - 1
    text = f"scoring forward: {with_probe:.3f} s with the probe, {without:.3f} s without: {share:+.1%}"
    return {"with_probe": with_probe, "without": without, "share": share, "text": text}


def matrix_speed() -> float:
    """Multiply-adds per second of one large float32 matrix product, the best of several."""
    matrix, best = torch.ones(1536, 1536), math.inf
    for _ in range(6):
        begin = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - begin)
    return 1536**3 / best


def multiply_adds(config, parameters: dict[str, int], prompt_tokens: int) -> dict[str, float]:
    """Multiply-adds that each stage of a packed step needs.

    A forward runs over P + G C tokens: prompt tokens attend to the prompt, completion tokens to the prompt and to their
    own past. Rollout: vision tower and sampling. Reference: a forward without the adapter. Score: a forward. Update:
    its backward, with gradients of activations and of the adapter's weights. Separate scoring: the second forward of a
    step whose rewards and loss do not share one.
    """
    length, sampled, width = config.max_new_tokens, config.num_generations * config.max_new_tokens, config.hidden_size
    tokens = prompt_tokens + sampled
    pairs = prompt_tokens**2 / 2 + sampled * prompt_tokens + sampled * length / 2
    attention = 2 * pairs * width * config.num_layers
    head = sampled * parameters["head"]
    forward = tokens * parameters["text"] + attention + head
    backward = tokens * parameters["text"] + 2 * attention + 2 * head  # the head's rows are computed again
    adapter = tokens * parameters["lora"]
    patches = 4 * config.image_tokens
    vision = patches * parameters["vision"] + 4 * 192 * patches**2
    sampling = forward - attention + sampled * prompt_tokens * 2 * width * config.num_layers
    stages = {"rollout": vision + sampling + adapter, "reference": forward, "score": forward + adapter}
    return stages | {"update": backward + 2 * adapter, "separate scoring": forward + adapter}
