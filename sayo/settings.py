"""Settings: dataclass fields with help and bounds, read from flags and YAML; every problem is reported at once."""

import argparse
import difflib
import io
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import MISSING, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

import yaml

# NUL bytes and lone surrogates (JSON, YAML and odd file names can have one) cannot be written to a file.
UNWRITABLE = re.compile("[\0\ud800-\udfff]")
LARGEST_FILE, MAX_DEPTH = 2**16, 20  # of a YAML file: bytes, and lists and mappings within each other
FIRST_RANK_SPEAKS = 5.0  # seconds that other ranks wait before they report a problem
MAX_LISTED = 20  # unknown fields named in one error message


class UserError(ValueError):
    """A problem that the user can solve. The message names the value, what is valid, and the fix."""


class ConfigError(UserError):
    """Settings that cannot work; the message names every one of them."""


def option(default, help: str, choices: tuple | None = None, aliases: tuple = (), **bounds):
    """A dataclass field with its help text, valid values and bounds.

    Args:
        bounds: at_least, above and at_most, numbers; hint, a remark about them. None and lists are not compared.
    """
    metadata = {"help": help, "choices": choices, "aliases": aliases, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Settings:
    """Base of every config class: a dataclass whose fields are made by option()."""

    @classmethod
    def from_file(cls, path: Path, values: dict) -> dict:
        """What the values of a YAML file mean; a subclass may read them by the place of the file."""
        return values

    def problems(self) -> list[str]:
        """What is wrong, one sentence each. Subclasses add theirs."""
        found = []
        for entry in fields(self):
            name, value, choices = entry.name, getattr(self, entry.name), entry.metadata["choices"]
            if choices and value not in (*choices, None):
                found.append(f"{name}={value!r}: valid are {_shown(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                found.append(f"{name}={value}: give a finite number")
            elif isinstance(value, int | float):
                found += _out_of_bounds(name, value, **entry.metadata["bounds"])
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and UNWRITABLE.search(text):
                    found.append(f"{name}={text!r:.200}: leave out the zero, or the half of a character, in it")
                elif isinstance(text, str) and name != "system_prompt" and is_too_long(text):
                    found.append(f"{name}={text!r:.200}: no file has so long a name")
        return found


def _shown(choices: tuple) -> str:
    return "{" + ",".join(choices) + "}"


def _out_of_bounds(name: str, value, at_least=None, above=None, at_most=None, hint: str = "") -> list[str]:
    inside = (at_least is None or value >= at_least) and (above is None or value > above)
    if inside and (at_most is None or value <= at_most):
        return []
    if above is not None:
        valid = f"more than {above}" + (f", at most {at_most}" if at_most is not None else "")
    else:
        valid = f"{at_least} or more" if at_most is None else f"{at_least} to {at_most}"
    return [f"{name}={value}: give {valid}" + (f" ({hint})" if hint else "")]


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
        existing = next((parent for parent in path.absolute().parents if os.path.exists(parent)), path)
        if os.path.isdir(path) or not existing.is_dir() or not os.access(existing, os.W_OK):
            found.append(f"{name}={value!r}: give the name of a file in a folder that can be written to")
        elif suffixes and path.suffix.lower() not in suffixes:
            found.append(f"{name}={value!r}: give a name that ends in {' or '.join(suffixes)}")
    return found


def read_jsonl(path: Path, *, skip_damage: bool = False) -> list[tuple[str, dict]]:
    """(line, object) of every line. A last one that is cut off was being written when a run stopped: it is left out.

    Args:
        skip_damage: leave out every line that is not one JSON object. For rows that are written one by one and can be
            made again: a power cut leaves zeros, or half a character.

    Raises:
        ConfigError: the file is no text, or a line is not one JSON object.
    """
    content = Path(path).read_bytes()
    if skip_damage:
        content = b"\n".join(line for line in content.split(b"\n") if _is_object(line))
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
            raise ConfigError(f"{str(path)!r}, line {number} is not JSON: {error}; give JSON lines") from error
        if row is not None and not isinstance(row, dict):
            raise ConfigError(f"{str(path)!r}, line {number} is not a JSON object: {line[:60]!r}")
        if row is not None:
            rows.append((line, row))
    return rows


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def read_config(config_class: type, arguments: list[str]):
    """A checked config from command-line arguments.

    `--config FILE.yaml` may hold any field; a flag given beside it wins. YAML values are parsed as flags are, so they
    meet the same type checks. A list that is given in several flags is all of them; `~` is the user's home.

    Raises:
        ConfigError: unknown fields, values of the wrong type, and everything that the class's problems() finds.
    """
    parser, found = _parser(config_class), []
    parser.add_argument("--config", metavar="FILE.yaml", help="YAML file of fields; flags given beside it win.")
    valid = [entry.name for entry in fields(config_class)]

    def complain(message: str):
        raise ConfigError(f"{message}\nsee {parser.prog} --help")

    parser.error = complain
    pairs, rest = parser.parse_known_args(arguments)
    if pairs.config is not None:
        from_file, nulls = _yaml_arguments(Path(pairs.config), config_class, found)
        may_be_none = {name for name, kind in get_type_hints(config_class).items() if NoneType in get_args(kind)}
        found += [f"{name} is null: give a value" for name in nulls if name not in may_be_none]
        pairs, rest = parser.parse_known_args(from_file)
        parser.set_defaults(**vars(pairs) | dict.fromkeys(may_be_none.intersection(nulls)))
        pairs, more = parser.parse_known_args(arguments)
        rest += more
    for argument in rest:
        if argument.startswith("--"):
            found.append(_unknown(argument[2:].split("=")[0], valid))
        elif not any(entry.startswith("--") for entry in rest):
            found.append(f"{argument!r} belongs to no field: fields are given as --name value")
    config = config_class(**{name: _at_home(name, value) for name, value in vars(pairs).items() if name in valid})
    found += config.problems()
    if found:
        raise ConfigError("\n".join(dict.fromkeys(found)))
    return config


def _at_home(name: str, value):
    """A value with the user's home in place of a leading ~, which a shell leaves in YAML and behind an equals sign."""
    if isinstance(value, list):
        return [_at_home(name, entry) for entry in value]
    is_place = isinstance(value, str) and value.startswith("~") and name != "system_prompt"
    return os.path.expanduser(value) if is_place and not UNWRITABLE.search(value) else value


def stored_config(path: Path, config_class: type):
    """The config that a former run wrote to a YAML file; fields that are new since then have their default.

    Only its types are checked: what it names (folders, packages) may be gone by now.

    Raises:
        ConfigError: the file cannot be read, or does not hold fields of this class.
    """
    found: list[str] = []
    arguments, nulls = _yaml_arguments(path, config_class, found)
    parser = _parser(config_class)
    parser.error = found.append
    values = vars(parser.parse_known_args(arguments)[0]) if not found else {}
    if found:
        raise ConfigError(f"{str(path)!r} cannot be what a run wrote: " + "; ".join(found))
    return config_class(**(values | dict.fromkeys(nulls)))


def _parser(config_class: type) -> argparse.ArgumentParser:
    """A flag for each field, as transformers' HfArgumentParser has it, whose import costs half of a second."""
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description=config_class.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    kinds = get_type_hints(config_class)
    for entry in fields(config_class):
        name, kind, known = entry.name, kinds[entry.name], entry.metadata
        if get_origin(kind) is UnionType:
            kind = next(part for part in get_args(kind) if part is not NoneType)
        options = {"help": known["help"], "type": kind}
        options["default"] = entry.default if entry.default is not MISSING else entry.default_factory()
        if known["choices"]:  # argparse would stop at the first wrong value; problems() reports all of them
            options["metavar"] = _shown(known["choices"])
        if kind is bool:
            options |= {"type": _truth, "nargs": "?", "const": True}
        elif get_origin(kind) is list:
            options |= {"type": get_args(kind)[0], "nargs": "+", "action": _Extend}
        parser.add_argument(*_spellings(name), *known["aliases"], **options)
        if options["default"] is True:
            negative = {"dest": name, "default": False, "help": known["help"]}
            parser.add_argument(*_spellings(f"no_{name}"), action="store_false", **negative)
    return parser


class _Extend(argparse.Action):
    """A list given in two flags is both; the first replaces the default, which may be that of a file."""

    def __call__(self, parser, namespace, values, option_string=None):
        former = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if former is self.default else former + values)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _truth(text: str) -> bool:
    valid = {"yes": True, "true": True, "t": True, "y": True, "1": True}
    valid |= {"no": False, "false": False, "f": False, "n": False, "0": False}
    if text.lower() not in valid:
        raise argparse.ArgumentTypeError(f"{text!r:.200} is neither true nor false: give one of the two")
    return valid[text.lower()]


def _yaml_fields(path: Path) -> Iterator[tuple[str, str | list | None | tuple]]:
    """(name, value) of a YAML file's fields: text as it is written (007, 12:30 and no stay so), a list of texts, None
    for null, (value,) for what no field can be. Aliases, which could blow up to gigabytes, and endless nesting are
    refused."""
    with path.open("rb") as file:
        content = file.read(LARGEST_FILE + 1)
    text, depth = content.decode("utf-8-sig"), 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        problem = "aliases (*name) are not read" if isinstance(event, yaml.AliasEvent) else None
        if getattr(event, "tag", None) is not None:
            problem = f"tags ({event.tag:.60}) are not read"
        elif depth > MAX_DEPTH:
            problem = f"nested more than {MAX_DEPTH} deep"
        if problem:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
    if len(content) > LARGEST_FILE:
        raise ValueError(f"it has more than {LARGEST_FILE} bytes: give a file of fields")
    root, names = yaml.compose(text, yaml.SafeLoader), set()
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("give one field per line, such as `max_steps: 100`")
    null = "tag:yaml.org,2002:null"
    for key, node in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="an unhashable key: give a field's name", problem_mark=key.start_mark)
        if key.value in names:
            raise yaml.MarkedYAMLError(problem=f"{key.value!r:.60} is given twice", problem_mark=key.start_mark)
        names.add(key.value)
        parts = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.ScalarNode):
            yield key.value, None if node.tag == null else node.value
        elif parts and all(isinstance(part, yaml.ScalarNode) and part.tag != null for part in parts):
            yield key.value, [part.value for part in parts]
        else:
            yield key.value, (yaml.load(yaml.serialize(node), yaml.BaseLoader),)


