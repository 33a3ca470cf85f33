"""run_experiment and its results file, and what is made of the lines: summaries, comparisons, tables."""

import contextlib
import functools
import importlib
import json
import linecache
import math
import os
import pathlib
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import experiments  # isort: skip  # imports Keras without TensorFlow's greeting, so it comes first
import keras
import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from clr_utils import CLR, CyclicalLR
from experiments import Dataset, Run

ROOT = pathlib.Path(__file__).resolve().parent.parent
rng = np.random.default_rng(0)
X = rng.integers(0, 256, (96, 4)).astype("uint8")
Y = (X[:, 0] > 127).astype("uint8")
DATA = Dataset((X[:64], Y[:64]), (X[64:], Y[64:]), "mnist", "made here")


def network(units=8, sigmoid=False):
    layers = [keras.layers.Dense(units, activation="relu"), keras.layers.Dropout(0.2)]
    layers.append(keras.layers.Dense(1, "sigmoid") if sigmoid else keras.layers.Dense(2, "softmax", dtype="float32"))
    return keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 255), *layers])


def logits():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])


def sgd(updates, learning_rate=0.1):
    return keras.optimizers.SGD(learning_rate, momentum=0.9)


ROW = Run("row", network, sgd, batch_size=16)


def train(*runs, seeds=(0,), data=DATA, **options):
    return records(experiments.run_experiment("t", runs or [ROW], seeds, data, **options))


def records(results):
    """The rows of a DataFrame as dicts. A column in which some are None holds NaN."""
    return results.astype(object).where(results.notna(), None).to_dict("records")


def read(*arguments):
    return records(experiments.read_results("t", *arguments))


@pytest.fixture(autouse=True)
def results_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    return tmp_path / "figures" / "results" / "t.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def results_of(line):
    return {key: line[key] for key in ("test_accuracy", "test_loss", "curve", "diverged_at", "code")}


# ---- a line


def test_a_line_says_what_ran_and_how_it_ended(results_file):
    (line,) = train(ROW._replace(epochs=2, notes={"peak": 0.1}))
    assert lines(results_file) == [line]
    assert (line["experiment"], line["run"], line["profile"], line["seed"]) == ("t", "row", "smoke", 0)
    assert (line["epochs"], line["batch_size"], line["train_size"], line["updates"]) == (2, 16, 64, 8)
    assert line["data"] == "mnist" and line["peak"] == 0.1 and "diverged_at" in line
    assert 0 <= line["test_accuracy"] <= 1 and line["test_loss"] > 0 and line["seconds"] > 0
    assert keras.__version__ in line["hardware"] and line["backend"] == keras.backend.backend()


def test_accuracy_and_loss_are_those_of_the_trained_model_on_the_test_part():
    def constant():  # says class 1 with probability 0.75, whatever comes in
        start = {"kernel_initializer": "zeros", "bias_initializer": keras.initializers.Constant([0.0, math.log(3)])}
        return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, "softmax", **start)])

    (line,) = train(Run("row", constant, lambda updates: sgd(updates, 0.0)))
    ones = (DATA.test[1] == 1).mean()
    assert line["test_accuracy"] == pytest.approx(ones)
    assert line["test_loss"] == pytest.approx(-ones * math.log(0.75) - (1 - ones) * math.log(0.25), abs=1e-5)


def test_every_epoch_keeps_the_accuracy_after_each():
    (line,) = train(ROW._replace(epochs=3), every_epoch=True)
    after = line["every_epoch"]
    assert len(after["accuracy"]) == len(after["loss"]) == 3
    assert (after["accuracy"][-1], after["loss"][-1]) == (line["test_accuracy"], line["test_loss"])
    assert len(set(after["loss"])) == 3


def test_the_curve_is_the_loss_of_every_update_with_its_learning_rate_and_momentum():
    # At learning rate 0 the loss of each batch follows from the initial weights and the stated order alone.
    def model():
        layers = [keras.layers.Rescaling(1 / 255), keras.layers.Dense(8, "relu"), keras.layers.Dense(2, "softmax")]
        return keras.Sequential([keras.Input((4,)), *layers])

    run = Run("row", model, lambda updates: CLR((0, 0), 3, (0.95, 0.85)), epochs=2, batch_size=10)
    (line,) = train(run, seeds=(5,))
    keras.utils.set_random_seed(5)
    built, order, expected = model(), np.random.default_rng(5), []
    for _ in range(2):
        chosen = order.permutation(64)
        for start in range(0, 64, 10):
            batch = chosen[start : start + 10]
            p = keras.ops.convert_to_numpy(built(X[batch].astype("float32")))
            expected.append(-np.log(p[np.arange(len(batch)), Y[batch]]).mean())
    curve = line["curve"]
    np.testing.assert_allclose(curve["loss"], expected, atol=6e-5)
    assert curve["update"] == list(range(14))


@pytest.mark.parametrize(
    "make, rates, momenta",
    [
        (lambda updates: CLR((0.01, 0.04), 3, (0.9, 0.6)), [0.01, 0.02, 0.03, 0.04], [0.9, 0.8, 0.7, 0.6]),
        (lambda updates: keras.optimizers.SGD(0.1, momentum=0.5), [0.1] * 4, [0.5] * 4),
        (lambda updates: keras.optimizers.Adam(CyclicalLR((0.1, 0.4), 3)), [0.1, 0.2, 0.3, 0.4], None),
        (
            lambda updates: keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.8, 1, 0.5)),
            [0.8, 0.4, 0.2, 0.1],
            None,
        ),
    ],
)
def test_the_curve_has_the_learning_rate_and_momentum_of_any_optimizer(make, rates, momenta):
    (line,) = train(Run("row", network, make, batch_size=16))
    assert line["curve"]["learning_rate"] == pytest.approx(rates, rel=1e-3)
    assert line["curve"]["momentum"] == (None if momenta is None else pytest.approx(momenta))


def test_a_long_curve_is_thinned_to_means():
    loss = np.arange(1050.0)
    curve = experiments._curve(loss, sgd(1050))
    assert len(curve["update"]) == len(curve["loss"]) == experiments.CURVE_POINTS == 100
    assert curve["update"][:3] == [0, 10, 21] and curve["loss"][:2] == [4.5, 15.0]
    assert curve["loss"][-1] == np.mean(loss[curve["update"][-1] :])


# ---- what follows from what


def test_everything_follows_from_the_seed(results_file):
    first, other = train(seeds=(0, 1))
    results_file.unlink()
    (again,) = train()
    assert results_of(again) == results_of(first)
    assert other["test_loss"] != first["test_loss"] and other["code"] == first["code"]


def test_weights_data_order_and_dropout_are_the_same_for_every_optimizer():
    # At learning rate 0 nothing else is left to decide the losses.
    still = [
        ROW._replace(name="sgd", make_optimizer=lambda updates: sgd(updates, 0.0)),
        ROW._replace(name="adam", make_optimizer=lambda updates: keras.optimizers.Adam(0.0)),
        ROW._replace(name="clr", make_optimizer=lambda updates: CLR((0.0, 0.0), 3, (0.95, 0.85))),
    ]
    trained = train(*[run._replace(epochs=2) for run in still])
    assert trained[0]["curve"]["loss"] == trained[1]["curve"]["loss"] == trained[2]["curve"]["loss"]
    assert len(set(trained[0]["curve"]["loss"])) == 8  # epochs differ in order and dropout


def test_the_optimizer_is_made_for_the_number_of_updates():
    asked = []
    train(ROW._replace(epochs=3, batch_size=10, make_optimizer=lambda updates: asked.append(updates) or sgd(updates)))
    assert set(asked) == {21}


