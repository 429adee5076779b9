import json
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from hdpo.data import ColumnMapping, EvaluationSource, OpenMathDataModule, PromptConfig, Selection, SourceConfig
from hdpo.data.preparation import problem_digest
from hdpo.data.prompts import PromptRenderer
from hdpo.errors import ConfigError
from hdpo.experience import EvaluationSampling, Experience
from hdpo.lab.problems import rows as lab_rows
from hdpo.rewards import MathVerifier
from tests.helpers.openmath_fixture import tiny_tokenizer, write_openmath_parquet
from tests.helpers.toy import BoxedVerifier

LAB = "pkg://hdpo.lab/policy"
ARITHMETIC = {"path": "python:hdpo.lab.problems:rows", "kwargs": {"split": "train", "tiers": [1, 2]}}


SELECTION = Selection(
    num_train_problems=50,  # no multiple of 6: batches span passes
    num_val_problems=11,
    num_test_problems=7,
    val_fraction=0.2,
    test_fraction=0.1,
    check_references=False,
)


def datamodule(folder, *, select=None, **options) -> OpenMathDataModule:
    defaults = {
        "source": SourceConfig(**ARITHMETIC),
        "selection": replace(SELECTION, **(select or {})),
        "tokenizer": LAB,
        "prompts_per_step": 6,
        "val_batch_size": 4,
        "cache_dir": str(folder / "cache"),
        "seed": 7,
    }
    return OpenMathDataModule(**{**defaults, **options})


def evaluation_source(split="validation", seed=0, **options) -> EvaluationSource:
    return EvaluationSource(**{**ARITHMETIC, "kwargs": {"split": split, "seed": seed, "tiers": [1, 2]}, **options})


def ready(module: OpenMathDataModule, rank: int = 0, num_ranks: int = 1) -> OpenMathDataModule:
    """Set up as a Trainer would on one of several ranks."""
    if num_ranks > 1:
        module.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"rank": rank, "num_replicas": num_ranks},
            global_step=0,
            state=SimpleNamespace(fn=TrainerFn.FITTING),
            lightning_module=None,
        )
    module.prepare_data()
    module.setup("fit")
    return module


