"""Callbacks of inner solvers: what they are told, how they end a solve, and that nobody pays who has none."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

import bilevel as bl
from bilevel.tuning import load, save

CURVATURE = torch.tensor([1.0, 3.0], dtype=torch.float64)
START = torch.tensor([5.0, -4.0], dtype=torch.float64)


def bowl(y):
    return (CURVATURE * (y - 1).square()).sum(-1) + 0.1 * (y - 1).pow(4).sum(-1)


def contraction(y):
    return torch.cos(y) / 2


SOLVERS = {
    "LBFGS": lambda callback: bl.LBFGS(max_steps=30, callback=callback),
    "LBFGS gtol": lambda callback: bl.LBFGS(max_steps=30, gtol=1e-6, callback=callback),
    "NewtonCG": lambda callback: bl.NewtonCG(max_steps=30, callback=callback),
    "GradientDescent": lambda callback: bl.GradientDescent(0.02, max_steps=30, callback=callback),
    "GradientDescent gtol": lambda callback: bl.GradientDescent(0.02, max_steps=500, gtol=1e-6, callback=callback),
    "line search": lambda callback: bl.GradientDescent(0.02, max_steps=30, line_search=True, callback=callback),
    "Adam": lambda callback: bl.Steps(bl.Adam(0.1), max_steps=30, callback=callback),
    "TorchOptim": lambda callback: bl.TorchOptim(torch.optim.SGD, lr=0.02, max_steps=30, callback=callback),
    "ScipyMinimize": lambda callback: bl.ScipyMinimize("BFGS", max_steps=30, callback=callback),
    "ScipyMinimize gtol": lambda callback: bl.ScipyMinimize("L-BFGS-B", max_steps=30, gtol=1e-4, callback=callback),
    "ProximalGradient": lambda callback: bl.ProximalGradient(bl.prox.L1(0.1), max_steps=200, callback=callback),
}
SYSTEMS = {
    "Newton": lambda callback: bl.Newton(callback=callback),
    "Anderson": lambda callback: bl.Anderson(callback=callback),
    "Picard": lambda callback: bl.Picard(callback=callback),
}


def solved(name, callback, start=START) -> bl.Solution:
    if name in SYSTEMS:
        return bl.fixed_point(contraction, start, solver=SYSTEMS[name](callback), throw="ignore")
    return bl.argmin(bowl, start, solver=SOLVERS[name](callback), throw="ignore")


@pytest.mark.parametrize("name", [*SOLVERS, *SYSTEMS])
def test_each_step_is_told_with_loss_gradient_norm_and_params(name):
    seen: list[bl.InnerStep] = []
    fit = solved(name, seen.append)
    plain = solved(name, None)
    torch.testing.assert_close(fit.value, plain.value, rtol=0.0, atol=0.0)
    assert [one.step for one in seen] == list(range(int(fit.stats["num_steps"]) + 1))
    if "Scipy" not in name:  # which does not tell
        assert [one.last for one in seen] == [False] * (len(seen) - 1) + [True]
    torch.testing.assert_close(seen[0].params, START)
    torch.testing.assert_close(seen[-1].params, fit.value)
    for one in seen:
        if name in SYSTEMS:
            assert one.loss is None
            assert one.residual_norm == pytest.approx(float((one.params - contraction(one.params)).norm()), rel=1e-6)
        elif name != "ProximalGradient":
            y = one.params.clone().requires_grad_()
            (grad,) = torch.autograd.grad(bowl(y), y)
            assert one.loss == pytest.approx(float(bowl(one.params)))
            assert one.gradient_norm == pytest.approx(float(grad.norm()), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", [*SOLVERS, *SYSTEMS])
@pytest.mark.parametrize("way", ["true", "tensor", "numpy", "exception"])
def test_a_callback_ends_the_solve_and_that_is_no_failure(name, way):
    def stop(step: bl.InnerStep):
        if step.step < 2:
            return None
        if way == "exception":
            raise StopIteration
        return {"true": True, "tensor": step.residual_norm >= 0, "numpy": np.bool_(True)}[way]

    fit = solved(name, stop)
    assert int(fit.stats["num_steps"]) == 2
    assert fit.result is bl.Result.STEPS_DONE


def test_a_batch_is_ended_where_all_problems_say_so():
    start = torch.stack([START, START / 10])
    fit = solved("LBFGS gtol", lambda step: step.loss < 1e9 * torch.tensor([1.0, 0.0]), start)
    assert bool((fit.stats["num_steps"] > 1).all())


@pytest.mark.parametrize(("callback", "words"), [(bl.History, r"History\(\)"), (3, "callback is 3"), ("a", "is 'a'")])
def test_what_is_no_callback_is_told(callback, words):
    with pytest.raises(TypeError, match=words):
        solved("LBFGS", callback)


def test_constrained_problems_are_told_in_the_units_and_the_tree_of_the_user():
    seen = {"inner": [], "newton": []}
    inner = bl.LBFGS(max_steps=200, callback=seen["inner"].append)
    newton = bl.Newton(bl.LeastNorm(), callback=[seen["newton"].append])
    weights, centre = torch.tensor([1e-3, 1e3]).double(), torch.tensor([1e3, 1.0]).double()
    fit = bl.constrained(
        lambda p: (weights * (p["a"] - centre).square()).sum(),
        lambda p: p["a"].sum()[None] - 900,
        {"a": torch.zeros(2, dtype=torch.float64)},
        solver=bl.AugmentedLagrangian(inner=inner, newton=newton),
    )
    torch.testing.assert_close(seen["inner"][-1].params, fit.value.params)
    torch.testing.assert_close(seen["newton"][-1].params, fit.value)


def test_the_tree_under_a_transform_is_that_of_the_user():
    seen = []

    def solved(x):
        solver = bl.Newton(callback=seen.append)
        return bl.root(lambda p, x: {"a": p["a"] - x}, {"a": torch.zeros(2)}, x, solver=solver).value["a"].sum()

    torch.func.grad(solved)(torch.ones(2))
    torch.testing.assert_close(seen[-1].params["a"], torch.ones(2))


def test_each_problem_of_a_batch_has_its_numbers():
    history = bl.History()
    start = torch.stack([START, START / 10, torch.ones_like(START)])
    fit = solved("LBFGS gtol", history, start)
    steps = int(fit.stats["num_steps"].max())
    assert history.loss.shape == history.residual_norm.shape == (steps + 1, 3)
    torch.testing.assert_close(history.loss[0], bowl(start))
    assert bool((history.loss.diff(dim=0) <= 1e-12).all())
    assert bool((history.residual_norm[-1] <= 1e-6).all())


def test_a_history_is_that_of_the_last_solve_and_several_callbacks_listen():
    history, seen = bl.History(), []
    for start in (START, START / 100):
        fit = solved("LBFGS", (history, seen.append), start)
    assert len(history.loss) == int(fit.stats["num_steps"]) + 1 < len(seen)
    assert history.loss[0] == pytest.approx(float(bowl(START / 100)))


def test_a_bar_shows_loss_and_gradient():
    shown = io.StringIO()
    solved("Adam", bl.ProgressBar("adaptation", file=shown, mininterval=0.0, leave=True, ascii=True))
    last = shown.getvalue().split("\r")[-1]
    assert last.startswith("adaptation: 100%")
    assert "30/30" in last
    assert "loss=" in last
    assert "gradient=" in last


def test_without_tqdm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ModuleNotFoundError, match=r"bilevel\[progress\]"):
        bl.ProgressBar()


def test_a_gradient_flows_through_a_watched_solve():
    x = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    slopes = []
    for solver, hypergrad in [
        (bl.LBFGS(callback=lambda step: None), bl.Implicit()),
        (bl.GradientDescent(0.3, max_steps=60, callback=lambda step: None), bl.Unroll()),
        (bl.Steps(bl.SGD(0.3), max_steps=60, callback=lambda step: None), bl.Unroll()),
    ]:
        fit = bl.argmin(
            lambda y: (y - x).square().sum() + x * y.square().sum(), START, solver=solver, hypergrad=hypergrad
        )
        slopes.append(torch.autograd.grad(fit.value.sum(), x)[0].item())
    assert slopes == pytest.approx([2 / 1.5**2] * 3, rel=1e-6)
    mapped = torch.vmap(
        lambda t: bl.argmin(lambda y: (y - t).square().sum(), START, solver=bl.LBFGS(callback=lambda s: None)).value
    )
    torch.testing.assert_close(mapped(torch.arange(3.0, dtype=torch.float64))[:, 0], torch.arange(3.0).double())


def test_what_no_callback_can_see_is_refused():
    watched = bl.Steps(bl.SGD(0.1), max_steps=4, callback=lambda step: None)
    for hypergrad in (bl.Unroll(checkpoint=True), bl.ForwardMode(), bl.Truncated(2)):
        with pytest.raises(TypeError, match="leave callback away"):
            bl.argmin(bowl, START, solver=watched, hypergrad=hypergrad)


def test_in_a_recording_it_is_refused_in_words():
    from torch.fx.experimental.proxy_tensor import make_fx

    solver = bl.GradientDescent(0.1, max_steps=2, callback=lambda step: None)
    with pytest.raises(NotImplementedError, match=r"callback was called inside of bilevel\.capture"):
        make_fx(lambda y: bl.argmin(bowl, y, solver=solver, hypergrad=None, throw="ignore").value)(START)


@pytest.mark.parametrize("make", (SOLVERS | SYSTEMS).values(), ids=SOLVERS | SYSTEMS)
def test_solvers_that_differ_in_their_callbacks_are_equal(make):
    assert make(print) == make(None)
    assert repr(make(print)) == repr(make(None))


def test_a_callback_is_no_setting(tmp_path):
    watched = bl.LBFGS(max_steps=7, callback=print)
    save(tmp_path / "settings.json", {"solver": bl.LBFGS(max_steps=7)})
    assert "callback" not in (tmp_path / "settings.json").read_text()
    assert load(tmp_path / "settings.json")["solver"] == watched
    with pytest.raises(TypeError, match="has a callback"):
        save(tmp_path / "other.json", {"solver": watched})
