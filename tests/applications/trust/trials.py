"""What is tried: kills, flipped bits, cuts, bad values of all options, memory over time, signals, two writers.

Each trial takes a size and a folder of its own, and returns its figures: a `Found`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch

import bilevel as bl
from applications.frame.checkpoint import Damaged, differences, from_bytes
from applications.frame.run_folder import RunFolder
from tests.applications.trust.commands import DATA, OUT, RUN, SMALL, all_tried
from tests.applications.trust.processes import (
    OVER,
    finish,
    kill_after,
    processor_seconds,
    start,
    wait,
    wait_for,
)

TINY = {name: list(SMALL[name]) for name in ("few_shot", "data_cleaning", "search")}
"""Short commands of the applications whose trainings are killed."""


@dataclass(frozen=True)
class Found:
    """``failed`` of ``tried`` did what they must not; ``told``: a few of them, in words."""

    tried: int
    failed: int
    told: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.failed} of {self.tried} failed", *(f"    {line}" for line in self.told[:10])])


def found(tried: int, failures: list[str]) -> Found:
    return Found(tried, len(failures), tuple(failures))


class Shared:
    """What several trials use and none changes: the images, and a finished run of few-shot learning."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder / "data"

    def data_of(self, application: str) -> list[str]:
        """The option that names the images, where an application has them."""
        return ["--data-root", str(self.data)] if application == "few_shot" else []

    def run(self) -> Path:
        """The run, with one checkpoint, so that no other serves in its place."""
        run, log = self.folder / "finished", self.folder / "finished.log"
        if not run.exists():
            arguments = [*TINY["few_shot"], *self.data_of("few_shot")]
            assert finish("few_shot", [*arguments, "--out", str(run)], log) == 0, log.read_text()
            (run / "checkpoint.previous.pt").unlink(missing_ok=True)
        return run


def kills(
    count: int, folder: Path, shared: Shared, applications: tuple[str, ...] = tuple(TINY), seed: int = 0
) -> Found:
    """Trainings that are killed at a random moment and resumed end as one that was not: metrics and state."""
    failures, chance = [], random.Random(seed)
    for application in applications:
        log, whole = folder / f"{application}.log", folder / f"{application}-whole"
        small = [*TINY[application], *shared.data_of(application)]
        begun = os.times()
        assert finish(application, [*small, "--out", str(whole)], log) == 0, log.read_text()
        seconds = os.times().children_user - begun.children_user
        for number in range(count):
            run = folder / f"{application}-{number}"
            arguments = [*small, "--out", str(run)]
            while not (run / "config.json").exists():  # what is killed before its folder is there starts anew
                kill_after(start(application, arguments, log, save_often=True), chance.uniform(0.05, 1) * seconds)
            code = finish(application, ["--resume", str(run)], log)
            wrong = f"exit code {code}" if code else _unlike(run, whole)
            if wrong:
                failures.append(f"{application}, kill {number}: {wrong}")
            shutil.rmtree(run)
    return found(count * len(applications), failures)


def studies(count: int, folder: Path, seed: int = 0) -> Found:
    """Studies that are killed and gone on with: all trials are made, and none is left running."""
    failures, chance = [], random.Random(seed)
    small = [*TINY["data_cleaning"], "--trials", "4", "--seconds", "0.1", "--confirm", "2"]
    for number in range(count):
        out, log = folder / f"study-{number}", folder / "studies.log"
        arguments = ["tune", *small, "--storage", str(out / "study.log"), "--out", str(out)]
        kill_after(start("data_cleaning", arguments, log), chance.uniform(0.2, 2))
        code = finish("data_cleaning", arguments, log)
        states = [] if code else _states(out)
        made = sum(state in ("COMPLETE", "PRUNED") for state in states)
        if code or made < 4 or "RUNNING" in states:
            failures.append(f"study {number}: exit code {code}, {states}")
        shutil.rmtree(out)
    return found(count, failures)


