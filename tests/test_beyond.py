"""Notebook 06: its functions, on small networks and drawn data."""

import ast
import functools
import json
import pathlib
import sys

import keras
import numpy as np
import pandas as pd
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import train_rows

import experiments

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="the notebook's sharpness needs it")


@pytest.fixture(scope="module")
def names():
    return train_rows.definitions(train_rows.NOTEBOOK_6)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (240, 8, 8, 3), np.uint8), rng.integers(0, 10, 240)
    return experiments.Dataset((images[:200], labels[:200]), (images[200:], labels[200:]), "synthetic", "drawn")


def small():
    x = inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3)(keras.layers.Rescaling(1 / 255)(x))
    x = keras.layers.ReLU()(experiments.BatchNormalization(momentum=0.9)(x))
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(10, activation="softmax")(x))


@pytest.fixture(scope="module")
def task(names):
    return names["Task"]("drawn", small, 10, (1, 2, 3))  # 20 updates an epoch


@pytest.mark.parametrize("make", ["sgd_trapezoid", "adamw_trapezoid"])
def test_a_branch_ends_where_a_run_made_for_its_length_does(names, task, data, make):
    rows = names["branches"](task, names[make], 0.1, "branch", 0, data)
    found = {row["epochs"]: row for row in rows if row["row"] == "branch"}
    for epochs in task.lengths:
        (made,) = names["made_for_its_length"](task, names[make], 0.1, "made", epochs, 0, data)
        assert found[epochs]["test_loss"] == pytest.approx(made["test_loss"], rel=1e-5), epochs


def test_the_run_does_not_notice_its_branches(names, task, data):
    rows = names["branches"](task, names["sgd_trapezoid"], 0.1, "branch", 0, data)
    (last,) = [row for row in rows if row["epochs"] == 3 and "before" not in row["row"]]
    (made,) = names["made_for_its_length"](task, names["sgd_trapezoid"], 0.1, "made", 3, 0, data)
    assert last["test_loss"] == pytest.approx(made["test_loss"], rel=1e-5)


def test_schedule_free_in_fit_is_the_papers_algorithm(names):
    rng = np.random.default_rng(1)
    inputs, targets = rng.normal(size=(60, 3)).astype("float32"), rng.normal(size=(60, 1)).astype("float32")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    (start,) = model.get_weights()
    optimizer = names["ScheduleFreeAdamW"](0.05, warm_up=4, decay=0.1)
    optimizer.build(model.trainable_variables)
    model.compile(optimizer, "mse", steps_per_execution=3)
    model.fit(inputs, targets, batch_size=10, epochs=2, shuffle=False, verbose=0)

    x = z = y = start.astype(float)
    v, total = 0, 0
    for t in range(1, 13):
        batch = slice(10 * ((t - 1) % 6), 10 * ((t - 1) % 6) + 10)
        gradient = 2 * inputs[batch].T @ (inputs[batch] @ y - targets[batch]) / 10
        rate = 0.05 * min(1, t / 4)
        v = 0.999 * v + 0.001 * gradient**2
        z = z - rate * (gradient / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.1 * y)
        total += rate**2
        x = (1 - rate**2 / total) * x + rate**2 / total * z
        y = 0.1 * z + 0.9 * x
    assert np.allclose(model.get_weights()[0], y, atol=1e-5)
    assert np.allclose(keras.ops.convert_to_numpy(optimizer.x[0]), x, atol=1e-5)


def test_calibration_error(names):
    sure = np.array([[0.9, 0.1]] * 10)
    assert names["calibration_error"](sure, np.array([0] * 7 + [1] * 3)) == pytest.approx(0.2)  # right in 70%
    assert names["calibration_error"](sure, np.array([0] * 9 + [1])) == pytest.approx(0)
    mixed = np.array([[1.0, 0.0]] * 5 + [[0.6, 0.4]] * 5)
    assert names["calibration_error"](mixed, np.array([0] * 5 + [1] * 5)) == pytest.approx(0.3)


