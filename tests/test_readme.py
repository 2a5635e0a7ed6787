"""The README keeps its word: settings as they are, files that exist."""

import re
from dataclasses import fields
from pathlib import Path

from train_rl import Config

README = Path("README.md").read_text()


def test_every_setting_is_listed_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", README, re.MULTILINE))
    for entry in fields(Config):
        value = getattr(Config(), entry.name)
        shown = rows.get(entry.name)
        if entry.name != "system_prompt":
            assert shown == ("none" if value is None else f"`{value}`"), entry.name


def test_the_files_that_are_named_exist():
    named = re.findall(r"`((?:data|configs|docs|tests)?/?[\w/]+\.(?:py|yaml|txt|png))`", README)
    named += re.findall(r"\]\((docs/[^)]+)\)", README)
    assert len(named) > 12
    for name in named:
        assert (
            Path(name).exists() or name in ("curves.png", "config.yaml", "table.txt") or name.startswith("analysis/")
        ), name


def test_every_script_is_on_the_map():
    for script in Path().glob("*.py"):
        assert f"`{script.name}`" in README, script.name
