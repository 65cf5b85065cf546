"""Our methods in benchopt's runner, on a small benchmark of the interface that benchmark_bilevel has; needs both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

jax = pytest.importorskip("jax")
pytest.importorskip("benchopt")

from applications.measurements.benchmark_bilevel import solver  # noqa: E402
from applications.measurements.benchmark_bilevel.bridge import Loss, to_jax, to_torch  # noqa: E402
from bilevel.stochastic import SOBA, Decay  # noqa: E402

OBJECTIVE = """
from benchopt import BaseObjective


class Objective(BaseObjective):
    name = "Small bilevel"

    def set_data(self, **data):
        self.data = data

    def get_objective(self):
        return {name: value for name, value in self.data.items() if name != "metrics"}

    def get_one_result(self):
        return dict(inner_var=self.data["inner_var0"], outer_var=self.data["outer_var0"])

    def evaluate_result(self, inner_var, outer_var):
        return self.data["metrics"](inner_var, outer_var)
"""

DATASET = """
import jax
import jax.numpy as jnp
from benchopt import BaseDataset

CENTRES = jax.random.normal(jax.random.PRNGKey(0), (24, 3))


def part(start, batch_size):
    return jax.lax.dynamic_slice(CENTRES, (start, 0), (batch_size, 3))


def f_inner(inner_var, outer_var, start=0, batch_size=1):
    return ((inner_var["w"] - outer_var - part(start, batch_size)) ** 2).mean()


def f_outer(inner_var, outer_var, start=0, batch_size=1):
    return ((inner_var["w"] - part(start, batch_size) - 1) ** 2).mean()


class Dataset(BaseDataset):
    name = "small"

    def get_data(self):
        return dict(
            f_inner=f_inner, f_outer=f_outer, n_inner_samples=24, n_outer_samples=24,
            inner_var0={"w": jnp.zeros(3)}, outer_var0=jnp.zeros(3),
            metrics=lambda inner_var, outer_var: dict(value=float(((outer_var - 1) ** 2).sum())),
        )
"""


@pytest.fixture
def double():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def inner(params, hparams, start=0, batch_size=1):
    rows = jax.lax.dynamic_slice(jax.numpy.arange(12.0).reshape(6, 2) / 12, (start, 0), (batch_size, 2))
    y = rows @ params["w"] + params["b"]
    return (jax.numpy.exp(hparams) * y**2).mean() + (params["w"] ** 4).sum() / 4


def same(params, hparams, start):
    rows = torch.arange(12.0, dtype=torch.float64).reshape(6, 2) / 12
    rows = rows if start is None else rows[start : start + 2]
    y = rows @ params["w"] + params["b"]
    return (hparams.exp() * y**2).mean() + (params["w"] ** 4).sum() / 4


@pytest.mark.parametrize("start", [None, 0, 2])
def test_a_loss_of_jax_has_two_derivatives(double, start):
    trees = to_torch(({"w": jax.numpy.array([0.3, -0.7]), "b": jax.numpy.array(0.2)}, jax.numpy.array(-0.4)))
    leaves = [trees[0]["w"], trees[0]["b"], trees[1]]
    loss = Loss(inner, batch_size=2, num_samples=6)
    values, grads, seconds = [], [], []
    for fn in (loss, same):
        value = fn(*trees, start)
        found = torch.autograd.grad(value, leaves, create_graph=True)
        values.append(value)
        grads.append(found)
        directions = [torch.full_like(leaf, 0.5) for leaf in leaves]
        seconds.append(torch.autograd.grad(found, leaves, directions))
    for one, other in zip([values[0], *grads[0], *seconds[0]], [values[1], *grads[1], *seconds[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert float(to_jax(leaves[1])) == leaves[1].item()


def test_a_method_makes_the_steps_that_it_makes_on_torch(double):
    start = {"w": jax.numpy.array([0.3, -0.7]), "b": jax.numpy.array(0.2)}, jax.numpy.array(-0.4)
    ends = []
    for loss in (Loss(inner, batch_size=2, num_samples=6), same):
        params, hparams = to_torch(start)
        method = SOBA(params, hparams, loss, loss, inner_lr=0.2, outer_lr=Decay(0.1))
        batches = solver.Slices((6, 6), (2, 2), seed=0)
        for _ in range(20):
            batches.step(method)
        ends.append(torch.cat([params["w"].detach(), params["b"].detach()[None], hparams.detach()[None]]))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-14)


def test_benchopt_runs_ours(tmp_path):
    bench = tmp_path / "bench"
    (bench / "datasets").mkdir(parents=True)
    (bench / "solvers").mkdir()
    (bench / "objective.py").write_text(OBJECTIVE)
    (bench / "datasets" / "small.py").write_text(DATASET)
    names = "[method=[SOBA,SABA,SPABA,VRBO,MA-SOBA],step_size=0.5,outer_ratio=2,batch_size=8,eval_freq=100]"
    command = [sys.executable, "-m", "benchopt", "run", str(bench), "-s", f"{solver.__file__}{names}"]
    command += ["-n", "3", "-r", "1", "--no-html", "--no-plot", "--output", "found"]
    root = Path(solver.__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pandas = pytest.importorskip("pandas")
    (file,) = (bench / "outputs").glob("found*.parquet")
    found = pandas.read_parquet(file)
    assert found.solver_name.nunique() == 5
    for name, rows in found.groupby("solver_name"):
        values = rows.sort_values("stop_val").objective_value.tolist()
        assert values[0] == 3.0
        assert values[-1] < (1e-6 if "SABA" in name or "SPABA" in name else 0.1), name
