"""One training split over devices and hosts. Notebook 05 runs it and says how to start it on several hosts.

    python 05_data_parallel.py --save weights.npz
    python 05_data_parallel.py --devices 2         # two devices made out of one processor, to try it

TensorFlow: all GPUs of one host (tf.distribute.MirroredStrategy). KERAS_BACKEND=jax: all GPUs of all hosts, with one
process for each host; the environment tells them of each other (keras.distribution.initialize).
"""

import argparse
import contextlib
import os
import pathlib
import sys
import time

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--devices", type=int, help="processors to pretend to have; default: the GPUs, or one processor")
parser.add_argument("--batch-size", type=int, default=256, help="of all devices together")
parser.add_argument("--updates", type=int, default=200)
parser.add_argument("--save", type=pathlib.Path, help="where the first process writes the weights (.npz)")
options = parser.parse_args()
if options.devices:  # JAX reads these when it starts
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"

for folder in pathlib.Path(__file__).resolve().parents:
    if (folder / "clr_utils.py").is_file():
        sys.path.insert(0, str(folder))
        break
import clr_utils  # noqa: E402  # isort: skip  # imports Keras without TensorFlow's greetings, so it comes first
import keras  # noqa: E402
import numpy as np  # noqa: E402

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
        pretended = [tf.config.LogicalDeviceConfiguration()] * options.devices
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], pretended)
        strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(options.devices)])
    else:
        strategy = tf.distribute.MirroredStrategy()
    processes, me, devices, on_all_devices = 1, 0, strategy.num_replicas_in_sync, strategy.scope()
else:
    parser.error(f"KERAS_BACKEND={keras.backend.backend()}: Keras trains on several devices with tensorflow or jax")
if options.batch_size % processes:
    parser.error(f"--batch-size {options.batch_size}: it must be a multiple of the {processes} processes")

# The same images in the same order, however many share the work: each process takes its rows of every batch.
(images, labels), share = clr_utils.load_mnist().train, options.batch_size // processes
order = np.random.default_rng(0).permutation(len(images))
order = np.resize(order, (options.updates, processes, share))[:, me].ravel()

keras.utils.set_random_seed(0)  # the same first weights everywhere
with on_all_devices:
    layers = [keras.layers.Flatten(), keras.layers.Dense(128, activation="tanh"), keras.layers.Dense(10, "softmax")]
    model = clr_utils.rescaled(keras.Sequential([keras.Input((28, 28)), *layers]))
    optimizer = clr_utils.CLR((0.01, 0.1), options.updates // 2, (0.95, 0.85), "one_cycle")
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])

start = time.perf_counter()
history = model.fit(images[order], labels[order], batch_size=share, shuffle=False, verbose=0).history
if me == 0:
    print(
        f"{keras.backend.backend()}, processes: {processes}, devices: {devices}; {options.updates} updates "
        f"of {options.batch_size} images in {time.perf_counter() - start:.1f} s, loss {history['loss'][-1]:.5f}"
    )
    if options.save:
        np.savez(options.save, *model.get_weights())