def flips(count: int, shared: Shared, seed: int = 0) -> Found:
    """A flipped bit in a checkpoint is never accepted."""
    content, chance, failures = (shared.run() / "checkpoint.pt").read_bytes(), random.Random(seed), []
    for _ in range(count):
        place = chance.randrange(8 * len(content))
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        if _accepted(bytes(flipped)):
            failures.append(f"bit {place} of {8 * len(content)}")
    return found(count, failures)


FILES = ("checkpoint.pt", "config.json", "metrics.jsonl", "results.json")


def cuts(count: int, folder: Path, shared: Shared, seed: int = 0) -> Found:
    """A run with a file that was cut short is refused in words, or goes on as it was.

    Half of the cuts are of the checkpoint.
    """
    run, chance, failures = shared.run(), random.Random(seed), []
    for number in range(count):
        name = FILES[0] if number % 2 else chance.choice(FILES)
        content, copy, log = (run / name).read_bytes(), folder / "cut", folder / f"cut-{number}.log"
        shutil.copytree(run, copy)
        size = chance.randrange(len(content))
        (copy / name).write_bytes(content[:size])
        code = finish("few_shot", ["--resume", str(copy)], log)
        if code != 2 and (name != "metrics.jsonl" or code or _unlike(copy, run)):
            failures.append(f"{name} cut to {size} of {len(content)} bytes: exit code {code}")
        shutil.rmtree(copy)
    return found(count, failures)


BAD = ("-1", "-1e-9", "0", "1e308", "inf", "nan", str(10**20), "", "x" * 300, "a\0b")
FINE = (0, 1, 2, -OVER, -signal.SIGALRM)
"""Exit codes: done; measured, and not as it should be; refused; more than was waited for."""


def options(command: str, part: float, folder: Path, shared: Shared, seconds: float = 1.5, seed: int = 0) -> Found:
    """Bad values of all options of a command: none ends with a traceback or a crash.

    Args:
        part: of all pairs of an option and a value, chosen at random. seconds: of the processor for a command; one that
            needs more took the value for a good one.
    """
    chance, failures, tried = random.Random(f"{command} {seed}"), [], 0
    for one in all_tried(command):
        for value in BAD:
            if chance.random() >= part:
                continue
            tried += 1
            out, log = folder / "options", folder / f"option-{tried}.log"
            places = {OUT: out, DATA: shared.data, **({RUN: shared.run()} if RUN in one.before else {})}
            line = [str(places.get(word, word)) for word in one.line(value)]
            code = finish(command.partition(" ")[0], line, log, seconds)
            text = log.read_text(errors="replace")
            if code not in FINE or "Traceback" in text:
                last = text.strip().splitlines()[-1:] or [""]
                told = " ".join((*one.before[:2], f"{one.option}={value[:20]!r}"))
                failures.append(f"{command}: {told}: exit code {code}, {last[0][:150]}")
            shutil.rmtree(out, ignore_errors=True)
    return found(tried, failures)


