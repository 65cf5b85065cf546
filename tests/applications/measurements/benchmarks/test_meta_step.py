"""Workloads A and F: ours and the peers against the reference, and the count of operations against PyTorch's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bilevel
from applications.measurements.benchmarks.contest import AS_BEFORE, BEFORE, NotHere
from applications.measurements.benchmarks.meta_step import MetaStep, network
from applications.measurements.benchmarks.runner import contest, relative_errors
from applications.measurements.benchmarks.training_step import TrainingStep

SMALL = {"A": MetaStep(ways=3, tasks=3, inner_steps=2), "F": TrainingStep(ways=3, tasks=3, inner_steps=2)}


@pytest.fixture(scope="module", params=SMALL)
def small(request, glyphs):
    return SMALL[request.param]


@pytest.fixture(scope="module")
def reference(small):
    return small.reference()


@pytest.fixture(scope="module", autouse=True)
def glyphs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILEVEL_DATA", str(tmp_path_factory.mktemp("data")))
        yield


def test_ours_is_the_reference(small, reference):
    # The reference has its images from float32, which 1/255 is not exact in.
    assert relative_errors(small.ours(precision="float64")().answer, reference).max() < 1e-6
    assert np.median(relative_errors(small.ours()().answer, reference)) < 1e-4


def test_the_safeguard_takes_no_step_back(reference, small):
    assert relative_errors(small.ours(precision="float64", safeguard=True)().answer, reference).max() < 1e-6


@pytest.mark.parametrize("name", [name for name in SMALL["A"].contestants() if not name.startswith("bilevel")])
def test_peers_are_the_reference(name, small, reference):
    try:
        contestant = small.contestants()[name]()
    except NotHere as missing:
        pytest.skip(str(missing))
    assert np.median(relative_errors(contestant().answer, reference)) < 1e-4


def test_the_operations_of_a_meta_step_are_those_that_pytorch_counts(small):
    learner, episodes = small.problem()
    params = [param.detach().requires_grad_() for param in learner.meta.values()]

    def counted(x):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(network(params, x, small.halve).sum(), params)
        return counter.get_total_flops()

    support, query = counted(episodes.support_x[0]), counted(episodes.query_x[0])
    gradients = (small.inner_steps + 1) * support + query
    products = (small.flops() / small.tasks - gradients) / small.cg_steps
    assert 1.9 * support < products < 2.0 * support  # a product: two gradients, less at the images


def test_an_earlier_commit_is_run_from_its_checkout(tmp_path, monkeypatch):
    """Its library and applications, by the worker of these benchmarks."""
    root = Path(bilevel.__file__).parents[1]
    for package in ("bilevel", "applications"):
        shutil.copytree(root / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "applications/measurements/benchmarks")
    (tmp_path / "applications/measurements/benchmarks").mkdir()
    (tmp_path / "applications/measurements/benchmarks/__init__.py").touch()
    (tmp_path / "bilevel/__init__.py").write_text("raise SystemError('the other library')")
    monkeypatch.setenv(BEFORE, str(tmp_path))
    settings = {"ways": 3, "tasks": 1, "inner_steps": 1}
    (row,) = contest("TrainingStep", settings, [f"bilevel{AS_BEFORE}"], rounds=1, runs=1, timeout=100)
    assert "the other library" in row.note
