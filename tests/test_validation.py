"""A fit with two evaluations: what is logged, recorded, summarised and kept agrees, and each starts anew."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from hdpo.callbacks import BestCheckpoint, Evaluation, LastCheckpoint
from hdpo.evaluation.records import read_gzip, read_records, recompute, record_path
from hdpo.rewards import Grade, Outcome, Verifier
from tests.helpers import toy
from tests.helpers.record import Recorder
from tests.helpers.reference import boxed, flat
from tests.helpers.tolerances import of_sum


class Partial(Verifier):
    """Half a reward for any box, and a verdict of its own: whoever takes a reward for a success counts too many."""

    def grade(self, completions, references, **columns):
        grades = []
        for completion, reference in zip(completions, references, strict=True):
            outcome = Outcome(boxed(completion, reference))
            # Some verdict that is not the same for samples and greedy completions.
            if zlib.crc32(completion.encode()) % 3 == 0:
                outcome = Outcome.WRONG
            grades.append(Grade(outcome, 0.5 if outcome is not Outcome.NO_ANSWER else 0.0))
        return grades

    def usable(self, references, **columns):
        return [bool(r) for r in references]


class Watch(Callback):
    """Values of each evaluation as the trainer has them, and the weights that were evaluated."""

    def __init__(self):
        self.values, self.weights, self.files = {}, {}, []

    def on_validation_end(self, trainer, pl_module):
        step = trainer.global_step
        self.values[step] = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        self.weights[step] = flat(pl_module.student)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        last = Path(trainer.log_dir) / "checkpoints" / "last.ckpt"
        saved = torch.load(last, weights_only=False)["global_step"] if last.exists() else None
        self.files.append(saved)


PASS_K = (1, 3)


def module(**options):
    rollouts = {"num_generations": 4, "num_val_samples": 3, "val_temperature": 2.0, "max_new_tokens": 40}
    return toy.module(verifier=Partial(), pass_k=PASS_K, rollouts=rollouts, engine=Recorder(), **options)


def trainer(folder, *callbacks, **options):
    return toy.trainer(folder, logger=CSVLogger(folder, version="run"), callbacks=list(callbacks), **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Five steps; evaluated before, after 2 and 4, and at the end."""
    folder = tmp_path_factory.mktemp("run")
    watch, best = Watch(), BestCheckpoint()
    fitter = trainer(
        folder,
        Evaluation(summary=False),
        LastCheckpoint(every_n_steps=2),
        best,
        watch,
        max_steps=5,
        val_check_interval=2,
    )
    fitted = module()
    data = toy.datamodule(folder, num_val_problems=8, val_source=toy.source("validation", [1, 2, 6]))
    fitter.fit(fitted, datamodule=data)
    return Path(fitter.log_dir), watch, fitted, best


def test_each_evaluation_logs_what_its_records_say(run):
    folder, watch, _, _ = run
    assert sorted(watch.values) == [0, 2, 4, 5]
    for step, values in watch.values.items():
        recorded = read_records(record_path(folder / "evaluations", step))
        assert recorded.rows == tuple(("", row) for row in range(8))
        assert (recorded.step, recorded.split) == (step, "validation")
        expected = {}
        for source, numbers in recompute(recorded, PASS_K).items():
            prefix = "val/" if source == "all" else f"val/{source}/"
            expected |= {prefix + name: n["value"] for name, n in numbers.items() if name != "num_problems"}
        assert values == pytest.approx(expected, abs=of_sum(8, 1.0))
    # Otherwise a metric that is never reset, or takes a sample for the greedy completion, would say the same.
    curves = [[values[name] for values in watch.values.values()] for name in ("val/pass@1", "val/greedy_accuracy")]
    assert all(len(set(curve)) > 1 for curve in curves)
    assert curves[0] != curves[1]
    assert len({values["val/pass@3"] for values in watch.values.values()}) > 1


def test_records_are_the_verifiers_word_on_what_was_sampled(run, tmp_path):
    folder, _, fitted, _ = run
    # The engine's calls before the first step: three batches, sampled and greedy.
    calls = fitted.engine.calls[:4]
    assert [call.temperature for call in calls] == [2.0, 0.0] * 2
    path = record_path(folder / "evaluations", 0)
    recorded = read_records(path)
    rows = [row for _, row in read_gzip(path)]
    references = [row["reference"] for row in rows if row["greedy"]]
    grader, position, partial = Partial(), 0, 0
    for sampled, greedy in (calls[:2], calls[2:4]):
        for samples, (first,) in zip(sampled.ids, greedy.ids, strict=True):
            texts = fitted.tokenizer.batch_decode([*samples, first], skip_special_tokens=True)
            grades = grader.grade(texts, [references[position]] * len(texts))
            right = "".join(str(int(grade.outcome is Outcome.CORRECT)) for grade in grades)
            assert recorded.samples[position] + recorded.greedy[position] == right
            mine = [row["outcome"] for row in rows if row["row"] == position]
            assert mine == [grade.outcome.value for grade in grades]
            partial += sum(grade.reward > 0 and grade.outcome is Outcome.WRONG for grade in grades)
            position += 1
    assert position == 8
    assert partial, "rewards that are no success"


