"""Coverage-guided fuzzing of what reads other people's files: the example loader, the settings, the answer check.

    python tests/long/fuzz.py rows --minutes 10      # load_examples on .jsonl and .json files
    python tests/long/fuzz.py config --minutes 10    # read_config on YAML files and flags
    python tests/long/fuzz.py grader --minutes 10    # is_correct on completions

Atheris (`pip install atheris`; Linux only) changes an input where that reaches new lines of code. A finding is any
exception but UserError, an input that takes more than ten seconds or 4 GB of memory, or a result that breaks what is
promised: it is printed and the command fails. It belongs into tests/examples/test_strangers.py.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

try:
    import atheris
except ImportError:
    sys.exit("fuzz.py: atheris is not installed: pip install atheris (it has builds for Linux alone)")

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ["HF_HUB_OFFLINE"] = "1"
with atheris.instrument_imports(include=["data", "sayo", "json", "yaml"]):
    import json.decoder
    import json.scanner

    import yaml

    from sayo.examples import load
    from sayo.examples.pictures import DataError
    from sayo.grader import grader
    from sayo.settings import ConfigError, read_config
import numpy as np
from PIL import Image

from data.check import CheckConfig
from evaluate import EvaluateConfig
from sayo.examples.regions import BOX_FORMATS
from train_rl import Config

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
SECONDS = 10  # that one input may take
GOOD = {"image": "a.png", "question": "What color?", "answer": "red", "boxes": [[1, 2, 30, 20]]}
KEYS = (*GOOD, "images", "choices", "polygons", "mask", "masks", "answer_type", "id", "x")
TEXTS = ["a.png", "mask.png", "gone.png", "../a.png", "/etc/hostname", "A", "red", "7", "", " ", "x" * 5000, "a\0"]
TEXTS += ["\ud800", "#", *grader.ANSWER_TYPES, "http://a.org/a.png", ".", "a.png/b", "question=query", "--model", "-1"]
TEXTS += ["~", "null"]
NUMBERS = [0, 1, -1, 5, 39.5, 40, 41, 1e308, float("nan"), float("inf"), 10**400, 2**63, 0.5, True]


def several(given, most: int, make, least: int = 0) -> list:
    return [make() for _ in range(given.ConsumeIntInRange(least, most))]


def text(given, most: int, least: int = 0) -> str:
    return given.ConsumeUnicode(given.ConsumeIntInRange(least, most))


def any_value(given: atheris.FuzzedDataProvider, depth: int = 0):
    """A JSON value, lists and objects up to four deep."""
    below, keys = partial(any_value, given, depth + 1), ["bytes", "path", "counts", "size", "x"]
    makers = [
        lambda: None,
        lambda: given.PickValueInList(NUMBERS),
        lambda: given.PickValueInList(TEXTS),
        lambda: text(given, 12),
        lambda: several(given, 5, below),
        lambda: several(given, 8, lambda: given.ConsumeIntInRange(-2, 45), least=3),
        lambda: {key: below() for key in several(given, 3, lambda: given.PickValueInList(keys))},
    ]
    return given.PickValueInList(makers if depth < 4 else makers[:4])()


def fuzz_rows(content: bytes) -> None:
    """A file as it comes, or rows that are nearly good."""
    given = atheris.FuzzedDataProvider(content[1:])
    mode, form = content[0] % 4, given.PickValueInList(list(BOX_FORMATS))
    if mode < 2:
        lines = content[1:]
    else:
        change = partial(several, given, 4, lambda: (given.PickValueInList(list(KEYS)), any_value(given)))
        rows = several(given, 3, lambda: GOOD | dict(change()), least=1)
        lines = json.dumps(rows).encode() if mode % 2 else "\n".join(map(json.dumps, rows)).encode()
    path = FOLDER / ("rows.json" if mode % 2 else "rows.jsonl")
    path.write_bytes(lines)
    renamed = [None, ["question=answer"], ["boxes=polygons"], ["image=mask", "mask=image"], ["id=x.path"]]
    fields = given.PickValueInList(renamed)
    try:
        examples = load.load_examples(str(path), bad_rows="skip", box_format=form, fields=fields)
    except DataError as error:
        assert len(str(error)) < 20_000
        str(error).encode()  # a message that cannot be printed is a finding, too
        return
    for example in examples:
        assert all(isinstance(example[name], str) and example[name].strip() for name in ("question", "answer"))
        assert all(image.mode == "RGB" for image in example["images"])
        lists = [example["boxes"]] if "image" in example else example["boxes"]
        for boxes, image in zip(lists, example["images"], strict=True):
            for x1, y1, x2, y2 in boxes:
                assert 0 <= x1 < x2 <= image.width and 0 <= y1 < y2 <= image.height
        grader.is_correct(f"<answer>{example['answer']}</answer>", example | {"answer_type": None})


def fuzz_config(content: bytes) -> None:
    """YAML as it comes, or fields that are nearly good; and flags."""
    given = atheris.FuzzedDataProvider(content[1:])
    config_class = (Config, EvaluateConfig, CheckConfig)[content[0] % 3]
    names, flags = list(config_class.__dataclass_fields__), []
    if content[0] & 64:
        written = content[1:]
    else:

        def pair():
            return given.PickValueInList(names), any_value(given)

        written = yaml.safe_dump(dict(several(given, 4, pair))).encode()
        for name, value in several(given, 2, pair):
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    path = FOLDER / "run.yaml"
    path.write_bytes(written)
    try:
        found = read_config(config_class, ["--config", str(path), *flags])
    except ConfigError as error:
        assert len(str(error)) < 50_000
        str(error).encode()
        return
    path.write_text(yaml.safe_dump(asdict(found)), encoding="utf-8")
    assert read_config(config_class, ["--config", str(path)]) == found


def fuzz_grader(content: bytes) -> None:
    """A completion, and an example of any kind but math, which has a process and a clock of its own."""
    given = atheris.FuzzedDataProvider(content[1:])
    gold = text(given, 30, least=1) if content[0] & 1 else given.PickValueInList(TEXTS[5:10])
    row = {"answer": gold}
    if content[0] & 2:
        row["choices"] = several(given, 5, lambda: text(given, 12), least=1)
    else:
        row["answer_type"] = given.PickValueInList([None, *(kind for kind in grader.ANSWER_TYPES if kind != "math")])
    said = given.ConsumeUnicode(2000)
    completion = said if content[0] & 4 else f"I look. <answer>{said}</answer>"
    verdict = grader.is_correct(completion, row)
    grader.answer_problem(gold, row.get("answer_type"), row.get("choices"))
    assert isinstance(verdict, bool)
    behind = completion.rpartition("</think>")[2]
    if behind.count("<answer>") != 1 or behind.count("</answer>") != 1:
        assert not verdict
    if verdict:  # blanks around an answer, and reasoning before it, change nothing
        spaced = completion.replace("<answer>", "<answer> ").replace("</answer>", "\n</answer>")
        assert grader.is_correct(f"Well. {spaced}", row)


MASKED = GOOD | {"mask": "mask.png", "polygons": [[1, 2, 9, 2, 9, 9]]}
MATH = GOOD | {"choices": ["red", "blue"], "answer_type": "math", "images": None}
SEEDS = {
    "rows": [
        f"\x00{json.dumps(GOOD)}\n{json.dumps(MASKED)}".encode(),
        f"\x01[{json.dumps(MATH)}]".encode(),
        b"\x02" + bytes(range(200)),
        b"\x03" + bytes(range(0, 250, 3)),
    ],
    "config": [
        b"\x40max_steps: 7\nattention_layers: [-1, 2]\nfields: [question=query]\nlimit: null\nload_in_4bit: true\n",
        b"\x41benchmarks: [vstar]\nmodel: 'a/b'\nbeta: 1e-3 # c\nsystem_prompt: |\n  Look.\n  Then answer.\n",
        b"\x00" + bytes(range(200)),
        b"\x02? a\n: &x {b: *x, <<: [c]}\n--- !!int 3",
    ],
    "grader": [
        bytes([flags]) + text.encode()
        for flags in range(8)
        for text in ("red\0red", "$1,200.50 million", "\\boxed{**B**}", "(A) red", "[1, 2; 3 and 4]", "5.0e-3 cm^2 / 4")
    ],
}
TARGETS = {"rows": fuzz_rows, "config": fuzz_config, "grader": fuzz_grader}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=tuple(TARGETS))
    parser.add_argument("--minutes", type=float, default=5, help="how long (default: 5)")
    parser.add_argument("--input", help="file of a finding: run it alone")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(FOLDER / "a.png")
    Image.fromarray(noise[..., 0] & 128).save(FOLDER / "mask.png")
    os.chdir(FOLDER)  # relative paths of findings lead nowhere else
    sys.stderr = open(os.devnull, "w")  # the loader says how many rows it skipped

    def one(content: bytes) -> None:
        began = time.process_time()
        try:
            TARGETS[arguments.target](content or b"\0")
        except BaseException:
            print(f"finding: {content!r}", flush=True)
            raise
        if time.process_time() - began > SECONDS:
            print(f"slow: {content!r}", flush=True)
            raise RuntimeError(f"more than {SECONDS} s")

    if arguments.input:
        one(Path(arguments.input).read_bytes())
        return
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[arguments.target]):
        (corpus / str(number)).write_bytes(seed)
    words = [*KEYS, *Config.__dataclass_fields__, *EvaluateConfig.__dataclass_fields__, "<answer>", "</answer>"]
    words += ["boxed", "true", "null", "NaN", "1e999", "[[", "]]", ": ", "- ", "? ", "&a ", "*a", "!!int ", "--- ", "|"]
    (FOLDER / "words").write_text("".join(f'"{word}"\n' for word in dict.fromkeys(words)))
    options = [f"-max_total_time={int(60 * arguments.minutes)}", "-rss_limit_mb=4096", f"-timeout={3 * SECONDS}"]
    options += [f"-seed={arguments.seed + 1}", "-max_len=2000", "-print_final_stats=1"]
    options += [f"-dict={FOLDER}/words", f"-artifact_prefix={FOLDER}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
