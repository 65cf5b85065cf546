"""Two and three real processes over gloo against one, in float64."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import bilevel as bl
from bilevel.distributed import AllReduce, from_first, rank, reduce_gradients, shard, sharded, together, world_size
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

THREADS = """
from pathlib import Path

import torch
import torch.distributed as dist
import bilevel as bl

def threads():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]

bl.distributed.world_size()
dist.init_process_group("gloo")
param = torch.nn.Parameter(torch.ones(3))
param.grad = torch.ones(3)
torch.optim.Adam([param]).step()
assert bl.distributed.reduce_gradients([param], 1.0) == [2.0]
assert threads(), "this test looks for threads by another name"
dist.destroy_process_group()
assert not threads(), threads()
print("done", flush=True)
"""


def logistic():
    """30 training and 11 validation examples of 6 features, labels -1 and 1."""
    random = torch.Generator().manual_seed(0)
    features = torch.randn(41, 6, generator=random, dtype=torch.float64)
    truth = torch.randn(6, generator=random, dtype=torch.float64)
    labels = torch.sign(features @ truth + torch.randn(41, generator=random, dtype=torch.float64))
    return features, labels


def hypergradients(train: slice, val: slice, wrap=lambda objective: objective) -> dict[str, torch.Tensor]:
    """The gradient of the validation loss towards one log-penalty a feature, from these parts of the data."""
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
    return launch_program(PROGRAM.format(body=textwrap.dedent(body)), ranks, tmp_path)


def launch_program(program: str, ranks: int, tmp_path: Path) -> str:
    script = tmp_path / "program.py"
    script.write_text(program)
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


def test_many_ranks_are_one(tmp_path):
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

        # A captured hyperparameter would have the gradient of one rank's data alone.
        x = torch.ones(2, dtype=torch.float64, requires_grad=True)
        try:
            bl.argmin(sharded(lambda w: ((w - x) ** 2).sum()), torch.zeros(2, dtype=torch.float64))
        except ValueError as error:
            check("captured a tensor (2,) that requires grad" in str(error), error)
        else:
            check(False, "no error")
        bl.argmin(sharded(lambda w: ((w - x.detach()) ** 2).sum()), torch.zeros(2, dtype=torch.float64))
        """,
        3,
        tmp_path,
    )


def test_ranks_may_use_other_leaves(tmp_path):
    """A weight for each rank, a penalty of one, a rank whose loss is linear or zero: derivatives of both orders."""
    launch(
        """
        from torch.autograd import grad

        target = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        start = torch.zeros(2, dtype=torch.float64)

        def weighted(w, logs, r):
            return logs[r].exp() * (w - target[r]).square().sum() + 0.05 * w.square().sum()

        def penalised(w, logs, r):
            loss = (w - target[r]).square().sum()
            return loss + logs[0].exp() * w.square().sum() if r == 0 else loss

        def linear(w, logs, r):
            return (w * target[1]).sum() if r else ((w - logs[0]) ** 2).sum() + logs[1]

        def nothing(w, logs, r):
            return torch.zeros((), dtype=torch.float64) if r else ((w - logs[1]) ** 2).sum()

        def derivatives(objective, settings):
            logs = [torch.full((), 0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
            fit = bl.argmin(objective, start, logs, **settings)
            first = grad((fit.value**3).sum(), logs, create_graph=True, materialize_grads=True)
            second = grad(sum(first) + 0 * sum(logs), logs, materialize_grads=True)
            return torch.stack([fit.value[0].detach(), *(part.detach() for part in (*first, *second))])

        unrolled = {"solver": bl.GradientDescent(0.1, max_steps=10), "hypergrad": bl.Unroll()}
        func = {"solver": bl.NewtonCG(), "hypergrad": bl.Implicit(operator="func")}
        for part in (weighted, penalised, linear, nothing):
            for settings in ({}, unrolled, func):
                found = derivatives(sharded(lambda w, logs: part(w, logs, own)), settings)
                truth = derivatives(lambda w, logs: part(w, logs, 0) + part(w, logs, 1), settings)
                check(torch.allclose(found, truth, rtol=1e-9, atol=1e-9), part.__name__, settings, found, truth)
                check(all_reduce(torch.ones(2)).tolist() == [2.0, 2.0], "a reduction was left over")

        logs = [torch.full((), 0.3, dtype=torch.float64) for _ in range(2)]
        found = torch.func.jacfwd(sharded(lambda w, logs: nothing(w, logs, own)))(start, logs)
        check(torch.allclose(found, torch.full((2,), -0.6, dtype=torch.float64)), found)
        """,
        2,
        tmp_path,
    )


