"""What the pictures show, what callbacks record, and what is written."""

import os
import pathlib
import subprocess
import sys

import keras
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from PIL import Image

import clr_utils
import experiments
from clr_utils import (
    CLR,
    CyclicalLR,
    LossPerUpdate,
    RangeTest,
    label_ends,
    new_axes,
    plot_range_test,
    plot_schedule,
    plot_training,
    smooth,
)
from experiments import STYLES, mnist_network, plot_comparison, plot_differences, plot_runs, profile, save_figure

ROOT = pathlib.Path(clr_utils.__file__).parent


@pytest.fixture(autouse=True)
def leaves_matplotlib_as_it_was(capsys):
    """No picture prints anything, or changes a setting of matplotlib for what is drawn after it."""
    matplotlib.use("Agg")  # a notebook collected in the same run may have asked for another
    plt.close("all")
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    assert capsys.readouterr().out == ""
    plt.close("all")


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path / "out"))
    return tmp_path / "out" / "figures"


def new_clr():
    return CLR((0.1, 0.5), 4, (0.95, 0.8))


def ends(ax):
    """The labels at the ends of lines, and the boxes that they take when the figure is drawn."""
    ax.figure.canvas.draw()
    labels = [text for text in ax.texts if text.get_gid() == "end"]
    assert len({text.get_text() for text in labels}) == len(labels)  # none twice
    return {text.get_text(): Text.get_window_extent(text) for text in labels}


def colour(line):
    return matplotlib.colors.to_rgb(line.get_color())


TRIANGLE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1, 0.2]
MOMENTUM = [0.95, 0.9125, 0.875, 0.8375, 0.8, 0.8375, 0.875, 0.9125, 0.95, 0.9125]


@pytest.mark.parametrize(
    "schedule, quantity, expected",
    [
        (lambda: new_clr(), "learning rate", TRIANGLE),
        (lambda: new_clr(), "momentum", MOMENTUM),
        (lambda: CyclicalLR((0.1, 0.5), 4), "learning rate", TRIANGLE),
        (lambda: keras.optimizers.Adam(CyclicalLR((0.1, 0.5), 4)), "learning rate", TRIANGLE),
        (lambda: keras.optimizers.LossScaleOptimizer(new_clr()), "momentum", MOMENTUM),
        (lambda: TRIANGLE, "learning rate", TRIANGLE),
        (lambda: np.array(MOMENTUM), "momentum", MOMENTUM),
        (lambda: lambda i: i**2, "learning rate", np.arange(10) ** 2),
    ],
    ids=["CLR", "CLR momentum", "CyclicalLR", "Adam", "loss scaling", "list", "array", "function"],
)
def test_schedule_drawn_is_the_schedule(schedule, quantity, expected):
    ax = plot_schedule(schedule(), 10, quantity=quantity)
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(10))
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("update", quantity)
    assert ends(ax) == {}


@pytest.mark.parametrize("names", [("color", "linestyle"), ("c", "ls")])
def test_schedules_on_the_same_axes_differ_in_colour_and_dashes_and_are_labelled_at_their_ends(names):
    ax = None
    for n in range(7):
        ax = plot_schedule(np.full(10, n), 10, label=f"number {n}", ax=ax, title="Seven")
    assert len({colour(line) for line in ax.lines[:4]}) == 4 and len(ax.lines) == 7 and len(plt.get_fignums()) == 1
    # get_linestyle() calls every dash tuple "--"; what is drawn is this:
    assert len({str(line._unscaled_dash_pattern) for line in ax.lines}) == 7
    assert list(ends(ax)) == [f"number {n}" for n in range(7)]  # each once, though every call labels
    assert ax.figure.get_suptitle() == "Seven"
    (line,) = plot_schedule(TRIANGLE, 10, **dict(zip(names, ("red", ":")))).lines
    assert (line.get_color(), line.get_linestyle()) == ("red", ":")


@pytest.mark.parametrize(
    "schedule, updates, options, match",
    [
        (TRIANGLE, 11, {}, r"11 updates.*shape \(10,\)"),
        (lambda i: 0.5, 10, {}, r"10 updates.*shape \(\)"),
        (new_clr(), 10, {"quantity": "lr"}, "quantity='lr'.*'learning rate'"),
        (CyclicalLR((0.1, 0.5), 4), 10, {"quantity": "momentum"}, "quantity='momentum'.*can be 'learning rate'\\.$"),
        (keras.optimizers.schedules.CosineDecay(1, 9), 10, {"quantity": "momentum"}, "'momentum'"),
        *((new_clr(), updates, {}, f"updates={updates!r}") for updates in (0, -3, 2.5, "10", None)),
    ],
)
def test_what_cannot_be_drawn_as_a_schedule_is_refused(schedule, updates, options, match):
    with pytest.raises(ValueError, match=match):
        plot_schedule(schedule, updates, **options)
    assert plt.get_fignums() == []


