"""The two contexts of a problem: what the student sees, and what the privileged teacher sees.

The student's context is the problem. The privileged context (paper, section 3.2) also holds the ground truth. Both pass
through the tokenizer's chat template and end in the same generation-prompt tokens, so that the completion starts from
the same position in both and the two distributions differ through the ground truth alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from jinja2 import TemplateError

from hdpo.errors import ConfigError, check_choice
from hdpo.files import resolve_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

PRIVILEGED_TEMPLATE = (
    "Here is a reference solution to the problem below:\n\n"
    "{context}\n\n"
    "Study it, then derive the solution again in your own words.\n\n"
    "{problem}"
)

CHAT_TEMPLATES = {
    "r1_zero": (
        "{{- bos_token }}"
        "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- else %}"
        "{{- 'A conversation between User and Assistant. The User asks a question, and the Assistant solves it: it '"
        " 'first thinks within <think> </think>, then gives its answer within <answer> </answer>.' }}"
        "{%- endif %}"
        "{%- for message in messages if message.role != 'system' %}"
        "{{- '\n' + message.role.capitalize() + ': ' + message.content }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '\nAssistant: <think>' }}{%- endif %}"
    )
}
"""Chat templates by name, for base models: ``r1_zero`` needs no special tokens (after DeepSeek-R1-Zero, 2501.12948)."""

_PLACEHOLDER = re.compile(r"\{(context|problem)\}")

Context = Literal["solution", "answer", "hint", "column"]


@dataclass(frozen=True)
class PromptConfig:
    """How problems become prompts.

    Attributes:
        system_prompt: content of the system message; null for none (the chat template may add its own).
        instruction: text after the problem in the user message, the same in both contexts; empty for none.
        privileged_template: user message of the privileged context, with ``{context}`` and ``{problem}``.
        privileged_context: what the ground truth is: ``solution`` (worked solution with its final answer), ``answer``
            (the final answer only), ``hint`` (the first ``hint_fraction`` of the solution's words, no answer) or
            ``column`` (the text of ``columns.context``). A problem without a worked solution gets ``answer`` where
            ``solution`` is asked for. One without any context is trained on like the others, but never distilled.
        hint_fraction: leading share of the solution that a ``hint`` reveals, in (0, 1].
        chat_template: in place of the tokenizer's: ``r1_zero`` (for base models, which have none) or a Jinja file.
        chat_template_kwargs: passed to the chat template (for example ``enable_thinking: false`` for Qwen3).
    """

    system_prompt: str | None = None
    instruction: str = BOXED_INSTRUCTION
    privileged_template: str = PRIVILEGED_TEMPLATE
    privileged_context: Context = "solution"
    hint_fraction: float = 0.5
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("{context}", "{problem}"):
            if name not in self.privileged_template:
                raise ConfigError(f"data.prompts.privileged_template must contain {name}")
        check_choice("data.prompts.privileged_context", self.privileged_context, get_args(Context))
        if not 0 < self.hint_fraction <= 1:
            raise ConfigError(f"data.prompts.hint_fraction must be in (0, 1], got {self.hint_fraction}")


def privileged_context(config: PromptConfig, solution: str, answer: str, context: str = "") -> str:
    r"""Return the ground truth in the form that ``config.privileged_context`` asks for; empty where there is none.

    Example:
        >>> privileged_context(PromptConfig(), "Add them: 2 + 3 = 5.", "5")
        'Add them: 2 + 3 = 5.\n\nThe final answer is \\boxed{5}.'
        >>> privileged_context(PromptConfig(privileged_context="answer"), "Add them: 2 + 3 = 5.", "5")
        'The final answer is \\boxed{5}.'
        >>> privileged_context(PromptConfig(privileged_context="hint"), "Add them: 2 + 3 = 5.", "5")
        'Add them: 2'
        >>> privileged_context(PromptConfig(privileged_context="column"), "Add them: 2 + 3 = 5.", "5", "Use +.")
        'Use +.'
    """
    final = f"The final answer is \\boxed{{{answer}}}." if answer else ""
    match config.privileged_context:
        case "answer":
            return final
        case "column":
            return context
        case "hint":
            words = solution.split(" ")
            return " ".join(words[: max(1, int(len(words) * config.hint_fraction))])
        case _:
            # A solution that already boxes its answer states it once; the others get it spelled out.
            parts = [solution.strip()] if "\\boxed" in solution else [solution.strip(), final]
            return "\n\n".join(part for part in parts if part)


class PromptRenderer:
    """Renders problems through a chat template.

    Attributes:
        chat_template: Jinja source of the template.
        generation_prompt: the tokens after the user's message, in which every context ends (in ChatML
            ``<|im_end|>``, a newline, and the opening of the assistant's turn).

    Raises:
        ConfigError: there is no chat template, the template refuses the messages, or it adds nothing after the user's
            message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig | None = None) -> None:
        self.tokenizer = tokenizer
        self.config = config or PromptConfig()
        self.chat_template = self._chat_template()
        self.generation_prompt = self._generation_prompt()
        self._special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

    def _chat_template(self) -> str:
        name = self.config.chat_template
        if name is None:
            if not getattr(self.tokenizer, "chat_template", None):
                raise ConfigError(
                    f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template: choose an instruction-tuned "
                    f"policy, or set data.prompts.chat_template to {', '.join(CHAT_TEMPLATES)} or a Jinja file"
                )
            return self.tokenizer.get_chat_template()
        if name in CHAT_TEMPLATES:
            return CHAT_TEMPLATES[name]
        try:
            return Path(resolve_path(name)).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            known = ", ".join(CHAT_TEMPLATES)
            raise ConfigError(f"data.prompts.chat_template must be {known} or a readable file ({error})") from error

    def _apply(self, users: Sequence[str]) -> list[list[int]]:
        """Return the token ids of conversations, one for each user message; tokenized together, which is quicker."""
        if not users:
            return []
        prompt = self.config.system_prompt
        system = [] if prompt is None else [{"role": "system", "content": prompt}]
        try:
            ids = self.tokenizer.apply_chat_template(
                [[*system, {"role": "user", "content": user}] for user in users],
                chat_template=self.chat_template,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **self.config.chat_template_kwargs,
            )
        except TemplateError as error:
            advice = "; set data.prompts.system_prompt to null" if system else ""
            raise ConfigError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses the prompt: {error}{advice}"
            ) from error
        return cast("list[list[int]]", ids)

    def _generation_prompt(self) -> list[int]:
        # Two messages that share neither their first nor their last character: what they end in, the template added.
        first, second = self._apply(["7 x", "1 - y."])
        if first == second:
            raise ConfigError(f"the chat template of {self.tokenizer.name_or_path!r} leaves the user's message out")
        shared = 0
        while shared < min(len(first), len(second)) and first[-1 - shared] == second[-1 - shared]:
            shared += 1
        if not shared:
            raise ConfigError(
                f"the chat template of {self.tokenizer.name_or_path!r} adds nothing after the user's message, so "
                "that the student's and the privileged context could end in different tokens"
            )
        return first[-shared:]

    def _question(self, problem: str) -> str:
        problem = problem.strip()
        return f"{problem}\n\n{self.config.instruction}" if self.config.instruction else problem

    def holds_special_tokens(self, *texts: str) -> bool:
        """Return whether a text spells one of the tokenizer's special tokens, which would break the prompt's turns."""
        return any(token in text for text in texts for token in self._special)

    def is_closed(self, ids: Sequence[int]) -> bool:
        """Return whether a context ends in :attr:`generation_prompt`; a tokenizer may merge across the border."""
        return list(ids[-len(self.generation_prompt) :]) == self.generation_prompt

    def students(self, problems: Sequence[str]) -> list[list[int]]:
        """Return the token ids of the contexts without ground truth, one per problem."""
        return self._apply([self._question(problem) for problem in problems])

    def teachers(self, problems: Sequence[str], contexts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of the contexts with ground truth, one per problem; empty where there is none.

        Args:
            problems: N problems.
            contexts: N ground truths, as :func:`privileged_context` returns them.
        """
        pairs = list(zip(problems, contexts, strict=True))
        ids = iter(self._apply([self._privileged_message(problem, context) for problem, context in pairs if context]))
        return [next(ids) if context else [] for context in contexts]

    def _privileged_message(self, problem: str, context: str) -> str:
        values = {"context": context, "problem": self._question(problem)}
        # One pass, and not str.format: problems and solutions are full of braces, and may hold the placeholders' names.
        return _PLACEHOLDER.sub(lambda match: values[match[1]], self.config.privileged_template)

    def student(self, problem: str) -> list[int]:
        """Return the token ids of one problem's context without ground truth."""
        return self._closed(self.students([problem]))

    def privileged(self, problem: str, solution: str, answer: str, context: str = "") -> list[int]:
        """Return the token ids of one problem's context with ground truth; it ends as :meth:`student`'s does."""
        return self._closed(self.teachers([problem], [privileged_context(self.config, solution, answer, context)]))

    def _closed(self, rows: list[list[int]]) -> list[int]:
        (ids,) = rows
        if ids and not self.is_closed(ids):
            raise ConfigError(
                f"the tokenizer {self.tokenizer.name_or_path!r} merges the end of a message with the generation "
                f"prompt: {self.tokenizer.decode(ids[-20:])!r} does not end in the tokens {self.generation_prompt}"
            )
        return ids
