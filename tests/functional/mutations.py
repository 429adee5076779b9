"""Break the mathematics on purpose, one sign or constant at a time, and see the tests fail.

``python tests/functional/mutations.py [name]`` runs, for each mutation, the test file of the mutated module against the
mutated functions, and exits with 1 if any mutation survives. Nothing on disk is changed: the mutated source is executed
under another name, and its functions replace the imported ones in the test module.
"""

import io
import sys
import types
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

import hdpo.functional

TESTS = Path(__file__).parent


class Mutation(NamedTuple):
    """Replace ``old``, which must occur exactly once in ``hdpo/functional/<module>.py``, by ``new``."""

    module: str
    old: str
    new: str


MUTATIONS = [
    # advantages: signs, baseline, divisor, and the exact zero
    Mutation("advantages", "rewards - others.mean(-1)", "rewards + others.mean(-1)"),
    Mutation("advantages", "rewards - others.mean(-1)", "others.mean(-1) - rewards"),
    Mutation("advantages", "rewards - others.mean(-1)", "rewards - rewards.mean(-1, keepdim=True)"),
    Mutation("advantages", "advantages / _safe_std(rewards)[:, None]", "advantages * _safe_std(rewards)[:, None]"),
    Mutation("advantages", "advantages / _safe_std(rewards)[:, None]", "-advantages / _safe_std(rewards)[:, None]"),
    Mutation("advantages", "advantages / _safe_std(others)", "advantages * _safe_std(others)"),
    Mutation("advantages", "advantages / _safe_std(others)", "-advantages / _safe_std(others)"),
    Mutation("advantages", "correction=1", "correction=0"),
    Mutation("advantages", "torch.where(varied, advantages, torch.zeros_like(advantages))", "advantages"),
    # policy loss
    Mutation("surrogate", "losses = -torch.minimum", "losses = torch.minimum"),
    Mutation("surrogate", "losses = -torch.minimum", "losses = -torch.maximum"),
    Mutation("surrogate", "logps - old_logps.detach()", "old_logps.detach() - logps"),
    Mutation("surrogate", "logps - old_logps.detach()", "logps + old_logps.detach()"),
    Mutation("surrogate", "torch.minimum(ratio * advantages,", "torch.minimum(-ratio * advantages,"),
    Mutation("surrogate", "ratio.clamp(low, high) * advantages", "-ratio.clamp(low, high) * advantages"),
    Mutation("surrogate", "1 - clip_eps_low, 1 + clip_eps_high", "1 - clip_eps_high, 1 + clip_eps_low"),
    Mutation("surrogate", "1 - clip_eps_low, 1 + clip_eps_high", "1 + clip_eps_low, 1 + clip_eps_high"),
    Mutation("surrogate", "1 - clip_eps_low, 1 + clip_eps_high", "1 - clip_eps_low, 1 - clip_eps_high"),
    Mutation("surrogate", "(ratio > high) & (advantages > 0)", "(ratio > high) & (advantages < 0)"),
    Mutation("surrogate", "(ratio < low) & (advantages < 0)", "(ratio < low) & (advantages > 0)"),
    Mutation("surrogate", "per_sequence / lengths", "per_sequence * lengths"),
    Mutation("surrogate", "(lengths > 0).sum()", "len(lengths)"),
    Mutation("surrogate", "ref_logps.detach() - logps", "logps - ref_logps.detach()"),
    Mutation("surrogate", "log_ratio.expm1() - log_ratio", "log_ratio.expm1() + log_ratio"),
    Mutation("surrogate", "log_ratio.expm1() - log_ratio", "log_ratio - log_ratio.expm1()"),
    Mutation("surrogate", "logps.detach() - sampler_logps.detach()", "sampler_logps.detach() - logps.detach()"),
    Mutation("surrogate", "(logps.detach() - sampler", "(logps - sampler"),
    # rollouts without a reward
    Mutation("advantages", "masked_fill(~valid, -infinite)", "masked_fill(valid, -infinite)"),
    Mutation("advantages", "masked_fill(~valid, infinite)", "masked_fill(~valid, -infinite)"),
    Mutation("advantages", "if mask.sum() >= 2:", "if mask.sum() >= 3:"),
    # divergences
    Mutation("topk_divergence", "log_p + math.log(b)", "log_p - math.log(b)"),
    Mutation("topk_divergence", "log_q + math.log1p(-b)", "log_q + math.log(b)"),
    Mutation("topk_divergence", "b * log_p.exp() * (log_p - log_m)", "b * log_p.exp() * (log_m - log_p)"),
    Mutation("topk_divergence", "b * log_p.exp() * (log_p - log_m)", "(1 - b) * log_p.exp() * (log_p - log_m)"),
    Mutation("topk_divergence", "(1 - b) * log_q.exp() * (log_q - log_m)", "-(1 - b) * log_q.exp() * (log_q - log_m)"),
    Mutation("topk_divergence", "- (1 - b) * math.log1p(-b) * _outside", "+ (1 - b) * math.log1p(-b) * _outside"),
    Mutation("topk_divergence", "- (1 - b) * math.log1p(-b) * _outside", "- b * math.log1p(-b) * _outside"),
    Mutation("topk_divergence", "p * (_LN2 + logsigmoid(difference))", "p * (_LN2 - logsigmoid(difference))"),
    Mutation("topk_divergence", "p * (_LN2 + logsigmoid(difference))", "p * (_LN2 + logsigmoid(-difference))"),
    Mutation("topk_divergence", "p * (_LN2 + logsigmoid(difference))", "-p * (_LN2 + logsigmoid(difference))"),
    Mutation("topk_divergence", "p * (_LN2 + logsigmoid(difference))", "p * (-_LN2 + logsigmoid(difference))"),
    Mutation("topk_divergence", "q * (_LN2 + logsigmoid(-difference))", "q * (_LN2 - logsigmoid(-difference))"),
    Mutation("topk_divergence", "q * (_LN2 + logsigmoid(-difference))", "q * (_LN2 + logsigmoid(difference))"),
    Mutation("topk_divergence", "+ q * (_LN2 + logsigmoid(-difference))", "- q * (_LN2 + logsigmoid(-difference))"),
    Mutation("topk_divergence", "q * (_LN2 + logsigmoid(-difference))", "q * (-_LN2 + logsigmoid(-difference))"),
    Mutation("topk_divergence", "difference = log_p - log_q\n    div", "difference = log_q - log_p\n    div"),
    Mutation("topk_divergence", "difference = log_p - log_q\n    div", "difference = log_p + log_q\n    div"),
    Mutation("topk_divergence", "divergence = 0.5 *", "divergence = -0.5 *"),
    Mutation("topk_divergence", "outside = 1 - q.sum(-1)", "outside = 1 + q.sum(-1)"),
    Mutation("topk_divergence", "outside = 1 - q.sum(-1)", "outside = q.sum(-1) - 1"),
    Mutation("topk_divergence", "(outside.clamp(min=0) - outside).detach()", "(outside.clamp(min=0) - outside)"),
    Mutation("topk_divergence", "return divergence + (0.5", "return divergence - (0.5"),
    Mutation("topk_divergence", "(0.5 if tail", "(1.0 if tail"),
    Mutation("topk_divergence", "else 1.0) * _LN2", "else 0.5) * _LN2"),
    Mutation("topk_divergence", "log_p, 0.0) - torch.where(", "log_p, 0.0) + torch.where("),
    Mutation("topk_divergence", "(log_p.exp() * difference)", "(-log_p.exp() * difference)"),
    Mutation("topk_divergence", "conditional - log_p.masked_fill", "conditional + log_p.masked_fill"),
    Mutation("topk_divergence", "conditional - log_p.masked_fill", "-conditional + log_p.masked_fill"),
    Mutation("topk_divergence", "conditional = log_q.log_softmax(-1)", "conditional = log_q"),
    # pass@k
    Mutation("pass_at_k", "result = 1 - all_wrong", "result = 1 + all_wrong"),
    Mutation("pass_at_k", "(n - c - j)", "(n + c - j)"),
    Mutation("pass_at_k", "(n - c - j)", "(n - c + j)"),
    Mutation("pass_at_k", "/ (n - j)", "/ (n + j)"),
    Mutation("pass_at_k", "correct[:, :k]", "correct[:, -k:]"),
    # random numbers
    Mutation("random", "(x >> bits) & ((1 << (64 - bits)) - 1)", "x >> bits"),
    Mutation("random", "_GOLDEN = -", "_GOLDEN = "),
    Mutation("random", "_MIX_1 = -", "_MIX_1 = "),
    Mutation("random", "_MIX_2 = -", "_MIX_2 = "),
]  # fmt: skip


