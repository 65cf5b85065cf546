"""Workload A: ours and the peers against the reference, and the count of operations against PyTorch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from applications.measurements.benchmarks.contest import NotHere
from applications.measurements.benchmarks.meta_step import CG_STEPS, MetaStep, network
from applications.measurements.benchmarks.runner import relative_errors

SMALL = MetaStep(ways=3, tasks=3, inner_steps=2)


@pytest.fixture(scope="module")
def reference(glyphs):
    return SMALL.reference()


@pytest.fixture(scope="module", autouse=True)
def glyphs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BILEVEL_DATA", str(tmp_path_factory.mktemp("data")))
        yield


def test_ours_is_the_reference(reference):
    # The reference has its images from float32, which 1/255 is not exact in.
    assert relative_errors(SMALL.ours(precision="float64")().answer, reference).max() < 1e-6
    assert np.median(relative_errors(SMALL.ours()().answer, reference)) < 1e-4


@pytest.mark.parametrize("name", [name for name in SMALL.contestants() if not name.startswith("bilevel")])
def test_peers_are_the_reference(name, reference):
    try:
        contestant = SMALL.contestants()[name]()
    except NotHere as missing:
        pytest.skip(str(missing))
    assert np.median(relative_errors(contestant().answer, reference)) < 1e-4


def test_the_operations_of_a_meta_step_are_those_that_pytorch_counts():
    learner, episodes = SMALL.problem()
    params = [param.detach().requires_grad_() for param in learner.meta.values()]

    def counted(x):
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(network(params, x).sum(), params)
        return counter.get_total_flops()

    support, query = counted(episodes.support_x[0]), counted(episodes.query_x[0])
    gradients = (SMALL.inner_steps + 1) * support + query
    rest = SMALL.flops() / SMALL.tasks - gradients
    assert 1.9 * CG_STEPS * support < rest < 2.0 * CG_STEPS * support  # a product: two gradients, less at the images
