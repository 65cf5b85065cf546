from __future__ import annotations

import threading
import weakref

import pytest
import torch

import bilevel as bl

T = 7


@pytest.fixture
def problem():
    torch.manual_seed(0)
    params = {"w": torch.randn(3, dtype=torch.float64, requires_grad=True), "b": torch.randn((), dtype=torch.float64)}
    params["unused"] = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    return params, torch.randn(T, 5, 3, dtype=torch.float64), torch.randn(T, 5, dtype=torch.float64)


def task_losses(params, x, y):
    """Each by an inner solve, so that the gradient is a hypergradient."""

    def inner(u, x, y):
        return (x @ u - y).square().mean() + (u - params["w"]).square().sum()

    start = torch.zeros(len(x), 3, dtype=x.dtype)
    fit = bl.argmin(torch.vmap(inner), start, x, y, solver=bl.NewtonCG(gtol=1e-12))
    return fit.value.pow(4).sum(-1) + params["b"], fit


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("num_threads", [1, 2, 9])
def test_the_mean_and_its_gradient(problem, chunk_size, num_threads):
    params, *data = problem
    leaves = [params["w"], params["unused"]]
    losses, _ = task_losses(params, *data)
    expected = torch.autograd.grad(3 * losses.mean(), leaves[0])[0]
    mean, fits = bl.mean_over_tasks(task_losses, params, *data, chunk_size=chunk_size, num_threads=num_threads)
    found = torch.autograd.grad(3 * mean, leaves)
    torch.testing.assert_close(mean, losses.mean())
    torch.testing.assert_close(found[0], expected, rtol=1e-10, atol=1e-12)
    assert not found[1].any()
    assert not any(fit.value.requires_grad for fit in fits)  # nor is a chunk's graph kept
    joined = bl.Solution.joined(fits)
    assert joined.stats["num_steps"].shape == (T,)
    assert joined.adjoint.value.shape == (T, 3)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_what_is_kept_is_chosen_once_the_gradient_is_known(problem, num_threads):
    params, *data = problem
    values, seen = [], []

    def losses(params, x, y):
        found, fit = task_losses(params, x, y)
        values.append(weakref.ref(fit.value))
        return found, fit

    def keep(fit):
        seen.append(fit.adjoint.stats["num_steps"].shape)
        return fit.without_values()

    _, every = bl.mean_over_tasks(task_losses, params, *data, chunk_size=1)
    mean, fits = bl.mean_over_tasks(losses, params, *data, chunk_size=1, num_threads=num_threads, keep=keep)
    assert seen == [(1,)] * T
    assert not any(value() is not None for value in values)
    lean, full = bl.Solution.joined(fits), bl.Solution.joined(every)
    assert lean.value is None
    assert lean.adjoint.value is None
    for ours, theirs in ((lean, full), (lean.adjoint, full.adjoint)):
        assert ours.stats.keys() == theirs.stats.keys()
        for name in theirs.stats:
            assert torch.equal(ours.stats[name], theirs.stats[name])
    assert lean.result == full.result
    torch.autograd.grad(mean, params["w"])


def test_the_result_does_not_depend_on_the_threads(problem):
    params, *data = problem
    found = []
    for num_threads in (1, 2):
        mean, _ = bl.mean_over_tasks(task_losses, params, *data, chunk_size=1, num_threads=num_threads)
        found.append(torch.cat([mean.reshape(1), *torch.autograd.grad(mean, params["w"])]))
    assert torch.equal(*found)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_losses_of_parameters_of_their_own(problem, chunk_size):
    _, x, y = problem
    own, weights = torch.randn(T, 3, dtype=torch.float64, requires_grad=True), torch.arange(T, dtype=torch.float64)

    def losses(u, x, y):
        return ((x @ u.unsqueeze(-1)).squeeze(-1) - y).square().mean(-1), None

    (expected,) = torch.autograd.grad((losses(own, x, y)[0] * weights).sum(), own)
    found, _ = bl.losses_of_tasks(losses, own, x, y, chunk_size=chunk_size)
    torch.testing.assert_close(found, losses(own, x, y)[0])
    torch.testing.assert_close(torch.autograd.grad((found * weights).sum(), own)[0], expected)


