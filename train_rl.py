"""GRPO with attention rewards (SAYO, arXiv 2602.08241): rollout, reward, advantage, update, log, save.

    accelerate launch train_rl.py                                     # the embedded policy and scenes, on any machine
    accelerate launch train_rl.py --config configs/paper.yaml --model Qwen/Qwen3-VL-4B-Instruct --data mine.jsonl
    accelerate launch --num_processes 2 train_rl.py ...               # two GPUs: groups_per_step is shared out
    accelerate launch --config_file configs/accelerate_fsdp.yaml train_rl.py ...   # the model is shared out, too

Departures from the paper's released script: the group is one packed sequence in every stage, one optimizer step sees
several groups, and every setting is a field of Config. README.md says how the defaults differ from configs/paper.yaml.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from biggest import try_biggest
from checkpoint import load_state, save_final_adapter, write_whole
from config import ConfigError, PolicyConfig, SamplingConfig, at_least, option, run_command
from data.attention_regions import RegionsConfig, attention_regions
from data.examples import load_examples
from data.order import example_index, step_seed
from ease import ease_layer, ease_loss, target_map
from evaluate import evaluate_shared, format_table, report, without_nan
from grpo import LOSS_TYPES, AdaptiveBeta, group_advantages, grpo_loss
from metrics import StageClock, group_metrics, not_finite, show_step, step_metrics
from model_card import write_model_card
from processes import (
    average_gradients,
    check_same_weights,
    make_accelerator,
    read_by_main,
    share_out,
    wait_for_forwards,
    wants_shares,
)
from prompts import base_model
from reward import COMPONENTS, RewardConfig, group_statistics, score_statistics
from rollout import Group, check_prompts, group_generator, sample_groups
from run_folder import begin, check_made_from, check_space, former_evaluations, made_from, mark_finished, open_run
from saving import draw_curves, insist, save, save_for_certain, write_rows
from stopping import Stopped, StopSignals
from tables import before_and_after
from vlm import compute_dtype, evaluating, group_logprobs, load_policy, resolve_layers

OPTIMIZERS = ("adamw", "paged_adamw_8bit")
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass
class Config(RegionsConfig, RewardConfig, SamplingConfig, PolicyConfig):
    """Train a multimodal LLM with GRPO, an attention reward, a format reward and an accuracy reward."""

    regions: str = option(
        "boxes", "Rewarded regions: the data's own, or made of the base model's attention.", ("boxes", "attention")
    )
    output_dir: str = option("runs/sayo", "Folder of the run: config, metrics, samples, checkpoints, adapter, curves.")
    max_steps: int = option(100, "Optimizer steps of groups_per_step groups each.")
    groups_per_step: int = option(8, "Prompts per step, over all processes; gradients add up over their groups.")
    num_iterations: int = option(1, "Updates on the same completions; above 1 the PPO clipping begins to matter.")
    loss_type: str = option("grpo", "How token losses become one number, as in TRL.", LOSS_TYPES)
    advantage_scale: str = option("group", "Divide advantages by the group's standard deviation.", ("group", "none"))
    clip_low: float = option(0.2, "A probability ratio below 1 - clip_low is clipped.")
    clip_high: float = option(0.2, "A probability ratio above 1 + clip_high is clipped.")
    beta: float = option(1e-3, "Weight of the k3 KL term to the base model; 0 leaves it out.")
    kl_target: float | None = option(
        None, "Raise beta while a step's KL, in nats per token, is far above this, and lower it again behind it."
    )
    ease_weight: float = option(0.0, "Weight of EASE's attention loss on right completions (its paper: 1e-3).")
    optimizer: str = option("adamw", "AdamW of torch, or of bitsandbytes with 8-bit paged state.", OPTIMIZERS)
    learning_rate: float = option(2e-4, "AdamW's peak learning rate; large models want less (the paper: 5e-6).")
    lr_scheduler: str = option("constant_with_warmup", "Schedule of transformers.", SCHEDULERS)
    warmup_steps: int = option(5, "Steps in which the learning rate rises from 0.")
    weight_decay: float = option(0.01, "AdamW's weight decay.")
    max_grad_norm: float = option(0.8, "Gradients are scaled down to this norm.")
    max_skipped_steps: int = option(10, "Stop after so many steps in a row whose gradients were not finite.")
    lora_rank: int = option(16, "Rank of the LoRA adapter; switched off, it is the reference of the KL term.")
    lora_alpha: int = option(32, "LoRA's alpha.")
    lora_targets: str = option("language", "Linear layers that LoRA adapts.", ("language", "all-linear"))
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: slower, much less memory."
    )
    save_steps: int = option(50, "Steps between checkpoints.")
    save_total_limit: int | None = option(None, "Keep so many checkpoints, the newest; none keeps all.")
    resume: bool = option(False, "Go on from the newest whole checkpoint of output_dir; start where there is no run.")
    eval_data: str | None = option(
        None, "Evaluated before and after, or none; by default none, but scenes:heldout when data is scenes."
    )
    eval_split: str = option("test", "Split of eval_data, where it has several.")
    eval_limit: int | None = option(512, "Evaluate on the first so many examples of eval_data.")
    report_to: str = option("tensorboard", "Tracker of Accelerate.", ("tensorboard", "wandb", "none"))
    plan: bool = option(False, "Print how much memory the run will take, by stage, and stop before weights are loaded.")
    memory_gb: float | None = option(None, "Plan for a GPU with so many GB (10^9 bytes) instead of for this machine.")
    try_biggest: bool = option(True, "Run the biggest group of the data first, so that a lack of memory shows at once.")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.num_generations < 2:
            found.append(
                f"num_generations={self.num_generations}: give 2 or more; advantages compare completions of a group"
            )
        found += at_least(self, 1, "max_steps", "groups_per_step", "num_iterations", "save_steps", "eval_limit")
        found += at_least(self, 1, "lora_rank", "lora_alpha", "max_skipped_steps", "save_total_limit")
        found += at_least(self, 0, "beta", "ease_weight", "clip_low", "clip_high", "warmup_steps", "weight_decay")
        for name in ("learning_rate", "max_grad_norm", "memory_gb", "kl_target"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                found.append(f"{name}={getattr(self, name)}: give more than 0")
        if self.report_to in ("tensorboard", "wandb") and find_spec(self.report_to) is None:
            found.append(f"report_to={self.report_to!r} is not installed: pip install {self.report_to}, or give none")
        if not any(getattr(self, f"{name}_weight") for name in COMPONENTS):
            found.append(f"{', '.join(f'{name}_weight' for name in COMPONENTS)} are all 0: nothing would be rewarded")
        if self.kl_target and not self.beta:
            found.append(f"kl_target={self.kl_target} with beta=0.0: give a beta above 0, where it starts (1e-3)")
        if self.ease_weight and self.num_iterations > 1:
            found.append(
                f"ease_weight={self.ease_weight} with num_iterations={self.num_iterations}: give 1; the loss is taken "
                "on the policy that sampled"
            )
        return found

    @property
    def needs_boxes(self) -> bool:
        """Whether an example without boxes cannot be trained on."""
        return self.regions == "boxes" and any((self.attention_weight, self.region_weight, self.ease_weight))


# --- one update -------------------------------------------------------------------------------------------------


def make_optimizer(name: str, parameters: Sequence[Tensor], **settings) -> torch.optim.Optimizer:
    """AdamW for LoRA weights. "paged_adamw_8bit" holds its state in 8 bits (tensors below 4,096 elements in 32); the
    GPU driver moves that of tensors of 100,000 elements or more to the computer's memory when the card is full. On a
    CPU, and in a run that was resumed, it is 8-bit, but not paged."""
    if name == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    import bitsandbytes  # prints about its optional kernels: not when a script is imported

    return bitsandbytes.optim.PagedAdamW8bit(parameters, **settings)


# --- the loop ---------------------------------------------------------------------------------------------------


def train_step(model, processor, optimizer, examples, step: int, config: Config, accelerator) -> tuple[dict, dict]:
    """One step: this process's share of the groups through all stages, then one update per iteration.

    An update whose gradients are not finite is skipped; accelerator.scaler, if there is one, then lowers its scale.

    Returns:
        (metrics of the step over all processes, a sample of this process for samples.jsonl).
    """
    device, clock = accelerator.device, StageClock()
    scaler = accelerator.scaler or torch.amp.GradScaler(device.type, enabled=False)
    groups_here = config.groups_per_step // accelerator.num_processes
    numbers = range(accelerator.process_index * groups_here, (accelerator.process_index + 1) * groups_here)
    positions = [step * config.groups_per_step + number for number in numbers]
    batch = [examples[example_index(config.seed, position, len(examples))] for position in positions]

    with clock.stage("rollout", device):
        groups = sample_groups(
            model,
            processor,
            batch,
            num_generations=config.num_generations,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            generators=[group_generator(config.seed, step, number) for number in numbers],
            system_prompt=config.system_prompt,
            sampling_tokens=config.sampling_tokens,
        )
        wait_for_forwards(model)
    references: list = [None] * len(groups)
    if config.beta:
        with clock.stage("reference", device), torch.no_grad(), evaluating(model), model.disable_adapter():
            references = [_logprobs(model, group, config) for group in groups]

    completion_tokens = torch.tensor([float(len(c)) for group in groups for c in group.completions])
    num_items = accelerator.reduce(completion_tokens.sum().to(device), "sum").item() / accelerator.num_processes
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scores, advantages, rows, skipped, num_skipped = [], [], [], [], 0
    map_layer = ease_layer(model) if config.ease_weight else None
    with clock.stage("update", device):
        for iteration in range(config.num_iterations):
            rows, faults = [], []
            for number, (group, reference) in enumerate(zip(groups, references, strict=True)):
                if iteration == 0:  # still the policy that sampled: one forward gives the rewards and the loss
                    statistics = group_statistics(model, group, config, map_layer)
                    group.statistics, logps = statistics.detached(), statistics.logps
                    scores.append(score_statistics(group, config))
                    advantages.append(group_advantages(scores[number]["total"], config.advantage_scale))
                else:
                    logps = _logprobs(model, group, config)
                loss, stats = grpo_loss(
                    logps,
                    group.statistics.logps,
                    reference,
                    advantages[number],
                    beta=config.beta,
                    clip_low=config.clip_low,
                    clip_high=config.clip_high,
                    loss_type=config.loss_type,
                    max_new_tokens=config.max_new_tokens,
                    num_items=num_items / groups_here,  # the loss is divided by groups_here below, for all types alike
                )
                if config.ease_weight:
                    ease = ease_loss(statistics.maps, target_map(processor, group.example), scores[number]["accuracy"])
                    loss, stats = loss + config.ease_weight * ease, stats | {"ease": ease.item()}
                fault = not_finite(reward=scores[number]["total"], loss=loss)
                # A reward or a loss that is not finite makes gradients so, and these skip the step in all processes.
                scaler.scale(loss * math.nan if fault else loss / groups_here).backward()
                norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
                faults.append(fault or not_finite(gradient=norm))
                metrics = group_metrics(group, scores[number], advantages[number], config)
                rows.append(metrics | stats | {"loss": loss.item()})
            average_gradients(parameters, accelerator)
            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
            if math.isfinite(grad_norm):
                scaler.step(optimizer)
            else:  # in every process, since they have one mean; gradients that add up stay so from the first fault on
                pairs = zip(groups, faults, strict=True)
                broken = [(group.example.get("id"), fault) for group, fault in pairs if fault]
                skipped += gather_object(broken[:1])  # the first one of each process
                num_skipped += 1
            scaler.update()
            optimizer.zero_grad()

    packed_tokens = float(sum(len(group.prompt.input_ids) for group in groups)) + completion_tokens.sum().item()
    clock.tokens = dict.fromkeys(clock.seconds, packed_tokens)
    clock.tokens["rollout"] = completion_tokens.sum().item()
    clock.tokens["update"] = packed_tokens * config.num_iterations
    table = torch.tensor([list(row.values()) for row in rows], device=device)  # (groups here, metrics)
    gathered = accelerator.gather(table).tolist()  # (groups_per_step, metrics)
    metrics = step_metrics([dict(zip(rows[0], values, strict=True)) for values in gathered])
    metrics |= {"grad_norm": grad_norm if math.isfinite(grad_norm) else None, "skipped_updates": float(num_skipped)}
    metrics |= clock.metrics() | ({"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {})
    first = groups[0]
    sample = {"id": first.example.get("id"), "question": first.example["question"], "answer": first.example["answer"]}
    sample |= {"texts": first.texts, "advantages": advantages[0].tolist()}
    sample |= {name: values.tolist() for name, values in scores[0].items()}
    if num_skipped:
        sample |= {"skipped_examples": [name for name, _ in skipped], "not_finite": [fault for _, fault in skipped]}
    return metrics, without_nan(sample)


def _logprobs(model, group: Group, config: Config) -> list[Tensor]:
    return group_logprobs(model, group.prompt, group.completions, temperature=config.temperature)


def main(config: Config) -> None:
    if config.plan:
        from plan import show_plan  # whose own command has these settings, too

        show_plan(config)
        return
    accelerator = make_accelerator(config)
    with StopSignals(accelerator.is_main_process) as stop, open_run(config, accelerator) as run:
        if not run.finished:
            train(config, accelerator, run, stop)


def train(config: Config, accelerator, run, stop) -> None:
    """A run from load to evaluation, or what a former start of it left to do."""
    output_dir, main_process = run.folder, accelerator.is_main_process
    set_seed(config.seed)
    examples = load_examples(config.data, **config.data_arguments(), require_boxes=config.needs_boxes)
    eval_data = config.eval_data or ("scenes:heldout" if config.data == "scenes" else "none")
    arguments = config.data_arguments() | {"split": config.eval_split, "limit": config.eval_limit}
    held_out = None if eval_data == "none" else load_examples(eval_data, **arguments, require_boxes=False)
    arguments = config.policy_arguments(config.lora_rank)
    if run.checkpoint:
        arguments["adapter"] = str(run.checkpoint / "adapter")
    arguments |= {"lora_alpha": config.lora_alpha, "lora_targets": config.lora_targets}
    arguments |= {"device": accelerator.device, "load_on": "cpu" if wants_shares() else None}
    model, processor = load_policy(**arguments)
    if wants_shares():
        share_out(model, accelerator)
    resolve_layers(model, config.attention_layers)
    for data in filter(None, (examples, held_out)):
        check_prompts(model, processor, data, config, config.max_new_tokens)
    made = made_from(config, examples, held_out, model, accelerator)
    notes = check_made_from(run, config, made)
    if config.regions == "attention":  # held-out data keeps its own: TAS is measured against those
        positions = range(config.max_steps * config.groups_per_step)
        used = {example_index(config.seed, position, len(examples)) for position in positions}
        examples = attention_regions(model, processor, examples, used, config)
    if config.gradient_checkpointing:
        base_model(model).activation_checkpointing_enable({"use_reentrant": False})
    model.train(config.gradient_checkpointing)  # transformers checkpoints in training mode alone

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = config.weight_decay
    optimizer = make_optimizer(config.optimizer, parameters, lr=config.learning_rate, weight_decay=decay)
    optimizer.register_step_pre_hook(stop.hold)  # a step is given up before its first update, or finished
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=compute_dtype(model) == torch.float16)
    accelerator.scaler = scaler  # where train_step looks for it
    from transformers import get_scheduler  # imports peft and bitsandbytes, which print: not when a script is imported

    scheduler = get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, config.max_steps)
    beta = AdaptiveBeta(config.beta, config.kl_target)
    parts = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler, "beta": beta}
    start, skipped_in_a_row = load_state(run.checkpoint, parts) if run.checkpoint else (0, 0)
    notes += check_space(config, run, parameters, start)
    stop.last_step = start

    accelerator.wait_for_everyone()  # every process has looked at the folder before one of them fills it
    stored = read_by_main(lambda: former_evaluations(run, config.max_steps), main_process)
    before, after = stored if held_out else (None, None)
    if held_out and before is None and start:
        notes.append("resume: evaluation_before.json is missing or damaged: there is nothing to compare the end with")
    accelerator.wait_for_everyone()
    if main_process:
        begin(run, config, made, start)
        accelerator.init_trackers(
            "sayo", config={k: v for k, v in asdict(config).items() if isinstance(v, int | float | str)}
        )
        print(
            f"{len(examples)} examples of {config.data}; {sum(p.numel() for p in parameters):,} trained parameters; "
            f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
        )
        for message in (*notes, *(f"skipped {message}" for message in examples.skipped)):
            print(message)
        print(
            "A GRPO loss hovers around zero: advantages of a group add up to zero and the ratio starts at 1, so it is\n"
            "its gradient that counts, not its value. Watch the rewards, TAS, KL and advantage shares instead."
        )

    check_same_weights(model, accelerator, "before the first step")
    if config.try_biggest and start < config.max_steps:
        try_biggest(model, processor, examples, config, accelerator)
    if held_out and before is None and start == 0:
        before = evaluate_shared(model, processor, held_out, config, accelerator, f"before, {eval_data}")
        if main_process:
            path, text = output_dir / "evaluation_before.json", json.dumps(without_nan(before))
            insist(run, path.name, lambda: write_whole(path, text))
            print(format_table({"before": report(before)["base"]}))

    progress = tqdm(
        range(start, config.max_steps),
        desc="train",
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 15,
        disable=not main_process,
    )
    is_due, told = False, set()  # a checkpoint that could not be saved stays due
    for step in progress:
        scale = scaler.state_dict()
        try:
            with stop.at_once(accelerator.num_processes == 1):
                set_seed(step_seed(config.seed, step, accelerator.process_index))
                settings = replace(config, beta=beta.value)
                metrics, sample = train_step(model, processor, optimizer, examples, step, settings, accelerator)
        except Stopped:
            scaler.load_state_dict(scale) if scaler.is_enabled() else None
            break
        metrics = {"step": step + 1, "learning_rate": scheduler.get_last_lr()[0], "beta": beta.value} | metrics
        skipped_in_a_row = skipped_in_a_row + 1 if metrics["skipped_updates"] == config.num_iterations else 0
        if not skipped_in_a_row:
            scheduler.step()
            beta.step(metrics["kl"])
        stop.last_step = step + 1
        is_stopping = stop.agreed(accelerator)
        if (step + 1) % config.save_steps == 0:
            check_same_weights(model, accelerator, f"after step {step + 1}")
            is_due = True
        if main_process:
            write_rows(run, {"metrics.jsonl": metrics, "samples.jsonl": {"step": step + 1} | sample})
            show_step(metrics, sample, progress, accelerator, told)
            if is_due and step + 1 < config.max_steps and not is_stopping:
                is_due = not save(run, config, step + 1, model, parts, skipped_in_a_row)
        if skipped_in_a_row >= config.max_skipped_steps:
            raise ConfigError(
                f"max_skipped_steps={config.max_skipped_steps}: the gradient was not finite in so many steps in a "
                f"row, the last one step {step + 1}; lower learning_rate (now {config.learning_rate}) or give "
                "--dtype bfloat16 or float32; the last checkpoint is untouched"
            )
        if is_stopping:
            break
    progress.close()
    check_same_weights(model, accelerator, f"after step {stop.last_step}")
    if main_process and stop.last_step > start:
        save_for_certain(run, config, stop.last_step, model, parts, skipped_in_a_row)
    accelerator.wait_for_everyone()
    if stop.number:
        accelerator.end_training()
    stop.release()

    if main_process:
        insist(run, "adapter", lambda: save_final_adapter(output_dir, model))
        insist(run, "curves.png", lambda: draw_curves(output_dir))
    columns: dict = {}
    if held_out:
        if after is None:
            after = evaluate_shared(model, processor, held_out, config, accelerator, f"after, {eval_data}")
        columns = before_and_after(before, after)
    if main_process:
        if held_out:
            result = {"step": config.max_steps, "summary": columns, "rows": {"after": after}}
            text = json.dumps(without_nan(result))
            insist(run, "evaluation.json", lambda: write_whole(output_dir / "evaluation.json", text))
            print(f"{len(after)} examples of {eval_data}, greedy; mean [95 % bootstrap interval]")
            print(format_table(columns))
        card = (output_dir, config, columns, eval_data, len(held_out or ()), len(examples))
        insist(run, "the model card", lambda: write_model_card(*card))
        mark_finished(run, config, made)
        print(f"adapter, metrics, samples and curves.png -> {output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(Config, main)
