"""What an LR range test costs: against `fit` on arrays for the same number of updates.

    python tests/bench_range_test.py [ROUNDS]

The MNIST network at batch 32, 600 updates, one process, the two alternating on fresh models, so that both include
their one-time tracing; then the same without it, as the time that 600 further updates take. Each number is the
median over the rounds of the ratio in the same round. Nothing else should run on the machine.
"""

import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import clr_utils  # isort: skip  # imports Keras, so it comes first
import keras
import numpy as np

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 7
UPDATES = 600

rng = np.random.default_rng(0)
x = rng.random((2 * UPDATES * 32, 28, 28), dtype="float32")
y = rng.integers(0, 10, len(x))


def new_model():
    model = clr_utils.mnist_network()
    model.compile(keras.optimizers.SGD(0.01, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def fit(updates):
    model = new_model()
    return seconds(lambda: model.fit(x[: 32 * updates], y[: 32 * updates], batch_size=32, verbose=0))


def range_test(updates):
    model = new_model()
    options = {"lr_bounds": (1e-6, 1e-3), "num_steps": updates, "stop_factor": float("inf")}
    return seconds(lambda: clr_utils.lr_range_test(model, x, y, **options))


print(clr_utils.describe_machine())
whole, further = [], []
for _ in range(ROUNDS):
    short = fit(UPDATES), range_test(UPDATES)
    long = fit(2 * UPDATES), range_test(2 * UPDATES)
    whole.append(short[1] / short[0])
    further.append((long[1] - short[1]) / (long[0] - short[0]))
    print(f"{UPDATES} updates: fit {short[0]:.2f} s, range test {short[1]:.2f} s", flush=True)
for name, ratios in {"with tracing": whole, "without": further}.items():
    print(f"{name}: range test / fit {statistics.median(ratios):.2f} (from {min(ratios):.2f} to {max(ratios):.2f})")
