"""The plan: what it says and advises, that it agrees with a measured peak; and the rehearsal of the largest step."""

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from conftest import FAMILIES, write_jsonl
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

import rollout
import train_rl
from sayo.examples.load import load_examples
from sayo.examples.pictures import DataError
from sayo.memory_plan import plan, rehearsal
from sayo.memory_plan.fake_policy import depths
from sayo.memory_plan.longest import longest_prompt
from sayo.memory_plan.plan import make_plan, planner, prompt_of_picture, show_plan
from sayo.memory_plan.rehearsal import is_out_of_memory
from sayo.model.loading import load_processor
from sayo.model.prompts import encode_prompt
from sayo.run.config import EMBEDDED_POLICY
from sayo.settings import ConfigError, read_config
from tools.plan import PlanConfig, main, plan_and_measure
from train_rl import Config, TrainState

# Those of the launcher are no settings of train_rl.py.
CONFIGS = sorted(path for path in Path("configs").glob("*.yaml") if not path.stem.startswith("accelerate"))
SHAPES = {"Qwen3-VL-2B": "2b", "Qwen3-VL-4B": "4b", "Qwen3-VL-8B": "8b"}
TINY = {"num_generations": 3, "max_new_tokens": 6, "groups_per_step": 2, "lora_rank": 2, "limit": 8, "eval_limit": 2}
LONG = {"num_generations": 8, "max_new_tokens": 64, "eval_limit": 1}  # the update takes more than reading prompts


def without_network(config):
    """The config with a folder of the same shapes in place of a Hub id."""
    name = next((folder for name, folder in SHAPES.items() if name in config.model), None)
    return replace(config, model=f"tests/qwen3_vl/{name}" if name else config.model)


@pytest.mark.parametrize(("folder", "billions"), [("2b", 2.13), ("4b", 4.44), ("8b", 8.77)])
def test_shapes_have_the_parameters_of_the_model_cards(folder, billions):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(f"tests/qwen3_vl/{folder}"))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_complete_and_fits_its_card(path, capsys):
    config, settings = read_config(Config, ["--config", str(path)]), yaml.safe_load(path.read_text(encoding="utf-8"))
    decisive = {"num_generations", "max_new_tokens", "groups_per_step", "dtype", "max_steps", "save_steps"}
    if path.stem not in ("paper", "released", "tiny-cpu"):
        decisive |= {"model", "load_in_4bit", "max_pixels", "gradient_checkpointing", "memory_gb", "learning_rate"}
        assert config.gradient_checkpointing
    assert decisive <= set(settings) <= {entry.name for entry in fields(Config)}
    assert config.dtype == ("float16" if path.stem == "t4-16gb" else config.dtype) != "auto"

    config = without_network(config)
    if path.stem in ("paper", "released"):  # which leave open which model, and on what card
        config = replace(config, model="tests/qwen3_vl/8b", memory_gb=48)
    processes = 2 if path.stem == "2x24gb" else 1
    picture = None if path.stem == "tiny-cpu" else (1024, 768)
    found = show_plan(config, picture, 160, processes)
    said = capsys.readouterr().out
    assert found.total <= found.capacity and "fits:" in said
    assert found.work.groups == config.groups_per_step // processes
    if picture:
        assert found.capacity == config.memory_gb * 1e9 and "768 of pictures" in said
        assert 0.3 * found.capacity < found.total < 0.85 * found.capacity  # not wasted, and room for what is assumed


def test_a_plan_agrees_with_a_measured_peak():
    """A small one of `python -m tools.plan --check`: a process of its own, two real steps, its largest resident set."""
    shape = {"image_tokens": 256, "hidden_size": 256, "num_layers": 8, "num_generations": 12, "max_new_tokens": 48}
    found, compared = plan_and_measure(shape)
    assert compared["measured"] > 0.2 and abs(compared["off"]) < 0.15, compared
    assert found.highest == "update"


