"""The run that the applications share: what is kept, what is resumed, how it ends."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from applications.frame.command import Knobs, Subcommand, main, require
from applications.frame.errors import UserError
from applications.frame.figures import plt, png
from applications.frame.interruption import Interruption, stop_if_asked
from applications.frame.output import forgiving
from applications.frame.run import CLOCKS, Run, aligned, markdown, slug
from applications.frame.run_folder import RunFolder
from tests.applications.runs import comparable


@dataclass(frozen=True)
class Walk(Knobs):
    """A random walk."""

    steps: int = 6
    data: Path | None = None
    stop_after: int = 0
    sizes: tuple[int, ...] = (1, 2)

    def check(self) -> None:
        require(self.steps > 0, f"--steps is {self.steps}: at least 1 is needed.")


class Walking:
    """Each step adds a random number; the signal comes after step ``stop_after``."""

    def __init__(self, knobs: Walk, stop_after: int = 0):
        self.steps, self.stop_after = knobs.steps, stop_after
        self.step, self.place = 0, torch.zeros(2, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(knobs.seed)

    def rows(self):
        while self.step < self.steps:
            self.place = self.place + torch.randn(2, generator=self.generator, dtype=torch.float64)
            self.step += 1
            if self.step == self.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            yield {"step": self.step, "loss": self.place.norm().item()}

    def state(self):
        return {"step": self.step, "place": self.place, "generator": self.generator.get_state()}

    def restore(self, state):
        self.step, self.place = state["step"], state["place"]
        self.generator.set_state(state["generator"])


ROOT = Path(__file__).parents[3]
STOP = {"after": 0}
COMPUTED: list[str] = []


def story(knobs: Walk, run: Run) -> None:
    walking = Walking(knobs, STOP["after"])
    start = run.part("start", lambda: (COMPUTED.append("start"), {"place": 0.0})[1])
    run.train("the walk", walking)
    run.table("Places", [{"name": "start", "place": start["place"]}, {"name": "end", "place": walking.place[0].item()}])


def walk(*arguments: str) -> int:
    return main("walk", list(arguments), Walk, story)


def test_the_clock_of_the_metrics(tmp_path, monkeypatch):
    """Each look at it is a second later: one before a step, and one after."""
    ticks = itertools.count()
    monkeypatch.setitem(CLOCKS, "cpu", lambda: float(next(ticks)))

    def timed(knobs: Walk, run: Run) -> None:
        assert run.train("the walk", Walking(knobs), clock="cpu") == knobs.steps

    assert main("walk", ["--out", str(tmp_path / "run")], Walk, timed) == 0
    assert [row["seconds"] for row in RunFolder(tmp_path / "run").metrics()] == [1, 2, 3, 4, 5, 6]


def test_interrupted_and_resumed_is_bit_for_bit_the_whole_run(tmp_path, capsys):
    assert walk("--out", str(tmp_path / "whole")) == 0
    STOP["after"], COMPUTED[:] = 3, []
    assert walk("--out", str(tmp_path / "halves")) == 128 + signal.SIGTERM
    assert f"--resume {tmp_path / 'halves'}" in capsys.readouterr().err
    assert len(RunFolder(tmp_path / "halves").metrics()) == 3
    STOP["after"] = 0
    assert walk("--resume", str(tmp_path / "halves")) == 0
    assert COMPUTED == ["start"]  # a part that is done is not computed again
    assert comparable(tmp_path / "halves") == comparable(tmp_path / "whole")
    tables = [json.loads((tmp_path / name / "results.json").read_text())["tables"] for name in ("halves", "whole")]
    assert tables[0] == tables[1]
    assert len(tables[0]["Places"]) == 2


def test_records_after_the_last_checkpoint_are_made_again(tmp_path):
    assert walk("--out", str(tmp_path / "run")) == 0
    folder = RunFolder(tmp_path / "run")
    whole = comparable(folder.path)
    early = Walking(Walk())
    records = early.rows()
    next(records), next(records)  # the checkpoint of a run that was killed later
    folder.save_checkpoint({"training": early.state(), "step": 2, "seconds": 0.1}, "checkpoint-the-walk.pt")
    assert walk("--resume", str(folder.path)) == 0
    assert comparable(folder.path) == whole


def test_a_finished_run_is_shown_again_unchanged(tmp_path, capsys):
    assert walk("--out", str(tmp_path / "run")) == 0
    first, report = capsys.readouterr().out, (tmp_path / "run" / "report.md").read_text()
    checkpoint = (tmp_path / "run" / "checkpoint-the-walk.pt").stat().st_mtime_ns
    time.sleep(0.01)
    assert walk("--resume", str(tmp_path / "run")) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "run" / "checkpoint-the-walk.pt").stat().st_mtime_ns == checkpoint
    assert (tmp_path / "run" / "report.md").read_text().splitlines()[2:] == report.splitlines()[2:]


def test_bad_input_ends_with_2_and_writes_nothing(tmp_path, capsys):
    assert walk("--steps", "0", "--out", str(tmp_path / "run")) == 2
    assert "--steps is 0" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert walk("--resume", str(tmp_path / "run")) == 2
    assert walk("--out", str(tmp_path / "run")) == 0
    assert walk("--out", str(tmp_path / "run")) == 2
    assert "holds a run already" in capsys.readouterr().err
    for option, value, kept in (("--seed", "1", "0"), ("--steps", "5", "6"), ("--threads", "2", "1")):
        assert walk("--resume", str(tmp_path / "run"), option, value) == 2
        assert f"{option} is {value}, but the run to resume has {kept}" in capsys.readouterr().err


def test_a_setting_that_is_the_default_is_a_change_too(tmp_path, capsys):
    assert walk("--out", str(tmp_path / "run"), "--seed", "3") == 0
    assert walk("--resume", str(tmp_path / "run"), "--seed", "0") == 2
    assert "--seed is 0, but the run to resume has 3" in capsys.readouterr().err


def test_a_run_may_become_longer_and_is_then_the_long_one(tmp_path):
    assert walk("--out", str(tmp_path / "whole"), "--steps", "9") == 0
    assert walk("--out", str(tmp_path / "run")) == 0
    results = (tmp_path / "run" / "results.json").read_bytes()
    assert walk("--resume", str(tmp_path / "run"), "--steps", "9") == 0
    assert (tmp_path / "run" / "results.previous.json").read_bytes() == results
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")
    tables = [RunFolder(tmp_path / name).results()["tables"] for name in ("run", "whole")]
    assert tables[0] == tables[1]
    assert walk("--resume", str(tmp_path / "run")) == 0  # the new length is that of the run
    assert len(comparable(tmp_path / "run")) == 9


def test_a_run_that_became_longer_says_so(tmp_path, capsys):
    """A schedule that follows the length makes it another run than one that was planned so long."""
    assert walk("--out", str(tmp_path / "run")) == 0
    assert walk("--resume", str(tmp_path / "run")) == 0
    assert "made longer" not in capsys.readouterr().out
    assert walk("--resume", str(tmp_path / "run"), "--steps", "9") == 0
    assert "This run was planned for 6 and made longer (9)" in capsys.readouterr().out
    assert walk("--resume", str(tmp_path / "run"), "--steps", "10") == 0
    assert "planned for 6 and made longer (9, then 10)" in capsys.readouterr().out
    (tmp_path / "run" / "lengths.json").write_text('["many"]')
    assert walk("--resume", str(tmp_path / "run")) == 2
    assert "lengths.json" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read_first(knobs: Walk, run: Run) -> None:
    """A story that cannot be told without its data."""
    require(knobs.data is None or knobs.data.is_file(), f"There is no {knobs.data}.")
    story(knobs, run)


def test_a_longer_run_that_is_refused_is_as_it_was(tmp_path, capsys):
    data, run = tmp_path / "data.npz", tmp_path / "run"
    data.write_bytes(b"data")

    def resumed(*arguments: str) -> int:
        return main("walk", ["--resume", str(run), *arguments], Walk, read_first)

    assert main("walk", ["--out", str(run), "--data", str(data)], Walk, read_first) == 0
    before = contents(run)
    data.rename(tmp_path / "elsewhere")
    assert resumed("--steps", "9") == 2
    assert "There is no" in capsys.readouterr().err
    assert contents(run) == before
    data.write_bytes(b"other data")
    assert resumed("--steps", "9") == 2
    assert contents(run) == before
    data.write_bytes(b"data")
    for name in ("checkpoint-the-walk.pt", "metrics.jsonl"):
        (run / name).write_bytes(b"damaged\n")
        damaged = contents(run)
        assert resumed("--steps", "9") == 2
        assert contents(run) == damaged
        (run / name).write_bytes(before[name])
    capsys.readouterr()
    assert resumed() == 0
    assert "made longer" not in capsys.readouterr().out
    (run / "lengths.json").write_text("[6, 9]")  # as earlier versions wrote it before the data were read
    assert resumed("--steps", "8") == 0
    assert "planned for 6 and made longer (8)" in capsys.readouterr().out


def test_a_run_goes_on_with_the_data_that_it_began_with(tmp_path, capsys):
    """Half of it would be of other data, without a word."""
    data, run = tmp_path / "data.npz", tmp_path / "run"
    data.write_bytes(b"first")
    assert walk("--out", str(run), "--data", str(data)) == 0
    data.write_bytes(b"second")
    for longer in ([], ["--steps", "9"]):
        assert walk("--resume", str(run), *longer) == 2
        assert "is not the one that the run" in capsys.readouterr().err
    data.write_bytes(b"first")
    assert walk("--resume", str(run)) == 0
    assert len(comparable(run)) == 6


def test_a_checkpoint_of_other_settings_is_told(tmp_path, capsys):
    assert walk("--out", str(tmp_path / "run")) == 0
    RunFolder(tmp_path / "run").save_checkpoint({"training": {}, "step": 1, "seconds": 0.0}, "checkpoint-the-walk.pt")
    assert walk("--resume", str(tmp_path / "run")) == 2
    assert "does not fit this training" in capsys.readouterr().err


def test_after_a_restart_the_same_command_goes_on_and_another_is_refused(tmp_path, monkeypatch, capsys):
    """torchrun starts the ranks again with the command that they had, when one of them has died."""
    arguments = ["--out", str(tmp_path / "run")]
    assert walk(*arguments) == 0
    whole = comparable(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert walk(*arguments) == 0
    assert comparable(tmp_path / "run") == whole
    assert walk(*arguments, "--steps", "9") == 2
    assert "holds a run with other settings" in capsys.readouterr().err
    assert comparable(tmp_path / "run") == whole


def test_validations_join_their_steps_and_are_off_the_clock(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setitem(CLOCKS, "wall", lambda: clock[0])
    run, walking = Run(RunFolder(tmp_path), {}, "", quiet=True), Walking(Walk(steps=5))

    def validate():
        clock[0] += 100.0
        return {"distance": walking.step}

    assert run.train("walk", walking, validate=validate, validate_every=2) == 0.0
    assert {record["step"]: record.get("distance") for record in run.metrics("walk")} == {
        1: None,
        2: 2,
        3: None,
        4: 4,
        5: None,
    }


def test_other_ranks_write_and_print_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bilevel.distributed.rank", lambda: 1)
    assert walk("--out", str(tmp_path / "run")) == 0
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class Trip(Walk):
    """A walk with presets."""

    preset: str = "default"


TRIPS = {"default": Trip(), "far": Trip(steps=7, preset="far")}


def trip(*arguments: str) -> int:
    def lengths(rest: list[str]) -> int:
        print(" ".join(rest))
        return 3

    beside = {"lengths": Subcommand("WORDS", "prints them", lengths)}
    return main("trip", list(arguments), Trip, story, presets=TRIPS, subcommands=beside)


def test_a_preset_is_where_the_options_start(tmp_path, capsys):
    assert trip("--preset", "far", "--seed", "5", "--out", str(tmp_path / "run")) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["preset"], config["steps"], config["seed"]) == ("far", 7, 5)
    assert trip("--resume", str(tmp_path / "run")) == 0
    assert trip("--resume", str(tmp_path / "run"), "--preset", "far") == 0
    capsys.readouterr()
    assert trip("--preset", "near", "--out", str(tmp_path / "other")) == 2
    assert "There is no preset 'near'. There are default, far." in capsys.readouterr().err


def test_subcommands_have_their_words_and_a_line_in_the_help(capsys):
    assert trip("lengths", "a", "b") == 3
    assert capsys.readouterr().out == "a b\n"
    with pytest.raises(SystemExit):
        trip("--help")
    printed = capsys.readouterr().out
    assert "python -m applications.trip lengths WORDS  prints them" in printed
    assert "Presets: default, far." in printed


def test_knobs_survive_the_file():
    knobs = Walk(seed=3, data=Path("a/b"), sizes=(4, 5))
    assert Walk.from_json(json.loads(json.dumps(knobs.to_json()))) == knobs
    with pytest.raises(UserError, match="another application or version: it has the unknown 'pace'"):
        Walk.from_json({**knobs.to_json(), "pace": 1})


def test_names_whose_bytes_are_no_text(tmp_path, capsys):
    """They are in paths, commands, titles and class names: what is written has their bytes, a picture a mark."""
    name = os.fsdecode(b"caf\xe9")
    run, data = tmp_path / name, tmp_path / f"{name}.npz"
    data.write_bytes(b"data")

    def named(knobs: Walk, run: Run) -> None:
        assert knobs.data == data
        story(knobs, run)
        run.table(f"Places of {data.name}", [{"name": data.name, "place": 1.0}])
        figure, axes = plt.subplots()
        axes.set_title(data.name)
        run.picture("places.png", png(figure))

    for words in (["--out", str(run), "--data", str(data)], ["--resume", str(run), "--steps", "9"]):
        assert main("walk", words, Walk, named) == 0
    assert b"Places of caf\xe9.npz" in (run / "report.md").read_bytes()
    assert (run / "places.png").read_bytes().startswith(b"\x89PNG")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    with contextlib.redirect_stdout(stream), forgiving():
        print(f"In {name}.")
        print("It goes on.")
    assert stream.buffer.getvalue() == b"In caf\\udce9.\nIt goes on.\n"
    assert not capsys.readouterr().err


def test_a_run_folder_is_the_same_in_every_locale(monkeypatch):
    """Where letters are ASCII, the names of files have escapes for their bytes."""
    knobs = Walk(data=Path("caf\udcc3\udca9"))
    monkeypatch.setattr(os, "fsencode", lambda name: str(name).encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
    saved = json.loads(json.dumps(knobs.to_json()))
    assert saved["data"] == "café"
    assert Walk.from_json(saved) == knobs
    monkeypatch.undo()
    assert Walk.from_json(saved).data == Path("café")
    assert Walk.from_json(saved).to_json()["data"] == "café"


def test_tables_as_text_and_markdown():
    rows = [{"method": "ours", "loss": 0.123456, "n": 10}, {"method": "a|b", "loss": None, "n": 5}]
    assert aligned(rows) == "  method    loss   n\n  ours    0.1235  10\n  a|b              5"
    assert markdown(rows) == "| method | loss | n |\n| --- | ---: | ---: |\n| ours | 0.1235 | 10 |\n| a/b |  | 5 |\n"
    assert slug("MNIST, 10 images") == "mnist-10-images"


def test_a_reader_that_goes_is_no_traceback(tmp_path):
    program = f"{sys.executable} -u -m applications.measurements.compare"
    command = f"{program} --sizes 1 --seconds 0.5 --out {tmp_path / 'run'} | head -c 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr


class Endless(Walking):
    """Its fourth step asks for a signal, and takes a minute unless it is stopped within."""

    def rows(self):
        for record in super().rows():
            yield record
            if self.step == 3 and STOP["after"]:
                os.kill(os.getpid(), STOP["after"])
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    stop_if_asked()
                    time.sleep(0.01)


def long_story(knobs: Walk, run: Run) -> None:
    run.train("the walk", Endless(knobs))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_does_not_wait_for_a_long_step_which_is_made_again(number, tmp_path):
    STOP["after"], begun = number, time.monotonic()
    assert main("walk", ["--out", str(tmp_path / "run")], Walk, long_story) == 128 + number
    assert time.monotonic() - begun < 5
    STOP["after"] = 0
    assert main("walk", ["--out", str(tmp_path / "whole")], Walk, long_story) == 0
    assert main("walk", ["--resume", str(tmp_path / "run")], Walk, long_story) == 0
    assert comparable(tmp_path / "run") == comparable(tmp_path / "whole")


def test_a_hangup_that_the_process_ignores_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.exit_code is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("what", ["loss", "state", "solve"])
def test_numbers_that_are_not_finite_end_a_training_with_the_last_good_checkpoint(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("applications.frame.run.CHECKPOINT_SECONDS", 0.0)

    class Spoilt(Walking):
        def rows(self):
            for record in super().rows():
                if self.step == 5 and what == "solve":
                    raise torch.linalg.LinAlgError("the matrix is singular")
                if self.step == 5 and what == "state":
                    self.place = self.place * math.inf
                yield {**record, "loss": math.nan} if self.step == 5 and what == "loss" else record

    def story(knobs: Walk, run: Run) -> None:
        run.train("the walk", Spoilt(knobs))

    assert main("walk", ["--out", str(tmp_path / "run")], Walk, story) == 2
    told = capsys.readouterr().err
    assert "The training 'the walk' cannot go on after step" in told
    assert "The last good checkpoint is that of step 4" in told
    state = RunFolder(tmp_path / "run").load_checkpoint(torch.device("cpu"), "checkpoint-the-walk.pt")
    assert state["step"] == 4
    assert torch.isfinite(state["training"]["place"]).all()


def test_metrics_that_end_before_their_checkpoint_are_damaged(tmp_path, capsys):
    assert walk("--out", str(tmp_path / "run")) == 0
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    assert walk("--resume", str(tmp_path / "run")) == 2
    assert "the rows of 'the walk' end at step 5, and its checkpoint is that of step 6" in capsys.readouterr().err
