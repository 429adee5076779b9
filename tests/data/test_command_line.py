"""The data section as users write it: in YAML and on the command line, through the program's own parser."""

import gzip
import json
import shutil

import pytest
import yaml

from hdpo.cli import main
from hdpo.files import resolve_path

GSM8K = [
    {
        "question": f"Ann has {i} clips and buys {i + 1}. How many?",
        "answer": f"She has {i}+{i + 1} = <<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}.\n#### {2 * i + 1:,}",
    }
    for i in range(600, 640)
]
#: README's mapping.
MAPPING = """
data:
  source:
    path: {path}
    columns: {{problem: question, solution: answer, answer: answer, source: null}}
    answer_pattern: '####\\s*(.+)'
"""
RUN = {
    "model.policy.path": "pkg://hdpo.lab/policy",
    "model.verifier": "tests.helpers.toy.BoxedVerifier",
    "model.pass_k": "[1]",
    "data.prompts_per_step": 2,
    "data.selection.val_fraction": 0.2,
    "rollouts.num_generations": 2,
    "rollouts.num_val_samples": 1,
    "rollouts.max_new_tokens": 2,
    "distillation.max_new_tokens": 2,
    "trainer.max_steps": 1,
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.logger": "false",
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, GSM8K)))
    return tmp_path


def options(settings):
    return [f"--{key}={value}" for key, value in settings.items()]


def printed(capsys, *args) -> str:
    """The configuration as the program understood it, as it prints and saves it."""
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *options(RUN), *args, "--print_config"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_readmes_mapping_of_gsm8k(workplace, capsys):
    (workplace / "gsm8k.yaml").write_text(MAPPING.format(path="gsm8k.jsonl"))
    assert main(["validate", *options(RUN), "--config", "gsm8k.yaml"]) == 0
    (report,) = (workplace / ".hdpo_cache").glob("*.json")
    report = json.loads(report.read_text())["report"]
    assert report["dropped"] == {}
    (records,) = workplace.rglob("step_*.jsonl.gz")
    records = [json.loads(line) for line in gzip.decompress(records.read_bytes()).splitlines()]
    records = [record for record in records if record["greedy"]]
    assert 0 < len(records) == report["kept"]
    assert {r["reference"] for r in records} <= {f"{2 * i + 1:,}" for i in range(600, 640)}
    assert {r["source"] for r in records} == {"gsm8k.jsonl"}
    # The same on the command line.
    capsys.readouterr()
    columns = "{problem: question, solution: answer, answer: answer, source: null}"
    arguments = ["--data.source.path=gsm8k.jsonl", f"--data.source.columns={columns}"]
    arguments += [r"--data.source.answer_pattern=####\s*(.+)"]
    sources = [
        yaml.safe_load(printed(capsys, *args))["data"]["source"] for args in (arguments, ["--config", "gsm8k.yaml"])
    ]
    assert sources[0] == sources[1]
    assert sources[0]["answer_pattern"] == r"####\s*(.+)"


STRINGS = {
    "data.source.name": "1234",
    "data.source.revision": "1e10",
    "data.source.answer_pattern": r"####\s*(.+)",
    "data.source.source_name": "0x1f",
    "data.source.columns.solution": "a: b",
    "data.source.columns.answer": "[x]",
    "data.source.columns.source": "- a",
    "data.source.columns.context": "&b",
    "data.prompts.system_prompt": "# Role: be brief.\n# Really.",
    "data.prompts.chat_template": "x:",
    "data.tokenizer": "yes",
    "model.policy.revision": "1_0e-1",
}


def nested(flat: dict) -> dict:
    result = {}
    for key, value in flat.items():
        *parents, name = key.split(".")
        part = result
        for parent in parents:
            part = part.setdefault(parent, {})
        part[name] = value
    return result


def contains(whole, part) -> bool:
    return all(contains(whole[k], v) if isinstance(v, dict) else whole[k] == v for k, v in part.items())


def test_strings_that_look_like_yaml_stay_strings(workplace, capsys):
    (workplace / "written.yaml").write_text(json.dumps(nested(STRINGS)))
    (workplace / "saved.yaml").write_text(printed(capsys, *options(STRINGS)))
    for name in ("written.yaml", "saved.yaml"):
        assert contains(yaml.safe_load(printed(capsys, "--config", name)), nested(STRINGS))


def test_null_is_still_null(workplace, capsys):
    (workplace / "some.yaml").write_text("data: {source: {columns: {solution: null}, name: ~}}")
    source = yaml.safe_load(printed(capsys, "--config", "some.yaml", "--data.source.columns.source=null"))["data"][
        "source"
    ]
    assert (source["columns"]["solution"], source["columns"]["source"], source["name"]) == (None, None, None)


