"""Points in the plane, through the whole program."""

import io
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from helpers.statistical import limit
from helpers.toy import toy, training
from PIL import Image

from drl_jax import config as config_lib
from drl_jax import method, model
from drl_jax.data import mixtures, pipeline
from drl_jax.metrics import density, plane
from drl_jax.plots import images
from drl_jax.tasks import evaluate


def png(path):
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def test_a_run_leaves_figures_and_finite_numbers(trained_toy):
    metrics = json.loads((trained_toy / "metrics.json").read_text())
    assert (metrics["step"], metrics["num_samples"]) == (30, 100)
    assert 0 < metrics["two_sample_p_value"] <= 1
    levels = metrics["levels"]
    assert (levels["level"][0], levels["level"][-1]) == (999, 0)
    assert levels.keys() == {"level", "log_Z", "kl", "edge_mass"}
    assert all(len(values) == 6 and np.all(np.isfinite(values)) for values in levels.values())
    assert png(trained_toy / "toy2d.png").shape[1] > 1000
    assert len(np.unique(png(trained_toy / "samples.png"))) > 1
    assert [path.name for path in (trained_toy / "grids").iterdir()] == ["00000020.png"]


def test_evaluating_gives_the_numbers_that_training_ended_with(trained_toy):
    names = ("metrics.json", "samples.png", "toy2d.png")
    before = {name: (trained_toy / name).read_bytes() for name in names}
    assert tiny.main("--mode=evaluate", f"--workdir={trained_toy}") == 0
    assert {name: (trained_toy / name).read_bytes() for name in names} == before


def test_samples_are_an_array_and_one_picture(trained_toy):
    assert tiny.main("--mode=sample", f"--workdir={trained_toy}", "--num_samples=100") == 0
    folder = trained_toy / "samples" / "step_30_seed_0"
    assert {path.name for path in folder.iterdir()} == {"grid.png", "samples.npy"}
    x = np.load(io.BytesIO((folder / "samples.npy").read_bytes()))
    assert (x.shape, x.dtype) == ((100, 2), np.float32)
    np.testing.assert_array_equal(png(folder / "grid.png"), images.histogram(x)[..., 0])


def test_what_the_metrics_test_are_the_models_samples(trained_toy, monkeypatch):
    """The ladder is left at each shown level."""
    seen = []
    monkeypatch.setattr(
        evaluate.plane, "two_sample_test", lambda rng, x, y: seen.append((x, y)) or 0.5
    )
    config, found, step = model.load_run(trained_toy)
    key = jax.random.key(3)
    evaluate.measure_points(config, found, step, trained_toy, key)
    (x, y), (samples_key, _) = seen[0], jax.random.split(key)
    np.testing.assert_allclose(x, found.sample(samples_key, 100), atol=1e-5)
    assert y.shape == (100, 2)


def test_a_grid_that_is_too_small_is_told(trained_toy, monkeypatch, caplog):
    narrow = plane.square(0.5, 51)
    monkeypatch.setattr(evaluate.plane, "square", lambda: narrow)
    config, found, step = model.load_run(trained_toy)
    evaluate.measure_points(config, found, step, trained_toy, jax.random.key(0))
    assert "along the edge of the grid" in caplog.text


