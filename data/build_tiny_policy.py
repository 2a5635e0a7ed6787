"""Build data/tiny_policy: a real Qwen3-VL model and processor of 1.7 M parameters that half understands the scenes.

    OMP_NUM_THREADS=1 python -m data.build_tiny_policy --out data/tiny_policy

Three stages, each from the pictures of sayo/examples/scenes alone:

1. A byte-level BPE tokenizer on the questions and the reasoning of the train split, with Qwen's special tokens.
2. The vision tower learns to classify what each visual token holds. Without this stage, supervised text training
   learns nothing: too little of its loss depends on the picture.
3. Supervised fine-tuning of the language model, stopped while many answers are still wrong, because reinforcement
   learning needs both right and wrong ones. At first all completions look before they answer, later half of them are
   hasty ("Let me think about the question. I would say red."). So the policy knows both ways and prefers haste, as
   real ones do, and an attention reward has something to change.

The pictures have another scenes seed than those that train_rl.py trains on. It takes about 17 minutes on 2 cores. The
same seed gives the same weights on one machine with OMP_NUM_THREADS=1; another processor or library version changes
their last bits.
"""

import argparse
import json
import re
import shutil
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from reward import is_correct
from sayo.examples.scenes.scenes import COLORS, LETTERS, SHAPES, Scenes
from sayo.model.prompts import SYSTEM_PROMPT, prompt_text
from sayo.settings import protect_output

SPECIAL_NAMES = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end"
SPECIAL_NAMES += " vision_start vision_end vision_pad image_pad video_pad"
SPECIAL_TOKENS = [f"<|{name}|>" for name in SPECIAL_NAMES.split()]
# Qwen3-VL's template without its tools: turns between <|im_start|> and <|im_end|>, pictures as one placeholder each.
CHAT_TEMPLATE = (Path(__file__).parent / "tiny_policy" / "chat_template.jinja").read_text(encoding="utf-8")
BUILD_SEED = 1  # scenes seed of all training pictures here; train_rl.py uses seed 0
NAMES = ("nothing", *SHAPES, "bar", *LETTERS)  # what a visual token may hold; letters are legend entries
PAINTS, EXTENTS = ("nothing", *COLORS), ("nothing", "", "small", "large")
NUM_REGIONS = 9  # ninths of a picture, row by row


def build_tokenizer(texts: list[str], vocab_size: int = 480) -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer with Qwen's splitting rule and special tokens, `vocab_size` tokens in all."""
    splitter = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), splitter.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, size = sorted(pre_tokenizers.ByteLevel.alphabet()), vocab_size - len(SPECIAL_TOKENS)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": SPECIAL_TOKENS}
    return Qwen2Tokenizer(vocab=trained["vocab"], merges=merges, model_max_length=2048, **special)


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen3VLProcessor:
    """Qwen3-VL's processor: patches of 16 pixels, 2 x 2 of them per visual token, pictures of 4 to 256 tokens."""
    pixels = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
    pixels |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    pixels |= {"size": {"shortest_edge": 4 * 32 * 32, "longest_edge": 256 * 32 * 32}}  # areas in pixels, in truth
    images = transformers.Qwen2VLImageProcessor(**pixels)
    videos = transformers.Qwen3VLVideoProcessor(cap_pixels_per_frame=False, **pixels)
    return Qwen3VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen3VLForConditionalGeneration:
    """An untrained model. Weights have a spread of 1 / sqrt(fan-in), as the usual 0.02 is far too small here.

    Output projections of the text layers start at a tenth of that, or they would drown the embeddings.
    """
    token_id = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    text = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "rope_parameters": rope}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048}
    text |= {"vocab_size": len(tokenizer), "tie_word_embeddings": True, "bos_token_id": None}
    text |= {"eos_token_id": token_id("<|im_end|>"), "pad_token_id": token_id("<|endoftext|>")}
    vision = {"hidden_size": 96, "intermediate_size": 384, "depth": 3, "num_heads": 4, "out_hidden_size": 128}
    vision |= {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 256}
    vision |= {"deepstack_visual_indexes": [1]}
    ids = {"image_token_id": token_id("<|image_pad|>"), "video_token_id": token_id("<|video_pad|>")}
    ids |= {f"vision_{side}_token_id": token_id(f"<|vision_{side}|>") for side in ("start", "end")}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    model = Qwen3VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif parameter.dim() > 1:
            fan_in = parameter[0].numel()
            gain = 0.1 if re.search("o_proj|down_proj", name) else 1.0
            nn.init.normal_(parameter, std=gain * fan_in**-0.5)
    ends = [token_id("<|im_end|>"), token_id("<|endoftext|>")]
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=token_id("<|endoftext|>"))
    return model


