"""Memory of the meta-gradient against inner steps, measured as `benchmark` does it: in processes of their own."""

from __future__ import annotations

import json

import pytest

from applications.few_shot import benchmark
from applications.few_shot.benchmark import Benchmark, Measurement, _extrapolate
from tests.applications.refusals import refusals


@pytest.fixture(scope="module")
def measured(glyph_root, tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmark")
    arguments = [
        *["--inner-steps", "100", "10", "--repeats", "1", "--tasks", "2", "--config.width", "16"],
        "--out",
        str(out),
    ]
    assert benchmark.main([*arguments, "--config.data-root", str(glyph_root)]) == 0
    return out


@pytest.mark.slow
def test_implicit_memory_is_flat_and_unrolled_memory_is_not(measured):
    rows = {(r["method"], r["inner_steps"]): r for r in json.loads((measured / "benchmark.json").read_text())["rows"]}
    assert set(rows) == {(method, steps) for method in ("imaml", "maml") for steps in (10, 100)}
    # resident memory is known to a MiB or two, of the 7 that are measured here
    grown = {method: rows[method, 100]["peak_mib"] - rows[method, 10]["peak_mib"] for method in ("imaml", "maml")}
    assert grown["imaml"] < 0.05 * grown["maml"]
    assert rows["maml", 100]["peak_mib"] >= 5 * rows["maml", 10]["peak_mib"]
    assert rows["imaml", 100]["peak_mib"] < 0.15 * rows["maml", 100]["peak_mib"]
    assert all(row["seconds"] > 0 for row in rows.values())


@pytest.mark.slow
def test_table_plot_and_command_are_written(measured):
    table = (measured / "table.md").read_text().splitlines()
    assert len(table) == 6
    assert table[2].startswith("| implicit MAML | 10 |")
    assert (measured / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "benchmark --inner-steps 100 10" in json.loads((measured / "benchmark.json").read_text())["command"]


def test_a_run_that_cannot_fit_is_extrapolated_instead(monkeypatch):
    rows = [Measurement("maml", 10, 50.0, 0.1), Measurement("maml", 110, 550.0, 1.0)]
    assert _extrapolate("maml", 1110, rows) == pytest.approx(5550.0)
    assert _extrapolate("imaml", 1110, rows) == 0.0
    monkeypatch.setattr(benchmark, "_available_mib", lambda settings: 6000.0)
    row = benchmark._in_own_process(Benchmark(), "maml", 1110, rows)
    assert (row.peak_mib, row.note) == (None, "not run: about 5550 needed, 6000 there")


@refusals(
    (["--config.preset", "paper", "--config.out", "x"], "no --config.preset and no --config.out"),
    (["--inner-steps", "0"], "must be at least 1"),
    (["--methods"], "--methods: one at least"),
    (["--inner-steps", "10", "10"], "--inner-steps 10 10: one at least, each once"),
    (["--repeats", "0"], "must be at least 1"),
    (["--tasks", "0"], "must be at least 1"),
    (["--config.lr", "inf"], "--config.lr is inf"),
)
def test_what_cannot_be_measured_is_refused(arguments, message, tmp_path, capsys):
    assert benchmark.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
