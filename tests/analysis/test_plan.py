"""``python -m hdpo plan``: what it reads from configurations, what it recommends, and bad input in one clear line."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hdpo.analysis import plan
from hdpo.analysis.cost import GIB, SHAPES, Setup, Workload, memory, peak
from hdpo.analysis.plan import fitted, setup_of, shape_of, workload_of
from hdpo.cli import main

CONFIGS = Path(__file__).parents[2] / "configs"
HDPO = ["--config", str(CONFIGS / "hdpo.yaml")]


def complete(*extra):
    """The configuration that the command itself would read."""
    options, rest = plan._parse([*HDPO, *extra])
    config = plan._complete(options, rest, main)
    assert isinstance(config, dict)
    return config


def test_the_papers_configuration_is_the_default_workload():
    config = complete()
    assert workload_of(config) == Workload()
    assert setup_of(config, None, 80 * GIB) == Setup(max_sequences=256)


def test_overlays_and_keys_move_the_plan():
    vllm, fsdp = CONFIGS / "engine" / "vllm.yaml", CONFIGS / "strategy" / "fsdp2.yaml"
    config = complete(
        "--config", str(vllm), "--config", str(fsdp), "--trainer.devices", "4", "--trainer.num_nodes", "2",
        "--model.teacher", "frozen", "--model.kl_coef", "0.1", "--model.optimizer", "torch.optim.SGD",
        "--model.optimizer.init_args.lr", "0.1", "--model.optimizer.init_args.momentum", "0.9",
        "--model.policy.gradient_checkpointing", "false", "--trainer.precision", "32-true",
        "--rollouts.val_max_new_tokens", "100", "--model.engine.init_args.free_memory_during_update", "false",
    )  # fmt: skip
    assert setup_of(config, None, 1) == Setup(8, 1, "fsdp2", "vllm", sleeps=False)
    assert setup_of(config, 3, 1).devices == 3
    assert workload_of(config) == replace(
        Workload(), extra_copies=2, optimizer_states=1, checkpointing=False, compute_bytes=4, val_new_tokens=100
    )
    plain = workload_of(complete("--model.distillation_weight", "0", "--model.teacher", "ema"))
    assert plain == replace(Workload(), num_privileged=0)


def test_hub_ids_of_qwen_need_no_network_and_folders_need_no_weights(tmp_path):
    for name, shape in (
        ("Qwen/Qwen2.5-Math-1.5B-Instruct", "qwen2.5-1.5b"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
    ):
        assert shape_of(name)[1] == SHAPES[shape]
    lab = Path(__file__).parents[2] / "hdpo" / "lab" / "policy" / "config.json"
    (tmp_path / "config.json").write_text(lab.read_text())
    assert shape_of(str(tmp_path))[1] == shape_of("pkg://hdpo.lab/policy")[1]
    assert shape_of(str(tmp_path))[1].vocab_size == json.loads(lab.read_text())["vocab_size"]


@pytest.mark.parametrize(("engine", "changed"), [("transformers", "max_sequences"), ("vllm", "micro_batch_tokens")])
def test_the_smallest_change_that_fits_is_found(engine, changed):
    shape, work, setup = SHAPES["qwen2.5-1.5b"], Workload(), Setup(engine=engine, memory=78 * GIB)
    if engine == "vllm":
        setup, work = replace(setup, memory=50 * GIB), replace(work, micro_batch_tokens=65_536)
    assert peak(memory(shape, work, setup))[0] > setup.memory
    here, now = fitted(shape, work, setup)
    assert peak(memory(shape, here, now))[0] <= setup.memory
    if changed == "max_sequences":
        assert (here, now) == (work, replace(setup, max_sequences=now.max_sequences))
        larger = here, replace(now, max_sequences=now.max_sequences * 2)
    else:
        assert (here, now) == (replace(work, micro_batch_tokens=here.micro_batch_tokens), setup)
        larger = replace(here, micro_batch_tokens=here.micro_batch_tokens * 2), now
    assert peak(memory(shape, *larger))[0] > setup.memory
    assert fitted(SHAPES["qwen2.5-7b"], work, setup) is None


def test_the_command_says_what_fits_and_how(capsys):
    assert main(["plan", *HDPO, "--devices", "8"]) == 0
    printed = capsys.readouterr().out
    assert "1,543,714,304 parameters; 8 GPU(s) of 80 GiB" in printed
    assert "not measured on a GPU" in printed
    assert "DDP, transformers engine" in printed
    assert "FSDP2, transformers engine" in printed
    assert "fits: DDP, vllm engine" in printed
    arguments = next(line for line in printed.splitlines() if line.startswith("fits: FSDP2, vllm"))
    assert arguments.endswith("--config configs/strategy/fsdp2.yaml --config configs/engine/vllm.yaml")
    assert "| rollouts" in printed


def test_the_recommended_arguments_are_accepted_and_fit(capsys, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    assert main(["plan", *HDPO, "--devices", "4", "--shape", "qwen2.5-1.5b"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fits: ")]
    assert len(lines) == 4
    for line in lines:
        name, _, changes = line.rpartition(" a step: ")
        assert ("data_parallel_size 4" in changes) == ("FSDP2" in name)
        arguments = changes.replace("as configured", "").split()
        assert main(["plan", *HDPO, *arguments, "--devices", "4", "--shape", "qwen2.5-1.5b"]) == 0
        first = next(found for found in capsys.readouterr().out.splitlines() if found.startswith("fits: "))
        assert first == f"{name} a step: as configured"


def test_what_cannot_fit_says_so_and_returns_1(capsys):
    assert main(["plan", *HDPO, "--shape", "qwen2.5-7b", "--memory_gb", "40"]) == 1
    assert "nothing fits" in capsys.readouterr().out


def test_the_table_holds_every_shape_on_one_and_eight_gpus(capsys):
    assert main(["plan", *HDPO, "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 3 * 3
    assert all(line.startswith("| ") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices must be positive, got 0"),
        (["--memory_gb", "-1"], "--memory_gb must be positive, got -1"),
        (["--mfu", "1.5"], "--mfu must be in (0, 1], got 1.5"),
        (["--config", "missing.yaml"], "--config: there is no file 'missing.yaml'"),
        (
            ["--model.policy.path", "no/such-model"],
            "model.policy.path: cannot read the configuration of 'no/such-model'",
        ),
        (["--rollouts.num_generations", "0"], "rollouts.num_generations must be at least 1, got 0"),
        (["--no.such.key", "1"], "no.such.key"),
        (["--shape", "qwen2.5-3b"], "qwen2.5-3b"),
    ],
)
def test_bad_input_ends_in_one_clear_line(capsys, arguments, message):
    try:
        status = main(["plan", *HDPO, *arguments])
    except SystemExit as exit_:
        status = exit_.code
    printed = capsys.readouterr()
    assert status == 2
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert "fits:" not in printed.out
    if "shape" not in arguments[0]:  # argparse prints its usage first
        assert len(printed.err.strip().splitlines()) == 1
