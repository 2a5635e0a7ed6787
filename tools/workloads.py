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
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sayo.memory_plan.plan import resident
from sayo.model.loading import load_policy
from sayo.model.prompts import base_model
from sayo.run.config import EMBEDDED_POLICY
from sayo.settings import ConfigError
from sayo.show.tables import markdown

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
    options = {"capture_output": True, "text": True, "errors": "replace", "env": known, "input": json.dumps(arguments)}
    done = subprocess.run([sys.executable, "-c", CHILD.format(module, function)], **options)
    if done.returncode:
        raise ConfigError(f"{function} of {module} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# Language models as (width, layers, feed-forward width, heads, key heads, head width, vocabulary), and their vision
# towers as (layers, width, feed-forward width, heads, layers whose features are added); those in billions are Qwen3-VL.
TEXT = {"2B": (2048, 28, 6144, 16, 8, 128, 151936), "4B": (2560, 36, 9728, 32, 8, 128, 151936)}
TEXT |= {"8B": (4096, 36, 12288, 32, 8, 128, 151936)}
VISION = {"2B": (24, 1024, 4096, 16, [5, 11, 17]), "4B": (24, 1024, 4096, 16, [5, 11, 17])}
VISION |= {"8B": (27, 1152, 4304, 16, [8, 16, 24])}


def model_config(config, tokenizer):
    """The Qwen3-VL config of a BenchConfig's shape, or of its sizes."""
    from transformers import Qwen3VLConfig

    heads, shape = config.hidden_size // 64, getattr(config, "shape", "wide")
    small = (config.hidden_size, config.num_layers, 3 * config.hidden_size, heads, math.gcd(heads, 2), 64)
    names = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    sizes = TEXT.get(shape, (*small, config.vocab_size))
    text = dict(zip((*names, "head_dim", "vocab_size"), sizes, strict=True)) | {"max_position_embeddings": 32768}
    section = [text["head_dim"] * 3 // 16, *[text["head_dim"] * 5 // 32] * 2]
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}}
    names = ("depth", "hidden_size", "intermediate_size", "num_heads", "deepstack_visual_indexes")
    vision = dict(zip(names, VISION.get(shape, (4, 192, 768, 3, [1])), strict=True))
    vision |= {"patch_size": 16, "out_hidden_size": text["hidden_size"], "num_position_embeddings": 48**2}
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape in ("2B", "4B"), **ids)


def build_model(config, folder: Path) -> dict[str, int]:
    """Save a random model and its processor; return its parameters by part."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    processor, device = AutoProcessor.from_pretrained(EMBEDDED_POLICY), getattr(config, "device", "cpu")
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 4096}
    made, dtype = model_config(config, processor.tokenizer), torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration._from_config(made, dtype=dtype)
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
    others = {"trl": measure_trl, "trl with vLLM": partial(measure_trl, with_vllm=True)}
    others |= {"probe": measure_probe, "sampling": measure_sampling, "launches": measure_launches}
    return others[variant](config, folder) if variant in others else measure_sayo(config, folder, variant)


def measure_sayo(config, folder: str, layout: str) -> dict:
    """Seconds of each stage of train_step and of the parts of the rollout, one dict per step; peaks; a decoding step.

    `matrix_speed` is that of the machine after each step, `reads` the seconds that a decoding step's matrix products
    (on a card, its memory reads) take alone.
    """
    from accelerate import Accelerator

    import rollout
    from sayo.model import forward
    from sayo.model.sampling import samplers
    from train_rl import Config, TrainState, train_step

    on_card = config.device == "cuda"
    options = {"load_in_4bit": config.load_in_4bit, "dtype": "auto" if on_card else "float32", "device": config.device}
    model, processor = load_policy(folder, lora_rank=RANK, **options)
    settings = Config(groups_per_step=1, top_p=1.0, learning_rate=1e-6, **fixed_lengths(config))
    state, accelerator = TrainState(model, settings), Accelerator(cpu=not on_card)
    steps, parts = [], Counter()

    def timed(name: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            begin = time.perf_counter()
            output = function(*args, **kwargs)
            wait(config.device)
            parts[name] += time.perf_counter() - begin
            return output

        return call

    with ExitStack() as patches:
        for module in (samplers, forward):
            patches.enter_context(mock.patch.object(module, "model_layout", lambda *_: layout))
        tower = type(base_model(model).model), "get_image_features"
        for name, (owner, function) in {"vision": tower, "prefill": (rollout, "make_sampler")}.items():
            patches.enter_context(mock.patch.object(owner, function, timed(name, getattr(owner, function))))
        baseline = peak_memory(config.device)
        for step in range(config.repeats + 1):
            parts.clear()
            begin = time.perf_counter()
            metrics, _ = train_step(model, processor, state, [example(config)], step, settings, accelerator)
            seconds = {"step": time.perf_counter() - begin, "matrix_speed": matrix_speed(config.device)}
            assert metrics["completion_length"] == config.max_new_tokens
            seconds |= {name: metrics[f"time/{name}_seconds"] for name in STAGES}
            parts["prefill"] -= parts["vision"]
            parts["decoding"] = seconds["rollout"] - parts["vision"] - parts["prefill"]
            steps.append(seconds | {f"rollout: {name}": value for name, value in parts.items()})
    found = {"steps": steps, "baseline_megabytes": baseline, "peak_megabytes": peak_memory(config.device)}
    return found | {"least_step": least_step(model, config)}


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> float:
    """Megabytes of the process so far; on a card, of its tensors."""
    return (torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM")) / 1e6


def least_step(model, config) -> float:
    """Seconds of one decoding step's matrix products alone; on a card, of reading what they read at copying speed."""
    layers = base_model(model).model.get_decoder().layers.modules()
    linears = [
        one for one in layers if isinstance(one, torch.nn.Linear) and min(one.in_features, one.out_features) > RANK
    ]
    linears.append(base_model(model).get_output_embeddings())
    if config.device == "cuda":
        text = base_model(model).config.get_text_config()
        cached = config.image_tokens + PROMPT_TEXT + config.num_generations * config.max_new_tokens / 2
        cached *= 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        read, block = sum(linear.weight.nbytes for linear in linears) + cached, torch.ones(2**30, device="cuda")
        return read / (2 * block.nbytes) * best(block.clone)
    rows = [torch.ones(config.num_generations, linear.in_features) for linear in linears]
    with torch.no_grad():
        return best(lambda: [linear(x) for x, linear in zip(rows, linears, strict=True)])


