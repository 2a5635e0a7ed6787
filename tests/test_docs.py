"""README.md and docs/ match the code: every setting is listed, paths and links exist, commands parse."""

import ast
import builtins
import re
import shlex
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import train_rl
from evaluate import EvaluateConfig
from reward import RewardConfig, ScoreConfig
from rollout import RolloutConfig
from sayo.extensions.attention_regions import RegionsConfig
from sayo.run.config import PolicyConfig, SamplingConfig
from sayo.run.folder import Run
from sayo.settings import _parser
from train_rl import Config, TrainState
from visualize import VisualizeConfig

ROOT = Path(__file__).parents[1]
SETTINGS = ROOT / "docs/settings.md"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
GROUPS = {"Policy and data": PolicyConfig, "Sampling": SamplingConfig, "Rewards": RewardConfig}
GROUPS |= {"Regions": RegionsConfig, "Training": Config}
SCRIPTS = {"evaluate.py": EvaluateConfig, "visualize.py": VisualizeConfig}
SCRIPTS |= {"rollout.py": RolloutConfig, "reward.py": ScoreConfig}
WRITTEN = "<!-- written by pytest tests/test_docs.py from the config classes -->\n\n"


# --- settings.md -------------------------------------------------------------------------------------------------


def settings_page() -> str:
    """docs/settings.md below its introduction: a table for each group of Config's fields, then one for each script."""
    groups, seen = {}, set()
    for title, declared_in in reversed(GROUPS.items()):
        groups[title] = [entry for entry in fields(Config) if entry.name in declared_in.__annotations__]
    for title in GROUPS:  # a field that two classes declare is listed once, with the help that applies
        groups[title] = [entry for entry in groups[title] if entry.name not in seen]
        seen |= {entry.name for entry in groups[title]}
    tables = [table(title, groups[title]) for title in GROUPS]
    for script, config in SCRIPTS.items():
        tables.append(table(f"`{script}`", [entry for entry in fields(config) if entry.name in config.__annotations__]))
    return "\n".join(tables)


def table(title: str, entries: list) -> str:
    rows = [f"## {title}\n", "| flag | default | what it does |", "|---|---|---|"]
    for entry in entries:
        value = entry.default if entry.default_factory is MISSING else " ".join(map(str, entry.default_factory()))
        value = str(value).lower() if isinstance(value, bool) else value
        shown = "none" if value in (None, "") else f"`{value}`"
        if entry.name == "system_prompt":
            shown = "`SYSTEM_PROMPT` of `sayo/model/prompts.py`"
        text = entry.metadata["help"].replace("|", r"\|").replace("<", r"\<")
        if choices := "`, `".join(entry.metadata["choices"] or ()):
            text += f" One of `{choices}`."
        names = "`, `".join([entry.name, *(alias.lstrip("-") for alias in entry.metadata["aliases"])])
        rows.append(f"| `{names}` | {shown} | {text} |")
    return "\n".join(rows) + "\n"


def test_every_setting_is_listed_with_its_default():
    """The page is written from the dataclasses, so a new flag only needs this test to run."""
    page, (introduction, mark, before) = settings_page(), PAGES["settings.md"].partition(WRITTEN)
    assert mark
    if before != page:
        SETTINGS.write_text(introduction + mark + page, encoding="utf-8")
    training, _, rest = page.partition("## `evaluate.py`")
    assert sorted(re.findall(r"^\| `(\w+)`", training, re.MULTILINE)) == sorted(entry.name for entry in fields(Config))
    for script, config in SCRIPTS.items():
        section = page.partition(f"## `{script}`\n")[2].partition("\n## ")[0]
        assert set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == set(config.__annotations__), script
    assert "| `beta` | `0.001` |" in training and "| `kl_target` | none |" in training
    assert "[settings.md](docs/settings.md)" in PAGES["README.md"]


# --- paths and links ---------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_that_a_page_names_exist(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = folder / path if path else folder / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
    spans = " ".join(re.findall(r"`([^`]+)`", re.sub(r"^```\w*$", "", PAGES[page], flags=re.MULTILINE)))
    named = r"(?<![\w./])(?:(?:sayo|tools|configs|docs|tests)/[\w./-]*\w|data/\w[\w/]*\.py|\w+\.(?:py|ipynb))"
    for name in re.findall(named, spans):
        assert (ROOT / name).exists() or re.search("[A-Z]{4}", name), name  # capitals: a placeholder


def test_the_files_of_the_readme_exist():
    tree = PAGES["README.md"].partition("## Files\n\n```\n")[2].partition("```")[0].splitlines()
    assert len(tree) > 15
    for line in tree:
        name = line.split()[0]
        assert (ROOT / name if line[0] != " " else ROOT / "sayo" / name).exists(), line


def test_the_loop_of_the_readme_calls_what_train_rl_has():
    (loop,) = re.findall(r"^```python\n(for step.*?)^```", PAGES["README.md"], re.MULTILINE | re.DOTALL)
    owners = {"run": Run, "state": TrainState}
    for call in (node.func for node in ast.walk(ast.parse(loop)) if isinstance(node, ast.Call)):
        if isinstance(call, ast.Name):
            assert hasattr(train_rl, call.id) or hasattr(builtins, call.id), call.id
        elif isinstance(call.value, ast.Name) and call.value.id in owners:
            assert hasattr(owners[call.value.id], call.attr), call.attr


# --- commands ----------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Every `python`, `accelerate launch` and `pytest` command of the pages, in code blocks and in code spans."""
    found = []
    for text in PAGES.values():
        blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for block in blocks:
            lines = block.replace("\\\n", " ").replace("&&", "\n").splitlines()
            found += [" ".join(shlex.split(line, comments=True)) for line in lines]
        spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        found += [" ".join(span.split()) for span in spans]
    pattern = re.compile(r"(?:\w+=\d+ )*((?:python3? (?!-m venv)|accelerate launch(?=.*\.py)|pytest )(?!.*\.\.\.).+)")
    return sorted({match[1] for match in map(pattern.fullmatch, found) if match})


@cache
def config_class(module: str):
    """The config that a script reads, or None where it has a parser of its own."""
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    name = re.search(r"run_command\((\w+), main\)", source)
    return getattr(import_module(module), name[1]) if name else None


@pytest.mark.parametrize("command", commands())
def test_a_command_that_is_shown_parses(command):
    program, *words = shlex.split(command)
    if program == "pytest":
        files = [ROOT / word.rstrip(":") for word in words if word.startswith("tests/")]
        assert all(file.is_file() for file in files)
        wanted = words[words.index("-k") + 1] if "-k" in words else ""
        assert not wanted or any(wanted in file.read_text(encoding="utf-8") for file in files)
        return
    if program == "accelerate":
        launch = launch_command_parser().parse_args(words[1:])
        words = [launch.training_script, *launch.training_script_args]
    module, *flags = words[1:] if words[0] == "-m" else [words[0].removesuffix(".py").replace("/", "."), *words[1:]]
    config = config_class(module)
    if not config:  # a parser of its own
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert all(f'"{flag}"' in source for flag in flags if flag.startswith("--"))
        return
    if module == "data.check" and not flags[0].startswith("-"):
        flags.insert(0, "--data")
    parser = _parser(config)
    parser.add_argument("--config", default="")
    values, unknown = parser.parse_known_args(flags)
    assert not unknown
    assert not values.config.startswith("configs/") or (ROOT / values.config).exists() or "NAME" in values.config
