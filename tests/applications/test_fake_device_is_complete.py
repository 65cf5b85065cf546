"""What else runs on a device that nobody has: fits, constraints, applications; and that no public name is missing."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bilevel as bl
import bilevel.stochastic
from applications.equilibrium.knobs import Config as EquilibriumConfig
from applications.equilibrium.methods import METHODS as EQUILIBRIA
from applications.equilibrium.methods import hidden
from applications.equilibrium.network import Dense
from applications.reweighting.drawing import Drawn
from applications.reweighting.networks import Mlp
from applications.reweighting.train import ClassifierTraining, Settings
from applications.reweighting.weighting import METHODS as WEIGHTINGS
from bilevel.diagnostics.methods import all_methods
from tests.applications.test_fake_device import DEVICE, FEW, KIND, LINEAR, OPERATORS, SOLVERS, SYSTEMS, on_device
from tests.fake_device import fake_device
from tests.stochastic.cases import CASES

REGIONS = [bl.LevenbergMarquardt(max_steps=2), bl.GaussNewtonCG(max_steps=2)]
CONSTRAINED = [bl.AugmentedLagrangian()]


@pytest.mark.parametrize("solver", REGIONS, ids=lambda solver: type(solver).__name__)
def test_least_squares(solver):
    with fake_device():
        x, y = on_device(6, 2), on_device(6).requires_grad_()
        fit = bl.least_squares(lambda w: torch.tanh(x @ w) - y, torch.zeros(2, device=DEVICE), solver=solver)
        (grad,) = torch.autograd.grad(fit.value.sum(), y)
        assert grad.device.type == KIND


@pytest.mark.parametrize("solver", CONSTRAINED, ids=lambda solver: type(solver).__name__)
def test_constrained_problems(solver):
    with fake_device():
        y = on_device(3).requires_grad_()
        start = torch.zeros(3, device=DEVICE)
        fit = bl.constrained(lambda w: (w - y).square().sum(), lambda w: w.sum().unsqueeze(0), start, solver=solver)
        (grad,) = torch.autograd.grad(fit.value.params.sum(), y)
        assert grad.device.type == KIND


@pytest.mark.parametrize("preconditioner", [bl.AdamPreconditioner, bl.InversePreconditioner])
def test_preconditioners_that_are_given(preconditioner):
    with fake_device():
        y = on_device(3).requires_grad_()
        known = torch.ones(3, device=DEVICE) if preconditioner is bl.AdamPreconditioner else torch.eye(3, device=DEVICE)
        hypergrad = bl.Implicit(bl.CG(max_steps=2, preconditioner=preconditioner(known)))
        objective = lambda w: (w - y).pow(4).sum() + w.square().sum()  # noqa: E731
        fit = bl.argmin(objective, torch.zeros(3, device=DEVICE), solver=FEW, hypergrad=hypergrad, throw="ignore")
        (grad,) = torch.autograd.grad(fit.value.sum(), y)
        assert grad.device.type == KIND


@pytest.mark.parametrize("method", EQUILIBRIA)
def test_a_step_of_the_equilibrium_application(method):
    config = replace(EquilibriumConfig(), width=4, max_iterations=4, unrolled=3)
    with fake_device():
        with torch.device(DEVICE):
            network = Dense(5, 4, 3, config.contraction)
        found = hidden(network, on_device(6, 5), method, config)
        grads = torch.autograd.grad(network.head(found.z).square().sum(), list(network.parameters()))
        assert all(grad.device.type == KIND for grad in grads)


@pytest.mark.parametrize("method", WEIGHTINGS)
def test_a_step_of_the_reweighting_application(method, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)  # fake parameters cannot be moved
    settings = Settings(
        **{"steps": 2, "batch": 3, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "meta_lr": 0.1},
        **{"warm_up": 0, "focal_gamma": 1.0, "seed": 0},
    )
    with fake_device():
        sets = [torch.zeros(2, 4, dtype=torch.int64, device=DEVICE) for _ in range(5)]
        drawn = Drawn(on_device(8, 5), torch.zeros(8, dtype=torch.int64, device=DEVICE), *sets, num_classes=3)
        with torch.device(DEVICE):
            training = ClassifierTraining(lambda: Mlp(5, 4, 3), drawn, method, settings)
        indices, labels, frequencies = training.batch()
        training.meta_step(indices, labels, frequencies, 0.1)
        training.classifier_step(indices, labels, frequencies)
        assert all(param.device.type == KIND for param in training.params.values())


WORK = ("minimize", "find", "solve", "pull", "run", "step")
"""Methods of what is a solver, a hypergradient method, a rule of steps or a stochastic method."""

NO_WORK = {
    "Solution": "what they return",
    "Recorded": "holds a user's function; tests/test_recording.py",
    **dict.fromkeys(("Hypergrad", "InnerSolver", "LinearSolver", "PathMethod", "RootSolver", "Rule"), "protocols"),
    **dict.fromkeys(("Stochastic", "Step", "Draws", "TorchSchedule", "Decay"), "parts of stochastic methods"),
}
HOST = {
    **dict.fromkeys(("ScipyGMRES", "ScipyBiCGSTAB", "LSMR"), "SciPy: fake tensors have no numbers to give it"),
    "External": "whatever the user's own function does",
}


def names_in(*values):
    """Names of the classes of values, and of the settings of those."""
    found = set()
    for value in values:
        found.add(type(value).__name__)
        if dataclasses.is_dataclass(value):
            found |= names_in(*(getattr(value, field.name) for field in dataclasses.fields(value)))
    return found


def workers():
    """Public names of what works, in both packages."""
    public = {name: getattr(place, name) for place in (bl, bilevel.stochastic) for name in place.__all__}
    return {name for name, it in public.items() if isinstance(it, type) and any(hasattr(it, work) for work in WORK)}


def test_every_public_solver_and_method_runs_on_the_fake_device():
    methods = [part for method in all_methods(max_steps=4) for part in (method.solver, method.hypergrad)]
    covered = names_in(*(solver for solver, _ in SOLVERS), *LINEAR, *methods, *(solver for _, solver in SYSTEMS))
    covered |= names_in(*REGIONS, *CONSTRAINED) | {case.method.__name__ for case in CASES.values()}
    covered |= {"ProximalGradient"}  # of all proximal maps
    assert workers() - covered - set(NO_WORK) - set(HOST) == set()
    assert {"graph", "func", bl.GaussNewton, bl.EmpiricalFisher} == set(OPERATORS)


def test_the_page_says_how_often_every_solver_looks():
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    table = page[page.index("| what | looks on a GPU |") : page.index("Where looks are not free")]
    told = set(re.findall(r"`(\w+)", table))
    inner = {name for name in workers() if any(hasattr(getattr(bl, name, None), work) for work in WORK[:4])}
    assert inner - told - set(NO_WORK) == set()
