"""Trains the recorded rows of notebooks 04 and 06 that are missing, the most telling first, for a limited time.

    python tools/train_rows.py full --processes 2 --minutes 600       # the post's network: forty hours on two cores
    KERAS_BACKEND=jax python tools/train_rows.py full --minutes 9     # the same without TensorFlow, on a GPU
    python tools/train_rows.py quick --processes 2                    # the small network
    python tools/train_rows.py 06 --processes 2                       # all of notebook 06

What is trained, and in which order, is defined in the notebook, in the cells tagged "rows" (`plan`). Each finished run
is one line in figures/results, in CLR_OUTPUT_DIR if that is set; a later call goes on where this one stopped, in the
middle of a run too. A run is started only if it is likely to end in time. Real data only; CLR_DATA_DIR names the folder
of cifar10.npz.
"""

import argparse
import itertools
import json
import linecache
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "04_cifar_super_convergence.ipynb"
NOTEBOOK_6 = ROOT / "notebooks" / "06_beyond_one_cycle.ipynb"


class OutOfTime(Exception):
    pass


class StartAgain(Exception):
    pass


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts = "of notebook 04 quick: the small network, full: the post's; 06: notebook 06"
    parser.add_argument("rows", choices=("quick", "full", "06"), help=texts)
    parser.add_argument("--minutes", type=float, default=math.inf, help="default: until everything is there")
    parser.add_argument("--processes", type=int, default=1, help="that share the rows, each with its part of the cores")
    parser.add_argument("--peak", type=float, metavar="TFLOPS", help="the chip's peak, to say which share is reached")
    options = parser.parse_args(arguments)
    if options.processes > 1:
        sys.exit(start_together(options.processes, arguments if arguments is not None else sys.argv[1:]))
    os.environ["CLR_PROFILE"] = "full" if options.rows == "full" else "quick"
    os.environ.setdefault("CLR_SYNTHETIC", "never")
    rows = definitions(NOTEBOOK_6 if options.rows == "06" else NOTEBOOK)
    trainer = Trainer(rows["images"], time.monotonic() + 60 * options.minutes, options.peak)
    if options.rows == "full" and (slowdown := bfloat16_slowdown()) > 2:
        print(
            f"Warning: bfloat16, in which these rows are trained, takes {slowdown:.0f} times as long as float32 here, so "
            "what would be hours are days. Use a processor with avx512_bf16 or amx_bf16, or a GPU.",
            flush=True,
        )
    try:
        if options.rows == "06":
            trainer.complete(lambda: rows["plan"](trainer.record))
        else:
            sizes = [rows["SMALL"], rows["ALL_IMAGES"]] if options.rows == "quick" else [rows["POST"]]
            trainer.complete(lambda: [rows["plan"](size, trainer.train) for size in sizes])
    except OutOfTime as stopped:
        print(f"{stopped}. Call it again to go on.")
    else:
        print("Everything is there.")


