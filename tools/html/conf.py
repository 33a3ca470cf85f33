"""Sphinx settings for `make html`: README.md as the first page, then the notebooks with their committed outputs.

The source folder is the repository itself (this folder is given with -c), so nothing is copied, and links from
README.md to the notebooks and back are found as they are. index.html only leads to README.html.
"""

import json
import operator
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from stamp_badges import unstamped  # noqa: E402

project = "Cyclical learning rates"
html_title = project
root_doc = "README"
include_patterns = ["README.md", "notebooks/*.ipynb"]
exclude_patterns = [".*", "build", "tests", "tools", "**/.ipynb_checkpoints"]  # folders that need not be searched

extensions = ["myst_nb"]
nb_execution_mode = "off"  # what is committed is what is shown
nb_ipywidgets_js = {}  # would come from the network, and no output needs it
nb_merge_streams = True  # lines printed one after the other are one box
nb_render_markdown_format = "myst"  # with tables; "gfm" would want linkify-it-py too
myst_heading_anchors = 3
myst_heading_slug_func = operator.methodcaller("replace", " ", "-")  # Jupyter's anchors; a function cannot be pickled

html_theme = "furo"
html_extra_path = ["index.html"]
html_static_path = ["pages.css"]
html_css_files = ["pages.css"]
ENLARGE = "document.addEventListener('click', e => { if (e.target.matches('article img')) location = e.target.src })"
html_js_files = [(None, {"body": ENLARGE})]  # a figure opens in its full size on a tap
html_use_index = html_copy_source = False
html_show_copyright = False
html_show_search_summary = False  # fetches the pages found, which browsers forbid under file://


def prepare(app, docname, source):
    """Adds what Sphinx wants to know and the repository's files do not say in its way."""
    if docname == root_doc:  # the order of the pages, for the sidebar and the links to the next and the previous one
        source[0] = unstamped(source[0])  # badges are pictures from the network
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\nnotebooks/*\n```\n"
        return
    notebook = json.loads(source[0])
    notebook["cells"][0]["source"] = unstamped("".join(notebook["cells"][0]["source"]))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            image = output.get("metadata", {}).get("image/png", {})
            if "alt" in image:  # MyST-NB reads it from the cell, clr_utils.py writes it beside the picture
                cell["metadata"]["mystnb"] = {"image": {"alt": image["alt"]}}
    source[0] = json.dumps(notebook)


def setup(app):
    app.connect("source-read", prepare)
