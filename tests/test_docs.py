"""The code blocks of README and docs run, page by page, in order; links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *(page for page in sorted((ROOT / "applications").rglob("*.md")) if "optunahub" not in page.parts),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
@pytest.mark.filterwarnings("ignore::bilevel.SolveWarning")
def test_code_runs(page):
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec", dont_inherit=True), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            made = re.sub(r"gallery/(\w+)\.rst$", r"examples/\1.py", target)  # a page that is made of an example
            assert (page.parent / made).exists(), f"{name(page)} links to {target}"


def test_the_workflow_runs_all_that_is_supported():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    matrix = workflow["jobs"]["run"]["strategy"]["matrix"]
    project = (ROOT / "pyproject.toml").read_text()
    assert matrix["python"] == re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    assert f'requires-python = ">={matrix["python"][0]}"' in project
    (oldest,) = re.findall(r'"torch>=([\d.]+)"', project)
    assert f"torch=={oldest}.*" in (ROOT / ".ci" / "oldest.txt").read_text()
    assert [step["run"] for step in workflow["jobs"]["run"]["steps"] if "run" in step] == [".ci/run"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the workflow's Python has tomllib")
@pytest.mark.parametrize(("urls", "code"), [("", 1), ('[project.urls]\nSource = "https://example.org"\n', 0)])
def test_nothing_is_published_without_an_address(urls, code, tmp_path):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    (step,) = (step for step in workflow["jobs"]["build"]["steps"] if step.get("name") == "The project has an address")
    (tmp_path / "pyproject.toml").write_text(f'[project]\nname = "bilevel"\n{urls}')
    command = step["run"].replace("python ", f"{sys.executable} ")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, "no [project.urls]" in done.stdout) == (code, bool(code)), done.stderr


def test_reports_of_bugs_have_the_doctor_s_output():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    (field,) = (part for part in form["body"] if part["id"] == "doctor")
    assert "python -m bilevel.doctor" in field["attributes"]["label"]
    assert field["validations"]["required"]


@pytest.mark.parametrize("name", ["CITATION.cff", ".pre-commit-config.yaml", ".github/ISSUE_TEMPLATE/idea.yml"])
def test_files_for_other_programs_can_be_read(name):
    assert len(yaml.safe_load((ROOT / name).read_text())) > 0


def test_readme_has_the_two_commands():
    assert blocks(ROOT / "README.md", "sh") == [
        'pip install -e ".[applications]" && python -m applications.few_shot\n',
        'pip install -e ".[test]" && pytest\n',
    ]
