"""make and tools/run_notebooks.py: what a stranger types first."""

import contextlib
import functools
import itertools
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest
import timing

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import experiments  # noqa: I001
import keras
import make_colab
import run_notebooks
import pandas as pd
import train_rows


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr(run_notebooks, "BUILD", tmp_path / "build")
    return tmp_path / "build"


def write_notebook(path, *code):
    cells = [nbformat.v4.new_code_cell(source) for source in code]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_executes_into_build_and_leaves_the_notebook_alone(tmp_path, build):
    path = write_notebook(tmp_path / "a.ipynb", "print(6 * 7)")
    before = path.read_bytes()
    assert run_notebooks.run(path, "[1/1]", in_place=False)
    assert path.read_bytes() == before
    executed = nbformat.read(build / "a.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "42\n"
    assert "42" in (build / "a.html").read_text(encoding="utf-8")


def test_in_place_writes_back_only_when_every_cell_went_through(tmp_path, build):
    good = write_notebook(tmp_path / "good.ipynb", "print(6 * 7)")
    bad = write_notebook(tmp_path / "bad.ipynb", "print(6 * 7)", "1 / 0")
    before = bad.read_bytes()
    assert run_notebooks.run(good, "[1/2]", in_place=True)
    assert not run_notebooks.run(bad, "[2/2]", in_place=True)
    assert nbformat.read(good, as_version=4).cells[0].outputs[0].text == "42\n"
    assert bad.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.ipynb", "good.ipynb"]


def test_a_failing_cell_is_named_and_what_ran_is_kept(tmp_path, build, capsys):
    path = write_notebook(tmp_path / "bad.ipynb", "print(6 * 7)", "1 / 0")
    assert not run_notebooks.run(path, "[1/1]", in_place=False)
    shown = capsys.readouterr()
    assert "FAILED" in shown.out and "ZeroDivisionError" in shown.err
    assert nbformat.read(build / "bad.ipynb", as_version=4).cells[0].outputs[0].text == "42\n"


def test_in_place_trains_the_live_runs_anew(tmp_path, monkeypatch):
    live, recorded = tmp_path / "live.jsonl", tmp_path / "02.jsonl"
    live.touch()
    recorded.touch()
    monkeypatch.setattr(run_notebooks, "LIVE", live)
    monkeypatch.setattr(os, "environ", {**os.environ, "CLR_PROFILE": "quick"})
    monkeypatch.setattr(sys, "argv", ["", "--in-place", str(write_notebook(tmp_path / "a.ipynb", "1"))])
    run_notebooks.main()
    assert not live.exists() and recorded.exists()


def test_in_place_takes_no_outputs_of_the_smoke_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLR_PROFILE", "smoke")
    monkeypatch.setattr(sys, "argv", ["", "--in-place", str(write_notebook(tmp_path / "a.ipynb", "1"))])
    with pytest.raises(SystemExit):
        run_notebooks.main()
    assert "smoke" in capsys.readouterr().err


def test_folders_are_meant_as_seen_from_where_the_command_was_typed(tmp_path, build, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "notebooks").mkdir()
    code = "import os\nassert os.path.isdir(os.environ['CLR_DATA_DIR'])"
    path = write_notebook(tmp_path / "notebooks" / "a.ipynb", code)
    monkeypatch.setattr(os, "environ", {**os.environ, "CLR_DATA_DIR": "data"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", str(path)])
    run_notebooks.main()


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_colab_notebook_brings_along_what_it_reads(path, tmp_path, monkeypatch):
    # That it runs alone is tested with its exercises, in test_exercises.py.
    notebook = make_colab.self_contained(nbformat.read(path, as_version=4), path.stem)
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert ".ipynb)" not in text and ".ipynb#" not in text, "a link that leads nowhere in Colab"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    exec(notebook.cells[2].source.split("import experiments")[0], {})
    number = path.stem[:2]
    along = [*(ROOT / "figures" / "results").glob(f"{number}_*"), *(ROOT / "notebooks").glob(f"{number}_*.py")]
    along.append(ROOT / "figures" / f"{number}_alt.json")
    along = {file.relative_to(ROOT) for file in [ROOT / "clr_utils.py", ROOT / "notebooks" / "experiments.py", *along]}
    assert {file.relative_to(tmp_path) for file in tmp_path.rglob("*.*")} == along
    assert all((tmp_path / file).read_bytes() == (ROOT / file).read_bytes() for file in along)


@pytest.fixture(scope="module")
def rows():
    return train_rows.definitions(train_rows.NOTEBOOK)


def tiny(size):
    def network(batch_norm_momentum=0.95):
        layers = [keras.layers.GlobalAveragePooling2D(), keras.layers.BatchNormalization(momentum=batch_norm_momentum)]
        layers.append(keras.layers.Dense(10, "softmax", dtype="float32"))
        return keras.Sequential([keras.Input((32, 32, 3)), *layers])

    return size._replace(network=network, budgets=(2,), seeds=(0, 1), equal_seeds=(2, 3))


def pretend(run, seed, data):
    """A line as of a training: a higher rate gives a higher accuracy, up to 1."""
    sizes = len(data.train[0]), len(data.test[0])
    line = {**run.notes, "run": run.name, "seed": seed, "profile": experiments.profile(), "data": data.source}
    line |= {"data_checksum": data.checksum, "code": experiments.code_of(run, *sizes, data.part)}
    return line | {"train_size": sizes[0], "seconds": 1.0, "test_accuracy": -abs(run.notes.get("rate", 0) - 1)}


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """What `run_experiment` was asked for, in place of the training."""
    asked, recorded = [], {}

    def run_experiment(experiment, runs, seeds, data, every_epoch=False, settled=False, wait=True):
        (run,), (seed,) = runs, seeds
        if (experiment, run.name, seed) not in recorded:
            asked.append((experiment, run.name, seed))
            line = {"experiment": experiment, "every_epoch": {}, "settled_accuracy": 0, **pretend(run, seed, data)}
            recorded[experiment, run.name, seed] = line
            experiments._append_line(
                experiments._results_file(tmp_path, experiment), recorded[experiment, run.name, seed]
            )
        return pd.DataFrame([recorded[experiment, run.name, seed]])

    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path))
    monkeypatch.setattr(experiments, "run_experiment", run_experiment)
    return asked


def test_rows_are_trained_in_order_of_worth_and_once(rows, trained):
    size = tiny(rows["POST"])
    done = rows["plan"](size, train_rows.Trainer(rows["images"], math.inf).train)
    assert set(done) == {"post", "equal", 2, "long", "augmented", "BatchNorm"}
    assert all(map(len, done.values())) and len(trained) == len(set(trained))
    assert trained[0] == ("04_post_network", "CLR 0.1-3.5", 0)
    wanted = [("Adam, default", 0), ("CLR 0.1-3.5", 1), ("1cycle", 2), ("piecewise constant, 8 x as long", 0)]
    wanted += [("1cycle, 2 epochs", 0), ("1cycle, 16 epochs, augmented", 0), ("BatchNorm 0.999", 0)]
    order = [trained.index(("04_post_network", *run)) for run in wanted]
    others = trained.index(("04_post_tuning", "constant, 0.03", 1000))
    assert trained.index(("04_post_network", "triangle", 3)) < others < order[3]  # the four that are compared first
    assert order == sorted(order)
    best = done["equal"].set_index("run")["test_accuracy"]
    assert (best["constant"] == 0).all()  # at the rate 1, beyond 0.3
    count = len(trained)
    rows["plan"](size, train_rows.Trainer(rows["images"], math.inf).train)
    assert len(trained) == count


def test_the_small_network_has_a_second_search_and_a_control(rows, trained, monkeypatch):
    for name in ("SMALL", "ALL_IMAGES"):
        size = tiny(rows[name])._replace(budgets=(), seeds=(0,), equal_seeds=(2,))
        monkeypatch.setitem(rows, name, size)
        rows["plan"](size, train_rows.Trainer(rows["images"], math.inf).train)
    again = [run for experiment, run, seed in trained if experiment == "04_cifar_tuning" and seed == 1001]
    assert {run.split(",")[0] for run in again} == set(rows["WAYS"])
    control = [run[1:] for run in trained if " at " in run[1]]
    lengths = ("", ", 2 epochs", ", 1 epoch", ", 8 epochs")
    names = [way + length for way in ("step decay at 0.3", "linear decay at 0.1") for length in lengths]
    assert control == [("1cycle at 1", 2), *((name, 2) for name in [*names, "1cycle at 1"])]
    few = [run[1:] for run in trained if run[1].endswith(", 10,000 images")]
    ways = ("1cycle", "linear decay", "step decay", "triangle")
    assert few == [(f"{way}, 10,000 images", seed) for seed in range(5) for way in ways]


def test_no_run_is_started_that_would_not_end_in_time(rows, trained, monkeypatch, tmp_path):
    now = [0.0]
    monkeypatch.setattr(train_rows.time, "monotonic", lambda: now[0])
    trainer, run_experiment = train_rows.Trainer(rows["images"], 100.0), experiments.run_experiment

    def slow(*arguments, **options):
        now[0] += 40
        return run_experiment(*arguments, **options)

    monkeypatch.setattr(experiments, "run_experiment", slow)
    with pytest.raises(train_rows.OutOfTime, match="constant 0.35"):
        rows["plan"](tiny(rows["POST"]), trainer.train)
    assert len(trained) == 2 and now[0] == 80
    runs = rows["post_rows"](tiny(rows["POST"]))[:1]  # there with seed 0, which says nothing of seed 1
    with pytest.raises(train_rows.OutOfTime, match="CLR 0.1-3.5, seed 1"):
        trainer.train("04_post_network", runs, [0, 1], 50000)
    # Recorded beside clr_utils.py, but not in the folder for this session's results: it would be trained anew.
    monkeypatch.setattr(experiments, "ROOT", experiments._output_folder())
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path / "new"))
    late = train_rows.Trainer(rows["images"], 0.0)
    late.speeds = trainer.speeds
    with pytest.raises(train_rows.OutOfTime, match="CLR 0.1-3.5, seed 0"):
        late.train("04_post_network", runs, [0], 50000)