def test_the_summary_compares_the_first_record_with_the_last(run):
    folder, watch, _, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    recorded = {
        step: recompute(read_records(record_path(folder / "evaluations", step)), PASS_K) for step in watch.values
    }
    assert summary["before"] == recorded[0]
    assert summary["after"] == recorded[5]
    assert summary["before"] != summary["after"]
    assert summary["steps"] == 5
    assert summary["evaluations"] == {str(step): values["all"] for step, values in recorded.items()}


def test_the_best_checkpoint_is_the_one_with_the_best_record(run):
    folder, watch, _, best = run
    assert best.monitor == "val/pass@3"
    candidates = {step: values["val/pass@3"] for step, values in watch.values.items()}
    largest = max(candidates.values())
    assert min(candidates.values()) < largest
    content = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=False)
    step = content["global_step"]
    assert candidates[step] == largest
    weights = [v.double().flatten() for k, v in content["state_dict"].items() if k.startswith("policy.")]
    assert torch.equal(torch.cat(weights), watch.weights[step])
    assert best.best_score == pytest.approx(largest)
    assert len(list((folder / "checkpoints").glob("best-*"))) == 1


def test_the_last_checkpoint_is_written_at_its_interval_and_at_the_end(run):
    folder, watch, _, _ = run
    # Seen before the step's own checkpoint is written.
    assert watch.files == [None, None, 2, 2, 4]
    checkpoints = folder / "checkpoints"
    for step, path in ((5, checkpoints / "last.ckpt"), (4, checkpoints / "last-000004.ckpt")):
        content = torch.load(path, weights_only=False)
        assert content["global_step"] == step
        assert content["optimizer_states"]
    assert len(list(checkpoints.glob("last-*"))) == 2, "the last two are kept"


@pytest.mark.parametrize(("options", "evaluated"), [
    ({}, [0, 2, 3]),
    ({"before_fit": False}, [2, 3]),
    ({"after_fit": False}, [0, 2]),
    ({"before_fit": False, "after_fit": False}, [2]),
])  # fmt: skip
def test_when_a_run_is_evaluated(tmp_path, options, evaluated):
    evaluation, watch = Evaluation(summary=False, **options), Watch()
    fitter = trainer(tmp_path, evaluation, watch, max_steps=3, val_check_interval=2)
    fitter.fit(module(), datamodule=toy.datamodule(tmp_path, num_val_problems=2))
    assert list(watch.values) == evaluated
    files = sorted((Path(fitter.log_dir) / "evaluations").iterdir())
    assert [file.name for file in files] == [f"step_{step:06d}.jsonl.gz" for step in evaluated]


def test_a_resumed_run_is_evaluated_where_its_checkpoint_came_before_the_evaluation(tmp_path):
    data = {"num_val_problems": 2}
    evaluated = []
    for stop, ckpt_path in ((2, None), (3, "last"), (5, "last")):
        watch, last = Watch(), LastCheckpoint(every_n_steps=1)
        fitter = trainer(
            tmp_path, Evaluation(summary=False, after_fit=False), watch, last, max_steps=stop, val_check_interval=2
        )
        path = None if ckpt_path is None else Path(fitter.log_dir) / "checkpoints" / "last.ckpt"
        fitter.fit(module(), datamodule=toy.datamodule(tmp_path, **data), ckpt_path=path)
        evaluated.append(list(watch.values))
    # Before the first step, at step 2, and at step 4; a checkpoint of step 2 is from before its evaluation.
    assert evaluated == [[0, 2], [2], [4]]


def test_a_last_step_at_the_interval_is_evaluated_once(tmp_path):
    watch, starts = Watch(), []
    watch.on_validation_start = lambda trainer, module: starts.append(trainer.global_step)
    fitter = trainer(tmp_path, Evaluation(summary=False), watch, max_steps=4, val_check_interval=2)
    fitter.fit(module(), datamodule=toy.datamodule(tmp_path, num_val_problems=2))
    assert starts == [0, 2, 4]


