"""The equilibrium application: bounds, gradients and resuming against truth, and the number of its README."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d, cross_entropy

import bilevel as bl
from applications.equilibrium import convergence, footprint, gradients
from applications.equilibrium.__main__ import story
from applications.equilibrium.convergence import iterations_needed
from applications.equilibrium.knobs import Config, create_network, parts_of, read
from applications.equilibrium.methods import METHODS, hidden
from applications.equilibrium.network import Convolutional, Dense
from applications.equilibrium.train import Fitting
from applications.frame.command import main
from applications.frame.run_folder import RunFolder
from tests.applications.refusals import NO_DATA, refusals
from tests.applications.runs import comparable


def dense(width=6, contraction=0.8, scale=3.0):
    torch.manual_seed(0)
    network = Dense(5, width, 3, contraction).double()
    network.weight.data *= scale  # beyond the bound, so that it acts
    return network, torch.randn(7, 5, dtype=torch.float64), torch.arange(7) % 3


def convolutional(width=2, contraction=0.8, scale=3.0):
    torch.manual_seed(0)
    network = Convolutional((1, 9, 6), width, 3, contraction).double()
    network.weight.data *= scale
    return network, torch.randn(4, 1, 9, 6, dtype=torch.float64), torch.arange(4) % 3


MAKERS = pytest.mark.parametrize("make", [dense, convolutional])


def as_matrix(network, weight, shape):
    size = int(np.prod(shape))
    basis = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    return network.mix(basis, weight).reshape(size, size).T


@MAKERS
def test_the_norm_is_an_upper_bound_of_that_of_the_dense_matrix(make):
    network, x, _ = make()
    shape = network.inject(x).shape[1:]
    true = torch.linalg.matrix_norm(as_matrix(network, network.weight, shape), 2)
    assert true <= network.norm() * (1 + 1e-12)
    assert network.norm() < 1.5 * true  # the borders of so small an image count
    bounded = torch.linalg.matrix_norm(as_matrix(network, network.bounded_weight(), shape), 2)
    assert bounded <= network.contraction * (1 + 1e-12)
    network.weight.data *= 0.01
    assert torch.equal(network.bounded_weight(), network.weight)  # within the bound nothing is changed


def test_the_norm_of_a_convolution_is_exact_on_the_torus():
    network, _, _ = convolutional()
    height, width = (side + 1 for side in network.size)
    size = network.weight.shape[0] * height * width
    basis = torch.eye(size, dtype=torch.float64).reshape(size, -1, height, width)
    wrapped = torch.nn.functional.pad(basis, (1, 1, 1, 1), mode="circular")
    true = torch.linalg.matrix_norm(conv2d(wrapped, network.weight).reshape(size, size), 2)
    assert network.norm().item() == pytest.approx(true.item(), rel=1e-10)


@MAKERS
def test_the_map_contracts(make):
    network, x, _ = make()
    injected, weight = network.inject(x), network.bounded_weight()
    a, b = torch.randn(2, *injected.shape, dtype=torch.float64)
    apart = (network.layer(a, weight, injected) - network.layer(b, weight, injected)).flatten(1).norm(dim=1)
    assert (apart <= network.contraction * (a - b).flatten(1).norm(dim=1)).all()


@MAKERS
def test_the_implicit_gradient_is_that_of_finite_differences(make):
    network, x, y = make()
    loss = gradients.Loss(network, x, y)
    parameters = list(loss.network.parameters())

    def value():
        with torch.no_grad():
            return loss.of(loss.solve(gradients.EXACT, bl.OneStep(1.0)).value).item()

    torch.manual_seed(1)
    direction = [torch.randn_like(parameter) for parameter in parameters]
    step, values = 1e-6, []
    for sign in (1, -2):  # there, and from there to the other side
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data += sign * step * d
        values.append(value())
    slope = (values[0] - values[1]) / (2 * step)
    expected = (loss.truth * torch.cat([d.flatten() for d in direction])).sum().item()
    assert slope == pytest.approx(expected, rel=1e-6)


@MAKERS
def test_errors_of_the_gradient_fall_but_for_the_one_step(make):
    curves = gradients.error_curves(*make())
    assert tuple(curves) == gradients.CURVES
    for name, errors in curves.items():
        if "one step" in name:
            assert errors[-1] > 0.02
            assert errors[-1] == pytest.approx(errors[-3], rel=1e-4)
        else:
            assert errors[-1] < 1e-3
    at = gradients.COUNTS.index(15)
    assert curves["implicit: k Anderson steps, k GMRES steps"][at] < 0.1 * curves["unrolled: k iterations"][at]


def test_adjoint_solvers_reach_their_tolerances():
    rows = {row["adjoint solver"]: row for row in gradients.adjoint_solvers(*dense(), repeats=1)}
    assert rows["one step"]["gradient error"] > 0.02
    for name, row in rows.items():
        if "rtol" in name:
            assert row["relative residual"] <= 1.01 * float(name.split("rtol ")[1])
            assert row["gradient error"] < 10 * float(name.split("rtol ")[1])


def test_methods_agree_where_they_should():
    network, x, y = dense()
    config = Config(unrolled=200, tol=1e-12, adjoint_rtol=1e-12, max_iterations=1000)
    grads = {}
    for method in METHODS:
        loss = cross_entropy(network.head(hidden(network, x, method, config).z), y)
        grads[method] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])
    torch.testing.assert_close(grads["implicit"], grads["unrolled"], rtol=1e-9, atol=1e-10)
    assert (grads["one step"] - grads["implicit"]).norm() > 0.02 * grads["implicit"].norm()
    assert torch.dot(grads["one step"], grads["implicit"]) > 0  # biased, and still downhill


def test_a_solver_without_a_tolerance_makes_its_steps():
    network, x, _ = dense()
    for solver in (bl.Anderson(max_steps=5), bl.Picard(max_steps=5)):
        found = hidden(network, x, "implicit", Config(), {"solver": solver})
        assert found.solution is not None
        assert found.solution.stats["num_steps"].max() == 5


def test_anderson_needs_fewer_iterations():
    network, x, _ = dense(width=30, contraction=0.97)
    symmetric = network.weight.data
    network.weight.data = symmetric @ symmetric.T  # a spectrum on a line, where acceleration pays most
    row = iterations_needed(network, x, 5)
    assert row["Anderson to 1e-06"] < 0.6 * row["Picard to 1e-06"]


def test_memory_is_flat_in_the_iterations():
    """Saved tensors of a step of the application, counted exactly; the README's run measures the process."""
    config = Config()
    examples = read(config)
    x, y = (tensor[:50] for tensor in parts_of(config, examples, 0).train)
    network = create_network(config, examples, 0)

    def saved(method, **settings):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            found = hidden(network, x, method, Config(**settings))
            cross_entropy(network.head(found.z), y)
        return sum(sizes)

    saved("implicit")  # the first solve is looked at
    assert saved("implicit", tol=1e-6) == saved("implicit", tol=1e-1)
    assert saved("unrolled", unrolled=100) > 8 * saved("unrolled", unrolled=10)


