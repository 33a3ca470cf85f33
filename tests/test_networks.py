"""The networks of the series and their layer: BatchNormalization through the backend's fused kernel."""

import experiments  # isort: skip  # imports Keras without TensorFlow's greeting, so it comes first
import inspect

import keras
import numpy as np
import pytest
from keras import ops

rng = np.random.default_rng(0)
IMAGES = rng.normal(1, 3, (6, 5, 4, 7)).astype("float32")
WEIGHTS = rng.normal(size=IMAGES.shape).astype("float32")


def pair(**options):
    """Keras's layer and ours, with the same weights that are no longer those of the start."""
    made = [kind(momentum=0.9, **options) for kind in (keras.layers.BatchNormalization, experiments.BatchNormalization)]
    for layer in made:
        layer.build(IMAGES.shape)
        for n, variable in enumerate(layer.variables):
            variable.assign(np.linspace(0.5 + n, 2 + n, variable.shape[0]))
    return made


def value(tensor):
    return np.asarray(ops.convert_to_numpy(ops.cast(ops.convert_to_tensor(tensor), "float32")))


def gradients(layer, x):
    """Of the sum of weighted outputs, for the inputs and the trainable weights."""
    inputs = [x, *(variable.value for variable in layer.trainable_variables)]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(tf.cast(layer(x, training=True), "float32") * WEIGHTS)
        return [value(gradient) for gradient in tape.gradient(loss, inputs)]
    import torch

    inputs[0] = x.detach().requires_grad_()
    loss = (layer(inputs[0], training=True).float() * torch.from_numpy(WEIGHTS)).sum()
    return [value(gradient.detach()) for gradient in torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"epsilon": 0.5}, {"axis": 3}])
def test_outputs_gradients_and_running_statistics_are_those_of_keras(options):
    theirs, ours = pair(**options)
    outputs = [value(layer(ops.convert_to_tensor(IMAGES), training=True)) for layer in (theirs, ours)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    for a, b in zip(theirs.variables, ours.variables):
        np.testing.assert_allclose(value(a), value(b), rtol=1e-6)
    if keras.backend.backend() != "jax":  # there it is Keras's own path
        for a, b in zip(*(gradients(layer, ops.convert_to_tensor(IMAGES)) for layer in (theirs, ours))):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    outputs = [value(layer(ops.convert_to_tensor(IMAGES), training=False)) for layer in (theirs, ours)]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_the_statistics_are_in_float32():
    theirs, ours = pair(dtype="mixed_bfloat16")
    x = ops.cast(ops.convert_to_tensor(IMAGES), "bfloat16")
    outputs = [layer(x, training=True) for layer in (theirs, ours)]
    assert [keras.backend.standardize_dtype(y.dtype) for y in outputs] == ["bfloat16"] * 2
    np.testing.assert_allclose(*map(value, outputs), rtol=1e-2, atol=1e-2)
    for a, b in zip(theirs.variables, ours.variables):  # in bfloat16 they would differ in the third digit
        assert keras.backend.standardize_dtype(b.dtype) == "float32"
        np.testing.assert_allclose(value(a), value(b), rtol=1e-6)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="has no fused kernel")
def test_the_fused_kernel_is_used_where_it_can_and_nowhere_else(monkeypatch):
    used, name = [], f"_fused_on_{keras.backend.backend()}"
    kernel = getattr(experiments, name)
    monkeypatch.setattr(experiments, name, lambda *arguments: used.append(1) or kernel(*arguments))
    layer, x = experiments.BatchNormalization(), ops.convert_to_tensor(IMAGES)
    for training in (True, False, None):
        layer(x, training=training)
    frozen = experiments.BatchNormalization(trainable=False)
    before = value(frozen(x, training=True))  # as in inference
    assert len(used) == 4 and np.allclose(before, IMAGES / np.sqrt(1.001), atol=1e-4)
    layer(x, training=True, mask=ops.ones(IMAGES.shape[:3], dtype="bool"))
    experiments.BatchNormalization(axis=1)(x, training=True)
    experiments.BatchNormalization()(ops.convert_to_tensor(IMAGES[:, 0, 0]), training=True)
    assert len(used) == 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_weights_in_half_precision_and_whole_numbers_are_taken_as_by_keras(dtype, kind):
    layers = [kind(dtype=dtype) for kind in (keras.layers.BatchNormalization, experiments.BatchNormalization)]
    x = ops.convert_to_tensor(IMAGES.astype(kind))
    for training in (True, False):
        first, second = (layer(x, training=training) for layer in layers)
        assert first.dtype == second.dtype
        np.testing.assert_allclose(value(first), value(second), atol=0.03)
    for theirs, ours in zip(*(layer.variables for layer in layers)):
        np.testing.assert_allclose(value(theirs), value(ours), rtol=0.02, atol=0.02)


