"""The work that bench.py measures: one model, one picture, one group, a step of this project's or of TRL's on it.

Each function runs in a process of its own and gives plain numbers. The floor is the step's multiply-adds at the speed
of one large matrix product, which is taken between the steps: a machine is not equally fast all the time.
"""

import math
import re
import resource
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

from config import EMBEDDED_POLICY

RANK = 16  # of LoRA
PROMPT_TEXT = 15  # tokens of the prompt beside those of the picture, without a system turn, which TRL does not add


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
    """A random picture that becomes so many tokens of 32 x 32 pixels."""
    rows = max(divisor for divisor in range(1, math.isqrt(image_tokens) + 1) if image_tokens % divisor == 0)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (32 * rows, 32 * image_tokens // rows, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def example(config) -> dict:
    image = picture(config.image_tokens)
    boxes = [[image.width // 4, image.height // 4, image.width // 2, image.height // 2]]
    return {"id": "bench", "image": image, "question": "What is it?", "answer": "red", "boxes": boxes}


def measure_sayo(config, folder: str, layout: str) -> dict:
    """Seconds of each stage of train_step, one dict per step, with the machine's speed after it."""
    from accelerate import Accelerator

    import rollout
    import vlm
    from train_rl import Config, train_step

    model, processor = vlm.load_policy(folder, lora_rank=RANK, dtype="float32")
    sizes = {"num_generations": config.num_generations, "max_new_tokens": config.max_new_tokens}
    settings = Config(groups_per_step=1, top_p=1.0, system_prompt="", **sizes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, accelerator = torch.optim.AdamW(trained, lr=1e-6), Accelerator(cpu=True)
    steps = []
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(rollout, "eos_token_ids", lambda *_: set()))  # nothing ends early
        for module in (rollout, vlm):
            patches.enter_context(mock.patch.object(module, "model_layout", lambda *_: layout))
        baseline = resident("VmHWM") / 1e6
        for step in range(config.repeats + 1):
            begin = time.perf_counter()
            metrics, _ = train_step(model, processor, optimizer, [example(config)], step, settings, accelerator)
            seconds = {"step": time.perf_counter() - begin, "matrix_speed": matrix_speed()}
            assert metrics["completion_length"] == config.max_new_tokens
            suffix = "_seconds"
            stages = {name: value for name, value in metrics.items() if name.startswith("time/") and suffix in name}
            steps.append(seconds | {name[5 : -len(suffix)]: value for name, value in stages.items()})
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
                    system_prompt="",
                )
                seconds.append(time.perf_counter() - begin)
            tokens = config.num_generations * config.max_new_tokens
            packed = count * (config.image_tokens + PROMPT_TEXT + tokens)
            rate = count * tokens / statistics.median(seconds)
            points.append({"groups": count, "packed_tokens": packed, "tokens_per_second": rate})
    lines = [
        f"{point['groups']:3} groups, {point['packed_tokens']:6} packed tokens: "
        f"{point['tokens_per_second']:8.1f} sampled tokens / s"
        for point in points
    ]
    return {"points": points, "text": "\n".join(lines)}


def measure_probe(config, folder: str) -> dict:
    """Seconds of the scoring forward with and without the attention probe, by turns; medians."""
    import vlm
    from attention import AttentionProbe
    from prompts import encode_prompt

    model, processor = vlm.load_policy(folder, lora_rank=RANK, dtype="float32")
    prompt = encode_prompt(processor, example(config), system_prompt="")
    ids = torch.arange(config.max_new_tokens) % 256 + 3
    completions = [ids] * config.num_generations

    def nothing(probe, layer, *_):
        probe.results[layer] = torch.zeros(len(probe.rows), 2)

    seconds = {True: [], False: []}
    for _ in range(config.repeats + 1):
        for probed, timed in seconds.items():
            with ExitStack() as patches, torch.no_grad():
                if not probed:
                    patches.enter_context(mock.patch.object(AttentionProbe, "read_packed", nothing))
                begin = time.perf_counter()
                vlm.token_statistics(model, prompt, completions)
                timed.append(time.perf_counter() - begin)
    with_probe, without = (statistics.median(timed[1:]) for timed in seconds.values())
    share = with_probe / without - 1
    text = f"scoring forward: {with_probe:.3f} s with the probe, {without:.3f} s without: {share:+.1%}"
    return {"with_probe": with_probe, "without": without, "share": share, "text": text}


def resident(name: str) -> int:
    """Bytes of this process in memory: "VmRSS" now, "VmHWM" at most so far (for both where there is no Linux' /proc).

    getrusage would not do: what it says of a new process begins with the peak of the one that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status.read_text(encoding="utf-8")).group(1))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- the floor ---------------------------------------------------------------------------------------------------


def matrix_speed() -> float:
    """Multiply-adds per second of one large float32 matrix product, the best of several."""
    matrix, best = torch.ones(1536, 1536), math.inf
    for _ in range(6):
        begin = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - begin)
    return 1536**3 / best


def multiply_adds(config, parameters: dict[str, int], prompt_tokens: int) -> dict[str, float]:
    """What the stages of a packed step cannot do without, in multiply-adds.

    Scoring: a forward over P + G C tokens, which this project needs not do, as the update's serves. Reference: a
    forward without the adapter. Update: a forward and its backward, which makes the gradients of activations and, for
    the adapter alone, of weights. In attention, prompt tokens see the prompt, completion tokens the prompt and their
    own past.
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
    stages = {"vision": vision, "sampling": sampling + adapter, "scoring": forward + adapter, "reference": forward}
    return stages | {"update": forward + backward + 3 * adapter}
