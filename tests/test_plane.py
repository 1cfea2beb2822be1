import jax.numpy as jnp
import numpy as np
import pytest

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
