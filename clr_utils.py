"""Cyclical learning rates for Keras 3, in one file to copy: schedules, an optimizer, the LR range test, pictures.

    Schedules    triangular, triangular2, exp_range, cosine, cosine_restarts, one_cycle, trapezoid:
                 pure functions of the update number
    Optimizer    CLR: SGD whose learning rate and momentum cycle inside the training graph
                 CyclicalLR: the same learning rates for Adam, AdamW and every other Keras optimizer
                 current_values: the learning rate and momentum of the coming update
    BatchNorm    settle_batch_norm: its running statistics estimated anew, at the weights of the moment
    Range test   lr_range_test: the learning rates that a model tolerates, found without leaving a trace in it
    Plots        plot_schedule, plot_training, plot_range_test

An *update* (or *iteration*) is one step of the optimizer, counted from 0. *bounds* are the lowest and the highest
learning rate, *momentum_bounds* the momentum at each of the two, and *steps* is the number of updates in HALF a cycle
(the "stepsize" of Smith 2017, arXiv:1506.01186, section 3). Needs numpy and Keras; matplotlib and seaborn to draw.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import numbers
import random
import sys
import warnings
from typing import NamedTuple

import keras
import numpy as np
from keras import ops, tree


def _require(condition, complaint):
    if not condition:
        raise ValueError(complaint)


# ---------------------------------------------------------------------------------------------------------
# Schedules: f(iteration, bounds, steps) -> value
#
# iteration is the number of the update, from 0: an int or an integer array (both computed in float64), or an
# integer tensor of the backend (float32, may be traced); the value comes back in the same kind. To change a
# further argument, hand `functools.partial(one_cycle, peak=0.3)` to CLR. To add a schedule, write a function
# with this signature and name it in STEP_FUNCTIONS.
# ---------------------------------------------------------------------------------------------------------


def triangular(iteration, bounds, steps):
    """Straight up from bounds[0] to bounds[1] and down, `steps` updates each (Smith, arXiv:1506.01186, section 3)."""
    xp, iteration = _numbers_of(iteration)
    return _between(xp, bounds, _triangle(xp, iteration, steps))


def triangular2(iteration, bounds, steps):
    """The triangle, its amplitude halved after each cycle; the lower bound stays (arXiv:1506.01186, section 3)."""
    xp, iteration = _numbers_of(iteration)
    # exp2 of a negative number fades to 0; 1 / 2**cycle overflows after some thousand cycles.
    shrink = xp.exp2(-_to_float(xp, iteration // (2 * steps)))
    return _between(xp, bounds, _triangle(xp, iteration, steps) * shrink)


def exp_range(iteration, bounds, steps, gamma=0.99994):
    """The triangle with its amplitude multiplied by gamma**iteration, gamma in (0, 1]; the lower bound stays.

    In Smith's paper (arXiv:1506.01186, section 3) both bounds decline; the callback that made the name popular
    (github.com/bckenstler/CLR) shrinks the amplitude only. The exponent counts from the start of training.
    """
    _require(0 < gamma <= 1, f"{gamma=}: exp_range needs a factor per update in (0, 1], for example 0.9999.")
    xp, iteration = _numbers_of(iteration)
    shrink = xp.exp(_to_float(xp, iteration) * math.log(gamma))
    return _between(xp, bounds, _triangle(xp, iteration, steps) * shrink)


def cosine(iteration, bounds, steps):
    """The triangle without corners: half a cosine up, half down (the "Hann window" of arXiv:1506.01186, section 3)."""
    xp, iteration = _numbers_of(iteration)
    return _between(xp, bounds, _rounded(xp, _triangle(xp, iteration, steps)))


def cosine_restarts(iteration, bounds, steps, factor=1):
    """From bounds[1] by half a cosine towards bounds[0], which the update of the restart would reach; and again.

    The first fall takes 2 * steps updates, a whole cycle of the others; each takes `factor` times, an int of at least
    1, as many as the one before. Source: Loshchilov & Hutter 2017, arXiv:1608.03983, section 3 (T_0 and T_mult).
    """
    _require(isinstance(factor, int) and factor >= 1, f"{factor=}: give the growth as an int of at least 1.")
    xp, iteration = _numbers_of(iteration)
    first = 2 * steps
    if factor == 1:
        start = iteration - iteration % first
    else:  # look among all starts that the counter can reach: a logarithm would miss the cycle by one at times
        dtype, starts = keras.backend.standardize_dtype(iteration.dtype), [0]
        while starts[-1] * factor + first <= np.iinfo(dtype).max:
            starts.append(starts[-1] * factor + first)
        starts = xp.array(starts, dtype)
        start = xp.max(xp.where(iteration[..., None] >= starts, starts, 0), axis=-1)
    fallen = _to_float(xp, iteration - start) / (_to_float(xp, start) * (factor - 1.0) + float(first))
    return _between(xp, bounds, 1.0 - _rounded(xp, fallen))


def one_cycle(iteration, bounds, steps, peak=0.45, tail=0.1, final=1e-3, shape="linear"):
    """One cycle for a run of 2 * steps updates: up to bounds[1], down to bounds[0], then a tail that falls further.

    The last update of the run (number 2 * steps - 1) has the value final * bounds[0], and so has every later one.
    Source: Smith & Topin 2018, arXiv:1708.07120, section 3; Smith 2018, arXiv:1803.09820, section 4.

    Args:
        peak: where the top is, as a share of the run; by default in the middle of what the tail leaves.
        tail: share of the run for the fall below bounds[0]; 0: straight from the top to the end, as fastai has it.
        final: the last value as a fraction of bounds[0].
        shape: "linear" or "cosine" (each of the three pieces is then half a cosine).
    """
    _check_run({"peak": peak, "tail": tail}, final, shape, ("linear", "cosine"))
    xp, iteration = _numbers_of(iteration)
    low, high = bounds
    last = 2 * steps - 1
    top = min(max(1, round(peak * last)), last)
    foot = max(top, min(round((1 - tail) * last), last - 1)) if tail else last

    def share(distance, length):  # of one piece: 0 at its lower end, 1 at its upper end
        height = _share(xp, xp.maximum(distance, 0), max(1, length))
        return _rounded(xp, height) if shape == "cosine" else height

    iteration, end = xp.minimum(iteration, last), final * low
    rise = _between(xp, (low, high), share(iteration, top))
    fall = _between(xp, (low if tail else end, high), share(foot - iteration, foot - top))
    rest = _between(xp, (end, low), share(last - iteration, last - foot))
    before_last = iteration < last  # decides in a run so short that the pieces meet at its last update
    value = xp.where((iteration <= top) & before_last, rise, xp.where((iteration <= foot) & before_last, fall, rest))
    return value[()] if xp is np else value  # numpy.where makes an array of a number


def trapezoid(iteration, bounds, steps, warmup=0.05, decay=0.2, final=1e-3, shape="linear"):
    """Warm-up, flat, fall (WSD) for a run of 2 * steps updates: up to bounds[1], along it, down to final * bounds[0].

    It ends as one_cycle does. Source: Hägele and others 2024, arXiv:2405.18392, section 3 (their "cooldown").

    Args:
        warmup, decay: shares of the run for the straight rise from bounds[0], and for the fall.
        final: the last value as a fraction of bounds[0]; 0 for a fall to nothing.
        shape: of the fall: "linear", or "1-sqrt", which falls fast at first and slowly at the end.
    """
    _check_run({"warmup": warmup, "decay": decay}, final, shape, ("linear", "1-sqrt"))
    xp, iteration = _numbers_of(iteration)
    last = 2 * steps - 1
    foot = min(round((1 - decay) * last), last - 1)  # the last update at the top
    top = min(max(1, round(warmup * last)), max(1, foot)) if warmup else 0
    foot = max(foot, min(top, last - 1))  # a warm-up, however short, reaches the top
    iteration = xp.minimum(iteration, last)
    rise = _between(xp, bounds, _share(xp, iteration, top)) if top else float(bounds[1])
    fallen = _share(xp, xp.maximum(iteration - foot, 0), last - foot)
    fall = _between(xp, (final * bounds[0], bounds[1]), 1.0 - (xp.sqrt(fallen) if shape == "1-sqrt" else fallen))
    value = xp.where(iteration <= foot, rise, fall)
    return value[()] if xp is np else value


STEP_FUNCTIONS = (triangular, triangular2, exp_range, cosine, cosine_restarts, one_cycle, trapezoid)
STEP_FUNCTIONS = {function.__name__: function for function in STEP_FUNCTIONS}
STEP_FUNCTIONS["one_cycle_cosine"] = functools.partial(one_cycle, shape="cosine")


def _check_run(shares, final, shape, shapes):
    fits = min(shares.values()) >= 0 and sum(shares.values()) <= 1 and 0 <= final <= 1 and shape in shapes
    given = ", ".join(f"{name}={value!r}" for name, value in {**shares, "final": final, "shape": shape}.items())
    hint = f"{' and '.join(shares)} are shares of the run, each at least 0 and together at most 1; final is in [0, 1]"
    _require(fits, f"{given}: {hint}, a fraction of bounds[0]; shape is one of {', '.join(shapes)}.")


def _numbers_of(iteration):
    """(numpy, int64 array) for numbers and arrays, (keras.ops, integer tensor) for everything else."""
    if isinstance(iteration, (numbers.Number, np.ndarray, list, tuple, range)):
        iteration = np.asarray(iteration)
        if iteration.dtype.kind not in "iu" or iteration.min(initial=0) < 0:
            raise ValueError(f"iteration={iteration!r}: updates are counted in whole numbers from 0; pass integers.")
        return np, iteration.astype(np.int64)
    iteration = ops.convert_to_tensor(iteration)
    if keras.backend.standardize_dtype(iteration.dtype) not in ("int32", "int64"):  # others overflow
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

    Before `load_weights` into a freshly compiled model call `optimizer.build(model.trainable_variables)`:
    otherwise Keras skips the optimizer's state with a mere warning, and the cycle starts anew. (CLR needs no build.)

    Args:
        bounds: the lowest and the highest learning rate, two finite numbers, 0 <= low <= high.
        steps: updates in half a cycle, a whole number of at least 1 (of one_cycle and trapezoid: in half of the
            run). With gradient_accumulation_steps=k Keras counts batches, not updates: give k times as many.
        step_function: a name from STEP_FUNCTIONS, or a callable f(iteration, bounds, steps) -> value in keras.ops, or a
            functools.partial of one with keywords. To save a model with your own, decorate it with
            @keras.saving.register_keras_serializable().
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
        return (ops if ops.is_tensor(height) else np).clip(height, 0.0, 1.0)

    def get_config(self):
        step_function = _describe_step_function(self.step_function)
        return {"bounds": list(self.bounds), "steps": self.steps, "step_function": step_function}


@keras.saving.register_keras_serializable(package="clr_utils")
class CLR(keras.optimizers.Optimizer):
    """Stochastic gradient descent with a cyclical learning rate and a cyclical momentum.

    Both are computed in the training graph, as pure functions of the optimizer's one iteration counter: a saved model
    resumes in mid-cycle. With learning rate lr and momentum m of the update, gradient g and velocity v:

        v = m * v - lr * g
        w = w + v            (nesterov: w = w + m * v - lr * g)

    This is the form of keras.optimizers.SGD and of Caffe; PyTorch keeps lr outside of v.

    `learning_rate` and `momentum` are those of the coming update; callbacks that set the rate are refused.
    Source: Smith 2017, arXiv:1506.01186; momentum: Smith 2018, arXiv:1803.09820, section 4.3.

    Args:
        bounds, steps, step_function: as for CyclicalLR.
        momentum_bounds: the momentum at the lowest and at the highest learning rate, normally falling, as in
            (0.95, 0.85); or one number for a constant momentum. Each in [0, 1). It follows the height of the
            cycle, step_function(i, (0, 1), steps) between 0 and 1, so it rests at the first in a tail below low.
        nesterov: whether to use Nesterov momentum.
        **kwargs: the other keywords of keras.optimizers.SGD. Its weight_decay is multiplied by the current learning
            rate, so it cycles along.

    Raises:
        ValueError, TypeError: for other arguments, a saved state of other number or shapes, and setting the rate.
    """

    def __init__(
        self, bounds=(0.01, 3.0), steps=15, momentum_bounds=0.0, step_function="triangular", nesterov=False, **kwargs
    ):
        if "learning_rate" in kwargs or "momentum" in kwargs:
            raise TypeError("CLR takes bounds=(low, high) and momentum_bounds in place of learning_rate and momentum.")
        super().__init__(learning_rate=CyclicalLR(bounds, steps, step_function), **{"name": "CLR", **kwargs})
        self.momentum_bounds = _checked_momentum_bounds(momentum_bounds)
        self.nesterov = bool(nesterov)
        self._loaded = None  # variables that were loaded before build() has made room for them

    bounds = property(lambda self: self._learning_rate.bounds)  # these cannot be set: a compiled graph keeps the old
    steps = property(lambda self: self._learning_rate.steps)
    step_function = property(lambda self: self._learning_rate.step_function)

    @property
    def learning_rate(self):
        """The learning rate of the coming update, a float32 scalar tensor."""
        _refuse_reduce_lr_on_plateau()
        return super().learning_rate

    @learning_rate.setter
    def learning_rate(self, value):
        raise _not_settable(f"learning_rate={value!r}")

    @property
    def _slots(self):  # how many variables it keeps for each of the model's
        return bool(self.use_ema) + bool(self.gradient_accumulation_steps) + bool(max(self.momentum_bounds))

    @property
    def momentum(self):
        """The momentum of the coming update, a float32 scalar tensor."""
        return ops.cast(self.momentum_at(ops.convert_to_tensor(self._iterations)), "float32")

    def learning_rate_at(self, iteration):
        """The learning rate of an update: a number for an int, an array for an integer array."""
        return self._learning_rate.at(iteration)

    def momentum_at(self, iteration):
        """The momentum of an update: a number for an int, an array for an integer array."""
        cycles = self.momentum_bounds[0] != self.momentum_bounds[1]  # a constant asks no step function
        height = (self._learning_rate if cycles else CyclicalLR()).height_at(iteration)
        return _between(ops if ops.is_tensor(height) else np, self.momentum_bounds, height)

    def build(self, variables):
        if self.built:
            return
        if self._loaded is not None:  # checked before anything is made, so that a second try is refused as well
            shapes = [tuple(v.shape) for v in variables if not self._overwrite_variable_with_gradient(v)]
            self._check_fits(self._loaded, [(), *shapes * self._slots])
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity") if max(self.momentum_bounds) else []
        if self._loaded is not None:
            outside_of_tracing = contextlib.nullcontext  # where assignments happen now
            if keras.backend.backend() == "tensorflow":
                from tensorflow import init_scope as outside_of_tracing
            with outside_of_tracing():
                _assign(self.variables[1:], self._loaded[1:])  # the counter was set on loading, maybe again since
            self._loaded = None

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        # The momentum goes along: computed once per update, it is free; once per variable, it is noticeable.
        super()._backend_update_step(grads, trainable_variables, (learning_rate, self.momentum))

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable. learning_rate: the rate, or the rate and the momentum as a tuple."""
        rate, momentum = learning_rate if isinstance(learning_rate, tuple) else (learning_rate, self.momentum)
        step = ops.multiply(ops.cast(gradient, variable.dtype), ops.cast(rate, variable.dtype))
        if not self.velocities:
            self.assign_sub(variable, step)
            return
        momentum = ops.cast(momentum, variable.dtype)
        velocity = self.velocities[self._get_variable_index(variable)]
        new_velocity = ops.subtract(ops.multiply(velocity, momentum), step)
        self.assign(velocity, new_velocity)
        if self.nesterov:
            new_velocity = ops.subtract(ops.multiply(new_velocity, momentum), step)
        self.assign_add(variable, new_velocity)

    def load_own_variables(self, store):
        """Takes the variables of a saved CLR, also before `build`, which then puts them in place. Keras would not."""
        saved = [np.asarray(store[str(i)]) for i in range(len(store.keys()))]
        # A LossScaleOptimizer, which Keras wraps around it under mixed_float16, saves four numbers of its own first:
        # an iteration, which stays 0, a learning rate, a counter, and the scale.
        if len(saved) > 4 and not any(v.ndim for v in saved[:4]) and saved[0] == 0 < saved[3]:
            saved = saved[4:]
        if not saved:  # as Keras's optimizers do
            why = "saved without optimizer, or not under mixed_float16 as here. The cycle does not resume."
            warnings.warn(f"Nothing in the file for optimizer '{self.name}': weights {why}", stacklevel=2)
        elif all(v.shape == () and v == 0 for v in saved):  # saved before its first update, maybe unbuilt: as new
            self._loaded = None
            _assign(self.variables, [np.zeros(v.shape) for v in self.variables])
        elif self.built:
            self._check_fits(saved, [tuple(v.shape) for v in self.variables])
            _assign(self.variables, saved)
        else:
            self._check_fits(saved)
            self._loaded = saved
            self._iterations.assign(saved[0])

    def save_own_variables(self, store):
        if self._loaded is None:
            super().save_own_variables(store)
        else:  # not built since: hand on what was loaded
            for i, value in enumerate([_value_of(self._iterations), *self._loaded[1:]]):
                store[str(i)] = value

    def _check_fits(self, saved, expected=None):
        """ValueError where saved variables are not this optimizer's. expected: the shapes of its own, once known."""
        shapes = [v.shape for v in saved]
        one_slot = shapes[1 : 1 + (len(shapes) - 1) // self._slots] if self._slots else []
        if len(shapes) > self._slots and shapes == (expected or [(), *one_slot * self._slots]):
            return
        names = ("momentum_bounds", "use_ema", "gradient_accumulation_steps")
        given = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        here = f"{len(expected)}: {expected!s:.300}" if expected else f"1 and {self._slots} for each trainable variable"
        raise ValueError(
            f"The saved state does not fit optimizer {self.name}. The file has {len(saved)} variables: "
            f"{shapes!s:.300}; with {given} there are {here}. Compile with the same settings and trainable variables. "
            "Or take the weights alone: load_model(path, compile=False); or compile, optimizer.build("
            "model.trainable_variables), then load_weights(path, skip_mismatch=True). The cycle then starts anew."
        )

    def get_config(self):
        config = {**super().get_config(), **self._learning_rate.get_config()}
        del config["learning_rate"]  # made from the three keys of the schedule
        return {**config, "momentum_bounds": list(self.momentum_bounds), "nesterov": self.nesterov}


def current_values(optimizer):
    """(learning rate, momentum) of the coming update, floats, of any Keras optimizer; the momentum of Adam is None."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of a LossScaleOptimizer, which hides the momentum
    values = optimizer.learning_rate, getattr(optimizer, "momentum", None)
    return tuple(None if value is None else float(ops.convert_to_numpy(value)) for value in values)


def _not_settable(what):
    return TypeError(
        f"{what}: CLR computes its learning rate from bounds, steps and step_function, and nothing else can set it. "
        "For another cycle, compile with a new CLR. Callbacks that set the rate, such as ReduceLROnPlateau and "
        "LearningRateScheduler, need an optimizer with a fixed one: keras.optimizers.SGD(0.1, momentum=0.9)."
    )


def _refuse_reduce_lr_on_plateau():
    """It reads the rate after each epoch but sets it, and would fail, only at a plateau: perhaps hours later."""
    if keras.backend.backend() == "torch" and sys.modules["torch"].compiler.is_compiling():
        return  # it cannot follow a look at the stack
    reader = sys._getframe(2)
    readers = [frame.f_code for frame in (reader, reader.f_back) if frame]  # a LossScaleOptimizer may be in between
    if keras.callbacks.ReduceLROnPlateau.on_epoch_end.__code__ in readers:
        raise _not_settable("ReduceLROnPlateau")


def _resolve_step_function(step_function):
    """The callable for a name, a callable, or what `_describe_step_function` made of one."""
    if isinstance(step_function, dict):
        return functools.partial(_resolve_step_function(step_function["name"]), **step_function["arguments"])
    if isinstance(step_function, str):
        found = STEP_FUNCTIONS.get(step_function) or keras.saving.get_registered_object(step_function)
        hint = "Pass one of your own itself, or decorate it with @keras.saving.register_keras_serializable() before"
        _require(found, f"{step_function=} is not known. Known: {', '.join(STEP_FUNCTIONS)}. {hint} loading.")
        return found
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
    if known := [name for name, known in STEP_FUNCTIONS.items() if step_function is known]:
        return known[0]
    if isinstance(step_function, functools.partial) and not step_function.args:
        return {"name": _describe_step_function(step_function.func), "arguments": dict(step_function.keywords)}
    name = keras.saving.get_registered_name(step_function) if hasattr(step_function, "__name__") else None
    known = name is not None and keras.saving.get_registered_object(name) is step_function
    hint = f"it with @keras.saving.register_keras_serializable(), or use a name: {', '.join(STEP_FUNCTIONS)}."
    _require(known, f"{step_function=} cannot be saved, because Keras would not find it when loading. Decorate {hint}")
    return name


def _pair(values):
    """The two numbers in values as floats, NaNs for anything else, such as text that float() would take."""
    values = list(values) if isinstance(values, (list, tuple)) or np.ndim(values) == 1 else []
    fits = len(values) == 2 and all(isinstance(v, numbers.Real) for v in values)
    return (float(values[0]), float(values[1])) if fits else (math.nan, math.nan)


def _checked_bounds(bounds):
    low, high = _pair(bounds)
    _require(0 <= low <= high < math.inf, f"{bounds=}: give the lowest and the highest rate, finite, 0 <= low <= high.")
    return low, high


def _checked_momentum_bounds(momentum_bounds):
    constant = isinstance(momentum_bounds, numbers.Real)
    at_low, at_high = _pair([momentum_bounds] * 2 if constant else momentum_bounds)
    hint = "give the momentum at the lowest and at the highest learning rate, each in [0, 1), for example (0.95, 0.85)"
    _require(0 <= at_low < 1 and 0 <= at_high < 1, f"{momentum_bounds=}: {hint}, or one number for a constant one.")
    return at_low, at_high


def _is_whole(value, low=1):
    return isinstance(value, numbers.Integral) and low <= value < 2**30  # twice it fits the int32 counter of JAX, torch


def _checked_steps(steps):
    whole = isinstance(steps, numbers.Real) and not isinstance(steps, bool) and steps == steps // 1
    _require(whole and _is_whole(int(steps)), f"{steps=}: give a whole number of at least 1, updates in half a cycle.")
    return int(steps)


# ---------------------------------------------------------------------------------------------------------
# BatchNorm
# ---------------------------------------------------------------------------------------------------------


def settle_batch_norm(model, x, batch_size=128, shuffle=True):
    """Estimates the running statistics of a model's BatchNormalization layers anew, at the weights it has now.

    Outside of training BatchNorm uses running means, which are those of weights that have moved on since: after high
    learning rates, or for averaged weights, a good network then tests badly. Here each statistic becomes its mean over
    the batches of x. Nothing else changes. Source: Izmailov and others 2018, arXiv:1803.05407, section 3.2.

    Args:
        model: a built keras.Model, run eagerly if it has run_eagerly. Of a BatchNorm called twice the last call counts.
        x: some thousand training inputs, an array (samples, ...) or several in a list, tuple or dict; no dataset.
        batch_size: samples of a batch, as in the training; what is left at the end is not used.
        shuffle: whether to mix the samples, always in the same way: batches of one class would have too low a variance.

    Raises:
        ValueError: if no BatchNormalization layer of the model is trainable, or x is less than one batch.
    """
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    layers = {layer: layer.momentum for layer in layers if layer.trainable and layer.built}
    _require(layers, f"model {model.name!r} has no trainable BatchNormalization that is built: nothing to settle.")
    _require(not any(getattr(layer, "renorm", False) for layer in layers), "Layers with renorm=True cannot be settled.")
    _require(_is_whole(batch_size), f"{batch_size=}: give a whole number of at least 1.")
    x, size = _arrays_and_size(_as_batch((x,))[0], "x")
    _require(size >= batch_size, f"x holds {size} samples, less than one batch of {batch_size}: give more of them.")
    statistics = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]
    means, kept = [0.0] * len(statistics), [(v, _value_of(v)) for v in _all_variables(model)]
    try:
        for layer in layers:
            layer.momentum = 0.0  # the running statistics are now those of the last batch; 0 times inf would be NaN
        _assign(statistics, [np.nan_to_num(_value_of(v).astype(float), posinf=0, neginf=0) for v in statistics])
        forward = _forward_in_training(model)
        with _random_states_kept():
            order = np.random.default_rng(0).permutation(size) if shuffle else np.arange(size)
            for k, batch in enumerate(order[: size - size % batch_size].reshape(-1, batch_size)):
                forward(tree.map_structure(lambda a, batch=batch: a[batch], x))
                means = [mean + (_value_of(v) - mean) / (k + 1) for mean, v in zip(means, statistics)]
        kept += zip(statistics, means)  # assigned last
    finally:
        for layer, momentum in layers.items():
            layer.momentum = momentum
        _assign(*zip(*kept))


def _forward_in_training(model):
    """A function that runs a model in training mode on a batch, compiled where that is faster."""
    call, backend = functools.partial(model, training=True), keras.backend.backend()
    if backend == "torch" or model.run_eagerly or backend == "jax" and not model._call_has_training_arg:
        return call
    if backend == "tensorflow":
        return sys.modules[backend].function(call, autograph=False)
    compiled = sys.modules["jax"].jit(functools.partial(model.stateless_call, training=True))

    def forward(x):
        values = [[v.value for v in kind] for kind in (model.trainable_variables, model.non_trainable_variables)]
        _assign(model.non_trainable_variables, compiled(*values, x)[1])

    return forward


def _assign(variables, values):
    for variable, value in zip(variables, values):
        variable.assign(value)


def _all_variables(model):
    """A model's, and its metrics': also those of a keras.Model within it, which model.metrics leaves out."""
    metrics = [*model.metrics, *(metric for layer in model._flatten_layers() for metric in layer._metrics)]
    return [*model.variables, *(v for metric in metrics for v in metric.variables)]


def _value_of(variable):
    return np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable)))  # a copy: torch gives the memory itself


# ---------------------------------------------------------------------------------------------------------
# LR range test
#
# The sweep is `train_on_batch` in a loop, on the model itself, compiled with a second optimizer meanwhile. That leaves
# behind attributes of the model, values of variables, and random states: two context managers put them back.
# ---------------------------------------------------------------------------------------------------------


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
    sample_weight=None,
    class_weight=None,
    validation_data=None,
    seed=0,
):
    """The RangeTest of `model`: some hundred updates with a rising learning rate, and the loss of each; then undone.

    Afterwards everything is as before, whatever ended the test, an exception or Ctrl-C included: weights, BatchNorm,
    dropout seeds, optimizer, metrics, compiled functions, history, and the random states of Python, NumPy, Keras and
    the backend. A `fit` after it gives the same bits as one without it. (What was not built is built, and stays so.)
    Only the data cannot be put back (a generator goes on where the test left it, a tf.data shuffle counts its passes in
    the dataset object), nor what the model does not know of: a tf.Variable in a layer, a variable of a loss.
    Source: Smith 2017, arXiv:1506.01186, section 3.3, and arXiv:1803.09820, section 4.1.

    Args:
        model: a compiled keras.Model, trained as it stands, by a copy of its optimizer with new slots.
        x, y: arrays (or lists, tuples, dicts of arrays) of equal length, read in an order drawn from `seed`, without
            incomplete batches; or, with y=None, a tf.data.Dataset, PyDataset, list, generator or other iterable of
            batches (x, y) or (x, y, sample_weight), read again where that is possible (not of a generator).
        lr_bounds: first and last learning rate, low < high.
        num_steps: updates from one to the other, at least 10 (batches, with gradient accumulation). The velocity is
            late: with momentum 0.9, over six decades, 600 updates read 1.2 times too high, 100 updates 2.2 times.
        sweep: "exponential" (equal factors) or "linear" (equal differences, for a closer look; low may be 0).
        batch_size: samples in a batch, where the data are arrays.
        stop_factor: it ends when the smoothed loss has lost stop_factor - 1 quarters of its descent in a rise beyond
            noise (math.inf: never), or a loss is not finite.
        smoothing: as in `smooth`.
        momentum: constant, in [0, 1). By default momentum_bounds[1] for CLR, as at its peak; others keep their own.
        sample_weight, class_weight, validation_data: as for `fit`; the last must end, and is evaluated up to 20 times.
        seed: of the order in which arrays and the batches of a PyDataset are read.

    Raises:
        ValueError, TypeError: for arguments outside these limits. Errors in the data come through as they are.
    """
    _check_arguments(model, num_steps, sweep, batch_size, stop_factor, smoothing, momentum, validation_data)
    schedule = CyclicalLR(lr_bounds, num_steps, functools.partial(_rising, sweep=sweep))
    if schedule.bounds[0] == schedule.bounds[1] or (schedule.bounds[0] == 0 and sweep == "exponential"):
        raise ValueError(f"{lr_bounds=}: give low < high, for an exponential sweep both above 0.")
    optimizer = _sweep_optimizer(model.optimizer, schedule, momentum)
    asked = {"sweep": sweep, "stop_factor": stop_factor, "smoothing": smoothing}
    with _random_states_kept():
        batches = _batches(x, y, sample_weight, int(batch_size), np.random.default_rng(seed))
        first = next(batches, None)
        _build(model, first)
        _require(not (class_weight and tree.is_nested(first[1])), "class_weight is for one output: give sample_weight.")
        batches = itertools.islice(itertools.chain([first], batches), num_steps)
        with _compiled_for_a_while(model, optimizer):
            return _sweep(model, batches, schedule, class_weight, (validation_data, batch_size), asked)


def _sweep(model, batches, schedule, class_weight, validation, asked):
    """The RangeTest of a compiled model on these batches."""
    smoothing, loss_scaled = asked["smoothing"], hasattr(model.optimizer, "inner_optimizer")
    lr, loss, smoothed, accuracy, checks, mean, diverged_at = [], [], [], [], [], 0.0, None
    for step, batch in enumerate(batches):
        # An update that loss scaling skips does not move the rate.
        rate = float(ops.convert_to_numpy(model.optimizer.learning_rate) if loss_scaled else schedule.at(step))
        if int(keras.version().split(".")[1]) < 15:  # where train_on_batch reports the mean since the last reset
            model.reset_metrics()
        logs = model.train_on_batch(*batch, class_weight=class_weight, return_dict=True)
        _require("loss" in logs, f"The model reports {', '.join(logs)}: give the metric of its loss the name 'loss'.")
        if not math.isfinite(of_batch := float(logs["loss"])):  # of a tensor where all is bfloat16
            when = f"update {step}" if step else "the very first update: look at the model and its data"
            stopped, diverged_at = f"The loss was {of_batch} at {when}.", rate if step else None
            break
        lr.append(rate)
        loss.append(of_batch)
        accuracy.append(next((v for k, v in logs.items() if k == "acc" or k.endswith("accuracy")), math.nan))
        mean = smoothing * mean + (1 - smoothing) * loss[-1]  # as `smooth` does
        smoothed.append(mean / (1 - smoothing ** (step + 1)))
        if smoothed[-1] > _stop_above(loss, smoothed, schedule.steps, **asked):
            stopped, diverged_at = f"The smoothed loss rose to {smoothed[-1]:.3g} at update {step}.", rate
            break
        if validation[0] is not None and (step + 1) % -(-schedule.steps // 20) == 0:
            checks.append((rate, _validation_loss(model, *validation)))
    else:
        short = f"The data ended after {len(loss)} batches."
        stopped = short if len(loss) < schedule.steps else "It reached the end of the sweep."
    lr, loss, smoothed, accuracy = (np.array(values, float) for values in (lr, loss, smoothed, accuracy))
    checked = np.array(checks).reshape(-1, 2).T if validation[0] is not None else (None, None)
    record = lr, loss, smoothed, None if np.isnan(accuracy).all() else accuracy, *checked, stopped, diverged_at
    return RangeTest(*record, lr_bounds=schedule.bounds, num_steps=schedule.steps, **asked)


def _validation_loss(model, data, batch_size):
    given = {"x": data}
    if isinstance(data, (tuple, list)):
        given = dict(zip(("x", "y", "sample_weight"), data), batch_size=batch_size)
    with _random_states_kept():  # torch draws from its own, even to read in order
        return float(model.evaluate(**given, verbose=0, return_dict=True)["loss"])


def _stop_above(loss, smoothed, num_steps, stop_factor, smoothing, **_):
    """The smoothed loss beyond which a sweep counts as diverged. A constant added to the loss moves it along."""
    first = max(num_steps // 10, 10)
    if len(loss) <= first:
        return math.inf
    start, lowest = sum(loss[:first]) / first, min(smoothed[first:])
    # The median step from one loss to the next is about their standard deviation, whatever the trend. Sixty of what
    # smoothing leaves of it, because noise grows with the learning rate. The last term is for losses without any.
    noise = float(np.median(np.abs(np.diff(loss[:first])))) * math.sqrt((1 - smoothing) / (1 + smoothing))
    return lowest + (stop_factor - 1) / 4 * max(start - lowest, 60 * noise, 1e-5 * abs(start))


class Suggestions(NamedTuple):
    """Learning rates that a range test suggests."""

    valley: float  # in the longest falling subsequence (length n), n/3 + n/6 points from its start
    steepest: float  # where the loss falls fastest per step of log(lr)
    minimum: float  # a tenth of the rate with the lowest loss
    why: str  # one sentence


@dataclasses.dataclass(eq=False, repr=False)
class RangeTest:
    """What `lr_range_test` saw. n updates were recorded, up to the end or to what stopped it."""

    lr: np.ndarray  # (n,): the learning rate of each update
    loss: np.ndarray  # (n,): of its batch, before the update
    smoothed: np.ndarray  # (n,): the exponential mean of the losses
    accuracy: np.ndarray | None  # (n,): of its batch, by the first metric whose name ends so, if there is one
    validation_lr: np.ndarray | None  # (up to 20,)
    validation_loss: np.ndarray | None
    stopped: str  # why it ended, one sentence
    diverged_at: float | None  # the learning rate at which it did, if it did
    lr_bounds: tuple  # this and the rest: as asked for
    num_steps: int
    sweep: str
    stop_factor: float
    smoothing: float

    def suggest(self):
        """Suggestions from the smoothed loss without its first tenth and last 5 points, as of fastai's lr_find.

        Raises:
            ValueError: with the reason, where there are less than 10 points, or no descent (from the mean of the first
                tenth, by four times the noise that points have after smoothing).
        """
        kept, _, reason = self._read()
        _require(kept is not None, f"The range test suggests nothing. {reason}")
        moved = np.diff(self.lr[kept], append=math.inf) > 0  # the rate stands still where loss scaling skips an update
        lr, loss = self.lr[kept][moved], self.smoothed[kept][moved]
        end, length = _longest_descent(loss)
        valley = max(0, end - length) + int(length / 3) + int(length / 6)
        steepest, lowest = int(np.argmin(np.diff(loss) / np.diff(np.log(lr)))), int(np.argmin(loss))
        falls = f"The smoothed loss was still falling at the last kept rate, {lr[-1]:.3g}. {self._advice()}"
        why = falls if lowest == len(loss) - 1 else "The smoothed loss falls and rises again."
        return Suggestions(float(lr[valley]), float(lr[steepest]), float(lr[lowest]) / 10, why)

    def bounds(self, high_of_break=1 / 8, low_of_high=1 / 10):
        """(low, high) for CLR: these fractions, of the rate at which the loss breaks away for high, of high for low.

        A sweep passes each rate in a few updates; a training stays there for hundreds, and tolerates less: notebook 02.
        Source of low: Smith 2018, arXiv:1803.09820, section 4.1.

        Raises:
            ValueError: with the reason, where `suggest` has no suggestion, or where the loss did not break.
        """
        _, break_lr, reason = self._read()
        _require(break_lr is not None, f"The range test gives no bounds. {reason}")
        return low_of_high * high_of_break * break_lr, high_of_break * break_lr

    @property
    def break_lr(self):
        """The last rate at which the smoothed loss still keeps three quarters of its descent, or None."""
        return self._read()[1]

    def summary(self):
        """One line: how far it went, why it stopped, what it suggests."""
        (low, high), (kept, break_lr, reason) = self.lr_bounds, self._read()
        text = f"LR range test, {self.sweep} from {low:.3g} to {high:.3g}: {len(self.lr)} of {self.num_steps} updates."
        if kept is None:
            return f"{text} {self.stopped} No suggestion: {reason}"
        valley, steepest, minimum, _ = self.suggest()
        marks = f"valley {valley:.3g}, steepest {steepest:.3g}, minimum/10 {minimum:.3g}"
        bounds = "bounds for CLR ({:.3g}, {:.3g})".format(*self.bounds()) if break_lr else f"no bounds: {reason}"
        return f"{text} {self.stopped} Lowest smoothed loss at {minimum * 10:.3g}; {marks}; {bounds}"

    __str__ = summary

    def __repr__(self):
        return f"<RangeTest: {len(self.lr)} of {self.num_steps} updates, {self.sweep} over {self.lr_bounds}>"

    def _read(self):
        """(slice of the points to judge, or None; break_lr, or None; why one of them is missing)."""
        first = self.num_steps // 10
        kept = slice(first, max(first, len(self.lr) - 5))
        if not len(self.lr):
            return None, None, self.stopped
        if kept.stop - kept.start < 10:
            advice = self._advice("Start at a lower rate or take more steps.")
            few = f"Too few points: {len(self.lr)} updates, and the first {first} and the last 5 do not count."
            return None, None, f"{few} {self.stopped} {advice}"
        start, noise = self.loss[: max(first, 5)].mean(), self.loss[: max(first, 5)].std()
        noise *= math.sqrt((1 - self.smoothing) / (1 + self.smoothing))  # of the exponential mean of independent values
        lowest = self.smoothed[kept].min()
        if not lowest < start - 4 * noise:
            none = f"No descent beyond noise: the smoothed loss starts at {start:.3g}, and its lowest is {lowest:.3g}."
            return None, None, f"{none} The model may have converged already, or learns at none of these rates."
        # The lowest point itself would be no guide: it lies anywhere in the flat part before the break.
        still_low = np.flatnonzero(self.smoothed <= lowest + (start - lowest) / 4)[-1]
        if self.diverged_at is None and self.smoothed[-1] <= lowest + max((start - lowest) / 4, 4 * noise):
            return kept, None, f"The loss was still low at the end, {self.lr[-1]:.3g}. {self._advice()}"
        return kept, float(self.lr[still_low]), ""

    def _advice(self, where_data_sufficed="Raise lr_bounds[1]."):
        if self.diverged_at is not None or len(self.lr) == self.num_steps:
            return where_data_sufficed
        return "Give more data, data that can be read again (a generator cannot), or a smaller num_steps."


def _longest_descent(values):
    """(index of its last value, length) of the longest falling subsequence of an array."""
    lengths = np.ones(len(values), int)
    for i in range(1, len(values)):
        lengths[i] += max(lengths[:i][values[:i] > values[i]], default=0)
    return int(np.argmax(lengths)), int(lengths.max())


def _rising(iteration, bounds, steps, sweep):
    """A step function for one rise from bounds[0] to bounds[1] in `steps` updates."""
    xp, iteration = _numbers_of(iteration)
    share, (low, high) = xp.minimum(_to_float(xp, iteration) / (steps - 1), 1.0), bounds
    return low + (high - low) * share if sweep == "linear" else low * xp.exp(share * math.log(high / low))


def _sweep_optimizer(optimizer, schedule, momentum):
    """A second optimizer that does what the first one does, at the rates of the schedule and with new slots.

    The config does not say all: exclude_from_weight_decay, what a subclass keeps to itself. So the base class is
    initialised anew, and what has been set besides is carried over, except variables, which `build` makes.
    """
    kind, base = type(optimizer), keras.optimizers.Optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        scale = float(ops.convert_to_numpy(optimizer.dynamic_scale)) if optimizer.built else optimizer.initial_scale
        inner = _sweep_optimizer(optimizer.inner_optimizer, schedule, momentum)
        return kind(inner, scale, dynamic_growth_steps=optimizer.dynamic_growth_steps, name=optimizer.name)
    held = any(isinstance(part, base) for part in tree.flatten([*vars(optimizer).values()]))
    held = held or hasattr(optimizer, "optimizers")  # of MultiOptimizer, before it is built
    _require(not held, f"{kind.__name__} holds other optimizers, with learning rates of their own: compile with one.")
    settings = {name: getattr(optimizer, name) for name in base(0.1, name="").get_config() if name != "learning_rate"}
    twin = object.__new__(kind)
    if isinstance(optimizer, CLR):
        momentum = optimizer.momentum_bounds[1] if momentum is None else momentum
        cycle = schedule.bounds, schedule.steps, momentum, schedule.step_function
        CLR.__init__(twin, *cycle, nesterov=optimizer.nesterov, **settings)
    else:
        base.__init__(twin, schedule, **settings)
        if momentum is not None:
            _require(hasattr(optimizer, "momentum"), f"{momentum=}: {kind.__name__} has none; leave it out.")
            twin.momentum = float(momentum)
    for name, value in vars(optimizer).items():
        if name not in vars(twin) and not any(isinstance(v, keras.Variable) for v in tree.flatten(value)):
            setattr(twin, name, value)  # which copies lists and dicts: its `build` may add to them
    return twin


@contextlib.contextmanager
def _compiled_for_a_while(model, optimizer):
    """The model compiled as it was, but with this optimizer. Afterwards its attributes and variables are as before."""
    attributes = dict(vars(model))
    # The arguments as they were given: the public get_compile_config serialises them, which not every loss survives.
    given = {**model._compile_config.config, "optimizer": optimizer, "steps_per_execution": 1, "auto_scale_loss": False}
    given |= {"jit_compile": model.jit_compile, "run_eagerly": model.run_eagerly}
    metrics = tree.flatten([given["metrics"], given["weighted_metrics"]])  # maybe not in model.metrics yet
    metrics = [metric for metric in metrics if isinstance(metric, keras.metrics.Metric)]
    variables = [*_all_variables(model), *(v for metric in metrics for v in metric.variables)]
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)  # the copy draws from its generators
    variables += [v.state for v in vars(inner).values() if isinstance(v, keras.random.SeedGenerator)]
    values = [_value_of(v) for v in variables]
    try:
        keras.Model.compile(model, **given)  # not a `compile` of the model's class
        yield
    finally:
        model.optimizer = attributes["optimizer"]  # TensorFlow's checkpoints follow what was assigned last
        object.__setattr__(model, "__dict__", attributes)
        for metric in metrics:  # some make their variables at the first batch
            metric.reset_state()
        _assign(variables, values)


@contextlib.contextmanager
def _random_states_kept():
    """Afterwards the random states of Python, NumPy, Keras and the backend are as before."""
    # No public way leads to the generator of unseeded keras.random calls, nor to one that may not exist yet.
    from keras.src.backend.common import global_state

    name, backend, torch = "global_seed_generator", keras.backend.backend(), sys.modules.get("torch")
    generator = global_state.get_global_attribute(name)
    with contextlib.ExitStack() as afterwards:
        afterwards.callback(random.setstate, random.getstate())
        afterwards.callback(np.random.set_state, np.random.get_state())
        afterwards.callback(global_state.set_global_attribute, name, generator)
        if generator is not None:
            afterwards.callback(generator.state.assign, _value_of(generator.state))
        if backend == "tensorflow":
            _keep_tensorflow_random_states(afterwards)
        if torch:
            afterwards.enter_context(torch.random.fork_rng(devices=None if backend == "torch" else []))
        yield


def _keep_tensorflow_random_states(afterwards):
    # Neither the global generator nor the seeds of eager operations can be read in public without making them.
    from tensorflow.python.eager import context
    from tensorflow.python.ops import stateful_random_ops

    eager, generator = context.context(), stateful_random_ops.global_generator
    afterwards.callback(setattr, stateful_random_ops, "global_generator", generator)
    if generator is not None:
        afterwards.callback(generator.state.assign, generator.state.numpy())

    def seeds():  # the attribute is not there before the first tf.random.set_seed
        return eager._seed, hasattr(eager, "_rng") and eager._rng and eager._rng.getstate()

    def reseed(before):
        if seeds() != before:
            eager._set_global_seed(before[0])  # also forgets the kernels made from draws that will be made again
            if before[1]:
                eager._rng.setstate(before[1])

    afterwards.callback(reseed, seeds())


def _batches(x, y, sample_weight, batch_size, rng):
    """Batches (x, y, sample_weight) of any kind of data, read again and again where that is possible."""
    of_batches = isinstance(x, (list, tuple)) and y is None and all(isinstance(part, (list, tuple)) for part in x)
    if (hasattr(x, "__array__") or isinstance(x, (list, tuple, dict))) and not of_batches:
        yield from _batches_of_arrays(_as_batch((x, y, sample_weight)), batch_size, rng)
        return
    hint = "is read as batches (x, y, sample_weight): leave out y and sample_weight, or give x as an array."
    _require(y is None and sample_weight is None, f"x={type(x).__name__} {hint}")
    pydataset = isinstance(x, keras.utils.PyDataset)
    if not (pydataset or hasattr(x, "__iter__")):
        raise TypeError(f"x={type(x).__name__}: give arrays, a tf.data.Dataset, a PyDataset or an iterable of batches.")
    empty = False
    while not empty:  # as a generator is the second time: it cannot be read again
        empty, epoch = True, x
        if pydataset:  # without its on_epoch_end, where data sets shuffle themselves: `fit` would notice
            order = itertools.count() if x.num_batches is None else rng.permutation(x.num_batches)
            epoch = (x[int(i)] for i in order)
        for batch in epoch:
            empty = False
            yield _as_batch(batch)


def _batches_of_arrays(arrays, batch_size, rng):
    arrays, size = _arrays_and_size(arrays, "x, y, sample_weight")
    while size:
        order = rng.permutation(size)
        for start in range(0, max(size - batch_size, 0) + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield tree.map_structure(lambda a, chosen=chosen: None if a is None else a[chosen], arrays)


def _arrays_and_size(data, names):
    """The arrays of any structure of them, and how many samples they hold."""
    arrays = tree.map_structure(_as_array, data)
    shapes = [a.shape for a in tree.flatten(arrays) if a is not None]
    fits = () not in shapes and len({shape[0] for shape in shapes}) == 1
    _require(fits, f"The shapes of {names} are {shapes!s:.200}: give arrays whose first axes count the same samples.")
    return arrays, shapes[0][0]


def _as_array(a):  # with floats as `fit` has them
    a = ops.convert_to_numpy(a) if ops.is_tensor(a) else a
    return a if a is None or a.dtype.kind != "f" else a.astype(keras.config.floatx(), copy=False)


def _as_batch(batch):
    """(x, y, sample_weight) with numpy arrays or tensors of the backend, None for what is missing."""
    batch = keras.utils.unpack_x_y_sample_weight(tree.lists_to_tuples(batch))
    return tree.map_structure(lambda a: a if a is None or ops.is_tensor(a) else np.asarray(a), batch)


def _build(model, batch):
    """Builds what is not built, in the order of `fit`, and moves no state. Checks that it can train."""
    _require(batch is not None, "The data has not a single batch: there is nothing to train on.")
    if batch[1] is None and model.loss is not None and type(model).compute_loss is keras.Model.compute_loss:
        raise ValueError("The loss of the model needs labels: give x and y (and sample_weight=), or batches (x, y).")
    if not all(layer.built for layer in model._flatten_layers()):
        x = tree.map_structure(ops.convert_to_tensor, batch[0])
        model(tree.map_structure(lambda a: keras.KerasTensor(a.shape, keras.backend.standardize_dtype(a.dtype)), x))
        if model._call_has_training_arg and not all(layer.built for layer in model._flatten_layers()):
            with keras.StatelessScope():
                model(x, training=True)  # with layers that only the training has
    _require(model.trainable_variables, f"model {model.name!r} has no trainable variables: nothing would change.")


def _check_arguments(model, num_steps, sweep, batch_size, stop_factor, smoothing, momentum, validation):
    if not isinstance(model, keras.Model):
        raise TypeError(f"model={model!r}: give a compiled keras.Model.")
    _require(model.compiled and model.optimizer, "The model is not compiled: call model.compile(optimizer, loss).")
    common = type(model).train_step is keras.Model.train_step
    _require(common, "The model has its own train_step, and maybe other optimizers: put its loss into compute_loss.")
    replicas = getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1)
    _require(replicas == 1, "The model is under a tf.distribute strategy: test a copy built outside of its scope.")
    _require(sweep in ("exponential", "linear"), f"{sweep=}: it can be 'exponential' or 'linear'.")
    _require(_is_whole(num_steps, 10), f"{num_steps=}: give a whole number of at least 10.")
    _require(_is_whole(batch_size), f"{batch_size=}: give a whole number of at least 1.")
    _require(isinstance(stop_factor, numbers.Real) and stop_factor > 1, f"{stop_factor=}: give a number above 1.")
    _require(momentum is None or 0 <= _pair([momentum] * 2)[0] < 1, f"{momentum=}: give a number in [0, 1).")
    endless = getattr(validation, "cardinality", int)() == -1 or getattr(validation, "num_batches", 0) is None
    _require(not (endless or hasattr(validation, "__next__")), "validation_data: give (x, y) or a finite dataset.")
    smooth([], smoothing)  # its check


# ---------------------------------------------------------------------------------------------------------
# Plots, and the losses that they show. Seaborn and matplotlib are imported where they draw: the rest goes without.
# ---------------------------------------------------------------------------------------------------------

RC = {"axes.spines.right": False, "axes.spines.top": False, "grid.color": ".9"}
RC |= {"font.family": ["DejaVu Sans"], "lines.linewidth": 2}
THEME = {"context": "notebook", "font_scale": 1.1, "style": "whitegrid", "palette": "colorblind", "rc": RC}
FIGURE_WIDTH = 6.4  # inches, for every figure
DASHES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 0.6)), (0, (8, 2, 2, 2)))
INK, FAINT = "indigo", {"color": "0.75", "linewidth": 0.6}  # a curve alone; each update behind the smoothed loss


class LossPerUpdate(keras.callbacks.Callback):
    """The loss of each update, in `losses`. Resets metrics before each batch: history shows the last of an epoch."""

    def on_train_begin(self, logs=None):
        _require((self.model.steps_per_execution or 1) == 1, "LossPerUpdate needs compile(steps_per_execution=1).")
        self.losses = []

    def on_train_batch_begin(self, batch, logs=None):
        self.model.reset_metrics()

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))


def smooth(values, smoothing):
    """Exponential mean of an array, bias-corrected; smoothing is the share of the past in it. Shape as given."""
    _require(0 <= smoothing < 1, f"{smoothing=}: it is the share of the past in the mean, in [0, 1).")
    mean, smoothed = 0.0, []
    for n, value in enumerate(values, start=1):
        mean = smoothing * mean + (1 - smoothing) * value
        smoothed.append(mean / (1 - smoothing**n))
    return np.array(smoothed)


@contextlib.contextmanager
def theme():
    """`seaborn.set_theme(**THEME)`, but only while the context lasts. Also a decorator."""
    import seaborn as sns

    with sns.axes_style(THEME["style"], RC), sns.plotting_context(THEME["context"], THEME["font_scale"], RC):
        yield


@theme()
def new_axes(rows=1, columns=1, *, title=None, height=3.6, heights=None, axes=None):
    """A flat array of `rows * columns` axes with a shared x axis, in one theme and of one width.

    Args:
        title: what the figure shows, wrapped to its width; of `axes`, in place of new ones, where they are given.
        height, heights: of the figure, in inches; of the rows, relative to each other.
    """
    import matplotlib.pyplot as plt

    if axes is None:
        layout = {"figsize": (FIGURE_WIDTH, height), "height_ratios": heights, "layout": "constrained"}
        axes = plt.subplots(rows, columns, sharex=True, sharey=columns > 1, squeeze=False, **layout)[1]
        axes[0, 0].locator_params(axis="x", nbins=6 // columns + 1)
    axes = np.ravel(axes)
    if title:
        axes[0].figure.suptitle(title, x=0.01, ha="left", wrap=True, fontsize="medium")
    return axes


def line_styles(n):
    """`n` styles for `ax.plot`: shades of one hue, the darkest first (they keep their order in grey), and DASHES."""
    import seaborn as sns

    shades = sns.light_palette(INK, n + 1 + n // 2, reverse=True)
    return [{"color": shades[i], "linestyle": DASHES[i % len(DASHES)]} for i in range(n)]


@theme()
def label_ends(ax):
    """Writes labels right of curves and on top of vertical lines, clear of each other. Set the limits before."""
    for text in [text for text in ax.texts if text.get_gid() == "end"]:
        text.remove()
    sides = [], []  # labels on top share the room along x (axis 0), on the right along y (axis 1)
    for line in ax.lines:
        points = line.get_xydata()
        if not line.get_label().startswith("_") and np.isfinite(points).all(axis=1).any():
            sides[0 if len(points) > 1 and np.ptp(points[:, 0]) == 0 else 1].append(line)

    def tip(line):  # as a share of the axes
        points = (line.get_transform() - ax.transAxes).transform(line.get_xydata())
        return points[np.isfinite(points).all(axis=1)][-1].clip(0, 1)

    for axis, align in ((1, {"ha": "left", "va": "center"}), (0, {"ha": "center", "va": "bottom"})):
        ax.figure.draw_without_rendering()  # gives the axes their limits and their size
        em = 11 / 72 * ax.figure.dpi / ax.bbox.size
        lines = sorted(sides[axis], key=lambda line: tip(line)[axis])
        texts = [line.get_label().split("\n") for line in lines]
        sizes = em[axis] * np.array([(0.6 * max(map(len, rows)) + 0.4, 1.2 * len(rows))[axis] for rows in texts])
        middle = np.cumsum(sizes) - sizes / 2
        shifts = [tip(line)[axis] for line in lines] - middle  # no two overlap where these never fall
        shifts = (np.maximum.accumulate(shifts) + np.minimum.accumulate(shifts[::-1])[::-1]) / 2
        centres = middle + shifts.clip(0, max(0, 1 - sizes.sum()))
        for line, centre in zip(lines, centres):
            place = np.insert([1 + 1.3 * em[1 - axis]], axis, centre)
            leader = {"arrowstyle": "-", "color": line.get_color(), "relpos": ((0.5, 0), (0, 0.5))[axis], "shrinkB": 0}
            look = {"textcoords": "axes fraction", "fontsize": 11, "gid": "end", "arrowprops": leader} | align
            point = (ax.transAxes - line.get_transform()).transform(tip(line))
            ax.annotate(line.get_label(), point, place, line.get_transform(), **look)
    return ax


@theme()
def plot_schedule(schedule, updates, *, quantity="learning rate", label=None, title=None, ax=None, **style):
    """Draws a learning rate or a momentum over `updates` updates and returns the axes.

    Args:
        schedule: CLR, CyclicalLR, an optimizer with one, an array (updates,), or a function of an integer array.
        quantity: `"learning rate"` or `"momentum"`.
        label: written where the line ends. Call again with the same `ax` to compare; **style is for `ax.plot`.
        title, ax: of the figure; axes to draw into, in place of a new figure.
    """
    schedule = getattr(schedule, "inner_optimizer", schedule)  # of a LossScaleOptimizer
    schedule = schedule if isinstance(schedule, CLR) else getattr(schedule, "_learning_rate", schedule)
    known = ["learning rate", "momentum"][: 2 - isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule)]
    _require(quantity in known, f"{quantity=}: of this schedule it can be {' or '.join(map(repr, known))}.")
    _require(_is_whole(updates), f"{updates=}: give a whole number of updates to draw, at least 1.")
    if isinstance(schedule, CLR):
        schedule = schedule.learning_rate_at if quantity == "learning rate" else schedule.momentum_at
    elif isinstance(schedule, CyclicalLR):
        schedule = schedule.at
    values = np.asarray(schedule(np.arange(updates)) if callable(schedule) else schedule, float)
    _require(values.shape == (updates,), f"Give a value for each of the {updates} updates, not shape {values.shape}.")
    (ax,) = new_axes(title=title, axes=ax)
    n = len(ax.lines)
    ax.plot(values, label=label, **line_styles(max(4, n + 1))[n])[0].set(**style)  # also c, ls and other short names
    ax.set(xlabel="update", ylabel=quantity)
    return label_ends(ax) if label else ax


@theme()
def plot_training(loss, learning_rate, momentum=None, *, smoothing=0.97, title=None, axes=None):
    """Draws learning rate, momentum and loss of each update on one shared x axis and returns the axes, the loss last.

    Args:
        loss, learning_rate, momentum: arrays of shape `(updates,)`; without momentum, no panel for it.
        smoothing, title, axes: as in `smooth`; of the figure; one for each panel, in place of a new figure.
    """
    above = {"learning\nrate": learning_rate, "momentum": momentum}
    above = {name: values for name, values in above.items() if values is not None}
    shapes = [np.shape(values) for values in (loss, *above.values())]
    _require(set(shapes) == {(np.size(loss) or 1,)}, f"Shapes {shapes}: each of them needs one value for each update.")
    smoothed, heights = smooth(loss, smoothing), [1] * len(above) + [2]
    axes = new_axes(len(heights), height=2.8 + 1.4 * len(above), heights=heights, title=title, axes=axes)
    for ax, name in zip(axes, above):
        ax.plot(above[name], color=INK)
        ax.set_ylabel(name)
    axes[-1].plot(loss, **FAINT)
    axes[-1].plot(smoothed, color=INK)
    set_loss_axis(axes[-1], "training loss\n(grey: each update)")
    return axes


def set_loss_axis(ax, label):
    """Labels axes of a loss over updates; in a logarithmic scale where it spans a factor of 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set(xlabel="update", ylabel=label)
    lowest, highest = ax.dataLim.intervaly
    if 0 < 5 * lowest < highest:
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())


