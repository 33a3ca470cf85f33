"""settle_batch_norm: running statistics estimated anew, and nothing else touched."""

import experiments  # isort: skip  # imports Keras without TensorFlow's greeting, so it comes first
import inspect

import keras
import numpy as np
import pytest

import clr_utils
from clr_utils import settle_batch_norm

rng = np.random.default_rng(0)
X = rng.normal(3, 2, (50, 4)).astype("float32")


def value(variable):
    return np.array(keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(variable)))


@pytest.mark.parametrize("layer", [keras.layers.BatchNormalization, experiments.BatchNormalization])
def test_statistics_become_the_means_over_the_batches(layer):
    norm = layer(momentum=0.9)
    model = keras.Sequential([keras.Input((4,)), norm])
    norm.moving_mean.assign(np.full(4, 100.0))
    settle_batch_norm(model, X, batch_size=16, shuffle=False)  # the last two samples are left over
    batches = X[:48].reshape(3, 16, 4)
    np.testing.assert_allclose(value(norm.moving_mean), batches.mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(value(norm.moving_variance), batches.var(axis=1).mean(axis=0), rtol=1e-4)
    assert norm.momentum == 0.9


def test_samples_sorted_by_class_are_mixed():
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), norm])
    classes = np.repeat(np.arange(4, dtype="float32"), 500)[:, None] + rng.normal(0, 0.1, (2000, 4)).astype("float32")
    found = []
    for _ in range(2):
        settle_batch_norm(model, classes, 50)
        found.append(value(norm.moving_variance))
    np.testing.assert_array_equal(*found)  # mixed in the same way each time
    np.testing.assert_allclose(found[0], classes.var(axis=0), rtol=0.05)
    settle_batch_norm(model, classes, 50, shuffle=False)
    assert (value(norm.moving_variance) < 0.02).all()


@pytest.mark.parametrize("layer", [keras.layers.BatchNormalization, experiments.BatchNormalization])
def test_statistics_that_an_overflow_has_spoilt_are_settled(layer):
    norm = layer()
    model = keras.Sequential([keras.Input((4,)), norm])
    norm.moving_mean.assign(np.full(4, np.nan))
    norm.moving_variance.assign(np.full(4, np.inf))
    settle_batch_norm(model, X, batch_size=25)
    np.testing.assert_allclose(value(norm.moving_mean), X.mean(axis=0), rtol=1e-5)
    assert np.isfinite(value(norm.moving_variance)).all()


def test_a_layer_may_be_frozen_between_two_calls():
    dense, norm = keras.layers.Dense(4), keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), dense, norm])
    settle_batch_norm(model, X, 10)
    dense.trainable = False
    settle_batch_norm(model, 3 * X, 10)  # JAX hands over trainable variables and others apart
    expected = 3 * X @ value(dense.kernel)
    np.testing.assert_allclose(value(norm.moving_mean), expected.mean(axis=0), rtol=1e-4, atol=1e-4)


def test_everything_else_stays_and_an_error_does_too():
    dropout, norm = keras.layers.Dropout(0.5), keras.layers.BatchNormalization(momentum=0.7)
    frozen = keras.layers.BatchNormalization(trainable=False)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), dropout, norm, frozen])
    model.compile("adam", "mse")
    model.fit(X, X, verbose=0)
    own = {id(norm.moving_mean), id(norm.moving_variance)}
    rest = [v for v in [*model.variables, *dropout.variables, *model.optimizer.variables] if id(v) not in own]
    before = [value(v) for v in rest]
    settle_batch_norm(model, X, 10)
    for variable, was in zip(rest, before):
        np.testing.assert_array_equal(value(variable), was)
    with pytest.raises(Exception):  # noqa: B017 (which one, the backend decides)
        settle_batch_norm(model, np.full((20, 3), 1.0), 10)
    assert norm.momentum == 0.7


class Frozen(keras.Model):
    """The usual way to keep the statistics of a part that is trained on."""

    def __init__(self):
        super().__init__()
        self.base = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        self.norm = keras.layers.BatchNormalization()

    def call(self, x, training=False):
        return self.norm(self.base(x, training=False), training=training)


def test_layers_that_run_as_in_inference_keep_their_statistics():
    model = Frozen()
    model(X)
    (base,) = model.base.layers
    base.moving_mean.assign(np.full(4, 3.0))
    base.moving_variance.assign(np.full(4, 5.0))
    settle_batch_norm(model, X, 10)
    assert value(base.moving_mean).tolist() == [3.0] * 4 and value(base.moving_variance).tolist() == [5.0] * 4
    expected = ((X - 3) / np.sqrt(5 + base.epsilon)).mean(axis=0)
    np.testing.assert_allclose(value(model.norm.moving_mean), expected, rtol=1e-4, atol=1e-5)


class Plain(keras.Model):
    def __init__(self):
        super().__init__()
        self.norm = keras.layers.BatchNormalization()

    def call(self, x):
        return self.norm(x)


def test_a_model_whose_call_takes_no_training_is_settled():
    model = Plain()
    model(X)
    settle_batch_norm(model, X, 10)
    np.testing.assert_allclose(value(model.norm.moving_mean), X.mean(axis=0), rtol=1e-5)


