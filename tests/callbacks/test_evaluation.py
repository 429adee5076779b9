"""When a run is evaluated, and what is recorded."""

import gzip
import hashlib
import json

import pytest
from lightning.pytorch import Callback

from hdpo.callbacks import BestCheckpoint
from hdpo.callbacks.evaluation import _print_scores
from hdpo.errors import ConfigError
from hdpo.evaluation.provenance import provenance, read_provenance
from hdpo.evaluation.records import COLUMNS, read_records
from tests.helpers import toy
from tests.helpers.reference import boxed


def fit(folder, **options):
    trainer = toy.trainer(folder, max_steps=1)
    trainer.fit(toy.module(), datamodule=toy.datamodule(folder.parent, num_val_problems=3), **options)


def test_a_run_that_was_killed_in_its_last_evaluation_makes_up_for_it(tmp_path):
    folder = tmp_path / "run"
    fit(folder)
    last = folder / "evaluations" / "step_000001.jsonl.gz"
    content = last.read_bytes()
    last.unlink()
    (folder / "summary.json").unlink()
    (checkpoint,) = folder.rglob("last.ckpt")
    fit(folder, ckpt_path=checkpoint)
    assert last.read_bytes() == content
    assert (folder / "summary.json").is_file()
    assert len(list(last.parent.iterdir())) == 2


def test_a_row_says_everything_about_a_sample(tmp_path):
    """Each completion can be drawn again from its row, and graded again."""
    import torch

    from hdpo.functional.random import Purpose, derive_seeds
    from hdpo.rewards.boxed import last_boxed

    trainer = toy.trainer(tmp_path / "run", max_steps=1)
    module = toy.module(rollouts={"val_temperature": 1.3, "val_max_new_tokens": 30})
    data = toy.datamodule(tmp_path, num_val_problems=4, val_source=toy.source("validation", [1, 6]))
    trainer.fit(module, datamodule=data)
    path = tmp_path / "run" / "evaluations" / "step_000001.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(rows) == 4 * (2 + 1)
    assert [(row["row"], row["greedy"], row["sample"]) for row in rows[:4]] == [
        (0, False, 0), (0, False, 1), (0, True, 0), (1, False, 0)
    ]  # fmt: skip
    problems = data.dataset("validation").prompts(range(4))
    for row in rows:
        assert set(row) == set(COLUMNS)
        assert (row["step"], row["split"], row["temperature"]) == (1, "validation", 0.0 if row["greedy"] else 1.3)
        seeds = derive_seeds(module.seed, Purpose.EVALUATION, 0, torch.tensor([[row["row"]]]), torch.arange(2))
        assert row["seed"] == int(seeds[0, row["sample"]])
        assert row["answer"] == last_boxed(row["completion"])
        assert row["outcome"] == boxed(row["completion"], row["reference"])
        assert row["reference"] == problems.reference[row["row"]]
        assert row["problem_hash"] == hashlib.sha256(problems.problem[row["row"]].encode()).hexdigest()[:16]
        ids = module.tokenizer.encode(row["completion"], add_special_tokens=False)
        assert row["tokens"] == (30 if row["truncated"] else len(ids) + 1), "with the end-of-sequence token"
    assert any(row["truncated"] for row in rows)
    assert not all(row["truncated"] for row in rows)


def test_what_was_spent_is_recorded_with_each_evaluation(tmp_path):
    class Count(Callback):
        def __init__(self):
            self.tokens, self.rates = [0], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            privileged = batch.privileged
            tokens = int(batch.rollouts.completion_mask.sum())
            tokens += 0 if privileged is None else int(privileged.rollouts.completion_mask.sum())
            self.tokens.append(self.tokens[-1] + tokens)
            self.rates.append(float(batch.is_cliff.float().mean()))

    count = Count()
    folder = tmp_path / "run"
    toy.trainer(folder, count, max_steps=2, val_check_interval=1).fit(toy.module(), datamodule=toy.datamodule(tmp_path))
    found = read_provenance(folder)
    assert found["processes"] == [provenance()]
    spent = found["evaluations"]
    assert list(spent) == ["validation/0", "validation/1", "validation/2"]
    assert [entry["tokens"] for entry in spent.values()] == count.tokens
    assert 0 == spent["validation/0"]["train_seconds"] < spent["validation/1"]["train_seconds"]
    assert spent["validation/2"]["recent"]["cliff/fraction"] == pytest.approx(sum(count.rates) / 2, rel=1e-5)
    # A resumed run goes on counting.
    (checkpoint,) = folder.rglob("last.ckpt")
    rest = Count()
    trainer = toy.trainer(folder, rest, max_steps=3)
    trainer.fit(toy.module(), datamodule=toy.datamodule(tmp_path), ckpt_path=checkpoint)
    assert len(rest.rates) == 1
    last = read_provenance(folder)["evaluations"]["validation/3"]
    assert last["tokens"] == count.tokens[-1] + rest.tokens[-1]
    assert last["recent"]["cliff/fraction"] == pytest.approx(sum(count.rates + rest.rates) / 3, rel=1e-5)


def test_fit_can_evaluate_on_the_test_problems(tmp_path):
    data = {"test_source": toy.source("validation", [5]), "num_test_problems": 5}

    def problems(evaluated):
        folder = tmp_path / evaluated
        datamodule = toy.datamodule(tmp_path, evaluation_split=evaluated, **data)
        trainer = toy.trainer(folder, max_steps=1)
        trainer.fit(toy.module(), datamodule=datamodule)
        metrics = {name.split("/")[0] for name in trainer.callback_metrics if "pass@" in name and "/" in name}
        assert metrics == {"test" if evaluated == "test" else "val"}
        found = read_records(folder / "evaluations" / "step_000001.jsonl.gz")
        return found, datamodule.dataset("train").fingerprint

    (validation, train), (test, same) = problems("validation"), problems("test")
    assert (validation.split, test.split, len(test.rows)) == ("validation", "test", 5)
    assert set(test.sources) == {"tier5"}
    assert train == same, "the training problems do not depend on it"


def test_nothing_is_chosen_on_the_test_problems(tmp_path):
    def fit_best(monitor):
        trainer = toy.trainer(tmp_path, BestCheckpoint(monitor=monitor), max_steps=1)
        data = toy.datamodule(
            tmp_path, evaluation_split="test", test_source=toy.source("validation", [5]), num_test_problems=4
        )
        trainer.fit(toy.module(), datamodule=data)

    with pytest.raises(ConfigError, match=r"best_checkpoint.monitor must be null where data.evaluation_split is test"):
        fit_best("auto")
    fit_best(None)
    assert not list(tmp_path.rglob("best.ckpt"))


def test_names_with_brackets_are_printed_as_they_are(capsys, tmp_path):
    one = {"value": 0.5, "low": 0.25, "high": 0.75}
    scores = {
        name: {"num_problems": 3, "pass@1": one, "greedy_accuracy": one} for name in ("all", "a [hard]", "f[/math]")
    }
    _print_scores("test", scores, tmp_path)
    printed = capsys.readouterr().out
    assert "a [hard]" in printed
    assert "f[/math]" in printed
    assert printed.count("0.500 [0.25, 0.75]") == 6
