"""The formulas once more, without Keras: what every backend must agree with, in float64."""

import functools
import math

import numpy as np

LOW, HIGH, STEPS, MOMENTA = 0.02, 0.3, 7, (0.95, 0.8)
UPDATES, BATCH = 60, 8
CUT = 25  # resume here: in the middle of a cycle, and not between two epochs of anything

# A linear regression: its gradient fits in one line of numpy.
_rng = np.random.default_rng(0)
X = _rng.normal(size=(UPDATES * BATCH, 3)).astype("float32")
Y = (X @ _rng.normal(size=(3, 2)) + 0.1 * _rng.normal(size=(len(X), 2))).astype("float32")
START = _rng.normal(size=(3, 2)).astype("float32")
GRADIENTS = 0.1 * _rng.normal(size=(UPDATES, 4)).astype("float32")


def smith(i, steps=STEPS):
    cycle = math.floor(1 + i / (2 * steps))
    return max(0.0, 1 - abs(i / steps - 2 * cycle + 1))


def between_corners(i, values, *shares, last=2 * STEPS - 1):
    """Straight lines through these values at these shares of a run, and the last of them ever after."""
    return float(np.interp(i, [round(share * last) for share in shares], values))


SHAPES = {
    "triangular": lambda i, low, high: low + (high - low) * smith(i),
    "triangular2": lambda i, low, high: low + (high - low) * smith(i) / 2 ** (i // (2 * STEPS)),
    "exp_range": lambda i, low, high: low + (high - low) * smith(i) * 0.99994**i,
    "cosine": lambda i, low, high: low + (high - low) * (1 - math.cos(math.pi * smith(i))) / 2,
    "cosine_restarts": lambda i, low, high: low + (high - low) * (1 + math.cos(math.pi * (i / 14 - i // 14))) / 2,
    "one_cycle": lambda i, low, high: between_corners(i, [low, high, low, low / 1000], 0, 0.45, 0.9, 1),
    "trapezoid": lambda i, low, high: between_corners(i, [low, high, high, low / 1000], 0, 0.05, 0.8, 1),
}
RATES = {name: functools.partial(shape, low=LOW, high=HIGH) for name, shape in SHAPES.items()}


def momentum_at(i, name="triangular", momenta=MOMENTA):
    height = min(1.0, max(0.0, SHAPES[name](i, 0.0, 1.0)))
    return momenta[0] + (momenta[1] - momenta[0]) * height


def regression_gradient(w, batch):
    x, y = (a[batch * BATCH : (batch + 1) * BATCH].astype(float) for a in (X, Y))
    return 2 / y.size * x.T @ (x @ w - y)


def numpy_update(w, v, gradient, rate, momentum, nesterov=False):
    v = momentum * v - rate * gradient
    return (w + momentum * v - rate * gradient if nesterov else w + v), v


def numpy_training(rates, momenta, nesterov=False, updates=UPDATES):
    """The weights after each update of the linear regression."""
    w, v, path = START.astype(float), 0.0, []
    for i in range(updates):
        w, v = numpy_update(w, v, regression_gradient(w, i), rates(i), momenta(i), nesterov)
        path.append(w)
    return np.array(path)


def cyclic_training(**options):
    return numpy_training(RATES["triangular"], momentum_at, **options)
