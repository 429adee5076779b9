"""Starts the processes of a distributed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.distributed import driver
from tests.helpers.processes import Started, environment, forking, free_port, wait


def run_scenarios(
    out: Path, strategy: str, world: int, scenarios: list[dict[str, Any]], *, timeout: float, expected: int = 0
) -> None:
    """Run scenarios in ``world`` processes of :mod:`tests.distributed.driver`."""
    out.mkdir(parents=True, exist_ok=True)
    name = scenarios[0]["name"]
    specification = out / f"{name}.spec"
    torch.save({"out": str(out), "strategy": strategy, "scenarios": scenarios}, specification)
    context, port = forking(), free_port()
    logs = [out / f"{name}.rank{rank}.log" for rank in range(world)]
    processes: list[Started] = []
    for rank, log in enumerate(logs):
        log.touch()
        env = environment(rank if world > 1 else None, world, port)
        processes.append(context.Process(target=driver.main, args=(str(specification), str(log), env), daemon=True))
    try:
        for process in processes:
            process.start()
    finally:
        wait([p for p in processes if p.pid is not None], logs, timeout, expected)


def results(out: Path, scenario: str, world: int) -> list[dict[str, Any]]:
    """What each rank wrote in that scenario."""
    return [torch.load(out / f"{scenario}.rank{r}.pt", weights_only=True) for r in range(world)]
