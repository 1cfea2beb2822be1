import jax
import jax.numpy as jnp
import numpy as np

from drl_jax import diffusion, recovery, train_step
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


def test_white_noise_is_the_reference_measure_of_many_levels():
    x = jax.random.normal(jax.random.key(5), (6, 3))
    tau = jnp.arange(1.0, 7.0)
    F = recovery.log_density(quadratic, Parameterisation(tau, 1.0))
    expected = quadratic(x, LEVELS) / tau - np.sum(np.square(x), axis=1) / 2
    np.testing.assert_allclose(F(x, LEVELS), expected, rtol=1e-6)


def test_the_network_of_many_levels_has_a_gradient_of_order_one_at_every_level():
    """Of the exact F for data at a point, the hardest: a normal of variance sigma_bar².

    With f = tau (F + rho |x|² / 2) the root mean square of grad f is a_bar_t². With T6's s_t²
    it would be three to six orders of magnitude smaller below the top.
    """
    many = diffusion.schedule(1000)
    t = jnp.arange(1000)
    x_t = many.a_bar[t] * 0.3 + many.sigma_bar[t] * jax.random.normal(
        jax.random.key(0), (500, 1000)
    )

    def slope(parameterisation):
        tau, rho = parameterisation
        grad_F = -(x_t - many.a_bar[t] * 0.3) / many.sigma_bar[t] ** 2
        return np.sqrt(np.mean((tau * (grad_F + rho * x_t)) ** 2, axis=0))

    ours = slope(Parameterisation(many.sigma_bar[:-1], 1.0))
    np.testing.assert_allclose(ours[:900], (many.a_bar[:900]) ** 2, rtol=0.3, atol=0.05)
    assert np.max(ours) < 1.2
    theirs = slope(Parameterisation(recovery.step_sizes(many, B_SQUARED) ** 2, 0.0))
    assert np.max(theirs[:-1]) < 5e-4
    assert np.min(theirs) < 5e-6


def test_the_denoising_loss_of_a_quadratic_energy_has_its_closed_form():
    """F = -c |x|² / 2, so grad F = -c x, and y - x_tilde - sigma² grad F is known."""
    many = diffusion.schedule(1000)
    t = jnp.array([0, 10, 500, 998, 999])
    c = jnp.array([3.0, 0.1, 1.0, 2.0, 1.0])
    y, x_tilde = jax.random.normal(jax.random.key(6), (2, 5, 4))
    losses = recovery.denoising_loss(
        lambda x, t: -c * jnp.sum(x**2, axis=1) / 2, y, x_tilde, t, many
    )
    sigma, sigma_bar, y, x_tilde = map(
        np.float64, (many.sigma[t + 1], many.sigma_bar[t + 1], y, x_tilde)
    )
    squares = np.sum((y - x_tilde + sigma[:, None] ** 2 * c[:, None] * x_tilde) ** 2, axis=1)
    np.testing.assert_allclose(
        losses, (sigma_bar / sigma) ** 2 * squares / (2 * sigma**2) / 4, rtol=1e-4
    )


def test_the_denoising_losss_gradient_is_that_of_its_closed_form():
    """d/dc of it, through a gradient of a gradient."""
    many = diffusion.schedule(1000)
    t = jnp.array([400])
    y, x_tilde = jax.random.normal(jax.random.key(7), (2, 1, 4))

    def loss(c):
        return recovery.denoising_loss(
            lambda x, t: -c * jnp.sum(x**2, axis=1) / 2, y, x_tilde, t, many
        )[0]

    sigma2, sigma_bar2 = many.sigma[401] ** 2, many.sigma_bar[401] ** 2
    error = y - x_tilde + sigma2 * 1.7 * x_tilde
    expected = sigma_bar2 / sigma2 * jnp.sum(error * x_tilde) / 4
    np.testing.assert_allclose(jax.grad(loss)(1.7), expected, rtol=1e-4)


def test_the_mean_of_y_given_the_data_is_noise_of_unit_variance_to_the_denoising_loss():
    """With it and F = 0 the loss is |eps_bar|² / 2D: what every level starts from."""
    many = diffusion.schedule(1000)
    n = 1000
    t = jnp.arange(n) % 999
    keys = jax.random.split(jax.random.key(8), n)
    x = jax.random.uniform(jax.random.key(9), (n, 64), minval=-1, maxval=1)
    y, x_tilde = train_step.expected_positives(keys, x, t, many)
    losses = recovery.denoising_loss(lambda x, t: 0 * x[:, 0], y, x_tilde, t, many)
    a_bar, sigma_bar = many.a_bar[t + 1, None], many.sigma_bar[t + 1, None]
    eps_bar = (x_tilde - a_bar * x) / sigma_bar
    np.testing.assert_allclose(losses, jnp.mean(eps_bar**2, axis=1) / 2, rtol=2e-3)


def test_displacement_is_euclidean():
    distance = recovery.displacement(jnp.full((2, 2, 2, 1), 3.0), jnp.zeros((2, 2, 2, 1)))
    np.testing.assert_allclose(distance, [6, 6], rtol=1e-6)
