"""The site builds without a warning, fetches nothing and shows every public name; the checks can fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import griffe
import pytest
from mkdocstrings import Inventory

import nab

ROOT = Path(nab.__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def built(config, out):
    """The build's exit status and what it said (with ``--quiet`` it would not count warnings)."""
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", config, "--site-dir", out]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    return result.returncode, result.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    status, said = built(ROOT / "mkdocs.yml", out)
    assert status == 0, said
    assert "WARNING" not in said
    return out


def test_what_is_wrong_with_a_page_fails_the_build(tmp_path):
    wrong = {
        "[a](nowhere.md)": "'nowhere.md'",
        "[b](other.md#nothing)": "'other.md#nothing'",
        "[c](/other.md)": "'/other.md'",
        "[d](folder/)": "'folder/'",
    }
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n\n" + "\n\n".join(wrong))
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nplugins: []\nnav: [index.md]\n")
    status, said = built(config, tmp_path / "out")
    assert status == 1
    assert all(each in said for each in (*wrong.values(), "- other.md"))


# --- nothing is fetched ---


def fetched(html):
    """Addresses of other machines that a browser would ask when it shows a page."""
    return re.findall(
        r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=[\"']?((?:https?:)?//[^\"'> ]+)", html
    )


def test_no_page_fetches_anything(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # the page for what is not found, too
    for page in pages:
        html = page.read_text()
        assert fetched(html) == []
        assert 'class="mermaid"' not in html  # drawn by a script that would be fetched


def test_that_check_can_fail():
    assert fetched('<link rel="x" href="https://a.b/c.css"><a href="https://d.e">') == ["https://a.b/c.css"]


def test_examples_in_docstrings_are_shown_as_code(site):
    html = (site / "reference" / "learners.html").read_text()
    assert '<span class="gp">&gt;&gt;&gt; </span>' in html
    assert "<blockquote>" not in html


# --- public names ---


@pytest.fixture(scope="module")
def package():
    return griffe.load("nab", search_paths=[ROOT])


def public(module, package):
    """What a module offers: what its ``__all__`` names, or what it defines without an underscore."""
    if module.exports is None:
        return [
            each for each in module.members.values() if each.is_public and not each.is_alias | each.is_module
        ]
    found = []
    for name in module.exports:
        path = module.imports.get(str(name), f"{module.path}.{name}")
        each = package[path.removeprefix(f"{package.path}.")]
        found.append(each.final_target if each.is_alias else each)
    return found


def lacking(objects, shown):
    """Complaints about objects without docstring, or that no page shows."""
    bare = [f"{each.path} has no docstring" for each in objects if not each.has_docstring]
    return bare + [f"{each.path} is on no page" for each in objects if each.path not in shown]


def modules(package):
    """Those that the reference is of, and all that have an ``__all__``."""
    found = [package]
    for each in found:
        found += [member for member in each.members.values() if not member.is_alias and member.is_module]
    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    named = re.findall(r"(?m)^::: (\S+)$", pages)
    assert set(named) <= {each.path for each in found}
    return [each for each in found if each.path in named or each.exports is not None]


def test_every_public_name_is_documented_and_shown(site, package):
    with (site / "objects.inv").open("rb") as file:
        shown = set(Inventory.parse_sphinx(file))
    found = modules(package)
    assert {"nab", "nab.learners", "nab.learners.bandits", "nab.sim", "nab.losses"} <= {
        each.path for each in found
    }
    assert lacking([each for module in found for each in public(module, package)], shown) == []


def test_a_name_that_is_not_is_named(package):
    source = (
        '"""A module."""\n\ndef bare(): ...\n\ndef good():\n    """Do it."""\n\ndef _own(): ...\n\nsize = 3\n'
    )
    with griffe.temporary_visited_module(source) as module:
        assert lacking(public(module, package), {"module.bare", "module.good"}) == [
            "module.bare has no docstring",
            "module.size has no docstring",
            "module.size is on no page",
        ]
    listed = {each.path for each in public(package, package)}
    assert {"nab.decode.decode", "nab.learners.hedge.Hedge", "nab.losses"} <= listed
    assert lacking(public(package, package), listed - {"nab.decode.decode"}) == [
        "nab.decode.decode is on no page"
    ]


# --- on GitHub, and pages outside the site ---


def anchors(text):
    """The addresses of headings on GitHub."""
    headings = re.findall(r"(?m)^#+ +(.*)$", re.sub(r"(?ms)^```.*?^```$", "", text))
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def test_headings_have_one_address_here_and_on_github(site):
    docs = ROOT / "docs"
    for page in docs.rglob("*.md"):
        html = site / page.relative_to(docs).with_suffix(".html")
        html = html.with_name("index.html") if page.name == "README.md" else html
        assert anchors(page.read_text()) <= set(re.findall(r'<h\d id="([^"]*)"', html.read_text()))


def broken(text, folder):
    """Links to files, or headings of files, that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = folder / path if path else None
        there = (
            text
            if target is None
            else target.read_text()
            if target.suffix == ".md" and target.exists()
            else ""
        )
        if (target and not target.exists()) or (anchor and anchor not in anchors(there)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_outside_the_site_lead_somewhere(page):
    assert broken(page.read_text(), ROOT) == []


def test_a_broken_link_is_found():
    text = "# A b\n\n[1](README.md) [2](#a-b) [3](#c) [4](nowhere.md) [5](docs/theory.md#nothing) [6](https://a.b)"
    assert broken(text, ROOT) == ["#c", "nowhere.md", "docs/theory.md#nothing"]


def test_the_picture_of_a_round_can_be_drawn_again(tmp_path):
    path = tmp_path / "new" / "dataflow.png"
    command = [sys.executable, ROOT / "scripts" / "dataflow.py", path]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"MPLCONFIGDIR": str(tmp_path)})
    assert path.read_bytes().startswith(b"\x89PNG")
