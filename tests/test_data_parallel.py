"""The script of notebook 05: which images each process trains on, without training and without other processes."""

import pathlib
import runpy
import sys
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import clr_utils
import experiments

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "notebooks" / "05_data_parallel.py"
ORDER = np.random.default_rng(0).permutation(10)


@pytest.fixture
def fed(monkeypatch, tmp_path):
    """What `fit` gets in process `me` of so many, with two devices each, from ten images that are their number."""

    def run(me, processes, batch_size, updates):
        got = {"saved": tmp_path / f"{me} of {processes}.npz"}
        options = f"--batch-size {batch_size} --updates {updates} --save".split()
        monkeypatch.setattr(sys, "argv", ["05_data_parallel.py", *options, str(got["saved"])])
        monkeypatch.setattr(sys, "path", [*sys.path])  # the script appends to it
        counts = {"process_count": processes, "process_index": me, "device_count": 2 * processes}
        jax = {name: lambda count=count: count for name, count in counts.items()}
        monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(**jax))
        monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
        monkeypatch.delenv("KERAS_DISTRIBUTION_NUM_PROCESSES", raising=False)
        monkeypatch.setattr(keras.distribution, "DataParallel", lambda **options: options)
        monkeypatch.setattr(keras.distribution, "set_distribution", lambda options: got.update(options))
        images = np.arange(10)
        data = experiments.Dataset((images, 100 + images), None, "synthetic", "drawn")
        monkeypatch.setattr(experiments, "load_mnist", lambda: data)

        def fit(x, y, **options):
            got.update(x=x.tolist(), y=y.tolist(), **options)
            return SimpleNamespace(history={"loss": [0.5]})

        model = SimpleNamespace(compile=lambda *_, **__: None, fit=fit, get_weights=lambda: [np.ones(2)])
        monkeypatch.setattr(keras, "Sequential", lambda layers: model)
        monkeypatch.setattr(clr_utils, "CLR", lambda *arguments: None)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return got

    return run


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_shares_of_all_processes_are_the_batches_of_one(fed, processes):
    batch_size, updates = 12, 5
    share, whole = batch_size // processes, np.tile(ORDER, 6).tolist()  # 60 of 10 images
    every = [fed(me, processes, batch_size, updates) for me in range(processes)]
    for update in range(updates):
        rows = slice(update * share, (update + 1) * share)
        batch = [image for got in every for image in got["x"][rows]]
        assert batch == whole[update * batch_size : (update + 1) * batch_size]
    for got in every:
        assert len(got["x"]) == updates * share and (got["batch_size"], got["shuffle"]) == (share, False)
        assert not got["auto_shard_dataset"]  # each brings its own rows


def test_the_order_begins_again_in_the_middle_of_a_batch(fed):
    first, second = (fed(me, 2, 4, 3) for me in range(2))  # 12 of 10 images
    assert first["x"] == [*ORDER[[0, 1]], *ORDER[[4, 5]], *ORDER[[8, 9]]]
    assert second["x"] == [*ORDER[[2, 3]], *ORDER[[6, 7]], *ORDER[[0, 1]]]


def test_labels_stay_with_their_images(fed):
    for me in range(2):
        got = fed(me, 2, 8, 3)
        assert got["y"] == [100 + image for image in got["x"]]


def test_the_first_process_alone_says_how_it_went_and_saves(fed, capsys):
    second, says_nothing = fed(1, 2, 8, 3), capsys.readouterr().out
    assert not second["saved"].exists() and not says_nothing
    first, says = fed(0, 2, 8, 3), capsys.readouterr().out
    assert first["saved"].exists()
    assert says.startswith("jax, processes: 2, devices: 4; 3 updates of 8 synthetic images") and "loss 0.50000" in says