def test_two_depths_and_a_straight_line_are_the_whole_model(monkeypatch):
    config = Config(**TINY, gradient_checkpointing=True)
    model_config, processor = load_processor(EMBEDDED_POLICY)
    prompt, origin = prompt_of_picture(model_config, processor, (320, 256), 30)
    short, layers = make_plan(config, model_config, prompt, origin, 2, True), model_config.text_config.num_hidden_layers
    assert len(depths(model_config)) == 2 and depths(model_config)[1] < layers
    monkeypatch.setattr(plan, "depths", lambda _: [layers])
    full = make_plan(config, model_config, prompt, origin, 2, True)
    for stage in full.stages:
        assert short.bytes_of(stage) == pytest.approx(full.bytes_of(stage), rel=0.02), stage
    assert short.multiply_adds == pytest.approx(full.multiply_adds, rel=1e-6)


@pytest.fixture
def small(tmp_path) -> str:
    """A folder of Qwen3-VL-2B's shapes with two layers and a short vision tower: quick to plan."""
    shutil.copytree("tests/qwen3_vl/2b", tmp_path / "small")
    settings = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))
    settings["text_config"]["num_hidden_layers"] = 2
    settings["vision_config"] |= {"depth": 4, "deepstack_visual_indexes": [1]}
    (tmp_path / "small" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(tmp_path / "small")


def test_every_cause_has_its_effect(small):
    """More of anything takes more, in the stage where it is at work."""
    model_config, processor = load_processor(small)
    settings = {"num_generations": 8, "max_new_tokens": 40, "dtype": "float32", "data": "mine.jsonl"}

    def planned(picture=(320, 256), groups=2, **others):
        prompt, origin = prompt_of_picture(model_config, processor, picture, 30)
        return make_plan(Config(**(settings | others)), model_config, prompt, origin, groups, False)

    base = planned()
    larger = planned(picture=(640, 512), lora_rank=64, groups=8)
    assert larger.bytes_of("update") > base.bytes_of("update")
    assert larger.stages["update"]["optimizer"] == pytest.approx(4 * base.stages["update"]["optimizer"], rel=1e-3)
    assert larger.stages["sampling"]["vision features"] == 16 * base.stages["sampling"]["vision features"]
    longer = planned(max_new_tokens=80, groups=8)
    assert longer.bytes_of("update") > base.bytes_of("update")
    assert longer.work.side_by_side == 8 > base.work.side_by_side
    assert longer.stages["sampling"]["prompt cache"] > 4 * base.stages["sampling"]["prompt cache"]
    less = planned(gradient_checkpointing=True, load_in_4bit=True, beta=0.0, memory_gb=8)
    assert less.bytes_of("update") < base.bytes_of("other update") < base.bytes_of("update")
    assert less.stages["update"]["language model"] < 0.2 * base.stages["update"]["language model"]
    assert "reference" in base.stages and "reference" not in less.stages


def test_what_does_not_fit_comes_with_what_to_lower(small, capsys):
    config = Config(model=small, memory_gb=2, max_pixels=1048576, data="mine.jsonl", groups_per_step=4)
    found = show_plan(replace(config, num_generations=16, max_new_tokens=110), (1024, 1024), 100)
    said = capsys.readouterr().out
    assert found.total > found.capacity == 2e9 and "does not fit" in said and "then it fits" in said
    assert "--gradient_checkpointing true" in said and "1,124 tokens, 1,024 of pictures" in said
    sizes = [float(line.split()[2]) for line in said.splitlines() if line.startswith("  --")]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] <= 2 < found.total / 1e9


def test_a_card_too_small_for_the_weights_is_said_so(small, capsys):
    show_plan(Config(model=small, data="mine.jsonl", groups_per_step=1, memory_gb=0.5), (320, 256), 30)
    assert "still does not fit: take a smaller model" in capsys.readouterr().out


