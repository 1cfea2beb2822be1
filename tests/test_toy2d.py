"""Points in the plane, from the data to the metrics."""

import io
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
from drl_jax import method
from drl_jax.data import pipeline, sources
from drl_jax.metrics import density, plane
from drl_jax.plots import images
from drl_jax.storage import runs
from drl_jax.tasks import evaluate


def png(path):
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


@pytest.mark.slow
def test_training_ends_with_figures_and_finite_metrics(trained_toy):
    metrics = json.loads((trained_toy / "metrics.json").read_text())
    assert (metrics["step"], metrics["num_samples"]) == (30, 100)
    assert 0 < metrics["two_sample_p_value"] <= 1
    levels = metrics["levels"]
    assert (levels["level"][0], levels["level"][-1]) == (99, 0)
    assert levels.keys() == {"level", "log_Z", "kl", "edge_mass"}
    assert all(len(values) == 6 and np.all(np.isfinite(values)) for values in levels.values())
    assert png(trained_toy / "toy2d.png").shape[1] > 1000
    assert len(np.unique(png(trained_toy / "samples.png"))) > 1
    assert [path.name for path in (trained_toy / "grids").iterdir()] == ["00000020.png"]


@pytest.mark.slow
def test_evaluating_repeats_the_metrics_of_training(trained_toy):
    names = ("metrics.json", "samples.png", "toy2d.png")
    before = {name: (trained_toy / name).read_bytes() for name in names}
    assert tiny.main("--mode=evaluate", f"--workdir={trained_toy}") == 0
    assert {name: (trained_toy / name).read_bytes() for name in names} == before


@pytest.mark.slow
def test_samples_are_written_as_an_array_and_a_histogram(trained_toy):
    assert tiny.main("--mode=sample", f"--workdir={trained_toy}", "--num_samples=100") == 0
    folder = trained_toy / "samples" / "step_30_seed_0"
    assert {path.name for path in folder.iterdir()} == {
        "grid.png",
        "samples.npy",
        "settings.json",
    }
    x = np.load(io.BytesIO((folder / "samples.npy").read_bytes()))
    assert (x.shape, x.dtype) == ((100, 2), np.float32)
    np.testing.assert_array_equal(png(folder / "grid.png"), images.histogram(x)[..., 0])


@pytest.mark.slow
def test_the_tested_points_are_the_samples_of_the_model(trained_toy, monkeypatch, tmp_path):
    """Although the descent stops at each shown level."""
    tested = []
    monkeypatch.setattr(
        evaluate.distances,
        "two_sample_test",
        lambda rng, x, y, bandwidths: tested.append((x, y)) or 0.5,
    )
    run, key = runs.load(trained_toy), jax.random.key(3)
    evaluate.measure_points(run, epath.Path(tmp_path), key)
    (x, y), (samples_key, _) = tested[0], jax.random.split(key)
    np.testing.assert_allclose(x, run.model.sample(samples_key, 100), atol=1e-5)
    assert y.shape == (100, 2)


@pytest.mark.slow
def test_a_grid_that_is_too_small_gives_a_warning(trained_toy, monkeypatch, tmp_path, caplog):
    narrow = plane.square_grid(0.5, 51)
    monkeypatch.setattr(evaluate.plane, "square_grid", lambda: narrow)
    run = runs.load(trained_toy)
    evaluate.measure_points(run, epath.Path(tmp_path), jax.random.key(0))
    assert "edge of the grid" in caplog.text


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"data__name": "digits"}, "'digits'.*'mlp'.*'ellipse'"),
        ({"energy__network": "resnet"}, "'ellipse'.*configs/toy2d.py"),
        ({"energy__network": "cnn"}, "'cnn'.*'resnet'.*'mlp'"),
        ({"data__channels": 3}, "data.channels is 3; .*channels=2"),
        ({"data__flip": True}, "data.flip is True.* False"),
        ({"data__dequantise": 0.1}, "data.dequantise is 0.1.* 0.0"),
        ({"evaluation__inception_weights": "x.pth"}, "inception_weights is 'x.pth'.* ''"),
        ({"data__name": "moon"}, "'moon'.*'moons'"),
        ({"energy__ch": 3}, "energy.ch is 3"),
    ],
)
def test_settings_that_contradict_each_other_are_reported_in_one_line(
    tmp_path, capsys, changes, pattern
):
    assert tiny.main(*training(tmp_path / "run", **changes)) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", error)
    assert re.search(pattern, error)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_F_is_the_network_plus_the_log_density_of_white_noise():
    learned = method.from_config(toy(energy__ch=8))
    assert learned.energy.shape == (2,)
    params, _ = learned.energy.init(jax.random.key(0))
    x, t = jax.random.normal(jax.random.key(1), (5, 2)), jnp.arange(5) * 200
    wanted = learned.energy.f(params, x, t) - jnp.sum(x**2, axis=1) / 2
    np.testing.assert_allclose(learned.F(params)(x, t), wanted, rtol=1e-6)


