"""The command line: finds the command, and tells a user's mistake in one line."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NoReturn

from hdpo.errors import ConfigError, StopRequested, did_you_mean

USAGE = """usage: python -m hdpo COMMAND [--config FILE] [--KEY VALUE] ...

Hybrid Distillation Policy Optimization: GRPO plus privileged self-distillation on cliff prompts.

commands that run a configuration (`COMMAND --help` lists the sections, `COMMAND --help SECTION` explains their keys):
  fit         train; --resume auto continues the newest run of this configuration, --ckpt_path FILE a certain checkpoint
  validate    evaluate on the validation split: pass@k, greedy accuracy, one record per problem and sample
  test        evaluate on the test split
  predict     write completions as JSON lines

commands around runs (`COMMAND --help` explains the options):
  plan        the GPU memory that a configuration needs, and which overlay makes it fit
              --config FILE [--devices N --memory_gb 80]
  sweep       fit in several variants and seeds; the same command continues it
              --config FILE [--arms FILE FILE --set KEY=V1,V2 --seeds 3 --jobs 2]
  report      compare runs: outcomes with intervals over runs, tests, figures
              RUN [RUN ...] [--baseline SETTING --primary ENDPOINT ...]
  show        read a run's completions with their verdicts
              RUN [--cliffs] [--problem ID]
  export      write a checkpoint as a Hugging Face model
              --config FILE --ckpt_path FILE --out DIR

A configuration FILE is a path, or the name of one that ships with hdpo: hdpo, lab, teacher/frozen, strategy/ddp, ...
Of several --config and --KEY VALUE the later ones override the earlier ones.

exit status: 0 finished, 2 a mistake of yours (told in one line), 3 training stopped itself, 75 asked to end, resumable

examples:
  python -m hdpo fit --config lab
  python -m hdpo fit --config hdpo --config teacher/frozen --model.distillation_weight 0.01
  python -m hdpo validate --config hdpo --ckpt_path runs/hdpo/version_0/checkpoints/last.ckpt
"""

_MODULES = dict.fromkeys(("fit", "validate", "test", "predict"), "hdpo.commands.run")
_MODULES |= {name: f"hdpo.commands.{name}" for name in ("plan", "report", "sweep", "show", "export")}


def main(args: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        args: command-line arguments without the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit status: 0; 2 after a mistake of the user's, which is told in one line (set ``HDPO_TRACEBACK=1`` to see
        where it was found); 3 where training stopped itself; 75 where it was asked to end (SIGTERM, SIGINT) and can be
        resumed. Errors of the program itself are raised.
    """
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if args[0] == "--version":
        from hdpo import __version__

        print(__version__)
        return 0
    try:
        if args[0] not in _MODULES:
            nearest = did_you_mean(args[0], _MODULES)
            raise ConfigError(f"there is no command {args[0]!r}; choose one of {', '.join(_MODULES)}{nearest}")
        runs = _MODULES[args[0]] == "hdpo.commands.run"
        with _ending_at_once() if runs else nullcontext():  # from here on: the imports alone take seconds
            status: int = importlib.import_module(_MODULES[args[0]]).main(args if runs else args[1:])
    except ConfigError as error:
        if os.environ.get("HDPO_TRACEBACK") == "1":
            raise
        print(f"hdpo: error: {error}", file=sys.stderr)
        return 2
    except StopRequested as stop:
        print(f"hdpo: ended ({stop.reason}); fit goes on with --resume auto", file=sys.stderr)
        return 75
    return status


@contextmanager
def _ending_at_once() -> Iterator[None]:
    """End on SIGTERM and SIGINT alike while there is nothing to save; training has a handler of its own."""

    def end(number: int, frame: object) -> NoReturn:
        raise StopRequested(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
