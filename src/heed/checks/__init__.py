"""The exercises' checks: named properties in teaching order, a hint for each, and the wrong answers
that each must catch.

    check("04.1", soft_lookup)     # the last line of a cell; stops at the first property that fails

A task holds a reference, its properties and its mutants: the reference with one line gone wrong.
Inputs are float64 with sizes that are distinct primes, and fresh for every random seed.
"""

import importlib
import inspect
import linecache
import pkgutil
import textwrap
import tomllib
import traceback
import zlib
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heed.checks.compare import Wrong, shown
from heed.checks.leaks import leaks as leaks

Function = Callable[..., Any]
Edits = dict[str, str]  # words of the source, and what stands in their place


class NotStarted(Exception):
    """The function is still blank."""


@dataclass(frozen=True)
class Property:
    name: str
    test: Callable[[Function, torch.Generator], None]  # raises Wrong
    hint: str


def prop(name: str, hint: str) -> Callable[[Callable[..., None]], Property]:
    """`@prop(name, hint)` above a function of the reader's function and a generator."""
    return lambda test: Property(name, test, hint)


@dataclass(frozen=True)
class Mutant:
    """The reference with some words replaced, and the property that must notice."""

    name: str
    caught_by: str
    edits: Edits


@dataclass(frozen=True)
class Bug:
    """A mistake that a reader's test must reject; `source` says where it was made."""

    name: str
    source: str
    hint: str
    edits: Edits


@dataclass(frozen=True)
class Task:
    id: str
    reference: Function  # its name is the name of the reader's function
    properties: tuple[Property, ...]
    mutants: tuple[Mutant, ...]
    bugs: tuple[Bug, ...] = ()  # of a task whose answer is a test,
    right: Function | None = None  # with the implementation that they are bugs of

    @property
    def name(self) -> str:
        return self.reference.__name__

    def broken(self, mutant: Mutant) -> Function:
        return edited(self.reference, mutant.edits)


@dataclass(frozen=True, repr=False)
class Result:
    """Shown as its message. `passed` properties of `total` held before the first that did not."""

    task: str
    passed: int
    total: int
    message: str
    failed: str | None = None  # the name of the property, None when all hold or nothing is there

    @property
    def ok(self) -> bool:
        return self.passed == self.total

    def __repr__(self) -> str:
        return self.message


def check(task: str, function: Function, random_seed: int = 0) -> Result:
    """All properties of a task, in order, up to the first that fails."""
    found = find(task)
    if not callable(function):
        raise TypeError(f"check({task!r}, ...) takes a function, got {type(function).__name__}")
    total = len(found.properties)
    for n, one in enumerate(found.properties):
        seed = zlib.crc32(f"{task} {one.name} {random_seed}".encode())
        try:
            one.test(_watched(function, bool(found.bugs)), torch.Generator().manual_seed(seed))
        except (NotStarted, NotImplementedError) as blank:
            return Result(task, 0, total, f"{task} not started yet{blank}")
        except Wrong as wrong:
            problem = str(wrong)
        except Exception as error:
            problem = _where(error, function)
        else:
            continue
        head = f"{task} stopped at property {n + 1} of {total}: {one.name}"
        lines = [head, textwrap.indent(problem, "  "), *textwrap.wrap(f"Hint: {one.hint}", 88)]
        return Result(task, n, total, "\n".join(lines), one.name)
    return Result(task, total, total, f"{task} passed: {total} of {total} properties")


