"""What recording costs in the experiment runner, and how it compares with PyTorch's SGD + OneCycleLR.

    python tests/bench_runner.py [ROUNDS]

One epoch of 800 updates of the MNIST network at batch 32, measured as timing.py does it. "fit" is Keras's own training
on shuffled batches without recording. Each ratio is the median over the rounds of the ratio in the same round. PyTorch
is timed where it is installed, on batches cut from shuffled tensors in memory (without a DataLoader, which is slower).
Nothing else should run on the machine.
"""

import argparse
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import experiments  # isort: skip  # imports Keras without TensorFlow's greeting, so it comes first
import numpy as np
from bench_update import torch_mnist_network
from timing import alternating, ratio

from clr_utils import CLR

UPDATES, BATCH_SIZE, PEAK = 800, 32, 0.05

rng = np.random.default_rng(0)
images = rng.integers(0, 256, (UPDATES * BATCH_SIZE, 28, 28)).astype("uint8")
labels = rng.integers(0, 10, len(images)).astype("uint8")


def epoch_in_keras(recorded):
    model = experiments.rescaled(experiments.mnist_network())
    optimizer = CLR((PEAK / 10, PEAK), UPDATES // 2, (0.95, 0.85), "one_cycle")
    if recorded:
        model = experiments._Recorded(model, optimizer, images, UPDATES)
        return lambda: model.train_epoch(rng.permutation(len(images)), labels, BATCH_SIZE, seed=0)
    model.compile(optimizer, "sparse_categorical_crossentropy", steps_per_execution=100)

    def epoch():
        order = rng.permutation(len(images))
        batches = experiments._in_batches(images[order], labels[order], BATCH_SIZE)
        model.fit(**batches, shuffle=False, verbose=0)

    return epoch


def epoch_in_torch():
    import torch
    from torch import nn

    model, loss_of = torch_mnist_network(nn), nn.CrossEntropyLoss()
    assert sum(p.numel() for p in model.parameters()) == experiments.mnist_network().count_params()
    x, y = torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()

    def epoch():
        optimizer = torch.optim.SGD(model.parameters(), lr=PEAK, momentum=0.9)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=UPDATES)
        for chosen in torch.from_numpy(rng.permutation(len(images))).split(BATCH_SIZE):
            optimizer.zero_grad()
            loss_of(model(x[chosen].float() / 255), y[chosen]).backward()
            optimizer.step()
            schedule.step()

    return epoch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=15)
    rounds = parser.parse_args().rounds
    contestants = {"fit": epoch_in_keras(False), "runner": epoch_in_keras(True)}
    try:
        contestants["PyTorch"] = epoch_in_torch()
    except ImportError:
        print("PyTorch is not installed: not timed", file=sys.stderr)
    seconds = alternating(contestants, rounds)
    print(experiments.describe_machine())
    for name, times in seconds.items():
        print(f"{name:7} {UPDATES / statistics.median(times):6.0f} updates/s")
    for yardstick in ("fit", "PyTorch"):
        if yardstick in seconds:
            low, median, high = ratio(seconds["runner"], seconds[yardstick])
            print(f"runner / {yardstick}: {median:.3f} (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
