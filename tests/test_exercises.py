"""The exercises of the notebooks: each solution runs and passes its check, and a wrong answer does not.

Each notebook is executed once, in the form for Colab and alone in an empty folder, with its exercises as further cells.
"""

import pathlib
import re
import sys
from typing import NamedTuple

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import make_colab

# One wrong answer for each exercise, in order. It is run on top of the solution, so it says only what is wrong.
WRONG_ANSWERS = {
    "01_clr_optimizer": [
        "answer = 0.001  # that of the cycle which ends at its bottom",
        "answer = 2 * ((updates - 1 + 40) // 80)  # as many bottoms too",
        "mended = lambda iteration, bounds, steps: ops.where(iteration > steps, bounds[0], bounds[1])  # one too late",
        "whole, sawtooth = sawtooth, lambda i, bounds, steps: whole(i, bounds, steps / 2)  # restarts too early",
    ],
    "02_lr_range_test": [
        "answer = 2 / (3 * CURVATURE)  # as if the curvature grew like the input",
        "my_cycle = CLR((0.005, 0.05), 5 * UPDATES // 2, MOMENTUM_BOUNDS)  # batches of 32",
        "adam = first  # from 1e-5 to 10",
        "def knee(result):\n    return result.lr[np.argmin(result.smoothed)]  # all of the descent",
    ],
    "03_mnist_comparison": [
        "answer = len(mnist.train[0]) // 32  # the updates in batches of 32",
        "answer = 10",
        "answer = 100 * 0.98 * 0.02 / 10000  # without the square root",
        "def lenet_linear(rate, updates):\n    return keras.optimizers.SGD(rate, momentum=0.9)",
        "my_schedule = clr_utils.one_cycle",
    ],
    "04_cifar_super_convergence": [
        "gradient = 10  # larger, where it is smaller",
        "answer = 0.999",
        "def steps_to_zero(iteration, bounds, steps):\n    return bounds[1] * (1 - iteration / (2 * steps))",
    ],
    "05_scaling_out": [
        "steps = 10 * -(-50_000 // 256) // 4  # as if the counter counted updates",
        "answer = 2**20",
        "rule = RULES['linear']",
    ],
    "06_beyond_one_cycle": [
        "share = 1.0  # as if a branch began anew",
        "errors = [0.2, 0.07]  # the bin of 0.5 left out",
        "branch = CLR((0.03, 0.3), 250, 0.9, functools.partial(trapezoid, warmup=0, decay=0.2, final=0))",
    ],
}

# Between exercises: the names are as the notebook left them. What a solution changes inside an object stays changed.
REMEMBER = """
def forget(kept=dict(globals())):
    for name in globals().keys() - kept.keys() - {"forget"}:
        del globals()[name]
    globals().update(kept)
"""


class Exercise(NamedTuple):
    title: str
    solution: str
    check: str


def exercises_of(notebook):
    """The exercises of a notebook, in order. Each begins with a line such as **1. Predict, then run.**"""
    prose = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    section = prose.split("## Exercises\n")[1].split("## References\n")[0]
    _, *parts = re.split(r"^(?=\*\*\d\. )", section, flags=re.M)
    return [
        Exercise(re.match(r"\*\*(.+?)\.?\*\*", part)[1], folded(part, "Solution"), folded(part, "Check"))
        for part in parts
    ]


def folded(text, summary):
    """The code of the one folded block with this summary."""
    blocks = re.findall(rf"^<details><summary>{summary}</summary>\n(.*?)^</details>$", text, flags=re.M | re.S)
    assert len(blocks) == 1, f"{len(blocks)} x {summary}, not one, in:\n{text}"
    code = re.findall(r"^```python\n(.*?)^```$", blocks[0], flags=re.M | re.S)
    assert len(code) == 1, f"{len(code)} blocks of python, not one, in {summary} of:\n{text}"
    return code[0]


def error_of(cell):
    """(name, message) of the exception that ended the cell, or (None, "")."""
    errors = [output for output in cell.outputs if output.output_type == "error"]
    return (errors[0].ename, errors[0].evalue) if errors else (None, "")


@pytest.fixture(params=sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def exercises(path):
    return exercises_of(nbformat.read(path, as_version=4))


def test_each_has_a_check_a_solution_and_a_wrong_answer(path, exercises):
    assert 3 <= len(exercises) <= 5
    assert [int(exercise.title[0]) for exercise in exercises] == list(range(1, len(exercises) + 1))
    assert re.match(r"\d\. Write your own ", exercises[-1].title)
    assert len(WRONG_ANSWERS.get(path.stem, [])) == len(exercises), (
        f"add one wrong answer for each exercise of {path.stem} to WRONG_ANSWERS in {pathlib.Path(__file__).name}"
    )


def test_solutions_pass_their_checks_and_wrong_answers_do_not(path, exercises, tmp_path, monkeypatch):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))  # nothing from other tests: every run is trained
    notebook = make_colab.self_contained(nbformat.read(path, as_version=4), path.stem)

    def add(code):
        cell = nbformat.v4.new_code_cell(code, metadata={"tags": ["raises-exception"]})
        notebook.cells.append(cell)
        return cell

    add(REMEMBER)
    added = []
    for exercise, wrong in zip(exercises, WRONG_ANSWERS.get(path.stem, [])):
        added.append([add(code) for code in (exercise.check, exercise.solution, exercise.check, wrong, exercise.check)])
        add("forget()")
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()

    for exercise, cells in zip(exercises, added):
        unanswered, solution, check, wrong, check_of_wrong = map(error_of, cells)
        name = f"{path.stem}, exercise {exercise.title}"
        assert unanswered[0], f"{name}: the check passes without an answer"
        assert not solution[0], f"{name}: the solution ends with {solution}"
        assert not check[0], f"{name}: the solution fails the check with {check}"
        assert not wrong[0], f"{name}: the wrong answer of this test ends with {wrong}"
        assert check_of_wrong[0] == "AssertionError", f"{name}: the check of a wrong answer ends with {check_of_wrong}"
        assert len(check_of_wrong[1]) > 20, f"{name}: the check does not say what is wrong"
