"""Who may import whom, which doors third parties use, what a file explains, how long it is."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src/heed"

# A file may import from the floors that stand behind its own.
FLOORS = {
    0: (
        {"masks", "positions", "stretch", "tokenizers", "pieces", "counting", "families"}
        | {"roofline"},
        set(),
    ),
    1: ({"attention", "layers"}, {0}),
    2: ({"flash", "cache"}, {0, 1}),
    3: ({"multihead", "latent", "blocks"}, {0, 1, 2}),
    4: ({"gpt", "models"}, {0, 1, 2, 3}),
    5: (
        {"generation", "speculative", "batching", "serving", "step"}
        | {"training", "checkpoints", "interop", "tasks"},
        {0, 1, 2, 3},
    ),
    6: (
        {"plots", "notebook", "checks"}
        | {"interactive", "stepper", "reading", "drawing", "calculator"},
        {0, 1},
    ),
}
BESIDES = {
    ("interop", "gpt"),
    ("interop", "models"),
    ("flash", "cache"),
    ("speculative", "generation"),
    ("batching", "generation"),
    ("serving", "batching"),
    ("interop", "checkpoints"),
    ("training", "checkpoints"),
    ("counting", "families"),
    ("counting", "pieces"),
    ("families", "pieces"),
    ("blocks", "multihead"),
    ("notebook", "plots"),
    ("stepper", "interactive"),
    ("reading", "interactive"),
    ("drawing", "interactive"),
    ("calculator", "interactive"),
}

EVERYWHERE = {"torch", "jaxtyping", *sys.stdlib_module_names}
DOORS = {
    "matplotlib": {"plots"},
    "numpy": {"plots"},
    "IPython": {"notebook"},
    "safetensors": {"checkpoints"},
    "latex2mathml": {"interactive"},
    "triton": {"flash_programs", "flash_decode_programs", "checks_ch22"},
}

# Tests of something that is not a file of the package.
OTHER_TESTS = {
    "architecture",
    "book",
    "environment",
    "exercises",
    "micro",
    "site",
    "site_ext",
    "tolerance",
}
# Files of the package with a test that is not called after them.
TESTED_ELSEWHERE = {
    r"checks_ch\d\d": "exercises",
    "checks_main": "checks",
    "checks_compare": "checks",
    "flash_decode_programs": "flash_decode",
    "flash_programs": "flash_kernel",
}


def name(path):
    """cache/paged.py is cache_paged, and cache/__init__.py is cache."""
    parts = path.relative_to(SRC).with_suffix("").parts
    return "_".join(part.strip("_") for part in parts if part != "__init__")


FILES = {name(path) or "heed": path for path in sorted(SRC.rglob("*.py"))}
TREES = {stem: ast.parse(path.read_text("utf8")) for stem, path in FILES.items()}


def imports(tree):
    """Dotted names; `from heed import masks` is heed.masks."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import on line {node.lineno}"
            whole = node.module == "heed"
            yield from ([f"heed.{a.name}" for a in node.names] if whole else [node.module])


def place(stem):
    """models_llama lives in models."""
    return stem.split("_")[0]


def floor(stem):
    (found,) = (n for n, (files, _) in FLOORS.items() if place(stem) in files)
    return found


@pytest.mark.parametrize("stem", sorted(FILES.keys() - {"heed"}))
def test_a_file_imports_only_what_stands_below_it(stem):
    for imported in imports(TREES[stem]):
        package, *rest = imported.split(".")
        if package != "heed":
            continue
        other = place(rest[0])
        inside = other == place(stem) and other != "models"
        allowed = floor(other) in FLOORS[floor(stem)][1] or (place(stem), other) in BESIDES
        assert inside or allowed or place(stem) == "checks", f"{stem} imports {imported}"


def test_gpt_imports_nothing_of_ours_and_needs_torch_and_jaxtyping_alone():
    third = {module.split(".")[0] for module in imports(TREES["gpt"])} - sys.stdlib_module_names
    assert third == {"torch", "jaxtyping"}


def test_the_package_itself_imports_nothing():
    assert list(imports(TREES["heed"])) == []


@pytest.mark.parametrize("stem", FILES)
def test_a_third_party_comes_in_by_its_one_door(stem):
    for package in {module.split(".")[0] for module in imports(TREES[stem])} - {"heed"}:
        assert package in EVERYWHERE or stem in DOORS.get(package, ()), f"{stem} imports {package}"


