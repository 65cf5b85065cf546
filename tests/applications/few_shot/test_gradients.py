from __future__ import annotations

import pytest
import torch

import bilevel as bl
from applications.few_shot import gradients
from applications.few_shot.__main__ import main
from applications.few_shot.gradients import Config, Tasks

SMALL = Config(size=6, tasks=3, condition=10.0, strength=0.1, steps=(2, 10, 400))


def test_the_exact_one_is_the_derivative_of_the_solution():
    tasks = Tasks.draw(SMALL)
    (x, y), (qx, qy) = tasks.support, tasks.query

    def outer(meta):
        hessian = x.mT @ x / x.shape[1] + 0.1 * torch.eye(6, dtype=torch.float64)
        right = (x.mT @ y.unsqueeze(-1)).squeeze(-1) / x.shape[1] + 0.1 * meta
        w = torch.linalg.solve(hessian, right)
        return (((qx @ w.unsqueeze(-1)).squeeze(-1) - qy).square().mean(-1) / 2).mean()

    meta = tasks.meta.clone().requires_grad_()
    expected = torch.autograd.grad(outer(meta), meta)[0]
    torch.testing.assert_close(tasks.exact(0.1), expected, rtol=1e-10, atol=1e-14)


def test_the_hessian_has_its_condition_number():
    x = Tasks.draw(SMALL).support[0]
    values = torch.linalg.eigvalsh(x.mT @ x / x.shape[1])
    torch.testing.assert_close(values[:, -1], torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(values[:, 0], torch.full((3,), 0.1, dtype=torch.float64))


def test_errors():
    """All n steps of CG and the unrolled one become exact; two steps of CG keep an error, five a smaller one."""
    found = {}
    for name, steps, error in gradients.errors(SMALL):
        found[name, steps] = error
    assert found["implicit, 6 CG steps", 400] < 1e-10
    assert found["unrolled", 400] < 1e-10
    assert found["implicit, 2 CG steps", 400] > 3 * found["implicit, 5 CG steps", 400] > 1e-9
    for steps in (2, 10):
        assert found["implicit, 6 CG steps", steps] < found["unrolled", steps]


def test_unrolled_is_the_derivative_of_what_it_does():
    tasks = Tasks.draw(SMALL)
    found = gradients.meta_gradient(tasks, 0.1, 3, bl.Unroll())

    def loss(meta):
        w = meta.expand(3, 6)
        (x, y), (qx, qy) = tasks.support, tasks.query
        for _ in range(3):
            gradient = (x.mT @ ((x @ w.unsqueeze(-1)).squeeze(-1) - y).unsqueeze(-1)).squeeze(-1) / x.shape[1]
            w = w - (gradient + 0.1 * (w - meta)) / 1.1
        return (((qx @ w.unsqueeze(-1)).squeeze(-1) - qy).square().mean(-1) / 2).mean()

    meta = tasks.meta.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(loss(meta), meta)[0], rtol=1e-10, atol=1e-14)


def test_command(tmp_path, capsys):
    arguments = ["--size", "4", "--tasks", "2", "--steps", "1", "3", "--out", str(tmp_path / "picture.png")]
    assert main(["gradients", *arguments]) == 0
    assert "| inner steps | implicit, 2 CG steps | implicit, 5 CG steps | implicit, 4 CG" in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert main(["gradients", "--tasks", "0"]) == 2


@pytest.mark.parametrize("name", ["condition", "strength"])
def test_numbers_that_are_not_positive(name, capsys):
    assert main(["gradients", f"--{name}", "-1"]) == 2
    assert f"--{name} is -1.0" in capsys.readouterr().err


def test_a_condition_that_no_matrix_has(capsys):
    assert main(["gradients", "--condition", "0.5"]) == 2
    assert "--condition is 0.5: that of a matrix is at least 1" in capsys.readouterr().err
