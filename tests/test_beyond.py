"""Notebook 06: its functions, on small networks and drawn data."""

import functools
import pathlib
import sys

import keras
import numpy as np
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
