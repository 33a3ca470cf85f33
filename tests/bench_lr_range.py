"""What an LR range test costs: against `fit` for the same number of updates.

    python tests/bench_lr_range.py [ROUNDS]

The MNIST network at batch 32, 600 updates, one process, the two alternating, each on a fresh model, so that both
include building and tracing it; then the same without, as the time that 2,400 further updates take. Each number is the
median over the rounds of the ratio in the same round. Nothing else should run on the machine.
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import experiments  # isort: skip  # imports Keras quietly, so it comes first
import keras
import numpy as np
from timing import alternating, ratio

from clr_utils import lr_range_test

SHORT, LONG, BATCH_SIZE = 600, 3000, 32  # updates, updates, images


def contestants():
    rng = np.random.default_rng(0)
    x = rng.random((LONG * BATCH_SIZE, 28, 28), dtype="float32")
    y = rng.integers(0, 10, len(x))

    def new_model():
        model = experiments.mnist_network()
        model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    def fit(updates):
        images = updates * BATCH_SIZE
        batches = experiments._in_batches(x[:images], y[:images], BATCH_SIZE)  # arrays would have `fit` wait
        new_model().fit(**batches, verbose=0)

    def range_test(updates):
        options = {"lr_bounds": (1e-6, 1e-3), "num_steps": updates, "stop_factor": float("inf")}
        lr_range_test(new_model(), x, y, **options)

    return {
        (name, updates): lambda train=train, updates=updates: train(updates)
        for name, train in [("fit", fit), ("range test", range_test)]
        for updates in (SHORT, LONG)
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=7)
    seconds = alternating(contestants(), parser.parse_args().rounds, rehearse=False)
    further = {
        name: [long - short for short, long in zip(seconds[name, SHORT], seconds[name, LONG])]
        for name in ("fit", "range test")
    }
    print(experiments.describe_machine())
    for what, test, fit in [
        (f"{SHORT} updates with building and tracing", seconds["range test", SHORT], seconds["fit", SHORT]),
        (f"{LONG - SHORT} further updates", further["range test"], further["fit"]),
    ]:
        low, median, high = ratio(test, fit)
        print(f"{what}: range test / fit {median:.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
