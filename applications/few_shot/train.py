"""Meta-training, from the knobs to the run folder; `meta_train` is the loop, one record a step."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import bilevel as bl
from applications import ranks
from applications.device import select_device
from applications.errors import UserError
from applications.few_shot import data, evaluate, guard, plots
from applications.few_shot.average import Average
from applications.few_shot.config import Config
from applications.few_shot.episodes import Sampler
from applications.few_shot.methods import Learner, fixed_at_zero, meta_step
from applications.few_shot.models import build
from applications.few_shot.trained import SETTINGS
from applications.run_folder import Interruption, ReadOnly, RunFolder
from applications.tune import read_settings

METHOD_NAMES = {
    "imaml": "implicit MAML",
    "imaml-hf": "implicit MAML (Hessian-free)",
    "maml": "MAML",
    "fomaml": "first-order MAML",
    "reptile": "Reptile",
}

NO_HEAD = (
    "--model {model} has no layer called head, so --head zero keeps nothing at zero: all its parameters are learned, "
    "those of the last layer too, and it serves this number of classes alone. Class numbers are arbitrary: call the "
    "last layer head to let it start at zero in every task."
)

MAX_SKIPPED = 20
"""Meta-steps in a row without a finite meta-gradient, after which training gives up."""


@dataclass
class Session:
    """What a run needs beside its configuration: the data, the learner, the meta-optimizer, and where it stands."""

    config: Config
    splits: data.Splits
    device: torch.device
    learner: Learner
    optimizer: torch.optim.Adam
    step: int = 0
    seconds: float = 0.0
    solution: bl.Solution | None = None
    """The last adaptation."""
    interruption: Interruption | None = None
    """Where a signal is noted."""
    stop: bool = False
    """Whether a signal came, to any rank: all stop after the same step."""
    clipping: guard.Clipping = field(init=False)
    average: Average = field(init=False)

    def __post_init__(self) -> None:
        self.clipping = guard.Clipping(self.config.clip)
        self.average = Average(self.learner, self.config.average)

    @classmethod
    def create(cls, config: Config, chosen: Mapping[str, Any] | None = None) -> Session:
        """At the start; ``chosen``: solver settings in place of those of the configuration and of its file."""
        device = set_up_device(config)
        splits = data.load(config.data, config.data_root, split=config.split, reading=config.reading)
        learner = create_learner(config, splits.train, device, chosen or solver_settings(config))
        session = cls(config, splits, device, learner, torch.optim.Adam(learner.parameters(), config.lr))
        for stream in ("train", "validation", "test"):
            session.sampler(stream)  # what cannot be sampled is told before training, not after it
        return session

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
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`.

        Raises:
            UserError: the checkpoint is of another network.
        """
        try:
            with torch.no_grad():
                for name, param in self.learner.meta.items():
                    param.copy_(state["meta"][name])
                for name, value in self.learner.log_strength.items():
                    value.copy_(state["log_strength"][name])
            self.average.restore(state.get("average"))
            self.clipping.running = state.get("running_norm", 0.0)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
        except (KeyError, RuntimeError, ValueError) as error:
            raise UserError(
                f"The checkpoint does not fit these settings ({str(error).splitlines()[0]}): the network, its "
                "width and the number of ways must be those of the run. Leave them out to take them from the run."
            ) from error

    def sampler(self, stream: str) -> Sampler:
        """Episodes of the ``"train"``, ``"validation"`` or ``"test"`` classes."""
        config = self.config
        queries = config.queries if stream == "train" else config.eval_queries
        return create_sampler(config, getattr(self.splits, stream), stream, queries, self.device)


def set_up_device(config: Config) -> torch.device:
    """The device of the configuration, with the arithmetic set up.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    device = select_device(config.device)
    exact = config.precision != "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact
    return device


def solver_settings(config: Config) -> dict[str, Any]:
    """What the file of ``--solver`` holds.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    if config.solver is None:
        return {}
    return read_settings(config.solver, SETTINGS, "few_shot")


def create_learner(
    config: Config, classes: data.ImageClasses, device: torch.device, chosen: Mapping[str, Any] | None = None
) -> Learner:
    """The network at its initialisation, which the seed alone decides."""
    channels, size = classes.images.shape[2], classes.images.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        conv4 = {"width": config.width, "norm": config.norm, "halve": config.halve}
        net = build(config.model, channels, size, config.ways, **conv4)
    return Learner.create(config, net.to(device, config.dtype), chosen)


