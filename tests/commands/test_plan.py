"""``python -m hdpo plan``: what it reads from configurations, what it recommends, and bad input in one clear line."""

from pathlib import Path

import pytest

from hdpo.cli import main
from hdpo.commands.memory import GIB, PHASES, Shape, memory
from hdpo.commands.run import read_config
from hdpo.policy import LoRAConfig
from hdpo.policy.architecture import policy_config

HDPO = ("--config", "hdpo")
SGD = ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "0.1")
VLLM, FSDP2 = ("--config", "engine/vllm"), ("--config", "strategy/fsdp2")
ROOT = Path(__file__).parents[2]
SHAPE = Shape.of(policy_config("Qwen/Qwen2.5-1.5B"))
WEIGHTS = 4 * SHAPE.num_parameters


def planned(*arguments):
    """Bytes by phase."""
    return memory(SHAPE, read_config([*HDPO, *arguments]), 1, 80 * GIB)


def rows(capsys, *arguments, status=0):
    """(strategy, engine) -> the row that the command prints, by column; the columns' names are known."""
    assert main(["plan", *arguments]) == status
    head, line, *found = [row.strip("| \n").split("|") for row in capsys.readouterr().out.splitlines()]
    names = [name.strip() for name in head]
    assert names[:10] == ["policy", "GPUs", "strategy", "engine", *PHASES]
    assert {cell.strip() for cell in line} == {"---"}
    found = [dict(zip([*names[:10], "set"], map(str.strip, row), strict=True)) for row in found]
    return {(row["strategy"], row["engine"]): row for row in found}


@pytest.fixture(scope="module")
def before():
    return planned()


KL = ("--model.policy_loss.kl_coef", "0.1")
FROZEN, EMA = ("--config", "teacher/frozen"), ("--config", "teacher/ema")


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        # Frozen teacher, reference and sampler are one copy of the initial policy; an average is another.
        ((*FROZEN, *KL, "--distillation.sampled_by", "initial"), dict.fromkeys(PHASES, WEIGHTS)),
        (("--distillation.sampled_by", "initial", "--model.update.log_gradient_norms", "true"),
         dict.fromkeys(PHASES, WEIGHTS) | {"update": 2 * WEIGHTS}),
        # On a GPU the optimizer is fused unless it is told otherwise.
        ((*EMA, *KL, "--model.optimizer.foreach", "true"),
         dict.fromkeys(PHASES, 2 * WEIGHTS) | {"optimizer": 3 * WEIGHTS}),
        (("--model.optimizer.amsgrad", "true"), dict.fromkeys(PHASES, WEIGHTS)),
        ((*SGD, "--model.optimizer.momentum", "0.9"), dict.fromkeys(PHASES, -WEIGHTS)),
        ((*SGD, "--model.optimizer.foreach", "false"), dict.fromkeys(PHASES, -2 * WEIGHTS)),
        ((*SGD, "--model.optimizer.fused", "false"),
         dict.fromkeys(PHASES, -2 * WEIGHTS) | {"optimizer": -WEIGHTS}),
    ],
)  # fmt: skip
def test_a_key_moves_the_phases_that_it_should(before, arguments, changes):
    after = planned(*arguments)
    assert {phase: after[phase] - before[phase] for phase in PHASES} == changes


def test_an_average_that_only_samples_is_counted():
    """Hard labels need no teacher to read, but here it writes."""
    labels = ("--config", "method/hard_labels", *EMA)
    without, sampling = planned(*labels), planned(*labels, "--distillation.sampled_by", "ema")
    assert {phase: sampling[phase] - without[phase] for phase in PHASES if phase in without} == dict.fromkeys(
        [phase for phase in PHASES if without.get(phase)], WEIGHTS
    ) | {phase: 0 for phase in without if not without[phase]}


def test_nobody_samples_what_is_given():
    for teacher, sampled_by in ((FROZEN, "initial"), (EMA, "ema")):
        given = ("--config", "method/sft_on_cliffs", *teacher)
        assert planned(*given, "--distillation.sampled_by", sampled_by) == planned(*given)


LORA = ("--model.policy.lora", "{r: 8, target_modules: [q_proj, down_proj]}")
#: Two matrices for each of 28 layers' query projection (1,536 x 1,536) and down projection (8,960 x 1,536).
ADAPTER = 28 * 8 * (1536 + 1536 + 8960 + 1536)


