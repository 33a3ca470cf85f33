"""Cyclical learning rates for Keras 3, in one file to copy: schedules, an optimizer, the LR range test, pictures.

    Schedules    triangular, triangular2, exp_range, cosine, cosine_restarts, one_cycle, trapezoid:
                 pure functions of the update number
    Optimizer    CLR: SGD whose learning rate and momentum cycle inside the training graph
                 CyclicalLR: the same learning rates for Adam, AdamW and every other Keras optimizer
                 current_values: the learning rate and momentum of the coming update
    Range test   lr_range_test: the learning rates that a model tolerates, found without leaving a trace in it
    Plots        plot_schedule, plot_training, plot_range_test

Words: an *update* (or *iteration*) is one step of the optimizer, counted from 0. *bounds* are the lowest and
the highest learning rate, *momentum_bounds* the momentum at each of the two, and *steps* is the number of
updates in HALF a cycle (the "stepsize" of Smith 2017, arXiv:1506.01186, section 3).

It needs numpy and Keras, and for the pictures matplotlib and seaborn. Importing it changes no setting.
"""

import contextlib
import functools
import inspect
import itertools
import math
import numbers
import random
import sys
import threading
import warnings
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

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
    """The triangle with its amplitude multiplied by gamma**iteration; the lower bound stays.

    In Smith's paper both bounds decline; the callbacks that made the name popular, and this function, shrink the
    amplitude only. The exponent counts from the start of training, not of the cycle.

    Source: Smith 2017, arXiv:1506.01186, section 3; github.com/bckenstler/CLR.

    Args:
        gamma: factor per update, in (0, 1].
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


def cosine_restarts(iteration, bounds, steps, factor=1):
    """From bounds[1] by half a cosine towards bounds[0], which the update of the restart would reach; and again.

    The first fall takes 2 * steps updates: a whole cycle, as of the other schedules.

    Source: Loshchilov & Hutter 2017, arXiv:1608.03983, section 3 (2 * steps is their T_0, factor their T_mult).

    Args:
        factor: each fall is this many times as long as the one before; an int of at least 1.
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor={factor!r}: give the growth of the falls as an int of at least 1.")
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
        peak: where the top is, as a share of the run. The default is the middle of what the tail leaves.
        tail: share of the run for the fall below bounds[0]. With tail=0 the descent leads straight from the top to
            the final value, as the default of fastai and PyTorch does.
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

    iteration = xp.minimum(iteration, last)
    end = final * low
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
        warmup: share of the run for the straight rise from bounds[0]. With warmup=0 it starts at the top.
        decay: share of the run for the fall; at least the last update.
        final: the last value as a fraction of bounds[0]; 0 for a fall to nothing.
        shape: of the fall: "linear", or "1-sqrt", which falls fast at first and slowly at the end.
    """
    _check_run({"warmup": warmup, "decay": decay}, final, shape, ("linear", "1-sqrt"))
    xp, iteration = _numbers_of(iteration)
    last = 2 * steps - 1
    foot = min(round((1 - decay) * last), last - 1)  # the last update at the top
    top = min(max(1, round(warmup * last)), max(1, foot)) if warmup else 0
    iteration = xp.minimum(iteration, last)
    rise = _between(xp, bounds, _share(xp, iteration, top)) if top else float(bounds[1])
    fallen = _share(xp, xp.maximum(iteration - foot, 0), last - foot)
    fall = _between(xp, (final * bounds[0], bounds[1]), 1.0 - (xp.sqrt(fallen) if shape == "1-sqrt" else fallen))
    value = xp.where(iteration <= foot, rise, fall)
    return value[()] if xp is np else value


STEP_FUNCTIONS = {
    function.__name__: function
    for function in (triangular, triangular2, exp_range, cosine, cosine_restarts, one_cycle, trapezoid)
}
STEP_FUNCTIONS["one_cycle_cosine"] = functools.partial(one_cycle, shape="cosine")


def _check_run(shares, final, shape, shapes):
    if not (min(shares.values()) >= 0 and sum(shares.values()) <= 1 and 0 <= final <= 1 and shape in shapes):
        given = ", ".join(f"{name}={value!r}" for name, value in {**shares, "final": final, "shape": shape}.items())
        raise ValueError(
            f"{given}: {' and '.join(shares)} are shares of the run, each at least 0 and together at most 1; final is "
            f"in [0, 1], a fraction of bounds[0]; shape is one of {', '.join(shapes)}."
        )


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

    Before `load_weights` into a freshly compiled model call `optimizer.build(model.trainable_variables)`:
    otherwise Keras skips the optimizer's state with a mere warning, and the cycle starts anew. (CLR needs no build.)

    Args:
        bounds: the lowest and the highest learning rate, two finite numbers, 0 <= low <= high.
        steps: updates in half a cycle, a whole number of at least 1 (of one_cycle and trapezoid: in half of the
            run). With gradient_accumulation_steps=k Keras counts batches, not updates: give k times as many.
        step_function: a name from STEP_FUNCTIONS, or any callable f(iteration, bounds, steps) -> value built from
            arithmetic and keras.ops, or a functools.partial of one with keyword arguments. To save a model that
            uses your own, decorate it with @keras.saving.register_keras_serializable().

    Raises:
        ValueError, TypeError: for other arguments.
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

    Both are computed in the training graph, as pure functions of the optimizer's one iteration counter. There
    is no callback and no further state, so a saved model resumes in mid-cycle, and skipped steps (loss scaling)
    do not move the cycle. With learning rate lr and momentum m of the update, gradient g and velocity v:

        v = m * v - lr * g
        w = w + v            (nesterov: w = w + m * v - lr * g)

    This is the form of keras.optimizers.SGD and of Caffe. PyTorch keeps lr outside of v, which is the same
    while lr is constant and differs slightly while it moves.

    `learning_rate` and `momentum` are the values of the coming update. Nothing else can set them: callbacks such as
    ReduceLROnPlateau are refused. Source: Smith 2017, arXiv:1506.01186; momentum: 2018, arXiv:1803.09820, section 4.3.

    Args:
        bounds, steps, step_function: as for CyclicalLR.
        momentum_bounds: the momentum at the lowest and at the highest learning rate, normally falling, as in
            (0.95, 0.85); or one number for a constant momentum. Each in [0, 1). It follows the height of the
            cycle, step_function(i, (0, 1), steps) between 0 and 1, so it rests at the first in a tail below low.
        nesterov: whether to use Nesterov momentum.
        **kwargs: weight_decay (Keras multiplies it by the current learning rate, so it cycles along), clipnorm,
            clipvalue, global_clipnorm, use_ema, ema_momentum, ema_overwrite_frequency, loss_scale_factor and
            gradient_accumulation_steps: as for keras.optimizers.SGD.

    Raises:
        ValueError, TypeError: for other arguments, for a saved state that does not fit, and for setting the rate.
    """

    def __init__(
        self, bounds=(0.01, 3.0), steps=15, momentum_bounds=0.0, step_function="triangular", nesterov=False, **kwargs
    ):
        if "learning_rate" in kwargs or "momentum" in kwargs:
            raise TypeError(
                "CLR takes bounds=(lowest, highest) and momentum_bounds in place of learning_rate and momentum."
            )
        momentum_bounds = _checked_momentum_bounds(momentum_bounds)
        super().__init__(learning_rate=CyclicalLR(bounds, steps, step_function), **{"name": "CLR", **kwargs})
        self.momentum_bounds = momentum_bounds
        self.nesterov = bool(nesterov)
        self._loaded = None  # variables that were loaded before build() has made room for them

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
        height = self._learning_rate.height_at(iteration)
        return _between(ops if ops.is_tensor(height) else np, self.momentum_bounds, height)

    def build(self, variables):
        if self._loaded is not None:  # checked before anything is made, so that a second try is refused as well
            shapes = [tuple(v.shape) for v in variables if not self._overwrite_variable_with_gradient(v)]
            self._check_fits(self._loaded, [(), *shapes * self._slots])
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity") if max(self.momentum_bounds) else []
        if self._loaded is not None:
            with _outside_of_tracing():
                self._restore(self._loaded)
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
            message = "weights saved without optimizer, or not under mixed_float16 as here. The cycle does not resume."
            warnings.warn(f"Nothing in the file for optimizer '{self.name}': {message}", stacklevel=2)
        elif all(v.shape == () and v == 0 for v in saved):  # saved before its first update, maybe unbuilt: as new
            self._loaded = None
            self._restore([np.zeros(v.shape) for v in self.variables])
        elif self.built:
            self._check_fits(saved, [tuple(v.shape) for v in self.variables])
            self._restore(saved)
        else:
            self._check_fits(saved)
            self._loaded = saved
            self._iterations.assign(saved[0])

    def save_own_variables(self, store):
        if self._loaded is None:
            super().save_own_variables(store)
        else:  # not built since: hand on what was loaded
            for i, value in enumerate(self._loaded):
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
            f"{shapes!s:.300}; with {given} there are {here}. Compile with the same settings and "
            "trainable variables. Or take the weights alone and start the cycle anew: compile, "
            "optimizer.build(model.trainable_variables), then load_weights(path, skip_mismatch=True)."
        )

    def _restore(self, values):
        for variable, value in zip(self.variables, values):
            variable.assign(value)

    def get_config(self):
        config = super().get_config()
        del config["learning_rate"]  # made from the three keys of the schedule
        config.update(self._learning_rate.get_config())
        return {**config, "momentum_bounds": list(self.momentum_bounds), "nesterov": self.nesterov}