def assert_apart(boxes, figure):
    boxes = list(boxes)
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    for box in boxes:
        assert (box.min >= figure.bbox.min).all() and (box.max <= figure.bbox.max).all()


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0])
def test_labels_at_the_ends_are_clear_of_each_other_in_order_and_in_the_picture(spread):
    (ax,) = new_axes(title="Eight lines")
    for n in range(8):
        ax.plot([0, 1, 2], [3, 9, n * spread], label=f"a rather long name {n}")
    boxes = ends(label_ends(ax))
    assert list(boxes) == [f"a rather long name {n}" for n in range(8)]
    assert_apart(boxes.values(), ax.figure)
    assert min(box.x0 for box in boxes.values()) > ax.bbox.x1  # beside the data
    assert (
        ax.bbox.y0 - 1 < min(box.y0 for box in boxes.values()) < max(box.y1 for box in boxes.values()) < ax.bbox.y1 + 1
    )
    heights = [box.y0 for box in boxes.values()]
    assert heights == sorted(heights)


def test_labels_follow_limits_and_curves_that_end_early():
    (ax,) = new_axes()
    ax.plot([0, 1, 2], [1, 2, 10], label="up")
    ax.plot([0, 1, 2], [1, 5, np.nan], label="ends early")
    ax.plot([0, 1], [np.nan] * 2, label="never there")
    for limits in ({}, {"ylim": (1, 100), "yscale": "log"}, {"ylim": (7, 20), "yscale": "linear"}):
        ax.set(**limits)
        boxes = ends(label_ends(ax))
        assert set(boxes) == {"up", "ends early"}
        for name, height in (("up", 10), ("ends early", max(5, ax.get_ylim()[0]))):  # at the edge if it ends outside
            middle = (boxes[name].y0 + boxes[name].y1) / 2
            assert middle == pytest.approx(ax.transData.transform((0, height))[1], abs=12)
        leaders = [text.xycoords.transform(text.xy)[1] for text in ax.texts]
        assert ax.bbox.y0 - 1 < min(leaders) < max(leaders) < ax.bbox.y1 + 1


def test_vertical_lines_are_labelled_on_top():
    (ax,) = new_axes(title="Limits")
    for n in range(4):
        ax.axvline(n / 100, label=f"limit\n{n}")
    ax.set_xlim(-1, 1)
    boxes = ends(label_ends(ax))
    assert_apart(boxes.values(), ax.figure)
    assert min(box.y0 for box in boxes.values()) > ax.bbox.y1


def test_a_title_is_wrapped_into_the_picture():
    (ax,) = new_axes(title="word " * 40)
    ax.figure.canvas.draw()
    box = ax.figure._suptitle.get_window_extent()
    assert box.x1 <= ax.figure.bbox.x1 and box.y0 > ax.bbox.y1


LOSS = np.array([4.0, 2.0, 1.0, 0.5])


def test_training_is_drawn_on_three_axes_above_each_other():
    axes = plot_training(LOSS, TRIANGLE[:4], MOMENTUM[:4], smoothing=0.5, title="A training")
    assert [ax.get_ylabel().split("\n(")[0] for ax in axes] == ["learning\nrate", "momentum", "training loss"]
    assert axes[2].get_xlabel() == "update" and axes[2].get_yscale() == "log"
    assert axes[0].get_shared_x_axes().joined(axes[0], axes[2]) and axes[0].figure.get_suptitle() == "A training"
    drawn = [line.get_ydata() for ax in axes for line in ax.lines]
    for values, expected in zip(drawn, (TRIANGLE[:4], MOMENTUM[:4], LOSS, smooth(LOSS, 0.5)), strict=True):
        np.testing.assert_array_equal(values, expected)


def test_training_without_momentum_can_be_drawn_into_axes_of_ones_own():
    figure, axes = plt.subplots(2)
    assert list(plot_training(LOSS, TRIANGLE[:4], axes=axes)) == list(axes)
    assert plt.get_fignums() == [figure.number]
    assert [len(ax.lines) for ax in axes] == [1, 2]


@pytest.mark.parametrize(
    "loss, rate, momentum",
    [(LOSS, TRIANGLE[:3], MOMENTUM[:4]), (LOSS, TRIANGLE[:4], MOMENTUM[:3]), ([], [], []), (1.0, 0.1, 0.9)],
)
def test_training_without_one_value_per_update_is_refused(loss, rate, momentum):
    with pytest.raises(ValueError, match="one value"):
        plot_training(loss, rate, momentum)
    assert plt.get_fignums() == []


