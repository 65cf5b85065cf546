"""The meta-step as a recorded program: on a CPU by the tracer of the library's tests, on a GPU by a CUDA graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from applications.few_shot.config import Config
from applications.few_shot.methods import meta_step
from applications.few_shot.train import Session
from tests.test_recording import recorded

__all__ = ["recorded"]  # the fixture is shared


def meta_steps(config, steps):
    """Outcome and meta-gradients of each step, of the eager program and of the recorded one."""
    found = []
    for capture in (False, True):
        session = Session.create(replace(config, capture=capture))
        sampler, meta = session.sampler("train"), list(session.learner.meta.values())
        outcomes = [meta_step(session.learner, sampler.episodes(config.tasks, step)) for step in range(steps)]
        found.append([(outcome, list(torch.autograd.grad(outcome.objective, meta))) for outcome in outcomes])
    return zip(*found, strict=True)


@pytest.mark.parametrize("method", ["imaml", "fomaml", "reptile", "maml"])
def test_the_meta_step(recorded, method):
    config = Config(method=method, width=4, inner_steps=1, cg_steps=1, tasks=2, queries=1, precision="float64")
    for (eager, eager_grads), (graph, graph_grads) in meta_steps(config, 2):
        torch.testing.assert_close(graph_grads, eager_grads, rtol=1e-7, atol=1e-9)
        for name in ("objective", "query_loss", "accuracy"):
            ours, theirs = (getattr(outcome, name).detach() for outcome in (graph, eager))
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    assert len(recorded) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    config = Config(width=16, tasks=8, device="cuda", safeguard=False, inner_steps=5, cg_steps=3)
    for (_, eager), (_, graph) in meta_steps(config, 3):
        for e, g in zip(eager, graph, strict=True):
            assert torch.linalg.vector_norm(e - g) <= 1e-4 * torch.linalg.vector_norm(e) + 1e-7
