"""Tests of lr_range_test: what it records, what it stops on, what it suggests, and that it leaves no trace."""

import dataclasses
import math
import random

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops

import clr_utils
from clr_utils import CLR, RangeTest, lr_range_test

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(160, 6)).astype("float32")
Y = (X[:, :3].argmax(axis=1)).astype("int32")
QUICK = dict(num_steps=24, batch_size=16, lr_bounds=(1e-4, 1.0))


def network(dropout=0.3, dtype=None):
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, activation="tanh", dtype=dtype),
            keras.layers.BatchNormalization(dtype=dtype),
            keras.layers.Dropout(dropout, dtype=dtype),
            keras.layers.Dense(3, dtype=dtype),
        ]
    )


def loss_function():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(optimizer=None, model=None, **options):
    model = model or network()
    model.compile(
        optimizer or keras.optimizers.SGD(0.05, momentum=0.9), loss_function(), metrics=["accuracy"], **options
    )
    return model


def small():
    """Quicker to trace, where only the data or the outcome matters."""
    return compiled(keras.optimizers.SGD(0.05), keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)]))


def set_seeds(seed):
    from keras.src.backend.common import global_state

    keras.utils.set_random_seed(seed)
    global_state.set_global_attribute("global_seed_generator", None)  # Keras 3.10 leaves it as it is
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tf.random.set_global_generator(tf.random.Generator.from_seed(3))


def bits(variables):
    return [np.array(ops.convert_to_numpy(ops.convert_to_tensor(v))) for v in variables]


def assert_same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other):
        np.testing.assert_array_equal(a, b)


# ---- no trace -------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "clr": lambda: CLR((0.01, 0.1), steps=7, momentum_bounds=(0.95, 0.85)),
    "adam": lambda: keras.optimizers.Adam(0.01),
}


