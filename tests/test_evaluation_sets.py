"""Several named evaluation sets through the command line: the shipped recipes, their metrics, table and summary."""

import gzip
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import yaml

from hdpo.cli import main
from hdpo.commands.parsing import join_evaluation_sets, with_config_files
from hdpo.errors import ConfigError
from hdpo.evaluation.comparison import build_report
from hdpo.evaluation.outcomes import Endpoint, OutcomeTable
from hdpo.evaluation.runs import find_runs
from hdpo.evaluation.scores import group_ks

EVAL = Path(__file__).parent.parent / "configs" / "eval"
#: Rows in the schemas of the hub's data sets; the laboratory's policy can read the problems.
ROWS = {
    "math500": [
        {
            "problem": f"Tom has {i} apples and gets {i + 1} more.", "solution": f"\\boxed{{{2 * i + 1}}}",
            "answer": str(2 * i + 1), "subject": ["Algebra", "Geometry"][i % 2], "level": 2,
            "unique_id": f"test/{i}.json",
        }
        for i in range(5)
    ],
    "aime24": [
        {"id": i, "problem": f"Ann has {i} pens.", "solution": "...", "answer": f"{i:03}", "url": "u", "year": "2024"}
        for i in range(3)
    ],
    "aime25": [{"problem": f"Eve has {i} cups.", "answer": str(i), "id": str(i)} for i in range(2)],
    "gsm8k": [
        {"question": f"Ben has {i} nuts.", "answer": f"He has <<{i}={i}>>{i}.\n#### {i:,}"} for i in range(1000, 1004)
    ],
}  # fmt: skip
SAMPLES = {"math500": 3, "aime24": 32, "aime25": 32, "gsm8k": 3}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipes(workplace) -> list[str]:
    """The shipped recipes with local files in the place of the hub's."""
    arguments = []
    for name, rows in ROWS.items():
        overlay = yaml.safe_load((EVAL / f"{name}.yaml").read_text())
        (only,) = overlay["data"]["test_sources"].values()
        assert "/" in only["path"]
        only["path"] = f"{name}.jsonl"
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        Path(f"{name}.yaml").write_text(yaml.safe_dump(overlay))
        arguments += ["--config", f"{name}.yaml"]
    return arguments


RUN = [
    "--config", "lab", "--data.source={path: nowhere.jsonl}", "--data.test_source=null", "--data.val_source=null",
    "--rollouts.max_new_tokens=12", "--rollouts.num_val_samples=3", "--model.pass_k=[1,2,32]",
    "--model.verifier=tests.helpers.toy.BoxedVerifier", "--trainer.enable_progress_bar=false",
]  # fmt: skip


def test_the_recipes_side_by_side_without_a_training_set(workplace, capsys):
    assert main(["test", *RUN, *recipes(workplace)]) == 0
    run = workplace / "runs/lab/version_0"
    rows = [json.loads(line) for line in gzip.decompress(next(run.glob("tests/*.gz")).read_bytes()).splitlines()]
    counts, greedy, groups = defaultdict(list), {}, defaultdict(set)
    for row in rows:
        key = row["dataset"], row["row"]
        for group in ["all", row["dataset"], *([f"math500/{row['source']}"] if row["dataset"] == "math500" else [])]:
            groups[group].add(key)
        if row["greedy"]:
            greedy[key] = row["outcome"] == "correct"
        else:
            counts[key].append(row["outcome"] == "correct")
    for (name, _), drawn in counts.items():
        assert len(drawn) == SAMPLES[name]
    assert {name: len(keys) for name, keys in groups.items()} == {
        "all": 14, "math500": 5, "math500/Algebra": 3, "math500/Geometry": 2, "aime24": 3, "aime25": 2, "gsm8k": 4
    }  # fmt: skip
    references = {row["dataset"]: row["reference"] for row in rows}
    assert references == {"math500": "9", "aime24": "002", "aime25": "1", "gsm8k": "1,003"}
    summary = json.loads((run / "summary.json").read_text())
    scores = summary["test"]["scores"]
    assert (summary["test"]["step"], set(scores)) == (0, set(groups))
    for name, keys in groups.items():
        expected = {
            "pass@1": sum(sum(counts[key]) / len(counts[key]) for key in keys) / len(keys),
            "greedy_accuracy": sum(greedy[key] for key in keys) / len(keys),
        }
        for metric, value in expected.items():
            assert scores[name][metric]["value"] == pytest.approx(value)
            assert scores[name][metric]["low"] <= value <= scores[name][metric]["high"]
        assert scores[name]["num_problems"] == len(keys)
        assert ("pass@32" in scores[name]) == name.startswith("aime"), "the k that all its problems have samples for"
        assert "pass@2" in scores[name]
    printed = capsys.readouterr().out
    assert "test at step 0 (95 % intervals)" in printed
    assert "Test metric" not in printed, "Lightning's own table says less"
    for name, keys in groups.items():
        assert any(line.split("│")[1:3] and [c.strip() for c in line.split("│")[1:3]] == [name, str(len(keys))]
                   for line in printed.splitlines() if "│" in line)  # fmt: skip
    # A report may be about a set, about one source in it, or about several.
    (found,) = find_runs([run])
    table = OutcomeTable("test")
    for sources, expected in (("math500", 5), ("math500/Algebra", 3), ("aime24+aime25", 5), ("", 14)):
        endpoint = Endpoint.parse(f"pass@1:{sources}" if sources else "pass@1")
        assert table.problems(found, [0], endpoint).shape == (1, expected)
        assert len(table.sources(found, 0, endpoint)) == expected
    (setting,) = build_report([found])["settings"]
    assert set(setting["by_source"]) == set(groups) - {"all"}
    assert setting["by_source"]["aime24"]["pass@1"]["value"] == pytest.approx(scores["aime24"]["pass@1"]["value"])


