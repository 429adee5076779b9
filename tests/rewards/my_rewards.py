"""Reward functions as a user writes them, in a module that workers can import."""

import os
import time

from hdpo.rewards.boxed import last_boxed


def exact(completions, references, **columns):
    return [float(last_boxed(c) == r) for c, r in zip(completions, references, strict=True)]


def short(completions, limit):
    """Names what it needs, and takes nothing else."""
    return [1.0 if len(c) <= n else 0.0 for c, n in zip(completions, limit, strict=True)]


def trl(prompts, completions, **columns):
    """TRL's signature; the dictionary holds every other column."""
    return [float(p in c) * len(columns) for p, c in zip(prompts, completions, strict=True)]


def obey(completions, **columns):
    """Does what the completion says."""
    rewards = []
    for text in completions:
        if text == "hang":
            time.sleep(1000)
        if text == "raise":
            raise RuntimeError("boom")
        rewards.append({"none": None, "nan": float("nan"), "pid": float(os.getpid())}.get(text, 1.0))
    return rewards[1:] if "short" in completions else rewards
