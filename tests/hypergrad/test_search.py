"""What a solve has to tell, when, and by how many looks; and what counts as the same objective."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

import bilevel as bl
from bilevel.hypergrad.search import Later, Search
from bilevel.hypergrad.seen import ROUNDING, Seen
from bilevel.notices import Place
from bilevel.problem import Problem
from bilevel.solution import Result, Solution

EPS = torch.finfo(torch.float64).eps
PLACE = Place("user.py", 7, "user", {})


def found(*results):
    codes = torch.tensor([int(result) for result in results], dtype=torch.int8)
    ones = torch.ones(len(results), dtype=torch.float64)
    return Solution(torch.zeros(len(results), 2).double(), {"result": codes, "residual_norm": ones, "num_steps": ones})


class TestLater:
    @pytest.mark.parametrize(("flags", "other"), [*itertools.product(range(4), [None, False, True])])
    def test_one_look_for_both(self, flags, other):
        told, codes = [], torch.tensor([int(Result.CONVERGED)], dtype=torch.int8)

        def tell(seen):
            told.append(seen)
            return found(Result.STAGNATED)

        later = Later(torch.tensor(flags), tell, PLACE)
        later.codes = codes
        assert later.look(None if other is None else torch.tensor(other)) is bool(other)
        assert told == ([flags] if flags else [])
        assert codes.tolist() == [int(Result.STAGNATED if flags else Result.CONVERGED)]
        del later
        assert len(told) <= 1  # it is told once

    def test_of_a_graph_that_is_dropped_it_is_told_then(self):
        def tell(seen):
            raise bl.SolveError("no luck", found(Result.STAGNATED))

        later = Later(torch.tensor(2), tell, PLACE)
        with pytest.warns(bl.SolveWarning, match="no luck"):
            del later

    @pytest.mark.parametrize(("flags", "place"), [(0, PLACE), (2, None)])
    def test_there_may_be_nothing_to_tell(self, flags, place):
        told = []
        later = Later(torch.tensor(flags), told.append, place)
        del later
        assert not told

    @pytest.mark.parametrize("name", ["recording", "sys.is_finalizing"])
    def test_nothing_is_looked_at_in_a_recording_or_at_the_end_of_the_process(self, name, monkeypatch):
        told = []
        later = Later(torch.tensor(2), told.append, PLACE)
        monkeypatch.setattr(f"bilevel.hypergrad.search.{name}", lambda: True)
        del later
        assert not told


def searched(results, throw, **settings):
    """A search on a bowl whose solver ends with these results, and what it heard."""
    problem = Problem(lambda y: (y - 1).square().sum(-1), torch.zeros(len(results), 2).double(), ())
    closer = []

    def measure(solution):
        return solution.with_stats(residual_norm=problem.evaluate(solution.value).g.norm(dim=-1))

    def look(problem, solution):
        closer.append(solution)
        return solution

    search = Search(lambda problem: found(*results), throw, "The solve", "try more", look=look, **settings)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        solution = search(problem, measure)
    return solution, [str(one.message) for one in heard], closer


class TestSearch:
    def test_what_succeeds_is_silent(self):
        solution, heard, closer = searched([Result.CONVERGED, Result.STEPS_DONE], "warn")
        assert solution.result is Result.STEPS_DONE
        assert not heard
        assert not closer

    def test_a_failure_is_told_with_its_advice(self):
        _, heard, closer = searched([Result.CONVERGED, Result.STAGNATED], "warn")
        assert len(heard) == 1
        assert "The solve" in heard[0]
        assert "in 1 of 2 problems" in heard[0]
        assert "try more" in heard[0]
        assert not closer
        assert not searched([Result.STAGNATED], "ignore")[1]
        with pytest.raises(bl.SolveError, match="try more"):
            searched([Result.STAGNATED], "raise")

    @pytest.mark.parametrize("throw", ["fallback", "warn"])
    def test_a_fallback_solves_what_failed_where_it_is_asked_for(self, throw):
        solution, heard, _ = searched([Result.STAGNATED, Result.CONVERGED], throw, fallback=bl.NewtonCG())
        if throw == "fallback":
            assert solution.recovered == ("NewtonCG",)
            torch.testing.assert_close(solution.value, torch.ones(2, 2).double())
            assert not heard
        else:
            assert not solution.recovered
            assert len(heard) == 1

    def test_a_start_that_is_not_finite_is_refused_beside_one_at_rest(self):
        """The second problem has nothing to do, which is odd by itself."""

        def losses(y):
            return torch.stack([(y[0] - 1).log().sum(), y[1].square().sum()])

        with pytest.raises(bl.NonFiniteError):
            bl.argmin(losses, torch.zeros(2, 3, dtype=torch.float64))

    def test_a_solve_that_succeeds_needs_no_fallback(self):
        solution, _, _ = searched([Result.CONVERGED], "fallback", fallback=bl.NewtonCG())
        assert not solution.recovered
        assert solution.value.tolist() == [[0.0, 0.0]]


class TestSeen:
    """Two problems: losses of 1 and 2, seen with scales of 1 and 4; residuals of norm 0.5, with scales of 10."""

    seen = Seen(
        loss=torch.tensor([1.0, 2.0]).double(),
        residual=torch.tensor([[0.3, 0.4], [0.5, 0.0]]).double(),
        loss_scale=torch.tensor([1.0, 4.0]).double(),
        residual_scale=torch.tensor([10.0, 10.0]).double(),
    )
    system = Seen(None, seen.residual, seen.loss_scale, seen.residual_scale)

    @pytest.mark.parametrize("losses", [(0.0, 0.0), (1e-3, 0.0), (0.0, 1e-3), (torch.nan, 0.0)])
    @pytest.mark.parametrize("residuals", [(0.0, 0.0), (4.0, 0.0), (6.0, 0.0), (0.0, 6.0)])
    def test_loss_and_residual_of_one_problem_have_to_differ(self, losses, residuals):
        """The residual by more than ten times itself."""
        loss = self.seen.loss + torch.tensor(losses)
        residual = self.seen.residual + torch.tensor([[0.0, residuals[0]], [0.0, residuals[1]]])
        if any(off != 0.0 and by > 5.0 for off, by in zip(losses, residuals, strict=True)):
            with pytest.raises(bl.ObjectiveChangedError, match="The objective has changed"):
                self.seen.check(loss, residual)
        else:
            self.seen.check(loss, residual)
        for loss_or_none in (loss, None):
            if max(residuals) > 5.0:
                with pytest.raises(bl.ObjectiveChangedError, match="The system has changed"):
                    self.system.check(loss_or_none, residual)
            else:
                self.system.check(loss_or_none, residual)

    @pytest.mark.parametrize("index", [0, 1])
    def test_losses_may_differ_by_rounding_of_their_scale(self, index):
        unit = torch.eye(2).double()[index] * self.seen.loss_scale[index] * ROUNDING * EPS
        self.seen.check_loss(self.seen.loss + 0.9 * unit)
        self.seen.check_loss(self.seen.loss - 0.9 * unit)
        for off in (1.5 * unit, -1.5 * unit, torch.nan * unit):
            with pytest.raises(bl.ObjectiveChangedError, match="objective"):
                self.seen.check_loss(self.seen.loss + off)

    def test_of_what_has_another_shape_nothing_is_known(self):
        self.seen.check(torch.tensor(9.0), torch.ones(2).double())
        self.seen.check_loss(torch.tensor(9.0).double())
        self.system.check_loss(self.seen.loss + 1)

    def test_sums_may_differ_by_the_rounding_of_all(self):
        self.seen.check_apart(torch.tensor(4.9 * ROUNDING * EPS).double())
        for apart in (5.1 * ROUNDING * EPS, torch.nan):
            with pytest.raises(bl.ObjectiveChangedError):
                self.seen.check_apart(torch.tensor(apart).double())

    def test_scales_are_those_of_the_start_and_the_end(self):
        problem = Problem(lambda y: y.square().sum(-1) - 3, torch.tensor([[2.0, 0.0], [1.0, 1.0]]).double(), ())
        seen = Seen.of(problem, torch.tensor([-7.0, 0.5]), problem.start.g)
        assert seen.loss.tolist() == [-7.0, 0.5]
        assert seen.loss_scale.tolist() == [7.0, 1.0]
        assert seen.residual_scale.tolist() == pytest.approx([4.0, 8.0**0.5])
