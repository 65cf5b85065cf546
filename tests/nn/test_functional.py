from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import bilevel as bl
from bilevel.nn import functional_call, linear


def test_linear_is_torchs_for_one_and_for_many():
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 5, 4), torch.randn(3, 2, 4), torch.randn(3, 2)
    expected = torch.stack([nn.functional.linear(*task) for task in zip(x, w, b, strict=True)])
    torch.testing.assert_close(linear(x, w, b), expected)
    torch.testing.assert_close(linear(x[0], w[0], b[0]), expected[0])


class Slow(nn.Module):
    """Lets other threads in between two uses of its parameter."""

    def __init__(self, barrier):
        super().__init__()
        self.weight, self.barrier = nn.Parameter(torch.zeros(())), barrier
        self.inner = nn.BatchNorm1d(1, track_running_stats=False)

    def forward(self, x):
        before = self.weight
        self.barrier.wait(timeout=30)
        return x * before + self.weight + self.inner.weight


def test_threads_do_not_see_each_others_parameters():
    """With PyTorch's own, each would see the parameters of the one that came last."""
    module, found = Slow(threading.Barrier(4)), {}

    def work(value):
        params = {"weight": torch.tensor(value), "inner.weight": torch.tensor([10 * value])}
        found[value] = functional_call(module, params, (torch.ones(()),)).item()

    threads = [threading.Thread(target=work, args=(float(value),)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {float(value): 12.0 * value for value in range(4)}
    assert module.weight.item() == 0
    assert isinstance(module.weight, nn.Parameter)


class Shared(nn.Module):
    """One part under two names, and one parameter tied to another."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a
        self.c = nn.Linear(3, 3)
        self.c.weight = self.a.weight

    def forward(self, x):
        if x is None:
            raise KeyError("no data")
        return self.c(self.b(torch.tanh(self.a(x))))


@pytest.mark.parametrize("call", [functional_call, torch.func.functional_call], ids=["bilevel", "torch"])
@pytest.mark.parametrize("threaded", [False, True])
def test_shared_parts_are_left_as_they_were(call, threaded):
    torch.manual_seed(0)
    net, x = Shared(), torch.randn(8, 3)
    before = dict(net.named_parameters(remove_duplicate=False))
    values = {name: p.detach().clone() for name, p in net.named_parameters()}
    given = {name: 2 * value for name, value in values.items()}

    def objective(params):
        return call(net, params, (x,)).square().mean() + sum(p.square().sum() for p in params.values())

    def expected(p):
        out = nn.functional.linear(
            torch.tanh(nn.functional.linear(x, p["a.weight"], p["a.bias"])), p["a.weight"], p["a.bias"]
        )
        return nn.functional.linear(out, p["a.weight"], p["c.bias"])

    def work():
        if call is functional_call:
            torch.testing.assert_close(call(net, given, (x,)), expected(given))
            with pytest.raises(KeyError):
                call(net, given, (None,))
        bl.argmin(objective, given, solver=bl.GradientDescent(0.01, 3))
        with pytest.raises(KeyError):
            bl.argmin(lambda params: call(net, params, (None,)).sum(), given)

    errors = []

    def guarded():
        try:
            work()
        except BaseException as error:
            errors.append(error)

    if threaded:
        threads = [threading.Thread(target=guarded) for _ in range(2 if call is functional_call else 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
    else:
        work()
    after = dict(net.named_parameters(remove_duplicate=False))
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        assert parameter is before[name], name
    for name, value in values.items():
        assert torch.equal(after[name], value), name


class Parts(nn.Module):
    """Two layers, which it also has by another way than as attributes."""

    def __init__(self, way: str):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1)
        self.run = self._run
        if way == "list":
            self.run = nn.Identity()
            self.layers = [self.a, nn.Tanh(), (self.b,)]
        if way == "dict":
            self.layers = {"a": self.a, "b": self.b}
        if way == "hook":
            self.a.register_forward_hook(lambda module, args, out: out * self.b.bias)
        self.way = way

    def _run(self, x):
        return self.b(torch.tanh(self.a(x)))

    def forward(self, x):
        if self.way == "list":
            return self.layers[2][0](self.layers[1](self.layers[0](x)))
        if self.way == "dict":
            return self.layers["b"](torch.tanh(self.layers["a"](x)))
        return self.run(x)


def in_a_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("way", ["bound method", "list", "dict"])
def test_a_replica_has_all_of_its_parts(way):
    """Those in lists and dicts too, and methods that were stored: they would have the parameters of the module."""
    net, x = Parts(way), torch.ones(2, 3)
    given = {name: torch.randn_like(parameter) for name, parameter in net.named_parameters()}
    wanted = torch.func.functional_call(net, given, (x,))
    for _ in range(2):
        assert torch.equal(in_a_thread(lambda: functional_call(net, given, (x,))), wanted)


def test_a_module_that_is_reached_past_its_replica_is_told():
    net = Parts("hook")
    given = {name: torch.randn_like(parameter) for name, parameter in net.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"Parts uses its own 'b\.bias' in place of the given one"):
        in_a_thread(lambda: functional_call(net, given, (torch.ones(2, 3),)))
