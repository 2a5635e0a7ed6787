"""The benchmark: every variant does the same work, and the floor is the work that is really done."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoTokenizer

from sayo.model.forward import group_logprobs
from sayo.model.loading import load_policy
from sayo.model.prompts import encode_prompt
from sayo.run.config import EMBEDDED_POLICY
from sayo.settings import ConfigError, read_config
from tools import bench, workloads
from tools.bench import BenchConfig
from tools.workloads import PROMPT_TEXT, RANK, build_model, example, multiply_adds, picture

SMALL = {"image_tokens": 16, "num_generations": 3, "max_new_tokens": 5, "hidden_size": 64, "num_layers": 2}


def test_this_project_and_trl_are_compared(tmp_path):
    flags = [f"--{name}={value}" for name, value in (SMALL | {"repeats": 1}).items()]
    output = tmp_path / "bench.json"
    command = [sys.executable, "-m", "tools.bench", *flags, "--variants", "packed", "trl", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    (point,) = json.loads(output.read_text())["points"]
    assert set(point["results"]) == {"packed", "trl"}
    for found in point["results"].values():
        assert found["seconds"]["step"] > 0 and found["peak_megabytes"] >= found["baseline_megabytes"] > 100
    parts = {"rollout: vision", "rollout: prefill", "rollout: decoding"}
    assert set(point["results"]["packed"]["seconds"]) == {"step", "rollout", "reference", "score", "update"} | parts
    words = (
        "trl / packed",
        "| floor |",
        "reference, score and update",
        "x its matrix products at this machine's speed",
    )
    assert all(part in done.stdout for part in words)
    assert (tmp_path / "bench.png").stat().st_size > 5_000
    sizes = [(name, size) for name, sizes in bench.SWEEPS.items() for size in sizes]
    points = [point | {"sweep": name, "setting": point["setting"] | {name: size}} for name, size in sizes]
    bench.plot_sweep(points, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SWEEPS", {"image_tokens": (4, 16), "num_generations": (2,), "max_new_tokens": (5,)})
    output = tmp_path / "sweep.json"
    config = BenchConfig(**SMALL, variants=["packed"], sweep=True, output=str(output))
    asked, stage = [], {"reference": 1.0, "score": 0.5, "update": 1.5}

    def measured(setting, variant, folder):
        asked.append((setting.image_tokens, setting.num_generations))
        if len(asked) == 3:
            raise KeyboardInterrupt
        tokens = setting.image_tokens + setting.num_generations * setting.max_new_tokens
        seconds = {name: value * tokens for name, value in stage.items()} | {"step": 5.0 * tokens + 1}
        memory = {"baseline_megabytes": 100, "peak_megabytes": 200}
        return {"seconds": seconds, "tokens_per_second": 1.0, "matrix_speed": 1e9} | memory

    monkeypatch.setattr(bench, "measure", measured)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)  # it would last for the tests that follow
    with pytest.raises(KeyboardInterrupt):
        bench.main(config)
    bench.main(config)
    assert asked == [(4, 3), (16, 3), (16, 2), (16, 2), (16, 3)]  # the third one was stopped, and asked again
    points = json.loads(output.read_text())["points"]
    assert [point["sweep"] for point in points] == ["image_tokens", "image_tokens", "num_generations", "max_new_tokens"]
    # The times above are a straight line, 3 s and 5 s a token.
    text = bench.linearity(points).replace("-0.00 s", "0.00 s")
    words = ("reference + score + update: 0.00 s", "3000.00 ms", "whole step: 1.00 s + 5000.00 ms")
    assert all(part in text for part in words) and text.count("R² 1.000") == 2
    other = BenchConfig(**SMALL | {"num_layers": 3}, variants=["packed"], sweep=True, output=str(output))
    assert bench.measured_before(other) == []


def test_both_layouts_are_measured_by_stage_and_the_sampling_of_several_groups(tmp_path):
    config = BenchConfig(**SMALL, repeats=1)
    build_model(config, tmp_path)
    for layout in ("packed", "padded"):
        found = workloads.measure_sayo(config, str(tmp_path), layout)
        assert len(found["steps"]) == 2
        for step in found["steps"]:
            assert step.pop("matrix_speed") > 1e8
            assert all(0 < stage <= step["step"] for stage in step.values())
    curve = workloads.measure_sampling(config, str(tmp_path))
    assert [point["groups"] for point in curve["points"]] == [1, 2, 4, 8, 16, 32]
    assert all(point["tokens_per_second"] > 0 for point in curve["points"])
    bench.plot_sampling(curve["points"], tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    probe = workloads.measure_probe(config, str(tmp_path))
    assert probe["with_probe"] / probe["without"] - 1 == probe["share"]


def test_the_floor_counts_the_multiply_adds_of_a_forward(tmp_path):
    """PyTorch's own counter of the matrix products, without attention, is the oracle."""
    config = BenchConfig(**SMALL)
    parameters = build_model(config, tmp_path)
    model, processor = load_policy(str(tmp_path), lora_rank=0, dtype="float32")
    model.requires_grad_(False)  # a frozen tower runs once
    prompt = encode_prompt(processor, example(config), system_prompt="")
    assert len(prompt.input_ids) == config.image_tokens + PROMPT_TEXT
    completions = [torch.arange(5) for _ in range(3)]
    with torch.no_grad():
        group_logprobs(model, prompt, completions)  # keeps the picture's features
        with FlopCounterMode(display=False) as counter:
            group_logprobs(model, prompt, completions)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for name, count in counts.items() if "attention" not in str(name)) / 2
    tokens = len(prompt.input_ids) + 15
    attention = 2 * (len(prompt.input_ids) ** 2 / 2 + 15 * len(prompt.input_ids) + 15 * 5 / 2) * 64 * 2
    floor = multiply_adds(config, parameters, len(prompt.input_ids))
    forward = tokens * parameters["text"] + 15 * parameters["head"]
    assert products == pytest.approx(forward, rel=0.02)
    trained, _ = load_policy(str(tmp_path), lora_rank=RANK)
    assert parameters["lora"] == sum(p.numel() for p in trained.parameters() if p.requires_grad)
    expected = 3 * tokens * (parameters["text"] + parameters["lora"]) + 4 * attention + 4 * 15 * parameters["head"]
    assert floor["reference"] + floor["score"] + floor["update"] == pytest.approx(expected, rel=1e-6)
    scoring = forward + attention + tokens * parameters["lora"]
    assert floor["score"] == floor["separate scoring"] == pytest.approx(scoring, rel=1e-6)


