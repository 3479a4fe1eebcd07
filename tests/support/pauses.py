"""Pauses processes for a random time, which the seed of the dice repeats."""

import random
import time
from collections.abc import Sequence

import psutil


def last(dice: random.Random, longest_s: float) -> None:
    """Lets a trouble last. No wait for a condition: this is how long it is."""
    time.sleep(dice.uniform(0.3, 1) * longest_s)


def pause(paused: Sequence[psutil.Process], dice: random.Random, longest_s: float) -> None:
    """Suspends processes, and resumes them in this order."""
    for process in paused:
        process.suspend()
    last(dice, longest_s)
    for process in paused:
        process.resume()
