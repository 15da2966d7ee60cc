"""The documentation site: every link leads somewhere, public names are described, and pages fit a phone."""

import html.parser
import importlib.util
import inspect
import os
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

import vllama_jax as vl

ROOT = Path(__file__).parents[1]
PHONE = {"width": 360, "height": 740}
pytestmark = pytest.mark.slow


class Page(html.parser.HTMLParser):
    """The links and the ids of an HTML page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found[name] for name in ("href", "src") if found.get(name)]
        self.ids.add(found.get("id"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site: the one that `.ci/run` has built, or a new one."""
    if built := os.environ.get("VLLAMA_SITE"):
        return Path(built)
    if importlib.util.find_spec("sphinx") is None:
        pytest.skip("needs the extra docs: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--quiet", str(ROOT / "docs"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def test_every_page_of_the_folder_is_on_the_site(site):
    docs = ROOT / "docs"
    pages = [*docs.glob("*.md"), *docs.glob("studies/*.md")]
    names = {path.relative_to(docs).with_suffix("").as_posix() for path in pages}
    assert {name for name in names if not (site / f"{name}.html").exists()} == set()
    index = (site / "index.html").read_text("utf-8")
    assert {name for name in names if f'href="{name}.html"' not in index} == {"index"}, "no link in the navigation"


def test_notebooks_are_shown_with_their_outputs(site):
    notebooks = sorted((ROOT / "examples/notebooks").glob("*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        page = (site / "repository" / f"{notebook.stem}.html").read_text("utf-8")
        assert page.count('class="cell_output') > 5, notebook.name


def test_links_within_the_site_lead_somewhere(pages):
    checked, broken = 0, []
    for path, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            place = urllib.parse.unquote(parts.fragment)
            known = pages[target].ids if target in pages else {place}
            checked += 1
            if not target.exists() or (place and place not in known):
                broken.append(f"{path.name}: {link}")
    print(f"{len(pages)} pages, {checked} links, {len(broken)} broken")
    assert broken == []
    assert checked > 1000


def test_public_names_are_described(pages):
    ids = set().union(*(page.ids for page in pages.values()))
    described = {name.rsplit(".", 1)[-1] for name in ids if name and name.startswith("vllama_jax.")}
    public = {name for name in vl.__all__ if name != "__version__" and not inspect.ismodule(getattr(vl, name))}
    assert public - described == set()


def test_pages_fit_a_phone_and_have_a_dark_mode(site, pages, browser):
    backgrounds, wide = {}, []
    for scheme in ("light", "dark"):
        tab = browser.new_page(viewport=PHONE, color_scheme=scheme)
        for path in pages:
            tab.goto(path.as_uri())
            if tab.evaluate("document.documentElement.scrollWidth") > PHONE["width"]:
                wide.append(str(path.relative_to(site)))
        backgrounds[scheme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.close()
    assert wide == [], "wider than the screen"
    brightness = {scheme: sum(map(int, color[4:-1].split(","))) for scheme, color in backgrounds.items()}
    assert brightness["dark"] < 150 < 600 < brightness["light"]
