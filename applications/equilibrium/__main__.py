"""A deep equilibrium classifier beside an unrolled one: `python -m applications.equilibrium`."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from applications.equilibrium import convergence, footprint, gradients, plots
from applications.equilibrium.knobs import Config, Parts, create_network, parts_of, read
from applications.equilibrium.methods import METHODS, Method
from applications.equilibrium.network import Network
from applications.equilibrium.train import Fitting, accuracy
from applications.equilibrium.tuning import tunable
from applications.frame.command import main
from applications.frame.data import Examples
from applications.frame.run import Row, Run

LOOKED_AT = 64
"""Examples on which gradients are compared."""


def story(config: Config, run: Run) -> None:
    """Train the same network four ways; then what a step costs in memory, and how good its gradient is."""
    examples = read(config)
    seeds = range(config.seed, config.seed + config.runs)
    rows, records, trained = [], {}, {}
    for method, name in METHODS.items():
        networks = [fit(config, examples, method, seed, run) for seed in seeds]
        records[name] = [run.metrics(part_name(method, seed)) for seed in seeds]
        rows.append({"method": name, **summary(config, examples, method, networks, records[name], run)})
        trained[method] = networks[0]
    rows.append({"method": "logistic regression", **linear(config, examples, run)})
    runs = f"mean of {config.runs} runs" if config.runs > 1 else "one run"
    run.table(f"Test accuracy, {config.data}, {runs}", rows)
    about = f"{config.data}, {config.net}, {config.width} hidden"
    run.picture("learning.png", plots.learning(records, f"Training ({about}, {runs})"))

    footprints = run.part("memory", lambda: footprint.curve(config))
    parts, network = parts_of(config, examples, config.seed), trained["implicit"]
    count = min(footprint.EXAMPLES, len(parts.train[1]))
    run.table(f"Peak memory of a training step on {count} examples", footprints)
    run.picture("memory.png", plots.memory(footprints, f"One training step ({about})"))

    x, y = (tensor[:LOOKED_AT] for tensor in parts.train)
    curves = run.part("gradient errors", lambda: gradients.error_curves(network, x, y))
    title = f"The gradient at the trained network ({about})"
    run.picture("gradients.png", plots.gradient_errors(gradients.COUNTS, curves, title))
    run.table(
        "Relative error of the gradient after k iterations",
        [
            {"gradient": name, **dict(zip(map(str, gradients.COUNTS), errors, strict=True))}
            for name, errors in curves.items()
        ],
    )
    run.table(
        "Adjoint solvers at the exact equilibrium",
        run.part("adjoints", lambda: gradients.adjoint_solvers(network, x, y)),
    )

    stages = {"before training": create_network(config, examples, config.seed), "after training": network}
    found = run.part("convergence", lambda: converge(stages, parts, config.history))
    run.picture(
        "residuals.png", plots.residuals(convergence.COUNTS, found["curves"], f"Finding the equilibrium ({about})")
    )
    run.table("Iterations to a root-mean-square residual, mean over validation examples", found["needed"])


def part_name(method: Method, seed: int) -> str:
    return f"{method}, seed {seed}"


def fit(config: Config, examples: Examples, method: Method, seed: int, run: Run) -> Network:
    """The network of one seed, trained by one method."""
    network = create_network(config, examples, seed)
    parts = parts_of(config, examples, seed)
    run.train(part_name(method, seed), Fitting(network, method, parts, config, seed, run.settings))
    return network


def summary(
    config: Config, examples: Examples, method: Method, networks: list[Network], records: list[list[Row]], run: Run
) -> Row:
    """A method's row of the first table."""

    def measure() -> list[list[float]]:
        scores = []
        for index, network in enumerate(networks):
            parts = parts_of(config, examples, config.seed + index)
            held_out = (parts.validation, parts.test)
            scores.append([accuracy(network, method, part, config, run.settings) for part in held_out])
        return scores

    scores = run.part(f"accuracy of {method}", measure)
    every = [record for run_records in records for record in run_records]
    return {
        "parameters": sum(parameter.numel() for parameter in networks[0].parameters()),
        **accuracies(scores),
        "iterations": mean_of(every, "iterations") if method != "unrolled" else float(config.unrolled),
        "adjoint iterations": mean_of(every, "adjoint_iterations"),
    }


def mean_of(records: list[Row], key: str) -> float | None:
    values = [record[key] for record in records if key in record]
    return float(np.mean(values)) if values else None


def linear(config: Config, examples: Examples, run: Run) -> Row:
    """Logistic regression of scikit-learn on the same splits, by its defaults."""

    def score(parts: Parts) -> list[float]:
        (x, y), *others = ((x.flatten(1).cpu(), y.cpu()) for x, y in (parts.train, parts.validation, parts.test))
        model = LogisticRegression(max_iter=1000).fit(x, y)
        return [100 * float(model.score(*other)) for other in others]

    seeds = range(config.seed, config.seed + config.runs)
    scores = run.part("logistic regression", lambda: [score(parts_of(config, examples, seed)) for seed in seeds])
    num_features = examples.features.shape[1]
    return {"parameters": (num_features + 1) * examples.num_classes, **accuracies(scores)}


def accuracies(scores: list[list[float]]) -> Row:
    """From validation and test accuracy of each run."""
    validation, test = np.mean(scores, axis=0)
    spread = float(np.std([score[1] for score in scores], ddof=1)) if len(scores) > 1 else None
    return {"validation %": float(validation), "test %": float(test), "± over runs": spread}


def converge(networks: dict[str, Network], parts: Parts, history: int) -> dict[str, Any]:
    """Residual curves and iteration counts of each network, on validation examples."""
    x = parts.validation[0][: 4 * LOOKED_AT]
    return {
        "curves": {name: convergence.residual_curves(network, x, history) for name, network in networks.items()},
        "needed": [
            {"network": name, **convergence.iterations_needed(network, x, history)}
            for name, network in networks.items()
        ],
    }


if __name__ == "__main__":
    sys.exit(main("equilibrium", sys.argv[1:], Config, story, tunable))
