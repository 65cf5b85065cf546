"""Trained networks as single files, small enough to ship: tensors, numbers and how they came about, with a hash."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import shlex
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

import bilevel as bl
from applications.few_shot import backbone, data
from applications.few_shot.config import Config, Precision
from applications.few_shot.methods import Learner, fixed_at_zero
from applications.few_shot.train import checkpoint_file, untrained_network
from applications.frame import schema
from applications.frame.checkpoint import not_finite
from applications.frame.command import lengths_of, names_code, refuse_code, require
from applications.frame.errors import UserError
from applications.frame.options import check_values, is_file, option
from applications.frame.run import SOLVER
from applications.frame.run_folder import RunFolder, understood
from applications.frame.tune import read_settings

SHIPPED = Path(__file__).parent / "trained"
"""Folder of the networks that come with the project, ``NAME.pt`` each."""

FORMAT = 1


class State(TypedDict):
    """What `Session.state` gives."""

    meta: dict[str, Tensor]
    log_strength: dict[str, Tensor]
    average: dict[str, Tensor]
    running_norm: float
    optimizer: dict[str, Any]
    step: int
    seconds: float
    classes: NotRequired[list[str]]
    images: NotRequired[str]


class Origin(TypedDict):
    """How a network came about."""

    command: str
    hours: float
    steps: int
    seed: int
    start: NotRequired[str]
    classes: NotRequired[list[str]]
    validation: NotRequired[float]
    solver: NotRequired[dict[str, str]]


class Content(TypedDict):
    """A file of a trained network, but for its hash."""

    format: Literal[1]
    config: dict[str, Any]
    origin: Origin
    solver: str
    meta: dict[str, Tensor]
    log_strength: dict[str, Tensor]


@dataclass(frozen=True)
class Trained:
    """Meta-parameters with the configuration that made them.

    Attributes:
        meta: name -> tensor, without those of a head that stays at zero.
        log_strength: layer -> log lambda, 0-d.
        origin: ``command``, ``hours``, ``steps``, ``seed``; ``start``, the network that it started from, if any;
            ``classes``, the names of the classes that it was trained on, where they are a folder's; ``validation``
            where it was measured: the accuracy in percent on tasks of the validation classes when the file was made;
            and ``solver``, the settings of ``--solver`` as Python, where it was given.
        chosen: solver settings of a tuned run, in place of those of the configuration.
        trusted: what may be imported, each a ``package.module:factory``, where the configuration says that the network
            or its backbone is made by it; a file or a folder alone runs no code.
    """

    config: Config
    meta: dict[str, Tensor]
    log_strength: dict[str, Tensor]
    origin: dict[str, Any]
    chosen: dict[str, Any] = field(default_factory=dict)
    trusted: tuple[str | None, ...] = ()

    @classmethod
    def load(cls, source: str | Path) -> Trained:
        """From the name of a shipped network, a file as `save` writes it, or the folder of a run.

        Raises:
            UserError: there is none, or the file is damaged or of another make.
        """
        path = Path(source)
        if is_file(path / "config.json"):
            return cls.from_run(path)
        if not is_file(path):
            path = SHIPPED / f"{source}.pt"
        if not is_file(path):
            raise UserError(
                f"There is no trained network {str(source)!r}: it is neither the folder of a run, nor a file, nor one "
                f"of those that are shipped ({', '.join(shipped()) or 'none yet'})."
            )
        return cls._from_file(path)

    @classmethod
    def from_run(cls, path: Path) -> Trained:
        """What a run evaluates: the moving average of its last checkpoint."""
        folder = RunFolder.open(path)
        config = Config.from_json(folder.read_json("config.json"))
        file = checkpoint_file(folder)
        state: Any = folder.load_checkpoint(torch.device("cpu"), file).get("training")
        schema.check(state, State, path / file, "checkpoint of a few-shot training")
        meta, log_strength = (_part(state["average"], part) for part in ("meta", "log_strength"))
        solver = path / SOLVER
        chosen = read_settings(solver, config.solver_settings, "few_shot") if solver.is_file() else {}
        origin: dict[str, Any] = {
            "command": _commands(config, state["step"], lengths_of(folder, config), chosen),
            "hours": round(state["seconds"] / 3600, 3),
            "steps": state["step"],
            "seed": config.seed,
        }
        if chosen:
            origin["solver"] = {name: bl.tuning.expression(setting) for name, setting in chosen.items()}
        if config.start is not None:
            origin["start"] = config.start
        if "classes" in state:
            origin["classes"] = state["classes"]
        measured = [r for r in folder.metrics() if "validation_accuracy" in r and r["step"] <= state["step"]]
        if measured:
            with understood(path / "metrics.jsonl"):
                origin["validation"] = round(float(measured[-1]["validation_accuracy"]), 3)
        fixed = fixed_at_zero(config, meta)
        kept = {name: value.detach().clone() for name, value in meta.items() if name not in fixed}
        return cls(config, kept, dict(log_strength), origin, chosen)

    @staticmethod
    def mean(networks: Sequence[Trained]) -> Trained:
        """The network whose parameters are the means of those of several: one and what it started from, say.

        Source: Wortsman et al. 2022, arXiv 2109.01903. The configuration and the solver settings are the first one's.

        Raises:
            UserError: they are not of one make, or not of one data set.
        """
        first, *others = networks
        for other in others:
            shapes = [{name: value.shape for name, value in one.meta.items()} for one in (first, other)]
            if first.config.data != other.config.data or first.log_strength.keys() != other.log_strength.keys():
                raise UserError("The networks cannot be averaged: they are of other data, or have a lambda for others.")
            if shapes[0] != shapes[1] or any(getattr(first.config, n) != getattr(other.config, n) for n in NETWORK):
                raise UserError(f"The networks cannot be averaged: {_as_trained(other.config, first.config)}.")
        meta, log_strength = (
            {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}
            for parts in ([one.meta for one in networks], [one.log_strength for one in networks])
        )
        origins = [one.origin for one in networks]
        commands = list(dict.fromkeys(origin["command"] for origin in origins))
        origin = {key: value for key, value in origins[0].items() if key != "validation"}
        origin |= {name: sum(one[name] for one in origins) for name in ("hours", "steps")}
        origin["command"] = "; and ".join(commands) + ("; then the mean of these networks" if others else "")
        if any("classes" in one for one in origins):
            origin["classes"] = sorted({name for one in origins for name in one.get("classes", [])})
        return replace(first, meta=meta, log_strength=log_strength, origin=origin)

    def save(self, path: Path) -> None:
        """Write it as a new file of tensors, numbers and strings, which loads without executing anything.

        Raises:
            UserError: there is a file of that name, or it cannot be written.
        """
        content = self._content()
        buffer = io.BytesIO()
        torch.save({**content, "hash": digest(content)}, buffer)
        RunFolder(path.parent).write_new([path.name], buffer.getvalue())

    def refuse_code(self) -> None:
        """To be called before anything of the configuration is used.

        Raises:
            UserError: it names code that is not `trusted`.
        """
        for name in self.config.names_code:
            value = getattr(self.config, name)
            if names_code(self.config, name) and value not in self.trusted:
                refuse_code(value, name, "The trained network")

    def learner(
        self, ways: int | None = None, device: torch.device | str = "cpu", precision: Precision | None = None
    ) -> Learner:
        """The network with its parameters, for tasks of ``ways`` classes; None: as many as in training.

        ``precision`` is that of `Config`; None: that of its training.

        Raises:
            UserError: the head was learned, for another number of classes; the network's code is another one now, or
                is not `trusted`.
        """
        self.refuse_code()
        ways = ways or self.config.ways
        config = replace(self.config, ways=ways, precision=precision or self.config.precision)
        net = untrained_network(config, *backbone.shape(config)).to(torch.device(device), config.dtype)
        learner = Learner.create(config, net, self.chosen)
        self.put_into(learner)
        put(learner.log_strength, self.log_strength)
        return learner

    def at_strength(self, strength: float) -> Trained:
        """The same with another lambda.

        Raises:
            UserError: lambda was learned with the network, or the value is not positive.
        """
        require(0 < strength < math.inf, f"The strength is {strength}: a positive number is needed.")
        if self.config.learn_strength != "no":
            raise UserError(
                "The strength (lambda) of this network was learned with it, and is no longer a setting. Leave it out, "
                "or train with --learn-strength no."
            )
        log_strength = {name: torch.full_like(value, strength).log() for name, value in self.log_strength.items()}
        return replace(self, log_strength=log_strength)

    def put_into(self, learner: Learner) -> None:
        """Copy the meta-parameters into those of a learner, whose settings and lambda stay its own.

        Raises:
            UserError: it is another network, or its head was learned for another number of classes.
        """
        ways, fixed = learner.config.ways, fixed_at_zero(learner.config, learner.meta)
        if ways != self.config.ways and not fixed:
            raise UserError(
                f"The network was trained for {self.config.ways} classes with a last layer that is learned, and has no "
                f"weights for {ways}. One with a layer called head, trained with --head zero, serves any number."
            )
        other = _as_trained(self.config, learner.config)
        put({name: param for name, param in learner.meta.items() if name not in fixed}, self.meta, other)

    def _content(self) -> dict[str, Any]:
        values = {**self.config.to_json(), "data_root": None}
        tensors = {"meta": self.meta, "log_strength": self.log_strength}
        plain = {part: {n: t.detach().cpu().contiguous() for n, t in named.items()} for part, named in tensors.items()}
        solver = (
            "" if not self.chosen else _through_a_file(lambda path: bl.tuning.save(path, self.chosen), Path.read_text)
        )
        return {"format": FORMAT, "config": values, "origin": self.origin, "solver": solver, **plain}

    @classmethod
    def _from_file(cls, path: Path) -> Trained:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            found = content.pop("hash")
            if found != digest(content):
                raise UserError(f"{path} is damaged: its content has another hash than it says. Fetch it again.")
            schema.check(content, Content, path, "trained network of this version")
            today = Config().to_json()  # knobs may have come and gone since
            config = Config.from_json({**today, **{k: v for k, v in content["config"].items() if k in today}})
            text = content["solver"]
            chosen = {} if not text else _through_a_file(lambda path: path.write_text(text), bl.tuning.load)
            check_values(config)
            config.check()
            if bad := next(not_finite({"meta": content["meta"], "log_strength": content["log_strength"]}), None):
                raise UserError(f"{path} is of no use: {bad} is not finite.")
            return cls(config, content["meta"], content["log_strength"], content["origin"], chosen)
        except UserError:
            raise
        except Exception as error:  # torch.load and a file of another make raise a dozen types
            reason = str(error).partition("\n")[0] or type(error).__name__
            if isinstance(error, pickle.UnpicklingError):  # its message says how to run code from the file
                reason = "it is no file of tensors"
            raise UserError(f"{path} is no trained network of this version, or damaged: {reason}.") from error


def seen_in_training(trained: Trained, config: Config, classes: data.ImageClasses) -> int:
    """How many of these classes a network was trained on: another split may have other classes for its test."""
    training = trained.config
    if training.data == config.data and "classes" in trained.origin:
        return len(set(trained.origin["classes"]) & set(classes.names))
    same = (training.data, training.split, training.seed, training.held_out)
    if same == (config.data, config.split, config.seed, config.held_out) or training.data != config.data:
        return 0
    splits = data.load(training.data, config.data_root, split=training.split, reading=training.reading)
    return len(set(splits.train.names) & set(classes.names))


def start_of(config: Config) -> Trained | None:
    """The network to start from; None: random parameters.

    Raises:
        UserError: there is no such network.
    """
    return None if config.start is None else Trained.load(config.start)


def shipped() -> list[str]:
    """Names of the networks that come with the project."""
    return sorted(path.stem for path in SHIPPED.glob("*.pt"))


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of everything in a file: the bytes of its tensors with their names, and the rest as JSON."""
    found = hashlib.sha256()
    for part, values in sorted(content.items()):
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor)} if isinstance(values, dict) else {}
        for name, tensor in sorted(tensors.items()):
            found.update(f"{part}.{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.cpu().contiguous().numpy().tobytes())
        if not tensors:
            found.update(f"{part} {json.dumps(values, sort_keys=True)}\n".encode())
    return found.hexdigest()


def command(config: Config, chosen: Mapping[str, Any] | None = None) -> str:
    """The command that trains with this configuration, with the options that are not at their defaults.

    Args:
        chosen: what the file of ``--solver`` held, if it was given; options that it stands in place of are left out.
    """
    words = options(config, config.replaced_by(chosen or {})) + (["--solver", SOLVER] if chosen else [])
    return f"python -m applications.few_shot train {shlex.join(words)}".strip()


def _commands(config: Config, steps: int, lengths: list[int], chosen: Mapping[str, Any]) -> str:
    """How a run was made: where it became longer, by one command after another, since schedules follow the length."""
    first, *later = (lengths or [config.steps]) if config.schedule == "cosine" else [steps]
    again = [f"python -m applications.few_shot train --resume RUN --steps {length}" for length in later]
    return "; then ".join([command(replace(config, steps=first), chosen), *again])


def options(config: Config, without: Collection[str] = ()) -> list[str]:
    """Those of a configuration that are not at their defaults, but for the place, the threads and the device.

    Args:
        without: other knobs that are left out.
    """
    default, words = Config().to_json(), []
    for name, value in config.to_json().items():
        if value != default[name] and name not in ("data_root", "threads", "device", *without):
            option, values = name.replace("_", "-"), value if isinstance(value, tuple | list) else [value]
            words += [f"--no-{option}" if value is False else f"--{option}"]
            words += [] if isinstance(value, bool) else [str(value) for value in values]
    return words


NETWORK = ("model", "backbone", "width", "norm", "halve")
"""Knobs that say which network it is."""


def _as_trained(trained: Config, config: Config) -> str:
    """What would make the network that of its training, in words."""
    told = [
        f"{option(name)} {getattr(trained, name)}"
        for name in NETWORK
        if getattr(trained, name) != getattr(config, name)
    ]
    if trained.image_shape != config.image_shape:
        channels, size = trained.image_shape
        told.append(f"images [{channels}, {size}, {size}] (of a folder: --grey, --image-size)")
    return f"it was trained with {', '.join(told)}" if told else OTHER


OTHER = "give --model, --width and the other knobs of the network as in its training"


def put(params: dict[str, Tensor], values: dict[str, Tensor], other: str = OTHER) -> None:
    """Copy values into parameters of the same names and shapes, whatever their precision.

    Raises:
        UserError: one of them is another one.
    """
    if unknown := set(values) - set(params):
        told = f"The file has {', '.join(sorted(unknown))}, and the network has not"
        raise UserError(f"{told}: not of one make; {other}.")
    for name, param in params.items():
        found = values.get(name)
        if found is None or found.shape != param.shape or not found.is_floating_point():
            has = "missing" if found is None else f"{list(found.shape)} of {found.dtype}"
            raise UserError(
                f"The network has {name} {list(param.shape)} of {param.dtype}, and the file has it {has}: not of one "
                f"make; {other}."
            )
        with torch.no_grad():
            param.copy_(values[name])


def _through_a_file(write: Callable[[Path], Any], read: Callable[[Path], Any]) -> Any:
    """What is read from a file that was written: solver settings have no other form as text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "solver.json"
        write(path)
        return read(path)


def _part(values: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in values.items() if name.startswith(f"{part}.")}
