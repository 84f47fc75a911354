"""Configuration of the documentation: sphinx-build -W --keep-going -b html docs docs/_build/html."""

import re
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path

from docutils import nodes
from sphinxcontrib.bibtex.plugin import register_plugin
from sphinxcontrib.bibtex.style.referencing import BracketStyle
from sphinxcontrib.bibtex.style.referencing.author_year import AuthorYearReferenceStyle

import pyro_genexact

project = "pyro-genexact"
copyright = "the authors of pyro-genexact"
release = version = pyro_genexact.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx.ext.mathjax",
    "sphinx.ext.doctest",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "myst_nb",
]
exclude_patterns = ["_build", "generated", "jupyter_execute"]
html_theme = "furo"
html_title = "pyro-genexact"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_show_sphinx = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "alpha"
bibtex_reference_style = "author_year_round"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# The build needs no network: the inventories of other projects are in the repository, python.inv and numpy.inv as they were
# published, the others as text that lists the names referred to here.
LISTED = {
    "torch": "https://docs.pytorch.org/docs/stable/",
    "pyro": "https://docs.pyro.ai/en/stable/",
    "arviz": "https://python.arviz.org/en/stable/",
    "matplotlib": "https://matplotlib.org/stable/",
}
INVENTORIES = Path(__file__).parent / "inventories"
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", str(INVENTORIES / "python.inv")),
    "numpy": ("https://numpy.org/doc/stable/", str(INVENTORIES / "numpy.inv")),
}

nitpicky = True
nitpick_ignore_regex = [  # internal types in annotations
    (r"py:class", r"_Residual|ChainRule|Layout|Memory|ScoreParts|Solver|Weights"),
    (
        r"py:class",
        r"pyro_genexact\.(contexts\.Features|encoders\.base\.Entries|flows\.build\.\w+|parts\.Categorical|testing\.helpers\.ModuleT)",
    ),
]

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_execution_show_tb = True
nb_merge_streams = True
nb_output_stderr = "remove"  # hints of tqdm, with paths


ROUND = BracketStyle(left="(", right=")")


@dataclass
class AuthorYearRound(AuthorYearReferenceStyle):
    """Citations as in Durkan et al. (2019)."""

    bracket_parenthetical: BracketStyle = field(default_factory=lambda: ROUND)
    bracket_textual: BracketStyle = field(default_factory=lambda: ROUND)
    bracket_author: BracketStyle = field(default_factory=lambda: ROUND)
    bracket_label: BracketStyle = field(default_factory=lambda: ROUND)
    bracket_year: BracketStyle = field(default_factory=lambda: ROUND)


register_plugin("sphinxcontrib.bibtex.style.referencing", "author_year_round", AuthorYearRound)


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


def defining_module(app, module, name):
    """The module that defines a name of a face, for the link to its source."""
    for found, contents in list(sys.modules.items()):
        path = getattr(contents, "__file__", None)
        if not (found.startswith("pyro_genexact.") and path and name in vars(contents)):
            continue
        if re.search(rf"^(class|def) {re.escape(name)}\b", Path(path).read_text(), re.MULTILINE):
            return found
    return None


def without_return_type(app, domain, kind, content):
    """The type of a property is in its signature."""
    if kind == "property":
        for field_list in list(content.findall(nodes.field_list)):
            kept = [field for field in field_list if field[0].astext() != "rtype"]
            field_list.children = kept
            if not kept:
                field_list.parent.remove(field_list)


def pack_inventories(app, config):
    """Packs the listed inventories in Sphinx's format; a line of a list is ``name domain:role address``, with $ for the name."""
    for project, base in LISTED.items():
        text = (INVENTORIES / f"{project}.txt").read_text()
        lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
        body = "".join(f"{name} {role} 1 {address} -\n" for name, role, address in lines)
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version: \n# The remainder is compressed using zlib.\n"
        packed = Path(app.doctreedir) / f"{project}.inv"
        packed.parent.mkdir(parents=True, exist_ok=True)
        packed.write_bytes(head.encode() + zlib.compress(body.encode()))
        config.intersphinx_mapping[project] = (base, str(packed))


def setup(app):
    app.connect("viewcode-follow-imported", defining_module)
    app.connect("object-description-transform", without_return_type, priority=600)  # after autodoc
    app.connect("config-inited", pack_inventories, priority=700)  # before intersphinx
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-docstring", keep_plain_text, priority=400)  # before napoleon