class Plain(keras.Model):
    """Its call takes no training argument, and its loss is its own, in the form of before Keras 3.3."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        return 2.0 * ops.mean(loss_function()(y, y_pred))


def test_a_model_class_with_its_own_loss():
    model = Plain()
    model.compile("sgd")
    result = lr_range_test(model, X[:16], Y[:16], num_steps=10, lr_bounds=(1e-9, 1e-8), batch_size=16)
    np.testing.assert_allclose(result.loss, 2 * float(loss_function()(Y[:16], model(X[:16]))), rtol=1e-5)


class Broken(Exception):
    pass


def breaking(error, good=7):
    for i in range(good):
        random.random(), np.random.rand()  # data that draws from the global states
        yield X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16]
    raise error


def spoilt():
    while True:
        for i in range(10):
            x = X[16 * i : 16 * i + 16].copy()
            x[0, 0] = math.nan if i == 9 else x[0, 0]
            yield x, Y[16 * i : 16 * i + 16]


def endings(monkeypatch):
    """Name, call: the ways in which a test can end."""

    def plain(model):
        assert lr_range_test(model, X, Y, **QUICK).stopped == "It reached the end of the sweep."

    def divergence(model):
        result = lr_range_test(model, X, Y, num_steps=60, lr_bounds=(1e-3, 1e3), stop_factor=1.5, batch_size=16)
        assert "smoothed loss rose" in result.stopped and len(result.lr) < 60 and result.diverged_at == result.lr[-1]

    def nan(model):
        result = lr_range_test(model, spoilt(), **QUICK)
        assert result.stopped == "The loss was nan at update 9." and len(result.loss) == 9

    def exception(model):
        with pytest.raises(Broken, match="half way"):
            lr_range_test(model, breaking(Broken("half way")), **QUICK)

    def interrupt_in_data(model):
        with pytest.raises(KeyboardInterrupt):
            lr_range_test(model, breaking(KeyboardInterrupt()), **QUICK)

    def interrupt_in_training(model):
        def interrupted(loss, *args, **kwargs):
            if len(loss) == 5:
                raise KeyboardInterrupt
            return math.inf

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(clr_utils, "_stop_above", interrupted)
            lr_range_test(model, X, Y, **QUICK)

    return [plain, divergence, nan, exception, interrupt_in_data, interrupt_in_training]


def global_random_draws():
    draws = [random.random(), np.random.rand(), keras.random.normal((3,))]
    layer = keras.layers.Dense(4)
    layer.build((None, 3))
    draws += [layer.kernel]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        draws += [tf.random.uniform((3,)), tf.random.get_global_generator().normal((3,))]
    return [np.array(ops.convert_to_numpy(ops.convert_to_tensor(d))) for d in draws]


def life(optimizer, state, then):
    """Everything that a training shows, with `then(model)` before it; mid-training: after 7 updates."""
    set_seeds(5)
    keras.random.normal((2,))  # brings Keras's global seed into being
    model = compiled(OPTIMIZERS[optimizer]())
    history = None
    if state == "mid-training":
        history = model.fit(X[:112], Y[:112], batch_size=16, verbose=0)
    then(model, history)
    draws = global_random_draws()
    history = model.fit(X, Y, batch_size=16, epochs=2, verbose=0)
    shown = [np.array(v) for v in history.history.values()]
    return draws + shown + bits(model.variables) + bits(model.optimizer.variables)


@pytest.mark.parametrize("state", ["fresh", "mid-training"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_after_it_gives_the_same_bits(optimizer, state, monkeypatch):
    def tested(model, history):
        own = model.optimizer
        before = bits(model.variables), bits(own.variables), own.built
        # A training function and metrics in mid-use, which the test must neither use nor replace.
        functions = model.train_function, model.test_function, model.predict_function
        counted = {id(v): np.array(ops.convert_to_numpy(v)) for m in model.metrics for v in m.variables}
        model.stop_training = "as it was"
        attributes = dict(vars(model))
        states = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
        ways = endings(monkeypatch)
        for ending in ways if state == "mid-training" or optimizer == "clr" else ways[:1] + ways[3:4]:
            ending(model)
            assert_same(before[0], bits(model.variables))
            assert_same(before[1], bits(own.variables))
            assert model.optimizer is own and own.built == before[2]
            assert (model.train_function, model.test_function, model.predict_function) == functions
            assert model.stop_training == "as it was"
            assert vars(model).keys() == attributes.keys() and all(vars(model)[n] is v for n, v in attributes.items())
            assert getattr(model, "history", None) is history
            for m in model.metrics:
                for v in m.variables:
                    value = ops.convert_to_numpy(v)
                    np.testing.assert_array_equal(value, counted.get(id(v), np.zeros_like(value)))
            assert states == (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2])
        model.stop_training = False

    assert_same(life(optimizer, state, lambda model, history: None), life(optimizer, state, tested))


class Heavy(keras.optimizers.Optimizer):
    """Keeps its velocities in a list of its own."""

    def __init__(self, learning_rate=0.05, **options):
        super().__init__(learning_rate=learning_rate, **options)
        self.slots = []

    def build(self, variables):
        if not self.built:
            super().build(variables)
            for variable in variables:
                self.slots.append(self.add_variable_from_reference(variable, "slot"))

    def update_step(self, gradient, variable, learning_rate):
        slot = self.slots[self._get_variable_index(variable)]
        self.assign(slot, ops.add(ops.multiply(0.9, slot), gradient))
        self.assign_sub(variable, ops.multiply(ops.cast(learning_rate, variable.dtype), slot))


def test_the_lists_of_an_optimizer_stay_its_own():
    def trained(test):
        set_seeds(1)
        model = compiled(Heavy())
        if test:
            lr_range_test(model, X, Y, **QUICK)
        model.fit(X, Y, batch_size=16, verbose=0)
        assert len(model.optimizer.slots) == len(model.trainable_variables)
        return bits(model.variables) + bits(model.optimizer.variables)

    assert_same(trained(False), trained(True))


def test_a_model_not_yet_built_trains_the_same(monkeypatch):
    def trained(test):
        set_seeds(1)
        model = keras.Sequential(
            [keras.layers.Dense(4, activation="relu"), keras.layers.Dropout(0.5), keras.layers.Dense(3)]
        )
        model.compile(CLR((0.01, 0.1), 5, 0.9), loss_function())
        if test:
            lr_range_test(model, X, Y, **QUICK)
        return model.fit(X, Y, batch_size=16, verbose=0).history["loss"] + bits(model.variables)

    assert_same(trained(False), trained(True))


def test_state_loaded_into_an_unbuilt_clr_survives(tmp_path):
    model = compiled(CLR((0.01, 0.1), 5, 0.9))
    model.fit(X, Y, batch_size=16, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    other = compiled(CLR((0.01, 0.1), 5, 0.9))
    other.load_weights(tmp_path / "m.weights.h5")
    lr_range_test(other, X, Y, **QUICK)
    other.optimizer.build(other.trainable_variables)
    assert_same(bits(model.optimizer.variables), bits(other.optimizer.variables))


def test_draws_of_the_data_are_taken_back(monkeypatch):
    """Data that draws from every global state."""

    def drawing():
        while True:
            i = np.random.randint(0, 140)
            random.random(), keras.random.normal((2,))
            if BACKEND == "tensorflow":
                tf.random.uniform((2,)), tf.random.get_global_generator().normal((2,))
            yield X[i : i + 16], Y[i : i + 16]

    def draws(test):
        set_seeds(2)
        model = small()
        if test:
            lr_range_test(model, drawing(), **QUICK)
        return global_random_draws()

    if BACKEND == "tensorflow":
        import tensorflow as tf
    assert_same(draws(False), draws(True))


def test_no_more_is_drawn_than_the_test_needs():
    left = iter([(X[:16], Y[:16])] * 30)
    lr_range_test(small(), left, **QUICK)
    assert len(list(left)) == 6


def test_states_that_did_not_exist_do_not_come_into_being(monkeypatch):
    from keras.src.backend.common import global_state

    def drawing():
        while True:
            keras.random.normal((2,))
            yield X[:16], Y[:16]

    model = small()
    if BACKEND == "tensorflow":
        from tensorflow.python.eager import context
        from tensorflow.python.ops import stateful_random_ops

        monkeypatch.delattr(context.context(), "_rng", raising=False)  # as before the first tf.random.set_seed
        monkeypatch.setattr(stateful_random_ops, "global_generator", None)
    global_state.set_global_attribute("global_seed_generator", None)
    lr_range_test(model, drawing() if BACKEND != "tensorflow" else X, None if BACKEND != "tensorflow" else Y, **QUICK)
    assert global_state.get_global_attribute("global_seed_generator") is None


class Auxiliary(keras.Model):
    """With a layer that only the training has."""

    def __init__(self):
        super().__init__()
        self.dense, self.auxiliary = keras.layers.Dense(3), keras.layers.Dense(3)

    def call(self, x, training=False):
        return self.dense(x) + self.auxiliary(x) if training else self.dense(x)


def around(model):
    return keras.Sequential([keras.Input((6,)), model])


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("whole", [lambda model: model, around], ids=["whole", "within"])
def test_layers_that_only_the_training_has_are_left_alone(whole, built):
    def trained(tested):
        keras.utils.set_random_seed(1)
        model = compiled(keras.optimizers.SGD(0.1), whole(Auxiliary()))
        if built:
            model(X[:2])
        if tested:
            lr_range_test(model, X, Y, num_steps=24, lr_bounds=(1e-2, 10.0))
        model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
        return bits(model.trainable_variables)

    if BACKEND == "jax":  # whose `fit` cannot build such a layer
        trained(tested=True)
    else:
        assert_same(trained(tested=True), trained(tested=False))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="the only backend with texts")
def test_a_model_of_texts_need_not_be_built():
    words = keras.layers.TextVectorization(vocabulary=["up", "down"], output_mode="multi_hot")
    model = compiled(keras.optimizers.SGD(0.1), keras.Sequential([words, keras.layers.Dense(3)]))
    result = lr_range_test(model, np.array(["up", "down"])[Y % 2], Y, **QUICK)
    assert len(result.loss) == 24


def test_metrics_of_a_model_within_the_model_keep_their_values():
    class Counting(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.seen = keras.layers.Dense(3), keras.metrics.Sum()

        def call(self, x):
            self.seen.update_state(1.0)
            return self.dense(x)

    counting = Counting()
    model = compiled(keras.optimizers.SGD(0.1), around(counting))
    counting.seen.update_state(3.0)
    before = bits(counting.seen.variables)
    lr_range_test(model, X, Y, **QUICK)
    assert_same(bits(counting.seen.variables), before)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX moves no state of an optimizer but its variables")
def test_a_generator_of_the_optimizer_goes_back():
    class Noisy(keras.optimizers.SGD):
        def __init__(self):
            super().__init__(0.1)
            self.generator = keras.random.SeedGenerator(0)

        def update_step(self, gradient, variable, learning_rate):
            noise = 1e-3 * keras.random.normal(gradient.shape, seed=self.generator)
            super().update_step(gradient + noise, variable, learning_rate)

    model = compiled(Noisy())
    before = bits([model.optimizer.generator.state])
    lr_range_test(model, X, Y, **QUICK)
    assert_same(bits([model.optimizer.generator.state]), before)


def test_a_model_that_names_its_loss_otherwise_is_told():
    class Named(keras.Model):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.tracker = keras.metrics.Mean(name="total_loss")

        @property
        def metrics(self):
            return [self.tracker]

        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            loss = loss_function()(y, y_pred)
            self.tracker.update_state(loss)
            return loss

    inputs = keras.Input((6,))
    model = Named(inputs, keras.layers.Dense(3)(inputs))
    model.compile("sgd")
    with pytest.raises(ValueError, match="reports total_loss: .* the name 'loss'"):
        lr_range_test(model, X, Y, **QUICK)


def test_metric_objects_keep_their_values():
    own, late = keras.metrics.CategoricalAccuracy(), keras.metrics.F1Score()  # the second makes its variables late
    one_hot = np.eye(3, dtype="float32")[Y]
    own.update_state(one_hot[:7], one_hot[:7])
    model = small()
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True), metrics=[own, late])
    before = bits(own.variables)
    assert lr_range_test(model, X, one_hot, **QUICK).accuracy.std() > 0
    assert_same(before, bits(own.variables))
    assert not any(v.any() for v in bits(late.variables))


def test_names_go_on_counting_as_before():
    model = small()
    number = int(keras.layers.Dense(1).name.split("_")[-1])
    lr_range_test(model, X, Y, **QUICK)
    assert int(keras.layers.Dense(1).name.split("_")[-1]) == number + 1


# ---- what it records ------------------------------------------------------------------------------------


def one_weight(optimizer, w=1.0, curvature=1.0):
    """loss = mean(curvature / 2 * (w * x - y)^2); with x = 1 a quadratic of known curvature."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(optimizer, lambda y, p: curvature / 2 * ops.mean(ops.square(p - y)))
    model.layers[0].kernel.assign([[w]])
    return model