def test_a_finished_run_is_not_repeated(results_file):
    first = train(seeds=(0, 1))
    assert train(seeds=(0, 1)) == first and len(lines(results_file)) == 2


def test_a_run_recorded_without_each_epoch_is_repeated_where_they_are_asked_for(results_file):
    (first,) = train(ROW._replace(epochs=2))
    (second,) = train(ROW._replace(epochs=2), every_epoch=True)
    assert len(lines(results_file)) == 2 and results_of(first) == results_of(second)
    assert read() == [second]
    assert train(ROW._replace(epochs=2), every_epoch=True) == train(ROW._replace(epochs=2)) == [second]


def test_notes_do_not_overwrite_what_was_measured():
    (line,) = train(ROW._replace(notes={"seed": 7, "peak": 0.1}))
    assert line["seed"] == 0 and line["peak"] == 0.1


@pytest.mark.parametrize(
    "change",
    [
        dict(make_model=lambda: network(9)),
        dict(make_optimizer=lambda updates: sgd(updates, 0.2)),
        dict(make_optimizer=lambda updates: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)),
        dict(make_optimizer=lambda updates: CLR((0.1, 0.1), 3, 0.9, "cosine")),
        dict(epochs=2),
        dict(batch_size=8),
    ],
)
def test_whatever_decides_the_result_makes_a_new_run(results_file, change):
    (first,), (changed,) = train(), train(ROW._replace(**change))
    assert first["code"] != changed["code"] and len(lines(results_file)) == 2
    assert read([ROW], 64, 32) == [first]
    assert read([ROW._replace(**change)], 64, 32) == [changed]


def test_the_size_of_the_data_and_what_it_is_tested_on_make_a_new_run_and_its_source_too(results_file):
    held_out = experiments.hold_out(DATA, 32)
    fewer = DATA._replace(train=(X[:48], Y[:48]))
    made = [train(data=data)[0] for data in (DATA, held_out, fewer, DATA._replace(source="synthetic"))]
    assert len(lines(results_file)) == 4
    assert len({line["code"] for line in made}) == 3 and made[0]["code"] == made[3]["code"]


def test_code_does_not_depend_on_names_or_how_often_a_model_was_built():
    assert experiments.code_of(ROW, 64, 32) == experiments.code_of(ROW._replace(name="other"), 64, 32)

    def branched(joined_first):
        inputs = keras.Input((4,))
        a, b = keras.layers.Dense(3)(inputs), keras.layers.Dense(3)(inputs)
        c = keras.layers.Dense(3)(a if joined_first else b)
        return keras.Model(inputs, keras.layers.Dense(2, "softmax")(keras.layers.Concatenate()([a, b, c])))

    codes = [experiments.code_of(Run("", lambda j=j: branched(j), sgd), 64, 32) for j in (True, True, False)]
    assert codes[0] == codes[1] != codes[2]


def test_runs_that_share_a_network_build_it_once_and_have_the_codes_that_each_has_alone(results_file):
    built = []

    def counted():
        built.append(keras.config.dtype_policy().name)
        return network()

    def drawn(updates):
        return keras.optimizers.SGD(random.random())

    makes = {"sgd": sgd, "drawn": drawn, "drawn again": drawn}
    runs = [Run(name, counted, make, batch_size=16) for name, make in makes.items()]
    runs.append(runs[0]._replace(name="bfloat16", precision="bfloat16"))
    alone = [experiments.code_of(run, 64, 32) for run in runs]
    assert len(set(alone)) == 3 and alone[1] == alone[2]
    for order in (runs, runs[::-1]):
        built.clear()
        assert read(order, 64, 32) == []
        assert sorted(built) == ["float32"] * 2 + ["mixed_bfloat16"] * 2
        codes = {run.name: code for run, (code, _) in zip(order, experiments._codes_and_models(order, 64, 32, "test"))}
        assert [codes[run.name] for run in runs] == alone
    assert [line["code"] for line in train(*runs)] == alone
    assert [line["code"] for line in read(runs, 64, 32)] == alone


def excluded(updates, names):
    optimizer = keras.optimizers.AdamW(0.01)
    optimizer.exclude_from_weight_decay(var_names=names)
    return optimizer


def started(updates, at):
    optimizer = sgd(updates)
    optimizer.iterations.assign(at)
    return optimizer


def scaled(factor):
    layers = [keras.layers.Lambda(lambda x: x * factor, output_shape=(4,)), keras.layers.Dense(2, "softmax")]
    return keras.Sequential([keras.Input((4,)), *layers])


def with_bias(value):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, "softmax")])
    model.layers[-1].bias.assign(value)
    return model


def with_kernel(*value):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, "softmax")])
    for all_of in value:
        model.layers[-1].kernel.assign(np.full((4, 2), all_of))
    return model


class Within(keras.layers.Layer):
    def __init__(self, trainable):
        super().__init__()
        self.within = keras.layers.Dense(4, trainable=trainable)

    def call(self, x):
        return self.within(x)


class Halved(keras.layers.Layer):
    def call(self, x):
        return x / 2


class Thirds(keras.layers.Layer):
    def call(self, x):
        return x / 3


Thirds.__name__ = "Halved"  # the configuration shows no more than the name


def with_layer(kind):
    return keras.Sequential([keras.Input((4,)), kind(), keras.layers.Dense(2, "softmax")])


def joined(skip):
    inputs = keras.Input((4,))
    first = inputs + keras.layers.Dense(4)(inputs)
    second = first + keras.layers.Dense(4)(first)
    outputs = (first if skip else second) + keras.layers.Dense(4)(second)
    return keras.Model(inputs, keras.layers.Dense(2, "softmax")(outputs))


class Times(keras.layers.Layer):
    def __init__(self, factor):
        super().__init__()
        self._factor = factor

    def call(self, x):
        return x * self._factor


class Steady(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, rate):
        self._rate = rate

    def __call__(self, step):
        return self._rate

    def get_config(self):
        return {}


@pytest.mark.parametrize(
    "one, other",
    [
        (
            dict(make_optimizer=lambda updates: excluded(updates, ["bias"])),
            dict(make_optimizer=lambda updates: excluded(updates, ["kernel"])),
        ),
        (
            dict(make_optimizer=lambda updates: started(updates, 0)),
            dict(make_optimizer=lambda updates: started(updates, 3)),
        ),
        (dict(make_model=lambda: scaled(2)), dict(make_model=lambda: scaled(3))),
        (dict(make_model=lambda: with_bias([1.0, 2.0])), dict(make_model=lambda: with_bias([2.0, 1.0]))),
        (dict(make_model=lambda: with_kernel()), dict(make_model=lambda: with_kernel(0))),
        (dict(make_model=lambda: with_kernel(0)), dict(make_model=lambda: with_kernel(1))),
        (dict(make_model=lambda: with_layer(Halved)), dict(make_model=lambda: with_layer(Thirds))),
        (
            dict(make_model=lambda: with_layer(lambda: Within(True))),
            dict(make_model=lambda: with_layer(lambda: Within(False))),
        ),
        (dict(precision="float32"), dict(precision="bfloat16")),
        (dict(make_model=lambda: joined(True)), dict(make_model=lambda: joined(False))),
        (
            dict(make_model=lambda: with_layer(lambda: keras.layers.Activation("relu", name="relu"))),
            dict(make_model=lambda: with_layer(lambda: keras.layers.Activation("tanh", name="tanh"))),
        ),
        (
            dict(make_model=lambda: with_layer(lambda: keras.layers.Softmax())),
            dict(make_model=lambda: with_layer(lambda: keras.layers.Softmax(axis=0))),
        ),
        (dict(make_model=lambda: with_layer(lambda: Times(2))), dict(make_model=lambda: with_layer(lambda: Times(3)))),
        (
            dict(make_optimizer=lambda updates: keras.optimizers.SGD(Steady(0.1))),
            dict(make_optimizer=lambda updates: keras.optimizers.SGD(Steady(0.2))),
        ),
    ],
    ids=[
        *("excluded from weight decay", "iterations", "closure", "weights", "weights of 0", "weights of 1"),
        *("own class", "a frozen layer within one of your own", "precision", "x + y"),
        *("layers named like activations", "an activation named like a layer", "attribute of a layer"),
        "attribute of a schedule",
    ],
)
def test_what_no_configuration_shows_is_in_the_code(one, other):
    codes = [experiments.code_of(ROW._replace(**change), 64, 32) for change in (one, one, other)]
    assert codes[0] == codes[1] != codes[2]


