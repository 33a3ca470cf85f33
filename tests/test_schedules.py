"""The step functions against values worked out by hand, Smith's formula, and properties that must hold everywhere."""

import functools
import math
import os
import pathlib
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from clr_utils import (
    STEP_FUNCTIONS,
    cosine,
    cosine_restarts,
    exp_range,
    one_cycle,
    trapezoid,
    triangular,
    triangular2,
)

NAMES = sorted(STEP_FUNCTIONS)
ONE_RUN = ["one_cycle", "one_cycle_cosine", "trapezoid"]  # those that end after 2 * steps updates, at 1e-3 * bounds[0]
INT32_MAX = 2**31 - 1
ODD = (0.067, 0.58)  # low + (high - low) is not high, neither in float64 nor in float32


def smith(iteration, bounds, steps):
    """The triangle as Smith and the CLR README write it, in float64."""
    iteration = np.asarray(iteration, np.float64)
    cycle = np.floor(1 + iteration / (2 * steps))
    x = np.abs(iteration / steps - 2 * cycle + 1)
    return bounds[0] + (bounds[1] - bounds[0]) * np.maximum(0, 1 - x)


def eager(function):
    return lambda iteration, bounds, steps: keras.ops.convert_to_numpy(
        function(keras.ops.convert_to_tensor(iteration), bounds, steps)
    )


def compiled(function, **options):
    def run(iteration, bounds, steps):
        traced = tf.function(lambda i: function(i, bounds, steps), **options)
        return traced(tf.constant(iteration)).numpy()

    return run


# Ways to call a step function with an array of iterations, each with the float type of its answer.
WAYS = {
    "int": (lambda f: lambda i, bounds, steps: np.array([f(int(k), bounds, steps) for k in i]), np.float64),
    "array": (lambda f: f, np.float64),
    "tensor": (eager, np.float32),
    "traced": (compiled, np.float32),
    "xla": (functools.partial(compiled, jit_compile=True), np.float32),
}
ways = pytest.mark.parametrize("way", WAYS)

# ---------------------------------------------------------------------------------------------- hand-computed

