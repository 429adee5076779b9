"""A ``python:`` source that the cache's tests can kill in the middle, and count how often it is read."""

import os
import time
from pathlib import Path


def rows(log: str, number: int = 40, pause_at: int | None = None, damaged: bool = False):
    """Yield rows, write one line to ``log`` for each reading, and sleep forever before row ``pause_at``."""
    with Path(log).open("a") as stream:
        stream.write(f"{os.getpid()}\n")
    for i in range(number):
        # The file, and not an argument, says whether to sleep: arguments are part of the cache key.
        if pause_at == i and not Path(log).with_suffix(".go").exists():
            Path(log).with_suffix(".paused").touch()
            time.sleep(600)
        yield {
            "problem": f"What is {i} + {i}?",
            "generated_solution": f"Double it: \\boxed{{{2 * i}}}",
            "expected_answer": "" if damaged else str(2 * i),
            "problem_source": "even" if i % 2 == 0 else "odd",
        }