def test_where_a_lambda_stands_is_not_in_the_code():
    text = "def way():\n    return keras.layers.Lambda(lambda x: x / 3, output_shape=(4,))"
    makers = [
        written_in({"keras": keras, "__name__": name}, lines + text) for name, lines in (("a", ""), ("b", "\n\n"))
    ]
    one, other = (experiments.code_of(ROW._replace(make_model=lambda m=m: with_layer(m)), 64, 32) for m in makers)
    assert one == other


def test_a_seed_that_keras_draws_for_a_layer_is_not_in_the_code():
    def cropped(size=2):
        layers = [keras.layers.RandomCrop(size, size), keras.layers.Flatten(), keras.layers.Dense(2, "softmax")]
        return keras.Sequential([keras.Input((4, 4, 1)), *layers])

    state = random.getstate()
    makers = cropped, lambda: [random.random(), cropped()][1]  # the second draws another seed for its layer
    codes = [experiments.code_of(ROW._replace(make_model=make), 64, 32) for make in makers]
    assert codes[0] == codes[1] != experiments.code_of(ROW._replace(make_model=lambda: cropped(3)), 64, 32)
    assert random.getstate() == state


def test_a_seed_of_yours_is_in_the_code_and_what_a_backend_draws_from_it_is_not():
    def seeded(seed):
        start = keras.initializers.GlorotUniform(seed)
        layers = [keras.layers.Dropout(0.5, seed=seed), keras.layers.Dense(2, "softmax", kernel_initializer=start)]
        return keras.Sequential([keras.Input((4,)), *layers])

    codes = [experiments.code_of(ROW._replace(make_model=lambda n=n: seeded(n)), 64, 32) for n in (1, 2)]
    assert codes[0] != codes[1] and experiments._set_weights(seeded(1), seeded(1)) == []


class WithoutConfig(keras.optimizers.SGD):
    def __init__(self, peak):
        super().__init__(peak)


def test_an_optimizer_that_no_configuration_makes_is_refused(results_file):
    with pytest.raises(ValueError, match="WithoutConfig cannot be made.*get_config with all arguments"):
        train(ROW._replace(make_optimizer=lambda updates: WithoutConfig(0.1)))
    assert not results_file.exists()


@pytest.mark.parametrize("what", ["make_model", "make_optimizer"])
def test_what_was_made_once_is_refused(results_file, what):
    once = {"make_model": network(), "make_optimizer": sgd(4)}[what]
    with pytest.raises(ValueError, match=f"{what} returns the same"):
        train(ROW._replace(**{what: lambda *updates: once}), seeds=(0, 1))
    assert not results_file.exists()


def test_weights_shared_by_two_models_are_refused():
    shared = keras.layers.Dense(2, "softmax")
    with pytest.raises(ValueError, match="shares its weights"):
        train(ROW._replace(make_model=lambda: keras.Sequential([keras.Input((4,)), shared])))


def test_other_data_of_the_same_size_are_another_run(results_file):
    flipped, turned = DATA._replace(train=(X[:64], 1 - Y[:64])), DATA._replace(train=(X[63::-1], Y[63::-1]))
    made = [train(data=data)[0] for data in (DATA, flipped, turned, DATA)]
    assert len(lines(results_file)) == 3 and made[0] == made[3]
    assert len({line["data_checksum"] for line in made}) == 3 and len({line["code"] for line in made}) == 1


def test_epochs_and_batch_size_may_be_numpy_numbers(results_file):
    given = train(ROW._replace(epochs=np.int64(2), batch_size=np.int32(16)))
    assert given == train(ROW._replace(epochs=2)) == lines(results_file)


def test_labels_may_be_lists_and_whole_floats_and_notes_numpy_numbers(results_file):
    data = Dataset((X[:64], [int(y) for y in Y[:64]]), (X[64:], Y[64:].astype("float32")), "mnist", "made here")
    (line,) = train(ROW._replace(notes={"peak": np.float32(0.5), "rates": np.arange(2)}), data=data)
    assert line["peak"] == 0.5 and line["rates"] == [0, 1]
    assert results_of(line) == results_of(train()[0]) and len(lines(results_file)) == 2


