from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import bilevel as bl
from bilevel import recording

T = 4


class Traced(recording.Graph):
    """A recording on a CPU by the rules of a CUDA graph: the operations alone, and any look at a value is an error."""

    def __init__(self, fn, inputs):
        self.inputs = list(inputs)
        fn(*inputs)  # the warm-up: an error of its own comes as it is
        try:
            self.program = make_fx(fn, tracing_mode="fake")(*inputs)
        except RuntimeError as error:
            raise recording.NotRecordedError(str(error)) from error
        self.program.graph.eliminate_dead_code()
        made_on_the_host = [node for node in self.program.graph.nodes if node.op == "get_attr"]
        if made_on_the_host:
            raise recording.NotRecordedError(f"copies from the host: {made_on_the_host}")
        self.outputs = [torch.empty_like(out) for out in self.program(*self.inputs)]

    def replay(self):
        for out, found in zip(self.outputs, self.program(*self.inputs), strict=True):
            out.copy_(found)


@pytest.fixture
def recorded(monkeypatch):
    """Programs on the CPU are recorded; the list has one entry for each recording."""
    made = []

    class Counted(Traced):
        def __init__(self, fn, inputs):
            super().__init__(fn, inputs)
            made.append(self)

    monkeypatch.setitem(recording.GRAPHS, "cpu", Counted)
    return made


def data(seed, tasks=T):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, 6, 3, dtype=torch.float64, generator=generator)
    return x, torch.randn(tasks, 6, dtype=torch.float64, generator=generator)


def start(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()}


def losses_of(solver=None, linear=None):
    """Losses of proximal least squares, by an inner solve."""
    solver = solver or bl.GradientDescent(0.1, max_steps=4, safeguard=True)
    hypergrad = bl.Implicit(linear or bl.CG(max_steps=3))

    def losses(params, x, y):
        def inner(u, x, y):
            return (x @ u - y).square().mean() + (u - params["w"]).square().sum()

        begin = torch.zeros(len(x), 3, dtype=x.dtype)
        fit = bl.argmin(torch.vmap(inner), begin, x, y, solver=solver, hypergrad=hypergrad)
        return fit.value.pow(4).sum(-1), fit

    return losses


def gradient(fn, params, *tensors, **sharing):
    mean, fits = bl.mean_over_tasks(fn, params, *tensors, **sharing)
    (grad,) = torch.autograd.grad(mean, params["w"])
    return mean, grad, bl.Solution.joined(fits)