@pytest.mark.parametrize(
    "args",
    [("interpolate",), ("inpaint",), ("long_run", "--num_steps=2")],
    ids=lambda args: args[0],
)
def test_a_mode_that_is_for_images_refuses_points(trained_toy, capsys, args):
    mode, *rest = args
    before = set(trained_toy.iterdir())
    assert tiny.main(f"--mode={mode}", f"--workdir={trained_toy}", *rest) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(rf"error: --mode={mode} is for images, .* model of points.*\n", told)
    assert set(trained_toy.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__name": "digits"}, r"'digits', no points.* 'mlp' is for points: use 'ellipse'"),
        ({"energy__network": "resnet"}, r"'ellipse', points in the plane.*configs/toy2d.py"),
        ({"energy__network": "cnn"}, "'cnn': use 'resnet' or 'mlp'"),
        ({"data__channels": 3}, "channels is 3: .*must be 2"),
        ({"data__flip": True}, "flip is True: .*must be False"),
        ({"data__dequantise": 0.1}, "dequantise is 0.1: .*must be 0.0"),
        (
            {"evaluation__inception_weights": "x.pth"},
            "weights is 'x.pth': .*must be ''",
        ),
        ({"data__name": "moon"}, "'moon', no points.*'moons'"),
        ({"energy__ch": 3}, "energy.ch is 3"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(tmp_path, capsys, changes, words):
    assert tiny.main(*training(tmp_path / "run", **changes)) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", told)
    assert re.search(words, told)
    assert not (tmp_path / "run").exists()


def test_images_of_a_misspelt_source_hear_of_points(tmp_path, capsys):
    args = tiny.training(tmp_path / "run", data__name="moon")
    assert tiny.main(*args) == 1
    assert re.fullmatch(r"error: .*'moon'.*'digits'.*'moons'.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("name", mixtures.PLANE)
def test_points_are_the_shapes_and_the_same_every_time(name):
    source = pipeline.Points(name)
    assert len(source) == pipeline.POINTS
    points = np.stack(list(source))
    assert (points.shape, points.dtype) == ((pipeline.POINTS, 2), np.float32)
    mean, covariance = mixtures.PLANE[name]().mean_and_covariance()
    np.testing.assert_allclose(points.mean(axis=0), mean, atol=0.015)
    np.testing.assert_allclose(np.cov(points.T), covariance, atol=0.015)
    np.testing.assert_array_equal(source[7], pipeline.Points(name)[7])


def test_batches_are_of_points_as_they_are():
    config = toy(data__name="ellipse", train__batch_size=6)
    points = {tuple(point) for point in pipeline.Points("ellipse")}
    for batch in itertools.islice(pipeline.training_batches(config), 3):
        assert (batch["image"].shape, batch["image"].dtype) == ((6, 2), np.float32)
        assert points.issuperset(map(tuple, batch["image"]))
    first = next(pipeline.all_images(config, limit=1))
    np.testing.assert_array_equal(first, pipeline.Points("ellipse")[0])


def test_f_is_the_networks_beside_white_noise():
    learned = method.from_config(toy(energy__ch=8))
    assert learned.energy.shape == (2,)
    params, _ = learned.energy.init(jax.random.key(0))
    x, t = jax.random.normal(jax.random.key(1), (5, 2)), jnp.arange(5) * 200
    wanted = learned.energy.f(params, x, t) - jnp.sum(x**2, axis=1) / 2
    np.testing.assert_allclose(learned.F(params)(x, t), wanted, rtol=1e-6)


def test_neighbouring_levels_of_many_are_nearly_one_energy():
    """Else the lowest levels, where noise hides the data, could not learn from those above."""
    learned = method.from_config(toy())
    params, _ = learned.energy.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (50, 2))
    f = jax.jit(lambda t: learned.energy.f(params, x, jnp.full(50, t)))
    change, spread = np.std(f(1) - f(0)), np.std(f(0))
    assert change < 0.05 * spread
    assert np.std(f(500) - f(0)) > 5 * change


def test_a_histogram_has_y_upwards_and_counts_as_brightness():
    shown = images.histogram(np.array([[1.4, 1.4]] * 4 + [[-1.4, 0.01]]))[..., 0]
    bright = np.argwhere(shown == 255)
    assert bright.max() > 0.9 * len(shown)  # to the right
    assert bright[:, 0].max() < 0.1 * len(shown)  # at the top
    row, column = np.argwhere(shown == 128).mean(axis=0) / len(shown)
    assert abs(row - 0.5) < 0.02  # in the middle
    assert column < 0.1  # to the left: exchanged axes fail (tried)
    assert np.unique(shown).tolist() == [0, 128, 255]
    assert images.histogram(np.full((3, 2), 9.0)).max() == 0  # all of them outside


def test_saved_configurations_from_before_points_are_of_images():
    old = config_lib.to_json(config_lib.default())
    del old["energy"]["network"]
    assert config_lib.from_json(old).energy.network == "resnet"


@pytest.mark.slow
def test_an_mlp_learns_a_mixture_and_is_sampled_right(tmp_path):
    """Its density by quadrature, its samples by a two-sample test, its log Z by annealing."""
    workdir = epath.Path(tmp_path)
    learning = {"energy.ch": 64, "energy.N": 2, "train.batch_size": 1024}
    steps = {"train.num_steps": 1500, "optim.decay_steps": 1500, "data.name": "blobs"}
    tested = {"evaluation.num_samples": 1000, "evaluation.batch_size": 1000}
    changes = {"log.sample_every_steps": 10_000} | learning | steps | tested
    changes = {name.replace(".", "__"): value for name, value in changes.items()}
    assert tiny.main(*training(workdir, **changes)) == 0
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert max(metrics["levels"]["kl"]) <= 0.05
    assert metrics["levels"]["level"][-1] == 0
    assert metrics["two_sample_p_value"] > 0.01  # of perfect models 1% fail

    # Annealing the energy that was learned bounds what quadrature knows.
    config, learned, _ = model.load_run(workdir)
    x = np.stack(list(pipeline.all_images(config, limit=1000)))
    found = density.log_partition(learned, jax.random.key(0), x)
    log_Z = metrics["levels"]["log_Z"][-1]
    for bound, way in ((found.lower, -1), (found.upper, 1)):
        assert abs(bound.log_Z - log_Z) < 0.05
        assert way * (bound.log_Z - log_Z) > -limit(2) * bound.std_error
