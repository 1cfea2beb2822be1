import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import assert_mean, limit

from drl_jax import diffusion, noise, recovery
from drl_jax.data import pipeline
from drl_jax.method import Method
from drl_jax.metrics import ood
from drl_jax.metrics.ood import Scores
from drl_jax.model import Model
from drl_jax.networks.energy import Energy
from drl_jax.runtime import sharding
from drl_jax.storage import exported

T = 6
SCHEDULE = diffusion.schedule(T)
A_BAR, SIGMA_BAR = np.float64(SCHEDULE.a_bar[:-1]), np.float64(SCHEDULE.sigma_bar[:-1])
A_Y = np.append(np.float64(SCHEDULE.a[1:-1]), 1.0)  # the top level is not scaled
TEMPERATURE = np.linspace(0.5, 2, T)
WAVES = np.linspace(1, 3, T)


@functools.cache
def digits():
    return exported.load("digits")


@functools.cache
def images():
    return np.stack(list(pipeline.all_images(digits().config, limit=40)))


def model_of(f, shape, schedule=SCHEDULE):
    """A model whose network is f(x, t), and F that over the levels' temperatures."""
    energy = Energy(None, None, lambda params, x, t: f(x, t), shape)
    temperature = jnp.asarray(np.resize(TEMPERATURE, schedule.T), jnp.float32)
    parameterisation = recovery.Parameterisation(temperature, 0.0)
    sampler = digits().model.method.sampler
    method = Method(energy, schedule, parameterisation, sampler, "recovery")
    return Model(method, {}, sharding.make_mesh())


def test_auroc_is_the_share_of_pairs_in_order_with_ties_as_halves():
    """Fails where ties do not count."""
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 8, 50) + 2, rng.integers(0, 8, 30)
    pairs = inside[:, None] - outside
    want = np.mean(pairs > 0) + np.mean(pairs == 0) / 2
    assert np.mean(pairs == 0) > 0.05
    assert ood.auroc(inside, outside) == pytest.approx(want, abs=1e-12)
    assert ood.auroc(outside, inside) == pytest.approx(1 - want, abs=1e-12)
    assert ood.auroc(inside, inside) == 0.5


def test_images_like_the_data_have_a_high_log_density_and_a_low_score_norm():
    """At level 0; at level 1 all is reversed. Fails where a sign of `ORIENTATION` is turned."""
    high, low = np.array([3.0, 4.0, 5.0]), np.array([1.0, 2.0])
    inside = Scores(log_density=np.stack([high, -high]), score_norm=np.stack([-high, high]))
    outside = Scores(log_density=np.stack([low, -low]), score_norm=np.stack([-low, low]))
    want = {"log_density": [1.0, 0.0], "score_norm": [1.0, 0.0]}
    assert ood.aurocs(inside, outside) == want


def by_hand(key, x):
    """y of every image at every level in float64, [T, n, H, W, C], in which it is scored."""
    levels = []
    for t in range(T):
        keys = noise.example_keys(jax.random.fold_in(key, t), jnp.arange(len(x)))
        eps = noise.normal(noise.fold(keys, 0), x.shape[1:])
        levels.append(A_Y[t] * (A_BAR[t] * np.float64(x) + SIGMA_BAR[t] * np.float64(eps)))
    return np.stack(levels)


def test_scores_are_F_and_the_norm_of_its_gradient_at_every_level():
    """Of f(x, t) = Σ sin(w_t x), by hand.

    Fails where level t meets a_t instead of a_{t+1} or none, where x is not diffused, at the
    top where y is scaled, and where f is taken for F.
    """
    waves = jnp.asarray(WAVES, jnp.float32)

    def f(x, t):
        return jnp.sum(jnp.sin(noise.per_example(waves[t], x) * x), axis=(1, 2, 3))

    x = np.random.default_rng(0).uniform(-1, 1, (7, 4, 3, 2)).astype(np.float32)
    scorer = ood.Scorer(model_of(f, (4, 3, 2)), batch_size=4)
    assert scorer.levels == [*range(T)]
    found = scorer(jax.random.key(1), x)
    y = by_hand(jax.random.key(1), x).reshape(T, 7, -1)
    waves, temperature = WAVES[:, None, None], TEMPERATURE[:, None]
    want = np.sin(waves * y).sum(-1) / temperature
    norm = np.linalg.norm(waves * np.cos(waves * y), axis=-1) / temperature
    np.testing.assert_allclose(found.log_density, want, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.score_norm, norm, rtol=2e-6)


def test_scores_of_a_trained_model_are_its_F_and_gradient():
    """Fails where f is taken for F, and where copies that fill up a batch are kept."""
    model, x, key = digits().model, images()[:5], jax.random.key(2)

    @jax.jit
    @jax.grad
    def gradient(y, t):
        return model.method.F(model.params)(y[None], t[None])[0]

    found = ood.Scorer(model, batch_size=8)(key, x)
    for t, y in enumerate(by_hand(key, x).astype(np.float32)):
        F = model.log_density(y, jnp.full(5, t))
        np.testing.assert_allclose(found.log_density[t], F, rtol=2e-5, atol=2e-3)
        norm = [np.linalg.norm(gradient(one, t)) for one in y]
        np.testing.assert_allclose(found.score_norm[t], norm, rtol=1e-4)


