"""CLR and CyclicalLR against loops in numpy, against keras.optimizers.SGD, and across every way to save and load."""

import contextlib
import copy
import functools
import json
import math
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from reference import (
    BATCH,
    CUT,
    GRADIENTS,
    HIGH,
    LOW,
    MOMENTA,
    RATES,
    START,
    STEPS,
    UPDATES,
    X,
    Y,
    cyclic_training,
    momentum_at,
    numpy_training,
    numpy_update,
    smith,
)

import clr_utils
from clr_utils import CLR, CyclicalLR, current_values

# ------------------------------------------------------------------------------------------------ helpers


def new_clr(**options):
    return CLR(**{"bounds": (LOW, HIGH), "steps": STEPS, "momentum_bounds": MOMENTA, **options})


def new_model(optimizer, **options):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False)])
    model.set_weights([START])
    model.compile(optimizer, "mse", **options)
    return model


def train(model, first=0, last=UPDATES, **options):
    part = slice(first * BATCH, last * BATCH)
    return model.fit(X[part], Y[part], batch_size=BATCH, shuffle=False, verbose=0, **options)


def weights(model):
    return model.get_weights()[0]


def walk(optimizer, gradients=GRADIENTS, start=1.0):
    """The weights after each update of a variable that gets these gradients."""
    variable = keras.Variable(np.full(gradients.shape[1:], start, "float32"))
    path = []
    for gradient in gradients:
        optimizer.apply([ops.convert_to_tensor(gradient)], [variable])
        path.append(variable.numpy())
    return np.array(path)


def rate_and_momentum(optimizer):
    return float(optimizer.learning_rate), float(optimizer.momentum)


@contextlib.contextmanager
def no_warning_about_the_optimizer():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [str(w.message) for w in caught if "optimizer" in str(w.message)] == []


def register(function):
    return keras.saving.register_keras_serializable(package="tests")(function)


@register
def sawtooth(iteration, bounds, steps):
    share = ops.cast(ops.convert_to_tensor(iteration) % steps, "float32") / steps
    return bounds[0] + (bounds[1] - bounds[0]) * share


def unregistered(iteration, bounds, steps):
    return sawtooth(iteration, bounds, steps)


# --------------------------------------------------------------------------------------------- trajectories


