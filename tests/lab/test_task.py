"""Every laboratory: its configuration is the first one's but for what makes it another; its recorded scores hold."""

import json
from pathlib import Path

import pytest
import yaml

from hdpo.data.prompts import PromptConfig
from hdpo.files import find_config, resolve_path
from hdpo.lab.build import load
from hdpo.lab.scoring import score_policy
from hdpo.lab.task import FOREIGN, LEARNABLE, STORIES, TASKS, TRANSFER

OTHERS = {
    "lab_foreign": (FOREIGN, "python:hdpo.lab.problems:foreign_rows", {}),
    "lab_transfer": (
        TRANSFER,
        "python:hdpo.lab.transfer:rows",
        {
            "data.source.columns.context": "context",
            "data.prompts.privileged_template": "Hint: {context}\n{problem}",
            "data.prompts.privileged_context": "column",
        },
    ),
}


def leaves(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read(name):
    return yaml.safe_load(Path(find_config(name)).read_text())


@pytest.mark.parametrize("name", OTHERS)
def test_a_configuration_is_the_laboratorys_but_for_what_makes_it_another(name):
    task, source, more = OTHERS[name]
    mine, other = dict(leaves(read(name))), dict(leaves(read("lab")))
    assert other.keys() <= mine.keys()
    assert {key: value for key, value in mine.items() if value != other.get(key)} == {
        "model.policy.path": f"pkg://hdpo.lab/policy_{task.name}",
        "data.source.path": source,
        "data.source.kwargs.tiers": [1, 2, 3, 4, 5, 6],
        "data.val_source.path": source,
        "data.test_source.path": source,
        "trainer.logger.init_args.name": name,
        **more,
    }


@pytest.mark.parametrize(("name", "task"), [("lab", STORIES), *((n, other[0]) for n, other in OTHERS.items())])
def test_training_reads_the_prompts_and_the_policy_of_the_warm_up(name, task):
    config = read(name)
    assert PromptConfig(**config["data"]["prompts"]) == task.prompts
    assert Path(resolve_path(config["model"]["policy"]["path"])) == task.policy
    assert TASKS[task.name] is task


def test_the_overlay_names_the_policy_whose_warm_up_read_its_references():
    config = yaml.safe_load(Path(find_config("lab/learnable")).read_text())
    assert Path(resolve_path(config["model"]["policy"]["path"])) == LEARNABLE.policy
    assert config["data"]["source"]["kwargs"].pop("style") == LEARNABLE.rows.keywords["style"]
    assert config["data"]["source"]["kwargs"] == read("lab_foreign")["data"]["source"]["kwargs"]
    assert TASKS["learnable"] is LEARNABLE


@pytest.mark.parametrize("task", [FOREIGN, LEARNABLE, TRANSFER], ids=lambda task: task.name)
def test_recorded_scores_are_reproduced_on_a_sample(task):
    """Other problems, fewer of them: within four standard errors of a proportion, and one problem's worth besides."""
    number = 6
    recorded = json.loads((task.policy / "scores.json").read_text())["scores"]
    again = score_policy(*load(task.policy), num_problems=number, num_samples=8, seed=17, task=task)
    for source, scores in again.items():
        for name, value in scores.items():
            expected = recorded[source][name]
            error = (expected * (1 - expected) / number) ** 0.5
            assert value == pytest.approx(expected, abs=4 * error + 1 / number), (source, name)
