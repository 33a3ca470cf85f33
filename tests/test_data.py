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
import pytest

import clr_utils

SHAPES = {"x_train": (12, 28, 28), "y_train": (12,), "x_test": (5, 28, 28), "y_test": (5,)}
CIFAR_SHAPES = {"x_train": (10, 32, 32, 3), "y_train": (10, 1), "x_test": (3, 32, 32, 3), "y_test": (3, 1)}
CIFAR_ARCHIVES = clr_utils._CIFAR10.archives


def make_arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.integers(0, 256 if n[0] == "x" else 10, s, dtype=np.uint8) for n, s in shapes.items()}


def npz(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def cifar_archive(arrays):
    """What cs.toronto.edu has: a tar of pickles, each image its red, then its green, then its blue rows."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:

        def add(name, content):
            content = pickle.dumps(content)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        def batch(images, labels):
            data = np.zeros((len(images), 3072), np.uint8)
            for colour in range(3):
                for row in range(32):
                    start = colour * 1024 + row * 32
                    data[:, start : start + 32] = images[:, row, :, colour]
            return {b"batch_label": b"", b"labels": [int(k) for k in labels[:, 0]], b"data": data, b"filenames": []}

        add("batches.meta", {b"label_names": [b"airplane"]})
        for i in (3, 5, 1, 2, 4):  # the real archive has them in no order either
            part = slice(2 * i - 2, 2 * i)
            add(f"data_batch_{i}", batch(arrays["x_train"][part], arrays["y_train"][part]))
        add("test_batch", batch(arrays["x_test"], arrays["y_test"]))
    return file.getvalue()


ARRAYS = make_arrays(SHAPES)
GOOD = npz(ARRAYS)
CIFAR_ARRAYS = make_arrays(CIFAR_SHAPES)
CIFAR_GOOD = cifar_archive(CIFAR_ARRAYS)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# ----------------------------------------------------------------------------------------------- the server


@pytest.fixture
def server():
    """Serves GOOD (or `server.content`) below every path, in the manner of the path. `requests` lists the paths."""
    closing = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            getattr(self, "answer_" + self.path.strip("/").split("/")[0])(self.server.content)

        def start(self, size=None, status=200):
            self.send_response(status)
            if size is not None:
                self.send_header("Content-Length", str(size))
            self.end_headers()

        def answer_ok(self, content):
            self.start(len(content))
            self.wfile.write(content)

        def answer_unsized(self, content):
            self.start()
            self.wfile.write(content)

        def answer_truncated(self, content):
            self.start(len(content))
            self.wfile.write(content[: len(content) // 2])

        def answer_unsized_truncated(self, content):
            self.start()
            self.wfile.write(content[: len(content) // 2])

        def answer_chunked_truncated(self, content):
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s" % (len(content), content[: len(content) // 2]))
            self.close_connection = True

        def answer_other(self, content):
            other = bytearray(content)
            other[len(other) // 2] ^= 1
            self.answer_ok(bytes(other))

        def answer_page(self, content):
            self.answer_ok(b"<html>Please log in to this hotel's network</html>")

        def answer_empty(self, content):
            self.start(0)

        def answer_503(self, content):
            self.start(0, status=503)

        def answer_404(self, content):
            self.start(0, status=404)

        def answer_garbage(self, content):
            self.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

        def answer_silent(self, content):
            closing.wait(10)  # not for ever: a client without a time limit must fail its test, not stop it

        def answer_stall(self, content):
            self.start(len(content))
            self.wfile.write(content[:1000])
            self.wfile.flush()
            closing.wait(10)

        def answer_trickle(self, content):
            self.start(len(content))
            for byte in content[:500]:  # at most ten seconds, for the same reason
                self.wfile.write(bytes([byte]))
                if closing.wait(0.02):
                    return

        def answer_slow(self, content):  # about half a second in all
            self.start(len(content))
            for part in np.array_split(np.frombuffer(content, np.uint8), 10):
                self.wfile.write(part.tobytes())
                closing.wait(0.05)

        def log_message(self, *args):
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            pass  # the client hung up, as it should

    served = Server(("127.0.0.1", 0), Handler)
    served.content, served.requests = GOOD, []
    served.url = lambda manner: f"http://127.0.0.1:{served.server_address[1]}/{manner}/mnist.npz"
    thread = threading.Thread(target=functools.partial(served.serve_forever, poll_interval=0.02))
    thread.start()

    def close():
        closing.set()
        served.shutdown()
        thread.join()
        served.server_close()

    served.close = close
    yield served
    if thread.is_alive():
        close()


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Nobody's real cache, nobody's proxy; and patience that suits a server on this machine."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLR_SYNTHETIC", "auto")
    monkeypatch.delenv("CLR_DATA_DIR", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(clr_utils, "_download", functools.partial(clr_utils._download, timeout=0.5, trial=0.3))
    monkeypatch.setattr(clr_utils, "_MNIST", clr_utils._MNIST._replace(mirrors=()))
    monkeypatch.setattr(clr_utils, "_CIFAR10", clr_utils._CIFAR10._replace(mirrors=()))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "home" / "datasets"


@pytest.fixture
def mirrors(server, monkeypatch):
    """Sets what the mirrors of MNIST do, one word each, and returns their addresses."""

    def use(*manners):
        urls = tuple(m if "://" in m else server.url(m) for m in manners)
        small = clr_utils._MNIST._replace(mirrors=urls, sha256=sha256(server.content), shapes=SHAPES)
        monkeypatch.setattr(clr_utils, "_MNIST", small)
        return urls

    return use


def load(train_size=12, test_size=5):
    return clr_utils.load_mnist(train_size, test_size)


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*")) if folder.exists() else []


def assert_is_the_real_thing(data, arrays=ARRAYS, source="mnist"):
    assert data.source == source
    for got, name in zip((*data.train, *data.test), ("x_train", "y_train", "x_test", "y_test")):
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, arrays[name])


# ------------------------------------------------------------------------------------------------- downloads


@pytest.mark.parametrize("manner", ["ok", "unsized"])
def test_a_download_is_kept_for_the_next_time(server, mirrors, cache, manner):
    (url,) = mirrors(manner)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first = load()
        assert first.origin == url
        assert_is_the_real_thing(first)
        assert files_below(cache) == ["mnist.npz"] and (cache / "mnist.npz").read_bytes() == GOOD
        server.close()
        second = load()
    assert_is_the_real_thing(second)
    assert "cache" in second.origin
    assert len(server.requests) == 1


def test_the_first_mirror_that_works_is_the_only_one_asked(server, mirrors):
    mirrors("503", "ok", "ok/second")
    load()
    assert server.requests == ["/503/mnist.npz", "/ok/mnist.npz"]


FAULTS = {
    "truncated": "truncated",
    "unsized_truncated": "checksum",
    "chunked_truncated": "",  # the wording is the library's
    "other": "checksum",
    "page": "checksum",
    "empty": "checksum",
    "503": "503",
    "404": "404",
    "garbage": "",
    "silent": "no answer",
    "stall": "no answer",
    "http://127.0.0.1:1/mnist.npz": "refused",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_mirror_is_passed_over(server, mirrors, cache, fault):
    _, url = mirrors(fault, "ok")
    data = load()
    assert_is_the_real_thing(data)
    assert data.origin == url
    assert files_below(cache) == ["mnist.npz"] and (cache / "mnist.npz").read_bytes() == GOOD


@pytest.mark.parametrize("fault, cause", FAULTS.items())
def test_a_fault_leaves_nothing_behind_and_is_reported(mirrors, cache, fault, cause, monkeypatch):
    monkeypatch.setenv("CLR_SYNTHETIC", "never")
    (url,) = mirrors(fault)
    with pytest.raises(RuntimeError, match="CLR_SYNTHETIC=never") as error:
        load()
    assert files_below(cache) == []
    (line,) = [line for line in str(error.value).splitlines() if url in line]
    assert cause in line.split(url)[1].lower()
    assert len(line.split(url)[1].strip(" :")) > 3


def test_a_slow_mirror_is_left_for_the_next(mirrors, cache):
    _, url = mirrors("trickle", "ok")
    data = load()
    assert_is_the_real_thing(data)
    assert data.origin == url and files_below(cache) == ["mnist.npz"]


def test_a_slow_mirror_is_reported(mirrors, cache, monkeypatch):
    monkeypatch.setenv("CLR_SYNTHETIC", "never")
    url, _ = mirrors("trickle", "503")
    with pytest.raises(RuntimeError, match=f"{url}: too slow"):
        load()
    assert files_below(cache) == []


def test_the_last_mirror_may_be_as_slow_as_it_likes(mirrors, monkeypatch):
    impatient = functools.partial(clr_utils._download.func, timeout=0.5, trial=0.1, slowest=1e12)
    monkeypatch.setattr(clr_utils, "_download", impatient)
    _, url = mirrors("slow/first", "slow")
    data = load()
    assert_is_the_real_thing(data)
    assert data.origin == url


def test_an_interrupted_download_leaves_nothing_behind(mirrors, cache, monkeypatch):
    def interrupt(*args, **kwargs):
        assert files_below(cache)  # a part of it is there by now
        raise KeyboardInterrupt

    mirrors("ok", "ok")
    monkeypatch.setattr(keras.utils.Progbar, "update", interrupt)
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
    for url, cause in zip(urls, ("503", "truncated", "checksum")):
        assert any(url in line and cause in line for line in message.splitlines())
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


def test_a_corrupt_file_in_the_cache_is_not_used_and_is_replaced(mirrors, cache):
    cache.mkdir(parents=True)
    (cache / "mnist.npz").write_bytes(npz(make_arrays(SHAPES, seed=1)))  # sound, but not the data
    (url,) = mirrors("ok")
    data = load()
    assert_is_the_real_thing(data)
    assert data.origin == url
    assert files_below(cache) == ["mnist.npz"] and (cache / "mnist.npz").read_bytes() == GOOD


def test_a_corrupt_file_in_the_cache_is_reported_and_left_where_nothing_better_comes(mirrors, cache, monkeypatch):
    monkeypatch.setenv("CLR_SYNTHETIC", "never")
    cache.mkdir(parents=True)
    (cache / "mnist.npz").write_bytes(GOOD[:-100])
    mirrors("503")
    with pytest.raises(RuntimeError, match=r"mnist\.npz in the Keras cache is truncated or corrupt"):
        load()
    assert (cache / "mnist.npz").read_bytes() == GOOD[:-100]


# -------------------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def small_cifar(server, monkeypatch):
    server.content = CIFAR_GOOD
    small = clr_utils._CIFAR10._replace(mirrors=(server.url("ok"),), sha256=sha256(CIFAR_GOOD), shapes=CIFAR_SHAPES)
    monkeypatch.setattr(clr_utils, "_CIFAR10", small)


def test_cifar10_images_come_upright_and_in_order(small_cifar, cache):
    data = clr_utils.load_cifar10(10, 3)
    assert_is_the_real_thing(data, CIFAR_ARRAYS, "cifar10")
    assert files_below(cache) == [CIFAR_ARCHIVES[0]]
    assert_is_the_real_thing(clr_utils.load_cifar10(10, 3), CIFAR_ARRAYS, "cifar10")  # now from the cache


@pytest.mark.parametrize("name", CIFAR_ARCHIVES)
def test_cifar10_is_found_under_every_name_that_keras_used(small_cifar, server, cache, name):
    cache.mkdir(parents=True)
    (cache / name).write_bytes(CIFAR_GOOD)
    data = clr_utils.load_cifar10(10, 3)
    assert_is_the_real_thing(data, CIFAR_ARRAYS, "cifar10")
    assert "cache" in data.origin and server.requests == []


def test_cifar10_reads_an_npz_in_the_data_folder(small_cifar, tmp_path, monkeypatch):
    (tmp_path / "cifar10.npz").write_bytes(npz(CIFAR_ARRAYS))
    monkeypatch.setenv("CLR_DATA_DIR", str(tmp_path))
    assert_is_the_real_thing(clr_utils.load_cifar10(10, 3), CIFAR_ARRAYS, "cifar10")


def test_keras_keeps_its_archives_under_the_names_looked_for():
    assert clr_utils._MNIST.archives[0] == "mnist.npz"
    assert CIFAR_ARCHIVES[0] == "cifar-10-batches-py-target_archive"  # Keras 3.8 and later; older ones have .tar.gz
    for files in (clr_utils._MNIST, clr_utils._CIFAR10):
        assert len(files.sha256) == 64 and int(files.sha256, 16)


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
    (data_dir / "mnist.npz").write_bytes(npz(mine))
    data = load()
    assert_is_the_real_thing(data, mine)
    assert "CLR_DATA_DIR" in data.origin
    assert server.requests == [] and files_below(cache) == []


def test_without_a_file_in_the_data_folder_the_next_source_is_used(data_dir, server):
    assert_is_the_real_thing(load())
    assert len(server.requests) == 1


def test_a_missing_file_in_the_data_folder_is_mentioned(data_dir, mirrors, monkeypatch):
    monkeypatch.setenv("CLR_SYNTHETIC", "never")
    mirrors("503")
    with pytest.raises(RuntimeError, match=r"CLR_DATA_DIR has no mnist\.npz"):
        load()


def test_a_data_folder_that_is_not_there_is_an_error(data_dir, monkeypatch):
    monkeypatch.setenv("CLR_DATA_DIR", str(data_dir / "no" / "such"))
    with pytest.raises(ValueError, match="CLR_DATA_DIR=.* folder.*unset") as error:
        load()
    assert repr(str(data_dir / "no" / "such")) in str(error.value)


def changed(**replacements):
    return npz({k: v for k, v in {**ARRAYS, **replacements}.items() if v is not None})


BROKEN = {
    "truncated": (lambda: GOOD[: len(GOOD) // 2], "truncated"),
    "cut by one byte": (lambda: GOOD[:-1], "truncated"),
    "empty": (lambda: b"", "truncated"),
    "text": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "truncated"),
    "bit flip": (lambda: GOOD[:5000] + bytes([GOOD[5000] ^ 1]) + GOOD[5001:], "cannot be read"),
    "missing key": (lambda: changed(y_test=None), "y_test"),
    "one image short": (lambda: changed(x_train=ARRAYS["x_train"][:-1]), r"x_train.*\(12, 28, 28\)"),
    "one label short": (lambda: changed(y_test=ARRAYS["y_test"][:-1]), r"y_test.*\(5,\)"),
    "flat images": (lambda: changed(x_test=ARRAYS["x_test"].reshape(5, 784)), r"x_test.*\(5, 28, 28\)"),
    "float images": (lambda: changed(x_train=ARRAYS["x_train"] / np.float32(255)), "x_train is float32.*whole numbers"),
    "float labels": (lambda: changed(y_train=ARRAYS["y_train"].astype(float)), "y_train is float64.*whole numbers"),
    "label 10": (lambda: changed(y_train=np.arange(12, dtype=np.uint8) % 11), "y_train.*0 to 9"),
    "label -1": (lambda: changed(y_train=np.full(12, -1)), "y_train.*0 to 9"),
    "image 256": (lambda: changed(x_train=np.full((12, 28, 28), 256)), "x_train.*0 to 255"),
    "pickled objects": (lambda: changed(y_train=np.array([1] * 12, dtype=object)), "cannot be read"),
}


@pytest.mark.parametrize("content, expected", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_in_the_data_folder_is_an_error_and_never_passed_over(data_dir, server, content, expected):
    (data_dir / "mnist.npz").write_bytes(content())
    with pytest.raises(ValueError, match=expected) as error:
        load()
    assert str(data_dir / "mnist.npz") in str(error.value)
    assert "expected" in str(error.value).lower()
    assert server.requests == []


def test_labels_of_another_integer_type_are_converted(data_dir):
    (data_dir / "mnist.npz").write_bytes(changed(y_train=ARRAYS["y_train"].astype(np.int64)))
    assert_is_the_real_thing(load())


def test_a_file_in_the_data_folder_is_never_unpickled(data_dir, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "pwned"),)

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        batch = pickle.dumps(Evil())
        info = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        info.size = len(batch)
        tar.addfile(info, io.BytesIO(batch))
    (data_dir / "mnist.npz").write_bytes(content.getvalue())
    with pytest.raises(ValueError, match="cannot be read"):
        load()
    assert not (tmp_path / "pwned").exists()


# ----------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [0, -1, 13, 2.5, "5", None])
@pytest.mark.parametrize("part", ["train_size", "test_size"])
def test_sizes_that_cannot_be_are_refused(mirrors, server, part, size):
    mirrors("ok")
    with pytest.raises(ValueError, match=f"{part}=") as error:
        load(**{part: size})
    assert f"{part}={size!r}" in str(error.value) and f"1 to {12 if part == 'train_size' else 5}" in str(error.value)
    assert server.requests == []


def test_sizes_up_to_the_whole_set_are_fine():
    for load_one, most in ((clr_utils.load_mnist, 60_000), (clr_utils.load_cifar10, 50_000)):
        with pytest.raises(ValueError, match=f"1 to {most:,}"):
            load_one(most + 1)
        with pytest.raises(ValueError, match="1 to 10,000"):
            load_one(test_size=10_001)


def test_the_first_n_are_given(mirrors):
    mirrors("ok")
    data = load(np.int64(7), 1)
    assert_is_the_real_thing(
        data,
        {"x_train": ARRAYS["x_train"][:7], "y_train": ARRAYS["y_train"][:7]}
        | {"x_test": ARRAYS["x_test"][:1], "y_test": ARRAYS["y_test"][:1]},
    )


# ------------------------------------------------------------------------------------------------- synthetic

DRAW = {"mnist": clr_utils.synthetic_mnist, "cifar10": clr_utils.synthetic_cifar10}
stand_ins = pytest.mark.parametrize("name", DRAW)


@pytest.fixture(scope="module")
def drawn():
    return {"mnist": clr_utils.synthetic_mnist(6000, 1000), "cifar10": clr_utils.synthetic_cifar10(3000, 1000)}


@stand_ins
def test_synthetic_data_have_the_form_of_the_real_ones(drawn, name):
    files = {"mnist": clr_utils._MNIST, "cifar10": clr_utils._CIFAR10}[name]
    for part, (images, labels) in zip(("train", "test"), drawn[name]):
        assert images.dtype == labels.dtype == np.uint8
        assert images.shape[1:] == files.shapes["x_" + part][1:]
        assert labels.shape == (len(images), *files.shapes["y_" + part][1:])
        counts = np.bincount(labels.ravel(), minlength=10)
        assert len(counts) == 10 and counts.min() > 0.07 * len(labels)
        assert images.max() > 200 and images.min() == 0
        assert len(np.unique(images.reshape(len(images), -1)[:200], axis=0)) == 200


@stand_ins
@pytest.mark.parametrize("train_size, test_size", [(1, 37), (1001, 1)])
def test_a_smaller_set_is_a_prefix_of_a_larger_one_whatever_the_seed(drawn, name, train_size, test_size):
    keras.utils.set_random_seed(train_size)
    small = DRAW[name](train_size, test_size)
    for (images, labels), (all_images, all_labels), size in zip(small, drawn[name], (train_size, test_size)):
        assert len(images) == len(labels) == size
        np.testing.assert_array_equal(images, all_images[:size])
        np.testing.assert_array_equal(labels, all_labels[:size])


@stand_ins
def test_no_test_image_is_a_training_image(drawn, name):
    (train, _), (test, _) = drawn[name]
    seen = {image.tobytes() for image in train}
    assert not any(image.tobytes() in seen for image in test)


def best_linear_accuracy(train, test):
    """The test accuracy of the best of several ridge regressions on one-hot labels, each in closed form."""
    x, x_test = (np.float32(images.reshape(len(images), -1)) / 255 for images, _ in (train, test))
    x, x_test = x - x.mean(axis=0), x_test - x.mean(axis=0)
    products, one, target = x @ x.T, np.eye(len(x), dtype="float32"), np.eye(10, dtype="float32")[train[1].ravel()]
    scores = []
    for strength in (3e-3, 3e-2):
        weights = x.T @ np.linalg.solve(products + strength * len(x) * one, target)
        scores.append(np.mean((x_test @ weights).argmax(axis=1) == test[1].ravel()))
    return max(scores)


@pytest.mark.parametrize("name, limit", [("mnist", 0.6), ("cifar10", 0.3)])
def test_a_linear_model_does_not_solve_it(drawn, name, limit):
    (images, labels), test = drawn[name]
    score = best_linear_accuracy((images[:3000], labels[:3000]), test)
    assert score < limit
    if name == "mnist":
        assert score > 0.3  # there is something to learn, and the labels belong to the images


def test_the_network_of_the_series_learns_what_a_linear_model_cannot(drawn):
    (x, y), (x_test, y_test) = drawn["mnist"]
    keras.utils.set_random_seed(0)
    model = clr_utils.mnist_network()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    model.fit(x / np.float32(255), y, batch_size=32, epochs=2, verbose=0)
    score = model.evaluate(x_test / np.float32(255), y_test, verbose=0)[1]
    assert score > 0.8
