"""The site: its reference has every public name, each with an example that runs; it builds strictly, its links hold."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import bilevel as bl

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def public_names() -> set[str]:
    """``CG``, ``stochastic``, ``stochastic.SOBA``: what a user may write after ``bl.``."""
    modules = {name for name in bl.__all__ if isinstance(getattr(bl, name), ModuleType)}
    own = {f"{name}.{part}" for name in modules for part in getattr(getattr(bl, name), "__all__", ())}
    return {*bl.__all__, *own}


def snippets() -> list[tuple[str, str]]:
    """Names and code of each part of the files of examples, with the imports on top of its file."""
    found = []
    for path in sorted((DOCS / "reference" / "examples").glob("*.py")):
        head, *parts = re.split(r"((?:^# %% .+:\n)+)", path.read_text(), flags=re.MULTILINE)
        for marks, code in zip(parts[::2], parts[1::2], strict=True):
            found.append((" ".join(re.findall("%% (.+):", marks)), head + code))
    return found


def test_the_reference_has_every_public_name_once():
    listed = re.findall(r"^   (\w[\w.]*)$", (DOCS / "reference" / "index.md").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert public_names() <= set(listed)
    for name in listed:
        part = bl
        for attribute in name.split("."):
            part = getattr(part, attribute)  # what is listed exists


def test_every_public_name_has_an_example():
    shown = {name for names, _ in snippets() for name in names.split()}
    assert public_names() - shown == set()


@pytest.mark.parametrize(("names", "code"), snippets(), ids=lambda value: value[:40] if " = " not in value else "")
def test_an_example_runs(names, code):
    exec(compile(code, names, "exec", dont_inherit=True), {"__name__": "example"})


class Links(HTMLParser):
    """What a page links to, and the anchors that it has."""

    def __init__(self, page: Path):
        super().__init__()
        self.targets, self.anchors = set(), {""}
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.anchors |= {values[key] for key in ("id", "name") if values.get(key)}
        self.targets |= {values[key] for key in ("href", "src") if values.get(key)}


@pytest.mark.slow
def test_the_site_builds_strictly_and_its_links_hold(tmp_path):
    pytest.importorskip("sphinx", reason="the extra docs is not installed, or this Python is older than 3.11")
    command = next(
        line.split() for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if "python -m sphinx" in line
    )
    done = subprocess.run(
        [sys.executable, *command[1:-1], str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    made = (page.resolve() for page in (tmp_path / "site").rglob("*.html") if "_static" not in page.parts)
    pages = {page: Links(page) for page in made}
    assert len(pages) > len(public_names())
    broken = []
    for page, links in pages.items():
        for target in links.targets:
            if re.match(r"[a-z]+:|//", target):
                continue
            path, _, anchor = unquote(target).partition("#")
            there = (page.parent / path.partition("?")[0]).resolve() if path else page
            if not there.exists() or (there in pages and anchor not in pages[there].anchors):
                broken.append(f"{page.relative_to(tmp_path.resolve())}: {target}")
    assert broken == []
    for name in ("ridge", "optuna_study"):
        assert list((tmp_path / "site" / "_images").glob(f"sphx_glr_{name}_*.png")), name
        assert list((tmp_path / "site" / "_downloads").rglob(f"{name}.ipynb")), name
    assert "Example" in (tmp_path / "site" / "reference" / "generated" / "bilevel.CG.html").read_text()