def test_what_another_process_is_training_is_looked_for_again(rows, trained, monkeypatch):
    run_experiment, asked = experiments.run_experiment, []

    def busy(experiment, runs, seeds, data, wait=True, **options):
        assert not wait
        asked.append(runs[0].name)
        if runs[0].name == "constant 3.5" and len(asked) < 6:
            return pd.DataFrame()
        return run_experiment(experiment, runs, seeds, data, **options)

    monkeypatch.setattr(experiments, "run_experiment", busy)
    trainer, found = train_rows.Trainer(rows["images"], math.inf), []
    first = rows["post_rows"](tiny(rows["POST"]))[:3]
    trainer.complete(lambda: found.append(trainer.train("04_post_network", first, (0,), 600)), pause=0)
    assert asked == ["CLR 0.1-3.5", "constant 3.5", "constant 0.35", *["constant 3.5"] * 3]
    assert [len(lines) for lines in found] == [2, 2, 2, 3]
    assert found[-1]["run"].tolist() == ["CLR 0.1-3.5", "constant 3.5", "constant 0.35"]


def test_what_was_left_out_comes_before_what_is_worth_less(rows, trained, monkeypatch):
    run_experiment, asked = experiments.run_experiment, []

    def busy(experiment, runs, seeds, data, **options):
        asked.append(runs[0].name)
        if asked == ["CLR 0.1-3.5"]:
            return pd.DataFrame()
        return run_experiment(experiment, runs, seeds, data, **options).assign(seconds=0.0)  # as trained here

    monkeypatch.setattr(experiments, "run_experiment", busy)
    monkeypatch.setattr(train_rows.Trainer, "report", lambda *line: None)
    trainer = train_rows.Trainer(rows["images"], math.inf)
    first = rows["post_rows"](tiny(rows["POST"]))[:3]
    trainer.complete(lambda: trainer.train("04_post_network", first, (0,), 600), pause=0)
    assert asked == ["CLR 0.1-3.5", "constant 3.5", "CLR 0.1-3.5", "constant 0.35"]


