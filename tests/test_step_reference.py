"""The step with every option against the step written out (tests/helpers/reference.py): weights and logged values."""

import zlib
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hdpo.files import resolve_path
from tests.helpers import toy
from tests.helpers.record import Recorder, StepTape
from tests.helpers.reference import Options, Reference, boxed, flat

LAB = resolve_path("pkg://hdpo.lab/policy")


#: Of the length of the way. All is float64 but rewards and advantages, which are float32 and enter each gradient once.
TOLERANCE = 16 * torch.finfo(torch.float32).eps


def replayed(folder, options, *, steps=3, bias=0.0, tiers=(1, 2, 3, 4, 6), path="pkg://hdpo.lab/policy", data=None):
    """Run and replay; returns [(experience, logged, weights, expected)]."""
    tape = StepTape()
    toy.fit(folder, options, tape, steps=steps, engine=Recorder(bias), tiers=list(tiers), path=path, data=data)
    reference = Reference(options, resolve_path(path))
    before, path_length = flat(reference.student), 0.0
    result = []
    for step in tape.steps:
        rollouts, *rest = step.calls
        assert rollouts.temperature == options.temperature
        assert all(call.temperature == options.privileged_temperature for call in rest)
        expected = reference.step(step.batch.prompts, rollouts, rest[0] if rest else None)
        result.append((step.batch, step.logged, step.weights, expected))
        path_length += float((expected.weights - before).norm())
        error = float((step.weights - expected.weights).norm())
        assert error <= TOLERANCE * path_length, f"step {len(result) - 1}: off by {error:.2e} of {path_length:.2e}"
        before = expected.weights
    return result


# What is measured but not part of the step's mathematics.
_OTHERS = (
    "time/",
    "speed/",
    "sampler/logprob_gap",
    "privileged/tokens",
    "sampler/token_ratio_max",
    "sampler/sequence_ratio_",
)


def check_logged(logged, expected):
    assert {k for k in expected if k not in logged} == set()
    assert {k for k in logged if k not in expected and not k.startswith(_OTHERS)} == set()
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.99), eps=1e-4, weight_decay=0.1)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=2e-3, momentum=0.9)


