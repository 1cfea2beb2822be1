import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.gaussian_ladder import CONDITIONALS, SCHEDULE
from helpers.statistical import assert_mean, assert_variance

from drl_jax import diffusion, noise
from drl_jax.data import pipeline, sources
from drl_jax.errors import UserError
from drl_jax.sampling import interpolation, ladder
from drl_jax.storage import runs

SHAPE = (8, 8, 3)
KEYS = noise.example_keys(jax.random.key(0), jnp.arange(4))

slerp = jax.jit(interpolation.slerp)
sample_strips = jax.jit(interpolation.sample_strips, static_argnames="frames")
image_strips = jax.jit(interpolation.image_strips, static_argnames="frames")


@jax.jit
def descend(keys, x, level):
    return ladder.descend(keys, CONDITIONALS, x, level, 0)


def white_noise(key, n, shape=SHAPE):
    return noise.normal(noise.example_keys(jax.random.key(key), jnp.arange(n)), shape)


@pytest.mark.slow
@pytest.mark.parametrize("w", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_slerp_between_white_noise_is_white_noise(w):
    """With linear interpolation, the variance at w = 0.5 would be one half."""
    n = 2000
    x = slerp(white_noise(1, n), white_noise(2, n), jnp.full(n, w))
    assert_variance(np.ravel(x), 0, 1)


def test_slerp_between_unit_vectors_stays_in_their_plane_with_unit_norm_and_equal_angles():
    a, b = (v / np.linalg.norm(np.ravel(v)) for v in (white_noise(1, 1), white_noise(2, 1)))
    frames = 7
    arc = np.stack([slerp(a, b, jnp.full(1, w)) for w in np.linspace(0, 1, frames)]).reshape(
        frames, -1
    )
    np.testing.assert_allclose(np.linalg.norm(arc, axis=-1), 1, rtol=1e-5)
    cosines = np.sum(arc[:-1] * arc[1:], axis=-1)
    np.testing.assert_allclose(cosines, cosines[0], rtol=1e-5)
    assert np.linalg.matrix_rank(arc, tol=1e-4) == 2


@pytest.mark.parametrize("factor", [1.0, 1.0001, 3.0, 0.0, -1.0])
def test_slerp_between_parallel_vectors_is_linear(factor):
    a = white_noise(1, 2)
    for w in (0.0, 0.3, 1.0):
        x = slerp(a, factor * a, jnp.full(2, w))
        np.testing.assert_allclose(x, (1 - w + w * factor) * a, rtol=1e-5, atol=1e-6)


def recovered(strips, level):
    """Returns x_0 of strips of x_level, with one key per strip, as `Model` does."""
    n, frames, *shape = strips.shape
    keys = jnp.repeat(KEYS[:n], frames)
    return descend(keys, strips.reshape(-1, *shape), level).reshape(strips.shape)


@pytest.mark.slow
def test_a_strip_between_samples_ends_in_these_samples():
    first = ladder.white_noise(KEYS, (5,), SCHEDULE)
    strips = sample_strips(first, white_noise(3, 4, (5,)), 4)
    x = recovered(strips, SCHEDULE.T)
    generated = ladder.generate(KEYS, CONDITIONALS, (5,))
    np.testing.assert_allclose(x[:, 0], generated, atol=1e-5)
    np.testing.assert_allclose(x[:, -1], descend(KEYS, strips[:, -1], SCHEDULE.T), atol=1e-5)
    assert jnp.abs(x[:, -1] - x[:, 0]).min() > 1e-3


def test_sample_level_is_the_highest_level_with_a_signal_of_one_quarter():
    """At the top of T1k, x_T has no effect on samples whose chains share their noise."""
    for T, level in ((6, 5), (1000, 521)):
        schedule = diffusion.schedule(T)
        assert interpolation.sample_level(schedule) == level
        assert schedule.a_bar[level] >= 0.25 > schedule.a_bar[level + 1]


@pytest.mark.slow
@pytest.mark.parametrize("level", [1, 3, 6])
def test_a_strip_between_images_ends_in_these_images_diffused_and_recovered(level):
    a, b = white_noise(1, 4, (5,)), white_noise(2, 4, (5,))
    strips = image_strips(KEYS, a, b, 4, jnp.array(level), SCHEDULE)
    x = recovered(strips, level)
    t = jnp.full(4, level)
    for end, frame in ((a, 0), (b, -1)):
        start = diffusion.diffuse(noise.fold(KEYS, SCHEDULE.T), end, t, SCHEDULE)
        np.testing.assert_allclose(strips[:, frame], start, atol=1e-6)
        np.testing.assert_allclose(x[:, frame], descend(KEYS, start, level), atol=1e-5)


@pytest.mark.parametrize("level", [1, 4])
def test_every_frame_is_a_weighted_mean_of_the_images_with_the_noise_of_the_level(level):
    n, frames = 50_000, 5
    keys = noise.example_keys(jax.random.key(3), jnp.arange(n))
    a, b = jnp.full((n, 1), -0.7), jnp.full((n, 1), 0.4)
    strips = image_strips(keys, a, b, frames, level, SCHEDULE)[..., 0]
    for i, w in enumerate(np.linspace(0, 1, frames)):
        mean = SCHEDULE.a_bar[level] * ((1 - w) * -0.7 + w * 0.4)
        variance = SCHEDULE.sigma_bar[level] ** 2
        assert_mean(strips[:, i], mean, variance, of=2 * frames)
        assert_variance(strips[:, i], mean, variance, of=2 * frames)
    # All frames have the same noise, so only the images differ from frame to frame.
    step = np.broadcast_to(SCHEDULE.a_bar[level] * 1.1 / (frames - 1), (n, frames - 1))
    np.testing.assert_allclose(np.diff(strips, axis=1), step, atol=1e-5)


def test_smoothness_is_1_for_equal_steps_and_their_number_for_a_single_jump():
    a, b = np.zeros((4, 4, 1)), np.full((4, 4, 1), 0.5)
    w = np.linspace(0, 1, 6)[:, None, None, None]
    straight = (1 - w) * a + w * b
    assert interpolation.smoothness(straight) == pytest.approx(1)
    assert interpolation.length(straight) == pytest.approx(np.linalg.norm(b - a))
    jump = np.stack([a, a, b, b, b, b])
    assert interpolation.smoothness(jump) == pytest.approx(5)
    assert interpolation.length(jump) == pytest.approx(np.linalg.norm(b - a))
    assert interpolation.length(np.stack([a, b, a, b])) == pytest.approx(6)
    assert interpolation.smoothness(np.stack([a, a, a])) == 1


@pytest.mark.parametrize("level", [-1, 0, 7])
def test_levels_outside_1_to_T_are_errors(level):
    with pytest.raises(UserError, match=rf"level is {level}.* 1 .* 6 "):
        interpolation.require_level(level, 6)


@pytest.fixture(scope="module")
def run():
    return runs.load(tiny.trained())


@pytest.mark.slow
def test_strips_of_a_trained_model_start_at_its_samples(run):
    trained = run.model
    key = jax.random.key(5)
    strips = trained.interpolate(key, 12, 6)
    assert strips.shape == (12, 6, 8, 8, 1)
    # The two programs may round differently, which some chains amplify.
    error = np.abs(strips[:, 0] - trained.sample(key, 12)).max(axis=(1, 2, 3))
    assert np.mean(error < 1e-4) > 0.8
    # The first frame depends only on its own pair, and not on the number of frames.
    again = trained.interpolate(key, 3, 4)[:, 0]
    error = np.abs(strips[:3, 0] - again).max(axis=(1, 2, 3))
    assert np.mean(error < 1e-4) > 0.6


@pytest.mark.slow
def test_strips_end_near_their_images_at_low_levels_and_far_from_them_at_high_ones(run):
    trained, config = run.model, run.config
    source = sources.open_source(config)
    x = np.stack(list(pipeline.all_examples(config, source, limit=8)))
    a, b = x[:4], x[4:]
    key = jax.random.key(0)
    errors, programs = [], []
    for level in range(1, 7):
        strips = trained.interpolate_images(key, a, b, 5, level)
        programs.append(trained.programs.descend._cache_size())
        errors.append(np.mean((strips[:, 0] - a) ** 2) + np.mean((strips[:, -1] - b) ** 2))
    assert errors[0] < 0.1 * errors[-1]
    assert len(set(programs)) == 1  # the level is a traced value
    middle = trained.interpolate_images(key, a, b, 5, 1)[:, 2]
    mean = (a + b) / 2
    assert np.mean((middle - mean) ** 2) < np.mean((middle - a) ** 2)


@pytest.mark.parametrize(
    ("first", "last", "words"),
    [
        (np.zeros((2, 8, 9, 1)), np.zeros((2, 8, 8, 1)), "2x8x9x1.* nx8x8x1"),
        (np.zeros((8, 8, 1)), np.zeros((8, 8, 1)), "8x8x1.* nx8x8x1"),
        (np.zeros((2, 8, 8, 1)), np.full((2, 8, 8, 1), 255.0), r"\[255, 255\]"),
        (np.zeros((2, 8, 8, 1)), np.full((2, 8, 8, 1), np.nan), "nan"),
        (np.zeros((2, 8, 8, 1)), np.zeros((3, 8, 8, 1)), "2 .* 3 "),
    ],
)
def test_images_that_do_not_fit_are_errors_of_one_line(run, first, last, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        run.model.interpolate_images(jax.random.key(0), first, last, frames=3, level=1)
