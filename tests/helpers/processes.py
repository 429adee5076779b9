"""Processes that train together: started quickly, and ended (and no others) when they take too long."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

__all__ = ["ROOT", "environment", "forking", "free_port", "run_on", "wait"]

ROOT = Path(__file__).parents[2]
#: What a process imports in the course of a run. It takes longer than the run, so one server does it for all of them.
PRELOAD = [
    "tests.distributed.driver",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.qwen2.modeling_qwen2",
]

Started = subprocess.Popen | BaseProcess


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(rank: int | None = None, world: int = 1, port: int = 0) -> dict[str, str]:
    """The environment of one process as torchrun gives it; without a rank that of a process on its own."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_", "PL_"))}
    own |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    own |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    if rank is not None:
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "MASTER_PORT": str(port)}
        own |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}
    return own


def _code(process: Started) -> int | None:
    """Exit status, negative for a signal; None while it runs."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def wait(
    processes: Sequence[Started],
    logs: Sequence[Path],
    timeout: float,
    expected: int = 0,
    *,
    whole_sessions: bool = False,
) -> None:
    """Wait for processes; end them all once one fails or the time is over, and say what they wrote.

    With ``whole_sessions`` each process leads a session of its own, which is ended with it.
    """
    deadline, grace = time.monotonic() + timeout, None
    try:
        while any(_code(p) is None for p in processes):
            failed = any(_code(p) not in (None, expected) for p in processes)
            # The others may be about to say why.
            grace = grace or (time.monotonic() + 5 if failed else None)
            if time.monotonic() > (grace or deadline):
                break
            time.sleep(0.05)
    finally:
        codes = [_code(p) for p in processes]
        for process, code in zip(processes, codes, strict=True):
            if code is None:
                if whole_sessions:
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.wait() if isinstance(process, subprocess.Popen) else process.join()
    texts = [f"--- process {i}:\n{log.read_text(errors='replace')[-4000:]}" for i, log in enumerate(logs)]
    # Where one is to fail, the others fail in their own ways, or wait for it until they are ended here.
    fine = codes == [0] * len(codes) if expected == 0 else expected in codes and 0 not in codes
    assert fine, "\n".join([f"exit codes {codes} (None: hung)", *texts])


def forking() -> Any:
    """Processes are forked from a server that has imported what they need, and started no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with mock.patch.dict(os.environ, {**environment(), "PYTHONPATH": path}, clear=True):
        forkserver.ensure_running()
    return context


def _on_rank(function: Callable[..., Any], variables: dict[str, str], log: str, out: str, args: Sequence[Any]) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(variables)
    with Path(log).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.save(function(dist.get_rank(), *args), out)
    dist.barrier()
    dist.destroy_process_group()


def run_on(
    world: int, folder: Path, function: Callable[..., Any], *args: Any, timeout: float = 120, fresh: bool = False
) -> list[Any]:
    """Return ``[function(rank, *args), ...]`` of processes that talk through gloo.

    Args:
        world: number of processes.
        folder: for what they write.
        function: of a test module, by whose name the processes find it.
        args: more arguments.
        timeout: seconds until they are ended.
        fresh: start interpreters of their own, which may start processes in their turn.
    """
    import torch

    context, port = multiprocessing.get_context("spawn") if fresh else forking(), free_port()
    outs, logs = ([folder / f"rank{rank}.{kind}" for rank in range(world)] for kind in ("pt", "log"))
    processes = []
    for rank, (out, log) in enumerate(zip(outs, logs, strict=True)):
        log.touch()
        arguments = (function, environment(rank, world, port), str(log), str(out), args)
        processes.append(context.Process(target=_on_rank, args=arguments, daemon=not fresh))
    try:
        for process in processes:
            process.start()
    finally:
        wait([p for p in processes if p.pid is not None], logs, timeout)
    return [torch.load(out, weights_only=False) for out in outs]
