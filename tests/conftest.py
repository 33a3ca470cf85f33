"""Settings for all tests. They must be there before Keras is imported, and notebook kernels inherit them."""

import os
import pathlib
import shutil
import tempfile

# What notebooks wrote in an earlier session of tests: runs found there would not be trained again.
shutil.rmtree(pathlib.Path(tempfile.gettempdir()) / "clr-smoke", ignore_errors=True)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CLR_PROFILE", "smoke")
os.environ.setdefault("CLR_SYNTHETIC", "always")
os.environ.setdefault("MPLBACKEND", "Agg")

import experiments  # noqa: E402, F401, I001  (first, because it imports Keras without TensorFlow's greeting)
import hypothesis  # noqa: E402
import keras  # noqa: E402
import pytest  # noqa: E402

# derandomize: the same examples in every run; database: nothing is written into the repository.
hypothesis.settings.register_profile("clr", deadline=None, derandomize=True, database=None, max_examples=150)
hypothesis.settings.load_profile("clr")


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")