def _yaml_arguments(path: Path, config_class: type, found: list[str]) -> tuple[list[str], list[str]]:
    """The fields of a YAML file as flags, and the names of those that are null; what is wrong goes to `found`."""
    try:
        settings = config_class.from_file(path, dict(_yaml_fields(path)))
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or a zero in the path
        raise ConfigError(f"config={str(path)!r:.200} cannot be read as YAML: {error}") from error
    kinds, arguments = get_type_hints(config_class), []
    unknown = [name for name in settings if name not in kinds]
    lines = [f"{path.name}: {_unknown(name, list(kinds))}" for name in unknown[:MAX_LISTED]]
    found += lines[:1] + [line.partition("; valid: ")[0] for line in lines[1:]]  # which are long, and the same
    found += [f"{path.name}: and {len(unknown) - MAX_LISTED} more unknown fields"] if len(unknown) > MAX_LISTED else []
    known = {name: value for name, value in settings.items() if name in kinds}
    for name, value in known.items():
        takes_list = "list" in str(kinds[name])
        if isinstance(value, list) and takes_list:
            # "=" would carry one value alone. One that begins with a dash and is no number could only be a flag.
            dashed = [entry for entry in value if entry.startswith("-") and not re.fullmatch(r"-[0-9]+", entry)]
            found += [f"{name}: {entry!r:.200} begins with a dash: leave it out" for entry in dashed]
            arguments += [] if dashed else [f"--{name}", *value]
        elif value == "--":  # which argparse drops
            found.append(f"{name}: '--' cannot be: give another value")
        elif isinstance(value, str):
            arguments.append(f"--{name}={value}")  # "=" also carries values that begin with a dash
        elif value is not None:
            given = value[0] if isinstance(value, tuple) else value
            found.append(f"{name}: {given!r:.200} cannot be: give {'a list, [a, b]' if takes_list else 'one value'}")
    return arguments, [name for name, value in known.items() if value is None]


