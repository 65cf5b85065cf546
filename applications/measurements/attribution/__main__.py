"""``python -m applications.measurements.attribution``: influences by three libraries, each against training again."""

from __future__ import annotations

import importlib.util
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from applications.frame.command import main, require
from applications.frame.data import load, mislabel, split
from applications.frame.run import Row, Run
from applications.influence import knobs as influence_knobs
from applications.influence import scores
from applications.influence.__main__ import subsets
from applications.influence.model import Model
from applications.measurements.attribution.contestants import CONTESTANTS, Trained, exact


@dataclass(frozen=True)
class Config(influence_knobs.Config):
    """Influences by this library, pyDVL and kronfluence on the network of the influence application.

    A library that is not installed has no row: pip install "pydvl[influence]" kronfluence curvlinops-for-pytorch, which
    bring an older NumPy, into an environment of their own.
    """

    def check(self) -> None:
        super().check()
        require(self.hidden > 0, "--hidden is 0: the contestants are given a network of one hidden layer.")


def story(knobs: Config, run: Run) -> None:
    """One training, the trainings again, a row for each contestant that is here."""
    examples = load(knobs.data, knobs.data_root)
    parts = split(examples, (knobs.num_train, knobs.num_queries), knobs.seed)
    (features, labels), queries = (part.tensors(torch.float64) for part in parts)
    given = mislabel(labels, examples.num_classes, knobs.noise, torch.Generator().manual_seed(knobs.seed))
    train = (features, given)
    model = Model(features.shape[1], examples.num_classes, knobs.hidden, knobs.decay, knobs.seed)
    fit = run.part("training", lambda: {name: leaf.tolist() for name, leaf in model.fit(train).items()})
    params = {name: torch.tensor(leaf, dtype=torch.float64) for name, leaf in fit.items()}
    out = subsets(knobs, len(given))
    truth = torch.tensor(run.part("retraining", lambda: scores.retrained(model, params, train, queries, out).tolist()))
    trained = Trained.make(params, train, queries, knobs.decay)
    reference = exact(trained)
    rows = []
    for name, (_, needs) in CONTESTANTS.items():
        missing = [module for module in needs if importlib.util.find_spec(module) is None]
        if missing:
            run.say(f"{name}: {', '.join(missing)} is not installed.")
        else:
            rows.append(
                {"influences by": name, **run.part(name, partial(row_of, name, trained, reference, out, truth))}
            )
    run.table(
        f"{examples.name}: {len(given)} examples, {len(queries[1])} queries, {knobs.subsets} trainings again", rows
    )


def row_of(name: str, trained: Trained, reference: Tensor, out: Tensor, truth: Tensor) -> Row:
    """Rank correlation with training again, distance from the exact influences, processor seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        begin = time.process_time()
        found = CONTESTANTS[name][0](trained)
        seconds = time.process_time() - begin
    predicted = -(out.to(found) @ found.T) / out.shape[1]
    return {
        "rank correlation with training again": scores.datamodeling_score(predicted, truth),
        "correlation with exact": float(np.corrcoef(found.flatten(), reference.flatten())[0, 1]),
        "size over exact": float((found * reference).sum() / reference.square().sum()),
        "CPU seconds": seconds,
    }


if __name__ == "__main__":
    sys.exit(main("measurements.attribution", sys.argv[1:], Config, story))