def test_an_adapter_alone_has_gradients_and_optimizer_state_and_no_second_copy_of_the_weights():
    lora = LoRAConfig(r=8, target_modules=["q_proj", "down_proj"])
    shape = Shape.of(policy_config("Qwen/Qwen2.5-1.5B"), lora)
    assert (shape.adapter, shape.rank, shape.adapted) == (ADAPTER, 8, {"q_proj", "down_proj"})
    assert shape.num_parameters == SHAPE.num_parameters

    def peaks(*arguments, devices=1):
        return memory(shape, read_config([*HDPO, *LORA, *arguments]), devices, 80 * GIB)

    before = peaks()
    assert before["optimizer"] == WEIGHTS + 4 * ADAPTER * (1 + 1 + 2), "weights, adapter, its gradient, two moments"
    assert peaks("--model.policy.dtype", "bfloat16")["optimizer"] == WEIGHTS // 2 + 16 * ADAPTER, "in float32"
    initial = peaks(*FROZEN, *KL, "--distillation.sampled_by", "initial")
    assert initial == before, "the initial policy is the same weights"
    for arguments, devices in ((EMA, 1), (("--trainer.strategy", "ddp"), 2)):
        after = peaks(*arguments, devices=devices)
        for phase in ("teacher", "update", "optimizer"):
            assert after[phase] - before[phase] == 4 * ADAPTER, "one more adapter; DDP's copy of its gradient"


def test_seven_billion_with_an_adapter_fit_one_gpu(capsys):
    seven = (*HDPO, "--model.policy.path", "Qwen/Qwen2.5-7B")
    assert {row["set"] for row in rows(capsys, *seven, status=1).values()} == {"does not fit"}
    found = rows(capsys, *seven, "--model.policy.dtype", "bfloat16", "--model.policy.lora", "{r: 16}")
    assert set(found) == {("none", "transformers"), ("none", "vLLM")}
    for row in found.values():
        assert row["set"] != "does not fit"
        assert max(float(row[phase].strip("*")) for phase in PHASES) <= 80
    assert found["none", "vLLM"]["set"] == "--config engine/vllm"


def test_fsdp2_cannot_shard_an_adapter(capsys):
    assert {strategy for strategy, _ in rows(capsys, *HDPO, *LORA, "--devices", "8")} == {"DDP"}
    assert main(["plan", *HDPO, *LORA, *FSDP2, "--devices", "8"]) == 2
    assert "model.policy.lora cannot be sharded by FSDP2" in capsys.readouterr().err


#: Bytes of 256 sequences' KV cache per token of each: keys and values in bfloat16.
COLUMN = 256 * 28 * 256 * (2 + 2)


@pytest.mark.parametrize(
    ("arguments", "phase", "columns"),
    [
        (("--rollouts.val_max_new_tokens", "2072"), "validation", -1000),
        (("--data.val_sources", "{a: {path: x, max_new_tokens: 4072}, b: {path: y}}"), "validation", 1000),
        (("--data.selection.max_privileged_tokens", "1048"), "privileged", -500),  # 128 sequences
        (("--distillation.max_cliffs_per_step", "8"), "privileged", -1536),  # 32 sequences of 4,096, not 128
    ],
)
def test_the_cache_is_as_long_as_the_longest_sequences(before, arguments, phase, columns):
    after = planned(*arguments)
    # One layer's keys are held twice, another 256 x 256 x 2 per token, or a block of logits, 16 bytes per sequence.
    beside = max(abs(columns) * 256 * 256 * 2, 96 * 151_936 * 16)
    assert after[phase] - before[phase] == pytest.approx(columns * COLUMN, abs=beside)
    assert {p: after[p] for p in PHASES if p != phase} == {p: before[p] for p in PHASES if p != phase}


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (("--config", "method/grpo", *EMA), ["privileged", "teacher"]),
        (("--trainer.limit_val_batches", "0"), ["validation"]),
        (("--config", "method/hinted_grpo"), ["teacher"]),
        (("--config", "method/hard_labels", *EMA), ["teacher"]),
        (("--config", "method/sft_on_cliffs"), ["privileged", "teacher"]),
        (("--config", "method/self_distillation"), ["privileged"]),
    ],
)  # fmt: skip
def test_phases_that_a_run_does_not_have_are_left_out(before, arguments, missing):
    found = planned(*arguments)
    assert [phase for phase in PHASES if phase not in found] == missing
    assert found == {phase: peak for phase, peak in before.items() if phase not in missing}


def test_a_missing_phase_has_no_number(capsys):
    row = rows(capsys, *HDPO, "--config", "method/grpo")["none", "transformers"]
    assert (row["privileged"], row["validation"]) == ("-", "50.7")