def test_operators_and_directions_are_those_of_all_data(tmp_path):
    """Gauss-Newton, written out and of a module; forward gradients, although each rank has another seed."""
    launch(
        """
        features, labels = logistic()
        module, start = torch.nn.Linear(6, 1, bias=False).double(), torch.zeros(1, 6, dtype=torch.float64)

        def hypergradient(part, wrap, method, solver=None):
            def outputs(w, x):
                return torch.func.functional_call(module, {"weight": w}, features[part]).squeeze(-1).exp()

            def misfit(outputs, x):
                return (outputs - labels[part]).square().sum() / 41

            def penalty(w, x):
                return len(labels[part]) / 41 * (x.exp() * w.square()).sum()

            x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
            inner = wrap(lambda w, x: misfit(outputs(w, x), x) + penalty(w, x))
            fit = bl.argmin(inner, start, x, solver=solver, hypergrad=method(outputs, misfit, penalty))
            return torch.autograd.grad(fit.value.square().sum(), x)[0]

        torch.manual_seed(own)
        steps = bl.GradientDescent(0.1, max_steps=5)
        every = slice(0, 41)
        for method, solver in (
            (lambda *parts: bl.Implicit(bl.CG(rtol=1e-13), operator=bl.GaussNewton(*parts)), None),
            (lambda *parts: bl.Implicit(bl.CG(rtol=1e-13), operator=bl.GaussNewton.of(module)), None),
            (lambda *parts: bl.ForwardGradient(6, "orthogonal"), steps),
        ):
            found = hypergradient(shard(41), sharded, method, solver)
            truth = hypergradient(every, lambda objective: objective, method, solver)
            check(torch.allclose(found, truth, rtol=1e-9, atol=1e-12), found, truth)
        one = hypergradient(shard(41), sharded, lambda *parts: bl.ForwardGradient(1), steps)
        check(torch.equal(one, from_first(one)))

        def losses(w, x):
            return (features[shard(41)] @ w[0] - labels[shard(41)]).square()

        def fisher(w, x):
            return losses(w, x).sum() / 41

        own_data = bl.EmpiricalFisher(losses)
        x = torch.zeros(6, dtype=torch.float64, requires_grad=True)
        inner = sharded(lambda w, x: fisher(w, x) + (x.exp() * w.square()).sum() / 2)
        for operator, word in (
            (own_data, "products of the operator"),
            (lambda problem, at: AllReduce(own_data(problem, at)), None),
        ):
            fit = bl.argmin(inner, start, x, hypergrad=bl.Implicit(bl.MINRES(max_steps=3), operator=operator))
            try:
                torch.autograd.grad(fit.value.sum(), x)
            except ValueError as error:
                check(word is not None and word in str(error), error)
            else:
                check(word is None, "no error")
        """,
        2,
        tmp_path,
    )


