"""A card and a report of hostile names: nothing of them becomes Markdown, HTML or code, and nothing is invisible."""

import ast
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import regex
from huggingface_hub import ModelCard

from sayo.run.card import code, python_text, visible, write_model_card
from sayo.show.report import PAGE
from sayo.show.tables import METRICS
from train_rl import Config

HOSTILE = [
    "mine\n\n# Another heading\n.jsonl",
    "mine.jsonl` <img src=x onerror=alert(1)> `",
    "``` three ```",
    "a|b|c",
    "`",
    " ",
    "",
    "[a](javascript:alert(1))",
    "</script><script>alert(1)</script>",
    'x", trust_remote_code=True, y="',
    "x'); import os; os.system('id') #",
    "back\\slash\\",
    "\n```\n\nfree text\n\n```python\n",
    "\n---\nlicense: mit\n---\n",
    "{{ card_data }} {% raw %}",
    "red\u202edet\u202c\u3164\ufe0f\U000e0041\x85\u2028",
    "红 é 🎉",
]


def text_of(span: str) -> str:
    """What CommonMark reads in a code span, which must be all of the line."""
    ticks = re.match("`+", span)[0]
    inside = span[len(ticks) : -len(ticks)]
    assert span.endswith(ticks) and ticks not in re.findall("`+", inside), span
    padded = inside[:1] == inside[-1:] == " " and inside.strip(" ")
    return inside[1:-1] if padded else inside


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_within_its_code(name):
    assert "\n" not in code(name) and text_of(code(name)).rstrip() == visible(name).rstrip()
    cell = code(name, in_table=True)
    assert not re.search(r"(?<!\\)\|", cell) and cell.replace("\\|", "|") == code(name)
    assert ast.literal_eval(python_text(name)) == name and not regex.search(r"[\p{DI}\p{Cc}]", python_text(name))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_of_hostile_names_has_the_parts_of_any_other(tmp_path, monkeypatch, name):
    """Headings, HTML, links and code of a card with plain names and of one with hostile names are as many."""
    monkeypatch.chdir(tmp_path)
    cards = []
    for given in ("plain", name.replace("/", "∕")):  # a folder's name has no slash
        folder = tmp_path / (given.strip() or "x")
        (folder / "adapter").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "skipped_updates": 0.0}) + "\n")
        columns = {"after": {metric: (0.5, 0.25, 0.75) for metric in METRICS}}
        names = dict.fromkeys(("model", "data", "eval_data", "revision", "adapter"), given)
        config = replace(Config(output_dir=str(folder), system_prompt=f"Look.\n{given}"), **names, fields=[given])
        write_model_card(folder, config, columns, 3, 20)
        cards.append((folder / "adapter/README.md").read_text(encoding="utf-8"))
        assert ModelCard.load(folder / "adapter/README.md").data.license is None
    for pattern in ("^#+ ", "^```", "^---$", r"^\| `\w+` \| ", r"^from_|^base = |^processor = "):
        plain, hostile = (len(re.findall(pattern, card, re.MULTILINE)) for card in cards)
        assert plain == hostile > 0, pattern
    (block,) = re.findall("^```python\n(.*?)^```", cards[1], re.MULTILINE | re.DOTALL)
    text = cards[1].partition("\n---\n")[2].replace(block, "")
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)|^    .*$", "", text, flags=re.MULTILINE)  # of all code
    assert not re.search(r"<\w|</|javascript:", outside) and not regex.search(r"[\p{DI}\p{Cc}--\n]", outside, regex.V1)
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    assert len(calls) == 3 and not any(word.arg == "trust_remote_code" for call in calls for word in call.keywords)


IGNORABLE = [chr(point) for point in range(0x110000) if regex.match(r"\p{Default_Ignorable_Code_Point}", chr(point))]


def test_every_ignorable_character_is_written_out_and_no_letter_is():
    assert len(IGNORABLE) > 4000
    for character in [*IGNORABLE, *map(chr, range(32)), "\x7f", "\x85", "\u2028", "\u2029", "\ufffa"]:
        assert visible(f"a{character}b") == f"a⟨U+{ord(character):04X}⟩b"
    shown = "aé红🎉\u00a0क्षि ́ ~|`"
    assert visible(shown) == shown


def test_the_report_writes_out_what_the_card_does():
    """One property of Unicode in both, so that no list can lack a character; the browser's tests show it at work."""
    script = (Path(PAGE) / "report.js").read_text(encoding="utf-8")
    (pattern,) = re.findall(r"const UNSEEN = /(.*)/gu;", script)
    unseen = regex.compile(pattern)
    for point in range(0x110000):
        character = chr(point)
        assert bool(unseen.match(character)) == (visible(character) != character and character not in "\t\n")
