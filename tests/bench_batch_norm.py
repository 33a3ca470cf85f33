"""What the fused BatchNormalization gains: images/s of the post's residual network with Keras's layer and with ours.

    python tests/bench_batch_norm.py [ROUNDS] [--batch 128] [--precision bfloat16]

In one process, the two take turns; each ratio is the median over the rounds of the ratio in the same round (timing.py).
Nothing else should run on the machine.
"""

import argparse
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import experiments  # isort: skip  # imports Keras without TensorFlow's greeting, so it comes first
import keras
import numpy as np
from timing import alternating, ratio

BATCHES = 8


def training(layer, precision, batch_size):
    """A function that trains for BATCHES updates."""
    ours, experiments.BatchNormalization = experiments.BatchNormalization, layer
    try:
        with experiments._built_in(precision):
            model = experiments.residual_network()
    finally:
        experiments.BatchNormalization = ours
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (BATCHES * batch_size, 32, 32, 3)).astype("float32")
    y = rng.integers(0, 10, len(x))
    return lambda: model.fit(x, y, batch_size, shuffle=False, verbose=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    layers = {"Keras's layer": keras.layers.BatchNormalization, "fused": experiments.BatchNormalization}
    contestants = {name: training(layer, options.precision, options.batch) for name, layer in layers.items()}
    seconds = alternating(contestants, options.rounds)
    print(f"{experiments.describe_machine()}, {options.precision}, batches of {options.batch}")
    for name, times in seconds.items():
        print(f"{name:13} {BATCHES * options.batch / statistics.median(times):6.0f} images/s")
    low, median, high = ratio(seconds["Keras's layer"], seconds["fused"])
    print(f"the fused layer is {median:.2f} times as fast (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
