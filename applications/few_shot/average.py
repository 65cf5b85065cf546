"""An average of the meta-parameters over the last meta-steps, for evaluation: it has less of the noise of the steps."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from applications.few_shot.methods import Learner


class Average:
    """Exponential moving average of what a learner learns; see `Config.average` for its horizon.

    The window is a tenth of the meta-steps made so far, until that is the horizon: early parameters are forgotten.

    Attributes:
        values: ``meta.NAME`` and ``log_strength.NAME`` -> the average of that tensor.
    """

    def __init__(self, learner: Learner, horizon: int):
        self.learner, self.horizon = learner, horizon
        self.values = {name: value.detach().clone() for name, value in self._current().items()}

    def update(self, step: int) -> None:
        """Take in the parameters after meta-step ``step``, counted from 1."""
        weight = 1 / min(self.horizon, 1 + step // 10)
        for name, value in self._current().items():
            self.values[name].lerp_(value.detach(), weight)

    def restore(self, values: dict[str, Tensor]) -> None:
        """The average of a checkpoint."""
        for name, value in self.values.items():
            value.copy_(values[name])

    def averaged(self) -> Learner:
        """The learner with the averages in place of its parameters, for evaluation."""
        return replace(self.learner, meta=self._part("meta"), log_strength=self._part("log_strength"))

    def _part(self, part: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{part}."): v for name, v in self.values.items() if name.startswith(f"{part}.")}

    def _current(self) -> dict[str, Tensor]:
        learner = self.learner
        named = {"meta": learner.meta, "log_strength": learner.log_strength}
        return {f"{part}.{name}": value for part, values in named.items() for name, value in values.items()}
