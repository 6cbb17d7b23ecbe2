"""A mechanism one step at a time: a numbered list that a script turns into a walk.

Without scripts the whole list stands there: nothing is lost in print or in an untrusted notebook.
"""

from collections.abc import Sequence

from heed.interactive import Output, _json, _rich


def stepper(steps: Sequence[tuple[str, str]], *, title: str) -> Output:
    """Each step is a name of a word or two and a sentence or two; $tex$ and `code` are set."""
    if len(steps) < 2:
        raise ValueError(f"a walk has at least two steps, got {len(steps)}")
    for name, text in steps:
        if not name.strip() or not text.strip():
            raise ValueError(f"every step has a name and a text, got {name!r} and {text!r}")
    names = [name for name, _ in steps]
    if len(set(names)) < len(names):
        raise ValueError(f"two steps have one name: {names}")
    items = "".join(f"<li><strong>{_rich(n)}.</strong> {_rich(t)}</li>" for n, t in steps)
    return Output("stepper", title, _json({"names": names}), f"<ol>{items}</ol>")
