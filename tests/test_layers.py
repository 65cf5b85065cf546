"""The modules of `bilevel` import only from layers to the left of their own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bilevel

ROOT = Path(bilevel.__file__).parent
LAYERS = [
    *(
        "extras",
        "_torch",
        "files",
        "notices",
        "tree",
        "recording",
        "reach",
        "ranks",
        "solution",
        "checks",
        "context",
        "spared",
        "modules",
    ),
    *("nn", "closure", "prox", "problem", "tasks", "linalg", "inner"),
    *(
        "hypergrad",
        "has_aux",
        "argmin",
        "least_squares",
        "constrained",
        "influence",
        "adaptive",
        "compat",
        "qp",
        "problems",
        "stochastic",
        "diagnostics",
        "distributed",
    ),
    *("tuning", "sklearn", "extending", "testing"),
    *("doctor", "__init__"),
]


def imported(path: Path) -> set[str]:
    """Top-level parts of `bilevel` that a file imports."""
    package = path.relative_to(ROOT).parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split("."))
            found.add(target[0] or node.names[0].name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bilevel"):
            found.add(node.module.split(".")[1] if "." in node.module else "__init__")
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_leftwards(path):
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imported(path):
        assert LAYERS.index(other) <= LAYERS.index(own), f"{own} imports {other}"


def test_applications_use_public_names_only():
    applications = ROOT.parent / "applications"
    for path in applications.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bilevel."):
                public = getattr(bilevel, node.module.removeprefix("bilevel."), None)
                assert public, f"{path} imports from {node.module}"
                assert {name.name for name in node.names} <= set(public.__all__), f"{path} imports from {node.module}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bl":
                assert node.attr in bilevel.__all__, f"{path} uses bl.{node.attr}"


def test_every_public_name_has_a_docstring():
    for name in bilevel.__all__:
        assert (getattr(bilevel, name).__doc__ or "").strip(), name
