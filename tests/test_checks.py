"""Arguments of a wrong kind: an error that names the argument and says what to write."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
from typing import Protocol

import pytest
import torch
from torch import nn

import bilevel as bl

NET = nn.Linear(2, 1)
Z = torch.zeros(2)
X = torch.tensor(1.0, requires_grad=True)


def f(p):
    return (p - X).square().sum()


def r(y):
    return y - X


MISTAKES = {
    "hypergrad=CG()": (lambda: bl.argmin(f, Z, hypergrad=bl.CG()), r"hypergrad.*Implicit\(CG"),
    "hypergrad=CG": (lambda: bl.argmin(f, Z, hypergrad=bl.CG), r"hypergrad.*Implicit\(CG"),
    "hypergrad=Implicit": (lambda: bl.argmin(f, Z, hypergrad=bl.Implicit), r"hypergrad.*Implicit\("),
    "hypergrad=Unroll": (lambda: bl.argmin(f, Z, hypergrad=bl.Unroll), r"hypergrad.*Unroll\("),
    "hypergrad=LBFGS()": (lambda: bl.argmin(f, Z, hypergrad=bl.LBFGS()), "hypergrad.*solver=LBFGS"),
    "hypergrad='implicit'": (lambda: bl.argmin(f, Z, hypergrad="implicit"), r"hypergrad is 'implicit'.*Implicit\(\)"),
    "hypergrad=True": (lambda: bl.argmin(f, Z, hypergrad=True), "hypergrad is True"),
    "root: hypergrad=GMRES()": (lambda: bl.root(r, Z, hypergrad=bl.GMRES()), r"hypergrad.*Implicit\(GMRES"),
    "fixed_point: hypergrad=Implicit": (lambda: bl.fixed_point(r, Z, hypergrad=bl.Implicit), "hypergrad.*Implicit"),
    "quadratic_program: hypergrad=LU()": (
        lambda: bl.quadratic_program(torch.eye(2), Z, hypergrad=bl.LU()),
        r"hypergrad.*Implicit\(LU",
    ),
    "Implicit('cg')": (lambda: bl.Implicit("cg"), "linear_solver is 'cg'"),
    "Implicit(CG)": (lambda: bl.Implicit(bl.CG), r"linear_solver is the class CG: write CG\("),
    "Implicit(LBFGS())": (lambda: bl.Implicit(bl.LBFGS()), "linear_solver is of type LBFGS"),
    "Implicit(operator=GaussNewton)": (lambda: bl.Implicit(operator=bl.GaussNewton), "operator is the class"),
    "CG(preconditioner=Jacobi)": (lambda: bl.CG(preconditioner=bl.Jacobi), r"preconditioner.*Jacobi\(\)"),
    "Newton('lu')": (lambda: bl.Newton("lu"), "linear_solver is 'lu'"),
    "solver=LBFGS": (lambda: bl.argmin(f, Z, solver=bl.LBFGS), r"solver is the class LBFGS: write solver=LBFGS\("),
    "solver=Adam": (lambda: bl.argmin(f, Z, solver=torch.optim.Adam), r"solver.*TorchOptim\(torch.optim.Adam"),
    "solver=Adam(...)": (
        lambda: bl.argmin(f, Z, solver=torch.optim.Adam(NET.parameters())),
        r"solver.*TorchOptim\(torch.optim.Adam",
    ),
    "solver=bl.SGD()": (lambda: bl.argmin(f, Z, solver=bl.SGD()), r"solver.*Steps\(SGD"),
    "solver=CG()": (lambda: bl.argmin(f, Z, solver=bl.CG()), r"solver.*Implicit\(CG"),
    "solver=Unroll()": (lambda: bl.argmin(f, Z, solver=bl.Unroll()), "solver.*hypergrad=Unroll"),
    "solver='lbfgs'": (lambda: bl.argmin(f, Z, solver="lbfgs"), "solver is 'lbfgs'.*LBFGS"),
    "root(solver='newton')": (lambda: bl.root(r, Z, solver="newton"), "solver is 'newton'.*Newton"),
    "argmin(solver=Newton())": (lambda: bl.argmin(f, Z, solver=bl.Newton()), "solver is of type Newton.*LBFGS"),
    "root(solver=LBFGS())": (lambda: bl.root(r, Z, solver=bl.LBFGS()), "solver is of type LBFGS.*Newton"),
    "fixed_point(solver=LBFGS())": (
        lambda: bl.fixed_point(r, Z, solver=bl.LBFGS()),
        "solver is of type LBFGS.*Anderson",
    ),
    "root(solver=Newton)": (lambda: bl.root(r, Z, solver=bl.Newton), r"solver is the class Newton"),
    "TorchOptim(instance)": (
        lambda: bl.TorchOptim(torch.optim.Adam(NET.parameters()), max_steps=2),
        r"optimizer.*TorchOptim\(torch.optim.Adam, lr",
    ),
    "TorchOptim('adam')": (lambda: bl.TorchOptim("adam"), "optimizer is 'adam'"),
    "Steps(SGD)": (lambda: bl.Steps(bl.SGD), r"rule is the class SGD: write SGD\("),
    "Steps(torch.optim.SGD)": (lambda: bl.Steps(torch.optim.SGD), r"rule.*TorchOptim\(torch.optim.SGD"),
    "Steps('sgd')": (lambda: bl.Steps("sgd"), "rule is 'sgd'"),
    "warm_start=params": (lambda: bl.argmin(f, Z, warm_start={"a": Z}), "warm_start is of type dict.*init"),
    "warm_start=tensor": (lambda: bl.root(r, Z, warm_start=Z), "warm_start is a tensor"),
    "warm_start=Solution": (lambda: bl.fixed_point(r, Z, warm_start=bl.Solution), "warm_start is the class"),
    "init=net": (lambda: bl.argmin(f, NET), r"init is a module .Linear.*named_parameters\(\)"),
    "init=net.parameters()": (lambda: bl.argmin(f, NET.parameters()), r"init is of type generator.*named_parameters"),
    "init=None": (lambda: bl.argmin(f, None), "init"),
    "init=[0.0]": (lambda: bl.argmin(f, [0.0]), "init contains a float"),
    "swapped": (lambda: bl.argmin(Z, f), r"objective is a tensor.*swapped.*argmin\(objective, init"),
    "swapped root": (lambda: bl.root(Z, r), r"residual is a tensor.*swapped.*root\(residual, init"),
    "swapped fixed point": (lambda: bl.fixed_point(Z, r), r"map is a tensor.*swapped.*fixed_point\(map, init"),
    "objective=loss": (lambda: bl.argmin(f(Z), Z), "objective is a tensor"),
    "throw=True": (lambda: bl.argmin(f, Z, throw=True), "throw is True"),
    "throw=None": (lambda: bl.argmin(f, Z, throw=None), "throw is None"),
    "throw=[]": (lambda: bl.root(r, Z, throw=[]), "throw is"),
    "batched=2": (lambda: bl.root(r, torch.zeros(3, 2), batched=2), "batched is 2: True or False"),
    "least_squares(batched='no')": (lambda: bl.least_squares(r, Z, batched="no"), "batched is 'no'"),
    "constrained(batched=None)": (lambda: bl.constrained(f, lambda p: p[:1], Z, batched=None), "batched is None"),
    "no residuals": (lambda: bl.least_squares(lambda p: p[:0], Z), "residuals returned no numbers"),
    "sparse init": (lambda: bl.argmin(f, torch.eye(2).to_sparse()), r"params are dense.*to_dense\(\)"),
    "float8 init": (lambda: bl.argmin(f, Z.to(torch.float8_e4m3fn)), r"of 16 bits or more.*bfloat16\(\)"),
    "Bisection('a')": (lambda: bl.Bisection("a", 1.0), "lower is 'a'"),
    "Bisection without end": (lambda: bl.Bisection(0.0, math.inf), "a bracket without end has no middle"),
    "Bisection of another shape": (
        lambda: bl.root(r, Z, solver=bl.Bisection(torch.zeros(3), 2.0)),
        r"lower has shape \(3,\)",
    ),
    "ScipyMinimize('zz')": (lambda: bl.ScipyMinimize("zz"), "method is 'zz'.*l-bfgs-b"),
    "External of NumPy": (
        lambda: bl.argmin(f, Z, solver=bl.External(lambda loss, start: start.numpy())),
        "what solve returned holds ndarray",
    ),
    "chunk_size=1.5": (lambda: bl.map_tasks(torch.sin, torch.ones(4, 2), chunk_size=1.5), "chunk_size is 1.5"),
    "num_threads=None": (lambda: bl.map_tasks(torch.sin, torch.ones(4, 2), num_threads=None), "num_threads is None"),
    "results of too few tasks": (
        lambda: bl.map_tasks(lambda x: x[:1], torch.ones(4, 2), chunk_size=2),
        r"fn returned \[\(1, 2\)\] for 2 tasks",
    ),
    "data of NumPy": (lambda: bl.map_tasks(torch.sin, torch.ones(4, 2).numpy()), "data holds ndarray"),
    "stack(2.0)": (lambda: bl.stack(Z, 2.0), "num_tasks is 2.0"),
    "linear(ndarray)": (lambda: bl.nn.linear(torch.ones(5, 2).numpy(), NET.weight), "x of type ndarray"),
    "batch_norm(eps=-1)": (lambda: bl.nn.batch_norm(torch.ones(2, 2, 3, 3), Z, Z, eps=-1), "eps is -1"),
    "batch_norm(weight=None)": (lambda: bl.nn.batch_norm(torch.ones(2, 2, 3, 3), None, Z), "weight of type NoneType"),
}


@pytest.mark.parametrize(("mistake", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(mistake, words):
    with pytest.raises((TypeError, ValueError), match=words):
        mistake()


def test_what_fits_is_accepted():
    class Mine:
        def minimize(self, problem):
            return bl.LBFGS().minimize(problem)

    fit = bl.argmin(f, Z, solver=Mine(), hypergrad=bl.Implicit(bl.CG(preconditioner=bl.Jacobi())))
    bl.argmin(f, {"a": [Z, Z]}["a"][0], warm_start=fit)
    bl.argmin(lambda p: (NET(p) - 1).square().sum() + p.square().sum(), Z)  # a module may be called on the params
    bl.root(r, Z, solver=bl.Anderson())
    bl.fixed_point(lambda y: 0.1 * y, Z, solver=bl.Newton(bl.LU()))
    bl.argmin(f, Z, solver=bl.TorchOptim(lambda params: torch.optim.SGD(params, lr=0.1), max_steps=3))


CLASSES = [one for name in bl.__all__ if isinstance(one := getattr(bl, name), type) and dataclasses.is_dataclass(one)]


@pytest.mark.parametrize("settings", [one for one in CLASSES if one is not bl.History])
def test_settings_cannot_be_changed(settings):
    """The same object twice gives the same answer; a `History` is what grows."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        object.__new__(settings).rtol = 0.5