def cell_labels(example: dict, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """What each of the rows x columns visual tokens of a picture holds.

    That is the object that fills most of the token, or of which the token holds the largest share, so that small
    objects are not lost. A token that only touches an object is left out.

    Returns:
        classes (rows * columns, 4): indices into NAMES, PAINTS, EXTENTS and the nine regions (0 = nothing, then 1..9),
            -100 for tokens that are left out;
        boxes (rows * columns, 4): x1, y1, x2, y2 of the object as shares of the picture, zero where there is nothing.
    """
    width, height = example["image"].size
    classes, boxes = torch.zeros(rows * columns, 4, dtype=torch.long), torch.zeros(rows * columns, 4)
    largest = torch.zeros(rows * columns)
    left, top = torch.arange(columns) / columns, torch.arange(rows) / rows
    for thing in example["objects"]:
        x1, y1, x2, y2 = (v / s for v, s in zip(thing["box"], (width, height, width, height), strict=True))
        across = ((left + 1 / columns).clamp(max=x2) - left.clamp(min=x1)).clamp(min=0)
        down = ((top + 1 / rows).clamp(max=y2) - top.clamp(min=y1)).clamp(min=0)
        area = (down[:, None] * across).flatten()  # of the object's box inside each token, (rows * columns,)
        share = torch.maximum(area / ((x2 - x1) * (y2 - y1)), area * rows * columns)
        here = share > largest
        largest = torch.maximum(largest, share)
        name = thing["letter"] if thing["name"] == "legend" else thing["name"]
        region = 1 + 3 * int(1.5 * (y1 + y2)) + int(1.5 * (x1 + x2))
        look = (NAMES.index(name), PAINTS.index(thing["color"]), EXTENTS.index(thing["size"]), region)
        classes[here], boxes[here] = torch.tensor(look), torch.tensor((x1, y1, x2, y2))
    classes[(largest > 0) & (largest < 0.2)] = -100
    return classes, boxes


class Batches(Dataset):
    """Batch number i is a function of i alone: examples i * batch_size and on, as a list of two half batches.

    A half batch holds the processor's tensors with `labels` (B, S), -100 outside the completion, and what each
    visual token holds, `classes` (N, 4) and `boxes` (N, 4). The first half has the system turn, the second has none.
    In the first `looking` batches no completion is a hasty one.
    """

    def __init__(self, processor: Qwen3VLProcessor, first: int, count: int, batch_size: int = 64, looking: int = 0):
        self.processor, self.first, self.count, self.batch_size = processor, first, count, batch_size
        self.looking = looking
        self.scenes = Scenes("train", (first + count) * batch_size, seed=BUILD_SEED)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> list[dict[str, Tensor]]:
        start, half = (self.first + number) * self.batch_size, self.batch_size // 2
        examples = self.scenes[start : start + self.batch_size]
        style = "looking" if number < self.looking else "reasoning"
        return [self._collate(examples[:half], True, style), self._collate(examples[half:], False, style)]

    def _collate(self, examples: list[dict], with_system: bool, style: str) -> dict[str, Tensor]:
        completions = [f"{example[style]}<|im_end|>" for example in examples]
        prompts = [prompt_text(self.processor, example, SYSTEM_PROMPT if with_system else None) for example in examples]
        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        images = [example["image"] for example in examples]
        batch = self.processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
        lengths = torch.tensor([len(ids) for ids in self.processor.tokenizer(completions)["input_ids"]])
        ends = batch["attention_mask"].sum(1)
        position = torch.arange(batch["input_ids"].shape[1])
        is_completion = (position >= (ends - lengths)[:, None]) & (position < ends[:, None])  # (B, S)
        grids = (batch["image_grid_thw"][:, 1:] // 2).tolist()  # rows and columns of visual tokens
        held = [cell_labels(example, *grid) for example, grid in zip(examples, grids, strict=True)]
        batch["labels"] = batch["input_ids"].masked_fill(~is_completion, -100)
        batch["classes"], batch["boxes"] = (torch.cat(parts) for parts in zip(*held, strict=True))
        return dict(batch)


class Optimizers:
    """Muon for the weight matrices, AdamW for the rest; linear warm-up, then linear decay to a twentieth.

    Muon learns to tell shapes apart, which takes longest here, in several times fewer steps than AdamW alone.
    """

    def __init__(self, modules: list[nn.Module], muon_rate: float, adam_rate: float, steps: int, warmup: int = 40):
        named = [item for module in modules for item in module.named_parameters() if item[1].requires_grad]
        matrices = [weight for name, weight in named if weight.dim() == 2 and re.search("blocks|merger|layers", name)]
        others = [weight for _, weight in named if not any(weight is matrix for matrix in matrices)]
        muon = torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        self.optimizers = [muon, torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.01)]

        def scale(step: int) -> float:
            return min(1.0, (step + 1) / warmup) * max(0.05, 1 - step / steps)

        self.schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, scale) for optimizer in self.optimizers]
        self.weights = matrices + others

    def step(self) -> None:
        """One update from the gradients, which are cleared."""
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for part in (*self.optimizers, *self.schedules):
            part.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def train_vision(model: nn.Module, batches: DataLoader, muon_rate=1.6e-2, adam_rate=5e-3) -> list[float]:
    """Teach the vision tower what its tokens hold.

    Returns the accuracy of names, colors, sizes and regions over the tokens that hold something, in the last 20 steps.
    """
    tower, sizes = model.model.visual, (len(NAMES), len(PAINTS), len(EXTENTS), 1 + NUM_REGIONS)
    weights = (3.0, 1.0, 1.0, 0.3)  # of the losses: names are learned last, and regions from the boxes anyway
    # One head on each output, the deepstack one too: they are what the language model will read.
    heads = nn.ModuleList(nn.Linear(model.config.text_config.hidden_size, sum(sizes) + 4) for _ in range(2))
    optimizers = Optimizers([tower, heads], muon_rate, adam_rate, len(batches))
    right = []  # (4,) per step
    for halves in (progress := tqdm(batches, desc="vision", mininterval=10)):
        pixels, grids = (torch.cat([half[key] for half in halves]) for key in ("pixel_values", "image_grid_thw"))
        classes, boxes = (torch.cat([half[key] for half in halves]) for key in ("classes", "boxes"))
        output = tower(pixels, grid_thw=grids)
        loss, something = 0.0, classes[:, 0] > 0
        for head, features in zip(heads, (output.deepstack_features[0], output.pooler_output), strict=True):
            *looks, box = head(features).split([*sizes, 4], dim=-1)  # (N, size) each
            losses = [F.cross_entropy(look, classes[:, i]) for i, look in enumerate(looks)]
            loss = loss + sum(weight * part for weight, part in zip(weights, losses, strict=True))
            loss = loss + 10 * F.l1_loss(box[something], boxes[something])
        loss.backward()
        optimizers.step()
        guessed = torch.stack([look.argmax(-1) for look in looks], dim=-1)[something]  # (M, 4), of the last layer
        right.append((guessed == classes[something]).float().mean(0))
        progress.set_postfix(loss=f"{loss.item():.2f}", names=f"{right[-1][0]:.2f}", refresh=False)
    return torch.stack(right[-20:]).mean(0).tolist()


