"""Sharpness in notebook 06: the largest eigenvalue of the Hessian, against one that is written out, and its ways."""

import functools
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

import experiments

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


def test_losses_are_those_of_each_image(cells):
    targets, outputs = np.float32([[1, 0], [0, 1]]), np.float32([[1, 3], [-1, 0]])
    np.testing.assert_allclose(cells["half_square"](targets, outputs), [4.5, 1], rtol=1e-6)
    np.testing.assert_allclose(cells["cross_entropy"](targets, outputs), np.log([1 + np.e**2, 1 + np.e**-1]), rtol=1e-5)


def test_rates_of_the_ways_and_the_momentum_that_their_border_counts_with(cells):
    rates = {"up_and_down": [0.02, 0.11, 0.2, 0.11], "up_and_stay": [0.02, 0.11, 0.2, 0.2]}
    for name, expected in rates.items():
        rate = cells[name]()._learning_rate
        assert [float(rate(at)) for at in (0, 375, 750, 1125)] == pytest.approx(expected, rel=1e-5), name
    rate = cells["sweep"]()._learning_rate
    assert [float(rate(at)) for at in (0, 300, 600)] == pytest.approx([1e-5, 1e-2, 10], rel=1e-4)
    for name, way in cells["WAYS"].items():
        optimizer = way.optimizer()
        momentum = getattr(optimizer, "momentum_bounds", None) or (optimizer.momentum, optimizer.momentum)
        assert momentum == (way.momentum, way.momentum), name
        assert "momentum" not in name or float(name.split("momentum ")[1]) == way.momentum
        assert "batches" not in name or int(name.split("batches of ")[1].split(",")[0]) == way.batch_size
        assert ("cross-entropy" in name or "range test" in name) == (way.loss is cells["cross_entropy"])


def test_batches_take_every_image_of_a_pass_once_and_no_leftovers(cells):
    way = cells["Way"](None, batch_size=3, updates=7)
    batches = cells["batches_of"](np.random.default_rng(0), way, 10)
    assert batches.shape == (7, 3) and batches.max() < 10
    rng = np.random.default_rng(0)
    passes = [rng.permutation(10) for _ in range(3)]  # three updates each
    assert batches.ravel().tolist() == np.concatenate([order[:9] for order in passes])[:21].tolist()


def linear(rate):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(3, use_bias=False)])
    model.compile(keras.optimizers.SGD(rate), half_square)
    model.optimizer.build(model.trainable_variables)
    return model


def test_an_update_is_a_step_against_the_gradient(cells):
    model = linear(0.1)
    (kernel,) = model.get_weights()
    cells["update"](model, tf.constant(X[:5]), tf.constant(Y[:5]))
    gradient = X[:5].T @ (X[:5] @ kernel - Y[:5]) / 5
    np.testing.assert_allclose(model.get_weights()[0], kernel - 0.1 * gradient, atol=1e-6)


def test_the_network_is_dense_with_tanh_and_follows_from_its_seed(cells):
    way = cells["Way"](keras.optimizers.SGD, data="mnist", widths=(4, 3))
    model, again, other = (cells["dense_network"](way, seed) for seed in (0, 0, 1))
    x = np.random.default_rng(0).normal(size=(5, 28, 28)).astype("float32")
    first, a, second, b, last, c = model.get_weights()
    h = np.tanh(np.tanh(x.reshape(5, 784) @ first + a) @ second + b)
    np.testing.assert_allclose(model.predict(x, verbose=0), h @ last + c, atol=1e-5)
    assert last.shape == (3, 10) and np.array_equal(first, again.get_weights()[0])
    assert not np.array_equal(first, other.get_weights()[0])
    assert cells["dense_network"](way._replace(data="cifar10"), 0).input_shape == (None, 16, 16, 3)


@pytest.fixture
def way(cells, monkeypatch):
    """Five updates, measured before the first, the second and the fourth, on four of the six images."""
    monkeypatch.setitem(cells, "SIZE", 4)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.2)  # by a hundredth in an update
    optimizer = functools.partial(keras.optimizers.SGD, schedule)
    return cells["Way"](optimizer, batch_size=2, images=6, widths=(3,), updates=5, every=2, first=1)


def drawn():
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    return experiments.Dataset((images, np.arange(8)[:, None]), None, "synthetic", "drawn")


def test_sharpness_is_measured_on_the_same_images_along_the_training(cells, way, monkeypatch):
    measured, trained, update = [], [], cells["update"]

    def sharpness(model, x, y):
        measured.append((x.numpy(), y.numpy()))
        return 12.34567

    def noted(model, x, y):
        trained.append((x.numpy(), y.numpy()))
        update(model, x, y)

    monkeypatch.setitem(cells, "sharpness", sharpness)
    monkeypatch.setitem(cells, "update", noted)
    data = drawn()
    (line,) = cells["sharpness_along"](way, 3, data)
    assert line["updates"] == [0, 1, 3] and line["sharpness"] == [12.35] * 3 and line["whole"] == 3
    assert line["learning_rate"] == pytest.approx([0.1, 0.11, 0.13])

    images = data.train[0].astype(float)
    small = (images[:, ::2, ::2] + images[:, 1::2, ::2] + images[:, ::2, 1::2] + images[:, 1::2, 1::2]) / 4 / 255 - 0.5
    for x, y in measured + trained:
        np.testing.assert_allclose(x, small[y.argmax(axis=1)], atol=1e-6)
        assert y.shape[1] == 10 and (y.sum(axis=1) == 1).all()
    chosen = np.random.default_rng(3).permutation(8)[:6]
    assert all(y.argmax(axis=1).tolist() == chosen[:4].tolist() for _, y in measured)
    assert [len(x) for x, _ in trained] == [2] * 5
    first_pass = np.concatenate([y.argmax(axis=1) for _, y in trained[:3]])
    assert sorted(first_pass) == sorted(chosen)

    x, y = measured[0]
    outputs = cells["dense_network"](way, 3).predict(x, verbose=0)
    assert line["loss"][0] == pytest.approx(((outputs - y) ** 2).sum(axis=1).mean() / 2, rel=1e-3)


@pytest.mark.parametrize("losses, kept", [([1, 9.9, 9.9], 3), ([1, 5, 10], 2), ([1, np.nan], 1)])
def test_a_run_that_has_diverged_is_measured_no_more(cells, way, monkeypatch, losses, kept):
    following = iter(losses)
    monkeypatch.setitem(cells, "loss_and_gradient", lambda model, x, y: (next(following), None))
    monkeypatch.setitem(cells, "sharpness", lambda model, x, y: 1.0)
    monkeypatch.setitem(cells, "update", lambda model, x, y: None)
    (line,) = cells["sharpness_along"](way, 3, drawn())
    assert line["loss"] == losses[:kept] and len(line["updates"]) == kept and line["whole"] == 3
