"""The snippets of the README run as they stand."""

import pathlib
import re

import experiments  # isort: skip  # imports Keras without TensorFlow's greeting, so it comes first
import keras
import pytest

from clr_utils import CLR

README = (pathlib.Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a reader has before the snippet: a compiled model and data."""
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    monkeypatch.setenv("CLR_SYNTHETIC", "always")
    mnist = experiments.load_mnist(2000, 100)
    small = experiments.subset(mnist, 640)
    monkeypatch.setattr(experiments, "load_mnist", lambda: small)
    keras.utils.set_random_seed(0)
    x_train, y_train = mnist.train
    model = experiments.mnist_network()
    model.compile(CLR(momentum_bounds=(0.95, 0.85)), "sparse_categorical_crossentropy")
    return {"model": model, "x_train": x_train.astype("float32") / 255, "y_train": y_train}


def test_it_is_read_in_some_minutes():
    assert len(re.sub(r"```.*?```", "", README, flags=re.S).split()) <= 1000  # the words of its tables too


def test_the_three_commonest_wishes_are_there():
    for name in ("lr_range_test", "CLR(", "CyclicalLR(", "run_experiment("):
        assert any(name in snippet for snippet in SNIPPETS)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: re.findall(r"\w+\(", snippet)[0][:-1])
def test_snippet(snippet, names):
    exec(snippet, names)
    if "bounds" in names:
        assert 0 < names["low"] < names["high"]
    if "optimizer" in names:
        names["model"].compile(names["optimizer"], "sparse_categorical_crossentropy")
    names["model"].fit(names["x_train"][:64], names["y_train"][:64], verbose=0)
