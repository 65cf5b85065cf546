"""Meta-training, and what it learned; `meta_train` is the loop, one row a step."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from applications.few_shot import backbone, data, evaluate, guard
from applications.few_shot.average import Average
from applications.few_shot.config import Config
from applications.few_shot.episodes import Episodes, Sampler
from applications.few_shot.methods import Learner, meta_step
from applications.few_shot.models import build
from applications.frame import memory
from applications.frame.checkpoint import restore_optimizer
from applications.frame.command import require
from applications.frame.device import select_device
from applications.frame.errors import UserError
from applications.frame.run import CLOCKS, Row, Run, checkpoint_of
from applications.frame.run_folder import RunFolder

METHOD_NAMES = {
    "imaml": "implicit MAML",
    "imaml-hf": "implicit MAML (Hessian-free)",
    "maml": "MAML",
    "fomaml": "first-order MAML",
    "reptile": "Reptile",
    "prototypical": "prototypical network",
}

NO_HEAD = (
    "--model {model} has no layer called head, so --head zero keeps nothing at zero: all its parameters are learned, "
    "those of the last layer too, and it serves this number of classes alone. Class numbers are arbitrary: call the "
    "last layer head to let it start at zero in every task."
)

TRAINING = "meta-training"
"""The part of a run whose checkpoint has the network."""

CHECKPOINT, EARLIER = "checkpoint.pt", checkpoint_of(TRAINING)
"""Its file, and what runs of earlier versions called it."""

MAX_SKIPPED = 20
"""Meta-steps in a row without a finite meta-gradient, after which training gives up."""


@dataclass
class Session:
    """The data, the learner, the meta-optimizer, and where they stand; an `applications.frame.run.Training`."""

    config: Config
    splits: data.Splits
    device: torch.device
    learner: Learner
    optimizer: torch.optim.Adam
    step: int = 0
    seconds: float = 0.0
    solution: bl.Solution | None = None
    """The last adaptation."""
    clipping: guard.Clipping = field(init=False)
    average: Average = field(init=False)
    late: Learner = field(init=False)
    """The learner with the steps of late in training; the parameters are the same."""

    def __post_init__(self) -> None:
        self.clipping = guard.Clipping(self.config.clip)
        self.average = Average(self.learner, self.config.average)
        self.late = self.learner.late()

    @classmethod
    def create(
        cls, config: Config, chosen: Mapping[str, Any] | None = None, start: Callable[[Learner], None] | None = None
    ) -> Session:
        """At the start.

        Args:
            chosen: solver settings in place of those of the configuration.
            start: puts other meta-parameters into the learner than those at random.
        """
        device = set_up_device(config)
        splits = backbone.splits(config)
        learner = create_learner(config, splits.train, device, chosen)
        if start is not None:
            start(learner)
        session = cls(config, splits, device, learner, torch.optim.Adam(learner.parameters(), config.lr))
        for stream in ("train", "validation", "test"):
            session.sampler(stream)  # what cannot be sampled is told before training, not after it
        return session

    @property
    def steps(self) -> int:
        """The meta-steps of the schedule, as many as there is time for where the clock ends it."""
        steps, done = self.config.steps, progress(self)
        return steps if done <= self.step / steps else max(self.step, math.ceil(self.step / done))

    def rows(self) -> Iterator[Row]:
        """See `meta_train`."""
        return meta_train(self)

    @cached_property
    def own_data(self) -> dict[str, Any]:
        """What the training data of a folder is known by, the names of its classes and a digest of their images."""
        if self.config.data in data.NAMES:
            return {}
        train = self.splits.train
        return {"classes": list(train.names), "images": hashlib.sha256(train.images.numpy()).hexdigest()}

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs; the episodes follow from the seed and the step."""
        return {
            "meta": {name: param.detach() for name, param in self.learner.meta.items()},
            "log_strength": {name: value.detach() for name, value in self.learner.log_strength.items()},
            "average": self.average.values,
            "running_norm": self.clipping.running,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            **self.own_data,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`.

        Raises:
            UserError: a folder has other classes to train on than it had, so that some of them would be in the test.
        """
        other = {name for name, value in self.own_data.items() if state.get(name, value) != value}
        if "classes" in other:
            raise UserError(
                f"{self.config.data} has other classes for training than when this run began: where folders come or "
                "go, its classes are shared out anew, and some of the training are in the test. Restore the folder "
                "(results.json lists the classes of each part); or give it folders train, validation and test, which "
                "stay as they are, and begin a new run."
            )
        if other:
            raise UserError(
                f"{self.config.data} has other images for training than when this run began: half of it would be of "
                "other data. Restore the folder, or begin a new run (--start takes its network)."
            )
        with torch.no_grad():
            for name, param in self.learner.meta.items():
                param.copy_(state["meta"][name])
            for name, value in self.learner.log_strength.items():
                value.copy_(state["log_strength"][name])
            self.average.restore(state["average"])
        self.clipping.running = state["running_norm"]
        restore_optimizer(self.optimizer, state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]

    def sampler(self, stream: str) -> Sampler:
        """Episodes of the ``"train"``, ``"validation"`` or ``"test"`` classes."""
        config = self.config
        queries, distort = (config.queries, config.distort) if stream == "train" else (config.eval_queries, 0.0)
        return create_sampler(config, getattr(self.splits, stream), stream, queries, self.device, distort)


def checkpoint_file(folder: RunFolder) -> str:
    """The name of the checkpoint in the folder of a run."""
    return EARLIER if folder.has_checkpoint(EARLIER) else CHECKPOINT


def set_up_device(config: Config) -> torch.device:
    """The device of the configuration, with the arithmetic and the memory set up.

    Raises:
        UserError: a GPU is asked for and there is none, or the CPU's clock while a GPU does the work.
    """
    device = select_device(config.device)
    require(
        config.clock == "wall" or device.type == "cpu",
        f"--clock cpu counts the time of the CPU, but {device} does the work: take --clock wall, or --device cpu.",
    )
    exact = config.precision != "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
    if device.type == "cpu":
        memory.keep_freed()
    return device


def untrained_network(config: Config, channels: int, size: int) -> torch.nn.Module:
    """The network of a configuration at its initialisation, which leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build(
            config.network, channels, size, config.ways, width=config.width, norm=config.norm, halve=config.halve
        )


def create_learner(
    config: Config, classes: data.ImageClasses, device: torch.device, chosen: Mapping[str, Any] | None = None
) -> Learner:
    """The network at its initialisation, which the seed alone decides."""
    net = untrained_network(config, classes.images.shape[2], classes.images.shape[-1])
    return Learner.create(config, net.to(device, config.dtype), chosen)


def create_sampler(
    config: Config,
    classes: data.ImageClasses,
    stream: str,
    queries: int,
    device: torch.device,
    distort: float = 0.0,
) -> Sampler:
    """Episodes of the configuration's ways, shots and precision."""
    sizes = config.ways, config.shots, queries
    return Sampler(classes, stream, *sizes, config.seed, device, config.dtype, distort)


def meta_train(session: Session) -> Iterator[dict[str, Any]]:
    """Meta-steps from where the session stands to the end of its schedule, one row each.

    Raises:
        UserError: no finite meta-gradient in many steps: the adaptation diverges.
    """
    config, sampler, skipped = session.config, session.sampler("train"), 0
    now = CLOCKS[config.clock]
    while progress(session) < 1:
        begin = now()
        lr = config.lr * scheduled(session)
        row = one_step(session, sampler, lr)
        session.step += 1
        elapsed = now() - begin
        session.seconds += elapsed if config.minutes is None else bl.distributed.from_first(elapsed)
        skipped = skipped + 1 if row.get("skipped") else 0
        if skipped == MAX_SKIPPED:
            raise UserError(
                f"No finite meta-gradient in {MAX_SKIPPED} steps, at step {session.step}: the adaptation diverges. "
                "Lower --inner-lr or --lr, or raise --strength; the last checkpoint is from before."
            )
        yield {"step": session.step, **row, "lr": lr}


def scheduled(session: Session) -> float:
    """What the schedule multiplies the step size of the meta-optimizer by."""
    if session.config.schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * progress(session))
    return 1 / math.sqrt(1 + session.step / 1000) if session.config.schedule == "root" else 1.0


def progress(session: Session) -> float:
    """How much of the schedule is done, by steps and by the clock: 1 ends it."""
    minutes = session.config.minutes
    by_clock = 0.0 if minutes is None else session.seconds / 60 / minutes
    return max(session.step / session.config.steps, by_clock)


def one_step(session: Session, sampler: Sampler, lr: float) -> dict[str, Any]:
    """One update of the meta-parameters; without a finite meta-gradient they stay as they are."""
    optimizer = session.optimizer
    learner = session.learner if progress(session) < session.config.late_from else session.late
    part = bl.distributed.shard(session.config.tasks)
    share = (part.stop - part.start) / session.config.tasks
    outcome = meta_step(learner, sampler.episodes(session.config.tasks, session.step, part))
    optimizer.zero_grad()
    (share * outcome.objective).backward()
    session.solution = solution = outcome.solution
    kept = int(outcome.kept)
    per_kept = [outcome.query_loss.item(), outcome.accuracy.item()] if kept else [0.0, 0.0]
    means = [_mean(solution.stats["residual_norm"])]
    sums = [float(kept)]
    if solution.adjoint is not None:
        means.append(_mean(solution.adjoint.stats["relative_residual"]))
        sums.append(float((solution.adjoint.stats["result"] == bl.Result.NEGATIVE_CURVATURE).sum()))
    numbers = [*(kept * mean for mean in per_kept), *(share * mean for mean in means), *sums]
    totals = bl.distributed.reduce_gradients(learner.parameters(), *numbers)
    (loss, accuracy, residual, *adjoint), (kept_by_all, *negative) = totals[: -len(sums)], totals[-len(sums) :]
    gradients = [param.grad for param in learner.parameters() if param.grad is not None]
    size, factor = guard.rescale(gradients, session.clipping, session.config.tasks, kept_by_all)
    finite = math.isfinite(size) and kept_by_all > 0 and math.isfinite(loss)
    if finite:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        session.average.update(session.step + 1)
    row: dict[str, Any] = {
        **({} if finite else {"skipped": True}),
        "loss": loss / max(kept_by_all, 1),
        "accuracy": accuracy / max(kept_by_all, 1),
        "meta_gradient_norm": size,
        "clipped": factor < 1,
        "left_out": session.config.tasks - int(kept_by_all),
        "inner_residual": residual,
    }
    if adjoint:
        row["adjoint_relative_residual"], row["negative_curvature"] = adjoint[0], int(negative[0])
    if session.config.learn_strength != "no":
        row["strength"] = {name: value.exp().item() for name, value in learner.log_strength.items()}
    return row


def _mean(values: Tensor) -> float:
    return values.mean().item()


def validation(session: Session, num_tasks: int = 100) -> Row:
    """Percent on tasks of the validation classes, transductive where the network is."""
    name, classify = next(iter(evaluate.settings(session.average.averaged())))
    found = evaluate.measure({name: classify}, session.sampler("validation"), num_tasks, progress=False)
    return {"validation_accuracy": found[name].mean}


def evaluation(session: Session) -> dict[str, Row]:
    """Accuracy on held-out tasks beside the baselines, by name."""
    config = session.config
    method = METHOD_NAMES[config.method]
    untrained = create_learner(config, session.splits.train, session.device)
    classifiers = {f"{method}, {name}": classify for name, classify in evaluate.settings(session.average.averaged())}
    first = next(iter(evaluate.settings(untrained)))
    classifiers |= {f"the same before training, {first[0].split(':')[0]}": first[1], **evaluate.baselines(config)}
    found = evaluate.measure(classifiers, session.sampler("test"), config.eval_tasks, progress=True)
    return {name: vars(accuracy) for name, accuracy in found.items()}


def report(session: Session, run: Run, found: dict[str, Row]) -> None:
    """Print and keep what was found, ``evaluation.json`` too, and draw a test episode."""
    from applications.few_shot import plots  # which take longer to import than to draw

    config, sampler = session.config, session.sampler("test")
    rows = [{"classifier": name, "accuracy": str(evaluate.Accuracy(**row))} for name, row in found.items()]
    title = f"Accuracy on {config.eval_tasks} held-out tasks, {describe(config)}"
    run.table(f"{title} (mean +- 95 % interval)", rows)
    run.folder.write_json("evaluation.json", found)
    episodes = sampler.episodes(1, config.eval_tasks)
    name, classify = next(iter(evaluate.settings(session.average.averaged())))
    title = f"A test episode of {config.data}, {name}"
    predicted = classify(episodes)[0]
    shown = _as_images(config, sampler, episodes, config.eval_tasks)
    picture = plots.episode(shown.support_x[0], shown.query_x[0], shown.query_y[0], predicted, title)
    run.picture("test_episode.png", picture)


def _as_images(config: Config, sampler: Sampler, episodes: Episodes, step: int) -> Episodes:
    """The same task in images, where a backbone made features of them."""
    if config.backbone is None:
        return episodes
    images = data.load(config.data, config.data_root, split=config.split, reading=config.reading).test
    return create_sampler(config, images, sampler.stream, sampler.queries, sampler.device).episodes(1, step)


def describe(config: Config) -> str:
    return f"{METHOD_NAMES[config.method]}, {Path(config.data).name} {config.ways}-way {config.shots}-shot"
