import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistical import limit

from drl_jax import diffusion, recovery
from drl_jax.data import mixtures
from drl_jax.mcmc import langevin
from drl_jax.method import Method
from drl_jax.metrics import plane
from drl_jax.model import Model
from drl_jax.networks.energy import Energy
from drl_jax.recovery import Parameterisation
from drl_jax.runtime import sharding
from drl_jax.sampling.ladder import Sampler

SCHEDULE = diffusion.schedule(1000)
GRID = plane.square_grid()


def model_of(F):
    """Returns a model of points whose log-density is F, at all levels."""
    energy = Energy(None, None, lambda params, x, t: F(x, t), (2,))
    ones = jnp.ones(SCHEDULE.T)
    sampler = Sampler(langevin.init, langevin.kernel, {"step_size": ones}, K=1)
    method = Method(energy, SCHEDULE, Parameterisation(ones, recovery.no_reference), sampler)
    return Model.create(method, {}, sharding.make_mesh())


def compare(F, exact):
    """Compares at level 0."""
    return plane.compare(model_of(F), exact, [0], GRID)[0]


def gaussian(mean, std):
    """Returns an unnormalised log-density, the same at every level, and its log Z."""
    mean, std = np.asarray(mean), np.asarray(std)

    def F(y, t):
        return -jnp.sum(jnp.square((y - mean) / std), axis=1) / 2

    return F, np.log(2 * np.pi * np.prod(std))


def kl_of_gaussians(mean, std, mean_p, std_p):
    """Returns KL(N(mean, std²) ‖ N(mean_p, std_p²)) with independent coordinates."""
    mean, std, mean_p, std_p = map(np.asarray, (mean, std, mean_p, std_p))
    terms = np.log(std_p / std) + (std**2 + (mean - mean_p) ** 2) / (2 * std_p**2) - 0.5
    return terms.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ellipse", "blobs", "moons"])  # few components: fast
def test_the_exact_energy_has_log_z_0_and_kl_0_at_the_lowest_and_the_highest_level(name):
    """Fails if the cell area is wrong by 1% (tried)."""
    exact = mixtures.exact_F(mixtures.PLANAR_SHAPES[name](), SCHEDULE)
    found = plane.compare(model_of(exact), exact, [0, 999], GRID)
    assert found.keys() == {0, 999}
    for comparison in found.values():
        assert abs(comparison.log_Z) < 2e-5  # log-densities in float32
        assert comparison.kl == pytest.approx(0, abs=2e-5)
        assert comparison.edge_mass < 1e-4


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.3, -0.2), (0.5, 0.5)), ((0.0, 0.0), (0.2, 0.9)), ((1.0, 2.0), (0.04, 0.3))],
)
def test_quadrature_agrees_with_the_closed_form_for_gaussians(mean, std):
    """Fails if the KL is reversed or the cell area is wrong by 1% (both tried)."""
    exact, log_Z_q = gaussian((0.1, 0.2), (0.3, 0.4))
    F, log_Z = gaussian(mean, std)
    found = compare(F, lambda y, t: exact(y, t) - log_Z_q)
    assert found.log_Z == pytest.approx(log_Z, abs=1e-5)
    assert found.kl == pytest.approx(
        kl_of_gaussians((0.1, 0.2), (0.3, 0.4), mean, std), rel=1e-5
    )


def test_the_first_axis_of_the_grid_is_the_first_coordinate():
    """Fails if the axes are exchanged (tried)."""
    F, log_Z = gaussian((1.0, -2.0), (0.5, 0.5))
    found = compare(F, lambda y, t: F(y, t) - log_Z)
    for log_density in (found.log_p, found.log_q):
        i, j = np.unravel_index(log_density.argmax(), log_density.shape)
        np.testing.assert_allclose(GRID.axis[[i, j]], [1.0, -2.0], atol=1e-9)


def test_kl_detects_a_width_that_is_wrong_by_two_percent():
    exact, log_Z = gaussian((0.0, 0.0), (0.1, 0.1))
    wide, _ = gaussian((0.0, 0.0), (0.102, 0.102))
    found = compare(wide, lambda y, t: exact(y, t) - log_Z)
    expected = kl_of_gaussians((0.0, 0.0), (0.1, 0.1), (0.0, 0.0), (0.102, 0.102))
    assert found.kl == pytest.approx(expected, rel=1e-3)
    assert found.kl > 5e-4