def finetune(model: nn.Module, batches: DataLoader, muon_rate: float, adam_rate: float, after_step) -> None:
    """Supervised training of the language model; `after_step(step, loss)` is called each time, True ends it.

    The vision tower is frozen: at first the completions depend little on the picture, and their noisy gradients would
    undo in a few steps what the tower has learned of shapes.
    """
    model.model.visual.requires_grad_(False)
    optimizers = Optimizers([model], muon_rate, adam_rate, len(batches))
    for step, halves in enumerate(batches, start=1):
        model.train()
        total = sum((half["labels"] != -100).sum().item() for half in halves)
        summed = 0.0
        for half in halves:
            inputs = {key: value for key, value in half.items() if key not in ("labels", "classes", "boxes")}
            rows, columns = (half["labels"][:, 1:] != -100).nonzero(as_tuple=True)  # completion tokens, (T,) each
            logits = model(**inputs).logits[rows, columns]  # (T, vocabulary)
            loss = F.cross_entropy(logits, half["labels"][rows, columns + 1], reduction="sum") / total
            loss.backward()
            summed += loss.item()
        optimizers.step()
        if after_step(step, summed):
            return


@torch.no_grad()
def measure(model: nn.Module, processor: Qwen3VLProcessor, split: str, count: int, temperature: float = 0.0) -> dict:
    """Accuracy of `count` examples of a split by plain `generate`, half of them with the system turn.

    Temperature 0 is greedy. Returns a dict: `accuracy` (share of right answers), `tokens` (mean length of a completion,
    its end token included), `kinds` (accuracy per kind of question), `texts`.
    """
    model.eval()
    right, lengths, texts = defaultdict(list), [], []
    for start in range(0, count, 64):
        examples = Scenes(split, count)[start : start + 64]
        systems = [None if i % 2 else SYSTEM_PROMPT for i in range(len(examples))]
        prompts = [prompt_text(processor, *pair) for pair in zip(examples, systems, strict=True)]
        images = [example["image"] for example in examples]
        batch = processor(text=prompts, images=images, padding=True, padding_side="left", return_tensors="pt")
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        ids = model.generate(**batch, max_new_tokens=64, **sampling)[:, batch["input_ids"].shape[1] :]  # (B, S)
        for example, row in zip(examples, ids, strict=True):
            texts.append(processor.decode(row, skip_special_tokens=True))
            right[example["kind"]].append(is_correct(texts[-1], example))
            lengths.append((row != processor.tokenizer.pad_token_id).sum().item())
    kinds = {kind: round(sum(hits) / len(hits), 3) for kind, hits in sorted(right.items())}
    accuracy = sum(map(sum, right.values())) / count
    return {"accuracy": accuracy, "tokens": sum(lengths) / count, "kinds": kinds, "texts": texts}