def test_a_search_whose_trials_another_process_trains_goes_on_later(rows, trained, monkeypatch):
    run_experiment, refused = experiments.run_experiment, []

    def busy(experiment, runs, seeds, data, **options):
        if runs[0].name.startswith("1cycle, ") and len(refused) < 6:  # in both of the plan's searches
            refused.append(runs[0].name)
            return pd.DataFrame()
        return run_experiment(experiment, runs, seeds, data, **options)

    monkeypatch.setattr(experiments, "run_experiment", busy)
    trainer, done = train_rows.Trainer(rows["images"], math.inf), []
    trainer.complete(lambda: done.append(rows["plan"](tiny(rows["POST"]), trainer.train)), pause=0)
    assert "equal" not in done[0] and len(done) == 2 and len(done[1]["equal"]) == 2 * len(rows["WAYS"])


def test_a_way_recorded_before_its_seconds_were_is_there(monkeypatch):
    old = pd.DataFrame([{"way": "triangle", "seed": 0, "sharpness": 20.0}])
    monkeypatch.setattr(experiments, "record", lambda *arguments, **options: old)
    trainer = train_rows.Trainer(lambda *which: None, math.inf)
    found = trainer.record("06_sharpness", {"triangle": None}, (0,), None, "test")
    assert found.equals(old) and not trainer.missing