def test_averages(names, task, data):
    assert np.array_equal(names["average_weights"]([[np.zeros(2), np.ones(1)], [np.ones(2), np.ones(1)]])[0], [0.5] * 2)
    rows = {row["row"]: row for row in names["high_and_averaged"](task, 0.1, 0, data)}
    assert len({row["test_loss"] for row in rows.values()}) == 3  # three models
    rows = names["restarts"](task, 0.1, 0, 0, data)
    assert [row["epochs"] for row in rows[:3]] == [1, 2, 3] and len(rows) == 5


def test_restarts_rise_over_the_first_updates_only(names):
    bounds, updates = (0.0, 1.0), np.arange(1, 60)
    plain, risen = (np.array(f(updates, bounds, 10)) for f in (names["cosine_restarts"], of_rise(names, 4)))
    np.testing.assert_allclose(risen[3:], plain[3:], atol=1e-6)
    np.testing.assert_allclose(risen[:3] / plain[:3], [0.5, 0.75, 1], atol=1e-6)  # updates 1 to 3


def of_rise(names, rise):
    return functools.partial(names["risen_restarts"], rise=rise)


def test_an_order_of_images_can_be_cut_anywhere(data):
    whole = list(experiments.batches(data, 3, 30, 0, 13))
    parts = [*experiments.batches(data, 3, 30, 0, 5), *experiments.batches(data, 3, 30, 5, 13)]
    assert len(whole) == len(parts) == 13
    for (x, y), (other_x, other_y) in zip(whole, parts):
        assert np.array_equal(x, other_x) and np.array_equal(y, other_y)
    first_pass = np.concatenate([np.asarray(x) for x, _ in whole[:6]])  # 6 whole batches in 200 images
    assert len(np.unique(first_pass.reshape(180, -1), axis=0)) == 180
    assert not np.array_equal(np.asarray(whole[0][0]), np.asarray(whole[6][0]))
    other_seed = next(iter(experiments.batches(data, 4, 30, 0, 13)))
    assert not np.array_equal(np.asarray(whole[0][0]), np.asarray(other_seed[0]))


def found_by(factor, seed, data):
    found_by.calls += 1
    return [{"row": "a", "value": np.float64(factor * seed)}, {"row": "b", "value": len(data.train[0])}]


def test_arrays_are_recorded_whole_and_what_is_no_list_of_dicts_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    ways = {"way": lambda seed, data: [{"values": np.arange(3) + seed, "mean": np.float32(0.5)}]}
    (row,) = experiments.record("here", ways, (1,), data).to_dict("records")
    assert (row["values"], row["mean"]) == ([1, 2, 3], 0.5)
    for found, message in (({"a": 1}, "a list of dicts"), ([{"a": object()}], "cannot be written")):
        with pytest.raises(ValueError, match=message):
            experiments.record("here", {"way": lambda seed, data, found=found: found}, (2,), data)


