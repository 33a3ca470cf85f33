"""What an update with CLR costs: against plain SGD with momentum, and against a callback that assigns the rate.

    python tests/bench_update.py [ROUNDS]

The MNIST network at batch 32, one process, the contestants one after the other in each round. Each number is the
median over the rounds of the ratio to SGD in the same round, so that a slow moment hits all of them. Nothing else
should run on the machine.
"""

import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import clr_utils  # isort: skip  # imports Keras, so it comes first
import keras
import numpy as np

ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 15
UPDATES, BATCH_SIZE = 400, 32
BOUNDS, STEPS = (0.001, 0.01), 50


class AssignLearningRate(keras.callbacks.Callback):
    """The same triangle the way that callbacks do it: set from outside before each batch. The momentum stays fixed."""

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = clr_utils.triangular(batch, BOUNDS, STEPS)


def contestants():
    return {
        "SGD(momentum=0.9)": (keras.optimizers.SGD(0.005, momentum=0.9), []),
        "CLR": (clr_utils.CLR(BOUNDS, STEPS, momentum_bounds=(0.95, 0.85)), []),
        "callback": (keras.optimizers.SGD(0.005, momentum=0.9), [AssignLearningRate()]),
    }


def measure(steps_per_execution):
    rng = np.random.default_rng(0)
    x = rng.random((UPDATES * BATCH_SIZE, 28, 28), dtype="float32")
    y = rng.integers(0, 10, len(x))
    models = {}
    for name, (optimizer, callbacks) in contestants().items():
        if steps_per_execution > 1 and callbacks:
            continue  # a callback sees one update in many
        model = clr_utils.mnist_network()
        model.compile(optimizer, "sparse_categorical_crossentropy", steps_per_execution=steps_per_execution)
        models[name] = model, callbacks
    seconds = {name: [] for name in models}
    for round_number in range(-1, ROUNDS):  # the first one compiles
        order = list(models)[round_number % len(models) :] + list(models)[: round_number % len(models)]
        for name in order:
            model, callbacks = models[name]
            start = time.perf_counter()
            model.fit(x, y, batch_size=BATCH_SIZE, verbose=0, callbacks=callbacks)
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
    plain = seconds["SGD(momentum=0.9)"]
    for name, times in seconds.items():
        ratios = [t / p for t, p in zip(times, plain)]
        quartiles = statistics.quantiles(ratios, n=4)
        print(
            f"steps_per_execution={steps_per_execution:<3} {name:18} "
            f"{UPDATES / statistics.median(times):6.0f} updates/s"
            f"   ratio to SGD {statistics.median(ratios):.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})"
        )


print(clr_utils.describe_machine())
for steps_per_execution in (1, 50):
    measure(steps_per_execution)