@pytest.mark.parametrize("which, sizes", [("quick", ["SMALL", "ALL_IMAGES"]), ("full", ["POST"])])
def test_the_command_follows_the_plan_of_each_size(rows, monkeypatch, which, sizes):
    asked = []
    planned = {**rows, "plan": lambda size, get_lines: asked.append(size)}
    monkeypatch.setattr(train_rows, "definitions", lambda notebook: planned)
    monkeypatch.setattr(train_rows, "bfloat16_slowdown", lambda: 1)
    for name in ("CLR_PROFILE", "CLR_SYNTHETIC"):  # which the command sets
        monkeypatch.setenv(name, os.environ.get(name, "always"))
    train_rows.main([which])
    assert asked == [rows[size] for size in sizes]


@pytest.mark.parametrize("which, slowdown, warns", [("full", 16, True), ("full", 1.5, False), ("quick", 16, False)])
def test_a_processor_without_bfloat16_is_warned_of(rows, monkeypatch, capsys, which, slowdown, warns):
    monkeypatch.setattr(train_rows, "definitions", lambda notebook: {**rows, "plan": lambda size, get_lines: None})
    monkeypatch.setattr(train_rows, "bfloat16_slowdown", lambda: slowdown)
    for name in ("CLR_PROFILE", "CLR_SYNTHETIC"):  # which the command sets
        monkeypatch.setenv(name, os.environ.get(name, "always"))
    train_rows.main([which])
    assert ("16 times as long as float32" in capsys.readouterr().out) == warns


def test_what_bfloat16_costs_is_measured_in_both_precisions(monkeypatch):
    asked, seconds = [], itertools.accumulate([0, 9, 1, 2, 1, 1, 1, 3, 0, 9, 1, 8, 1, 7, 1, 6])

    def train(model, x, y):
        asked.append(model.layers[0].compute_dtype)

    monkeypatch.setattr(keras.Sequential, "train_on_batch", train)
    monkeypatch.setattr(train_rows.time, "monotonic", lambda: next(seconds))
    assert train_rows.bfloat16_slowdown() == 6 / 1  # the fastest of each
    assert asked == ["float32"] * 4 + ["bfloat16"] * 4


class Started:
    """In place of a process that `train_rows` starts."""

    def __init__(self, command, env):
        self.command, self.environment, self.terminated = command, env, False
        Started.all.append(self)

    def wait(self):
        return Started.statuses[Started.all.index(self)]

    def terminate(self):
        self.terminated = True


@pytest.fixture
def handlers(monkeypatch):
    """The signal handlers that are set; processes are not started but kept in Started.all."""
    handlers = {}
    monkeypatch.setattr(train_rows.subprocess, "Popen", Started)
    monkeypatch.setattr(train_rows.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(Started, "all", [], raising=False)
    return handlers


@pytest.mark.parametrize("status", [0, 1, -9], ids=["ended", "failed", "killed"])
def test_processes_share_the_cores_and_what_one_says_in_the_end_counts(handlers, monkeypatch, status):
    monkeypatch.setattr(Started, "statuses", [0, status], raising=False)
    monkeypatch.setattr(train_rows.os, "sched_getaffinity", lambda process: range(5), raising=False)
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "3")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    with pytest.raises(SystemExit) as exited:
        train_rows.main(["quick", "--minutes", "7", "--processes", "2"])
    assert exited.value.code == int(status != 0) and len(Started.all) == 2
    for process in Started.all:
        options = process.command[process.command.index(train_rows.__file__) + 1 :]
        assert options == ["quick", "--minutes", "7", "--processes", "2", "--processes", "1"]  # the last one counts
        environment = process.environment
        assert environment["OMP_NUM_THREADS"] == environment["TF_NUM_INTRAOP_THREADS"] == "2"
        assert environment["TF_NUM_INTEROP_THREADS"] == "3"  # as asked
        assert "mmap_threshold" in environment["GLIBC_TUNABLES"]


