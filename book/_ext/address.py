"""One setting says where the book is published: `[tool.heed] address` in pyproject.toml.

With an address the site gets its launch, repository and feedback links; without one it has none,
so that nothing on it is dead.
"""

import tomllib
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[2]


def address() -> str:
    """https://github.com/owner/name, or "" while the book is not published."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
    return settings["tool"]["heed"]["address"].rstrip("/").removesuffix(".git")


def theme_options(address: str) -> dict:
    """What the theme is told: which buttons a page has, and where they lead."""
    if not address:
        return {}
    return {
        "repository_url": address,
        "repository_branch": "main",
        "path_to_docs": "",
        "use_repository_button": True,
        "use_issues_button": True,
        "use_edit_page_button": True,
        "launch_buttons": {
            "notebook_interface": "jupyterlab",
            "colab_url": "https://colab.research.google.com",
            "binderhub_url": "https://mybinder.org",
        },
    }


def base_url(address: str) -> str:
    """Where GitHub serves the pages of a repository: https://owner.github.io/name/."""
    if not address:
        return ""
    owner, name = urlsplit(address).path.strip("/").split("/")
    return f"https://{owner.lower()}.github.io/{name}/"


def configure(app, config):
    here = address()
    config.html_theme_options = {**config.html_theme_options, **theme_options(here)}
    config.html_baseurl = base_url(here)
    config.html_context = {**config.html_context, "issues": f"{here}/issues" if here else ""}


def setup(app):
    app.connect("config-inited", configure, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
