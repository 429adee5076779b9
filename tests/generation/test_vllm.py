"""What the vLLM engine does without vLLM: options, the stream of weights, when it synchronises, when it sleeps."""

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

from hdpo.errors import ConfigError, TrainingStopped
from hdpo.generation import SamplingConfig
from hdpo.generation.vllm import VLLMEngine
from hdpo.generation.vllm_start import config_folder
from hdpo.policy import LoRAConfig, Policy
from hdpo.policy.lora import add_adapter
from hdpo.policy.without_adapter import WithoutAdapter, with_own_adapter
from tests.helpers.tolerances import F32

SAMPLING = SamplingConfig(max_new_tokens=4, temperature=1.0, eos_token_ids=(2,))
NO_SEEDS = torch.zeros(0, 2, dtype=torch.int64)


def build(tied=False):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        tie_word_embeddings=tied,
    )
    return Policy(Qwen2ForCausalLM(config))


def move(policy):
    """As an optimizer that does not move version counters."""
    policy.model.lm_head.weight.data.add_(1e-6)


@pytest.fixture
def installed(monkeypatch):
    """As if vLLM were installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: object() if name == "vllm" else find_spec(name, *a)
    )


def test_importing_the_engine_does_not_import_vllm():
    code = "import sys, hdpo.generation.vllm; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_absent_extra_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(ConfigError, match=r"^[^\n]*pip install hdpo\[vllm\]$"):
        VLLMEngine()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("tensor_parallel_size", 0),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 1.5),
        ("kv_cache_gib", 0.0),
        ("max_model_len", 0),
        ("max_num_seqs", 0),
    ],
)
def test_bad_options_name_their_key(installed, argument, value):
    with pytest.raises(ValueError, match=rf"model\.engine\.{argument}"):
        VLLMEngine(**{argument: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments: true"),
    ],
)
def test_expandable_segments_are_refused_where_vllm_does_not_see_them(installed, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{name} asks for expandable segments.*PYTORCH_CUDA_ALLOC_CONF=expandable_"):
        VLLMEngine()
    VLLMEngine(free_memory_during_update=False)
    monkeypatch.setenv(name, "expandable_segments:False")
    VLLMEngine()


def test_expandable_segments_are_left_to_vllm_where_it_sees_them(installed, monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True")
    assert VLLMEngine().free_memory_during_update, "accepted, with the sleep mode on"


def test_another_process_is_refused(installed, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING"):
        VLLMEngine()


def test_what_the_engine_sets_itself_cannot_be_set_beside_it(installed):
    engine = VLLMEngine(engine_args={"generation_config": "auto", "block_size": 32})
    with pytest.raises(ValueError, match=r"engine_args must not hold generation_config"):
        engine._arguments(build(), torch.float32, "folder")
    arguments = VLLMEngine(engine_args={"block_size": 32})._arguments(build(), torch.bfloat16, "folder")
    assert arguments["block_size"] == 32
    assert arguments["dtype"] == "bfloat16"


def test_shared_engines_need_a_multiple_of_their_size(installed):
    with pytest.raises(ValueError, match=r"model\.engine\.tensor_parallel_size is 2.*1 processes"):
        VLLMEngine(tensor_parallel_size=2).generate(build(), [], NO_SEEDS, SAMPLING)


class FakeLLM:
    """Writes down what it is told."""

    def __init__(self):
        self.calls = []
        self.model_config = SimpleNamespace(max_model_len=16)
        self.fail = False

    def sleep(self, level):
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags=("all",)):
        self.calls.append(f"wake {','.join(tags)}")

    @property
    def llm_engine(self):
        return SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.calls.append("shutdown")))

    def reset_prefix_cache(self):
        self.calls.append("reset prefix cache")
        return True

    def collective_rpc(self, method, kwargs):
        self.calls.append(method)
        if self.fail:
            raise RuntimeError("half of the weights are new")
        self.weights = {name: weight.clone() for name, weight in kwargs["weights_iterator"]}
        assert len(self.weights) > 1


@pytest.fixture
def engine(installed, monkeypatch):
    engine = VLLMEngine()
    fake = FakeLLM()
    monkeypatch.setattr(engine, "_start", lambda policy, dtype: fake)
    monkeypatch.setattr(engine, "_can_sleep", lambda: engine.free_memory_during_update)
    engine.fake = fake
    return engine


def test_it_wakes_weights_synchronises_and_wakes_the_cache_last(engine):
    policy = build()
    engine.release_memory()  # nothing has started yet
    engine.generate(policy, [], NO_SEEDS, SAMPLING)
    engine.generate(policy, [], NO_SEEDS, SAMPLING)
    engine.release_memory()
    engine.release_memory()
    move(policy)
    engine.generate(policy, [], NO_SEEDS, SAMPLING)
    sync = ["reload_weights", "reset prefix cache"]
    assert engine.fake.calls == [*sync, "sleep 2", "wake weights", *sync, "wake kv_cache"]
    assert engine.sync_version() == 2


def test_an_adapter_reaches_the_engine_within_the_weights(engine, tmp_path, monkeypatch):
    """vLLM is given a model without an adapter: the policy's own, the initial one and an average in turn."""
    pytest.importorskip("peft")
    plain, policy = build().model, build()
    add_adapter(policy.model, LoRAConfig(r=2, alpha=6.0, target_modules=["q_proj", "down_proj"]))
    average, initial = with_own_adapter(policy), WithoutAdapter(policy)
    torch.manual_seed(1)
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ids, found = torch.tensor([[5, 9, 11, 4]]), []
    for sampled in (policy, initial, average, policy):
        engine.generate(sampled, [], NO_SEEDS, SAMPLING)
        assert set(engine.fake.weights) == {name for name, _ in plain.named_parameters()}
        model = build().model
        model.load_state_dict(engine.fake.weights)
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)
    with torch.no_grad():
        own, base = (model(input_ids=ids).logits for model in (policy.model, plain))
    assert (own - base).abs().max() > 0.01
    for logits, expected in zip(found, (own, base, base, own), strict=True):
        torch.testing.assert_close(logits, expected, rtol=0, atol=16 * F32 * float(expected.abs().max()))
    assert engine.sync_version() == 4, "the initial policy and an average that has not moved differ in their matrices"
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    folders = {config_folder(model, untie_embeddings=False) for model in (policy.model, plain)}
    assert len(folders) == 1, "one architecture: the adapter is no part of it"