def test_records_of_two_data_sets_of_one_size_are_not_mixed(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    ways = {"way": lambda seed, data: [{"value": 1}]}
    other = data._replace(train=(255 - data.train[0], data.train[1]))
    for seed, of in enumerate((data, other)):
        experiments.record("here", ways, (seed,), of)
    assert len(experiments.read_record("here", ways, (0,), 200, 40)) == 1
    with pytest.raises(ValueError, match="an experiment of their own"):
        experiments.read_record("here", ways, (0, 1), 200, 40)


def test_what_is_recorded_is_not_repeated_and_is_read_again(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    found_by.calls = 0
    twice = {"way": functools.partial(found_by, 2)}
    first = experiments.record("here", twice, (1, 2), data)
    assert first[["seed", "row", "value"]].values.tolist() == [[1, "a", 2], [1, "b", 200], [2, "a", 4], [2, "b", 200]]
    assert found_by.calls == 2 and experiments.record("here", twice, (1, 2), data).equals(first)
    assert experiments.read_record("here", twice, (1, 2), 200, 40).equals(first)
    assert not len(experiments.read_record("here", twice, (1, 2), 100, 40))  # other data
    thrice = {"way": functools.partial(found_by, 3)}
    assert not len(experiments.read_record("here", thrice, (1, 2), 200, 40))
    assert experiments.record("here", thrice, (1,), data)["value"].tolist() == [3, 200]
    assert found_by.calls == 3


def test_images_keep_their_labels(data):
    label_of = {image.astype("float32").tobytes(): label for image, label in zip(*data.train)}
    for x, y in experiments.batches(data, 3, 30, 2, 9):
        assert [label_of[image.tobytes()] for image in np.asarray(x)] == np.asarray(y).tolist()


def test_a_record_of_another_profile_or_part_is_not_taken(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    found_by.calls, ways = 0, {"way": functools.partial(found_by, 2)}
    for profile, of in (("quick", data), ("full", data), ("full", data._replace(part="validation"))):
        monkeypatch.setenv("CLR_PROFILE", profile)
        experiments.record("here", ways, (0,), of)
    assert found_by.calls == 3
    for part in ("test", "validation"):
        assert len(experiments.read_record("here", ways, (0,), 200, 40, part)) == 2


def test_a_way_that_another_process_is_training_is_left_out(data, tmp_path, monkeypatch):
    class Held:
        def __init__(self, path, timeout=-1):
            assert timeout == 0  # or it would wait

        def __enter__(self):
            raise experiments.Timeout("held")

        def __exit__(self, *error):
            pass

    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr(experiments, "FileLock", Held)
    assert not len(experiments.record("here", {"way": None}, (0,), data, wait=False))


class Counting:
    """In place of a network: it holds the epochs that it was trained, the seed of its data, and its first draw."""

    def __init__(self):
        self.epochs, self.seed, self.first = 0.0, 0, np.random.random()

    def get_weights(self):
        return [np.array([self.epochs, self.seed, self.first])]

    def save(self, path):
        path.write_text(str(self.epochs))


def state(epochs, seed):
    return np.array([epochs, seed, np.random.RandomState(seed).random()])


@pytest.fixture
def counted(names, monkeypatch):
    """A task without training: a prediction is the square of the weights. And the list of its trainings."""
    trainings = []

    def train(model, optimizer, task, data, seed, epochs, start=0, look=lambda epoch: None):
        trainings.append((optimizer, start, epochs))
        model.seed = seed
        for tenth in range(round(10 * start) + 1, round(10 * epochs) + 1):
            model.epochs = round(model.epochs + 0.1, 1)
            look(tenth / 10)
        model.epochs = -1.0 if getattr(optimizer, "use_ema", False) else model.epochs

    def probabilities(model, task, data, weights, trainable=None):
        return weights[0] ** 2 if trainable is None else trainable

    monkeypatch.setitem(names, "train", train)
    monkeypatch.setitem(names, "probabilities", probabilities)
    monkeypatch.setitem(names, "scores", lambda predicted, data, **what: {"predicted": predicted.tolist(), **what})
    return names["Task"]("counted", Counting, 10, (1, 2, 3)), trainings


def row(name, epochs, predicted):
    return {"predicted": pytest.approx(predicted), "row": name, "epochs": epochs}


def test_one_run_is_read_off_where_asked_and_at_its_end(names, counted, data):
    task, trainings = counted
    found = names["one_run"](task, lambda *arguments: arguments, 0.1, 2, 7, data, looks=(0.5, 1))
    assert trainings == [((0.1, 40, 2), 0, 2)]
    assert {epoch: values.tolist() for epoch, values in found.items()} == {
        epoch: pytest.approx(state(epoch, 7) ** 2) for epoch in (0.5, 1, 2)
    }
    found = names["one_run"](task, lambda *arguments: Average(), 0.1, 1, 7, data)
    assert found == {1: "the average"}  # of schedule-free training, in place of what is trained


class Average:
    x = "the average"


def test_rows_of_one_run_for_each_length_and_of_one_for_all(names, counted, data):
    task, trainings = counted
    rows = names["made_for_its_length"](task, names["cosine_decay"], 0.1, "made", 2, 7, data)
    assert rows == [row("made", 2, state(2, 7) ** 2)]
    assert names["schedule_free_run"](task, 0.1, 7, data) == [
        row("schedule-free AdamW", epochs, state(epochs, 7) ** 2) for epochs in (1, 2, 3)
    ]
    assert [epochs for _, _, epochs in trainings] == [2, 3]


def test_a_trial_has_the_shortest_length_and_names_its_rate(names, counted, data):
    (found,) = names["trial"](counted[0], names["cosine_decay"], 0.3, 7, data)
    assert found == {"predicted": pytest.approx(state(1, 7) ** 2), "rate": 0.3, "epochs": 1}


def test_independent_runs_have_a_cycle_and_a_seed_each(names, counted, data):
    task, trainings = counted
    first, averaged = names["short_runs"](task, 0.1, 7, data)
    assert first == row("cosine decay", 1, state(1, 7) ** 2)
    assert averaged == row("independent runs", 3, sum(state(1, seed) ** 2 for seed in (7, 107, 207)) / 3)
    assert [optimizer.steps for optimizer, _, _ in trainings] == [10] * 3  # half of a cycle of 20 updates


@pytest.mark.parametrize("warm_up, first", [(0, [1, 1]), (0.2, [0.25, 0.5])])
def test_restarts_are_read_off_at_the_ends_of_their_cycles_and_averaged(names, counted, data, warm_up, first):
    task, trainings = counted
    rows = names["restarts"](task, 0.1, warm_up, 7, data)
    assert rows[:3] == [row("cosine restarts", n, state(n, 7) ** 2) for n in (1, 2, 3)]
    assert rows[3] == row("snapshot ensemble", 3, (state(1, 7) ** 2 + state(2, 7) ** 2 + state(3, 7) ** 2) / 3)
    assert rows[4] == row("weights of its cycle ends", 3, state(2, 7) ** 2)
    ((optimizer, start, epochs),) = trainings
    assert (start, epochs) == (0, 3)
    falls = (1 + np.cos(np.pi * np.arange(2) / 20)) / 2
    np.testing.assert_allclose(optimizer.learning_rate_at(np.arange(2)), 0.1 * falls * first, rtol=1e-5)
    np.testing.assert_allclose(optimizer.learning_rate_at(np.array([10, 20, 30, 40])), [0.05, 0.1] * 2, rtol=1e-5)


def test_weights_are_averaged_over_the_last_third_of_a_rate_that_stays_high(names, counted, data, monkeypatch):
    (task, trainings), averaged, average = counted, [], names["average_weights"]
    monkeypatch.setitem(names, "average_weights", lambda several: averaged.extend(several) or average(several))
    assert names["high_and_averaged"](task, 0.1, 7, data) == [
        row("constant", 3, state(3, 7) ** 2),
        row("constant, SWA", 3, state(2.5, 7) ** 2),
        row("constant, EMA", 3, state(-1, 7) ** 2),  # what the training put in place
    ]
    assert [weights[0][0] for weights in averaged] == [2, 2.5, 3]
    ((optimizer, _, _),) = trainings
    assert optimizer.ema_momentum == 1 - 1 / 20  # an epoch has 20 updates
    rates = optimizer.learning_rate_at(np.arange(59))  # the last update of every trapezoid is at its end
    np.testing.assert_allclose(rates, np.minimum(0.01 + 0.09 / 4 * np.arange(59), 0.1), rtol=1e-5)


class Bare:
    def __init__(self, *arguments):
        self.arguments, self.variables = arguments, []

    def build(self, variables):
        pass


def test_branches_leave_their_run_at_four_fifths_of_their_length(names, counted, data, monkeypatch):
    def load(path):
        model = Counting()
        model.epochs, model.optimizer, model.trainable_variables = float(path.read_text()), Bare(), []
        model.first = state(0, 7)[2]
        return model

    monkeypatch.setattr(keras.models, "load_model", load)
    task, trainings = counted
    before = [row("branch, before its fall", n, state(n, 7) ** 2) for n in (1, 2)]
    after = [row("branch", n, state(n, 7) ** 2) for n in (1, 2, 3)]
    assert names["branches"](task, Bare, 0.1, "branch", 7, data) == before + after
    assert [(optimizer.arguments, start, epochs) for optimizer, start, epochs in trainings] == [
        ((0.1, 60, 3), 0, 2.4),
        ((0.1, 20, 1), 0.8, 1),
        ((0.1, 40, 2), 1.6, 2),
        ((0.1, 60, 3), 2.4, 3),
    ]


@pytest.mark.parametrize("epochs", [2, 4, 6])
def test_rates_of_a_run_rise_for_a_fifth_of_an_epoch_and_fall_to_its_end(names, epochs):
    updates, low = 400 * epochs, 0.2
    last, foot = updates - 1, round(0.8 * (updates - 1))
    at = np.arange(updates)
    rise, rounded = low + (2 - low) * at / 80, low + (2 - low) * (1 - np.cos(np.pi * at / 80)) / 2
    cosine = 1e-3 * low + (2 - 1e-3 * low) * (1 + np.cos(np.pi * (at - 80) / (last - 80))) / 2
    root = 1e-3 * low + (2 - 1e-3 * low) * (1 - np.sqrt(np.maximum(at - foot, 0) / (last - foot)))
    for make, start, fall in (("cosine_decay", rounded, cosine), ("sgd_trapezoid", rise, root)):
        optimizer = names[make](2.0, updates, epochs)
        expected = np.where(at <= 80, start, fall)
        np.testing.assert_allclose(optimizer.learning_rate_at(at), expected, rtol=1e-4, atol=1e-6, err_msg=make)
        assert optimizer.momentum_at(5) == 0.9
    adamw = names["adamw_trapezoid"](2.0, updates, epochs)
    assert isinstance(adamw, keras.optimizers.AdamW)
    np.testing.assert_allclose(adamw._learning_rate.at(at), np.where(at <= 80, rise, root), rtol=1e-4, atol=1e-6)
    free = names["schedule_free"](2.0, updates, epochs)
    assert (float(free.learning_rate), free.warm_up) == (2, pytest.approx(80))


def test_a_training_looks_after_each_tenth_of_an_epoch_and_goes_on_where_it_stopped(names, task, data):
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(10, "softmax")])
    optimizer, seen = keras.optimizers.SGD(0.0), []

    def look(epoch):
        seen.append((epoch, int(optimizer.iterations)))

    names["train"](model, optimizer, task, data, 0, 1, 0.7, look)
    assert seen == [(0.8, 2), (0.9, 4), (1.0, 6)]  # 20 updates an epoch
    assert names["updates_of"](task, data._replace(train=(data.train[0][:199], None)), 2) == 38  # whole batches


def test_probabilities_are_those_of_the_weights_given_with_statistics_of_the_first_fifty_batches(names, data):
    drawn = np.random.default_rng(0)
    train, test = drawn.normal(size=(120, 2)).astype("float32"), drawn.normal(size=(4, 2)).astype("float32")
    train[100:] += 9  # after fifty batches of two
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization(center=False, scale=False)])
    model.add(keras.layers.Dense(2, "softmax", use_bias=False))
    kernel, other = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[2.0, 0.0], [0.0, 1.0]])
    weights, two = [np.zeros(2), np.ones(2), kernel], names["Task"]("two", None, 2, ())
    for trainable, used in ((None, kernel), ([other], other)):
        found = names["probabilities"](
            model, two, data._replace(train=(train, None), test=(test, None)), weights, trainable
        )
        mean, variance, _ = model.get_weights()
        np.testing.assert_allclose(mean, train[:100].mean(axis=0), atol=1e-6)
        powers = np.exp((test - mean) / np.sqrt(variance + 1e-3) @ used)
        np.testing.assert_allclose(found, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4)


