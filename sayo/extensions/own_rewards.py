"""Rewards that users write: plain functions in files of their own, called with a reward.Completion.

    def brevity(completion):
        return 1.0 if len(completion.token_ids) < 40 else 0.0

`--reward_file mine.py` takes every public function of the file, `mine.py:brevity` one of them.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Container
from functools import lru_cache
from pathlib import Path
from types import FunctionType

from sayo.settings import ConfigError


@lru_cache
def own_rewards(files: tuple[str, ...]) -> dict[str, Callable]:
    """{"FILE:function": function} of reward files, each FILE.py or FILE.py:function.

    Raises ConfigError: a file that is missing, that fails, or without such a function.
    """
    found = {}
    for name in files:
        stem, _, only = name.partition(".py:")
        path = Path(f"{stem}.py" if only else name).expanduser()
        if not path.is_file():
            raise ConfigError(f"reward_file={name!r}: there is no such file; give FILE.py or FILE.py:function")
        spec = importlib.util.spec_from_file_location(f"own_rewards_{len(found)}_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(f"reward_file={name!r}: {type(error).__name__}: {error}") from error
        own = {key: value for key, value in vars(module).items() if isinstance(value, FunctionType)}
        own = {key: value for key, value in own.items() if value.__module__ == spec.name and not key.startswith("_")}
        if not own or (only and only not in own):
            raise ConfigError(f"reward_file={name!r}: no such function; its public ones are {', '.join(own) or 'none'}")
        found |= {f"{path}:{key}": function for key, function in own.items() if key == only or not only}
    return found


def call_own_reward(place: str, function: Callable, completion, taken: Container[str]) -> dict[str, float]:
    """What a function of own_rewards gives: a number under its own name, or a dict of numbers by name.

    Raises ConfigError with file, function and example: it failed, or gave something else or a `taken` name.
    """
    try:
        value = function(completion)
        found = value if isinstance(value, dict) else {function.__name__: value}
        found = {str(name): float(number) for name, number in found.items()}
        for name, number in found.items():
            if not math.isfinite(number):
                raise ValueError(f"{name} is {number}")
            if name in taken:
                raise ValueError(f"{name} is a reward of sayo or of another file; give it another name")
    except Exception as error:
        where = f"reward_file: {place} on example {completion.example.get('id')!r}"
        problem = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{where}: {problem}; it should return a number, or a dict of numbers by name") from error
    return found


def parse_weight(entry: str) -> tuple[str, float]:
    """("brevity", 0.5) of "brevity=0.5". Raises ValueError where that is no number."""
    name, _, weight = entry.partition("=")
    return name.strip(), float(weight)