class _Replace:
    """Pytest plugin: put the mutated module's public functions in the place of the imported ones."""

    def __init__(self, mutated: types.ModuleType) -> None:
        self.mutated = mutated

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for module in {item.module for item in items if isinstance(item, pytest.Function)}:
            for name in vars(self.mutated):
                if name in vars(module) and not name.startswith("_"):
                    setattr(module, name, vars(self.mutated)[name])


def _mutated_module(mutation: Mutation) -> types.ModuleType:
    path = Path(hdpo.functional.__file__).parent / f"{mutation.module}.py"
    source = path.read_text()
    if source.count(mutation.old) != 1:
        raise SystemExit(
            f"{path.name}: {mutation.old!r} occurs {source.count(mutation.old)} times; update the mutation"
        )
    module = types.ModuleType(f"mutated_{mutation.module}")
    # A dataclass or NamedTuple looks its module up while it is defined.
    sys.modules[module.__name__] = module
    exec(compile(source.replace(mutation.old, mutation.new), str(path), "exec"), vars(module))
    return module


def survives(mutation: Mutation) -> bool:
    """Whether the tests of the mutated module pass all the same."""
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(TESTS / f"test_{mutation.module}.py")]
    with redirect_stdout(io.StringIO()):
        code = pytest.main(options, plugins=[_Replace(_mutated_module(mutation))])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"{mutation}: pytest ended with {code!r}")
    return code == pytest.ExitCode.OK


def main(names: list[str]) -> int:
    """Run the mutations of the named modules (all without names) and report the survivors."""
    chosen = [m for m in MUTATIONS if not names or m.module in names]
    survivors = []
    for mutation in chosen:
        alive = survives(mutation)
        print(
            f"{'SURVIVED' if alive else 'killed  '} {mutation.module}: {mutation.old!r} -> {mutation.new!r}", flush=True
        )
        survivors += [mutation] * alive
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations killed")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
