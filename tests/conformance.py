"""What people ask of a Keras optimizer, asked of CLR, on the backend that KERAS_BACKEND names.

    KERAS_BACKEND=jax python tests/conformance.py          # one line for each feature
    python tests/conformance.py --all                      # on every backend that is installed, as a table
    python tests/conformance.py --all --write              # and keep it, for notebook 05

Each check trains the linear regression of reference.py and compares with a loop in numpy. It runs with
keras.optimizers.SGD first: what Keras refuses to plain SGD (with which words stands at the check), it must refuse to
CLR, and everything else must give the numbers of the loop.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import pathlib
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
TABLE = ROOT / "figures" / "results" / "05_conformance.json"
BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}
TIME_LIMIT = 600  # seconds for all checks of a backend; its own child processes get a fifth

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if "XLA_FLAGS" not in os.environ and "KERAS_DISTRIBUTION_NUM_PROCESSES" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"  # JAX: two devices out of one processor,
    os.environ.setdefault("PJRT_NPROC", "16")  # which in a pool of two threads can wait for each other for ever
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from reference import (  # noqa: E402
    BATCH,
    CUT,
    HIGH,
    LOW,
    MOMENTA,
    RATES,
    START,
    STEPS,
    UPDATES,
    X,
    Y,
    momentum_at,
    numpy_update,
    regression_gradient,
)

from clr_utils import CLR, CyclicalLR, current_values, keras  # noqa: E402

BACKEND = keras.backend.backend()


class Contestant(NamedTuple):
    """An optimizer with what its learning rate and momentum are at each iteration."""

    new: Callable  # new(**options) -> optimizer
    rate: Callable
    momentum: Callable


SGD_WITH_MOMENTUM = Contestant(
    lambda **options: keras.optimizers.SGD(0.1, momentum=0.9, **options), lambda i: 0.1, lambda i: 0.9
)
CYCLING = Contestant(lambda **options: CLR((LOW, HIGH), STEPS, MOMENTA, **options), RATES["triangular"], momentum_at)

FEATURES = {}


class Feature(NamedTuple):
    check: Callable
    backends: tuple  # others have no such thing
    refused: dict  # backend -> words of the error that SGD gets there
    beyond_sgd: bool  # nothing to compare with SGD


def feature(name, backends=tuple(BACKENDS), refused=None, beyond_sgd=False):
    """Enters a check into FEATURES: a function of a contestant that raises where something is wrong."""

    def enter(check):
        FEATURES[name] = Feature(check, backends, refused or {}, beyond_sgd)
        return check

    return enter


def verdict(name):
    """What the table says about a feature on this backend: "same", "refused, as SGD is", "-", or what failed."""
    check, backends, refused, beyond_sgd = FEATURES[name]
    if BACKEND not in backends:
        return "-"
    if BACKEND in refused:
        for this in (SGD_WITH_MOMENTUM, CYCLING):
            who = type(this.new()).__name__
            try:
                check(this)
            except Exception as error:
                if refused[BACKEND] not in str(error):
                    return f"FAILED: {who} was refused with other words, {type(error).__name__}: {error}"
            else:
                return f"FAILED: {who} was not refused"
        return "refused, as SGD is"
    for this in [CYCLING] if beyond_sgd else [SGD_WITH_MOMENTUM, CYCLING]:
        try:
            check(this)
        except Exception as error:
            return f"FAILED with {type(this.new()).__name__}: {type(error).__name__}: {error}"
        finally:
            keras.config.set_dtype_policy("float32")
    return "same"


# --------------------------------------------------------------------------------------------- the yardstick


def numpy_loop(this, batches=range(UPDATES), start=START, gradient_at=regression_gradient, after=None, **options):
    """The weights after each update. after(i, w): what is done to them besides, such as an average."""
    w, v, path = start.astype(float), 0.0, []
    for i, batch in enumerate(batches):
        w, v = numpy_update(w, v, gradient_at(w, batch), this.rate(i), this.momentum(i), **options)
        w = after(i, w) if after else w
        path.append(w)
    return np.array(path)


def new_model(optimizer, **options):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False)])
    model.set_weights([START])
    model.compile(optimizer, "mse", **options)
    return model


def train(model, first=0, last=UPDATES, x=X, y=Y, **options):
    part = slice(first * BATCH, last * BATCH)
    model.fit(x[part], y[part], batch_size=BATCH, shuffle=False, verbose=0, **options)


def weights(model):
    return np.asarray(model.get_weights()[0], "float64")


def close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def follows_the_loop(this, optimizer_options=None, expected=None, nesterov=False, **compile_options):
    """Trains and compares the weights after every update."""
    model, path = new_model(this.new(nesterov=nesterov, **(optimizer_options or {})), **compile_options), Path()
    train(model, callbacks=[path])
    close(path.weights, numpy_loop(this, nesterov=nesterov) if expected is None else expected)


class Path(keras.callbacks.Callback):
    """Keeps the weights after every update."""

    def __init__(self):
        super().__init__()
        self.weights = []

    def on_train_batch_end(self, batch, logs=None):
        self.weights.append(weights(self.model))  # through self.model, which is up to date under JAX too


def has_come_to(this, model, updates=UPDATES):
    """The model is where the loop is after so many updates, and so are its rate and momentum."""
    close(weights(model), numpy_loop(this)[updates - 1])
    close(current_values(model.optimizer), (this.rate(updates), this.momentum(updates)), 1e-6)


@contextlib.contextmanager
def temporary_folder():
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)


# -------------------------------------------------------------------------------------------------- compiled


@feature("compiled as Keras does by itself")
def _(this):
    follows_the_loop(this)


@feature("jit_compile=True (XLA, torch.compile)")
def _(this):
    follows_the_loop(this, jit_compile=True)


@feature("jit_compile=False")
def _(this):
    follows_the_loop(this, jit_compile=False)


@feature("run_eagerly=True")
def _(this):
    follows_the_loop(this, run_eagerly=True)


@feature("Nesterov momentum")
def _(this):
    follows_the_loop(this, nesterov=True)


@feature("steps_per_execution=4", refused={"torch": "steps_per_execution"})
def _(this):
    model = new_model(this.new(), steps_per_execution=4)
    train(model)
    has_come_to(this, model)


# ------------------------------------------------------------------------------------------------- precision


@feature("mixed_float16; a step skipped for an overflow does not move the cycle")
def _(this):
    keras.config.set_dtype_policy("mixed_float16")
    overflow = [3, 4, 17, 40]
    x = X.copy()
    for batch in overflow:
        x[batch * BATCH] = 60000.0  # times a weight it is more than float16 can hold
    scaled = keras.optimizers.LossScaleOptimizer(this.new(), initial_scale=64.0)
    model = new_model(scaled)
    train(model, x=x)
    assert int(scaled.iterations) == UPDATES - len(overflow)
    close(current_values(scaled), (this.rate(UPDATES - len(overflow)), this.momentum(UPDATES - len(overflow))), 1e-6)
    done = [batch for batch in range(UPDATES) if batch not in overflow]
    close(weights(model), numpy_loop(this, done)[-1], 5e-3)


@feature("mixed_bfloat16")
def _(this):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = new_model(this.new())
    train(model)
    assert all(v.dtype == "float32" for v in model.trainable_variables + model.optimizer.variables[1:])
    close(current_values(model.optimizer), (this.rate(UPDATES), this.momentum(UPDATES)), 1e-6)
    close(weights(model), numpy_loop(this)[-1], 3e-2)


@feature("variables of several dtypes")
def _(this):
    optimizer = this.new()
    tolerance = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
    variables = [keras.Variable(START, dtype=dtype) for dtype in tolerance]
    optimizer.build(variables)
    path = numpy_loop(this, range(10))
    for i in range(10):
        gradient = regression_gradient(START if i == 0 else path[i - 1], i)
        optimizer.apply([keras.ops.convert_to_tensor(gradient.astype("float32"))] * 3, variables)
    for variable in variables:
        close(keras.ops.convert_to_numpy(keras.ops.cast(variable, "float32")), path[-1], tolerance[variable.dtype])


# --------------------------------------------------------------------------------- what every optimizer can do


@feature("gradient accumulation; the counter counts batches")
def _(this):
    every = 4
    model = new_model(this.new(gradient_accumulation_steps=every))
    train(model)
    w, v = START.astype(float), 0.0
    for i in range(every - 1, UPDATES, every):  # the rate is that of the last batch of each group
        gradient = np.mean([regression_gradient(w, batch) for batch in range(i - every + 1, i + 1)], axis=0)
        w, v = numpy_update(w, v, gradient, this.rate(i), this.momentum(i))
    close(weights(model), w)


@feature("use_ema")
def _(this):
    average = START.astype(float)

    def averaged(i, w):
        nonlocal average
        average = w if i == 0 else 0.9 * average + 0.1 * w
        return average if (i + 1) % 5 == 0 else w

    expected = numpy_loop(this, after=averaged)
    follows_the_loop(this, dict(use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=5), expected)


@feature("clipnorm")
def _(this):
    def clipped(w, batch):
        gradient = regression_gradient(w, batch)
        return gradient * min(1, 0.15 / np.linalg.norm(gradient))

    follows_the_loop(this, {"clipnorm": 0.15}, numpy_loop(this, gradient_at=clipped))


@feature("clipvalue")
def _(this):
    expected = numpy_loop(this, gradient_at=lambda w, batch: np.clip(regression_gradient(w, batch), -0.05, 0.05))
    follows_the_loop(this, {"clipvalue": 0.05}, expected)


@feature("global_clipnorm, over two variables")
def _(this):
    optimizer = this.new(global_clipnorm=0.5)
    variables = [keras.Variable(START), keras.Variable(START[0])]
    optimizer.build(variables)
    gradients = [np.full((3, 2), 3.0), np.full(2, 4.0)]
    optimizer.apply([keras.ops.convert_to_tensor(g.astype("float32")) for g in gradients], variables)
    norm = np.sqrt(6 * 9 + 2 * 16)
    for variable, start, gradient in zip(variables, (START, START[0]), gradients):
        close(keras.ops.convert_to_numpy(variable), start - this.rate(0) * 0.5 / norm * gradient)


@feature("weight_decay, times the rate of the moment")
def _(this):
    w, v, path = START.astype(float), 0.0, []
    for i in range(UPDATES):
        gradient = regression_gradient(w, i)
        w = w * (1 - 0.3 * this.rate(i))
        w, v = numpy_update(w, v, gradient, this.rate(i), this.momentum(i))
        path.append(w)
    follows_the_loop(this, {"weight_decay": 0.3}, path)


@feature("a frozen layer")
def _(this):
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(3, use_bias=False), keras.layers.Dense(2, use_bias=False)]
    )
    model.set_weights([np.eye(3), START])
    model.layers[0].trainable = False
    model.compile(this.new(), "mse")
    train(model)
    close(model.layers[0].get_weights()[0], np.eye(3), 0)
    close(model.layers[1].get_weights()[0], numpy_loop(this)[-1])


@feature("a variable without gradient (None)")
def _(this):
    optimizer = this.new()
    used, unused = keras.Variable(START), keras.Variable(START)
    optimizer.build([used, unused])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of it, as it should
        for _ in range(2):
            optimizer.apply([keras.ops.ones((3, 2)), None], [used, unused])
    close(keras.ops.convert_to_numpy(unused), START, 0)
    close(
        keras.ops.convert_to_numpy(used), numpy_loop(this, range(2), gradient_at=lambda w, batch: np.ones((3, 2)))[-1]
    )


@feature("an embedding (sparse gradients in TensorFlow)")
def _(this):
    words = np.random.default_rng(1).integers(0, 9, len(Y))  # word 9 never occurs
    table = np.random.default_rng(2).normal(size=(10, 2)).astype("float32")
    model = keras.Sequential([keras.Input((), dtype="int32"), keras.layers.Embedding(10, 2)])
    model.set_weights([table])
    model.compile(this.new(), "mse")
    train(model, x=words)

    def gradient_at(w, batch):
        rows = slice(batch * BATCH, (batch + 1) * BATCH)
        gradient = np.zeros_like(w)
        np.add.at(gradient, words[rows], 2 / Y[rows].size * (w[words[rows]] - Y[rows]))
        return gradient

    close(weights(model), numpy_loop(this, start=table, gradient_at=gradient_at)[-1])
    close(weights(model)[9], table[9], 0)


# -------------------------------------------------------------------------------------------- loops of your own


@feature("train_on_batch")
def _(this):
    model = new_model(this.new())
    for i in range(UPDATES):
        model.train_on_batch(X[i * BATCH : (i + 1) * BATCH], Y[i * BATCH : (i + 1) * BATCH])
    has_come_to(this, model)


@feature("apply_gradients in a loop of your own")
def _(this):
    model = new_model(this.new())
    optimizer = model.optimizer
    if BACKEND == "tensorflow":
        import tensorflow as tf

        def gradients_of(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2)
            return tape.gradient(loss, model.trainable_variables)
    elif BACKEND == "torch":

        def gradients_of(x, y):
            model.zero_grad()
            loss = ((model(x) - keras.ops.convert_to_tensor(y)) ** 2).mean()
            loss.backward()
            return [v.value.grad for v in model.trainable_variables]
    else:
        import jax

        def loss(values, x, y):
            return ((model.stateless_call(values, [], x)[0] - y) ** 2).mean()

        def gradients_of(x, y):
            return jax.grad(loss)([v.value for v in model.trainable_variables], x, y)

    for i in range(UPDATES):
        gradients = gradients_of(X[i * BATCH : (i + 1) * BATCH], Y[i * BATCH : (i + 1) * BATCH])
        with no_gradients_recorded():
            optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    has_come_to(this, model)


@contextlib.contextmanager
def no_gradients_recorded():
    if BACKEND == "torch":
        import torch

        with torch.no_grad():
            yield
    else:
        yield


@feature("stateless_apply in a loop of your own", refused={"tensorflow": "stateless"})
def _(this):
    optimizer, variable = this.new(), keras.Variable(START)
    optimizer.build([variable])
    step = optimizer.stateless_apply
    if BACKEND == "jax":
        import jax

        step = jax.jit(step)
    state, values, path = [v.value for v in optimizer.variables], [variable.value], numpy_loop(this)
    for i in range(UPDATES):
        gradient = regression_gradient(START if i == 0 else path[i - 1], i)
        values, state = step(state, [keras.ops.convert_to_tensor(gradient.astype("float32"))], values)
    close(keras.ops.convert_to_numpy(values[0]), path[-1])


# --------------------------------------------------------------------------------------------- save and resume


def resumes(this, reopen):
    """A model that reopen(first, folder) makes of one trained until CUT goes on where that one stopped."""
    with temporary_folder() as folder:
        first = new_model(this.new())
        train(first, 0, CUT)
        model = reopen(first, folder)
        has_come_to(this, model, CUT)
        train(model, CUT, UPDATES)
        has_come_to(this, model)


@feature("saved as .keras and loaded")
def _(this):
    def reopen(first, folder):
        first.save(folder / "model.keras")
        return keras.models.load_model(folder / "model.keras")

    resumes(this, reopen)


@feature("save_weights, optimizer.build, load_weights")
def _(this):
    def reopen(first, folder):
        first.save_weights(folder / "model.weights.h5")
        model = new_model(this.new())
        model.optimizer.build(model.trainable_variables)
        model.load_weights(folder / "model.weights.h5")
        return model

    resumes(this, reopen)


@feature("save_weights, load_weights without build (SGD starts anew with a warning)", beyond_sgd=True)
def _(this):
    def reopen(first, folder):
        first.save_weights(folder / "model.weights.h5")
        model = new_model(this.new())
        model.load_weights(folder / "model.weights.h5")
        return model

    resumes(this, reopen)


@feature("pickle of the model")
def _(this):
    resumes(this, lambda first, folder: pickle.loads(pickle.dumps(first)))


@feature("copy.deepcopy of the model")
def _(this):
    resumes(this, lambda first, folder: copy.deepcopy(first))


@feature("clone_model with the optimizer's config")
def _(this):
    model = new_model(this.new(nesterov=True))
    clone = keras.models.clone_model(model)
    clone.set_weights([START])
    clone.compile(type(model.optimizer).from_config(model.optimizer.get_config()), "mse")
    train(clone)
    close(weights(clone), numpy_loop(this, nesterov=True)[-1])


EVERY, KILLED_AT = 10, 47  # a backup after every so many batches; killed in the second of two epochs of 30


def train_with_backup(model, folder, kill_at=None):
    """Two epochs of 30 batches, the data of each the first 30."""
    seen = []

    def count(batch, logs):
        seen.append(batch)
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    backup = keras.callbacks.BackupAndRestore(folder, save_freq=EVERY, delete_checkpoint=False)
    counter = keras.callbacks.LambdaCallback(on_train_batch_end=count)
    train(model, 0, 30, epochs=2, callbacks=[backup, counter])
    return seen


@feature("BackupAndRestore after a kill in mid-epoch", beyond_sgd=True)
def _(this):
    with temporary_folder() as folder:
        with child_processes(["--killed", folder]) as [killed]:
            killed.wait(TIME_LIMIT / 5)
        assert killed.returncode == -signal.SIGKILL, killed.stdout.read()
        model = new_model(this.new())
        seen = train_with_backup(model, folder / "backup")
    # What was trained since the last backup is lost, and Keras begins the interrupted epoch anew.
    batches = [i % 30 for i in range(KILLED_AT // EVERY * EVERY)] + seen
    assert len(seen) == 30 and int(model.optimizer.iterations) == len(batches)
    close(weights(model), numpy_loop(this, batches)[-1])
    close(current_values(model.optimizer), (this.rate(len(batches)), this.momentum(len(batches))), 1e-6)


@contextlib.contextmanager
def child_processes(*commands, environments=None):
    """Runs this file once for each list of arguments; none of them outlives the block."""
    environments = environments or [{}] * len(commands)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *map(str, arguments)],
            env={**os.environ, "KERAS_BACKEND": BACKEND, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for arguments, environment in zip(commands, environments)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


# ---------------------------------------------------------------------------------------- CyclicalLR for others


def driven_by_cyclical_lr(name, **options):
    """The optimizer with CyclicalLR does what it does when the same rates are assigned by hand, and resumes."""
    kind = getattr(keras.optimizers, name)

    def new():
        return new_model(kind(CyclicalLR((LOW / 10, HIGH / 10), STEPS, "cosine"), **options))

    by_hand = new_model(kind(0.5, **options))
    for i in range(UPDATES):
        by_hand.optimizer.learning_rate = RATES["cosine"](i) / 10
        by_hand.train_on_batch(X[i * BATCH : (i + 1) * BATCH], Y[i * BATCH : (i + 1) * BATCH])
    assert np.abs(weights(by_hand) - START).max() > 0.05

    uninterrupted = new()
    train(uninterrupted)
    close(weights(uninterrupted), weights(by_hand))

    with temporary_folder() as folder:
        first = new()
        train(first, 0, CUT)
        first.save(folder / "model.keras")
        first.save_weights(folder / "model.weights.h5")
        model = keras.models.load_model(folder / "model.keras")
        from_weights = new()
        from_weights.optimizer.build(from_weights.trainable_variables)
        from_weights.load_weights(folder / "model.weights.h5")
    for resumed in (model, from_weights):
        train(resumed, CUT, UPDATES)
        close(weights(resumed), weights(uninterrupted), 1e-6)


for _name, _options in [("Adam", {}), ("AdamW", {}), ("Nadam", {}), ("RMSprop", {"momentum": 0.5}), ("Muon", {})]:
    if hasattr(keras.optimizers, _name):  # Muon came with Keras 3.11

        @feature(f"CyclicalLR with {_name}, saved and resumed", beyond_sgd=True)
        def _(this, _name=_name, _options=_options):
            driven_by_cyclical_lr(_name, **_options)


# --------------------------------------------------------------------------------------------- several devices


@contextlib.contextmanager
def two_devices():
    """MirroredStrategy over two logical CPUs, or DataParallel over two devices of one process."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
            yield
    else:
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"]))
        try:
            yield
        finally:
            keras.distribution.set_distribution(None)


