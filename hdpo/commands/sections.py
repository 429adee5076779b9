"""``fit --help``: the sections with the names of their keys; ``fit --help SECTION``: what each of them means."""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from hdpo.errors import did_you_mean


class SectionHelp(argparse._HelpAction):
    """Prints all sections, or the keys of one (``model``, ``model.policy``, ``data.selection``), and ends."""

    def __init__(self, option_strings: Sequence[str], **kwargs: Any) -> None:
        argparse.Action.__init__(
            self, option_strings, **{**kwargs, "nargs": "?", "dest": "help", "default": argparse.SUPPRESS}
        )

    def __call__(
        self, parser: Any, namespace: Any, values: str | Sequence[Any] | None, option_string: str | None = None
    ) -> None:
        """Print and end."""
        groups = [(group.title, list(_keys(group))) for group in parser._action_groups]
        if not values:
            print("\n".join(_overview(parser.prog.replace(" [options]", ""), groups)))
            parser.exit()
        wanted = str(values).strip("-.")
        formatter = parser._get_formatter()
        found = [(title, [a for a in keys if f"{a.dest}.".startswith(f"{wanted}.")]) for title, keys in groups]
        if not any(keys for _, keys in found):
            names = [action.dest for _, keys in groups for action in keys]
            known = {".".join(name.split(".")[: i + 1]) for name in names for i in range(name.count(".") + 1)}
            parser.error(f"--help: there is no section {wanted!r}{did_you_mean(wanted, sorted(known))}")
        for title, keys in found:
            formatter.start_section(title)
            formatter.add_arguments(keys)
            formatter.end_section()
        print(formatter.format_help(), end="")
        parser.exit()


def _keys(group: Any) -> Iterator[argparse.Action]:
    """What can be set: not the help of a class, not what follows from others, not a section as one file."""
    actions = [a for a in group._group_actions if a.option_strings and "-->" not in str(a.option_strings)]
    parents = {a.dest.rpartition(".")[0] for a in actions if not a.dest.endswith(".help")}
    yield from (a for a in actions if a.dest not in parents and not a.dest.endswith(".help"))


def _overview(command: str, groups: Sequence[tuple[str | None, list[argparse.Action]]]) -> Iterator[str]:
    yield f"usage: {command} --config FILE [--config OVERLAY] [--KEY VALUE] ...\n"
    for title, keys in groups:
        section = ".".join(os.path.commonprefix([a.dest.split(".")[:-1] for a in keys]))  # noqa: RUF071 - of lists
        names = [action.dest.removeprefix(f"{section}.") for action in keys]
        if names:
            yield f"{section}: {title}".removesuffix(":") if section else "of the command:"
            yield textwrap.fill(", ".join(names), 100, initial_indent="  ", subsequent_indent="  ") + "\n"
    yield f"{command} --help SECTION explains the keys of a section (--help model, --help data.selection),"
    yield f"{command} --model.engine.help CLASS those of a class (hdpo.VLLMEngine)."
