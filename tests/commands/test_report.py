import json
import re
import shutil

import numpy as np
import pytest

from hdpo.commands.report import main
from hdpo.errors import ConfigError
from hdpo.evaluation.comparison import Question, build_report
from hdpo.evaluation.intervals import runs_interval
from hdpo.evaluation.records import metric_values, recompute, record_path
from hdpo.evaluation.runs import find_runs
from hdpo.evaluation.statistics import compare, compare_policies, holm, selection_bias
from tests.evaluation.simulate import rows, write_run

TIERS = np.repeat([3.0, 1.0, -2.0], 8)  # log-odds of the problems
SOURCES = [f"tier{i}" for i in (1, 2, 3)]
STEPS = (0, 20, 40, 60, 80, 100, 120)
KL = {"model__divergence": {"class_path": "hdpo.losses.ForwardKL"}}


def evaluations(seed, lift=0.0, sd=0.4, steps=STEPS, split="validation", num_samples=8):
    """A run whose policy is ``lift`` log-odds better in the end, and differs by its seed."""
    rng = np.random.default_rng(seed)
    own = sd * rng.normal()
    made = {}
    for step in steps:
        success = 1 / (1 + np.exp(-(TIERS + own + lift * step / steps[-1])))
        made[step] = rows(success, num_samples, rng=rng, step=step, split=split, sources=SOURCES)
        for row in made[step]:  # the sources in blocks, as the rates
            row["source"] = SOURCES[row["row"] // 8]
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five runs of weight 0, five of JSD and three of forward KL at weight 1, one at weight 5."""
    folder = tmp_path_factory.mktemp("experiment") / "runs"
    for seed in range(5):
        write_run(folder / f"grpo-{seed}", seed=seed, evaluations=evaluations(seed), recent={"cliff/fraction": 0.3})
        recent = {"cliff/fraction": 0.1 + 0.01 * seed, "privileged/pass_rate": 0.5}
        write_run(folder / f"jsd-{seed}", weight=1.0, seed=seed, evaluations=evaluations(10 + seed, 1.5), recent=recent)
    for seed in range(3):
        write_run(folder / f"kl-{seed}", weight=1.0, seed=seed, evaluations=evaluations(20 + seed, 1.5), **KL)
    write_run(folder / "once", weight=5.0, evaluations=evaluations(30, 3.0))
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    return find_runs([folder])


def named(report, part, **wanted):
    (row,) = [r for r in report[part] if all(r[name] == value for name, value in wanted.items())]
    return row


def outcomes(runs, prefix, metric, steps=(40, 60, 80, 100, 120)):
    found = [run for run in runs if run.folder.name.startswith(prefix)]
    tables = [[metric_values(run.of_split("validation")[step], metric) for step in steps] for run in found]
    return [float(np.mean(table)) for table in tables], np.mean(tables, axis=(0, 1))


def test_the_settings_and_their_numbers(runs):
    report = build_report(runs)
    assert report["split"] == "validation"
    assert [s["label"] for s in report["settings"]] == [
        "weight 0",
        "weight 1, ForwardKL",
        "weight 1, JSD",
        "weight 5, JSD",
    ]
    assert [s["num_runs"] for s in report["settings"]] == [5, 3, 5, 1]
    assert [s["seeds"] for s in report["settings"]][1] == [0, 1, 2]
    for setting, prefix in zip(report["settings"], ("grpo", "kl", "jsd", "once"), strict=True):
        for metric in ("greedy_accuracy", "pass@1", "pass@8"):
            found = outcomes(runs, prefix, metric)[0]
            estimate = setting["outcome"][metric]
            assert estimate["value"] == pytest.approx(np.mean(found))
            interval = runs_interval(found) if len(found) > 1 else (None, None)
            assert (estimate["low"], estimate["high"]) == pytest.approx(interval)
            last = outcomes(runs, prefix, metric, steps=[120])[0]
            assert setting["last"][metric]["value"] == pytest.approx(np.mean(last))
            own = [run for run in runs if run.folder.name.startswith(prefix)]
            tables = [
                np.stack([metric_values(e, metric) for s, e in run.of_split("validation").items() if s]) for run in own
            ]
            assert setting["best"][metric]["value"] == pytest.approx(np.mean([t.mean(1).max() for t in tables]))
            bias = np.mean([selection_bias(t) for t in tables])
            assert setting["best"][metric]["selection_bias"] == pytest.approx(bias)
    assert list(report["settings"][0]["curves"]["pass@8"]) == list(STEPS)
    json.dumps(report, allow_nan=False)


def test_the_runs_are_listed_with_intervals_over_problems(runs):
    report = build_report(runs)
    assert len(report["runs"]) == 14
    for run in report["runs"]:
        (own,) = [r for r in runs if str(r.folder) == run["folder"]]
        assert run["last"] == recompute(own.of_split("validation")[120], (1, 4, 8))
        assert run["spent"] == {"train_seconds": 180.0, "tokens": 1200}
        assert run["processes"][0]["commit"] == "abcdef0123456789"


def test_comparisons_are_over_runs(runs):
    report = build_report(runs, Question(margin=0.05))
    assert report["baseline"] == "weight 0"
    assert {(r["setting"], r["endpoint"]) for r in report["comparisons"]} == {
        (s, e)
        for s in ("weight 1, ForwardKL", "weight 1, JSD")
        for e in ("greedy_accuracy", "pass@1", "pass@4", "pass@8")
    }
    strata = np.repeat(SOURCES, 8).tolist()
    for label, prefix in (("weight 1, ForwardKL", "kl"), ("weight 1, JSD", "jsd")):
        for metric in ("greedy_accuracy", "pass@8"):
            (first, p), (second, q) = outcomes(runs, "grpo", metric), outcomes(runs, prefix, metric)
            expected = compare(first, second, problems=(p, q), strata=strata, margin=0.05)
            row = named(report, "comparisons", setting=label, endpoint=metric)
            for name, value in vars(expected).items():
                assert row[name] == pytest.approx(value), name
            assert row["steps"] == [40, 60, 80, 100, 120]
            assert (row["baseline"], row["with"]) == pytest.approx((np.mean(first), np.mean(second)))
    assert named(report, "comparisons", setting="weight 1, JSD", endpoint="pass@1")["p_permutation"] is not None
    assert named(report, "comparisons", setting="weight 1, ForwardKL", endpoint="pass@1")["p_permutation"] is None


def test_differences_by_source_have_intervals_and_no_tests(runs):
    report = build_report(runs)
    row = named(report, "by_source", setting="weight 1, JSD", source="tier3", metric="pass@8")
    tier = slice(16, 24)
    sides = []
    for prefix in ("grpo", "jsd"):
        own = [run.of_split("validation") for run in runs if run.folder.name.startswith(prefix)]
        sides.append([np.mean([metric_values(e[s], "pass@8")[tier] for s in (40, 60, 80, 100, 120)]) for e in own])
    expected = compare(*sides)
    assert (row["value"], row["low"], row["high"]) == pytest.approx((expected.value, expected.low, expected.high))
    assert len(report["by_source"]) == 2 * 3 * 2
    assert not any(name.startswith("p") for row in report["by_source"] for name in row)


def test_each_source_before_and_after(folder, runs, tmp_path, capsys):
    main([str(folder), "--out", str(tmp_path), "--last", "2"])
    printed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    own = [run.of_split("validation") for run in runs if run.folder.name.startswith("jsd")]
    for metric in ("greedy_accuracy", "pass@8"):
        expected = []
        for tier in (slice(0, 8), slice(8, 16), slice(16, 24)):
            before, *after = (np.mean([metric_values(e[s], metric)[tier] for e in own]) for s in (0, 100, 120))
            expected.append(f"{before:.3f} -> {np.mean(after):.3f}")
        assert ["weight 1, JSD", metric, *expected] in printed


def test_runs_without_an_evaluation_before_training_have_none_by_source(tmp_path, capsys):
    write_run(tmp_path / "runs", evaluations=evaluations(0, steps=(20, 40)))
    main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")])
    printed = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    (row,) = [row for row in printed if row[1:2] == ["pass@8"] and len(row) == 5]
    assert all(re.fullmatch(r"[01]\.\d{3}", cell) for cell in row[2:])


def test_one_run_is_compared_as_a_policy(runs):
    report = build_report(runs)
    row = named(report, "policies", endpoint="pass@8")
    assert (row["setting"], row["step"]) == ("weight 5, JSD", 120)
    assert row["first"].endswith("grpo-0")
    values = [
        metric_values(run.of_split("validation")[120], "pass@8")
        for run in runs
        if run.folder.name in ("grpo-0", "once")
    ]
    expected = compare_policies(*values, np.repeat(SOURCES, 8).tolist())
    assert (row["value"], row["low"], row["high"]) == pytest.approx(expected)
    assert not any(name.startswith("p_") for name in row)


def test_the_family_is_adjusted_among_itself(folder, runs, tmp_path):
    question = Question(primary=["pass@8:tier2+tier3", "greedy_accuracy"], family=["weight 1, JSD"])
    report = build_report(runs, question)
    rows_ = [named(report, "comparisons", setting="weight 1, JSD", endpoint=e) for e in question.primary]
    assert [r["p_value_holm"] for r in report["family"]] == holm([r["p_value"] for r in rows_])
    assert [r["endpoint"] for r in report["family"]] == question.primary
    sides = [
        [
            np.mean([metric_values(run.of_split("validation")[s], "pass@8")[8:] for s in (40, 60, 80, 100, 120)])
            for run in runs
            if run.folder.name.startswith(prefix)
        ]
        for prefix in ("grpo", "jsd")
    ]
    assert rows_[0]["value"] == pytest.approx(np.mean(sides[1]) - np.mean(sides[0]))
    # What else lies in the folder does not matter.
    few = build_report(
        [r for r in runs if not r.folder.name.startswith(("kl", "once"))], Question(primary=question.primary)
    )
    assert [r["p_value_holm"] for r in few["family"]] == [r["p_value_holm"] for r in report["family"]]
    # A member that cannot be tested counts as one.
    both = build_report(runs, Question(primary=["greedy_accuracy"], family=["weight 1, JSD", "weight 5, JSD"]))
    assert both["family"][1] == {
        "setting": "weight 5, JSD", "endpoint": "greedy_accuracy", "p_value_holm": None, "tested": False
    }  # fmt: skip
    assert both["family"][0]["p_value_holm"] == pytest.approx(min(1.0, 2 * rows_[1]["p_value"]))
    # One that is named twice is one member.
    twice = build_report(runs, Question(primary=question.primary * 2, family=question.family * 2))
    assert twice["family"] == report["family"]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (
            {"primary": ["pass@8"]},
            "--family: name the settings it is about; there are: weight 1, ForwardKL; weight 1, JSD",
        ),
        ({"primary": ["pass@8"], "family": ["hdpo"]}, "--family: there is no setting 'hdpo'"),
        ({"family": ["weight 1, JSD"]}, "--family needs --primary"),
        ({"primary": ["pass@8:tier9"], "family": ["weight 1, JSD"]}, "--primary pass@8:tier9: there are no problems"),
        ({"primary": ["accuracy"], "family": ["weight 1, JSD"]}, "there is no metric 'accuracy'"),
        ({"primary": ["pass@8:"], "family": ["weight 1, JSD"]}, "--primary pass@8:: name a source after the colon"),
        ({"primary": ["pass@8:tier2+"], "family": ["weight 1, JSD"]}, "--primary pass@8:tier2+: name a source after"),
        ({"primary": ["pass@64"], "family": ["weight 1, JSD"]}, "pass@64 needs at least 64 samples"),
        ({"baseline": "grpo"}, "--baseline: there is no setting 'grpo'"),
        ({"split": "test"}, "--split test: no run was evaluated on it; there are evaluations on validation"),
    ],
)
def test_questions_about_what_is_not_there(runs, question, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        build_report(runs, Question(**question))


def test_another_baseline(runs):
    report = build_report(runs, Question(baseline="weight 1, JSD"))
    assert report["baseline"] == "weight 1, JSD"
    back = named(report, "comparisons", setting="weight 0", endpoint="pass@8")
    row = named(build_report(runs), "comparisons", setting="weight 1, JSD", endpoint="pass@8")
    assert (back["value"], back["p_value"]) == pytest.approx((-row["value"], row["p_value"]))


def test_of_several_settings_without_distillation_the_arm_grpo_is_the_baseline(tmp_path):
    for arm, changes in (("grpo", {}), ("luffy", {"cliffs": {"reference_in_group": True}}), ("hdpo", {"weight": 1.0})):
        write_run(tmp_path / arm, evaluations=evaluations(0), arm=arm, **changes)
    report = build_report(find_runs([tmp_path]))
    assert (report["baseline"], {row["setting"] for row in report["policies"]}) == ("grpo", {"luffy", "hdpo"})
    (tmp_path / "grpo" / "sweep.json").unlink()
    unnamed = build_report(find_runs([tmp_path]))
    assert unnamed["baseline"] is None
    assert "several settings have weight 0, so nothing is compared" in unnamed["notes"][0]


def test_the_number_of_evaluations(runs):
    report = build_report(runs, Question(last=1))
    row = named(report, "comparisons", setting="weight 1, JSD", endpoint="pass@8")
    assert row["steps"] == [120]
    assert row["with"] == pytest.approx(np.mean(outcomes(runs, "jsd", "pass@8", [120])[0]))
    everything = build_report(runs, Question(last=50))["settings"][0]
    assert everything["steps"] == [20, 40, 60, 80, 100, 120], "the initial policy is no outcome"


def test_what_limits_a_comparison_is_said(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "runs", ignore=shutil.ignore_patterns("once", "report"))
    place = tmp_path / "runs"
    shutil.copytree(place / "jsd-0", place / "jsd-again")
    record_path(place / "jsd-again" / "evaluations", 60).unlink()
    record_path(place / "jsd-1" / "evaluations", 120).unlink()
    other = {step: [{**row, "problem_hash": "other"} for row in made] for step, made in evaluations(0).items()}
    write_run(place / "other", weight=2.0, evaluations=other)
    write_run(place / "late", weight=3.0, evaluations={30: evaluations(0)[20]})
    write_run(place / "short", weight=4.0, evaluations={step: evaluations(0)[step] for step in (0, 20, 40)})
    failed = evaluations(0)
    failed[120][0]["outcome"] = "timeout"
    write_run(place / "grpo-0", evaluations=failed)
    report = build_report(find_runs([place]))
    notes = "\n".join(report["notes"])
    assert f"{place}/jsd-again repeats {place}/jsd-0 (setting and seed) and is left out" in notes
    assert f"{place}/jsd-1 ends at step 100, other runs of weight 1, JSD at 120: it is left out" in notes
    assert "weight 2, JSD and weight 0 were evaluated on different problems, so are not compared" in notes
    assert "weight 3, JSD and weight 0 were never evaluated at the same steps, so are not compared" in notes
    assert "weight 4, JSD and weight 0 are compared up to step 40, the last that all runs have" in notes
    assert "1 completions got no verdict" in notes
    assert named(report, "settings", label="weight 1, JSD")["seeds"] == [0, 2, 3, 4]
    assert {row["setting"] for row in report["policies"]} == {"weight 4, JSD"}
    assert {row["step"] for row in report["policies"]} == {40}


def test_a_run_that_was_continued_with_other_problems_is_reported_on_its_later_ones(tmp_path):
    made = evaluations(0, steps=(0, 40, 80))
    made[0] = [row for row in made[0] if row["row"] < 20]
    made[40] = [row | {"problem_hash": f"other {row['row']}"} for row in made[40]]
    write_run(tmp_path / "run", evaluations=made)
    runs = find_runs([tmp_path])
    report = build_report(runs)
    (setting,) = report["settings"]
    assert setting["steps"] == [80]
    expected = metric_values(runs[0].of_split("validation")[80], "pass@8").mean()
    assert setting["outcome"]["pass@8"]["value"] == pytest.approx(expected)
    assert "run: evaluations at 0, 40 are of other problems than its last, so are left out" in report["notes"][0]


def test_without_a_baseline_there_are_numbers_but_no_comparisons(runs):
    some = [run for run in runs if run.weight > 0]
    report = build_report(some)
    assert report["comparisons"] == report["policies"] == []
    assert "no setting has weight 0" in report["notes"][0]
    with pytest.raises(ConfigError, match="--primary needs a baseline"):
        build_report(some, Question(primary=["pass@8"]))


def test_a_question_about_certain_seeds_is_answered_by_their_runs_alone(runs):
    question = Question(primary=["pass@8"], family=["weight 1, JSD"], seeds=[1, 3, 4])
    report = build_report(runs, question)
    wanted = build_report(
        [run for run in runs if run.seed in (1, 3, 4)], Question(primary=["pass@8"], family=question.family)
    )
    assert {s["label"]: s["seeds"] for s in report["settings"]} == {
        "weight 0": [1, 3, 4], "weight 1, ForwardKL": [1], "weight 1, JSD": [1, 3, 4],
    }  # fmt: skip
    assert report["notes"][0] == "only runs with seed 1, 3, 4"
    for part in ("settings", "comparisons", "family"):
        assert report[part] == wanted[part]
    with pytest.raises(ConfigError, match="--seeds: no run has seed 7, 9"):
        build_report(runs, Question(seeds=[9, 0, 7]))


def test_two_groups_that_differ_in_seeds_alone(tmp_path):
    """Nothing is found, at the rate at which nothing should be: 20 experiments of five GRPO runs a side."""
    found = []
    for i in range(20):
        runs = []
        for seed in range(10):
            made = evaluations(1000 * i + seed, sd=0.7, steps=(0, 10), num_samples=4)
            write_run(tmp_path / f"{seed}", seed=seed, evaluations=made, pass_k=(4,), data__group=seed % 2)
        runs = find_runs([tmp_path])
        report = build_report(runs, Question(baseline="group 0", primary=["pass@4"], family=["group 1"]))
        found.append(report["family"][0]["p_value_holm"] <= 0.05)
        assert len(build_report(runs, Question(ignore=["data.group"]))["settings"]) == 1
    assert np.mean(found) <= 0.05 + 3 * (0.05 * 0.95 / 20) ** 0.5


@pytest.mark.parametrize("ignored", ["data.group", "data"])
def test_what_is_ignored_makes_runs_of_one_seed_repetitions_of_one_setting(tmp_path, ignored):
    """A key or a whole section; and no run is taken for another one's double."""
    for seed in range(3):
        for group in range(2):
            made = evaluations(10 * seed + group, steps=(0, 10))
            write_run(tmp_path / f"{seed}-{group}", seed=seed, evaluations=made, data__group=group)
    (setting,) = build_report(find_runs([tmp_path]), Question(ignore=[ignored]))["settings"]
    assert (setting["num_runs"], sorted(setting["seeds"])) == (6, [0, 0, 1, 1, 2, 2])


def test_the_test_split_is_reported_where_all_runs_have_it(folder, tmp_path):
    for seed in range(2):
        write_run(tmp_path / f"a{seed}", seed=seed, evaluations=evaluations(seed, split="test", num_samples=16))
    write_run(tmp_path / "b", weight=1.0, evaluations=evaluations(9))
    report = build_report(find_runs([tmp_path]))
    assert (report["split"], report["notes"][0]) == (
        "validation",
        "2 of 3 runs have no evaluation on the validation split",
    )
    assert build_report(find_runs([tmp_path]), Question(split="test"))["settings"][0]["num_runs"] == 2
    shutil.rmtree(tmp_path / "b")
    assert build_report(find_runs([tmp_path]))["split"] == "test"


def test_the_k_are_those_that_all_runs_have(tmp_path):
    write_run(tmp_path / "a", evaluations=evaluations(0), pass_k=(1, 4, 8, 16))
    write_run(tmp_path / "b", weight=1, evaluations=evaluations(1), pass_k=(4, 8, 16))
    assert build_report(find_runs([tmp_path]))["pass_k"] == [4, 8]
    write_run(tmp_path / "c", weight=2, evaluations=evaluations(1), pass_k=(2,))
    with pytest.raises(ConfigError, match="no k of pass@k in common"):
        build_report(find_runs([tmp_path]))


def test_the_command_and_its_question_in_a_file(folder, runs, tmp_path, capsys):
    question = tmp_path / "question.yaml"
    question.write_text("primary: ['pass@8:tier2+tier3']\nfamily: ['weight 1, JSD']\nmargin: 0.02\nlast: 3\n")
    out, compact = tmp_path / "out", tmp_path / "compact"
    assert main([str(folder), "--question", str(question), "--out", str(out), "--compact", str(compact)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "named beforehand", "exploratory, p-values not adjusted", "these two policies", "nothing follows for their",
        "mean of the last 3 evaluations on the validation split", "p (lower by 0.02)",
        "the settings differ in: model.distillation_weight, model.divergence", "hdpo at abcdef012345",
    ):  # fmt: skip
        assert text in " ".join(printed.split())
    written = json.loads((out / "report.json").read_text())
    expected = Question(primary=["pass@8:tier2+tier3"], family=["weight 1, JSD"], margin=0.02, last=3)
    assert written == json.loads(json.dumps(build_report(runs, expected)))
    # From the compact files, the same report to the last digit.
    assert main([str(compact), "--question", str(question), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    for part in ("settings", "comparisons", "family", "by_source"):
        assert again[part] == written[part]
    for name in ("tradeoff", "sources", "steps"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (out / f"{name}.svg").read_bytes() == (tmp_path / "again" / f"{name}.svg").read_bytes()


def test_bad_input(tmp_path, capsys):
    with pytest.raises(ConfigError, match="there is no run here"):
        main([str(tmp_path)])
    assert not (tmp_path / "report").exists()
    write_run(tmp_path / "a", evaluations=evaluations(0))
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--out", str(tmp_path / "file")], r"--out: .*file is a file"),
        (["--compact", str(tmp_path / "file")], r"--compact: .*file is a file"),
        (["--bseline", "x"], "report: .*--bseline"),
        (["--last", "0"], "--last must be at least 1"),
        (["--margin", "-1"], "--margin must be"),
        (["--question", str(tmp_path / "none.yaml")], "report: .*none.yaml"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            main([str(tmp_path), *arguments])
        assert "\n" not in str(caught.value)
