"""Scores of images, and the AUROC with which they separate two sets of images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import assert_mean, limit

from drl_jax import diffusion, noise, recovery
from drl_jax.data import pipeline, sources
from drl_jax.method import Method
from drl_jax.metrics import ood
from drl_jax.metrics.ood import Scores
from drl_jax.model import Model
from drl_jax.networks.energy import Energy
from drl_jax.runtime import sharding
from drl_jax.storage import runs

T = 6
SCHEDULE = diffusion.schedule(T)
A_BAR, SIGMA_BAR = np.float64(SCHEDULE.a_bar[:-1]), np.float64(SCHEDULE.sigma_bar[:-1])
A_Y = np.append(np.float64(SCHEDULE.a[1:-1]), 1.0)  # the top level is not scaled
TEMPERATURE = np.linspace(0.5, 2, T)
WAVES = np.linspace(1, 3, T)


@functools.cache
def digits():
    return runs.load("digits_t6")


@functools.cache
def images():
    config = digits().config
    return np.stack(list(pipeline.all_examples(config, sources.open_source(config), limit=40)))


def model_of(f, shape, batch_size=256, schedule=SCHEDULE):
    """Returns a model whose network is f(x, t), with F = f / TEMPERATURE."""
    energy = Energy(None, None, lambda params, x, t: f(x, t), shape)
    temperature = jnp.asarray(np.resize(TEMPERATURE, schedule.T), jnp.float32)
    parameterisation = recovery.Parameterisation(temperature, recovery.no_reference)
    sampler = digits().model.method.sampler
    method = Method(energy, schedule, parameterisation, sampler)
    return Model.create(method, {}, sharding.make_mesh(), batch_size)


def digits_scorer(batch_size):
    """Returns a scorer of the shipped T6 model with this batch size."""
    model = digits().model
    return ood.Scorer(Model.create(model.method, model.params, model.mesh, batch_size))


def test_auroc_is_the_fraction_of_pairs_in_order_with_ties_counted_as_half():
    """Fails if ties do not count."""
    rng = np.random.default_rng(0)
    inside = rng.integers(0, 8, 50).astype(float) + 2
    outside = rng.integers(0, 8, 30).astype(float)
    pairs = inside[:, None] - outside
    expected = np.mean(pairs > 0) + np.mean(pairs == 0) / 2
    assert np.mean(pairs == 0) > 0.05
    assert ood.auroc(inside, outside) == pytest.approx(expected, abs=1e-12)
    assert ood.auroc(outside, inside) == pytest.approx(1 - expected, abs=1e-12)
    assert ood.auroc(inside, inside) == 0.5


def test_a_high_log_density_and_a_low_score_norm_are_in_distribution():
    """Level 1 is the reverse of level 0. Fails if a sign in `ORIENTATION` is wrong."""
    high, low = np.array([3.0, 4.0, 5.0]), np.array([1.0, 2.0])
    inside = Scores(log_density=np.stack([high, -high]), score_norm=np.stack([-high, high]))
    outside = Scores(log_density=np.stack([low, -low]), score_norm=np.stack([-low, low]))
    expected = {"log_density": [1.0, 0.0], "score_norm": [1.0, 0.0]}
    assert ood.aurocs(inside, outside) == expected


def diffused(key, x):
    """Returns y of every image at every level, computed in float64: [T, n, H, W, C]."""
    levels = []
    for t in range(T):
        keys = noise.example_keys(jax.random.fold_in(key, t), jnp.arange(len(x)))
        eps = noise.normal(noise.fold(keys, 0), x.shape[1:])
        levels.append(A_Y[t] * (A_BAR[t] * np.float64(x) + SIGMA_BAR[t] * np.float64(eps)))
    return np.stack(levels)


@pytest.mark.slow
def test_scores_are_F_and_the_norm_of_its_gradient_at_every_level():
    """Compared with the closed form for f(x, t) = Σ sin(w_t x).

    Fails if y is scaled by a_t or not scaled, if x is not diffused, if y is scaled at the top
    level, and if f is used instead of F.
    """
    waves = jnp.asarray(WAVES, jnp.float32)

    def f(x, t):
        return jnp.sum(jnp.sin(noise.per_example(waves[t], x) * x), axis=(1, 2, 3))

    x = np.random.default_rng(0).uniform(-1, 1, (7, 4, 3, 2)).astype(np.float32)
    scorer = ood.Scorer(model_of(f, (4, 3, 2), batch_size=4))
    assert scorer.levels == [*range(T)]
    found = scorer(jax.random.key(1), x)
    y = diffused(jax.random.key(1), x).reshape(T, 7, -1)
    waves, temperature = WAVES[:, None, None], TEMPERATURE[:, None]
    expected = np.sin(waves * y).sum(-1) / temperature
    norm = np.linalg.norm(waves * np.cos(waves * y), axis=-1) / temperature
    np.testing.assert_allclose(found.log_density, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.score_norm, norm, rtol=2e-6)


@pytest.mark.slow
def test_scores_of_a_trained_model_are_its_F_and_gradient_norm():
    """Fails if f is used instead of F, and if the padding of a batch is not dropped."""
    model, x, key = digits().model, images()[:5], jax.random.key(2)

    @jax.jit
    @jax.grad
    def gradient(y, t):
        return model.method.F(model.params)(y[None], t[None])[0]

    found = digits_scorer(batch_size=8)(key, x)
    for t, y in enumerate(diffused(key, x).astype(np.float32)):
        F = model.log_density(y, jnp.full(5, t))
        np.testing.assert_allclose(found.log_density[t], F, rtol=2e-5, atol=2e-3)
        norm = [np.linalg.norm(gradient(one, t)) for one in y]
        np.testing.assert_allclose(found.score_norm[t], norm, rtol=1e-4)


@pytest.mark.slow
def test_scores_depend_on_the_image_and_its_index_but_not_on_the_batch():
    """They do not depend on the other images to the bit.

    Another batch size is another compiled program, with other rounding errors. Fails if an
    image's key is derived from its position in the batch.
    """
    key, x = jax.random.key(0), images()[:10]
    in_one_batch, scorer = digits_scorer(10)(key, x), digits_scorer(4)
    in_batches = scorer(key, x)
    for one, other in zip(in_one_batch, in_batches, strict=True):
        assert one.shape == (T, 10)
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5 * np.abs(one).max())
    first_five, changed = scorer(key, iter(x[:5])), x.copy()
    changed[[0, 5]] = 0.3
    for one, some, other in zip(in_batches, first_five, scorer(key, changed), strict=True):
        np.testing.assert_array_equal(some, one[:, :5])
        unchanged = [1, 2, 3, 4, 6, 7, 8, 9]
        np.testing.assert_array_equal(other[:, unchanged], one[:, unchanged])
        assert np.all(other[:, [0, 5]] != one[:, [0, 5]])
    assert scorer._compiled._cache_size() == 1  # one program for all levels and batches


def test_auroc_of_a_quadratic_energy_is_that_of_the_diffused_data():
    """If F decreases with |y|² and images are two normal numbers, it is V' / (V + V').

    V = a_bar² v + sigma_bar² is the variance of x_t; v and v' are those of the two sets. The
    variance of the AUROC A is at most 4 A (1 - A) / n, since both sets are diffused with the
    same noise; false alarms have probability 1e-6. Fails without diffusion, and if a score has
    the wrong sign.
    """
    n, v = 4000, np.array([0.04, 1.0])
    x = np.sqrt(v)[:, None, None, None, None] * np.random.default_rng(0).normal(
        size=(2, n, 1, 2, 1)
    )

    def f(x, t):
        return -jnp.sum(jnp.square(x), axis=(1, 2, 3))

    scorer = ood.Scorer(model_of(f, (1, 2, 1), batch_size=n))
    found = ood.aurocs(*(scorer(jax.random.key(0), one.astype(np.float32)) for one in x))
    V = A_BAR**2 * v[:, None] + SIGMA_BAR**2
    expected = V[1] / V.sum(axis=0)
    assert expected[0] > 0.95
    assert expected[-1] < 0.75
    for name in Scores._fields:
        z = (found[name] - expected) / np.sqrt(4 * expected * (1 - expected) / n)
        assert np.abs(z).max() < limit(z.size)
    np.testing.assert_allclose(found["score_norm"], found["log_density"], atol=1e-6)


def test_ten_of_many_levels_are_scored():
    model = model_of(
        f=lambda x, t: t + 0.0 * x.sum(axis=(1, 2, 3)),
        shape=(1, 2, 1),
        batch_size=1,
        schedule=diffusion.schedule(1000),
    )
    scorer = ood.Scorer(model)
    assert scorer.levels == [*range(0, 1000, 100)]
    found = scorer(jax.random.key(0), np.zeros((1, 1, 2, 1), np.float32))
    temperature = np.resize(TEMPERATURE, 1000)[::100]
    np.testing.assert_allclose(found.log_density[:, 0], scorer.levels / temperature, rtol=1e-6)


def synthetic(name, x, seed=0, **kwargs):
    return np.stack(list(ood.synthetic_images(name, jax.random.key(seed), x, **kwargs)))


@pytest.mark.parametrize("name", ood.SYNTHETIC)
def test_synthetic_images_depend_on_the_image_the_seed_and_the_index(name):
    x = images()[:14]
    found = synthetic(name, x)
    assert (found.shape, found.dtype) == (x.shape, np.float32)
    assert np.abs(found).max() <= 1
    assert np.all(np.abs(found - x).max(axis=(1, 2, 3)) > 0.1)
    np.testing.assert_array_equal(synthetic(name, x, batch_size=7), found)
    np.testing.assert_array_equal(synthetic(name, x[:7]), found[:7])
    assert np.all(synthetic(name, x, seed=1) == found) == (name == "inverted")


def test_shuffled_images_have_the_same_pixels_in_different_orders():
    """Fails if all images share one permutation, and if channels are permuted separately."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (6, 5, 4, 3)).astype(np.float32)
    found = synthetic("shuffled", x)
    before, after = (
        np.array([sorted(map(tuple, one)) for one in y.reshape(6, 20, 3)]) for y in (x, found)
    )
    np.testing.assert_array_equal(after, before)  # channels stay together
    orders = synthetic("shuffled", np.broadcast_to(x[:1], x.shape))
    assert len(np.unique(orders, axis=0)) == 6


