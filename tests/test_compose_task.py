"""The task compose, on Gaussians, whose products and mixtures have closed forms."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers import exact, tiny
from helpers.statistical import assert_mean, assert_variance
from PIL import Image
from scipy import stats

from drl_jax import config as config_lib
from drl_jax import method as method_lib
from drl_jax.data import mixtures
from drl_jax.errors import UserError
from drl_jax.metrics import plane
from drl_jax.model import Model
from drl_jax.networks import guidance
from drl_jax.sampling.ladder import Adapted
from drl_jax.storage import runs
from drl_jax.storage.runs import Run
from drl_jax.tasks import compose

T = 3
LOG_Z = 3.0, -2.0  # of the two models: their F are known up to a constant
MEANS, VARIANCES = np.array([[0.5, -0.2], [-0.3, 0.4]]), np.array([0.1, 0.2])


def gaussian_run(i, shape=(2,), sampler="langevin"):
    """Returns the run of an exact model."""
    mean = np.tile(MEANS[i], np.prod(shape) // 2)
    data = mixtures.gaussian(mean, VARIANCES[i] * np.eye(len(mean)))
    config = config_lib.load("toy2d")
    config.diffusion.T = T
    config.mcmc.update(sampler=sampler, K=20, warmup_steps=30)
    model = exact.model(data, T, LOG_Z[i], shape=shape)
    method = method_lib.with_sampler(model.method, sampler=sampler, K=20)
    return Run(config, Model.create(method, {}, model.mesh, batch_size=4096), 5)


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """Runs the task on two Gaussians; returns its folder, samples and metrics."""

    def run(shape=(2,), sampler="langevin", **flags):
        other = gaussian_run(1, shape)
        monkeypatch.setattr(runs, "load", lambda name: other)
        monkeypatch.setattr(runs, "reconfigure", lambda run, config: run)
        given = {
            "model": "runs/first",
            "others": ["runs/second"],
            "labels": [],
            "rule": "product",
            "weights": [],
            "temperature": 1.0,
            "num_samples": 2000,
            "seed": 0,
        }
        first = gaussian_run(0, shape, sampler)
        workdir = epath.Path(tmp_path)
        compose.run(run=first, workdir=workdir, **given | flags)
        (folder,) = (workdir / "compositions").iterdir()
        return (
            folder,
            np.load(folder / "samples.npy"),
            json.loads((folder / "metrics.json").read_text()),
        )

    return run


def level_0():
    """Returns means and variances of both models at level 0."""
    schedule = gaussian_run(0).model.method.schedule
    a, sigma = float(schedule.a_bar[0]), float(schedule.sigma_bar[0])
    return a * MEANS, a**2 * VARIANCES + sigma**2


@pytest.mark.slow
def test_samples_of_a_product_have_the_mean_and_variance_of_the_closed_form(composed):
    """The false-alarm rate is 10^-6: precisions add up, times the weights over temperature.

    Fails with another weight or temperature.
    """
    folder, x, metrics = composed(weights=[1.0, 0.5], temperature=2.0)
    means, variances = level_0()
    precision = np.array([0.5, 0.25]) / variances
    variance = 1 / precision.sum()
    mean = variance * precision @ means
    assert_mean(x, mean, variance, of=2)
    assert_variance(x, mean, variance, of=2)
    # F of a model is its log-density plus log Z, of y = a_1 x.
    expected = [
        log_Z
        - np.log(2 * np.pi * v)
        - np.mean(np.sum((x - m) ** 2, axis=1)) / (2 * v)
        + log_volume
        for log_Z, m, v, log_volume in zip(LOG_Z, means, variances, 2 * [volume()], strict=True)
    ]
    np.testing.assert_allclose(metrics["mean_log_density"], expected, rtol=1e-3)
    assert 0.4 < metrics["acceptance"] < 0.9
    assert metrics["kl_of_samples"] < 1.3 * metrics["kl_of_exact_samples"]
    assert np.ptp(np.asarray(Image.open(folder / "compose.png").convert("L"))) == 255
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["weights"] == [1.0, 0.5]
    assert settings["config.mcmc.sampler"] == "mala"


def volume():
    """Returns -log |dy/dx| of y = a_1 x in the plane, by which the density of y differs."""
    return -2 * np.log(float(gaussian_run(0).model.method.schedule.y_scale(jnp.array(0))))


@pytest.mark.slow
def test_the_shares_of_a_mixture_in_the_plane_are_its_weights(composed):
    """Though log Z of the models differs by 5. The false-alarm rate is 10^-6."""
    _, x, metrics = composed(rule="mixture", weights=[1.0, 3.0], sampler="mala")
    means, variances = level_0()
    mean, n = np.array([0.25, 0.75]) @ means, len(x)
    spread = np.array([0.25, 0.75]) @ (variances[:, None] + (means - mean) ** 2)
    z = (x.mean(axis=0) - mean) / np.sqrt(spread / n)
    assert np.all(np.abs(z) < stats.norm.isf(1e-6 / 4))
    assert metrics["kl_of_samples"] < 1.3 * metrics["kl_of_exact_samples"]


@pytest.mark.slow
def test_samples_of_the_parts_are_shown_above_those_of_a_product_of_images(
    composed, monkeypatch
):
    """With a configured exact sampler, which samples the product, too."""
    adapted = Adapted(*np.ones((3, T)))
    monkeypatch.setattr(Model, "adapt", lambda model, **settings: (model, adapted))
    black = [-np.ones((5, 4, 4, 1), np.float32)]
    monkeypatch.setattr(Model, "sample_batches", lambda model, key, n, *_, **__: black)
    folder, x, metrics = composed(shape=(4, 4, 1), sampler="hmc", num_samples=5)
    assert x.shape == (5, 4, 4, 1)
    assert metrics.keys() == {"step", "acceptance", "mean_log_density"}
    names = {path.name for path in folder.iterdir()}
    assert names >= {"compose.png", "grid.png", "000004.png", "samples.npy", "settings.json"}
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["config.mcmc.sampler"] == "hmc"


@pytest.mark.parametrize("sampler", ["langevin", "hmc"])
def test_only_products_are_sampled_by_chains_on_the_marginals(sampler):
    """Also with a configured exact sampler. At few levels, moments hardly tell."""
    parts = [
        compose.Part(name, gaussian_run(i, sampler=sampler)) for i, name in enumerate("ab")
    ]
    for rule, on_marginals in (("product", True), ("mixture", False)):
        sigma = compose._combined(parts, rule, [1.0, 1.0]).model.method.schedule.sigma
        assert bool(jnp.isinf(sigma).all()) == on_marginals


def test_classes_are_parts_with_names():
    run = runs.load("mnist")
    parts = compose._parts(run, "mnist", [], [5, 10])
    assert [part.name for part in parts] == ["class 5", "class 10"]
    assert [part.run.model.params[guidance.NAME].label for part in parts] == [5, 10]


def test_formulas():
    def title(rule, *weights):
        return compose._title(["a", "b"], rule, np.array(weights, float))

    assert title("product", 1, -0.3) == "a - 0.3 b"
    assert title("product", -2, 1) == "- 2 a + b"
    assert title("mixture", 1, 3) == "0.25 a or 0.75 b"


def test_names_are_distinct():
    run = runs.load("digits_t6")
    parts = compose._parts(run, "a/digits", ["digits_t6", "digits_t6"], [])
    assert [part.name for part in parts] == ["digits (1)", "digits_t6 (2)", "digits_t6 (3)"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weights=1"], "--weights has 1 elements for 2 models"),
        (["--labels=1,2,3"], "--labels has 3 elements for 2 models"),
        (["--temperature=0"], "--temperature=0: give a positive"),
        (["--rule=mixture", "--temperature=2"], "--temperature is for --rule=product"),
        (["--rule=mixture", "--weights=1,-1"], r"\[1.0, -1.0\]: give positive numbers"),
        (["--labels=1,1"], "trained without labels"),
        (["--others=nonesuch"], "'nonesuch' is not a work directory"),
        (["--others=mnist"], r"\(8, 8, 1\) and \(28, 28, 1\)"),
    ],
)
def test_what_cannot_be_combined_is_an_error_of_one_line(tmp_path, capsys, flags, words):
    args = "--mode=compose", f"--workdir={tmp_path}", "--model=digits_t6", "--others=digits_t6"
    assert tiny.main(*args, *flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    with pytest.raises(UserError, match=words):
        raise UserError(line)
    assert not list(tmp_path.iterdir())


def test_the_divergence_of_exact_samples_is_their_scatter_and_that_of_others_is_larger():
    """A shift by 0.2 standard deviations has KL = 0.02; cells lose little of it."""
    grid, rng = plane.square_grid(), np.random.default_rng(0)
    log_p = -np.sum(grid.nodes**2, axis=-1) / 2 - np.log(2 * np.pi)
    x = rng.normal(size=(100_000, 2))
    found, scatter = plane.divergence_of_samples(rng, x, log_p, grid)
    assert found == pytest.approx(scatter, rel=0.2)
    shifted, _ = plane.divergence_of_samples(rng, x + np.array([0.2, 0]), log_p, grid)
    assert shifted - scatter == pytest.approx(0.02, rel=0.2)
    far, _ = plane.divergence_of_samples(rng, x + 50, log_p, grid)
    assert 10 < far < np.inf
