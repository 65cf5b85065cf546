"""``python -m applications.influence``: who taught the network that, and was it right?"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor

from applications.frame.command import main
from applications.frame.data import load, mislabel, split
from applications.frame.run import Run
from applications.influence import pictures, scores
from applications.influence.knobs import Config
from applications.influence.model import Batch, Model, losses


def story(knobs: Config, run: Run) -> None:
    """One training, the influences on its test losses, what retraining says of them, and the labels that are wrong."""
    examples = load(knobs.data, knobs.data_root)
    parts = split(examples, (knobs.num_train, knobs.num_queries), knobs.seed)
    (features, labels), queries = (part.tensors(torch.float64) for part in parts)
    given = mislabel(labels, examples.num_classes, knobs.noise, torch.Generator().manual_seed(knobs.seed))
    train, wrong = (features, given), given != labels
    model = Model(features.shape[1], examples.num_classes, knobs.hidden, knobs.decay, knobs.seed)
    run.say(
        f"{examples.name}: {len(given)} training examples, {int(wrong.sum())} labels wrong; {len(queries[1])} queries."
    )

    fit = run.part("training", lambda: {name: leaf.tolist() for name, leaf in model.fit(train).items()})
    params = {name: torch.tensor(leaf, dtype=torch.float64) for name, leaf in fit.items()}
    found = run.part("influences", partial(influences, model, params, train, queries, run))
    values, own = torch.tensor(found["values"]), torch.tensor(found["own"])
    out = subsets(knobs, len(given))
    truth = torch.tensor(run.part("retraining", lambda: scores.retrained(model, params, train, queries, out).tolist()))
    draw(run, examples.image, train, wrong, queries, model.outputs(params, queries).argmax(1), values)
    report(run, train, wrong, values, own, out, truth, losses(model.outputs(params, train), train), found)


def influences(model: Model, params: dict[str, Tensor], train: Batch, queries: Batch, run: Run) -> dict[str, Any]:
    """On the queries, kept in a file of the run folder on the way, and of the examples on themselves."""
    of = model.influence(params, train)
    found = of.of(queries, file=run.folder.path / "influences.pt" if run.leads else None)
    plain = torch.eye(sum(leaf.numel() for leaf in params.values()), dtype=torch.float64)
    # The identity is no solution, and is not meant to be one.
    alone = type(of)(model.outputs, losses, params, train, penalty=model.penalty, inverse=plain, throw="ignore").of(
        queries
    )
    return {
        "values": found.values.tolist(),
        "gradients alone": alone.values.tolist(),
        "own": of.of_themselves().tolist(),
        "relative error": float((found.error / found.values.square().mean(1).sqrt()).max()),
        "distance": float(of.distance),
    }


def subsets(knobs: Config, count: int) -> Tensor:
    """Which examples each training again leaves out, ``[s, n]`` bool."""
    random = torch.Generator().manual_seed(knobs.seed + 1)
    size = max(1, round(knobs.left_out * count))
    return torch.stack([torch.randperm(count, generator=random) < size for _ in range(knobs.subsets)])


def draw(
    run: Run,
    image: tuple[int, int, int] | None,
    train: Batch,
    wrong: Tensor,
    queries: Batch,
    guesses: Tensor,
    values: Tensor,
) -> None:
    """The predictions that are wrong first, then others."""
    if image is None:
        return
    chosen = (guesses == queries[1]).long().argsort(stable=True)[:6]
    shown = [part.view(-1, *image) for part in (train[0], queries[0][chosen])]
    parts = (queries[1][chosen], guesses[chosen], values[chosen])
    run.picture("speaking.png", pictures.speaking(shown[0], train[1], wrong, shown[1], *parts))


def report(
    run: Run,
    train: Batch,
    wrong: Tensor,
    values: Tensor,
    own: Tensor,
    out: Tensor,
    truth: Tensor,
    train_losses: Tensor,
    found: dict[str, Any],
) -> None:
    """Both tables, and the picture of the first."""
    rows = []
    for name, scored in (("influence", values), ("gradients alone", torch.tensor(found["gradients alone"]))):
        predicted = -(out.to(scored) @ scored.T) / len(wrong)
        score = scores.datamodeling_score(predicted, truth)
        slope = float((predicted * truth).sum() / predicted.square().sum())
        rows.append({"prediction": name, "rank correlation": score, "true change over predicted": slope})
        if name == "influence":
            run.picture("retraining.png", pictures.against_retraining(predicted, truth, score))
    run.table("Subsets left out", rows)
    if not bool(wrong.any()):
        return
    rows = [
        {
            "ranked by": name,
            "wrong among the first (%)": scores.found_first(s, wrong),
            "AUC": scores.area_under_curve(s, wrong),
        }
        for name, s in (
            ("influence on itself", own),
            ("training loss", train_losses),
            ("chance", torch.zeros_like(own)),
        )
    ]
    run.table("Wrong labels", rows)
    run.say(
        f"Linear solves left {found['relative error']:.1e} of the influences at most; the training stopped "
        f"{found['distance']:.1e} of the params short of its minimum."
    )


if __name__ == "__main__":
    sys.exit(main("influence", sys.argv[1:], Config, story))
