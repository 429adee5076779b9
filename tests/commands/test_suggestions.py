"""A key that there is not is refused in one line that names it, and the one that was probably meant."""

import pytest

from hdpo.cli import main
from hdpo.errors import did_you_mean

LAB = ["--config", "lab"]
LINES = {
    "command": (["fti"], "fti", "fit"),
    "sweep": (["sweep", *LAB, "--job", "2"], "--job 2", "jobs"),
    "sweep, an abbreviation": (["sweep", *LAB, "--seed", "3"], "--seed 3", "seeds"),
    "report": (["report", "runs", "--basline", "grpo"], "--basline grpo", "baseline"),
    "show": (["show", "run", "--clifs"], "--clifs", "cliffs"),
    "export": (["export", *LAB, "--ckpt_path", "a", "--out", "b", "--cofig", "c"], "--cofig c", "config"),
    "plan": (["plan", *LAB, "--device", "8"], "--device", "--devices"),
    "plan, of fit": (
        ["plan", *LAB, "--model.update.micro_batch_token=8"],
        "micro_batch_token=8",
        "model.update.micro_batch_tokens",
    ),
    "an abbreviation": (["fit", *LAB, "--trainer.max_step=3"], "--trainer.max_step=3", "trainer.max_steps"),
    "section": (["validate", *LAB, "--moodel.pass_k=[1]"], "--moodel.pass_k=[1]", "model.pass_k"),
    "section left out": (["test", *LAB, "--max_new_tokens=3"], "--max_new_tokens=3", "rollouts.max_new_tokens"),
    "key above a class's arguments": (
        ["predict", *LAB, "--model.verifer.init_args.timeout=3"],
        "--model.verifer.init_args.timeout=3",
        "model.verifier.init_args.timeout",
    ),
    "argument of a class": (["fit", *LAB, "--model.verifier.init_args.profil=strict"], "'profil'", "profile"),
}
FILES = {
    "section": ("modle: {distillation_weight: 1}", "'modle.distillation_weight'", "model.distillation_weight"),
    "key": ("data: {selection: {num_train_problem: 8}}", "num_train_problem'", "data.selection.num_train_problems"),
    "argument of a class": (
        "model: {teacher: {class_path: hdpo.teacher.EMATeacher, init_args: {deacy: 0.9}}}",
        "'deacy'",
        "decay",
    ),
}


def refusal(capsys, args):
    try:
        status = main(args)
    except SystemExit as end:
        status = end.code
    assert status == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("name", LINES)
def test_command_line(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, named, meant = LINES[name]
    line = refusal(capsys, args)
    assert line.startswith("hdpo: error: ")
    assert named in line
    assert f"; did you mean {meant}?" in line
    assert line.count("did you mean") == 1
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize("name", FILES)
def test_file(name, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, named, meant = FILES[name]
    (tmp_path / "mine.yaml").write_text(content)
    line = refusal(capsys, ["fit", *LAB, "--config", "mine.yaml"])
    assert named in line
    assert f"; did you mean {meant}?" in line


def test_a_question_of_a_report(capsys, tmp_path):
    (tmp_path / "question.yaml").write_text("basline: grpo\n")
    line = refusal(capsys, ["report", str(tmp_path), "--question", str(tmp_path / "question.yaml")])
    assert "'basline'" in line
    assert "; did you mean baseline?" in line


def test_nothing_is_suggested_where_nothing_is_near(capsys):
    assert refusal(capsys, ["show", "run", "--zzz"]).endswith("unrecognized arguments: --zzz; see show --help")
    assert did_you_mean("zzz", ["model", "data"]) == ""