def test_scores(names, data):
    predicted = np.array([[0.8, 0.2], [0.4, 0.6], [np.nan, np.nan], [0.0, 1.0]])  # right, wrong, diverged, wrong
    labels = np.array([[0], [0], [1], [0]])
    assert names["scores"](predicted, data._replace(test=(None, labels)), row="a", epochs=2) == {
        "row": "a",
        "epochs": 2,
        "test_accuracy": 0.25,
        "test_loss": pytest.approx(-np.log([0.8, 0.4, 0.1, 1e-7]).mean()),
        "calibration_error": pytest.approx((0.2 + 0.6 + 0.1 + 1) / 4),
    }


def accuracies(asked, *of_schedules):
    """`get` of these test accuracies, {rate: accuracy} for each schedule; what it was asked is noted."""

    def get(experiment, trials, seeds, task, part):
        assert (experiment, seeds, part) == ("drawn_tuning", (1000,), "validation")
        asked.append(sorted({trial.args[2] for trial in trials.values()}))
        found = [(rate, of_schedules[make(None)].get(rate)) for _, make, rate in (t.args for t in trials.values())]
        return pd.DataFrame([line for line in found if line[1] is not None], columns=["rate", "test_accuracy"])

    return get


def one(_):
    return 0


def another(_):
    return 1


