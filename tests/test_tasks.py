from __future__ import annotations

import threading
import warnings
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
def test_adjoint_solves_of_chunks_are_told_at_the_users_line_and_once(num_threads):
    """Each chunk is differentiated by the library itself, in threads that have no line of the user's by then."""
    scales = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)

    def losses(shift, x):
        def inner(y):
            return ((y - x - shift).square() * scales).sum(-1)

        hypergrad = bl.Implicit(bl.CG(rtol=1e-6, max_steps=1))
        fit = bl.argmin(inner, torch.zeros_like(x), solver=bl.NewtonCG(), hypergrad=hypergrad)
        return fit.value.square().sum(-1), None

    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        bl.mean_over_tasks(losses, shift, x, chunk_size=2, num_threads=num_threads)[0].backward()
    (warning,) = caught
    assert "The adjoint solve" in str(warning.message)
    assert warning.filename == __file__


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


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("with_params", [False, True])
def test_data_that_require_grad_get_their_gradient(problem, num_threads, with_params):
    """Leaves, views, and what was computed, in a nested tree; with and without params that require grad."""
    params, x, y = problem
    if not with_params:
        params = {name: leaf.detach() for name, leaf in params.items()}
    x, raw, flags = x.requires_grad_(), y.clone().requires_grad_(), torch.arange(T)

    def losses(params, x, tree):
        return task_losses(params, x, tree["y"][0])[0] * (1 + tree["flags"]), None

    def tree():
        return {"y": [raw.exp()[:, :5]], "flags": flags}

    wanted = [x, raw, *([params["w"]] if with_params else [])]
    expected = torch.autograd.grad(losses(params, x, tree())[0].mean() * 3, wanted)
    mean, _ = bl.mean_over_tasks(losses, params, x, tree(), chunk_size=2, num_threads=num_threads)
    for found, true in zip(torch.autograd.grad(3 * mean, wanted), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-11)
    weights = torch.arange(1.0, T + 1, dtype=x.dtype)
    own = torch.randn(T, 3, dtype=x.dtype, requires_grad=with_params)

    def own_losses(u, x, y):
        return ((x @ u.unsqueeze(-1)).squeeze(-1) - y).square().mean(-1), None

    wanted[2:] = [own] if with_params else []
    expected = torch.autograd.grad((own_losses(own, x, raw.exp())[0] * weights).sum(), wanted)
    found, _ = bl.losses_of_tasks(own_losses, own, x, raw.exp(), chunk_size=2, num_threads=num_threads)
    for grad, true in zip(torch.autograd.grad((found * weights).sum(), wanted), expected, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-10, atol=1e-12)


def test_one_tensor_as_params_and_as_data(problem):
    _, x, _ = problem
    w = torch.randn(T, 3, dtype=x.dtype, requires_grad=True)

    def fn(p, x, w):
        return (x.sum(1) * w).sum(-1) * p.square().sum(), None

    (expected,) = torch.autograd.grad(fn(w, x, w)[0].mean(), w)
    mean, _ = bl.mean_over_tasks(fn, w, x, w, chunk_size=3)
    torch.testing.assert_close(torch.autograd.grad(mean, w)[0], expected)


def test_what_is_captured_is_refused_whatever_else_requires_grad(problem):
    """A tensor, what was computed from one, the parameters of a module, a param that fn reads past its argument."""
    params, x, _ = problem
    frozen = {name: leaf.detach() for name, leaf in params.items()}
    w, module = torch.ones(3, dtype=x.dtype, requires_grad=True), torch.nn.Linear(3, 1).double()
    fns = [
        lambda p, x: ((x @ w).sum(-1), None),
        lambda p, x: ((x @ (w * 2)[:3].exp()).sum(-1) + p["b"], None),
        lambda p, x: (module(x).sum((1, 2)), None),
        lambda p, x: (
            bl.argmin(lambda u: (u - w).square().sum(-1), torch.zeros(len(x), 3, dtype=x.dtype)).value[:, 0],
            0,
        ),
    ]
    for fn in fns:
        for given in (frozen, params):
            for tasks in (bl.mean_over_tasks, bl.losses_of_tasks):
                own = bl.stack(given, T) if tasks is bl.losses_of_tasks else given
                with pytest.raises(ValueError, match=r"requires grad and is not one of params or data"):
                    tasks(fn, own, x, chunk_size=2)
                with torch.no_grad():
                    assert not tasks(fn, own, x)[0].requires_grad
    with pytest.raises(ValueError, match=r"shape \(3,\) that requires grad"):
        bl.mean_over_tasks(lambda p, x: ((x @ params["w"]).sum(-1), None), params, x)


def test_forward_mode_is_refused(problem):
    _, x, _ = problem
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype))
        for fn, params in (
            (lambda p, x: ((x @ p).sum(-1), None), dual),
            (lambda p, x: ((x @ dual).sum(-1), None), x[0]),
        ):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                bl.mean_over_tasks(fn, params, x)


@pytest.mark.parametrize("method", [bl.Unroll(), bl.Truncated(2), bl.Unroll(checkpoint=True)], ids=repr)
def test_unrolled_steps_from_a_start_without_gradient(method):
    """The leaf that unrolled steps begin at is the library's own, and nothing that is lost."""
    rate, x = torch.tensor(0.1, dtype=torch.float64, requires_grad=True), torch.randn(T, 3, dtype=torch.float64)

    def fn(rate, x):
        solver = bl.Steps(bl.SGD(rate), max_steps=4)
        start = torch.zeros_like(x)
        fit = bl.argmin(lambda u, x: (u - x).square().sum(-1), start, x, solver=solver, hypergrad=method)
        return fit.value.sum(-1), None

    (expected,) = torch.autograd.grad(fn(rate, x)[0].mean(), rate)
    mean, _ = bl.mean_over_tasks(fn, rate, x, chunk_size=2)
    torch.testing.assert_close(torch.autograd.grad(mean, rate)[0], expected)
    assert not bl.mean_over_tasks(fn, rate.detach(), x, chunk_size=2)[0].requires_grad


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda losses: losses, r"one tensor of shape \(2,\): .* return \(losses, None\)"),
        (lambda losses: losses.sum(), r"one tensor of shape \(\): .* return \(losses, None\)"),
        (lambda losses: (losses, 1, 2), r"\(Tensor, int, int\): a pair is needed.* all else in one tree"),
        (lambda losses: {"losses": losses, "other": 1}, "a dict: a pair is needed"),
        (lambda losses: (None, losses), r"\(NoneType, Tensor\): a pair is needed"),
    ],
)
def test_what_is_no_pair_of_losses_and_something_else_is_told(returned, words):
    data = torch.ones(2, 3)
    with pytest.raises(ValueError, match=words):
        bl.mean_over_tasks(lambda p, d: returned((d - p).square().sum(-1)), torch.zeros(3, requires_grad=True), data)
    with pytest.raises(ValueError, match=words):
        bl.losses_of_tasks(lambda p, d: returned((d - p).square().sum(-1)), torch.zeros(2, 3), data)