def test_after_a_sleep_the_weights_are_streamed_though_they_have_not_moved(engine):
    """Level 2 drops them."""
    policy = build()
    for _ in range(3):
        engine.generate(policy, [], NO_SEEDS, SAMPLING)
        engine.release_memory()
    assert engine.sync_version() == engine.fake.calls.count("reload_weights") == 3


@pytest.mark.parametrize("asleep", [False, True])
def test_it_is_woken_before_it_is_closed(engine, asleep):
    engine.generate(build(), [], NO_SEEDS, SAMPLING)
    if asleep:
        engine.release_memory()
    engine.fake.calls.clear()
    engine.close()
    engine.close()
    assert engine.fake.calls == [*(["wake all"] if asleep else []), "shutdown"]


def test_a_prefix_cache_that_stays_stops_the_run(engine, monkeypatch):
    monkeypatch.setattr(engine.fake, "reset_prefix_cache", lambda: False)
    with pytest.raises(TrainingStopped, match="could not drop its prefix cache"):
        engine.generate(build(), [], NO_SEEDS, SAMPLING)


def test_the_architectures_folder_is_named_by_its_content(monkeypatch, tmp_path):
    """Its path is in the key of vLLM's compiled code."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    first = config_folder(build().model, untie_embeddings=True)
    model = build().model
    model.config._name_or_path = "checkpoints/from/elsewhere"
    assert config_folder(model, untie_embeddings=True) == first
    assert [p.name for p in first.iterdir()] == ["config.json"]
    own = {"_name_or_path", "architectures"}
    kept, known = (c.to_dict().items() for c in (AutoConfig.from_pretrained(first), model.config))
    assert dict(item for item in kept if item[0] not in own) == dict(item for item in known if item[0] not in own)
    assert AutoConfig.from_pretrained(first).architectures == ["Qwen2ForCausalLM"]
    tied = build(tied=True).model
    assert config_folder(tied, untie_embeddings=True) == first
    kept = config_folder(tied, untie_embeddings=False)
    assert AutoConfig.from_pretrained(kept).tie_word_embeddings
    assert sorted(p.name for p in (tmp_path / "hdpo").iterdir()) == sorted({first.name, kept.name})


def test_the_first_of_several_ranks_writes_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    first = config_folder(build().model, untie_embeddings=True)
    monkeypatch.setattr("pathlib.Path.exists", lambda path: False)
    assert config_folder(build().model, untie_embeddings=True) == first
    assert [p.name for p in (tmp_path / "hdpo").iterdir()] == [first.name]


def test_it_stays_awake_where_told_so(engine):
    engine.free_memory_during_update = False
    engine.generate(build(), [], NO_SEEDS, SAMPLING)
    engine.release_memory()
    assert engine.fake.calls == ["reload_weights", "reset prefix cache"]


def test_an_interrupted_synchronisation_is_done_again(engine):
    policy = build()
    engine.generate(policy, [], NO_SEEDS, SAMPLING)
    old = {name: value.clone() for name, value in policy.state_dict().items()}
    move(policy)
    engine.fake.fail = True
    with pytest.raises(RuntimeError, match="half of the weights"):
        engine.generate(policy, [], NO_SEEDS, SAMPLING)
    engine.fake.fail = False
    # Back to what the engine had before: it must not believe that it still has it.
    policy.load_state_dict(old)
    engine.generate(policy, [], NO_SEEDS, SAMPLING)
    assert engine.sync_version() == 2
    assert engine.fake.calls.count("reload_weights") == 3


def test_what_vllm_would_silently_change_is_refused(engine):
    policy, seeds = build(), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"a prompt of 13 tokens .* engine's 16 tokens.*max_model_len"):
        engine.generate(policy, [[5] * 13], seeds, SAMPLING)
    for temperature in (0.001, 2.5):
        with pytest.raises(ValueError, match=rf"from 0\.01 to 2\.0.* {temperature}"):
            engine.generate(policy, [[5]], seeds, SamplingConfig(4, temperature, (2,)))


@pytest.mark.parametrize(
    ("autocast", "weights", "option", "expected"),
    [
        (False, torch.float32, "auto", torch.float32),
        (True, torch.float32, "auto", torch.bfloat16),
        (False, torch.bfloat16, "auto", torch.bfloat16),
        (False, torch.float64, "auto", torch.float32),
        (True, torch.float32, "float32", torch.float32),
    ],
)
def test_the_engine_computes_in_the_policys_dtype(installed, autocast, weights, option, expected):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert VLLMEngine(dtype=option)._compute_dtype(build().to(weights)) == expected