def test_ranks_that_differ_are_told(tmp_path):
    """Another start, another hyperparameter, an outer loss of one rank's data: an error on each, and they go on."""
    launch(
        """
        features, labels = logistic()
        part = shard(41)

        def inner(w, x):
            return (features[part] @ w - labels[part]).square().sum() / 41 + (x.exp() * w.square()).sum() / 3

        zero = torch.zeros(6, dtype=torch.float64)

        def expect(word, call):
            try:
                call()
            except (TypeError, ValueError) as error:
                check(word in str(error), error)
            else:
                check(False, "no error: " + word)
            check(all_reduce(torch.ones(1)).item() == 3, "a reduction was left over")

        def own_outer(**settings):
            x = zero.clone().requires_grad_()
            fit = bl.argmin(sharded(inner), zero, x, **settings)
            (features[part] @ fit.value - labels[part]).square().sum().backward()

        expect("different params", lambda: bl.argmin(sharded(inner), zero + own, zero))
        swapped = torch.tensor([1.0, 0, 0, 0, 0, 0] if own else [0, 1.0, 0, 0, 0, 0]).double().requires_grad_()
        expect("different params", lambda: bl.argmin(sharded(inner), zero, swapped))
        expect("different params", lambda: bl.root(sharded(lambda y: y - 1), zero + own))
        for settings in (
            {},
            {"hypergrad": bl.Implicit(bl.Cholesky())},
            {"solver": bl.GradientDescent(0.1, max_steps=4), "hypergrad": bl.Unroll()},
            {"solver": bl.Steps(bl.Adam(0.1), max_steps=4), "hypergrad": bl.Unroll(checkpoint="tree")},
        ):
            expect("different gradients of the outer loss", lambda: own_outer(**settings))
        # What only one rank evaluates, the others would not answer.
        quick = {"max_steps": 4}
        for settings in (
            {"solver": bl.GradientDescent(0.1, callback=bl.History() if own == 0 else None, **quick)},
            {"solver": bl.Steps(bl.Adam(0.1), callback=bl.ProgressBar() if own == 0 else None, **quick)},
            {"throw": "warn" if own == 0 else "ignore"},
            {"solver": bl.GradientDescent(0.1 + 0.1 * own, **quick)},
            {"solver": bl.Steps(bl.SGD(0.1 + 0.1 * own), **quick), "hypergrad": bl.Unroll()},
        ):
            expect("different settings of the solve", lambda: bl.argmin(sharded(inner), zero, zero, **settings))
        every = bl.Steps(bl.Adam(0.1), callback=lambda step: None, **quick)
        bl.argmin(sharded(inner), zero, zero, solver=every, throw="ignore")
        expect("different shapes", lambda: bl.argmin(sharded(lambda w: w.new_zeros(1 + own).squeeze()), zero))
        expect("returned a tuple", lambda: bl.argmin(sharded(lambda w: (w.sum(), 1)), zero))
        expect("returned a float", lambda: bl.argmin(sharded(lambda w: 1.0), zero))
        expect("different params", lambda: bl.argmin(sharded(inner), zero + 1 + own * 1e-15, zero))
        # Data may differ as args.
        x = zero.clone().requires_grad_()
        bl.argmin(sharded(lambda w, x, f: (f @ w - x[:1]).square().sum()), zero, x, features[part])

        def param(*shape, dtype):
            made = torch.zeros(shape, dtype=dtype, requires_grad=True)
            made.grad = torch.ones_like(made)
            return made

        odd = own == 2
        kinds = [param(2, dtype=torch.complex64 if odd else torch.float64)]
        expect("with other params", lambda: reduce_gradients(kinds))
        turned = [param(*((2, 3) if odd else (3, 2)), dtype=torch.float32)]
        expect("with other params", lambda: reduce_gradients(turned))

        group = dist.new_group([1, 2])
        if own:
            check(from_first({"rank": own}, group) == {"rank": 1})
        """,
        3,
        tmp_path,
    )


def test_an_objective_that_raises_leaves_no_rank_waiting(tmp_path):
    """At the start of a solve and in its midst, of one problem and of five, with `together` around it and without.

    A first loss may be of any shape and dtype: gloo's own errors, or an aborted process, were what the others had.
    """
    launch(
        """
        import contextlib, itertools, time
        from bilevel.distributed import RankError, together

        def solve(fails_from, batch=(), dtype=torch.float64):
            calls = 0

            def inner(w, x):
                nonlocal calls
                calls += 1
                if own == 1 and calls > fails_from:
                    raise ZeroDivisionError("bad data")
                return (((w - own) ** 4).sum(-1) + x * w.sum(-1)).to(dtype)

            x = torch.ones((), dtype=torch.float64)
            return bl.argmin(sharded(inner), torch.zeros(*batch, 3, dtype=torch.float64), x)

        begun = time.monotonic()
        for fails_from in (0, 4):
            for batch, dtype in itertools.product(((), (5,)), (torch.float64, torch.float32)):
                for block in (contextlib.nullcontext, together):
                    try:
                        with block():
                            solve(fails_from, batch, dtype)
                    except ZeroDivisionError:
                        check(own == 1)
                    except RankError as error:
                        check(own != 1 and "rank 0 stops as well" in str(error), error)
                    else:
                        check(False, "no error")
                    check(all_reduce(torch.ones(1)).item() == world_size())
        check(time.monotonic() - begun < 60)
        solve(10**9)
        """,
        2,
        tmp_path,
    )


