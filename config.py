"""Settings: the fields that the scripts share, and reading them from flags and YAML with every problem said at once."""

import difflib
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from data.examples import DataError
from data.regions import BOX_FORMATS
from data.rows import parse_fields
from families import PolicyError
from prompts import SYSTEM_PROMPT

DTYPES = ("auto", "float32", "bfloat16", "float16")
# A zero ends every file name, and half of a character (JSON, YAML and odd file names can have one) cannot be written.
UNWRITABLE = re.compile("[\0\ud800-\udfff]")
LARGEST_FILE, MAX_DEPTH = 2**16, 20  # of a YAML file: bytes, and lists and mappings within each other
FIRST_PROCESS_SPEAKS = 5.0  # seconds that other processes wait before they tell of a problem
MAX_LISTED = 20  # unknown fields named in one error message
EMBEDDED_POLICY = str(Path(__file__).parent / "data" / "tiny_policy")


class ConfigError(ValueError):
    """Settings that cannot work. The message names every one of them, what is valid, and the fix."""


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field with its help text and, if given, its valid values."""
    metadata = {"help": help}
    if choices:
        # argparse would stop at the first value that is not among its choices; problems() says all of them.
        metadata["metavar"] = "{" + ",".join(choices) + "}"
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class PolicyConfig:
    """Which policy, on which data: the fields that every script has."""

    model: str = option("data/tiny_policy", "Policy: a local folder or a Hub id such as Qwen/Qwen3-VL-4B-Instruct.")
    revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    adapter: str | None = option(None, "Folder or Hub id (or owner/name@revision) of a LoRA adapter to start from.")
    load_in_4bit: bool = option(False, "Load the language model in 4 bits (NF4, bitsandbytes).")
    dtype: str = option("auto", "Number format of the weights; auto takes the checkpoint's own.", DTYPES)
    max_pixels: int | None = option(
        None,
        "Shrink pictures to about this many pixels (area); a thumbnail comes on top.",
    )
    system_prompt: str = option(SYSTEM_PROMPT, "Text of the system turn; an empty one leaves the turn out.")
    data: str = option(
        "scenes",
        "Examples: .jsonl, .json, .parquet, datasets folder, Hub id (or owner/name@revision), scenes, scenes:heldout.",
    )
    split: str = option("train", "Split of a datasets folder or a Hub dataset.")
    limit: int | None = option(None, "Use only the first so many examples.")
    bad_rows: str = option("error", "What to do about examples that cannot be used.", ("error", "skip"))
    box_format: str = option("xyxy", "How boxes are written; polygons are in the same unit.", BOX_FORMATS)
    allowed_folders: list[str] | None = option(
        None, "Folders beside that of the data that its pictures and masks may lie in; / allows all."
    )
    fields: list[str] | None = option(None, "Columns of other names, as name=column: question=query answer=label.text.")
    sampling_tokens: int = option(8192, "Sample as many groups side by side as have this many tokens at full length.")
    seed: int = option(0, "Seed of everything random.")

    def policy_arguments(self, lora_rank: int) -> dict:
        """Keyword arguments for vlm.load_policy."""
        model = EMBEDDED_POLICY if Path(self.model) == Path("data/tiny_policy") else self.model
        names = ("revision", "adapter", "load_in_4bit", "dtype", "max_pixels")
        return {"model": model, "lora_rank": lora_rank} | {name: getattr(self, name) for name in names}

    def data_arguments(self) -> dict:
        """Keyword arguments for data.examples.load_examples."""
        names = ("split", "limit", "bad_rows", "box_format", "fields", "allowed_folders")
        return {name: getattr(self, name) for name in names}

    def problems(self) -> list[str]:
        """What is wrong, one sentence each. Subclasses add theirs."""
        found = []
        for entry in fields(self):
            value, valid = getattr(self, entry.name), entry.metadata.get("metavar")
            if valid and value not in valid.strip("{}").split(","):
                found.append(f"{entry.name}={value!r}: valid are {valid}")
            if isinstance(value, float) and not math.isfinite(value):
                found.append(f"{entry.name}={value}: give a finite number")
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and UNWRITABLE.search(text):
                    found.append(f"{entry.name}={text!r:.200}: leave out the zero, or the half of a character, in it")
                elif isinstance(text, str) and entry.name != "system_prompt" and is_too_long(text):
                    found.append(f"{entry.name}={text!r:.200}: no file has so long a name")
        if not 0 <= self.seed < 2**32:
            found.append(f"seed={self.seed}: give 0 to {2**32 - 1}")
        found += at_least(self, 1, "limit", "max_pixels", "sampling_tokens")
        found += [
            f"allowed_folders={folder!r:.200}: there is no such folder"
            for folder in self.allowed_folders or ()
            if not os.path.isdir(os.path.expanduser(folder))
        ]
        found += [f"fields: {problem}" for problem in parse_fields(self.fields or [])[1]]
        return found


@dataclass
class SamplingConfig:
    """How completions are drawn."""

    num_generations: int = option(8, "Completions per prompt (the group size G).")
    max_new_tokens: int = option(64, "Longest completion in tokens.")
    temperature: float = option(1.0, "Sampling temperature; entropies and log-probs are taken at the same one.")
    top_p: float = option(0.9, "Sample from the smallest set of tokens with this much probability; 1 is all.")

    def problems(self) -> list[str]:
        found = at_least(self, 1, "num_generations", "max_new_tokens") + super().problems()
        if self.temperature <= 0:
            found.append(f"temperature={self.temperature}: give more than 0 (1.0 samples from the policy itself)")
        if not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p}: give more than 0, at most 1")
        return found


def is_too_long(name: str) -> bool:
    """Whether no file can have this name: systems raise an error of their own for that, wherever it is looked for."""
    return len(name) > 1000 or any(len(part.encode(errors="replace")) > 255 for part in name.split("/"))


def writable(config, *names: str, suffixes: tuple = ()) -> list[str]:
    """A sentence for every named field that is no file that could be written; None passes."""
    found = []
    for name in names:
        value = getattr(config, name)
        if value is None:
            continue
        path = Path(value)
        existing = next(parent for parent in path.absolute().parents if os.path.exists(parent))
        if os.path.isdir(path) or not existing.is_dir() or not os.access(existing, os.W_OK):
            found.append(f"{name}={value!r}: give the name of a file in a folder that can be written to")
        elif suffixes and path.suffix.lower() not in suffixes:
            found.append(f"{name}={value!r}: give a name that ends in {' or '.join(suffixes)}")
    return found


def read_jsonl(path: Path) -> list[tuple[str, dict]]:
    """(line, object) of every line. A last one that is cut off was being written when a run stopped: it is left out.

    Raises:
        ConfigError: the file is no text, or a line is not one JSON object.
    """
    content = Path(path).read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # which is a last line cut off within a character
            raise ConfigError(f"{str(path)!r} is not a text file: {error}") from error
        text = content[: error.start].decode("utf-8")
    lines = text.replace("\r\n", "\n").split("\n")  # not splitlines: texts may hold other line breaks
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ConfigError(
                f"{str(path)!r}, line {number} is not JSON: {error}; give a file of JSON lines"
            ) from error
        if row is not None and not isinstance(row, dict):
            raise ConfigError(f"{str(path)!r}, line {number} is not a JSON object: {line[:60]!r}")
        if row is not None:
            rows.append((line, row))
    return rows


def at_least(config, lowest: float, *names: str) -> list[str]:
    """A sentence for every named field that is below `lowest`; None passes."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{name}={value}: give {lowest} or more"
        for name, value in values.items()
        if value is not None and value < lowest
    ]


