"""Configuration of the documentation: sphinx-build -W --keep-going -b html docs docs/_build/html."""

import re

import pyro_genexact

project = "pyro-genexact"
copyright = "the authors of pyro-genexact"
release = version = pyro_genexact.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "myst_nb"]
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
    example = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            lines[i] = MARKUP.sub(lambda m: m[1] or "\\" + m[2], line)


def setup(app):
    app.connect("autodoc-process-docstring", keep_plain_text, priority=400)  # before napoleon