def test_one_sequence_that_exceeds_a_micro_batch_counts_whole():
    """In the update behind plain prompts, privileged ones and reference solutions; in the teacher's reading."""

    def update(*arguments, tokens="1"):
        config = read_config([*HDPO, *arguments, "--model.update.micro_batch_tokens", tokens])
        return memory(SHAPE, config, 1, 80 * GIB)

    for arguments, longest in (
        ((), 1024 + 3072),
        (("--distillation.max_new_tokens", "9000"), 1024 + 9000),
        (("--config", "method/joint", "--distillation.max_new_tokens", "9000"), 2048 + 9000),
        (("--config", "method/luffy", "--cliffs.max_reference_tokens", "9000"), 1024 + 9000),
    ):
        assert update(*arguments)["update"] == update(tokens=str(longest))["update"]
    assert (
        update("--rollouts.max_new_tokens", "9000", "--config", "method/self_distillation")["teacher"]
        == (update(tokens=str(2048 + 9000))["teacher"])
    )


def test_an_engine_that_stays_awake_keeps_its_share():
    awake = planned(*VLLM, "--model.engine.free_memory_during_update", "false")
    asleep = planned(*VLLM)
    assert {p: awake[p] - asleep[p] for p in PHASES} == dict.fromkeys(PHASES[:3], 0) | dict.fromkeys(
        PHASES[3:], int(0.3 * 80 * GIB)
    )


def test_a_cache_of_a_given_size_stands_beside_vllms_weights():
    """Weights and a tied output layer in 16 bits, and within a completion's cache (0.11 GiB) what is asked for."""
    ten, five = (planned(*VLLM, "--model.engine.kv_cache_gib", gib)["rollouts"] for gib in ("10", "5"))
    share = planned(*VLLM)["rollouts"] - int(0.3 * 80 * GIB)
    assert ten - five == 5 * GIB
    assert ten - share == pytest.approx(2 * (SHAPE.num_parameters + SHAPE.head) + 10 * GIB, abs=0.12 * GIB)


@pytest.mark.parametrize(
    ("arguments", "devices"),
    [
        (("--trainer.devices", "4", "--trainer.num_nodes", "2"), "8"),
        (("--trainer.devices", "[0, 3]"), "2"),
        (("--trainer.devices", "4", "--devices", "3"), "3"),
    ],
)
def test_the_number_of_gpus(capsys, arguments, devices):
    assert {row["GPUs"] for row in rows(capsys, *HDPO, *arguments).values()} == {devices}


def test_the_largest_phase_is_marked(capsys):
    row = rows(capsys, *HDPO, "--devices", "8")["DDP", "vLLM"]
    largest = [phase for phase in PHASES if row[phase].startswith("**")]
    numbers = {phase: float(row[phase].strip("*")) for phase in PHASES}
    assert largest == ["rollouts"]
    assert numbers["rollouts"] == max(numbers.values())
    # 2 GiB more than what is allocated.
    policy = read_config([*HDPO, *VLLM])
    assert numbers == {p: round(b / GIB + 2, 1) for p, b in memory(SHAPE, policy, 8, 80 * GIB).items()}


@pytest.mark.parametrize(
    ("arguments", "engine", "key", "value"),
    [
        ((), "transformers", "model.engine.max_sequences", 128),
        ((*VLLM, "--model.update.micro_batch_tokens", "65536"), "vLLM", "model.update.micro_batch_tokens", 32768),
    ],
)
def test_the_smallest_change_that_fits_is_recommended(capsys, arguments, engine, key, value):
    """What is recommended fits, and twice as much would not."""
    memory_gb = ("--memory_gb", "42")
    assert rows(capsys, *HDPO, *arguments, *memory_gb)["none", engine]["set"] == f"--{key} {value}"
    again = rows(capsys, *HDPO, *arguments, f"--{key}", str(value), *memory_gb)["none", engine]
    assert again["set"] == "as configured"
    assert float(again["update" if engine == "vLLM" else "rollouts"].strip("*")) <= 42
    assert rows(capsys, *HDPO, *arguments, f"--{key}", str(2 * value), *memory_gb)["none", engine]["set"] == (
        f"--{key} {value}"
    )


def test_recomputation_is_recommended_where_small_micro_batches_do_not_help(capsys):
    off = ("--model.policy.gradient_checkpointing", "false", "--memory_gb", "36")
    row = rows(capsys, *HDPO, *VLLM, *off)["none", "vLLM"]
    assert row["set"] == "--model.policy.gradient_checkpointing true"


