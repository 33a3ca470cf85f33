"""The sharpness of notebook 06: the largest eigenvalue of the Hessian, against one that is written out."""

import pathlib
import sys

import keras
import numpy as np
import pytest

tf = pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("the cells are TensorFlow's", allow_module_level=True)

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))

import train_rows

rng = np.random.default_rng(0)
X = rng.normal(size=(40, 6)).astype("float32")
Y = np.eye(3, dtype="float32")[rng.integers(0, 3, 40)]


@pytest.fixture(scope="module")
def cells():
    return train_rows.definitions(train_rows.NOTEBOOK_6)


def network(loss, seed=0, activation="tanh"):
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Dense(5, activation=activation), keras.layers.Dense(4, activation=activation)]
    model = keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


def explicit_hessian(model, loss):
    """By differentiating every component of the gradient, in float64."""
    weights = [tf.Variable(tf.cast(v.value, tf.float64)) for v in model.trainable_variables]
    with tf.GradientTape(persistent=True) as outer:
        with tf.GradientTape() as inner:
            h = tf.constant(X, tf.float64)
            for kernel, bias in zip(weights[:-2:2], weights[1:-2:2]):
                h = tf.tanh(h @ kernel + bias)
            value = loss(tf.constant(Y, tf.float64), h @ weights[-2] + weights[-1])
        gradient = tf.concat([tf.reshape(g, [-1]) for g in inner.gradient(value, weights)], 0)
    rows = outer.jacobian(gradient, weights, experimental_use_pfor=False)
    return np.concatenate([np.reshape(row, (len(gradient), -1)) for row in rows], axis=1)


def cross_entropy(y, outputs):
    return -tf.reduce_mean(tf.reduce_sum(y * tf.nn.log_softmax(outputs), -1))


def half_square(y, outputs):
    return tf.reduce_mean(tf.reduce_sum((outputs - y) ** 2, -1)) / 2


def minus_half_square(y, outputs):
    return -half_square(y, outputs)


LOSSES = {
    "cross-entropy": (keras.losses.CategoricalCrossentropy(from_logits=True), cross_entropy),
    "half square": (half_square, half_square),
    "its negative, where the largest in magnitude is negative": (minus_half_square, minus_half_square),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_is_the_largest_eigenvalue_of_the_explicit_hessian(cells, name, seed):
    loss, by_hand = LOSSES[name]
    model = network(loss, seed)
    hessian = explicit_hessian(model, by_hand)
    assert np.abs(hessian - hessian.T).max() < 1e-9
    eigenvalues = np.linalg.eigvalsh(hessian)
    if name.startswith("its negative"):
        assert -eigenvalues[0] > 1.5 * eigenvalues[-1] > 0
    assert cells["sharpness"](model, X, Y) == pytest.approx(eigenvalues[-1], rel=0.01)


def test_a_product_is_that_of_the_explicit_hessian(cells):
    model = network(LOSSES["cross-entropy"][0])
    hessian = explicit_hessian(model, cross_entropy)
    vector = rng.normal(size=len(hessian)).astype("float32")
    product = cells["hessian_times"](tf.constant(vector), model, X, Y)
    np.testing.assert_allclose(product, hessian @ vector, rtol=1e-4, atol=1e-5)


def test_leaves_the_model_as_it_was(cells):
    model = network(LOSSES["half square"][0])
    before = [v.numpy().copy() for v in model.variables + model.optimizer.variables]
    assert cells["sharpness"](model, X, Y) == cells["sharpness"](model, X, Y)
    for value, variable in zip(before, model.variables + model.optimizer.variables):
        np.testing.assert_array_equal(value, variable.numpy())
