"""``python -m tests.mutation SESSION [PATH ...] [--each 4]``: how many small changes of the library its tests find.

The changes are cosmic-ray's, and so is the file SESSION (``cr-report SESSION`` reads it): some of each module, chosen
at random. A change is tried in a child of this process, which imports the changed module and runs the quickest tests
that reach the changed line; no file is touched. A session goes on where it ended; a larger ``--each`` adds to it.
Which tests reach which line, and how long they take, is from a run with coverage: docs/quality.md has the commands.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch counts its threads: children are forks

import argparse
import ast
import difflib
import functools
import importlib.machinery
import importlib.util
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import cosmic_ray.plugins
import coverage
import hypothesis  # noqa: F401 (imported once, for all children)
import pytest
import scipy.optimize  # noqa: F401
import sklearn.datasets
import sklearn.linear_model  # noqa: F401
import torch._dynamo  # noqa: F401
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult

PATHS = ("bilevel/linalg", "bilevel/hypergrad", "bilevel/inner", "bilevel/argmin.py")
LOOKS_AT_CLASSES = [
    f"tests/test_checks.py::{name}"
    for name in (
        "test_settings_cannot_be_changed",
        "test_all_that_does_not_grow_is_frozen",
        "test_a_method_without_a_body_is_abstract",
    )
]
PASSED, FAILED, NOT_IMPORTED, UNCLEAR = 0, 1, 100, 101


def mutants(module: Path) -> list[MutationSpec]:
    """All of cosmic-ray's changes of a module but those of annotations, which nothing evaluates."""
    source = module.read_text()
    nodes, found = list(ast_nodes(get_ast(source))), []
    ignored = [span(node) for node in annotations(ast.parse(source))]
    for name in sorted(cosmic_ray.plugins.operator_names()):
        operator = cosmic_ray.plugins.get_operator(name)
        if operator.arguments():
            continue
        places = (place for node in nodes for place in operator().mutation_positions(node))
        for number, (start, end) in enumerate(places):
            if not any(first <= start and end <= last for first, last in ignored):
                found.append(MutationSpec(module, name, number, start, end))
    return found


def annotations(tree: ast.AST) -> Iterable[ast.expr]:
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if getattr(node, name, None) is not None:
                yield getattr(node, name)


def span(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]


class Tests:
    """Which tests reach a line, and how long they take."""

    def __init__(self, data: Path, times: Sequence[Path]):
        self.data = coverage.CoverageData(str(data))
        self.data.read()
        self.seconds: dict[str, float] = {}
        """Of each test that passed, by its name for pytest."""
        for case in (case for path in times for case in ElementTree.parse(path).iter("testcase")):
            if not {"failure", "error", "skipped"} & {child.tag for child in case}:
                self.seconds[node_id(f"{case.get('classname')}.", case.get("name", ""))] = float(case.get("time", 0))

    def of(self, mutant: MutationSpec, seconds: float) -> list[str]:
        """As many as take so long in sum: a case of each test function, then another of each.

        Those that are made for the module, by their file or name, come first, and the quicker ones.
        """
        reached = self.data.contexts_by_lineno(str(mutant.module_path.resolve()))
        lines = statement_lines(ast.parse(mutant.module_path.read_text()), mutant.start_pos[0])
        names = {context.removesuffix("|run") for line in lines for context in reached.get(line, ())}
        at_import = not names & self.seconds.keys()
        if at_import:
            names = {context.removesuffix("|run") for found in reached.values() for context in found}
        own = "/".join(("tests", *mutant.module_path.parent.parts[1:], f"test_{mutant.module_path.stem}.py"))
        word = plain(mutant.module_path.stem)
        turns: Counter[tuple[str, bool]] = Counter()
        cases = []
        for name in sorted(names & self.seconds.keys(), key=lambda name: (self.seconds[name], name)):
            function, other = name.partition("[")[0], not (name.startswith(own) or word in plain(name))
            cases.append((turns[function, other], other, self.seconds[name], name))
            turns[function, other] += 1
        chosen, spent = [*LOOKS_AT_CLASSES] if at_import else [], 0.0
        for _, _, needed, name in sorted(cases):
            if not spent or spent + needed <= seconds:
                chosen.append(name)
                spent += needed
        return chosen


