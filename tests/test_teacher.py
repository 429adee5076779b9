"""The three teachers, and the teacher's top-k against a dense forward pass."""

import math

import pytest
import torch

from hdpo.errors import ConfigError
from hdpo.experience import Sequences
from hdpo.teacher import DriftingTeacher, EMATeacher, FrozenTeacher, teacher_topk
from tests.helpers.models import random_ids, random_policy
from tests.helpers.reference import Reference
from tests.helpers.tolerances import EXACT


def initial():
    return random_policy("gpt2")


def step(policy, amount):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(amount)


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def test_drifting_is_the_student_itself():
    student, teacher = initial(), DriftingTeacher()
    teacher.prepare(student, initial)
    step(student, 1.0)
    assert teacher.policy(student) is student


def test_frozen_keeps_the_initial_weights_and_stays_out_of_the_checkpoint():
    student, teacher = initial(), FrozenTeacher()
    teacher.prepare(student, initial)
    step(student, 1.0)
    teacher.update(student)
    assert torch.equal(weights(teacher.policy(student)), weights(initial()))
    assert list(teacher.parameters()) == []
    assert teacher.state_dict() == {}


def test_frozen_computes_in_the_students_dtype():
    """Lightning casts what it sees of a module (trainer.precision=64-true), and a frozen policy it does not see."""
    student, teacher = random_policy("gpt2", dtype=torch.float32), FrozenTeacher()
    teacher.prepare(student, lambda: random_policy("gpt2", dtype=torch.float32))
    student.double()
    sequences = Sequences(random_ids((6, 3)), random_ids((4, 5), seed=2))
    logps = [policy.completion_logps(sequences, token_budget=99) for policy in (student, teacher.policy(student))]
    for mine, theirs in zip(*logps, strict=True):
        assert torch.equal(mine, theirs)


def test_ema_follows_by_its_formula_and_is_in_the_checkpoint():
    student, teacher = initial(), EMATeacher(0.75)
    teacher.prepare(student, initial)
    mean = weights(initial())
    for amount in (1.0, -3.0, 0.5):
        step(student, amount)
        teacher.update(student)
        mean = 0.75 * mean + 0.25 * weights(student)
    torch.testing.assert_close(weights(teacher.policy(student)), mean, rtol=EXACT, atol=EXACT)
    assert len(teacher.state_dict()) == len(student.state_dict())
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(("decay", "same_as_student"), [(0.0, True), (1.0, False)])
def test_ema_limits_are_drifting_and_frozen(decay, same_as_student):
    student, teacher = initial(), EMATeacher(decay)
    teacher.prepare(student, initial)
    step(student, 2.0)
    teacher.update(student)
    expected = student if same_as_student else initial()
    assert torch.equal(weights(teacher.policy(student)), weights(expected))


@pytest.mark.parametrize("decay", [-0.1, 1.5, math.nan])
def test_bad_options_name_their_key(decay):
    with pytest.raises(ConfigError, match=rf"model.teacher.decay must be in \[0, 1\], got {decay}"):
        EMATeacher(decay)


def test_what_is_prepared_once_stays():
    for teacher in (FrozenTeacher(), EMATeacher(0.5)):
        student = initial()
        teacher.prepare(student, initial)
        first = teacher.policy(student)
        teacher.prepare(student, lambda: pytest.fail("a second copy"))
        assert teacher.policy(student) is first is not student
        assert not any(m.training for m in first.modules())
        assert not any(p.requires_grad for p in first.parameters())
        assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("budget", [1, 25, 1000])
@pytest.mark.parametrize("num_passes", [None, 5])
def test_topk_equals_a_dense_forward_pass(budget, num_passes):
    policy, passes = initial(), []
    policy.register_forward_hook(lambda _, arguments, __: passes.append(arguments[0].input_ids.numel()))
    sequences = Sequences(random_ids((5, 2, 9)), random_ids((3, 8, 1), seed=2))
    ids, logits = teacher_topk(policy, sequences, 7, token_budget=budget, num_passes=num_passes)
    groups = {1: 3, 25: 2, 1000: 1}[budget]
    assert len(passes) == max(groups, num_passes or 0), "missing passes are made on a placeholder"
    assert max(passes) <= max(budget, 10)
    for prompt, completion, my_ids, mine in zip(*sequences, ids, logits, strict=True):
        dense = Reference.distribution(policy.model, prompt, completion, 1.0)
        expected = dense.topk(7, dim=-1)
        assert torch.equal(my_ids.long(), expected.indices)
        # Logits, which are log-probabilities up to a constant per position.
        torch.testing.assert_close(mine.log_softmax(-1), expected.values.log_softmax(-1), rtol=EXACT, atol=EXACT)
        constant = (mine - expected.values).std(-1)
        torch.testing.assert_close(constant, torch.zeros_like(constant), rtol=0, atol=EXACT)
        assert not mine.requires_grad
        assert my_ids.dtype == torch.int32


def test_nothing_to_read():
    assert teacher_topk(initial(), Sequences([], []), 7, token_budget=10) == ([], [])


def test_topk_is_capped_at_the_vocabulary():
    ids, _ = teacher_topk(initial(), Sequences([[4]], [[5]]), 1000, token_budget=10)
    assert ids[0].shape == (1, 61)