def test_the_trainers_metrics_are_those_of_the_records(tmp_path):
    from hdpo.data import EvaluationSource
    from hdpo.evaluation.records import read_records, recompute
    from tests.helpers import toy

    sources = {
        "few": EvaluationSource(**vars(toy.source("validation", [4, 5])), num_problems=5, num_samples=4),
        "plain": EvaluationSource(**vars(toy.source("validation", [1])), num_problems=3),
    }

    def frozen(parameters):
        return torch.optim.SGD(parameters, lr=0.0)

    module = toy.module(pass_k=(1, 4), rollouts={"num_val_samples": 2, "val_temperature": 1.2}, optimizer=frozen)
    data = toy.datamodule(tmp_path, val_source=None, val_sources=sources, val_batch_size=2)
    trainer = toy.trainer(tmp_path / "run", max_steps=1)
    trainer.fit(module, datamodule=data)
    records = read_records(tmp_path / "run" / "evaluations" / "step_000001.jsonl.gz")
    expected = {
        f"val/{name}/{metric}".replace("/all/", "/"): value["value"]
        for name, values in recompute(records, (1, 4)).items()
        for metric, value in values.items()
        if metric != "num_problems"
    }
    found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    assert found == pytest.approx(expected, abs=1e-6)
    assert {"val/few/pass@4", "val/few/tier5/pass@4", "val/plain/tier1/pass@1"} < set(found)
    assert not {"val/pass@4", "val/plain/pass@4"} & set(found)
    assert 0 < found["val/pass@1"] < 1
    # The best checkpoint is chosen by the largest k that all have.
    assert trainer.progress_bar_metrics["pass@1"] == pytest.approx(found["val/pass@1"])


@pytest.mark.slow
@pytest.mark.parametrize("given", ["", "stories"])
def test_one_source_has_one_name_in_fit_validate_and_test(workplace, capsys, given):
    """Its own, or the end of its path, where no column says where problems are from."""
    from hdpo.lab.problems import rows

    name = given or "own.jsonl"
    problems = [{"problem": r["problem"], "answer": r["expected_answer"]} for r in rows(40, split="train", tiers=(1,))]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, problems)))
    source = {
        "path": "own.jsonl",
        "columns": {"problem": "problem", "solution": None, "answer": "answer", "source": None},
    }
    data = {
        "source": source | {"source_name": given or None},
        "val_source": None,
        "test_source": None,
        "prompts_per_step": 2,
    }
    data["selection"] = {"val_fraction": 0.3, "test_fraction": 0.3, "num_train_problems": 2}
    overlay = {"data": data, "model": {"pass_k": [1]}, "trainer": {"max_steps": 1, "val_check_interval": 1}}
    overlay |= {"rollouts": {"num_generations": 2, "max_new_tokens": 12, "num_val_samples": 1}}
    Path("one.yaml").write_text(yaml.safe_dump(overlay))
    run, tables = workplace / "runs/lab", {}
    for number, command in enumerate(("fit", "validate", "test")):
        arguments = ["--model.verifier=tests.helpers.toy.BoxedVerifier", "--trainer.enable_progress_bar=false"]
        assert main([command, "--config", "lab", "--config", "one.yaml", *arguments]) == 0
        summary = json.loads((run / f"version_{number}/summary.json").read_text())
        split = {"fit": "after", "validate": "validation", "test": "test"}[command]
        scores = summary[split] if command == "fit" else summary[split]["scores"]
        assert list(scores) == ["all", name]
        assert scores[name] == scores["all"]
        cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in capsys.readouterr().out.splitlines()]
        tables[command] = [row for row in cells if row and row[0] in ("all", name)]
        assert tables[command] == [[group, str(scores[name]["num_problems"])] for group in ("all", name)]
        (*_, path) = sorted((run / f"version_{number}").rglob("step_*.jsonl.gz"))
        assert {json.loads(row)["source"] for row in gzip.decompress(path.read_bytes()).splitlines()} == {name}
    assert tables["fit"] == tables["validate"], "of the same problems"


