"""Wheel and sdist in an environment with the core dependencies alone: public names, a solve, what is missing told."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bilevel import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
CORE = {"torch", "numpy", "scipy"}
EXTRAS = ("optuna", "plotly", "sklearn", "torchvision", "tyro", "tqdm", "matplotlib", "PIL", "pandas", "pytest")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of what a build reads, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "bilevel", source / "bilevel", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, source)
    return source


@pytest.fixture(scope="module")
def dist(source) -> Path:
    """What a release publishes: an sdist, and the wheel that is built of it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source))
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (found,) = dist.glob("bilevel-*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(dist) -> Path:
    (found,) = dist.glob("bilevel-*.tar.gz")
    return found


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def closure(names: set[str]) -> set[str]:
    """The distributions and all that they require here, without extras."""
    found, rest = set(), [canonicalize_name(name) for name in names]
    while rest:
        name = rest.pop()
        if name in found:
            continue
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            requirement = Requirement(line)
            asked = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if asked and installed(requirement.name):
                rest.append(canonicalize_name(requirement.name))
                for extra in requirement.extras:  # such as cuda-toolkit[cublas]
                    rest += [
                        canonicalize_name(part.name)
                        for part in map(Requirement, importlib.metadata.requires(requirement.name) or [])
                        if part.marker is not None and part.marker.evaluate({"extra": extra}) and installed(part.name)
                    ]
    return found


def installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def python(request, tmp_path_factory) -> Path:
    """A fresh environment with either; links to this environment's core dependencies stand for a second download."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    (site,) = place.glob("lib/python*/site-packages")
    build = {"setuptools"} if request.param == "sdist" else set()
    for name in closure(CORE | build):
        distribution = importlib.metadata.distribution(name)
        for part in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / part).exists():
                (site / part).symlink_to(Path(str(distribution.locate_file(part))))
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index"]
    run(*pip, "--no-build-isolation", str(request.getfixturevalue(request.param)))
    return python


def test_the_index_would_take_both_files(dist):
    said = run(sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    assert said.count("PASSED") == 2


def test_the_sdist_holds_the_release_note_and_no_more_than_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {""}
    assert {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "bilevel/__init__.py"} <= names
    made = {"PKG-INFO", "setup.cfg", "MANIFEST.in", "CITATION.cff", "bilevel.egg-info"}
    assert {name.split("/")[0] for name in names} <= made | {
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "bilevel",
    }


def test_version_and_workflow_agree(dist):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {path.name for path in dist.iterdir()} == {
        f"bilevel-{project['version']}.tar.gz",
        f"bilevel-{project['version']}-py3-none-any.whl",
    }
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    publish = workflow["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["needs"] == "build"
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML reads "on" as true
    (upload,) = (step for step in publish["steps"] if "pypi-publish" in step["uses"])
    assert "with" not in upload  # no password, no token


def test_the_wheel_holds_the_library_and_asks_for_three_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        text = archive.read(metadata).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"bilevel"}
    assert "bilevel/py.typed" in names
    asked = [Requirement(line.removeprefix("Requires-Dist: ")) for line in text.splitlines() if "Requires-Dist" in line]
    assert {requirement.name for requirement in asked if requirement.marker is None} == CORE
    extras = {line.removeprefix("Provides-Extra: ") for line in text.splitlines() if "Provides-Extra" in line}
    assert extras == set(doctor.USES)
    assert {"tuning", "sklearn", "progress", "applications", "test", "docs", "bench", "dev"} <= extras
    assert {"Classifier", "Keywords"} <= {line.split(":")[0] for line in text.splitlines()}


def test_an_editable_install_is_a_path_that_type_checkers_follow(source):
    """They read no import hook, which setuptools makes where packages lie beside other folders."""
    (source / "editable").mkdir()
    build = "from setuptools import build_meta; build_meta.build_editable('editable')"
    run(sys.executable, "-c", build, cwd=source)
    (found,) = (source / "editable").glob("*.whl")
    with zipfile.ZipFile(found) as archive:
        (path,) = (name for name in archive.namelist() if ".dist-info" not in name)
        assert path.endswith(".pth")
        assert (Path(archive.read(path).decode().strip()) / "bilevel" / "py.typed").exists()


PROGRAM = """
import importlib, importlib.util, pkgutil, sys
import torch
import bilevel as bl

for name in {extras}:
    assert importlib.util.find_spec(name) is None, name + " is visible"
assert bl.__file__.startswith(sys.prefix), bl.__file__
assert bl.__version__ == importlib.metadata.version("bilevel")

for name in bl.__all__:
    part = getattr(bl, name)
    for own in getattr(part, "__all__", ()):
        name == "sklearn" or getattr(part, own)
for module in pkgutil.walk_packages(bl.__path__, "bilevel."):
    if not module.name.startswith(("bilevel.sklearn.", "bilevel.testing", "bilevel.doctor")):
        importlib.import_module(module.name)

problem = bl.problems.Ridge(per_feature=True)
x = problem.hparams.clone().requires_grad_()
fit = bl.argmin(problem.inner, problem.init, x, hypergrad=bl.Implicit(bl.CG(rtol=1e-12)))
(found,) = torch.autograd.grad(problem.outer(fit.value, x), x)
torch.testing.assert_close(found, problem.hypergradient(x.detach()), rtol=1e-6, atol=1e-9)

def sentence(use):
    try:
        use()
    except ModuleNotFoundError as error:
        return str(error)
    raise AssertionError("nothing is missing")

comparison = bl.diagnostics.compare_methods(problem, {{"CG": bl.Implicit(bl.CG(rtol=1e-9))}}, repeats=1)
for use, extra, package in (
    (lambda: bl.sklearn.BilevelSearchCV, "sklearn", "sklearn"),
    (lambda: bl.tuning.create_study("study"), "tuning", "optuna"),
    (lambda: bl.tuning.open_storage("study.db"), "tuning", "optuna"),
    (comparison.to_png, "applications", "matplotlib"),
    (bl.ProgressBar, "progress", "tqdm"),
    (lambda: importlib.import_module("bilevel.testing"), "test", "pytest"),
):
    said = sentence(use)
    assert said.startswith(package + " is not installed") and 'pip install "bilevel[' + extra + ']"' in said, said
try:
    bl.extending.Dense(torch.eye(2)).to_curvlinops()
except ImportError as error:
    assert "pip install curvlinops-for-pytorch" in str(error)
else:
    raise AssertionError("curvlinops is visible")
assert bl.tuning.from_json(bl.tuning.to_json(bl.LBFGS(gtol=1e-6))) == bl.LBFGS(gtol=1e-6)
print("all is well")
"""


def test_it_works_with_its_core_dependencies_alone(python, tmp_path):
    assert "all is well" in run(str(python), "-I", "-c", PROGRAM.format(extras=EXTRAS), cwd=tmp_path)


def test_its_doctor_names_what_is_missing(python, tmp_path):
    said = run(str(python), "-I", "-m", "bilevel.doctor", cwd=tmp_path)
    assert 'missing scikit-learn, threadpoolctl: pip install "bilevel[sklearn]"' in said
    assert "WRONG" not in said


TYPED = """
import torch
from torch import Tensor

import bilevel as bl


def loss(y: Tensor, x: Tensor) -> Tensor:
    return (y - x).square().sum()


x = torch.ones(2, requires_grad=True)
fit = bl.argmin(loss, torch.zeros(2), x, solver=bl.LBFGS(gtol=1e-6), hypergrad=bl.Implicit(bl.CG()), throw="raise")
value: Tensor = fit.value
tree = bl.argmin(lambda p: p["w"].square().sum(), {"w": torch.ones(2)}, hypergrad=None)
weight: Tensor = tree.value["w"]
equation = bl.root(lambda y: y**2 - 2, torch.ones(2), solver=bl.Newton())

bl.argmin(loss, torch.zeros(2), x, solver=bl.CG())  # wrong
bl.argmin(loss, torch.zeros(2), x, hypergrad="implicit")  # wrong
bl.argmin(loss, torch.zeros(2), x, throw="never")  # wrong
bl.argmin(loss, torch.zeros(2), x, tolerance=1e-6)  # wrong
bl.root(loss, torch.zeros(2), x, solver=bl.LBFGS())  # wrong
number: int = fit.value  # wrong
"""


@pytest.mark.parametrize("python", ["wheel"], indirect=True)
@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_type_checkers_see_a_wrong_use_and_no_other(checker, python, tmp_path):
    """In a folder outside of the checkout, by ``py.typed`` of what was installed."""
    if shutil.which(checker) is None and checker == "pyright":
        pytest.skip("pyright is not installed")
    mypy = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python)]
    command = mypy if checker == "mypy" else ["pyright", "--pythonpath", str(python)]
    (tmp_path / "program.py").write_text(TYPED)
    said = subprocess.run([*command, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600).stdout
    lines = [number for number, line in enumerate(TYPED.splitlines(), 1) if line.endswith("# wrong")]
    assert sorted({int(line) for line in re.findall(r"program\.py:(\d+):.*error", said)}) == lines, said
