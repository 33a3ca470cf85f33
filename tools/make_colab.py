"""Writes self-contained notebooks to build/colab: one file to upload into Colab, nothing to install.

    python tools/make_colab.py                                  # all of notebooks/
    python tools/make_colab.py notebooks/01_clr_optimizer.ipynb

The cell that looks for clr_utils.py is replaced by one that unpacks it, with experiments.py and the recorded runs that
the notebook reads, into the working folder. Outputs are kept, so the uploaded file can be read before it is run.
"""

import argparse
import base64
import io
import pathlib
import re
import zipfile

import nbformat
import stamp_badges

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "colab"
CELL = '''\
# clr_utils.py and experiments.py{results}, packed into this cell: it writes them into the working folder.
import base64
import io
import sys
import zipfile

PACKED = """
{packed}
"""
zipfile.ZipFile(io.BytesIO(base64.b64decode(PACKED))).extractall()
sys.path.insert(0, "notebooks")

import experiments  # imports Keras too, without the greetings of TensorFlow
'''


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=pathlib.Path, help="default: all of notebooks/")
    TARGET.mkdir(parents=True, exist_ok=True)
    for path in parser.parse_args(arguments).notebooks or sorted((ROOT / "notebooks").glob("*.ipynb")):
        target = TARGET / path.name
        nbformat.write(self_contained(nbformat.read(path, as_version=4), path.stem), target)
        print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e6:.1f} MB")


def self_contained(notebook, name):
    """The notebook with its third cell, which finds clr_utils.py, replaced by one that brings it along."""
    number = name[:2]
    along = [ROOT / "clr_utils.py", ROOT / "notebooks" / "experiments.py"]
    along += sorted((ROOT / "notebooks").glob(f"{number}_*.py"))
    along += sorted((ROOT / "figures").glob(f"{number}_alt.json"))
    results = sorted((ROOT / "figures" / "results").glob(f"{number}_*.json*"))
    notebook.cells[2].source = CELL.format(
        results=", with the recorded results" if results else "", packed=packed(along + results)
    )
    notebook.cells[2].metadata["jupyter"] = {"source_hidden": True}
    notebook.cells[2].metadata["cellView"] = "form"  # Colab's way of folding a cell
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # the other notebooks are not beside this one
            cell.source = re.sub(r"\[([^\]]+)\]\(\d\d_\w+\.ipynb[^)]*\)", r"\1", stamp_badges.unstamped(cell.source))
    return notebook


def packed(paths):
    """The files as a zip archive in base64, in lines; the same text for the same files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in paths:
            archive.writestr(
                zipfile.ZipInfo(path.relative_to(ROOT).as_posix()), path.read_bytes(), zipfile.ZIP_DEFLATED
            )
    text = base64.b64encode(buffer.getvalue()).decode()
    return "\n".join(text[i : i + 120] for i in range(0, len(text), 120))


if __name__ == "__main__":
    main()