def test_the_best_rate_is_searched_until_its_neighbours_are_worse(names, task):
    def search(middle, *of_schedules):
        asked = []
        schedules = (one, another)[: len(of_schedules)]
        return names["best_rate"](task, schedules, middle, accuracies(asked, *of_schedules)), asked

    rates = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    rising = dict(zip(rates, np.linspace(0.1, 0.9, 9)))
    assert search(0.3, rising | {1.0: 0.2}) == (0.3, [[0.1, 0.3, 1.0]])
    assert search(0.03, rising | {0.3: 0.2}) == (0.1, [[0.01, 0.03, 0.1], [0.01, 0.03, 0.1, 0.3]])
    assert search(1.0, rising) == (3.0, [[0.3, 1.0, 3.0]])  # the last of all
    falling = {rate: 1 - accuracy for rate, accuracy in rising.items()}
    assert search(0.01, falling)[0] == 0.0003 and len(search(0.01, falling)[1]) == 3
    assert search(0.3, {0.1: 0.9, 0.3: 0.8, 1.0: 0.1}, {0.1: 0.1, 0.3: 0.8, 1.0: 0.2})[0] == 0.3  # in the mean
    assert search(0.3, {0.1: 0.9, 0.3: 0.95})[0] is None  # a trial is missing


def test_ways_have_the_peaks_that_were_found_and_wait_for_the_others(names, monkeypatch):
    cifar, mnist = names["CIFAR"], names["MNIST"]

    def best_rate(task, schedules, middle, get):
        return {"cosine_decay, sgd_trapezoid": 0.5, "cosine_decay": 0.6, "adamw_trapezoid": 0.7}.get(
            ", ".join(make.__name__ for make in schedules)
        )

    monkeypatch.setitem(names, "best_rate", best_rate)
    peaks = {"SGD": 0.5, "cosine decay alone": 0.6, "AdamW trapezoid": 0.7, "schedule-free AdamW": None}
    assert names["peaks_of"](cifar, None) == peaks and names["peaks_of"](mnist, None) == {"SGD": 0.5}

    def told(task):
        return {name: (way.func.__name__, *way.args[1:]) for name, way in names["ways_of"](task, None).items()}

    decay, flat, adamw = names["cosine_decay"], names["sgd_trapezoid"], names["adamw_trapezoid"]
    shared = {"short runs": ("short_runs", 0.5), "constant": ("high_and_averaged", 0.5)}
    shared |= {"trapezoid": ("branches", flat, 0.5, "trapezoid")}
    made = {f"cosine decay, {n} epochs": ("made_for_its_length", decay, 0.5, "cosine decay", n) for n in (4, 6)}
    of_own = "cosine decay, own peak"
    made |= {f"{of_own}, {n} epochs": ("made_for_its_length", decay, 0.6, of_own, n) for n in (2, 4, 6)}
    more = {"cosine restarts": ("restarts", 0.5, 0), "AdamW trapezoid": ("branches", adamw, 0.7, "AdamW trapezoid")}
    assert told(cifar) == shared | made | more
    made = {f"cosine decay, {n} epochs": ("made_for_its_length", decay, 0.5, "cosine decay", n) for n in (2, 3)}
    more = {"cosine restarts": ("restarts", 0.5, 0.2), "restarts from the top": ("restarts", 0.5, 0)}
    assert told(mnist) == shared | made | more