def test_a_set_with_fewer_samples_than_the_largest_k_goes_through_to_the_end(workplace):
    easy = {"path": "python:hdpo.lab.problems:rows", "kwargs": {"split": "validation", "tiers": [1]}}
    sets = {"few": easy | {"num_samples": 2, "num_problems": 3}}
    Path("few.yaml").write_text(yaml.safe_dump({"data": {"val_source": None, "val_sources": sets}}))
    small = [
        "--config", "lab", "--config", "few.yaml", "--model.pass_k=[1,2,4]", "--rollouts.num_val_samples=4",
        "--data.prompts_per_step=2", "--rollouts.num_generations=2", "--rollouts.max_new_tokens=12",
        "--data.selection.num_train_problems=8", "--model.verifier=tests.helpers.toy.BoxedVerifier",
    ]  # fmt: skip
    assert main(["fit", *small, "--trainer.max_steps=1", "--trainer.val_check_interval=1"]) == 0
    run = Path("runs/lab/version_0")
    after = json.loads((run / "summary.json").read_text())["after"]["all"]
    assert {name for name in after if name.startswith("pass@")} == {"pass@1", "pass@2"}
    assert (run / "policy").is_dir()
    assert main(["validate", *small, "--ckpt_path", str(run / "checkpoints/last.ckpt")]) == 0


def test_a_set_with_too_few_samples_is_refused():
    with pytest.raises(ConfigError, match=r"evaluation set 'few' has num_samples 2, but the smallest k .* is 4"):
        group_ks((4, 8), {"few": 2, "many": 8})


def test_later_files_add_evaluation_sets(workplace):
    files = {
        "a": {"data": {"val_sources": {"x": {"path": "1"}, "y": {"path": "2"}}, "test_sources": {"t": {"path": "3"}}}},
        "b": {"data": {"val_sources": {"y": {"path": "4"}}}, "model": None},
        "c": {"data": {"val_sources": None}},
        "d": {"data": {"val_sources": {"z": {"path": "5"}}}},
        "e": None,
    }
    for name, content in files.items():
        Path(name).write_text(yaml.safe_dump(content))

    def joined(names, *more):
        args = ["fit", *(f"--config={name}" for name in names), *more]
        return join_evaluation_sets(args)

    assert joined("a", "--x", "1") == ["fit", "--config=a", "--x", "1"]
    both = '--data.val_sources={"x": {"path": "1"}, "y": {"path": "4"}}'
    assert joined("aeb", "--x", "1") == ["fit", "--config=a", "--config=e", "--config=b", both, "--x", "1"]
    assert joined("abcd") == ["fit", *(f"--config={name}" for name in "abcd")], "null takes away what was before"
    lab = str(EVAL.parent / "lab.yaml")
    assert with_config_files(["fit", "--config=lab", "-c", "lab"]) == ["fit", f"--config={lab}", "-c", lab]
    args = ["fit", "--config", "a", "-c", "d"]
    assert join_evaluation_sets(args)[-1].startswith('--data.val_sources={"x"')


def test_problems_without_answers_are_predicted(workplace):
    Path("problems.jsonl").write_text("\n".join(json.dumps({"q": f"Ann has {i} pens."}) for i in range(2)))
    source = "{path: problems.jsonl, columns: {problem: q, solution: null, answer: null, source: null}}"
    args = [arg for arg in RUN if not arg.startswith(("--model.verifier", "--model.pass_k"))]
    assert main(["predict", *args, "--model.pass_k=[1,8]", f"--data.predict_source={source}"]) == 0
    (path,) = workplace.rglob("predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["problem"], row["reference"], len(row["samples"])) for row in rows] == [
        (f"Ann has {i} pens.", "", 3) for i in range(2)
    ]
    for row in rows:
        assert {one["outcome"] for one in [row["greedy"], *row["samples"]]} <= {"invalid_reference", "no_answer"}
        assert row["answer"] is None or f"boxed{{{row['answer']}}}" in row["greedy"]["text"]