def test_memory_of_a_step_is_measured():
    """Here in this process; that it is one of its own and that the figures are right, the README's run tells."""
    config = Config(data="wine", width=8)
    assert all(0 <= footprint.measure(config, unrolled, 3) < 1000 for unrolled in (False, True))


SMALL = ("--data", "wine", "--width", "8", "--epochs", "2", "--runs", "1", "--batch-size", "40", "--depths", "2")


def command(*arguments):
    return main("equilibrium", [*arguments], Config, story)


def without_times(folder):
    tables = json.loads((folder / "results.json").read_text())["tables"]
    for rows in tables.values():
        for row in rows:
            row.pop("ms", None)
    return tables


def test_interrupted_and_resumed_is_bit_for_bit_the_whole_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        footprint, "curve", lambda config: [{"iterations": 2, "implicit, MiB": 1.0, "unrolled, MiB": 1.0}]
    )
    monkeypatch.setattr(gradients, "COUNTS", (1, 3))
    monkeypatch.setattr(convergence, "COUNTS", (1, 3))
    assert command(*SMALL, "--out", str(tmp_path / "whole")) == 0
    plain, steps = Fitting._batch, []

    def interrupt(self):
        steps.append(self.step)
        if len(steps) == 8:  # in the second training
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Fitting, "_batch", interrupt)
        assert command(*SMALL, "--out", str(tmp_path / "halves")) == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().err
    assert len(RunFolder(tmp_path / "halves").metrics()) == 8
    assert command("--resume", str(tmp_path / "halves")) == 0
    assert comparable(tmp_path / "halves") == comparable(tmp_path / "whole")
    assert without_times(tmp_path / "halves") == without_times(tmp_path / "whole")


