"""Sphinx settings for `make html`: README.md as index.html, then the notebooks with their committed outputs.

The source folder is the repository itself (this folder is given with -c), so nothing is copied, and links from
README.md to the notebooks and back are found as they are.
"""

import json
import operator
import pathlib
import sys

from sphinx.project import Project

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from stamp_badges import unstamped  # noqa: E402

project = "Cyclical learning rates"
html_title = project
root_doc = "index"
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
html_theme_options = {"dark_css_variables": {"figure-brightness": "0.85"}}  # by the system or by the toggle
html_static_path = ["pages.css", "pages.js"]
html_css_files = ["pages.css"]
html_js_files = ["pages.js"]
html_use_index = html_copy_source = False
html_show_copyright = False
html_show_search_summary = False  # fetches the pages found, which browsers forbid under file://

path2doc = Project.path2doc
Project.path2doc = lambda project, path: root_doc if (name := path2doc(project, path)) == "README" else name


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
