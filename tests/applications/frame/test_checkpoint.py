"""A checkpoint is what was saved, to the bit, or it is refused in words; then the one before it serves."""

from __future__ import annotations

import random

import pytest
import torch

from applications.frame.checkpoint import (
    Damaged,
    differences,
    from_bytes,
    not_finite,
    restore_optimizer,
    to_bytes,
)
from applications.frame.errors import UserError
from applications.frame.run_folder import RunFolder, before

CPU = torch.device("cpu")
STATE = {"training": {"w": torch.arange(30.0), "names": ["a"], "betas": (0.9, 0.99)}, "step": 3, "seconds": 0.5}
CONTENT = to_bytes(STATE)


def test_it_comes_back_to_the_bit_and_plain_torch_reads_it_too(tmp_path):
    state, hashed = from_bytes(CONTENT, CPU)
    assert hashed
    assert list(differences(state, STATE)) == []
    (tmp_path / "checkpoint.pt").write_bytes(CONTENT)
    assert torch.equal(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["training"]["w"], torch.arange(30.0))


@pytest.mark.parametrize("seed", range(150))
def test_no_flipped_bit_is_accepted(seed):
    place = random.Random(seed).randrange(8 * len(CONTENT))
    flipped = bytearray(CONTENT)
    flipped[place // 8] ^= 1 << place % 8
    with pytest.raises(Damaged):
        from_bytes(bytes(flipped), CPU)


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_is_accepted(seed):
    with pytest.raises(Damaged):
        from_bytes(CONTENT[: random.Random(seed).randrange(len(CONTENT))], CPU)


def saved(value, tmp_path):
    torch.save(value, tmp_path / "x.pt")
    return (tmp_path / "x.pt").read_bytes()


@pytest.mark.parametrize(
    ("value", "message"), [([1], "holds a list"), (torch.ones(2), "holds a Tensor"), ({"format": 9}, "later version")]
)
def test_something_else_is_refused_in_words(value, message, tmp_path):
    with pytest.raises(Damaged, match=message):
        from_bytes(saved(value, tmp_path), CPU)


def test_one_without_a_hash_is_of_an_earlier_version_unless_it_says_otherwise(tmp_path):
    assert from_bytes(saved(STATE, tmp_path), CPU)[1] is False
    with pytest.raises(Damaged, match="hash is missing"):
        from_bytes(saved({"format": 1, **STATE}, tmp_path), CPU)


@pytest.fixture
def folder(tmp_path):
    """With the checkpoints of steps 1, 2 and 3."""
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.save_checkpoint({**STATE, "step": step}, "state.pt")
    return folder


def test_the_last_two_are_kept_and_the_one_before_serves_and_is_told(folder, capsys):
    path = folder.path / "state.pt"
    assert {file.name for file in folder.path.iterdir()} == {"state.pt", "state.previous.pt"}
    assert folder.load_checkpoint(CPU, "state.pt")["step"] == 3
    assert capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:-5])
    assert folder.load_checkpoint(CPU, "state.pt")["step"] == 2
    told = capsys.readouterr().err
    assert "state.pt is damaged" in told
    assert "state.previous.pt" in told
    path.unlink()
    assert folder.load_checkpoint(CPU, "state.pt")["step"] == 2
    assert "is missing" in capsys.readouterr().err
    before(path).write_bytes(b"")
    with pytest.raises(UserError, match="it is empty"):
        folder.load_checkpoint(CPU, "state.pt")


def test_differences_are_exact():
    def state(**changes):
        return {"w": torch.ones(3), "n": 1, "list": [1.0, float("nan")], **changes}

    assert list(differences(state(), state())) == []
    for changed, told in (
        (state(w=torch.ones(1)), "w is float32 [3], not float32 [1]"),
        (state(w=torch.ones(3, dtype=torch.float64)), "w is float32 [3], not float64 [3]"),
        (state(w=torch.tensor([1.0, 1.0, 1.1])), "w has other values"),
        (state(n=1.0), "n is int, not float"),
        (state(n=2), "n is 1, not 2"),
        (state(list=[1.0]), "list has 2 entries, not 1"),
        (state(more=0), "more is missing"),
        ({"w": torch.ones(3), "n": 1}, "list is unknown"),
    ):
        assert told in list(differences(state(), changed))


def test_what_is_not_finite_is_named():
    state = {"a": {"w": torch.tensor([1.0, torch.inf])}, "b": [torch.ones(1)], "c": torch.tensor(3)}
    assert list(not_finite(state)) == ["a.w"]


def test_averages_of_another_shape_are_not_broadcast():
    param = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.Adam([param])
    param.sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    restore_optimizer(optimizer, state)
    state["state"][0]["exp_avg"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 of the optimizer is \[1\], not \[3\]"):
        restore_optimizer(optimizer, state)