@pytest.mark.parametrize("linear", [None, bl.Neumann(max_steps=6, alpha=0.1), bl.CG(rtol=1e-4, max_steps=3)])
def test_a_replay_gives_the_numbers_of_the_function(recorded, linear):
    fn = losses_of(linear=linear)
    captured = bl.capture(fn)
    for seed in range(3):  # other values, of parameters too: one recording
        params, tensors = start(seed), data(seed)
        mean, grad, fit = gradient(fn, params, *tensors)
        again, recorded_grad, recorded_fit = gradient(captured, params, *tensors)
        torch.testing.assert_close(again, mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(recorded_grad, grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(recorded_fit.value, fit.value)
        for ours, theirs in ((recorded_fit, fit), (recorded_fit.adjoint, fit.adjoint)):
            assert ours.stats.keys() == theirs.stats.keys()
            for name in theirs.stats:
                torch.testing.assert_close(ours.stats[name], theirs.stats[name], rtol=1e-9, atol=1e-12)
    assert len(recorded) == 1


def test_results_belong_to_the_caller(recorded):
    captured = bl.capture(lambda x: {"square": x.square(), "name": "kept", "nothing": None})
    one = captured(torch.tensor([2.0]))
    two = captured(torch.tensor([3.0]))
    assert one["square"].item() == 4
    assert two == {"square": torch.tensor([9.0]), "name": "kept", "nothing": None}


def test_other_shapes_settings_and_flags_are_other_recordings(recorded):
    captured = bl.capture(losses_of())
    for tasks in (4, 4, 6):
        gradient(captured, start(), *data(0, tasks))
    assert len(recorded) == 2
    gradient(captured, start(), *data(0, 6), chunk_size=2)  # three chunks of one shape, a sixth of the sum each
    assert len(recorded) == 3
    with torch.no_grad():
        bl.mean_over_tasks(captured, start(), *data(0, 4))
    assert len(recorded) == 4


def test_chunks_over_threads_share_a_recording(recorded):
    fn = losses_of()
    params, tensors = start(), data(1, 8)
    expected = gradient(fn, params, *tensors, chunk_size=2)
    found = gradient(bl.capture(fn), params, *tensors, chunk_size=2, num_threads=2)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-12)
    assert len(recorded) == 1


def test_map_and_losses_of_tasks(recorded):
    own = {"w": torch.randn(T, 3, dtype=torch.float64).requires_grad_()}

    def own_losses(params, x, y):
        residual = torch.einsum("tnd,td->tn", x, params["w"]) - y
        return residual.square().mean(-1), residual.detach()

    x, y = data(2)
    found, _ = bl.losses_of_tasks(bl.capture(own_losses), own, x, y)
    expected, _ = own_losses(own, x, y)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(losses.sum(), own["w"])[0] for losses in (found, expected)]
    torch.testing.assert_close(*grads)
    mapped = bl.map_tasks(bl.capture(lambda x: x.square().sum(-1)), x, chunk_size=2)
    torch.testing.assert_close(mapped, x.square().sum(-1))
    assert len(recorded) == 2


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (losses_of(solver=bl.LBFGS()), "value"),
        (losses_of(linear=bl.CG(rtol=1e-8)), "max_steps"),
        (losses_of(linear=bl.Neumann(rtol=1e-8, alpha=0.1)), "max_steps"),
        (losses_of(solver=bl.GradientDescent((0.1,) * T, max_steps=2)), "host"),
    ],
)
def test_what_cannot_be_recorded_is_told(recorded, fn, words):
    with pytest.raises(RuntimeError, match=f"could not be recorded.*{words}"):
        gradient(bl.capture(fn), start(), *data(0))


def test_a_device_without_graphs_calls_the_function():
    calls = []

    def fn(x):
        calls.append(x)
        return x.square()

    captured = bl.capture(fn)
    x = torch.ones(2, requires_grad=True)
    assert not captured(x).requires_grad
    captured(x)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore::bilevel.SolveWarning")
@pytest.mark.parametrize(
    "linear",
    [
        *(
            bl.CG(max_steps=3, preconditioner=bl.Jacobi(2)),
            bl.CG(max_steps=3, preconditioner=bl.NystromPreconditioner(2)),
        ),
        *(bl.Neumann(max_steps=6), bl.MINRES(max_steps=3), bl.NormalCG(max_steps=3), bl.GMRES(max_steps=3)),
        *(bl.BiCGSTAB(max_steps=3), bl.Nystrom(2), bl.Cholesky(), bl.LU(), bl.LeastNorm(), bl.Identity(0.1)),
    ],
    ids=repr,
)
def test_what_is_promised_can_be_recorded(recorded, linear):
    fn, params, tensors = losses_of(linear=linear), start(), data(0)
    expected, found = gradient(fn, params, *tensors), gradient(bl.capture(fn), params, *tensors)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-8, atol=1e-10)
    assert len(recorded) == 1