def test_plan_stops_before_weights_and_without_a_run(tmp_path, capsys, monkeypatch):
    shutil.copytree(EMBEDDED_POLICY, tmp_path / "policy", ignore=shutil.ignore_patterns("*.safetensors"))
    monkeypatch.chdir(tmp_path)
    train_rl.main(Config(model=str(tmp_path / "policy"), plan=True, output_dir="run", **(TINY | LONG)))
    said = capsys.readouterr().out
    assert "computed from shapes, nothing measured" in said and "the longest of 8 of scenes" in said
    assert re.search("vision tower weights(.|\n)*attention product(.|\n)*hidden states(.|\n)*multiply-adds", said)
    assert "update with gradient_checkpointing" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weight", ["attention_weight", "region_weight", "ease_weight"])
def test_the_plan_wants_boxes_where_training_does(tmp_path, weight):
    """It asked for boxes beside an attention reward only, and planned runs that training refused."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    data = write_jsonl(tmp_path, {"id": "0", "image": "a.png", "question": "?", "answer": "1"})
    config = replace(Config(data=data, attention_weight=0.0), **{weight: 1.0})
    assert config.needs_boxes and not replace(config, regions="attention").needs_boxes
    with pytest.raises(DataError, match="boxes is empty or missing"):
        planner(1)(config)
    planner(1)(replace(config, **{weight: 0.0}))


def test_the_command_measures_what_it_planned(capsys):
    sizes = {"limit": 2, "groups_per_step": 1, "num_generations": 2, "max_new_tokens": 8}
    main(PlanConfig(measure=True, **sizes))
    said = capsys.readouterr().out
    planned, measured = (float(number) for number in re.findall(r"(?:planned|measured) ([\d.]+) GB", said))
    assert 0 < planned < 1 and 0 < measured < 1 and "the plan is" in said


def test_problems_of_the_settings():
    with pytest.raises(ConfigError) as error:
        read_config(PlanConfig, ["--picture", "1024", "--processes", "0", "--memory_gb", "-1"])
    assert all(words in str(error.value) for words in ("picture='1024'", "processes=0", "memory_gb=-1"))
    with pytest.raises(ConfigError, match="holds no chat template.*--picture"):
        planner(1)(Config(model="tests/qwen3_vl/2b"))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_prompt_is_found_without_decoding(model_folders, tmp_path, family):
    rows = []
    for number, (*size, words) in enumerate([(300, 200, 2), (64, 64, 90), (640, 410, 1), (641, 100, 30), (90, 480, 3)]):
        Image.new("RGB", size, "red").save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "red " * words, "answer": "x", "boxes": [[1, 2, 30, 20]]})
    examples = load_examples(write_jsonl(tmp_path, *rows))
    processor = load_processor(model_folders[family])[1]
    lengths = [len(encode_prompt(processor, example).input_ids) for example in examples]
    assert lengths[longest_prompt(processor, examples, None)] == max(lengths)


def spy(monkeypatch, owner, name: str, note) -> None:
    """Call note(arguments) before every call of a function of a module."""
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: note(args) or function(*args, **options))


def test_the_largest_step_goes_through_every_stage_at_full_length(policies, monkeypatch):
    model, processor = policies["qwen3_vl"]
    config, seen = Config(**TINY), []
    spy(monkeypatch, rehearsal, "make_sampler", lambda _: seen.append("evaluation"))
    spy(monkeypatch, rollout, "make_sampler", lambda _: seen.append("sampling"))
    spy(monkeypatch, train_rl, "logprobs", lambda _: seen.append("reference"))
    spy(monkeypatch, train_rl, "group_statistics", lambda args: seen.append([len(ids) for ids in args[1].completions]))
    example = load_examples("scenes", limit=1)[0]
    rehearsal.run_largest(train_rl.train_step, TrainState(model, config), model, processor, example, 2, config)
    assert seen == ["evaluation", "sampling", "reference", "reference", [6, 6, 6], [6, 6, 6]]
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in gradients) and any(gradient.any() for gradient in gradients)
    model.zero_grad()


def rehearse(policy, train_step, **accelerator) -> None:
    """sayo.memory_plan.rehearsal.rehearse of a small step in one process."""
    alone = {"num_processes": 1, "device": torch.device("cpu"), "reduce": lambda value, _: value} | accelerator
    state, examples = TrainState(policy[0], Config(**TINY)), load_examples("scenes", limit=3)
    rehearsal.rehearse(train_step, state, *policy, examples, state.config, SimpleNamespace(**alone))


OUTCOMES = [  # error of a step, what the rehearsal raises, words in the message
    (None, None, ""),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory"), ConfigError, "not fit(.|\n)*lower it"),
    (MemoryError(), ConfigError, "MemoryError(.|\n)*lower it"),  # which has no words of its own
    (RuntimeError("shapes do not match"), RuntimeError, "shapes"),
    (ZeroDivisionError("by zero"), ZeroDivisionError, "by zero"),
]


@pytest.mark.parametrize(("error", "expected", "words"), OUTCOMES)
def test_a_rehearsal_names_a_lack_of_memory_and_leaves_nothing_behind(policy, monkeypatch, error, expected, words):
    """Weights, gradients and random numbers are as before, also when the step fails."""
    seen, weights, numbers = [], [p.detach().clone() for p in policy[0].parameters()], torch.random.get_rng_state()

    def step(*arguments):
        train_rl.train_step(*arguments)
        torch.rand(3)
        seen.append(any(p.grad is not None for p in policy[0].parameters()))
        if error:
            raise error

    monkeypatch.setattr(plan, "advice_for", lambda *_: "lower it")
    with pytest.raises(expected, match=words) if error else nullcontext():
        rehearse(policy, step)
    assert seen == [True] and torch.equal(torch.random.get_rng_state(), numbers)
    assert all(p.grad is None for p in policy[0].parameters())
    assert all(map(torch.equal, weights, policy[0].parameters()))


# The evaluation's prompts, sampling, and the update.
@pytest.mark.parametrize("place", [(rehearsal, "make_sampler"), (rollout, "make_sampler"), (train_rl, "grpo_loss")])
def test_no_memory_for_the_largest_step_stops_the_run_with_advice(tmp_path, monkeypatch, place):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nsecond line")
    monkeypatch.setattr(*place, mock.Mock(side_effect=error))
    monkeypatch.setattr(plan, "_machine", lambda *_: ({}, 3 * 10**7, "a card of 0.03 GB"))
    with pytest.raises(ConfigError) as raised:
        train_rl.main(Config(**TINY, output_dir=str(tmp_path / "run"), report_to="none"))
    said = str(raised.value)
    assert "the biggest group of scenes does not fit" in said and "second line" not in said
    for words in ("what to lower", "3 completions of 6", "a card of 0.03 GB", "Tried to allocate 2 GiB"):
        assert words in said
    assert not (tmp_path / "run" / "evaluation_before.json").exists()


def test_what_torch_says_when_a_cpu_has_no_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert is_out_of_memory(raised.value)


def test_a_process_stops_when_another_has_no_memory(policy):
    with pytest.raises(ConfigError, match="another process ran out of memory"):
        rehearse(policy, train_rl.train_step, num_processes=2, reduce=lambda *_: torch.tensor(1.0))


def test_advice_is_given_where_the_plan_says_that_it_fits(policy):
    """Others may use the card, too: the run failed, whatever the plan says."""
    said = plan.advice_for(Config(**(TINY | LONG)), policy[1], load_examples("scenes", limit=1)[0], 2)
    assert "what to lower" in said and "--gradient_checkpointing true" in said


def test_a_run_has_the_same_numbers_with_and_without_the_rehearsal(tmp_path):
    rows = []
    for tried in (True, False):
        folder = tmp_path / str(tried)
        settings = TINY | {"max_steps": 2, "report_to": "none", "eval_data": None, "data": "scenes:validation"}
        train_rl.main(Config(**settings, output_dir=str(folder), try_biggest=tried))
        rows.append((folder / "samples.jsonl").read_text(encoding="utf-8"))
    assert rows[0] == rows[1]
