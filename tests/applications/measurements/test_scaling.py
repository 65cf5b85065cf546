"""The curves of `measurements.scaling`: that the problems are what the axes say, and one small run of the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from applications.frame import memory
from applications.frame.command import main
from applications.measurements.scaling import __main__ as application
from applications.measurements.scaling import penalized
from applications.measurements.scaling.penalized import Size
from tests.applications.refusals import refusals

SMALL = "--tasks 1 --widths 16 --inner-steps 2 --penalties 1 --examples 60 --features 5 --repeats 1".split()  # noqa: SIM905


def test_equal_penalties_are_one_penalty():
    """Its derivative is the sum of theirs, up to what conjugate gradients leave: here they have steps enough."""
    size = Size(2, inner_steps=300)
    one, each, three = (penalized.problem(replace(size, penalties=count), cg_steps=400)() for count in (1, None, 3))
    assert each.shape == (size.num_params,)
    torch.testing.assert_close(each.sum(), one[0], rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(three.sum(), one[0], rtol=1e-2, atol=1e-6)


def test_shards_give_the_hypergradient_of_one_process():
    def norm(count: int) -> float:
        return application.launch("applications.measurements.scaling.sharded", [60, 5, 1, 100], count)["norm"]

    assert norm(2) == pytest.approx(norm(1), rel=1e-5)


def test_the_command(tmp_path, monkeypatch):
    """In this process: that a fresh one is measured, few-shot's benchmark tells."""
    monkeypatch.setattr(memory, "in_own_process", lambda function, *arguments: function(*arguments))
    arguments = [*SMALL, "--ranks", "1", "--out", str(tmp_path / "run")]
    assert main("scaling", arguments, application.Config, application.story) == 0
    tables = json.loads((tmp_path / "run" / "results.json").read_text())["tables"]
    assert len(tables) == 5
    assert all(row["seconds"] > 0 for title, rows in tables.items() for row in rows if title != "Ranks of one thread")
    assert (tmp_path / "run" / "scaling.png").read_bytes().startswith(b"\x89PNG")


@refusals(
    (["--tasks", "0"], "--tasks: give numbers of at least 1"),
    (["--penalties", "2000000000"], "--penalties"),
    (["--examples", "1"], "each rank needs one"),
)
def test_bad_input(tmp_path, capsys, arguments, message):
    assert main("scaling", [*arguments, "--out", str(tmp_path / "run")], application.Config, application.story) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
