"""How the benchmarks measure: in one process, the contestants one after the other, ratios within a round, medians."""

import statistics
import time


def alternating(contestants, rounds, rehearse=True):
    """Times functions that take no argument: {name: [seconds in each round]} of {name: function}.

    In each round all of them run, beginning with another one, so that a slow moment hits all of them.

    rehearse: a round that is not counted comes first, in which they compile.
    """
    if rounds < 2:
        raise ValueError(f"rounds={rounds}: give two or more, quartiles take that many.")
    seconds = {name: [] for name in contestants}
    for round_number in range(-1 if rehearse else 0, rounds):
        turn = round_number % len(contestants)
        for name in [*contestants][turn:] + [*contestants][:turn]:
            start = time.perf_counter()
            contestants[name]()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(times, yardstick):
    """Lower quartile, median and upper quartile, over the rounds, of the time as a multiple of the yardstick's."""
    return statistics.quantiles([a / b for a, b in zip(times, yardstick, strict=True)], n=4)
