"""Order and random numbers that depend on the seed and the step alone, so that none is saved for a stop."""

import random
from functools import lru_cache


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, num_examples: int) -> list[int]:
    return random.Random(f"{seed}/epoch/{epoch}").sample(range(num_examples), num_examples)


def example_index(seed: int, position: int, num_examples: int) -> int:
    """Which example stands at a position of the endless stream of shuffled epochs."""
    epoch, place = divmod(position, num_examples)
    return _epoch_order(seed, epoch, num_examples)[place]


def step_seed(seed: int, step: int, process: int) -> int:
    """Seed of Python's, numpy's and torch's own random numbers in a step: nothing here draws from them, but a change
    of yours may (a dropout, an augmentation), and goes on after a stop all the same."""
    return random.Random(f"{seed}/step/{step}/{process}").getrandbits(32)