def range_test(**fields):
    """What a sweep from 1e-4 to 1 would give that breaks at 0.4, without the sweep."""
    lr, loss = np.geomspace(1e-4, 1, 100), np.r_[np.full(40, 2.0), np.linspace(2, 0.5, 40), np.linspace(0.6, 90, 20)]
    seen = {"lr": lr, "loss": loss, "smoothed": loss, "validation_lr": None, "validation_loss": None}
    seen |= {"stopped": "The end.", "sweep": "exponential", "diverged_at": 0.9, "break_lr": 0.4}
    methods = {"__init__": lambda self: None, "suggest": lambda self: (0.04, 0.02, 0.005, "Why.")}
    methods["bounds"] = lambda self: (0.005, 0.05)
    return type("Result", (RangeTest,), seen | methods | fields)()


def test_a_range_test_is_drawn_with_what_it_suggests():
    result = range_test(validation_lr=[0.1], validation_loss=[1.0])
    ax = plot_range_test(result, title="A range test")
    np.testing.assert_array_equal(ax.lines[1].get_xydata(), np.stack([result.lr, result.smoothed], axis=1))
    assert ax.get_xscale() == "log" and ax.get_ylim()[1] < 3  # not 90: that would flatten the rest
    at = {line.get_label(): line.get_xdata()[0] for line in ax.lines if not line.get_label().startswith("_")}
    marks = {"min/10\n0.005": 0.005, "steepest\n0.02": 0.02, "valley\n0.04": 0.04, "break\n0.4": 0.4}
    marks |= {"validation": 0.1, "diverged\n0.9": 0.9, "bounds\n0.005 to 0.05": (0.005 * 0.05) ** 0.5}
    assert at == pytest.approx(marks)
    (band,) = ax.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((0.005, 0.05))
    assert_apart(ends(ax).values(), ax.figure)


def test_a_range_test_that_suggests_nothing_is_drawn_without():
    nothing = {"suggest": lambda self: (None, None, None, "Why."), "break_lr": None, "diverged_at": None}
    _, mine = plt.subplots()
    assert plot_range_test(range_test(sweep="linear", **nothing), mine) is mine
    assert mine.get_xscale() == "linear" and len(mine.lines) == 2 and not mine.texts and not mine.patches
    empty = dict.fromkeys(("lr", "loss", "smoothed"), np.array([]))
    (text,) = plot_range_test(range_test(**empty, **nothing)).texts
    assert text.get_text() == "The end."
    with pytest.raises(TypeError, match="lr_range_test"):
        plot_range_test(5)


def row_of(run, seed, accuracy, *, momentum=(0.9, 0.8), data="mnist", last=0.5, diverged_at=None):
    curve = {"update": [0, 10], "loss": [2.0 + seed, last], "learning_rate": [0.1, 0.2], "momentum": momentum}
    row = {"run": run, "seed": seed, "data": data, "test_accuracy": accuracy, "diverged_at": diverged_at}
    return row | {"code": "c0de", "data_checksum": "0", "curve": curve}


def results_of(*rows):
    return pd.DataFrame(rows)


ROWS = [row_of("a", 0, 0.10, momentum=None), row_of("1cycle", 0, 0.97), row_of("1cycle", 1, 0.99)]
RESULTS = results_of(*ROWS)


def test_runs_are_drawn_as_means_in_a_band():
    rate, momentum, loss = plot_runs(RESULTS, title="Two ways")
    assert [list(line.get_ydata()) for line in rate.lines] == [[0.1, 0.2], [0.1, 0.2]]
    assert [list(line.get_ydata()) for line in momentum.lines] == [[0.9, 0.8]]  # the other has none
    assert [list(line.get_ydata()) for line in loss.lines] == [[2.0, 0.5], [2.5, 0.5]]
    assert list(loss.lines[0].get_xdata()) == [0, 10]
    band = loss.collections[1].get_paths()[0].vertices  # of 1cycle
    assert (band[band[:, 0] == 0, 1].min(), band[band[:, 0] == 0, 1].max()) == (2.0, 3.0)
    assert colour(rate.lines[1]) == colour(momentum.lines[0]) == colour(loss.lines[1]) != colour(loss.lines[0])
    assert list(ends(loss)) == ["a", "1cycle"] and rate.figure.get_suptitle() == "Two ways"


def test_a_mean_ends_where_one_of_its_losses_is_not_finite():
    axes = plot_runs(results_of(row_of("a", 0, 0.1, last=None, momentum=None), row_of("a", 1, 0.1, momentum=(0, 0))))
    assert len(axes) == 2  # no momentum, no panel
    assert [line.get_xydata().tolist() for line in axes[-1].lines] == [[[0, 2.5]]]