def _unknown(name: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(name[:100], valid, n=2)
    advice = f": did you mean {' or '.join(near)}?" if near else f"; valid: {', '.join(valid)}"
    return f"unknown field {name!r:.100}{advice}"


def resume_command() -> str:
    """The command line that this process was started with, with --resume, as a shell takes it."""
    words = ["python", *sys.argv]
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # by accelerate launch, whose own flags only its process knows
        words = ["accelerate", "launch", *sys.argv]
        launcher = Path(f"/proc/{os.getppid()}/cmdline")
        given = launcher.read_text(encoding="utf-8", errors="replace").split("\0")[:-1] if launcher.exists() else []
        if "launch" in given:
            words = ["accelerate", *given[given.index("launch") :]]
    return shlex.join(words + ["--resume"] * ("--resume" not in words))


def no_bar(is_short: bool | None = False) -> bool | None:
    """The `disable` of a tqdm bar: an argument would override TQDM_DISABLE, which hides all of them."""
    return bool(os.environ.get("TQDM_DISABLE")) or is_short


class _Output(io.FileIO):
    """The file of stdout or stderr; what it does not take (full disk, reader or terminal that is gone) is dropped."""

    def write(self, data) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def protect_output() -> None:
    """From now on no output ends the process: not a dead or full stdout or stderr, not a closed one, and not a
    character that its encoding lacks, which is written as an escape.

    Exceptions of print and tqdm would end a run, and a buffer that cannot be flushed at the end changes the exit code.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:  # else the next file that is opened is a closed stream's
        pass
    os.close(handle)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        raw = getattr(stream, "buffer", None)
        raw = getattr(raw, "raw", raw)
        if stream is not None and not isinstance(raw, io.FileIO):  # of a notebook or Windows' console
            continue
        file = io.BufferedWriter(_Output(number if stream is None else raw.fileno(), "w", closefd=False))
        by_line = stream is None or stream.line_buffering or stream.write_through
        encoding = getattr(stream, "encoding", "utf-8")
        setattr(sys, name, io.TextIOWrapper(file, encoding, "backslashreplace", line_buffering=by_line))


def run_command(config_class: type, main: Callable) -> None:
    """Read the config, run main, and turn a problem of the user's into one message and exit code 1.

    Of several ranks on one machine only the first prints. A problem of another one is reported, too, but a little
    later: when all have the same, the launcher has ended them before that.
    """
    name, rank = Path(sys.argv[0]).name, os.environ.get("LOCAL_RANK", "0")
    rank = int(rank) if rank.isdecimal() else 0
    protect_output()
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            out, err = (nowhere, nowhere) if rank else (sys.stdout, sys.stderr)
            with redirect_stdout(out), redirect_stderr(err):
                main(read_config(config_class, sys.argv[1:]))
        return
    except UserError as error:
        problem = str(error)
    except KeyboardInterrupt:
        resumes = any(entry.name == "resume" for entry in fields(config_class))
        how = f"resume with {resume_command()}" if resumes else "the same command continues where it keeps rows"
        problem = f"interrupted; what was written stays: {how}"
    if rank:
        time.sleep(FIRST_RANK_SPEAKS)
        name = f"{name}, process {os.environ.get('RANK', rank)}"
    sys.exit(f"{name}: {problem}")
