"""Executes notebooks from top to bottom, each in a fresh kernel, and says how far it is.

    python tools/run_notebooks.py              # all of notebooks/ -> build/*.ipynb and *.html, build/figures
    python tools/run_notebooks.py --in-place   # writes the outputs back into the notebooks and figures/; real data only
    python tools/run_notebooks.py notebooks/01_clr_optimizer.ipynb

CLR_PROFILE chooses the profile (smoke, quick, full), CLR_DATA_DIR the data. The exit status is 1 if a cell failed.
"""

import argparse
import os
import pathlib
import sys
import time

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
LIVE = ROOT / "figures" / "results" / "live.jsonl"  # runs that each reader trains; not committed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=pathlib.Path, help="default: all of notebooks/")
    parser.add_argument("--in-place", action="store_true", help="write back what is committed")
    options = parser.parse_args()
    notebooks = options.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in notebooks:
        if not path.is_file():
            parser.error(f"{path} is not there")

    if options.in_place and os.environ.get("CLR_PROFILE") == "smoke":
        parser.error("--in-place with CLR_PROFILE=smoke: what is committed comes from quick or full")

    for name in ("CLR_DATA_DIR", "CLR_OUTPUT_DIR"):  # kernels start in the folder of their notebook
        if os.environ.get(name):
            os.environ[name] = str(pathlib.Path(os.environ[name]).expanduser().absolute())
    os.environ["TQDM_DISABLE"] = "1"  # bars are for those who watch; here they would stay in the outputs
    if options.in_place:
        os.environ["CLR_SYNTHETIC"] = "never"  # what is committed comes from real data
        os.environ["CLR_OUTPUT_DIR"] = str(ROOT)
        LIVE.unlink(missing_ok=True)  # what is committed shows these runs being trained
    else:
        os.environ.setdefault("CLR_OUTPUT_DIR", str(BUILD))
    failed = [path for k, path in enumerate(notebooks, 1) if not run(path, f"[{k}/{len(notebooks)}]", options.in_place)]
    if failed:
        sys.exit(f"{len(failed)} of {len(notebooks)} notebooks failed: {', '.join(path.stem for path in failed)}")


def run(path, label, in_place):
    """Executes one notebook. Returns whether every cell went through; in place, a failed run leaves it as it was
    (figures and results that its cells have written by then stay)."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    profile = os.environ.get("CLR_PROFILE", "quick")

    def show(text, end="\n"):
        line = f"{label} {path.stem} ({profile}): {text}, {time.monotonic() - start:.0f} s"
        if end == "\r" and not sys.stdout.isatty():
            return
        print(f"{line:<100}", end=end, flush=True)

    def starting(cell, cell_index):
        show(f"cell {cell_index + 1} of {len(notebook.cells)}", end="\r")

    print(f"{label} {path.stem} ({profile}): starting", flush=True)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],  # ipykernel warns about its transport otherwise
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=starting,
    )
    error = None
    try:
        client.execute()
    except (CellExecutionError, DeadKernelError) as raised:
        error = raised
    if in_place:
        if not error:
            notebook.metadata["language_info"].pop("version", None)  # of no use to a reader, and new with each Python
            write(path, nbformat.writes(notebook) + "\n")
            show("done, outputs written back")
    else:
        BUILD.mkdir(exist_ok=True)
        write(BUILD / path.name, nbformat.writes(notebook) + "\n")
        html, _ = HTMLExporter(embed_images=True).from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        write(BUILD / f"{path.stem}.html", html)
        if not error:
            show(f"done -> {os.path.relpath(BUILD / path.stem)}.html")
    if error:
        show("FAILED")
        print(error, file=sys.stderr)
    return error is None


def write(path, text):
    """Writes a text file in one piece or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    main()