def test_residuals_of_other_data_are_not_added():
    with pytest.raises(ValueError, match=r"argmin\(sharded\(cost\), init"):
        bl.least_squares(sharded(lambda w: w - 1), torch.zeros(2))


def gradients(part: slice) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Params of every kind, with their gradients on this part of eight examples, and the loss."""
    random = torch.Generator().manual_seed(0)
    data = torch.randn(8, 4, generator=random, dtype=torch.float64)

    def make(dtype, *shape, grad=True):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).requires_grad_(grad)

    params = {
        "half": make(torch.bfloat16, 4),
        "single": make(torch.float32, 4, 1),
        "double": make(torch.float64, 4),
        "complex": make(torch.complex64, 4),
        "sparse": make(torch.float32, 8, 2),
        "empty": make(torch.float32, 0),
        "scalar": make(torch.float64),
        "frozen": make(torch.float32, 4, grad=False),
        "unused": make(torch.float32, 4),
        "of the last example": make(torch.float64, 4),
    }
    used = [make(torch.float64, 4) for _ in range(8)]
    loss = torch.zeros((), dtype=torch.float64)
    for place in range(8)[part]:
        x = data[place]
        loss = loss + (params["half"].double() * x).sum() ** 2 + ((x.float() @ params["single"]) ** 2).sum()
        loss = loss + (params["double"] * x).exp().sum() * params["scalar"] + (used[place] * x).sum()
        loss = loss + (params["complex"] * x).abs().square().sum() + (params["frozen"] * x).sum()
        row = torch.nn.functional.embedding(torch.tensor([place]), params["sparse"], sparse=True)
        loss = loss + row.square().sum() + params["empty"].sum()
        if place == 7:
            loss = loss + (params["of the last example"] * x).sum()
    loss.backward()
    params |= {f"used {place}": param for place, param in enumerate(used)}
    return params, loss.detach()


def test_reduced_gradients_are_those_of_one_process(tmp_path):
    """Params that some ranks or none use, frozen ones, every dtype; None stays None, and AdamW does not decay it."""
    launch(
        """
        from tests.test_distributed import gradients
        params, loss = gradients(shard(8))
        expected, whole = gradients(slice(0, 8))
        (total,) = reduce_gradients(params.values(), loss)
        check(abs(total - whole.item()) <= 1e-12 * abs(whole.item()), total, whole)
        for name, param in expected.items():
            found = params[name].grad
            check((found is None) == (param.grad is None), name)
            if found is not None:
                truth = param.grad.to_dense()
                check(found.dtype == truth.dtype and found.shape == truth.shape, name, found.dtype)
                rounding = {torch.bfloat16: 2e-2, torch.float64: 1e-12}.get(found.dtype, 1e-5)
                check(torch.allclose(found, truth, rtol=rounding, atol=rounding), name, found, truth)
        check(expected["unused"].grad is None and expected["frozen"].grad is None)
        before = params["unused"].detach().clone()
        optimizer = torch.optim.AdamW([p for p in params.values() if p.requires_grad and not p.is_complex()], lr=0.1)
        optimizer.step()
        check(torch.equal(params["unused"], before))

        # Numbers keep their float64 beside gradients of float32, and go alone.
        single = torch.zeros(2, requires_grad=True)
        single.grad = torch.ones(2)
        tiny = 1 + 2.0**-40
        check(reduce_gradients([single], tiny) == [tiny * world_size()])
        check(reduce_gradients([], 1.0, 2.0) == [world_size(), 2.0 * world_size()])
        check(reduce_gradients([]) == [])
        check(reduce_gradients(iter([torch.zeros(2, requires_grad=True)])) == [])
        """,
        3,
        tmp_path,
    )


def test_a_rank_that_raises_leaves_no_other_waiting(tmp_path):
    """Errors that are caught, so that no process ends: each rank hears of them, and they go on together."""
    output = launch(
        """
        import time
        from bilevel.distributed import RankError, together

        def caught(act):
            begin = time.monotonic()
            try:
                act()
            except Exception as error:
                check(time.monotonic() - begin < 30)
                return error

        param = torch.zeros(2, requires_grad=True)

        def before():
            with together():
                if own == 1:
                    raise KeyError("of rank 1")
                param.grad = torch.ones(2)
                reduce_gradients([param], 1.0)

        def after():
            with together():
                reduce_gradients([param], 1.0)
                if own == 1:
                    raise KeyError("of rank 1")

        def inside():
            reduce_gradients([param], "no number" if own == 1 else 1.0)

        def inside_both():
            with together():
                inside()

        def twice():
            with together():
                raise KeyError(own)

        for act, kind in ((before, KeyError), (after, KeyError), (inside, ValueError), (inside_both, ValueError)):
            error = caught(act)
            if own == 1:
                check(type(error) is kind, act.__name__, error)
            else:
                check(type(error) is RankError and "Rank 1 raised" in str(error), act.__name__, error)
            check(reduce_gradients([param], 1.0) == [world_size()], act.__name__)  # they are in step again
        check(isinstance(caught(twice), KeyError))

        # Other params on one rank: told on all.
        others = [param] if own else [param, torch.zeros(3, requires_grad=True)]
        error = caught(lambda: reduce_gradients(others, 1.0))
        check(isinstance(error, ValueError) and "other params" in str(error), error)
        error = caught(lambda: reduce_gradients([param], *[1.0] * (own + 1)))
        check(isinstance(error, ValueError) and "count of numbers" in str(error), error)
        check(reduce_gradients([param], 1.0) == [world_size()])
        with together():
            pass
        print("together", flush=True)
        """,
        3,
        tmp_path,
    )
    assert output.count("together") == 3


def test_alone_there_is_nobody_to_tell():
    with together():
        pass
    with pytest.raises(KeyError), together():
        raise KeyError


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux shows them")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    """Those of gloo abort a process at Python's end. What optimizers import must not hold the group that has them."""
    launch_program(THREADS, 2, tmp_path)


