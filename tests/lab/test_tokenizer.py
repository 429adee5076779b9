"""The tokenizer: digits alone, a template whose generation prompt is a suffix, the same ids from the same texts."""

import pytest

from hdpo.data.prompts import PromptConfig, PromptRenderer
from hdpo.lab.task import LAB_PROMPTS
from hdpo.lab.tokenizer import VOCAB_SIZE, train_tokenizer
from hdpo.lab.warmup import warmup_texts


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(warmup_texts(500, seed=0))


def test_same_texts_give_the_same_ids(tokenizer):
    again = train_tokenizer(warmup_texts(500, seed=0))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == VOCAB_SIZE


def test_every_digit_is_one_token_and_alone(tokenizer):
    ids = tokenizer.encode("12*3=36. So \\boxed{1907}", add_special_tokens=False)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("123361907")


def test_any_text_survives(tokenizer):
    text = "Ünïcode ∑ 東京\n\ttabs  and 42 blanks "
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_template_knows_three_roles_and_ends_turns_with_eos(tokenizer):
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|>"
    opened = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert opened == "<|system|>s<|end|><|user|>u<|end|><|assistant|>"
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": ""}], tokenize=False)


@pytest.mark.parametrize("config", [LAB_PROMPTS, PromptConfig(), PromptConfig(system_prompt="Be brief.")])
def test_both_contexts_end_in_the_generation_prompt(tokenizer, config):
    renderer = PromptRenderer(tokenizer, config)
    student = renderer.student("How many eggs now?")
    privileged = renderer.privileged("How many eggs now?", "1+1=2. So \\boxed{2}", "2")
    ending = tokenizer.convert_tokens_to_ids(["<|end|>", "<|assistant|>"])
    assert student[-2:] == privileged[-2:] == ending
    assert ending[-len(renderer.generation_prompt) :] == renderer.generation_prompt[-2:]