def read_config(config_class: type, arguments: list[str]):
    """A checked config from command-line arguments.

    `--config FILE.yaml` may hold any field; a flag given beside it wins. YAML values take the same way as flags, so
    they meet the same type checks.

    Raises:
        ConfigError: unknown fields, values of the wrong type, and everything that the class's problems() finds.
    """
    parser = HfArgumentParser(config_class, prog=Path(sys.argv[0]).name, allow_abbrev=False)
    parser.description = config_class.__doc__
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of fields; flags given beside it win.")
    valid = [entry.name for entry in fields(config_class)]
    found: list[str] = []

    def complain(message: str):
        raise ConfigError(f"{message}\nsee {parser.prog} --help")

    parser.error = complain
    pairs, rest = parser.parse_known_args(arguments)
    if pairs.config is not None:
        from_file, nulls = _yaml_arguments(Path(pairs.config), config_class, found)
        may_be_none = {name for name, kind in get_type_hints(config_class).items() if type(None) in get_args(kind)}
        found += [f"{name} is null: give a value" for name in nulls if name not in may_be_none]
        parser.set_defaults(**dict.fromkeys(may_be_none.intersection(nulls)))
        # In front of the flags, so that a flag comes last and wins.
        pairs, rest = parser.parse_known_args(from_file + arguments)
    del pairs.config
    for argument in rest:
        if argument.startswith("--"):
            found.append(_unknown(argument[2:].split("=")[0], valid))
        elif not any(entry.startswith("--") for entry in rest):
            found.append(f"{argument!r} belongs to no field: fields are given as --name value")
    config = config_class(**{name: value for name, value in vars(pairs).items() if name in valid})
    found += config.problems()
    if found:
        raise ConfigError("\n".join(dict.fromkeys(found)))
    return config