def test_params_in_shards_are_refused():
    """Functional collectives keep a group's threads past its end, so this group is of one process and sends nothing."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        params = DTensor.from_local(torch.zeros(4), init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(NotImplementedError, match=r"DTensor[\s\S]*sharded"):
            bl.argmin(lambda w: (w**2).sum(), params)
    finally:
        dist.destroy_process_group()


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


def test_gradients_cost_one_reduction_and_numbers_one_in_float64(monkeypatch):
    """Beside the word that all are here: one flat copy, and one look of the host."""
    calls = []
    monkeypatch.setattr("bilevel.distributed.world_size", lambda group=None: 2)
    monkeypatch.setattr("bilevel.distributed._device", lambda group: torch.device("cpu"))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, **_: calls.append((t.dtype, t.numel())))
    params = [torch.zeros(size, requires_grad=True) for size in (3, 4)]
    for param in params:
        param.grad = torch.ones_like(param)
    assert reduce_gradients(params, 1.0, 2.0) == [1.0, 2.0]
    assert calls == [(torch.int64, 3), (torch.float64, 4), (torch.float32, 7)]


def test_numbers_alone_are_where_the_backend_has_its_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for backend, device in (("nccl", torch.device("cuda", 1)), ("gloo", torch.device("cpu"))):
        monkeypatch.setattr(torch.distributed, "get_backend", lambda group, backend=backend: backend)
        assert bl.distributed._device(None) == device