@theme()
def plot_range_test(result, ax=None, *, title=None):
    """Draws the loss of a RangeTest over the learning rate, with what it suggests, in `ax` or anew. Returns axes."""
    if not isinstance(result, RangeTest):
        raise TypeError(f"result={result!r}: give what lr_range_test returned.")
    (ax,) = new_axes(height=4.4, title=title, axes=ax)
    log = result.sweep == "exponential"
    ax.set(xlabel="learning rate", ylabel="training loss\n(grey: each update)", xscale="log" if log else "linear")
    if not len(result.lr):
        ax.text(0.5, 0.5, result.stopped, transform=ax.transAxes, ha="center", va="center", wrap=True)
        return ax
    ax.plot(result.lr, result.loss, **FAINT)
    ax.plot(result.lr, result.smoothed, color=INK)
    start, lowest = result.smoothed[: len(result.lr) // 10 + 1].max(), result.smoothed.min()
    if start > lowest:  # what is above broke away: it would flatten the rest
        ax.set_ylim(min(result.loss.min(), lowest) - 0.1 * (start - lowest), start + 0.4 * (start - lowest))
    ax.margins(x=0.02)
    if result.validation_loss is not None:
        ax.plot(result.validation_lr, result.validation_loss, "o", color="black", markersize=4, label="validation")
    marks = {"break": result.break_lr, "diverged": result.diverged_at}
    with contextlib.suppress(ValueError):  # where it suggests nothing, there is nothing to mark
        marks |= zip(("valley", "steepest", "min/10"), result.suggest())
    for name, rate in marks.items():
        if rate is not None:
            ax.axvline(rate, color="0.3", linestyle="--", linewidth=1, label=f"{name}\n{rate:.2g}")
    if result.break_lr is not None:
        low, high = result.bounds()
        ax.axvspan(low, high, color=INK, alpha=0.15, linewidth=0)
        middle = math.sqrt(low * high) if log else (low + high) / 2
        ax.axvline(middle, color=INK, linestyle="", label=f"bounds\n{low:.2g} to {high:.2g}")
    return label_ends(ax)
