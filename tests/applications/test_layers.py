"""The frame knows no story, a story no other, and the measurements stand on both; nothing goes round in circles."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAME, MEASUREMENTS = "frame", "measurements"
PARTS = sorted(path.name for path in (ROOT / "applications").iterdir() if (path / "__init__.py").exists())
STORIES = [part for part in PARTS if part not in (FRAME, MEASUREMENTS)]


def module(path: Path) -> str:
    """Its dotted name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """What a file imports from `applications`, anywhere in it: dotted names of modules and of what stands in them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name == "applications" or name.startswith("applications.")}


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if "." in name}


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def test_the_parts_are_those_that_the_docs_list():
    page = (ROOT / "docs" / "applications.md").read_text()
    assert len(STORIES) == 11
    assert all(f"| [{story}](" in page for story in STORIES)


@pytest.mark.parametrize("part", PARTS)
def test_nothing_imports_upwards_and_no_story_another(part):
    allowed = {FRAME: {FRAME}, MEASUREMENTS: set(PARTS)}.get(part, {FRAME, part})
    for path in files(ROOT / "applications" / part):
        assert parts_imported(path) <= allowed, path


@pytest.mark.parametrize("part", PARTS)
def test_there_is_no_circle(part):
    paths = {module(path): path for path in files(ROOT / "applications" / part)}
    graph = {name: imported(path) & set(paths) - {name} for name, path in paths.items()}
    for name, path in paths.items():
        if path.name == "__init__.py":  # it gathers its own modules; what they import of it is what they name
            graph[name] = {other for other in graph[name] if not other.startswith(f"{name}.")}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"{' -> '.join(error.args[1])}")


@pytest.mark.parametrize("folder", ["bilevel", "tests"])
def test_the_library_and_its_tests_know_no_application(folder):
    for path in files(ROOT / folder):
        if ROOT / "tests" / "applications" not in path.parents:
            assert not imported(path), path
