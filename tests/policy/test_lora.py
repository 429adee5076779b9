"""LoRA: a step against the dense reference, one set of weights, and what is saved. Needs peft."""

import copy
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hdpo.callbacks import CliffDetection, LastCheckpoint
from hdpo.commands.export import export_checkpoint
from hdpo.errors import ConfigError
from hdpo.experience import Sequences
from hdpo.files import resolve_path
from hdpo.generation.weights import named_weights, weight_rows, weights_fingerprint
from hdpo.policy import Policy, PolicyConfig
from hdpo.policy.lora import LoRAConfig, adapter_layers, adapter_off, is_adapter
from hdpo.policy.packing import TokenBatch
from hdpo.policy.without_adapter import WithoutAdapter
from hdpo.teacher import EMATeacher
from tests.distributed.driver import KEEP_ALL
from tests.distributed.launch import results, run_scenarios
from tests.helpers import toy
from tests.helpers.record import Recorder, StepTape
from tests.helpers.reference import Options, Reference
from tests.helpers.tolerances import F32

peft = pytest.importorskip("peft")
LAB = resolve_path("pkg://hdpo.lab/policy")
CONFIG = LoRAConfig(r=3, alpha=12.0, target_modules=["q_proj", "up_proj"])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


def policy_config(alpha=CONFIG.alpha, **options):
    return PolicyConfig(path="pkg://hdpo.lab/policy", dtype="float64", lora=replace(CONFIG, alpha=alpha), **options)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


class DenseLoRA(nn.Module):
    """x (W + alpha / r * B A)^T + b, with the product written out; only A and B are parameters."""

    def __init__(self, linear, first, second):
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())
        self.first, self.second = nn.Parameter(first.clone()), nn.Parameter(second.clone())

    def forward(self, x):
        weight = self.weight + CONFIG.alpha / CONFIG.r * self.second @ self.first
        return nn.functional.linear(x, weight, self.bias)


class LoRAReference(Reference):
    """The step written out for a policy whose trained parameters are low-rank matrices; knows nothing of peft."""

    def __init__(self, options, matrices):
        super().__init__(options, LAB)
        pairs = iter(zip(matrices[::2], matrices[1::2], strict=True))
        for name, module in list(self.student.named_modules()):
            if name.endswith(tuple(CONFIG.target_modules)):
                parent, _, child = name.rpartition(".")
                setattr(self.student.get_submodule(parent), child, DenseLoRA(module, *next(pairs)))
        assert next(pairs, None) is None
        for module in list(self.student.modules()):
            if not isinstance(module, DenseLoRA):
                for name, value in list(module.named_parameters(recurse=False)):
                    delattr(module, name)
                    module.register_buffer(name, value.detach())
        self.average = copy.deepcopy(self.student)
        self.optimizer = options.optimizer(self.student.parameters())


