"""Checkpoints on disk: written whole or not at all, found again, and refused in one line where they cannot be read."""

from __future__ import annotations

import io
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import _get_rank
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from hdpo.distributed import all_max
from hdpo.errors import ConfigError, TrainingStopped, first_line
from hdpo.files import flush

_NAME = re.compile(r"(\w+)-(\d+)(?:\.(\d+))?\.ckpt")
#: What an FSDP2 checkpoint's folder holds beside the ranks' parts: Lightning's file and PyTorch's.
_META, _INDEX = "meta.pt", ".metadata"


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there; a folder that is half removed has no checkpoint's name."""
    if path.is_dir() and not path.is_symlink():
        going = path if path.name.endswith(".partial") else path.with_name(f".{path.name}.partial")
        path.rename(going)
        shutil.rmtree(going)
    else:
        path.unlink(missing_ok=True)


def saved_checkpoints(folder: Path, name: str = "last") -> list[Path]:
    """Return the whole checkpoints of a folder, the newest first.

    Args:
        folder: a run's ``checkpoints``.
        name: ``last`` or ``best``.
    """
    found = [(m, p) for p in folder.glob(f"{name}-*.ckpt") if (m := _NAME.fullmatch(p.name))]
    return [p for _, p in sorted(found, key=lambda item: (int(item[0][2]), int(item[0][3] or 0)), reverse=True)]


# ---------------------------------------------------------------------- writing


class DirectIO(TorchCheckpointIO):
    """Writes where it is told to; Lightning's own goes through memory and the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint to one file.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        try:
            with Path(path).open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch's writer fails once more when it closes the file
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else error from None


def save_checkpoint(trainer: Any, folder: Path, name: str, num_kept: int) -> None:
    """Write a checkpoint of all ranks beside the ones before, then let ``<name>.ckpt``, a link, point to it.

    At every moment the link leads to a whole checkpoint, also if the process is killed or the disk fills up. All ranks
    must call it together.

    Args:
        trainer: whose state is saved.
        folder: where to.
        name: of the link; the checkpoint itself is called ``<name>-<step>.ckpt``.
        num_kept: how many checkpoints of this name are kept, the newest ones.

    Raises:
        TrainingStopped: a weight or a state of the optimizer is not finite, or the checkpoint cannot be written. What
            was saved before stays.
    """
    step = trainer.global_step
    kept = f"the last good checkpoint is {folder / f'{name}.ckpt'}" if (folder / f"{name}.ckpt").exists() else ""
    finite = all_finite(_state_tensors(trainer))
    if all_max([not finite], trainer.strategy.root_device)[0]:
        raise TrainingStopped(
            f"after step {step} the policy's weights or the optimizer's state are not finite, so nothing was saved; "
            f"{kept or 'lower the learning rate'}"
        )
    path = trainer.strategy.broadcast(_free_path(folder, name, step))
    partial = path.with_name(f".{path.name}.partial")
    try:
        if trainer.is_global_zero:
            for old in folder.glob(f".{name}-*.partial"):  # what a killed run left
                _remove(old)
        trainer.strategy.barrier()
        trainer.save_checkpoint(partial, weights_only=False)  # ends with a barrier
        if trainer.is_global_zero:
            _put_in_place(partial, path, folder / f"{name}.ckpt")
            saved = saved_checkpoints(folder, name)
            newest = saved.index(path)  # those of later steps are of a run whose place this one has taken
            for old in saved[:newest] + saved[newest + num_kept :]:
                _remove(old)
    except (OSError, CheckpointException) as error:
        _remove(partial)
        raise TrainingStopped(
            f"the checkpoint of step {step} cannot be written to {folder} ({first_line(error)}); "
            f"{kept or 'there is none before it'}: free space, then resume"
        ) from error
    trainer.strategy.barrier()


def _state_tensors(trainer: Any) -> Iterator[Tensor]:
    """Parameters and optimizer state of this rank."""
    yield from trainer.lightning_module.parameters()
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every element is finite; of a sharded tensor, those of this rank. One device read for all of them."""
    verdicts: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        local = getattr(tensor, "to_local", None)  # a DTensor under FSDP2
        values = tensor if local is None else local()
        verdicts.setdefault(values.device, []).append(values.isfinite().all())
    return all(bool(torch.stack(part).all()) for part in verdicts.values())