def numpy_sweep(x, y, rates, beta):
    w, v, losses = 1.0, 0.0, []
    for lr, a, b in zip(rates, x, y):
        losses.append(0.5 * np.mean((w * a - b) ** 2))
        v = beta * v - lr * np.mean((w * a - b) * a)
        w += v
    return np.array(losses)


@pytest.mark.parametrize("sweep", ["exponential", "linear"])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_losses_are_those_of_each_batch(beta, sweep):
    x, y = RNG.normal(size=(2, 30, 5, 1)).astype("float32")
    model = one_weight(keras.optimizers.SGD(0.7, momentum=beta))
    result = lr_range_test(
        model, iter(list(zip(x, y))), lr_bounds=(1e-3, 0.1), num_steps=30, sweep=sweep, smoothing=0.8
    )
    rates = np.geomspace(1e-3, 0.1, 30) if sweep == "exponential" else np.linspace(1e-3, 0.1, 30)
    np.testing.assert_allclose(result.lr, rates, rtol=1e-12)
    losses = numpy_sweep(x, y, rates, beta)
    np.testing.assert_allclose(result.loss, losses, rtol=2e-5)
    weights = 0.8 ** np.arange(30)[::-1]
    assert result.smoothed[-1] == pytest.approx((losses * weights).sum() / weights.sum(), rel=1e-5)
    assert result.smoothed[0] == pytest.approx(losses[0], rel=1e-5)
    assert result.accuracy is None and result.validation_loss is None and len(result.smoothed) == 30


def test_clr_sweeps_at_the_momentum_of_its_high_rate():
    x, y = RNG.normal(size=(2, 30, 5, 1)).astype("float32")
    batches = list(zip(x, y))
    options = dict(lr_bounds=(1e-3, 0.1), num_steps=30)
    model = one_weight(CLR((0.1, 1.0), 3, momentum_bounds=(0.95, 0.6), step_function=lambda i, b, s: b[0] + 0 * i))
    rates = np.geomspace(1e-3, 0.1, 30)
    np.testing.assert_allclose(
        lr_range_test(model, iter(batches), **options).loss, numpy_sweep(x, y, rates, 0.6), rtol=2e-5
    )
    result = lr_range_test(model, iter(batches), momentum=0.3, **options)
    np.testing.assert_allclose(result.loss, numpy_sweep(x, y, rates, 0.3), rtol=2e-5)


@pytest.mark.parametrize("beta, num_steps, stop_factor, smoothing", [(0.0, 400, 4, 0.5), (0.9, 2000, 30, 0.9)])
def test_finds_the_limit_of_a_noisy_quadratic(beta, num_steps, stop_factor, smoothing):
    curvature = 4.0
    limit = 2 * (1 + beta) / curvature
    targets = np.random.default_rng(1).normal(size=(num_steps, 8, 1)).astype("float32") * 0.1
    model = one_weight(keras.optimizers.SGD(0.1, momentum=beta), curvature=curvature)
    data = ((np.ones_like(t), t) for t in targets)
    options = dict(num_steps=num_steps, sweep="linear", stop_factor=stop_factor, smoothing=smoothing)
    result = lr_range_test(model, data, lr_bounds=(0.01 * limit, 2 * limit), **options)
    assert result.diverged_at == pytest.approx(limit, rel=0.1)


def test_accuracy_of_each_batch_and_sample_weights():
    model = small()
    weights = np.linspace(0, 2, 16).astype("float32")
    batches = [(X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16], weights) for i in range(10)]
    result = lr_range_test(model, iter(batches), num_steps=10, lr_bounds=(1e-9, 1e-8))
    for i, (x, y, _) in enumerate(batches):
        prediction = model.predict(x, verbose=0)
        assert result.accuracy[i] == pytest.approx(np.mean(prediction.argmax(axis=1) == y), rel=1e-5)
        by_sample = keras.losses.sparse_categorical_crossentropy(y, prediction, from_logits=True)
        assert result.loss[i] == pytest.approx(np.mean(ops.convert_to_numpy(by_sample) * weights), rel=1e-4)
    assert len(set(result.accuracy)) > 3


def test_layers_are_in_training_mode():
    batches = [(X[:16], Y[:16])] * 16
    options = dict(num_steps=16, lr_bounds=(1e-9, 1e-8))
    assert len(set(lr_range_test(compiled(), iter(batches), **options).loss)) > 6  # dropout differs each time
    model = compiled(model=network(dropout=0.0))
    expected = float(loss_function()(Y[:16], model(X[:16], training=True)))
    result = lr_range_test(model, iter(batches), validation_data=(X[:16], Y[:16]), **options)
    np.testing.assert_allclose(result.loss, expected, rtol=1e-4)  # the statistics of the batch, not the moving ones
    assert abs(result.validation_loss[0] / expected - 1) > 1e-3


def test_losses_of_layers_count():
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(
        4, kernel_regularizer=keras.regularizers.L2(0.1), activity_regularizer=keras.regularizers.L1(0.1)
    )(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3)(hidden))
    model.compile(keras.optimizers.SGD(0.1), loss_function())
    expected = model.evaluate(X[:16], Y[:16], batch_size=16, verbose=0)
    result = lr_range_test(model, iter([(X[:16], Y[:16])] * 12), num_steps=12, lr_bounds=(1e-9, 1e-8))
    np.testing.assert_allclose(result.loss, expected, rtol=1e-5)


def test_losses_in_16_bits():
    keras.config.set_floatx("bfloat16")
    try:
        options = {"num_steps": 12, "batch_size": 16, "lr_bounds": (1e-4, 1e-2), "validation_data": (X, Y)}
        result = lr_range_test(small(), X, Y, **options)
    finally:
        keras.config.set_floatx("float32")
    assert len(result.loss) == 12 and np.isfinite(np.asarray(result.loss, float)).all()