REQUIRED = {
    bl.ProximalGradient: {"prox": bl.prox.L1(0.1)},
    bl.Steps: {"rule": bl.SGD()},
    bl.External: {"solve": lambda loss, start: start},
    bl.Bisection: {"lower": 0.0, "upper": 1.0},
    bl.TorchOptim: {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)},
    bl.Nystrom: {"rank": 5},
}


def numbers(kind):
    """The names of settings that are numbers, and whether whole ones."""
    named = {f.name: set(str(f.type).split(" | ")) for f in dataclasses.fields(kind) if f.init}
    return {name: "float" not in words for name, words in named.items() if words <= {"int", "float", "None"}}


SOLVERS = [
    one
    for one in CLASSES
    if any(hasattr(one, name) for name in ("minimize", "find", "pull", "run", "solve")) and numbers(one)
]


@pytest.mark.parametrize("kind", SOLVERS)
def test_numbers_of_a_wrong_kind_are_named(kind):
    """When the settings are made, not in the middle of a solve; a step count of 1.5 was a TypeError of range.

    ``gtol=inf`` was init, CONVERGED.
    """
    for name, whole in numbers(kind).items():
        for wrong in ("a", True, math.inf, math.nan, torch.ones(2), *([1.5, torch.tensor(5.0)] if whole else [])):
            with pytest.raises((TypeError, ValueError), match=rf"^{name} is "):
                kind(**{**REQUIRED.get(kind, {}), name: wrong})


