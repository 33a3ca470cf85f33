# Draft of notebook 06, part 3, as a script of cells; not a part of the project. `SETUP` is the notebook's own first cells.

# %% SETUP
import json
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import experiments

# %% SETUP
from typing import Callable, NamedTuple, Sequence

import keras
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import tensorflow as tf
from keras.layers import Dense, Flatten
from scipy import stats
from scipy.sparse.linalg import LinearOperator, eigsh

import clr_utils
from clr_utils import CLR, FAINT, INK, label_ends, new_axes
from experiments import save_figure

sns.set_theme(**clr_utils.THEME)

# %% SETUP
ALT = {  # goes to figures/06_alt.json
    "06_sharpness": (
        "Sharpness over 1,500 updates, log axis. The border 2/rate falls from 100 to 10 at update "
        "750 and rises again. The triangle's sharpness falls along it and rises again up to the "
        "last fifth; with a constant low rate it moves little; with a rate that stays high, it "
        "stays low. Below, the loss."
    ),
    "06_border": (
        "Sharpness divided by the border over 1,500 updates of a triangle, eight panels. With all "
        "images, with momentum and on MNIST it reaches 1 and stays there to the middle of the fall; "
        "with batches of 100 and 20 it stays below; with cross-entropy it passes 1 once or not at "
        "all and falls to near 0."
    ),
    "06_range_test": (
        "Two range tests of the tanh network, sharpness divided by the border above, loss below. "
        "With all images the loss breaks where the ratio is about 1; with batches of 32 and "
        "momentum it breaks where the ratio is far below 1."
    ),
}

# %% [markdown]
# ## Why high rates work
#
# In a bowl of one curvature gradient descent diverges beyond a rate of `2 / curvature`, with
# momentum `m` beyond `2 (1 + m) / curvature` ([notebook 2](02_lr_range_test.ipynb#Where-the-answer-is-known)).
# A network has many curvatures, one for each eigenvalue of the Hessian of its loss, and the largest
# should set the border; it is called the *sharpness*. So why does a cycle not blow up whose
# peak lies beyond the border of the network that it starts with? Because the sharpness is no
# constant. [Cohen and others (2021)](https://arxiv.org/abs/2103.00065) trained with a constant
# rate and all images in each step: the sharpness rises until it meets `2 / rate`, then stays just
# above. With a rate that goes up and down, does the sharpness go along?
#
# ### Measuring it
#
# The Hessian of the network below has 58,000 rows, too many to write down. But its product with a
# vector says how the gradient changes along that vector, and costs about two gradients. Some twenty such
# products are enough for Lanczos's method, which `eigsh` of scipy has, to find the largest
# eigenvalue. (Multiplying the same vector again and again, *power iteration*, finds it too.
# But it is slow where two eigenvalues are close, as they are here, and stopped up to 12% too low
# in a trial; and it finds the largest in magnitude, which may be a negative one.)

# %%
def loss_and_gradient(model, x, y):
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x))
    return loss, tape.gradient(loss, [v.value for v in model.trainable_variables])


@tf.function
def hessian_times(vector, model, x, y):
    """The Hessian of the loss times a vector: how the gradient changes along it."""
    weights = [v.value for v in model.trainable_variables]
    parts = tf.split(vector, [w.shape.num_elements() for w in weights])
    parts = [tf.reshape(part, w.shape) for part, w in zip(parts, weights)]
    with tf.autodiff.ForwardAccumulator(weights, parts) as forward:
        _, gradient = loss_and_gradient(model, x, y)
    return tf.concat([tf.reshape(change, [-1]) for change in forward.jvp(gradient)], 0)


def sharpness(model, x, y, tolerance=0.01):
    """The largest eigenvalue of the Hessian, from some twenty products."""
    size = sum(np.prod(v.shape) for v in model.trainable_variables)
    start = np.random.default_rng(0).normal(size=size).astype("float32")

    def times(vector):
        return hessian_times(tf.constant(vector.ravel(), "float32"), model, x, y).numpy()

    hessian = LinearOperator((size, size), times, dtype="float32")
    (value,) = eigsh(hessian, 1, which="LA", v0=start, tol=tolerance, return_eigenvectors=False)
    return float(value)