def test_inverted_images_are_negatives():
    np.testing.assert_array_equal(synthetic("inverted", images()), -images())


def test_uniform_images_have_the_moments_of_independent_uniform_numbers():
    """Mean 0, variance 1/3, neighbours uncorrelated; 4e-8 false alarms per compared number.

    Fails for numbers in [0, 1), and if batches repeat each other's numbers.
    """
    n = 5000
    x = synthetic("uniform", np.ones((n, 3, 2, 1), np.float32)).reshape(n, -1)
    assert_mean(x, 0, 1 / 3)
    assert_mean(x**2, 1 / 3, 1 / 5 - 1 / 9)
    assert_mean(x * np.roll(x, 1, axis=1), 0, 1 / 9)
    assert_mean(x[1:] * x[:-1], 0, 1 / 9)
    assert 0.999 < x.max() < 1
    assert -1 <= x.min() < -0.999


def test_a_patch_is_a_square_of_uniform_noise_at_a_random_place():
    """All 10 x 7 places occur. Fails if the size, or the range of places, is another one."""
    n, zeros = 2000, np.zeros((2000, 12, 8, 2), np.float32)
    changed = synthetic("patch", zeros)
    masks = np.any(changed != 0, axis=-1)
    rows, columns = masks.any(axis=2), masks.any(axis=1)
    np.testing.assert_array_equal(masks, rows[:, :, None] & columns[:, None, :])
    assert (*{*rows.sum(axis=1)}, *{*columns.sum(axis=1)}) == (3, 2)
    first = rows.argmax(axis=1), columns.argmax(axis=1)
    assert len({*zip(*first, strict=True)}) == 10 * 7
    assert np.all(rows[np.arange(n), first[0] + 2] & columns[np.arange(n), first[1] + 1])
    assert_mean(changed[masks].reshape(n, -1), 0, 1 / 3)


