"""500 generated problems: right to what is promised, or flagged; benign ones right and not flagged.

``python -m tests.generated 10000`` runs more, see ``docs/reliability.md``.
"""

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, given, settings

from tests.generated import CHOICES, Case, judge

CASES = st.builds(Case, **{name: st.sampled_from(choices) for name, choices in CHOICES.items()})


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