def test_validation_loss():
    model = compiled()
    result = lr_range_test(
        model, X, Y, validation_data=(X[:50], Y[:50]), num_steps=64, batch_size=16, lr_bounds=(1e-9, 1e-8)
    )
    assert 1 <= len(result.validation_lr) == len(result.validation_loss) <= 20
    assert set(result.validation_lr) <= set(result.lr)
    plain = lr_range_test(model, X, Y, num_steps=64, batch_size=16, lr_bounds=(1e-9, 1e-8))
    np.testing.assert_allclose(plain.loss, result.loss, rtol=1e-5)  # taking it changes nothing
    # BatchNorm's statistics move even at no learning rate, so without them:
    flat = one_weight(keras.optimizers.SGD(0.1))
    x, y = RNG.normal(size=(2, 40, 1)).astype("float32")
    result = lr_range_test(flat, x, y, validation_data=(x, y), num_steps=32, lr_bounds=(1e-9, 1e-8))
    np.testing.assert_allclose(result.validation_loss, np.mean((x - y) ** 2) / 2, rtol=1e-4)


# ---- kinds of data --------------------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.epochs_ended = 0

    def __len__(self):
        return 5

    def __getitem__(self, i):
        return X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16]

    def on_epoch_end(self):
        self.epochs_ended += 1


def tf_dataset(batches=6):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((X[: 16 * batches], Y[: 16 * batches])).batch(16)


def endless():
    while True:
        yield X[:16], Y[:16]


