"""``python -m applications.domain_weights``: which texts should a transformer read to write like the target?"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.domain_weights.corpus import Corpus
from applications.domain_weights.knobs import Config, training
from applications.domain_weights.measure import peak_memory
from applications.domain_weights.pictures import weights_and_losses
from applications.domain_weights.search import alone, best_alone, best_of_trials
from applications.domain_weights.train import MixtureTraining
from applications.domain_weights.tuning import tunable
from applications.frame.command import main
from applications.frame.run import Row, Run

PLAIN = "uniform"
TARGET = "target"
"""The name of the validation text among the domains, where it is one."""
AND_TARGET = f", + {TARGET} text"


def story(knobs: Config, run: Run) -> None:
    """Weights by every rule, a training on each mixture, one table; then the picture."""
    corpus, ranks = knobs.read(), bl.distributed.world_size()
    knobs.check_ranks(ranks)
    sizes = ", ".join(f"{name} {len(text):,}" for name, text in corpus.domains.items())
    run.say(
        f"Target {knobs.target}: {len(corpus.validation):,} characters to choose by, {len(corpus.test):,} for the test."
        f"\nDomains: {sizes}.{f' {ranks} ranks.' if ranks > 1 else ''}"
    )
    hypergrads = knobs.hypergrads(run.settings)
    learned = {name: learn(knobs, corpus, run, name, hypergrad) for name, hypergrad in hypergrads.items()}
    found, seconds = candidates(knobs, corpus, run, learned)
    ways = {PLAIN: None, **hypergrads}
    peaks = run.part("memory", partial(peak_memory, knobs, ways)) if run.leads else dict.fromkeys(ways, 0.0)
    rows = [
        {
            "weights": name,
            **run.part(f"trained, {name}", partial(losses, knobs, read, run, name, scores)),
            "minutes to choose": seconds.get(name, 0.0) / 60,
            "peak memory (MiB)": peaks.get(name.removesuffix(AND_TARGET), peaks[PLAIN]),
        }
        for name, (read, scores) in found.items()
    ]
    run.table(f"{knobs.target}: loss in nats a character after {knobs.steps} steps", rows)
    names = list(corpus.domains)
    mixtures = {name: scores.softmax(0).tolist() for name, (read, scores) in found.items() if read is corpus}
    run.table("Weights", [{"weights": name, **dict(zip(names, row, strict=True))} for name, row in mixtures.items()])
    run.picture("weights.png", weights_and_losses({name: run.metrics(part_of(name)) for name in learned}, names, rows))


def part_of(name: str) -> str:
    return f"learning, {name}"


def learn(knobs: Config, corpus: Corpus, run: Run, name: str, hypergrad: Any) -> tuple[Tensor, float]:
    """The scores that a hypergradient leads to, and the seconds of its training."""
    own = {"outer_lr": run.settings.get("outer_lr", knobs.outer_lr)}
    begun = training(knobs, corpus, knobs.learn_steps, torch.zeros(len(corpus.domains)), hypergrad, **own)
    seconds = run.train(part_of(name), begun, show=("loss", "target_loss"))
    return begun.scores.detach().cpu(), seconds


def candidates(
    knobs: Config, corpus: Corpus, run: Run, learned: Mapping[str, tuple[Tensor, float]]
) -> tuple[dict[str, tuple[Corpus, Tensor]], dict[str, float]]:
    """Texts and scores by the names of the table's rows, and the seconds that it took to find these scores.

    What the validation text is worth as a text to train on, by itself and as half of a mixture, the last rows tell.
    """
    uniform = torch.zeros(len(corpus.domains))
    domain, by_hand = best_alone(knobs, corpus, run)
    tpe, by_trials = best_of_trials(knobs, corpus, run)
    best, trials = f"{domain} alone, the best of {len(uniform)}", f"Optuna, {knobs.mixtures} mixtures"
    first = next(iter(learned))
    joint = corpus.joined(TARGET)
    found = {
        PLAIN: (corpus, uniform),
        best: (corpus, alone(corpus, domain)),
        trials: (corpus, tpe),
        **{name: (corpus, scores) for name, (scores, _) in learned.items()},
        f"{TARGET} text alone": (joint, alone(joint, TARGET)),
        f"{PLAIN}{AND_TARGET}": (joint, with_half(uniform)),
        f"{first}{AND_TARGET}": (joint, with_half(learned[first][0])),
    }
    seconds = {best: by_hand, trials: by_trials, **{name: spent for name, (_, spent) in learned.items()}}
    return found, {**seconds, f"{first}{AND_TARGET}": learned[first][1]}


def with_half(scores: Tensor) -> Tensor:
    """Scores whose last one weighs as much as all others, which keep their ratios."""
    return torch.cat([scores, scores.logsumexp(0, keepdim=True)])


def losses(knobs: Config, corpus: Corpus, run: Run, name: str, scores: Tensor) -> Row:
    """Losses of a transformer that is trained from its start on a mixture."""
    trained: MixtureTraining = training(knobs, corpus, knobs.steps, scores)
    run.train(f"mixture, {name}", trained)
    return {"validation loss": trained.loss_on(corpus.validation), "test loss": trained.loss_on(corpus.test)}


if __name__ == "__main__":
    sys.exit(main("domain_weights", sys.argv[1:], Config, story, tunable))
