"""What `import bilevel` and a command's help load, and what they leave for later."""

import importlib
import subprocess
import sys

import pytest

import bilevel as bl


def loaded(code: str) -> set[str]:
    """The modules of a fresh process after it ran ``code``."""
    program = f"{code}\nimport sys\nprint('\\n'.join(['modules:', *sys.modules]))"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return set(told.partition("modules:")[2].split())


def test_what_few_programs_need_is_not_loaded():
    modules = loaded("import bilevel")
    assert "bilevel.argmin" in modules
    later = {"bilevel.problems", "bilevel.stochastic", "bilevel.diagnostics", "bilevel.tuning", "bilevel.testing"}
    assert not modules & {*later, "scipy.optimize", "scipy.sparse", "scipy.linalg", "optuna", "sklearn"}


@pytest.mark.parametrize("name", bl.__all__)
def test_every_name_is_there(name):
    assert getattr(bl, name) is not None
    assert name in dir(bl)


def test_parts_come_at_their_first_use():
    modules = loaded("import bilevel as bl\nassert 'problems' in dir(bl)\nbl.problems.Ridge\nbl.custom_root")
    assert {"bilevel.problems", "bilevel.compat"} <= modules
    assert bl.problems is importlib.import_module("bilevel.problems")
    assert bl.custom_root is bl.compat.custom_root


def test_the_version_is_that_of_the_package():
    assert isinstance(bl.__version__, str)
    assert "__version__" in dir(bl)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'bilevel' has no attribute 'argmax'"):
        _ = bl.argmax


@pytest.mark.applications
def test_the_help_of_few_shot_waits_for_nothing_that_draws():
    help_of = """
import runpy, sys
sys.argv = ["few_shot", "--help"]
try:
    runpy.run_module("applications.few_shot", run_name="__main__")
except SystemExit:
    pass
"""
    assert not loaded(help_of) & {"matplotlib.pyplot", "scipy.stats", "scipy.ndimage", "torchvision", "sklearn"}