def current_values(optimizer):
    """The learning rate and the momentum of the coming update, of any Keras optimizer.

    Returns:
        (learning rate, momentum) as floats, the momentum None where there is none (Adam). Those of the inner optimizer
        of a LossScaleOptimizer, which mixed_float16 wraps around yours and which hands on the learning rate only.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    momentum = getattr(optimizer, "momentum", None)
    learning_rate = float(ops.convert_to_numpy(optimizer.learning_rate))
    return learning_rate, None if momentum is None else float(ops.convert_to_numpy(momentum))


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
        if found is None:
            raise ValueError(
                f"step_function={step_function!r} is not known. Known: {', '.join(STEP_FUNCTIONS)}. Pass one of your "
                "own itself, or decorate it with @keras.saving.register_keras_serializable() before loading the model."
            )
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


def _pair(values):
    """The two numbers in values as floats, NaNs for anything else, such as text that float() would take."""
    values = list(values) if isinstance(values, (list, tuple)) or np.ndim(values) == 1 else []
    fits = len(values) == 2 and all(isinstance(v, numbers.Real) for v in values)
    return (float(values[0]), float(values[1])) if fits else (math.nan, math.nan)


def _checked_bounds(bounds):
    low, high = _pair(bounds)
    if not 0 <= low <= high < math.inf:
        raise ValueError(
            f"bounds={bounds!r}: give the lowest and the highest learning rate as two finite numbers with "
            "0 <= low <= high, for example bounds=(0.001, 0.01)."
        )
    return low, high


def _checked_momentum_bounds(momentum_bounds):
    constant = isinstance(momentum_bounds, numbers.Real)
    at_low, at_high = _pair([momentum_bounds] * 2 if constant else momentum_bounds)
    if not (0 <= at_low < 1 and 0 <= at_high < 1):
        raise ValueError(
            f"momentum_bounds={momentum_bounds!r}: give the momentum at the lowest and at the highest learning rate, "
            "each in [0, 1), for example momentum_bounds=(0.95, 0.85), or one number for a constant momentum."
        )
    return at_low, at_high


def _checked_steps(steps):
    whole = isinstance(steps, numbers.Real) and not isinstance(steps, bool) and steps == steps // 1
    if not whole or not 1 <= steps < 2**30:  # two of them must fit the int32 counter of JAX and torch
        raise ValueError(
            f"steps={steps!r}: give the updates in half a cycle as a whole number of at least 1 (and below 2**30), "
            "for example steps=2 * len(x_train) // batch_size."
        )
    return int(steps)


def _outside_of_tracing():
    """Where assignments happen now, not in a function that TensorFlow is tracing."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.init_scope()
    return contextlib.nullcontext()


