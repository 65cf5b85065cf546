"""The knobs of the few-shot application, and the presets with the settings of the papers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from typing_extensions import Self

from applications.few_shot.data import SHAPES, Reading
from applications.frame.command import Purposes, SolverKnobs, require, require_at_least_one, require_positive

Method = Literal["imaml", "imaml-hf", "maml", "fomaml", "reptile", "prototypical"]


NEWER = ("backbone", "start", "distort", "late_from", "late_inner_steps", "late_cg_steps", "clock")
"""Knobs that runs of earlier versions don't have; their defaults change nothing."""


Precision = Literal["float32", "tf32", "bf16", "float64"]


@dataclass(frozen=True)
class Config(SolverKnobs):
    """Few-shot classification by implicit MAML and its relatives: train, then evaluate on held-out tasks.

    Every knob has a default that works; the defaults are sized for two CPU cores and five minutes.
    """

    preset: str = "default"
    """Settings to start from; the other options change them."""
    threads: int | None = None
    """Threads of PyTorch on a CPU, and tasks that are worked on side by side; None: all cores."""
    data: str = "glyphs"
    """Data set: glyphs (built in), omniglot and cifar-fs (downloaded), mini-imagenet; or a folder of class folders."""
    data_root: Path | None = None
    """Folder of the data sets; by default $BILEVEL_DATA, then ~/.cache/bilevel."""
    split: Literal["characters", "alphabets"] = "characters"
    """Omniglot's split: shuffled characters (the MAML protocol) or whole alphabets (Lake's, harder)."""
    image_size: int = 28
    """Side in pixels to which the images of a folder are brought."""
    grey: bool = False
    """Read the images of a folder in grey instead of colour."""
    held_out: tuple[float, float] = (0.2, 0.2)
    """Fractions of a folder's classes for validation and test, where it has no folders train, validation, test."""
    ways: int = 5
    """Classes in a task."""
    shots: int = 1
    """Labelled support images for each class."""
    queries: int = 5
    """Query images for each class while training."""

    method: Method = "imaml"
    """imaml (gradient descent), imaml-hf (Hessian-free Newton), maml (unrolled), fomaml, reptile; prototypical: the
    nearest class mean of features, the baseline that adapts nothing."""
    model: str = "conv4"
    """conv4, fc, or the import path package.module:factory of a function (channels, image size, ways) -> module."""
    backbone: str | None = None
    """A frozen network, package.module:factory of (channels, image size) -> module, whose features [n, size] are
    computed once; --model is then a head behind them."""
    width: int = 32
    """Filters of each convolution of conv4."""
    norm: Literal["batch", "image"] = "batch"
    """Norm of conv4: batch statistics (transductive) or each image by itself (inductive)."""
    halve: Literal["pool", "stride"] = "stride"
    """How conv4 halves its maps: max-pool, or strided convolutions at a quarter of the work."""

    start: str | None = None
    """Network to start from, in place of random parameters: a shipped one, a file of `export`, or a run's folder."""

    head: Literal["zero", "learned"] = "zero"
    """Meta-parameters of the module called head: kept at zero, as class numbers are arbitrary, or learned."""

    inner_steps: int = 5
    """Steps of adaptation: gradient steps, or Newton steps of imaml-hf."""
    inner_lr: float = 0.1
    """Step size of adaptation by gradient descent."""
    inner_momentum: float = 0.0
    """Heavy-ball momentum of adaptation by gradient descent."""
    safeguard: bool = True
    """Take back the gradient steps that raise a task's loss, and halve its step size."""
    newton_cg_steps: int = 5
    """Products for each Newton direction of imaml-hf."""
    strength: float = 1.0
    """lambda, the strength of the proximal term of imaml: adapted parameters stay near the meta-parameters."""
    learn_strength: Literal["no", "scalar", "layer"] = "no"
    """Learn lambda with the meta-parameters: one, or one for each layer."""
    cg_steps: int = 2
    """Steps of conjugate gradients for the hypergradient; 0 takes the identity (first order)."""
    hessian: Literal["graph", "func"] = "graph"
    """Hessian products over the retained graph (faster) or recomputed by torch.func."""

    distort: float = 0.0
    """Shear, stretch, turn and move each training image at random, by affine maps of this standard deviation (0.06 is
    what helps on Omniglot); drawings of ink and paper stay that."""

    steps: int = 500
    """Meta-steps."""
    late_from: float = 0.7
    """Part of the schedule after which the next two are taken, when the inner problem is nearly solved."""
    late_inner_steps: int | None = None
    """Steps of adaptation late in training; None: as before."""
    late_cg_steps: int | None = None
    """Steps of conjugate gradients late in training; None: as before."""
    tasks: int = 16
    """Tasks in a meta-step."""
    lr: float = 8e-3
    """Step size of the meta-optimizer (Adam)."""
    schedule: Literal["cosine", "root", "constant"] = "cosine"
    """Schedule of that step size: to zero over the meta-steps, lr / sqrt(1 + step / 1000), or none."""
    clip: float | None = 3.0
    """Shorten a meta-gradient to so many times the running norm of those before; None: never."""
    average: int = 100
    """Meta-steps in the moving average of the meta-parameters that is evaluated, at most a tenth of all; 1: none."""
    minutes: float | None = None
    """Stop training after so many minutes; the schedule then follows the clock instead of the steps."""
    clock: Literal["wall", "cpu"] = "wall"
    """What --minutes and the seconds of the metrics count: the clock on the wall, or the CPU time of all threads, which
    other programs on the machine do not shorten."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes the GPU where there is one."""
    chunk_size: int | None = None
    """Tasks in one tensor program; None: a few on a CPU, so that their tensors stay in the cache, all on a GPU."""
    capture: bool = False
    """Record the meta-step as a CUDA graph and replay it, on a GPU; for methods that make a fixed number of steps."""
    precision: Precision = "float32"
    """Arithmetic: tf32 and bf16 are for GPUs."""

    eval_tasks: int = 600
    """Held-out tasks of the final evaluation."""
    eval_queries: int = 15
    """Query images for each class in evaluations."""
    eval_steps: int | None = 16
    """Steps of adaptation in evaluations, more than in training since nothing is differentiated; None: as there."""
    validate_every: int = 100
    """Meta-steps between validations (100 tasks of the validation classes); 0 for none."""

    solver_settings = ("solver", "hypergrad", "strength")
    names_code = ("model", "backbone")
    own_code = ("applications.few_shot.backbone:resnet18",)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_json`; of a run from before the `NEWER` knobs came, with their defaults."""
        if isinstance(values, dict):  # else the base says that it is no configuration
            default = cls().to_json()
            values = {**{name: default[name] for name in NEWER}, **values}
        return super().from_json(values)

    def untuned(self) -> Collection[str]:
        """See `SolverKnobs`."""
        return ("steps", "schedule", "eval_tasks", "validate_every", "late_from", "late_inner_steps", "late_cg_steps")

    def check(self) -> None:
        require_at_least_one(self, "ways", "shots", "queries", "eval_queries")
        counts = ("inner_steps", "newton_cg_steps", "tasks", "steps", "eval_tasks", "width", "eval_steps")
        require_at_least_one(self, "late_inner_steps", "late_cg_steps")
        require(0 <= self.distort < 1, f"--distort is {self.distort}: from 0 to below 1, where nothing is left.")
        frozen = self.distort > 0 and self.backbone is not None
        require(not frozen, "--distort: a frozen --backbone has seen each image once, as it is. Leave it out.")
        require(0 <= self.late_from <= 1, f"--late-from is {self.late_from}: it lies in [0, 1].")
        late = self.late_inner_steps is not None or self.late_cg_steps is not None
        require(not (late and self.solver), "--solver has steps of its own: leave --late-... away.")
        require_at_least_one(self, *counts, "image_size", "average", "chunk_size")
        require(self.ways >= 2, f"--ways is {self.ways}: there must be two classes or more to tell apart.")
        require_positive(self, "inner_lr", "strength", "lr")
        require(self.minutes is None or self.minutes > 0, f"--minutes is {self.minutes}: it must be positive.")
        clip = f"--clip is {self.clip}: it is at least 1, or None; below, every meta-gradient shrinks."
        require(self.clip is None or self.clip >= 1, clip)
        fractions = min(self.held_out) > 0 and sum(self.held_out) < 1
        require(fractions, f"--held-out is {self.held_out}: two fractions above 0, of sum below 1.")
        require(
            self.backbone is None or self.model != "fc",
            "--model fc takes images, not features: leave it out, or name a factory of your own.",
        )
        require(0 <= self.inner_momentum < 1, f"--inner-momentum is {self.inner_momentum}: it lies in [0, 1).")
        require(self.cg_steps >= 0 and self.validate_every >= 0, "--cg-steps and --validate-every cannot be negative.")
        implicit = self.method.startswith("imaml")
        require(
            implicit or self.learn_strength == "no",
            f"--learn-strength needs an imaml method: {self.method} has no proximal term.",
        )
        require(
            implicit or self.solver is None,
            f"--solver needs an imaml method: {self.method} has a hypergradient of its own.",
        )
        require(
            not self.capture or self.method != "imaml-hf",
            "--capture records a fixed number of steps: --method imaml-hf searches for its step sizes.",
        )
        require(
            self.norm != "image" or self.width % 8 == 0,
            f"--width is {self.width}: with --norm image it must be a multiple of 8.",
        )

    def replaced(self) -> Mapping[str, Collection[str]]:
        """See `SolverKnobs`; the Newton steps of imaml-hf have Hessian products too."""
        adaptation = ("inner_steps", "inner_lr", "inner_momentum", "safeguard", "newton_cg_steps")
        products = ("cg_steps",) if self.method == "imaml-hf" else ("cg_steps", "hessian")
        return {"solver": adaptation, "hypergrad": products, "strength": ("strength",)}

    def only_for(self) -> Purposes:
        """See `Knobs`."""
        adapts, newton = self.method != "prototypical", self.method == "imaml-hf"
        late = self.late_inner_steps is not None or self.late_cg_steps is not None
        gpu = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        products = self.cg_steps > 0 or self.late_cg_steps is not None or newton
        return {
            "--cg-steps above 0, products with the Hessian": (products, ("hessian",)),
            "--late-from below 1": (self.late_from < 1, ("late_inner_steps", "late_cg_steps")),
            "folders of images": (self.data not in SHAPES, ("image_size", "grey", "held_out")),
            "--data omniglot": (self.data == "omniglot", ("split",)),
            "--model conv4 on images": (self.network == "conv4", ("width", "norm", "halve")),
            "the imaml methods": (
                self.method.startswith("imaml"),
                ("strength", "cg_steps", "late_cg_steps", "hessian"),
            ),
            "--method imaml-hf": (newton, ("newton_cg_steps",)),
            "adaptation by gradient descent": (adapts and not newton, ("inner_lr", "inner_momentum", "safeguard")),
            "methods that adapt a network": (adapts, ("inner_steps", "late_inner_steps", "eval_steps", "head")),
            "--late-inner-steps and --late-cg-steps": (late, ("late_from",)),
            "a GPU": (gpu, ("capture", *(("precision",) if self.precision == "tf32" else ()))),
        }

    @property
    def network(self) -> str:
        """What is built: --model, behind a backbone a head unless another one is named."""
        return "head" if self.backbone is not None and self.model == "conv4" else self.model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of parameters and images; bf16 and tf32 are arithmetic on float32."""
        return torch.float64 if self.precision == "float64" else torch.float32

    @property
    def reading(self) -> Reading:
        """How the images of a folder are read."""
        return Reading(self.image_size, self.grey, self.held_out, self.seed)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Channels and side of the images."""
        return SHAPES.get(self.data, (1 if self.grey else 3, self.image_size))


# Rajeswaran et al. 2019, section 4 and the command of the released code: 16 gradient steps (25 for 20-way), lambda 2,
# 5 CG steps, meta-batch 32, Adam 1e-3, 20,000 meta-steps, K query images for K shots in the released code; more cost
# little and steady the meta-gradient. Conv4-64 with strided convolutions as MAML's. The released inner step of 0.1
# without momentum is kept.
PAPER = replace(
    Config(),
    data="omniglot",
    width=64,
    inner_steps=16,
    inner_lr=0.1,
    head="learned",
    strength=2.0,
    cg_steps=5,
    eval_steps=None,
    steps=20_000,
    tasks=32,
    lr=1e-3,
    queries=15,
    validate_every=500,
)

PRESETS: dict[str, Config] = {
    name: replace(config, preset=name)
    for name, config in {
        "default": Config(),
        "omniglot-10-minutes": replace(Config(), data="omniglot", minutes=10.0, steps=100_000),
        "paper-omniglot-5way-1shot": PAPER,
        "paper-omniglot-5way-5shot": replace(PAPER, shots=5),
        "paper-omniglot-20way-1shot": replace(PAPER, ways=20, inner_steps=25),
        "paper-omniglot-20way-5shot": replace(PAPER, ways=20, shots=5, inner_steps=25),
        "paper-miniimagenet-5way-1shot": replace(
            PAPER,
            data="mini-imagenet",
            width=32,
            halve="pool",
            strength=0.5,
            inner_steps=10,
            steps=60_000,
            tasks=4,
        ),
    }.items()
}
