"""The user's mistakes and training that stops itself, told apart from defects of the program."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

__all__ = [
    "ConfigError",
    "StopRequested",
    "TrainingStopped",
    "check_at_least",
    "check_choice",
    "check_positive",
    "did_you_mean",
    "first_line",
    "instance_of",
]


class ConfigError(ValueError):
    """A mistake in a configuration, a file or a row: told in one line, with exit status 2.

    The message names the key, file or row and says what to do. Every other exception is a defect of the program and
    keeps its traceback.
    """


class TrainingStopped(RuntimeError):
    """Training stopped itself, since going on would spoil the run: told in one line, with exit status 3.

    What was saved before is good; the message says why the run stopped and what to do.
    """


class StopRequested(SystemExit):
    """The run was asked to end (SIGTERM or SIGINT), has saved its state, and can be resumed: exit status 75.

    It leaves a script that does not catch it with that status, which a scheduler's script can tell from an error.

    Args:
        reason: name of the signal.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(75)
        self.reason = reason


def first_line(error: BaseException) -> str:
    r"""The first line of an error's message, or its type where it has none.

    Example:
        >>> first_line(ValueError("no such split\nGiven: x")), first_line(KeyError())
        ('no such split', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def did_you_mean(word: str, known: Iterable[str], ending: str = "") -> str:
    """The end of a message about a name that there is not: the nearest one that there is, or nothing.

    Example:
        >>> did_you_mean("modle", ["model", "data"]), did_you_mean("model", ["data"])
        ('; did you mean model?', '')
    """
    import difflib

    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {nearest[0]}{ending}?" if nearest else ""


def check_choice(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ConfigError: the message names the key and the choices.
    """
    if value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_at_least(lowest: float, **values: float | None) -> None:
    """Refuse values below a bound, and those that are not finite numbers; None passes.

    Args:
        lowest: the smallest value that is allowed.
        values: keys (``model__kl_coef`` stands for ``model.kl_coef``) and their values.

    Raises:
        ConfigError: the message names the key.
    """
    for key, value in values.items():
        if value is not None and not lowest <= value < float("inf"):
            raise ConfigError(f"{_dotted(key)} must be a number of at least {lowest:g}, got {value}")


def check_positive(**values: float | None) -> None:
    """Refuse values that are not positive and finite; None passes. As :func:`check_at_least`."""
    for key, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{_dotted(key)} must be a positive number, got {value}")


def _dotted(key: str) -> str:
    return key.replace("__", ".")


def instance_of(key: str, given: Any, kind: type, default: type) -> Any:
    """Return the object that was given, or a default; anything else is refused before it can be misread."""
    if given is None:
        return default()
    if not isinstance(given, kind):
        known = ", ".join(sorted(c.__name__ for c in _subclasses(kind)))
        raise ConfigError(f"model.{key} must be a {kind.__name__} ({known}, or a subclass of yours), got {given!r}")
    return given


def _subclasses(kind: type) -> list[type]:
    return [c for sub in cast(list[type], kind.__subclasses__()) for c in (sub, *_subclasses(sub))]
