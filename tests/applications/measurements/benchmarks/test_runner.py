"""Contests in real processes, at sizes of seconds; the command, its files and its errors."""

from __future__ import annotations

import json
import math
import subprocess

import numpy as np
import pytest
import torch

from applications.frame import figures
from applications.measurements.benchmarks import __main__ as command
from applications.measurements.benchmarks import latency, report, workloads
from applications.measurements.benchmarks.contest import BEFORE, missing
from applications.measurements.benchmarks.hyperparameters import Hyperparameters
from applications.measurements.benchmarks.runner import Row, contest, relative_errors
from tests.applications.refusals import refusals

SMALL = {"num_examples": 120, "num_features": 30, "num_classes": 4}
OURS = "bilevel, plain CG"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Processes find the problem's cache in the system's temporary folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.getbasetemp()))
    monkeypatch.setattr("tempfile.tempdir", None)


def rows(names, problem=SMALL, **changes):
    settings = {"rounds": 1, "runs": 2, "timeout": 120.0, **changes}
    return {row.name: row for row in contest("Hyperparameters", problem, names, **settings)}


@pytest.mark.slow
def test_right_answers_have_times_and_memory():
    # A smaller problem fits into what a process has left of its start, and needs no memory then.
    row = rows([OURS], {**SMALL, "num_examples": 20_000}, rounds=2)[OURS]
    assert not row.note
    assert row.error < 1e-5
    assert len(row.seconds) == 4
    assert all(0 < second < 60 for second in row.seconds)
    assert 0 < row.peak_mib < 500
    assert row.facts["iterations"] > 1


def test_a_wrong_answer_has_no_time(monkeypatch):
    monkeypatch.setattr(Hyperparameters, "reference", lambda self: np.ones(30))
    row = rows([OURS])[OURS]
    assert row.note.startswith("wrong: relative error")
    assert row.seconds == []
    assert row.median == math.inf


def test_a_peer_that_is_not_here_says_what_to_do(monkeypatch):
    monkeypatch.delenv("BILEVEL_BENCH_HYPERTORCH", raising=False)
    assert "clone it" in rows(["hypertorch"])["hypertorch"].note
    monkeypatch.setattr("applications.measurements.benchmarks.contest.find_spec", lambda module: None)
    for name, module in (("TorchOpt, functional", "torchopt"), ("JAXopt, compiled", "jaxopt"), ("higher", "higher")):
        assert missing(name).startswith(f"{module} is not installed: pip install")
    assert (missing(OURS), missing("scipy")) == ("", "")


def test_a_turn_has_a_limit_and_a_crash_a_message():
    assert rows([OURS], timeout=0.5)[OURS].note == "not done after 0 s"
    assert rows(["nobody"])["nobody"].note.startswith("failed: KeyError")


def test_errors_are_those_of_each_task():
    truth = np.array([[3.0, 4.0], [0.0, 1.0]])
    assert relative_errors(truth + np.array([[0.0, 0.5], [0.0, 0.0]]), truth).tolist() == [0.1, 0.0]
    assert relative_errors(truth[0], truth[0]).tolist() == [0.0]
    assert relative_errors(truth, np.stack([truth + 1, truth])).tolist() == [0.0, 0.0]
    assert np.isinf(relative_errors(truth[0], truth)).all()
    assert not (relative_errors(truth * np.nan, truth) <= 1.0).any()


@pytest.mark.slow
def test_the_command_writes_results_tables_and_pictures_and_keeps_earlier_ones(tmp_path, monkeypatch):
    monkeypatch.setitem(workloads.NAMES, "B", ("Hyperparameters", SMALL))
    (tmp_path / "results.json").write_text(json.dumps({"A": ENTRY}))
    arguments = ["--workloads", "B", "--only", OURS, "--rounds", "1", "--runs", "1", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"A", "B"}
    assert results["B"]["command"].endswith("--out " + str(tmp_path))
    assert results["B"]["machine"]["versions"]["torch"]
    assert (tmp_path / "B.png").read_bytes().startswith(b"\x89PNG")
    tables = (tmp_path / "tables.md").read_text()
    assert "## an earlier one" in tables
    assert f"| {OURS} |" in tables