def test_a_density_wider_than_the_grid_has_mass_along_the_edge():
    F, log_Z = gaussian((0.0, 0.0), (4.0, 4.0))
    found = compare(F, lambda y, t: F(y, t) - log_Z)
    assert found.edge_mass > plane.EDGE_MASS


def test_the_edge_is_a_tenth_of_the_half_width():
    grid = plane.square_grid(half_width=2.0, side=401)
    uniform = np.full((401, 401), -np.log(4.0**2))
    assert plane.edge_mass(uniform, grid) == pytest.approx(1 - 0.9**2, rel=0.03)


def test_every_level_is_evaluated_at_its_own_t_with_the_given_parameters():
    levels = [3, 7]
    values = plane.evaluate(
        F=lambda params: lambda x, t: params["scale"] * t + jnp.sum(x, axis=1),
        params={"scale": jnp.float32(10)},
        levels=levels,
        grid=GRID,
        mesh=sharding.make_mesh(),
    )
    expected = 10 * np.array(levels)[:, None, None] + GRID.nodes.sum(axis=-1)
    np.testing.assert_allclose(values, expected, atol=1e-5)


def test_shown_levels_descend_to_level_0_in_decreasing_steps():
    levels = plane.shown_levels(SCHEDULE, 6)
    assert len(levels) == 6
    assert (levels[0], levels[-1]) == (999, 0)
    roots = np.sqrt(np.float64(SCHEDULE.sigma_bar[np.array(levels)]))
    np.testing.assert_allclose(roots, np.linspace(roots[0], roots[-1], 6), atol=0.005)
    assert plane.shown_levels(diffusion.schedule(6), 6) == [5, 4, 3, 2, 1, 0]


def draws(n, seed, std=0.12):
    """Draws n points of the eight blobs, with this width."""
    blobs = mixtures.PLANAR_SHAPES["blobs"]()
    blobs = blobs._replace(variances=jnp.full_like(blobs.variances, std**2))
    keys = jax.random.split(jax.random.key(seed), n)
    return np.asarray(jax.jit(blobs.sample)(keys))


def test_the_rate_of_false_alarms_is_the_significance_level():
    """Of 400 tests at level 0.1, 40 ± 6 are expected to reject."""
    n, tests, alpha = 40, 400, 0.1
    x = draws(2 * n * tests, seed=0).reshape(tests, 2, n, 2)
    rng = np.random.default_rng(0)
    p = np.array([plane.two_sample_test(rng, *pair, permutations=99) for pair in x])
    assert p.min() >= 0.01
    spread = np.sqrt(tests * alpha * (1 - alpha))
    assert abs(np.sum(p <= alpha) - tests * alpha) < limit(2) * spread
    assert abs(np.mean(p) - 0.5) < limit(2) / np.sqrt(12 * tests)


def test_two_points_are_no_evidence_of_different_distributions():
    """There are only two partitions, with equal statistics. Fails if a tie does not count."""
    x, y = np.zeros((1, 2)), np.array([[0.3, 2.0]])
    assert plane.two_sample_test(np.random.default_rng(0), x, y, permutations=99) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + np.float32([0.06, 0]),
        lambda x: x * np.float32(1.1),
        lambda x: np.where(x[:, :1] > 0.6, -x, x),  # one blob is missing
        lambda x: draws(len(x), 1, std=0.18),
    ],
    ids=["shifted", "larger", "missing", "wider"],
)
def test_a_wrong_sampler_is_detected(change):
    rng = np.random.default_rng(0)
    assert plane.two_sample_test(rng, change(draws(1000, 1)), draws(1000, 2)) <= 0.01


@pytest.mark.parametrize("scale", [1, 100], ids=str)
def test_in_more_dimensions_the_kernels_follow_the_scale_of_the_data(scale):
    """Equal distributions are rejected with probability 0.01. Fails with `BANDWIDTHS`.

    One of 20 values has another standard deviation in the wrong sample.
    """
    x, y = scale * np.random.default_rng(1).normal(size=(2, 500, 20))
    wrong = x * np.where(np.arange(20), 1, 3)
    p_equal, p_wrong = (
        plane.two_sample_test(np.random.default_rng(0), z, y, bandwidths=None)
        for z in (x, wrong)
    )
    assert p_equal > 0.01
    assert p_wrong <= 0.01
