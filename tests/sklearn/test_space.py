"""Bounds of the search, and what is taken for none."""

from __future__ import annotations

import numpy as np
import pytest

from bilevel.sklearn.space import Coordinate, make_space

KNOWN = {"alpha": (None, True), "alphas": (3, True)}


@pytest.mark.parametrize("bounds", ["13", ("1", "2"), (None, 1), (1 + 0j, 2), ([1], [2]), 3, (1, 2, 3), {"low": 1}])
def test_bounds_are_two_numbers(bounds):
    with pytest.raises(ValueError, match="two numbers"):
        make_space({"alpha": bounds}, KNOWN, "")


@pytest.mark.parametrize("bounds", [[1, 2], np.array([1, 2]), {1, 2}, range(1, 3)])
def test_what_may_be_a_grid_is_told(bounds):
    with pytest.warns(UserWarning, match="not a grid"):
        assert make_space({"alpha": bounds}, KNOWN, "").coordinates[0].high == 2


def test_a_name_is_a_word():
    with pytest.raises(ValueError, match="param_space has 1, which cannot be searched"):
        make_space({1: (1, 2)}, KNOWN, "")


def test_where_a_search_starts():
    number, vector = Coordinate("alpha", None, 0.1, 10.0, True), Coordinate("alphas", 3, 0.1, 10.0, True)
    assert np.exp(number.inward(np.full((2, 1, 1), 4.0))) == pytest.approx([4])
    assert np.exp(number.inward(np.array([1.0, 3.0]))) == pytest.approx([2])  # Ridge has one for each target
    assert np.exp(vector.inward(100.0)) == pytest.approx([10, 10, 10])
    assert np.exp(vector.inward([1.0, 2.0, 3.0])) == pytest.approx([1, 2, 3])