@pytest.mark.slow
def test_of_many_levels_neighbours_have_nearly_the_same_energy():
    """Otherwise the levels would have to learn independently of each other."""
    learned = method.from_config(toy())
    params, _ = learned.energy.init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (50, 2))
    f = jax.jit(lambda t: learned.energy.f(params, x, jnp.full(50, t)))
    change, spread = np.std(f(1) - f(0)), np.std(f(0))
    assert change < 0.05 * spread
    assert np.std(f(500) - f(0)) > 5 * change


def test_in_a_histogram_y_points_up_and_brightness_is_the_count():
    shown = images.histogram(np.array([[1.4, 1.4]] * 4 + [[-1.4, 0.01]]))[..., 0]
    bright = np.argwhere(shown == 255)
    assert bright.max() > 0.9 * len(shown)  # to the right
    assert bright[:, 0].max() < 0.1 * len(shown)  # at the top
    row, column = np.argwhere(shown == 128).mean(axis=0) / len(shown)
    assert abs(row - 0.5) < 0.02  # in the middle
    assert column < 0.1  # to the left; fails if the axes are exchanged (tried)
    assert np.unique(shown).tolist() == [0, 128, 255]
    assert images.histogram(np.full((3, 2), 9.0)).max() == 0  # all are outside


def test_old_configurations_without_a_network_are_for_images():
    old = config_lib.to_json(config_lib.default())
    del old["energy"]["network"]
    assert config_lib.from_json(old).energy.network == "resnet"


@pytest.mark.slow
def test_an_mlp_learns_a_mixture_and_samples_it(tmp_path):
    """Its densities are integrated, its samples tested, and its log Z bounded by annealing."""
    workdir = epath.Path(tmp_path)
    changes = {
        "data.name": "blobs",
        "energy.ch": 64,
        "energy.N": 2,
        "train.batch_size": 512,
        "train.num_steps": 1000,
        "log.sample_every_steps": 10_000,
        "evaluation.num_samples": 1000,
        "evaluation.batch_size": 1000,
    }
    changes = {name.replace(".", "__"): value for name, value in changes.items()}
    assert tiny.main(*training(workdir, **changes)) == 0
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert max(metrics["levels"]["kl"]) <= 0.05
    assert metrics["levels"]["level"][-1] == 0
    assert metrics["two_sample_p_value"] > 0.01  # an exact model fails with probability 0.01

    # Annealing bounds the log Z that quadrature computes.
    run = runs.load(workdir)
    source = sources.open_source(run.config)
    x = np.stack(list(pipeline.all_examples(run.config, source, limit=500)))
    budget = density.DEFAULT._replace(distributions=300, transitions=2)
    bounds = density.log_partition(run.model, jax.random.key(0), x, budget)
    log_Z = metrics["levels"]["log_Z"][-1]
    for bound, sign in ((bounds.lower, -1), (bounds.upper, 1)):
        assert abs(bound.log_Z - log_Z) < 0.05
        assert sign * (bound.log_Z - log_Z) > -limit(2) * bound.std_error
