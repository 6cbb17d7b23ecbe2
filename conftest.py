"""nbval compares text exactly; here numbers may differ in their last digits between machines.

Words and integers must be the same; other numbers may differ by one part in a thousand.
"""

import importlib.util
import math
import re

NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?|[-+]?\b(?:inf|nan)\b")
RTOL, ATOL = 1e-3, 1e-4


class Text(str):
    """Equal when the words are equal and the numbers are close."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        if str.__eq__(self, other):
            return True
        if not isinstance(other, str) or _words(self) != _words(other):
            return False
        pairs = zip(NUMBER.findall(self), NUMBER.findall(other), strict=True)
        return all(_close(x, y) for x, y in pairs)

    def __ne__(self, other):
        return not self == other


def _words(text: str) -> list[str]:
    return NUMBER.sub("#", text).split()


def _close(x: str, y: str) -> bool:
    if x == y:
        return True
    if re.fullmatch(r"[-+]?\d+", x) or re.fullmatch(r"[-+]?\d+", y):
        return False
    return math.isclose(float(x), float(y), rel_tol=RTOL, abs_tol=ATOL)


if importlib.util.find_spec("nbval"):  # a rented GPU runs tests, and no notebooks
    from nbval.plugin import IPyNbCell

    _sanitize = IPyNbCell.sanitize

    def sanitize(self, text):
        text = _sanitize(self, text)
        return Text(text) if isinstance(text, str) else text

    IPyNbCell.sanitize = sanitize
