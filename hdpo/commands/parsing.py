"""Reading a command line: what is wrong in one line, and configuration files by name and side by side."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from hdpo.commands.sections import SectionHelp
from hdpo.commands.suggestions import SuggestingParser
from hdpo.errors import ConfigError, first_line
from hdpo.files import find_config


class OneLineParser(SuggestingParser, LightningArgumentParser):
    """Tells what is wrong in one line, and what there is by sections, where the library prints hundreds of options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "add_help": False})
        self.add_argument("-h", "--help", action=SectionHelp, metavar="SECTION", help="what the keys of a section mean")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2, or raise for a caller that wants to know."""
        message = self.suggesting(message)
        if not self.exit_on_error or os.environ.get("HDPO_TRACEBACK") == "1":
            super().error(message, ex)
        mistake = find_cause(ex, ConfigError)
        print(f"hdpo: error: {mistake or _explained(_one_line(message))}", file=sys.stderr)
        raise SystemExit(2)


def find_cause(error: BaseException | None, kind: type[BaseException]) -> BaseException | None:
    """The first error of a kind among an error and its causes."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def _one_line(message: str) -> str:
    """The library's indented explanation as one line, without the repetitions of the value at its end."""
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(("Given value type:", "Given value:")))


_TRUNCATED_SAMPLING = re.compile(r"\b(top_p|top_k|min_p)\b")


def _explained(message: str) -> str:
    """Say why there is no such key where a user looks for truncated sampling."""
    if found := _TRUNCATED_SAMPLING.search(message):
        return (
            f"{found[1]} is refused: the loss needs the log-probabilities of the distribution that was sampled, so "
            f"completions come from the full one ({message})"
        )
    return message


def _config_arguments(args: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    """Where the files of ``--config`` stand: position, what stands before the name in that argument, and the name."""
    for i, argument in enumerate(args):
        key, separator, value = argument.partition("=")
        if key in ("--config", "-c") and separator:
            yield i, f"{key}=", value
        elif key in ("--config", "-c") and i + 1 < len(args):
            yield i + 1, "", args[i + 1]


def with_config_files(args: Sequence[str]) -> list[str]:
    """The arguments with every ``--config`` as the path of a YAML file: shipped configurations go by their names."""
    found = list(args)
    for i, before, name in _config_arguments(args):
        found[i] = before + config_file(name)
    return found


_NAMED = ("val_sources", "test_sources")


def join_evaluation_sets(args: Sequence[str]) -> list[str]:
    """Return command-line arguments in which the named evaluation sets of all ``--config`` files count.

    jsonargparse replaces a dictionary whole, so that of two recipes only the last would be evaluated.

    Args:
        args: the arguments; what comes after the last ``--config`` still overrides it. The files are readable YAML.

    Returns:
        The arguments, with one after the last ``--config`` for each section that several files have. A file in which a
        section is null takes away what those before it say.
    """
    joined: dict[str, list[dict[str, Any]]] = {name: [] for name in _NAMED}
    end = 0
    for i, _, path in _config_arguments(args):
        end = i + 1
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        data: Any = content.get("data") if isinstance(content, dict) else None
        for name in _NAMED if isinstance(data, dict) else ():
            if isinstance(data.get(name), dict):
                joined[name].append(data[name])
            elif name in data:
                joined[name].clear()
    several = {name: parts for name, parts in joined.items() if len(parts) > 1}
    extra = [
        f"--data.{name}={json.dumps({key: value for part in parts for key, value in part.items()})}"
        for name, parts in several.items()
    ]
    return [*args[:end], *extra, *args[end:]]


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's other readers take the last in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key.value, str) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def config_file(name: str) -> str:
    """Return the path of a configuration file, its own or that of one that ships with the package.

    Raises:
        ConfigError: there is none, or it is not YAML with sections; the message names file and line.
    """
    path = find_config(name)
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{place}: not YAML ({error.problem})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML ({first_line(error)})") from error
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path}: a configuration has sections such as model and data; this is {content!r:.40}")
    return path