ENTRY = {
    "title": "an earlier one",
    "command": "python -m applications.measurements.benchmarks",
    "machine": {"cpu": "AMD EPYC", "instructions": "AVX2", "threads": 2},
    "matmul_gflops": 100.0,
    "flops": 1e11,
    "rows": [
        {"name": "bilevel", "seconds": [2.0, 1.0, None], "error": 1e-6, "beyond": 1, "checked": 16, "peak_mib": 9.6},
        {"name": "peer", "seconds": [5.0], "error": None, "beyond": 0, "checked": 0, "peak_mib": None},
        {"name": "gone", "seconds": [], "error": None, "beyond": 0, "checked": 0, "peak_mib": None},
    ],
}
for _row in ENTRY["rows"]:
    _row |= {"facts": {}, "note": "not | here" if _row["name"] == "gone" else ""}


def test_the_table_has_ratios_rates_and_reasons():
    lines = report.table(ENTRY).splitlines()
    assert lines[2] == "2 cores of an AMD EPYC with AVX2, a matrix product at 100 GFLOP/s"
    assert lines[6] == "| bilevel | 2 (1, 2) | 2.50 | 1e-06, 1 of 16 beyond | 10 | 50 GFLOP/s, 50 % of a matmul |"
    assert lines[7] == "| peer | 5 (5, 5) | 1.00 |  |  | 20 GFLOP/s, 20 % of a matmul |"
    assert lines[8] == "| gone |  |  |  |  | not / here |"


def test_curves_are_drawn_where_there_are_some():
    curve = {"curve": [[0.0, 2.0], [0.5, 1.0], [1.0, 0.4]], "target": 0.5, "start": 2.0}
    entry = {**ENTRY, "rows": [{**ENTRY["rows"][0], "facts": curve}, ENTRY["rows"][2]]}
    assert report.picture(entry).startswith(b"\x89PNG")
    assert report.picture(entry) != report.picture(ENTRY)


def test_rows_that_differ_in_their_sizes_are_drawn_against_memory(monkeypatch):
    drawn = []
    monkeypatch.setattr(report, "_png", lambda figure, axes, entry: drawn.append(axes) or b"")
    settings = [{"threads": threads, "chunk_size": size} for threads in (1, 2) for size in (8, 1)]
    row = {"seconds": [2.0, 3.0, None], "note": ""}
    rows = [
        {**row, "name": f"bilevel, {index}", "peak_mib": 10.0 * index, "facts": {"settings": each}}
        for index, each in enumerate(settings)
    ]
    report.picture({**ENTRY, "rows": rows})
    assert [list(line.get_xdata()) for line in drawn[0].lines] == [[10.0, 0.0], [30.0, 20.0]]  # by tasks at a time
    assert [list(line.get_ydata()) for line in drawn[0].lines] == [[3.0, 3.0]] * 2
    report.picture({**ENTRY, "rows": [{**rows[0], "peak_mib": None}]})
    assert not drawn[1].lines  # bars