# %% [markdown]
# On a network so small that its Hessian can be written out, row by row:

# %%
def written_out(model, x, y):
    """The Hessian as a matrix, one product with each unit vector."""
    size = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    return np.array([hessian_times(row, model, x, y) for row in np.eye(size, dtype="float32")])


keras.utils.set_random_seed(0)
tiny = keras.Sequential([keras.Input((6,)), Dense(5, activation="tanh"), Dense(3)])
tiny.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True))
x, y = keras.random.normal((40, 6), seed=0), tf.one_hot(tf.range(40) % 3, 3)
eigenvalues = np.linalg.eigvalsh(written_out(tiny, x, y))
assert abs(sharpness(tiny, x, y) / eigenvalues[-1] - 1) < 0.01
print(f"largest of {len(eigenvalues)} eigenvalues {eigenvalues[-1]:.4f}, ", end="")
print(f"sharpness {sharpness(tiny, x, y):.4f}; lowest {eigenvalues[0]:.4f}")

# %% [markdown]
# ### What is trained
#
# Theory is exact for gradient descent without noise, so each update sees all of 1,000 images of
# CIFAR-10, shrunk to 16 x 16 pixels. As in Cohen and others, the network is dense, with tanh (a
# function with second derivatives everywhere) and the loss is half the squared distance between
# the outputs and the one-hot label. One triangle goes from a rate of 0.02 to 0.2 and back in 1,500
# updates, without momentum. Beside it, the same network with constant rates, and with a rate that
# goes up and stays. Then one thing at a time is changed: the data, the loss, the momentum, the
# batch size. The seed draws images, weights and batches. All of this was chosen on
# seeds from 1000 on; the seeds that count here are 0 to 4.

# %%
def half_square(targets, outputs):
    return keras.ops.sum((outputs - targets) ** 2, axis=-1) / 2


CROSS_ENTROPY = keras.losses.CategoricalCrossentropy(from_logits=True)
SIZE, UPDATES, BOUNDS = 1000, 1500, (0.02, 0.2)


class Way(NamedTuple):
    """A way to train."""

    optimizer: Callable
    momentum: float = 0.0
    batch_size: int = SIZE
    loss: Callable = half_square
    data: str = "cifar10"
    images: int = SIZE  # to train on; the sharpness is that of the first SIZE
    widths: tuple = (64, 64, 64)
    updates: int = UPDATES
    measured: Sequence = range(0, UPDATES, 50)  # before these updates


# %%
SGD = keras.optimizers.SGD