@pytest.mark.parametrize("when", ["wait", "__init__"], ids=["while they train", "while they are started"])
def test_what_stops_the_command_stops_all_its_processes(handlers, monkeypatch, when):
    act = getattr(Started, when)

    def stopped(process, *arguments, **options):
        if len(Started.all) == (1 if when == "__init__" else 2):  # before the second is there
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        return act(process, *arguments, **options)

    monkeypatch.setattr(Started, when, stopped)
    with pytest.raises(SystemExit) as exited:
        train_rows.main(["quick", "--processes", "2"])
    assert exited.value.code == 1 and all(process.terminated for process in Started.all)
    assert len(Started.all) == (1 if when == "__init__" else 2)


@pytest.mark.parametrize(
    "script, options, says",
    [
        ("notebooks/05_data_parallel.py", "--devices 2 --batch-size 3", "3: it must divide among 2 devices"),
        ("tests/bench_update.py", "--write", "give --all and no --network"),
        ("tests/bench_update.py", "--write --all --network 'MNIST network'", "give --all and no --network"),
    ],
)
def test_scripts_refuse_what_they_cannot_do(script, options, says):
    command = [sys.executable, ROOT / script, *shlex.split(options)]
    refused = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"KERAS_BACKEND": "tensorflow"})
    assert refused.returncode == 2 and says in refused.stderr


def test_benchmarks_take_turns_and_compare_within_a_round():
    calls, contestants = [], ("a", "b", "c")
    seconds = timing.alternating({name: functools.partial(calls.append, name) for name in contestants}, 3)
    assert "".join(calls) == "cab" + "abc" + "bca" + "cab"  # the first round is the rehearsal
    assert list(seconds) == list(contestants) and all(len(times) == 3 for times in seconds.values())
    assert timing.ratio([2.0, 9.0, 8.0], [1.0, 3.0, 8.0])[1] == 2  # not 8 / 3, of the medians
    with pytest.raises(ValueError, match="two or more"):
        timing.alternating({"a": calls.clear}, 1)
    assert calls  # nothing was measured


