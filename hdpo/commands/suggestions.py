"""Parsers whose word on a key that there is not names the nearest one that there is."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentError, ArgumentParser

from hdpo.errors import ConfigError, did_you_mean, first_line

_UNKNOWN = re.compile(r"(?:unrecognized arguments: -*|\b[Oo]ption ')([\w.]+)")


class SuggestingParser(argparse.ArgumentParser):
    """Takes no abbreviations, which would hide a mistyped key, and suggests the nearest one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, *args: Any) -> NoReturn:
        """As the parser does, with the suggestion."""
        super().error(self.suggesting(message), *args)

    def suggesting(self, message: str) -> str:
        """Return a message, with the key that was meant where it is about one that there is not.

        A class's own arguments have a parser of their own, which has answered first; its word is then in the message.
        """
        if "did you mean" in message or not (found := _UNKNOWN.search(message)):
            return message
        key, init_args, rest = found[1].partition(".init_args")
        return message + did_you_mean(key, _keys(self), init_args + rest)


def _keys(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield action.dest
        for sub in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            yield from _keys(sub)


class CommandParser(SuggestingParser, ArgumentParser):
    """Options of a command about runs."""

    def __init__(self, command: str, **kwargs: Any) -> None:
        super().__init__(prog=f"python -m hdpo {command}", exit_on_error=False, **kwargs)
        self._command = command

    def options(self, args: Sequence[str]) -> Any:
        """Read a command line.

        Raises:
            ConfigError: a mistake of the user's.
        """
        try:
            return self.parse_args(list(args))
        except ArgumentError as error:
            raise ConfigError(f"{self._command}: {first_line(error)}; see {self._command} --help") from None