class Recorder(pl.LightningModule):
    """One optimizer step per batch by manual optimisation, as the real module; remembers what it was given."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.interrupt_at = interrupt_at
        self.seen: list[list[int]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: Experience, batch_idx: int):
        if self.global_step == self.interrupt_at:
            raise RuntimeError("interrupted")
        self.seen.append(batch.prompts.row.tolist())
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight * float(batch.prompts.row.sum()))
        optimizer.step()

    def validation_step(self, batch: Experience, batch_idx: int, dataloader_idx: int = 0):
        self.validated.append(batch.prompts.row[batch.prompts.valid].tolist())

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-4)


def trainer(folder, max_steps, *callbacks: Callback, **options) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **{"check_val_every_n_epoch": None, "val_check_interval": 2, **options},
    )


def every_step(folder) -> ModelCheckpoint:
    return ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten steps without interruption, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("straight")
    module = Recorder()
    trainer(folder, 10, every_step(folder)).fit(module, datamodule=datamodule(folder))
    return folder, module


def test_a_run_sees_every_pass_and_validates_in_between(straight):
    _, module = straight
    assert [len(rows) for rows in module.seen] == [6] * 10
    assert sorted([row for rows in module.seen for row in rows][:50]) == list(range(50))
    assert [row for rows in module.validated for row in rows] == 5 * list(range(11))


@pytest.mark.parametrize("step", [1, 3, 5, 8, 9])
def test_resuming_from_any_checkpoint_sees_exactly_the_batches_that_were_left(straight, step):
    folder, whole = straight
    checkpoint = folder / f"step={step}.ckpt"
    # Lightning fetches one batch ahead; the checkpoint must count what was trained on, not what was fetched.
    states = [v for v in torch.load(checkpoint, weights_only=True).values() if isinstance(v, dict) and "consumed" in v]
    assert [state["consumed"] for state in states] == [step * 6]
    module = Recorder()
    trainer(folder, 10).fit(module, datamodule=datamodule(folder), ckpt_path=checkpoint, weights_only=True)
    assert module.seen == whole.seen[step:]
    assert torch.equal(module.weight, whole.weight)


def test_a_run_that_stopped_and_was_resumed_twice_equals_the_straight_one(straight, tmp_path):
    _, whole = straight
    seen, path = [], None
    for stop in (3, 5, 10):
        module = Recorder()
        checkpoints = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=stop)
        trainer(tmp_path, stop, checkpoints).fit(module, datamodule=datamodule(tmp_path), ckpt_path=path)
        seen += module.seen
        path = tmp_path / f"step={stop}.ckpt"
    assert seen == whole.seen
    assert torch.equal(module.weight, whole.weight)


def test_a_run_that_died_within_a_step_repeats_that_step(straight, tmp_path):
    _, whole = straight
    module = Recorder(interrupt_at=4)
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer(tmp_path, 10, every_step(tmp_path)).fit(module, datamodule=datamodule(tmp_path))
    resumed = Recorder()
    trainer(tmp_path, 10).fit(resumed, datamodule=datamodule(tmp_path), ckpt_path=tmp_path / "step=4.ckpt")
    assert module.seen + resumed.seen == whole.seen


def test_a_checkpoint_of_a_resumed_run_counts_from_the_beginning(straight, tmp_path):
    folder, whole = straight
    trainer(tmp_path, 6, every_step(tmp_path)).fit(
        Recorder(), datamodule=datamodule(folder), ckpt_path=folder / "step=3.ckpt"
    )
    module = Recorder()
    trainer(tmp_path, 10).fit(module, datamodule=datamodule(folder), ckpt_path=tmp_path / "step=6.ckpt")
    assert module.seen == whole.seen[6:]


def test_a_second_fit_on_the_same_data_module_starts_over(straight, tmp_path):
    _, whole = straight
    data = datamodule(tmp_path)
    for _ in range(2):
        module = Recorder()
        trainer(tmp_path, 3).fit(module, datamodule=data)
        assert module.seen == whole.seen[:3]


def test_another_batch_size_continues_after_the_same_problems_and_is_forgotten_by_the_next_fit(straight, tmp_path):
    folder, whole = straight
    data = datamodule(folder, prompts_per_step=3)
    resumed, fresh = Recorder(), Recorder()
    trainer(tmp_path, 5).fit(resumed, datamodule=data, ckpt_path=folder / "step=3.ckpt")
    assert data.consumed == 3 * 6 + 2 * 3
    assert [row for rows in resumed.seen for row in rows] == whole.seen[3]
    trainer(tmp_path, 4).fit(fresh, datamodule=data)
    assert [row for rows in fresh.seen for row in rows] == whole.seen[0] + whole.seen[1]


def test_resuming_on_other_data_is_refused_in_one_line(straight):
    folder, _ = straight
    checkpoint = folder / "step=3.ckpt"
    for options, message in (
        (
            {"select": {"num_train_problems": 40}},
            "the checkpoint was trained on other problems than data.source gives now",
        ),
        ({"seed": 8}, "order of problems has seed 7, but data.seed is 8"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            trainer(folder, 10).fit(Recorder(), datamodule=datamodule(folder, **options), ckpt_path=checkpoint)
        assert "\n" not in str(caught.value)
    # Validation may be on any data; a checkpoint is not bound to what it was trained on.
    module = Recorder()
    trainer(folder, -1).validate(
        module, datamodule=datamodule(folder, select={"num_train_problems": 40}), ckpt_path=checkpoint, verbose=False
    )
    assert [row for rows in module.validated for row in rows] == list(range(11))


@pytest.mark.parametrize(
    ("method", "number"), [("validate", 11), ("test", 7), ("predict", 11)], ids=["validate", "test", "predict"]
)
def test_evaluation_sees_every_problem_once(tmp_path, method, number):
    module = Recorder()
    data = datamodule(tmp_path)
    options = {} if method == "predict" else {"verbose": False}
    getattr(trainer(tmp_path, -1), method)(module, datamodule=data, **options)
    assert module.validated == [list(range(number))[i : i + 4] for i in range(0, number, 4)]
    assert [report.name for report in data.reports] == ["test" if method == "test" else "validation"]
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1, "no other set was prepared"


def test_a_run_without_validation(tmp_path):
    module = Recorder()
    trainer(tmp_path, 3).fit(module, datamodule=datamodule(tmp_path, select={"num_val_problems": 0}))
    assert len(module.seen) == 3
    assert not module.validated


def test_the_training_loader_has_no_end_and_no_length(tmp_path):
    data = ready(datamodule(tmp_path))
    loader = data.train_dataloader()
    with pytest.raises(TypeError):
        len(loader)
    batches = list(islice(loader, 40))
    assert all(isinstance(batch, Experience) and len(batch) == 6 for batch in batches)
    prompts = batches[0].prompts
    assert prompts.index.tolist() == list(range(6))
    assert prompts.valid.all()
    for row, problem, ids in zip(prompts.row.tolist(), prompts.problem, prompts.prompt_ids, strict=True):
        assert data.dataset("train").column("problem")[row] == problem
        assert problem in data.tokenizer.decode(ids)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_one_global_batch_and_one_validation_pass(tmp_path, num_ranks):
    alone = ready(datamodule(tmp_path))
    ranks = [ready(datamodule(tmp_path), rank, num_ranks) for rank in range(num_ranks)]
    whole = islice(alone.train_dataloader(), 12)
    for expected, *parts in zip(whole, *(data.train_dataloader() for data in ranks), strict=False):
        assert [row for part in parts for row in part.prompts.row.tolist()] == expected.prompts.row.tolist()
        assert [i for part in parts for i in part.prompts.index.tolist()] == list(range(6))
    validation = [list(data.val_dataloader()[0]) for data in ranks]
    assert len({len(batches) for batches in validation}) == 1
    assert len(validation[0]) == len(ranks[0].val_dataloader()[0])
    prompts = [batch.prompts for batches in validation for batch in batches]
    assert sorted(row for p in prompts for row in p.row[p.valid].tolist()) == list(range(11))
    groups = dict.fromkeys(["tier1", "tier2"])
    assert ranks[0].evaluation_groups == ranks[-1].evaluation_groups == alone.evaluation_groups == groups
    assert all(data.state_dict() == alone.state_dict() for data in ranks)


def test_an_indivisible_batch_is_refused_before_the_run(tmp_path):
    with pytest.raises(ConfigError, match=r"data.prompts_per_step=6 cannot be split evenly over 4 ranks"):
        ready(datamodule(tmp_path), 0, 4)
    module = Recorder()
    module.update = SimpleNamespace(num_minibatches=4)
    with pytest.raises(ConfigError, match=r"data.prompts_per_step=6 cannot be split evenly over 4 minibatches"):
        trainer(tmp_path, 1).fit(module, datamodule=datamodule(tmp_path))
    for name in ("prompts_per_step", "val_batch_size"):
        with pytest.raises(ConfigError, match=f"data.{name} must be a number of at least 1, got 0"):
            datamodule(tmp_path, **{name: 0})


def test_nothing_is_there_before_setup(tmp_path):
    data = datamodule(tmp_path)
    assert data.state_dict() == {}
    with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\) for its stage"):
        data.train_dataloader()


def few(folder, number) -> SourceConfig:
    return SourceConfig(
        path="python:tests.data.slow_source:rows", kwargs={"log": str(folder / "log"), "number": number}
    )


def test_too_few_problems_are_told_or_refused(tmp_path):
    select = {"num_val_problems": 0}
    with pytest.warns(UserWarning, match=r"data.source ended after \d+ usable train problems; 50 are wanted"):
        ready(datamodule(tmp_path, source=few(tmp_path, 40), select=select))
    with pytest.raises(ConfigError, match=r"data.prompts_per_step=6 is more than the 4 training problems"):
        ready(datamodule(tmp_path, source=few(tmp_path, 4), select=select | {"num_test_problems": 0}))


def test_an_empty_validation_split_is_refused(tmp_path):
    message = r"data.source: no validation problem is left of python:.*; give more rows, another fraction in data.sel"
    with pytest.raises(ConfigError, match=message) as caught:
        ready(datamodule(tmp_path, source=few(tmp_path, 20), select={"val_fraction": 1e-9}))
    assert "\n" not in str(caught.value)


# Splits and sources


def problems_of(data, name):
    return {problem_digest(problem) for problem in data.dataset(name).column("problem")}


def prepared(folder, stage, **options):
    """The problems of each set that a stage needs."""
    data = datamodule(folder, **options)
    data.setup(stage)
    return data, {report.name: problems_of(data, report.name) for report in data.reports}


def test_training_validation_and_test_are_disjoint_and_each_stage_prepares_its_own(tmp_path):
    found = {stage: prepared(tmp_path, stage)[1] for stage in ("test", "validate", "fit", "predict")}
    assert {stage: list(sets) for stage, sets in found.items()} == {
        "test": ["test"], "validate": ["validation"], "fit": ["validation", "train"], "predict": ["validation"],
    }  # fmt: skip
    train, validation, test = found["fit"]["train"], found["validate"]["validation"], found["test"]["test"]
    assert (len(train), len(validation), len(test)) == (50, 11, 7)
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert found["fit"]["validation"] == validation == found["predict"]["validation"]
    # Without a test split its problems are trained on.
    _, without = prepared(tmp_path, "fit", select={"test_fraction": 0.0})
    assert without["train"] & test


def test_sources_of_their_own_are_held_out_of_what_comes_after_them(tmp_path):
    options = {
        "val_sources": {"same": evaluation_source("train"), "other": evaluation_source()},
        "test_source": SourceConfig(path=ARITHMETIC["path"], kwargs={"split": "train", "tiers": [1]}),
    }
    data, sets = prepared(tmp_path, "fit", **options)
    assert list(sets) == ["test", "validation/same", "validation/other", "train"]
    assert [len(problems) for problems in sets.values()] == [7, 11, 11, 50]
    test, same, other, train = sets.values()
    assert test == {problem_digest(row["problem"]) for row in lab_rows(7, split="train", tiers=[1])}
    for first, second in combinations((test, same, other, train), 2):
        assert not first & second
    # No problem of the training source is set aside for splits that nobody asks for.
    assert data.dataset("train").report.rows_read == 50 + data.dataset("train").report.dropped["held_out"]
    assert data.dataset("train").report.dropped["held_out"] == len(test) + len(same)


def test_a_test_split_of_the_training_source_leaves_out_validation_sources(tmp_path):
    _, sets = prepared(tmp_path, "test", val_source=SourceConfig(**ARITHMETIC), select={"num_val_problems": 500})
    assert len(sets["test"]) == 7
    assert not sets["test"] & sets["validation"]


def test_named_sources_have_their_own_limits_and_sampling(tmp_path):
    options = {
        "val_source": SourceConfig(path=ARITHMETIC["path"], kwargs={"split": "validation", "seed": 3, "tiers": [1, 2]}),
        "val_sources": {
            "few": evaluation_source(num_problems=3, num_samples=4, temperature=0.6, max_new_tokens=99),
            "many": evaluation_source(seed=1, num_problems=13),
        },
    }
    data = ready(datamodule(tmp_path, **options))
    batches = [[experience.prompts for experience in loader] for loader in data.val_dataloader()]
    assert [[prompts.dataset for prompts in loader] for loader in batches] == [[""] * 3, ["few"], ["many"] * 4]
    assert [sum(len(prompts) for prompts in loader) for loader in batches] == [11, 3, 13]
    assert batches[1][0].sampling == EvaluationSampling(num_samples=4, temperature=0.6, max_new_tokens=99)
    assert batches[0][0].sampling == batches[2][0].sampling == EvaluationSampling()
    assert next(iter(data.train_dataloader())).prompts.dataset == ""
    names = ["few", "few/tier1", "few/tier2", "many", "many/tier1", "many/tier2", "tier1", "tier2"]
    assert data.evaluation_groups == {name: 4 if name.startswith("few") else None for name in names}
    # Sampling and names are no part of the problems: nothing is prepared again.
    files = set((tmp_path / "cache").glob("*.arrow"))
    options["val_sources"] = {
        "brief": evaluation_source(num_problems=3, temperature=1.0), "many": evaluation_source(seed=1, num_problems=13)
    }  # fmt: skip
    again = ready(datamodule(tmp_path, **options))
    assert [report.name for report in again.reports] == ["validation", "validation/brief", "validation/many", "train"]
    assert set((tmp_path / "cache").glob("*.arrow")) == files
    module = Recorder()
    trainer(tmp_path, -1).validate(module, datamodule=data, verbose=False)
    assert sum(map(len, module.validated)) == 11 + 3 + 13


@pytest.mark.parametrize(
    ("stage", "select", "kind"),
    [
        ("test", {"test_fraction": 0.0}, "test"),
        ("test", {"num_test_problems": 0}, "test"),
        ("validate", {"num_val_problems": 0}, "val"),
        ("predict", {"val_fraction": 0.0}, "val"),
    ],
)
def test_nothing_to_evaluate_is_one_line(tmp_path, stage, select, kind):
    message = (
        f"data: there is nothing to {stage}: give data.{kind}_source, or data.selection.num_{kind}_problems and {kind}_"
    )
    with pytest.raises(ConfigError, match=message):
        datamodule(tmp_path, select=select).setup(stage)


def test_problems_without_answers_are_predicted(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"question": "1+1?", "id": 3}, {"question": "", "id": 4}, {"question": "1+1?", "id": [5]}]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = ColumnMapping(problem="question", solution=None, answer=None, source=None, extra=["id"])
    data = datamodule(
        tmp_path, predict_source=SourceConfig(path=str(path), columns=columns), select={"check_references": True},
        verifier=BoxedVerifier(),
    )  # fmt: skip
    data.setup("predict")
    ((experience,),) = [list(loader) for loader in data.predict_dataloader()]
    prompts = experience.prompts
    assert (prompts.problem, prompts.reference, prompts.privileged_ids) == (["1+1?"] * 2, [""] * 2, [[]] * 2)
    assert prompts.columns == {"id": [3, [5]]}
    assert (data.evaluation_groups, prompts.dataset) == ({"problems.jsonl": None}, "")


def test_the_laboratorys_validation_problems_are_the_first_of_their_split(tmp_path):
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / "lab.yaml").read_text())["data"]
    sources = {name: SourceConfig(**config[name]) for name in ("source", "val_source", "test_source")}
    data, sets = prepared(
        tmp_path,
        "fit",
        selection=Selection(**config["selection"] | {"num_train_problems": 300}),
        verifier=BoxedVerifier(),
        **sources,
    )
    first = [row["problem"] for row in lab_rows(240, split="validation")]
    assert data.dataset("validation").column("problem") == first
    train = [row["problem"] for row in lab_rows(300, split="train", tiers=[1, 2, 3, 4, 6])]
    assert data.dataset("train").column("problem") == train
    assert len(sets["test"]) == 240


# What comes from the LightningModule


class Owner(Recorder):
    """Has what the data module may take from a LightningModule."""

    def __init__(self, tokenizer, verifier, seed) -> None:
        super().__init__()
        self.tokenizer, self.verifier, self.seed = tokenizer, verifier, seed


class Odd(BoxedVerifier):
    """Takes odd answers of problems that it is given, and counts what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.closed = 0, 0

    def usable(self, references, prompts):
        assert len(prompts) == len(references)
        self.asked += len(references)
        return [int(reference) % 2 == 1 for reference in references]

    def identity(self):
        return {"class": "Odd"}

    def close(self):
        self.closed += 1