KINDS = {
    "arrays": lambda: (X, Y),
    "short arrays": lambda: (X[:40], Y[:40]),
    "less than a batch": lambda: (X[:7], Y[:7]),
    "tensors": lambda: (ops.convert_to_tensor(X), ops.convert_to_tensor(Y)),
    "doubles": lambda: (X.astype("float64"), Y),
    "tf.data": lambda: (tf_dataset(),),
    "endless tf.data": lambda: (tf_dataset().repeat(),),
    "PyDataset": lambda: (Batches(),),
    "generator": lambda: (endless(),),
    "list of batches": lambda: ([(X[:16], Y[:16]), (X[16:32], Y[16:32])],),
    "loader": lambda: (
        type("Loader", (), {"__iter__": lambda self: iter([(X[:16], Y[:16]), (X[16:32], Y[16:32])])})(),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_is_read_again_or_cut(kind):
    data = KINDS[kind]()
    result = lr_range_test(small(), *data, **QUICK)
    assert len(result.loss) == len(result.lr) == len(result.accuracy) == 24 and np.isfinite(result.loss).all()
    assert result.stopped == "It reached the end of the sweep." and result.diverged_at is None
    if kind == "PyDataset":
        assert data[0].epochs_ended == 0


class Endless(Batches):
    num_batches = None  # and that is what Keras asks


@pytest.mark.parametrize("data", [Endless, lambda: tf_dataset().repeat(), endless])
def test_validation_data_must_end(data, monkeypatch):
    monkeypatch.setattr(clr_utils, "_sweep", lambda *arguments: pytest.fail("it would never end"))
    with pytest.raises(ValueError, match="a finite dataset"):
        lr_range_test(small(), X, Y, validation_data=data(), **QUICK)


def test_validation_data_of_unknown_length_is_read():
    data = tf_dataset().filter(lambda x, y: True)
    assert lr_range_test(small(), X, Y, validation_data=data, num_steps=10).validation_loss.size


def test_a_generator_that_ends_ends_the_test():
    result = lr_range_test(small(), ((X[:16], Y[:16]) for _ in range(13)), **QUICK)
    assert result.stopped == "The data ended after 13 batches." and len(result.loss) == 13


def test_data_without_a_batch_is_said():
    with pytest.raises(ValueError, match="not a single batch"):
        lr_range_test(small(), tf_dataset().filter(lambda x, y: False), **QUICK)


def test_data_that_ended_is_not_blamed_on_the_rate():
    result = lr_range_test(small(), iter([(X[:16], Y[:16])] * 10), **QUICK)
    with pytest.raises(ValueError, match="ended after 10 batches. Give .* can be read again"):
        result.suggest()


def test_sample_and_class_weights_are_those_of_fit():
    model, weights = small(), np.linspace(0, 2, len(X)).astype("float32")
    by_class = {0: 1.0, 1: 0.5, 2: 3.0}
    options = dict(num_steps=10, lr_bounds=(1e-9, 1e-8), batch_size=len(X))
    for weighting in dict(sample_weight=weights), dict(class_weight=by_class):
        expected = weights if "sample_weight" in weighting else np.array([by_class[int(y)] for y in Y])
        losses = keras.losses.sparse_categorical_crossentropy(Y, model(X), from_logits=True)
        expected = np.mean(ops.convert_to_numpy(losses) * expected)
        np.testing.assert_allclose(lr_range_test(model, X, Y, **weighting, **options).loss, expected, rtol=1e-4)
        if "class_weight" in weighting:
            batches = lr_range_test(model, [(X, Y)], **weighting, **options)
            np.testing.assert_allclose(batches.loss, expected, rtol=1e-4)


@pytest.mark.skipif(
    BACKEND == "torch", reason="`fit` cannot train it on torch: autograd refuses the state's assignment"
)
def test_a_recurrent_network_whose_state_is_of_one_batch_size():
    model = keras.Sequential(
        [keras.Input(batch_shape=(32, 6, 3)), keras.layers.LSTM(4, stateful=True), keras.layers.Dense(3)]
    )
    compiled(model=model)
    before = bits(model.variables)
    x = np.repeat(X[:, :, None], 3, axis=2)
    assert len(lr_range_test(model, x, Y, num_steps=12).loss) == 12
    assert_same(before, bits(model.variables))
    unbuilt = compiled(model=keras.Sequential([keras.layers.LSTM(4, stateful=True), keras.layers.Dense(3)]))
    assert len(lr_range_test(unbuilt, x, Y, num_steps=12).loss) == 12


def test_several_inputs():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    out = keras.layers.Dense(3)(keras.layers.Concatenate()([a, b]))
    model = compiled(model=keras.Model([a, b], out))
    assert len(lr_range_test(model, [X[:, :3], X[:, 3:]], Y, **QUICK).loss) == 24
    model = compiled(model=keras.Model({"a": a, "b": b}, out))
    assert len(lr_range_test(model, {"a": X[:, :3], "b": X[:, 3:]}, Y, **QUICK).loss) == 24


def test_several_outputs():
    a = keras.Input((6,))
    model = keras.Model(a, [keras.layers.Dense(3, name="p")(a), keras.layers.Dense(3, name="q")(a)])
    model.compile("sgd", [loss_function(), loss_function()], metrics=[["accuracy"], ["accuracy"]])
    result = lr_range_test(model, X, [Y, Y], **QUICK)
    assert len(result.loss) == len(result.accuracy) == 24  # of the first output


def test_the_seed_decides_the_order():
    model = small()
    one, same, other = (lr_range_test(model, X, Y, seed=s, **QUICK).loss for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


# ---- optimizers and ways to compile ---------------------------------------------------------------------


class Unsaveable(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1


WAYS = {
    "adamw": lambda: compiled(keras.optimizers.AdamW(0.01, weight_decay=0.1)),
    "schedule": lambda: compiled(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 50), momentum=0.9)),
    "schedule without config": lambda: compiled(keras.optimizers.SGD(Unsaveable())),
    "learning rate function": lambda: compiled(keras.optimizers.SGD(lambda: 0.1)),
    "cyclical adam": lambda: compiled(keras.optimizers.Adam(clr_utils.CyclicalLR((1e-4, 1e-2), 5))),
    "clipping, ema": lambda: compiled(keras.optimizers.SGD(0.1, momentum=0.9, global_clipnorm=1.0, use_ema=True)),
    "accumulation": lambda: compiled(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)),
    "eager": lambda: compiled(run_eagerly=True),
    "jit": lambda: compiled(jit_compile=BACKEND != "torch"),
    "many per execution": lambda: compiled(steps_per_execution=20 if BACKEND != "torch" else 1),
    "float16": lambda: compiled(
        keras.optimizers.LossScaleOptimizer(CLR((0.01, 0.1), 5, 0.9)), network(dtype="mixed_float16")
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_compile(way):
    model = WAYS[way]()
    rate = model.optimizer._learning_rate
    before = bits(model.variables)
    result = lr_range_test(model, X, Y, **QUICK)
    assert len(result.loss) == 24 and np.isfinite(result.loss).all() and len(set(result.loss)) > 20
    assert result.lr[-1] == pytest.approx(1.0) and model.optimizer._learning_rate is rate
    assert_same(before, bits(model.variables))


def sweep_optimizer(optimizer, momentum=None):
    return clr_utils._sweep_optimizer(optimizer, clr_utils.CyclicalLR((1e-3, 1.0), 10), momentum)


def test_the_sweep_optimizer_has_the_settings_of_the_models():
    model = compiled(keras.optimizers.AdamW(0.3, weight_decay=0.123, beta_1=0.7, clipnorm=2.0))
    model.optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.fit(X, Y, verbose=0)
    made = sweep_optimizer(model.optimizer)
    assert type(made) is type(model.optimizer) and not made.built and int(made.iterations) == 0
    assert (made.weight_decay, made.beta_1, made.clipnorm) == (0.123, 0.7, 2.0)
    assert made._use_weight_decay(model.layers[0].kernel) and not made._use_weight_decay(model.layers[0].bias)
    clr = CLR((0.1, 1), 5, (0.9, 0.8), nesterov=True, weight_decay=0.01, gradient_accumulation_steps=3)
    made = sweep_optimizer(clr)
    assert (made.momentum_bounds, made.nesterov) == ((0.8, 0.8), True)
    assert (made.weight_decay, made.gradient_accumulation_steps) == (0.01, 3)
    assert sweep_optimizer(keras.optimizers.SGD(0.1), momentum=0.7).momentum == 0.7


class TenthOfCLR(CLR):
    """Has an update_step of its own, and a setting that no config knows."""

    share = 1.0

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(self.share * gradient, variable, learning_rate)


def test_an_optimizer_is_swept_as_it_is():
    x, y = RNG.normal(size=(2, 30, 5, 1)).astype("float32")
    optimizer = TenthOfCLR((0.1, 1.0), 3)
    optimizer.share = 0.1
    result = lr_range_test(one_weight(optimizer), list(zip(x, y)), lr_bounds=(1e-3, 0.1), num_steps=30)
    expected = numpy_sweep(x, y, 0.1 * np.geomspace(1e-3, 0.1, 30), 0.0)
    np.testing.assert_allclose(result.loss, expected, rtol=2e-5)


@pytest.mark.skipif(not hasattr(keras.optimizers, "MultiOptimizer"), reason="came with Keras 3.15")
def test_several_optimizers_in_one_are_refused():
    several = keras.optimizers.MultiOptimizer(lambda variable: keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match="MultiOptimizer holds other optimizers"):
        lr_range_test(compiled(several), X, Y, **QUICK)


class Wrapper(keras.optimizers.Optimizer):
    """As Lookahead, SAM and the like: what it holds has state and a learning rate of its own."""

    def __init__(self, inner_optimizer):
        super().__init__(learning_rate=1.0)
        self.inner_optimizer = inner_optimizer


def test_an_optimizer_that_holds_another_is_refused():
    with pytest.raises(ValueError, match="Wrapper holds other optimizers, with learning rates of their own"):
        lr_range_test(compiled(Wrapper(keras.optimizers.SGD(0.1))), X, Y, **QUICK)


def test_updates_skipped_by_loss_scaling_do_not_move_the_rate():
    huge = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0**127)
    model = one_weight(huge)
    x, y = RNG.normal(size=(2, 40, 1)).astype("float32")
    result = lr_range_test(model, 30 * x, y, num_steps=40, lr_bounds=(1e-9, 1e-7), batch_size=8)
    skipped = int((np.diff(result.lr) == 0).sum())
    assert skipped >= 1 and len(result.lr) == len(result.loss) == 40
    assert result.lr[-1] == pytest.approx(np.geomspace(1e-9, 1e-7, 40)[39 - skipped])


def test_a_skipped_update_is_not_where_the_loss_falls_fastest():
    lr = np.repeat(np.geomspace(1e-3, 1.0, 30), 2)  # every second update is skipped
    loss = np.linspace(2, 1, 60) - 0.5 * (np.arange(60) > 40)
    result = RangeTest(lr, loss, loss, None, None, None, "It ended.", 1.1, (1e-3, 1.0), 60, "exponential", 4.0, 0.95)
    with np.errstate(all="raise"):
        assert result.suggest().steepest == lr[39]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="tf.train.Checkpoint")
@pytest.mark.parametrize("make", [lambda: keras.optimizers.Adam(0.1), lambda: CLR((0.01, 0.1), 50)])
def test_tensorflows_checkpoint_holds_the_models_own_optimizer_afterwards(make, tmp_path):
    import tensorflow as tf

    trained, restored = compiled(make()), compiled(make())
    lr_range_test(trained, X, Y, **QUICK)
    trained.fit(X, Y, batch_size=16, verbose=0)
    path = tf.train.Checkpoint(model=trained).save(tmp_path / "checkpoint")
    restored.optimizer.build(restored.trainable_variables)
    tf.train.Checkpoint(model=restored).restore(path)
    assert int(restored.optimizer.iterations) == int(trained.optimizer.iterations) == 10


# ---- when it stops --------------------------------------------------------------------------------------


def test_stops_at_once_on_a_loss_that_is_not_finite():
    result = lr_range_test(small(), spoilt(), stop_factor=math.inf, **QUICK)
    assert len(result.lr) == len(result.loss) == len(result.smoothed) == 9
    assert result.diverged_at == pytest.approx(np.geomspace(1e-4, 1.0, 24)[9]) and np.isfinite(result.loss).all()


def test_nan_from_the_start_is_said():
    model = compiled()
    before = bits(model.variables)
    result = lr_range_test(model, X * math.nan, Y, **QUICK)
    assert "very first update" in result.stopped and len(result.lr) == 0 and result.diverged_at is None
    for advice in (result.suggest, result.bounds):
        with pytest.raises(ValueError, match="very first"):
            advice()
    assert_same(before, bits(model.variables))


def swept(losses, **options):
    """A range test in which the losses are these, because they are the data."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", lambda y, p: ops.mean(y) + 0.0 * ops.mean(p))
    batches = [(np.ones((2, 1), "float32"), np.full((2, 1), loss, "float32")) for loss in losses]
    return lr_range_test(model, batches, num_steps=len(losses), **options)


def test_stop_factor_by_hand():
    # From 3 down to 1, then up again by 0.25 with each batch; without smoothing.
    losses = [3.0] * 10 + [1.0] * 5 + list(1.125 + 0.25 * np.arange(15))
    for factor, update in (4.0, 21), (2.0, 17), (6.0, 25):  # three, one, five quarters of 2 above 1: 2.5, 1.5, 3.5
        result = swept(losses, stop_factor=factor, smoothing=0.0)
        assert len(result.lr) == update + 1 and result.diverged_at == result.lr[update]
        assert f"rose to {result.loss[-1]:.3g} at update {update}" in result.stopped
    assert swept(losses, stop_factor=math.inf, smoothing=0.0).diverged_at is None


def descent_and_rise(seed):
    rng = np.random.default_rng(seed)
    climb = -3 + np.cumsum(rng.exponential(0.2, 60))
    return np.r_[np.zeros(30), np.linspace(0, -3, 60), climb] + 0.2 * rng.normal(size=150)


@given(seed=st.integers(0, 10**6), constant=st.floats(-1e3, 1e3), scale=st.floats(1e-2, 1e3))
def test_the_stop_depends_neither_on_the_origin_nor_on_the_unit_of_the_loss(seed, constant, scale):
    loss = descent_and_rise(seed)

    def end(loss):
        smoothed = clr_utils.smooth(loss, 0.8)
        return next(
            n
            for n in range(150)
            if smoothed[n] > clr_utils._stop_above(loss[: n + 1], smoothed[: n + 1], 150, 4.0, 0.8)
        )

    assert end(loss) == end(scale * loss + constant) > 90


@pytest.mark.parametrize("constant", [-3.0, 100.0])
def test_a_constant_added_to_the_loss_changes_nothing_but_the_losses(constant):
    plain, moved = (swept(descent_and_rise(0) + c, smoothing=0.8) for c in (0.0, constant))
    assert plain.diverged_at is not None and moved.diverged_at == plain.diverged_at
    np.testing.assert_allclose(moved.loss, plain.loss + constant, atol=1e-5)
    assert moved.bounds() == plain.bounds() and moved.suggest()[:3] == plain.suggest()[:3]


@pytest.mark.parametrize("seed", range(20))
def test_noise_around_zero_is_no_divergence(seed):
    # What a similarity gives before anything is learned; the lowest value says nothing about the noise.
    loss = 0.1 * np.random.default_rng(seed).normal(size=100)
    assert swept(loss, smoothing=0.9).stopped == "It reached the end of the sweep."


# ---- suggestions ----------------------------------------------------------------------------------------


def made_up(smoothed, num_steps=None, loss=None, **fields):
    smoothed = np.asarray(smoothed, float)
    num_steps = num_steps or len(smoothed)
    fields = (
        dict(
            stopped="It reached the end of the sweep.",
            diverged_at=None,
            accuracy=None,
            validation_lr=None,
            validation_loss=None,
        )
        | fields
    )
    lr = np.geomspace(1e-5, 10, num_steps)[: len(smoothed)]
    return RangeTest(
        lr=lr, smoothed=smoothed, loss=smoothed if loss is None else np.asarray(loss, float), lr_bounds=(1e-5, 10.0),
        num_steps=num_steps, sweep="exponential", smoothing=0.9, stop_factor=4.0, **fields,
    )  # fmt: skip


def test_suggestions_by_hand():
    # 50 points: flat to 14, falls by 1 to 35 (steepest, by 3, at 20), rises to 45.
    loss = np.r_[np.full(15, 50.0), 50 - np.arange(1, 22), 29 + 5 * np.arange(1, 15)].astype(float)
    loss[21:36] -= 2
    result = made_up(loss)
    lr = result.lr
    suggested = result.suggest()
    # kept: 5..44. The falling run has 22 values (14..35), 30 at its end in the kept ones: start 30 - 22 = 8, + 7 + 3.
    assert suggested.valley == lr[5 + 8 + 7 + 3]
    assert suggested.steepest == lr[20]
    assert suggested.minimum == pytest.approx(lr[35] / 10)
    assert result.bounds() == (pytest.approx(lr[35] / 80), pytest.approx(lr[35] / 8))
    assert result.bounds(high_of_break=0.5, low_of_high=0.2) == (pytest.approx(lr[35] / 10), pytest.approx(lr[35] / 2))
    assert result.break_lr == lr[35] and "still falling" not in suggested.why
    assert "\n" not in repr(result) and len(repr(result)) < 100


def test_bounds_come_from_the_last_rate_at_which_the_loss_is_still_low():
    # 50 points: flat at 50 to 14, falls by 1 to 30 at 34, rises by 1 to 45. A quarter of the descent above 30 is 35.
    loss = np.r_[np.full(15, 50.0), 50 - np.arange(1, 21), 30 + np.arange(1, 16)].astype(float)
    result = made_up(loss)
    assert result.bounds() == (pytest.approx(result.lr[39] / 80), pytest.approx(result.lr[39] / 8))


def test_a_loss_that_never_breaks_gives_suggestions_but_no_bounds():
    result = made_up(np.r_[np.full(15, 50.0), np.linspace(49, 30, 35)])
    assert result.suggest().valley is not None and "no bounds" in result.summary()
    with pytest.raises(ValueError, match=r"Raise lr_bounds\[1\]"):
        result.bounds()


@pytest.mark.parametrize("rises", [False, True], ids=["flat", "rises"])
def test_noise_at_the_end_is_no_break_but_a_rise_is(rises):
    rng, found = np.random.default_rng(0), 0
    loss = np.r_[np.full(100, 2.0), np.linspace(2, 1, 200), np.full(300, 1.0)]
    if rises:  # at the very end, so late that nothing stopped the sweep
        loss[-60:] += np.linspace(0, 1.5, 60)
    for _ in range(50):  # the noise of a batch is as large as the whole descent
        noisy = loss + rng.normal(0, 1, 600)
        found += made_up(clr_utils.smooth(noisy, 0.9), loss=noisy).break_lr is not None
    assert found >= 45 if rises else found <= 7


def test_data_that_end_early_are_not_told_to_go_to_a_higher_rate():
    result = dataclasses.replace(made_up(np.r_[np.full(15, 50.0), np.linspace(49, 30, 35)]), num_steps=100)
    assert "more data" in result.suggest().why and "Raise" not in result.suggest().why
    with pytest.raises(ValueError, match="Give more data"):
        result.bounds()


def test_longest_descent_against_brute_force():
    from itertools import combinations

    for seed in range(20):
        values = np.random.default_rng(seed).integers(0, 9, 9)
        best = max(
            len(c) for n in range(1, 10) for c in combinations(values, n) if all(a > b for a, b in zip(c, c[1:]))
        )
        assert clr_utils._longest_descent(values)[1] == best


def test_no_suggestion_without_points_or_descent():
    noise = 1 + 0.1 * np.random.default_rng(0).normal(size=200)
    for result, reason in (
        (made_up(np.linspace(2, 1, 12)), "Too few points"),
        (made_up(np.linspace(2, 1, 30), num_steps=300), "Too few points"),
        (made_up(np.linspace(1, 2, 100)), "No descent"),
        (made_up(np.ones(100)), "No descent"),
        (made_up(clr_utils.smooth(noise, 0.9), loss=noise), "No descent"),
    ):
        for advice in (result.suggest, result.bounds):
            with pytest.raises(ValueError, match=reason):
                advice()
        assert result.break_lr is None
        assert "No suggestion" in result.summary() and "\n" not in result.summary()


def test_still_falling_at_the_end_is_said():
    assert "still falling" in made_up(np.linspace(2, 1, 100)).suggest().why


# ---- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(lr_bounds=(1.0, 0.1)), "bounds=.*low <= high"),
        (dict(lr_bounds=(0.0, 0.1)), "lr_bounds=.*both above 0"),
        (dict(lr_bounds=(-1, 0.1), sweep="linear"), "bounds=.*0 <= low"),
        (dict(lr_bounds=(0.1, math.inf)), "bounds="),
        (dict(lr_bounds=(math.nan, 0.1)), "bounds="),
        (dict(lr_bounds=0.1), "bounds=0.1"),
        (dict(num_steps=9), "num_steps=9"),
        (dict(num_steps=20.5), "num_steps=20.5"),
        (dict(sweep="cubic"), "sweep='cubic'"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(stop_factor=1), "stop_factor=1"),
        (dict(smoothing=1.0), "smoothing=1.0"),
        (dict(momentum=1.0), "momentum=1.0"),
        (dict(x=X[:0], y=Y[:0]), "not a single batch"),
        (dict(x=iter([]), y=None), "not a single batch"),
        (dict(y=Y[:5]), "samples"),
        (dict(y=[0] * 10_000), r"^.{,500}count the same samples"),  # not a shape for each label
        (dict(x=iter([])), "leave out y"),
        (dict(x=iter([]), y=None, sample_weight=Y), "leave out y and sample_weight"),
        (dict(x=(X, Y, Y), y=None), "needs labels"),
        (dict(sample_weight=X[:, 0], class_weight={0: 2.0}), "cannot be specified at the same time"),
        (dict(y=[Y, Y], class_weight={0: 2.0}), "class_weight is for one output"),
        (dict(x=5, y=None), "give arrays"),
        (dict(validation_data=iter([])), "validation_data: give .* a finite dataset"),
    ],
)
def test_bad_input(options, message):
    model = small()
    before = bits(model.variables)
    with pytest.raises((ValueError, TypeError), match=message):
        lr_range_test(model, **(dict(x=X, y=Y) | options))
    assert_same(before, bits(model.variables))


def test_bad_models():
    with pytest.raises(ValueError, match="not compiled"):
        lr_range_test(network(), X, Y)
    with pytest.raises(TypeError, match="compiled keras.Model"):
        lr_range_test("model", X, Y)
    with pytest.raises(ValueError, match="momentum=0.9: Adam"):
        lr_range_test(compiled(keras.optimizers.Adam()), X, Y, momentum=0.9)

    class Own(keras.Model):
        def train_step(self, *args):
            pass

    model = Own()
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="its own train_step"):
        lr_range_test(model, X, Y)
    frozen = compiled()
    frozen.trainable = False
    with pytest.raises(ValueError, match="no trainable"):
        lr_range_test(frozen, X, Y)


def test_a_mistake_in_the_shapes_comes_through():
    with pytest.raises(Exception, match="(?i)shape|incompatible|dimension"):
        lr_range_test(compiled(), X[:, :4], Y, **QUICK)


def test_steepest_is_per_step_of_log_lr_in_a_linear_sweep_too():
    lr = np.linspace(0.01, 1, 100)
    loss = 2 - lr - 0.2 * np.minimum(lr, 0.3)  # per step of lr it falls fastest at first, per step of log(lr) at last
    result = dataclasses.replace(made_up(loss), lr=lr, sweep="linear")
    assert result.suggest().steepest == lr[93]  # the last but one of the points 10 to 94


def test_validation_loss_is_that_after_the_update_at_its_rate():
    x, y = np.ones((8, 1), "float32"), np.zeros((8, 1), "float32")  # loss w**2 / 2
    options = dict(lr_bounds=(1e-3, 0.5), num_steps=40, batch_size=8, validation_data=(x, y))
    result = lr_range_test(one_weight(keras.optimizers.SGD(0.1)), x, y, **options)
    rates = np.geomspace(1e-3, 0.5, 40)
    np.testing.assert_allclose(result.validation_lr, rates[1::2])
    np.testing.assert_allclose(result.validation_loss, np.cumprod(1 - rates)[1::2] ** 2 / 2, rtol=1e-4)


def test_validation_data_may_have_sample_weights():
    keras.utils.set_random_seed(0)
    model, weights = small(), np.linspace(0, 2, len(X)).astype("float32") ** 2
    expected = model.evaluate(X, Y, sample_weight=weights, verbose=0)[0]
    result = lr_range_test(model, X, Y, validation_data=(X, Y, weights), num_steps=10, lr_bounds=(1e-9, 1e-8))
    np.testing.assert_allclose(result.validation_loss, expected, rtol=1e-4)
    assert abs(expected / model.evaluate(X, Y, verbose=0)[0] - 1) > 0.01


def samples_read(x, y, **options):
    """The samples in each batch, read off its loss, their sum of powers of two."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", lambda y, p: ops.sum(y) + 0.0 * ops.mean(p))
    loss = lr_range_test(model, x, y, stop_factor=math.inf, num_steps=12, **options).loss
    return [{k for k in range(10) if int(total) >> k & 1} for total in loss]


