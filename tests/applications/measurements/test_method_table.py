"""The table of methods: measured again, within what each method states, and with the rows that the docs show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from applications.measurements.method_table import __main__ as method_table
from bilevel.diagnostics import all_methods
from bilevel.problems import collection

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.slow
def test_the_table_is_what_the_docs_show(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "applications.measurements.method_table",
            "--out",
            str(tmp_path),
            "--precision",
            "float32",
        ],
        cwd=DOCS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    measured = json.loads((tmp_path / "method_table.json").read_text())
    shown = [cell for cell in json.loads((DOCS / "method_table.json").read_text()) if cell["precision"] == "float32"]
    assert [(c["method"], c["problem"]) for c in measured] == [(c["method"], c["problem"]) for c in shown]


def test_every_method_and_problem_has_its_place_in_the_docs():
    page = (DOCS / "method_table.md").read_text()
    for method in all_methods():
        assert f"| {method.name} |" in page
    for name in collection():
        assert f" {name} |" in page


def test_a_broken_promise_is_shown():
    kept = method_table.Cell("float64", "a", "b", 1e-9, 1e-6, False)
    broken = method_table.Cell("float64", "a", "c", 1e-3, 1e-6, False)
    told = method_table.Cell("float64", "a", "d", 1e-3, 1e-6, True)
    assert kept.kept
    assert told.kept
    assert not broken.kept
    assert "| a | 1e-06 | 1e-09 | 1e-03 **above** | 1e-03 (told) |" in method_table.page([kept, broken, told])


def test_bad_output_folder(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "applications.measurements.method_table",
            "--out",
            str(tmp_path / "file" / "x"),
            "--precision",
            "no",
        ],
        cwd=DOCS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
