"""The memory of each way to train, in a process that does nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from applications.domain_weights.knobs import Config, training
from applications.frame import memory
from applications.frame.device import select_device

STEPS = 3
"""Steps of each training that is measured."""


def peak_memory(knobs: Config, hypergrads: Mapping[str, Any]) -> dict[str, float]:
    """By name, the peak above what the process held before the training, MiB; a hypergradient is taken at each step."""
    with memory.environment(memory.RETURN_FREED):
        return memory.in_own_process(_peaks, knobs, dict(hypergrads))


def _peaks(knobs: Config, hypergrads: dict[str, Any]) -> dict[str, float]:
    if knobs.threads is not None:
        torch.set_num_threads(knobs.threads)
    corpus = knobs.read()

    def train(hypergrad: Any) -> None:
        begun = training(knobs, corpus, STEPS, torch.zeros(len(corpus.domains)), hypergrad, warm_up=0, every=1)
        for _ in begun.rows():
            pass

    def peak(hypergrad: Any) -> float:
        train(hypergrad)  # what torch sets up at its first use stays
        return memory.peak_of(select_device(knobs.device), lambda: train(hypergrad))[1]

    return {name: peak(hypergrad) for name, hypergrad in hypergrads.items()}
