"""The table of `advise` beside all methods, on two of its problems in miniature."""

from __future__ import annotations

import math

import bilevel as bl
from applications.measurements.advice.__main__ import contestants, race, seconds_to
from applications.measurements.advice.problems import ridge


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
