"""What is had without a hypergradient: mixtures that are tried, each by a short training."""

from __future__ import annotations

from functools import partial

import optuna
import torch
from torch import Tensor

from applications.domain_weights.corpus import Corpus
from applications.domain_weights.knobs import Config, training
from applications.frame.run import Run

SPAN = 4.0
"""Scores of Optuna's mixtures lie in ``[-SPAN, 0]``: the least weight is a hundredth part of the largest, or nearly."""
ALONE = 30.0
"""The score of a domain beside zeros that leaves nothing to the others."""


def alone(corpus: Corpus, domain: str) -> Tensor:
    """The scores of one domain and no other."""
    return ALONE * torch.tensor([float(name == domain) for name in corpus.domains])


def best_alone(knobs: Config, corpus: Corpus, run: Run) -> tuple[str, float]:
    """The domain that a short training on it alone has the least validation loss with, and the seconds of them all."""
    found = {domain: tried(knobs, corpus, run, f"{domain} alone", alone(corpus, domain)) for domain in corpus.domains}
    best = min(found, key=lambda domain: found[domain])
    return best, sum(run.seconds(f"{domain} alone, tried") for domain in found)


def best_of_trials(knobs: Config, corpus: Corpus, run: Run) -> tuple[Tensor, float]:
    """The scores of the least validation loss that Optuna's TPE found, and the seconds of all its trials."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=knobs.seed))
    space: dict[str, optuna.distributions.BaseDistribution] = {
        domain: optuna.distributions.FloatDistribution(-SPAN, 0.0) for domain in corpus.domains
    }
    study.enqueue_trial(dict.fromkeys(corpus.domains, 0.0))
    for number in range(knobs.mixtures):  # a run that is resumed asks for the same mixtures again, and has their losses
        trial = study.ask(space)
        study.tell(trial, tried(knobs, corpus, run, f"mixture {number + 1}", of_params(corpus, trial.params)))
    seconds = sum(run.seconds(f"mixture {number + 1}, tried") for number in range(knobs.mixtures))
    return of_params(corpus, study.best_params), seconds


def of_params(corpus: Corpus, params: dict[str, float]) -> Tensor:
    return torch.tensor([params[domain] for domain in corpus.domains])


def tried(knobs: Config, corpus: Corpus, run: Run, name: str, scores: Tensor) -> float:
    """The validation loss after a short training on a mixture."""
    return run.part(f"{name}, tried", partial(short, knobs, corpus, scores))


def short(knobs: Config, corpus: Corpus, scores: Tensor) -> float:
    begun = training(knobs, corpus, knobs.short_steps, scores)
    for _ in begun.rows():
        pass
    return begun.loss_on(corpus.validation)