OTHERS = [(10,), (10, 2), (5, 5, 5, 2)]  # vectors, signals and volumes


@pytest.mark.parametrize("shape", OTHERS)
def test_shuffled_examples_keep_their_values_and_the_channels_of_a_step_together(shape):
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    found = synthetic("shuffled", x)
    channels = shape[-1] if len(shape) > 1 else 1
    for before, after in zip(x, found, strict=True):
        rows = (sorted(map(tuple, y.reshape(-1, channels))) for y in (before, after))
        np.testing.assert_array_equal(*map(np.array, rows))
        assert np.any(before != after)


@pytest.mark.parametrize("shape", OTHERS)
def test_uniform_examples_that_are_not_images_have_variance_1(shape):
    """Fails with the width of images. 4e-8 false alarms per compared number."""
    x = synthetic("uniform", np.zeros((4000, *shape), np.float32)).reshape(4000, -1)
    assert_mean(x, 0, 1)
    assert_mean(x**2, 1, 9 / 5 - 1)


@pytest.mark.parametrize("shape", OTHERS)
def test_a_patch_replaces_a_quarter_of_each_axis_rounded_up_with_all_channels(shape):
    zeros = np.zeros((300, *shape), np.float32)
    changed = synthetic("patch", zeros) != 0
    sides = shape[:-1] or shape
    lengths = [-(-side // 4) for side in sides]
    assert np.all(
        changed.reshape(300, -1).sum(axis=1) == np.prod(lengths + [*shape][len(sides) :])
    )
    for axis, (side, length) in enumerate(zip(sides, lengths, strict=True), start=1):
        others = tuple(i for i in range(1, changed.ndim) if i != axis)
        along = changed.any(axis=others)
        first = along.argmax(axis=1)
        assert {*first.tolist()} == {*range(side - length + 1)}  # at every place
        np.testing.assert_array_equal(along.sum(axis=1), length)
        assert np.all(along[np.arange(300), first + length - 1])  # without gaps