VERIFIER = '''
import json
import shutil
from hdpo.rewards import Grade, Outcome, Verifier

class Unit(Verifier):
    """Writes down what it is given; takes problems whose unit it knows."""

    def usable(self, references, *, prompts, unit):
        with open("asked.jsonl", "a") as file:
            file.writelines(json.dumps(["usable", *row]) + "\\n" for row in zip(references, prompts, unit))
        return [u["name"] != "parsec" for u in unit]

    def grade(self, completions, references, *, prompts, unit):
        with open("asked.jsonl", "a") as file:
            file.writelines(json.dumps(["grade", *row]) + "\\n" for row in zip(references, prompts, unit))
        return [Grade(Outcome.WRONG, 0.0) for _ in completions]
'''
COLUMNS = """
model: {verifier: unit_verifier.Unit, engine: {init_args: {max_sequences: 8}}}
data:
  source:
    path: rows.jsonl
    columns: {problem: q, solution: null, answer: a, source: null, context: formula, extra: [unit]}
  prompts: {privileged_context: column, instruction: ''}
  selection: {num_val_problems: 0}
"""


def test_a_verifier_of_the_users_own_gets_columns_by_yaml_alone(workplace, monkeypatch):
    units = ["meter", "foot", "parsec"]
    rows = [
        {"q": f"{i} {units[i % 3]}s?", "a": i, "formula": f"{i}*1", "unit": {"name": units[i % 3], "power": [i]}}
        for i in range(24)
    ]
    (workplace / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (workplace / "columns.yaml").write_text(COLUMNS)
    (workplace / "unit_verifier.py").write_text(VERIFIER)
    monkeypatch.syspath_prepend(str(workplace))
    assert main(["fit", *options(RUN), "--config", "columns.yaml"]) == 0
    asked = [json.loads(line) for line in (workplace / "asked.jsonl").read_text().splitlines()]
    known = {(str(row["a"]), row["q"]): row["unit"] for row in rows}
    assert all(known[reference, prompt] == unit for _, reference, prompt, unit in asked)
    graded = [unit["name"] for what, _, _, unit in asked if what == "grade"]
    assert set(graded) <= {"meter", "foot"}
    assert graded
    assert "parsec" in {unit["name"] for what, _, _, unit in asked if what == "usable"}


def test_a_base_model_gets_its_template_by_name_or_file(workplace, capsys):
    base = workplace / "base"
    shutil.copytree(resolve_path("pkg://hdpo.lab/policy"), base)
    (base / "chat_template.jinja").unlink()
    (workplace / "mine.jinja").write_text("Q:{% for m in messages %} {{ m['content'] }}{% endfor %}{{ '\nA:' }}")
    (workplace / "gsm8k.yaml").write_text(MAPPING.format(path="gsm8k.jsonl"))
    run = options(RUN | {"model.policy.path": "base", "trainer.logger": "false", "samples.every_n_steps": 1})
    run += ["--config", "gsm8k.yaml", "--data.selection.num_val_problems=0", "--export.enabled=false"]
    assert main(["fit", *run]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has no chat template" in error
    assert "data.prompts.chat_template" in error
    prompts = []
    for template in ("mine.jinja", "r1_zero"):
        assert main(["fit", *run, f"--data.prompts.chat_template={template}"]) == 0
        prompts.append(json.loads((workplace / "samples.jsonl").read_text().splitlines()[-1])["prompt"])
        (workplace / "samples.jsonl").unlink()
        shutil.rmtree(workplace / "checkpoints")
        (workplace / "config.yaml").unlink()
    assert prompts[0].endswith("A:")
    assert prompts[1].endswith("<think>")


def test_a_runs_configuration_keeps_the_programs_order(capsys):
    """Sections stand as ``--help`` lists them, and not by the alphabet."""
    with pytest.raises(SystemExit):
        main(["fit", "--config", "lab", "--print_config"])
    sections = list(yaml.safe_load(capsys.readouterr().out))
    assert (
        sections.index("seed_everything") < sections.index("trainer") < sections.index("model") < sections.index("data")
    )


def test_null_on_the_command_line_is_no_column(workplace, capsys):
    """Within a section that may be null itself, jsonargparse makes the text None of it."""
    given = ["--data.val_source.path=gsm8k.jsonl", "--data.val_source.columns.problem=question",
             "--data.val_source.columns.source=null", "--data.val_source.columns.solution=null",
             "--data.val_source.columns.answer=answer", "--data.val_source.answer_pattern=####\\s*(.+)"]  # fmt: skip
    assert main(["validate", "--config", "lab", *options(RUN), *given]) == 0
