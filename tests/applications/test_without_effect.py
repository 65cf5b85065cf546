"""Options that change nothing beside the others are told: who gives one believes that it does something."""

from __future__ import annotations

import dataclasses

import pytest

from applications.data_cleaning.knobs import Config as Cleaning
from applications.data_cleaning.tuning import tunable as cleaning
from applications.distillation.knobs import Config as Distillation
from applications.domain_weights.knobs import Config as Weights
from applications.equilibrium.knobs import Config as Equilibrium
from applications.few_shot.__main__ import main as few_shot
from applications.few_shot.compare import ComparisonConfig
from applications.few_shot.config import PRESETS
from applications.few_shot.config import Config as FewShot
from applications.frame.command import main, parse, tell_replaced
from applications.learned_optimizer_settings.knobs import Config as Learned
from applications.regularization.knobs import Config as Regularization
from applications.reweighting.knobs import Config as Reweighting
from applications.search.knobs import Config as Search
from applications.sparse_regression.knobs import Config as SparseRegression

CASES = [
    (FewShot, "--image-size 84 --data omniglot", "--image-size changes nothing here: it is for folders of images."),
    (FewShot, "--grey", "--grey changes nothing here"),
    (FewShot, "--split alphabets", "it is for --data omniglot"),
    (FewShot, "--model fc --width 64 --halve pool", "--width changes nothing here: it is for --model conv4 on images."),
    (FewShot, "--backbone applications.few_shot.backbone:resnet18 --norm image", "--norm changes nothing here"),
    (FewShot, "--method maml --strength 2", "--strength changes nothing here: it is for the imaml methods."),
    (FewShot, "--method reptile --cg-steps 5", "--cg-steps changes nothing here"),
    (FewShot, "--newton-cg-steps 7", "it is for --method imaml-hf"),
    (FewShot, "--method imaml-hf --inner-lr 0.3", "it is for adaptation by gradient descent"),
    (FewShot, "--method prototypical --inner-steps 9", "it is for methods that adapt a network"),
    (FewShot, "--late-from 0.5", "it is for --late-inner-steps and --late-cg-steps"),
    (FewShot, "--late-inner-steps 3 --late-from 1", "--late-inner-steps changes nothing here: it is for --late-from"),
    (FewShot, "--hessian func --cg-steps 0", "--hessian changes nothing here: it is for --cg-steps above 0"),
    (Cleaning, "--data digits --data-root /nope", "--data-root changes nothing here: it is for --data mnist, cifar10"),
    (FewShot, "--capture --device cpu", "--capture changes nothing here: it is for a GPU."),
    (FewShot, "--precision tf32 --device cpu", "--precision changes nothing here: it is for a GPU."),
    (FewShot, "--preset paper-omniglot-5way-1shot --method maml --strength 3", "--strength changes nothing here"),
    (ComparisonConfig, "--methods maml fomaml --cg-steps 3", "--cg-steps changes nothing here"),
    (ComparisonConfig, "--minutes 5 --steps 300", "--steps changes nothing here: it is for --minutes None."),
    (Cleaning, "--hidden 64", "--hidden changes nothing here: it is for the network; add its --model."),
    (Cleaning, "--seconds 9", "it is for --setting stochastic"),
    (Cleaning, "--setting stochastic --steps 9 --repeats 2", "--steps changes nothing here"),
    (Distillation, "--network linear --convnet-steps 9", "it is for the ConvNet"),
    (Distillation, "--network convnet --l2 0.1", "it is for the linear classifier"),
    (Regularization, "--problem features --hidden 10", "it is for --problem weights"),
    (Reweighting, "--problems noise --imbalance 9", "it is for --problems long-tail"),
    (Reweighting, "--problems long-tail --noise 0.1", "it is for --problems noise"),
    (Reweighting, "--model resnet32 --hidden 9", "it is for --model mlp"),
    (Search, "--task regression", "it is for other --data than what is built in"),
    (SparseRegression, "--data synthetic --noise-features 5", "it is for real data"),
    (SparseRegression, "--data diabetes --block-size 5", "it is for synthetic data and files"),
]


