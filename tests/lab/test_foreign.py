"""The laboratory of the foreign hand: its references, what its warm-up shows, and what its policy can do."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from hdpo.cli import main
from hdpo.data.prompts import PromptRenderer
from hdpo.lab.build import load
from hdpo.lab.problems import foreign_rows, rows
from hdpo.lab.task import FOREIGN, LAB_PROMPTS, LEARNABLE, STORIES
from hdpo.lab.warmup import WarmupBatches
from hdpo.rewards import MathVerifier, Outcome
from tests.helpers.curves import read_curves
from tests.helpers.record import StopAtStart

TIERS = range(1, 7)
PLAIN, CLIFFS = (1, 2, 3), (5, 6)
STYLES = {  # a step, what finds the steps of a solution, and such a step in the own hand
    "result_first": ("{}={}{}{}.", r"(\d+)=(\d+)([-+*])(\d+)\.", r"\2\3\4=\1."),
    "other_signs": ("{1}{2}{3} makes {0};", r"(?=\S+ makes (\d+))(\d+)([-+*])(\d+) makes \d+;", r"\2\3\4=\1."),
}
TASKS = {"result_first": FOREIGN, "other_signs": LEARNABLE}

every_style = pytest.mark.parametrize("style", STYLES)


@pytest.fixture(scope="module")
def labs():
    return {style: load(task.policy) for style, task in TASKS.items()}


@every_style
@pytest.mark.parametrize("split", ["warmup", "train", "validation"])
def test_rows_are_the_stories_with_references_in_the_style(split, style):
    """So the splits are the stories': no problem is in two of them (tests/lab/test_problems.py)."""
    step, pattern, _ = STYLES[style]
    mine_and_story = zip(
        foreign_rows(600, split=split, seed=3, style=style), rows(600, split=split, seed=3), strict=True
    )
    for mine, story in mine_and_story:
        assert mine["own_solution"] == story["generated_solution"]
        assert {name: mine[name] for name in story if name != "generated_solution"} == {
            name: story[name] for name in story if name != "generated_solution"
        }
        steps, final = mine["generated_solution"].split(" So ")
        equations = re.findall(pattern, steps)
        assert steps == " ".join(step.format(*e) for e in equations)
        for result, a, operator, b in equations:
            assert int(result) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator]
        assert final == f"\\boxed{{{equations[-1][0]}}}" == f"\\boxed{{{mine['expected_answer']}}}"
        assert f"tier{len(equations)}" == mine["problem_source"]


def test_bad_arguments_are_refused_at_the_call():
    with pytest.raises(ValueError, match="there are tiers 1 to 6"):
        foreign_rows(tiers=[7])
    with pytest.raises(ValueError, match="style must be one of result_first, other_signs; got 'neat'"):
        foreign_rows(style="neat")


@every_style
def test_the_verifier_accepts_both_hands_and_no_other_answer(style):
    sample = list(foreign_rows(12, split="train", style=style))
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


@every_style
def test_the_warm_up_writes_its_own_hand_in_both_contexts(labs, style):
    tokenizer, (_, pattern, rewritten) = labs[style][1], STYLES[style]
    batches = WarmupBatches(tokenizer, FOREIGN.recipe, TASKS[style])
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
            assert re.sub(pattern, rewritten, shown) + "<|end|>" == text != shown + "<|end|>"
            seen.add(text.count("="))
        else:
            assert shown.startswith("The final answer is ")
            assert text.count("=") in PLAIN
    assert seen == set(TIERS)


@every_style
def test_files_are_small_and_the_tokenizer_gives_every_text_back(labs, style):
    lab = labs[style]
    assert sum(f.stat().st_size for f in TASKS[style].policy.iterdir()) < 1.5e6
    renderer = PromptRenderer(lab[1], LAB_PROMPTS)
    for row in foreign_rows(60, split="train", seed=2, style=style):
        for text in (row["problem"], row["generated_solution"], row["own_solution"]):
            ids = lab[1].encode(text, add_special_tokens=False)
            assert lab[1].decode(ids) == text
            tokens = lab[1].convert_ids_to_tokens(ids)
            assert [t for t in tokens if any(map(str.isdigit, t))] == re.findall(r"\d", text)
        context = renderer.privileged(row["problem"], row["generated_solution"], row["expected_answer"])
        shown = f"<|user|>Solution: {row['generated_solution']}\n{row['problem']}<|end|><|assistant|>"
        assert lab[1].decode(context) == shown


@every_style
def test_the_record_is_of_this_recipe_and_keeps_what_the_laboratory_promises(style):
    record = json.loads((TASKS[style].policy / "scores.json").read_text())
    assert record["recipe"] == json.loads(json.dumps(vars(TASKS[style].recipe)))
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
        ("lab_foreign", "learnable"),
    ],
)
def test_overlays_reach_the_prompts(config, overlay, tmp_path, monkeypatch, labs):
    monkeypatch.chdir(tmp_path)
    prompts = built(config, overlay)
    style = "other_signs" if overlay == "learnable" else "result_first"
    tokenizer = labs[style][1] if config == "lab_foreign" else load(STORIES.policy)[1]
    shown = [tokenizer.decode(ids).removeprefix("<|user|>Solution: ").split("\n")[0] for ids in prompts.privileged_ids]
    if overlay == "with_tier5":
        assert set(prompts.source) == {f"tier{t}" for t in TIERS}
        assert shown == prompts.solution
    elif overlay == "learnable":
        assert shown == prompts.solution
        assert all(re.fullmatch(r"(\d+[-+*]\d+ makes \d+; )+So \\boxed\{\d+\}", text) for text in shown)
    else:
        assert shown == [f"The final answer is \\boxed{{{answer}}}." for answer in prompts.reference]
        assert all(prompts.solution) == (overlay == "answer_only") != (not any(prompts.solution))
