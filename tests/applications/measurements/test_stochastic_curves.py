"""The application that draws the methods side by side."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from applications.frame import figures
from applications.frame.mini_batches import Batches
from applications.frame.trace import trace
from applications.measurements.stochastic_curves.__main__ import main
from applications.measurements.stochastic_curves.methods import methods
from bilevel import Solution, SolveError
from bilevel.problems.finite_sums import Quadratics
from tests.applications.refusals import refusals
from tests.stochastic.cases import CASES


def test_every_method_has_a_curve_and_a_colour():
    names = set(methods(Quadratics(size=3, outer_size=3, num_samples=8), 2))
    assert names == set(CASES) == set(figures.COLOURS)


def test_a_short_run_writes_curves_and_picture(tmp_path, capsys):
    assert main(["--problem", "logistic", "--out", str(tmp_path / "new"), "--seconds", "0.02"]) == 0
    record = json.loads((tmp_path / "new" / "curves.json").read_text())
    assert set(record["curves"]) == set(CASES)
    for points in record["curves"].values():
        assert points[0] == {"step": 0, "passes": 0.0, "seconds": 0.0, "suboptimality": 1.0}
        assert points[-1]["step"] >= 1
        assert all(a["passes"] < b["passes"] for a, b in pairwise(points))
    assert (tmp_path / "new" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "SOBA" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["curves.json", "curves.png"]


@refusals(
    *("--seconds 0", "--seconds nan", "--batches 0"),
    (["--batches", "1000"], "--batches is 1000: there are 256"),
)
def test_bad_options_are_told_in_one_message(arguments, message, refused):
    assert message in refused(lambda *arguments: main([*arguments]), *arguments)


def test_an_out_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_full_pass_costs_a_full_pass():
    """SRBA on 4 batches: 3 whole passes first, then 6 evaluations of a quarter; the others by their records."""
    problem, batches = Quadratics(size=3, outer_size=3, num_samples=8), Batches(8, 4)
    found = methods(problem, 4)
    assert [batches.step(found["SRBA"]) for _ in range(2)] == [3.0, 1.5]
    assert batches.step(found["SOBA"]) == 0.75
    assert batches.step(found["SABA"]) == 0.75


def test_a_trace_counts_steps_passes_and_time_without_measurements():
    now = [0.0]

    def step() -> float:
        now[0] += 1.0
        return 0.5

    def measure() -> dict[str, float]:
        now[0] += 100.0  # the clock of a measurement does not count
        return {"value": now[0]}

    points = trace(step, measure, 10.0, growth=2.0, clock=lambda: now[0])
    assert [point["step"] for point in points] == [0, 1, 2, 4, 8, 10]
    assert [point["seconds"] for point in points] == [0, 1, 2, 4, 8, 10]
    assert [point["passes"] for point in points] == [0, 0.5, 1, 2, 4, 5]
    early = trace(step, measure, 10.0, finished=lambda point: point["step"] == 2, clock=lambda: now[0])
    assert early[-1]["step"] == 2


def test_a_trace_that_diverges_says_so():
    def step() -> float:
        raise SolveError("too long", Solution(None, {}))

    points = trace(step, dict, 10.0)
    assert points == [{"step": 0, "passes": 0.0, "seconds": 0.0, "stopped": "too long"}]


def test_labels_keep_their_order_and_distance():
    heights = figures.spread([0.0, 0.01, 0.5, 0.505, 0.51, 1.0], gap=0.05)
    assert heights == sorted(heights)
    assert all(b - a > 0.05 - 1e-12 for a, b in pairwise(heights))
    assert heights[3] == pytest.approx(0.505)
    assert 0 <= heights[0] <= heights[-1] <= 1