def test_the_plan_is_of_both_tasks_and_each_way_of_sharpness_on_its_data(names, monkeypatch):
    asked = []

    def get(experiment, ways, seeds, task, part):
        asked.append((experiment, {name: getattr(way, "args", way) for name, way in ways.items()}, task, part))
        assert list(seeds) == [0, 1, 2, 3, 4]
        return pd.DataFrame({"way": list(ways)})

    monkeypatch.setitem(names, "ways_of", lambda task, get: {f"way of {task.name}": task})
    done, tasks = names["plan"](get), (names["CIFAR"], names["MNIST"])
    assert asked[:2] == [(task.name, {f"way of {task.name}": task}, task, "test") for task in tasks]
    for (experiment, ways, task, part), at, data in zip(asked[2:], tasks, ("cifar10", "mnist")):
        assert (experiment, task, part) == ("06_sharpness", at, "test")
        assert ways == {name: (way,) for name, way in names["WAYS"].items() if way.data == data}
    assert list(done) == ["06_cifar", "06_mnist", "06_sharpness"]
    assert sorted(done["06_sharpness"]["way"]) == sorted(names["WAYS"]) and len(asked) == 4


def test_trials_are_scored_on_five_thousand_images_that_no_trial_trains_on(names, monkeypatch):
    def load(*sizes):
        assert not sizes  # all images
        numbers = np.arange(6000)
        return experiments.Dataset((numbers, numbers), (numbers[:9], numbers[:9]), "synthetic", "drawn")

    monkeypatch.setitem(names, "SMOKE", False)
    for task, loader, other in (("CIFAR", "load_cifar10", "load_mnist"), ("MNIST", "load_mnist", "load_cifar10")):
        monkeypatch.setattr(experiments, loader, load)
        monkeypatch.setattr(experiments, other, None)
        images = functools.partial(names["images"].__wrapped__, names[task])
        assert len(images("test").train[0]) == 6000 and len(images("test").test[0]) == 9
        assert images("validation").train[0].tolist() == list(range(1000))
        assert images("validation").test[1].tolist() == list(range(1000, 6000))


