"""The interior point on random families of programs: solved, or proved to have no solution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bilevel import Result, Solution, quadratic_program
from bilevel.inner.interior_point import InteriorPoint, scaled


def solve(*data: Tensor | None) -> Solution:
    return quadratic_program(*data, throw="ignore", hypergrad=None)


class Draw:
    """Random sizes and float64 numbers of one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(40))
def test_feasible_programs_are_solved(seed):
    """Q of any rank and of condition up to 1e8, rows of any length, slacks down to 1e-3: no stall, no false proof."""
    draw = Draw(seed)
    n = draw.size(2, 25)
    me, mi, rank = draw.size(0, n), draw.size(0, 3 * n), draw.size(0, n + 1)
    root = draw.normal(n, rank) * torch.logspace(0, -draw.size(0, 5), rank, dtype=torch.float64)
    eye, inside, A = torch.eye(n, dtype=torch.float64), draw.normal(n), draw.normal(me, n)
    G = torch.cat([draw.normal(mi, n) * 10 ** draw.normal(mi, 1), eye, -eye])
    slack = torch.cat([draw.uniform(mi) * 10 ** draw.normal(mi), 5 * torch.ones(2 * n, dtype=torch.float64)])
    data = root @ root.mT, draw.normal(n), A, A @ inside, G, G @ inside + slack
    found = solve(*data)
    assert found.result is Result.CONVERGED
    assert not found.stats["infeasible"]
    assert not found.stats["unbounded"]
    # A KKT point of a convex program is a solution: stationarity, feasibility, signs, complementarity.
    Q, c, A, b, G, h = data
    z, nu, lam = found.value
    size = 1 + c.norm() + lam.norm() * G.norm()
    assert (Q @ z + c + A.mT @ nu + G.mT @ lam).norm() <= 1e-9 * size
    assert (A @ z - b).norm() <= 1e-9 * (1 + b.norm())
    assert (G @ z - h).max() <= 1e-9 * (1 + h.norm())
    assert lam.min() >= -1e-9 * size
    assert (lam * (h - G @ z)).abs().max() <= 1e-7 * size


def test_infeasible_programs_are_proved():
    """``G z <= h`` and, of a positive combination of its rows, ``w'G z >= w'h + 0.1``."""
    proved = 0
    for seed in range(40):
        draw = Draw(seed)
        n = draw.size(2, 20)
        m = draw.size(1, n + 3)
        G, h, weights, root = draw.normal(m, n), draw.normal(m), draw.uniform(m) + 0.1, draw.normal(n, n)
        G, h = torch.cat([G, -(weights @ G)[None]]), torch.cat([h, -(weights @ h)[None] - 0.1])
        found = solve(root @ root.mT, draw.normal(n), None, None, G, h)
        assert not found.result.ok
        assert not found.stats["unbounded"]
        proved += bool(found.stats["infeasible"])
    assert proved >= 38  # a proof is not always found before the iterates leave float64


def test_unbounded_programs_are_proved():
    """A direction in the null space of Q and A, out of no constraint, along which c falls."""
    for seed in range(40):
        draw = Draw(seed)
        n = draw.size(3, 20)
        d = torch.nn.functional.normalize(draw.normal(n), dim=0)
        across = torch.eye(n, dtype=torch.float64) - torch.outer(d, d)
        root, A, G, c = across @ draw.normal(n, n - 1), draw.normal(1, n) @ across, draw.normal(n, n), draw.normal(n)
        G = torch.where((G @ d > 0)[:, None], -G, G)
        found = solve(root @ root.mT, c if c @ d < 0 else -c, A, draw.normal(1), G, draw.normal(n))
        assert found.result is Result.DIVERGED
        assert found.stats["unbounded"]


def test_a_batch_goes_on_beside_what_has_no_solution():
    eye, one = torch.eye(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    G, h = torch.cat([eye, -eye]), torch.tensor([[-1.0, -1.0], [3.0, 3.0]], dtype=torch.float64)
    found = solve(eye, -2 * one, None, None, G, h)
    assert found.stats["infeasible"].tolist() == [True, False]
    assert found.value.primal[1].item() == pytest.approx(2.0)
    assert found.stats["result"][1] == Result.CONVERGED


def test_units_are_exact_and_undo_themselves():
    """Powers of two: scaled data times their units are the data, bit by bit; and of about 1; Q's diagonal is even."""
    draw = Draw(3)
    Q, c, A, b, G, h = (
        size * draw.normal(*shape)
        for size, shape in ((1e-9, (4, 4)), (1e-5, (4,)), (1e7, (2, 4)), (1e3, (2,)), (1e-3, (3, 4)), (1e-6, (3,)))
    )
    spread = torch.tensor([1.0, 1e-2, 1e3, 0.0], dtype=Q.dtype)
    Q = (Q @ Q.mT) * spread[:, None] * spread
    Q = (Q + Q.mT) / 2
    data, (units, rows_A, rows_G) = scaled(Q, c, A, b, G, h)
    widths = units / units[0]
    unit, force = units[0], (c * widths / data[1])[0]
    assert torch.equal(c * widths / data[1], force.expand(4))
    assert torch.equal(data[0] / units / widths[:, None] * force, Q)
    assert torch.equal(data[2] / widths * (force / rows_A)[:, None], A)
    assert torch.equal(data[3] * unit * (force / rows_A), b)
    assert torch.equal(data[4] / widths * (force / rows_G)[:, None], G)
    assert torch.equal(data[5] * unit * (force / rows_G), h)
    diagonal = data[0].diagonal()[:3]
    assert diagonal.max() / diagonal.min() < 4.1
    for matrix in (data[2], data[4]):
        assert ((matrix.abs().sum(-1) > 0.7) & (matrix.abs().sum(-1) < 1.5)).all()


@pytest.mark.parametrize(("settings", "name"), [({"tol": 0.0}, "tol"), ({"tol": 1e-9, "max_steps": 0}, "max_steps")])
def test_bad_settings_name_the_argument(settings, name):
    with pytest.raises(ValueError, match=name):
        InteriorPoint(**settings)


@pytest.mark.parametrize(
    ("c", "h", "degenerate"),
    [
        ((0.0, 0.0), (0.0, 5.0), True),  # z_0 is at its bound, and would be there without it
        ((-1.0, 0.0), (0.0, 5.0), False),  # it is pulled against its bound
        ((0.0, 0.0), (1.0, 5.0), False),
        ((-3.0, 5.0), (1.0, 2.0), False),
        ((-3.0, -2.0), (1.0, 2.0), True),
    ],
)
def test_an_active_constraint_without_a_multiplier_is_degenerate(c, h, degenerate):
    """``min |z|^2 / 2 + c z`` where ``z <= h``: at ``min(-c, h)``."""
    c, h, eye = torch.tensor(c).double(), torch.tensor(h).double(), torch.eye(2, dtype=torch.float64)
    found = solve(eye, c, None, None, eye, h)
    torch.testing.assert_close(found.value[0], torch.minimum(-c, h), rtol=0, atol=1e-8)
    assert bool(found.stats["degenerate"]) == degenerate
