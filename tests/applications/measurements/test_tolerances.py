"""The table of solves without a tolerance: what its command measures, and that the page holds no wrong cell."""

import json
from pathlib import Path

import pytest
import torch

from applications.measurements.tolerances.__main__ import Cell, _cell, main, table, variations
from bilevel.problems import LassoPath, Ridge, hard

DOCS = Path(__file__).parents[3] / "docs"


def test_the_page_holds_no_cell_that_is_wrong_and_not_told():
    cells = [Cell(**cell) for cell in json.loads((DOCS / "tolerances.json").read_text())]
    assert {cell.precision for cell in cells} == {"float64", "float32"}
    assert len({cell.problem for cell in cells}) >= 20
    assert all(cell.kept for cell in cells)
    for precision in ("float64", "float32"):
        assert table([cell for cell in cells if cell.precision == precision]) in (DOCS / "tolerances.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cells_of_some_problems(dtype):
    precision = str(dtype).removeprefix("torch.")
    for name, problem in (("ridge", Ridge(dtype=dtype)), ("exponential", hard(dtype)["exponential"])):
        cells = [
            _cell(precision, name, variation, truth, scaled) for variation, truth, scaled in variations(name, problem)
        ]
        assert all(cell.kept for cell in cells)
        assert all(1 < cell.evaluations < 60 for cell in cells)


def test_a_wrong_cell_is_called_so():
    assert not Cell("float32", "ridge", "as it is", 0.1, False, 3).kept
    assert not Cell("float32", "ridge", "as it is", float("nan"), False, 3).kept
    assert Cell("float32", "ridge", "as it is", 0.1, True, 3).kept
    assert "**wrong**" in table([Cell("float64", "ridge", "as it is", 1e-3, False, 3)])


def test_lasso_is_solved_in_the_units_of_its_loss():
    name, truth, scaled = next(v for v in variations("lasso path", LassoPath()) if v[0] == "params 1e+06")
    assert _cell("float64", "lasso path", name, truth, scaled).error < 1e-6


def test_bad_input_is_refused():
    with pytest.raises(SystemExit) as caught:
        main(["--precision", "float16"])
    assert caught.value.code == 2
