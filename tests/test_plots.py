"""What the plotting and training helpers draw, print, record and write."""

import os
import pathlib
import subprocess
import sys

import keras
import matplotlib
import numpy as np
import pytest
from PIL import Image

import clr_utils
from clr_utils import CLR, CyclicalLR, LossPerUpdate, plot_schedule, plot_training, profile, save_figure, smooth

plt = pytest.importorskip("matplotlib.pyplot")

ROOT = pathlib.Path(clr_utils.__file__).parent


@pytest.fixture(autouse=True)
def figures_closed(monkeypatch):
    matplotlib.use("Agg")  # a notebook collected in the same run may have asked for another
    plt.close("all")
    yield
    plt.close("all")


@pytest.fixture
def output(tmp_path, monkeypatch):
    monkeypatch.setenv("CLR_OUTPUT_DIR", str(tmp_path / "out"))
    return tmp_path / "out" / "figures"


def new_clr():
    return CLR((0.1, 0.5), 4, (0.95, 0.8))


# -------------------------------------------------------------------------------------------- plot_schedule

TRIANGLE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.4, 0.3, 0.2, 0.1, 0.2]
MOMENTUM = [0.95, 0.9125, 0.875, 0.8375, 0.8, 0.8375, 0.875, 0.9125, 0.95, 0.9125]


@pytest.mark.parametrize(
    "schedule, quantity, expected",
    [
        (lambda: new_clr(), "learning rate", TRIANGLE),
        (lambda: new_clr(), "momentum", MOMENTUM),
        (lambda: CyclicalLR((0.1, 0.5), 4), "learning rate", TRIANGLE),
        (lambda: TRIANGLE, "learning rate", TRIANGLE),
        (lambda: np.array(MOMENTUM), "momentum", MOMENTUM),
        (lambda: lambda i: i**2, "learning rate", np.arange(10) ** 2),
    ],
    ids=["CLR", "CLR momentum", "CyclicalLR", "list", "array", "function"],
)
def test_schedule_drawn_is_the_schedule(schedule, quantity, expected):
    ax = plot_schedule(schedule(), 10, quantity=quantity)
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(10))
    np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-12)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("update", quantity)
    assert ax.get_legend() is None


def test_schedule_summary_is_one_line_with_start_extremes_and_end(capsys):
    plot_schedule(new_clr(), 10, label="mine")
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and err == ""
    assert out.startswith("mine: learning rate 0.1 at update 0")
    assert "highest 0.5 at 4" in out and "lowest 0.1 at 0" in out and "last 0.2 at 9" in out


def test_schedules_on_the_same_axes_differ_in_colour_and_dashes():
    ax = None
    for n in range(len(clr_utils.COLOURS)):
        again = plot_schedule(TRIANGLE, 10, label=f"number {n}", ax=ax)
        assert ax is None or again is ax
        ax = again
    assert len({line.get_color() for line in ax.lines}) == len(ax.lines) == 7
    # get_linestyle() calls every dash tuple "--"; what is drawn is this:
    assert len({str(line._unscaled_dash_pattern) for line in ax.lines}) == 7
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [f"number {n}" for n in range(7)]
    plot_schedule(TRIANGLE, 10, ax=ax)  # an eighth starts over


def test_learning_rate_and_momentum_have_the_colours_of_plot_training():
    rate = plot_schedule(new_clr(), 10).lines[0].get_color()
    momentum = plot_schedule(new_clr(), 10, quantity="momentum").lines[0].get_color()
    axes = plot_training([1.0, 2.0], [0.1, 0.2], [0.9, 0.8], source="mnist")
    assert [ax.lines[0].get_color() for ax in axes[:2]] == [rate, momentum]
    assert rate != momentum


@pytest.mark.parametrize(
    "arguments, match",
    [
        ((TRIANGLE, 11), r"shape \(10,\).*11 updates"),
        ((lambda i: 0.5, 10), r"shape \(\).*10 updates"),
    ],
)
def test_a_schedule_without_one_value_per_update_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        plot_schedule(*arguments)


def test_an_unknown_quantity_is_refused():
    with pytest.raises(ValueError, match="quantity='lr'.*'learning rate'"):
        plot_schedule(new_clr(), 10, quantity="lr")


@pytest.mark.parametrize("updates", [0, -3, 2.5, "10", None])
def test_updates_that_are_no_number_of_updates_are_refused(updates):
    with pytest.raises((ValueError, TypeError), match="updates") as error:
        plot_schedule(new_clr(), updates)
    assert repr(updates) in str(error.value)


