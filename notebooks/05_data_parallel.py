"""One training split over devices and hosts. Notebook 05 runs it and tells how to on several hosts.

    python 05_data_parallel.py --save weights.npz
    python 05_data_parallel.py --devices 2     # two devices made out of one processor, to try it

TensorFlow: all GPUs of one host (tf.distribute.MirroredStrategy). KERAS_BACKEND=jax: all GPUs of
all hosts, with one process for each host; the environment tells them of each other
(keras.distribution.initialize).
"""

import argparse
import contextlib
import os
import pathlib
import sys
import time

as_written = argparse.RawDescriptionHelpFormatter
parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
parser.add_argument("--devices", type=int, help="to pretend to have; default: the GPUs, or one CPU")
parser.add_argument("--batch-size", type=int, default=256, help="of all devices together")
parser.add_argument("--updates", type=int, default=200)
parser.add_argument("--save", type=pathlib.Path, help="where the first process writes the weights")
options = parser.parse_args()
if options.devices:  # JAX reads these when it starts
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    # In a pool of two threads, as two cores get it, devices can wait for each other for ever.
    os.environ.setdefault("PJRT_NPROC", "16")

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # clr_utils.py, if it is not here
import experiments  # noqa: E402  # isort: skip  # Keras too, without TensorFlow's greetings
import keras  # noqa: E402
import numpy as np  # noqa: E402

from clr_utils import CLR  # noqa: E402

if keras.backend.backend() == "jax":
    if "KERAS_DISTRIBUTION_NUM_PROCESSES" in os.environ:
        keras.distribution.initialize()
    import jax

    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    processes, me, devices = jax.process_count(), jax.process_index(), jax.device_count()
    on_all_devices = contextlib.nullcontext()
elif keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    if options.devices:
        cpu = tf.config.list_physical_devices("CPU")[0]
        pretended = tf.config.LogicalDeviceConfiguration()
        tf.config.set_logical_device_configuration(cpu, [pretended] * options.devices)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(options.devices)])
    else:
        strategy = tf.distribute.MirroredStrategy()
    processes, me, devices, on_all_devices = 1, 0, strategy.num_replicas_in_sync, strategy.scope()
else:
    parser.error(f"KERAS_BACKEND={keras.backend.backend()}: it can be tensorflow or jax")
if options.batch_size % devices:
    parser.error(f"--batch-size {options.batch_size}: it must divide among {devices} devices")

# The same images in the same order, however many share the work: each process takes its rows.
mnist, share = experiments.load_mnist(), options.batch_size // processes
images, labels = mnist.train
order = np.random.default_rng(0).permutation(len(images))
order = np.resize(order, (options.updates, processes, share))[:, me].ravel()

keras.utils.set_random_seed(0)  # the same first weights everywhere
with on_all_devices:
    model = keras.Sequential(
        [
            keras.Input((28, 28)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(128, activation="tanh"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
    optimizer = CLR((0.01, 0.1), options.updates // 2, (0.95, 0.85), "one_cycle")
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])

start = time.perf_counter()
history = model.fit(images[order], labels[order], batch_size=share, shuffle=False, verbose=0)
if me == 0:
    seconds, loss = time.perf_counter() - start, history.history["loss"][-1]
    print(
        f"{keras.backend.backend()}, processes: {processes}, devices: {devices}; {options.updates} "
        f"updates of {options.batch_size} {mnist.source} images in {seconds:.1f} s, loss {loss:.5f}"
    )
    if options.save:
        np.savez(options.save, *model.get_weights())
