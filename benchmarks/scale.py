"""Where a step's time goes as GPUs and policies grow: bounds computed from counted costs, for docs/scale.md.

    PYTHONPATH=. python benchmarks/scale.py

Each GPU has 4 prompts of 200 tokens with 16 rollouts, as configs/hdpo.yaml has on 8. Completions are exponentially
distributed with a mean of 1,000 tokens up to the limits of that file, and a fifth of the prompts are cliffs. Then

* rollouts, privileged: every token of the longest completion reads the weights once (divided among the GPUs of an
  engine, which then has the rollouts of all of them), and each token its keys and values: bytes over the memory's
  bandwidth. The longest of many completions reaches the limit.
* teacher: 2 FLOPs per parameter and token that is read, at the utilisation of the update.
* update: 6 FLOPs per parameter and token of what has an advantage (four fifths of the prompts) or is distilled, at the
  utilisation that was measured with recomputed layers (RESULTS.md, "On a GPU").
* gather: under FSDP2 each micro-batch receives all weights twice, in the dtype in which they are gathered, and the step
  sums its gradients once, at 32B in every micro-batch; bytes over the link, not hidden by computation.
* to vLLM: all weights in 16 bits over the same link.
"""

from __future__ import annotations

import math

from hdpo.commands.memory import Shape
from hdpo.policy.architecture import policy_config

FLOPS, BYTES = 989e12, 3.35e12  # an H100's
MFU = 0.28
NVLINK, NETWORK = 450e9, 50e9  # bytes per second that a GPU receives inside its machine, and from others
PROMPTS, ROLLOUTS, PRIVILEGED, CLIFFS = 4, 16, 4, 0.2
PROMPT, CONTEXT, MEAN, LIMIT, PRIVILEGED_LIMIT = 200, 700, 1000, 3072, 2048
MICRO_BATCH = 16_384
#: GPUs that share an engine.
SHARED = {"1.5": 1, "7": 1, "32": 4}


def mean_length(limit: int) -> tuple[float, float]:
    """Mean and mean square of a completion's tokens, cut off at the limit."""
    share = math.exp(-limit / MEAN)
    return MEAN * (1 - share), 2 * MEAN**2 * (1 - share) - 2 * MEAN * limit * share


def decoding(shape: Shape, sequences: float, prompt: int, limit: int, shared: int) -> float:
    """Seconds that an engine takes for so many completions per GPU."""
    mean, square = mean_length(limit)
    weights = 2 * shape.num_parameters / shared
    cache = 2 * 2 * shape.num_layers * shape.key
    return (limit * weights + sequences * cache * (prompt * mean + square / 2)) / BYTES


def step(size: str, devices: int) -> dict[str, float]:
    """Seconds of each part of a step."""
    shape, shared = Shape.of(policy_config(f"Qwen/Qwen2.5-{size}B")), SHARED[size]
    link = NVLINK if devices <= 8 else NETWORK
    cliffs = PROMPTS * CLIFFS
    mean, private = mean_length(LIMIT)[0], mean_length(PRIVILEGED_LIMIT)[0]
    kept = cliffs * PRIVILEGED
    tokens = (PROMPTS - cliffs) * ROLLOUTS * (PROMPT + mean) + kept * (PROMPT + private)
    found = {
        "rollouts": decoding(shape, PROMPTS * ROLLOUTS, PROMPT, LIMIT, shared),
        "privileged": decoding(shape, kept, CONTEXT, PRIVILEGED_LIMIT, shared),
        "teacher": 2 * shape.num_parameters * kept * (CONTEXT + private) / (MFU * FLOPS),
        "update": 6 * shape.num_parameters * tokens / (MFU * FLOPS),
    }
    sharded = size != "1.5"
    passes = math.ceil(tokens / MICRO_BATCH)
    # float32 gradients; DDP receives each twice, FSDP2 once, or once per micro-batch where whole ones do not fit.
    sums = {"1.5": 2, "7": 1, "32": passes}[size]
    received = 4 * shape.num_parameters * sums + sharded * passes * 2 * 2 * shape.num_parameters
    found["gather"] = received / link
    found["to vLLM"] = 2 * shape.num_parameters / link if sharded else 0.0
    return found


def main() -> None:
    """Print the table."""
    names = list(step("1.5", 8))
    print("| policy | GPUs | engine on | " + " | ".join(names) + " | step | sampling |")
    print("|" + " --- |" * (len(names) + 5))
    for size in SHARED:
        for devices in (16, 64) if size == "32" else (8, 64):
            parts = step(size, devices)
            total = sum(parts.values())
            cells = [f"Qwen2.5-{size}B", str(devices), f"{SHARED[size]} GPU" + "s" * (SHARED[size] > 1)]
            cells += [f"{x:.1f}" for x in (*parts.values(), total)]
            cells.append(f"{(parts['rollouts'] + parts['privileged']) / total:.0%}")
            print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