def triangle(momentum=0.0):
    return lambda: CLR(BOUNDS, UPDATES // 2, momentum)


def up_and_stay():
    return SGD(keras.optimizers.schedules.PolynomialDecay(BOUNDS[0], UPDATES // 2, BOUNDS[1]))


def sweep(momentum=0.0):
    """As in a range test: from 0.00001 to 10 in 600 updates."""
    return lambda: SGD(keras.optimizers.schedules.ExponentialDecay(1e-5, 600, 1e6), momentum)


# %%
NOTEBOOK_2 = {"loss": CROSS_ENTROPY, "data": "mnist", "widths": (128, 128)}
NOTEBOOK_2 |= {"updates": 600, "measured": (0, *range(200, 600, 10))}
WAYS = {
    "triangle": Way(triangle(), measured=range(0, UPDATES, 25)),
    "constant 0.02": Way(lambda: SGD(0.02)),
    "constant 0.2": Way(lambda: SGD(0.2)),
    "up, then constant": Way(up_and_stay),
    "triangle, MNIST": Way(triangle(), data="mnist"),
    "triangle, cross-entropy": Way(triangle(), loss=CROSS_ENTROPY),
    "triangle, MNIST, cross-entropy": Way(triangle(), loss=CROSS_ENTROPY, data="mnist"),
    "triangle, momentum 0.9": Way(triangle(0.9), 0.9),
    "triangle, batches of 100": Way(triangle(), batch_size=100),
    "triangle, batches of 20": Way(triangle(), batch_size=20),
    "triangle, batches of 100, momentum 0.9": Way(triangle(0.9), 0.9, batch_size=100),
    "range test": Way(sweep(), **NOTEBOOK_2),
    "range test, batches of 32, momentum 0.85": Way(
        sweep(0.85), 0.85, batch_size=32, images=60000, **NOTEBOOK_2
    ),
}

# %% [markdown]
# The training loop is written out, since it stops now and then to measure, always on the same
# 1,000 images. It gives up where the loss is ten times that of the start.

# %%
def network(way, seed):
    keras.utils.set_random_seed(seed)
    shape = (16, 16, 3) if way.data == "cifar10" else (28, 28)
    layers = [Dense(width, activation="tanh") for width in way.widths]
    model = keras.Sequential([keras.Input(shape), Flatten(), *layers, Dense(10)])
    model.compile(way.optimizer(), way.loss)
    model.optimizer.build(model.trainable_variables)
    return model


@tf.function
def update(model, x, y):
    _, gradient = loss_and_gradient(model, x, y)
    model.optimizer.apply(gradient, model.trainable_variables)


def batches_of(rng, way, images):
    """Positions of the images in each batch, (updates, batch size), without leftovers."""
    per_epoch = images // way.batch_size
    epochs = [rng.permutation(images) for _ in range(-(-way.updates // per_epoch))]
    used = per_epoch * way.batch_size
    return np.reshape([e[:used] for e in epochs], (-1, way.batch_size))[: way.updates]


# %%
MEASURED = ("updates", "sharpness", "learning_rate", "loss")


def sharpness_along(name, seed, data):
    """Trains in one way and measures on the way: a dict of plain numbers."""
    way, rng = WAYS[name], np.random.default_rng(seed)
    images, labels = data.train
    chosen = rng.permutation(len(images))[: way.images]
    x = images[chosen] / np.float32(255)
    if way.data == "cifar10":  # 16 x 16 pixels are a quarter of the work
        x = x.reshape(-1, 16, 2, 16, 2, 3).mean((2, 4)) - 0.5
    x = tf.constant(x, "float32")
    y = tf.one_hot(labels[chosen].ravel(), 10)
    fixed = x[:SIZE], y[:SIZE]
    model, batches = network(way, seed), batches_of(rng, way, len(x))
    line = {"run": name, "seed": seed} | {key: [] for key in MEASURED}
    for start, end in zip(way.measured, [*way.measured[1:], way.updates]):
        loss = float(loss_and_gradient(model, *fixed)[0])
        if start and not loss < 10 * line["loss"][0]:
            break  # diverged
        rate = float(model.optimizer.learning_rate)
        now = start, sharpness(model, *fixed), rate, loss
        for key, value in zip(MEASURED, now):
            line[key].append(value if key == "updates" else float(f"{value:.4g}"))
        for positions in batches[start:end]:
            update(model, tf.gather(x, positions), tf.gather(y, positions))
    return line

# %% [markdown]
# Two words, fixed before the runs were made. The *border* is `2 (1 + momentum) / rate`. A
# measurement *obeys* it if the sharpness is at most 1.1 times the border, and is *at the border*
# if it is within 20% of it. To obey is easy at a low rate; only the second says that the rate
# decides the sharpness.

# %%
def recorded_lines(path=ROOT / "figures" / "results" / "06_sharpness.jsonl"):
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def frame_of(lines):
    """One row for each measurement."""
    frame = pd.DataFrame(lines).explode(list(MEASURED)).astype(dict.fromkeys(MEASURED, float))
    frame = frame.rename(columns={"updates": "update"})
    momentum = frame["run"].map(lambda name: WAYS[name].momentum)
    frame["border"] = 2 * (1 + momentum) / frame["learning_rate"]
    frame["ratio"] = frame["sharpness"] / frame["border"]
    return frame.reset_index(drop=True)


measured = frame_of(recorded_lines())
seeds = measured.groupby("run", sort=False)["seed"].nunique()
assert (seeds.reindex(list(WAYS)) == 5).all()
print(f"{seeds.sum()} recorded runs, {len(measured):,} measurements")

# %% [markdown]
# One of them again, here:

# %%
live = frame_of([sharpness_along("triangle", 5, experiments.load_cifar10())])
columns = ["update", "learning_rate", "border", "sharpness", "loss"]
print(live.iloc[::6][columns].round(3).to_string())

# %% [markdown]
# ### Along a triangle

# %%
LINES = {
    "triangle": {"color": INK, "linewidth": 2.5},
    "up, then constant": {"color": "tab:orange", "linestyle": "--"},
    "constant 0.02": {"color": "0.55", "linestyle": "-."},
}
title = "The rate pushes the sharpness down along the border;\n"
title += "as it falls, the sharpness grows back"
top, bottom = new_axes(2, height=5.6, heights=(2, 1), title=title)
for run, style in LINES.items():
    of_run = measured[measured["run"] == run]
    for ax, y in ((top, "sharpness"), (bottom, "loss")):
        options = {"errorbar": ("pi", 100), "label": run.replace(", ", ",\n"), "legend": False}
        sns.lineplot(of_run, x="update", y=y, ax=ax, **options, **style)
triangles = measured[(measured["run"] == "triangle") & (measured["seed"] == 0)]
top.plot("update", "border", "k:", data=triangles, label="border: 2 / rate\nof the triangle")
top.set(yscale="log", ylabel="sharpness", yticks=(10, 20, 50, 100), yticklabels=(10, 20, 50, 100))
top.minorticks_off()
clr_utils.set_loss_axis(bottom, "training loss")
label_ends(top)
save_figure(top, "06_sharpness", "cifar10", ALT["06_sharpness"])

# %% [markdown]
# At first the border is far above the sharpness. Where they meet, the sharpness turns down
# and goes with the border, from then on a little above it. The loss becomes ragged there: along the steepest
# direction each update jumps across the valley and lands a little higher, until the
# weights have moved to where the valley is wider
# ([Damian and others 2023](https://arxiv.org/abs/2209.15594) derive this). When the rate falls, the sharpness
# grows, and it does so *because* the rate falls: where the rate stays high, it stays low. In the last
# part of the fall the border runs away faster than the sharpness can grow.
#
# In numbers, for the rising half (up to the peak) and the falling half of the triangle: the share of measurements
# that obey the border, the share at the border, and the median of sharpness / border. The mean
# of five seeds with its 95% interval by Student's t:

# %%
def mean_and_interval(values):
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return np.mean(values), np.mean(values) - half, np.mean(values) + half


def text_of(values):
    mean, _, high = mean_and_interval(values)
    return f"{mean:.2f} ± {high - mean:.2f}"


def shares_of(frame, runs):
    """Of each run, seed and half of the triangle."""
    frame = frame[frame["run"].isin(runs)].assign(
        obeys=lambda rows: rows["ratio"] <= 1.1,
        at_border=lambda rows: rows["ratio"].between(0.8, 1.2),
        half=lambda rows: np.where(rows["update"] <= UPDATES // 2, "rise", "fall"),
    )
    groups = frame.groupby(["run", "half", "seed"], sort=False)
    kinds = {"obeys": "mean", "at_border": "mean", "ratio": "median"}
    return groups.agg(kinds).rename(columns={"at_border": "at the border", "ratio": "median ratio"})


def table_of(shares):
    table = shares.groupby(["run", "half"], sort=False).agg(text_of)
    return table.assign(n=shares.groupby(["run", "half"], sort=False).size())


shares = shares_of(measured, ["triangle", "up, then constant", "constant 0.02", "triangle, MNIST"])
falls = shares.loc[("triangle", "fall"), "at the border"]
assert mean_and_interval(falls)[1] > 0.5
print(table_of(shares).to_string())

# %% [markdown]
# The sharpness itself, at the peak and at the end, as the ratio of two ways with the same seed:

# %%
def sharpness_at(run, update):
    rows = measured[(measured["run"] == run) & (measured["update"] == update)]
    return rows.set_index("seed")["sharpness"]


last = measured.loc[measured["run"] == "constant 0.02", "update"].max()
comparisons = {
    "peak: triangle / constant 0.02": ("triangle", 750, "constant 0.02", 750),
    "end: triangle / constant 0.02": ("triangle", last, "constant 0.02", last),
    "end: triangle / up, then constant": ("triangle", last, "up, then constant", last),
    "triangle: end / peak": ("triangle", last, "triangle", 750),
}
ratios = {}
for name, (run, update, other, then) in comparisons.items():
    ratio = sharpness_at(run, update) / sharpness_at(other, then)
    assert ratio.notna().all() and len(ratio) == 5
    ratios[name] = dict(zip(("mean", "low", "high"), mean_and_interval(ratio))) | {"n": len(ratio)}
ratios = pd.DataFrame(ratios).T
assert ratios.loc["peak: triangle / constant 0.02", "high"] < 1
assert ratios.loc["end: triangle / up, then constant", "low"] > 1
print(ratios.round(2).to_string())

# %% [markdown]
# At the peak the triangle has about half the sharpness of the low rate, and at the end twice that of
# the rate that stayed high. So what would the peak rate have done at once, at the first update?

# %%
whole = measured["run"].map(lambda name: len(WAYS[name].measured))
counts = measured.groupby(["run", "seed"], sort=False)["update"].transform("size")
measured["diverged"] = counts < whole
of_seeds = measured[measured["run"] == "constant 0.2"].groupby("seed")
at_once = of_seeds[["ratio"]].first().assign(diverged=of_seeds["diverged"].max())
triangles = measured[measured["run"].str.startswith("triangle")]
assert not triangles["diverged"].any() and at_once["diverged"].sum() >= 2
print(f"{at_once['diverged'].sum()} of 5 diverge; of the triangles none. Sharpness / border at first:")
print(at_once.round(2).to_string())

# %% [markdown]
# It begins at three to five times the border, and three of five seeds are lost within 25 updates. In the two others
# the loss jumps and the sharpness falls to below the border in 50 updates: the *catapult* of
# [Lewkowycz and others (2020)](https://arxiv.org/abs/2003.02218), a matter of luck here. The rising half of a
# triangle does the same without the jump, and every time. That is what a warm-up is for
# ([Gilmer and others 2022](https://arxiv.org/abs/2110.04369)).

# %% [markdown]
# ### Where theory is not exact
#
# Now one change at a time, all with the same triangle. The border counts the momentum; the sharpness
# is that of all 1,000 images, also where an update sees only some of them.

# %%
PANELS = {
    "all images": "triangle",
    "MNIST": "triangle, MNIST",
    "momentum 0.9": "triangle, momentum 0.9",
    "batches of 100": "triangle, batches of 100",
    "batches of 20": "triangle, batches of 20",
    "batches of 100,\nmomentum 0.9": "triangle, batches of 100, momentum 0.9",
    "cross-entropy": "triangle, cross-entropy",
    "MNIST,\ncross-entropy": "triangle, MNIST, cross-entropy",
}
title = "With all images and the squared loss the sharpness goes to the border (grey);\n"
title += "with batches it stays below, with cross-entropy it vanishes with the loss"
axes = new_axes(2, 4, height=4.4)
axes[0].figure.suptitle(title, x=0.01, ha="left", fontsize="small")
for ax, (name, run) in zip(axes, PANELS.items()):
    ax.axhspan(0.8, 1.2, color="0.85", linewidth=0)
    ax.axvline(UPDATES // 2, color="0.6", linewidth=0.8)
    of_run = measured[measured["run"] == run]
    band = {"errorbar": ("pi", 100), "color": INK, "linewidth": 1.5}
    sns.lineplot(of_run, x="update", y="ratio", ax=ax, **band)
    ax.set_title(name, fontsize=11)
    ax.set(xlabel="", ylabel="", ylim=(0, 2.2), xticks=(0, 750, 1500))
for ax in axes[::4]:
    ax.set_ylabel("sharpness / border", fontsize="small")
axes[0].figure.supxlabel("update (the rate peaks at 750)", fontsize="small")
save_figure(axes[0], "06_border", "cifar10", ALT["06_border"])

# %%
shares = shares_of(measured, list(PANELS.values()))
print(table_of(shares).to_string())

# %% [markdown]
# What goes with theory: MNIST, and momentum without batches, whose border is 1.9 times as high and is met all the same.
# What does not:
# - **Batches** keep the sharpness below the border: batches of 100 by a tenth, smaller ones by half, and with momentum by more.
#   With batches of 20 it is never at the border, but half of it through the whole
#   rising half: the rate still decides, with another factor. What stands at `2 / rate` there is, according to
#   [Andreyev and Beneventano (2024)](https://arxiv.org/abs/2412.20553), the curvature of each batch along its own gradient.
# - **Cross-entropy** shoots past the border and then falls far below it, rate or no rate, since the curvature of this
#   loss vanishes as the network becomes sure of its answers (Cohen and others see it too). On MNIST that comes so soon that the border is never met:
#   nothing here says that the trainings of notebooks 1 to 3 are limited by it.

# %% [markdown]
# ### Why the range test breaks where it does
#
# [Notebook 2](02_lr_range_test.ipynb) finds the break and leaves open what it is. Its tanh network (MNIST, cross-entropy) goes
# through the sweep of the range test again, once with 1,000 images in each update and no momentum, once as there, with
# batches of 32 and momentum 0.85, while the sharpness is measured. The loss is that of 1,000 images, without
# smoothing. It *breaks* at the last rate before it loses a quarter of its descent.

# %%
SWEEPS = ["range test", "range test, batches of 32, momentum 0.85"]


def break_of(rows):
    """Of a sweep: the rate at which the loss breaks, and how that compares with the borders."""
    loss, rate, ratio = (rows[name].to_numpy() for name in ("loss", "learning_rate", "ratio"))
    low = loss <= loss.min() + (loss[0] - loss.min()) / 4
    fell = np.argmax(low)
    broken = fell + np.argmin(low[fell:]) - 1
    first_border = rows["border"].iloc[0] * rate[0] / rows["sharpness"].iloc[0]
    found = {"break": rate[broken], "break / first border": rate[broken] / first_border}
    found["break / border there"] = ratio[broken]
    return pd.Series(found)


sweeps = measured[measured["run"].isin(SWEEPS)]
breaks = sweeps.groupby(["run", "seed"], sort=False)[sweeps.columns]
breaks = breaks.apply(break_of)
table = breaks.groupby("run", sort=False).agg(text_of).assign(n=5).loc[SWEEPS]
there = {run: mean_and_interval(breaks.loc[run, "break / border there"]) for run in SWEEPS}
assert there[SWEEPS[0]][1] > 1 and there[SWEEPS[1]][2] < 1
print(table.to_string())

# %%
title = "With all images the loss breaks past the border,\n"
title += "with batches of 32 and momentum far below it"
options = {"figsize": (6.4, 4.6), "layout": "constrained", "sharex": True, "sharey": "row"}
figure, axes = plt.subplots(2, 2, **options)
figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
for (top, bottom), run in zip(axes.T, SWEEPS):
    rows, ends = sweeps[sweeps["run"] == run], breaks.loc[run, "break"]
    for ax, y in ((top, "ratio"), (bottom, "loss")):
        ax.axvspan(0.97 * ends.min(), 1.03 * ends.max(), color=INK, alpha=0.3, linewidth=0)
        for _, of_seed in rows.groupby("seed"):
            ax.plot("learning_rate", y, color=INK, linewidth=0.9, data=of_seed)
    top.axhline(1, color="black", linestyle=":", linewidth=1.5)
    top.set_title(run.removeprefix("range test, ").replace("range test", "all images"))
axes[0, 0].set(xscale="log", xlim=(0.005, 2), ylabel="sharpness / border", ylim=(0, 2))
axes[0, 0].set(xticks=(0.01, 0.1, 1), xticklabels=(0.01, 0.1, 1))
axes[0, 0].minorticks_off()
axes[1, 0].set(ylim=(0, 2.5), ylabel="loss")
figure.supxlabel("learning rate (bar: where the loss breaks)", fontsize="medium")
save_figure(figure, "06_range_test", "mnist", ALT["06_range_test"])

# %% [markdown]
# Without noise the break is the border, but not that of the initial weights: the sharpness falls by a third during the sweep,
# and after the border is crossed it takes ten or twenty updates until the loss shows it, in which the rate grows on. With the noise of small batches the loss breaks
# at a fraction of the border. So the bowl of notebook 2 is right about a noiseless training, and what
# breaks *its* range tests comes earlier: the noise.