@feature("two devices in one process", backends=("tensorflow", "jax"))
def _(this):
    with two_devices():
        model = new_model(this.new())
        train(model)
    close(weights(model), numpy_loop(this)[-1])


@feature(
    "two devices, gradient accumulation", backends=("tensorflow", "jax"), refused={"tensorflow": "merge_call"}
)  # keras-team/keras#20582
def _(this):
    with two_devices():
        model = new_model(this.new(gradient_accumulation_steps=2))
        train(model)
    w, v = START.astype(float), 0.0
    for i in range(1, UPDATES, 2):
        gradient = (regression_gradient(w, i - 1) + regression_gradient(w, i)) / 2
        w, v = numpy_update(w, v, gradient, this.rate(i), this.momentum(i))
    close(weights(model), w)


@feature("two processes (keras.distribution over jax.distributed)", backends=("jax",), beyond_sgd=True)
def _(this):
    with temporary_folder() as folder:
        address = f"127.0.0.1:{free_port()}"
        environments = [
            {
                "XLA_FLAGS": "",
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
                "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
                "KERAS_DISTRIBUTION_PROCESS_ID": str(me),
            }
            for me in range(2)
        ]
        with child_processes(*[["--process", folder]] * 2, environments=environments) as both:
            for process in both:
                said, _ = process.communicate(timeout=TIME_LIMIT / 5)
                assert process.returncode == 0, said
        for me in range(2):
            close(np.load(folder / f"{me}.npy"), numpy_loop(this)[-1])


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def train_as_one_of_several_processes(folder):
    keras.distribution.initialize()
    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    import jax

    me, share = jax.process_index(), BATCH // jax.process_count()
    mine = np.arange(UPDATES * BATCH).reshape(UPDATES, -1, share)[:, me].ravel()  # my rows of every batch
    model = new_model(CYCLING.new())
    model.fit(X[mine], Y[mine], batch_size=share, shuffle=False, verbose=0)
    np.save(folder / f"{me}.npy", weights(model))