def test_vllm_gets_as_much_as_its_weights_need(capsys):
    tight = ("--model.engine.gpu_memory_utilization", "0.05", "--memory_gb", "40")
    row = rows(capsys, *HDPO, *VLLM, *tight)["none", "vLLM"]
    assert row["set"] == "--model.engine.gpu_memory_utilization 0.1"  # 3.4 GiB


def test_gradients_that_do_not_fit_whole_are_summed_in_every_micro_batch(capsys):
    # 32.8 billion parameters: 122 GiB of gradients in float32 on each GPU, or a 64th of them.
    large = ("--model.policy.path", "Qwen/Qwen2.5-32B", "--devices", "64")
    engine = ("--model.engine.tensor_parallel_size", "4")
    row = rows(capsys, *HDPO, *FSDP2, *VLLM, *large, *engine)["FSDP2", "vLLM"]
    assert row["set"].endswith("--model.update.sync_every_micro_batch true")
    again = rows(capsys, *HDPO, *FSDP2, *VLLM, *large, *engine, *row["set"].split())["FSDP2", "vLLM"]
    assert again == row | {"set": "as configured"}
    # A quarter of the weights, in 16 bits, lies on each of the GPUs that share an engine.
    alone = rows(capsys, *HDPO, *FSDP2, *VLLM, *large)["FSDP2", "vLLM"]
    share = "--model.engine.gpu_memory_utilization 0.8"  # 62.6 GiB of 80
    assert share in alone["set"]
    assert share not in row["set"]


@pytest.mark.parametrize("configured", [(), (*FSDP2, *VLLM)], ids=["hdpo", "FSDP2 and vLLM"])
def test_what_is_recommended_is_accepted_and_fits(capsys, configured):
    for names, row in rows(capsys, *HDPO, *configured, "--devices", "4", "--memory_gb", "50").items():
        if row["set"] == "as configured":
            continue
        changes = row["set"].split()
        again = rows(capsys, *HDPO, *configured, *changes, "--devices", "4", "--memory_gb", "50")[names]
        assert again == row | {"set": "as configured"}


def test_what_cannot_fit_says_so_and_returns_1(capsys):
    found = rows(capsys, *HDPO, "--model.policy.path", "Qwen/Qwen2.5-7B", "--memory_gb", "40", status=1)
    assert {row["set"] for row in found.values()} == {"does not fit"}


def test_a_folder_with_config_json_is_enough(capsys, tmp_path):
    path = Path(ROOT / "hdpo" / "lab" / "policy" / "config.json")
    (tmp_path / "config.json").write_text(path.read_text())
    there, here = (
        rows(capsys, "--config", "lab", "--model.policy.path", path)["none", "transformers"]
        for path in (str(tmp_path), "pkg://hdpo.lab/policy")
    )
    assert there | {"policy": ""} == here | {"policy": ""}


def test_a_configuration_needs_no_more_than_a_policy(capsys):
    """The defaults of what it leaves out are counted as if they stood there."""
    policy = ("--model.policy.path", "Qwen/Qwen2.5-1.5B")
    stated = ("--model.update.micro_batch_tokens", "16384", "--model.update.num_minibatches", "1")
    assert rows(capsys, *policy) == rows(capsys, *policy, *stated)
    smaller = rows(capsys, *policy, "--model.update.micro_batch_tokens", "2048")["none", "transformers"]["update"]
    assert float(smaller) < float(rows(capsys, *policy)["none", "transformers"]["update"])


def test_without_a_policy_there_is_nothing_to_plan(capsys):
    assert main(["plan"]) == 2
    assert capsys.readouterr().err.startswith("hdpo: error: plan: model.policy.path is not set; name the policy with")


def test_the_table_in_the_documentation_is_the_commands(capsys):
    assert main(["plan", *HDPO, "--table"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 2 + 2 * (2 + 4)
    assert f"\n{printed}\n" in (ROOT / "docs" / "what-fits-where.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices must be a number of at least 1, got 0"),
        (["--memory_gb", "-1"], "--memory_gb must be a positive number, got -1"),
        (["--config", "missing.yaml"], "--config: there is no file 'missing.yaml'"),
        (["--model.policy.path", "no/such"], "model.policy.path: cannot read the configuration of 'no/such'"),
        (["--rollouts.num_generations", "0"], "rollouts.num_generations must be a number of at least 1, got 0"),
        (["--no.such.key", "1"], "no.such.key"),
        (["--model.policy.dtype", "int8"], "model.policy.dtype"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_clear_line(capsys, arguments, message):
    try:
        status = main(["plan", *HDPO, *arguments])
    except SystemExit as exit_:
        status = exit_.code
    printed = capsys.readouterr()
    assert status == 2
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert printed.out == ""