def test_a_learning_rate_is_not_drawn_as_a_momentum():
    with pytest.raises((ValueError, TypeError), match="momentum"):
        plot_schedule(CyclicalLR((0.1, 0.5), 4), 10, quantity="momentum")


# -------------------------------------------------------------------------------------------- plot_training

LOSS = np.array([4.0, 2.0, 1.0, 0.5])


def texts(figure):
    return [text.get_text() for text in figure.texts]


def test_training_is_drawn_on_three_axes_above_each_other():
    axes = plot_training(LOSS, TRIANGLE[:4], MOMENTUM[:4], source="mnist", smoothing=0.5)
    assert [ax.get_ylabel().split("\n")[0] for ax in axes] == ["learning rate", "momentum", "training loss"]
    assert axes[2].get_xlabel() == "update" and axes[2].get_yscale() == "log"
    assert axes[0].get_shared_x_axes().joined(axes[0], axes[2])
    drawn = [line.get_ydata() for ax in axes for line in ax.lines]
    for values, expected in zip(drawn, (TRIANGLE[:4], MOMENTUM[:4], LOSS, smooth(LOSS, 0.5)), strict=True):
        np.testing.assert_array_equal(values, expected)
    labels = [text.get_text() for text in axes[2].get_legend().get_texts()]
    assert labels == ["each update", "smoothed"]


@pytest.mark.parametrize("source, marked", [("mnist", False), ("cifar10", False), ("synthetic", True)])
def test_synthetic_data_are_written_across_the_figure(source, marked):
    axes = plot_training(LOSS, TRIANGLE[:4], MOMENTUM[:4], source=source)
    assert ("SYNTHETIC DATA" in texts(axes[0].figure)) == marked


def test_training_summary_is_one_line(capsys):
    plot_training(LOSS, TRIANGLE[:4], MOMENTUM[:4], source="synthetic", smoothing=0.0)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    for part in ("4 updates on synthetic data", "0.1 to 0.4", "0.838 to 0.95", "4 at the start", "0.5 at the end"):
        assert part in out


def test_training_can_be_drawn_into_axes_of_ones_own():
    figure, axes = plt.subplots(3)
    assert plot_training(LOSS, TRIANGLE[:4], MOMENTUM[:4], source="mnist", axes=axes) is axes
    assert plt.get_fignums() == [figure.number]
    assert [len(ax.lines) for ax in axes] == [1, 1, 2]


@pytest.mark.parametrize(
    "loss, rate, momentum",
    [(LOSS, TRIANGLE[:3], MOMENTUM[:4]), (LOSS, TRIANGLE[:4], MOMENTUM[:3]), ([], [], []), (1.0, 0.1, 0.9)],
)
def test_training_without_one_value_per_update_is_refused(loss, rate, momentum):
    with pytest.raises(ValueError, match="one value"):
        plot_training(loss, rate, momentum, source="mnist")
    assert plt.get_fignums() == []


# -------------------------------------------------------------------------------------------- plots of experiments


def line_of(run, seed, accuracy, *, momentum=(0.9, 0.8), data="mnist", last=0.5):
    curve = {"update": [0, 10], "loss": [2.0 + seed, last], "learning_rate": [0.1, 0.2]}
    curve["momentum"] = None if momentum is None else list(momentum)
    kept = {"test_accuracy": accuracy, "diverged_at": None, "seconds": 1.0, "epochs": 1, "code": run}
    return {"run": run, "seed": seed, "data": data, "curve": curve, **kept}


LINES = [line_of("a", 0, 0.97), line_of("a", 1, 0.99), line_of("b", 0, 0.10, momentum=None)]


def test_runs_are_drawn_every_seed_behind_the_mean(capsys):
    rate, momentum, loss = clr_utils.plot_runs(LINES)
    assert [list(line.get_ydata()) for line in rate.lines] == [[0.1, 0.2], [0.1, 0.2]]
    assert [list(line.get_ydata()) for line in momentum.lines] == [[0.9, 0.8]]  # Adam has none
    seeds_a, mean_a = loss.lines[:2], loss.lines[2]
    assert [list(line.get_ydata()) for line in seeds_a] == [[2.0, 0.5], [3.0, 0.5]]
    assert list(mean_a.get_ydata()) == [2.5, 0.5] and list(mean_a.get_xdata()) == [0, 10]
    assert mean_a.get_linewidth() > seeds_a[0].get_linewidth() and mean_a.get_label() == "a"
    assert rate.lines[0].get_color() == mean_a.get_color() != loss.lines[-1].get_color()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "3 runs on mnist data" in out and "a 0.5" in out


