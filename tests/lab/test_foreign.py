"""The laboratory of the foreign hand: its references, what its warm-up shows, and what its policy can do."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from hdpo.cli import main
from hdpo.data.prompts import PromptRenderer
from hdpo.lab.build import load
from hdpo.lab.demo import read_curves
from hdpo.lab.problems import foreign_rows, rows
from hdpo.lab.task import FOREIGN, LAB_PROMPTS, STORIES
from hdpo.lab.warmup import WarmupBatches
from hdpo.rewards import MathVerifier, Outcome
from tests.helpers.record import StopAtStart

TIERS = range(1, 7)
PLAIN, CLIFFS = (1, 2, 3), (5, 6)


@pytest.fixture(scope="module")
def lab():
    return load(FOREIGN.policy)


@pytest.fixture(scope="module")
def record():
    return json.loads((FOREIGN.policy / "scores.json").read_text())


@pytest.mark.parametrize("split", ["warmup", "train", "validation"])
def test_rows_are_the_stories_with_each_result_first(split):
    """So the splits are the stories': no problem is in two of them (tests/lab/test_problems.py)."""
    for mine, story in zip(foreign_rows(600, split=split, seed=3), rows(600, split=split, seed=3), strict=True):
        assert mine["own_solution"] == story["generated_solution"]
        assert {name: mine[name] for name in story if name != "generated_solution"} == {
            name: story[name] for name in story if name != "generated_solution"
        }
        steps, final = mine["generated_solution"].split(" So ")
        equations = re.findall(r"(\d+)=(\d+)([-+*])(\d+)\.", steps)
        assert steps == " ".join("{}={}{}{}.".format(*e) for e in equations)
        for result, a, operator, b in equations:
            assert int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
        assert final == f"\\boxed{{{equations[-1][0]}}}" == f"\\boxed{{{mine['expected_answer']}}}"
        assert f"tier{len(equations)}" == mine["problem_source"]


def test_bad_arguments_are_refused_at_the_call():
    with pytest.raises(ValueError, match="there are tiers 1 to 6"):
        foreign_rows(tiers=[7])


def test_the_verifier_accepts_both_hands_and_no_other_answer():
    sample = list(foreign_rows(12, split="train"))
    truth = [row["expected_answer"] for row in sample for _ in range(3)]
    texts = [
        text
        for row in sample
        for text in (
            row["generated_solution"],
            row["own_solution"],
            row["own_solution"].replace("\\boxed{", "\\boxed{1"),
        )
    ]
    with MathVerifier(profile="strict", num_workers=1, timeout=20.0) as verifier:
        grades = verifier.grade(texts, truth)
    assert [g.outcome for g in grades] == [Outcome.CORRECT, Outcome.CORRECT, Outcome.WRONG] * 12


def test_the_warm_up_writes_its_own_hand_in_both_contexts(lab):
    tokenizer = lab[1]
    batches = WarmupBatches(tokenizer, FOREIGN.recipe, FOREIGN)
    own = r"(\d+[-+*]\d+=\d+\. )+So \\boxed\{\d+\}<\|end\|>"
    for context, completion in islice(batches.plain_examples(), 200):
        text = tokenizer.decode(completion)
        assert re.fullmatch(own, text)
        assert text.count("=") in PLAIN
        assert "Solution" not in tokenizer.decode(context)
    seen = set()
    for i, (context, completion) in enumerate(islice(batches.privileged_examples(), 200), start=1):
        shown = tokenizer.decode(context).removeprefix("<|user|>Solution: ").split("\n")[0]
        text = tokenizer.decode(completion)
        assert re.fullmatch(own, text)
        if i % FOREIGN.recipe.answer_only_every:
            assert re.sub(r"(\d+)=(\S+)\.", r"\2=\1.", shown) + "<|end|>" == text != shown + "<|end|>"
            seen.add(text.count("="))
        else:
            assert shown.startswith("The final answer is ")
            assert text.count("=") in PLAIN
    assert seen == set(TIERS)


