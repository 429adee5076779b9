"""Where vLLM finds the policy's architecture and keeps what it has compiled, and what it cannot start with."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hdpo.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cache_root() -> Path:
    """VLLM's cache folder, ``VLLM_CACHE_ROOT``.

    With several processes each needs one of its own: under its external launcher every rank takes itself for rank 0,
    and all would write the same compiled code to the same place.
    """
    return Path(os.environ.get("VLLM_CACHE_ROOT") or "~/.cache/vllm").expanduser()


def config_folder(model: PreTrainedModel, *, untie_embeddings: bool) -> Path:
    """Write the model's config.json, which is all that an engine with random weights and no tokenizer needs.

    The folder is named by its content, since its path is part of the key of vLLM's compiled code: with another path in
    each run everything would be compiled again.

    Args:
        model: whose architecture.
        untie_embeddings: describe it with an output layer of its own.

    Returns:
        The folder, in vLLM's cache.
    """
    config = copy.deepcopy(model.config)
    config.architectures = config.architectures or [type(model).__name__]
    config._name_or_path = ""
    if untie_embeddings:
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
    parent = cache_root() / "hdpo"
    folder = parent / hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest()[:16]
    if not folder.exists():
        parent.mkdir(parents=True, exist_ok=True)
        written = Path(tempfile.mkdtemp(dir=parent, prefix="."))
        config.save_pretrained(written)
        try:
            written.rename(folder)
        except OSError:  # another rank was first
            (written / "config.json").unlink()
            written.rmdir()
    return folder


def check_expandable_segments(environment: Mapping[str, str]) -> None:
    """Refuse expandable segments where vLLM does not see them.

    The pool of its sleep mode cannot have them, so that vLLM switches them off while it fills the pool. It looks for
    these very letters in one variable (vllm.device_allocator.cumem); else sleeping frees nothing.

    Raises:
        ConfigError: the message names the variable.
    """
    seen = "expandable_segments:True" in environment.get("PYTORCH_CUDA_ALLOC_CONF", "")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if not seen and "expandable_segments:true" in environment.get(name, "").lower().replace(" ", ""):
            raise ConfigError(
                f"{name} asks for expandable segments where vLLM's sleep mode does not look: write exactly "
                "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, unset it, or set "
                "model.engine.free_memory_during_update to false"
            )
