import jax
import jax.numpy as jnp
import numpy as np

from drl_jax import diffusion, recovery
from drl_jax.recovery import Parameterisation

SCHEDULE = diffusion.schedule(6)
B_SQUARED = 2e-4
S = recovery.step_sizes(SCHEDULE, B_SQUARED)
LEVELS = jnp.arange(6)


def quadratic(x, t):
    """f of a known curvature, different at every level."""
    return -(t + 1.0) * jnp.sum(x**2, axis=1)


def test_step_sizes_follow_the_paper():
    sigma, sigma_bar = np.float64(SCHEDULE.sigma), np.float64(SCHEDULE.sigma_bar)
    expected = B_SQUARED * sigma_bar[:6] / sigma_bar[0] * sigma[1:] ** 2
    np.testing.assert_allclose(S**2, expected, rtol=1e-6)


def test_the_conditional_is_energy_plus_gaussian_and_the_top_is_the_marginal():
    y, x_tilde = jax.random.normal(jax.random.key(0), (2, 6, 3))
    F = recovery.log_density(quadratic, Parameterisation(S**2, 0.0))
    log_p = recovery.conditional_log_density(F, y, x_tilde, LEVELS, SCHEDULE)
    expected = -(np.arange(6) + 1) * np.sum(np.square(y), axis=1) / np.square(S)
    gauss = -np.sum(np.square(x_tilde - y), axis=1) / (2 * np.square(SCHEDULE.sigma[1:]))
    np.testing.assert_allclose(log_p[:5], (expected + gauss)[:5], rtol=1e-5)
    np.testing.assert_allclose(log_p[5], expected[5], rtol=1e-6)


def test_the_conditionals_gradient_points_from_its_value():
    """Central differences in float64; the quadratic term's sign flipped: fails."""
    with jax.enable_x64(True):
        schedule = diffusion.schedule(6)
        s = recovery.step_sizes(schedule, B_SQUARED)
        F = recovery.log_density(quadratic, Parameterisation(s**2, 0.0))
        y, x_tilde = jax.random.normal(jax.random.key(1), (2, 6, 3), jnp.float64)

        def log_p(y):
            return recovery.conditional_log_density(F, y, x_tilde, LEVELS, schedule)

        gradient = jax.grad(lambda y: log_p(y).sum())(y)
        v = jax.random.normal(jax.random.key(2), y.shape, jnp.float64)
        h = 1e-6
        difference = (log_p(y + h * v) - log_p(y - h * v)) / (2 * h)
        np.testing.assert_allclose(difference, jnp.sum(gradient * v, axis=1), rtol=1e-6)


def test_the_loss_weighs_levels_and_raises_f_on_data():
    y_pos, y_neg = jax.random.normal(jax.random.key(3), (2, 6, 3))
    losses, (f_pos, f_neg) = recovery.loss(quadratic, y_pos, y_neg, LEVELS, SCHEDULE)
    np.testing.assert_allclose(f_pos, quadratic(y_pos, LEVELS), rtol=1e-6)
    np.testing.assert_allclose(f_neg, quadratic(y_neg, LEVELS), rtol=1e-6)
    weight = SCHEDULE.sigma[1] / SCHEDULE.sigma[1:]
    np.testing.assert_allclose(losses, -weight * (f_pos - f_neg), rtol=1e-5)


def test_negatives_are_constants_to_the_loss():
    y_pos, y_neg = jax.random.normal(jax.random.key(4), (2, 6, 3))

    def mean_loss(y_neg):
        return recovery.loss(quadratic, y_pos, y_neg, LEVELS, SCHEDULE)[0].mean()

    np.testing.assert_array_equal(jax.grad(mean_loss)(y_neg), 0)


def test_displacement_is_euclidean():
    distance = recovery.displacement(jnp.full((2, 2, 2, 1), 3.0), jnp.zeros((2, 2, 2, 1)))
    np.testing.assert_allclose(distance, [6, 6], rtol=1e-6)
