"""Completions that a person can read: as TensorBoard text and as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO, cast

from lightning.pytorch import Callback

from hdpo.errors import check_at_least
from hdpo.experience import Experience, Rollouts
from hdpo.files import run_folder, write_text
from hdpo.rewards.boxed import last_boxed


class SampleLogger(Callback):
    """Logs the completions of a few prompts with their verdicts, and cliffs with their privileged rollouts.

    Written to TensorBoard (text) and to ``samples.jsonl`` in the run's folder.

    Args:
        every_n_steps: interval in steps; 0 for never.
        num_prompts: prompts per logged step, and in addition as many cliffs, if there are any.
        num_completions: completions per prompt.

    Raises:
        ConfigError: a negative number.
    """

    def __init__(self, every_n_steps: int = 25, num_prompts: int = 2, num_completions: int = 2) -> None:
        check_at_least(
            0,
            samples__every_n_steps=every_n_steps,
            samples__num_prompts=num_prompts,
            samples__num_completions=num_completions,
        )
        self.every_n_steps = every_n_steps
        self.num_prompts = num_prompts
        self.num_completions = num_completions

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget what was written after the checkpoint that the run is resumed from: it comes again."""
        path = run_folder(trainer) / "samples.jsonl"
        if trainer.is_global_zero and path.is_file():
            # Not by splitlines: a text may hold other characters that end a line. A killed run may leave half a line.
            *whole, _ = path.read_text(encoding="utf-8").split("\n")
            write_text(path, "".join(f"{line}\n" for line in whole if json.loads(line)["step"] < trainer.global_step))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int) -> None:
        """Write the step's samples on the first rank."""
        if self.every_n_steps == 0:
            return
        step = trainer.global_step - 1  # the step that has just ended
        if step % self.every_n_steps:
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        assert batch.is_cliff is not None, "the stations complete the experience first"
        cliffs = batch.is_cliff.nonzero()[:, 0].tolist()
        others = [i for i in range(len(batch)) if i not in cliffs]
        chosen = others[: self.num_prompts] + cliffs[: self.num_prompts]
        rows = [self._row(batch, i, step, pl_module.tokenizer) for i in chosen]
        folder.mkdir(parents=True, exist_ok=True)
        with _open_lines(folder / "samples.jsonl", "a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                for number, row in enumerate(rows):
                    add_text(f"samples/{'cliff' if row['is_cliff'] else 'prompt'}_{number}", _markdown(row), step)

    def _row(self, batch: Experience, i: int, step: int, tokenizer: Any) -> dict[str, Any]:
        rollouts, prompts = batch.rollouts, batch.prompts
        assert rollouts is not None
        assert batch.is_cliff is not None
        privileged: list[dict[str, Any]] = []
        if batch.privileged is not None and i in batch.privileged.positions:
            privileged = self._shown(batch.privileged.rollouts, batch.privileged.positions.index(i))
        contexts = tokenizer.batch_decode([prompts.prompt_ids[i], prompts.privileged_ids[i]], skip_special_tokens=False)
        return {
            "step": step,
            "source": prompts.source[i],
            "is_cliff": bool(batch.is_cliff[i]),
            "problem": prompts.problem[i],
            "reference": prompts.reference[i],
            "solution": prompts.solution[i],
            "prompt": contexts[0],
            "privileged_prompt": contexts[1],
            "reward": float(rollouts.rewards[i].mean()),
            "completions": self._shown(rollouts, i),
            "privileged": privileged,
        }

    def _shown(self, rollouts: Rollouts, i: int) -> list[dict[str, Any]]:
        return _completions(rollouts, i)[: self.num_completions]


def _open_lines(path: Path, mode: str) -> TextIO:
    # Byte-level tokenizers can produce lone surrogates, which UTF-8 has not; JSON can say them in ASCII.
    return cast("TextIO", path.open(mode, encoding="utf-8", errors="backslashreplace"))


def _completions(rollouts: Rollouts, i: int) -> list[dict[str, Any]]:
    """The completions of one prompt with their verdicts."""
    tokens, rewards = rollouts.completion_mask[i].sum(-1).tolist(), rollouts.rewards[i].tolist()
    truncated = rollouts.truncated[i].tolist()
    return [
        {"text": text, "outcome": outcome, "reward": reward, "tokens": length, "truncated": cut}
        for text, outcome, reward, length, cut in zip(
            rollouts.texts[i], rollouts.outcomes[i], rewards, tokens, truncated, strict=True
        )
    ]


def _markdown(row: dict[str, Any]) -> str:
    """One sample as TensorBoard shows it.

    Every text is an indented code block, in which Markdown has no special characters: no backtick, bar, tag or LaTeX
    that a policy writes can change what is around it.
    """
    lines = [f"**{visible(row['source'])}**, mean reward {row['reward']:.2f}; problem, and expected answer:"]
    lines += ["", _block(row["problem"]), _block(row["reference"])]
    for title, completions in (("plain prompt", row["completions"]), ("privileged prompt", row["privileged"])):
        if completions:
            lines += [
                "",
                f"**{title}:**",
                "",
                _block(row["prompt" if title == "plain prompt" else "privileged_prompt"]),
            ]
        for one in completions:
            verdict = f"{one['outcome']}, reward {one['reward']:g}, {one['tokens']} tokens"
            lines += ["", f"*{verdict}{', truncated' if one['truncated'] else ''}:*", "", _block(one["text"])]
    return "\n".join(lines)


def _block(text: str) -> str:
    return "\n".join(f"    {visible(line)}" for line in text.split("\n"))


def visible(text: str) -> str:
    r"""Text whose control and formatting characters are spelled out.

    Example:
        >>> print(visible("2*3 \x1b[31m \u202e"))
        2*3 \x1b[31m \u202e
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class PredictionWriter(Callback):
    """``predict`` writes one JSON line per problem: sampled and greedy completions with their outcomes.

    ``answer`` is what the greedy completion's last box holds. Problems need no reference answer: their outcome is then
    what the verifier says of one without (``invalid_reference`` for mathematics).

    Args:
        path: the file; null for ``predictions.jsonl`` in the run's folder. With several ranks each writes its own
            part, ``<name>.rank<r>.jsonl``.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._file: Any = None

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Open the file."""
        path = Path(self.path) if self.path else run_folder(trainer) / "predictions.jsonl"
        if trainer.world_size > 1:
            path = path.with_suffix(f".rank{trainer.global_rank}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _open_lines(path, "w")
        self._path = path

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Experience, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write the batch's problems, at once: nothing computed is lost if the run stops."""
        prompts, rollouts, greedy = batch.prompts, batch.rollouts, batch.greedy
        assert rollouts is not None
        assert greedy is not None
        for i in range(len(batch)):
            if not bool(prompts.valid[i]):
                continue
            row = {
                "row": int(prompts.row[i]),
                "source": prompts.source[i],
                "problem": prompts.problem[i],
                "reference": prompts.reference[i],
                "answer": last_boxed(greedy.texts[i][0]),
                "greedy": _completions(greedy, i)[0],
                "samples": _completions(rollouts, i),
            }
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        """Close the file and say where it is."""
        self._file.close()
        print(f"predictions: {self._path}")