def test_a_run_that_was_stopped_takes_no_points_from_the_others():
    rows = [row_of("a", seed, 0.1, momentum=None) for seed in (0, 1)]
    for row, updates, loss in zip(rows, ([0, 10, 20, 30], [0, 8, 16]), ([4.0, 3.0, 2.0, 1.0], [4.0, 2.0, None])):
        row["curve"] = row["curve"] | {"update": updates, "loss": loss, "learning_rate": [0.1] * len(updates)}
    (line,) = plot_runs(results_of(*rows))[-1].lines
    np.testing.assert_allclose(line.get_xydata(), [[0, 4], [8, (3.2 + 2) / 2]])


def test_comparison_draws_every_seed_the_mean_and_its_interval():
    live = results_of(row_of("1cycle", 7, 0.95), row_of("not there", 0, 0.5))
    ax = plot_comparison(RESULTS, live, title="Two ways")
    points = [row.get_offsets() for row in ax.collections]
    assert sorted(x for row in points for x in row[:, 0]) == pytest.approx([10, 97, 99])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1cycle", "a"]  # sorted by their means
    assert {round(y) for _, y in points[0]} != {round(y) for _, y in points[1]}
    lines = [line.get_xydata() for line in ax.lines if len(line.get_xydata())]
    half = 12.706204736 * 1.0  # t for one degree of freedom, times the standard error of 97 and 99
    (interval,) = [xy[~np.isnan(xy[:, 0]), 0] for xy in lines if np.nanmax(xy[:, 0], initial=0) > 105]
    np.testing.assert_allclose([interval.min(), interval.max()], [98 - half, 98 + half])
    assert any(np.allclose(xy[:, 0], 95) for xy in lines) and not any(np.allclose(xy[:, 0], 50) for xy in lines)


