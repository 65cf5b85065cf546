"""The site: ``python -m sphinx -W --keep-going docs build/site``."""

from __future__ import annotations

import os
import re
import sys
import urllib.request
from pathlib import Path
from types import BuiltinFunctionType

os.environ.setdefault("OMP_NUM_THREADS", "1")
DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))  # this checkout's bilevel and applications, installed or not

from sphinx.util.nodes import make_refnode  # noqa: E402

import bilevel  # noqa: E402

project = "bilevel"
author = "The bilevel authors"
copyright = f"2026, {author}"
release = version = bilevel.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_templates", "examples/README.rst", "examples/*.py", "gallery/*.ipynb", "gallery/*.py"]
exclude_patterns += ["gallery/sg_execution_times.rst", "sg_execution_times.rst", "reference/examples"]
templates_path = ["_templates"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # the gallery's settings hold functions, which no cache keeps


def snippets() -> dict[str, str]:
    """The example of each object: parts of the files in ``reference/examples``, under ``# %% CG MINRES:``."""
    found = {}
    for path in sorted((DOCS / "reference" / "examples").glob("*.py")):
        head, *parts = re.split(r"((?:^# %% .+:\n)+)", path.read_text(), flags=re.MULTILINE)
        for marks, code in zip(parts[::2], parts[1::2], strict=True):
            whole = f"{head.strip()}\n\n{code.strip()}"
            found |= {f"bilevel.{name}": whole for line in re.findall("%% (.+):", marks) for name in line.split()}
    return found


EXAMPLES = snippets()


# Reference: a page an object, from the docstrings, which are Google's and name objects in single backticks.
default_role = "py:obj"
autosummary_generate = True
autosummary_ignore_module_all = False
autosummary_context = {"example_of": EXAMPLES.get}
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_type_aliases = {"Tree": "Tree", "Params": "Params", "Objective": "Objective", "Throw": "Throw"}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 90

# Links into other projects' references: their lists of names are fetched once, and left out where there is no network.
INVENTORIES = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "numpy": "https://numpy.org/doc/stable/",
    "sklearn": "https://scikit-learn.org/stable/",
    "optuna": "https://optuna.readthedocs.io/en/stable/",
}


def inventory(name: str, url: str) -> Path | None:
    """The file of a project's names, or None where it can be neither found nor fetched."""
    path = DOCS.parent / "build" / "inventories" / f"{name}.inv"
    if not path.exists():
        try:
            with urllib.request.urlopen(url + "objects.inv", timeout=5) as reply:
                content = reply.read()
        except OSError:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return path


found = {name: inventory(name, url) for name, url in INVENTORIES.items()}
intersphinx_mapping = {name: (INVENTORIES[name], str(path)) for name, path in found.items() if path is not None}

# Examples: files that run as they are, and are notebooks too.
ORDER = ("ridge", "lasso_path", "cnn_hyperparameters", "data_cleaning", "transformer_reweighting", "imaml_sinusoid")
ORDER += ("equilibrium_layer", "ode_parameters", "qp_layer", "optuna_study")


def in_order(name: str) -> tuple[int, str]:
    """The sort key of the gallery: first those that most people look for; new files come last."""
    return ORDER.index(name[:-3]) if name[:-3] in ORDER else len(ORDER), name


sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": in_order,
    "image_scrapers": ("matplotlib",),
    "default_thumb_file": str(DOCS / "_static" / "logo.svg"),
    "doc_module": ("bilevel",),
    "backreferences_dir": "reference/uses",
    "thumbnail_size": (420, 180),  # of two panels side by side
    "remove_config_comments": True,
    "show_memory": False,
    "write_computation_times": False,
    "min_reported_time": 1e6,
    "download_all_examples": False,
}

html_theme = "pydata_sphinx_theme"
html_title = "bilevel"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/logo.svg"
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "bilevel", "image_light": "_static/logo.svg", "image_dark": "_static/logo.svg"},
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {"index": [], "faq": [], "choosing": []}


def resolve(app, env, node, contnode):
    """Link ``bl.CG`` and ``stochastic.SOBA`` of a docstring to `bilevel.CG`; what is not public stays plain code."""
    if node.get("refdomain") == "py":
        full = f"bilevel.{node['reftarget'].removeprefix('bl.')}"
        entry = env.get_domain("py").objects.get(full)
        if entry is not None:
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, full)
    return None


def is_foreign(app, what, name, obj, skip, options):
    """Whether a member comes from another library: its own reference has it."""
    if hasattr(obj, "__objclass__") or isinstance(obj, BuiltinFunctionType):  # of int, from which Result inherits
        return True
    module = getattr(getattr(obj, "fget", obj), "__module__", None) or "bilevel"
    return True if not module.startswith("bilevel") else None


def drop_empty_globs(app, docname, source):
    """A pattern of a toctree that no page matches is left out; Sphinx would warn."""
    found = re.compile(r"^([\w/]+\*)\n", re.MULTILINE)
    source[0] = found.sub(lambda pattern: pattern[0] if any(DOCS.glob(f"{pattern[1]}.md")) else "", source[0])


def plain_aliases(app, what, name, obj, options, signature, returned):
    """``Solution[TypeAliasForwardRef('Params')]`` as ``Solution[Params]``."""
    return tuple(text and re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text) for text in (signature, returned))


def setup(app) -> None:
    app.connect("autodoc-process-signature", plain_aliases)
    app.connect("autodoc-skip-member", is_foreign)
    app.connect("source-read", drop_empty_globs)
    app.connect("missing-reference", resolve)