def start_together(processes, arguments):
    """Starts this command so many times, with one part of the cores each. Two trainings with one core each are faster
    than one with two, since the second core waits for the first now and then. Returns the exit status."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = str(max(1, cores // processes))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "TF_NUM_INTRAOP_THREADS": threads}
    # So two trainings of the post's network do 187 images/s each in place of 168 (two cores of a Xeon with AMX): no
    # operations side by side within one, and glibc keeps freed memory for the next tensor, in huge pages.
    malloc = {"hugetlb": 1, "mmap_threshold": 2**30, "trim_threshold": 2**32, "top_pad": 2**28}
    keep = ":".join(f"glibc.malloc.{name}={value}" for name, value in malloc.items())
    environment = {"TF_NUM_INTEROP_THREADS": "1", "GLIBC_TUNABLES": keep} | environment
    command = [sys.executable, __file__, *arguments, "--processes", "1"]
    started = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for _ in range(processes):
            started.append(subprocess.Popen(command, env=environment))
        ended = [process.wait() for process in started]
    except KeyboardInterrupt:
        ended = [process.wait() for process in started]  # they were interrupted too, and keep their checkpoints
    finally:
        for process in started:
            process.terminate()  # of no effect on one that has ended
    return int(any(ended))  # one that was killed has a negative status


def definitions(notebook):
    """What the cells of a notebook tagged "rows" define."""
    sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]
    import experiments  # noqa: F401  (first, because it imports Keras without TensorFlow's greeting)

    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    names = {"__name__": "rows"}
    for number, cell in enumerate(cells):
        if "rows" in cell["metadata"].get("tags", []):
            source, name = "".join(cell["source"]), f"<cell {number} of {notebook.name}>"
            linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name  # for inspect.getsource
            exec(compile(source, name, "exec"), names)
    return names


def bfloat16_slowdown():
    """How many times as long as in float32 two convolutions train in bfloat16: 10 and more on a CPU without it."""
    import keras
    import numpy as np

    seconds = {}
    for dtype in ("float32", "mixed_bfloat16"):
        convolutions = [keras.layers.Conv2D(32, 3, dtype=dtype) for _ in range(2)]
        mean = keras.layers.GlobalAveragePooling2D(dtype="float32")
        model = keras.Sequential([keras.Input((16, 16, 32)), *convolutions, mean])
        model.compile("sgd", "mse")
        times = []
        for _ in range(4):  # the first one compiles
            start = time.monotonic()
            model.train_on_batch(np.ones((32, 16, 16, 32)), np.ones((32, 32)))
            times.append(time.monotonic() - start)
        seconds[dtype] = min(times)
    return seconds["mixed_bfloat16"] / seconds["float32"]


class Trainer:
    """`run_experiment` and `record`, run by run, until the time is up.

    What another process is training is left out, so no process waits while there is something to do.
    """

    def __init__(self, images, end, peak=None):
        self.images, self.end, self.peak = images, end, peak
        self.speeds = {}  # {batch size: images per second of the last run, evaluation and compilation included}
        self.found = {}  # {(experiment, run or way, seed): its lines}
        self.longest = 0  # seconds of a way
        self.missing = self.trained = False  # something was left out, something was trained: since the plan began

    def complete(self, plan, pause=5):
        """Follows a plan, and again until nothing is missing: what was left out may be there, or allow for more."""
        self.missing = True
        while self.missing:
            self.missing = self.trained = False
            try:
                plan()
            except StartAgain:
                continue
            if self.missing:
                time.sleep(pause)

    def gather(self, experiment, names, find):
        """A DataFrame of all (name, seed) that `find` has or trains now."""
        import pandas as pd

        for name, seed in names:
            if (experiment, name, seed) not in self.found:
                lines = find(name, seed)
                if len(lines):
                    self.found[experiment, name, seed] = lines
                self.missing |= not len(lines)
                if self.missing and self.trained:  # what was left out is worth more than what comes now
                    raise StartAgain
        found = [self.found[key] for name, seed in names if (key := (experiment, name, seed)) in self.found]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["run", "test_accuracy"])

    def train(self, experiment, runs, seeds, train_size, part="test", **options):
        data, runs = self.images(train_size, part), {run.name: run for run in runs}
        names = [(name, seed) for seed, name in itertools.product(seeds, runs)]
        return self.gather(
            experiment, names, lambda n, seed: self.train_one(experiment, runs[n], seed, data, **options)
        )

    def record(self, experiment, ways, seeds, task, part):
        data, names = self.images(task, part), [(way, seed) for seed, way in itertools.product(seeds, ways)]
        return self.gather(experiment, names, lambda way, seed: self.record_one(experiment, way, ways[way], seed, data))

    def train_one(self, experiment, run, seed, data, **options):
        from experiments import is_recorded, run_experiment

        work, start = run.epochs * len(data.train[0]), time.monotonic()
        speed = self.speeds.get(run.batch_size, min(self.speeds.values(), default=math.inf))
        late = start + work / speed > self.end
        if late and not is_recorded(experiment, run, seed, data, **options):
            raise OutOfTime(f"No time for {experiment}: {run.name}, seed {seed}")
        found = run_experiment(experiment, [run], [seed], data, wait=False, **options)
        seconds = time.monotonic() - start
        if len(found) and found["seconds"][0] <= seconds:  # trained here, and in one go
            self.speeds[run.batch_size] = work / seconds
            self.trained = True
            self.report(experiment, run, found.iloc[0])
        return found

    def record_one(self, experiment, way, function, seed, data):
        from experiments import record

        start = time.monotonic()
        if start + self.longest > self.end:
            raise OutOfTime(f"No time for {experiment}: {way}, seed {seed}")
        found = record(experiment, {way: function}, [seed], data, wait=False)
        seconds = time.monotonic() - start
        if "seconds" in found and found["seconds"].iloc[0] <= seconds:  # trained here (older lines do not say)
            self.longest, self.trained = max(self.longest, seconds), True
            print(f"{experiment}: {way}, seed {seed}, {seconds:.0f} s", flush=True)
        return found

    def report(self, experiment, run, line):
        speed = run.epochs * line["train_size"] / line["seconds"]
        flops = speed * operations_per_image(run.make_model())
        share = f", {flops / self.peak / 1e10:.1f}% of the peak" if self.peak else ""
        print(
            f"{experiment}: {run.name}, seed {line['seed']}: {100 * line['test_accuracy']:.2f}% "
            f"in {line['seconds']:.0f} s, {speed:,.0f} images/s, {flops / 1e12:.3g} TFLOP/s{share}",
            flush=True,
        )


def operations_per_image(model):
    """Floating-point operations of a training step for one image: the products and sums of convolutions and dense
    layers, once forward and twice backward."""
    layers = [layer for layer in model._flatten_layers() if hasattr(layer, "kernel")]
    return 3 * sum(2 * math.prod(layer.kernel.shape) * math.prod(layer.output.shape[1:-1]) for layer in layers)


if __name__ == "__main__":
    main()