CASES = {
    "paper": {},
    "adamw, warm-up": {"optimizer": adamw, "num_warmup_steps": 2, "start_factor": 0.25},
    "grpo": {"distillation_weight": 0.0},
    "weight .3, no clipping": {"distillation_weight": 0.3, "max_grad_norm": None},
    "clipped hard": {"max_grad_norm": 0.05},
    "advantage scale none": {"advantage_scale": "none"},
    "advantage scale leave-one-out std": {"advantage_scale": "leave_one_out_std"},
    "sequence mean": {"aggregation": "sequence"},
    "truncated masked": {"mask_truncated": True, "max_new_tokens": 32},
    "truncated counted": {"max_new_tokens": 32},
    "zero variance left out": {"count_zero_variance": False},
    "everything masked": {
        "mask_truncated": True,
        "count_zero_variance": False,
        "aggregation": "sequence",
        "max_new_tokens": 32,
    },
    "kl": {"kl_coef": 0.2},
    "kl, sequence mean, masked": {
        "kl_coef": 0.5,
        "aggregation": "sequence",
        "mask_truncated": True,
        "max_new_tokens": 32,
    },
    "frozen teacher": {"teacher": "frozen"},
    "ema teacher": {"teacher": "ema", "teacher_decay": 0.6},
    "ema teacher that nothing reads": {"teacher": "ema", "distillation_weight": 0.0},
    "ema sampler, hard labels": {"sampled_by": "ema", "teacher": "ema", "target": "token", "divergence": "forward_kl"},
    "forward kl": {"divergence": "forward_kl"},
    "reverse kl": {"divergence": "reverse_kl"},
    "paper's tail": {"jsd_tail": "paper"},
    "topk 3": {"topk": 3},
    "temperature 1.5": {"temperature": 1.5},
    "privileged temperature": {"privileged_temperature": 1.5, "num_privileged": 3},
    "one cliff per step": {"max_cliffs_per_step": 1},
    "buffer of two steps": {"refresh_every": 2},
    "buffer, frozen": {"refresh_every": 2, "teacher": "frozen"},
    "epochs": {
        "num_epochs": 2,
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.01),
        "max_grad_norm": None,
        "clip_eps_low": 0.01,
        "clip_eps_high": 0.02,
    },
    "minibatches": {"num_minibatches": 3},
    "epochs x minibatches, kl, ema": {
        "num_epochs": 2,
        "num_minibatches": 2,
        "kl_coef": 0.1,
        "teacher": "ema",
        "teacher_decay": 0.5,
        "optimizer": momentum,
    },
    "epochs x minibatches, sequence": {
        "num_epochs": 2,
        "num_minibatches": 2,
        "aggregation": "sequence",
        "optimizer": lambda p: torch.optim.SGD(p, lr=0.01),
        "max_grad_norm": None,
    },
    # What is done with a cliff: each choice, and the named methods.
    "reference solutions, teacher": {"completions": "reference", "privileged_new_tokens": 96},
    "sft on cliffs": {
        "completions": "reference",
        "target": "token",
        "divergence": "forward_kl",
        "distillation_weight": 0.1,
        "privileged_new_tokens": 96,
    },
    "hard labels": {"target": "token", "divergence": "forward_kl"},
    "hard labels, jsd": {"target": "token"},
    "own failures, reverse kl": {"completions": "failures", "divergence": "reverse_kl"},
    "own failures, truncated masked": {"completions": "failures", "mask_truncated": True, "max_new_tokens": 32},
    "initial sampler": {"sampled_by": "initial", "teacher": "frozen"},
    "initial sampler, drifting, kl": {"sampled_by": "initial", "kl_coef": 0.1},
    "ema sampler": {"sampled_by": "ema", "teacher": "ema", "teacher_decay": 0.5},
    "generalised jsd .1": {"divergence": "generalized_jsd", "teacher_weight": 0.1},
    "generalised jsd .9": {"divergence": "generalized_jsd", "teacher_weight": 0.9, "topk": 3},
    "joint": {"privileged_policy_weight": 1.0, "num_privileged": 4, "log_gradient_norms": True},
    "joint, sequence, kl, updates": {
        "privileged_policy_weight": 0.5,
        "num_privileged": 4,
        "privileged_temperature": 1.5,
        "aggregation": "sequence",
        "kl_coef": 0.1,
        "num_minibatches": 2,
        "num_epochs": 2,
        "optimizer": momentum,
    },
    "joint, reference solutions": {
        "privileged_policy_weight": 1.0,
        "num_privileged": 4,
        "completions": "reference",
        "privileged_new_tokens": 96,
    },
    "hinted grpo": {"distillation_weight": 0.0, "privileged_policy_weight": 1.0, "num_privileged": 4},
    "luffy": {"distillation_weight": 0.0, "reference_in_group": True, "log_gradient_norms": True},
    "luffy, kl, sequence, updates": {
        "distillation_weight": 0.0,
        "reference_in_group": True,
        "off_policy_shaping": 0.5,
        "kl_coef": 0.1,
        "aggregation": "sequence",
        "num_epochs": 2,
        "optimizer": momentum,
    },
    "gradient norms": {"log_gradient_norms": True, "max_grad_norm": 0.05},
    "one micro-batch": {"micro_batch_tokens": 10**6},
    "one sequence per micro-batch": {"micro_batch_tokens": 1},
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_one_that_is_written_out(tmp_path, case):
    options = replace(Options(), **CASES[case])
    steps = replayed(tmp_path, options)
    for batch, logged, _, expected in steps:
        assert batch.is_cliff.tolist() == expected.is_cliff
        check_logged(logged, expected.metrics)
    # Without a signal there is nothing to compare.
    assert sum(logged["optim/grad_norm"] > 1e-3 for _, logged, _, _ in steps) == len(steps)
    assert sum(logged["cliff/mixed"] > 0 for _, logged, _, _ in steps) >= 2
    if options.distillation_weight:
        assert sum("loss/distillation" in logged for _, logged, _, _ in steps) >= 2
    if options.kl_coef:
        assert steps[-1][1]["loss/kl"] > 1e-6, "the policy must have moved"
    if options.num_epochs > 1 and options.clip_eps_low < 0.1:
        assert steps[0][1]["loss/clip_fraction"] > 0.01, "the clip must matter"
    if options.max_new_tokens < 48:
        assert steps[0][1]["rollout/truncated"] > 0.05


def hashed(text, reference):
    """Some verdict on any text: random policies have mixed groups and cliffs too."""
    return ("correct", "wrong", "wrong", "no_answer")[zlib.crc32(f"{text}{reference}".encode()) % 4]


def failing(text, reference):
    """The verifier comes to no verdict on every third text; two texts in seven it takes too long for."""
    number = zlib.crc32(text.encode())
    return "error" if number % 3 == 0 else "timeout" if number % 7 < 2 else boxed(text, reference)