def test_tokenizer_verifier_and_seed_are_the_modules(tmp_path, tiny_policy_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    options = {"tokenizer": None, "verifier": None, "seed": None, "select": {"check_references": True}}
    seen = []
    for seed in (5, 6):
        module, data = Owner(tokenizer, Odd(), seed), datamodule(tmp_path, **options)
        trainer(tmp_path, 2).fit(module, datamodule=data)
        seen.append(module.seen)
        assert data.state_dict()["seed"] == seed
        assert module.verifier.closed == 0, "it is the module's to close"
        answers = data.dataset("train").column("answer") + data.dataset("validation").column("answer")
        assert all(int(answer) % 2 == 1 for answer in answers)
        prompt = data.dataset("train").prompts([0])
        assert prompt.prompt_ids[0] == PromptRenderer(tokenizer).student(prompt.problem[0])
        assert (module.verifier.asked > 0) == (seed == 5), "the second run reads the cache"
    own = datamodule(tmp_path, **options | {"seed": 5})
    module = Owner(tokenizer, Odd(), 6)
    trainer(tmp_path, 2).fit(module, datamodule=own)
    assert seen[0] == module.seen != seen[1]


def test_what_the_data_module_is_given_comes_first(tmp_path):
    given = Odd()
    data = datamodule(tmp_path, verifier=given, select={"check_references": True})
    module = Owner(tiny_tokenizer(), BoxedVerifier(), 1)
    trainer(tmp_path, 1).fit(module, datamodule=data)
    assert given.asked > 0
    assert given.closed == 1
    assert data.seed == 7
    assert data.tokenizer.name_or_path.endswith("hdpo/lab/policy")


def test_references_that_are_not_checked_are_all_kept(tmp_path):
    verifier = Odd()
    data = ready(datamodule(tmp_path, verifier=verifier))
    assert verifier.asked == 0
    assert {int(answer) % 2 for answer in data.dataset("train").column("answer")} == {0, 1}


def test_without_a_module_there_are_defaults_for_all_but_the_tokenizer(tmp_path):
    data = datamodule(tmp_path, tokenizer=None, seed=None)
    with pytest.raises(ConfigError, match=r"data.tokenizer: there is no policy to take it from; give its folder"):
        data.setup("fit")
    assert data.seed == 42
    assert isinstance(data.verifier, MathVerifier)
    assert OpenMathDataModule().sets[-1].source == SourceConfig(path="nvidia/OpenMathInstruct-2")


def test_a_context_from_a_column_and_extra_columns_reach_the_batch(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"q": f"{i}+1?", "a": i + 1, "formula": f"{i}+1" if i % 2 else None, "tests": [{"input": i}]} for i in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    columns = ColumnMapping("q", None, "a", None, context="formula", extra=["tests", "a"])
    source = SourceConfig(path=str(path), columns=columns)
    prompts = PromptConfig(privileged_context="column", instruction="")
    data = ready(datamodule(tmp_path, source=source, prompts=prompts, select={"val_fraction": 0.0}))
    batch = next(iter(data.train_dataloader())).prompts
    for problem, ids, tests, answer in zip(
        batch.problem, batch.privileged_ids, batch.columns["tests"], batch.columns["a"], strict=True
    ):
        number = int(problem.split("+")[0])
        assert (tests, answer) == ([{"input": number}], number + 1)
        assert bool(ids) == bool(number % 2)
        assert not ids or f"problem below:\n\n{number}+1\n\n" in data.tokenizer.decode(ids)
    train = data.dataset("train")
    everything = train.prompts(range(len(train)))
    assert train.report.not_distilled["no_context"] == sum(not ids for ids in everything.privileged_ids)
    for option, key in (("hint", "solution"), ("column", "context")):
        columns = ColumnMapping(solution=None)
        with pytest.raises(ConfigError, match=f"={option} needs a column for data.source.columns.{key}"):
            OpenMathDataModule(SourceConfig(columns=columns), PromptConfig(privileged_context=option))


def test_openmath_from_end_to_end(tmp_path, tiny_policy_dir):
    """The real schema, LaTeX answers, a Qwen-style policy, and references graded by the real verifier."""
    data = ready(
        datamodule(
            tmp_path,
            source=SourceConfig(path=str(write_openmath_parquet(tmp_path / "train.parquet", 900))),
            tokenizer=str(tiny_policy_dir),
            selection=Selection(None, None, val_fraction=0.2, test_fraction=0.0),
        )
    )
    reports = data.reports
    assert [report.rows_read for report in reports] == [900, 900]
    assert sum(sum(report.dropped.values()) + report.kept for report in reports) == 900
    reasons = {"missing_problem", "missing_solution", "missing_answer", "unusable", "duplicate"}
    assert reasons == {reason for report in reports for reason in report.dropped}
    assert list(data.evaluation_groups) == sorted(set(data.dataset("train").column("source")))
    assert len(data.evaluation_groups) > 1
    prompts = next(iter(data.train_dataloader())).prompts
    for student, privileged, solution in zip(prompts.prompt_ids, prompts.privileged_ids, prompts.solution, strict=True):
        texts = [data.tokenizer.decode(ids) for ids in (student, privileged)]
        assert all(text.endswith("<|im_end|>\n<|im_start|>assistant\n") for text in texts)
        assert solution in texts[1]
        assert solution not in texts[0]
    # No reference answer of a well-formed kind may be lost: what is unparseable was made so.
    answers = data.dataset("train").column("answer") + data.dataset("validation").column("answer")
    for part in ("\\frac", "[", "\\{", "\\text{ km}", "pmatrix", "\\infty", "\\sqrt", "\\text{odd}", "x^2", "("):
        assert any(part in answer for answer in answers), part
