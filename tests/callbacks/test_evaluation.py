"""When a run is evaluated."""

from tests import toy


def fit(folder, **options):
    trainer = toy.trainer(folder, max_steps=1)
    trainer.fit(toy.module(), datamodule=toy.datamodule(folder.parent, num_val_problems=3), **options)


def test_a_run_that_was_killed_in_its_last_evaluation_makes_up_for_it(tmp_path):
    folder = tmp_path / "run"
    fit(folder)
    last = folder / "evaluations" / "step_000001.jsonl"
    content = last.read_bytes()
    last.unlink()
    (folder / "summary.json").unlink()
    (checkpoint,) = folder.rglob("last.ckpt")
    fit(folder, ckpt_path=checkpoint)
    assert last.read_bytes() == content
    assert (folder / "summary.json").is_file()
    assert len(list(last.parent.iterdir())) == 2

    written = last.stat().st_mtime_ns
    fit(folder, ckpt_path=checkpoint)
    assert last.stat().st_mtime_ns == written, "it was there already"
