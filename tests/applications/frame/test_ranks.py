"""The process group of a launch; what two real processes do in it is tested with the few-shot application."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from applications.frame import ranks


@pytest.mark.parametrize(("cards", "backend"), [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_a_command_may_stay_on_the_cpu_of_a_machine_with_cards(monkeypatch, cards, backend):
    chosen, ended = [], []
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    devices = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(None, 1, 2)]))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: chosen.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append(True))
    with ranks.process_group():
        assert chosen == [backend]
    assert ended == [True]
    assert devices == ([1] if cards else [])


def test_without_a_launch_there_is_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with ranks.process_group():
        assert not dist.is_initialized()