def test_bad_files_end_with_2_and_write_nothing(bad_file, refused):
    refused(command, "--data", bad_file)


@refusals(
    *("--contraction 1.0", "--epochs 0", "--tol -1", "--history -1", "--adjoint-rtol 2"),
    (("--depths", "0"), "--depths"),
    (("--data", "wine", "--net", "convolutional"), "needs images"),
    (("--max-train", "3"), "cannot be split"),
    *NO_DATA,
)
def test_bad_knobs_end_with_2_and_write_nothing(arguments, message, refused):
    assert message in refused(command, *arguments)


def test_mnist_keeps_its_test_images_and_is_learned(mnist_root):
    config = Config(data="mnist", data_root=mnist_root, net="convolutional", width=4, max_train=200, epochs=4)
    examples = read(config)
    first, second = (parts_of(config, examples, seed) for seed in (0, 1))
    assert first.train[0].shape == (200, 1, 28, 28)
    assert first.test[1].shape == (10_000,)
    assert first.test[1][:5].tolist() == [7, 2, 1, 0, 4]  # as everywhere
    assert torch.equal(first.test[0], second.test[0])
    assert not torch.equal(first.train[1], second.train[1])

    training = Fitting(create_network(config, examples, 0), "implicit", first, config, 0)
    records = list(training.rows())
    assert records[-1]["validation_accuracy"] > 40  # 10 without learning
    assert records[-1]["loss"] < 0.95 * records[0]["loss"]  # eight steps


@pytest.mark.applications
def test_the_command_of_the_readme(readme_run):
    folder, tables, printed = readme_run("equilibrium")
    accuracy, memory, errors, adjoints, iterations = tables.values()
    test = {row["method"]: row["test %"] for row in accuracy}
    implicit = test[METHODS["implicit"]]
    assert implicit >= 95.8
    assert abs(implicit - test[METHODS["unrolled"]]) < 1.5
    assert implicit > test["logistic regression"] - 1
    flat, grows = ([row[f"{name}, MiB"] for row in memory] for name in ("implicit", "unrolled"))
    assert [row["iterations"] for row in memory] == [10, 30, 100, 300]
    assert flat[-1] < 1.5 * flat[0]
    assert grows[-1] > 10 * grows[0]
    assert grows[-1] > 3 * flat[-1]
    at_30 = {row["gradient"]: row["30"] for row in errors}
    assert at_30["implicit: k Anderson steps, k Neumann terms"] < 0.3 * at_30["unrolled: k iterations"] < 0.05
    assert at_30["one step: k Anderson steps"] > 0.1
    assert all(row["gradient error"] < 1e-4 for row in adjoints if "1e-6" in row["adjoint solver"])
    after = iterations[-1]
    assert after["Anderson to 1e-06"] < 0.7 * after["Picard to 1e-06"]
    assert "Test accuracy" in printed
    for name in ("learning.png", "memory.png", "gradients.png", "residuals.png"):
        assert (folder / name).stat().st_size > 10_000