FULL = dict(peak=0.4, tail=0.2, final=0.1)  # with S = 8: top at 6, foot at 12, end at 15
HAND = [
    (triangular, 4, [1, 1.5, 2, 2.5, 3, 2.5, 2, 1.5, 1, 1.5]),
    (triangular, 1, [1, 3, 1, 3]),
    (triangular2, 2, [1, 2, 3, 2, 1, 1.5, 2, 1.5, 1, 1.25, 1.5, 1.25, 1]),
    (functools.partial(exp_range, gamma=0.5), 2, [1, 1.5, 1.5, 1.125, 1, 1 + 1 / 32, 1 + 2 / 64, 1 + 1 / 128, 1]),
    (functools.partial(exp_range, gamma=1), 2, [1, 2, 3, 2, 1]),
    (cosine, 4, [1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5), 3, 2 + math.sqrt(0.5), 2, 2 - math.sqrt(0.5), 1]),
    (cosine, 3, [1, 1.5, 2.5, 3, 2.5, 1.5, 1]),
    (
        functools.partial(one_cycle, **FULL),
        8,
        [1, 4 / 3, 5 / 3, 2, 7 / 3, 8 / 3, 3, 8 / 3, 7 / 3, 2, 5 / 3, 4 / 3, 1, 0.7, 0.4, 0.1, 0.1, 0.1],
    ),
    (
        functools.partial(one_cycle, shape="cosine", **FULL),
        8,
        # sin(30 deg)**2 = 1/4, sin(45 deg)**2 = 1/2, sin(60 deg)**2 = 3/4
        {0: 1, 2: 1.5, 3: 2, 4: 2.5, 6: 3, 8: 2.5, 9: 2, 10: 1.5, 12: 1, 13: 0.775, 14: 0.325, 15: 0.1, 16: 0.1},
    ),
    (
        functools.partial(one_cycle, peak=0.2, tail=0, final=0.1),  # top at 3, then 12 updates down to the end
        8,
        {0: 1, 1: 5 / 3, 3: 3, 6: 3 - 2.9 / 4, 9: 1.55, 12: 0.1 + 2.9 / 4, 15: 0.1, 16: 0.1, 1000: 0.1},
    ),
    (
        functools.partial(one_cycle, peak=0.3),  # S = 10: top at round(5.7), foot at round(17.1)
        10,
        {0: 1, 3: 2, 6: 3, 7: 3 - 2 / 11, 16: 1 + 2 / 11, 17: 1, 18: 0.5005, 19: 0.001, 20: 0.001},
    ),
    (one_cycle, 10, {0: 1, 3: 5 / 3, 9: 3, 11: 2.5, 13: 2, 17: 1, 18: 0.5005, 19: 0.001, 20: 0.001}),
    (one_cycle, 2, [1, 3, 1, 0.001, 0.001]),
    (one_cycle, 1, [1, 0.001, 0.001]),
    (functools.partial(one_cycle, tail=0), 2, [1, 3, (3 + 0.001) / 2, 0.001, 0.001]),
    # 2 + cos(45 deg) = 2.707, then cos(90), cos(135); the second time cos(22.5), ...
    (cosine_restarts, 2, [3, 2 + math.sqrt(0.5), 2, 2 - math.sqrt(0.5), 3, 2 + math.sqrt(0.5), 2]),
    (
        functools.partial(cosine_restarts, factor=2),  # restarts at 2, 6, 14
        1,
        {0: 3, 1: 2, 2: 3, 3: 2 + math.sqrt(0.5), 5: 2 - math.sqrt(0.5), 6: 3, 8: 2 + math.sqrt(0.5), 10: 2, 14: 3},
    ),
    (functools.partial(cosine_restarts, factor=3), 1, {2: 3, 5: 2, 8: 3, 17: 2, 26: 3, 53: 2, 80: 3}),
    (
        functools.partial(trapezoid, warmup=0.2, decay=0.4, final=0.2),  # S = 8: top from 3, falls from 9 to 15
        8,
        {
            0: 1,
            1: 5 / 3,
            2: 7 / 3,
            3: 3,
            6: 3,
            9: 3,
            10: 3 - 2.8 / 6,
            12: 1.6,
            14: 0.2 + 2.8 / 6,
            15: 0.2,
            16: 0.2,
            99: 0.2,
        },
    ),
    (
        functools.partial(trapezoid, warmup=0, decay=0.6, final=0, shape="1-sqrt"),  # falls from 6 to 15
        8,
        {0: 3, 6: 3, 7: 2, 10: 1, 15: 0, 16: 0},
    ),
    (trapezoid, 1, [1, 0.001, 0.001]),
    (trapezoid, 2, [1, 3, 3, 0.001, 0.001]),
]


@ways
@pytest.mark.parametrize("function, steps, expected", HAND)
def test_hand_computed_values(function, steps, expected, way):
    call, dtype = WAYS[way]
    if not isinstance(expected, dict):
        expected = dict(enumerate(expected))
    values = call(function)(np.array(list(expected)), (1.0, 3.0), steps)
    assert values.dtype == dtype
    np.testing.assert_allclose(values, list(expected.values()), rtol=1e-14 if dtype == np.float64 else 4e-7)


def test_exp_range_default_gamma_is_that_of_the_callback():
    # One peak at iteration 10,000: 0.99994**10000 = exp(10000 * log(0.99994)) = 0.5488017...
    assert exp_range(10_000, (0.0, 1.0), 10_000) == pytest.approx(0.54880175, abs=1e-7)


def test_exp_range_counts_from_the_start_of_training():
    peaks = exp_range(np.array([5, 15, 25]), (0.0, 1.0), 5, gamma=0.9)
    np.testing.assert_allclose(peaks, [0.9**5, 0.9**15, 0.9**25], rtol=1e-13)