@pytest.fixture(scope="module")
def shown(names):
    """Those, and the functions of the cells that show what was recorded."""
    cells, found = json.loads(train_rows.NOTEBOOK_6.read_text(encoding="utf-8"))["cells"], dict(names)
    for cell in cells:
        if cell["cell_type"] == "code" and "rows" not in cell["metadata"].get("tags", []):
            functions = [n for n in ast.parse("".join(cell["source"])).body if isinstance(n, ast.FunctionDef)]
            exec(compile(ast.Module(functions, []), "a cell of notebook 06", "exec"), found)
    return found


def test_the_interval_is_students(shown):
    half = 4.302653 / 3**0.5  # t of two degrees of freedom; the standard deviation is 1
    assert shown["interval"]([1, 2, 3]) == pytest.approx((2, 2 - half, 2 + half), rel=1e-6)
    assert shown["mean_text"]([1, 2, 3]) == "2.00 ± 2.48"
    assert shown["mean_text"]([0.01, 0.02, 0.03]) == "0.020 ± 0.025"  # one digit more, for a small mean
    table = pd.DataFrame({"mean": [91.25], "low": [90.04], "high": [92.46]})
    assert shown["text_of"](table) == ["91.2 (90.0 to 92.5)"]


def test_recorded_rows_are_read_with_the_sizes_of_their_data_and_named(shown, monkeypatch):
    monkeypatch.setitem(shown, "IMAGES", {"06_cifar": 50000, "06_mnist": 60000})
    monkeypatch.setitem(shown, "read_record", lambda *arguments: arguments)
    for task, size in (("CIFAR", 50000), ("MNIST", 60000)):
        assert shown["read"]("name", {}, (0,), shown[task], "test") == ("name", {}, (0,), size, 10000, "test")
        held_out = shown["read"]("name", {}, (0,), shown[task], "validation")
        assert held_out == ("name", {}, (0,), size - 5000, 5000, "validation")
    named = shown["named"](pd.DataFrame({"row": ["a", "b"], "epochs": [1.0, 2.0]}))
    assert named["run"].tolist() == ["a, 1 epoch", "b, 2 epochs"] and named["diverged_at"].isna().all()


