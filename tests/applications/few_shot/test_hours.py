from __future__ import annotations

import json

import pytest

from applications.few_shot import hours
from applications.few_shot.__main__ import main
from applications.few_shot.config import Config

RECORDS = [
    {"step": 1, "loss": 1.0, "seconds": 900.0},
    {"step": 2, "loss": 0.9, "seconds": 1800.0},
    {"step": 2, "validation_accuracy": 88.0},
    {"step": 3, "loss": 0.8, "seconds": 3600.0},
    {"step": 3, "validation_accuracy": 91.5},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(Config(data="omniglot", ways=20).to_json()))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    return tmp_path


def test_points():
    assert hours.validations(RECORDS) == [(0.5, 88.0), (1.0, 91.5)]


def test_picture(run):
    assert main(["hours", str(run), str(run / "picture.png")]) == 0
    assert (run / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_a_validation(run, capsys):
    (run / "metrics.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    assert main(["hours", str(run), str(run / "picture.png")]) == 2
    assert "has no validation yet" in capsys.readouterr().err
    assert main(["hours", str(run)]) == 2