def test_names_are_those_of_the_documentation():
    plain = ["cosine", "cosine_restarts", "exp_range", "one_cycle", "trapezoid", "triangular", "triangular2"]
    assert NAMES == sorted([*plain, "one_cycle_cosine"])
    assert all(STEP_FUNCTIONS[name].__name__ == name for name in plain)
    iterations = np.arange(20)
    np.testing.assert_array_equal(
        STEP_FUNCTIONS["one_cycle_cosine"](iterations, (1, 3), 8), one_cycle(iterations, (1, 3), 8, shape="cosine")
    )


# ------------------------------------------------------------------------------------------------------ exact


@ways
@pytest.mark.parametrize("function", [triangular, cosine])
@pytest.mark.parametrize("steps", [1, 2, 3, 97, 2000])
def test_low_and_high_are_hit_exactly_however_far_the_training_has_come(function, steps, way):
    call, dtype = WAYS[way]
    last_cycle = INT32_MAX // (2 * steps) - 1  # its end is the last that an int32 counter can reach
    past_float32 = 2**24 // (2 * steps) + 1  # float32 has lost the odd numbers here
    cycles = np.array([0, 1, 2, past_float32, past_float32 + 1, last_cycle]) * 2 * steps
    between = {1, steps - 1, steps + 1, 2 * steps - 1} - {0, steps, 2 * steps}
    offsets = np.array([0, steps, 2 * steps, *between])
    iterations = (cycles + offsets[:, None]).astype(np.int32 if way in ("tensor", "xla") else np.int64)
    values = call(function)(iterations.ravel(), ODD, steps).reshape(iterations.shape)
    low, high = map(dtype, ODD)
    for expected, got in zip((low, high, low), values):
        np.testing.assert_array_equal(got, np.full(len(cycles), expected))
    assert (values[3:] > low).all() and (values[3:] < high).all()  # and nowhere else


@ways
@pytest.mark.parametrize("name", NAMES)
def test_first_update_at_the_lower_bound_and_peak_where_promised(name, way):
    call, dtype = WAYS[way]
    steps = 97
    tops = {"one_cycle": 87, "one_cycle_cosine": 87, "trapezoid": 10, "cosine_restarts": 2 * steps}
    first, peak = call(STEP_FUNCTIONS[name])(np.array([0, tops.get(name, steps)]), ODD, steps)
    assert first == dtype(ODD[1 if name == "cosine_restarts" else 0])
    if name == "exp_range":
        assert peak == pytest.approx(ODD[0] + (ODD[1] - ODD[0]) * 0.99994**97, rel=1e-6)
    else:
        assert peak == dtype(ODD[1])


def restarts(steps, factor):
    """The updates that restart, as far as an int32 counter comes: the first cycles and the last."""
    starts, length = [0], 2 * steps
    while starts[-1] + length <= INT32_MAX and len(starts) < 1000:
        starts.append(starts[-1] + length)
        length *= factor
    last = INT32_MAX // length * length if factor == 1 else starts[-1]
    return np.array(sorted({*starts[:40], starts[-1], last}))


@ways
@pytest.mark.parametrize("factor", [1, 2, 3, 10])
@pytest.mark.parametrize("steps", [1, 3, 97, 2000, 2**29 + 1])
def test_cosine_restarts_exactly_at_the_top_and_never_before(steps, factor, way):
    call, dtype = WAYS[way]
    starts = restarts(steps, factor)
    before, after = starts[1:] - 1, starts[starts < INT32_MAX] + 1
    iterations = np.concatenate([starts, before, after]).astype(np.int32 if way in ("tensor", "xla") else np.int64)
    values = call(functools.partial(cosine_restarts, factor=factor))(iterations, ODD, steps)
    assert (values[: len(starts)] == dtype(ODD[1])).all()
    # The last update of the first fall has sin(pi / 4 / steps)**2 of the height left, that of longer ones less.
    left = math.sin(math.pi / 4 / steps) ** 2
    beside = values[len(starts) : len(starts) + len(before)]
    assert (beside <= ODD[0] + (ODD[1] - ODD[0]) * left + 1e-6).all() and (beside >= ODD[0]).all()
    if steps < 2000 and factor == 1:
        assert (values[-len(after) :] < ODD[1]).all()


