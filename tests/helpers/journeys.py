"""A user's empty folder: files, the command line of an installed wheel, and what a run leaves behind."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

from hdpo.lab.problems import rows as stories

__all__ = ["SMALL", "Folder", "boxed_right", "scripted_policy", "story_rows"]

#: Two steps of four prompts; every journey names its own source.
SMALL = {
    "model": {"policy": {"path": "pkg://hdpo.lab/policy"}, "pass_k": [1, 2]},
    "data": {
        "prompts": {"instruction": "", "privileged_template": "Solution: {context}\n{problem}"},
        "selection": {"num_train_problems": 16, "num_val_problems": 6, "val_fraction": 0.3},
        "prompts_per_step": 4,
    },
    "rollouts": {"num_generations": 4, "num_val_samples": 2, "max_new_tokens": 24},
    "distillation": {"num_privileged": 2, "max_new_tokens": 32, "topk": 16},
    "samples": {"every_n_steps": 1},
    "trainer": {
        "max_steps": 2, "val_check_interval": 2, "accelerator": "cpu", "devices": 1, "precision": "32-true",
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "runs", "name": "mine", "version": "run"},
        },
    },
}  # fmt: skip


@dataclass
class Folder:
    """Where a journey takes place.

    Attributes:
        path: the folder.
        site: the unpacked wheel.
    """

    path: Path
    site: Path

    def write(self, name: str, content: Any) -> str:
        """Write text, rows (``.jsonl``) or settings (``.yaml``); returns the name."""
        if name.endswith(".jsonl"):
            content = "".join(json.dumps(row) + "\n" for row in content)
        elif not isinstance(content, str):
            content = yaml.safe_dump(content, allow_unicode=True)
        (self.path / name).write_text(content, encoding="utf-8")
        return name

    def python(self, *arguments: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python here, with the wheel's hdpo."""
        environment = {**os.environ, "PYTHONPATH": str(self.site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=self.path, env={**environment, **variables},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def hdpo(self, command: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on ``small.yaml`` and what comes after it."""
        self.write("small.yaml", SMALL)
        return self.python("-m", "hdpo", command, "--config", "small.yaml", *arguments, **options)

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.path / "runs/mine/run"

    def read(self, name: str) -> Any:
        """A JSON or JSON lines file of the run, compressed or not."""
        path = self.run / name
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]

    def preparation(self) -> dict[str, dict[str, Any]]:
        """What data preparation reported of each set."""
        reports = [json.loads(file.read_text())["report"] for file in (self.path / ".hdpo_cache").glob("*.json")]
        return {report["name"]: report for report in reports}

    def curves(self, run: str = "run") -> dict[str, dict[int, float]]:
        """TensorBoard's scalars: name -> step -> value."""
        from tests.helpers.curves import read_curves

        return {tag: dict(points) for tag, points in read_curves(self.path / "runs/mine" / run).items()}

    def check_scores(self, records: list[dict], scores: dict[str, Any], right: Any) -> None:
        """Grade the records with ``right(row)`` and hold the verdicts and the summary's values against that."""
        sampled, greedy = defaultdict(list), []
        for row in records:
            assert (row["outcome"] == "correct") == right(row), row
            if row["greedy"]:
                greedy.append(right(row))
            else:
                sampled[row["dataset"], row["row"]].append(right(row))
        assert scores["num_problems"] == len(greedy) == len(sampled) > 0
        mean = sum(sum(one) / len(one) for one in sampled.values()) / len(sampled)
        assert abs(scores["pass@1"]["value"] - mean) < 1e-9
        assert abs(scores["greedy_accuracy"]["value"] - sum(greedy) / len(greedy)) < 1e-9


def boxed_right(row: dict[str, Any]) -> bool:
    r"""Whether a record's last ``\boxed{}`` holds its reference; enough for integers."""
    return re.findall(r"boxed\{(.*?)\}", row["completion"])[-1:] == [row["reference"].replace(",", "")]


def story_rows(count: int, split: str = "train", tiers: tuple[int, ...] = (1,)) -> list[dict[str, str]]:
    """Rows of the laboratory, whose policy can solve them."""
    return list(stories(count, split=split, tiers=tiers))


def scripted_policy(site: Path, folder: Path, parts: list[list[str]]) -> None:
    """A policy of one's own that says one alternative of each part, each as likely as the others, whatever it reads.

    Embeddings are one-hot, the layer adds nothing, and the output layer says which token follows which.
    """
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(site / "hdpo/lab/policy")
    tokenizer.add_tokens([text for part in parts for text in part])
    size = -(-len(tokenizer) // 8) * 8
    config = Qwen2Config(
        vocab_size=size, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        torch.nn.init.eye_(model.model.embed_tokens.weight)
        for layer in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj, model.lm_head):
            layer.weight.zero_()
        chain = [["<|assistant|>"], *parts, ["<|end|>"]]
        for before, after in pairwise([tokenizer.convert_tokens_to_ids(part) for part in chain]):
            for token in before:
                # The final norm makes one-hot vectors of length sqrt(size): 30 nats above all other tokens.
                model.lm_head.weight[after, token] = 30 / size**0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
