"""make and tools/run_notebooks.py: what a stranger types first."""

import os
import pathlib
import shutil
import subprocess
import sys

import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import run_notebooks  # noqa: E402


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path / "build")
    return tmp_path / "build"


def write_notebook(path, *code):
    cells = [nbformat.v4.new_code_cell(source) for source in code]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_executes_into_build_and_leaves_the_notebook_alone(tmp_path, build):
    path = write_notebook(tmp_path / "a.ipynb", "print(6 * 7)")
    before = path.read_bytes()
    assert run_notebooks.run(path, "[1/1]", in_place=False)
    assert path.read_bytes() == before
    executed = nbformat.read(build / "a.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "42\n"
    assert "42" in (build / "a.html").read_text(encoding="utf-8")


def test_in_place_writes_back_only_when_every_cell_went_through(tmp_path, build):
    good = write_notebook(tmp_path / "good.ipynb", "print(6 * 7)")
    bad = write_notebook(tmp_path / "bad.ipynb", "print(6 * 7)", "1 / 0")
    before = bad.read_bytes()
    assert run_notebooks.run(good, "[1/2]", in_place=True)
    assert not run_notebooks.run(bad, "[2/2]", in_place=True)
    assert nbformat.read(good, as_version=4).cells[0].outputs[0].text == "42\n"
    assert bad.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.ipynb", "good.ipynb"]


def test_a_failing_cell_is_named_and_what_ran_is_kept(tmp_path, build, capsys):
    path = write_notebook(tmp_path / "bad.ipynb", "print(6 * 7)", "1 / 0")
    assert not run_notebooks.run(path, "[1/1]", in_place=False)
    shown = capsys.readouterr()
    assert "FAILED" in shown.out and "ZeroDivisionError" in shown.err
    assert nbformat.read(build / "bad.ipynb", as_version=4).cells[0].outputs[0].text == "42\n"


def test_in_place_trains_the_live_runs_anew(tmp_path, monkeypatch):
    live, recorded = tmp_path / "live.jsonl", tmp_path / "02.jsonl"
    live.touch()
    recorded.touch()
    monkeypatch.setattr(run_notebooks, "LIVE", live)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "argv", ["", "--in-place", str(write_notebook(tmp_path / "a.ipynb", "1"))])
    run_notebooks.main()
    assert not live.exists() and recorded.exists()


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_a_python_without_tensorflow_wheels_gets_one_clear_line(tmp_path):
    old = tmp_path / "python2.7"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    made = subprocess.run(
        ["make", "--no-print-directory", "run", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode != 0
    assert len(made.stdout.splitlines()) == 1
    assert "3.10 to 3.13" in made.stdout and "PYTHON=" in made.stdout
    assert not (tmp_path / "venv").exists()