# -------------------------------------------------------------------------------------------------------- main


def on_every_backend():
    """{backend: {"versions": ..., "features": {name: verdict}}}, None for a backend that is not installed."""
    return {backend: on_backend(backend) for backend in BACKENDS}


def on_backend(backend):
    """The checks in a process of their own, or None where the backend is not installed."""
    if importlib.util.find_spec(backend) is None:
        return None
    environment = {**os.environ, "KERAS_BACKEND": backend}
    environment.pop("XLA_FLAGS", None)
    done = subprocess.run(
        [sys.executable, __file__, "--json"], env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    if done.returncode:
        raise RuntimeError(f"The checks on {backend} ended with an error:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def on_this_backend(only="", report=lambda line: None):
    versions = {"keras": keras.version(), BACKEND: sys.modules[BACKEND].__version__}
    verdicts = {}
    for name in (name for name in FEATURES if only in name):
        start = time.monotonic()
        verdicts[name] = verdict(name)
        report(f"{name}: {verdicts[name]} ({time.monotonic() - start:.1f} s)")
    return {"versions": versions, "features": verdicts}


def table(results):
    """The results as a table in Markdown: a row for each feature, a column for each backend."""
    rows = [["feature", *BACKENDS.values()], ["---"] * (1 + len(BACKENDS))]
    for name in FEATURES:
        cells = [
            results[backend]["features"].get(name, "-") if results[backend] else "not installed" for backend in BACKENDS
        ]
        rows.append([name, *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="on every backend that is installed")
    parser.add_argument("--write", action="store_true", help=f"with --all: keep the table in {TABLE.relative_to(ROOT)}")
    parser.add_argument("--only", default="", metavar="TEXT", help="only features with this in their name")
    parser.add_argument("--json", action="store_true", help="the last line of the output is the result")
    parser.add_argument("--killed", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write and not options.all or options.only and options.all:
        parser.error("--write needs --all, and --only goes without it: the table has every feature on every backend")
    if options.killed:
        train_with_backup(new_model(CYCLING.new()), options.killed / "backup", KILLED_AT)
    elif options.process:
        train_as_one_of_several_processes(options.process)
    elif options.all:
        results = on_every_backend()
        print(table(results))
        if options.write:
            missing = [backend for backend, found in results.items() if found is None]
            if missing:
                sys.exit(f"Not written: {' and '.join(missing)} is not installed.")
            TABLE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    else:
        results = on_this_backend(options.only, lambda line: print(line, flush=True))
        if options.json:
            print(json.dumps(results))


if __name__ == "__main__":
    if BACKEND == "tensorflow":  # before TensorFlow looks at its devices
        import tensorflow

        cpu = tensorflow.config.list_physical_devices("CPU")[0]
        halves = [tensorflow.config.LogicalDeviceConfiguration()] * 2
        tensorflow.config.set_logical_device_configuration(cpu, halves)
    main()
