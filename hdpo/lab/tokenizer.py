"""The laboratory's tokenizer: byte-level BPE of a few hundred tokens in which every digit stands alone.

It ships with the weights and is never rebuilt for an existing policy: another corpus permutes the ids, and a policy
whose ids are permuted knows nothing any more, without a word of warning.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 376
PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# One token opens a message, `<|end|>` closes it: the smallest template that still knows every role and whose generation
# prompt is a pure suffix.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same texts in the same order give the same ids.

    Args:
        texts: what the policy will read and write.
        vocab_size: 256 bytes, five special tokens and the merges.

    Returns:
        a tokenizer with a chat template; ``<|end|>`` (its end-of-sequence token) closes every message.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        # Bytes leave nothing unknown. But AutoTokenizer takes the class from the model's type, and Qwen2's would add an
        # `<|endoftext|>` for want of this one: an id that the policy has no row for.
        unk_token=PAD,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