@pytest.mark.parametrize("image_tokens", [1, 64, 96, 1024])
def test_a_picture_becomes_so_many_tokens(image_tokens):
    image = picture(image_tokens)
    assert image.width * image.height == 32 * 32 * image_tokens
    assert image.width % 32 == image.height % 32 == 0 and image.width < 40 * image.height


def test_log_probs_of_a_large_vocabulary_stay_in_small_memory():
    """152,000 tokens x 1,760 rows in float32 are 1 GB, and a softmax with its gradient several times that."""
    code = """
import torch
from sayo.memory_plan.plan import resident
from sayo.model.forward import row_logprobs
head = torch.nn.Linear(16, 152_000, bias=False).requires_grad_(False)
hidden, ids = torch.randn(1760, 16, requires_grad=True), torch.randint(152_000, (1760,))
row_logprobs(head, hidden[:2], ids[:2], 1.0)[0].sum().backward()  # libraries that torch imports late
before = resident("VmHWM")
logps, entropies = row_logprobs(head, hidden, ids, 1.0, with_entropy=True)
logps.sum().backward()
print((resident("VmHWM") - before) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 400


@pytest.mark.parametrize("size", ["2B", "4B", "8B"])
def test_the_shapes_in_billions_are_those_of_the_checkpoints(size):
    """Their config files are what the memory plan is tested on."""
    found = workloads.model_config(BenchConfig(shape=size), AutoTokenizer.from_pretrained(EMBEDDED_POLICY))
    real = AutoConfig.from_pretrained(Path(__file__).parents[1] / "qwen3_vl" / size.lower())
    for one, other in ((found.text_config, real.text_config), (found.vision_config, real.vision_config)):
        sizes = {name: value for name, value in other.to_dict().items() if isinstance(value, int | list)}
        same = {name for name, value in sizes.items() if getattr(one, name, value) == value}
        assert sizes.keys() - same <= {"max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"}
    assert found.tie_word_embeddings == real.tie_word_embeddings


def test_launches_and_the_planned_peak_are_in_the_report(tmp_path, capsys):
    config = BenchConfig(
        **SMALL | {"image_tokens": 4, "max_new_tokens": 8}, launches=True, output=str(tmp_path / "b.json")
    )
    bench.main(config)
    said = capsys.readouterr().out
    assert "| sayo, 8 groups of 8 |" in said and "| transformers' generate, 64 rows |" in said and "| 1.00 |" in said
    counts = json.loads((tmp_path / "b.json").read_text())["launches"]
    assert sum(counts["sayo, 8 groups of 8"].values()) <= 1.05 * sum(counts["sayo, 1 group of 64"].values())
    build_model(config, tmp_path)
    assert 1e6 < bench.planned(config, tmp_path) < 1e9


def test_problems_of_the_settings():
    with pytest.raises(ConfigError) as error:
        read_config(BenchConfig, ["--variants", "packed", "verl", "--num_generations", "1", "--hidden_size", "100"])
    assert all(word in str(error.value) for word in ("verl", "num_generations=1", "hidden_size=100"))
