"""Configuration of the documentation: sphinx-build -W --keep-going -b html docs docs/_build/html."""

import re
import sys

import pyro_genexact

project = "pyro-genexact"
copyright = "the authors of pyro-genexact"
release = version = pyro_genexact.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.doctest", "myst_nb"]
exclude_patterns = ["_build", "generated", "jupyter_execute"]
html_theme = "furo"
html_title = "pyro-genexact"
html_static_path = ["_static"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# References must resolve, but for those to other projects, whose inventories a build without the internet does not have.
nitpicky = True
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|pyro|zuko|funsor|arviz|collections|os|typing|abc|numbers|matplotlib|nn|constraints|optional)\b.*",
    ),
    (
        r"py:.*",
        r"Tensor|Distribution|Transform|TorchDistribution|Axes|ScoreParts|MaskedDistribution|ExpandedDistribution|__init__",
    ),
    # internal types in annotations
    (r"py:class", r"_DependentProperty|_Residual|Weights|ChainRule|Layout"),
    (r"py:class", r"pyro_genexact\.(contexts\.Features|flows\.build\.\w+|parts\.Categorical)"),
    (r"py:class", r"pyro_genexact\.(testing\.helpers\.ModuleT|transforms\.block_network\.BlockLinear)"),
]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # hints of tqdm, with paths


MARKUP = re.compile(r"(``.*?``|:[a-z:]+:`.*?`)|([*|])")


def keep_plain_text(app, what, name, obj, options, lines):
    """Formulae and shapes in docstrings are plain text: their stars and bars are no markup, except in literals."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # a comment, else napoleon takes what stands before a colon for the type
    example = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            lines[i] = MARKUP.sub(lambda m: m[1] or "\\" + m[2], line)


def public_bases(app, name, obj, options, bases):
    """A class shows the public classes that it derives from, in place of internal ones."""
    faces = {face for face in sys.modules if face.startswith("pyro_genexact") and face.count(".") < 2}
    shown = [
        base for base in obj.__mro__[1:] if not base.__module__.startswith("pyro_genexact.") or base.__module__ in faces
    ]
    kept = [base for base in shown if not any(issubclass(other, base) for other in shown if other is not base)]
    bases[:] = [base for base in kept if base is not object]


def setup(app):
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-docstring", keep_plain_text, priority=400)  # before napoleon