@pytest.mark.parametrize("factor", [1, 2, 3, 7])
def test_cosine_restarts_is_the_formula_of_the_paper(factor):
    values, length = [], 2 * 5
    while len(values) < 400:
        values += [1 + 2 * (1 + math.cos(math.pi * now / length)) / 2 for now in range(length)]
        length *= factor
    got = cosine_restarts(np.arange(400), (1, 3), 5, factor=factor)
    np.testing.assert_allclose(got, values[:400], rtol=1e-13)


ENDING = [functools.partial(one_cycle, shape=shape, tail=tail) for shape in ("linear", "cosine") for tail in (0.0, 0.1)]
ENDING += [
    functools.partial(trapezoid, shape=shape, decay=decay) for shape in ("linear", "1-sqrt") for decay in (0, 0.2)
]


@ways
@pytest.mark.parametrize("steps", [1, 2, 3, 97, 2000, 2**30 - 1])
@pytest.mark.parametrize("function", ENDING, ids=lambda f: f"{f.func.__name__} {f.keywords}")
def test_a_run_ends_exactly_on_its_final_value_and_stays_there(steps, function, way):
    call, dtype = WAYS[way]
    last = 2 * steps - 1
    iterations = np.array([last, min(last + 1, INT32_MAX), min(4 * steps, INT32_MAX), INT32_MAX, last - 1])
    *values, before = call(function)(iterations, (0.2, 1.7), steps)
    np.testing.assert_array_equal(values, np.full(4, dtype(1e-3 * 0.2)))
    if steps < 2**24:
        assert before > values[0]


