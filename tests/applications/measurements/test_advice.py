"""The table of `advise` beside all methods, on two of its problems in miniature."""

from __future__ import annotations

import math

import bilevel as bl
from applications.measurements.advice.__main__ import Config, check, contestants, main, race, seconds_to
from applications.measurements.advice.problems import PROBLEMS, ridge


def test_the_race_moves_and_its_clock_stops_at_the_target():
    problem = ridge()
    field = contestants(problem)
    assert {"advised", "defaults", "Adaptive", "implicit, CG"} <= set(field)
    curve = race(problem, field["Adaptive"](), lr=0.3, limit=0.5)
    seconds, losses = zip(*curve, strict=True)
    assert min(losses) < losses[0]
    assert seconds_to(curve, losses[0]) == seconds[0]
    assert seconds_to(curve, -math.inf) == math.inf
    assert isinstance(field["advised"](), bl.Adaptive | dict)


def test_by_default_each_problem_has_a_limit_of_its_own(capsys):
    check(Config())
    assert all(limit > 0 for _, _, limit in PROBLEMS.values())
    assert main(["--limit", "0"]) == 2
    assert "--limit is 0.0: a positive number is needed" in capsys.readouterr().err