def test_runs_with_a_loss_that_is_not_finite_are_drawn_as_far_as_it_is(capsys):
    axes = clr_utils.plot_runs([line_of("a", 0, 0.1, last=None)])
    assert np.isnan(axes[2].lines[0].get_ydata()[1]) and "nan" in capsys.readouterr().out


def test_comparison_draws_every_seed_the_mean_and_its_interval(capsys):
    live = [line_of("a", 7, 0.95)]
    ax = clr_utils.plot_comparison(LINES, live, xlim=(90, 100))
    points = [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert points == [[97.0, 99.0], [10.0]]
    assert [list(line.get_xdata()) for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())] == [
        [95.0]
    ]
    summary = clr_utils.summarise(LINES)[0]
    (segment,) = ax.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [summary.low, summary.high])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    assert any("1 of 1 outside" in text.get_text() for text in ax.texts)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "highest mean: a, 98.00%" in out


def test_a_run_that_diverged_has_a_ring():
    ax = clr_utils.plot_comparison([*LINES, {**line_of("b", 1, 0.2), "diverged_at": 3}])
    rings = [list(line.get_xdata()) for line in ax.lines if line.get_fillstyle() == "none" and len(line.get_xdata())]
    assert rings == [[20.0]]
    assert "diverged" in [text.get_text() for text in ax.get_legend().get_texts()]
    assert "diverged" not in [t.get_text() for t in clr_utils.plot_comparison(LINES).get_legend().get_texts()]


@pytest.mark.parametrize("live", [[], [line_of("a", 7, 0.9, data="synthetic")]], ids=["mnist", "synthetic"])
def test_synthetic_runs_mark_the_comparison(live):
    ax = clr_utils.plot_comparison(LINES, live)
    assert any("SYNTHETIC" in text.get_text() for text in ax.figure.texts) == bool(live)


def test_synthetic_runs_mark_the_curves():
    axes = clr_utils.plot_runs([line_of("a", 0, 0.9, data="synthetic")])
    assert any("SYNTHETIC" in text.get_text() for text in axes[0].figure.texts)


def test_too_many_rows_or_none_are_refused():
    with pytest.raises(ValueError, match="0 rows"):
        clr_utils.plot_comparison([])
    with pytest.raises(ValueError, match="8 rows: 1 to 7"):
        clr_utils.plot_runs([line_of(str(n), 0, 0.9) for n in range(8)])


# --------------------------------------------------------------------------------------------------- smooth


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


# ---------------------------------------------------------------------------------------------- save_figure