# ---------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------


class LossPerUpdate(keras.callbacks.Callback):
    """Keeps the loss of every update in `losses`: the mean over that batch, before the update.

    Keras reports the running mean since the start of the epoch. To get the loss of one batch the metrics are reset
    before each, so the epoch's line in `History` is that of its last batch: use `model.evaluate`. Needs
    `compile(steps_per_execution=1)`, the default, and raises ValueError at the start of training without.
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
    """Exponential mean of an array, bias-corrected so that the first values are not drawn towards 0. Shape as given.

    Args:
        smoothing: share of the past in the mean, in [0, 1).
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing={smoothing!r}: it is the share of the past in the mean, in [0, 1).")
    mean, smoothed = 0.0, []
    for n, value in enumerate(values, start=1):
        mean = smoothing * mean + (1 - smoothing) * value
        smoothed.append(mean / (1 - smoothing**n))
    return np.array(smoothed)


# ---------------------------------------------------------------------------------------------------------
# BatchNorm
# ---------------------------------------------------------------------------------------------------------


def settle_batch_norm(model, x, batch_size=128):
    """Estimates the running statistics of a model's BatchNormalization layers anew, at the weights it has now.

    In training BatchNorm uses the mean and variance of each batch; everywhere else their running means, which are those
    of weights that have moved on since. After high learning rates, or for averaged weights, the two can be far apart,
    and a good network tests badly. Here each statistic becomes its mean over the batches of x. Nothing else in the
    model changes: weights, optimizer and the states of dropout stay.

    Args:
        model: a built keras.Model.
        x: training inputs, an array (samples, ...); some thousand samples will do. They are taken in their order.
        batch_size: samples of a batch, as in the training; what is left at the end is not used.

    Raises:
        ValueError: if the model has no BatchNormalization layer that is trainable, or x is less than one batch.

    Source: Izmailov and others 2018, arXiv:1803.05407, section 3.2, where averaged weights need it.
    """
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    layers = [layer for layer in layers if layer.trainable]
    if not layers:
        raise ValueError(f"model {model.name!r} has no trainable BatchNormalization layer: there is nothing to settle.")
    if len(x) < batch_size:
        raise ValueError(
            f"x holds {len(x)} samples, less than one batch of {batch_size}: give more, or a smaller batch."
        )
    own = {id(v) for layer in layers for v in layer.non_trainable_variables}
    others = [
        (v, ops.convert_to_numpy(ops.convert_to_tensor(v))) for v in model.non_trainable_variables if id(v) not in own
    ]
    momenta = [layer.momentum for layer in layers]
    try:
        for k in range(len(x) // batch_size):
            for layer in layers:
                layer.momentum = k / (k + 1)  # of the running mean: what makes it the plain mean of k + 1 batches
            model(x[k * batch_size : (k + 1) * batch_size].astype(keras.config.floatx()), training=True)
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
        for variable, value in others:
            variable.assign(value)


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
# Plots
#
# Seaborn and matplotlib are imported where they draw: schedules and the optimizer work without them, and sooner.
# ---------------------------------------------------------------------------------------------------------

# For seaborn.set_theme(**THEME). Text stays legible where a figure is shrunk to the width of a phone.
RC = {"axes.spines.right": False, "axes.spines.top": False, "grid.color": ".9"}
RC |= {"font.family": ["DejaVu Sans"], "lines.linewidth": 2}
THEME = {"context": "notebook", "font_scale": 1.1, "style": "whitegrid", "palette": "colorblind", "rc": RC}
FIGURE_WIDTH = 6.4  # inches, for every figure
DASHES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 0.6)), (0, (8, 2, 2, 2)))
INK, FAINT = "indigo", {"color": "0.75", "linewidth": 0.6}  # a curve alone; each update behind the smoothed loss


