"""What a person reads: sample texts and predictions."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hdpo.callbacks import CliffDetection, PredictionWriter, SampleLogger
from hdpo.experience import PrivilegedRollouts


@pytest.fixture
def watched(trainer, tmp_path):
    texts = []
    experiment = SimpleNamespace(add_text=lambda tag, text, step: texts.append((tag, text, step)))
    vars(trainer).update(
        is_global_zero=True, loggers=[SimpleNamespace(experiment=experiment)], log_dir=str(tmp_path), texts=texts
    )
    return trainer


def finished(scored, module, trainer):
    batch = scored([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    CliffDetection().on_train_batch_start(trainer, module, batch, 0)
    one = {name: getattr(batch.rollouts, name)[:1, :1] for name in ("rewards", "completion_mask", "truncated")}
    rollouts = replace(batch.rollouts, texts=[["2*3*4 | x"]], outcomes=[["correct"]], **one)
    batch.privileged = PrivilegedRollouts([0], rollouts)
    return batch


def test_cliffs_come_with_their_privileged_rollouts(scored, module, watched, tmp_path):
    batch = finished(scored, module, watched)
    watched.global_step = 51
    SampleLogger(every_n_steps=25, num_prompts=1).on_train_batch_end(watched, module, None, batch, 0)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(r["problem"], r["is_cliff"], r["step"]) for r in rows] == [("b", False, 50), ("a", True, 50)]
    verdict = {"outcome": "correct", "reward": 0.0, "tokens": 1, "truncated": False}
    assert rows[1]["privileged"] == [{"text": "2*3*4 | x", **verdict}]
    assert (rows[1]["prompt"], rows[1]["privileged_prompt"]) == ("\\boxed{10}", "\\boxed{10}")
    (tag, text, step) = watched.texts[1]
    assert (tag, step) == ("samples/cliff_1", 50)
    plain, privileged = text.split("**privileged prompt:**")
    assert "*wrong, reward 0, 1 tokens:*\n\n    x" in plain
    assert privileged == "\n\n    \\boxed{10}\n\n*correct, reward 0, 1 tokens:*\n\n    2*3*4 | x"


@pytest.mark.parametrize(("every", "step"), [(25, 52), (0, 1)])
def test_other_steps_write_nothing(scored, module, watched, tmp_path, every, step):
    watched.global_step = step
    SampleLogger(every_n_steps=every).on_train_batch_end(watched, module, None, finished(scored, module, watched), 0)
    assert not list(tmp_path.iterdir())


HOSTILE = "a ``` b | c\n\n# no heading\n<script>alert(1)</script> \x1b[31m\x00\u202e\ud800 `x` $y_1$"


def test_no_text_escapes_from_its_block(scored, module, watched, tmp_path):
    """What a policy writes is seen as it is, whatever Markdown would make of it."""
    import markdown  # comes with TensorBoard, which renders texts with it

    batch = finished(scored, module, watched)
    batch.rollouts.texts[0] = [HOSTILE, "y"]
    batch.prompts.problem[0] = HOSTILE
    watched.global_step = 1
    SampleLogger(every_n_steps=1, num_prompts=1).on_train_batch_end(watched, module, None, batch, 0)
    text = watched.texts[1][1]
    shown = markdown.markdown(text, extensions=["markdown.extensions.tables", "markdown.extensions.fenced_code"])
    expected = (
        "a ``` b | c\n\n# no heading\n&lt;script&gt;alert(1)&lt;/script&gt; \\x1b[31m\\x00\\u202e\\ud800 `x` $y_1$"
    )
    assert shown.count(expected) == 2
    assert "<script" not in shown
    assert "<h1" not in shown
    assert "<table" not in shown
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert rows[1]["completions"][0]["text"] == HOSTILE


def test_on_resume_later_samples_and_half_a_line_go_whatever_the_texts_hold(scored, module, watched, tmp_path):
    """JSON leaves U+2028 and its like as they are, and ``str.splitlines`` takes them for ends of lines."""
    batch, logger = finished(scored, module, watched), SampleLogger(every_n_steps=1)
    batch.rollouts.texts[0] = ["a\u2028b\u2029c\x85d", "y"]
    for watched.global_step in (3, 4, 5):
        logger.on_train_batch_end(watched, module, None, batch, 0)
    path = tmp_path / "samples.jsonl"
    whole = path.read_text(encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "prob')
    watched.global_step = 4
    logger.on_train_start(watched, module)
    kept = path.read_text(encoding="utf-8")
    assert whole.startswith(kept)
    rows = [json.loads(line) for line in kept.split("\n")[:-1]]
    assert {row["step"] for row in rows} == {2, 3}
    assert rows[-2]["completions"][0]["text"] == "a\u2028b\u2029c\x85d"


def test_predictions_leave_repeated_problems_out(scored, module, watched, tmp_path):
    batch = finished(scored, module, watched)
    batch.greedy, batch.prompts.valid[2] = batch.rollouts, False
    watched.world_size = 1
    writer = PredictionWriter()
    writer.on_predict_start(watched, module)
    writer.on_predict_batch_end(watched, module, None, batch, 0)
    writer.on_predict_end(watched, module)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == [40, 50, 70]
    assert [(one["text"], one["outcome"]) for one in rows[1]["samples"]] == [("x", "correct"), ("x", "wrong")]


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match=r"samples.every_n_steps"):
        SampleLogger(every_n_steps=-1)