def test_map_joins_trees_in_order_and_keeps_no_graph(problem):
    params, x, _ = problem
    seen = set()

    def fn(chunk):
        seen.add(threading.get_ident())
        return {"sum": (chunk @ params["w"]).sum(-1), "first": chunk[:, 0]}

    found = bl.map_tasks(fn, x, chunk_size=1, num_threads=2)
    torch.testing.assert_close(found["sum"], (x @ params["w"]).sum(-1).detach())
    assert torch.equal(found["first"], x[:, 0])
    assert not found["sum"].requires_grad
    assert threading.get_ident() not in seen


def test_each_chunk_drops_its_graph(problem):
    """Memory is that of a few tasks: when a chunk begins, the graphs of those before the last few are gone."""
    params, x, _ = problem
    graphs, alive = [], []

    def fn(params, x):
        alive.append(sum(graph() is not None for graph in graphs))
        product = x @ params["w"]
        graphs.append(weakref.ref(product))
        return product.square().mean(-1), None

    bl.mean_over_tasks(fn, params, x, chunk_size=1)
    assert alive == [0] * T


def test_threads_and_modes_are_those_of_the_caller(problem):
    _, x, _ = problem
    before = torch.get_num_threads()

    def fn(x):
        flags = [torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")]
        return torch.tensor([flags]).expand(len(x), 3)

    with torch.autocast("cpu", torch.bfloat16):
        found = bl.map_tasks(fn, x, chunk_size=1, num_threads=2)
    assert found.tolist() == [[1, 0, 1]] * T
    assert torch.get_num_threads() == before
    started = []
    thread = threading.Thread(target=lambda: started.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert started == [before]


def test_an_error_in_a_thread_is_the_callers(problem):
    params, *data = problem

    def fails(params, x, y):
        raise ZeroDivisionError("in a task")

    with pytest.raises(ZeroDivisionError, match="in a task"):
        bl.mean_over_tasks(fails, params, *data, chunk_size=1, num_threads=2)


def test_a_second_derivative_is_refused(problem):
    params, *data = problem
    mean, _ = bl.mean_over_tasks(task_losses, params, *data)
    with pytest.raises(NotImplementedError, match="all tasks at once"):
        torch.autograd.grad(mean, params["w"], create_graph=True)


def test_a_captured_hyperparameter_is_refused(problem):
    """Its gradient would be lost without a word."""
    params, x, _ = problem
    strength = torch.ones((), dtype=x.dtype, requires_grad=True)
    for captured in (strength, 2 * strength):
        with pytest.raises(ValueError, match=r"shape \(\) that requires grad and is not one of params"):
            bl.mean_over_tasks(lambda p, x, s=captured: ((x @ p["w"]).sum(-1) * s, None), params, x)


def test_parameters_that_only_some_chunks_use():
    own, x = torch.ones(4, requires_grad=True), torch.arange(4.0)

    def fn(u, x):
        return (u * x if x[0] > 1 else x), None

    losses, _ = bl.losses_of_tasks(fn, own, x, chunk_size=2)
    assert torch.autograd.grad(losses.sum(), own)[0].tolist() == [0, 0, 2, 3]


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ((torch.zeros(0, 2),), {}, "at least one"),
        ((torch.zeros(2, 2), torch.zeros(3)), {}, "at least one"),
        ((torch.zeros(()),), {}, "at least one"),
        ((torch.zeros(2),), {"chunk_size": 0}, "chunk_size is 0"),
        ((torch.zeros(2),), {"num_threads": -1}, "num_threads is -1"),
    ],
)
def test_bad_input(data, settings, message):
    with pytest.raises(ValueError, match=message):
        bl.map_tasks(lambda *chunk: chunk[0], *data, **settings)


def test_losses_of_a_wrong_shape():
    with pytest.raises(ValueError, match="one for each is needed"):
        bl.mean_over_tasks(lambda w, x: (w.sum(), None), torch.ones(2, requires_grad=True), torch.zeros(3, 2))