@pytest.mark.parametrize("steps", [1, 3, 2000])
def test_triangular2_fades_to_the_lower_bound_without_overflow(steps):
    peaks = np.array([1_000, 2_000, 10**6]) * 2 * steps + steps
    with np.errstate(over="raise", invalid="raise", divide="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(triangular2(peaks, (0.01, 3.0), steps), [0.01] * 3)
        assert triangular2(int(peaks[-1]), (0.01, 3.0), steps) == 0.01
    np.testing.assert_array_equal(eager(triangular2)(peaks, (0.01, 3.0), steps), np.full(3, np.float32(0.01)))


def test_bounds_may_fall_as_those_of_the_momentum_do():
    values = triangular(np.arange(9), (0.95, 0.85), 4)
    np.testing.assert_allclose(values, [0.95, 0.925, 0.9, 0.875, 0.85, 0.875, 0.9, 0.925, 0.95], rtol=1e-14)
    assert values[0] == 0.95 and values[4] == 0.85


# ------------------------------------------------------------------------------------------------- properties

steps_ = st.integers(1, 10**6)
iterations_ = st.lists(st.integers(0, INT32_MAX), min_size=1, max_size=30)
bounds_ = st.tuples(st.floats(0, 1), st.floats(1e-6, 10)).map(lambda b: (b[0], b[0] + b[1]))
names_ = st.sampled_from(NAMES)


@given(steps_, iterations_, bounds_)
@example(3, [INT32_MAX, 2**24 + 1], (0.01, 3.0))
def test_triangular_is_smiths_formula(steps, iterations, bounds):
    # 1e-6 of the height is what the reference loses in float64 near 2**31.
    np.testing.assert_allclose(
        triangular(np.array(iterations), bounds, steps), smith(iterations, bounds, steps), rtol=0, atol=1e-6 * bounds[1]
    )


@given(steps_, st.lists(st.integers(0, 10**5), min_size=1, max_size=30), bounds_)
def test_triangular_is_smiths_formula_to_the_last_digits_where_that_is_precise(steps, iterations, bounds):
    np.testing.assert_allclose(
        triangular(np.array(iterations), bounds, steps),
        smith(iterations, bounds, steps),
        rtol=0,
        atol=1e-10 * bounds[1],
    )


@given(names_, steps_, iterations_, bounds_)
def test_values_stay_within_the_bounds(name, steps, iterations, bounds):
    values = STEP_FUNCTIONS[name](np.array(iterations), bounds, steps)
    lowest = 1e-3 * bounds[0] if name in ONE_RUN else bounds[0]
    assert (values >= lowest).all() and (values <= bounds[1]).all()


@given(names_, steps_, iterations_, bounds_)
def test_int_and_array_agree(name, steps, iterations, bounds):
    function = STEP_FUNCTIONS[name]
    ints = np.array([function(i, bounds, steps) for i in iterations])
    array = function(np.array(iterations), bounds, steps)
    assert array.shape == ints.shape
    np.testing.assert_array_equal(array, ints)


@pytest.mark.parametrize("name", NAMES)
def test_int_and_array_agree_at_every_update_of_a_run(name):
    bounds, steps = (0.0013, 0.77), 997
    iterations = range(5 * steps)
    ints = [STEP_FUNCTIONS[name](i, bounds, steps) for i in iterations]
    np.testing.assert_array_equal(STEP_FUNCTIONS[name](np.array(iterations), bounds, steps), ints)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("iteration", [5, np.int32(5), 10**6])
def test_an_int_gives_a_number(name, iteration):
    # numpy.where, which one_cycle needs, would make an array without dimensions of it.
    assert isinstance(STEP_FUNCTIONS[name](iteration, (0.1, 1), 10), float)


@settings(max_examples=80)  # each traces anew
@given(names_, steps_, iterations_, bounds_, st.sampled_from(["int32", "int64"]), st.sampled_from([eager, compiled]))
@example("cosine", 1000, [2**24 + 1, 2**24 + 3, INT32_MAX], (0.0, 1.0), "int64", eager)
@example("cosine", 1000, [2**24 + 1, 2**24 + 3, INT32_MAX], (0.0, 1.0), "int32", compiled)
def test_tensor_eager_or_traced_agrees_with_array_to_float32(name, steps, iterations, bounds, dtype, way):
    iterations = np.array(iterations)
    tensor = way(STEP_FUNCTIONS[name])(iterations.astype(dtype), bounds, steps)
    array = STEP_FUNCTIONS[name](iterations, bounds, steps)
    assert tensor.dtype == np.float32
    # exp_range: float32 rounds the exponent, iteration * log(gamma), and e**x makes a relative error of that.
    exponent = np.abs(iterations * math.log(0.99994)) if name == "exp_range" else 0
    height = np.maximum(array - bounds[0], 0)
    np.testing.assert_array_less(np.abs(tensor - array), 5e-7 * bounds[1] + 2e-7 * exponent * height + 1e-12)


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_other_backends_agree_with_arrays_too(backend):
    pytest.importorskip(backend)
    program = """
import functools, keras, numpy as np
from clr_utils import STEP_FUNCTIONS, cosine_restarts, trapezoid
doubling, root = functools.partial(cosine_restarts, factor=2), functools.partial(trapezoid, shape="1-sqrt")
iterations = np.array([*range(100), 2**24 + 1, 2**30 - 1, 2**31 - 1], "int32")
for function in [*STEP_FUNCTIONS.values(), doubling, root]:
    at = call = lambda i: function(i, (0.067, 0.58), 7)
    if keras.backend.backend() == "jax":
        import jax
        call = jax.jit(at)
    values = keras.ops.convert_to_numpy(call(keras.ops.convert_to_tensor(iterations)))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, at(iterations), rtol=0, atol=5e-7)
"""
    root = pathlib.Path(__file__).resolve().parent.parent
    environment = {**os.environ, "KERAS_BACKEND": backend}
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, env=environment)


