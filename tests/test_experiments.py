"""run_experiment and its results file."""

import json

import clr_utils  # isort: skip  # imports Keras, so it comes first
import keras
import numpy as np
import pytest

rng = np.random.default_rng(0)
X = rng.normal(size=(96, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("uint8")
DATA = (X[:64], Y[:64], X[64:], Y[64:])


def network(units=8):
    layers = [keras.layers.Dense(units, activation="relu"), keras.layers.Dropout(0.2), keras.layers.Dense(2, "softmax")]
    return keras.Sequential([keras.Input((4,)), *layers])


def sgd(learning_rate=0.1):
    return keras.optimizers.SGD(learning_rate, momentum=0.9)


def run(seed=0, make_model=network, make_optimizer=sgd, data=DATA, **options):
    return clr_utils.run_experiment("t", "row", make_model, make_optimizer, data, source="mnist", seed=seed, **options)


@pytest.fixture(autouse=True)
def results_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    return tmp_path / "figures" / "results" / "t.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_a_line_says_what_ran_and_how_it_ended(results_file):
    line = run(epochs=2, batch_size=16, peak=0.1)
    assert lines(results_file) == [line]
    assert (line["experiment"], line["run"], line["profile"], line["seed"]) == ("t", "row", "smoke", 0)
    assert (line["epochs"], line["batch_size"], line["train_size"], line["updates"]) == (2, 16, 64, 8)
    assert line["data"] == "mnist" and line["peak"] == 0.1 and line["diverged"] is False
    assert 0 <= line["test_accuracy"] <= 1 and line["test_loss"] > 0 and line["seconds"] > 0
    assert keras.__version__ in line["hardware"] and line["backend"] == keras.backend.backend()


def test_a_finished_run_is_not_repeated_and_everything_follows_from_the_seed(results_file):
    first, other = run(), run(seed=1)
    assert run() == first and len(lines(results_file)) == 2
    results_file.unlink()
    again = run()
    assert (again["test_accuracy"], again["test_loss"], again["code"]) == (
        first["test_accuracy"],
        first["test_loss"],
        first["code"],
    )
    assert other["test_loss"] != first["test_loss"] and other["code"] == first["code"]


@pytest.mark.parametrize(
    "change",
    [
        dict(make_model=lambda: network(9)),
        dict(make_optimizer=lambda: sgd(0.2)),
        dict(data=(X[:64] * 2, *DATA[1:])),
        dict(epochs=2),
        dict(batch_size=16),
    ],
)
def test_whatever_decides_the_result_makes_a_new_run(results_file, change):
    assert run()["code"] != run(**change)["code"]
    assert len(lines(results_file)) == 2


def test_a_run_that_diverges_is_recorded_as_such():
    line = run(make_optimizer=lambda: sgd(1e30))
    assert line["diverged"] is True and line["test_loss"] is None


def test_the_same_seed_gives_the_same_start_to_every_optimizer():
    started = []

    def remembered():
        model = network()
        started.append(model.get_weights())
        return model

    run(make_model=remembered)
    run(make_model=remembered, make_optimizer=lambda: clr_utils.CLR((0.01, 0.1), 5, (0.95, 0.85)))
    for a, b in zip(*started):
        np.testing.assert_array_equal(a, b)


def test_a_line_cut_off_by_a_crash_is_ignored_and_costs_only_its_own_run(results_file):
    first, second = run(), run(seed=1)
    text = results_file.read_text()
    results_file.write_text(text[:-20])
    assert clr_utils.read_results("t") == [first]
    again = run(seed=1)
    assert [line["seed"] for line in clr_utils.read_results("t")] == [0, 1]
    assert again["test_loss"] == second["test_loss"]


def test_recorded_lines_beside_the_module_are_read_but_not_taken_for_this_run(results_file, monkeypatch, tmp_path):
    first = run()
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(clr_utils, "__file__", str(tmp_path / "clr_utils.py"))
    assert clr_utils.read_results("t") == [first]
    second = run()
    assert second["test_loss"] == first["test_loss"]
    assert len(clr_utils.read_results("t")) == 2


def test_every_recorded_result_is_of_real_data_and_stands_once():
    import pathlib

    for path in (pathlib.Path(__file__).resolve().parent.parent / "figures" / "results").glob("*.jsonl"):
        found = lines(path)
        assert found and all(line["data"] in ("mnist", "cifar10") for line in found)
        keys = [tuple(line[k] for k in ("run", "profile", "seed", "code")) for line in found]
        assert len(set(keys)) == len(keys)
        assert path.stat().st_size < 1e6
