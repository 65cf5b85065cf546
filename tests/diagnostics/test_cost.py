"""Times end with the device's work; memory is that above the start."""

import pytest
import torch

from bilevel.diagnostics import cost


def test_a_run_is_timed_until_the_device_has_ended_it(monkeypatch):
    calls = []
    monkeypatch.setattr(cost, "_on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(cost.time, "perf_counter", lambda: calls.append("clock") or float(calls.count("clock")))
    assert cost.median_seconds(lambda: calls.append("run"), 2, warm_up=True) == 1.0
    assert calls == ["run", *["wait", "clock", "run", "wait", "clock"] * 2]


def test_peak_memory_is_that_of_what_lived_together():
    def run():
        first = torch.zeros(2**18)  # 1 MiB
        del first
        return torch.zeros(2**18) + torch.zeros(2**18)

    assert cost.peak_mib(run) == pytest.approx(3.0, rel=0.01)
