"""Settings: flags over YAML over defaults, and every problem reported at once, before anything long starts."""

import json
import subprocess
import sys
from dataclasses import MISSING, asdict, field, fields, make_dataclass
from typing import get_type_hints

import pytest
import yaml

from data.check import CheckConfig
from evaluate import EvaluateConfig
from reward import COMPONENTS, ScoreConfig
from rollout import RolloutConfig
from sayo.settings import ConfigError, read_config
from train_rl import Config
from visualize import VisualizeConfig


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-5\nmax_steps: 7\nattention_layers: [-1, 2]\nresume: true\neval_limit: null\n")
    expected = Config(learning_rate=1e-5, max_steps=9, attention_layers=[-1, 2], resume=True, eval_limit=None)
    for arguments in (["--config", str(path), "--max_steps", "9"], ["--max_steps=9", f"--config={path}"]):
        assert read_config(Config, arguments) == expected
    assert read_config(Config, [f"--config={path}", "--eval_limit", "3"]).eval_limit == 3
    assert read_config(Config, []) == Config()


@pytest.mark.parametrize(
    ("flags", "name", "expected", "reason"),
    [
        ("--fields id=a --fields answer=b", "fields", ["id=a", "answer=b"], "the last was all of it"),
        ("--fields id=a image=c --fields=answer=b", "fields", ["id=a", "image=c", "answer=b"], "in either form"),
        ("--fields id=a", "fields", ["id=a"], "over the file's list, which is not part of it"),
        ("", "fields", ["question=q"], "the file's"),
        ("--attention_layers 0 --attention_layers 1 -1", "attention_layers", [0, 1, -1], "without the default"),
        ("", "attention_layers", [-1], "the default, which no call before has changed"),
        ("--seed 1 --seed 2", "seed", 2, "of two single values the last wins, as everywhere"),
    ],
)
def test_a_list_in_several_flags_is_all_of_them(tmp_path, flags, name, expected, reason):
    (tmp_path / "run.yaml").write_text("fields: [question=q]\n")
    config = read_config(Config, [f"--config={tmp_path}/run.yaml", *flags.split()])
    assert getattr(config, name) == expected, reason


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize(
    ("config_class", "name", "value", "expected"),
    [
        (Config, "output_dir", "~/run", "{home}/run"),
        (Config, "model", "~/m", "{home}/m"),
        (Config, "output_dir", "~", "{home}"),
        (Config, "allowed_folders", ["~", "{tmp}"], ["{home}", "{tmp}"]),
        (RolloutConfig, "output", "~/x.jsonl", "{home}/x.jsonl"),
        (EvaluateConfig, "json", "~/x.json", "{home}/x.json"),
        (VisualizeConfig, "plots", "~/plots", "{home}/plots"),
        (CheckConfig, "sheet", "~/sheet.png", "{home}/sheet.png"),
        (Config, "output_dir", "a/~/run", "a/~/run"),
        (Config, "output_dir", "~nobody-of-this-name/run", "~nobody-of-this-name/run"),
        (Config, "system_prompt", "~ look", "~ look"),
    ],
)
def test_a_tilde_in_front_is_the_home_of_the_user(tmp_path, monkeypatch, by_file, config_class, name, value, expected):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))

    def filled(text):
        return [filled(part) for part in text] if isinstance(text, list) else text.format(home=home, tmp=tmp_path)

    (tmp_path / "run.yaml").write_text(json.dumps({name: filled(value)}))  # which is YAML, too; a bare ~ is null there
    flags = [f"--{name}", *filled(value)] if isinstance(value, list) else [f"--{name}={value}"]
    config = read_config(config_class, [f"--config={tmp_path}/run.yaml"] if by_file else flags)
    assert getattr(config, name) == filled(expected)


