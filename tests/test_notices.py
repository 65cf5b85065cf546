from __future__ import annotations

import contextlib
import io
import sys
import threading
import warnings

import pytest
import torch

import bilevel as bl
from bilevel.notices import place_of_user, tell


def heard(action: str, told, times: int = 4) -> list[warnings.WarningMessage]:
    """What is shown of a function that is called a few times from one line, under a filter of Python's."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter(action)
        for index in range(times):
            told(index)
    return seen


def line() -> int:
    return sys._getframe(1).f_lineno


@pytest.mark.parametrize(
    ("action", "shown"), [("default", [0]), ("once", [0]), ("always", [0, 1, 2, 3]), ("ignore", [])]
)
def test_a_kind_is_shown_as_pythons_filters_say(action, shown):
    seen = heard(action, lambda index: tell(f"residual {index}", bl.SolveWarning, kind="failed"))
    assert [str(one.message) for one in seen] == [f"residual {index}" for index in shown]


def test_other_kinds_lines_and_texts_are_other_warnings():
    kinds = heard("default", lambda index: tell("same", bl.SolveWarning, kind=index))
    texts = heard("default", lambda index: tell(f"text {index}", bl.SolveWarning))
    assert (len(kinds), len(texts)) == (4, 4)

    def on_two_lines(index):
        tell(f"{index}", bl.SolveWarning, kind=0)
        tell(f"{index}", bl.SolveWarning, kind=0)

    assert len(heard("default", on_two_lines)) == 2


def test_a_filter_by_text_or_as_an_error_sees_the_text():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(bl.SolveWarning, match="residual 3"):
            tell("residual 3", bl.SolveWarning, kind="failed")
    with warnings.catch_warnings(record=True) as seen:
        warnings.filterwarnings("ignore", message="residual")
        tell("residual 3", bl.SolveWarning, kind="failed")
    assert not seen


def unsolved(x: torch.Tensor) -> bl.Solution:
    hypergrad = bl.Implicit(bl.CG(rtol=1e-6, max_steps=1))
    return bl.argmin(lambda y: ((y - x) ** 4).sum(), torch.zeros(3), solver=bl.LBFGS(max_steps=2), hypergrad=hypergrad)


def test_both_solves_point_at_the_lines_of_the_user():
    x, lines = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), []

    def step(index):
        fit = unsolved(x * (1 + index))
        loss = fit.value.sum()
        lines.append(line() + 1)
        loss.backward()

    seen = heard("default", step)
    assert all(one.filename == __file__ for one in seen)
    assert lines[0] in {one.lineno for one in seen if "adjoint" in str(one.message)}
    inner = [one for one in seen if str(one.message).startswith("The inner solve")]
    assert len(inner) == 1
    assert inner[0].lineno == unsolved.__code__.co_firstlineno + 2


def test_a_loop_is_told_once_for_each_kind_although_its_residuals_differ():
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)

    def step(index):
        unsolved(x * (1.3 + index)).value.square().sum().backward()

    seen = heard("default", step, times=20)
    assert len(seen) == 2
    assert len({str(one.message)[:60] for one in seen}) == len(seen)


def test_other_libraries_that_touch_the_filters_do_not_bring_it_back():
    def step(index):
        with warnings.catch_warnings():
            pass
        tell(f"residual {index}", bl.SolveWarning, kind="failed")

    assert len(heard("default", step)) == 1
    assert len(heard("default", step)) == 1  # other filters, to which it is new


def test_what_is_printed_shows_the_users_line():
    shown = io.StringIO()
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with contextlib.redirect_stderr(shown), warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda *args: shown.write(warnings.formatwarning(*args[:4]))
        unsolved(x)
    assert "solver=bl.LBFGS(max_steps=2)" in shown.getvalue()


def test_a_thread_without_a_line_of_the_users_takes_the_place_that_it_is_given():
    place = place_of_user()
    assert place is not None
    assert place.filename == __file__
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        thread = threading.Thread(target=tell, args=("here", bl.SolveWarning), kwargs={"place": place})
        thread.start()
        thread.join()
    assert (seen[0].filename, seen[0].lineno) == (place.filename, place.line)