def test_every_pass_over_arrays_has_an_order_of_its_own_and_whole_batches():
    x, y = np.ones((10, 1), "float32"), 2.0 ** np.arange(10, dtype="float32")[:, None]
    found = samples_read(x, y, batch_size=4)
    assert {len(batch) for batch in found} == {4}
    assert not any(one & other for one, other in zip(found[::2], found[1::2]))  # nothing twice in a pass
    assert len({frozenset(batch) for batch in found[::2]}) > 3


def test_the_batches_of_a_pydataset_are_mixed_anew_in_every_pass():
    class Powers(keras.utils.PyDataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return np.ones((1, 1), "float32"), np.full((1, 1), 2.0**i, "float32")

    found = [batch.pop() for batch in samples_read(Powers(), None)]
    passes = [tuple(found[i : i + 4]) for i in (0, 4, 8)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes) and len(set(passes)) > 1


def test_the_loss_scale_of_the_moment_is_taken_along():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    optimizer.build([keras.Variable([1.0])])
    optimizer.dynamic_scale.assign(64.0)
    assert sweep_optimizer(optimizer).initial_scale == 64.0


def test_a_lucky_first_batch_is_not_the_lowest_loss():
    losses = [-3.0, *[0.0] * 9, *np.linspace(0, -1, 90)]
    assert swept(losses, smoothing=0.0).stopped == "It reached the end of the sweep."


def test_rounding_of_a_constant_loss_is_no_divergence():
    assert swept([1.0] * 20 + [1.0, 1.0 + 2e-6] * 20, smoothing=0.5).diverged_at is None


def test_noise_counts_sixty_times():
    assert clr_utils._stop_above([0.0, 1.0] * 10, [0.5] * 20, 100, 4.0, 0.0) == 0.5 + 0.75 * 60


def test_accuracy_is_that_of_the_first_output():
    keras.utils.set_random_seed(0)
    a = keras.Input((6,))
    model = keras.Model(a, [keras.layers.Dense(3, name="p")(a), keras.layers.Dense(3, name="q")(a)])
    model.compile("sgd", [loss_function(), loss_function()], metrics=[["accuracy"], ["accuracy"]])
    result = lr_range_test(model, X, [Y, Y], batch_size=len(X), num_steps=10, lr_bounds=(1e-9, 1e-8))
    first, second = (np.mean(p.argmax(axis=1) == Y) for p in model.predict(X, verbose=0))
    assert result.accuracy == pytest.approx([first] * 10) and first != second


def test_a_compile_of_the_models_own_is_not_called_again():
    class Compiling(keras.Sequential):
        def compile(self, rate):
            super().compile(keras.optimizers.SGD(rate), loss_function())

    model = Compiling([keras.Input((6,)), keras.layers.Dense(3)])
    model.compile(0.1)
    assert len(lr_range_test(model, X, Y, **QUICK).loss) == 24


def test_a_descent_counts_from_four_times_the_noise_on():
    noise = math.sqrt(0.1 / 1.9)  # of the smoothed loss, where that of the losses is 1
    for lowest, found in ((3.8 * noise, False), (4.2 * noise, True)):
        smoothed, loss = np.r_[np.zeros(20), np.full(180, -lowest)], np.r_[[1.0, -1.0] * 10, np.full(180, -lowest)]
        assert ("No descent" not in made_up(smoothed, loss=loss).summary()) == found


def test_the_valley_of_a_loss_that_only_falls_counts_from_the_first_kept_point():
    result = made_up(np.linspace(2, 1, 100))  # kept are 10 to 94, 85 points
    assert result.suggest().valley == result.lr[10 + 85 // 3 + 85 // 6]


def test_the_start_of_a_short_sweep_is_the_mean_of_five_losses():
    falling = np.linspace(1.9, 1, 27)
    loss = np.r_[2.0, 2.0, 2.0, 8.0, -4.0, np.full(25, 1.0)]  # the noise of the first three is 0
    result = made_up(np.r_[np.full(3, 2.0), falling], loss=loss)
    assert "No descent" in result.summary()


def test_ten_points_are_judged_and_nine_are_too_few():
    for points, judged in ((10, True), (9, False)):  # between the first 2 of 20 and the last 5
        result = made_up(np.linspace(2, 1, 20)[: 2 + points + 5], num_steps=20)
        assert ("Too few points" not in result.summary()) == judged


def test_a_sweep_that_diverged_early_is_told_to_start_lower_and_not_to_get_more_data():
    result = made_up(np.linspace(2, 1, 12), num_steps=100, diverged_at=1.0)
    with pytest.raises(ValueError, match="Start at a lower rate"):
        result.suggest()


def test_the_summary_has_the_numbers_of_suggest_and_bounds():
    loss = np.r_[np.full(15, 50.0), 50 - np.arange(1, 22), 29 + 5 * np.arange(1, 15)].astype(float)
    loss[21:36] -= 2
    result = made_up(loss)
    (valley, steepest, minimum, _), (low, high) = result.suggest(), result.bounds()
    text = f"Lowest smoothed loss at {10 * minimum:.3g}; valley {valley:.3g}, steepest {steepest:.3g}, "
    text += f"minimum/10 {minimum:.3g}; bounds for CLR ({low:.3g}, {high:.3g})"
    assert str(result).endswith(text) and "50 of 50 updates. It reached the end" in str(result)
    assert len({valley, steepest, minimum, low, high}) == 5


def test_the_loss_scale_of_the_sweep_grows_as_that_of_the_model():
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), dynamic_growth_steps=7)
    assert sweep_optimizer(optimizer).dynamic_growth_steps == 7