def legend_of(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_a_run_that_diverged_has_a_ring():
    ax = plot_comparison(results_of(*ROWS, row_of("a", 1, 0.2, diverged_at=3)))
    assert [list(line.get_xdata()) for line in ax.lines if line.get_markerfacecolor() == "none"] == [[20.0]]
    assert "diverged" in legend_of(ax) and "diverged" not in legend_of(plot_comparison(RESULTS))


def test_a_way_has_its_colour_in_every_picture_and_nothing_else_has_it():
    names = ["mine", "1cycle", "1cycle, 3 epochs", "Adam"]
    results = results_of(*(row_of(name, seed, 0.9 - n / 100) for n, name in enumerate(names) for seed in (0, 1)))
    styles = experiments.styles_of(names)
    assert styles["1cycle"] == experiments.styles_of(["1cycle"])["1cycle"]
    curves = [colour(line) for line in plot_runs(results)[-1].lines]
    assert curves == [matplotlib.colors.to_rgb(style["color"]) for style in styles.values()] and len(set(curves)) == 4
    ax = plot_comparison(results)
    points = [tuple(row.get_facecolor()[0][:3]) for row in ax.collections]
    assert points[1] == points[2] == pytest.approx(styles["1cycle"]["color"])  # rows are told apart by their names
    ways = [experiments.styles_of([name])[name]["color"] for name in STYLES]
    assert not {matplotlib.colors.to_rgb(style["color"]) for style in clr_utils.line_styles(8)} & set(ways)


def test_no_two_ways_look_the_same():
    looks = {style[:2] for style in STYLES.values()}
    assert len(looks) == len(set(STYLES.values())) == 15
    for names in ([f"row {n}" for n in range(8)], ["1cycle, a", "1cycle, b", "1cycle"]):
        styles = experiments.styles_of(names)
        assert len({str(style) for style in styles.values()}) == len(names) == len(styles)


@pytest.mark.parametrize("plot", [plot_runs, plot_comparison])
def test_results_that_do_not_belong_together_are_refused(plot):
    with pytest.raises(ValueError, match="hold no line"):
        plot(RESULTS[:0])
    for mixed in ([*ROWS, ROWS[0]], [*ROWS, row_of("b", 0, 0.1, data="synthetic")]):
        with pytest.raises(ValueError, match="two lines with seed|mnist and synthetic"):
            plot(results_of(*mixed))
    with pytest.raises(ValueError, match="9 ways to train: 1 to 8"):
        plot_runs(results_of(*(row_of(str(n), 0, 0.9) for n in range(9))))


DIFFERENCES = pd.DataFrame(
    [
        ("a", "b", 5, -1.0, -3.0, 1.0, 0.3, "not told apart"),
        ("a", "c", 10, 2.0, 1.0, 3.0, 0.01, "ahead"),
        ("b", "c", 2, 0.5, -9, 10, np.nan, "not judged"),
    ],
    columns=["first", "second", "n", "difference", "low", "high", "p_holm", "verdict"],
)


def test_differences_are_drawn_in_order_with_intervals_and_verdicts():
    ax = plot_differences(DIFFERENCES, title="Differences")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a\nminus c", "b\nminus c", "a\nminus b"]
    assert [text.get_text() for text in ax.texts] == ["n = 10", "n = 2", "n = 5"]
    bars = {bar.get_label(): bar for bar in ax.containers}  # one row each
    drawn = [(bar.lines[0].get_xdata()[0], *bar.lines[2][0].get_segments()[0].T[0]) for bar in bars.values()]
    assert drawn == [(2, 1, 3), (-1, -3, 1), (0.5, -9, 10)]
    points = {verdict: bar.lines[0] for verdict, bar in bars.items()}
    assert [point.get_ydata()[0] for point in points.values()] == [0, 2, 1]
    assert [verdict for verdict, point in points.items() if point.get_markerfacecolor() != "white"] == ["told apart"]
    assert colour(points["told apart"]) == colour(points["not told apart"]) != colour(points["not judged"])
    assert ax.lines[0].get_xdata() == [0, 0]
    assert legend_of(ax) == ["told apart", "not told apart", "not judged"]
    assert ax.get_xlabel().endswith("95% intervals, uncorrected")
    ax = plot_differences(DIFFERENCES.assign(n=5))
    assert not ax.texts and ax.get_xlabel().endswith("uncorrected, n = 5")


def marks(ax):
    return [text.get_text() for text in ax.figure.texts].count("SYNTHETIC DATA")


@pytest.mark.parametrize("data", ["mnist", "synthetic"])
def test_synthetic_data_are_written_across_the_figure(data, output):
    results = results_of(row_of("a", 0, 0.9, data=data))
    pictures = [plot_comparison(RESULTS, results.assign(run="1cycle")), plot_runs(results)[0], triangle()]
    pictures.append(plot_comparison(results, title="Once"))
    for n, ax in enumerate(pictures):
        if n > 1:
            save_figure(ax, "x", data, "text")
        assert marks(ax) == int(data == "synthetic")


@pytest.mark.parametrize(
    "values, smoothing, expected",
    [
        ([5, 1, 3], 0.0, [5, 1, 3]),
        ([2, 2, 2, 2], 0.97, [2, 2, 2, 2]),  # without the bias correction: 0.06, 0.12, ...
        # means 1, 1.5, 2.75 without correction; weights 1/2, 3/4, 7/8
        ([2, 2, 4], 0.5, [2, 2, 2.75 / 0.875]),
        ([1, 0, 0], 0.9, [1, 0.9 / 1.9, 0.81 / 2.71]),
        ([], 0.5, []),
    ],
)
def test_smooth_is_a_bias_corrected_exponential_mean(values, smoothing, expected):
    smoothed = smooth(np.array(values, float), smoothing)
    assert smoothed.shape == (len(values),)
    np.testing.assert_allclose(smoothed, expected, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [1, 1.5, -0.1, float("nan")])
def test_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=r"smoothing=.*\[0, 1\)") as error:
        smooth([1.0], smoothing)
    assert repr(smoothing) in str(error.value)


def triangle(**options):
    return plot_schedule(new_clr(), 10, title="A triangle", **options)


def test_a_figure_is_written_with_its_text_at_the_size_of_the_series_whatever_the_users_settings(output):
    alt = "A triangle: 0.1 to 0.5 – and back"  # the dash is not in Latin-1
    for hand_over in (lambda ax: ax, lambda ax: ax.figure):
        with matplotlib.rc_context({"figure.dpi": 50, "savefig.dpi": 300, "figure.figsize": (3, 3)}):
            save_figure(hand_over(triangle()), "01_triangle", alt=alt)
        assert os.listdir(output) == ["01_triangle.png"] and plt.get_fignums() == []
        with Image.open(output / "01_triangle.png") as picture:
            assert (picture.format, picture.size, picture.text["Description"]) == ("PNG", (960, 540), alt)
            assert "Software" not in picture.text  # it would change the file with every version of matplotlib
            assert picture.mode == "P"  # 256 colours: a third of the bytes
            shades = np.asarray(picture.convert("L"))
        assert shades.min() < 100 and shades.max() == 255  # something is drawn
        os.remove(output / "01_triangle.png")


def test_the_same_figure_gives_the_same_bytes_and_labels_that_fit_its_last_limits(output):
    contents = []
    for limits in ((0, 1), (0, 1), (0, 5)):
        ax = triangle(label="CLR")
        ax.set_ylim(limits)
        save_figure(ax, "same", alt="A triangle")
        contents.append((output / "same.png").read_bytes())
        (label,) = ax.texts
        assert label.xyann[1] == pytest.approx(0.2 / limits[1], abs=0.05)
    assert contents[0] == contents[1] != contents[2]