@contextlib.contextmanager
def theme():
    """THEME while the context lasts, and matplotlib's settings as they were after it. Also a decorator."""
    import seaborn as sns

    with sns.axes_style(THEME["style"], RC), sns.plotting_context(THEME["context"], THEME["font_scale"], RC):
        yield


@theme()
def new_axes(rows=1, columns=1, *, title=None, height=3.6, heights=None):
    """A flat array of `rows * columns` axes with a shared x axis, in one theme and of one width.

    Args:
        title: what the figure shows; wrapped to its width.
        height: of the figure, in inches.
        heights: of the rows, relative to each other.
    """
    import matplotlib.pyplot as plt

    layout = {"figsize": (FIGURE_WIDTH, height), "height_ratios": heights, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, sharex=True, sharey=columns > 1, squeeze=False, **layout)
    axes[0, 0].locator_params(axis="x", nbins=6 // columns + 1)
    _write_title(figure, title)
    return axes.flatten()


def _write_title(figure, title):
    if title:
        figure.suptitle(title, x=0.01, ha="left", wrap=True, fontsize="medium")


def line_styles(n):
    """`n` styles for `ax.plot`: shades of one hue, the darkest first (they keep their order in grey), and DASHES."""
    import seaborn as sns

    shades = sns.light_palette(INK, n + 1 + n // 2, reverse=True)
    return [{"color": shades[i], "linestyle": DASHES[i % len(DASHES)]} for i in range(n)]


@theme()
def label_ends(ax):
    """Writes the labels of lines where they end, beside the axes and clear of each other, in place of a legend.

    Curves are labelled on the right, vertical lines on top. A second call replaces what the first one wrote.
    """
    from matplotlib.transforms import Affine2D

    def place(n, lines, along, beside):  # in pixels. Asked for at every drawing: limits may have changed
        shown = [line.get_transform().transform(line.get_xydata()) for line in lines]
        tips = np.array([xy[np.isfinite(xy).all(1)][-1] for xy in shown]).clip(ax.bbox.min, ax.bbox.max)
        if beside:
            point, texts = ax.figure.dpi / 72, [line.get_label().split("\n") for line in lines]
            sizes = [(0.6 * max(map(len, rows)) + 0.4, 1.2 * len(rows))[along] * 11 * point for rows in texts]
            tips[:, along] = _spread(tips[:, along], np.array(sizes), ax.bbox.min[along], ax.bbox.max[along])
            tips[:, 1 - along] = ax.bbox.max[1 - along] + 14 * point
        return Affine2D().translate(*tips[n])

    for text in [text for text in ax.texts if text.get_gid() == "end"]:
        text.remove()
    sides = [], []  # on top the labels share the room along x (axis 0), on the right along y (axis 1)
    for line in ax.lines:
        x = line.get_xydata()[:, 0]
        if not line.get_label().startswith("_") and np.isfinite(line.get_xydata()).all(1).any():
            sides[0 if len(x) > 1 and np.ptp(x) == 0 else 1].append(line)
    for along, lines in enumerate(sides):
        text = {"ha": ("center", "left")[along], "va": ("bottom", "center")[along], "fontsize": 11, "gid": "end"}
        leader = {"arrowstyle": "-", "relpos": ((0.5, 0), (0, 0.5))[along], "shrinkA": 1, "shrinkB": 0}
        for n, line in enumerate(lines):
            tip, end = (lambda _, of=(n, lines, along, beside): place(*of) for beside in (False, True))
            text |= {"xycoords": tip, "textcoords": end, "arrowprops": {**leader, "color": line.get_color()}}
            ax.annotate(line.get_label(), (0, 0), (0, 0), **text)
    return ax


def _spread(centres, lengths, low, high):
    """Centres for intervals of these lengths from low to high: as given, moved apart where they would overlap."""
    order = np.argsort(centres, kind="stable")
    centres, lengths = centres[order], lengths[order]
    for _ in range(300):
        push = 0.45 * np.maximum((lengths[1:] + lengths[:-1]) / 2 - np.diff(centres), 0)
        centres = centres + np.append(0, push) - np.append(push, 0)
        centres = np.clip(centres, low + lengths / 2, np.maximum(high - lengths / 2, low + lengths / 2))
    return centres[np.argsort(order)]


@theme()
def plot_schedule(schedule, updates, *, quantity="learning rate", label=None, title=None, ax=None, **style):
    """Draws a learning rate or a momentum over `updates` updates and returns the axes.

    Args:
        schedule: a CLR, a CyclicalLR, an array of values, one per update, or a function of an integer array.
        quantity: `"learning rate"` or `"momentum"`; the label of the y axis.
        label: written where the line ends. Call again with the same `ax` to compare.
        title: of the figure.
        ax: axes to draw into, in place of a new figure.
        **style: for `ax.plot`.
    """
    if quantity not in ("learning rate", "momentum"):
        raise ValueError(f"quantity={quantity!r}: it can be 'learning rate' or 'momentum'.")
    if not isinstance(updates, numbers.Integral) or updates < 1:
        raise ValueError(f"updates={updates!r}: give the number of updates to draw, a whole number of at least 1.")
    if quantity == "momentum" and isinstance(schedule, CyclicalLR):
        raise ValueError(f"schedule={schedule!r} has no momentum; a CLR has, and so may an array or a function.")
    if isinstance(schedule, CLR):
        schedule = schedule.learning_rate_at if quantity == "learning rate" else schedule.momentum_at
    elif isinstance(schedule, CyclicalLR):
        schedule = schedule.at
    values = np.asarray(schedule(np.arange(updates)) if callable(schedule) else schedule, float)
    if values.shape != (updates,):
        raise ValueError(f"schedule gives values of shape {values.shape}, expected one for each of {updates} updates.")
    ax = new_axes()[0] if ax is None else ax
    _write_title(ax.figure, title)
    n = len(ax.lines)
    ax.plot(values, label=label, **line_styles(max(4, n + 1))[n] | style)
    ax.set(xlabel="update", ylabel=quantity)
    return label_ends(ax)


@theme()
def plot_training(loss, learning_rate, momentum=None, *, smoothing=0.97, title=None, axes=None):
    """Draws learning rate, momentum and loss of each update on one shared x axis and returns the axes, the loss last.

    Args:
        loss, learning_rate: arrays of shape `(updates,)`.
        momentum: the same, or `None` for an optimizer without: it has no panel then.
        smoothing: share of the past in the smoothed loss, as in `smooth`.
        title: of the figure.
        axes: one for each panel, in place of a new figure.
    """
    panels = {"loss": loss, "learning\nrate": learning_rate, "momentum": momentum}
    panels = {name: np.asarray(values, float) for name, values in panels.items() if values is not None}
    if {values.shape for values in panels.values()} != {(panels["loss"].size or 1,)}:
        raise ValueError(
            f"Shapes {[values.shape for values in panels.values()]}: loss, learning_rate and momentum need one value "
            "for each update, as learning_rate_at(np.arange(len(loss))) of the optimizer gives them."
        )
    smoothed, above = smooth(panels.pop("loss"), smoothing), len(panels)
    axes = new_axes(above + 1, height=2.8 + 1.4 * above, heights=[1] * above + [2]) if axes is None else axes
    _write_title(axes[0].figure, title)
    for ax, name in zip(axes, panels):
        ax.plot(panels[name], color=INK)
        ax.set_ylabel(name)
    axes[-1].plot(loss, **FAINT)
    axes[-1].plot(smoothed, color=INK)
    _set_loss_axis(axes[-1], "training loss\n(grey: each update)")
    return axes


def _set_loss_axis(ax, name):
    from matplotlib.ticker import LogLocator, NullFormatter

    ax.set(xlabel="update", ylabel=name)
    lowest, highest = ax.dataLim.intervaly
    if 0 < 5 * lowest < highest:
        ax.set_yscale("log")
        ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter())


@theme()
def plot_range_test(result, ax=None, *, title=None):
    """Draws loss against learning rate, with what the result suggests, and returns the axes.

    Args:
        result: the RangeTest of `lr_range_test`. The y axis ends a little above its loss at the start.
        ax: axes to draw into, in place of a new figure.
        title: of the figure.
    """
    if not isinstance(result, RangeTest):
        raise TypeError(f"result={result!r}: give what lr_range_test returned.")
    ax = new_axes(height=4.4)[0] if ax is None else ax
    _write_title(ax.figure, title)
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
    valley, steepest, minimum, _ = result.suggest()
    marks = {"min/10": minimum, "steepest": steepest, "valley": valley}
    for name, rate in {**marks, "break": result.break_lr, "diverged": result.diverged_at}.items():
        if rate is not None:
            ax.axvline(rate, color="0.3", linestyle="--", linewidth=1, label=f"{name}\n{rate:.2g}")
    if result.break_lr is not None:
        low, high = result.bounds()
        ax.axvspan(low, high, color=INK, alpha=0.15, linewidth=0)
        middle = math.sqrt(low * high) if log else (low + high) / 2
        ax.axvline(middle, color=INK, linestyle="", label=f"bounds\n{low:.2g} to {high:.2g}")
    return label_ends(ax)