@pytest.mark.parametrize(
    "data, message",
    [
        ((X, Y), "give a Dataset"),
        (DATA._replace(train=(X[:64], Y[:64] + 0.5)), "one whole number"),
        (DATA._replace(train=(X[:64], np.eye(2)[Y[:64]])), "not one-hot"),
        (DATA._replace(train=(X[:64], Y[:60])), "for each image"),
        (DATA._replace(train=(X[:64], Y[:64] + 1)), "for 3 classes"),
        (DATA._replace(test=(X[64:], Y[64:].astype(int) - 1)), "data.test: labels from 0 on"),
        (DATA._replace(test=(X[:0], Y[:0])), "at least one image"),
        (DATA._replace(test=(X[64:, :3], Y[64:])), "training of .4,., for testing of .3,."),
        (Dataset((X[:64, :3], Y[:64]), (X[64:, :3], Y[64:]), "mnist", "here"), "does not take images of shape .3,."),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(results_file, data, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(data=data)
    assert not results_file.exists()


def test_a_model_that_is_not_built_is_refused(results_file):
    with pytest.raises(ValueError, match="begin with keras.Input"):
        train(ROW._replace(make_model=lambda: keras.Sequential([keras.layers.Dense(2, "softmax")])))


def test_lines_of_two_data_sets_of_one_size_are_not_averaged():
    flipped = DATA._replace(train=(X[:64], 1 - Y[:64]))
    train(seeds=(0,))
    train(seeds=(1,), data=flipped)
    both = experiments.read_results("t", [ROW], 64, 32)
    assert len(both) == 2
    with pytest.raises(ValueError, match="lines of different data"):
        experiments.summarise(both)


def test_recorded_runs_are_asked_for_with_the_size_of_their_data():
    with pytest.raises(ValueError, match="on how many images"):
        read([ROW])


def test_code_is_that_of_the_recorded_lines():
    # Changing it makes every recorded line stale. It must be the same with every version of Keras.
    run = Run(
        "",
        lambda: experiments.rescaled(experiments.mnist_network()),
        lambda u: CLR((0.005, 0.05), u // 2, (0.95, 0.85)),
    )
    recorded = [
        line
        for line in lines(ROOT / "figures" / "results" / "02_lr_range_test.jsonl")
        if line["run"] == "convolutional, peak 0.05"
    ]
    assert {line["code"] for line in recorded} == {experiments.code_of(run, 60000, 10000)}


def test_code_of_a_network_with_branches_and_batchnorm_is_the_same_with_every_version_of_keras():
    def rates(updates):
        return CLR((0.1, 3.5), updates // 2, 0.9)

    assert experiments.code_of(Run("", lambda: experiments.residual_network(8, 1), rates), 640, 64) == "8b76e836705d"


# ---- precision, settled statistics, checkpoints


def normalised():
    layers = [keras.layers.Dense(8), experiments.BatchNormalization(momentum=0.999), keras.layers.Dropout(0.5)]
    last = keras.layers.Dense(2, "softmax", dtype="float32")
    return keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 255), *layers, last])


LONG = Run("row", normalised, lambda updates: CLR((0.01, 0.3), updates // 2, (0.95, 0.85)), epochs=6, batch_size=16)


def test_bfloat16_is_for_what_the_run_builds_and_nothing_else():
    (line,), (other,) = train(ROW._replace(precision="bfloat16")), train(ROW)
    assert line["precision"] == "bfloat16" and other["precision"] == "float32"
    assert line["test_loss"] != other["test_loss"] and abs(line["test_loss"] - other["test_loss"]) < 0.05
    assert keras.config.dtype_policy().name == "float32"
    with pytest.raises(ValueError, match='dtype="float32"'):
        train(LONG._replace(precision="bfloat16", make_model=lambda: scaled(2)))


def test_settled_statistics_are_measured_beside_the_running_ones_and_change_nothing(results_file):
    (both,) = train(LONG._replace(epochs=2), every_epoch=True, settled=True)
    (plain,) = train(LONG._replace(epochs=2), every_epoch=True)
    assert plain == both  # a line that has more serves as well
    results_file.unlink()
    (plain,) = train(LONG._replace(epochs=2), every_epoch=True)
    assert results_of(plain) == results_of(both) and "settled_accuracy" not in plain
    assert both["every_epoch"]["settled_loss"][-1] == both["settled_loss"]
    # The running statistics have kept 0.999 of what they started with, so the network tests badly with them.
    assert both["settled_loss"] < both["test_loss"]


def test_what_cannot_be_settled_is_refused_before_the_training(results_file, monkeypatch):
    monkeypatch.setattr(experiments, "_train", None)
    for row in (ROW, LONG._replace(batch_size=65)):
        with pytest.raises(ValueError, match="settled=True needs"):
            train(row, settled=True)


def test_a_run_killed_in_its_fifth_epoch_and_called_again_ends_in_the_same_line(results_file, tmp_path):
    code = """
import os, signal
written, count = t.experiments._write_checkpoint, 0
def write(*arguments):
    global count
    written(*arguments)
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
t.experiments._write_checkpoint = write
t.train(t.LONG, every_epoch=True, settled=True)
"""
    assert other_process(code, tmp_path).wait(timeout=120) == -signal.SIGKILL
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pickle")
    assert not results_file.exists()
    epochs, train_epoch = [], experiments._Recorded.train_epoch

    def counted(self, *arguments):
        epochs.append(1)
        return train_epoch(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments._Recorded, "train_epoch", counted)
        (resumed,) = train(LONG, every_epoch=True, settled=True)
    assert len(epochs) == 2 and not checkpoint.exists()
    results_file.unlink()
    (whole,) = train(LONG, every_epoch=True, settled=True)
    assert {**whole, "seconds": 0} == {**resumed, "seconds": 0}


class Noise(keras.layers.Layer):
    def call(self, x, training=False):
        return x + keras.random.normal(keras.ops.shape(x)) if training else x  # without a seed


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="Keras on JAX refuses such draws in a compiled step")
def test_an_interrupted_run_goes_on_with_the_random_numbers_that_no_layer_holds(results_file, monkeypatch):
    draws = [[keras.utils.set_random_seed(0), float(keras.random.normal((1,))[0])] for _ in range(2)]
    if draws[0] != draws[1]:
        pytest.skip("In this version of Keras such draws do not follow from the seed")
    run, write = ROW._replace(make_model=lambda: with_layer(Noise), epochs=4), experiments._write_checkpoint

    def interrupted(*arguments):
        write(*arguments)
        if len(arguments[-1][1]) == 2:  # epochs
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "_write_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(run)
    keras.random.normal((3,))
    (resumed,) = train(run)
    results_file.unlink()
    assert results_of(train(run)[0]) == results_of(resumed)


def test_a_checkpoint_of_another_version_is_none(results_file, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "_append_line", None)
    with pytest.raises(TypeError):
        train(ROW._replace(epochs=2))
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pickle")
    progress, state, values = pickle.loads(checkpoint.read_bytes())
    checkpoint.write_bytes(pickle.dumps((progress, state, values[:1])))  # no weights to go on from
    monkeypatch.undo()
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    (anew,) = train(ROW._replace(epochs=2))
    results_file.unlink()
    assert results_of(anew) == results_of(train(ROW._replace(epochs=2))[0]) and not checkpoint.exists()


def test_a_run_that_another_process_is_training_is_left_out_or_waited_for(results_file):
    keys = {**{"experiment": "t", "run": "row", "profile": "smoke", "data": "mnist"}, "seed": 0}
    keys |= {"data_checksum": DATA.checksum, "code": experiments.code_of(ROW, 64, 32)}
    with FileLock(f"{experiments._checkpoint_file(keys, set())}.lock"):
        assert train(wait=False) == []
        assert [line["seed"] for line in train(seeds=(0, 1), wait=False)] == [1]
    assert [line["seed"] for line in train(seeds=(0, 1))] == [0, 1]


# ---- divergence


def test_what_a_regularizer_adds_is_not_in_the_curve():
    def heavy(penalty):
        layer = keras.layers.Dense(2, "softmax", kernel_regularizer=keras.regularizers.L2(penalty))
        return keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 255), layer])

    still = ROW._replace(make_optimizer=lambda updates: sgd(updates, 0.0))
    (plain,), (line,) = (train(still._replace(make_model=lambda p=penalty: heavy(p))) for penalty in (0.0, 10.0))
    np.testing.assert_allclose(line["curve"]["loss"], plain["curve"]["loss"], atol=2e-4)


def test_averaged_weights_are_put_in_place_at_the_end_and_not_after_each_epoch():
    def averaged(updates):
        return keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)

    line, plain = (
        train(LONG._replace(make_optimizer=make))[0] for make in (averaged, lambda u: keras.optimizers.SGD(0.5))
    )
    assert line["curve"]["loss"] == plain["curve"]["loss"] and line["test_loss"] != plain["test_loss"]


def test_a_run_whose_loss_is_not_finite_is_recorded_stopped_and_counted():
    (line,) = train(ROW._replace(make_optimizer=lambda updates: sgd(updates, 1e30), epochs=3), every_epoch=True)
    assert 0 < line["diverged_at"] < 4
    assert len(line["every_epoch"]["loss"]) == 1 and line["test_loss"] is None
    assert experiments.summarise(frame(line)).diverged["row"] == 1
    json.dumps(line, allow_nan=False)


@pytest.mark.parametrize(
    "loss, update",
    [
        ([2.3] * 50 + [0.5] * 50, None),
        ([0.5] * 40 + [math.nan] * 60, 40),
        ([0.5] * 40 + [math.inf] + [0.5] * 59, 40),
        ([2.3] * 100, 0),
        ([2.3] * 30 + [1.0] * 30 + [2.4] * 40, range(60, 80)),
    ],
)
def test_diverged_at(loss, update):
    found = experiments._diverged_at(np.array(loss), math.log(10))
    assert found in update if isinstance(update, range) else found == update