@given(st.sampled_from([triangular, cosine]), steps_, iterations_, bounds_)
def test_triangular_and_cosine_repeat_exactly(function, steps, iterations, bounds):
    iterations = np.array(iterations)
    np.testing.assert_array_equal(
        function(iterations, bounds, steps), function(iterations % (2 * steps), bounds, steps)
    )
    np.testing.assert_array_equal(
        function(iterations, bounds, steps), function(iterations + 2 * steps * 7, bounds, steps)
    )


@given(st.sampled_from([triangular, cosine]), steps_, iterations_, bounds_)
def test_the_way_down_mirrors_the_way_up(function, steps, iterations, bounds):
    position = np.array(iterations) % (2 * steps)
    np.testing.assert_array_equal(function(position, bounds, steps), function(2 * steps - position, bounds, steps))


@given(st.integers(1, 1000), st.integers(0, 10**6), bounds_)
def test_triangular2_halves_the_amplitude_in_each_cycle(steps, iteration, bounds):
    low, high = bounds
    cycle = iteration // (2 * steps)
    expected = (triangular(iteration, bounds, steps) - low) * 0.5 ** min(cycle, 1074)
    assert triangular2(iteration, bounds, steps) - low == pytest.approx(expected, abs=1e-14 * high)


@given(st.integers(1, 1000), st.integers(0, 10**6), bounds_, st.floats(0.9, 1))
def test_exp_range_shrinks_the_amplitude_by_gamma_per_update(steps, iteration, bounds, gamma):
    low, high = bounds
    expected = (triangular(iteration, bounds, steps) - low) * math.pow(gamma, iteration)
    assert exp_range(iteration, bounds, steps, gamma=gamma) - low == pytest.approx(expected, rel=1e-8, abs=1e-14 * high)


@given(st.sampled_from([triangular2, exp_range]), steps_, iterations_, bounds_)
def test_amplitude_never_grows(function, steps, iterations, bounds):
    iterations = np.array(iterations)
    now, later = (function(iterations + k * 2 * steps, bounds, steps) for k in (0, 1))
    assert (later <= now).all()


@given(steps_, iterations_, bounds_)
def test_triangular_moves_in_equal_small_steps(steps, iterations, bounds):
    iterations = np.array(iterations)
    step = np.abs(triangular(iterations + 1, bounds, steps) - triangular(iterations, bounds, steps))
    np.testing.assert_allclose(step, (bounds[1] - bounds[0]) / steps, rtol=0, atol=1e-14 * bounds[1])


# How far one update can move the height of each schedule, in units of 1 / steps.
STEEPEST = {
    "triangular": 1,
    "triangular2": 1,
    "exp_range": 1,  # and a little for the shrinking, below
    "cosine": math.pi / 2,
    "one_cycle": 1 / 0.9,  # the rise is 0.45 of the 2S - 1 updates
    "one_cycle_cosine": math.pi / 2 / 0.9,
}