def stored_config(path: Path, config_class: type):
    """The config that a former run wrote to a YAML file; fields that are new since then have their default.

    Only its types are checked: what it names (folders, packages) may be gone by now.

    Raises:
        ConfigError: the file cannot be read, or does not hold fields of this class.
    """
    found: list[str] = []
    arguments, nulls = _yaml_arguments(path, config_class, found)
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    parser.error = found.append
    values = vars(parser.parse_known_args(arguments)[0]) if not found else {}
    if found:
        raise ConfigError(f"{str(path)!r} cannot be what a run wrote: " + "; ".join(found))
    return config_class(**(values | dict.fromkeys(nulls)))


class _FieldLoader(yaml.SafeLoader):
    """YAML whose values stay the texts that they are written as, as flags are; only null is told apart.

    So 007, 12:30 and no are not turned into 7, 750 and False on their way to a field of type text. What a few bytes
    could blow up to gigabytes (aliases of aliases), and what nests without end, is refused.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    depth = 0

    def compose_node(self, parent, index):
        event, problem = self.peek_event(), None
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not read"
        elif event.tag is not None:
            problem = f"tags ({event.tag:.60}) are not read"
        elif self.depth >= MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} deep"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, count in names.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name!r:.60} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _yaml_arguments(path: Path, config_class: type, found: list[str]) -> tuple[list[str], list[str]]:
    """The fields of a YAML file as flags, and the names of those that are null; what is wrong goes to `found`."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        settings = yaml.load(content.decode("utf-8-sig"), _FieldLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a zero in the path
        raise ConfigError(f"config={str(path)!r:.200} cannot be read as YAML: {error}") from error
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"config={str(path)!r:.200} has more than {LARGEST_FILE} bytes: give a file of fields")
    if not isinstance(settings, dict):
        raise ConfigError(f"config={str(path)!r:.200}: give one field per line, such as `max_steps: 100`")
    kinds, arguments = get_type_hints(config_class), []
    unknown = [str(name) for name in settings if name not in kinds]
    found += [f"{path.name}: {_unknown(name, list(kinds))}" for name in unknown[:MAX_LISTED]]
    found += [f"{path.name}: and {len(unknown) - MAX_LISTED} more unknown fields"] if len(unknown) > MAX_LISTED else []
    for name, value in settings.items():
        takes_list = "list" in str(kinds.get(name))
        if name not in kinds or value is None:
            continue
        if isinstance(value, list) and takes_list and value and all(isinstance(entry, str) for entry in value):
            # "=" would carry one value alone. One that begins with a dash and is no number could only be a flag.
            dashed = [entry for entry in value if entry.startswith("-") and not re.fullmatch(r"-[0-9]+", entry)]
            found += [f"{name}: {entry!r:.200} begins with a dash: leave it out" for entry in dashed]
            arguments += [] if dashed else [f"--{name}", *value]
        elif isinstance(value, str):
            # "=" also carries values that begin with a dash, such as attention_layers: -1.
            arguments.append(f"--{name}={value}")
        else:
            found.append(f"{name}: {value!r:.200} cannot be: give {'a list, [a, b]' if takes_list else 'one value'}")
    return arguments, [name for name, value in settings.items() if name in kinds and value is None]


def _unknown(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name[:100], valid, n=2)
    return f"unknown field {name!r:.100}" + (
        f": did you mean {' or '.join(near)}?" if near else f"; valid: {', '.join(valid)}"
    )


def run_command(config_class: type, main: Callable) -> None:
    """Read the config, run main, and turn a problem of the user's into one message and exit code 1.

    Of several processes on one machine only the first prints. A problem of another one is told, too, but a little
    later: when all have the same, the launcher has ended them before that.
    """
    name, number = Path(sys.argv[0]).name, int(os.environ.get("LOCAL_RANK", 0))
    try:
        with ExitStack() as stack:
            if number:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            main(read_config(config_class, sys.argv[1:]))
        return
    except (ConfigError, DataError, PolicyError) as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = (
            "interrupted; what was written stays: go on with --resume where there is that flag, else with the same "
            "command"
        )
    if number:
        time.sleep(FIRST_PROCESS_SPEAKS)
        name = f"{name}, process {os.environ.get('RANK', number)}"
    sys.exit(f"{name}: {problem}")
