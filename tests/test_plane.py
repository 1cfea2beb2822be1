import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import limit

from drl_jax import diffusion
from drl_jax.data import mixtures
from drl_jax.metrics import plane

SCHEDULE = diffusion.schedule(1000)
GRID = plane.square()


def gaussian(mean, std):
    """A log-density of every level, not normalised, and its log Z."""
    mean, std = np.asarray(mean), np.asarray(std)

    def F(y, t):
        return -jnp.sum(jnp.square((y - mean) / std), axis=1) / 2

    return F, np.log(2 * np.pi * np.prod(std))


def kl_of_gaussians(mean, std, mean_p, std_p):
    """KL(N(mean, std²) ‖ N(mean_p, std_p²)), axis by axis."""
    mean, std, mean_p, std_p = map(np.asarray, (mean, std, mean_p, std_p))
    terms = np.log(std_p / std) + (std**2 + (mean - mean_p) ** 2) / (2 * std_p**2) - 0.5
    return terms.sum()


@pytest.mark.parametrize("name", ["ellipse", "blobs", "moons"])  # of few components: quick
def test_the_exact_energy_has_log_z_0_and_kl_0_at_the_lowest_and_the_highest_level(name):
    """An area 1% off fails (tried)."""
    exact = jax.jit(mixtures.exact_F(mixtures.PLANE[name](), SCHEDULE))
    for t in (0, 999):
        known = plane.compare(exact, exact, t, GRID)
        assert abs(known.log_normaliser) < 2e-5  # float32 log-densities
        assert known.kl == pytest.approx(0, abs=2e-5)
        assert known.edge < 1e-4


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.3, -0.2), (0.5, 0.5)), ((0.0, 0.0), (0.2, 0.9)), ((1.0, 2.0), (0.04, 0.3))],
)
def test_quadrature_is_the_closed_form_of_gaussians(mean, std):
    """A KL the other way round or an area 1% off fails (both tried)."""
    exact, log_Z_q = gaussian((0.1, 0.2), (0.3, 0.4))
    F, log_Z = gaussian(mean, std)
    known = plane.compare(F, lambda y, t: exact(y, t) - log_Z_q, 0, GRID)
    assert known.log_normaliser == pytest.approx(log_Z, abs=1e-5)
    assert known.kl == pytest.approx(
        kl_of_gaussians((0.1, 0.2), (0.3, 0.4), mean, std), rel=1e-5
    )


def test_the_first_axis_of_the_grid_goes_with_the_first_coordinate():
    """Axes exchanged fail (tried)."""
    F, log_Z = gaussian((1.0, -2.0), (0.5, 0.5))
    known = plane.compare(F, lambda y, t: F(y, t) - log_Z, 0, GRID)
    for log_density in (known.log_p, known.log_q):
        i, j = np.unravel_index(log_density.argmax(), log_density.shape)
        np.testing.assert_allclose(GRID.axis[[i, j]], [1.0, -2.0], atol=1e-9)


def test_kl_sees_a_width_that_is_two_percent_off():
    exact, log_Z = gaussian((0.0, 0.0), (0.1, 0.1))
    wide, _ = gaussian((0.0, 0.0), (0.102, 0.102))
    known = plane.compare(wide, lambda y, t: exact(y, t) - log_Z, 0, GRID)
    wanted = kl_of_gaussians((0.0, 0.0), (0.1, 0.1), (0.0, 0.0), (0.102, 0.102))
    assert known.kl == pytest.approx(wanted, rel=1e-3)
    assert known.kl > 5e-4


def test_a_density_that_reaches_out_of_the_grid_shows_at_its_edge():
    F, log_Z = gaussian((0.0, 0.0), (4.0, 4.0))
    known = plane.compare(F, lambda y, t: F(y, t) - log_Z, 0, GRID)
    assert known.edge > plane.EDGE_MASS


def test_levels_go_down_closer_together_and_end_at_the_data():
    levels = plane.shown_levels(SCHEDULE, 6)
    assert len(levels) == 6
    assert (levels[0], levels[-1]) == (999, 0)
    assert np.all(np.diff(np.diff(levels)) > 0)
    assert plane.shown_levels(diffusion.schedule(6), 6) == [5, 4, 3, 2, 1, 0]


def draws(n, seed, std=0.12):
    """Of the eight blobs, with this width."""
    blobs = mixtures.PLANE["blobs"]()
    blobs = blobs._replace(variances=jnp.full_like(blobs.variances, std**2))
    keys = jax.random.split(jax.random.key(seed), n)
    return np.asarray(jax.jit(blobs.sample)(keys))


def test_false_alarms_are_as_many_as_the_level_says():
    """Of 400 tests at level 0.1, 40 ± 6 are expected."""
    n, tests, alpha = 40, 400, 0.1
    x = draws(2 * n * tests, seed=0).reshape(tests, 2, n, 2)
    rng = np.random.default_rng(0)
    p = np.array([plane.two_sample_test(rng, *pair, permutations=99) for pair in x])
    assert p.min() >= 0.01
    spread = np.sqrt(tests * alpha * (1 - alpha))
    assert abs(np.sum(p <= alpha) - tests * alpha) < limit(2) * spread
    assert abs(np.mean(p) - 0.5) < limit(2) / np.sqrt(12 * tests)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + np.float32([0.06, 0]),
        lambda x: x * np.float32(1.1),
        lambda x: np.where(x[:, :1] > 0.6, -x, x),  # a blob goes missing
        lambda x: draws(len(x), 1, std=0.18),
    ],
    ids=["shifted", "larger", "missing", "wider"],
)
def test_a_wrong_sampler_is_found(change):
    rng = np.random.default_rng(0)
    assert plane.two_sample_test(rng, change(draws(1000, 1)), draws(1000, 2)) <= 0.01