@given(st.sampled_from(sorted(STEEPEST)), st.integers(2, 10**6), st.integers(0, 2**31), st.integers(-2, 2), bounds_)
@example("triangular2", 10**6, 1, -1, (0.0, 1.0))
@example("one_cycle", 1000, 1, -1, (0.1, 1.0))
def test_no_cycle_jumps(name, steps, cycles, beside, bounds):
    # Where a cycle begins, at its top, and where it ends is where a jump would be.
    for corner in (0, steps, round(0.45 * (2 * steps - 1)), round(0.9 * (2 * steps - 1))):
        iteration = max(0, min(2 * steps * (cycles % (INT32_MAX // (2 * steps))) + corner + beside, INT32_MAX - 1))
        before, after = STEP_FUNCTIONS[name](np.array([iteration, iteration + 1]), bounds, steps)
        rounding = 2.5 / steps  # the corners of one_cycle lie on whole updates
        most = (
            STEEPEST[name] / steps * (1 + (rounding if name.startswith("one_cycle") else 0)) * (bounds[1] - bounds[0])
        )
        if name == "exp_range":
            most += -math.log(0.99994) * (bounds[1] - bounds[0])
        if name.startswith("one_cycle"):  # the tail falls from the lower bound
            most = max(most, bounds[0] / max(1, 0.1 * (2 * steps - 1) - 1) * math.pi / 2)
        assert abs(after - before) <= most * (1 + 1e-9) + 1e-14 * bounds[1]


one_cycle_ = st.fixed_dictionaries(
    {
        "peak": st.floats(0, 1),
        "tail": st.floats(0, 1),
        "final": st.floats(0, 1),
        "shape": st.sampled_from(["linear", "cosine"]),
    }
)


@given(st.integers(1, 300), bounds_, one_cycle_)
@example(1, (0.1, 1.0), dict(peak=1.0, tail=0.0, final=0.0, shape="linear"))
@example(2, (0.1, 1.0), dict(peak=1.0, tail=0.0, final=0.0, shape="linear"))
@example(3, (0.1, 1.0), dict(peak=0.0, tail=1.0, final=0.0, shape="cosine"))
@example(3, (0.1, 1.0), dict(peak=0.5, tail=0.5, final=1.0, shape="linear"))
def test_one_cycle_rises_once_falls_once_and_ends_where_it_should(steps, bounds, options):
    assume(options["peak"] + options["tail"] <= 1)
    low, high = bounds
    run = 2 * steps
    values = one_cycle(np.arange(3 * run), bounds, steps, **options)
    top = int(values[:run].argmax())
    slack = 1e-14 * high
    assert values[0] == low
    assert (np.diff(values[: top + 1]) >= -slack).all()
    assert (np.diff(values[top:]) <= slack).all()
    assert (values[run - 1 :] == options["final"] * low).all()
    assert (values >= options["final"] * low).all() and (values <= high).all()
    room_for_the_top = steps > 1 and round(options["peak"] * (run - 1)) < run - 1  # which the end does not leave
    if room_for_the_top:
        assert values.max() == high
        assert abs(top - options["peak"] * (run - 1)) <= 1


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_one_cycle_has_no_jump_inside_the_run(shape):
    values = one_cycle(np.arange(2000), (0.1, 1.0), 1000, shape=shape)
    # Steepest piece: 0.9 over 0.45 * 1999 updates; a cosine is pi/2 steeper in the middle.
    assert np.abs(np.diff(values)).max() <= 0.9 / (0.45 * 1999 - 1) * math.pi / 2
    assert (values[:-1] > values[-1]).all()


trapezoid_ = st.fixed_dictionaries(
    {
        "warmup": st.floats(0, 1),
        "decay": st.floats(0, 1),
        "final": st.floats(0, 1),
        "shape": st.sampled_from(["linear", "1-sqrt"]),
    }
)


@given(st.integers(2, 300), bounds_, trapezoid_)
@example(2, (0.1, 1.0), dict(warmup=1.0, decay=0.0, final=0.0, shape="linear"))
@example(3, (0.1, 1.0), dict(warmup=0.0, decay=1.0, final=1.0, shape="1-sqrt"))
@example(2, (0.0, 1.0), dict(warmup=1e-9, decay=1.0, final=0.0, shape="linear"))
def test_trapezoid_rises_rests_and_falls_as_long_as_asked(steps, bounds, options):
    assume(options["warmup"] + options["decay"] <= 1)
    (low, high), last = bounds, 2 * steps - 1
    values = trapezoid(np.arange(3 * steps), bounds, steps, **options)
    at_top = np.flatnonzero(values == high)
    assert values[0] == (low if options["warmup"] else high)
    assert values[: at_top[0] + 1].tolist() == sorted(values[: at_top[0] + 1])  # up, once
    assert values[at_top[-1] :].tolist() == sorted(values[at_top[-1] :], reverse=True)  # down, once
    assert (values[at_top[0] : at_top[-1] + 1] == high).all()
    assert abs(at_top[0] - options["warmup"] * last) <= 1
    assert abs(last - at_top[-1] - options["decay"] * last) <= 1 + (options["final"] * low == high)
    assert (values[last:] == options["final"] * low).all()


def test_the_fall_of_the_trapezoid_is_linear_or_1_minus_sqrt():
    # 101 updates at the top, then 99 to the end: final + (high - final) * (1 - sqrt(share of the fall)).
    share = np.arange(100) / 99
    for shape, expected in [("linear", 1 - share), ("1-sqrt", 1 - np.sqrt(share))]:
        values = trapezoid(np.arange(200), (0.0, 1.0), 100, warmup=0, decay=99 / 199, shape=shape)
        np.testing.assert_allclose(values[100:], expected, rtol=0, atol=1e-14)


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("gamma", [0, -0.5, 1.0001, math.nan, math.inf])
def test_exp_range_refuses_gamma_outside_its_range(gamma):
    with pytest.raises(ValueError, match=r"gamma=.*\(0, 1\]") as error:
        exp_range(0, (0, 1), 1, gamma=gamma)
    assert repr(gamma) in str(error.value)


@pytest.mark.parametrize("factor", [0, -1, 1.5, 2.0, math.nan, "2", None])
def test_cosine_restarts_refuses_a_factor_that_is_no_whole_growth(factor):
    with pytest.raises(ValueError, match="int of at least 1") as error:
        cosine_restarts(0, (0, 1), 1, factor=factor)
    assert f"factor={factor!r}" in str(error.value)


@pytest.mark.parametrize("function, start, end", [(one_cycle, "peak", "tail"), (trapezoid, "warmup", "decay")])
@pytest.mark.parametrize(
    "first, second", [(-0.1, 0), (1.1, 0), (math.nan, 0), (0, -0.1), (0, 1.5), (0, math.nan), (0.8, 0.3)]
)
def test_shares_that_make_no_run_are_refused(function, start, end, first, second):
    with pytest.raises(ValueError, match="shares of the run") as error:
        function(0, (0, 1), 10, **{start: first, end: second})
    assert f"{start}={first!r}, {end}={second!r}" in str(error.value)


@pytest.mark.parametrize("function", [one_cycle, trapezoid])
@pytest.mark.parametrize(
    "option, value",
    [("final", -1e-9), ("final", 1.1), ("final", math.nan), ("shape", "cubic"), ("shape", None)],
)
def test_a_final_value_or_shape_that_there_is_not_is_refused(function, option, value):
    with pytest.raises(ValueError, match=r"shape is one of linear, ") as error:
        function(0, (0, 1), 10, **{option: value})
    assert f"{option}={value!r}" in str(error.value)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "iteration", [1.5, 2.0, -1, True, np.float64(3), np.array([0.0, 1.0]), np.array([3, -1]), [1, -2], [0.5], 2 + 0j]
)
def test_iterations_that_are_no_update_numbers_are_refused(name, iteration):
    with pytest.raises(ValueError, match="whole numbers from 0") as error:
        STEP_FUNCTIONS[name](iteration, (0, 1), 10)
    assert repr(np.asarray(iteration))[:10] in str(error.value)


@pytest.mark.parametrize("iteration", [range(5), [0, 1, 2, 3, 4], (0, 1, 2, 3, 4), np.arange(5, dtype=np.uint8)])
def test_lists_ranges_and_small_integer_types_are_fine(iteration):
    # In uint8 arithmetic 2 * 300 would overflow.
    np.testing.assert_array_equal(triangular(iteration, (0, 300), 300), [0, 1, 2, 3, 4])
    tensor = keras.ops.convert_to_tensor(np.array(iteration, "uint8"))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(triangular(tensor, (0, 300), 300)), range(5), atol=1e-4)