# ---- the file


def test_a_line_cut_off_by_a_crash_is_ignored_and_costs_only_its_own_run(results_file):
    first, second = train(seeds=(0, 1))
    text = results_file.read_text()
    results_file.write_text(text[:-20])
    assert read() == [first]
    again = train(seeds=(0, 1))
    assert [line["seed"] for line in read()] == [0, 1]
    assert results_of(again[1]) == results_of(second)


def test_lines_that_ran_together_and_a_byte_order_mark_are_read(results_file):
    first, second = train(seeds=(0, 1))
    text = results_file.read_text()
    results_file.write_bytes(b"\xef\xbb\xbf" + text.replace("}\n{", "}{").encode())
    assert read() == [first, second] and train(seeds=(0, 1)) == [first, second]


def test_a_line_for_which_there_is_no_room_is_an_error_and_costs_no_checkpoint(results_file, tmp_path, monkeypatch):
    def full(*arguments, **options):
        file = open(*arguments, **options)
        write, file = file.write, contextlib.closing(file)
        return SimpleFile(file, lambda text: write(text[:100]))

    class SimpleFile:
        def __init__(self, file, write):
            self.file, self.write = file, write

        def __enter__(self):
            self.fileno = self.file.__enter__().fileno
            return self

        def __exit__(self, *error):
            self.file.__exit__(*error)

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "open", lambda *a, **o: (full if "ab" in a else open)(*a, **o), raising=False)
        with pytest.raises(OSError, match="no room"):
            train(ROW._replace(epochs=2))
    assert list((tmp_path / "checkpoints").glob("*.pickle")) and read() == []
    (line,) = train(ROW._replace(epochs=2))
    assert read() == [line]


def test_notes_may_hold_braces():
    (line,) = train(ROW._replace(notes={"formula": r"\frac{1}{2}"}))
    assert read() == [line] and line["formula"] == r"\frac{1}{2}"


def other_process(code, folder):
    environment = {
        **os.environ,
        "CLR_OUTPUT_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in ("", "notebooks", "tests")),
    }
    return subprocess.Popen([sys.executable, "-c", f"import test_experiments as t\n{code}"], env=environment)


def test_a_kill_at_any_moment_loses_no_finished_run(results_file, tmp_path):
    process = other_process("t.train(seeds=range(1000))", tmp_path)
    deadline = time.monotonic() + 120
    while not (results_file.exists() and results_file.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    survived = read()
    assert 2 <= len(survived) < 100 and [line["seed"] for line in survived] == list(range(len(survived)))
    more = train(seeds=range(len(survived) + 2))
    assert more[: len(survived)] == survived and len(read()) == len(survived) + 2
    assert results_of(more[0]) == results_of(train(data=DATA, seeds=(0,))[0])


def test_two_processes_writing_to_one_file_lose_nothing(results_file, tmp_path):
    code = (
        "for n in range(300):\n"
        "    t.experiments._append_line(t.pathlib.Path({path!r}), {{'run': '{run}', 'seed': n, 'fill': 'x' * 5000}})"
    )
    processes = [other_process(code.format(path=str(results_file), run=run), tmp_path) for run in "ab"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = lines(results_file)
    assert sorted((line["run"], line["seed"]) for line in found) == [(run, n) for run in "ab" for n in range(300)]


def test_recorded_lines_beside_the_module_are_read_but_not_taken_for_this_run(results_file, monkeypatch, tmp_path):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path / "z"))
    (first,) = train()
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path / "a"))
    monkeypatch.setattr(experiments, "ROOT", tmp_path / "z")
    assert read() == [first]
    (second,) = train(seeds=(0,), every_epoch=True)
    assert results_of(second) == results_of(first)
    assert len(lines(tmp_path / "a" / "figures" / "results" / "t.jsonl")) == 1
    assert read() == [second] != [first]  # the same run of the same seed, as recorded last


def test_one_file_may_hold_runs_and_what_ways_have_found(results_file):
    def way(seed, data):
        return [{"found": seed}]

    (line,) = train()
    found = experiments.record("t", {"way": way}, [3], DATA)
    assert train() == [line] and read([ROW], 64, 32)[0]["code"] == line["code"]
    assert list(experiments.read_record("t", {"way": way}, [3], 64, 32)["found"]) == list(found["found"]) == [3]


@pytest.mark.parametrize(
    "runs, seeds, message",
    [
        ([], (0,), "at least one"),
        ([network], (0,), "give a list of Run"),
        ([ROW, ROW], (0,), "a name of its own"),
        ([ROW._replace(epochs=0)], (0,), "epochs=0"),
        ([ROW._replace(batch_size=1.5)], (0,), "batch_size=1.5"),
        ([ROW], (), "different whole numbers"),
        ([ROW], 5, "for example range"),
        ([ROW._replace(precision="float16")], (0,), "precision='float16'"),
        ([ROW._replace(notes={"model": network})], (0,), "cannot be written as JSON"),
        ([ROW._replace(notes=["peak"])], (0,), "give a dict"),
        ([ROW._replace(name=("row", 1))], (0,), "a name of its own"),
        ([ROW._replace(make_model=lambda: network(sigmoid=True))], (0,), "no sigmoid"),
        ([ROW._replace(make_model=logits)], (0,), "row: the outputs for an image add up to .* not 1.*not in logits"),
        ([ROW], (0, 0), "different whole numbers"),
        ([ROW], (-1,), "whole numbers from 0"),
    ],
)
def test_bad_arguments_are_named(results_file, runs, seeds, message):
    with pytest.raises((TypeError, ValueError), match=message):
        experiments.run_experiment("t", runs, seeds, DATA)
    assert not results_file.exists()


# ---- summaries


def line_of(run, seed, accuracy, diverged_at=None, **items):
    line = {"run": run, "seed": seed, "test_accuracy": accuracy, "diverged_at": diverged_at, "seconds": 2.0}
    return {**line, "epochs": 1, "data": "mnist", "data_checksum": "0", "code": run, **items}


def frame(*lines):
    return pd.DataFrame(lines)


A = [line_of("a", seed, accuracy) for seed, accuracy in enumerate((0.97, 0.98, 0.99))]
B = [line_of("b", seed, accuracy) for seed, accuracy in enumerate((0.96, 0.968, 0.982))]


def test_summarise():
    row = experiments.summarise(frame(*A)).loc["a"]
    assert (row.n, row.diverged, row.seconds) == (3, 0, 2.0)
    assert row["mean"] == pytest.approx(98.0) and row.sd == pytest.approx(1.0)
    half = 4.302653 / math.sqrt(3)  # 97.5% quantile of Student's t with 2 degrees of freedom
    assert (row.low, row.high) == pytest.approx((98 - half, 98 + half), abs=1e-5)


def test_seconds_are_the_median():
    slow = [line_of("a", seed, 0.9, seconds=seconds) for seed, seconds in enumerate((2.0, 3.0, 100.0))]
    assert experiments.summarise(frame(*slow)).seconds["a"] == 3.0


def test_a_diverged_run_counts_in_the_mean():
    row = experiments.summarise(frame(*A, line_of("a", 3, 0.10, diverged_at=7))).loc["a"]
    assert row.diverged == 1 and row.n == 4 and row["mean"] == pytest.approx(76.0)


def test_one_seed_has_a_mean_and_no_interval():
    row = experiments.summarise(frame(*A[:1])).loc["a"]
    assert row["mean"] == pytest.approx(97.0) and math.isnan(row.sd) and math.isnan(row.low) and math.isnan(row.high)
    assert "nan" not in str(experiments.results_table(frame(*A[:1])))
    assert "nan" not in str(experiments.results_table(frame(*A[:1], *B)))