def test_files_are_small_and_the_tokenizer_gives_every_text_back(lab):
    assert sum(f.stat().st_size for f in FOREIGN.policy.iterdir()) < 1.5e6
    renderer = PromptRenderer(lab[1], LAB_PROMPTS)
    for row in foreign_rows(60, split="train", seed=2):
        for text in (row["problem"], row["generated_solution"], row["own_solution"]):
            ids = lab[1].encode(text, add_special_tokens=False)
            assert lab[1].decode(ids) == text
            tokens = lab[1].convert_ids_to_tokens(ids)
            assert [t for t in tokens if any(map(str.isdigit, t))] == re.findall(r"\d", text)
        context = renderer.privileged(row["problem"], row["generated_solution"], row["expected_answer"])
        shown = f"<|user|>Solution: {row['generated_solution']}\n{row['problem']}<|end|><|assistant|>"
        assert lab[1].decode(context) == shown


def test_the_record_is_of_this_recipe_and_keeps_what_the_laboratory_promises(record):
    recipe = json.loads(json.dumps(vars(FOREIGN.recipe)))
    assert record["recipe"] == recipe
    assert not set(CLIFFS) & set(FOREIGN.recipe.plain_tiers)
    scores = record["scores"]
    assert min(scores[f"tier{t}"]["greedy"] for t in PLAIN) >= 0.9
    for tier in CLIFFS:
        assert scores[f"tier{tier}"]["pass@1"] <= 0.05
        assert scores[f"tier{tier}"]["privileged"] >= 0.4
    assert max(scores[f"tier{t}"]["copied"] for t in TIERS) == 0


SMALL = [
    *("--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false", "--best_checkpoint.monitor=null"),
    *("--evaluation.before_fit=false", "--evaluation.after_fit=false", "--evaluation.summary=false"),
    *("--data.selection.num_train_problems=40", "--data.selection.num_val_problems=6", "--model.pass_k=[1]"),
    *("--rollouts.num_val_samples=1", "--trainer.logger.init_args.version=run"),
]


def test_two_steps_distil_translations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "lab_foreign", *SMALL, "--trainer.max_steps=2"]) == 0
    curves = {tag: dict(points) for tag, points in read_curves(Path("runs/lab_foreign/run")).items()}
    for step in (0, 1):
        assert curves["cliff/fraction"][step] >= 0.2  # two tiers of five, and few of their problems are solved
        assert curves["privileged/pass_rate"][step] >= 0.4
        assert curves["privileged/copy_rate"][step] == 0
        assert 0 < curves["loss/distillation"][step] < 1


def built(config, overlay):
    """The first training batch's prompts, as the data module makes them under an overlay."""
    files = ["--config", config, "--config", f"lab/{overlay}"]
    stop = "--trainer.callbacks=[{class_path: tests.helpers.record.StopAtStart}]"
    with pytest.raises(StopAtStart.Stopped):
        main(["fit", *files, *SMALL, stop])
    return next(iter(StopAtStart.last.trainer.datamodule.train_dataloader())).prompts


@pytest.mark.parametrize(
    ("config", "overlay"),
    [
        ("lab", "with_tier5"),
        ("lab", "answer_only"),
        ("lab_foreign", "without_references"),
    ],
)
def test_overlays_reach_the_prompts(config, overlay, tmp_path, monkeypatch, lab):
    monkeypatch.chdir(tmp_path)
    prompts = built(config, overlay)
    tokenizer = lab[1] if config == "lab_foreign" else load(STORIES.policy)[1]
    shown = [tokenizer.decode(ids).removeprefix("<|user|>Solution: ").split("\n")[0] for ids in prompts.privileged_ids]
    if overlay == "with_tier5":
        assert set(prompts.source) == {f"tier{t}" for t in TIERS}
        assert shown == prompts.solution
    else:
        assert shown == [f"The final answer is \\boxed{{{answer}}}." for answer in prompts.reference]
        assert all(prompts.solution) == (overlay == "answer_only") != (not any(prompts.solution))
