"""The methods at one equal budget: runs that go on where they stopped, and a table of what they gave."""

from __future__ import annotations

import json
import statistics

import pytest

from applications.few_shot import compare
from applications.few_shot.__main__ import main
from applications.few_shot.config import NEWER, Config
from applications.frame.errors import UserError

SMALL = ["--methods", "imaml", "prototypical", "--seeds", "2", "--minutes", "None", "--steps", "4", "--data", "glyphs"]
SMALL += ["--tasks", "2", "--width", "8", "--inner-steps", "2", "--eval-tasks", "4", "--validations", "2"]


@pytest.fixture(scope="module")
def compared(glyph_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    assert main(["compare", *SMALL, "--data-root", str(glyph_root), "--out", str(folder)]) == 0
    return folder


def test_table_and_picture(compared):
    found = json.loads((compared / "comparison.json").read_text())
    assert {(run["method"], run["seed"]) for run in found["runs"]} == {
        (method, seed) for method in ("imaml", "prototypical") for seed in (0, 1)
    }
    for run in found["runs"]:
        evaluated = json.loads((compared / f"{run['method']}-{run['seed']}" / "evaluation.json").read_text())
        assert run["accuracy"]["transductive"]["mean"] in [row["mean"] for row in evaluated.values()]
        assert (run["steps"], len(run["validation"])) == (4, 2)
    first = found["methods"][0]
    means = [r["accuracy"]["transductive"]["mean"] for r in found["runs"] if r["method"] == "imaml"]
    assert first["transductive (%)"].startswith(f"{statistics.mean(means):.2f} ({min(means):.2f} to {max(means):.2f}")
    table = (compared / "comparison.md").read_text()
    assert "python -m applications.few_shot compare --methods imaml prototypical" in table
    assert "| prototypical network | 2 |" in table
    assert (compared / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_done_again_and_what_is_missing_is(compared, glyph_root, monkeypatch, capsys):
    trained = []

    def train(words):
        trained.append(words)
        return 143

    rest = ["--data-root", str(glyph_root), "--out", str(compared)]
    assert compare.command([*SMALL, *rest], train) == 0
    assert not trained
    (compared / "prototypical-1" / "evaluation.json").rename(compared / "kept.json")
    try:
        assert compare.command([*SMALL, *rest], train) == 143
    finally:
        (compared / "kept.json").rename(compared / "prototypical-1" / "evaluation.json")
    (words,) = trained
    assert words[-2:] == ["--resume", str(compared / "prototypical-1")]
    assert main(words) == 0  # with all of its settings
    assert main(["compare", *SMALL, *rest, "--width", "16"]) == 2
    assert "is a run with other settings" in capsys.readouterr().err


def test_minutes_become_as_many_meta_steps_as_are_timed(glyph_root, tmp_path, capsys):
    """The slower method has fewer; a second call takes the numbers of the first, and other settings are refused."""
    asked = [*SMALL, "--minutes", "0.02", "--data-root", str(glyph_root), "--out", str(tmp_path)]
    cut = asked.index("--steps")
    del asked[cut : cut + 2]
    trained = []

    def train(words):
        trained.append(words)
        return 143

    assert compare.command(asked, train) == 143
    known = json.loads((tmp_path / "budget.json").read_text())["methods"]
    assert set(known) == {"imaml", "prototypical"}
    assert all(row["steps"] == max(1, round(1.2 / row["seconds"])) for row in known.values())
    assert known["imaml"]["seconds"] > known["prototypical"]["seconds"]
    (words,) = trained
    assert words[words.index("--steps") + 1] == str(known["imaml"]["steps"])
    assert "--minutes" not in words
    assert main(["compare", *asked]) == 0
    assert json.loads((tmp_path / "budget.json").read_text())["methods"] == known
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert {(run["method"], run["steps"]) for run in runs} == {(name, row["steps"]) for name, row in known.items()}
    assert main(["compare", *asked, "--tasks", "3"]) == 2
    assert "has trainings with other settings" in capsys.readouterr().err


def test_steps_that_grow_late_are_timed_where_they_do(glyph_root, monkeypatch):
    """At ten points of the schedule, so that three tenths of the steps of --late-from 0.7 count as late ones."""
    seen = []

    def step(session, sampler, lr):
        seen.append(session.step / session.config.steps)
        return {}

    monkeypatch.setattr(compare, "one_step", step)
    config = Config(data="glyphs", data_root=glyph_root, width=8, minutes=1.0, tasks=2)
    assert compare.time_steps([config], 0.0) > [0.0]
    assert seen[1:] == [part / 10 for part in range(10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds is 0"),
        (["--validations", "-1"], "--validations is -1"),
        (["--methods", "maml", "maml"], "--methods maml maml: one at least, each once"),
        (["--methods"], "--methods: one at least"),
        (["--resume", "x"], "no --resume"),
        (["--learn-strength", "layer"], "--learn-strength needs an imaml method: maml"),
    ],
)
def test_bad_input(arguments, message, refused):
    assert message in refused(lambda *words: main(list(words)), "compare", *arguments)


def test_the_commands_of_the_papers_can_be_parsed(capsys, monkeypatch, tmp_path):
    """Each names its data and its settings; mini-ImageNet and CIFAR-FS too, which are not here."""
    assert main(["papers"]) == 0
    printed = capsys.readouterr().out
    lines = [line.split("few_shot ")[1] for line in printed.splitlines() if "python -m" in line]
    seen: list[Config] = []
    monkeypatch.setattr("applications.few_shot.__main__.story", lambda config, run: seen.append(config))
    for number, line in enumerate(lines):
        assert main([*line.replace("FOLDER", str(tmp_path)).split(), "--out", str(tmp_path / str(number))]) == 0
    found = [(config.data, config.ways, config.shots) for config in seen]
    assert found[4:] == [("mini-imagenet", 5, 1), ("mini-imagenet", 5, 5), ("cifar-fs", 5, 1), ("cifar-fs", 5, 5)]
    assert "folders named by synset" in printed
    assert seen[-1].halve == "pool"
    assert main(["papers", "more"]) == 2


def test_runs_from_before_the_newer_knobs_are_read():
    values = Config(width=8).to_json()
    assert Config.from_json({name: value for name, value in values.items() if name not in NEWER}) == Config(width=8)
    with pytest.raises(UserError, match="of another application or version"):
        Config.from_json({name: value for name, value in values.items() if name != "width"})
