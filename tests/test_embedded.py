"""Tables and signals that come with packages, or are synthesised."""

import sys

import numpy as np
import pytest
from helpers.examples import make_config, one_line
from helpers.statistical import assert_mean
from scipy import integrate

from drl_jax.data import embedded, pipeline, sources
from drl_jax.errors import UserError

SHAPES = {
    "wine": (178, 13),
    "breast_cancer": (569, 30),
    "mnist1d": (4000, 40, 1),
    "heartbeats": (4000, 64, 1),
    "premature_beats": (4000, 64, 1),
}
CLASSES = {"wine": 3, "breast_cancer": 2, "mnist1d": 10}


def config_of(name):
    _, *shape = SHAPES[name]
    config = make_config(name, channels=shape[-1], flip=False)
    config.energy.network = "mlp" if len(shape) == 1 else "unet"
    config.energy.parameterisation = "unit"
    config.data.axes, config.data.image_size = len(shape) - 1, shape[0]
    return config


@pytest.mark.parametrize("name", embedded.DATA)
def test_the_examples_are_finite_labelled_and_the_same_each_time(name):
    config = config_of(name)
    source, again = (sources.open_source(config) for _ in range(2))
    x = pipeline.load_examples(config, source)
    assert x.shape == SHAPES[name]
    assert x.dtype == np.float32
    assert np.isfinite(x).all()
    assert source.classes == CLASSES.get(name, 0)
    np.testing.assert_array_equal(x, pipeline.load_examples(config, again))
    assert source.identity == again.identity


@pytest.mark.parametrize("name", ["mnist1d", "heartbeats"])
def test_test_data_are_others(name):
    config = config_of(name)
    train, test = sources.open_source(config), sources.open_held_out(config)
    assert test.held_out
    assert len(test) == 1000
    assert not np.isin(test.read([0])[0][0], train.read(range(100))).all()
    assert train.identity != test.identity


def test_mnist1d_leaves_the_random_generator_of_numpy_as_it_was():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    embedded.mnist1d()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_a_package_that_is_missing_is_one_line(monkeypatch):
    embedded.mnist1d.cache_clear()
    monkeypatch.setitem(sys.modules, "mnist1d", None)
    with pytest.raises(UserError, match="mnist1d") as error:
        sources.open_source(config_of("mnist1d"))
    one_line(error)


def test_a_beat_solves_the_differential_equation():
    """Compared with a numerical solution; fails with a sign, a width or the decay changed."""
    a, b, centre = embedded.STRENGTH, embedded.WIDTH, embedded.ANGLE
    period = 0.8

    def slope(time, z):
        delta = (2 * np.pi * time / period - centre) % (2 * np.pi) - np.pi
        return -np.sum(a * delta * np.exp(-(delta**2) / (2 * b**2))) - z

    periods = 12  # after which the start has decayed by e^-9.6
    times = period * (periods + np.arange(embedded.LENGTH) / embedded.LENGTH)
    solved = integrate.solve_ivp(
        slope, (0, times[-1]), [0.0], t_eval=times, rtol=1e-8, atol=1e-10, max_step=0.005
    )
    found = embedded._solution(a[None], b[None], centre[None], np.full((1, 1), period))
    np.testing.assert_allclose(found[0], solved.y[0], atol=2e-4 * np.ptp(found))


def test_a_normal_beat_has_its_waves_in_order_and_a_premature_one_a_broad_complex():
    """The five waves of the mean beat: P, Q (down), R, S (down) and T."""
    names = "heartbeats", "premature_beats"
    normal, premature = (embedded.DATA[name]().x[..., 0].mean(axis=0) for name in names)
    slopes = np.sign(np.diff(normal[8:56]))
    turns = np.flatnonzero(np.diff(slopes)) + 9
    large = [i for i in turns if abs(normal[i] - normal[8]) > 0.05]
    assert len(large) == 5
    assert large[2] == normal.argmax()
    assert normal[large[0]] > normal[8] < normal[large[4]]
    assert normal[large[1]] < normal[8] > normal[large[3]]
    widths = [np.sum(mean > mean.max() / 2) for mean in (normal, premature)]
    assert widths[1] > 1.5 * widths[0]
    assert premature[48] < -0.2 < normal[48]


def test_the_baseline_moves_with_the_breath_and_the_electrodes_have_noise():
    """Means of the baseline over beats are 0, since its phase is uniform."""
    rng = np.random.default_rng(0)
    x = embedded.beats(rng, 4000, premature=False)[..., 0]
    baseline = x[:, 0]
    quiet = embedded.beats(np.random.default_rng(1), 4000, premature=False)[:, 0, 0]
    assert_mean(baseline - quiet, 0.0, 2 * baseline.var())
    assert baseline.std() == pytest.approx(0.11, abs=0.01)  # 0.15 / sqrt(2), and the noise
    assert np.diff(x[:, :4], n=3).std() == pytest.approx(0.02 * np.sqrt(20), rel=0.1)