def test_a_saved_network_comes_back_with_its_layer(tmp_path):
    model = experiments.residual_network(8, 1)
    model(ops.convert_to_tensor(rng.normal(size=(4, 32, 32, 3)).astype("float32")), training=True)
    model.save(tmp_path / "a.keras")
    back = keras.models.load_model(tmp_path / "a.keras")
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in model.layers]
    for a, b in zip(model.variables, back.variables):
        np.testing.assert_array_equal(value(a), value(b))


def test_the_residual_network_is_the_one_of_the_post():
    model = experiments.residual_network()
    assert model.count_params() == 1_016_970
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    filters = [layer.filters for layer in convolutions]
    assert filters == [128, *[32, 128, 128] * 8, 128]
    assert [layer.kernel_size[0] for layer in convolutions] == [3, *[3, 3, 1] * 8, 3]
    assert all(layer.momentum == 0.95 for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization))
    small = experiments.residual_network(8, 1, batch_norm_momentum=0.5)
    assert {layer.momentum for layer in small.layers if isinstance(layer, keras.layers.BatchNormalization)} == {0.5}
    assert small(np.zeros((2, 32, 32, 3))).shape == (2, 10)


@pytest.mark.parametrize(
    "arguments, what",
    [
        ((30,), "width=30.*multiple of 4"),
        ((0,), "width=0"),
        ((8, -1), "blocks=-1"),
        ((8, 1, 1.0), "batch_norm_momentum=1.0"),
    ],
)
def test_a_residual_network_that_cannot_be_built_says_why(arguments, what):
    with pytest.raises(ValueError, match=what):
        experiments.residual_network(*arguments)


def test_augmentation_moves_and_flips_in_training_only():
    model = experiments.augmented(lambda: keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Identity()]))
    images = np.tile(np.arange(32.0, dtype="float32")[:, None], (20, 32, 1, 3))
    np.testing.assert_array_equal(value(model(images, training=False)), images)
    moved = value(model(images, training=True))
    assert moved.shape == images.shape and len({image.tobytes() for image in moved}) > 5


def test_augmentation_flips_left_and_right_and_shifts_by_up_to_4_pixels():
    model = experiments.augmented(lambda: keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Identity()]))
    images = np.zeros((600, 32, 32, 3), "float32")
    images[:, 10, 8] = 1  # flipped: column 23; upside down it would be row 21
    _, rows, columns = np.nonzero(value(model(images, training=True))[..., 0])
    assert set(rows) == {*range(6, 15)} and set(columns) == {*range(4, 13), *range(19, 28)}


@pytest.mark.parametrize("option", ["synchronized", "renorm"])
def test_statistics_over_devices_and_renorm_are_left_to_keras(monkeypatch, option):
    if option not in inspect.signature(keras.layers.BatchNormalization).parameters:
        pytest.skip("this Keras has no such option")
    used = []
    for name in ("_fused_on_tensorflow", "_fused_on_torch"):
        monkeypatch.setattr(experiments, name, lambda *arguments: used.append(1))
    experiments.BatchNormalization(**{option: True})(ops.convert_to_tensor(IMAGES), training=True)
    assert used == []


def test_what_augmentation_shifts_in_is_black_and_pixels_stay_whole():
    model = experiments.augmented(lambda: keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Identity()]))
    images = value(model(np.ones((200, 32, 32, 3), "float32"), training=True))
    assert set(np.unique(images)) == {0, 1}
    assert images[:, 4:-4, 4:-4].min() == 1 and {image.sum() for image in images} > {28 * 28 * 3, 32 * 32 * 3}