def test_whole_numbers_stay_whole():
    first = 2**24  # from here on float32 knows even numbers only

    class Last(keras.layers.Layer):
        def call(self, x):
            return keras.ops.cast(x % 2, "float32")

        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, "float32")

    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((1,), dtype="int32"), Last(), norm])
    settle_batch_norm(model, np.arange(first + 1, first + 41, 2, dtype="int32")[:, None], 10)
    np.testing.assert_allclose(value(norm.moving_mean), 1.0, rtol=1e-6)


@pytest.mark.parametrize("kind", [keras.layers.Layer, keras.Model])  # `model.metrics` has none of a model within it
def test_metrics_of_layers_and_of_models_within_the_model_stay(kind):
    class Counting(kind):
        def __init__(self):
            super().__init__()
            self.seen = keras.metrics.Sum()

        def call(self, x):
            self.seen.update_state(1.0)
            return x

    counting = Counting()
    model = keras.Sequential([keras.Input((4,)), counting, keras.layers.BatchNormalization()])
    before = float(value(counting.seen.result()))
    settle_batch_norm(model, X, 10)
    assert float(value(counting.seen.result())) == before


@pytest.mark.parametrize("kind", [list, tuple, dict])
def test_a_model_may_have_several_inputs(kind):
    norm = keras.layers.BatchNormalization()
    inputs = {name: keras.Input((4,), name=name) for name in "ab"}
    arrays = {"a": X.astype("float64"), "b": 2 * X}
    outputs = norm(inputs["a"] + inputs["b"])
    model = keras.Model(inputs if kind is dict else list(inputs.values()), outputs)
    settle_batch_norm(model, arrays if kind is dict else kind(arrays.values()), 25)
    np.testing.assert_allclose(value(norm.moving_mean), 3 * X[: len(X) // 25 * 25].mean(axis=0), rtol=1e-5)


def test_weights_that_change_in_a_forward_pass_stay():
    dense = keras.layers.SpectralNormalization(keras.layers.Dense(4))
    model = keras.Sequential([keras.Input((4,)), dense, keras.layers.BatchNormalization()])
    before = model.get_weights()[0]
    settle_batch_norm(model, X, 10)
    np.testing.assert_array_equal(model.get_weights()[0], before)


class Noise(keras.layers.Layer):
    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x))


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX refuses to compile draws without a seed")
def test_random_numbers_drawn_afterwards_are_the_same():
    model = keras.Sequential([keras.Input((4,)), Noise(), keras.layers.BatchNormalization()])

    def drawn():
        return value(keras.random.normal((2,))).tolist()

    for before in (0, 1):  # in the first round Keras's generator is made only afterwards
        keras.utils.set_random_seed(0)
        expected = [drawn() for _ in range(before + 1)][-1]
        keras.utils.set_random_seed(0)
        for _ in range(before):
            drawn()
        settle_batch_norm(model, X, 10)
        assert drawn() == expected


def test_a_model_that_runs_eagerly_is_not_compiled():
    class OfNumpy(keras.layers.Layer):
        def call(self, x):
            return keras.ops.convert_to_tensor(2 * keras.ops.convert_to_numpy(x))

        def compute_output_shape(self, shape):
            return shape

    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), OfNumpy(), norm])
    model.compile("sgd", "mse", run_eagerly=True)
    settle_batch_norm(model, X, 10)
    np.testing.assert_allclose(value(norm.moving_mean), 2 * X.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize(
    "layers, x, message",
    [([keras.layers.Dense(2)], X, "nothing to settle"), ([keras.layers.BatchNormalization()], X[:8], "less than one")],
)
def test_what_cannot_be_settled_is_refused(layers, x, message):
    with pytest.raises(ValueError, match=message):
        settle_batch_norm(keras.Sequential([keras.Input((4,)), *layers]), x, 16)
    with pytest.raises(ValueError, match="is built: nothing to settle"):
        settle_batch_norm(keras.Sequential([keras.layers.BatchNormalization()]), X, 16)


def test_what_is_no_data_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    with pytest.raises(ValueError, match="batch_size=0: give a whole number of at least 1"):
        settle_batch_norm(model, X, 0)
    for x in (iter([X]), {"a": X, "b": X[:3]}):  # an iterable of batches, as of tf.data; unequal lengths
        with pytest.raises(ValueError, match="shapes of x are"):
            settle_batch_norm(model, x)
    if "renorm" in inspect.signature(keras.layers.BatchNormalization).parameters:
        renorm = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(renorm=True)])
        with pytest.raises(ValueError, match="Layers with renorm=True"):
            settle_batch_norm(renorm, X, 10)


def test_an_interruption_half_way_puts_the_statistics_back(monkeypatch):
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dropout(0.5), norm])
    norm.moving_mean.assign(np.full(4, 7.0))
    before = [value(v) for v in [*model.variables, *model.layers[0].variables]]
    make = clr_utils._forward_in_training

    def interrupted(model):
        forward, calls = make(model), []

        def run(x):
            forward(x)
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt

        return run

    monkeypatch.setattr(clr_utils, "_forward_in_training", interrupted)
    with pytest.raises(KeyboardInterrupt):
        settle_batch_norm(model, X, 10)
    for variable, was in zip([*model.variables, *model.layers[0].variables], before):
        np.testing.assert_array_equal(value(variable), was)


def test_a_model_whose_only_batch_norm_is_frozen_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(trainable=False)])
    with pytest.raises(ValueError, match="no trainable BatchNormalization"):
        settle_batch_norm(model, X, 10)