def best(call: Callable) -> float:
    """Seconds of the quickest of several calls."""
    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        kept = call()
        wait("cuda" if torch.cuda.is_available() else "cpu")
        seconds.append(time.perf_counter() - begin)
        del kept
    return min(seconds)


def measure_trl(config, folder: str, with_vllm: bool = False) -> dict:
    """The same step with TRL's trainer and a constant reward; with_vllm: sampled by vLLM in the same process."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    processor = AutoProcessor.from_pretrained(folder)
    on_card, loading = config.device == "cuda", {}
    if config.load_in_4bit:
        four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        loading["quantization_config"] = BitsAndBytesConfig(**four_bit, bnb_4bit_compute_dtype=torch.bfloat16)
    dtype = torch.bfloat16 if on_card else torch.float32
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **loading)
    model.generation_config.eos_token_id = None
    steps, begin = [], [0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            begin[0] = time.perf_counter()

        def on_step_end(self, *_, **__):
            wait(config.device)
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
    training = {"beta": 1e-3, "learning_rate": 1e-6, "use_cpu": not on_card, "bf16": on_card, "disable_tqdm": True}
    training |= dict.fromkeys(("gradient_checkpointing", "shuffle_dataset"), False)
    training |= {"use_vllm": True, "vllm_mode": "colocate"} if with_vllm else {}
    training |= {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    arguments = GRPOConfig(output_dir=str(Path(folder) / "trl"), **sizes, **sampling, **training)
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    baseline = peak_memory(config.device)
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
    return {"steps": steps, "baseline_megabytes": baseline, "peak_megabytes": peak_memory(config.device)}


def measure_launches(config, folder: str) -> dict:
    """Launches of one decoding step by who samples, for 64 rows (`python -m tools.bench --launches`)."""
    from rollout import sample_groups
    from sayo.model.prompts import encode_prompt
    from sayo.model.sampling import samplers

    model, processor = load_policy(folder, lora_rank=RANK, dtype="float32")
    prompt = encode_prompt(processor, example(config), system_prompt="")

    def ours(groups: int, rows: int, length: int) -> None:
        options = fixed_lengths(SimpleNamespace(num_generations=rows, max_new_tokens=length))
        sample_groups(model, processor, [example(config)] * groups, sampling_tokens=10**9, **options)

    counts = {"sayo, 1 group of 64": step_launches(partial(ours, 1, 64))}
    counts["sayo, 8 groups of 8"] = step_launches(partial(ours, 8, 8))
    with mock.patch.object(samplers, "model_layout", lambda *_: "padded"):
        counts["sayo's padded layout, 1 group of 64"] = step_launches(partial(ours, 1, 64))
    counts["transformers' generate, 64 rows"] = step_launches(partial(generate, model, prompt, 64))
    least = counts["transformers' generate, 64 rows"].total()
    rows = [[name, f"{count.total():.0f}", f"{count.total() / least:.2f}"] for name, count in counts.items()]
    return {"launches": counts, "text": markdown(["who samples", "launches", "of generate's"], rows)}


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


class Launches(TorchDispatchMode):
    """Counts the operations that a card would launch a kernel for: all but views, allocations and reads by the host."""

    NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "alias"}
    NOTHING |= {"_local_scalar_dense", "detach", "lift_fresh", "_reshape_alias"}

    def __init__(self):
        super().__init__()
        self.counts = Counter()  # by name of the operation

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in operation._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and operation._schema.name.removeprefix("aten::") not in self.NOTHING:
            self.counts[operation._schema.name] += 1
        return operation(*args, **(kwargs or {}))


def step_launches(sample: Callable[[int], object]) -> Counter:
    """Launches of one decoding step by operation; `sample` samples so many tokens."""
    counts = []
    sample(2)  # the first token of a model is computed twice
    for length in (4, 8):
        with Launches() as launches:
            sample(length)
        counts.append(launches.counts)
    counts[1].subtract(counts[0])
    return Counter({name: count / 4 for name, count in counts[1].items() if count})


def generate(model, prompt, rows: int, length: int) -> Tensor:
    """transformers' own sampling of `rows` completions of `length` tokens: ids (rows, P + length)."""
    ids = prompt.input_ids.expand(rows, -1)
    inputs = {name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in prompt.model_inputs.items()}
    options = dict.fromkeys(("max_new_tokens", "min_new_tokens"), length) | {"do_sample": True, "top_k": 0}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **options)


def matrix_speed(device: str = "cpu") -> float:
    """Multiply-adds per second of one large matrix product, the best of several; float32, on a card bfloat16."""
    size = 8192 if device == "cuda" else 1536
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    return size**3 / best(lambda: matrix @ matrix)


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