def memory(seconds: float, folder: Path, shared: Shared) -> Found:
    """A long training keeps its memory and its handles: the last reading beside that at a third of the time."""
    arguments = [*TINY["few_shot"], *shared.data_of("few_shot"), "--steps", "100000000"]
    child = start("few_shot", [*arguments, "--out", str(folder / "long")], folder / "long.log", save_often=True)
    readings = []
    for _ in range(3):
        time.sleep(seconds / 3)
        resident = int(Path(f"/proc/{child}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        readings.append((resident, len(os.listdir(f"/proc/{child}/fd"))))
    os.kill(child, signal.SIGTERM)
    code, steps = wait(child), len(RunFolder(folder / "long").metrics())
    (mib, handles), (mib_after, handles_after) = readings[0], readings[-1]
    told = f"{steps} steps: {mib:.0f} MiB, {handles} handles at a third; {mib_after:.0f}, {handles_after} at the end"
    bad = code != 128 + signal.SIGTERM or mib_after > 1.02 * mib + 2 or handles_after > handles
    return Found(1, int(bad), (told,))


WIDEST = [
    "--width",
    "64",
    "--tasks",
    "32",
    "--inner-steps",
    "16",
    "--cg-steps",
    "5",
    "--steps",
    "1000",
    "--threads",
    "1",
]


def signals(count: int, folder: Path, shared: Shared, seed: int = 0) -> Found:
    """SIGTERM ends a training at its widest setting within five seconds of the processor, which others may use, too."""
    chance, failures, needed = random.Random(seed), [], []
    for number in range(count):
        out, log = folder / f"ended-{number}", folder / f"ended-{number}.log"
        child = start("few_shot", [*WIDEST, *shared.data_of("few_shot"), "--out", str(out)], log)
        while not (out / "config.json").exists():
            time.sleep(0.1)
        wait_for(child, processor_seconds(child) + chance.uniform(2, 25))
        begun = processor_seconds(child)
        os.kill(child, signal.SIGTERM)
        _, status, used = os.wait4(child, 0)
        needed.append(used.ru_utime + used.ru_stime - begun)
        code = os.waitstatus_to_exitcode(status)
        if code != 128 + signal.SIGTERM or needed[-1] > 5:
            failures.append(f"signal {number}: exit code {code} after {needed[-1]:.1f} s")
    return Found(count, len(failures), (*failures, f"after {', '.join(f'{one:.1f}' for one in needed)} s"))


def writers(count: int, folder: Path) -> Found:
    """Two runs with one new folder at once: one is refused, and the other is whole. They share one empty cache, too."""
    failures = []
    for number in range(count):
        out, data = folder / f"shared-{number}", folder / f"cache-{number}"
        arguments = [*TINY["few_shot"], "--data-root", str(data), "--out", str(out)]
        logs = [folder / f"writer-{number}-{index}.log" for index in range(2)]
        children = [start("few_shot", arguments, log) for log in logs]
        codes = sorted(wait(child) for child in children)
        steps = [record["step"] for record in RunFolder(out).metrics()]
        if codes != [0, 2] or steps != list(range(1, 13)):
            failures.append(f"pair {number}: exit codes {codes}, {len(steps)} steps")
        other = [start("few_shot", [*arguments[:-1], f"{out}-{index}"], log) for index, log in enumerate(logs)]
        if any(wait(child) for child in other):
            failures.append(f"pair {number}: two folders and one cache")
        for path in folder.glob(f"shared-{number}*"):
            shutil.rmtree(path)
    return found(2 * count, failures)


def _accepted(content: bytes) -> bool:
    try:
        from_bytes(content, torch.device("cpu"))
    except Damaged:
        return False
    return True


def _states(out: Path) -> list[str]:
    study = optuna.load_study(study_name="data_cleaning score", storage=bl.tuning.open_storage(out / "study.log"))
    return [trial.state.name for trial in study.trials]


def _unlike(run: Path, whole: Path) -> str:
    """Where a run differs from another in what the clock does not decide; empty where it does not."""
    metrics = [_without_clock(RunFolder(path).metrics()) for path in (run, whole)]
    if metrics[0] != metrics[1]:
        return "other metrics"
    for path in sorted(whole.glob("checkpoint*.pt")):
        if "previous" in path.name:
            continue
        one, two = (
            RunFolder(each).load_checkpoint(torch.device("cpu"), path.name)["training"] for each in (run, whole)
        )
        wrong = [place for place in differences(one, two) if "seconds" not in place]
        if wrong:
            return f"{path.name}: {wrong[0]}"
    return ""


def _without_clock(value: Any) -> Any:
    """Metrics without seconds; a curve against them keeps its losses."""
    if isinstance(value, dict):
        return {name: _without_clock(inner) for name, inner in value.items() if "seconds" not in name}
    if isinstance(value, list):
        return [_without_clock(inner[1:] if isinstance(inner, list) else inner) for inner in value]
    return json.dumps(value)
