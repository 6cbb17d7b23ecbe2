"""book/_ext: what an address switches on, and what the gathering directives read."""

import json
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "book/_ext"))
import address  # noqa: E402
import frontmatter  # noqa: E402
import gather  # noqa: E402
import lighten  # noqa: E402

FAKE = "https://github.com/Somebody/heed"


def test_without_an_address_no_button_and_no_base_url():
    assert address.theme_options("") == {}
    assert address.base_url("") == ""


def test_with_an_address_every_button_has_a_place_to_lead_to():
    options = address.theme_options(FAKE)
    assert options["repository_url"] == FAKE
    assert options["launch_buttons"]["colab_url"] and options["launch_buttons"]["binderhub_url"]
    assert all(options[f"use_{what}_button"] for what in ("repository", "issues", "edit_page"))
    assert address.base_url(FAKE) == "https://somebody.github.io/heed/"


@pytest.mark.parametrize("here, issues", [("", ""), (FAKE, FAKE + "/issues")])
def test_the_configuration_keeps_what_the_theme_was_told_before(monkeypatch, here, issues):
    monkeypatch.setattr(address, "address", lambda: here)
    config = types.SimpleNamespace(html_theme_options={"a": 1}, html_context={"b": 2})
    address.configure(None, config)
    assert config.html_theme_options["a"] == 1 and config.html_context["b"] == 2
    assert config.html_context["issues"] == issues
    assert ("repository_url" in config.html_theme_options) == bool(here)


def chapter(tmp_path, cells=(), name="05_scale.ipynb", **meta):
    prose = {"cell_type": "markdown", "source": ["# Scale\n", "Words here."]}
    path = tmp_path / name
    path.write_text(json.dumps({"metadata": {"chapter": meta}, "cells": [prose, *cells]}), "utf8")
    return frontmatter.read(path)


def test_a_chapter_takes_its_number_from_its_file_and_its_name_from_its_heading(tmp_path):
    made = chapter(tmp_path, question="Why?", xp=60, needs=["04_lookup"])
    assert (made.number, made.name, made.doc) == ("05", "05 · Scale", "chapters/05_scale")
    assert (made.question, made.xp, made.needs, made.minutes) == ("Why?", 60, ["04_lookup"], 1)


def test_an_unknown_key_in_the_front_matter_is_an_error(tmp_path):
    with pytest.raises(TypeError, match="dificulty"):
        chapter(tmp_path, dificulty="core")


def test_equations_are_numbered_by_chapter_and_exercises_apart():
    numbers = {
        "chapters/05_scale": {"displaymath": {"a": (7,), "b": (8,)}, "figure": {"c": (3,)}},
        "chapters/00_start": {"displaymath": {"d": (1,)}},
        "exercises/solutions/05_scale": {"displaymath": {"e": (9,)}},
        "book/notation": {"figure": {"f": (4,)}},
    }
    frontmatter.number_by_chapter(None, types.SimpleNamespace(toc_fignumbers=numbers))
    assert numbers == {
        "chapters/05_scale": {
            "displaymath": {"a": ("5", 1), "b": ("5", 2)},
            "figure": {"c": ("5", 1)},
        },
        "chapters/00_start": {"displaymath": {"d": ("0", 1)}},
        "exercises/solutions/05_scale": {"displaymath": {"e": ("E5", 1)}},
        "book/notation": {"figure": {"f": (4,)}},
    }


def test_a_witness_is_the_printed_line_that_names_its_equation(tmp_path):
    cell = {
        "cell_type": "code",
        "source": ['witness("eq-a", 1, 1)\n', "witness('eq-a-b', 2, 2)\n", "print('eq-c')"],
        "outputs": [
            {"output_type": "stream", "text": ["eq-a holds\n", "eq-a-b holds\n", "eq-c\n"]}
        ],
    }
    silent = {"cell_type": "code", "source": 'witness("eq-d", 1, 1)', "outputs": []}
    made = chapter(tmp_path, [cell, silent])
    assert gather.witnesses(made) == {"eq-a": ["eq-a holds"], "eq-a-b": ["eq-a-b holds"]}


def stub(stem, *needs):
    return frontmatter.Chapter(f"chapters/{stem}", stem[:2], stem, (), needs=needs)


def test_the_map_puts_a_chapter_after_all_that_it_needs():
    a, b, c, d = stub("a"), stub("b", "a"), stub("c", "a", "unwritten"), stub("d", "a", "c")
    assert gather.columns([a, b, c, d]) == [[a], [b, c], [d]]


def test_chapters_that_need_each_other_are_refused():
    with pytest.raises(ValueError, match="a -> b"):
        gather.columns([stub("a", "b"), stub("b", "a")])


def test_the_style_sheet_loses_the_rules_that_no_page_uses():
    css = ".used{a:b} .unused{a:b} .used .unused, p{c:d} @media print{.unused{e:f}}"
    assert lighten.purge(css, {"used"}) == ".used{a:b}\np{c:d}"