def test_what_a_run_saves_is_a_config_again(tmp_path):
    config = Config(attention_layers=[-1], system_prompt="Look: at 'it', -- really.\nThen answer.", adapter=None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    assert read_config(Config, ["--config", str(tmp_path / "config.yaml")]) == config


WEIGHTS = [f"{name}_weight" for name in COMPONENTS]
REFUSED = [
    (Config, "--learningrate 1", "unknown field 'learningrate'|learning_rate"),
    (Config, "--max_step 1 --num_generation 4", "max_steps|num_generations"),
    (Config, "--max_steps many", "max_steps|many"),
    (Config, "--num_generations 1", "num_generations=1|2 or more"),
    (Config, "--loss_type ppo", "loss_type='ppo'|{grpo,bnpo,dr_grpo,dapo,cispo,sapo}"),
    (Config, "--optimizer sgd", "optimizer='sgd'|{adamw,paged_adamw_8bit}"),
    (Config, "--top_fraction 0 --top_p 2 --temperature 0", "top_fraction=0|top_p=2|temperature=0"),
    (Config, "--beta -1 --limit 0", "beta=-1|limit=0"),
    (Config, "--min_new_tokens -1", "min_new_tokens=-1"),
    (RolloutConfig, "--min_new_tokens 9 --max_new_tokens 8", "min_new_tokens=9|max_new_tokens|8"),
    (Config, "--format_min_tokens 9 --format_max_tokens 6", "format_min_tokens=9|format_max_tokens=6"),
    (Config, " ".join(f"--{name} 0" for name in WEIGHTS), ", ".join(WEIGHTS) + "|nothing would be rewarded"),
    (Config, "--attention_tokens all --region_weight -1", "attention_tokens='all'|region_weight=-1"),
    (Config, "--ease_weight 1 --num_iterations 2", "num_iterations=2: give 1"),
    (Config, "--kl_target 0.05 --beta 0", "kl_target=0.05|give a beta above 0"),
    (Config, "--config nowhere.yaml", "nowhere.yaml|cannot be read"),
    (Config, "--learning_rate nan --seed -1", "learning_rate=nan|seed=-1"),
    (Config, "runs/here", "'runs/here'|--name value"),
    (Config, "--lora_rank 0 --report_to mlflow", "lora_rank=0|report_to='mlflow'|wandb"),
    (ScoreConfig, "--rollouts {tmp}/a.jsonl --output {tmp}/./a.jsonl", "is what is read"),
    (EvaluateConfig, "--json {tmp}/gone/x.json", "json="),
    (EvaluateConfig, "--json {tmp}", "json="),
    (EvaluateConfig, "--benchmarks vsstar", "benchmarks='vsstar': did you mean vstar?"),
    (EvaluateConfig, "--benchmarks docvqa2", "valid: all, mme_realworld_lite, m3cot"),
    (EvaluateConfig, "--benchmark_root {tmp}", "add --benchmarks all"),
    (EvaluateConfig, "--benchmarks mmstar --benchmark_root {tmp}", "no mmstar or MMStar in"),
    (EvaluateConfig, "--benchmarks vstar --data mine.jsonl", "beside benchmarks"),
    (EvaluateConfig, "--benchmarks vsstar mmstar --benchmark_root /gone", "mean vstar?|root='/gone': give a folder"),
    (EvaluateConfig, "--output_dir {tmp}/file", "is no folder that can be written to"),
    (Config, "beta: -1\nlearning_rte: 3\nnum_generations: 1\n", "beta=-1|learning_rate?|num_generations=1|run.yaml"),
    (Config, "max_steps: 1.5\n", "max_steps"),
    (Config, "just text\n", "one field per line"),
    (Config, "learning_rate: null\n", "learning_rate is null"),
]


@pytest.mark.parametrize(("config_class", "flags", "words"), REFUSED)
def test_every_problem_is_named_with_what_is_valid(tmp_path, config_class, flags, words):
    (tmp_path / "file").write_text("")
    if flags.endswith("\n"):  # a YAML file
        (tmp_path / "run.yaml").write_text(flags)
        flags = "--config {tmp}/run.yaml"
    with pytest.raises(ConfigError) as error:
        read_config(config_class, flags.format(tmp=tmp_path).split())
    assert all(word in str(error.value) for word in words.split("|")), str(error.value)


def test_the_papers_settings_are_valid_and_its_main_model_has_no_accuracy_reward():
    config = read_config(Config, ["--config", "configs/paper.yaml", "--data", "mine.jsonl"])
    assert (config.attention_weight, config.format_weight, config.accuracy_weight) == (1.0, 1.0, 0.0)
    assert (config.num_generations, config.learning_rate, config.beta, config.top_p) == (16, 5e-6, 1e-3, 0.9)
    off = "attention_gate attention_normalized border_mask region_weight memory_weight ease_weight".split()
    for one in (config, Config()):
        assert not any(getattr(one, name) for name in off) and one.attention_tokens == "uncertain"


@pytest.mark.parametrize("config_class", [Config, RolloutConfig, ScoreConfig, EvaluateConfig])
def test_every_field_has_help_a_valid_default_and_bounds_that_hold(config_class):
    assert all(len(entry.metadata["help"]) > 10 for entry in fields(config_class))
    assert config_class().problems() == []
    for entry in fields(config_class):
        bounds, kind = entry.metadata["bounds"], float if "float" in str(entry.type) else int
        outside = {name: kind(bounds[name]) for name in bounds.keys() & {"at_least", "above", "at_most"}}
        for name, value in outside.items():
            value += {"at_least": -1, "above": 0, "at_most": 1}[name]
            assert f"{entry.name}={value}: give" in "\n".join(config_class(**{entry.name: value}).problems())


def test_the_fixed_field_names_are_there():
    names = """model data output_dir max_steps groups_per_step num_generations max_new_tokens temperature top_p
    learning_rate beta top_fraction attention_weight format_weight accuracy_weight lora_rank load_in_4bit save_steps
    resume seed""".split()
    assert set(names) <= {entry.name for entry in fields(Config)}


COMMANDS = [
    ("train_rl.py --num_generations 1 --bta 3", "num_generations=1|did you mean beta"),
    ("train_rl.py --data gone.jsonl --output_dir {tmp}/run", "gone.jsonl|no such file"),
    ("rollout.py --model gone/model --output {tmp}/out.jsonl", "gone/model|config.json"),
    ("evaluate.py --data scenes:training", "scenes:training|scenes:heldout"),
    ("reward.py --rollouts gone.jsonl", "gone.jsonl|rollout.py"),
]


@pytest.mark.parametrize(("command", "words"), COMMANDS)
def test_a_command_with_a_problem_fails_with_one_message(tmp_path, command, words):
    command = [sys.executable, *command.format(tmp=tmp_path).split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words.split("|")), result.stderr


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        read_config(Config, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0
    for words in (
        "--top_fraction",
        "most uncertain",
        "default: 0.3",
        "--config",
        "{grpo,bnpo,dr_grpo,dapo,cispo,sapo}",
    ):
        assert words in shown


def test_a_tracker_that_is_not_installed_is_named_first(monkeypatch):
    monkeypatch.setattr("train_rl.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to='wandb' is not installed: pip install wandb"):
        read_config(Config, ["--report_to", "wandb"])


@pytest.mark.parametrize("config_class", [Config, RolloutConfig, ScoreConfig, EvaluateConfig])
def test_flags_are_read_as_by_transformers_own_parser(config_class):
    """HfArgumentParser is the oracle; importing it costs a third of what torch does, before --help is printed."""
    from transformers import HfArgumentParser

    given = ["--limit", "3", "--load_in_4bit", "--seed=7", "--max-pixels", "9", "--fields", "id=a", "answer=b.c"]
    if config_class is Config:
        given += ["--no_try_biggest", "--resume", "f", "--attention_layers", "-1", "2", "--beta", "0", "--adapter=-x"]
        given += ["--lora_rank", "2", "--lora_alpha", "4", "--lora_targets", "all-linear"]  # else filled in
        given += ["--clip_low", "0.1", "--clip_high", "0.3"]
    kinds, plain = get_type_hints(config_class), []
    for entry in fields(config_class):  # without the bounds, which argparse does not know
        name = "default_factory" if entry.default is MISSING else "default"
        plain.append((entry.name, kinds[entry.name], field(**{name: getattr(entry, name)})))
    (expected,) = HfArgumentParser(make_dataclass("Plain", plain)).parse_args_into_dataclasses(given)
    assert asdict(read_config(config_class, given)) == asdict(expected) != asdict(config_class())
