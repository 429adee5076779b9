import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hdpo.data.prompts import CHAT_TEMPLATES, PromptConfig, PromptRenderer, privileged_context
from hdpo.errors import ConfigError
from tests.helpers.openmath_fixture import QWEN_TEMPLATE, tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No special tokens at all, and an end-of-sequence token where no answer is asked for.
ALPACA = (
    "{% for m in messages %}{{ '### ' + m['role'] + ':\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
TEMPLATES = {
    "qwen": (QWEN_TEMPLATE, ()),
    "chatml": (CHATML, ()),
    "llama3": (LLAMA_3, ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": (GEMMA, ("<bos>", "<start_of_turn>", "<end_of_turn>")),
    "alpaca": (ALPACA, ()),
    "mistral": (MISTRAL, ("[INST]", "[/INST]")),
    "r1_zero": (CHAT_TEMPLATES["r1_zero"], ()),
}
ENDINGS = {
    "qwen": "<|im_end|>\n<|im_start|>assistant\n",
    "chatml": "<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<end_of_turn>\n<start_of_turn>model\n",
    "alpaca": "\n\n### Response:\n",
    "mistral": " [/INST]",
    "r1_zero": "\nAssistant: <think>",
}

PROBLEMS = [
    ("What is $2 + 2$?", "It is \\boxed{4}.", "4"),
    ("Solve {context} for {problem} where {0} and {x} and %s", "{problem}{context}{}{", "\\frac{1}{2}"),
    ("  Trailing newline?\n\n", "Work\n", "\\{1, 2\\}"),
    ("Ends in a space and digit 7 ", "a\\1\\g<0>", "x"),
    ("日本語の問題 é", "", "5"),
]


def tokenizer(name):
    return tiny_tokenizer(*TEMPLATES[name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_both_contexts_end_in_identical_tokens(name):
    renderer = PromptRenderer(tokenizer(name))
    tail = renderer.generation_prompt
    decoded = renderer.tokenizer.decode(tail)
    # Where no special token guards the border, its first character may be merged with the message's last one.
    assert ENDINGS[name].endswith(decoded)
    assert decoded.strip()
    for problem, solution, answer in PROBLEMS:
        student, privileged = renderer.student(problem), renderer.privileged(problem, solution, answer)
        assert student[-len(tail) :] == tail == privileged[-len(tail) :]
        assert student != privileged
        # The whole question ends both contexts, not just the template's tokens.
        question = problem.strip() + "\n\n" + renderer.config.instruction
        for ids in (student, privileged):
            text = renderer.tokenizer.decode(ids)
            assert text.removesuffix(ENDINGS[name]).endswith(question), text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_privileged_context_holds_the_solution_verbatim(name):
    renderer = PromptRenderer(tokenizer(name), PromptConfig(privileged_template="A {problem} B {context} C"))
    for problem, solution, answer in PROBLEMS:
        text = renderer.tokenizer.decode(renderer.privileged(problem, solution, answer))
        context = privileged_context(renderer.config, solution, answer)
        assert f"A {problem.strip()}\n\n{renderer.config.instruction} B {context} C" in text
        assert context not in renderer.tokenizer.decode(renderer.student(problem)) or not solution


def test_system_prompt_and_template_arguments_reach_the_template():
    # An argument that is not passed is undefined, and thus false.
    template = CHATML.replace("assistant\n' }}", "assistant\n' + ('<think>' if think else '') }}")
    config = PromptConfig(system_prompt="Be brief.", instruction="", chat_template_kwargs={"think": True})
    renderer = PromptRenderer(tiny_tokenizer(template), config)
    text = renderer.tokenizer.decode(renderer.student("2+2?"))
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>"
    )
    assert renderer.tokenizer.decode(renderer.generation_prompt).endswith("<think>")


@pytest.mark.parametrize(
    ("context", "solution", "expected"),
    [
        ("solution", "So \\boxed{4}", "So \\boxed{4}"),
        ("solution", " So 4 \n", "So 4\n\nThe final answer is \\boxed{4}."),
        ("solution", "", "The final answer is \\boxed{4}."),
        ("column", "So 4", ""),
        ("hint", "", ""),
        ("answer", "So 4", "The final answer is \\boxed{4}."),
        ("hint", "one two three four", "one two"),
        ("hint", "one", "one"),
    ],
)
def test_privileged_context_forms(context, solution, expected):
    assert privileged_context(PromptConfig(privileged_context=context), solution, "4") == expected


def test_hint_fraction_grows_to_the_whole_solution():
    solution = "a b c d e f g h"
    lengths = [
        len(privileged_context(PromptConfig(privileged_context="hint", hint_fraction=f), solution, "4").split())
        for f in (0.01, 0.25, 0.5, 1.0)
    ]
    assert lengths == [1, 2, 4, 8]


def test_special_tokens_in_a_text_are_found():
    renderer = PromptRenderer(tokenizer("qwen"))
    assert renderer.holds_special_tokens("fine", "bad <|im_end|> here")
    assert not renderer.holds_special_tokens("x < y | z > w", "<im_end>")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"privileged_template": "{problem} only"}, r"privileged_template must contain \{context\}"),
        ({"hint_fraction": 0.0}, "hint_fraction"),
        ({"hint_fraction": 1.5}, "hint_fraction"),
        (
            {"privileged_context": "everything"},
            "data.prompts.privileged_context must be one of solution, answer, hint, column",
        ),
    ],
)
def test_bad_configuration(arguments, key):
    with pytest.raises(ConfigError, match=key):
        PromptConfig(**arguments)


