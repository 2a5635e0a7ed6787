"""Settings: flags over YAML over defaults, and every problem said at once, before anything long starts."""

import subprocess
import sys
from dataclasses import fields

import pytest
import yaml

from config import ConfigError, read_config
from evaluate import EvaluateConfig
from reward import ScoreConfig
from rollout import RolloutConfig
from train_rl import Config


def test_without_arguments_everything_is_the_default():
    assert read_config(Config, []) == Config()


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1e-5\nmax_steps: 7\nattention_layers: [-1, 2]\nload_in_4bit: true\nlimit: null\n")
    for arguments in (["--config", str(path), "--max_steps", "9"], ["--max_steps=9", f"--config={path}"]):
        config = read_config(Config, arguments)
        assert (config.learning_rate, config.max_steps, config.load_in_4bit) == (1e-5, 9, True)
        assert config.attention_layers == [-1, 2] and config.limit is None
        assert config.beta == Config().beta


def test_what_a_run_saves_is_a_config_again(tmp_path):
    from dataclasses import asdict

    config = Config(attention_layers=[-1], system_prompt="Look: at 'it', -- really.\nThen answer.", adapter=None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    assert read_config(Config, ["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learningrate", "1"], ["unknown field 'learningrate'", "learning_rate"]),
        (["--max_step", "1", "--num_generation", "4"], ["max_steps", "num_generations"]),
        (["--max_steps", "many"], ["max_steps", "many"]),
        (["--num_generations", "1"], ["num_generations=1", "2 or more"]),
        (["--loss_type", "ppo"], ["loss_type='ppo'", "{grpo,bnpo,dr_grpo,dapo}"]),
        (["--top_fraction", "0", "--top_p", "2", "--temperature", "0"], ["top_fraction=0", "top_p=2", "temperature=0"]),
        (["--beta", "-1", "--limit", "0"], ["beta=-1", "limit=0"]),
        (["--format_min_tokens", "9", "--format_max_tokens", "6"], ["format_min_tokens=9", "format_max_tokens=6"]),
        (["--attention_weight", "0", "--format_weight", "0", "--accuracy_weight", "0"], ["nothing would be rewarded"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "cannot be read"]),
        (["--learning_rate", "nan", "--seed", "-1"], ["learning_rate=nan", "seed=-1"]),
        (["runs/here"], ["'runs/here'", "--name value"]),
        (["--lora_rank", "0", "--report_to", "mlflow"], ["lora_rank=0", "report_to='mlflow'", "wandb"]),
    ],
)
def test_every_problem_is_named_with_what_is_valid(arguments, words):
    with pytest.raises(ConfigError) as error:
        read_config(Config, arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_unknown_and_wrong_yaml_fields_are_named_together(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("beta: -1\nlearning_rte: 3\nnum_generations: 1\n")
    with pytest.raises(ConfigError) as error:
        read_config(Config, ["--config", str(path)])
    assert all(word in str(error.value) for word in ("beta=-1", "learning_rate?", "num_generations=1", "run.yaml"))
    path.write_text("max_steps: 1.5\n")
    with pytest.raises(ConfigError, match="max_steps"):
        read_config(Config, ["--config", str(path)])
    path.write_text("just text\n")
    with pytest.raises(ConfigError, match="one field per line"):
        read_config(Config, ["--config", str(path)])


def test_the_papers_settings_are_valid_and_its_main_model_has_no_accuracy_reward():
    config = read_config(Config, ["--config", "configs/paper.yaml", "--data", "mine.jsonl"])
    assert (config.attention_weight, config.format_weight, config.accuracy_weight) == (1.0, 1.0, 0.0)
    assert (config.num_generations, config.learning_rate, config.beta, config.top_p) == (16, 5e-6, 1e-3, 0.9)


@pytest.mark.parametrize("config_class", [Config, RolloutConfig, ScoreConfig, EvaluateConfig])
def test_every_field_has_help_and_every_default_is_valid(config_class):
    assert all(len(entry.metadata["help"]) > 10 for entry in fields(config_class))
    assert config_class().problems() == []


def test_the_fixed_field_names_are_there():
    names = """model data output_dir max_steps groups_per_step num_generations max_new_tokens temperature top_p
    learning_rate beta top_fraction attention_weight format_weight accuracy_weight lora_rank load_in_4bit save_steps
    resume seed""".split()
    assert set(names) <= {entry.name for entry in fields(Config)}


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train_rl.py", ["--num_generations", "1", "--bta", "3"], ["num_generations=1", "did you mean beta"]),
        ("train_rl.py", ["--data", "gone.jsonl", "--output_dir", "{tmp}/run"], ["gone.jsonl", "no such file"]),
        ("rollout.py", ["--model", "gone/model", "--output", "{tmp}/out.jsonl"], ["gone/model", "config.json"]),
        ("evaluate.py", ["--data", "scenes:training"], ["scenes:training", "scenes:heldout"]),
        ("reward.py", ["--rollouts", "gone.jsonl"], ["gone.jsonl", "rollout.py"]),
    ],
)
def test_a_command_with_a_problem_says_so_in_one_message_and_fails(tmp_path, script, arguments, words):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def test_help_teaches():
    result = subprocess.run([sys.executable, "train_rl.py", "--help"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0
    for words in ("--top_fraction", "most uncertain", "default: 0.3", "--config", "{grpo,bnpo,dr_grpo,dapo}"):
        assert words in " ".join(result.stdout.split())


def test_null_in_yaml_is_none_and_only_where_none_is_valid(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("eval_limit: null\nlimit:\n")
    assert read_config(Config, ["--config", str(path)]).eval_limit is None
    assert read_config(Config, ["--config", str(path), "--eval_limit", "3"]).eval_limit == 3
    path.write_text("learning_rate: null\n")
    with pytest.raises(ConfigError, match="learning_rate is null"):
        read_config(Config, ["--config", str(path)])


def test_a_tracker_that_is_not_installed_is_named_first(monkeypatch):
    monkeypatch.setattr("train_rl.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="report_to='wandb' is not installed: pip install wandb"):
        read_config(Config, ["--report_to", "wandb"])
