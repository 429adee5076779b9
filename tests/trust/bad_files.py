"""Files that no command can use: name -> (what makes them in the working folder and returns arguments, the message).

The working folder holds the laboratory's policy as ``policy`` and a finished run of it as ``runs/lab/version_0``.
"""

# ruff: noqa: E501

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file, save_file

RUN = Path("runs/lab/version_0")
LAST = RUN / "checkpoints/last.ckpt"
POLICY = ["--model.policy.path=policy"]

# ---------------------------------------------------------------------- checkpoints


def checkpoint(change: Callable[[dict[str, Any]], Any], *arguments: str) -> Callable[[], list[str]]:
    """A copy of the run's checkpoint with something changed."""

    def make() -> list[str]:
        content = torch.load(LAST, weights_only=True)
        torch.save(change(content) or content, "changed.ckpt")
        return ["--ckpt_path=changed.ckpt", *arguments]

    return make


def weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[], list[str]]:
    """The checkpoint with other weights."""
    return checkpoint(lambda content: change(content["state_dict"]) and None)


def resumed(*arguments: str) -> Callable[[], list[str]]:
    """The run's own checkpoint under another configuration."""
    return lambda: [f"--ckpt_path={LAST}", *arguments]


def written(name: str, content: bytes | str, *arguments: str) -> Callable[[], list[str]]:
    """A file of the working folder."""

    def make() -> list[str]:
        data = content.encode() if isinstance(content, str) else content
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(data)
        return list(arguments)

    return make


def cut(path: Path, *arguments: str, keep: float = 0.5) -> Callable[[], list[str]]:
    """A file that is cut off."""

    def make() -> list[str]:
        data = path.read_bytes()
        Path("cut.ckpt").write_bytes(data[: int(len(data) * keep)])
        return list(arguments)

    return make


class Evil:
    def __reduce__(self) -> Any:
        return (os.system, ("touch run-by-a-pickle",))


FIRST = "policy.model.model.embed_tokens.weight"
UNREADABLE = "is not a checkpoint, or it is cut off or broken"
CKPT = "--ckpt_path=cut.ckpt"
EMA = "--model.teacher=hdpo.teacher.EMATeacher"

CHECKPOINTS = {
    "cut in the middle": (cut(LAST, CKPT), UNREADABLE),
    "cut before its end": (cut(LAST, CKPT, keep=0.999), UNREADABLE),
    "empty": (written("cut.ckpt", b"", CKPT), UNREADABLE),
    "a text": (written("cut.ckpt", "weights\n" * 99, CKPT), UNREADABLE),
    "a pickle that runs code": (written("cut.ckpt", pickle.dumps({"state_dict": Evil()}), CKPT), UNREADABLE),
    "a folder": (lambda: Path("cut.ckpt").mkdir() or [CKPT], "meta.pt is missing"),
    "a list": (checkpoint(lambda c: [1, 2], ), UNREADABLE),
    "without step": (checkpoint(lambda c: c.pop("global_step") and None), UNREADABLE),
    "of something else": (checkpoint(lambda c: {"state_dict": {"w": torch.ones(2)}, "global_step": 1}), "something else"),
    "another size": (weights(lambda s: s.update({FIRST: s[FIRST][:-1]}) or 1), f"shape of {FIRST}: ("),
    "a weight less": (weights(lambda s: s.pop(FIRST) is not None), f"shape of {FIRST}: none in the checkpoint"),
    "a weight more": (weights(lambda s: s.update({"policy.more": torch.ones(2)}) or 1), "shape of policy.more: (2,) in the checkpoint"),
    "weights that are not finite": (weights(lambda s: s[FIRST].view(-1)[:1].fill_(float("nan"))), "not finite"),
    "an average that it lacks": (resumed(EMA), "model.teacher"),
    "an average too many": (
        weights(lambda s: s.update({f"teacher.average.{k}": v for k, v in [*s.items()]}) or 1), "model.teacher"
    ),
    "another optimizer": (resumed("--model.optimizer=torch.optim.SGD"), "model.optimizer"),
    "a relative of its optimizer": (resumed("--model.optimizer=torch.optim.Adam"), "model.optimizer"),
    "another learning rate": (resumed("--model.optimizer.init_args.lr=0.5"), "model.optimizer"),
    "another decay": (resumed("--model.optimizer.init_args.weight_decay=0.5"), "weight_decay"),
    "another seed": (resumed("--seed_everything=1"), "seed"),
    "other problems": (resumed("--data.source.kwargs={'split': 'train', 'seed': 7}"), "other problems"),
}  # fmt: skip