def test_every_file_has_a_test_of_its_name_and_every_test_a_file():
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    beside = {
        path.stem
        for folder in ("tools", "book/_ext", "bench")
        for path in (ROOT / folder).glob("*.py")
    }
    # tasks/grammar.py is tested in test_grammar.py or test_tasks_grammar.py.
    files = {
        stem.split("_")[-1] if stem.split("_")[-1] in tests else stem
        for stem, tree in TREES.items()
        if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
    }
    elsewhere = {
        stem: test
        for stem in files
        for pattern, test in TESTED_ELSEWHERE.items()
        if re.fullmatch(pattern, stem)
    }
    beside |= {f"bench_{stem}" for stem in beside}  # bench/training.py beside training.py
    assert tests - files - beside - OTHER_TESTS == set(), "tests of nothing"
    assert files - tests - elsewhere.keys() == set(), "files without a test"
    assert set(elsewhere.values()) <= tests


def shapes(tree):
    """Every shape string in an annotation, with the names of the arguments beside it."""
    known = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for alias in node.names
    }
    owners = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    for owner in owners:
        arguments = getattr(owner, "args", None)
        names = [a.arg for a in arguments.args + arguments.kwonlyargs] if arguments else []
        for node in ast.walk(owner):
            if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in known:
                yield node.slice.elts[-1].value, names


def unexplained(tree):
    """Shape letters that the docstring of the file does not introduce, as in `T queries`.

    Axes with a star are any axes. Dv needs no word of its own beside an argument v: it is v's D.
    The word for the index b says what B counts, and so for h.
    """
    said = ast.get_docstring(tree) or ""
    for shape, arguments in shapes(tree):
        for axis in shape.split():
            for letter in re.findall(r"[A-Z]\w*", "" if axis.startswith("*") else axis):
                own = letter[0] if letter[1:] in arguments else letter
                words = {letter, own, own.lower() if own in {"B", "H"} else own}
                if not any(re.search(rf"(?<!\w){word} [a-z]", said) for word in words):
                    yield letter


@pytest.mark.parametrize("stem", FILES)
def test_a_file_explains_its_letters(stem):
    assert set(unexplained(TREES[stem])) == set()


def test_the_letter_check_sees_a_letter_without_a_word():
    code = '''"""B batch · T queries.\n\nA sentence about D."""
from jaxtyping import Float
def f(q: Float[X, "B T D"], v: Float[X, "B S Dv"], *, x: Float[X, " Br"]) -> Float[X, "*N T+1"]:
    pass
class A:
    x: Float[X, "H 3"]
'''
    assert sorted(unexplained(ast.parse(code))) == ["Br", "D", "Dv", "H", "S"]


@pytest.mark.parametrize("stem", [stem for stem in FILES if not re.match(r"checks_ch\d\d", stem)])
def test_a_file_has_at_most_300_lines(stem):
    assert len(FILES[stem].read_text("utf8").splitlines()) <= 300


# Paths of the machine it was written on, and words that tell a reader he is slow.
FORBIDDEN = re.compile(r"(?<![\w.:/-])/(?:work|tmp/w|root)\b|\b(?:simply|obviously)\b", re.I)


def written():
    """Every text of ours that a reader may open."""
    for folder in ("src", "chapters/md", "exercises", "book", "bench", "."):
        every = (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*")
        for path in every:
            if path.suffix in {".py", ".js", ".css", ".md", ".yml", ".toml", ".cff"}:
                if not {"_build", "__pycache__", "node_modules"} & set(path.parts):
                    yield path


def test_no_text_has_a_forbidden_word():
    found = {
        f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
        for path in written()
        for n, line in enumerate(path.read_text("utf8").splitlines(), 1)
        if FORBIDDEN.search(line)
    }
    assert found == set()


@pytest.mark.parametrize("line", ["see /work/x", "(/tmp/w/x)", "It is simply", "Obviously,"])
def test_the_word_check_sees(line):
    assert FORBIDDEN.search(line)


@pytest.mark.parametrize(
    "line", ["https://a.org/work/1", ":root { }", "his/work", "/tmp/where", "insimply"]
)
def test_the_word_check_lets_pass(line):
    assert not FORBIDDEN.search(line)