def test_the_table_of_many_models_is_of_the_longest_runs_in_percent(shown, monkeypatch):
    monkeypatch.setitem(shown, "MANY", {"cosine decay": "one cosine"})
    lines = [("cosine decay", 4, 0.5, 0.1), ("cosine decay", 6, 0.75, 0.05), ("trapezoid", 6, 0.8, 0.02)]
    lines = pd.DataFrame(lines, columns=["row", "epochs", "test_accuracy", "calibration_error"])
    monkeypatch.setitem(shown, "recorded", {"06_cifar": lines})
    found = shown["at_the_end"](shown["CIFAR"])[["way", "accuracy (%)", "calibration error (%)"]]
    assert found.values.tolist() == [["one cosine", 75, 5]]
    summary = pd.DataFrame({"row": ["a", "b", "a"], "epochs": [4, 2, 2], "mean": [1, 2, 3]})
    monkeypatch.setitem(shown, "summarise", lambda found: found)
    assert list(shown["intervals"](summary, "a")["mean"].items()) == [(2, 3), (4, 1)]


def test_the_border_is_two_over_the_rate_and_more_with_momentum(shown, monkeypatch):
    lines = {"way": ["triangle", "triangle, momentum 0.9"], "seed": [0, 1], "loss": [[1.0, 0.5], [2.0, 1.0]]}
    lines |= {"updates": [[0, 25], [0, 50]], "sharpness": [[10.0, 30.0], [19.0, 76.0]]}
    found = shown["frame_of"](pd.DataFrame(lines | {"learning_rate": [[0.1, 0.05], [0.2, 0.1]]}))
    assert found["update"].tolist() == [0, 25, 0, 50] and found["run"].tolist() == sorted(lines["way"] * 2)
    assert found["border"].tolist() == pytest.approx([20, 40, 19, 38])
    assert found["ratio"].tolist() == pytest.approx([0.5, 0.75, 1, 2])
    monkeypatch.setitem(shown, "measured", found)
    assert list(shown["sharpness_at"]("triangle", 25).items()) == [(0, 30)]


def test_shares_at_the_border_are_of_each_half_of_the_triangle(shown):
    ratios = {0: 1.1, 400: 1.2, 750: 0.79, 751: 1.0, 1000: 0.8, 1200: 1.21}
    lines = [(run, seed, at, ratio * (1 + seed)) for run in "ab" for seed in (0, 9) for at, ratio in ratios.items()]
    found = shown["shares_of"](pd.DataFrame(lines, columns=["run", "seed", "update", "ratio"]), ["a"])
    assert found.index.tolist() == [("a", half, seed) for seed in (0, 9) for half in ("rise", "fall")]
    assert found.columns.tolist() == ["obeys", "at the border", "median ratio"]
    assert found.loc[("a", "rise", 0)].tolist() == pytest.approx([2 / 3, 2 / 3, 1.1])
    assert found.loc[("a", "fall", 0)].tolist() == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert found.loc[("a", "rise", 9)].tolist() == pytest.approx([0, 0, 11])


def test_a_sweep_breaks_where_its_loss_first_leaves_the_lowest_quarter(shown):
    rows = {"loss": [2, 2, 1, 1.25, 3, 1.1, 4], "learning_rate": np.arange(1, 8) / 10}
    rows |= {"ratio": np.arange(7) / 4, "sharpness": [5.0] * 7, "border": 2 / rows["learning_rate"]}
    found = shown["break_of"](pd.DataFrame(rows))
    assert found.to_dict() == pytest.approx(
        {
            "break": 0.4,
            "break / first border": 0.4 / (2 / 5),  # 2 / its first sharpness
            "by the other rule": 0.6 / (2 / 5),  # the last rate with a loss in that quarter
            "break / border there": 0.75,
        }
    )
    with pytest.raises(AssertionError):
        shown["break_of"](pd.DataFrame(rows | {"loss": [2, 2, 1, 1, 1, 1, 1]}))
