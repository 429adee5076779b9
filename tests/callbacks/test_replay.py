"""Former cliffs come back after a delay, at most so many at a time, and exactly so after a resume."""

from types import SimpleNamespace

import pytest
import torch

from hdpo.callbacks import CliffDetection, CliffReplay, Station
from hdpo.errors import ConfigError
from hdpo.experience import Experience, Prompts
from tests.helpers import toy

SIZE = 4


class Dataset:
    """Row n is the problem "n"."""

    def prompts(self, rows, index):
        num = len(rows)
        return Prompts(
            index=torch.tensor(index),
            row=torch.tensor(rows),
            problem=[str(row) for row in rows],
            reference=[""] * num,
            solution=[""] * num,
            source=["s"] * num,
            prompt_ids=[[row] for row in rows],
            privileged_ids=[[row, row] for row in rows],
            valid=torch.ones(num, dtype=torch.bool),
            columns={"extra": [row * 10 for row in rows]},
        )


class Run:
    """Steps of a batch of four prompts, scripted: which of them are distilled, and which rows are ever solved."""

    def __init__(self, replay):
        self.replay = replay
        datamodule = SimpleNamespace(prompts_per_step=SIZE, dataset=lambda name: Dataset())
        self.trainer = SimpleNamespace(global_step=0, datamodule=datamodule)
        self.module = SimpleNamespace(cliffs=CliffDetection())

    def step(self, distilled=(), solved=(), rows=None):
        step, history = self.trainer.global_step, self.module.cliffs.history
        rows = [100 * step + i for i in range(SIZE)] if rows is None else rows
        batch = Experience(Dataset().prompts(rows, list(range(SIZE))))
        self.replay.after_prompts(self.trainer, self.module, batch)
        rows = batch.prompts.row.tolist()
        success = torch.tensor([[False, row in solved] for row in rows])
        batch.rollouts = SimpleNamespace(success=success, has_verdict=success | True, num_generations=2)
        batch.is_cliff = ~success.any(-1)
        history.visit(batch, step)
        self.replay.after_cliffs(self.trainer, self.module, batch)
        history.distil(distilled, step)
        history.finish()
        self.trainer.global_step += 1
        return batch


def replayed(batch):
    return {name: value for name, value in batch.measurements.means().items() if name.startswith("replay/")}


def test_a_cliff_returns_after_the_delay_and_once_more_if_it_is_solved():
    run = Run(CliffReplay(max_share=0.25, after_steps=2))
    run.step(distilled=[1, 3])
    assert run.step().prompts.row.tolist() == [100, 101, 102, 103], "not yet"
    first = run.step(solved=[1])
    assert first.prompts.row.tolist() == [200, 201, 202, 1], "one at a time: a quarter of four"
    assert first.prompts.index.tolist() == [0, 1, 2, 3]
    assert (first.prompts.problem[3], first.prompts.prompt_ids[3], first.prompts.privileged_ids[3]) == (
        "1",
        [1],
        [1, 1],
    )
    assert first.prompts.columns["extra"][3] == 10
    assert replayed(first) == {"replay/share": 0.25, "replay/converted": 1.0}
    second = run.step()
    assert second.prompts.row.tolist() == [300, 301, 302, 3]
    assert replayed(second)["replay/converted"] == 0.0
    third = run.step(solved=[1])
    assert third.prompts.row.tolist() == [400, 401, 402, 1], "does it last?"
    assert replayed(third) == {"replay/share": 0.25, "replay/durable": 1.0}
    for _ in range(4):
        assert max(run.step().prompts.row.tolist()) % 100 == 3, "nobody is left"


def test_a_cliff_that_is_distilled_again_waits_again():
    run = Run(CliffReplay(max_share=1.0, after_steps=1))
    run.step(distilled=[2])
    assert run.step(distilled=[2]).prompts.row.tolist()[-1] == 2
    assert run.step().prompts.row.tolist()[-1] == 2
    assert run.step().prompts.row.tolist()[-1] == 303


def test_a_cliff_that_is_seen_by_chance_has_returned():
    run = Run(CliffReplay(max_share=0.5, after_steps=2))
    run.step(distilled=[0, 1])
    assert replayed(run.step(rows=[0, 1, 11, 12], solved=[1])) == {"replay/share": 0}
    assert run.step().prompts.row.tolist() == [200, 201, 202, 203], (
        "row 0 failed, and row 1 waits for its second return"
    )
    last = run.step(solved=[1])
    assert last.prompts.row.tolist() == [300, 301, 302, 1]
    assert replayed(last) == {"replay/share": 0.25, "replay/durable": 1.0}


def test_state_goes_on_after_a_resume():
    run = Run(CliffReplay(max_share=0.5, after_steps=2))
    run.step(distilled=[0, 1, 2])
    run.step()
    other = Run(CliffReplay(max_share=0.5, after_steps=2))
    other.module.cliffs.load_state_dict(run.module.cliffs.state_dict())
    other.trainer.global_step = run.trainer.global_step
    for _ in range(4):
        assert other.step(solved=[0]).prompts.row.tolist() == run.step(solved=[0]).prompts.row.tolist()


def test_without_a_share_nothing_returns():
    run = Run(CliffReplay())
    run.step(distilled=[0])
    for step in range(1, 30):
        assert run.step().prompts.row.tolist() == [100 * step + i for i in range(SIZE)]


@pytest.mark.parametrize(("option", "value"), [("max_share", 1.5), ("max_share", -0.1), ("after_steps", 0)])
def test_bad_options_name_their_key(option, value):
    with pytest.raises(ConfigError, match=f"replay.{option}"):
        CliffReplay(**{option: value})


class Rows(Station):
    """The rows that each step trains on."""

    def __init__(self):
        self.steps = []

    def after_distillation(self, trainer, pl_module, batch):
        self.steps.append(batch.prompts.row.tolist())


def test_in_a_run_former_cliffs_come_back_also_after_a_resume(tmp_path):
    def fit(folder, steps, ckpt_path=None):
        rows, replay = Rows(), CliffReplay(max_share=0.5, after_steps=1)
        trainer = toy.trainer(folder, replay, rows, max_steps=steps, limit_val_batches=0)
        module = toy.module(optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
        trainer.fit(module, datamodule=toy.datamodule(tmp_path), ckpt_path=ckpt_path)
        return rows.steps

    straight = fit(tmp_path / "a", 5)
    assert set(straight[1]) & set(straight[0]), "a cliff of the first step is back in the second"
    assert len(set(straight[1]) & set(straight[0])) <= 3
    fit(tmp_path / "b", 3)
    assert fit(tmp_path / "b", 5, tmp_path / "b/checkpoints/last.ckpt") == straight[3:]
