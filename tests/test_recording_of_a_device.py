"""A CUDA graph by the calls that it makes, and what a recording keeps of the device and its kernels."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

import bilevel as bl
from bilevel import recording
from bilevel.nn import kernels
from tests import test_recording
from tests.test_recording import data, gradient, start

recorded = test_recording.recorded  # the fixture


class Driver:
    """The streams, events and graphs of CUDA by name only: what is asked of them, in order."""

    def __init__(self, patch):
        self.calls, self.stream, self.modes = [], "the user's", []
        for name in ("Stream", "Event", "CUDAGraph"):
            patch.setattr(torch.cuda, name, lambda name=name: self.thing(name))
        patch.setattr(torch.cuda, "current_stream", lambda *_: self.thing(self.stream))
        patch.setattr(torch.cuda, "stream", self.entered)
        patch.setattr(torch.cuda, "graph", self.capture)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream.name))

    def thing(self, name):
        """Anything with a name, whose methods are written down."""
        asked = ("wait_stream", "wait_event", "record", "replay")
        methods = {
            ask: lambda *other, ask=ask: self.calls.append((name, ask, *(o.name for o in other))) for ask in asked
        }
        return SimpleNamespace(name=name, **methods)

    @contextlib.contextmanager
    def entered(self, stream):
        before, self.stream = self.stream, stream.name
        yield
        self.stream = before

    @contextlib.contextmanager
    def capture(self, graph, capture_error_mode="global"):
        """One that fails leaves its stream the current one, as PyTorch's does."""
        self.modes.append(capture_error_mode)
        before, self.stream = self.stream, "of the capture"
        yield
        self.stream = before


def test_a_cuda_graph_is_of_its_thread_and_its_replays_wait_for_each_other(monkeypatch):
    driver, streams = Driver(monkeypatch), []
    graph = recording.CudaGraph(lambda x: streams.append(driver.stream) or [x], [torch.ones(1)])
    assert streams == ["Stream"] * recording.WARM_UP + ["of the capture"]
    assert driver.modes == ["thread_local"]
    assert driver.stream == "the user's"
    driver.calls.clear()
    driver.stream = "another one"
    graph.enter()
    graph.replay()
    graph.leave()
    assert driver.calls == [("another one", "wait_event", "Event"), ("CUDAGraph", "replay"), ("Event", "record")]


def test_a_capture_that_fails_gives_the_stream_back(monkeypatch):
    driver = Driver(monkeypatch)

    def looks(x):
        if driver.stream == "of the capture":
            raise RuntimeError("operation not permitted when stream is capturing")
        return [x]

    with pytest.raises(recording.NotRecordedError, match="not permitted"):
        recording.CudaGraph(looks, [torch.ones(1)])
    assert driver.stream == "the user's"


def test_the_device_of_the_arguments_is_the_current_one(recorded, monkeypatch):
    entered = []

    @contextlib.contextmanager
    def on(device):
        entered.append(device)
        yield
        entered.append("left")

    monkeypatch.setattr(recording, "_on", on)
    bl.capture(lambda x: entered.append("runs") or x)(torch.ones(1))
    assert entered[0] == torch.device("cpu")
    assert set(entered[1:-1]) == {"runs"}
    assert entered[-1] == "left"


def test_what_chooses_the_kernels_makes_other_recordings(recorded, monkeypatch):
    captured = bl.capture(torch.square)
    for allowed in (True, False, True):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        captured(torch.ones(1))
    assert len(recorded) == 2
    torch.use_deterministic_algorithms(True)
    try:
        captured(torch.ones(1))
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(recorded) == 3


def test_a_learned_step_size_can_be_recorded(recorded):
    """`Steps` whose rates are tensors that ``fn`` makes of its arguments."""

    def losses(params, x, y):
        def inner(u, x, y):
            return (x @ u - y).square().mean()

        solver = bl.Steps(bl.SGD(params["w"][0].exp() / 20, momentum=params["w"][1].sigmoid() / 2), max_steps=3)
        fit = bl.argmin(torch.vmap(inner), torch.zeros_like(x[:, 0]), x, y, solver=solver, hypergrad=bl.Unroll())
        return fit.value.pow(4).sum(-1), fit

    captured = bl.capture(losses)
    for seed in range(2):
        params, tensors = start(seed), data(seed)
        expected, found = gradient(losses, params, *tensors), gradient(captured, params, *tensors)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-9, atol=1e-12)
    assert len(recorded) == 1


def test_a_shape_that_is_first_seen_in_a_recording_is_measured_before_it(recorded, monkeypatch):
    """By the runs that warm up; inside of the recording nothing can be measured."""
    monkeypatch.setattr(kernels, "MEASURED", {"cpu"})
    monkeypatch.setattr(kernels, "_fastest", {})
    bl.capture(bl.nn.conv2d)(torch.ones(2, 1, 1, 5, 5), torch.ones(2, 1, 1, 3, 3))
    assert [key[0] for key in kernels._fastest] == ["output"]