def _free_path(folder: Path, name: str, step: int) -> Path:
    """A name that no checkpoint has: a run that is resumed may save a step again."""
    paths = (folder / f"{name}-{step:06d}{'' if n == 0 else f'.{n}'}.ckpt" for n in range(1 << 30))
    return next(path for path in paths if not path.exists())


def _put_in_place(partial: Path, path: Path, link: Path) -> None:
    for written in (partial, *partial.rglob("*")) if partial.is_dir() else (partial,):
        flush(written)
    os.rename(partial, path)
    new = link.with_name(f".{link.name}.link")
    _remove(new)
    new.symlink_to(path.name)
    if link.is_dir() and not link.is_symlink():  # a copy that somebody made; no system call replaces it by a link
        _remove(link)
    os.replace(new, link)
    flush(link.parent)


# ---------------------------------------------------------------------- reading


class CheckpointHeader(NamedTuple):
    """What a checkpoint says of itself.

    Attributes:
        step: optimizer steps that it has seen.
        shapes: name -> shape of each of the policy's weights.
    """

    step: int
    shapes: dict[str, tuple[int, ...]]


def read_header(key: str, path: str | Path) -> CheckpointHeader:
    """Read a checkpoint's header, and compare the file with its checksums (on the first rank; about a second per GB).

    Args:
        key: the option that named it, for messages.
        path: a file, or the folder of an FSDP2 checkpoint.

    Raises:
        ConfigError: there is none, it is cut off or broken, or something else; the message names file and cause.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{key}: there is no file or folder {str(path)!r}")
    try:
        step, shapes = _folder_header(path) if path.is_dir() else _file_header(path)
    except Exception as error:  # whatever a broken file makes of the unpickler
        raise ConfigError(
            f"{key}: {path} is not a checkpoint, or it is cut off or broken ({first_line(error)})"
        ) from error
    shapes = {name: shape for name, shape in shapes.items() if name.startswith("policy.")}
    if not shapes:
        raise ConfigError(f"{key}: {path} is a checkpoint of something else: it holds no weights called policy.*")
    return CheckpointHeader(int(step), shapes)


#: Settings of an optimizer that may differ: the schedule's, and how (not what) it computes.
_FREE = {"params", "lr", "foreach", "fused", "capturable", "differentiable"}


def check_state(module: Any, checkpoint: dict[str, Any]) -> int:
    """Return the step of a loaded checkpoint; refuse one of another policy, teacher, optimizer or schedule.

    PyTorch's own refusal is pages long, and an optimizer or a schedule of another kind or with other settings would be
    taken in silence.

    Args:
        module: the LightningModule, with its policy loaded.
        checkpoint: what Lightning has read. Under FSDP2 it does not hold the weights, which are not compared then.

    Raises:
        ConfigError: the message names the key, and the first weight or setting that differs.
    """
    given = f"the checkpoint {module.trainer.ckpt_path}"
    saved = {name: tuple(value.shape) for name, value in checkpoint.get("state_dict", {}).items()}
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in [n for n in {**wanted, **saved} if saved and wanted.get(n) != saved.get(n)][:1]:
        key = "model.teacher" if name.startswith("teacher.") else "model.policy.path"
        raise ConfigError(
            f"{given} does not fit {key}: shape of {name}: {saved.get(name, 'none')} in the checkpoint, "
            f"{wanted.get(name, 'none')} in the model; resume with config.yaml of its run, or start a new run from its "
            "exported policy"
        )
    if not all_finite(checkpoint.get("state_dict", {}).values()):
        raise ConfigError(f"{given} holds weights that are not finite: resume from the one before")
    for state in checkpoint.get("optimizer_states", []) if module.trainer.state.fn == "fit" else ():
        configured = module.configure_optimizers()
        groups = configured["optimizer"].state_dict()["param_groups"]
        for mine, theirs in zip(groups, state["param_groups"], strict=False):
            _compare("model.optimizer", given, mine, theirs, {*mine, *theirs} - _FREE)
        for theirs in checkpoint.get("lr_schedulers", []):
            schedule = configured["lr_scheduler"]["scheduler"]
            mine = schedule.state_dict()
            # What both have is a setting if the constructor takes it; the rest moves with the steps.
            names = (_arguments(type(schedule)) & {*mine}) | ({*mine} ^ {*theirs})
            _compare("model.lr_scheduler", given, mine, theirs, {n for n in names if n[0] != "_"} - {"last_epoch"})
    return int(checkpoint.get("global_step", 0))


def _compare(key: str, given: str, mine: dict[str, Any], theirs: dict[str, Any], names: Iterable[str]) -> None:
    for name in sorted(names):
        one, other = (list(v) if isinstance(v, tuple) else v for v in (mine.get(name), theirs.get(name)))
        if one != other:
            raise ConfigError(
                f"{key}: that of {given} has {name} {other}, and not {one}: resume with the config.yaml of its run, "
                "or start a new run from its exported policy"
            )


def _arguments(kind: Any) -> set[str]:
    """Names of what the constructors of a class and of its bases take."""
    return {name for base in kind.__mro__ for name in signature(base.__init__).parameters}


def check_alpha(alpha: float, checkpoint: dict[str, Any], given: str) -> None:
    """Refuse an adapter of another scale: its matrices have the same shapes, but make another policy.

    Args:
        alpha: ``model.policy.lora.alpha``.
        checkpoint: what was read; an older one does not say its alpha.
        given: what the message calls it.

    Raises:
        ConfigError: the message names the key and both values.
    """
    if (saved := checkpoint.get("lora_alpha", alpha)) != alpha:
        raise ConfigError(
            f"model.policy.lora.alpha: {given} was trained with {saved}, and not {alpha}: its adapter would be another "
            "policy; give the config.yaml of its run"
        )


def _file_header(path: Path) -> tuple[int, dict[str, tuple[int, ...]]]:
    if _get_rank() in (None, 0):  # PyTorch writes checksums, and does not read them
        with zipfile.ZipFile(path) as parts:
            if broken := parts.testzip():
                raise ValueError(f"{broken} is not what was written")
    content = torch.load(path, map_location="meta", weights_only=True)
    shapes = {name: tuple(value.shape) for name, value in content["state_dict"].items()}
    return content["global_step"], shapes


#: What the index of an FSDP2 checkpoint, a pickle, is made of. PyTorch would run whatever else stands in it.
_INDEX_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"its {_INDEX} names {module}.{name}, which has no place there")
        return super().find_class(module, name)


def _folder_header(path: Path) -> tuple[int, dict[str, tuple[int, ...]]]:
    for name in (_META, _INDEX):
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
    with (path / _INDEX).open("rb") as file:
        index = _IndexUnpickler(file).load()
    for item, info in (index.storage_data or {}).items():
        part = path / info.relative_path
        if not part.is_file() or part.stat().st_size < info.offset + info.length:
            raise ValueError(f"{info.relative_path} is missing or cut off")
        if not hasattr(index.state_dict_metadata[item.fqn], "size"):  # no tensor: PyTorch will unpickle it unchecked
            with part.open("rb") as file:
                file.seek(info.offset)
                torch.load(io.BytesIO(file.read(info.length)), map_location="meta", weights_only=True)
    content = torch.load(path / _META, map_location="meta", weights_only=True)
    shapes = {
        name.removeprefix("state_dict."): tuple(item.size)
        for name, item in index.state_dict_metadata.items()
        if name.startswith("state_dict.") and hasattr(item, "size")
    }
    return content["global_step"], shapes