def test_compare_pairs_by_seed():
    (row,) = records(experiments.compare(frame(*reversed(A), *B, line_of("b", 9, 0.1)), [("a", "b")]))
    assert row["n"] == 3 and row["difference"] == pytest.approx(1.0)
    half = 4.302653 * np.std([1.0, 1.2, 0.8], ddof=1) / math.sqrt(3)
    assert (row["low"], row["high"]) == pytest.approx((1 - half, 1 + half), abs=1e-5)
    assert row["verdict"] == "ahead"
    (back,) = records(experiments.compare(frame(*A, *B), [("b", "a")]))
    assert back["verdict"] == "behind" and back["difference"] == pytest.approx(-1.0)


def test_compare_says_when_nothing_can_be_told():
    worse = [line_of("b", s, a) for s, a in enumerate((0.99, 0.98, 0.965))]
    (row,) = records(experiments.compare(frame(*A, *worse), [("a", "b")]))
    assert row["verdict"] == "not told apart" and row["low"] < 0 < row["high"]


def test_the_comparisons_of_a_family_are_corrected_together():
    # Alone, this pair's interval leaves out 0; among four comparisons that is no evidence any more.
    lines = [*A, *B, *(line_of(name, s, 0.97 + 0.01 * s + (s == 1) / 100) for name in "cde" for s in range(3))]
    alone = experiments.compare(frame(*lines), [("a", "b")])
    family = experiments.compare(frame(*lines), [("a", "b"), ("a", "c"), ("a", "d"), ("a", "e")])
    assert alone.verdict[0] == "ahead" and family.verdict[0] == "not told apart"
    singly = [experiments.compare(frame(*lines), [("a", name)]).p_holm[0] for name in "bcde"]
    assert family.p_holm[0] == pytest.approx(4 * alone.p_holm[0])
    assert family.p_holm[1] == pytest.approx(min(1, 3 * singly[1]))  # the second smallest of the four, three times
    assert (family.low[0], family.high[0]) == (alone.low[0], alone.high[0])


@pytest.mark.parametrize(
    "others, n",
    [
        ([line_of("b", s, a) for s, a in enumerate((0.96, 0.9699))], 2),  # two pairs, far from 0
        ([line_of("b", s, a - 0.01) for s, a in enumerate((0.97, 0.98, 0.99))], 3),  # all differences are equal
        ([line_of("b", 2, 0.5)], 1),
    ],
)
def test_compare_does_not_judge_what_has_no_spread_or_fewer_than_three_pairs(others, n):
    (row,) = records(experiments.compare(frame(*A, *others), [("a", "b")]))
    assert row["n"] == n and row["verdict"] == "not judged" and row["p_holm"] is None


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([("a", "c")], "'c' is not among"),
        ([("a", "b")], "no seed in common"),
        (("a", "b"), "give a list of pairs"),
        ([], "at least one pair"),
    ],
)
def test_compare_refuses_what_cannot_be_compared(pairs, message):
    with pytest.raises(ValueError, match=message):
        experiments.compare(frame(*A, line_of("b", 9, 0.5)), pairs)


@pytest.mark.parametrize(
    "other, message",
    [
        (line_of("a", 0, 0.5), "two lines with seed 0"),
        (line_of("a", 7, 0.5, code="changed"), "different code"),
        (line_of("c", 0, 0.5, data="synthetic"), "mnist and synthetic"),
    ],
)
def test_what_does_not_belong_together_is_not_averaged(other, message):
    with pytest.raises(ValueError, match=message):
        experiments.summarise(frame(*A, other))


def test_results_table_prints_what_summarise_has():
    table = experiments.results_table(frame(*A, *B))
    assert table.loc["a", "test accuracy (%)"] == "98.00 ± 1.00" and table.loc["a", "95% interval"] == "95.52 to 100.48"
    assert table.loc["a", "n"] == 3 and "diverged" not in table
    assert "diverged" in experiments.results_table(frame(*A, line_of("a", 3, 0.1, diverged_at=7)))


# ---- what feeds the training, and the networks


def test_a_model_is_trained_on_the_images_in_the_order_given_to_the_last_one():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Rescaling(1 / 255), keras.layers.Dense(2, "softmax")])
    recorded = experiments._Recorded(model, sgd(3, 0.0), X, 3)  # at learning rate 0 the weights stay
    mixed = np.random.default_rng(0).permutation(len(X))
    for order in (mixed, mixed[::-1]):
        found = recorded.train_epoch(order, Y, 40, seed=0)
        p = keras.ops.convert_to_numpy(model(X[order].astype("float32")))[np.arange(len(X)), Y[order]]
        expected = [-np.log(p[start : start + 40]).mean() for start in (0, 40, 80)]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert len(recorded.trainable_variables) == 2


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.data")
def test_no_thread_of_tf_data_holds_up_the_end_of_a_fit():
    assert experiments._in_batches(X, Y, 10)["x"].options().autotune.enabled is False


def written_in(namespace, text):
    """The function `way` of a text, as a cell of a notebook defines it, with what else the namespace holds."""
    name = f"<cell {namespace.get('__name__')}>"
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    exec(compile(text, name, "exec"), namespace)
    return namespace["way"]


WAY = """
class Own:
    factor = 2

    def step(self, x):
        return x * SCALE

def helper(x):
    return x + 1

def way(seed, data):
    def inner(x):
        return helper(x)

    return [{"found": inner(Own().step(seed)), "size": data.train}]
"""


def test_code_of_a_way_stops_at_libraries():
    from scipy.sparse.linalg import eigsh  # whose modules hold what JSON cannot

    text = "def way(seed, data):\n    return [{'found': eigsh(data.train)}]\n"
    way = written_in({"eigsh": eigsh, "__name__": "cell"}, text)
    assert len(list(experiments._own_code([way], {}))) == 2  # its source, and the name that it refers to
    assert experiments._code_of_way(way, 200, 40, "test")


def test_code_of_a_way_follows_all_that_it_calls_and_nothing_else():
    def code(text=WAY, **more):
        return experiments._code_of_way(written_in({"SCALE": 3, "__name__": "cell", **more}, text), 200, 40, "test")

    assert code() == code(__name__="another")  # the same class in another module
    assert code() == code(train=5, step=np.ones(3), found=[1])  # globals with the names of attributes and keys
    changes = {"x + 1": "x + 2", "x * SCALE": "SCALE * x", "factor = 2": "factor = 4", "seed))": "seed + 1))"}
    codes = {code(), code(SCALE=4), *(code(WAY.replace(*change)) for change in changes.items())}
    assert len(codes) == 2 + len(changes)