class Matrices(Callback):
    """The adapter's matrices before training and after each step."""

    def __init__(self):
        self.start, self.after = None, []

    def on_train_start(self, trainer, pl_module):
        self.start = [p.detach().clone() for p in trained(pl_module.student)]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(flat(trained(pl_module.student)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"teacher": "frozen", "kl_coef": 0.3, "sampled_by": "initial"},
        {"teacher": "ema", "teacher_decay": 0.7, "sampled_by": "ema"},
    ],
    ids=["drifting", "initial policy in three places", "an average of the adapter"],
)
def test_steps_equal_the_dense_reference(tmp_path, options):
    chosen = Options(optimizer=sgd, num_warmup_steps=0, **options)
    tape, matrices = StepTape(), Matrices()
    module = toy.module(
        policy=policy_config(), engine=Recorder(), verifier=toy.BoxedVerifier(chosen.grade),
        rollouts={
            "num_generations": chosen.num_generations, "max_new_tokens": chosen.max_new_tokens, "max_logprob_gap": 1.0
        },
        distillation={
            "num_privileged": chosen.num_privileged, "max_new_tokens": chosen.privileged_new_tokens,
            "temperature": chosen.privileged_temperature, "max_cliffs_per_step": chosen.max_cliffs_per_step,
            "topk": chosen.topk, "refresh_every": chosen.refresh_every, "completions": chosen.completions,
            "sampled_by": chosen.sampled_by, "target": chosen.target,
        },
        cliffs=CliffDetection(reference_in_group=chosen.reference_in_group),
        **{name: getattr(chosen, name) for name in toy.MODULE_OPTIONS},
    )  # fmt: skip
    fitter = toy.trainer(tmp_path, tape, matrices, max_steps=3, limit_val_batches=0)
    fitter.fit(module, datamodule=toy.datamodule(tmp_path, source=toy.source("train", [1, 2, 3, 4, 6])))
    assert (module.distillation.sampled_by, module.policy_loss.kl_coef) == (chosen.sampled_by, chosen.kl_coef)
    reference = LoRAReference(chosen, matrices.start)
    before, way = flat(matrices.start), 0.0
    for step, after in zip(tape.steps, matrices.after, strict=True):
        rollouts, *rest = step.calls
        expected = reference.step(step.batch.prompts, rollouts, rest[0] if rest else None)
        assert step.batch.distillation is not None
        assert len(step.batch.distillation) > 0
        way += float((expected.weights - before).norm())
        assert float((after - expected.weights).norm()) <= 16 * torch.finfo(torch.float32).eps * way
        before = expected.weights
    assert way > 1e-3 * float(before.norm())


@pytest.fixture
def policy():
    """A policy whose adapter is not zero any more."""
    torch.manual_seed(3)
    policy = Policy.load(policy_config())
    for parameter in trained(policy):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return policy


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_the_initial_policy_is_the_same_weights_with_the_adapter_off(policy):
    base = AutoModelForCausalLM.from_pretrained(LAB, dtype=torch.float64)
    ids = torch.tensor([[5, 9, 11, 4]])
    assert (logits(policy.model, ids) - logits(base, ids)).abs().max() > 0.01
    with adapter_off(adapter_layers(policy.model)):
        torch.testing.assert_close(logits(policy.model, ids), logits(base, ids), rtol=0, atol=0)
    assert all(p.requires_grad == is_adapter(name) for name, p in policy.model.named_parameters()), "as before"
    initial = WithoutAdapter(policy)
    own = {p.data_ptr() for p in policy.parameters()}
    assert {p.data_ptr() for p in initial.parameters()} <= own, "no second copy"
    hidden = initial.backbone(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden, base.base_model(input_ids=ids).last_hidden_state, rtol=0, atol=0)
    for name, weight in named_weights(initial, torch.float64):
        torch.testing.assert_close(weight, base.get_parameter(name).detach(), rtol=0, atol=0)
    assert weights_fingerprint(initial) != weights_fingerprint(policy), "an engine must tell them apart"


