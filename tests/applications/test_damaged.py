"""Bad command lines and damaged run folders of every kind: exit code 2, one message, no traceback, no code run."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from applications.few_shot import trained
from applications.few_shot.__main__ import main
from applications.few_shot.classifier import FewShot
from applications.few_shot.trained import Trained
from applications.frame.errors import UserError
from tests.applications.refusals import refusals

TINY = ["--steps", "2", "--tasks", "2", "--eval-tasks", "2", "--validate-every", "0", "--width", "8", "--queries", "1"]
CODE = ["os:system", "json:loads", "torch.nn:Linear"]


@refusals(
    *(
        "--seed -1",
        "--ways -1",
        "--ways 1",
        "--eval-queries 0",
        "--queries 0",
        "--shots 0",
        "--lr inf",
        "--strength inf",
        "--threads 100000",
        "--tasks 100000000000",
    ),
    (["--lr", "1e308"], "cannot go on after step 1"),
    (["--width", "100000"], "Look at --width 100000, "),
    *((["--model", code], f"--model {code} makes no network") for code in CODE),
    *(([option, "x" * 300], f"{option} is 'xxx") for option in ("--out", "--resume")),
)
def test_values(arguments, message, glyph_root, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--data-root", str(glyph_root), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["few_shot", "data_cleaning", "search", "sparse_regression"])
def test_a_study_in_a_file(name, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    module = importlib.import_module(f"applications.{name}.__main__")
    arguments = ["tune", "--trials", "1", "--out", str(tmp_path / "file")]
    kinds = () if name == "few_shot" else (module.Config, module.story, module.tunable)
    assert (module.main(name, arguments, *kinds) if kinds else module.main(arguments)) == 2
    assert f"--out is {tmp_path / 'file'}" in capsys.readouterr().err


@pytest.fixture(scope="session")
def finished(glyph_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    assert main([*TINY, "--data-root", str(glyph_root), "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the folder of a run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def changed(**values):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), **values})
    )


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def checkpoint(value):
    return lambda folder: torch.save(value, folder / "checkpoint.pt")


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        *(
            (replaced("results.json", make), "results.json is damaged: it is no file")
            for make in (Path.mkdir, os.mkfifo)
        ),
        *(
            (replaced("metrics.jsonl", make), "metrics.jsonl is damaged: it is no file")
            for make in (Path.mkdir, os.mkfifo)
        ),
        (written("checkpoint.pt", b""), "checkpoint.pt is damaged, so it is not loaded: it is empty"),
        (written("checkpoint.pt", b"PK\x03\x04"), "checkpoint.pt is damaged"),
        (checkpoint([1]), "it holds a list"),
        (checkpoint(torch.ones(3)), "it holds a Tensor"),
        (checkpoint({"state_dict": {}}), "is no checkpoint of a training"),
        (checkpoint({"training": {}, "step": 2, "seconds": 0.1}), "does not fit this training"),
        (written("config.json", b"null"), "config.json is of another application or version"),
        (written("config.json", b"[]"), "config.json is of another application or version"),
        (written("config.json", b"{"), "config.json is damaged"),
        (written("config.json", b"[" * 100_000), "config.json is damaged"),
        (written("config.json", b'{"seed": 0, "threads": 1}'), "it lacks"),
        (changed(colour=1), "it has the unknown 'colour'"),
        (changed(steps="many"), "'steps' is 'many'"),
        (changed(steps=None), "'steps' is None"),
        (changed(steps=True), "'steps' is True"),
        (changed(steps=-1), "--steps is -1"),
        (changed(split="letters"), "'split' is 'letters'"),
        (changed(held_out=[0.1]), "'held_out' is"),
        (written("metrics.jsonl", b"null\n"), "metrics.jsonl, line 1, is no record"),
        (written("metrics.jsonl", b'{"step": "1"}\n'), "metrics.jsonl, line 1, is no record"),
        (written("metrics.jsonl", bytes(range(256))), "metrics.jsonl, line 1, is damaged"),
        (written("metrics.jsonl", b""), "metrics.jsonl is damaged"),
        (written("results.json", b"null"), "results.json is no file of results"),
        (written("results.json", b'{"parts": {"a": 1}, "tables": {}}'), "results.json is no file of results"),
    ],
)
def test_run_folders(damage, told, run, capsys):
    damage(run)
    assert main(["train", "--resume", str(run)]) == 2
    assert told in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--steps", "3"]) == 2


def part(value):
    def damage(folder):
        found = json.loads((folder / "results.json").read_text())
        found["parts"]["evaluation"]["value"] = value
        (folder / "results.json").write_text(json.dumps(found))

    return damage


def rows(**values):
    def damage(folder):
        found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps({**row, **values}) + "\n" for row in found))

    return damage


@pytest.mark.parametrize(
    "damage", [part(None), part([]), part({"a": 1}), part({"a": {"mean": "x"}}), rows(loss="x"), rows(loss=None)]
)
def test_what_a_story_makes_of_a_run_folder_is_told(damage, run, capsys):
    damage(run)
    assert main(["train", "--resume", str(run)]) == 2
    assert re.search(r"run folder .* does not hold what this program writes", capsys.readouterr().err)


@pytest.mark.parametrize("value", ["x", None, [1]])
@pytest.mark.parametrize("key", ["validation_accuracy", "seconds"])
def test_what_a_picture_makes_of_metrics_is_told(key, value, run, tmp_path, capsys):
    rows(**{"validation_accuracy": 50.0, key: value})(run)
    assert main(["hours", str(run), str(tmp_path / "hours.png")]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "hours.png").exists()


def stored(**values):
    def damage(content):
        content |= values

    return damage


def in_config(**values):
    def damage(content):
        content["config"] |= values

    return damage


def not_a_number(content):
    next(iter(content["meta"].values())).fill_(float("nan"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (stored(format=2), "'format'"),
        (stored(meta=5), "'meta'"),
        (stored(meta={"a": 1.0}), "'meta'"),
        (stored(meta={}), "the file has it missing"),
        (stored(origin={}), "'origin'"),
        (stored(solver=5), "'solver'"),
        (stored(extra=1), "'extra'|\"extra\""),
        (stored(config=[1]), "'config'"),
        (in_config(width=-1), "--width is -1"),
        (in_config(width="x"), "'width' is 'x'"),
        (in_config(ways=10**30), "--ways is"),
        (not_a_number, "is not finite"),
    ],
)
def test_trained_networks_with_the_right_hash(damage, told, finished, tmp_path, capsys):
    Trained.from_run(finished).save(tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    del content["hash"]
    damage(content)
    torch.save({**content, "hash": trained.digest(content)}, tmp_path / "x.pt")
    assert main(["evaluate", "--trained", str(tmp_path / "x.pt"), "--eval-tasks", "2"]) == 2
    message = capsys.readouterr().err
    assert re.search(told, message), message


@pytest.fixture
def foreign(run, monkeypatch):
    """A run folder from elsewhere, which names code of its own."""
    (run / "payload.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('RAN').touch()\n\ndef factory(*a):\n    raise SystemExit\n"
    )
    monkeypatch.syspath_prepend(str(run))
    yield run
    sys.modules.pop("payload", None)


@pytest.mark.parametrize("option", ["model", "backbone"])
@pytest.mark.parametrize("words", [["evaluate"], ["train", "--resume"]])
def test_code_that_a_folder_names_does_not_run_until_the_command_names_it_too(words, option, foreign, capsys):
    changed(**{option: "payload:factory"})(foreign)
    assert main([*words, str(foreign)]) == 2
    assert f"giving the option again: --{option} payload:factory" in capsys.readouterr().err
    assert not (foreign / "RAN").exists()
    assert main([*words, str(foreign), f"--{option}", "payload:factory"]) == 2  # what it makes is no network
    assert f"--{option} payload:factory makes no network" in capsys.readouterr().err
    assert (foreign / "RAN").exists()


@pytest.mark.parametrize("option", ["model", "backbone"])
def test_what_the_projects_modules_import_is_no_code_of_the_project(option, run, capsys):
    changed(**{option: "applications.frame.lock:os.kill", "image_size": 99999999})(run)
    assert main(["evaluate", str(run)]) == 2
    assert f"giving the option again: --{option} applications.frame.lock:os.kill" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["model", "backbone"])
def test_code_that_a_file_names_does_not_run_either(option, foreign, tmp_path, capsys):
    changed(**{option: "payload:factory"})(foreign)
    Trained.from_run(foreign).save(tmp_path / "x.pt")
    with pytest.raises(UserError, match="names code of its own"):
        FewShot.load(tmp_path / "x.pt")
    assert main(["evaluate", "--trained", str(tmp_path / "x.pt")]) == 2
    assert f"giving the option again: --{option} payload:factory" in capsys.readouterr().err
    assert not (foreign / "RAN").exists()