def plain(name: str) -> str:
    return name.replace("_", "").replace(" ", "").lower()


def statement_lines(tree: ast.AST, line: int) -> range:
    """The lines of the innermost statement that has this one, without its body."""
    found = range(line, line + 1)
    for node in ast.walk(tree):  # outer ones come first
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0):
            body = getattr(node, "body", None)
            found = range(node.lineno, max(body[0].lineno, line + 1) if body else (node.end_lineno or 0) + 1)
    return found


@functools.cache
def node_id(place: str, test: str) -> str:
    """``tests.linalg.test_cg.`` and ``test_x[1]`` as pytest names it."""
    parts = place.strip(".").split(".")
    file = next(number for number in range(len(parts), 0, -1) if Path(*parts[:number]).with_suffix(".py").exists())
    return "::".join(["/".join(parts[:file]) + ".py", *parts[file:], test])


def run(tests: Sequence[str], seconds: int, module: Path | None = None, source: str = "") -> tuple[int, str]:
    """An exit code and the first test that failed, of a child that imports the module with this source."""
    with tempfile.TemporaryDirectory() as folder:
        told, child = Path(folder) / "failed", os.fork()
        if not child:
            code = UNCLEAR
            try:
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                signal.setitimer(signal.ITIMER_PROF, seconds)  # of the processor: others may use it, too
                signal.alarm(20 * seconds)
                code = _child(tests, told, module, source)
            except BaseException:
                told.write_text(traceback.format_exc())
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, told.read_text() if told.exists() else ""


def _child(tests: Sequence[str], told: Path, module: Path | None, source: str) -> int:
    if module is not None:
        sys.meta_path.insert(0, Changed(module, source))
    try:
        import bilevel  # noqa: F401
    except Exception:
        told.write_text(traceback.format_exc(limit=-1))
        return NOT_IMPORTED
    flags = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    code = pytest.main([*flags, *tests], plugins=[FirstFailure(told)])
    if code == pytest.ExitCode.USAGE_ERROR and not told.exists():  # what has changed is in their names
        functions = dict.fromkeys(test.partition("[")[0] for test in tests)
        code = pytest.main([*flags, *functions], plugins=[FirstFailure(told)])
    if code and told.exists():  # a test that failed, or a file that cannot be imported any more
        return FAILED
    return UNCLEAR if code else PASSED


class FirstFailure:
    """A plugin of pytest that writes down which test failed."""

    def __init__(self, path: Path):
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.path.write_text(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.path.write_text(f"{report.nodeid} was not collected\n{report.longreprtext[-500:]}")


class Changed(importlib.machinery.SourceFileLoader):
    """Finds and loads one module with another source."""

    def __init__(self, module: Path, source: str):
        parts = module.with_suffix("").parts
        super().__init__(".".join(parts[:-1] if parts[-1] == "__init__" else parts), str(module.resolve()))
        self.source = source

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str):
        return compile(self.source, self.path, "exec", dont_inherit=True)


def sample(database: WorkDB, paths: Sequence[Path], each: int, seed: int) -> None:
    """Add so many mutants of each module to the session, the first of an order that the seed gives."""
    known = {item.job_id for item in database.work_items}
    for path in paths:
        for module in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            if sum(name.startswith(f"{module} ") for name in known) >= each:
                continue
            found = mutants(module)
            random.Random(f"{seed} {module}").shuffle(found)
            names = {f"{module} {one.operator_name} {one.occurrence}": one for one in found[:each]}
            database.add_work_items(WorkItem.single(name, one) for name, one in names.items() if name not in known)