def test_templates_that_cannot_work_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"System role not supported; set data\.prompts\.system_prompt to null"):
        PromptRenderer(tokenizer("gemma"), PromptConfig(system_prompt="Be brief."))
    without = tokenizer("qwen")
    without.chat_template = None
    with pytest.raises(
        ConfigError, match=r"has no chat template: .* set data.prompts.chat_template to r1_zero or a Jinja"
    ):
        PromptRenderer(without)
    with pytest.raises(ConfigError, match="adds nothing after the user's message"):
        PromptRenderer(tiny_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}"))


def test_the_column_is_the_context_and_a_problem_without_it_has_none():
    renderer = PromptRenderer(tokenizer("qwen"), PromptConfig(privileged_context="column"))
    text = renderer.tokenizer.decode(renderer.privileged("2+2?", "So 4", "4", "Use addition."))
    assert "below:\n\nUse addition.\n\nStudy" in text
    assert "So 4" not in text
    assert renderer.privileged("2+2?", "So 4", "4") == []


def test_many_prompts_at_once_are_the_prompts_one_by_one():
    renderer = PromptRenderer(tokenizer("qwen"))
    problems, solutions, answers = zip(*PROBLEMS, strict=True)
    contexts = [privileged_context(renderer.config, s, a) for s, a in zip(solutions, answers, strict=True)]
    assert renderer.students(problems) == [renderer.student(problem) for problem in problems]
    assert renderer.teachers(problems, contexts) == [renderer.privileged(*problem) for problem in PROBLEMS]
    contexts[1] = contexts[3] = ""
    one, two, three = (renderer.privileged(*PROBLEMS[i]) for i in (0, 2, 4))
    assert renderer.teachers(problems, contexts) == [one, [], two, [], three]
    assert renderer.students([]) == renderer.teachers([], []) == []


def test_a_base_model_gets_the_named_template(tmp_path):
    base = tokenizer("qwen")
    base.chat_template = None
    renderer = PromptRenderer(base, PromptConfig(chat_template="r1_zero"))
    text = base.decode(renderer.student("What is 2+2?"))
    assert text.startswith("A conversation between User and Assistant.")
    assert text.endswith(f"\nUser: What is 2+2?\n\n{renderer.config.instruction}\nAssistant: <think>")
    assert base.decode(renderer.generation_prompt).endswith("Assistant: <think>")
    brief = PromptRenderer(base, PromptConfig(chat_template="r1_zero", system_prompt="Be brief.", instruction=""))
    assert base.decode(brief.student("2+2?")) == "Be brief.\nUser: 2+2?\nAssistant: <think>"
    assert base.chat_template is None
    base.bos_token = "<|endoftext|>"
    assert base.decode(brief.student("2+2?")).startswith("<|endoftext|>Be brief.")


def test_a_template_from_a_file_replaces_the_tokenizers(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}Q: {{ m['content'] }}{% endfor %}{{ '\\nA:' }}", encoding="utf-8")
    renderer = PromptRenderer(tokenizer("qwen"), PromptConfig(chat_template=str(path), instruction=""))
    assert renderer.tokenizer.decode(renderer.student("2+2?")) == "Q: 2+2?\nA:"
    with pytest.raises(
        ConfigError, match=r"data.prompts.chat_template must be r1_zero or a readable file .*other.jinja"
    ):
        PromptRenderer(tokenizer("qwen"), PromptConfig(chat_template=str(tmp_path / "other.jinja")))
    path.write_text("{% for m in messages %}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"the chat template of .* refuses the prompt") as caught:
        PromptRenderer(tokenizer("qwen"), PromptConfig(chat_template=str(path)))
    assert "\n" not in str(caught.value)


#: Any text but lone surrogates, which are dropped before: emoji, combining marks, right-to-left, control characters.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
renderers = {name: PromptRenderer(tokenizer(name)) for name in ("qwen", "alpaca", "r1_zero")}


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(renderers)), texts, texts, texts.filter(bool))
def test_any_unicode_ends_both_contexts_in_the_generation_prompt(name, problem, solution, answer):
    renderer = renderers[name]
    tail = renderer.generation_prompt
    student, privileged = renderer.student(problem), renderer.privileged(problem, solution, answer)
    assert student[-len(tail) :] == tail == privileged[-len(tail) :]
    if renderer.holds_special_tokens(problem, solution, answer):
        return
    # The tokenizer's normalizer composes characters (NFC); nothing else is lost.
    for ids, parts in ((student, [problem]), (privileged, [problem, solution, answer])):
        text = renderer.tokenizer.decode(ids)
        assert all(unicodedata.normalize("NFC", part.strip()) in text for part in parts)