def test_constants_of_other_types_and_autocast_are_other_recordings(recorded):
    captured = bl.capture(lambda x, by: x * by if not isinstance(by, bool) else x - 1)
    x = torch.tensor([3.0])
    assert [captured(x, by).item() for by in (1, 1.0, True, 1)] == [3.0, 3.0, 2.0, 3.0]
    assert len(recorded) == 3
    product = bl.capture(torch.matmul)
    plain = product(torch.eye(2), torch.eye(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert product(torch.eye(2), torch.eye(2)).dtype is torch.bfloat16
    assert plain.dtype is torch.float32


def test_recordings_are_kept_up_to_a_number(recorded):
    captured = bl.capture(torch.square, max_recordings=2)
    for size in (1, 2, 1, 3, 1, 2):  # 2 was not used for longest when 3 came
        captured(torch.ones(size))
    assert [len(made.inputs[0]) for made in recorded] == [1, 2, 3, 2]
    with pytest.raises(ValueError, match="max_recordings is 0"):
        bl.capture(torch.square, max_recordings=0)


def test_captured_inside_captured_is_one_recording(recorded):
    inner = bl.capture(torch.square)
    outer = bl.capture(lambda x: inner(x) + inner(2 * x))
    assert outer(torch.tensor([3.0])).item() == 9 + 36
    assert outer(torch.tensor([1.0])).item() == 1 + 4
    # The warm-up runs it outside of a recording, and makes one of its own.
    assert len(recorded) == 2


def test_an_error_of_the_function_comes_as_it_is(recorded):
    def wrong(x):
        return x @ torch.ones(3)

    with pytest.raises(RuntimeError, match="size mismatch") as caught:
        bl.capture(wrong)(torch.ones(2, 2))
    assert "could not be recorded" not in str(caught.value)


def test_arguments_on_two_devices_are_refused(recorded):
    with pytest.raises(ValueError, match="arguments are on cpu and meta"):
        bl.capture(torch.add)(torch.ones(2), torch.ones(2, device="meta"))


def unrolled(method, noise=False):
    """Losses of proximal least squares by unrolled steps."""

    def losses(params, x, y):
        def inner(u):
            fit = torch.einsum("tni,ti->tn", x, u)
            fit = torch.nn.functional.dropout(fit, 0.5) if noise else fit
            return (fit - y).square().mean(-1) + (u - params["w"]).square().sum(-1)

        begin = torch.zeros(len(x), 3, dtype=x.dtype)
        fit = bl.argmin(inner, begin, solver=bl.GradientDescent(0.1, 6), hypergrad=method)
        return fit.value.pow(4).sum(-1), fit

    return losses


@pytest.mark.parametrize(
    "method", [bl.Unroll(checkpoint=True), bl.Unroll(checkpoint="tree"), bl.Unroll(mode="mixed")], ids=repr
)
def test_steps_that_are_made_again_are_recorded(recorded, method):
    losses, params = unrolled(method), start()
    captured = bl.capture(losses)
    for seed in (1, 2):
        found, plain = (gradient(fn, params, *data(seed))[1] for fn in (captured, losses))
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)
    assert len(recorded) == 1
    with pytest.raises(RuntimeError, match=r"could not be recorded.*draws random numbers"):
        gradient(bl.capture(unrolled(method, noise=True)), params, *data(1))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd, torch.vmap])
def test_under_a_transform_it_is_refused(transform, request):
    """On a CPU, too, where detached results would have derivatives of zero without a word."""
    fn = bl.capture(lambda x: (x**2).sum())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"called under torch\.func: its results are detached"):
            transform(fn)(torch.ones(3, 2))
        request.getfixturevalue("recorded")
    inside = bl.capture(lambda x: torch.func.grad(lambda y: (y**2).sum())(x))
    assert torch.equal(inside(torch.ones(3)), torch.full((3,), 2.0))


def test_a_captured_function_is_no_objective():
    fn = bl.capture(lambda y: (y**2).sum())
    for solve in (bl.argmin, bl.root, bl.fixed_point, bl.least_squares):
        with pytest.raises(TypeError, match="is a captured function, whose results are detached"):
            solve(fn, torch.ones(3))


def test_inference_mode_has_a_recording_of_its_own(recorded):
    fn, x = bl.capture(lambda x: x * 2), torch.ones(3)
    for _ in range(2):
        with torch.inference_mode():
            fn(x)
        with torch.no_grad():
            assert torch.equal(fn(x + 1), torch.full((3,), 4.0))
    assert len(recorded) == 2


def test_a_constant_that_cannot_be_hashed_is_named(recorded):
    with pytest.raises(TypeError, match="An argument holds ndarray, which is no constant of a recording"):
        bl.capture(lambda x, y: x)(torch.ones(3), np.ones(3))
