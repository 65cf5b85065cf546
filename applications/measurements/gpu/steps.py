"""Meta-steps on the device: captured, eager and task by task, in tasks a second, and beside the peers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from applications.few_shot import data
from applications.few_shot.config import PRESETS, Config
from applications.few_shot.methods import meta_step
from applications.few_shot.train import Session, create_learner, create_sampler, one_step, set_up_device
from applications.frame.figures import OURS
from applications.measurements.benchmarks.meta_step_task import FewShot
from applications.measurements.benchmarks.runner import contest
from applications.measurements.benchmarks.workloads import KINDS, NAMES

Rows = Iterator[dict[str, Any]]


def seconds_of(run: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """The median of a few runs after one that warms up, until the device has ended them."""
    run()
    found = []
    for _ in range(repeats):
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def processor_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """One run: the time of the processor on a CPU, else that until the device has ended it."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    _wait(device)
    begin = clock()
    run()
    _wait(device)
    return clock() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(device: torch.device) -> dict[str, float]:
    """Floating-point operations a second of a large matrix product, in float32 and in TF32."""
    return {name: _rate(device, tf32) for name, tf32 in (("float32", False), ("tf32", True))}


def _rate(device: torch.device, tf32: bool) -> float:
    size = 8192 if device.type == "cuda" else 512
    a = torch.randn(size, size, device=device)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    took = seconds_of(lambda: a @ a, device)
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * size**3 / took


def paper(device: torch.device, **changes: Any) -> Config:
    """The paper's 5-way 1-shot on glyphs; on a CPU a small one."""
    small: dict[str, Any] = {"width": 4, "tasks": 2, "inner_steps": 2} if device.type == "cpu" else {}
    config = replace(PRESETS["paper-omniglot-5way-1shot"], data="glyphs", **small)
    return replace(config, **{"device": device.type, **changes})


def gradient_of(config: Config) -> Callable[[], Tensor]:
    """The meta-gradient on fixed episodes, away from the start, where a head of zero has an easy problem."""
    device = set_up_device(config)
    classes = data.load(config.data, config.data_root, split=config.split).train
    learner = create_learner(config, classes, device)
    with torch.no_grad():
        for param in learner.meta.values():
            param += 0.05 * torch.randn(param.shape, generator=torch.Generator().manual_seed(0)).to(param)
    episodes = create_sampler(config, classes, "train", config.queries, device).episodes(config.tasks, 0)

    def gradient() -> Tensor:
        objective = meta_step(learner, episodes).objective
        return torch.cat([g.flatten() for g in torch.autograd.grad(objective, learner.parameters())])

    return gradient


def training_step_of(config: Config) -> Callable[[], Any]:
    """A whole step of training: episodes, meta-gradient, update, and what its row looks at."""
    session = Session.create(config)
    sampler = session.sampler("train")
    return lambda: one_step(session, sampler, config.lr)


def flops_of(run: Callable[[], Any]) -> float:
    """Floating-point operations of one run, as PyTorch counts those of matrix products and convolutions."""
    run()  # the first one on a card tries kernels out
    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def variants(
    device: torch.device, config: Config, made_of: Callable[[Config], Callable[[], Any]], known: dict[str, float]
) -> Rows:
    """One kind of step captured, eager and task by task: tasks a second, and the share of each `rates`."""
    work = flops_of(made_of(replace(config, chunk_size=config.tasks, threads=1)))
    one_by_one: dict[str, Any] = {"chunk_size": 1, "threads": 1}
    kinds = {"captured": {"capture": True}, "eager": {}, "task by task": one_by_one}
    for name, changes in kinds.items():
        took = seconds_of(made_of(replace(config, **changes)), device, 3)
        yield {"step": name, "seconds": took, **_speed(took, config.tasks, work, known)}


def _speed(took: float, tasks: int, work: float, known: dict[str, float]) -> dict[str, float]:
    shares = {f"share_of_{kind}": work / took / rate for kind, rate in known.items()}
    return {"tasks_per_second": tasks / took, **shares}


def captured(device: torch.device, seconds: float, root: Path | None = None) -> Rows:
    """The paper's step, captured against eager, and how far apart their gradients are."""
    config, known = paper(device), rates(device)
    yield {"rates_in_flops": known}
    yield from variants(device, config, gradient_of, known)
    eager, recorded = (gradient_of(replace(config, capture=capture))() for capture in (False, True))
    yield {"captured_apart_from_eager": float((recorded - eager).norm() / eager.norm())}


def workload_a(device: torch.device, seconds: float, root: Path | None = None) -> Rows:
    """The paper's network with max-pool."""
    return _contest("A", device, seconds, root, gradient_of)


def workload_c(device: torch.device, seconds: float, root: Path | None = None) -> Rows:
    """Two of its tasks, beside a library that unrolls the steps."""
    return _contest("C-10-steps", device, seconds, root, gradient_of)


def workload_f(device: torch.device, seconds: float, root: Path | None = None) -> Rows:
    """The whole step of training, as the application makes it by default, of 64 filters."""
    small: dict[str, Any] = {"width": 4, "tasks": 2} if device.type == "cpu" else {"width": 64}
    known, name = rates(device), "glyphs" if root is None else "omniglot"
    config = replace(Config(), **{"data": name, "data_root": root, "device": device.type, **small})
    yield {"rates_in_flops": known}
    yield from variants(device, config, training_step_of, known)
    yield from _contest("F", device, seconds, root, None)


def _contest(
    name: str,
    device: torch.device,
    seconds: float,
    root: Path | None,
    made_of: Callable[[Config], Callable[[], Any]] | None,
) -> Rows:
    """Ours by themselves, then with the peers, where answers are checked and who is missing is told."""
    begin, (kind, changes) = time.monotonic(), NAMES[name]
    small: dict[str, Any] = {"tasks": 2, "inner_steps": 1} if device.type == "cpu" else {}
    settings = {**changes, **small, "device": device.type, "root": None if root is None else str(root)}
    workload, known = KINDS[kind](**settings), rates(device)
    assert isinstance(workload, FewShot)
    yield {"rates_in_flops": known}
    if made_of is not None:
        yield from variants(device, workload.config, made_of, known)
    work = flops_of(gradient_of(replace(workload.config, chunk_size=workload.tasks, threads=1)))
    names = [one for one in workload.contestants() if device.type == "cuda" or one == OURS or not one.startswith(OURS)]
    left = seconds - (time.monotonic() - begin)
    for row in contest(kind, settings, names, 1, 1, max(40.0, left / len(names))):
        speed = _speed(row.median, workload.tasks, work, known) if row.seconds else {}
        yield {**row.to_json(), **speed}