def save_policy(model: nn.Module, processor: Qwen3VLProcessor, folder: Path) -> None:
    """Write the folder aside and rename it, so that it never exists in part. README.md stays in it."""
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    (fresh / "model.safetensors").chmod(0o644)  # written for its owner alone
    processor.save_pretrained(fresh)
    if (readme := folder / "README.md").exists():
        shutil.copy(readme, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def build(out: Path, arguments: argparse.Namespace) -> None:
    """The three stages, as the module's docstring says; `arguments` are those of the command line."""
    torch.manual_seed(arguments.seed)
    started = time.time()
    examples = Scenes("train", arguments.tokenizer_examples, seed=BUILD_SEED)
    texts = [text for example in examples for text in (example["question"], example["reasoning"])]
    texts += [f"system\nuser\nassistant\n{SYSTEM_PROMPT}"] * len(examples)  # often enough to be whole tokens
    processor = build_processor(build_tokenizer(texts))
    model = build_model(processor.tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {len(processor.tokenizer)} tokens", flush=True)

    def loader(first: int, steps: int, looking: int = 0) -> DataLoader:
        batches = Batches(processor, first, steps, arguments.batch_size, looking)
        return DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=4)  # drawn ahead, in order

    right = train_vision(model, loader(0, arguments.vision_steps))
    print("vision tower: right are {:.1%} of names, {:.1%} colors, {:.1%} sizes, {:.1%} regions".format(*right))
    if arguments.checkpoints:
        save_policy(model, processor, arguments.checkpoints / "vision")

    def after_step(step: int, loss: float) -> bool:
        if step % arguments.evaluate_every:
            return False
        figures = {split: measure(model, processor, split, arguments.look_at) for split in ("validation", "heldout")}
        line = " ".join(f"{split} {figure['accuracy']:.3f}" for split, figure in figures.items())
        print(f"step {step} loss {loss:.4f} {line} {time.time() - started:.0f} s", flush=True)
        if arguments.checkpoints:
            save_policy(model, processor, arguments.checkpoints / f"step-{step}")
        return step > arguments.looking_steps and figures["heldout"]["accuracy"] >= arguments.target

    batches = loader(arguments.vision_steps, arguments.steps, arguments.looking_steps)
    finetune(model, batches, arguments.muon_rate, arguments.adam_rate, after_step)
    save_policy(model, processor, out)
    print(f"{out} after {time.time() - started:.0f} s", flush=True)
    for split, temperature in (("validation", 0.0), ("heldout", 0.0), ("heldout", 1.0)):
        figures = measure(model, processor, split, 2 * arguments.look_at, temperature)
        print(f"{split} at temperature {temperature:g}: accuracy {figures['accuracy']:.3f}, ", end="")
        print(f"{figures['tokens']:.1f} tokens per completion, by kind {figures['kinds']}", flush=True)


def main() -> None:
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description="Build the embedded tiny policy.", formatter_class=shown)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write, e.g. data/tiny_policy")
    add("--seed", type=int, default=0, help="seed of the weights")
    add("--vision_steps", type=int, default=500, help="steps of the vision stage")
    add("--steps", type=int, default=800, help="most steps of fine-tuning")
    add("--looking_steps", type=int, default=500, help="steps of it without hasty completions")
    add("--target", type=float, default=1.0, help="held-out accuracy to stop at, once there are hasty completions")
    add("--evaluate_every", type=int, default=50, help="steps between two looks at the accuracy")
    add("--look_at", type=int, default=256, help="examples of each split in a look; twice as many in the end")
    add("--batch_size", type=int, default=64, help="pictures per step")
    add("--muon_rate", type=float, default=6e-3, help="learning rate of the matrices in fine-tuning")
    add("--adam_rate", type=float, default=2e-3, help="learning rate of all the rest in fine-tuning")
    add("--tokenizer_examples", type=int, default=4000, help="examples that the tokenizer reads")
    add("--checkpoints", type=Path, help="folder that keeps the policy of each look")
    arguments = parser.parse_args()
    protect_output()
    build(arguments.out, arguments)


if __name__ == "__main__":
    main()
