"""Trains the recorded rows of notebook 04 that are missing, the most telling first, for a limited time.

    python tools/train_rows.py full --minutes 60                      # the post's network: for a GPU
    KERAS_BACKEND=jax python tools/train_rows.py full --minutes 9     # the same without TensorFlow
    python tools/train_rows.py quick                                  # the small network: two hours or so on two cores

What is trained, and in which order, is defined in the notebook, in the cells tagged "rows" (`plan`). Each finished run
is one line in figures/results, in CLR_OUTPUT_DIR if that is set, so a later call goes on where this one stopped. A run
is started only if it is likely to end in time. Real data only; CLR_DATA_DIR names the folder of cifar10.npz.
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "04_cifar_super_convergence.ipynb"


class OutOfTime(Exception):
    pass


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", choices=("quick", "full"), help="quick: the small network; full: the post's")
    parser.add_argument("--minutes", type=float, default=math.inf, help="default: until everything is there")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="the chip's peak, to say which share is reached")
    options = parser.parse_args(arguments)
    os.environ["CLR_PROFILE"] = options.profile
    os.environ.setdefault("CLR_SYNTHETIC", "never")
    rows = definitions(NOTEBOOK)
    trainer = Trainer(rows["images"], time.monotonic() + 60 * options.minutes, options.peak)
    try:
        rows["plan"](rows["SMALL"] if options.profile == "quick" else rows["POST"], trainer.train)
    except OutOfTime as stopped:
        print(f"{stopped}. Call it again to go on.")
    else:
        print("Everything is there.")


def definitions(notebook):
    """What the cells of a notebook tagged "rows" define."""
    sys.path.insert(0, str(ROOT))
    import clr_utils  # imports Keras without the greetings of TensorFlow

    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "rows", "clr_utils": clr_utils}
    for cell in cells:
        if "rows" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), names)
    return names


class Trainer:
    """`run_experiment`, run by run, until the time is up."""

    def __init__(self, images, end, peak=None):
        self.images, self.end, self.peak = images, end, peak
        self.speeds = {}  # {batch size: images per second of the last run, evaluation and compilation included}

    def train(self, experiment, runs, seeds, train_size, part="test", every_epoch=False):
        import clr_utils

        data = self.images(train_size, part)
        sizes = len(data.train[0]), len(data.test[0]), data.part
        lines = {
            (line["run"], line["seed"]): line
            for line in clr_utils.read_results(experiment, runs, *sizes)
            if line["profile"] == clr_utils.profile() and line["data"] == data.source
        }
        wanted = [(run, seed) for seed, run in itertools.product(seeds, runs)]
        for number, (run, seed) in enumerate(wanted, 1):
            if (run.name, seed) in lines:
                continue
            work, start = run.epochs * sizes[0], time.monotonic()
            speed = self.speeds.get(run.batch_size, min(self.speeds.values(), default=math.inf))
            if start + work / speed > self.end:
                raise OutOfTime(f"No time for {experiment}: {run.name}, seed {seed}")
            print(f"{experiment}, {number} of {len(wanted)}:", end=" ", flush=True)
            (line,) = clr_utils.run_experiment(experiment, [run], [seed], data, every_epoch=every_epoch)
            self.speeds[run.batch_size] = work / (time.monotonic() - start)
            lines[run.name, seed] = line
            self.report(run, work / line["seconds"])
        return [lines[run.name, seed] for run, seed in wanted]

    def report(self, run, images_per_second):
        flops = images_per_second * operations_per_image(run.make_model())
        share = f", {flops / self.peak / 1e10:.1f}% of the peak" if self.peak else ""
        print(f"    {images_per_second:,.0f} images/s in training, {flops / 1e12:.3g} TFLOP/s{share}", flush=True)


def operations_per_image(model):
    """Floating-point operations of a training step for one image: the products and sums of convolutions and dense
    layers, once forward and twice backward."""
    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "kernel")]
    return 3 * sum(2 * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1]) for layer in layers)


if __name__ == "__main__":
    main()
