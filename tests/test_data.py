"""Where the data come from, what happens when a source fails, and whether the synthetic stand-ins are fit for use.

Nothing here needs the network: the "mirrors" are a server on this machine that misbehaves on demand.
"""

import functools
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import warnings

import keras
import numpy as np
import pooch
import pytest

import experiments
from clr_utils import lr_range_test
from experiments import Dataset, hold_out, load_cifar10, load_mnist, subset

SHAPES = {"x_train": (12, 28, 28), "y_train": (12,), "x_test": (5, 28, 28), "y_test": (5,)}
CIFAR_SHAPES = {"x_train": (10, 32, 32, 3), "y_train": (10, 1), "x_test": (3, 32, 32, 3), "y_test": (3, 1)}
CIFAR_ARCHIVE = experiments._CIFAR10.archive


def make_arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.integers(0, 256 if n[0] == "x" else 10, s, dtype=np.uint8) for n, s in shapes.items()}


def npz(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def archive(batches):
    """A tar of pickles, as cs.toronto.edu has one."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in batches.items():
            content = pickle.dumps(content)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def batch(images, labels):
    """A batch of CIFAR-10: of each image its red, then its green, then its blue rows."""
    data = np.stack([images[..., colour].reshape(len(images), 1024) for colour in range(3)], axis=1)
    return {b"labels": [int(k) for k in labels[:, 0]], b"data": data.reshape(-1, 3072), b"filenames": []}


ARRAYS, CIFAR_ARRAYS = make_arrays(SHAPES), make_arrays(CIFAR_SHAPES)
GOOD = npz(ARRAYS)
BATCHES = {"batches.meta": {b"label_names": [b"airplane"]}, "test_batch": batch(*list(CIFAR_ARRAYS.values())[2:])}
for i in (3, 5, 1, 2, 4):  # the real archive has them in no order either
    BATCHES[f"data_batch_{i}"] = batch(*(array[2 * i - 2 : 2 * i] for array in list(CIFAR_ARRAYS.values())[:2]))
CIFAR_GOOD = archive(BATCHES)
DATA = Dataset((ARRAYS["x_train"], ARRAYS["y_train"]), (ARRAYS["x_test"], ARRAYS["y_test"]), "mnist", "this test")


# ----------------------------------------------------------------------------------------------- the server


@pytest.fixture
def server():
    """Serves `server.content` below every path, in the manner that the path begins with. `requests` lists the paths."""
    closing = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            content, manner = self.server.content, self.path.split("/")[1]
            if manner == "silent":
                closing.wait(10)  # not for ever: a client without a time limit must fail its test, not stop it
            self.send_response(503 if manner == "503" else 200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            half = len(content) // 2
            if manner == "other":
                content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
            self.wfile.write(content[:half])
            self.wfile.flush()
            if manner == "stall":
                closing.wait(10)
            if manner != "truncated":
                self.wfile.write(content[half:])

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # the client hung up, as it should

    served = Server(("127.0.0.1", 0), Handler)
    served.content, served.requests = GOOD, []
    thread = threading.Thread(target=functools.partial(served.serve_forever, poll_interval=0.02))
    thread.start()
    yield served
    closing.set()
    served.shutdown()
    thread.join()
    served.server_close()


def set_all(monkeypatch, files, **values):
    for name, value in values.items():
        monkeypatch.setattr(files, name, value)


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Nobody's real cache, mirrors or proxy; and patience that suits a server on this machine."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLR_SYNTHETIC", "auto")
    monkeypatch.delenv("CLR_DATA_DIR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(experiments, "PATIENCE", 0.5)
    set_all(monkeypatch, experiments._MNIST, mirrors=())
    set_all(monkeypatch, experiments._CIFAR10, mirrors=())


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "home" / "datasets"


@pytest.fixture
def mirrors(server, monkeypatch):
    """Sets what the mirrors of MNIST do, one word each, and returns their addresses."""

    def use(*manners):
        at = f"http://127.0.0.1:{server.server_address[1]}"
        urls = tuple(m if "://" in m else f"{at}/{m}/mnist.npz" for m in manners)
        sha256 = hashlib.sha256(server.content).hexdigest()
        set_all(monkeypatch, experiments._MNIST, mirrors=urls, sha256=sha256, shapes=SHAPES)
        return urls

    return use


def load(train_size=12, test_size=5):
    return load_mnist(train_size, test_size)


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else []


def assert_is_the_real_thing(data, arrays=ARRAYS, source="mnist"):
    assert data.source == source
    for got, name in zip((*data.train, *data.test), SHAPES):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, arrays[name])


def assert_is_kept(cache):
    assert files_below(cache) == ["mnist.npz"] and (cache / "mnist.npz").read_bytes() == GOOD


# ------------------------------------------------------------------------------------------------- downloads


def test_a_download_is_kept_and_the_next_time_nothing_is_said(server, mirrors, cache, capfd):
    _, url, _ = mirrors("503", "ok", "ok/third")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = load()
        shown = capfd.readouterr()
        second = load()
    assert_is_the_real_thing(first)
    assert_is_the_real_thing(second)
    assert first.origin == url and second.origin == "the Keras cache"
    assert server.requests == ["/503/mnist.npz", "/ok/mnist.npz"]
    assert shown.out == ""  # the line and the bar of pooch go to stderr; tests switch the bar off
    assert capfd.readouterr() == ("", "")
    assert_is_kept(cache)


FAULTS = {
    "truncated": "IncompleteRead",
    "other": "does not match the known hash",
    "503": "503 Server Error",
    "silent": "timed out",
    "stall": "timed out",
    "http://127.0.0.1:1/mnist.npz": "refused",
}


@pytest.mark.parametrize("fault, cause", FAULTS.items())
def test_a_faulty_mirror_is_passed_over_reported_and_leaves_nothing_behind(mirrors, cache, monkeypatch, fault, cause):
    monkeypatch.setenv("CLR_SYNTHETIC", "never")
    (url,) = mirrors(fault)
    with pytest.raises(RuntimeError, match="CLR_SYNTHETIC=never") as error:
        load()
    assert any(url in line and cause in line for line in str(error.value).splitlines())
    assert files_below(cache) == []

    _, url = mirrors(fault, "ok")
    data = load()
    assert_is_the_real_thing(data)
    assert data.origin == url
    assert_is_kept(cache)


def test_an_interrupted_download_leaves_nothing_behind(mirrors, cache, monkeypatch):
    def interrupt(*args, **kwargs):
        assert files_below(cache)  # a part of it is there by now
        raise KeyboardInterrupt

    mirrors("ok", "ok")
    monkeypatch.setattr(pooch.downloaders.tqdm, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert files_below(cache) == []


def test_all_mirrors_down_gives_the_stand_in_with_a_warning_that_tells_why(mirrors, cache):
    urls = mirrors("503", "truncated", "other")
    with pytest.warns(UserWarning, match="SYNTHETIC") as caught:
        data = load()
    assert data.source == "synthetic"
    assert data.train[0].shape == (12, 28, 28) and data.test[1].shape == (5,)
    assert caught[0].filename == __file__  # the line that asked for the data
    message = str(caught[0].message)
    assert all(url in message for url in urls)
    assert "CLR_DATA_DIR" in message  # what to do about it
    assert files_below(cache) == []


def test_synthetic_always_asks_nobody(server, mirrors, monkeypatch):
    monkeypatch.setenv("CLR_SYNTHETIC", "always")
    mirrors("ok")
    with pytest.warns(UserWarning, match="SYNTHETIC"):
        assert load().source == "synthetic"
    assert server.requests == []


def test_a_misspelt_setting_is_refused(monkeypatch):
    monkeypatch.setenv("CLR_SYNTHETIC", "allways")
    with pytest.raises(ValueError, match="CLR_SYNTHETIC='allways'.*never"):
        load()


def test_data_are_delivered_where_the_cache_cannot_be_written(mirrors, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "file" / "home"))
    (url,) = mirrors("ok")
    data = load()
    assert_is_the_real_thing(data)
    assert data.origin == url
    assert files_below(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("content", [GOOD[:-100], npz(make_arrays(SHAPES, seed=1))], ids=["truncated", "other data"])
def test_a_corrupt_file_in_the_cache_is_never_used_but_replaced(mirrors, cache, monkeypatch, content):
    monkeypatch.setenv("CLR_SYNTHETIC", "never")
    cache.mkdir(parents=True)
    (cache / "mnist.npz").write_bytes(content)
    mirrors("503")
    with pytest.raises(RuntimeError, match="503 Server Error"):
        load()
    mirrors("ok")
    assert_is_the_real_thing(load())
    assert_is_kept(cache)


def test_a_good_file_is_read_from_a_cache_that_cannot_be_written(server, mirrors, cache, monkeypatch):
    cache.mkdir(parents=True)
    (cache / "mnist.npz").write_bytes(GOOD)
    mirrors("ok")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **options: 1 / 0)
    assert_is_the_real_thing(load())
    assert server.requests == []


# -------------------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def small_cifar(server, mirrors, monkeypatch):
    server.content = CIFAR_GOOD
    urls, sha256 = mirrors("ok"), hashlib.sha256(CIFAR_GOOD).hexdigest()
    set_all(monkeypatch, experiments._CIFAR10, mirrors=urls, sha256=sha256, shapes=CIFAR_SHAPES)


def test_cifar10_images_come_upright_and_in_order(small_cifar, cache):
    assert_is_the_real_thing(load_cifar10(10, 3), CIFAR_ARRAYS, "cifar10")
    assert files_below(cache) == [CIFAR_ARCHIVE]


def test_cifar10_is_found_in_the_cache(small_cifar, server, cache):
    cache.mkdir(parents=True)
    (cache / CIFAR_ARCHIVE).write_bytes(CIFAR_GOOD)
    assert_is_the_real_thing(load_cifar10(10, 3), CIFAR_ARRAYS, "cifar10")
    assert server.requests == []


def test_cifar10_reads_an_npz_in_the_data_folder(small_cifar, tmp_path, monkeypatch):
    (tmp_path / "cifar10.npz").write_bytes(npz(CIFAR_ARRAYS))
    monkeypatch.setenv("CLR_DATA_DIR", str(tmp_path))
    assert_is_the_real_thing(load_cifar10(10, 3), CIFAR_ARRAYS, "cifar10")


class Evil:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_only_files_of_the_right_checksum_are_unpickled(small_cifar, cache, tmp_path, monkeypatch):
    evil = Evil(tmp_path / "pwned")
    cache.mkdir(parents=True)
    (cache / CIFAR_ARCHIVE).write_bytes(archive({"test_batch": evil}))
    assert_is_the_real_thing(load_cifar10(10, 3), CIFAR_ARRAYS, "cifar10")  # downloaded anew

    monkeypatch.setenv("CLR_DATA_DIR", str(tmp_path))
    for content in (archive({"test_batch": evil}), npz({**CIFAR_ARRAYS, "y_train": np.array([evil], dtype=object)})):
        (tmp_path / "cifar10.npz").write_bytes(content)
        with pytest.raises(ValueError, match="cifar10.npz is not cifar10"):
            load_cifar10(10, 3)
    assert not (tmp_path / "pwned").exists()


def test_keras_keeps_its_archives_under_the_names_looked_for():
    assert experiments._MNIST.archive == "mnist.npz"
    assert CIFAR_ARCHIVE == "cifar-10-batches-py-target_archive"  # since Keras 3.8


# ---------------------------------------------------------------------------------------------- CLR_DATA_DIR


@pytest.fixture
def data_dir(mirrors, tmp_path, monkeypatch):
    """A folder named by CLR_DATA_DIR, and a mirror that would work: your own data must never be passed over."""
    mirrors("ok")
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.setenv("CLR_DATA_DIR", str(folder))
    return folder


def test_a_good_file_in_the_data_folder_is_used(data_dir, server, cache):
    mine = make_arrays(SHAPES, seed=7)
    (data_dir / "mnist.npz").write_bytes(npz(mine | {"y_train": mine["y_train"].astype(np.int64)}))
    data = load()
    assert_is_the_real_thing(data, mine)  # uint8 again
    assert "CLR_DATA_DIR" in data.origin
    assert server.requests == [] and files_below(cache) == []


def test_a_missing_file_in_the_data_folder_is_mentioned_where_the_next_source_fails(data_dir, mirrors, monkeypatch):
    monkeypatch.setenv("CLR_SYNTHETIC", "never")
    mirrors("503")
    with pytest.raises(RuntimeError, match=r"CLR_DATA_DIR has no mnist\.npz"):
        load()
    mirrors("ok")
    assert_is_the_real_thing(load())


def test_a_data_folder_that_is_not_there_is_an_error(data_dir, monkeypatch):
    monkeypatch.setenv("CLR_DATA_DIR", str(data_dir / "no"))
    with pytest.raises(ValueError, match="CLR_DATA_DIR=.*mine.no' is no folder.*unset"):
        load()


def changed(**replacements):
    return npz({k: v for k, v in {**ARRAYS, **replacements}.items() if v is not None})


BROKEN = {
    "cut by one byte": (GOOD[:-1], "may be truncated"),
    "empty": (b"", "may be truncated"),
    "text": (b"version https://git-lfs.github.com/spec/v1\n", "may be truncated"),
    "bit flip": (GOOD[:5000] + bytes([GOOD[5000] ^ 1]) + GOOD[5001:], "CRC"),
    "missing key": (changed(y_test=None), "y_test"),
    "one image short": (changed(x_train=ARRAYS["x_train"][:-1]), r"x_train is uint8 \(11, 28, 28\)"),
    "one label short": (changed(y_test=ARRAYS["y_test"][:-1]), r"y_test is uint8 \(4,\)"),
    "float images": (changed(x_train=ARRAYS["x_train"] / np.float32(255)), "x_train is float32"),
    "float labels": (changed(y_train=ARRAYS["y_train"].astype(float)), "y_train is float64"),
    "label 10": (changed(y_train=np.arange(12, dtype=np.uint8) % 11), "y_train .* 0 to 10"),
    "label -1": (changed(y_train=np.full(12, -1)), "y_train .* -1 to"),
    "image 256": (changed(x_train=np.full((12, 28, 28), 256)), "x_train .* to 256"),
}


@pytest.mark.parametrize("content, expected", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_in_the_data_folder_is_an_error_and_never_passed_over(data_dir, server, content, expected):
    (data_dir / "mnist.npz").write_bytes(content)
    with pytest.raises(ValueError, match=expected) as error:
        load()
    assert str(data_dir / "mnist.npz") in str(error.value)
    assert f"Expected: whole numbers, labels 0 to 9, in {SHAPES}" in str(error.value)
    assert server.requests == []


# --------------------------------------------------------------------------------- sizes, parts and checksum


@pytest.mark.parametrize("size", [0, -1, 13, 2.5, "5", None])
@pytest.mark.parametrize("part", ["train_size", "test_size"])
def test_sizes_that_cannot_be_are_refused(mirrors, server, part, size):
    mirrors("ok")
    with pytest.raises(ValueError, match=f"{part}={size!r}.*from 1 to {12 if part == 'train_size' else 5}"):
        load(**{part: size})
    assert server.requests == []


def test_sizes_up_to_the_whole_set_are_fine():
    for load_one, most in ((load_mnist, 60_000), (load_cifar10, 50_000)):
        with pytest.raises(ValueError, match=f"1 to {most:,}"):
            load_one(most + 1)
        with pytest.raises(ValueError, match="1 to 10,000"):
            load_one(test_size=10_001)


def assert_same(part, images, labels):
    np.testing.assert_array_equal(part[0], images)
    np.testing.assert_array_equal(part[1], labels)


def test_the_first_n_are_given(mirrors):
    mirrors("ok")
    data = load(np.int64(7), 1)
    assert_same(data.train, ARRAYS["x_train"][:7], ARRAYS["y_train"][:7])
    assert_same(data.test, ARRAYS["x_test"][:1], ARRAYS["y_test"][:1])


def test_subset_takes_the_first_training_images_and_hold_out_the_last():
    x, y = DATA.train
    first = subset(DATA, 9)
    assert_same(first.train, x[:9], y[:9])
    assert_same(first.test, *DATA.test)
    held_out = hold_out(first, 4)
    assert_same(held_out.train, x[:5], y[:5])
    assert_same(held_out.test, x[5:9], y[5:9])
    assert (DATA.part, first.part, held_out.part) == ("test", "test", "validation")
    assert_same(subset(DATA, 12).train, x, y)


@pytest.mark.parametrize("function, most", [(subset, 12), (hold_out, 11)])
def test_parts_that_cannot_be_are_refused(function, most):
    for size in (0, -1, most + 1, 1.5, None):
        with pytest.raises(ValueError, match=f"size={size}.* 1 to {most}"):
            function(DATA, size)


def test_the_checksum_is_that_of_the_arrays_wherever_they_are_and_came_from():
    other = [tuple(np.asfortranarray(array) for array in part) for part in DATA[:2]]  # laid out differently
    assert Dataset(*other, "synthetic", "elsewhere").checksum == DATA.checksum
    x, y = np.arange(8, dtype=np.uint8).reshape(2, 2, 2), np.uint8([3, 1])
    assert Dataset((x, y), (x[:1], y[:1]), "mnist", "").checksum == "c8829258f02e"  # on every machine, for ever


def test_whatever_changes_the_data_changes_the_checksum():
    (x, y), (x_test, y_test) = DATA.train, DATA.test
    one_bit = x.copy()
    one_bit[6, 7, 8] ^= 1
    others = [
        DATA._replace(train=(one_bit, y)),
        DATA._replace(train=(x, (y + 1) % 10)),
        DATA._replace(test=(x_test, (y_test + 1) % 10)),
        DATA._replace(train=(x[::-1], y[::-1])),
        DATA._replace(train=(x.reshape(12, 784), y)),
        DATA._replace(train=(x, y.astype(np.int8))),
        DATA._replace(train=DATA.test, test=DATA.train),
        subset(DATA, 11),
        hold_out(DATA, 5),
    ]
    assert len({data.checksum for data in (DATA, *others)}) == len(others) + 1


# ------------------------------------------------------------------------------------------------- synthetic


def draw(name, train_size, test_size):
    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match="SYNTHETIC"):
        patch.setenv("CLR_SYNTHETIC", "always")
        return {"mnist": load_mnist, "cifar10": load_cifar10}[name](train_size, test_size)


@pytest.fixture(scope="module")
def drawn():
    return {"mnist": draw("mnist", 6000, 1000), "cifar10": draw("cifar10", 3000, 1000)}


stand_ins = pytest.mark.parametrize("name", ["mnist", "cifar10"])


@stand_ins
def test_synthetic_data_have_the_form_of_the_real_ones(drawn, name):
    files = {"mnist": experiments._MNIST, "cifar10": experiments._CIFAR10}[name]
    for part, (images, labels) in zip(("train", "test"), drawn[name]):
        assert images.dtype == labels.dtype == np.uint8
        assert images.shape[1:] == files.shapes["x_" + part][1:]
        assert labels.shape == (len(images), *files.shapes["y_" + part][1:])
        counts = np.bincount(labels.ravel(), minlength=10)
        assert len(counts) == 10 and counts.min() > 0.07 * len(labels)
        assert images.max() > 200 and images.min() < 20
        assert len(np.unique(images.reshape(len(images), -1)[:200], axis=0)) == 200


@stand_ins
@pytest.mark.parametrize("train_size, test_size", [(1, 37), (1001, 1)])
def test_a_smaller_set_is_a_prefix_of_a_larger_one_whatever_the_seed(drawn, name, train_size, test_size):
    keras.utils.set_random_seed(train_size)
    small, large = draw(name, train_size, test_size), drawn[name]
    assert_same(small.train, *(array[:train_size] for array in large.train))
    assert_same(small.test, *(array[:test_size] for array in large.test))


@stand_ins
def test_no_test_image_is_a_training_image(drawn, name):
    seen = {image.tobytes() for image in drawn[name].train[0]}
    assert not any(image.tobytes() in seen for image in drawn[name].test[0])


def test_the_network_of_the_series_learns_it(drawn):
    (x, y), (x_test, y_test) = drawn["mnist"][:2]
    keras.utils.set_random_seed(0)
    model = experiments.mnist_network()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x / np.float32(255), y, batch_size=32, epochs=2, verbose=0)
    score = model.evaluate(x_test / np.float32(255), y_test, verbose=0)[1]
    assert 0.8 < score < 0.95  # one label in ten is wrong: where the loss goes to zero, no rate is too high


@stand_ins
@pytest.mark.parametrize("seed", range(3))
def test_a_short_range_test_descends_on_it(drawn, name, seed):
    x, y = (array[:2000] for array in drawn[name].train)
    keras.utils.set_random_seed(seed)
    mnist = name == "mnist"
    model = experiments.rescaled(experiments.mnist_network()) if mnist else experiments.residual_network(16, 1)
    model.compile(keras.optimizers.SGD(momentum=0.9), "sparse_categorical_crossentropy")
    found = lr_range_test(model, x.astype("float32"), y, num_steps=200)
    assert found.smoothed.min() < 0.95 * np.log(10)  # that of guessing
    assert found.bounds()[0] < found.bounds()[1]


def test_the_data_folder_may_be_in_the_home_folder(data_dir, monkeypatch):
    (data_dir / "mnist.npz").write_bytes(GOOD)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(data_dir.parent))
    monkeypatch.setenv("CLR_DATA_DIR", f"~/{data_dir.name}")
    assert "CLR_DATA_DIR" in load().origin


def test_the_data_folder_comes_before_the_cache(data_dir, cache):
    mine = make_arrays(SHAPES, seed=7)
    (data_dir / "mnist.npz").write_bytes(npz(mine))
    cache.mkdir(parents=True)
    (cache / "mnist.npz").write_bytes(GOOD)
    assert_is_the_real_thing(load(), mine)
