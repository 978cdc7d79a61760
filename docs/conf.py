"""How the site is built: `make docs`, strictly; a word that refers to nothing fails it."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import vitkernels  # noqa: E402

project = "vitkernels"
author = "the vitkernels contributors"
copyright = "the vitkernels contributors"
release = version = vitkernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "drawings"]
default_role = "code"  # docstrings name things in single backticks
nitpicky = True
# torch's pages are not read: a build needs no network. Types that only annotations name are no pages of ours either.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|Tensor|Console|Module|collections|typing|Callable|Sequence|Path|pathlib|optional|dtype)\b.*"),
    (
        "py:class",
        r"(T|Pair|vitkernels\.(ops|nn)\..*\._?\w+|vitkernels\.fuse\..*|vitkernels\.train\.model\.ModelSpec|vitkernels\.residual\..*|vitkernels\.dispatch\..*)",
    ),
]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_rtype = False  # what is returned reads on: "An `Explanation`: printed, a table"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"vitkernels {release}"
html_static_path = ["static"]
html_css_files = ["drawings.css"]
pygments_style = "friendly"
pygments_dark_style = "monokai"
