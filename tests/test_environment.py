"""environment.yml, the lock, pyproject.toml and what is installed say the same."""

import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text("utf8"))["dependencies"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]
ASKED = re.findall(r"^[\w-].*", (ROOT / "requirements.in").read_text("utf8"), re.M)
LINES = (ROOT / "requirements.lock").read_text("utf8").split()


def key(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


LOCK = {key(r.name): str(r.specifier).removeprefix("==") for r in map(Requirement, LINES)}


def test_conda_brings_python_and_pip_and_the_lock_brings_the_rest():
    (python,) = [d for d in CONDA if isinstance(d, str) and d.startswith("python=")]
    (pip,) = [d["pip"] for d in CONDA if isinstance(d, dict)]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.split("=")[1] + ".0")
    assert pip == ["-r requirements.lock", "-e ."]
    assert len(CONDA) == 3


def test_the_lock_names_one_public_version_of_each_package():
    pin = r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*"
    linux = r';platform_system=="Linux"'
    assert all(re.fullmatch(rf"{pin}({linux})?", line) for line in LINES)
    assert len(LOCK) == len(LINES)


def test_the_lock_covers_what_is_asked_for():
    for line in [*PROJECT["dependencies"], *ASKED]:
        asked = Requirement(line)
        assert key(asked.name) in LOCK, f"{asked} is not in requirements.lock"
        assert asked.specifier.contains(LOCK[key(asked.name)]), asked


def test_the_lock_is_what_is_installed():
    here = {key(r.name) for r in map(Requirement, LINES) if not r.marker or r.marker.evaluate()}
    assert {name: Version(version(name)).public for name in here} == {n: LOCK[n] for n in here}


def test_the_npm_lock_names_no_registry_and_covers_what_is_asked_for():
    asked = json.loads((ROOT / "package.json").read_text("utf8"))
    lock = json.loads((ROOT / "package-lock.json").read_text("utf8"))["packages"]
    for name, wanted in {**asked["dependencies"], **asked["devDependencies"]}.items():
        assert lock[f"node_modules/{name}"]["version"] == wanted
    assert not any("resolved" in package for package in lock.values())
