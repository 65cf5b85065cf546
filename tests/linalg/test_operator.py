from __future__ import annotations

import pytest
import torch

from bilevel.linalg.operator import Damped, Dense
from tests.conformance import check_operator, spd


@pytest.mark.parametrize("batch", [(), (3,)])
def test_dense_conforms(batch):
    matrix = spd(6, batch=batch)
    check_operator(Dense(matrix), matrix)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_damped_conforms(batch):
    matrix = spd(6, batch=batch)
    check_operator(Damped(Dense(matrix), 0.5), matrix + 0.5 * torch.eye(6, dtype=torch.float64))


def test_dense_refuses_rectangles():
    with pytest.raises(ValueError, match="square matrices"):
        Dense(torch.ones(3, 2))