def test_a_failed_save_keeps_the_old_file_and_leaves_no_part(output, monkeypatch):
    save_figure(triangle(), "01_triangle", alt="A triangle")
    before = (output / "01_triangle.png").read_bytes()

    def fail(self, file, **options):
        file.write(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        save_figure(triangle(), "01_triangle", alt="Two triangles")
    assert os.listdir(output) == ["01_triangle.png"]
    assert (output / "01_triangle.png").read_bytes() == before


@pytest.mark.parametrize(
    "name, alt, match",
    [
        ("sub/x", "text", "name='sub/x'"),
        ("../x", "text", r"name='\.\./x'"),
        ("/tmp/x", "text", "name='/tmp/x'"),
        ("", "text", "name=''"),
        ("x", "", "no alt text"),
        ("x", None, "no alt text"),
    ],
)
def test_a_name_with_folders_or_a_missing_text_is_refused(output, name, alt, match):
    ax = triangle()
    with pytest.raises(ValueError, match=match):
        save_figure(ax, name, alt=alt)
    assert not output.exists()


def test_the_alt_text_of_a_notebooks_figure_is_in_its_file(output, tmp_path, monkeypatch):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/07_alt.json").write_text('{"07_triangle": "Up – down"}', encoding="utf-8")
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    save_figure(triangle(), "07_triangle")
    assert Image.open(output / "07_triangle.png").text["Description"] == "Up – down"
    with pytest.raises(ValueError, match="'07_other' has no alt text.*07_alt.json"):
        save_figure(triangle(), "07_other")


def test_a_figure_without_a_title_is_refused(output):
    ax = plot_schedule(new_clr(), 10)
    with pytest.raises(ValueError, match="'x' has no title"):
        save_figure(ax, "x", alt="text")
    ax.set_title("of the axes")
    save_figure(ax, "x", alt="text")


@pytest.mark.parametrize(
    "environment, folder",
    [
        ({"CLR_OUTPUT_DIR": "OUT", "CLR_PROFILE": "full"}, "OUT"),
        ({"CLR_OUTPUT_DIR": "OUT", "CLR_PROFILE": "smoke"}, "OUT"),
        ({"CLR_PROFILE": "quick"}, "MODULE"),
        ({"CLR_PROFILE": "full"}, "MODULE"),
        ({}, "MODULE"),
        ({"CLR_PROFILE": "smoke"}, "TEMP"),
    ],
)
def test_where_figures_go(tmp_path, monkeypatch, environment, folder):
    folders = {name: tmp_path / name for name in ("OUT", "MODULE", "TEMP")}
    for path in folders.values():
        path.mkdir()
    for name in ("CLR_OUTPUT_DIR", "CLR_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(folders.get(value, value)))
    monkeypatch.setattr(experiments, "ROOT", folders["MODULE"])
    monkeypatch.setattr("tempfile.tempdir", str(folders["TEMP"]))
    save_figure(triangle(), "x", alt="A triangle")
    (written,) = tmp_path.rglob("*.png")
    assert written.is_relative_to(folders[folder]) and written.parent.name == "figures"


def fit_one_dense(optimizer, **options):
    x = np.ones((12, 1), "float32")
    y = np.repeat([[1.0], [2.0], [4.0]], 4, axis=0).astype("float32")  # another target in every batch
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(optimizer, "mse", **options)
    keep = LossPerUpdate()
    history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[keep])
    return keep.losses, history, model


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}, {"metrics": ["mae"]}], ids=str)
def test_the_loss_of_each_update_is_that_of_its_batch_alone(options):
    losses, _, model = fit_one_dense(CLR((0.1, 0.1), 1), **options)
    w, expected = 0.0, []
    for target in (1.0, 2.0, 4.0) * 2:
        expected.append((w - target) ** 2)
        w -= 0.1 * 2 * (w - target)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert all(type(loss) is float for loss in losses)
    assert float(model.get_weights()[0][0, 0]) == pytest.approx(w, rel=1e-5)


def test_a_second_fit_starts_a_new_list():
    losses, _, model = fit_one_dense(CLR((0.1, 0.1), 1))
    keep = LossPerUpdate()
    for _ in range(2):
        model.fit(np.ones((8, 1)), np.ones((8, 1)), batch_size=4, verbose=0, callbacks=[keep])
        assert len(keep.losses) == 2


def test_several_updates_per_execution_are_refused():
    with pytest.raises(ValueError, match="steps_per_execution=1"):
        fit_one_dense(CLR((0.1, 0.1), 1), steps_per_execution=2)