def test_gradient_checkpointing_gives_the_same_gradients():
    """Where the embedding is frozen no layer's input has a gradient, which reentrant checkpoints would need."""
    sequences = Sequences([[5, 9, 11], [8, 3]], [[4, 7], [6, 2, 9]])

    def gradients(checkpointing):
        torch.manual_seed(3)
        policy = Policy.load(policy_config(gradient_checkpointing=checkpointing))
        for parameter in trained(policy):
            parameter.data += 0.05 * torch.randn_like(parameter)
        policy.train()
        policy(TokenBatch.from_sequences(sequences, policy.device)).sum().backward()
        return [p.grad for p in trained(policy)]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        assert float(b.norm()) > 0
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def num_bytes(*models):
    """Of all distinct storages."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    return sum(storages.values())


def test_an_average_of_the_adapter_stands_on_the_same_weights(policy):
    teacher = EMATeacher(0.75)
    teacher.prepare(policy, lambda: pytest.fail("a second copy"))
    average = teacher.policy(policy)
    adapter = sum(p.numel() * p.element_size() for p in trained(policy))
    assert num_bytes(policy, average) == num_bytes(policy) + adapter, "one more adapter, and nothing else"
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    for p in trained(policy):
        p.data += 1.0
    teacher.update(policy)
    for name, p in average.named_parameters():
        expected = before[name] + 0.25 if is_adapter(name) else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-15)
        assert not p.requires_grad
    assert all(p.requires_grad == is_adapter(name) for name, p in policy.named_parameters())
    # Under their names they are what an engine samples from.
    assert {name for name, _ in average.named_weights()} == {name for name, _ in policy.named_weights()}
    ids = torch.tensor([[5, 9, 11, 4]])
    merged = AutoModelForCausalLM.from_pretrained(LAB, dtype=torch.float64)
    merged.load_state_dict(dict(named_weights(average, torch.float64)), strict=False)
    torch.testing.assert_close(logits(merged, ids), logits(average.model, ids), rtol=0, atol=1e-12)
    assert (logits(average.model, ids) - logits(policy.model, ids)).abs().max() > 0.01


def test_the_adapter_of_a_policy_in_16_bits_is_in_float32():
    """Updates of a bfloat16 number that are smaller than 1/256 of it are lost."""
    policy = Policy.load(PolicyConfig("pkg://hdpo.lab/policy", dtype="bfloat16", lora=CONFIG))
    dtypes = {is_adapter(name): p.dtype for name, p in policy.named_parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    torch.manual_seed(3)
    for p in trained(policy):
        p.data += 0.05 * torch.randn_like(p)
    layer = policy.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    merged = policy.weight("model.layers.0.self_attn.q_proj.weight")
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), exact, rtol=2.0**-8, atol=1e-7)  # rounded once
    ids = torch.tensor([[5, 9, 11, 4]])
    plain = AutoModelForCausalLM.from_pretrained(LAB, dtype=torch.bfloat16)
    assert logits(policy.model, ids).dtype == logits(plain, ids).dtype


def test_engines_get_merged_weights(policy):
    ids = torch.tensor([[5, 9, 11, 4]])
    merged = AutoModelForCausalLM.from_pretrained(LAB, dtype=torch.float64)
    weights = dict(named_weights(policy, torch.float64))
    assert set(weights) == {name for name, _ in merged.named_parameters()}
    merged.load_state_dict(weights, strict=False)
    torch.testing.assert_close(logits(merged, ids), logits(policy.model, ids), rtol=0, atol=1e-12)
    for name, weight in weights.items():
        assert torch.equal(weight_rows(policy, name, 2), weight[:2])
    before = weights_fingerprint(policy)
    trained(policy)[0].data[0, 0] += 1e-6
    assert weights_fingerprint(policy) != before


def test_export_writes_the_merged_model_and_the_adapter(policy, tmp_path):
    policy.save(tmp_path)
    ids = torch.tensor([[5, 9, 11, 4]])
    expected = logits(policy.model, ids)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(plain, ids), expected, rtol=0, atol=1e-12)
    base = AutoModelForCausalLM.from_pretrained(LAB, dtype=torch.float64)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(adapted, ids), expected, rtol=0, atol=1e-12)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 12.0


@pytest.mark.parametrize("teacher", ["drifting", "ema"])
def test_checkpoints_hold_the_adapter_alone_and_resume_exactly(tmp_path, teacher):
    def fit(folder, steps, **options):
        module = toy.module(policy=policy_config(), teacher=teacher, optimizer=adamw)
        trainer = toy.trainer(folder, LastCheckpoint(every_n_steps=1), max_steps=steps, limit_val_batches=0)
        trainer.fit(module, datamodule=toy.datamodule(tmp_path), **options)
        return module

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-2)

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "part", 2)
    (checkpoint,) = (tmp_path / "part").rglob("last.ckpt")
    names = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert names
    assert all(is_adapter(name) for name in names)
    resumed = fit(tmp_path / "part", 3, ckpt_path=checkpoint)
    assert torch.equal(flat(trained(resumed.student)), flat(trained(whole.student)))
    assert not torch.equal(
        flat(trained(resumed.student)), torch.cat([v.flatten() for n, v in names.items() if n.startswith("policy.")])
    )


def test_an_adapter_of_another_scale_is_another_policy(tmp_path):
    def run(what, alpha, **options):
        module = toy.module(policy=policy_config(alpha=alpha), distillation_weight=0.0)
        trainer = toy.trainer(tmp_path, max_steps=1, limit_val_batches=0)
        getattr(trainer, what)(module, datamodule=toy.datamodule(tmp_path), **options)

    run("fit", 12.0)
    path = tmp_path / "checkpoints/last.ckpt"
    for given, call in (
        ("the checkpoint", lambda: run("fit", 24.0, ckpt_path=path)),
        ("the checkpoint", lambda: run("validate", 24.0, ckpt_path=path)),
        ("--ckpt_path", lambda: export_checkpoint(policy_config(alpha=24.0), path, tmp_path / "out")),
    ):
        with pytest.raises(ConfigError, match=rf"^model.policy.lora.alpha: {given} {path} was .* 12.0, and not 24.0: "):
            call()
    content = torch.load(path, weights_only=True)
    del content["lora_alpha"]
    torch.save(content, tmp_path / "old.ckpt")
    export_checkpoint(policy_config(alpha=24.0), tmp_path / "old.ckpt", tmp_path / "out")


def test_export_of_a_checkpoint(tmp_path, monkeypatch):
    from hdpo.cli import main

    monkeypatch.chdir(tmp_path)
    small = [
        "--data.prompts_per_step=4", "--rollouts.num_generations=2", "--rollouts.max_new_tokens=16",
        "--distillation.max_new_tokens=16", "--trainer.max_steps=1", "--trainer.limit_val_batches=0",
        "--best_checkpoint.monitor=null", "--model.verifier=tests.helpers.toy.BoxedVerifier",
        "--model.policy.lora={r: 2, alpha: 8, target_modules: [v_proj]}", "--data.selection.num_train_problems=16",
    ]  # fmt: skip
    assert main(["fit", "--config", "lab", *small]) == 0
    run = tmp_path / "runs/lab/version_0"
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert main(["export", "--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint), "--out", "out"]) == 0
    exported, written = load_file(tmp_path / "out/model.safetensors"), load_file(run / "policy/model.safetensors")
    assert set(exported) == set(written) == set(load_file(f"{LAB}/model.safetensors"))
    assert all(torch.equal(exported[name], written[name]) for name in written)
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()
    assert checkpoint.stat().st_size < 0.5 * (run / "policy/model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["nothing"], r"target_modules: .*nothing"),
        (["lm_head"], r"must not name embeddings or the output layer, but lm_head"),
        (["embed_tokens"], r"must not name embeddings or the output layer"),
    ],
)
def test_targets_that_cannot_work_are_refused(targets, message):
    with pytest.raises(ConfigError, match=message):
        Policy.load(PolicyConfig("pkg://hdpo.lab/policy", lora=LoRAConfig(target_modules=targets)))


def test_all_linear_layers_but_the_output_layer():
    policy = Policy.load(PolicyConfig("pkg://hdpo.lab/policy", lora=LoRAConfig(r=2)))
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name, p in policy.named_parameters() if p.requires_grad}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_train_the_same_adapter(tmp_path):
    scenario = {
        "name": "lora", "folder": "lora", "steps": 4, "dtype": "float64", "distillation": KEEP_ALL,
        "module": {"teacher": "frozen", "kl_coef": 0.1}, "lora": {"r": 2, "alpha": 8.0},
    }  # fmt: skip
    found = []
    for strategy, world in (("auto", 1), ("ddp", 2)):
        run_scenarios(tmp_path / strategy, strategy, world, [scenario], timeout=240)
        found.append(
            [flat(step["weights"].values()) for step in results(tmp_path / strategy, "lora", world)[0]["steps"]]
        )
    way = sum(float((b - a).norm()) for a, b in pairwise(found[0]))
    assert way > 1e-3
    for alone, together in zip(*found, strict=True):
        assert float((alone - together).norm()) <= F32 * way
