"""Strings of a configuration reach the program as they were written.

jsonargparse reads the value of a ``str | None`` argument as YAML once more, also where it came out of YAML as a string:
``'####'`` is then an empty document and becomes null. And its dumper writes the string ``1e10`` without the quotes that
its loader needs, so that a run's ``config.yaml`` cannot be read again.
"""

from __future__ import annotations

import re
from typing import Any

import yaml
from jsonargparse import get_loader, set_dumper, set_loader

_NULLS = ("", "~", "null", "Null", "NULL")
_load_yaml = get_loader("yaml")


def keep_strings() -> None:
    """Teach jsonargparse's ``yaml`` mode, in this process, to keep strings; may be called any number of times."""
    set_loader("yaml", _load, exceptions=(yaml.YAMLError,))
    set_dumper("yaml", _dump)


def _load(text: str) -> Any:
    value = _load_yaml(text)
    return text if value is None and text.strip() not in _NULLS else value


class _Dumper(yaml.SafeDumper):
    """Quotes what jsonargparse's loader would take for a number and PyYAML's would not."""


_NUMBER = re.compile(r"[-+]?[\d_.]+(?:[eE][-+]?\d+)?$")
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def _dump(data: Any) -> str:
    return yaml.dump(data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False)