def test_a_gpu_is_named():
    machine = {**ENTRY["machine"], "gpu": "NVIDIA H200"}
    assert "NVIDIA H200, beside 2 cores of an AMD EPYC" in report.table({**ENTRY, "machine": machine})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_meta_step_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    monkeypatch.setitem(workloads.NAMES, "A", ("MetaStep", {"ways": 3, "tasks": 3, "inner_steps": 2}))
    arguments = ["--workloads", "A", "--device", "cuda", "--rounds", "1", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["A-cuda"]["rows"]
    for row in rows[:2]:
        assert not row["note"]
        assert row["peak_mib"] > 0


@refusals(
    (["--workloads", "E"], "no workload E"),
    (["--rounds", "0"], "must be positive"),
    (["--data-root", "/nowhere/at/all"], "is no folder"),
    (["--workloads", "B", "--only", "nobody"], "no contestant of B"),
    pytest.param(
        ["--device", "cuda"],
        "finds no GPU",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
    ),
)
def test_bad_input(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_all_workloads_exist():
    for name, (kind, changes) in workloads.NAMES.items():
        workload = workloads.KINDS[kind](**changes)
        assert workload.letter == name[0]
        assert any(contestant.startswith(figures.OURS) for contestant in workload.contestants())


def entry(*rows: tuple[str, float, dict[str, object]], gflops: float = 100.0) -> dict[str, object]:
    like = ENTRY["rows"][0]
    made = [{**like, "name": name, "seconds": [seconds], "facts": facts} for name, seconds, facts in rows]
    return {**ENTRY, "matmul_gflops": gflops, "rows": made}


def test_figures_are_compared_with_those_that_were_kept():
    kept = {"E": entry(("bilevel", 1.0, {"ratio": 2.0}), ("peer", 1.0, {})), "F": entry(("bilevel", 3.0, {}))}
    new = {"E": entry(("bilevel", 9.0, {"ratio": 3.0}), ("peer", 9.0, {})), "F": entry(("bilevel", 6.0, {}), gflops=50)}
    assert report.changes(new, kept) == {"E, bilevel": 1.5, "F, bilevel": 1.0}
    assert report.changes({"G": entry(("bilevel", 1.0, {}))}, kept) == {}


@pytest.mark.parametrize(("ratio", "code"), [(2.5, 0), (1.0, 1)])
def test_the_command_fails_where_a_figure_has_grown(ratio, code, tmp_path, monkeypatch, capsys):
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"E-ridge-9": entry(("bilevel", 1.0, {"ratio": ratio}))}))
    found = Row("bilevel", [1.0], facts={"ratio": 2.5, "to": "its gradients"})
    monkeypatch.setattr(command, "contest", lambda *_: iter([found]))
    monkeypatch.setattr(command, "matmul_gflops", lambda _: 100.0)
    monkeypatch.setattr(command, "machine", lambda _: ENTRY["machine"])
    arguments = ["--workloads", "E-ridge-9", "--only", "bilevel", "--against", str(kept), "--out", str(tmp_path)]
    assert command.main(arguments) == code
    told = capsys.readouterr().out
    assert f"{2.5 / ratio:5.2f} times the kept figure: E-ridge-9, bilevel" in told
    assert ("slower" in told) == bool(code)


@pytest.mark.slow
def test_another_checkout_does_ours_once_more(tmp_path, monkeypatch):
    """Its library is taken, and the workload is that of this checkout."""
    package = tmp_path / "bilevel"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('the other one')")
    monkeypatch.setenv(BEFORE, str(tmp_path))
    (row,) = contest("SmallProblem", {}, ["bilevel, before"], 1, 1, 600.0)
    assert row.note == "failed: ImportError: the other one"


@pytest.mark.slow
def test_the_latency_is_that_of_processes():
    (row,) = contest("Latency", {"repeats_of_each": 1}, ["bilevel: import bilevel"], 1, 1, 600.0)
    assert row.seconds[0] / row.facts["ratio"] > 0  # which is longer, a pair on a busy machine cannot say
    assert row.facts["to"] == "`import torch`"


def test_the_ratio_is_that_of_pairs_of_processes(monkeypatch):
    seconds, started = iter([6.0, 3.0, 5.0, 1.0, 9.0, 3.0]), []
    monkeypatch.setattr(latency, "start", started.append)
    monkeypatch.setattr(latency, "timed", lambda work: (next(seconds), work()))
    found = latency.wait(["-c", "import bilevel"], 3)
    assert started == [["-c", "import bilevel"], latency.FLOOR] * 3
    assert found.seconds == 6.0
    assert found.facts["ratio"] == 3.0


@pytest.mark.slow
def test_a_program_that_fails_has_no_latency():
    with pytest.raises(subprocess.CalledProcessError):
        latency.start(["-c", "raise SystemExit(1)"])