def create_sampler(
    config: Config, classes: data.ImageClasses, stream: str, queries: int, device: torch.device
) -> Sampler:
    """Episodes of the configuration's ways, shots and precision."""
    return Sampler(classes, stream, config.ways, config.shots, queries, config.seed, device, config.dtype)


def meta_train(session: Session) -> Iterator[dict[str, Any]]:
    """Meta-steps from where the session stands to the end of its schedule, one record each.

    Raises:
        UserError: no finite meta-gradient in many steps: the adaptation diverges.
    """
    config, sampler, skipped = session.config, session.sampler("train"), 0
    while progress(session) < 1:
        begin = time.perf_counter()
        lr = config.lr * scheduled(session)
        record = one_step(session, sampler, lr)
        session.step += 1
        elapsed = time.perf_counter() - begin
        session.seconds += elapsed if config.minutes is None else bl.distributed.from_first(elapsed)
        skipped = skipped + 1 if record.pop("skipped") else 0
        if skipped == MAX_SKIPPED:
            raise UserError(
                f"No finite meta-gradient in {MAX_SKIPPED} steps, at step {session.step}: the adaptation diverges. "
                "Lower --inner-lr or --lr, or raise --strength; the last checkpoint is from before."
            )
        yield {"step": session.step, **record, "lr": lr, "seconds": round(session.seconds, 3)}


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
    learner, optimizer = session.learner, session.optimizer
    part = bl.distributed.shard(session.config.tasks)
    share = (part.stop - part.start) / session.config.tasks
    outcome = meta_step(learner, sampler.episodes(session.config.tasks, session.step, part))
    optimizer.zero_grad()
    (share * outcome.objective).backward()
    session.solution = solution = outcome.solution
    kept = int(outcome.kept)
    per_kept = [outcome.query_loss.item(), outcome.accuracy.item()] if kept else [0.0, 0.0]
    means = [_mean(solution.stats["residual_norm"])]
    sums = [float(kept), float(session.interruption is not None and session.interruption.exit_code is not None)]
    if solution.adjoint is not None:
        means.append(_mean(solution.adjoint.stats["relative_residual"]))
        sums.append(float((solution.adjoint.stats["result"] == bl.Result.NEGATIVE_CURVATURE).sum()))
    numbers = [*(kept * mean for mean in per_kept), *(share * mean for mean in means), *sums]
    totals = bl.distributed.reduce_gradients(learner.parameters(), *numbers)
    (loss, accuracy, residual, *adjoint), (kept_by_all, stop, *negative) = totals[: -len(sums)], totals[-len(sums) :]
    session.stop = stop > 0
    gradients = [param.grad for param in learner.parameters() if param.grad is not None]
    size, factor = guard.rescale(gradients, session.clipping, session.config.tasks, kept_by_all)
    finite = math.isfinite(size) and kept_by_all > 0 and math.isfinite(loss)
    if finite:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        session.average.update(session.step + 1)
    record: dict[str, Any] = {
        "skipped": not finite,
        "loss": loss / max(kept_by_all, 1),
        "accuracy": accuracy / max(kept_by_all, 1),
        "meta_gradient_norm": size,
        "clipped": factor < 1,
        "left_out": session.config.tasks - int(kept_by_all),
        "inner_residual": residual,
    }
    if adjoint:
        record["adjoint_relative_residual"], record["negative_curvature"] = adjoint[0], int(negative[0])
    if session.config.learn_strength != "no":
        record["strength"] = {name: value.exp().item() for name, value in learner.log_strength.items()}
    return record


def _mean(values: Tensor) -> float:
    return values.mean().item()


def run(config: Config, folder: RunFolder, resume: bool) -> int:
    """Train, evaluate, draw; the exit code is 0, or 128 + the signal that interrupted it."""
    with ranks.process_group():
        if config.tasks < bl.distributed.world_size():
            raise UserError(
                f"--tasks is {config.tasks} for {bl.distributed.world_size()} ranks: each needs a task. Start fewer."
            )
        if bl.distributed.rank() > 0:
            folder = ReadOnly(folder.path)
        return _run(config, folder, resume)


