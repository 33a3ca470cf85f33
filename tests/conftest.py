"""Settings for all tests. They must be there before Keras is imported, and notebook kernels inherit them."""

import atexit
import os
import shutil
import tempfile

# A folder of this session's own for what is trained: runs of an earlier one would not be trained again. Processes that
# it starts (pytest-xdist's, notebook kernels) share it.
if "CLR_OUTPUT_DIR" not in os.environ:
    os.environ["CLR_OUTPUT_DIR"] = tempfile.mkdtemp(prefix="clr-tests-")
    atexit.register(shutil.rmtree, os.environ["CLR_OUTPUT_DIR"], ignore_errors=True)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CLR_PROFILE", "smoke")
os.environ.setdefault("CLR_SYNTHETIC", "always")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["TQDM_DISABLE"] = "1"

import experiments  # noqa: E402, I001  (first, because it imports Keras without TensorFlow's greeting)
import hypothesis  # noqa: E402
import keras  # noqa: E402
import pytest  # noqa: E402

# derandomize: the same examples in every run; database: nothing is written into the repository.
hypothesis.settings.register_profile("clr", deadline=None, derandomize=True, database=None, max_examples=150)
hypothesis.settings.load_profile("clr")

assert experiments.keras is keras


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")
