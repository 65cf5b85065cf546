"""500 generated problems: right to what is promised, or flagged; benign ones right and not flagged.

``python -m tests.generated 10000`` runs more, see ``docs/reliability.md``.
"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.generated import CHOICES, Case, judge

CASES = st.builds(Case, **{name: st.sampled_from(choices) for name, choices in CHOICES.items()})


MENDED = (
    Case(
        "program", seed=146, tree="nested", condition=1e6, spread=1e3, loss=1e6, params=1e-3, data=1e-3,
        start="solution", outer="linear", throw="ignore",
    ),
    Case(
        "fixed point", torch.float32, 234, "dict", condition=1e8, loss=1e6, params=1e-3, data=1e3, outer="units",
        solver=1, method=7,
    ),
    Case("fixed point", seed=507, tasks=3, condition=100.0, loss=1e3, data=1e6, start=1e-6, outer="linear", solver=1),
    Case(
        "fixed point", torch.float32, 605, tasks=3, condition=100.0, loss=1e3, params=1e-3, data=1e3, solver=1, method=6
    ),
)  # fmt: skip
"""What larger runs found wrong without a word."""


@pytest.mark.parametrize("case", MENDED)
def test_what_was_wrong_is_right(case):
    verdict = judge(case)
    assert verdict is not None
    assert verdict.flag is None
    assert verdict.error <= verdict.allowed


def test_a_system_too_ill_conditioned_for_its_precision_is_told():
    """LU did not look at the condition of matrices that are not symmetric: 79 times the hypergradient off."""
    case = Case(
        "root", torch.float32, 393, "nested", 3, condition=1e6, loss=1e6, params=1e6, data=1e3, start=1e4,
        outer="units", solver=4, method=5, throw="ignore",
    )  # fmt: skip
    verdict = judge(case)
    assert verdict is not None
    assert verdict.flag == "adjoint INACCURATE"


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(case=CASES)
def test_right_or_flagged(case):
    verdict = judge(case)
    if verdict is not None:
        assert not verdict.wrong, verdict
        assert not verdict.false_alarm, verdict