def tasks() -> dict[str, Task]:
    """Every task of the book, by its number."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("ch"))
    chapters = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return {task.id: task for chapter in chapters for task in chapter.TASKS}


def find(task: str) -> Task:
    chapter = "ch" + task.split(".")[0]
    if chapter in {m.name for m in pkgutil.iter_modules(__path__)}:  # load no other chapter
        for one in importlib.import_module(f"{__name__}.{chapter}").TASKS:
            if one.id == task:
                return one
    raise ValueError(f"no task {task!r}; there are {', '.join(tasks())}")


def write_the_test(
    id: str,
    test: Function,
    first: Function,
    second: Function,
    bugs: tuple[Bug, ...],
    mutants: tuple[Mutant, ...],
    use: Callable[[Function], Function] = lambda f: f,
) -> Task:
    """A task whose answer is a test: it accepts two right implementations and rejects every bug.

    `use` makes what a test is given of `first`, with and without a bug: the launch of a kernel.
    """
    accepts = "A right implementation fails your test: is a number in it wrong, or a limit tight?"
    again = (
        "It computes the same in another order, so the last digits differ. Compare with a limit."
    )
    properties = [
        Property("accepts the reference", _accepts(use(first)), accepts),
        Property("accepts a second way to write it", _accepts(second), again),
        *(
            Property(f"rejects: {b.name}", _rejects(use(edited(first, b.edits))), b.hint)
            for b in bugs
        ),
    ]
    return Task(id, test, tuple(properties), mutants, bugs, first)


def mutants(chapter: str) -> dict[str, tuple[Mutant, ...]]:
    """The mutants of every task of a chapter, from the table beside its file."""
    table = tomllib.loads(Path(chapter).with_suffix(".toml").read_text("utf8"))
    return {
        task: tuple(Mutant(name, **entry) for name, entry in found.items())
        for task, found in table.items()
    }


def edited(function: Function, edits: Edits) -> Function:
    """The same function with words of its source replaced; each must stand there exactly once."""
    plain = _plain(function)
    source = textwrap.dedent(inspect.getsource(plain))
    for old, new in edits.items():
        if source.count(old) != 1:
            raise ValueError(f"{old!r} stands {source.count(old)} times in {plain.__name__}")
        source = source.replace(old, new)
    name = f"<mutant {zlib.crc32(source.encode()):08x} of {plain.__name__}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)  # for inspect
    namespace = dict(plain.__globals__)
    exec(compile(source, name, "exec"), namespace)
    return namespace[plain.__name__]


def _plain(function: Function) -> Function:
    """The function that was written, below its decorators; a kernel of Triton keeps it as `fn`."""
    return inspect.unwrap(getattr(function, "fn", function))


def table() -> str:
    """The kill table in Markdown: each wrong answer, and the property that catches it."""
    found = tasks()
    wrong = sum(len(t.mutants) + len(t.bugs) for t in found.values())
    held = sum(len(t.properties) for t in found.values())
    lines = [
        "# Which check catches which mistake",
        "",
        f"{len(found)} tasks, {held} properties, {wrong} wrong answers. A check is only worth as"
        " much as the mistakes it catches, so each was tried on wrong answers: the reference with a"
        " few words replaced. The tests of this book fail unless every one of them is caught, and"
        " by the property named here, so that the hint fits the mistake. Spoilers below.",
    ]
    for task in found.values():
        lines += ["", f"## {task.id} {task.name}", "", ":::{dropdown} The code that is changed"]
        lines += ["```python", *_source(task), "```", ":::", ""]
        if task.bugs:
            lines += ["Bugs that your test must reject, each from a public project:", ""]
            lines += ["| bug | found in | in the code |", "| --- | --- | --- |"]
            lines += [f"| {b.name} | {_link(b.source)} | {_diff(b.edits)} |" for b in task.bugs]
            lines += ["", "Weak tests, and where they fail:", ""]
        lines += ["| wrong answer | caught by | in the code |", "| --- | --- | --- |"]
        lines += [f"| {m.name} | {m.caught_by} | {_diff(m.edits)} |" for m in task.mutants]
    return "\n".join(lines) + "\n"


def _source(task: Task) -> list[str]:
    both = [f for f in (task.right, task.reference) if f is not None]
    return "\n\n".join(inspect.getsource(_plain(f)) for f in both).strip().split("\n")


def _diff(edits: Edits) -> str:
    def code(words: str) -> str:
        short = " ⏎ ".join(line.strip() for line in words.strip().split("\n"))
        return f"`{short}`".replace("|", "\\|") if short else "nothing"

    return "; ".join(f"{code(old)} becomes {code(new)}" for old, new in edits.items())


def _link(source: str) -> str:
    repository, number = source.split("#")
    return f"[{source}](https://github.com/{repository}/issues/{number})"


def _watched(function: Function, is_test: bool) -> Function:
    """Hands over copies, so that nothing done to them in place can mislead the check."""

    def call(*inputs: Any) -> Any:
        got = function(*(x.clone() if isinstance(x, Tensor) else copy(x) for x in inputs))
        if got is ...:
            raise NotStarted
        if got is None and not is_test:
            raise NotStarted(": it returns None. Is a `return` missing?")
        return got

    call.__wrapped__ = function  # type: ignore[attr-defined]
    return call


def _where(error: Exception, function: Function) -> str:
    """Type, line and first line of the message: of the reader's code, nothing of ours."""
    words = (str(error).strip().splitlines() or [""])[0][:200]
    space = getattr(_plain(function), "__globals__", None)
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if space is not None and frame.f_globals is space:
            code = frame.f_code
            text = linecache.getline(code.co_filename, line, frame.f_globals).strip()
            place = f"line {line - code.co_firstlineno + 1} of {code.co_name}" + f": {text}" * bool(
                text
            )
            return f"{type(error).__name__} on {place}\n{words}".rstrip()
    return f"{type(error).__name__}: {words}"


def _accepts(implementation: Function) -> Callable[[Function, torch.Generator], None]:
    def accepts(test: Function, rng: torch.Generator) -> None:
        try:
            verdict = test(implementation)
        except AssertionError as refused:
            words = (str(refused).strip().splitlines() or [""])[0][:200]
            said = f"AssertionError: {words}" if words else "AssertionError"
            raise Wrong(shown("a right implementation", "nothing to complain of", said)) from None
        if verdict is not None and not verdict:
            raise Wrong(shown("a right implementation", "nothing to complain of", repr(verdict)))

    return accepts


def _rejects(implementation: Function) -> Callable[[Function, torch.Generator], None]:
    def rejects(test: Function, rng: torch.Generator) -> None:
        try:
            verdict = test(implementation)
        except NotImplementedError:
            raise
        except Exception:  # a test that stops with any error has failed, as in pytest
            return
        if verdict is None or verdict:
            raise Wrong(shown("this bug", "AssertionError, or False", "your test lets it pass"))

    return rejects
