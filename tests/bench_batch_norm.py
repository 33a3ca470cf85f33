"""What the fused BatchNormalization gains: images/s of the post's residual network with Keras's layer and with ours.

    python tests/bench_batch_norm.py [ROUNDS] [--batch 128] [--write PROCESSOR]

In one process, in float32 and bfloat16; all take turns, and each ratio is the median over the rounds of that in the
same round (timing.py). Nothing else should run on the machine. --write: into figures/results, for notebook 04, in place
of what that processor has there.
"""

import argparse
import json
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
        run = experiments.Run("", experiments.residual_network, keras.optimizers.SGD, precision=precision)
        model = experiments._made(run, "make_model", seed=0)
    finally:
        experiments.BatchNormalization = ours
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (BATCHES * batch_size, 32, 32, 3)).astype("float32")
    batches = experiments._in_batches(x, rng.integers(0, 10, len(x)), batch_size)  # arrays would have `fit` wait
    return lambda: model.fit(**batches, shuffle=False, verbose=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--write", metavar="PROCESSOR", help='for example "Intel Xeon, amx_bf16"')
    options = parser.parse_args()
    layers = {"Keras's": keras.layers.BatchNormalization, "fused": experiments.BatchNormalization}
    contestants = {
        (name, precision): training(layer, precision, options.batch)
        for precision in ("float32", "bfloat16")
        for name, layer in layers.items()
    }
    seconds, rows = alternating(contestants, options.rounds), []
    for (name, precision), times in seconds.items():
        low, median, high = ratio(seconds["Keras's", "float32"], times)
        speed = round(BATCHES * options.batch / statistics.median(times))
        rows.append({"processor": options.write, "layer": name, "precision": precision, "images/s": speed})
        print(f"{name:8} {precision:9} {speed:5} images/s, {median:.2f} times the first ({low:.2f} to {high:.2f})")
    for precision in ("float32", "bfloat16"):
        low, median, high = ratio(seconds["Keras's", precision], seconds["fused", precision])
        print(f"fused, {precision}: {median:.2f} times as fast as Keras's (quartiles {low:.2f} to {high:.2f})")
    print(experiments.describe_machine())
    if options.write:
        path = ROOT / "figures" / "results" / "04_images_per_second.json"
        others = [row for row in json.loads(path.read_text(encoding="utf-8")) if row["processor"] != options.write]
        rows = [*others, *({**row, "hardware": experiments.describe_machine()} for row in rows)]
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
