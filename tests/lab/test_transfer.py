"""The laboratory of transfer: its rows read by another program, words that the warm-up never shows, and its policy."""

import ast
import json
import operator
import re
from collections import Counter
from pathlib import Path

import pytest

from hdpo.cli import main
from hdpo.data.prompts import PromptRenderer
from hdpo.lab.build import load
from hdpo.lab.problems import split_of
from hdpo.lab.scoring import contexts
from hdpo.lab.task import TRANSFER
from hdpo.lab.transfer import DECOYS, SIZES, rows
from hdpo.lab.warmup import WarmupBatches
from hdpo.rewards import MathVerifier, Outcome
from tests.helpers.curves import read_curves
from tests.lab.test_foreign import SMALL

GAINS = {"buys": 1, "finds": 1, "gets": 1, "gives": -1, "loses": -1, "sells": -1}
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


@pytest.fixture(scope="module")
def lab():
    return load(TRANSFER.policy)


def value_of(formula):
    def of(node):
        if isinstance(node, ast.Constant):
            return node.value
        return OPERATORS[type(node.op)](of(node.left), of(node.right))

    return of(ast.parse(formula, mode="eval").body)


def done(amount, clause, sizes):
    if clause in ("doubles them", "triples them"):
        return amount * (2 if clause.startswith("d") else 3)
    verb, number = clause.split(" ", 1)
    return amount + GAINS[verb] * (sizes[number.removeprefix("a ")] if number.startswith("a ") else int(number))


def readings(problem, sizes):
    """Every answer that a reader can come to."""
    first, *clauses = problem.split(". ")[0].split(", ")
    orders = [[]]
    for clause in clauses:
        if clause.startswith("but first "):
            orders = [[*o[:-1], clause.removeprefix("but first "), o[-1]] for o in orders]
        else:
            pair = clause.split(" and ")
            orders = [o + way for o in orders for way in ([pair, pair[::-1]] if len(pair) == 2 else [pair])]
    return [chain(int(first.split()[2]), order, sizes) for order in orders]


def chain(amount, clauses, sizes):
    for clause in clauses:
        amount = done(amount, clause, sizes)
    return amount


@pytest.mark.parametrize("split", ["train", "validation"])
def test_answers_hints_and_solutions_are_right(split):
    in_order = Counter()
    for row in rows(1200, split=split, seed=3):
        answer = int(row["expected_answer"])
        found = readings(row["problem"], SIZES)
        if row["problem_source"] == "tier4":
            assert found[0] != found[1]
            in_order[found.index(answer)] += 1
        else:
            assert found == [answer]
        assert value_of(row["context"]) == answer
        assert "=" not in row["context"]
        *steps, final = re.split(r"\. ", row["generated_solution"])
        assert final in (f"So \\boxed{{{answer}}}", f"The answer is \\boxed{{{answer}}}")
        for step in steps:
            formula, result = step.split("=")
            assert value_of(formula) == int(result) in range(1, 100)
        assert len(steps) == (2 if row["problem_source"] == "tier1" else 3)
        words = set(re.findall(r" a (\w+)", row["problem"]))
        assert len(words) == {"tier5": 1, "tier6": 2}.get(row["problem_source"], 0)
        assert words <= set(SIZES)
    assert in_order[0] / 200 == pytest.approx(0.7, abs=0.11)  # 3.5 standard errors


def test_the_warm_up_has_other_words_of_no_fixed_size():
    sizes = {word: set() for word in DECOYS}
    for row in rows(600, split="warmup", tiers=[5]):
        assert split_of(row["problem"]) == "warmup"
        (word,) = re.findall(r" a (\w+)", row["problem"])
        sizes[word] |= {n for n in range(5, 25) if int(row["expected_answer"]) in readings(row["problem"], {word: n})}
        assert value_of(row["context"]) == int(row["expected_answer"])
    assert not set(DECOYS) & set(SIZES)
    assert all(len(found) >= 18 for found in sizes.values())


