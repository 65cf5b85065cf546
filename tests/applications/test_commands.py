"""Every command of the pages is one that there is, with options that there are."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "applications").rglob("*.md"))]
COMMANDS = sorted(
    {
        (match[1], " ".join(re.findall(r"--([a-z][a-z.-]*)", match[2])))
        for page in PAGES
        for match in re.finditer(r"-m (applications(?:\.\w+)+)\b([^`\n]*)", page.read_text())
        if match[1].split(".")[1].islower()  # others stand for a name
    }
)


@pytest.mark.parametrize(("module", "options"), COMMANDS, ids=lambda part: part or "no options")
def test_the_command_is_there(module, options):
    assert find_spec(f"{module}.__main__") is not None
    folders = [ROOT / "applications" / "frame", ROOT.joinpath(*module.split("."))]
    source = "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    for option in options.split():
        field = option.removeprefix("config.").removeprefix("no-").replace("-", "_")
        assert re.search(rf"^    {field}: ", source, re.MULTILINE), f"--{option}"


def test_the_commands_are_found():
    assert {"applications.few_shot", "applications.measurements.benchmarks"} <= {module for module, _ in COMMANDS}
    assert len(COMMANDS) > 30