@pytest.mark.parametrize("how", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}], ids=str)
@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
def test_trajectory_is_that_of_the_numpy_loop(nesterov, how):
    model = new_model(new_clr(nesterov=nesterov), **how)
    path = []
    keep = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: path.append(weights(model)))
    train(model, callbacks=[keep])
    np.testing.assert_allclose(path, cyclic_training(nesterov=nesterov), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", RATES)
def test_each_step_function_sets_rate_and_momentum_of_each_update(name):
    path = walk(new_clr(step_function=name))
    w, v = np.ones(4), np.zeros(4)
    for i, gradient in enumerate(GRADIENTS):
        rate = RATES[name](i)
        w, v = numpy_update(w, v, gradient, rate, momentum_at(i, name), False)
        np.testing.assert_allclose(path[i], w, rtol=0, atol=2e-6)


@pytest.mark.parametrize("momentum_bounds", [MOMENTA, 0.0])
def test_update_step_alone_makes_the_update_of_the_counter(momentum_bounds):
    clr, variable = new_clr(momentum_bounds=momentum_bounds), keras.Variable([1.0])
    clr.build([variable])
    w, v = 1.0, 0.0
    for i in (3, 4):
        clr.iterations.assign(i)
        clr.update_step(ops.convert_to_tensor([2.0]), variable, clr.learning_rate)
        momentum = momentum_at(i) if momentum_bounds else 0.0
        w, v = numpy_update(w, v, 2.0, RATES["triangular"](i), momentum)
        assert float(variable[0]) == pytest.approx(w, rel=1e-6)


def test_momentum_sits_at_its_second_bound_when_the_cosine_restarts():
    clr = CLR((0.1, 1.0), 10, (0.95, 0.85), functools.partial(clr_utils.cosine_restarts, factor=2))
    starts = np.array([0, 20, 60, 140])
    np.testing.assert_array_equal(clr.momentum_at(starts), [0.85] * 4)
    np.testing.assert_array_equal(clr.learning_rate_at(starts), [1.0] * 4)
    assert (clr.momentum_at(starts[1:] - 1) > 0.94).all()


def test_momentum_rests_at_its_first_bound_in_the_tail_of_one_cycle():
    clr = CLR((0.1, 1.0), 50, (0.95, 0.85), "one_cycle")
    assert clr.learning_rate_at(99) == 0.1 / 1000
    assert clr.momentum_at(99) == 0.95 and clr.momentum_at(95) == 0.95
    assert clr.momentum_at(round(0.45 * 99)) == 0.85
    between = clr.momentum_at(np.arange(100))
    assert between.min() == 0.85 and between.max() == 0.95


def test_triangular2_momentum_swings_less_with_the_rate():
    clr = CLR((0.1, 1.0), 10, (0.95, 0.85), "triangular2")
    np.testing.assert_allclose(clr.momentum_at(np.array([0, 10, 20, 30, 50])), [0.95, 0.85, 0.95, 0.9, 0.925])


def test_momentum_0_needs_no_velocities_and_is_plain_gradient_descent():
    clr = new_clr(momentum_bounds=0)
    path = walk(clr)
    assert [v.shape for v in clr.variables] == [()]  # the counter alone
    rates = np.array([RATES["triangular"](i) for i in range(UPDATES)])
    np.testing.assert_allclose(path, 1 - np.cumsum(rates[:, None] * GRADIENTS, axis=0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("momenta", [(0.0, 0.9), (0.9, 0.0)])
def test_momentum_may_be_0_at_one_end_only(momenta):
    path = walk(new_clr(momentum_bounds=momenta))
    w, v = np.ones(4), np.zeros(4)
    for i, gradient in enumerate(GRADIENTS):
        rate = RATES["triangular"](i)
        w, v = numpy_update(w, v, gradient, rate, momentum_at(i, momenta=momenta), False)
    np.testing.assert_allclose(path[-1], w, rtol=0, atol=2e-6)


def test_one_number_as_momentum_bounds_is_a_constant_momentum():
    clr = new_clr(momentum_bounds=0.9)
    assert clr.momentum_bounds == (0.9, 0.9)
    np.testing.assert_array_equal(clr.momentum_at(np.arange(50)), np.full(50, 0.9))
    np.testing.assert_array_equal(walk(clr), walk(new_clr(momentum_bounds=(0.9, 0.9))))


def test_a_constant_momentum_asks_no_step_function():
    def geometric(iteration, bounds, steps):
        low, high = bounds
        return low * (high / low) ** clr_utils.triangular(iteration, (0.0, 1.0), steps)

    for momentum in (0.0, 0.9):
        clr = new_clr(momentum_bounds=momentum, step_function=geometric)
        np.testing.assert_array_equal(clr.momentum_at(np.arange(50)), np.full(50, momentum))
        assert np.isfinite(walk(clr)).all()


def test_the_call_of_the_blog_post():
    clr = CLR([0.0005, 0.002], momentum_bounds=[0.95, 0.8], steps=40)
    assert clr.learning_rate_at(0) == clr.learning_rate_at(80) == 0.0005
    assert clr.learning_rate_at(40) == 0.002
    assert clr.learning_rate_at(20) == pytest.approx(0.00125)
    assert (clr.momentum_at(0), clr.momentum_at(40)) == (0.95, 0.8)
    np.testing.assert_allclose(clr.momentum_at(np.array([20, 60])), 0.875)


def test_the_defaults_are_those_of_the_blog_post():
    clr = CLR()
    assert (clr.learning_rate_at(0), clr.learning_rate_at(15), clr.learning_rate_at(30)) == (0.01, 3.0, 0.01)
    assert clr.momentum_at(15) == 0 and not clr.nesterov and clr.name == "CLR"
    model = new_model(clr)
    train(model, 0, 3)
    expected = numpy_training(lambda i: 0.01 + 2.99 * smith(i, 15), lambda i: 0.0, updates=3)
    np.testing.assert_allclose(weights(model), expected[-1], rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------ reading the current values


def test_current_values_before_during_and_after_training():
    model = new_model(new_clr())
    seen = []
    keep = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(rate_and_momentum(model.optimizer))
    )
    assert rate_and_momentum(model.optimizer) == pytest.approx((LOW, MOMENTA[0]))
    train(model, 0, 20, callbacks=[keep])
    expected = [(RATES["triangular"](i), momentum_at(i)) for i in range(21)]
    np.testing.assert_allclose(seen, expected[:20], rtol=1e-6)
    assert rate_and_momentum(model.optimizer) == pytest.approx(expected[20])
    assert current_values(model.optimizer) == rate_and_momentum(model.optimizer)


def test_values_at_any_update_are_numbers_for_an_int_and_arrays_for_an_array():
    clr = new_clr()
    iterations = np.arange(40)
    rates = clr.learning_rate_at(iterations)
    np.testing.assert_allclose(rates, [RATES["triangular"](i) for i in iterations], rtol=1e-12)
    np.testing.assert_allclose(clr.momentum_at(iterations), [momentum_at(i) for i in iterations], rtol=1e-12)
    for at in (clr.learning_rate_at, clr.momentum_at):
        assert at(iterations).shape == (40,)
        assert isinstance(at(5), float) and at(5) == at(iterations)[5]


def test_current_values_look_through_the_loss_scale_optimizer(mixed_float16):
    model = new_model(new_clr())
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)  # Keras wraps it by itself
    assert current_values(model.optimizer) == pytest.approx((LOW, MOMENTA[0]))
    train(model, 0, 5)
    updates = int(model.optimizer.iterations)
    assert 0 < updates <= 5  # the loss scale starts so high that the first ones are skipped
    rate = RATES["triangular"](updates)
    assert current_values(model.optimizer) == pytest.approx((rate, momentum_at(updates)))


@pytest.mark.parametrize(
    "optimizer, expected",
    [
        (lambda: keras.optimizers.SGD(0.25, momentum=0.5), (0.25, 0.5)),
        (lambda: keras.optimizers.Adam(0.25), (0.25, None)),
        (lambda: keras.optimizers.Adam(CyclicalLR((0.25, 1.0), 4)), (0.25, None)),
    ],
)
def test_current_values_of_other_optimizers(optimizer, expected):
    assert current_values(optimizer()) == expected


SETTINGS = [
    lambda: CyclicalLR((LOW / 10, HIGH / 10), STEPS),
    lambda: keras.optimizers.schedules.CosineDecay(0.1, 10),
    lambda: 0.1,
    lambda: keras.Variable(0.1),
    lambda: lambda: 0.1,
]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_nothing_else_can_set_the_learning_rate(tmp_path, setting, policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = new_model(new_clr())
    finally:
        keras.config.set_dtype_policy("float32")
    value = setting()
    with pytest.raises(TypeError, match="compile with a new CLR") as error:
        model.optimizer.learning_rate = value
    assert f"learning_rate={value!r}" in str(error.value) and "keras.optimizers.SGD" in str(error.value)
    train(model, 0, 3)  # and all is as it was
    model.save(tmp_path / "m.keras")
    updates = int(model.optimizer.iterations)
    assert current_values(model.optimizer)[0] == pytest.approx(RATES["triangular"](updates))


class PatientReducer(keras.callbacks.ReduceLROnPlateau):
    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "loss-scaled"])
@pytest.mark.parametrize(
    "callback",
    [
        lambda: keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate),
        lambda: keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=1000),
        lambda: PatientReducer(monitor="loss", patience=1000),
    ],
    ids=["scheduler", "plateau", "subclass"],
)
def test_callbacks_that_set_the_rate_are_refused_in_the_first_epoch(callback, wrapped):
    optimizer = keras.optimizers.LossScaleOptimizer(new_clr(), initial_scale=1.0) if wrapped else new_clr()
    model, finished = new_model(optimizer), []
    count = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: finished.append(epoch))
    with pytest.raises(TypeError, match="CLR computes its learning rate") as error:
        train(model, callbacks=[callback(), count], epochs=3)
    assert finished == []
    assert "ReduceLROnPlateau" in str(error.value) and "keras.optimizers.SGD" in str(error.value)