@pytest.mark.parametrize(("kind", "words", "told"), CASES)
def test_it_is_told(kind, words, told, capsys):
    parse(kind, words.split(), "command", presets=PRESETS if kind is FewShot else None)
    notes = capsys.readouterr().err.splitlines()
    assert notes
    assert all(note.startswith("note: --") for note in notes)
    assert any(told in note for note in notes)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (FewShot, "--image-size 84 --grey --data photographs"),
        (FewShot, "--split alphabets --data omniglot"),
        (FewShot, "--preset paper-omniglot-5way-1shot --method maml"),
        (FewShot, "--preset paper-omniglot-5way-1shot --model fc"),
        (FewShot, "--late-from 0.5 --late-cg-steps 5"),
        (FewShot, "--clock wall --grey --resume some/run"),
        (FewShot, "--precision bf16 --device cpu"),
        (FewShot, "--capture --precision tf32 --device cuda"),
        (ComparisonConfig, "--methods maml imaml --cg-steps 3 --strength 2"),
        (Cleaning, "--model mlp --hidden 64"),
        (Cleaning, "--data mnist --data-root some/where"),
        (FewShot, "--method imaml-hf --hessian func --cg-steps 0"),
        (Distillation, "--network both --l2 0.1 --width 8"),
        (Reweighting, "--noise 0.1 --imbalance 9 --hidden 9"),
        (Search, "--data diabetes --task regression"),
        (SparseRegression, "--noise-features 5 --block-size 10"),
    ],
)
def test_what_has_an_effect_is_not(kind, words, capsys):
    parse(kind, words.split(), "command", presets=PRESETS if kind is FewShot else None)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "words", "settings", "told"),
    [
        (FewShot, "--inner-steps 9", {"solver"}, ["inner-steps"]),
        (FewShot, "--inner-steps 9 --hessian func", {"hypergrad"}, ["hessian"]),
        (FewShot, "--method imaml-hf --hessian func", {"hypergrad"}, []),
        (FewShot, "--inner-steps 9 --tasks 3", {"strength"}, []),
        (Equilibrium, "--adjoint-rtol 0.5 --tol 0.1", {"solver", "hypergrad"}, ["adjoint-rtol"]),
        (Learned, "--hypergrad forward --outer-lr 1", {"hypergrad", "outer_lr"}, ["hypergrad", "outer-lr"]),
        (Reweighting, "--meta-lr 1 --lr 1", {"hypergrad", "meta_lr"}, ["meta-lr"]),
        (Weights, "--outer-lr 1", {"outer_lr"}, ["outer-lr"]),
        (Weights, "--outer-lr 1", {"hypergrad"}, []),
    ],
)
def test_what_settings_of_solvers_stand_in_place_of_is_told(kind, words, settings, told, capsys):
    knobs = parse(kind, words.split(), "command", presets=PRESETS if kind is FewShot else None)
    capsys.readouterr()
    tell_replaced(knobs, kind(), dict.fromkeys(settings))
    notes = capsys.readouterr().err.splitlines()
    assert [note.partition(" changes nothing here: the '")[0] for note in notes] == [f"note: --{name}" for name in told]


def test_what_a_study_does_not_look_at_is_told(tmp_path, capsys):
    words = ["--trials", "1", "--seconds", "0.1", "--confirm", "2", "--num-train", "60", "--num-val", "60"]
    changed = ["--steps", "3", "--repeats", "9", "--fit-ridge", "5", "--lr", "0.2"]
    assert main("data_cleaning", ["tune", *words, *changed, "--out", str(tmp_path)], Cleaning, tell, cleaning) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    why = "changes nothing here: it is for a run, and not for the trials of tune."
    assert notes == [f"note: {option} {why}" for option in ("--steps", "--repeats", "--fit-ridge")]


def tell(knobs, run):
    raise AssertionError("A study tells no story.")


@pytest.mark.parametrize(
    "kind",
    [
        Cleaning,
        Distillation,
        Equilibrium,
        FewShot,
        Learned,
        Regularization,
        Reweighting,
        Search,
        SparseRegression,
        Weights,
    ],
)
def test_only_knobs_are_untuned(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    assert set(kind().untuned()) <= names
    assert {name for knobs in kind().replaced().values() for name in knobs} <= names


@pytest.mark.parametrize("kind", sorted({kind for kind, _, _ in CASES}, key=repr))
def test_only_knobs_are_named(kind):
    names = {field.name for field in dataclasses.fields(kind)}
    assert set(kind().without_effect()) <= names


def test_the_command_says_it_and_goes_on(tmp_path, glyph_root, capsys):
    small = ["--steps", "1", "--tasks", "2", "--width", "8", "--eval-tasks", "2", "--data-root", str(glyph_root)]
    assert few_shot([*small, "--grey", "--out", str(tmp_path / "run")]) == 0
    assert "note: --grey changes nothing here: it is for folders of images.\n" in capsys.readouterr().err