def flags(kind):
    return [f.name for f in dataclasses.fields(kind) if f.init and set(str(f.type).split(" | ")) <= {"bool", "None"}]


@pytest.mark.parametrize("kind", [one for one in CLASSES if flags(one) and one is not bl.InnerStep])
def test_flags_of_a_wrong_kind_are_named(kind):
    """``safeguard="no"`` was True."""
    for name in flags(kind):
        for wrong in ("no", 1, 0.0, torch.ones(())):
            with pytest.raises(TypeError, match=rf"^{name} is "):
                kind(**{**REQUIRED.get(kind, {}), name: wrong})


@pytest.mark.parametrize("solve", [bl.argmin, bl.root, bl.fixed_point])
def test_flags_of_a_wrong_kind_are_named_by_solves(solve):
    for name in {"has_aux", "symmetric", "batched"} & set(inspect.signature(solve).parameters):
        with pytest.raises(TypeError, match=rf"^{name} is .no.: True or False"):
            solve(f if solve is bl.argmin else r, Z, **{name: "no"})


def classes(*packages):
    """All classes that the modules of these packages define, and those beside them."""
    names = [module.name for module in pkgutil.walk_packages(bl.__path__, "bilevel.")]
    chosen = [name for name in names if name.count(".") == 1 or name.split(".")[1] in packages]
    modules = [importlib.import_module(name) for name in chosen]
    found = {one for module in modules for one in vars(module).values() if isinstance(one, type)}
    return {one for one in found if one.__module__ in chosen}


CORE = classes("linalg", "inner", "hypergrad")
GROWING = (
    *("History", "Lanczos", "_Anchor", "_State", "_Walk", "Ends", "Progress", "RootProgress", "SweepState"),
    *("AdjointCell", "Findings", "Point"),
)
"""What a solve writes into as it goes on; all else is made once."""


def test_all_that_does_not_grow_is_frozen():
    made = {one for one in CORE if dataclasses.is_dataclass(one)}
    assert {one.__name__ for one in made if not one.__dataclass_params__.frozen} == set(GROWING)


def documented():
    """Nothing else."""


def test_a_method_without_a_body_is_abstract():
    """So that a class that forgets it cannot be made."""
    for one in (one for one in CORE if Protocol not in one.__bases__):
        for name, member in vars(one).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if inspect.isfunction(function) and not name.startswith("__"):
                empty = function.__code__.co_code == documented.__code__.co_code and function.__doc__
                assert not empty or getattr(function, "__isabstractmethod__", False), f"{one.__name__}.{name}"