PARTS = {
    "a class method": "class Own:\n    @classmethod\n    def make(cls):\n        return 1\nway = lambda: Own.make()\n",
    "a range": "rows = range(1)\ndef way():\n    return list(rows)\n",
    "a path": "from pathlib import PurePosixPath\npath = PurePosixPath('1')\nway = lambda: open(path)\n",
    "a namespace": "from types import SimpleNamespace\nheld = SimpleNamespace(x=1)\nway = lambda: held.x\n",
    "a read-only dict": "from types import MappingProxyType as D\nheld = D({'x': 1})\nway = lambda: held['x']\n",
    "a decorator": """
import functools
def more(function):
    @functools.wraps(function)
    def wrapper():
        return function() + 1
    return wrapper
@more
def way():
    return 2
""",
    "which function of a library": """
import math
use = [math.sin, math.cos, *9 * [math.tan]][1]
way = lambda: use(2)
""",
    "of what a partial is one": """
import functools, math
way = functools.partial([math.sin, math.cos, *9 * [math.tan]][1], 2)
""",
    "what a partial hands over": """
import functools, math
def inner(f):
    return f(2)
way = functools.partial(inner, [math.sin, math.cos, *9 * [math.tan]][1])
""",
    "a table": "import pandas as pd\ntable = pd.DataFrame({'x': [1, None]})\nway = lambda: table\n",
    "a tensor": "import keras\nheld = keras.ops.full((2,), 1.0)\nway = lambda: held\n",
    "an array of objects": "import numpy as np\nheld = np.array([1.25, None])\nway = lambda: held\n",
    "keys that are no texts": "held = {(0, 1): [{2: 3, 'x': 4}]}\nway = lambda: held\n",
    "a slot": """
from dataclasses import dataclass
@dataclass(slots=True)
class Held:
    x: int
held = Held(1)
way = lambda: held.x
""",
    "a cached property": """
import functools
class Held:
    @functools.cached_property
    def x(self):
        return 1
held = Held()
way = lambda: held.x
""",
    "what a library's decorator has wrapped": "import functools\n@functools.cache\ndef way():\n    return 1\n",
    "a lambda over two lines": "both = dict(\n    way=lambda: 2\n    + 1,\n    other=0)\nway = both['way']\n",
    "a private attribute": """
class Held:
    def __init__(self, x):
        self._x = x
    def get(self):
        return self._x
held = Held(1)
way = lambda: held.get()
""",
}


@pytest.mark.parametrize("text", PARTS.values(), ids=PARTS.keys())
def test_code_of_a_way_has_all_that_decides(text):
    texts = text, text, text.replace("1", "7")
    ways = [written_in({"__name__": f"cell {n}"}, text) for n, text in enumerate(texts)]
    codes = [experiments._code_of_way(way, 200, 40, "test") for way in ways]
    assert codes[0] == codes[1] != codes[2]


def test_code_of_a_way_does_not_depend_on_the_order_of_a_set():
    text = "def f():\n    return 1\ndef g():\n    return 2\nboth = {f, g, abs, len}\nway = lambda: both\n"
    ways = [written_in({"__name__": "cell"}, text) for _ in range(20)]
    assert len({experiments._code_of_way(way, 200, 40, "test") for way in ways}) == 1