# ---------------------------------------------------------------------- policies


def policy(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], list[str]]:
    """The policy with other weights."""

    def make() -> list[str]:
        tensors = load_file("policy/model.safetensors")
        change(tensors)
        save_file(tensors, "policy/model.safetensors", metadata={"format": "pt"})
        return POLICY

    return make


def setting(file: str, **values: Any) -> Callable[[], list[str]]:
    """The policy with other values in one of its JSON files; None removes a key."""

    def make() -> list[str]:
        path = Path("policy", file)
        content = {k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}
        path.write_text(json.dumps(content))
        return POLICY

    return make


def without(*files: str) -> Callable[[], list[str]]:
    """The policy without some of its files."""
    return lambda: [Path("policy", file).unlink() for file in files] and POLICY


def shortened(file: str, size: int) -> Callable[[], list[str]]:
    """The policy with a file that is cut off."""

    def make() -> list[str]:
        Path("policy", file).write_bytes(Path("policy", file).read_bytes()[:size])
        return POLICY

    return make


EMBEDDINGS, HEAD = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"

POLICIES = {
    "a weight that is not a number": (policy(lambda t: t[HEAD].view(-1)[:1].fill_(float("nan"))), f"not finite in {HEAD}"),
    "an infinite weight": (policy(lambda t: t[HEAD].view(-1)[:1].fill_(float("-inf"))), f"not finite in {HEAD}"),
    "a weight less": (policy(lambda t: t.pop(HEAD)), f"lacks the weights {HEAD}"),
    "a weight of another shape": (policy(lambda t: t.update({HEAD: t[HEAD][:-1].clone()})), "model.policy.path"),
    "weights cut off": (shortened("model.safetensors", 100_000), "model.policy.path"),
    "weights of no length": (shortened("model.safetensors", 0), "model.policy.path"),
    "a header cut off": (shortened("model.safetensors", 40), "model.policy.path"),
    "no weights": (without("model.safetensors"), "model.policy.path"),
    "no configuration": (without("config.json"), "model.policy.path"),
    "a configuration cut off": (shortened("config.json", 100), "model.policy.path"),
    "another architecture": (setting("config.json", model_type="no_such_model"), "model.policy.path"),
    "no language model": (setting("config.json", model_type="vit", architectures=["ViTModel"]), "model.policy.path"),
    "a mixture of experts": (
        setting("config.json", model_type="mixtral", num_local_experts=8), "mixtral is a mixture of experts (num_local_experts is 8)"
    ),
    "softcapped": (setting("config.json", final_logit_softcapping=30.0), "final_logit_softcapping"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "has no vocabulary"),
    "a tokenizer cut off": (shortened("tokenizer.json", 1000), "model.policy.path"),
    "no end of sequence": (setting("tokenizer_config.json", eos_token=None), "has 376 tokens, but its tokenizer 377"),
    "no chat template": (without("chat_template.jinja"), "has no chat template"),
    "a template that is no Jinja": (written("policy/chat_template.jinja", "{% for", *POLICY), "chat template"),
    "a template without the message": (written("policy/chat_template.jinja", "x", *POLICY), "leaves the user's message"),
    "a template that adds nothing": (
        written("policy/chat_template.jinja", "{{ messages[0].content }}", *POLICY), "adds nothing after"
    ),
}  # fmt: skip

# ---------------------------------------------------------------------- data

ROWS = [
    {"problem": f"What is {i} + {i}?", "solution": f"It is \\boxed{{{2 * i}}}.", "answer": str(2 * i)}
    for i in range(60)
]
COLUMNS = "--data.source.columns={problem: problem, solution: solution, answer: answer, source: null}"


def source(name: str, *arguments: str) -> list[str]:
    """Arguments that name a file of problems."""
    return [f"--data.source.path={name}", COLUMNS, "--data.val_source=null", "--data.test_source=null",
            "--data.selection.test_fraction=0", *arguments]  # fmt: skip


def rows(
    *arguments: str, last: Any = None, content: list[dict[str, Any]] = ROWS, end: str = ""
) -> Callable[[], list[str]]:
    """A file of JSON lines."""

    def make() -> list[str]:
        lines = [*content, *([] if last is None else [last])]
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)
        return source("rows.jsonl", *arguments)

    return make


