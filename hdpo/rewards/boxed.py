r"""The project's one reader of ``\boxed{}``, for completions, reference solutions and the laboratory's scores."""

from __future__ import annotations

import re

# Escaped braces are LaTeX text (sets), not grouping. Any number of backslashes may stand before `boxed`: a line break
# (`\\`) directly before it, or a model that escapes twice.
_TOKEN = re.compile(r"(?P<box>\\+boxed\s*\{)|\\[\\{}]|(?P<open>\{)|(?P<close>\})")


def boxes(text: str) -> list[str]:
    r"""Return the contents of all complete ``\boxed{...}``, without surrounding white space, in their order.

    Of nested boxes only the outermost counts. A box that was never closed, as in a truncated completion, is no box and
    hides none inside it. Runs in linear time, whatever the text.

    Example:
        >>> boxes(r"First \boxed{1}, then \boxed{\frac{1}{2}}, then \boxed{3")
        ['1', '\\frac{1}{2}']
    """
    begin = text.find("\\boxed")
    if begin < 0:
        return []
    found: list[tuple[int, int]] = []
    # For each open brace: where the content of its box begins, or -1 for a brace that only groups.
    opened: list[int] = []
    for match in _TOKEN.finditer(text, begin):
        kind = match.lastgroup
        if kind == "box":
            opened.append(match.end())
        elif kind == "open":
            opened.append(-1)
        elif kind == "close" and opened and (start := opened.pop()) >= 0:
            while found and found[-1][0] > start:
                found.pop()
            found.append((start, match.start()))
    return [text[start:end].strip() for start, end in found]


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete ``\boxed{...}``, or None where there is none; see :func:`boxes`.

    Example:
        >>> last_boxed(r"so \boxed{\left\{1, 2\right\}}")
        '\\left\\{1, 2\\right\\}'
        >>> last_boxed(r"it is 5") is None
        True
    """
    found = boxes(text)
    return found[-1] if found else None