def test_code_of_a_way_has_the_modules_of_yours_that_it_calls(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    codes = []
    for n in (1, 1, 2):
        for name, text in (
            ("of_mine", "import below\n\n\ndef f():\n    return below.g()\n"),
            ("below", f"g = lambda: {n}\n"),
        ):
            (tmp_path / f"{name}.py").write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        way = written_in({"__name__": "cell"}, "import of_mine\n\ndef way():\n    return of_mine.f()\n")
        codes.append(experiments._code_of_way(way, 200, 40, "test"))
    assert codes[0] == codes[1] != codes[2]


def test_code_of_a_way_whose_source_was_not_kept_is_the_same_at_each_call():
    bytecode = [experiments._bytecode(compile(f"x in {{{names}}}", "", "eval")) for names in ("'a', 'b'", "'b', 'a'")]
    assert bytecode[0] == bytecode[1]  # a frozenset, whose order is another in each process
    texts = (
        "lambda: [x + 1 for x in range(3)]",
        "lambda: [x + 1 for x in range(3)]",
        "lambda: [x + 2 for x in range(3)]",
    )
    codes = [experiments._code_of_way(eval(text), 200, 40, "test") for text in texts]
    assert codes[0] == codes[1] != codes[2]


# ---- the recorded results


def test_every_recorded_result_is_of_real_data_and_stands_once():
    for path in (ROOT / "figures" / "results").glob("0*.jsonl"):
        found = lines(path)
        assert found and all(line["data"] in ("mnist", "cifar10") and line["profile"] != "smoke" for line in found)
        keys = [(line.get("run") or line["way"], *(line[k] for k in ("profile", "seed", "code"))) for line in found]
        assert len(set(keys)) == len(keys)
        assert path.stat().st_size < 1e6


def markdown(summary):
    """The table of the README: the highest mean on top."""
    rows = ["| way | test accuracy (%), mean and 95% interval | n |", "| --- | --- | --- |"]
    for row in summary.sort_values("mean", ascending=False).itertuples():
        rows.append(f"| {row.Index} | {row.mean:.2f} ({row.low:.2f} to {row.high:.2f}) | {row.n} |")
    return "\n".join(rows)


def test_the_tables_of_the_readme_are_those_of_the_recorded_lines():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    asked = re.findall(r"<!-- results_table of (\w+): (.+?) -->\n\n(\|.+?\|)\n\n", readme, re.S)
    assert len(asked) == readme.count("<!-- results_table") > 0
    for experiment, rows, table in asked:
        recorded = lines(ROOT / "figures" / "results" / f"{experiment}.jsonl")
        kept = [line for row in rows.split("; ") for line in recorded if line["run"] == row]
        assert markdown(experiments.summarise(frame(*kept))) == table, "paste the left one into README.md"
        hardware = "; ".join(sorted({line["hardware"] for line in kept}))
        assert f"{table}\n\nTrained on: {hardware}.\n" in readme


def test_holm_multiplies_each_p_value_by_the_number_of_those_not_below_it():
    lines = [*A, *B, *(line_of("c", s, a) for s, a in enumerate((0.969, 0.975, 0.978)))]
    family = experiments.compare(frame(*lines), [("a", "b"), ("a", "c")])
    small, large = (experiments.compare(frame(*lines), [("a", name)]).p_holm[0] for name in "bc")
    assert 2 * small < large < 0.5  # so that neither the order nor the limit of 1 hides a factor
    assert list(family.p_holm) == pytest.approx([2 * small, large])


def test_a_long_curve_has_the_rate_and_momentum_of_the_updates_that_it_names():
    clr = CLR((0.1, 0.5), 200, (0.95, 0.85))
    curve = experiments._curve(np.ones(400), clr)
    updates = np.array(curve["update"])
    np.testing.assert_allclose(curve["learning_rate"], clr.learning_rate_at(updates), rtol=1e-3)
    np.testing.assert_allclose(curve["momentum"], clr.momentum_at(updates), atol=1e-4)
    assert max(curve["learning_rate"]) == 0.5 and updates[-1] == 396


def test_settled_results_are_those_with_statistics_of_the_first_training_images(monkeypatch):
    monkeypatch.setattr(experiments, "SETTLING_BATCHES", 3)
    (line,) = train(LONG._replace(epochs=1, make_optimizer=lambda updates: sgd(updates, 0.0)), settled=True)
    keras.utils.set_random_seed(0)
    model = normalised()
    experiments.clr_utils.settle_batch_norm(model, X[:48], 16, shuffle=False)
    p = model.predict(X[64:].astype("float32"), verbose=0)
    assert line["settled_loss"] == pytest.approx(-np.log(p[range(32), Y[64:]]).mean(), abs=2e-6)
    assert line["settled_accuracy"] == pytest.approx((p.argmax(axis=1) == Y[64:]).mean(), abs=2e-6)


def test_a_run_on_held_out_images_has_another_code_than_on_as_many_test_images():
    assert experiments.code_of(ROW, 64, 32, "validation") != experiments.code_of(ROW, 64, 32, "test")


def test_a_crash_while_a_checkpoint_is_written_keeps_the_one_before(tmp_path, monkeypatch):
    def crash(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    path, order, progress = tmp_path / "a.pickle", np.random.default_rng(0), (1.0, [[0.5]], [])
    experiments._write_checkpoint(path, [], order, progress)
    monkeypatch.setattr(experiments.pickle, "dump", crash)
    with pytest.raises(KeyboardInterrupt):
        experiments._write_checkpoint(path, [], order, (2.0, [[0.5]] * 2, []))
    assert experiments._read_checkpoint(path, [], order) == progress


def test_what_another_process_has_trained_in_the_meantime_is_taken(results_file, monkeypatch):
    (first,) = train()
    looks, recorded = [{}], experiments._recorded  # at the first look nothing is there yet
    look = lambda *arguments: looks.pop() if looks else recorded(*arguments)  # noqa: E731
    monkeypatch.setattr(experiments, "_recorded", look)
    assert train() == [first] and len(lines(results_file)) == 1


def test_lines_of_two_data_sets_of_one_size_and_seed_are_both_read():
    made = train()[0], train(data=DATA._replace(train=(X[:64], 1 - Y[:64])))[0]
    assert read([ROW], 64, 32) == [*made]
    with pytest.raises(ValueError, match="lines of different data"):
        experiments.summarise(experiments.read_results("t", [ROW], 64, 32))


@pytest.mark.parametrize("loss, update", [([2.3] * 94 + [2.0] * 6, None), ([2.15] * 100, None)])
def test_diverged_at_the_limits(loss, update):
    assert experiments._diverged_at(np.array(loss), math.log(10)) == update


def test_an_error_in_a_network_leaves_no_precision_behind():
    def broken():
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        train(ROW._replace(make_model=broken, precision="bfloat16"))
    assert keras.config.dtype_policy().name == "float32"


def test_seeds_are_outermost_in_the_order_of_training_and_of_the_rows(results_file):
    made = train(ROW, ROW._replace(name="other", batch_size=32), seeds=(1, 0))
    order = [("row", 1), ("other", 1), ("row", 0), ("other", 0)]
    assert [(line["run"], line["seed"]) for line in made] == order
    assert [(line["run"], line["seed"]) for line in lines(results_file)] == order


def test_is_recorded_says_what_run_experiment_would_not_repeat():
    held_out = experiments.hold_out(DATA, 32)
    (line,) = train(data=held_out)
    assert line["part"] == "validation" and experiments.is_recorded("t", ROW, 0, held_out)
    for run, seed, data, asked in (
        (ROW, 0, held_out, {"every_epoch": True}),
        (ROW, 0, held_out, {"settled": True}),
        (ROW, 1, held_out, {}),
        (ROW._replace(epochs=2), 0, held_out, {}),
        (ROW, 0, held_out._replace(part="test"), {}),
    ):
        assert not experiments.is_recorded("t", run, seed, data, **asked)


def test_seconds_are_those_of_the_training_also_before_an_interruption(monkeypatch):
    now, evaluations = [0.0], []
    train_epoch, evaluated = experiments._Recorded.train_epoch, experiments._evaluated

    def slow_epoch(*arguments):
        now[0] += 10
        return train_epoch(*arguments)

    def slow_evaluation(*arguments):
        now[0] += 100
        evaluations.append(1)
        if len(evaluations) == 3:
            raise KeyboardInterrupt
        return evaluated(*arguments)

    monkeypatch.setattr(experiments._Recorded, "train_epoch", slow_epoch)
    monkeypatch.setattr(experiments, "_evaluated", slow_evaluation)
    monkeypatch.setattr(experiments, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with pytest.raises(KeyboardInterrupt):
        train(ROW._replace(epochs=3), every_epoch=True)
    assert train(ROW._replace(epochs=3), every_epoch=True)[0]["seconds"] == 30


def test_a_checkpoint_is_for_what_was_asked_alone(monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experiments, "_evaluated", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(ROW._replace(epochs=3))
    (line,) = train(ROW._replace(epochs=3), every_epoch=True)
    assert len(line["every_epoch"]["loss"]) == 3


def test_a_test_set_in_blocks_gives_what_it_gives_whole():
    model = network()
    expected = experiments._loss_and_accuracy(model, X, Y, block=96)
    assert experiments._loss_and_accuracy(model, X, Y, block=7) == pytest.approx(expected)
    assert experiments._loss_and_accuracy(model, X[::-1], Y, block=7) != pytest.approx(expected)


def test_a_probability_of_0_counts_as_a_ten_millionth():
    model = SimpleNamespace(predict_on_batch=lambda images: np.tile([1.0, 0.0], (len(images), 1)))
    loss, accuracy = experiments._loss_and_accuracy(model, X[:4], np.array([0, 1, 1, 1]))
    assert (loss, accuracy) == (pytest.approx(0.75 * 7 * math.log(10)), 0.25)


def test_a_class_that_only_the_test_labels_have_is_refused_before_the_training(results_file):
    with pytest.raises(ValueError, match="for 3 classes"):
        train(data=DATA._replace(test=(X[64:], Y[64:] + 1)))
    assert not results_file.exists()


def test_results_are_read_in_the_order_of_the_runs():
    other = ROW._replace(name="other", batch_size=32)
    train(ROW, other)
    for runs in ([ROW, other], [other, ROW]):
        assert [line["run"] for line in read(runs, 64, 32)] == [run.name for run in runs]


def test_two_pairs_have_an_interval_and_count_in_no_family():
    few = [line_of("c", seed, accuracy) for seed, accuracy in enumerate((0.96, 0.969))]
    family = experiments.compare(frame(*A, *B, *few), [("a", "c"), ("a", "b")])
    half = 12.7062047 * np.std([1.0, 1.1], ddof=1) / math.sqrt(2)
    assert (family.low[0], family.high[0]) == pytest.approx((1.05 - half, 1.05 + half), abs=1e-5)
    alone = experiments.compare(frame(*A, *B), [("a", "b")])
    assert math.isnan(family.p_holm[0]) and family.p_holm[1] == pytest.approx(alone.p_holm[0])
    assert list(family.verdict) == ["not judged", "ahead"]


def test_the_shape_of_an_array_is_in_the_code_of_a_way():
    codes = []
    for shape in ((2, 3), (3, 2)):
        held = np.arange(6.0).reshape(shape)
        way = written_in({"held": held, "__name__": "cell"}, "def way(seed, data):\n    return held\n")
        codes.append(experiments._code_of_way(way, 200, 40, "test"))
    assert codes[0] != codes[1]


def test_a_frozen_batch_norm_cannot_be_settled_and_that_is_said_before_the_training(results_file):
    frozen = functools.partial(with_layer, functools.partial(experiments.BatchNormalization, trainable=False))
    with pytest.raises(ValueError, match="settled=True needs"):
        train(ROW._replace(make_model=frozen), settled=True)
    assert not results_file.exists()


def test_seconds_in_the_table_are_rounded():
    assert experiments.results_table(frame(line_of("a", 0, 0.9, seconds=2.6))).seconds["a"] == 3


def test_a_run_no_better_than_guessing_among_two_classes_has_diverged():
    (line,) = train(ROW._replace(make_optimizer=lambda updates: sgd(updates, 0.0), make_model=lambda: with_kernel(0)))
    assert line["curve"]["loss"] == pytest.approx([math.log(2)] * 4, abs=1e-4) and line["diverged_at"] == 0


def test_averages_do_not_replace_the_weights_that_are_trained_on_after_each_epoch():
    def averaged(updates):
        return keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.9)

    run = LONG._replace(make_optimizer=averaged, epochs=3)
    assert results_of(train(run, every_epoch=True)[0]) == results_of(train(run._replace(name="again"))[0])