@pytest.mark.parametrize("options", [
    {},
    {"advantage_scale": "leave_one_out_std", "aggregation": "sequence", "kl_coef": 0.1},
    {"count_zero_variance": False, "advantage_scale": "none", "num_epochs": 2, "max_grad_norm": None},
], ids=["paper", "sequence, kl", "zero variance left out"])  # fmt: skip
def test_rollouts_without_a_verdict_have_no_part_in_anything(tmp_path, options):
    steps = replayed(tmp_path, replace(Options(), grade=failing, num_generations=6, **options))
    logs = [logged for _, logged, _, _ in steps]
    for batch, logged, _, expected in steps:
        assert batch.is_cliff.tolist() == expected.is_cliff
        check_logged(logged, expected.metrics)
        partial = (~batch.rollouts.has_verdict).any(-1) & batch.rollouts.has_verdict.any(-1)
        assert partial.any(), "there must be groups with both"
    assert sum(log["cliff/mixed"] for log in logs) > 0
    assert sum(log["cliff/ungraded"] for log in logs) > 0


@pytest.mark.parametrize(("options", "arguments", "has"), [
    ({"num_generations": 2, "temperature": 1.0, "optimizer": adamw}, {"tiers": [6]}, "cliffs"),
    ({"temperature": 0.3, "optimizer": adamw}, {"tiers": [1]}, "solved"),
    ({"grade": lambda text, reference: "wrong", "kl_coef": 0.1, "optimizer": momentum}, {}, "nothing kept"),
    ({"num_minibatches": 6, "optimizer": momentum}, {}, "minibatches without a gradient"),
    ({}, {"data": {"max_privileged_tokens": 104}}, "privileged prompts too long"),
])  # fmt: skip
def test_steps_that_lack_something(tmp_path, options, arguments, has):
    steps = replayed(tmp_path, replace(Options(), **options), **arguments)
    for batch, logged, _, expected in steps:
        assert batch.is_cliff.tolist() == expected.is_cliff
        check_logged(logged, expected.metrics)
    logs = [logged for _, logged, _, _ in steps]
    match has:
        case "cliffs":
            assert all(log["cliff/fraction"] == 1 for log in logs)
            assert logs[0]["privileged/kept"] > 0
            assert logs[0]["loss/policy"] == 0
        case "solved":
            assert all(log["cliff/solved"] == 1 and log["optim/grad_norm"] == 0 for log in logs)
            assert not torch.equal(steps[0][2], steps[1][2]), "weight decay acts all the same"
        case "nothing kept":
            assert all(log["privileged/kept"] == 0 and "loss/distillation" not in log for log in logs)
        case "minibatches without a gradient":
            assert all(log["cliff/mixed"] < 1 for log in logs)
        case _:
            assert sum(log["privileged/too_long"] for log in logs) > 0
            assert sum(log["privileged/kept"] for log in logs) > 0


def test_the_sampler_correction(tmp_path):
    options = replace(Options(), sampler_correction="truncated", sampler_correction_threshold=1.05)
    steps = replayed(tmp_path, options, steps=2, bias=0.1)
    plain = replayed(tmp_path, Options(), steps=1, bias=0.1)
    assert (steps[0][2] - plain[0][2]).norm() > 1e-3 * (steps[0][2] - steps[1][2]).norm(), "the correction must matter"
    for _, logged, _, expected in steps:
        check_logged(logged, expected.metrics)
        assert 0.2 < logged["sampler/token_ratio_above"] < 0.5


def write_policy(folder, kind, **options):
    """A random policy of two layers that reads the laboratory's tokens."""
    sizes = {"vocab_size": 376, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(LAB)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(kind, **sizes, **heads, **special, **options)
    AutoModelForCausalLM.from_config(config, dtype=torch.float64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("kind", "architecture"), [
    ("qwen2", {"tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": False}),
    ("mistral", {"sliding_window": 8}),
    ("qwen3", {"head_dim": 16}),
])  # fmt: skip
def test_architectures_and_tied_weights(tmp_path, kind, architecture):
    path = write_policy(tmp_path / "policy", kind, **architecture)
    options = Options(
        grade=hashed,
        kl_coef=0.1,
        teacher="ema",
        teacher_decay=0.5,
        temperature=1.0,
        num_generations=3,
        num_privileged=4,
        max_new_tokens=12,
        privileged_new_tokens=12,
    )
    steps = replayed(tmp_path, options, path=path)
    for _, logged, _, expected in steps:
        check_logged(logged, expected.metrics)
        assert logged["cliff/mixed"] > 0
    assert sum("loss/distillation" in logged for _, logged, _, _ in steps) >= 2
