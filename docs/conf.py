"""Sphinx configuration of the documentation site: `sphinx-build -W --keep-going docs build/site`.

The pages are the Markdown files of this folder, which are also read on GitHub. Pages and notebooks that are outside of
this folder are copied to `docs/repository` while the site is built, and links are changed accordingly. Notebooks are
shown with their stored outputs.
"""

import importlib.metadata
import os
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
OUTSIDE = {  # pages of the repository that the site has too
    REPOSITORY / "README.md": "quick_start",
    REPOSITORY / "benchmarks/README.md": "benchmarks",
    REPOSITORY / "CONTRIBUTING.md": "contributing",
    REPOSITORY / "CHANGELOG.md": "changelog",
    REPOSITORY / "examples/serving/lmms_eval.md": "lmms_eval",
    **{notebook: notebook.stem for notebook in (REPOSITORY / "examples/notebooks").glob("*.ipynb")},
}
COPIES = {page: DOCS / "repository" / f"{name}{page.suffix}" for page, name in OUTSIDE.items()}
FILE_NAME = re.compile(r"\[[\w/]+\.(?:md|ipynb)\](?=\()")  # in [chat.md](chat.md); the site shows the title instead
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the relative path in [text](path#place)

project = "vllama_jax"
author = project_copyright = "The vllama_jax authors"
release = version = importlib.metadata.version("vllama-jax")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

myst_heading_anchors = 4  # as GitHub has them
nb_execution_mode = "off"  # .ci/notebooks.py stores the outputs

smartquotes_action = "D"  # dashes only: shapes in types are strings with straight quotes
default_role = "code"  # `name` in docstrings, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented_params"
napoleon_use_ivar = True  # the fields of a dataclass are described once

highlight_language = "none"  # of blocks that name none: diagrams and output
html_theme = "furo"
html_title = f"vllama_jax {release}"
html_copy_source = False
html_show_sourcelink = False


def move_links(text: str, folder: Path, to: Path) -> str:
    """Change relative links of a page for another folder. Links to a copied page lead to its copy.

    Args:
        text: Markdown, or a notebook.
        folder: The folder that its links are relative to.
        to: The folder that they will be relative to.
    """

    def move(link: re.Match[str]) -> str:
        path, hash_sign, place = link[1].partition("#")
        target = Path(os.path.normpath(folder / path))
        moved = os.path.relpath(COPIES.get(target, target), to)
        return moved + hash_sign + place if target.exists() else link[1]

    return LINK.sub(move, FILE_NAME.sub("[]", text))


def copy_pages(app: Sphinx) -> None:
    """Copy the pages of `OUTSIDE`. A copy that would not change is left, so that Sphinx does not read it again."""
    for page, copy in COPIES.items():
        text = move_links(page.read_text("utf-8"), page.parent, copy.parent)
        copy.parent.mkdir(exist_ok=True)
        if not copy.exists() or copy.read_text("utf-8") != text:
            copy.write_text(text, "utf-8")


def lead_to_copies(app: Sphinx, name: str, source: list[str]) -> None:
    """Change the links of a page of this folder that lead to a copied page."""
    if not name.startswith("repository/"):
        folder = (DOCS / name).parent
        source[0] = move_links(source[0], folder, folder)


def shorten_types(app: Sphinx, doctree: nodes.document) -> None:
    """Write the type of JAX's arrays as users import it, where jaxtyping has the module that defines it."""
    for text in list(doctree.findall(nodes.Text)):
        if "jaxlib._jax.Array" in text:
            text.parent.replace(text, nodes.Text(text.replace("jaxlib._jax.Array", "Array")))


def setup(app: Sphinx) -> None:
    """Connect the functions to Sphinx's events."""
    app.connect("builder-inited", copy_pages)
    app.connect("source-read", lead_to_copies)
    app.connect("doctree-read", shorten_types)
