"""Two and three real processes over gloo against one, in float64."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import bilevel as bl
from bilevel.distributed import AllReduce, from_first, rank, reduce_gradients, shard, sharded, world_size
from bilevel.linalg.operator import Dense
from tests.conformance import randn, spd

ROOT = Path(__file__).parents[1]

PROGRAM = """
import torch
import torch.distributed as dist
import bilevel as bl
from bilevel.distributed import AllReduce, all_reduce, from_first, rank, reduce_gradients, shard, sharded, world_size
from bilevel.linalg.operator import Dense
from tests.test_distributed import hypergradients, logistic

alone = hypergradients(slice(0, 30), slice(0, 11))
dist.init_process_group("gloo")
own = rank()

def check(condition, *what):
    assert condition, (own, *what)

{body}
dist.barrier()
dist.destroy_process_group()  # else its threads may abort the process at its end
print(f"done {{own}}", flush=True)
"""


def logistic():
    """30 training and 11 validation examples of 6 features, labels -1 and 1."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(41, 6, generator=random, dtype=torch.float64)
    truth = torch.randn(6, generator=random, dtype=torch.float64)
    labels = torch.sign(features @ truth + torch.randn(41, generator=random, dtype=torch.float64))
    return features, labels


def hypergradients(train: slice, val: slice, wrap=lambda objective: objective) -> dict[str, torch.Tensor]:
    """Of the validation loss towards one log-penalty a feature, from these parts of the data."""
    features, labels = logistic()
    x_train, y_train, x_val, y_val = features[:30][train], labels[:30][train], features[30:][val], labels[30:][val]

    def inner(w, x):
        share = len(y_train) / 30  # of the penalty: the parts sum to the whole
        fit = torch.nn.functional.softplus(-y_train * (x_train @ w)).sum() / 30
        return fit + share * (x.exp() * w.square()).sum() / 2

    def outer(w, x):
        return torch.nn.functional.softplus(-y_val * (x_val @ w)).sum() / 11

    inner, outer, start = wrap(inner), wrap(outer), torch.zeros(6, dtype=torch.float64)
    found = {}
    for name, solver, hypergrad in (
        ("implicit", bl.NewtonCG(gtol=1e-12), bl.Implicit(bl.CG(rtol=1e-13))),
        ("L-BFGS, MINRES", bl.LBFGS(gtol=1e-10), bl.Implicit(bl.MINRES(rtol=1e-13))),
        ("unrolled", bl.GradientDescent(0.5, max_steps=20), bl.Unroll()),
    ):
        x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        fit = bl.argmin(inner, start, x, solver=solver, hypergrad=hypergrad)
        (found[name],) = torch.autograd.grad(outer(fit.value, x), x, create_graph=True)
        if name == "implicit":
            (found["second derivative"],) = torch.autograd.grad(found[name].square().sum(), x)
    return {name: gradient.detach() for name, gradient in found.items()}


def launch(body: str, ranks: int, tmp_path: Path) -> str:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.format(body=textwrap.dedent(body)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(script)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done") == ranks
    return done.stdout


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_many_ranks_are_one(tmp_path, ranks):
    """Hypergradients, their second derivative, Hessian products and gradients, all to 1e-10 and better."""
    launch(
        """
        found = hypergradients(shard(30), shard(11), sharded)
        for name, gradient in alone.items():
            error = ((found[name] - gradient).norm() / gradient.norm()).item()
            check(error < 1e-10, name, error)

        # One operator over data in shards serves any linear solver.
        features, _ = logistic()
        part = features[:30][shard(30)]
        whole = features[:30].T @ features[:30] + torch.eye(6, dtype=torch.float64)
        local = part.T @ part + torch.eye(6, dtype=torch.float64) / world_size()
        b = torch.arange(1.0, 7.0, dtype=torch.float64)
        solved = bl.CG(rtol=1e-13).solve(AllReduce(Dense(local)), b)
        check(torch.allclose(solved.value, torch.linalg.solve(whole, b), rtol=1e-10, atol=0))
        skew = AllReduce(Dense(torch.full((2, 2), float(own + 1)).triu().double(), symmetric=False))
        total = world_size() * (world_size() + 1) / 2
        check(skew.rmatvec(torch.tensor([1.0, 0.0]).double()).tolist() == [total, total])

        # The flat all-reduce: sums, a missing gradient, numbers beside them.
        params = [torch.zeros(2, 3, requires_grad=True), torch.zeros(4, requires_grad=True)]
        params[0].grad = torch.full((2, 3), own + 1.0)
        if own == 1:
            params[1].grad = torch.ones(4)
        sums = reduce_gradients(params, 1.0, float(own == 0))
        check(sums == [float(world_size()), 1.0], sums)
        check((params[0].grad == total).all() and (params[1].grad == 1).all())
        check(params[0].grad.dtype == torch.float32)
        check(from_first({"rank": own}) == {"rank": 0})
        """,
        ranks,
        tmp_path,
    )


def test_captured_hyperparameters_and_sharded_params_are_refused(tmp_path):
    launch(
        """
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        loss = sharded(lambda w: ((w - x) ** 2).sum())
        try:
            bl.argmin(loss, torch.zeros(2, dtype=torch.float64))
        except ValueError as error:
            check("captured a tensor (2,) that requires grad" in str(error), error)
        else:
            check(False, "no error")
        bl.argmin(sharded(lambda w: ((w - x.detach()) ** 2).sum()), torch.zeros(2, dtype=torch.float64))

        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor
        params = distribute_tensor(torch.zeros(4), init_device_mesh("cpu", (2,)), [Shard(0)])
        try:
            bl.argmin(lambda w: (w ** 2).sum(), params)
        except NotImplementedError as error:
            check("DTensor" in str(error) and "sharded" in str(error))
        else:
            check(False, "no error")
        """,
        2,
        tmp_path,
    )


def test_one_process_needs_no_group():
    assert (world_size(), rank(), shard(7)) == (1, 0, slice(0, 7))
    objective = sharded(lambda w, x: (w * x).sum())
    assert objective(torch.ones(2), torch.ones(2)) == 2
    matrix, v = spd(3), randn(3)
    torch.testing.assert_close(AllReduce(Dense(matrix)) @ v, matrix @ v)
    param = torch.zeros(2, requires_grad=True)
    param.grad = torch.ones(2)
    assert reduce_gradients([param], 3.0) == [3.0]
    assert from_first("value") == "value"


def test_shards_are_even_and_cover_everything(monkeypatch):
    monkeypatch.setattr("bilevel.distributed.world_size", lambda group=None: 4)
    parts = []
    for own in range(4):
        monkeypatch.setattr("bilevel.distributed.rank", lambda group=None, own=own: own)
        parts.append(range(11)[shard(11)])
    assert [len(part) for part in parts] == [3, 3, 3, 2]
    assert [i for part in parts for i in part] == list(range(11))
    with pytest.raises(ValueError, match="3 things cannot be shared out among 4 ranks"):
        shard(3)
