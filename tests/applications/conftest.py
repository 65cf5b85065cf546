from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def real_data(name: str, path: str) -> Path:
    """The folder of real data sets, where a file of this one lies below it; else the test is skipped."""
    root = Path(os.environ.get("BILEVEL_DATA", ROOT.parent / "shared" / "data"))
    if not (root / path).exists():
        pytest.skip(f"real {name} is not at {root}; set BILEVEL_DATA to its folder")
    return root


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    return real_data("MNIST", "MNIST/raw")


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    return real_data("Omniglot", "omniglot/omniglot28.npz")


@pytest.fixture(scope="session")
def glyph_root(tmp_path_factory) -> Path:
    """One cache of the built-in data set for all tests."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def readme_run(tmp_path) -> Callable[[str], tuple[Path, dict[str, Any], str]]:
    """Runs the one `sh` command of an application's README as its reader would, in a process of its own.

    Returns its run folder, the tables of results.json by title, and what it printed.
    """

    def run(name: str) -> tuple[Path, dict[str, Any], str]:
        page = (ROOT / "applications" / name / "README.md").read_text()
        (command,) = re.findall(r"^```sh\n(.*?)\n```$", page, re.DOTALL | re.MULTILINE)
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", f"applications.{name}"]
        folder = tmp_path / "run"
        done = subprocess.run(
            [sys.executable, *words[1:], "--out", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, json.loads((folder / "results.json").read_text())["tables"], done.stdout

    return run


@pytest.fixture
def bad_files(tmp_path) -> dict[str, Path]:
    """Files of examples that no application takes, by what is wrong."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(60, 4)), np.arange(60) % 3
    holes = features.copy()
    holes[7, 1] = np.nan
    sets = {
        "nan": (holes, labels),
        "range": (features, np.where(labels == 2, -5, labels)),
        "empty": (features, np.where(labels == 1, 0, labels)),
        "halves": (features, labels + 0.5),
        "shapes": (features, labels[:-1]),
    }
    paths = {}
    for name, (x, y) in sets.items():
        paths[name] = tmp_path / f"{name}.npz"
        np.savez(paths[name], features=x, targets=y)
    paths["sparse"] = tmp_path / "sparse.svm"
    paths["sparse"].write_text("".join(f"{i % 3} 1:{i} 3:1\n" for i in range(60)))
    paths["damaged"] = tmp_path / "damaged.npz"
    paths["damaged"].write_bytes(paths["nan"].read_bytes()[:200])
    paths["missing"] = tmp_path / "nowhere.npz"
    return paths


@pytest.fixture(params=["nan", "range", "empty", "halves", "shapes", "sparse", "damaged", "missing"])
def bad_file(request, bad_files) -> Path:
    """Each of them."""
    return bad_files[request.param]


@pytest.fixture
def refused(tmp_path, capsys) -> Callable[..., str]:
    """Bad input of a command: exit code 2, nothing written, and the one message that it is told in."""

    def run(command: Callable[..., int], *arguments: object) -> str:
        capsys.readouterr()
        assert command(*map(str, arguments), "--out", str(tmp_path / "run")) == 2
        lines = capsys.readouterr().err.splitlines(keepends=True)
        message = "".join(line for line in lines if not line.startswith("note: "))
        assert message.startswith("error: ")
        assert "Traceback" not in message
        assert not (tmp_path / "run").exists()
        return message

    return run


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
