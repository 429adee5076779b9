"""How far runs took the policy from where it started: exact KL divergence per token, by source.

    python benchmarks/kl.py runs/foreign/* --json kl.json

For each run of the command line (a folder with ``config.yaml`` and ``policy/``) the trained policy samples completions
of problems of the run's own test source, and both policies read them: "kl" is the mean over tokens of
KL(trained || initial) in nats, over the whole vocabulary. Runs of one arm are averaged; "all" lists the runs' values.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

from common import add_arguments, check_arguments, environment, report


def divergences(run: Path, num_problems: int, num_samples: int) -> dict[str, list[float]]:
    """KL of each sampled token, by source and for all, of one run."""
    import torch
    import yaml

    from hdpo.data import ColumnMapping, PromptConfig, SourceConfig
    from hdpo.data.prompts import PromptRenderer
    from hdpo.data.sources import Source
    from hdpo.functional.random import derive_seeds
    from hdpo.generation import SamplingConfig, TransformersEngine
    from hdpo.policy import Policy, PolicyConfig, load_tokenizer

    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    initial = PolicyConfig(path=config["model"]["policy"]["path"])
    before, after = (Policy.load(c).eval() for c in (initial, PolicyConfig(path=str(run / "policy"))))
    renderer = PromptRenderer(load_tokenizer(initial), PromptConfig(**config["data"]["prompts"]))
    given = dict(config["data"]["test_source"])
    source = Source(SourceConfig(**given | {"columns": ColumnMapping(**given["columns"])}))
    problems = list(islice(source, num_problems))
    prompts = [renderer.student(problem.problem) for problem in problems]
    seeds = derive_seeds(0, torch.arange(len(prompts))[:, None], torch.arange(num_samples))
    sampling = SamplingConfig(config["rollouts"]["max_new_tokens"], 1.0, tuple(after.eos_token_ids))
    sampled = TransformersEngine().generate(after, prompts, seeds, sampling)
    found: dict[str, list[float]] = {"all": []}
    for problem, prompt, ids, mask in zip(problems, prompts, sampled.ids, sampled.mask, strict=True):
        for row, kept in zip(ids, mask, strict=True):
            tokens = torch.tensor([[*prompt, *row[kept].tolist()]])
            with torch.no_grad():
                ours, theirs = (
                    policy.model(input_ids=tokens).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
                    for policy in (after, before)
                )
            values = (ours.exp() * (ours - theirs)).sum(-1).tolist()
            found["all"] += values
            found.setdefault(problem.source, []).extend(values)
    return found


def main() -> None:
    """Measure, print a table and write JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--problems", type=int, default=120, help="of the test source (default: 120)")
    parser.add_argument("--samples", type=int, default=2, help="completions per problem (default: 2)")
    add_arguments(parser)
    args = parser.parse_args()
    check_arguments(parser, args)
    env = environment()
    arms: dict[str, list[dict[str, float]]] = {}
    for run in args.runs:
        means = {name: statistics.fmean(kl) for name, kl in divergences(run, args.problems, args.samples).items()}
        arms.setdefault(run.name.partition("-seed_")[0], []).append(means)
    rows: list[dict[str, Any]] = []
    for arm, runs in arms.items():
        kls = {f"kl {name}": statistics.fmean(run[name] for run in runs) for name in sorted(runs[0])}
        rows.append({"arm": arm, "runs": len(runs), **kls, "all": [run["all"] for run in runs]})
    report(rows, args, env)


if __name__ == "__main__":
    main()