def _run(config: Config, folder: RunFolder, resume: bool) -> int:
    session, lead = Session.create(config), bl.distributed.rank() == 0
    title = describe(config)
    if resume:
        session.restore(folder.load_checkpoint(session.device))
        folder.rewind_metrics(session.step)
    if config.solver is not None:  # the run is whole without the file
        kept = folder.path / "solver.json"
        bl.tuning.save(kept, solver_settings(config))
        config = replace(config, solver=kept)
    folder.begin(config.to_json())
    many = f", {bl.distributed.world_size()} ranks" if bl.distributed.world_size() > 1 else ""
    say(f"{title}: {config.tasks} tasks a step on {session.device}{many}; run folder {folder.path}")
    if config.head == "zero" and not fixed_at_zero(config, session.learner.meta):
        say(NO_HEAD.format(model=config.model))
    with Interruption() as interruption:
        session.interruption = interruption
        _train(session, folder)
    records = folder.metrics()
    folder.write_bytes("learning_curve.png", plots.learning_curve(records, title))
    told = guard.told(records)
    if told:
        say(told)
    if session.stop:
        say(f"Interrupted after step {session.step}; everything is saved. Go on with: --resume {folder.path}")
        return interruption.exit_code or 128 + signal.SIGTERM
    if lead:
        report(session, folder)
    return 0


def _train(session: Session, folder: RunFolder) -> None:
    """The loop with its metrics, validations, checkpoints and progress bar, which are those of the first rank."""
    config, lead = session.config, bl.distributed.rank() == 0
    validation = session.sampler("validation") if config.validate_every and lead else None
    hide = None if lead else True
    with tqdm(total=config.steps, initial=session.step, unit="step", disable=hide, dynamic_ncols=True) as bar:
        for record in meta_train(session):
            folder.append_metrics(record)
            bar.total = max(session.step, round(session.step / progress(session)))  # the clock may end the run earlier
            bar.update()
            rate = config.tasks * bar.format_dict["rate"] if bar.format_dict["rate"] else 0
            bar.set_postfix(loss=f"{record['loss']:.3f}", acc=f"{record['accuracy']:.3f}", tasks_s=f"{rate:.0f}")
            if validation is not None and session.step % config.validate_every == 0:
                name, classify = next(iter(evaluate.settings(session.average.averaged())))
                accuracy = evaluate.measure({name: classify}, validation, 100, progress=False)[name]
                folder.append_metrics({"step": session.step, "validation_accuracy": accuracy.mean})
                line = f"step {session.step}: loss {record['loss']:.3f}, validation {accuracy} ({name.split(':')[0]})"
                tqdm.write(line)
            if session.step % config.checkpoint_every == 0:
                folder.save_checkpoint(session.state())
            if session.stop:
                break
    folder.save_checkpoint(session.state())


def report(session: Session, folder: RunFolder) -> None:
    """Evaluate on held-out tasks beside the baselines; print, and write ``evaluation.json`` and a test episode."""
    config, sampler = session.config, session.sampler("test")
    method = METHOD_NAMES[config.method]
    untrained = create_learner(config, session.splits.train, session.device)
    classifiers = {f"{method}, {name}": classify for name, classify in evaluate.settings(session.average.averaged())}
    first = next(iter(evaluate.settings(untrained)))
    classifiers |= {f"the same before training, {first[0].split(':')[0]}": first[1], **evaluate.BASELINES}
    found = evaluate.measure(classifiers, sampler, config.eval_tasks, progress=True)
    width = max(map(len, found))
    say(f"\nAccuracy on {config.eval_tasks} held-out tasks, {describe(config)} (mean +- 95 % interval):")
    for name, accuracy in found.items():
        say(f"  {name:{width}}  {accuracy}")
    again = (folder.path / "evaluation.json").exists()  # of the same run before it went on: it is kept
    kept = f"evaluation-step-{session.step}.json" if again else "evaluation.json"
    folder.write_json(kept, {name: vars(accuracy) for name, accuracy in found.items()})
    episodes = sampler.episodes(1, config.eval_tasks)
    name, classify = next(iter(evaluate.settings(session.average.averaged())))
    title = f"A test episode of {config.data}, {name}"
    predicted = classify(episodes)[0]
    picture = plots.episode(episodes.support_x[0], episodes.query_x[0], episodes.query_y[0], predicted, title)
    folder.write_bytes("test_episode.png", picture)
    say(f"Pictures and figures are in {folder.path}")


def describe(config: Config) -> str:
    return f"{METHOD_NAMES[config.method]}, {Path(config.data).name} {config.ways}-way {config.shots}-shot"


def default_folder(config: Config) -> Path:
    name = f"{Path(config.data).name}-{config.ways}way-{config.shots}shot-{config.method}"
    return Path("runs") / "few_shot" / f"{ranks.launch_name() or time.strftime('%Y%m%d-%H%M%S')}-{name}"


def say(text: str) -> None:
    """Print at once, also into a pipe; on the first rank alone."""
    if bl.distributed.rank() == 0:
        print(text, flush=True)
