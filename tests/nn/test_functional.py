from __future__ import annotations

import threading

import torch
from torch import nn

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
