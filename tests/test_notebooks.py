"""The committed notebooks and README: complete, executed once from top to bottom, free of what a reader stumbles over.

That the code in them runs is tested by nbval, which executes every notebook in the smoke profile.
"""

import ast
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHECKED = "nbval-check-output"  # the tag of a cell whose text comes out again on every machine; nbval compares it
MEASURED = "measured"  # the tag of a cell whose text depends on a training here, on the data or on the machine


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def prose(notebook):
    return "\n".join(source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell["outputs"]]


def output_text(output):
    return "".join(output.get("text", [])) + "".join(output.get("data", {}).get("text/plain", []))


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_begins_with_title_promise_and_bootstrap(notebook):
    first, setup, bootstrap = notebook["cells"][:3]
    assert source(first).startswith("# ") and not re.search(r"^# ", source(first)[2:], re.M)
    for promise in ("You will learn", "Time", "You need"):
        assert promise in source(first)
    assert source(setup).startswith("## Setup")
    assert "clr_utils.py" in source(bootstrap) and "FileNotFoundError" in source(bootstrap)
    assert source(bootstrap).splitlines()[-1].startswith("import experiments")


def test_ends_with_takeaways_exercises_and_references(notebook):
    headings = re.findall(r"^## (.+)$", prose(notebook), re.M)
    assert headings[-3:] == ["Takeaways", "Exercises", "References"]


def test_was_executed_once_from_top_to_bottom(notebook):
    assert [cell["execution_count"] for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))


def test_outputs_are_clean(notebook):
    for output in outputs(notebook):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr", output_text(output)
        assert not re.search(r"(?<![\w:/.])/(home|root|tmp|work|Users|usr|var|content)/|[A-Z]:\\", output_text(output))
        assert "synthetic" not in output_text(output).lower(), "committed outputs come from real data"


def test_every_picture_says_in_words_what_it_shows(notebook):
    for output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            assert len(output["metadata"]["image/png"]["alt"]) > 30


def test_is_small_and_reads_as_a_text(path, notebook):
    assert path.stat().st_size < 2e6
    lines = [source(cell).count("\n") + 1 for cell in code_cells(notebook)]
    assert max(lines) <= 32
    assert max(len(line) for cell in code_cells(notebook) for line in source(cell).splitlines()) <= 100
    assert sum(cell["cell_type"] == "markdown" for cell in notebook["cells"]) >= 0.8 * len(lines)


def is_shown_file(output):
    """Of 05_data_parallel.py, which has a test of its own."""
    return "highlight" in "".join(output.get("data", {}).get("text/html", []))


def test_every_text_is_compared_or_marked_as_measured(notebook):
    # So that executing the notebook anew, on unchanged code and data, changes no text but that of marked cells.
    for cell in code_cells(notebook):
        texts = [o for o in cell["outputs"] if "image/png" not in o.get("data", {}) and not is_shown_file(o)]
        tags = {CHECKED, MEASURED} & set(cell["metadata"].get("tags", []))
        assert len(tags) == 1 if texts else MEASURED not in tags, source(cell)


def test_a_file_that_is_shown_is_shown_as_it_is():
    notebook = json.loads((ROOT / "notebooks" / "05_scaling_out.ipynb").read_text(encoding="utf-8"))
    (shown,) = [output for output in outputs(notebook) if is_shown_file(output)]
    script = (ROOT / "notebooks" / "05_data_parallel.py").read_text(encoding="utf-8")
    assert output_text(shown) == script.rstrip("\n")


def test_cells_whose_output_nbval_compares_have_one(notebook):
    # nbval passes a checked cell that was never run or prints nothing.
    checked = [cell for cell in code_cells(notebook) if CHECKED in cell["metadata"].get("tags", [])]
    assert checked and all(any(output_text(output) for output in cell["outputs"]) for cell in checked)


def test_figures_and_their_texts_are_the_ones_committed(path, notebook):
    code = "\n".join(source(cell) for cell in code_cells(notebook))
    number = path.stem[:2]
    results = {results.stem for results in (ROOT / "figures" / "results").glob("*.jsonl")}
    results |= set(re.findall(r'(?:experiment|tuning)="(\w+)"', code))  # also those that have not been run yet
    saved = set(re.findall(rf'"({number}_\w+)"', code)) - results
    assert saved == {figure.stem for figure in (ROOT / "figures").glob(f"{number}_*.png")}
    texts = json.loads((ROOT / "figures" / f"{number}_alt.json").read_text(encoding="utf-8"))
    shown = [o["metadata"]["image/png"]["alt"] for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert set(texts) == saved and sorted(texts.values()) == sorted(shown)


def test_taught_code_is_the_code_of_the_module(notebook):
    module = {
        node.name: ast.unparse(node)
        for path in (ROOT / "clr_utils.py", ROOT / "notebooks" / "experiments.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }
    for cell in code_cells(notebook):
        for node in ast.parse(source(cell)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in module:
                assert ast.unparse(node) == module[node.name], node.name


def links(text):
    without_code = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", without_code)


def anchors(text):
    without_code = re.sub(r"```.*?```", "", text, flags=re.S)
    return {heading.strip().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", without_code, re.M)}


def test_links_resolve(path, notebook):
    text = prose(notebook)
    for link in links(text):
        if link.startswith("#"):
            assert link[1:] in anchors(text)
        elif "://" not in link:
            assert (path.parent / link.split("#")[0]).exists(), link


def test_readme_links_resolve_and_its_pictures_have_alt_text():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in links(readme):
        assert "://" in link or (ROOT / link.split("#")[0]).exists(), link
    pictures = re.findall(r"!\[([^\]]*)\]", readme)
    assert pictures and all(len(alt) > 30 for alt in pictures)


def test_readme_lists_every_notebook():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"notebooks/{path.name}" in readme for path in NOTEBOOKS)
