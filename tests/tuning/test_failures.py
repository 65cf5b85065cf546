"""What a trial may meet is pruned, with its reason; a mistake of the program ends the study, with its own error."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest
import scipy.linalg
import torch

import bilevel as bl
from bilevel.tuning import create_study, guard

optuna.logging.set_verbosity(optuna.logging.ERROR)


def diverge():
    y, x = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    method = bl.stochastic.SOBA(
        y, x, lambda y, x, b: (y - x).square().sum(), lambda y, x, b: y.square().sum(), inner_lr=100.0, outer_lr=0.1
    )
    for _ in range(100):
        method.step()


def too_steep():
    bl.argmin(lambda y: (y**4).sum(), torch.ones(2), solver=bl.GradientDescent(1e3, max_steps=50), hypergrad=None)


def not_finite():
    bl.argmin(lambda y: (y**2).sum(), torch.tensor([math.nan]), hypergrad=None)


def too_much():
    torch.empty(2**50, dtype=torch.float64)


def more_than_can_be_addressed():
    torch.empty(2**60, dtype=torch.float64)


def cuda_is_full():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def a_library_of_cuda_is_full():
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def numpy_is_full():
    np.empty(2**58)


def numpy_overflows():
    with np.errstate(over="raise"):
        np.float64(1e300) * np.float64(1e300)


MET = {
    "a solve that failed": (too_steep, "SolveError"),
    "a problem that is not finite": (not_finite, "NonFiniteError"),
    "a divergence": (diverge, "SolveError: SOBA diverges"),
    "torch, not positive definite": (lambda: torch.linalg.cholesky(-torch.eye(3)), "LinAlgError"),
    "torch, singular": (lambda: torch.linalg.inv(torch.zeros(2, 2)), "LinAlgError"),
    "numpy, singular": (lambda: np.linalg.inv(np.zeros((2, 2))), "LinAlgError"),
    "scipy, not positive definite": (lambda: scipy.linalg.cholesky(-np.eye(2)), "LinAlgError"),
    "memory of torch": (too_much, "RuntimeError"),
    "memory beyond any": (more_than_can_be_addressed, "RuntimeError"),
    "memory of numpy": (numpy_is_full, "MemoryError"),
    "memory of a GPU": (cuda_is_full, "OutOfMemoryError: CUDA out of memory"),
    "memory of cuBLAS": (a_library_of_cuda_is_full, "RuntimeError: CUDA error"),
    "an overflow of Python": (lambda: math.exp(1e4), "OverflowError"),
    "an overflow of numpy": (numpy_overflows, "FloatingPointError"),
}


@pytest.mark.parametrize("name", MET)
def test_what_a_trial_may_meet_is_pruned(name):
    meet, reason = MET[name]
    study = create_study("a", sampler="random")
    study.optimize(guard(lambda trial: meet() or (1.0 if trial.number else meet())), n_trials=2)
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "PRUNED"]
    assert reason in study.trials[0].user_attrs["failure"]


MISTAKES = {
    "a division by zero": (lambda: 1 / 0, ZeroDivisionError),
    "a wrong type": (lambda: "1" + 1, TypeError),
    "a missing key": (lambda: {}["x"], KeyError),
    "an unknown name": (lambda: unknown, NameError),  # noqa: F821
    "an unknown attribute": (lambda: torch.unknown, AttributeError),
    "an index": (lambda: [][1], IndexError),
    "a wrong value": (lambda: int("x"), ValueError),
    "a wrong setting": (lambda: bl.LBFGS(history=0), ValueError),
    "an assertion": (lambda: exec("assert False"), AssertionError),
    "shapes that do not fit": (lambda: torch.ones(2) @ torch.ones(3), RuntimeError),
    "a missing file": (lambda: Path("/nowhere/at/all").read_text(), FileNotFoundError),
    "damaged JSON": (lambda: json.loads("{"), json.JSONDecodeError),
    "a recursion": (lambda: (lambda f: f(f))(lambda f: f(f)), RecursionError),
    "what is not done": (lambda: exec("raise NotImplementedError"), NotImplementedError),
    "an import": (lambda: __import__("no_such_module"), ImportError),
    "Ctrl-C": (lambda: exec("raise KeyboardInterrupt"), KeyboardInterrupt),
    "an exit": (lambda: sys.exit(3), SystemExit),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_program_is_no_pruned_trial(name):
    make, error = MISTAKES[name]
    study = create_study("a", sampler="random")
    with pytest.raises(error):
        study.optimize(guard(lambda trial: make()), n_trials=2)
    assert "PRUNED" not in [trial.state.name for trial in study.trials]


def test_what_the_program_prunes_itself_stays_as_it_is():
    def objective(trial):
        raise optuna.TrialPruned("enough")

    study = create_study("a")
    study.optimize(guard(objective), n_trials=1)
    assert study.trials[0].state.name == "PRUNED"
    assert "failure" not in study.trials[0].user_attrs