def test_splits_share_no_problem_whatever_the_seed():
    texts = {
        split: {row["problem"] for seed in (0, 1) for row in rows(1200, split=split, seed=seed)}
        for split in ("warmup", "train", "validation")
    }
    assert all(split_of(text) == split for split, found in texts.items() for text in found)
    assert all(len(found) > 2000 for found in texts.values())


def test_the_verifier_takes_the_reference_and_not_the_other_reading():
    ambiguous = list(rows(20, split="train", tiers=[4]))
    other = [next(r for r in readings(row["problem"], {}) if r != int(row["expected_answer"])) for row in ambiguous]
    truth = [row["expected_answer"] for row in ambiguous]
    with MathVerifier(profile="strict", num_workers=1, timeout=20.0) as verifier:
        right = verifier.grade([row["generated_solution"] for row in ambiguous], truth)
        wrong = verifier.grade([f"So \\boxed{{{answer}}}" for answer in other], truth)
    assert {g.outcome for g in right} == {Outcome.CORRECT}
    assert {g.outcome for g in wrong} == {Outcome.WRONG}


def test_the_hint_is_the_context_in_warm_up_scoring_and_training(lab, tmp_path, monkeypatch):
    tokenizer = lab[1]
    renderer = PromptRenderer(tokenizer, TRANSFER.prompts)
    for row in rows(30, split="train"):
        ids = contexts(tokenizer, row, TRANSFER)["solution"]
        assert tokenizer.decode(ids) == f"<|user|>Hint: {row['context']}\n{row['problem']}<|end|><|assistant|>"
        assert ids == renderer.privileged(row["problem"], "", "", row["context"])
        assert tokenizer.decode(tokenizer.encode(row["generated_solution"])) == row["generated_solution"]
    plain, privileged = next(iter(WarmupBatches(tokenizer, TRANSFER.recipe, TRANSFER)))
    assert not re.search(r" a \w", " ".join(tokenizer.batch_decode(plain.input_ids)))
    texts = tokenizer.batch_decode(privileged.input_ids)
    assert sum(text.startswith("<|user|>Hint: (") for text in texts) == 16
    assert set(re.findall(r" a (\w+)", " ".join(texts))) <= set(DECOYS)

    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "lab_transfer", *SMALL, "--trainer.max_steps=2"]) == 0
    curves = {tag: dict(points) for tag, points in read_curves(Path("runs/lab_transfer/run")).items()}
    assert curves["cliff/fraction"][0] >= 0.15
    assert curves["privileged/pass_rate"][0] >= 0.3  # cliffs of tier 4 are among them, which the hint does not open
    assert all(0 < curves["loss/distillation"][step] < 1 for step in (0, 1))


@pytest.mark.slow
def test_hdpo_is_the_same_where_references_are_withheld(tmp_path, monkeypatch):
    """Its privileged context is the formula, so that its results with references are those without."""
    monkeypatch.chdir(tmp_path)
    found = []
    for name, overlay in (("with", []), ("without", ["--config", "lab/without_references"])):
        place = ["--trainer.logger.init_args.version", name]
        assert main(["fit", "--config", "lab_transfer", *overlay, *SMALL, "--trainer.max_steps=3", *place]) == 0
        found.append(read_curves(Path("runs/lab_transfer", name)))
    assert found[0]["privileged/pass_rate"][0][1] > 0
    # Neither the clock nor what is said of solutions, where there are none.
    compared = {tag for tag in found[0] if not re.match("time/|speed/|spent/seconds", tag) and "copy_rate" not in tag}
    assert compared >= {"loss/total", "loss/distillation", "privileged/kept", "rollout/reward", "cliff/fraction"}
    assert {tag for tag in compared if found[0][tag] != found[1].get(tag)} == set()


def test_the_record_keeps_what_the_laboratory_promises():
    record = json.loads((TRANSFER.policy / "scores.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(vars(TRANSFER.recipe)))
    for tier in ("tier5", "tier6"):
        assert record["scores"][tier]["pass@1"] <= 0.05
        assert 0.4 <= record["scores"][tier]["privileged"] <= 0.95
        assert record["scores"][tier]["copied"] <= 0.25
