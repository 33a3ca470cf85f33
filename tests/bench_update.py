"""What an update with CLR costs: against plain SGD, a callback that assigns the rate, and PyTorch's own training loop.

    KERAS_BACKEND=jax python tests/bench_update.py [ROUNDS]     # this backend, as a table
    python tests/bench_update.py [ROUNDS] --all --write         # each backend in turn, kept for notebook 05

The MNIST network (batches of 32) and the small residual network (batches of 128), one process for a backend, measured
as timing.py does it. A ratio is the median over the rounds of the ratio to SGD in the same round. Compiled as Keras
does by itself; "in one call" compiles many updates into one (steps_per_execution). PyTorch, where it is installed,
trains the same layers in its own loop with SGD and OneCycleLR, on batches cut from tensors in memory. Nothing else
should run on the machine.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import experiments  # isort: skip  # imports Keras without TensorFlow's greeting, so it comes first
import keras
import numpy as np
from timing import alternating, ratio

import clr_utils

TABLE = ROOT / "figures" / "results" / "05_updates.json"
BOUNDS, STEPS = (0.001, 0.01), 50
NETWORKS = {  # name: (network, shape of its images, batch size, updates in a measurement, of which in one call)
    "MNIST network": (experiments.mnist_network, (28, 28), 32, 200, 50),
    "small residual network": (lambda: experiments.residual_network(32, 3), (32, 32, 3), 128, 8, 4),
}


class AssignLearningRate(keras.callbacks.Callback):
    """The same triangle the way that callbacks do it: set from outside before each batch. The momentum stays fixed."""

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = clr_utils.triangular(batch, BOUNDS, STEPS)


def sgd():
    return keras.optimizers.SGD(0.005, momentum=0.9)


def clr():
    return clr_utils.CLR(BOUNDS, STEPS, momentum_bounds=(0.95, 0.85))


def contestants(network, images, labels, batch_size, in_one_call):
    """{name: function that trains one measurement}; SGD, the yardstick of those that follow, comes first."""

    def keras_fit(optimizer, callbacks=(), steps_per_execution=1):
        model = network()
        model.compile(optimizer, "sparse_categorical_crossentropy", steps_per_execution=steps_per_execution)
        options = {"shuffle": False, "verbose": 0, "callbacks": list(callbacks)}
        # On arrays, the end of a fit is held up by a thread of tf.data (see _in_batches), at times by seconds.
        batches = experiments._in_batches(images, labels, batch_size)
        return lambda: model.fit(**batches, **options)

    found = {"SGD": keras_fit(sgd()), "CLR": keras_fit(clr()), "callback": keras_fit(sgd(), [AssignLearningRate()])}
    if keras.backend.backend() != "torch":  # Keras refuses steps_per_execution there
        found |= {
            f"{name}, in one call": keras_fit(new(), (), in_one_call) for name, new in [("SGD", sgd), ("CLR", clr)]
        }
    try:
        found["PyTorch, SGD + OneCycleLR"] = torch_loop(images, labels, batch_size)
    except ImportError:
        print("PyTorch is not installed: not timed", file=sys.stderr)
    return found


def torch_loop(images, labels, batch_size):
    import torch
    from torch import nn

    model = torch_mnist_network(nn) if images.ndim == 3 else torch_residual_network(torch, nn)
    x = torch.from_numpy(images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2).copy())
    y, loss_of = torch.from_numpy(labels), nn.CrossEntropyLoss()

    def train():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=len(x) // batch_size)
        for chosen in torch.randperm(len(x)).split(batch_size):
            optimizer.zero_grad()
            loss_of(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()

    return train


def torch_mnist_network(nn):
    layers = [nn.Conv2d(1, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.ReLU()]
    layers += [nn.Conv2d(16, 20, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(500, 64), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def torch_residual_network(torch, nn, width=32, blocks=3):
    def convolution(channels, filters, size, **options):
        return nn.Sequential(nn.Conv2d(channels, filters, size, **options), nn.BatchNorm2d(filters), nn.ReLU())

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow = convolution(width, width // 4, 3, padding=1)
            self.widen = convolution(width // 4, width, 3, padding=1)
            self.mix = convolution(2 * width, width, 1)

        def forward(self, x):
            return self.mix(torch.cat([self.widen(self.narrow(x)), x], 1))

    layers = [convolution(3, width, 3, stride=2, padding=1), *[Block() for _ in range(blocks)]]
    layers += [convolution(width, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def measure(rounds, only=None):
    """The rows of this backend: a dictionary for each network and contestant."""
    rows = []
    for name, (network, shape, batch_size, updates, in_one_call) in NETWORKS.items():
        if only not in (None, name):
            continue
        rng = np.random.default_rng(0)
        images = rng.random((updates * batch_size, *shape), dtype="float32")
        trainings = contestants(network, images, rng.integers(0, 10, len(images)), batch_size, in_one_call)
        seconds = alternating(trainings, rounds)
        for contestant, times in seconds.items():
            yardstick = seconds["SGD, in one call" if "in one call" in contestant else "SGD"]
            low, median, high = ratio(times, yardstick)
            rows.append(
                {
                    "backend": keras.backend.backend(),
                    "network": name,
                    "batch_size": batch_size,
                    "contestant": contestant,
                    "updates_per_second": round(updates / statistics.median(times), 1),
                    "ratio_to_sgd": round(median, 3),
                    "quartiles": [round(low, 3), round(high, 3)],
                    "rounds": rounds,
                    "hardware": experiments.describe_machine(),
                }
            )
    return rows


def table(rows):
    lines = [
        "| network | backend | training | updates/s | time against SGD | quartiles |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        low, high = row["quartiles"]
        cells = [row["network"], row["backend"], row["contestant"], f"{row['updates_per_second']:.0f}"]
        lines.append(f"| {' | '.join(cells)} | {row['ratio_to_sgd']:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=15)
    parser.add_argument("--network", choices=NETWORKS, help="only this one")
    parser.add_argument("--all", action="store_true", help="TensorFlow, JAX and torch, one after the other")
    parser.add_argument("--write", action="store_true", help=f"with --all: keep the rows in {TABLE.relative_to(ROOT)}")
    parser.add_argument("--json", action="store_true", help="the last line of the output is the result")
    options = parser.parse_args()
    if options.write and (not options.all or options.network):
        parser.error("--write keeps all backends and networks: give --all and no --network")
    if not options.all:
        rows = measure(options.rounds, options.network)
    else:
        rows = []
        for backend in ("tensorflow", "jax", "torch"):
            command = [sys.executable, __file__, str(options.rounds), "--json"]
            command += ["--network", options.network] if options.network else []
            done = subprocess.run(
                command, env={**os.environ, "KERAS_BACKEND": backend}, stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                sys.exit(f"{backend}: not timed, see above")
            rows += json.loads(done.stdout.splitlines()[-1])
    print(table(rows))
    if options.json:
        print(json.dumps(rows))
    if options.write:
        TABLE.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