def test_scores_depend_on_the_image_and_its_number_not_on_the_batch():
    """Not on its neighbours to the bit; another batch size is another program, which rounds.

    Fails where an image's key is of its place in the batch.
    """
    model, key, x = digits().model, jax.random.key(0), images()[:10]
    whole, parts = ood.Scorer(model, 10)(key, x), ood.Scorer(model, 4)
    for one, other in zip(whole, parts(key, x), strict=True):
        assert one.shape == (T, 10)
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5 * np.abs(one).max())
    few, spoilt = parts(key, iter(x[:5])), x.copy()
    spoilt[[0, 5]] = 0.3
    for one, some, beside in zip(parts(key, x), few, parts(key, spoilt), strict=True):
        np.testing.assert_array_equal(some, one[:, :5])
        kept = [1, 2, 3, 4, 6, 7, 8, 9]
        np.testing.assert_array_equal(beside[:, kept], one[:, kept])
        assert np.all(beside[:, [0, 5]] != one[:, [0, 5]])
    assert parts._at_level._cache_size() == 1  # levels and full batches are data


def test_auroc_of_a_quadratic_energy_is_that_of_the_diffused_data():
    """Where F falls with |y|² and images are two normal numbers, it is V' / (V + V').

    V = a_bar² v + sigma_bar² is the variance of x_t, v and v' those of the two sets. A variance
    of AUROC is at most 4 A (1 - A) / n, as both sets meet the same noise: false alarms 1e-6.
    Fails without diffusion, and where a score has the wrong sign.
    """
    n, v = 4000, np.array([0.04, 1.0])
    x = np.sqrt(v)[:, None, None, None, None] * np.random.default_rng(0).normal(
        size=(2, n, 1, 2, 1)
    )

    def f(x, t):
        return -jnp.sum(jnp.square(x), axis=(1, 2, 3))

    scorer = ood.Scorer(model_of(f, (1, 2, 1)), n)
    found = ood.aurocs(*(scorer(jax.random.key(0), one.astype(np.float32)) for one in x))
    V = A_BAR**2 * v[:, None] + SIGMA_BAR**2
    want = V[1] / V.sum(axis=0)
    assert want[0] > 0.95
    assert want[-1] < 0.75
    for name in Scores._fields:
        z = (found[name] - want) / np.sqrt(4 * want * (1 - want) / n)
        assert np.abs(z).max() < limit(z.size)
    np.testing.assert_allclose(found["score_norm"], found["log_density"], atol=1e-6)


def test_of_many_levels_ten_stand_for_all():
    model = model_of(
        lambda x, t: t + 0.0 * x.sum(axis=(1, 2, 3)), (1, 2, 1), diffusion.schedule(1000)
    )
    scorer = ood.Scorer(model, 1)
    assert scorer.levels == [*range(0, 1000, 100)]
    found = scorer(jax.random.key(0), np.zeros((1, 1, 2, 1), np.float32))
    temperature = np.resize(TEMPERATURE, 1000)[::100]
    np.testing.assert_allclose(found.log_density[:, 0], scorer.levels / temperature, rtol=1e-6)


def unlike(name, x, seed=0, **kwargs):
    return np.stack(list(ood.unlike_images(name, jax.random.key(seed), x, **kwargs)))


@pytest.mark.parametrize("name", ood.UNLIKE)
def test_unlike_images_depend_on_seed_and_number_alone(name):
    x = images()[:14]
    found = unlike(name, x)
    assert (found.shape, found.dtype) == (x.shape, np.float32)
    assert np.abs(found).max() <= 1
    assert np.all(np.abs(found - x).max(axis=(1, 2, 3)) > 0.1)
    np.testing.assert_array_equal(unlike(name, x, batch_size=7), found)
    np.testing.assert_array_equal(unlike(name, x[:7]), found[:7])
    assert np.all(unlike(name, x, seed=1) == found) == (name == "inverted")


def test_shuffled_images_keep_their_pixels_each_in_an_order_of_its_own():
    """Fails where one permutation serves all, and where channels are shuffled apart."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (6, 5, 4, 3)).astype(np.float32)
    found = unlike("shuffled", x)
    before, after = (
        np.array([sorted(map(tuple, one)) for one in y.reshape(6, 20, 3)]) for y in (x, found)
    )
    np.testing.assert_array_equal(after, before)  # channels stay together
    orders = unlike("shuffled", np.broadcast_to(x[:1], x.shape))
    assert len(np.unique(orders, axis=0)) == 6


def test_inverted_images_are_negatives():
    np.testing.assert_array_equal(unlike("inverted", images()), -images())


def test_uniform_images_have_the_moments_of_independent_uniform_numbers():
    """Mean 0, variance 1/3, no correlation of neighbours: false alarms 4e-8 a number compared.

    Fails for numbers in [0, 1), and where batches repeat each other's.
    """
    n = 5000
    x = unlike("uniform", np.ones((n, 3, 2, 1), np.float32)).reshape(n, -1)
    assert_mean(x, 0, 1 / 3)
    assert_mean(x**2, 1 / 3, 1 / 5 - 1 / 9)
    assert_mean(x * np.roll(x, 1, axis=1), 0, 1 / 9)
    assert_mean(x[1:] * x[:-1], 0, 1 / 9)
    assert 0.999 < x.max() < 1
    assert -1 <= x.min() < -0.999