def parquet(keep: float) -> Callable[[], list[str]]:
    """A Parquet file that is cut off."""

    def make() -> list[str]:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), "rows.parquet")
        data = Path("rows.parquet").read_bytes()
        Path("rows.parquet").write_bytes(data[: int(len(data) * keep)])
        return source("rows.parquet")

    return make


def with_answer(answer: Any) -> list[dict[str, Any]]:
    """Rows that all have one answer."""
    return [{**row, "answer": answer} for row in ROWS]


ALL_VALIDATION = ["--data.selection.val_fraction=0.99"]

DATA = {
    "a list as problem": (rows(last={**ROWS[0], "problem": ["a", "b"]}), "rows.jsonl, row 61: column 'problem'"),
    "a number as problem": (rows(last={**ROWS[0], "problem": 5}), "rows.jsonl, row 61: column 'problem'"),
    "an object as solution": (rows(last={**ROWS[0], "solution": {}}), "rows.jsonl, row 61: column 'solution'"),
    "a list as answer": (rows(last={**ROWS[0], "answer": [1]}), "rows.jsonl, row 61: column 'answer'"),
    "lone surrogates": (rows(content=[{**row, "problem": f"\ud800 {i}"} for i, row in enumerate(ROWS)]), "surrogate): "),
    "a broken line": (rows(end='\n{"problem": '), "rows.jsonl: row 61"),
    "a line that is no object": (rows(end="\n[1, 2]"), "rows.jsonl: row 61"),
    "an empty file": (rows(content=[]), "rows.jsonl has no rows"),
    "bytes that are no text": (written("rows.jsonl", b"\xff\xfe{}\n", *source("rows.jsonl")), "rows.jsonl: row 1"),
    "nested too deeply": (written("rows.jsonl", "[" * 99_999, *source("rows.jsonl")), "rows.jsonl: row 1"),
    "a Parquet file cut off": (parquet(0.6), "rows.parquet"),
    "a Parquet file of no length": (parquet(0.0), "rows.parquet"),
    "another format": (written("rows.csv", "problem,answer\n", *source("rows.csv")), "give files of one format"),
    "an empty folder": (lambda: Path("rows").mkdir() or source("./rows"), "there is no file"),
    "no such column": (rows("--data.source.columns.answer=result"), "data.source.columns.answer"),
    "no such extra column": (rows("--data.source.columns.extra=[unit]"), "data.source.columns.extra[0]"),
    "no such context": (
        rows("--data.source.columns.context=hint", "--data.prompts.privileged_context=column"),
        "data.source.columns.context",
    ),
    "answers that are empty": (rows(content=with_answer("")), "no final answer: "),
    "answers that cannot be used": (rows(content=with_answer("\\frac{1}{0}")), "reference answer that the verifier"),
    "a pattern that finds nothing": (rows("--data.source.answer_pattern=XX"), "no final answer: "),
    "prompts that are too long": (rows("--data.selection.max_prompt_tokens=1"), "prompt over data.selection"),
    "an empty validation split": (rows("--data.selection.val_fraction=1e-9"), "no validation problem is left"),
    "fewer problems than a batch": (rows("--data.selection.num_train_problems=3"), "data.prompts_per_step=4 is more than the"),
    "no training problem": (rows(*ALL_VALIDATION, content=ROWS[:4]), "no train problem is left"),
    "rows that are no dictionaries": (
        written("my_rows.py", "def rows():\n    return iter([1, 2])\n", *source("python:my_rows:rows", "--data.source.kwargs={}")),
        "my_rows:rows must yield dictionaries; its row 1 is a int",
    ),
    "a template that is not there": (lambda: ["--data.prompts.chat_template=none.jinja"], "data.prompts.chat_template"),
}  # fmt: skip

# ---------------------------------------------------------------------- configurations and folders


def config(text: str | bytes) -> Callable[[], list[str]]:
    """A second configuration file."""
    return written("mine.yaml", text, "--config", "mine.yaml")


def locked() -> list[str]:
    """The run's folder, while the run is running."""
    LOCKS.append(FileLock(RUN / ".lock"))
    LOCKS[-1].acquire(blocking=False)
    return ["--trainer.logger.init_args.version=version_0", f"--ckpt_path={LAST}"]