def attempt(mutant: MutationSpec, tests: Sequence[str], seconds: int) -> WorkResult:
    source = mutant.module_path.read_text()
    changed = mutate_code(source, cosmic_ray.plugins.get_operator(mutant.operator_name)(), mutant.occurrence)
    if changed is None:
        return WorkResult(WorkerOutcome.NO_TEST, "the module has changed since the session began")
    lines = difflib.unified_diff(source.splitlines(), changed.splitlines(), lineterm="", n=0)
    code, failed = run(tests, seconds, mutant.module_path, changed) if tests else (PASSED, "no test reaches it")
    killed = code in (FAILED, NOT_IMPORTED, -signal.SIGPROF, -signal.SIGALRM)
    outcome = TestOutcome.KILLED if killed else TestOutcome.SURVIVED
    output = failed if code in (PASSED, FAILED) else f"exit code {code}: {failed}"
    return WorkResult(WorkerOutcome.NORMAL, output, outcome, "\n".join(list(lines)[2:]))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path)
    parser.add_argument("paths", nargs="*", type=Path, help=f"modules and folders of them; {' '.join(PATHS)}")
    parser.add_argument("--each", type=int, default=4, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10, help="of tests for each mutant")
    parser.add_argument("--again", action="store_true", help="try the survivors again: there are new tests")
    parser.add_argument("--tests", nargs="+", help="try the survivors again, with these tests")
    parser.add_argument("--check", action="store_true", help="whether the tests that killed pass without a mutant")
    parser.add_argument("--coverage", type=Path, default=Path(".coverage"))
    parser.add_argument("--times", type=Path, nargs="+", default=[Path("times.xml")])
    given = parser.parse_args(arguments)
    paths = given.paths or [Path(path) for path in PATHS]
    tests = Tests(given.coverage, given.times)
    with use_db(given.session) as database:
        sample(database, paths, given.each, given.seed)
        done = {item.job_id: result for item, result in database.completed_work_items}
        for item in sorted(database.work_items, key=lambda item: item.job_id):
            (mutant,) = item.mutations
            if not any(path in (mutant.module_path, mutant.module_path.parent) for path in paths):
                continue
            survived = item.job_id in done and not done[item.job_id].is_killed
            wanted = given.tests or given.again if survived else not (given.tests or item.job_id in done)
            if not wanted:
                continue
            chosen = given.tests or tests.of(mutant, given.seconds)
            result = attempt(mutant, chosen, int(10 + sum(tests.seconds.get(test, 1.0) for test in chosen)))
            database.set_result(item.job_id, result)
            outcome, first = "killed" if result.is_killed else "survived", (result.output or "").partition("\n")[0]
            print(f"{item.job_id}: {outcome} {first}", flush=True)
        report(database, given.check)
    return 0


def report(database: WorkDB, check: bool) -> None:
    """The figures of each folder, and the survivors; a test that fails without a change has killed nothing."""
    results = [(item.mutations[0], result) for item, result in database.completed_work_items if result.diff]
    named = {result.output or "" for _, result in results if result.is_killed}
    killers = sorted(test for test in named if "::" in test)
    whole = not check or run(killers, 600)[0] == PASSED
    false = set() if whole else {test for test in killers if run([test], 120)[0] != PASSED}
    for test in sorted(false):
        print(f"fails by itself: {test}")
    figures: dict[str, list[bool]] = defaultdict(list)
    for mutant, result in results:
        folder = mutant.module_path.parent if len(mutant.module_path.parts) > 2 else mutant.module_path
        killed = result.is_killed and result.output not in false
        figures[str(folder)].append(killed)
        if not killed:
            place = f"{mutant.module_path}:{mutant.start_pos[0]}"
            print(f"\n{place} {mutant.operator_name}, {result.output}\n{result.diff}")
    for folder, outcomes in sorted(figures.items()):
        print(f"{folder}: {sum(outcomes)} of {len(outcomes)} killed ({sum(outcomes) / len(outcomes):.0%})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
