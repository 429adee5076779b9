"""Sampled tokens per second: hdpo's transformers engine against plain ``model.generate``.

    python benchmarks/rollouts.py --model lab 100m --json rollouts.json

Everyone samples K completions of the same prompts at temperature 1 from the full distribution, from the same float32
weights. ``generate`` is called as a user would call it: left-padded prompts, ``do_sample``, ``num_return_sequences`` K;
"generate-dynamic" with the default cache, "generate-static" with ``cache_implementation="static"`` (without
compilation, which costs minutes on a CPU for each shape). Tokens are those up to and with the end of sequence; padding
that ``generate`` goes on to write is not counted. hdpo also returns the log-probability of each token. The random
policies hardly ever end a completion, so they show the decode loop alone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import (
    SHAPES,
    add_arguments,
    check_arguments,
    environment,
    interleaved,
    lab_prompts,
    median_ratio,
    policy_path,
    report,
)

#: policy -> prompts, samples per prompt, new tokens; the large ones are given less to do.
WORK = {"toy": (2, 2, 6), "lab": (16, 8, 72), "20m": (16, 8, 32), "100m": (8, 8, 24)}


def engine_run(policy: Any, prompts: list[list[int]], samples: int, new_tokens: int, counts: list[int]) -> Callable:
    """A function that samples with TransformersEngine and appends the number of tokens to ``counts``."""
    import torch

    from hdpo.functional.random import derive_seeds
    from hdpo.generation import TransformersEngine
    from hdpo.generation.engine import SamplingConfig

    engine = TransformersEngine()
    sampling = SamplingConfig(new_tokens, 1.0, tuple(policy.eos_token_ids))

    def run() -> None:
        seeds = derive_seeds(0, len(counts), torch.arange(len(prompts))[:, None], torch.arange(samples))
        counts.append(int(engine.generate(policy, prompts, seeds, sampling).mask.sum()))

    return run


def generate_run(
    policy: Any, prompts: list[list[int]], samples: int, new_tokens: int, counts: list[int], cache: str | None
) -> Callable:
    """The same with ``model.generate``."""
    import torch

    model = policy.model
    width = max(map(len, prompts))
    input_ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    eos = torch.tensor(policy.eos_token_ids)
    options = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}

    def run() -> None:
        torch.manual_seed(len(counts))
        with torch.no_grad():
            output = model.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=samples,
                max_new_tokens=new_tokens,
                pad_token_id=0,
                use_cache=True,
                **options,
            )
        ended = torch.isin(output[:, width:], eos)
        counts.append(int((ended.cumsum(-1) - ended.long() == 0).sum()))

    return run


def continuous_run(policy: Any, prompts: list[list[int]], new_tokens: int, counts: list[int]) -> Callable:
    """The same with transformers' continuous batching (one sample per prompt)."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=list(policy.eos_token_ids),
        pad_token_id=0,
        num_blocks=512,
        max_batch_tokens=512,
    )

    def run() -> None:
        out = policy.model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        counts.append(sum(len(o.generated_tokens) for o in out.values()))

    return run


def measure(name: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one policy."""
    from hdpo.policy import Policy, PolicyConfig

    num_prompts, samples, new_tokens = WORK[name]
    policy = Policy.load(PolicyConfig(path=policy_path(name, folder))).eval()
    _, prompts = lab_prompts(num_prompts)
    if name == "toy":
        prompts = [[i % SHAPES["toy"][0] for i in p] for p in prompts]
    counts: dict[str, list[int]] = {"hdpo": [], "generate-dynamic": [], "generate-static": []}
    work = (policy, prompts, samples, new_tokens)
    runs = {
        "hdpo": engine_run(*work, counts["hdpo"]),
        "generate-dynamic": generate_run(*work, counts["generate-dynamic"], None),
        "generate-static": generate_run(*work, counts["generate-static"], "static"),
    }
    if args.continuous:
        num_prompts, samples, new_tokens = 2, 1, 8
        counts = {"hdpo": [], "generate-batch": []}
        runs = {
            "hdpo": engine_run(policy, prompts[:2], 1, 8, counts["hdpo"]),
            "generate-batch": continuous_run(policy, prompts[:2], 8, counts["generate-batch"]),
        }
    seconds = interleaved(runs, args.repeats)
    rates = {n: [c / s for c, s in zip(counts[n][1:], seconds[n], strict=True)] for n in runs}
    return [
        {
            "model": name,
            "prompts": num_prompts,
            "samples": samples,
            "new_tokens": new_tokens,
            "method": method,
            "tokens": statistics.median(counts[method][1:]),
            "seconds": statistics.median(seconds[method]),
            "tokens_per_s": statistics.median(rates[method]),
            "all_tokens_per_s": rates[method],
            "hdpo_over_this": median_ratio(rates["hdpo"], rates[method]),
        }
        for method in runs
    ]


def main() -> None:
    """Run the comparison, print a table and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(WORK), nargs="+", default=["lab", "100m"], help="policies")
    parser.add_argument(
        "--continuous",
        action="store_true",
        help="transformers' continuous batching instead, on two prompts with 8 tokens: it takes seconds for these",
    )
    add_arguments(parser)
    args = parser.parse_args()
    check_arguments(parser, args)
    env = environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in args.model for row in measure(name, Path(folder), args)]
    report(rows, args, env)


if __name__ == "__main__":
    main()
