"""conformance.py on each backend that is installed, in a process of its own: every feature is as with SGD.

A backend that is not installed is skipped, and pytest says so. The table that notebook 05 prints must be the one that
comes out here.
"""

import functools
import importlib.metadata
import json

import conformance
import pytest


@functools.cache
def outcome_on(backend):
    try:
        return conformance.on_backend(backend), None
    except Exception as error:  # kept too, or each feature would wait for it again
        return None, error


def results_on(backend):
    results, error = outcome_on(backend)
    if error:
        raise error
    return results


@pytest.mark.parametrize("feature", conformance.FEATURES)
@pytest.mark.parametrize("backend", conformance.BACKENDS)
def test_conforms(backend, feature):
    results = results_on(backend)
    if results is None:
        pytest.skip(f"{backend} is not installed, its column of the table was NOT tested: pip install {backend}")
    assert not results["features"][feature].startswith("FAILED"), results["features"][feature]


@pytest.mark.parametrize("backend", conformance.BACKENDS)
def test_the_table_of_notebook_05_is_what_comes_out(backend):
    recorded = json.loads(conformance.TABLE.read_text(encoding="utf-8"))[backend]
    results = results_on(backend)
    if results is None or recorded["versions"] != results["versions"]:
        pytest.skip(f"recorded with {recorded['versions']}, here: {results and results['versions']}")
    remedy = "python tests/conformance.py --all --write, in an environment with TensorFlow, JAX and torch"
    assert results["features"] == recorded["features"], remedy


def test_every_backend_of_the_table_was_run():
    recorded = json.loads(conformance.TABLE.read_text(encoding="utf-8"))
    assert list(recorded) == list(conformance.BACKENDS)
    for column in recorded.values():
        assert list(column["features"]) == list(conformance.FEATURES)
        assert set(column["features"].values()) <= {"same", "refused, as SGD is", "-"}


def test_a_wrong_optimizer_does_not_conform(monkeypatch):
    # An update late: the fault that a table of "same" must not hide.
    late = conformance.CYCLING._replace(rate=lambda i: conformance.RATES["triangular"](max(i - 1, 0)))
    monkeypatch.setattr(conformance, "CYCLING", late)
    assert conformance.verdict("compiled as Keras does by itself").startswith("FAILED with CLR: AssertionError")


def test_tensorflow_is_always_there():
    assert importlib.metadata.version("tensorflow")  # or the whole table would be skipped unnoticed
    assert results_on("tensorflow") is not None