def test_operations_of_a_training_step():
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.Flatten()(keras.layers.Conv2D(5, 3)(inputs))
    model = keras.Model(inputs, keras.layers.Dense(10)(x))
    assert train_rows.operations_per_image(model) == 3 * 2 * (6 * 6 * 5 * 3 * 3 * 3 + 6 * 6 * 5 * 10)


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_a_python_without_tensorflow_wheels_gets_one_clear_line(tmp_path):
    old = tmp_path / "python2.7"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    made = subprocess.run(
        ["make", "--no-print-directory", "run", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode != 0
    assert len(made.stdout.splitlines()) == 1
    assert "3.10 to 3.13" in made.stdout and "PYTHON=" in made.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("which, profile", [("quick", "quick"), ("full", "full"), ("06", "quick")])
def test_the_command_sets_profile_real_data_and_the_end_in_minutes(rows, monkeypatch, which, profile):
    read, ends = [], []

    def definitions(notebook):
        read.append(notebook)
        return {**rows, "plan": lambda *arguments: None}

    def trainer(images, end, peak):
        ends.append(end)
        return SimpleNamespace(complete=lambda plan: plan(), train=None, record=None)

    monkeypatch.setattr(train_rows, "definitions", definitions)
    monkeypatch.setattr(train_rows, "Trainer", trainer)
    monkeypatch.setattr(train_rows, "bfloat16_slowdown", lambda: 1)
    monkeypatch.setattr(train_rows, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    environment = {name: value for name, value in os.environ.items() if name != "CLR_SYNTHETIC"}
    monkeypatch.setattr(train_rows, "os", SimpleNamespace(environ=environment))
    train_rows.main([which, "--minutes", "7"])
    assert (environment["CLR_PROFILE"], environment["CLR_SYNTHETIC"]) == (profile, "never")
    assert ends == [1000 + 7 * 60]
    assert read == [train_rows.NOTEBOOK_6 if which == "06" else train_rows.NOTEBOOK]


def test_of_a_batch_size_not_seen_yet_the_slowest_speed_is_expected(monkeypatch):
    monkeypatch.setattr(experiments, "is_recorded", lambda *arguments, **options: False)
    monkeypatch.setattr(experiments, "run_experiment", lambda *arguments, **options: pd.DataFrame())
    monkeypatch.setattr(train_rows, "time", SimpleNamespace(monotonic=lambda: 0.0))
    data = SimpleNamespace(train=(range(100), None))
    trainer = train_rows.Trainer(None, 50.0)
    trainer.speeds = {10: 1.0, 20: 4.0}
    for batch_size, fits in ((20, True), (10, False), (30, False)):  # 25, 100 and, as of the slowest, 100 seconds
        run = experiments.Run("row", None, None, batch_size=batch_size)
        with contextlib.nullcontext() if fits else pytest.raises(train_rows.OutOfTime, match="row, seed 3"):
            trainer.train_one("t", run, 3, data)


def test_no_way_is_started_that_takes_longer_than_there_is_time(monkeypatch):
    now, seconds = [0.0], {"long": 40.0, "short": 10.0}

    def record(experiment, ways, seeds, data, wait):
        (way,) = ways
        now[0] += seconds[way]
        return pd.DataFrame([{"way": way, "seconds": seconds[way]}])

    monkeypatch.setattr(experiments, "record", record)
    monkeypatch.setattr(train_rows, "time", SimpleNamespace(monotonic=lambda: now[0]))
    trainer = train_rows.Trainer(None, 85.0)
    for way in ("long", "short"):
        trainer.record_one("t", way, None, 0, None)
    with pytest.raises(train_rows.OutOfTime, match="short, seed 1"):
        trainer.record_one("t", "short", None, 1, None)  # 35 seconds are left, and one has taken 40
    assert now == [50.0] and trainer.trained


def test_a_report_says_images_per_second_and_the_share_of_the_peak(monkeypatch, capsys):
    monkeypatch.setattr(train_rows, "operations_per_image", lambda model: 5e9)
    line = {"seed": 3, "train_size": 1000, "seconds": 20.0, "test_accuracy": 0.5}
    run = SimpleNamespace(name="row", epochs=4, make_model=lambda: None)
    train_rows.Trainer(None, 0.0, peak=8.0).report("t", run, line)  # 200 images/s, 1e12 of 8e12 operations/s
    said = "t: row, seed 3: 50.00% in 20 s, 200 images/s, 1 TFLOP/s, 12.5% of the peak\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_committed_comes_from_real_data_and_nothing_else_goes_there(tmp_path, monkeypatch, in_place):
    seen = []

    def failing(path, label, in_place):
        seen.append((label, in_place, dict(os.environ)))
        return len(seen) > 1

    monkeypatch.setattr(run_notebooks, "run", failing)
    monkeypatch.setattr(run_notebooks, "LIVE", tmp_path / "live.jsonl")
    environment = {**os.environ, "CLR_PROFILE": "quick", "CLR_SYNTHETIC": "always"}
    del environment["CLR_OUTPUT_DIR"]
    if in_place:
        environment["CLR_OUTPUT_DIR"] = str(tmp_path)
    monkeypatch.setattr(os, "environ", environment)
    paths = [str(write_notebook(tmp_path / f"{name}.ipynb", "1")) for name in "ab"]
    monkeypatch.setattr(sys, "argv", ["", *["--in-place"] * in_place, *paths])
    with pytest.raises(SystemExit) as exited:
        run_notebooks.main()
    assert exited.value.code == "1 of 2 notebooks failed: a"
    assert [label for label, *_ in seen] == ["[1/2]", "[2/2]"] and {given for _, given, _ in seen} == {in_place}
    expected = ("never", str(ROOT)) if in_place else ("always", str(ROOT / "build"))
    assert {(of["CLR_SYNTHETIC"], of["CLR_OUTPUT_DIR"]) for *_, of in seen} == {expected}


def test_a_kernel_works_in_the_folder_of_its_notebook_and_may_die(tmp_path, build, monkeypatch, capsys):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    good = write_notebook(folder / "a.ipynb", "import os\nassert os.path.isfile('a.ipynb')")
    assert run_notebooks.run(good, "[1/2]", in_place=True)
    assert "version" not in nbformat.read(good, as_version=4).metadata["language_info"]
    dying = write_notebook(folder / "b.ipynb", "import os\nos._exit(1)")
    assert not run_notebooks.run(dying, "[2/2]", in_place=False)
    assert "FAILED" in capsys.readouterr().out


def test_the_same_files_are_packed_into_the_same_text_at_any_time(monkeypatch):
    texts = []
    for year in (2020, 2030):
        clock = SimpleNamespace(time=lambda: 0, localtime=lambda *_, year=year: (year, 1, 1, 0, 0, 0))
        monkeypatch.setattr("zipfile.time", clock)
        texts.append(make_colab.packed([ROOT / "README.md"]))
    assert texts[0] == texts[1]