def test_profile_is_read_from_the_environment_and_quick_unless_told_otherwise(monkeypatch):
    for value in ("smoke", "quick", "full"):
        monkeypatch.setenv("CLR_PROFILE", value)
        assert profile() == value
    for value in ("fast", "", "Full"):
        monkeypatch.setenv("CLR_PROFILE", value)
        with pytest.raises(ValueError, match=f"CLR_PROFILE={value!r}.*smoke, quick or full"):
            profile()
    monkeypatch.delenv("CLR_PROFILE")
    assert profile() == "quick"


def test_mnist_network_is_that_of_the_blog_post():
    model = mnist_network()
    assert model.count_params() == 40_558
    assert model.input_shape == (None, 28, 28) and model.output_shape == (None, 10)
    rows = model.predict(np.random.default_rng(0).random((3, 28, 28), "float32"), verbose=0)
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("given, threads", [("1,1", 1), ("", None)])
def test_describe_machine_reads_every_omp_num_threads(monkeypatch, given, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    line = experiments.describe_machine()
    some = f" {threads} of {cores} CPU cores ("
    assert (some if threads and threads < cores else f" {cores} CPU core{'s' * (cores > 1)} (") in line


def test_describe_machine_of_one_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert " 1 CPU core (" in experiments.describe_machine()


def test_describe_machine_is_one_line_with_the_versions():
    line = experiments.describe_machine()
    assert "\n" not in line
    for part in (f"Python {sys.version.split()[0]}", f"Keras {keras.__version__}", keras.backend.backend()):
        assert part in line


def in_a_new_process(code, folder):
    path = os.pathsep.join([str(ROOT), str(ROOT / "notebooks")])
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_module_needs_matplotlib_and_seaborn_only_to_draw(tmp_path):
    # Keras itself imports matplotlib where there is one, so whether it is loaded tells nothing: take it away.
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["seaborn"] = None
import clr_utils
print(clr_utils.CLR((0.1, 0.5), 4).learning_rate_at(2))
try:
    clr_utils.plot_schedule([1, 2], 2)
except ImportError as error:
    print(error.name)
"""
    done = in_a_new_process(code, tmp_path)
    assert done.returncode == 0, done.stderr
    rate, missing = done.stdout.split()
    assert float(rate) == pytest.approx(0.3) and missing == "seaborn"


def test_experiments_are_imported_in_silence(tmp_path):
    done = in_a_new_process("import experiments", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_point_mean_and_cross_is_in_the_row_of_its_name():
    ax = plot_comparison(RESULTS, results_of(row_of("a", 7, 0.2), row_of("1cycle", 7, 0.95)))
    names = {int(y): text.get_text() for y, text in zip(ax.get_yticks(), ax.get_yticklabels())}
    drawn = [*(row.get_offsets() for row in ax.collections), *(line.get_xydata() for line in ax.lines)]
    drawn = [(x, y) for part in drawn for x, y in np.asarray(part) if np.isfinite([x, y]).all()]
    assert len(drawn) > 7  # three points, two means, two crosses, an interval
    assert {(names[round(y)], x > 50) for x, y in drawn} == {("a", False), ("1cycle", True)}


def test_the_losses_of_runs_are_smoothed_as_asked():
    (line,) = plot_runs(results_of(row_of("a", 0, 0.9)), smoothing=0.5)[-1].lines
    np.testing.assert_allclose(line.get_ydata(), smooth([2.0, 0.5], 0.5))


def test_labels_on_top_stand_in_the_order_of_their_lines_which_they_lead_to_in_their_colours():
    (ax,) = new_axes()
    for place, colour in ((3.0, "red"), (1.0, "green"), (2.0, "blue")):
        ax.axvline(place, color=colour, label=f"at {place:g}")
    ax.plot([0, 4], [0, 1], color="black", label="curve")
    ax.set_xlim(0, 4)
    boxes = ends(label_ends(ax))
    assert boxes["at 1"].x1 < boxes["at 2"].x0 and boxes["at 2"].x1 < boxes["at 3"].x0
    led_to = {}
    for text in ax.texts:
        led_to[text.get_text()] = text.xycoords.transform(text.xy), text.arrow_patch.get_edgecolor()
    for line in ax.lines:
        point, colour = led_to[line.get_label()]
        np.testing.assert_allclose(point, line.get_transform().transform(line.get_xydata()[-1]), atol=1e-6)
        assert colour == matplotlib.colors.to_rgba(line.get_color())


@pytest.mark.parametrize("loss, scale", [([4.0, 1.0], "linear"), ([6.0, 1.0], "log"), ([6.0, -1.0], "linear")])
def test_a_loss_axis_is_logarithmic_from_a_factor_of_5_on(loss, scale):
    assert plot_training(loss, [0.1, 0.2])[-1].get_yscale() == scale


def test_each_update_is_drawn_in_grey_and_the_smoothed_loss_dark():
    result = range_test(loss=np.linspace(2, 1, 100), smoothed=np.linspace(3, 2, 100))
    ax = plot_training(LOSS, TRIANGLE[:4], smoothing=0.5)[-1]
    for (grey, dark), values, smoothed in (
        (ax.lines, LOSS, smooth(LOSS, 0.5)),
        (plot_range_test(result).lines[:2], result.loss, result.smoothed),
    ):
        np.testing.assert_array_equal(grey.get_ydata(), values)
        np.testing.assert_array_equal(dark.get_ydata(), smoothed)
        assert colour(grey) == (0.75, 0.75, 0.75) and colour(dark) == matplotlib.colors.to_rgb(clr_utils.INK)


def test_the_whole_descent_of_a_range_test_and_its_validation_losses_are_in_the_picture():
    result = range_test(validation_lr=[0.01, 0.1], validation_loss=[1.7, 0.8])
    ax = plot_range_test(result)
    low, high = ax.get_ylim()
    assert low < 0.5 and 2.0 < high < 3  # of what fell from 2 to 0.5
    (points,) = [line for line in ax.lines if line.get_label() == "validation"]
    np.testing.assert_array_equal(points.get_xydata(), [[0.01, 1.7], [0.1, 0.8]])


def test_the_bounds_of_a_linear_range_test_are_labelled_in_their_middle():
    ax = plot_range_test(range_test(sweep="linear", lr=np.linspace(0.01, 1, 100)))
    (middle,) = [line for line in ax.lines if line.get_label().startswith("bounds")]
    assert middle.get_xdata()[0] == pytest.approx((0.005 + 0.05) / 2)


def test_a_sweep_that_found_nothing_is_drawn_without_marks():
    lr, loss = np.geomspace(1e-4, 1, 50), np.linspace(1, 2, 50)
    seen = lr, loss, loss, None, None, None, "The end.", None, (1e-4, 1), 50, "exponential", 4.0, 0.9
    ax = plot_range_test(RangeTest(*seen))
    assert len(ax.lines) == 2 and not ax.texts and not ax.patches


def test_the_rate_is_drawn_to_the_end_though_the_first_run_was_stopped():
    stopped, whole = row_of("a", 0, 0.1, momentum=None), row_of("a", 1, 0.1, momentum=None)
    stopped["curve"] = {"update": [0], "loss": [2.0], "learning_rate": [0.1], "momentum": None}
    assert list(plot_runs(results_of(stopped, whole))[0].lines[0].get_ydata()) == [0.1, 0.2]


def test_the_legend_of_a_comparison_has_the_marks_that_are_drawn():
    ax = plot_comparison(RESULTS)
    handles, names = ax.get_legend_handles_labels()
    marks = {name: handle.get_marker() for name, handle in zip(names, handles)}
    assert marks == {"one seed": "o", "mean, 95% interval": "D"}
    means = [x for line in ax.lines if line.get_marker() == "D" for x in line.get_xdata() if np.isfinite(x)]
    assert sorted(means) == pytest.approx([10, 98])


def test_the_first_row_is_on_top():
    for ax in (plot_comparison(RESULTS), plot_differences(DIFFERENCES)):
        bottom, top = ax.get_ylim()
        assert top < 0 < bottom


def test_differences_in_the_order_given_have_their_own_numbers_of_pairs():
    ax = plot_differences(DIFFERENCES, order="given")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a\nminus b", "a\nminus c", "b\nminus c"]
    assert {text.get_position()[1]: text.get_text() for text in ax.texts} == {0: "n = 5", 1: "n = 10", 2: "n = 2"}


def test_an_alt_text_that_is_given_comes_before_that_of_the_file(output, tmp_path, monkeypatch):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures/07_alt.json").write_text('{"07_triangle": "of the file"}', encoding="utf-8")
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    save_figure(triangle(), "07_triangle", alt="given")
    assert Image.open(output / "07_triangle.png").text["Description"] == "given"


def test_panels_beside_each_other_share_their_heights():
    left, right = new_axes(columns=2)
    right.set_ylim(0, 7)
    assert left.get_ylim() == (0, 7)


def test_the_ring_of_a_diverged_run_is_around_its_point():
    ax = plot_comparison(results_of(*ROWS, row_of("a", 1, 0.2, diverged_at=3)))
    (ring,) = [line.get_xydata()[0] for line in ax.lines if line.get_markerfacecolor() == "none"]
    points = np.concatenate([row.get_offsets() for row in ax.collections])
    assert np.abs(points - ring).sum(axis=1).min() < 1e-9