def test_callbacks_may_read_the_rate_at_the_end_of_an_epoch():
    model, seen = new_model(new_clr()), []
    read = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: seen.append(float(model.optimizer.learning_rate)))
    train(model, 0, 10, epochs=2, callbacks=[read])
    np.testing.assert_allclose(seen, [RATES["triangular"](10), RATES["triangular"](20)], rtol=1e-6)


@pytest.mark.parametrize("start", [2**24 // 2000 * 2000, 2**31 // 2000 * 2000 - 2000])
def test_rates_stay_exact_where_float32_cannot_count(start):
    assert start + 2000 > 2**24
    clr = CLR((0.001, 0.1), 1000, (0.95, 0.85))
    variable = keras.Variable([0.0])
    clr.build([variable])
    for i in [start, start + 1, start + 333, start + 999, start + 1000, start + 1001, start + 1999]:
        height = 1 - abs(i % 2000 - 1000) / 1000
        clr.iterations.assign(i)
        clr.velocities[0].assign([0.0])
        variable.assign([0.0])
        assert rate_and_momentum(clr) == pytest.approx((0.001 + 0.099 * height, 0.95 - 0.1 * height), rel=3e-7)
        clr.apply([ops.convert_to_tensor([1.0])], [variable])
        assert float(variable[0]) == pytest.approx(-(0.001 + 0.099 * height), rel=3e-7)
        assert int(clr.iterations) == i + 1


# ------------------------------------------------------------------------------------- everything SGD can do

# With both bounds equal CLR must be keras.optimizers.SGD, whatever else is asked for.
OPTIONS = [
    {},
    {"clipnorm": 0.15},
    {"clipvalue": 0.05},
    {"global_clipnorm": 0.15},
    {"weight_decay": 0.1},
    {"use_ema": True, "ema_momentum": 0.9, "ema_overwrite_frequency": 5},
    {"gradient_accumulation_steps": 3},
    {"loss_scale_factor": 8.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "nesterov"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_with_equal_bounds_it_is_sgd(momentum, nesterov, options):
    sgd = keras.optimizers.SGD(0.1, momentum=momentum, nesterov=nesterov, **options)
    clr = CLR((0.1, 0.1), 5, momentum, nesterov=nesterov, **options)
    expected = walk(sgd, GRADIENTS[:12])
    # Otherwise the option did nothing, and nothing is tested.
    if options:
        plain = walk(keras.optimizers.SGD(0.1, momentum=momentum, nesterov=nesterov), GRADIENTS[:12])
        assert np.abs(plain - expected).max() > 1e-3
    np.testing.assert_allclose(walk(clr, GRADIENTS[:12]), expected, rtol=0, atol=1e-7)


def test_weight_decay_cycles_with_the_rate():
    path = walk(new_clr(momentum_bounds=0.0, weight_decay=0.5), np.zeros((10, 1), "float32"))
    expected = np.cumprod([1 - 0.5 * RATES["triangular"](i) for i in range(10)])
    np.testing.assert_allclose(path[:, 0], expected, rtol=2e-6)


def test_exclude_from_weight_decay_is_obeyed():
    clr = new_clr(weight_decay=0.5)
    kernel, bias = keras.Variable([1.0], name="kernel"), keras.Variable([1.0], name="bias")
    clr.exclude_from_weight_decay(var_names=["bias"])
    clr.build([kernel, bias])
    clr.apply([ops.zeros(1), ops.zeros(1)], [kernel, bias])
    assert float(bias[0]) == 1 and float(kernel[0]) == pytest.approx(1 - 0.5 * LOW)


def test_with_gradient_accumulation_the_counter_counts_batches():
    every, updates = 4, 15
    path = walk(new_clr(gradient_accumulation_steps=every))
    w, v = np.ones(4), np.zeros(4)
    for k in range(updates):
        rate = RATES["triangular"](k * every + every - 1)
        gradient = GRADIENTS[k * every : (k + 1) * every].mean(axis=0)
        before = w
        w, v = numpy_update(w, v, gradient, rate, momentum_at(k * every + every - 1), False)
        np.testing.assert_allclose(path[k * every : (k + 1) * every - 1], [before] * (every - 1), rtol=0, atol=2e-6)
        np.testing.assert_allclose(path[(k + 1) * every - 1], w, rtol=0, atol=2e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients_of_an_embedding_are_treated_as_sgd_does(momentum):
    keras.utils.set_random_seed(0)
    words = np.random.default_rng(1).integers(0, 9, (80, 2))  # word 9 never occurs
    target = np.sin(words.sum(axis=1, keepdims=True)).astype("float32")
    layers = keras.Sequential([keras.Input((2,)), keras.layers.Embedding(10, 3), keras.layers.Flatten()])
    layers.add(keras.layers.Dense(1))
    after = []
    for optimizer in (keras.optimizers.SGD(0.1, momentum=momentum), CLR((0.1, 0.1), 5, momentum)):
        model = keras.models.clone_model(layers)
        model.set_weights(layers.get_weights())
        model.compile(optimizer, "mse")
        model.fit(words, target, batch_size=8, epochs=2, shuffle=False, verbose=0)
        after.append(model.get_weights())
    for ours, theirs, start in zip(after[1], after[0], layers.get_weights()):
        assert np.abs(theirs - start).max() > 1e-2
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)  # threads may sum in any order
    np.testing.assert_array_equal(after[1][0][9], layers.get_weights()[0][9])


def test_a_frozen_layer_stays_and_the_others_train_as_before():
    def two_layers(optimizer):
        model = keras.Sequential(
            [keras.Input((3,)), keras.layers.Dense(3, use_bias=False), keras.layers.Dense(2, use_bias=False)]
        )
        model.set_weights([np.eye(3, dtype="float32"), START])
        model.layers[0].trainable = False
        model.compile(optimizer, "mse")
        return model

    model = two_layers(new_clr())
    train(model)
    np.testing.assert_array_equal(model.get_weights()[0], np.eye(3))
    np.testing.assert_allclose(model.get_weights()[1], cyclic_training()[-1], rtol=0, atol=2e-6)


def test_a_variable_without_gradient_is_left_alone():
    clr = new_clr()
    used, unused = keras.Variable([1.0]), keras.Variable([1.0])
    clr.build([used, unused])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of it, as it should
        clr.apply([ops.ones(1), None], [used, unused])
    assert float(used[0]) == pytest.approx(1 - LOW) and float(unused[0]) == 1


def test_a_step_skipped_for_an_overflow_does_not_move_the_cycle():
    inner = new_clr()
    scaled = keras.optimizers.LossScaleOptimizer(inner, initial_scale=4.0)
    variable = keras.Variable([1.0])
    scaled.apply([ops.convert_to_tensor([4.0])], [variable])
    before = float(variable[0]), rate_and_momentum(inner)
    for bad in (np.inf, np.nan):
        scaled.apply([ops.convert_to_tensor(np.array([bad], "float32"))], [variable])
    assert (float(variable[0]), rate_and_momentum(inner)) == before
    assert int(inner.iterations) == 1
    scaled.apply([ops.convert_to_tensor([1.0])], [variable])  # the scale is 1 by now
    assert int(inner.iterations) == 2
    w, v = 1.0, 0.0
    for i in range(2):
        rate = RATES["triangular"](i)
        w, v = numpy_update(w, v, 1.0, rate, momentum_at(i), False)
    assert float(variable[0]) == pytest.approx(w, rel=1e-6)


def test_the_step_function_is_called_once_when_traced_and_not_once_per_update():
    # The post found that its method "runs once": it must, and the values must change all the same.
    calls = []

    def counting(iteration, bounds, steps):
        calls.append(1)
        return clr_utils.triangular(iteration, bounds, steps)

    model = new_model(new_clr(step_function=counting))
    train(model, 0, 1)
    traced = len(calls)
    train(model, 1, UPDATES)
    assert len(calls) == traced
    np.testing.assert_allclose(weights(model), cyclic_training()[-1], rtol=0, atol=2e-6)


# --------------------------------------------------------------------------------------------- save and load


def trained_until_cut(**options):
    model = new_model(new_clr(**options))
    train(model, 0, CUT)
    return model


@functools.cache
def _uninterrupted(options):
    model = trained_until_cut(**dict(options))
    train(model, CUT, UPDATES)
    return weights(model)


def uninterrupted(**options):
    return _uninterrupted(tuple(sorted(options.items())))


@pytest.fixture(scope="module")
def saved_weights(tmp_path_factory):
    """A function that gives a file with the weights of a model trained until CUT, made once for each optimizer."""
    folder = tmp_path_factory.mktemp("saved")

    @functools.cache
    def save(options):
        path = folder / f"{len(list(folder.iterdir()))}.weights.h5"
        trained_until_cut(**dict(options)).save_weights(path)
        return path

    return lambda **options: save(tuple(sorted(options.items())))


def test_a_saved_model_resumes_in_mid_cycle(tmp_path):
    trained_until_cut().save(tmp_path / "m.keras")
    with no_warning_about_the_optimizer():
        model = keras.models.load_model(tmp_path / "m.keras")
    assert int(model.optimizer.iterations) == CUT
    assert rate_and_momentum(model.optimizer) == pytest.approx((RATES["triangular"](CUT), momentum_at(CUT)))
    train(model, CUT, UPDATES)
    np.testing.assert_array_equal(weights(model), uninterrupted())
    np.testing.assert_allclose(weights(model), cyclic_training()[-1], rtol=0, atol=2e-6)


OPTIMIZERS = [{}, {"momentum_bounds": 0.0}, {"nesterov": True, "use_ema": True}, {"gradient_accumulation_steps": 2}]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("built", [False, True], ids=["unbuilt", "built"])
def test_saved_weights_resume_in_mid_cycle(saved_weights, built, options):
    path = saved_weights(**options)
    model = new_model(new_clr(**options))
    model.set_weights([np.zeros((3, 2))])
    if built:
        model.optimizer.build(model.trainable_variables)
    with no_warning_about_the_optimizer():
        model.load_weights(path)
        assert int(model.optimizer._iterations) == CUT
        assert float(model.optimizer.learning_rate) == pytest.approx(RATES["triangular"](CUT))
        train(model, CUT, UPDATES)
    np.testing.assert_array_equal(weights(model), uninterrupted(**options))


def test_saved_weights_resume_in_a_custom_loop_that_builds_the_optimizer_while_traced(saved_weights):
    tf = pytest.importorskip("tensorflow")
    model = new_model(new_clr())
    model.load_weights(saved_weights())
    optimizer = model.optimizer
    assert not optimizer.built

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    for i in range(CUT, UPDATES):
        step(X[i * BATCH : (i + 1) * BATCH], Y[i * BATCH : (i + 1) * BATCH])
    assert int(optimizer.iterations) == UPDATES
    np.testing.assert_allclose(weights(model), cyclic_training()[-1], rtol=0, atol=2e-6)


def test_saved_weights_resume_in_mid_cycle_in_half_precision(tmp_path, mixed_float16):
    first = trained_until_cut()
    first.save_weights(tmp_path / "m.weights.h5")
    updates, scale = int(first.optimizer.iterations), float(first.optimizer.dynamic_scale)
    assert updates % STEPS
    train(first, CUT, UPDATES)

    model = new_model(new_clr())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns that the loss scale starts anew: that one is not ours
        model.load_weights(tmp_path / "m.weights.h5")
    assert int(model.optimizer.iterations) == updates
    assert current_values(model.optimizer)[0] == pytest.approx(RATES["triangular"](updates))
    model.optimizer.build(model.trainable_variables)
    model.optimizer.dynamic_scale.assign(scale)
    train(model, CUT, UPDATES)
    np.testing.assert_array_equal(weights(model), weights(first))


def test_a_model_saved_in_half_precision_resumes_in_mid_cycle(tmp_path, mixed_float16):
    first = trained_until_cut()
    first.save(tmp_path / "m.keras")
    train(first, CUT, UPDATES)
    model = keras.models.load_model(tmp_path / "m.keras")
    train(model, CUT, UPDATES)
    np.testing.assert_array_equal(weights(model), weights(first))


def test_loaded_state_survives_another_save_before_the_first_update(tmp_path, saved_weights):
    model = new_model(new_clr())
    model.load_weights(saved_weights())
    model.save_weights(tmp_path / "m.weights.h5")
    model = new_model(new_clr())
    model.load_weights(tmp_path / "m.weights.h5")
    train(model, CUT, UPDATES)
    np.testing.assert_array_equal(weights(model), uninterrupted())


def test_a_counter_set_after_loading_stays(tmp_path, saved_weights):
    model = new_model(new_clr())
    model.load_weights(saved_weights())
    model.optimizer.iterations.assign(0)  # the cycle anew, the weights and velocities as loaded
    model.save_weights(tmp_path / "m.weights.h5")
    train(model, 0, 1)
    assert int(model.optimizer.iterations) == 1
    again = new_model(new_clr())
    again.load_weights(tmp_path / "m.weights.h5")
    assert int(again.optimizer.iterations) == 0
    train(again, 0, 1)
    np.testing.assert_array_equal(weights(again), weights(model))


def test_a_model_frozen_after_its_training_says_how_to_load_it(tmp_path):
    model = new_model(new_clr())
    train(model, 0, CUT)
    model.layers[0].trainable = False
    model.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"load_model\(path, compile=False\)"):
        keras.models.load_model(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras", compile=False)
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), model.predict(X, verbose=0))


def test_the_file_loaded_last_counts(tmp_path, saved_weights):
    new_model(new_clr()).save_weights(tmp_path / "untrained.weights.h5")
    model = new_model(new_clr())
    model.load_weights(saved_weights())
    model.load_weights(tmp_path / "untrained.weights.h5")
    train(model)
    np.testing.assert_allclose(weights(model), cyclic_training()[-1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_a_model_saved_before_any_training_can_be_loaded_and_trained(tmp_path, options):
    new_model(new_clr(**options)).save(tmp_path / "m.keras")
    with no_warning_about_the_optimizer():
        model = keras.models.load_model(tmp_path / "m.keras")
    train(model, 0, CUT)
    train(model, CUT, UPDATES)
    np.testing.assert_array_equal(weights(model), uninterrupted(**options))


def test_weights_saved_before_any_training_can_be_loaded_and_trained(tmp_path):
    new_model(new_clr()).save_weights(tmp_path / "m.weights.h5")
    model = new_model(new_clr())
    model.set_weights([np.zeros((3, 2))])
    with no_warning_about_the_optimizer():
        model.load_weights(tmp_path / "m.weights.h5")
    train(model)
    np.testing.assert_allclose(weights(model), cyclic_training()[-1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_weights_saved_before_any_training_take_a_trained_model_back_to_the_start(tmp_path, options):
    new_model(new_clr(**options)).save_weights(tmp_path / "m.weights.h5")
    model = trained_until_cut(**options)
    model.load_weights(tmp_path / "m.weights.h5")
    train(model, 0, CUT)
    train(model, CUT, UPDATES)
    np.testing.assert_array_equal(weights(model), uninterrupted(**options))


@contextlib.contextmanager
def policy(name):
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("updates", [0, CUT])
@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
@pytest.mark.parametrize("way", ["model", "weights", "weights, built"])
def test_saved_in_half_precision_it_resumes_under_float32(tmp_path, way, options, updates):
    with policy("mixed_float16"):
        first = new_model(keras.optimizers.LossScaleOptimizer(new_clr(**options), initial_scale=1.0))
        # As compile() leaves it: the optimizer in the file is CLR, the variables are those of both.
        first._compile_config.config["optimizer"] = first.optimizer.inner_optimizer
        if updates:
            train(first, 0, updates)
        first.save(tmp_path / "m.keras")
        first.save_weights(tmp_path / "m.weights.h5")
    with no_warning_about_the_optimizer():
        if way == "model":
            model = keras.models.load_model(tmp_path / "m.keras")
        else:
            model = new_model(new_clr(**options))
            if "built" in way:
                model.optimizer.build(model.trainable_variables)
            model.load_weights(tmp_path / "m.weights.h5")
    assert type(model.optimizer) is CLR and int(model.optimizer._iterations) == updates
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    if updates:
        for ours, saved in zip(model.optimizer.variables, first.optimizer.inner_optimizer.variables, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(saved))
    train(model, updates, updates + 5)
    assert int(model.optimizer._iterations) == updates + 5


def test_compiled_in_half_precision_by_keras_itself_it_is_served_under_float32(tmp_path):
    with policy("mixed_float16"):
        first = trained_until_cut()
        first.save(tmp_path / "m.keras")
        updates = int(first.optimizer.iterations)
    model = keras.models.load_model(tmp_path / "m.keras")
    assert type(model.optimizer) is CLR and int(model.optimizer.iterations) == updates > 0
    np.testing.assert_array_equal(model.predict(X, verbose=0), first.predict(X, verbose=0))


@pytest.mark.parametrize("new", [lambda: keras.optimizers.SGD(0.1, momentum=0.9), new_clr], ids=["SGD", "CLR"])
def test_a_file_without_the_state_of_the_optimizer_is_loaded_with_a_warning(tmp_path, new):
    first = new_model(new())
    train(first, 0, CUT)
    first.save(tmp_path / "full.keras")
    first.optimizer = None
    first.save_weights(tmp_path / "m.weights.h5")
    model = new_model(new())
    with policy("mixed_float16"), pytest.warns(UserWarning, match="optimizer"):
        full = keras.models.load_model(tmp_path / "full.keras")  # Keras wraps a LossScaleOptimizer around it
    with pytest.warns(UserWarning, match=f"optimizer '{model.optimizer.name}'"):
        model.load_weights(tmp_path / "m.weights.h5")
    for loaded in (full, model):
        np.testing.assert_array_equal(weights(loaded), weights(first))
        assert int(loaded.optimizer.iterations) == 0
        train(loaded, 0, 5)


# What was saved, what loads it, and whether the file shows without the model that it does not fit.
MISMATCHES = [
    ({"momentum_bounds": 0.0}, {}, True),
    ({}, {"momentum_bounds": 0.0}, True),
    ({}, {"use_ema": True}, True),
    ({"use_ema": True, "gradient_accumulation_steps": 2}, {"use_ema": True}, True),
    ({"gradient_accumulation_steps": 2}, {}, False),
]


@pytest.mark.parametrize("built", [False, True], ids=["unbuilt", "built"])
@pytest.mark.parametrize("saved, loading, shown", MISMATCHES, ids=str)
def test_state_that_does_not_fit_is_an_error_each_time(saved_weights, saved, loading, shown, built):
    model = new_model(new_clr(**loading), run_eagerly=True)
    if built:
        model.optimizer.build(model.trainable_variables)
    attempts = [functools.partial(model.load_weights, saved_weights(**saved))] * 2
    if not built and not shown:
        attempts.pop()()
        attempts = [lambda: train(model, 0, 1)] * 2
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"optimizer\.build\(.*skip_mismatch=True") as error:
            attempt()
        given = ", ".join(f"{name}={getattr(new_clr(**loading), name)}" for name in ("momentum_bounds", "use_ema"))
        assert given in str(error.value) and "same settings" in str(error.value)


def test_the_state_of_another_optimizer_or_model_is_an_error_that_names_the_shapes(tmp_path):
    sgd = new_model(keras.optimizers.SGD(0.1, momentum=0.9))
    train(sgd, 0, 2)
    sgd.save_weights(tmp_path / "m.weights.h5")
    model = new_model(new_clr())
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError) as error:
        model.load_weights(tmp_path / "m.weights.h5")
    assert "3 variables: [(), (), (3, 2)]" in str(error.value) and "2: [(), (3, 2)]" in str(error.value)


@pytest.mark.parametrize("saved, loading", [mismatch[:2] for mismatch in MISMATCHES], ids=str)
@pytest.mark.filterwarnings("ignore:A total of")  # Keras says what it skipped
def test_skip_mismatch_takes_the_weights_alone_and_starts_the_cycle_anew(saved_weights, saved, loading):
    first = new_model(new_clr(**saved))
    first.load_weights(saved_weights(**saved))
    assert np.abs(weights(first) - START).max() > 0.1
    model, fresh = (new_model(new_clr(**loading), run_eagerly=True) for _ in range(2))
    model.optimizer.build(model.trainable_variables)  # unbuilt, it cannot know every time
    model.load_weights(saved_weights(**saved), skip_mismatch=True)
    np.testing.assert_array_equal(weights(model), weights(first))
    fresh.set_weights(first.get_weights())
    for m in (model, fresh):
        train(m, 0, 5)
    assert int(model.optimizer._iterations) == 5
    np.testing.assert_array_equal(weights(model), weights(fresh))


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has no MultiOptimizer")
def test_inside_a_multi_optimizer_it_trains_and_resumes_as_alone(tmp_path):
    def two_layers(optimizer):
        dense = functools.partial(keras.layers.Dense, use_bias=False)
        model = keras.Sequential([keras.Input((3,)), dense(3, name="first"), dense(2, name="second")])
        model.set_weights([np.eye(3, dtype="float32"), START])
        model.compile(optimizer, "mse")
        return model

    def slow_clr():
        return new_clr(bounds=(LOW / 10, HIGH / 10))

    alone = two_layers(slow_clr())
    train(alone)
    parts = keras.optimizers.OptimizerMap(slow_clr(), {".*first/kernel": slow_clr()})
    model = two_layers(keras.optimizers.MultiOptimizer(parts))
    train(model, 0, CUT)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    for m in (model, loaded):
        train(m, CUT, UPDATES)
        for ours, expected in zip(m.get_weights(), alone.get_weights()):
            np.testing.assert_array_equal(ours, expected)
    for callback in (
        keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate),
        keras.callbacks.ReduceLROnPlateau(),
    ):
        with pytest.raises(TypeError, match="CLR computes"):
            train(model, 0, 2, callbacks=[callback])


def test_with_cyclical_lr_a_built_adam_resumes_in_mid_cycle(tmp_path):
    def model_with_adam():
        return new_model(keras.optimizers.Adam(CyclicalLR((LOW, HIGH), STEPS, "cosine")))

    first = model_with_adam()
    train(first, 0, CUT)
    first.save_weights(tmp_path / "m.weights.h5")
    first.save(tmp_path / "m.keras")
    train(first, CUT, UPDATES)
    from_file = keras.models.load_model(tmp_path / "m.keras")
    from_weights = model_with_adam()
    from_weights.optimizer.build(from_weights.trainable_variables)
    from_weights.load_weights(tmp_path / "m.weights.h5")
    for model in (from_file, from_weights):
        assert float(model.optimizer.learning_rate) == pytest.approx(RATES["cosine"](CUT), rel=1e-6)
        train(model, CUT, UPDATES)
        np.testing.assert_array_equal(weights(model), weights(first))


# ---------------------------------------------------------------------------------------------------- config

CONFIGS = [
    lambda: CLR(),
    lambda: new_clr(
        nesterov=True, weight_decay=0.1, clipnorm=1.0, use_ema=True, ema_overwrite_frequency=3, name="mine"
    ),
    lambda: new_clr(step_function="one_cycle_cosine", gradient_accumulation_steps=4, loss_scale_factor=2.0),
    lambda: CLR(np.array([0.1, 0.2], "float32"), np.int64(9), np.float32(0.5), clr_utils.triangular2),
    lambda: new_clr(step_function=functools.partial(clr_utils.exp_range, gamma=0.99)),
    lambda: new_clr(step_function=functools.partial(functools.partial(clr_utils.one_cycle, tail=0.2), peak=0.3)),
    lambda: new_clr(step_function=sawtooth),
    lambda: new_clr(step_function="tests>sawtooth"),
    lambda: new_clr(step_function=functools.partial(sawtooth)),
    lambda: CyclicalLR((0.1, 0.2), 5, "triangular2"),
    lambda: CyclicalLR((0.1, 0.2), 5, functools.partial(clr_utils.one_cycle, shape="cosine", peak=0.3)),
]


@pytest.mark.parametrize("make", CONFIGS)
def test_config_is_json_and_makes_the_same_again(make):
    first = make()
    config = first.get_config()
    config = json.loads(json.dumps(config))
    before = copy.deepcopy(config)
    for _ in range(2):  # a second time, because the first must not have changed the config
        second = type(first).from_config(config)
        assert config == before
        assert second.get_config() == before
        for at in ("at", "learning_rate_at", "momentum_at"):
            if hasattr(first, at):
                i = np.arange(30)
                np.testing.assert_array_equal(getattr(second, at)(i), getattr(first, at)(i))


@pytest.mark.parametrize("make", CONFIGS)
def test_keras_serialization_round_trip(make):
    first = make()
    kind = keras.optimizers if isinstance(first, CLR) else keras.optimizers.schedules
    assert kind.deserialize(json.loads(json.dumps(kind.serialize(first)))).get_config() == first.get_config()


def test_config_holds_every_argument():
    options = dict(
        bounds=[0.1, 0.2],
        steps=9,
        momentum_bounds=[0.9, 0.8],
        step_function="cosine",
        nesterov=True,
        weight_decay=0.1,
        clipnorm=1.0,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=True,
        ema_momentum=0.9,
        ema_overwrite_frequency=3,
        loss_scale_factor=2.0,
        gradient_accumulation_steps=4,
        name="mine",
    )
    assert CLR(**options).get_config() == options


def test_a_cloned_model_with_the_optimizers_config_trains_alike():
    model = new_model(new_clr(nesterov=True))
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    clone.compile(CLR.from_config(model.optimizer.get_config()), "mse")
    for m in (model, clone):
        train(m)
    np.testing.assert_array_equal(weights(clone), weights(model))
    np.testing.assert_allclose(weights(clone), cyclic_training(nesterov=True)[-1], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "function, probe",
    [
        (functools.partial(clr_utils.exp_range, gamma=0.9), LOW + (HIGH - LOW) * 0.9**STEPS),
        (functools.partial(clr_utils.one_cycle, peak=0.0), HIGH - 6 / 11 * (HIGH - LOW)),  # top at 1, foot at 12
        (sawtooth, LOW),
    ],
    ids=["exp_range", "one_cycle", "registered"],
)
def test_own_step_functions_survive_a_saved_model(tmp_path, function, probe):
    model = new_model(new_clr(step_function=function))
    train(model, 0, STEPS)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert float(loaded.optimizer.learning_rate) == pytest.approx(probe, rel=1e-6)
    for m in (model, loaded):
        train(m, STEPS, UPDATES)
    np.testing.assert_array_equal(weights(loaded), weights(model))


def test_an_unregistered_function_trains_but_is_not_saved_silently(tmp_path):
    model = new_model(new_clr(step_function=unregistered))
    registered = new_model(new_clr(step_function=sawtooth))
    for m in (model, registered):
        train(m, 0, 10)
    np.testing.assert_array_equal(weights(model), weights(registered))
    for save in (model.optimizer.get_config, lambda: model.save(tmp_path / "m.keras")):
        with pytest.raises(ValueError, match="register_keras_serializable") as error:
            save()
        assert repr(unregistered) in str(error.value)
    model.save_weights(tmp_path / "m.weights.h5")  # weights alone need no function


def test_importing_the_module_changes_no_setting_and_loads_no_plotting():
    program = """
import os, random, sys, warnings
import keras, numpy
def settings():
    return dict(os.environ), random.getstate(), str(numpy.random.get_state()), warnings.filters[:], os.fstat(2).st_ino
before = settings(), {*sys.modules}
import clr_utils
assert before[0] == settings()
assert not {"matplotlib", "seaborn", "pandas", "scipy"} & ({*sys.modules} - before[1])
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=clr_utils.__file__.rpartition("/")[0])


# ------------------------------------------------------------------------------------------------ CyclicalLR


@pytest.mark.parametrize("name", RATES)
def test_cyclical_lr_drives_adam(name):
    gradients = GRADIENTS[: 2 * STEPS + 5]
    path = walk(keras.optimizers.Adam(CyclicalLR((LOW, HIGH), STEPS, name)), gradients)
    w, m, v = np.ones(4), np.zeros(4), np.zeros(4)
    for i, gradient in enumerate(gradients.astype(float)):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        rate = RATES[name](i) * math.sqrt(1 - 0.999 ** (i + 1)) / (1 - 0.9 ** (i + 1))
        w = w - rate * m / (np.sqrt(v) + 1e-7)
        np.testing.assert_allclose(path[i], w, rtol=0, atol=2e-5)


def test_cyclical_lr_has_the_defaults_of_clr():
    ours, clr = CyclicalLR().get_config(), CLR().get_config()
    assert ours == {key: clr[key] for key in ("bounds", "steps", "step_function")}


def test_cyclical_lr_is_the_schedule_of_clr():
    schedule, clr = CyclicalLR((LOW, HIGH), STEPS, "triangular2"), new_clr(step_function="triangular2")
    i = np.arange(50)
    np.testing.assert_array_equal(schedule.at(i), clr.learning_rate_at(i))
    np.testing.assert_allclose([float(schedule(k)) for k in range(50)], schedule.at(i), rtol=1e-6)
    np.testing.assert_allclose(schedule.height_at(i), (schedule.at(i) - LOW) / (HIGH - LOW), atol=1e-12)


def test_the_height_stays_between_0_and_1_where_a_step_function_leaves_its_bounds():
    def beyond(iteration, bounds, steps):
        return bounds[0] + (bounds[1] - bounds[0]) * (iteration - 2)

    schedule = CyclicalLR((LOW, HIGH), STEPS, beyond)
    np.testing.assert_array_equal(schedule.height_at(np.arange(6)), [0, 0, 0, 1, 1, 1])
    clr = new_clr(step_function=beyond)
    np.testing.assert_array_equal(clr.momentum_at(np.arange(6)), [MOMENTA[0]] * 3 + [MOMENTA[1]] * 3)


# ---------------------------------------------------------------------------------------------------- errors

BAD_BOUNDS = [
    (0.3, 0.1),
    (-0.1, 0.1),
    (math.nan, 0.1),
    (0.1, math.nan),
    (0.1, math.inf),
    0.1,
    (0.1,),
    (0.1, 0.2, 0.3),
    (),
    ("a", "b"),
    ("0.1", "0.2"),
    "12",
    (None, 0.1),
    (0.1, 1j),
    None,
]
BAD_STEPS = [0, -1, 1.5, math.nan, math.inf, "40", True, None, 2**30, [3]]
BAD_MOMENTA = [
    1.0,
    -0.1,
    math.nan,
    math.inf,
    (0.9, 1.0),
    (-0.1, 0.9),
    (0.9,),
    (0.9, 0.8, 0.7),
    "00",
    ("0", "0"),
    "high",
    None,
]


@pytest.mark.parametrize(
    "argument, value, remedy",
    [("bounds", v, "0 <= low <= high") for v in BAD_BOUNDS]
    + [("steps", v, "whole number of at least 1") for v in BAD_STEPS]
    + [("momentum_bounds", v, "in [0, 1)") for v in BAD_MOMENTA]
    + [("step_function", v, "triangular, triangular2") for v in ("triangel", "", 3, None, max)],
)
def test_bad_arguments_are_named_with_a_remedy(argument, value, remedy):
    makers = [CLR] if argument == "momentum_bounds" else [CLR, CyclicalLR]
    for make in makers:
        with pytest.raises((ValueError, TypeError)) as error:
            make(**{argument: value})
        assert f"{argument}={value!r}" in str(error.value)
        assert remedy in str(error.value)


@pytest.mark.parametrize("steps", [40, 40.0, np.int32(40), np.float64(40)])
def test_whole_steps_of_any_type_are_fine(steps):
    assert CLR(steps=steps).learning_rate_at(40) == 3.0


@pytest.mark.parametrize(
    "function",
    [lambda: 1, lambda iteration: 1, lambda iteration, bounds, steps, more: 1, lambda *, iteration: 1],
)
def test_a_step_function_with_another_signature_is_refused(function):
    for make in (CLR, CyclicalLR):
        with pytest.raises(TypeError, match=r"f\(iteration, bounds, steps\)") as error:
            make(step_function=function)
        assert repr(function) in str(error.value)


@pytest.mark.parametrize(
    "name, value, other",
    [
        ("bounds", (LOW, HIGH), (0.0, 1.0)),
        ("steps", STEPS, STEPS + 1),
        ("step_function", clr_utils.triangular, "one_cycle"),
    ],
)
def test_the_cycle_can_be_read_but_not_replaced(name, value, other):
    clr = new_clr()
    assert getattr(clr, name) == value
    with pytest.raises(AttributeError):
        setattr(clr, name, other)
    assert getattr(clr, name) == value


@pytest.mark.parametrize("keyword", ["learning_rate", "momentum"])
def test_keywords_of_sgd_that_clr_replaces_are_refused(keyword):
    with pytest.raises(TypeError, match=keyword) as error:
        CLR(**{keyword: 0.1})
    assert "bounds=" in str(error.value) and "momentum_bounds" in str(error.value)


def test_an_unknown_keyword_is_refused():
    with pytest.raises((ValueError, TypeError), match="warmup"):
        CLR(warmup=3)


def test_building_it_again_changes_nothing():
    weight = keras.Variable(np.ones(3, "float32"))
    optimizer = CLR((0.1, 0.1), 5, 0.9)
    optimizer.build([weight])
    optimizer.apply([ops.ones(3)], [weight])
    before = [ops.convert_to_numpy(v).tolist() for v in optimizer.variables]
    optimizer.build([weight])
    assert [ops.convert_to_numpy(v).tolist() for v in optimizer.variables] == before and len(before) == 2
    optimizer.apply([ops.ones(3)], [weight])
    assert np.allclose(ops.convert_to_numpy(weight), 1 - 0.1 - 0.19)


@pytest.mark.parametrize("built", [False, True], ids=["unbuilt", "built"])
def test_more_than_ten_variables_are_loaded_in_their_order(tmp_path, built):
    def deep():
        layers = [keras.layers.Dense(3, use_bias=False) for _ in range(11)]
        model = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(2)])
        model.compile(new_clr(), "mse")
        return model

    first, model = deep(), deep()
    train(first, 0, 3)
    first.save_weights(tmp_path / "m.weights.h5")
    if built:
        model.optimizer.build(model.trainable_variables)
    model.load_weights(tmp_path / "m.weights.h5")
    model.optimizer.build(model.trainable_variables)
    for ours, saved in zip(model.optimizer.variables, first.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(saved))