@pytest.mark.parametrize("hand_over", [lambda ax: ax, lambda ax: ax.figure], ids=["axes", "figure"])
def test_a_figure_is_written_with_its_text_at_the_size_of_the_series(output, hand_over):
    alt = "A triangle: 0.1 to 0.5 – and back"  # the dash is not in Latin-1
    save_figure(hand_over(plot_schedule(new_clr(), 10)), "01_triangle", alt)
    assert os.listdir(output) == ["01_triangle.png"]
    with Image.open(output / "01_triangle.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == 960 and picture.height == 384
        assert picture.text["Description"] == alt
        assert "Software" not in picture.text  # it would change the file with every version of matplotlib
        shades = np.asarray(picture.convert("L"))
    assert shades.min() < 100 and shades.max() == 255  # something is drawn
    assert plt.get_fignums() == []


def test_the_size_is_that_of_the_series_whatever_the_users_settings(output):
    with matplotlib.rc_context({"figure.dpi": 50, "savefig.dpi": 300, "figure.figsize": (3, 3)}):
        save_figure(plot_training(LOSS, LOSS, LOSS, source="mnist")[0], "training", "Three curves")
    with Image.open(output / "training.png") as picture:
        assert picture.size == (960, 720)


def test_the_same_figure_gives_the_same_bytes(output):
    contents = []
    for _ in range(2):
        save_figure(plot_schedule(new_clr(), 10, label="CLR"), "same", "A triangle")
        contents.append((output / "same.png").read_bytes())
    assert contents[0] == contents[1]


def test_a_failed_save_keeps_the_old_file_and_leaves_no_part(output, monkeypatch):
    save_figure(plot_schedule(new_clr(), 10), "01_triangle", "A triangle")
    before = (output / "01_triangle.png").read_bytes()

    def fail(self, path, **options):
        pathlib.Path(path).write_bytes(b"half a picture")
        raise KeyboardInterrupt

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        save_figure(plot_schedule(new_clr(), 20), "01_triangle", "Two triangles")
    assert os.listdir(output) == ["01_triangle.png"]
    assert (output / "01_triangle.png").read_bytes() == before


@pytest.mark.parametrize(
    "name, alt, match",
    [
        ("sub/x", "text", "name='sub/x'"),
        ("../x", "text", r"name='\.\./x'"),
        ("/tmp/x", "text", "name='/tmp/x'"),
        ("", "text", "name=''"),
        ("x", "", "alt=''"),
        ("x", None, "alt=None"),
    ],
)
def test_a_name_with_folders_or_a_missing_text_is_refused(output, name, alt, match):
    ax = plot_schedule(new_clr(), 10)
    with pytest.raises(ValueError, match=match):
        save_figure(ax, name, alt)
    assert not output.exists() or os.listdir(output) == []


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
    monkeypatch.setattr(clr_utils, "__file__", str(folders["MODULE"] / "clr_utils.py"))
    monkeypatch.setattr("tempfile.tempdir", str(folders["TEMP"]))
    save_figure(plot_schedule(new_clr(), 10), "x", "A triangle")
    (written,) = tmp_path.rglob("*.png")
    assert written.is_relative_to(folders[folder]) and written.parent.name == "figures"


# -------------------------------------------------------------------------------------------- LossPerUpdate


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


# ------------------------------------------------------------------------------------------ the small helpers


@pytest.mark.parametrize("value", ["smoke", "quick", "full"])
def test_profile_is_read_from_the_environment(monkeypatch, value):
    monkeypatch.setenv("CLR_PROFILE", value)
    assert profile() == value


def test_profile_is_quick_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("CLR_PROFILE")
    assert profile() == "quick"


@pytest.mark.parametrize("value", ["fast", "", "Full"])
def test_an_unknown_profile_is_refused(monkeypatch, value):
    monkeypatch.setenv("CLR_PROFILE", value)
    with pytest.raises(ValueError, match="smoke, quick or full") as error:
        profile()
    assert f"CLR_PROFILE={value!r}" in str(error.value)


def test_mnist_network_is_that_of_the_blog_post():
    model = clr_utils.mnist_network()
    assert model.count_params() == 40_558
    assert model.input_shape == (None, 28, 28) and model.output_shape == (None, 10)
    rows = model.predict(np.random.default_rng(0).random((3, 28, 28), "float32"), verbose=0)
    np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-5)


def test_describe_machine_is_one_line_with_the_versions():
    line = clr_utils.describe_machine()
    assert "\n" not in line
    for part in (f"Python {sys.version.split()[0]}", f"Keras {keras.__version__}", keras.backend.backend()):
        assert part in line


def test_the_module_is_imported_quietly_and_needs_matplotlib_only_to_draw(tmp_path):
    # Keras itself imports matplotlib where there is one, so whether it is loaded tells nothing: take it away.
    code = """
import sys
sys.modules["matplotlib"] = None
import clr_utils
print(clr_utils.CLR((0.1, 0.5), 4).learning_rate_at(2))
try:
    clr_utils.plot_schedule([1, 2], 2)
except ImportError as error:
    print(error.name)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    rate, missing = done.stdout.split()
    assert float(rate) == pytest.approx(0.3) and missing.startswith("matplotlib")


def test_a_way_to_train_looks_the_same_in_every_picture_and_like_no_other():
    alone, together = (clr_utils.styles_of(names)["1cycle"] for names in (["1cycle"], ["mine", "Adam", "1cycle"]))
    assert alone == together
    for names in (list(clr_utils.STYLES)[:7], ["SGD", "constant", "constant 0.35"], [f"row {n}" for n in range(7)]):
        styles = clr_utils.styles_of(names)
        assert list(styles) == names and len({style["color"] for style in styles.values()}) == len(names)
    with pytest.raises(ValueError, match="8 names"):
        clr_utils.styles_of([f"row {n}" for n in range(8)])