LOCKS: list[Any] = []
VERSION = "--trainer.logger.init_args.version=version_0"

CONFIGS = {
    "a brace that is not closed": (config("model: {pass_k: [1]\n"), "mine.yaml, line 2: not YAML"),
    "a tab": (config("model:\n\tpass_k: [1]\n"), "mine.yaml, line 2: not YAML"),
    "an alias of nothing": (config("model: *mine\n"), "mine.yaml, line 1: not YAML"),
    "a tag of Python": (config("model: !!python/object/apply:os.system ['x']\n"), "mine.yaml, line 1: not YAML"),
    "control characters": (config(b"model: \x00\x01\n"), "mine.yaml: not YAML"),
    "bytes that are no text": (config(b"\xff\xfe\x00model"), "mine.yaml: not YAML"),
    "a list": (config("- model\n- data\n"), "mine.yaml"),
    "a word": (config("model\n"), "mine.yaml"),
    "a key twice": (config("model: {pass_k: [1]}\nmodel: {distillation_weight: 0}\n"), "mine.yaml, line 2"),
    "an unknown key": (config("model: {no_such_key: 1}\n"), "no_such_key"),
    "an unknown section": (config("modell: {pass_k: [1]}\n"), "modell"),
    "a section that is a number": (config("model: 5\n"), "model"),
    "nested too deeply": (config("[" * 9999), "mine.yaml"),
    "a folder": (lambda: Path("mine.yaml").mkdir() or ["--config", "mine.yaml"], "mine.yaml"),
    "a folder that holds a run": (lambda: [VERSION], "version_0 holds a run already"),
    "a folder of a running run": (locked, "version_0 belongs to a run that is running"),
    "another configuration of that name": (
        lambda: [VERSION, "--resume=auto", "--trainer.max_steps=3"], "version_0 holds a run already"
    ),
    "runs in a file": (
        written("elsewhere", "", "--trainer.logger.init_args.save_dir=elsewhere"), "trainer.logger.init_args.save_dir"
    ),
}  # fmt: skip

# ---------------------------------------------------------------------- other commands


def export(*arguments: str, before: Callable[[], Any] = lambda: None) -> Callable[[], list[str]]:
    """The whole command."""

    def make() -> list[str]:
        before()
        return ["export", *arguments, "--out=exported"]

    return make


def without_policy() -> None:
    saved = yaml.safe_load((RUN / "config.yaml").read_text())
    Path("mine.yaml").write_text(yaml.safe_dump({"data": saved["data"]}))


CONFIG = f"--config={RUN}/config.yaml"
OTHER = "--ckpt_path=changed.ckpt"

COMMANDS = {
    "no command": (lambda: ["train"], "there is no command 'train'"),
    "export of nothing": (export(CONFIG, "--ckpt_path=none.ckpt"), "--ckpt_path"),
    "export of what is cut off": (export(CONFIG, CKPT, before=cut(LAST)), UNREADABLE),
    "export of another size": (
        export(CONFIG, OTHER, before=CHECKPOINTS["another size"][0]), "do not fit model.policy.path"
    ),
    "export of what is not finite": (
        export(CONFIG, OTHER, before=CHECKPOINTS["weights that are not finite"][0]), "not finite"
    ),
    "export without policy": (
        export("--config=mine.yaml", f"--ckpt_path={LAST}", before=without_policy), "model.policy.path"
    ),
    "export of no YAML": (export("--config=mine.yaml", OTHER, before=config("a: {\n")), "mine.yaml"),
    "report of nothing": (lambda: ["report", "nowhere"], "nowhere"),
    "report of an empty folder": (lambda: Path("empty").mkdir() or ["report", "empty"], "empty"),
    "sweep without configuration": (lambda: ["sweep", "--config", "none.yaml", "--seeds", "2"], "none.yaml"),
    "sweep of no runs": (lambda: ["sweep", "--config", "lab", "--seeds", "0"], "seeds"),
    "plan without configuration": (lambda: ["plan", "--config", "none.yaml"], "none.yaml"),
}  # fmt: skip

#: ``fit`` with these arguments, and for the last table whole commands.
FILES = {
    f"{kind}: {name}": case
    for kind, table in (
        ("checkpoint", CHECKPOINTS), ("policy", POLICIES), ("data", DATA), ("config", CONFIGS), ("command", COMMANDS)
    )
    for name, case in table.items()
}  # fmt: skip