def test_the_metrics_follow_the_sources_of_the_data(tmp_path):
    fitted, found = module(), []
    for tiers in ([1], [2, 6], [2, 6]):
        watch = Watch()
        data = toy.datamodule(tmp_path, num_val_problems=4, val_source=toy.source("validation", tiers))
        trainer(tmp_path, watch, max_steps=-1).validate(fitted, datamodule=data, verbose=False)
        found.append(watch.values[0])
    names = [sorted({name.split("/")[1] for name in values if name.count("/") == 2}) for values in found]
    assert names == [["tier1"], ["tier2", "tier6"], ["tier2", "tier6"]]
    assert found[1] == found[2], "an evaluation adds nothing to the next"


def test_named_sets_are_sampled_as_each_says(tmp_path):
    from hdpo.data import EvaluationSource

    fitted = module()
    sources = {
        "few": EvaluationSource(
            **vars(toy.source("validation", [1])), num_problems=2, num_samples=5, temperature=0.7, max_new_tokens=3
        ),
        "plain": EvaluationSource(**vars(toy.source("validation", [2])), num_problems=3),
    }
    data = toy.datamodule(tmp_path, val_source=None, val_sources=sources)
    trainer(tmp_path, max_steps=-1).validate(fitted, datamodule=data, verbose=False)
    few, greedy, plain, _ = fitted.engine.calls
    assert (few.temperature, len(few.ids), len(few.ids[0])) == (0.7, 2, 5)
    assert max(len(ids) for group in few.ids + greedy.ids for ids in group) <= 3
    assert (plain.temperature, len(plain.ids), len(plain.ids[0])) == (2.0, 3, 3)
    assert max(len(ids) for group in plain.ids for ids in group) > 3


def test_a_test_run_has_its_own_folder_names_and_step(tmp_path):
    fitted, watch = module(), Watch()
    data = {"num_val_problems": 2, "num_test_problems": 3, "test_source": toy.source("validation", [3])}
    fitter = trainer(tmp_path, LastCheckpoint(), max_steps=2, limit_val_batches=0)
    fitter.fit(fitted, datamodule=toy.datamodule(tmp_path, **data))
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    other = toy.trainer(
        tmp_path, logger=CSVLogger(tmp_path, version="test"), callbacks=[Evaluation(summary=False), watch], max_steps=-1
    )
    other.test(module(), datamodule=toy.datamodule(tmp_path, **data), ckpt_path=checkpoint, verbose=False)
    values = {name: value.item() for name, value in other.callback_metrics.items()}
    assert {name.split("/")[0] for name in values if "/" in name} == {"test"}
    (file,) = (Path(other.log_dir) / "tests").iterdir()
    assert file.name == "step_000002.jsonl.gz", "steps that the weights have seen"
    records = read_records(file)
    assert (len(records.rows), records.split, records.step) == (3, "test", 2)
    expected = recompute(records, PASS_K)["all"]
    assert values["test/pass@3"] == pytest.approx(expected["pass@3"]["value"], abs=of_sum(8, 1.0))
    assert values["test/greedy_accuracy"] == pytest.approx(expected["greedy_accuracy"]["value"], abs=of_sum(8, 1.0))
    assert not (Path(other.log_dir) / "evaluations").exists()


def test_a_monitor_of_the_smallest_is_possible(tmp_path):
    best, watch = BestCheckpoint(monitor="val/tier6/pass@1", mode="min"), Watch()
    fitter = trainer(tmp_path, Evaluation(summary=False), best, watch, max_steps=4, val_check_interval=1)
    data = toy.datamodule(tmp_path, num_val_problems=5, val_source=toy.source("validation", [6]))
    fitter.fit(replaced(module()), datamodule=data)
    candidates = {step: values["val/tier6/pass@1"] for step, values in watch.values.items()}
    content = torch.load(Path(fitter.log_dir) / "checkpoints" / "best.ckpt", weights_only=False)
    assert candidates[content["global_step"]] == min(candidates.values()) == pytest.approx(best.best_score)


def replaced(fitted):
    """Learns fast, so that the evaluations differ."""
    fitted.optimizer_factory = lambda parameters: torch.optim.AdamW(parameters, lr=3e-3)
    return fitted


@pytest.mark.parametrize(("step", "score"), [(0, None), (3, 0.5)])
def test_the_best_score_is_that_of_one_fit(step, score):
    """A callback may serve several, or a trainer that goes on."""
    best = BestCheckpoint(monitor="val/greedy_accuracy")
    best.best_score = 0.5
    trainer = SimpleNamespace(strategy=SimpleNamespace(checkpoint_io=None), datamodule=None, global_step=step)
    best.setup(trainer, None, "validate")
    assert best.best_score == 0.5
    best.setup(trainer, None, "fit")
    assert best.best_score == score
