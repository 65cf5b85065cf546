"""Networks as files: what is in them, what is refused, and that the shipped ones do what the page says."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import bilevel as bl
from applications.few_shot import data, evaluation, trained
from applications.few_shot.__main__ import main
from applications.few_shot.config import Config
from applications.few_shot.train import CHECKPOINT
from applications.few_shot.trained import Trained, seen_in_training
from applications.few_shot.tuning import tunable
from applications.frame.errors import UserError
from applications.frame.run_folder import RunFolder
from tests.applications.few_shot.conftest import QUICK


@pytest.fixture(scope="session")
def run(short_run):
    """The folder of a run of 20 meta-steps."""
    return short_run(20)


@pytest.fixture
def file(run, tmp_path):
    path = tmp_path / "network.pt"
    assert main(["export", str(run), str(path)]) == 0
    return path


class TestFile:
    def test_it_holds_the_average_and_its_origin(self, run, file):
        found = Trained.load(file)
        state = RunFolder(run).load_checkpoint(torch.device("cpu"), CHECKPOINT)["training"]
        assert found.meta
        assert not any(name.startswith("head.") for name in found.meta)
        for name, value in found.meta.items():
            assert torch.equal(value, state["average"][f"meta.{name}"])
        assert (found.config.width, found.config.data_root) == (8, None)
        assert (found.origin["steps"], found.origin["seed"]) == (20, 0)
        assert found.origin["hours"] == pytest.approx(state["seconds"] / 3600, abs=1e-3)
        assert 0 < found.origin["validation"] <= 100
        assert found.origin["command"].startswith("python -m applications.few_shot train --width 8 --inner-steps 2")

    def test_its_command_makes_its_configuration(self, run, file, tmp_path, monkeypatch):
        monkeypatch.setattr("applications.few_shot.__main__.story", lambda config, run: seen.append(config))
        seen: list[Config] = []
        words = Trained.load(file).origin["command"].split()[3:]
        assert main([*words, "--out", str(tmp_path / "again")]) == 0
        assert {**seen[0].to_json(), "data_root": None} == Trained.load(file).config.to_json()

    def test_it_loads_without_code_and_its_hash_is_checked(self, file):
        content = torch.load(file, weights_only=True)
        next(iter(content["meta"].values())).view(-1)[0] += 1e-3
        torch.save(content, file)
        with pytest.raises(UserError, match="has another hash than it says"):
            Trained.load(file)
        content = torch.load(file, weights_only=True)
        content["origin"]["hours"] = 0.5
        torch.save(content, file)
        with pytest.raises(UserError, match="has another hash than it says"):
            Trained.load(file)

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
    def test_something_else(self, content, tmp_path):
        (tmp_path / "other.pt").write_bytes(content)
        with pytest.raises(UserError, match="is no trained network of this version, or damaged"):
            Trained.load(tmp_path / "other.pt")

    def test_a_name_that_is_not_there(self):
        with pytest.raises(UserError, match="neither the folder of a run, nor a file"):
            Trained.load("no-such-network")

    def test_the_mean_of_several_networks(self, run, file, short_run, tmp_path):
        longer, path = short_run(22), tmp_path / "mean.pt"
        assert main(["export", str(longer), str(file), str(path)]) == 0
        one, other, mean = (Trained.load(source) for source in (longer, file, path))
        for name, value in mean.meta.items():
            torch.testing.assert_close(value, (one.meta[name] + other.meta[name]) / 2)
        assert mean.origin["steps"] == 42
        assert mean.origin["hours"] == pytest.approx(one.origin["hours"] + other.origin["hours"])
        assert mean.origin["command"].endswith("; then the mean of these networks")
        assert "validation" not in mean.origin

    def test_networks_of_two_makes_have_no_mean(self, file, short_run, tmp_path, capsys):
        other = Trained.load(file)
        replace(other, config=replace(other.config, halve="pool")).save(tmp_path / "pool.pt")
        assert main(["export", str(file), str(tmp_path / "pool.pt"), str(tmp_path / "mean.pt")]) == 2
        assert "cannot be averaged: it was trained with --halve pool" in capsys.readouterr().err
        replace(other, config=replace(other.config, data="omniglot")).save(tmp_path / "data.pt")
        assert main(["export", str(file), str(tmp_path / "data.pt"), str(tmp_path / "mean.pt")]) == 2
        assert "of other data" in capsys.readouterr().err

    def test_export_does_not_overwrite(self, run, file, capsys):
        before = file.read_bytes()
        assert main(["export", str(run), str(file)]) == 2
        assert "is not overwritten" in capsys.readouterr().err
        assert file.read_bytes() == before

    def test_an_export_without_its_file_is_refused(self, run, file, short_run, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("applications.few_shot.evaluation.SHIPPED", tmp_path / "shipped")
        (tmp_path / "table.csv").write_text("1")
        for last in (run, tmp_path / "table.csv", tmp_path / "new.bin", "folder/name", "name.v2"):
            assert main(["export", str(run), str(last)]) == 2
            assert "export ends with the file to write" in capsys.readouterr().err
        assert not (tmp_path / "shipped").exists()
        assert main(["export", str(run), "name"]) == 0
        assert (tmp_path / "shipped" / "name.pt").is_file()

    def test_any_number_of_ways_with_a_zero_head_only(self, file):
        found = Trained.load(file)
        learner = found.learner(ways=7)
        assert learner.meta["head.weight"].shape[0] == 7
        assert not learner.meta["head.weight"].any()
        learned = Trained(Config(width=8, head="learned"), found.meta, found.log_strength, found.origin)
        with pytest.raises(UserError, match="trained for 5 classes with a last layer that is learned"):
            learned.learner(ways=7)

    def test_tuned_settings_go_with_it(self, run, tmp_path):
        folder = tmp_path / "tuned"
        shutil.copytree(run, folder)
        settings = {"solver": bl.GradientDescent(0.05, 7), "hypergrad": bl.Implicit(bl.MINRES(max_steps=3))}
        bl.tuning.save(folder / "solver.json", settings)
        assert main(["export", str(folder), str(tmp_path / "tuned.pt")]) == 0
        for source in (folder, tmp_path / "tuned.pt"):
            found = Trained.load(source)
            assert found.chosen == settings
            assert found.learner().inner_solver() == settings["solver"]

    def test_how_a_tuned_network_came_about(self, glyph_root, tmp_path, capsys):
        """By the settings of --solver, and not by the options that these stand in place of; each command says so."""
        settings = {
            "solver": bl.GradientDescent(0.05, 3),
            "hypergrad": bl.Implicit(bl.CG(max_steps=1)),
            "strength": 3.0,
        }
        bl.tuning.save(tmp_path / "best.json", settings)
        replaced = ["--inner-steps", "20", "--inner-lr", "0.5", "--strength", "7", "--cg-steps", "9", "--no-safeguard"]
        words = [*QUICK, *replaced, "--data-root", str(glyph_root), "--steps", "1", "--solver"]
        run = tmp_path / "tuned"
        assert main([*words, str(tmp_path / "best.json"), "--out", str(run)]) == 0
        told = capsys.readouterr().err
        assert "note: --inner-lr changes nothing here: the 'solver' of --solver stands in its place.\n" in told
        for option in replaced:
            assert not option.startswith("--") or f"note: {option.replace('--no', '-')} changes nothing here" in told

        assert main(["evaluate", str(run), "--inner-lr", "5", "--strength", "1", "--eval-tasks", "2"]) == 0
        out, err = capsys.readouterr()
        assert "--inner-lr changes nothing here: the 'solver' of its training's --solver stands in its place" in err
        assert "--strength" not in err  # of an evaluation it is another one
        assert "--solver solver.json" in out
        assert f"Its --solver: solver = {bl.tuning.expression(settings['solver'])}, hypergrad = " in out
        assert main(["export", str(run), str(tmp_path / "tuned.pt")]) == 0
        for source in (run, tmp_path / "tuned.pt"):
            origin = Trained.load(source).origin
            assert "--solver solver.json" in origin["command"]
            assert "--width 8" in origin["command"]
            assert not any(option in origin["command"] for option in replaced if option.startswith("--"))
            assert origin["solver"]["strength"] == "3.0"
        assert main(["evaluate", str(run), "--eval-steps", "None", "--eval-tasks", "2", "--out", str(run / "e")]) == 0
        assert json.loads((run / "e" / "evaluation.json").read_text())["inner_steps"] == 3

    def test_another_network(self, file):
        found = Trained.load(file)
        with pytest.raises(UserError, match="not of one make"):
            Trained(Config(width=16), found.meta, found.log_strength, found.origin).learner()


class TestStart:
    def test_training_begins_at_a_network(self, file, glyph_root, tmp_path, capsys):
        words = [*QUICK, "--data-root", str(glyph_root), "--start", str(file), "--lr", "1e-9", "--average", "1"]
        out = tmp_path / "further"
        assert main([*words, "--steps", "1", "--out", str(out)]) == 0
        begun, further = Trained.load(file), Trained.load(out)
        for name, value in further.meta.items():
            torch.testing.assert_close(value, begun.meta[name], rtol=0, atol=1e-6)
        assert further.origin["start"] == str(file)
        assert f"--start {file}" in further.origin["command"]
        assert "training classes of" not in capsys.readouterr().out

    def test_it_is_needed_at_the_start_only(self, file, glyph_root, tmp_path):
        start, out = tmp_path / "start.pt", tmp_path / "further"
        shutil.copy(file, start)
        words = [*QUICK, "--data-root", str(glyph_root), "--start", str(start)]
        assert main([*words, "--steps", "1", "--out", str(out)]) == 0
        start.unlink()
        assert main(["--resume", str(out), "--steps", "2"]) == 0
        assert Trained.load(out).origin["steps"] == 2

    def test_a_study_begins_there_too(self, file, glyph_root):
        config = replace(Config(), start=str(file), width=8, tasks=2, data_root=glyph_root, validate_every=0)
        settings = {"solver": bl.GradientDescent(0.1, 2), "hypergrad": bl.Implicit(bl.CG(max_steps=2))}
        _, accuracy, _ = next(iter(tunable(replace(config, lr=1e-9)).train(settings, seed=0)))
        at_random = next(iter(tunable(replace(config, lr=1e-9, start=None)).train(settings, seed=0)))
        assert accuracy() > at_random[1]()

    @pytest.mark.parametrize(
        ("more", "told"),
        [
            (["--width", "16"], "make; it was trained with --width 8"),
            (["--start", "no-such-network"], "There is no trained network"),
        ],
    )
    def test_another_network_or_none(self, more, told, file, glyph_root, tmp_path, capsys):
        words = [*QUICK, "--data-root", str(glyph_root), "--start", str(file), "--steps", "1"]
        assert main([*words, *more, "--out", str(tmp_path / "other")]) == 2
        assert told in capsys.readouterr().err

    def test_classes_of_the_test_that_it_was_trained_on_are_told(self, file, glyph_root, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("applications.few_shot.__main__.seen_in_training", lambda *_: 3)
        words = [*QUICK, "--data-root", str(glyph_root), "--start", str(file), "--steps", "1"]
        assert main([*words, "--out", str(tmp_path / "seen")]) == 0
        assert f"3 of the test classes were training classes of {file}" in capsys.readouterr().out


class TestEvaluate:
    def test_of_a_run_is_written_beside_it_and_never_over_another(self, run, glyph_root, capsys):
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        for _ in range(2):
            assert main(["evaluate", str(run), "--ways", "3", "--eval-tasks", "10"]) == 0
        assert "Accuracy on 10 held-out tasks, implicit MAML, glyphs 3-way 1-shot" in capsys.readouterr().out
        after = {path.name: path.read_bytes() for path in run.iterdir()}
        assert {name: after[name] for name in before} == before
        stem = "evaluation-step-20-3way-1shot-test"
        assert set(after) - set(before) == {f"{stem}.json", f"{stem}-2.json"}
        one, two = (json.loads(after[f"{stem}{more}.json"]) for more in ("", "-2"))
        assert {**one, "seconds": 0} == {**two, "seconds": 0}
        assert one["accuracy"]["implicit MAML, transductive: batch statistics of all queries"]["num_tasks"] == 10
        assert one["seen_in_training"] == 0

    def test_of_a_file_is_that_of_its_run(self, run, file, glyph_root, capsys):
        root = ["--data-root", str(glyph_root), "--eval-tasks", "10"]
        assert main(["evaluate", str(run), *root]) == 0
        of_run = capsys.readouterr().out
        assert main(["evaluate", "--trained", str(file), *root]) == 0
        of_file = capsys.readouterr().out
        lines = [line for line in of_run.splitlines() if "+-" in line]
        assert len(lines) == 3  # with the heading
        assert [line for line in of_file.splitlines() if "+-" in line] == lines

    def test_validation_classes_and_baselines(self, file, glyph_root, capsys):
        more = ["--classes", "validation", "--baselines", "--eval-tasks", "4", "--data-root", str(glyph_root)]
        assert main(["evaluate", "--trained", str(file), *more]) == 0
        printed = capsys.readouterr().out
        assert "validation classes" in printed
        assert "nearest neighbour on pixels" in printed
        assert "the same before training" in printed

    def test_settings_of_adaptation_take_effect(self, file, glyph_root, tmp_path, capsys):
        root = ["--data-root", str(glyph_root), "--eval-tasks", "10", "--eval-steps", "40"]
        bl.tuning.save(tmp_path / "solver.json", {"strength": 500.0})
        found = {}
        for name, more in {
            "as trained": [],
            "strength": ["--strength", "500"],
            "of a file": ["--solver", str(tmp_path / "solver.json")],
            "step size": ["--inner-lr", "1e-9"],
            "float64": ["--precision", "float64"],
        }.items():
            assert main(["evaluate", "--trained", str(file), *root, *more]) == 0, name
            found[name] = [line for line in capsys.readouterr().out.splitlines() if "+-" in line]
        assert found["strength"] == found["of a file"] != found["as trained"]
        assert found["step size"] not in (found["as trained"], found["strength"])
        assert found["float64"][0] == found["as trained"][0]

    def test_settings_of_training_are_told(self, file, glyph_root, capsys):
        root = ["--data-root", str(glyph_root), "--eval-tasks", "4"]
        assert main(["evaluate", "--trained", str(file), *root]) == 0
        assert "note" not in capsys.readouterr().err
        assert main(["evaluate", "--trained", str(file), *root, "--queries", "3", "--tasks", "3"]) == 0
        told = capsys.readouterr().err
        assert (
            "note: --queries changes nothing here: it is for training; of an evaluation, it is --eval-queries." in told
        )
        assert "note: --tasks changes nothing here: it is for training." in told

    def test_a_strength_that_cannot_be(self, file, capsys):
        assert main(["evaluate", "--trained", str(file), "--strength", "-1"]) == 2
        assert "--strength is -1" in capsys.readouterr().err

    def test_a_strength_that_was_learned_is_no_setting(self, file):
        learned = replace(Trained.load(file), config=replace(Trained.load(file).config, learn_strength="layer"))
        with pytest.raises(UserError, match="was learned with it"):
            learned.at_strength(2.0)

    def test_both_or_neither(self, run, capsys):
        assert main(["evaluate", str(run), "--trained", "some"]) == 2
        assert "one of them" in capsys.readouterr().err
        assert main(["evaluate"]) == 2

    def test_classes_that_were_trained_on_are_told(self, omniglot_root):
        training = Config(data="omniglot", data_root=omniglot_root)
        whole = data.load("omniglot", omniglot_root, split="alphabets")
        changed = Config(data="omniglot", data_root=omniglot_root, split="alphabets")
        network = Trained(training, {}, {}, {})
        assert seen_in_training(network, changed, whole.test) > 1000
        assert seen_in_training(network, training, whole.test) == 0


FIGURES = {
    "omniglot-20way-1shot": {"ways": 5, "shots": 1, "transductive": 97.20, "not transductive": 95.78},
    "omniglot-20way-5shot": {"ways": 20, "shots": 5, "transductive": 98.61, "not transductive": 98.56},
    "omniglot-5way-1shot": {"ways": 5, "shots": 1, "transductive": 99.28, "not transductive": 99.03},
    "omniglot-5way-5shot": {"ways": 5, "shots": 5, "transductive": 99.33, "not transductive": 99.24},
}
"""Figures of the page: name -> a setting, and accuracies in percent there."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if at["shots"] > 1 else ()) for name, at in FIGURES.items()]
)
class TestShipped:
    def test_is_small_and_says_how_it_was_made(self, name):
        assert trained.shipped() == list(FIGURES)
        assert (trained.SHIPPED / f"{name}.pt").stat().st_size < 500_000
        found = Trained.load(name)
        assert found.origin["hours"] > 0
        assert found.origin["steps"] > 0
        assert "--data omniglot" in found.origin["command"]

    def test_has_the_figures_of_the_page(self, name, omniglot_root):
        """On the first 100 of the 1,000 tasks, within the interval of these."""
        setting, found = FIGURES[name], Trained.load(name)
        ways, shots = setting["ways"], setting["shots"]
        config = replace(found.config, ways=ways, shots=shots, eval_tasks=100, eval_queries=15, data_root=omniglot_root)
        measured = evaluation.figures(found, config, evaluation.What())
        for label, row in measured["accuracy"].items():
            expected = setting[label.split(", ")[1].split(":")[0]]
            assert abs(row["mean"] - expected) < row["interval"], label
        assert measured["seen_in_training"] == 0