def test_a_model_that_was_told_to_run_eagerly_after_compile_does():
    class Own(keras.layers.Layer):
        def call(self, x):
            return ops.convert_to_tensor(ops.convert_to_numpy(x))  # a value, which no graph has

        def compute_output_shape(self, shape):
            return shape

    model = compiled(keras.optimizers.SGD(0.05), keras.Sequential([keras.Input((6,)), Own(), keras.layers.Dense(3)]))
    model.run_eagerly = True
    assert len(lr_range_test(model, X, Y, **QUICK).loss) == 24


def test_a_metric_named_acc_is_the_accuracy():
    model = small()
    model.compile("sgd", loss_function(), metrics=[keras.metrics.SparseCategoricalAccuracy(name="acc")])
    assert len(lr_range_test(model, X, Y, **QUICK).accuracy) == 24


def test_the_start_of_a_stop_is_the_mean_of_at_least_ten_losses():
    assert clr_utils._stop_above([0.0, 1.0] * 5, [0.5] * 10, 20, 4.0, 0.0) == math.inf
    assert clr_utils._stop_above([0.0, 1.0] * 6, [0.5] * 12, 20, 4.0, 0.0) == 0.5 + 0.75 * 60


def test_a_sweep_that_diverged_has_a_break_even_where_the_smoothed_loss_is_still_low():
    result = made_up(np.r_[np.full(15, 50.0), np.linspace(49, 30, 35)], diverged_at=10.0)
    assert result.break_lr == result.lr[-1] and result.bounds()[1] == result.lr[-1] / 8


def test_weighted_metric_objects_keep_their_values():
    own = keras.metrics.SparseCategoricalAccuracy()
    model = small()
    model.compile("sgd", loss_function(), weighted_metrics=[own])
    own.update_state(Y[:7], np.eye(3)[Y[:7]])
    before = bits(own.variables)
    lr_range_test(model, X, Y, **QUICK)
    assert_same(bits(own.variables), before)
