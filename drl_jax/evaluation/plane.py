"""What can be known of an energy in the plane: its normaliser and its distance from the truth.

Both are integrals, sums over a grid in float64. Of a density that is smooth on the scale of
the grid's cells such a sum converges faster than any power of their size; what it cannot know
is the mass that lies outside, of which that along the edge is a sign.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from drl_jax.diffusion import NoiseSchedule
from drl_jax.recovery import LevelFn

HALF_WIDTH = 5.0  # of the grid, whose centre is the origin; white noise has 1e-6 outside
SIDE = 501  # nodes along a side, 0.02 apart
EDGE = 0.1  # width of the edge, in units of the half width
EDGE_MASS = 1e-3  # more than so much along it, and the grid may be too small
BATCH = 2**14  # nodes at a time
BANDWIDTHS = (0.05, 0.2, 0.8)  # of the two-sample test's kernels, in units of the data


class Grid(NamedTuple):
    """Nodes of a square grid.

    Attributes:
      axis: their coordinates, the same along both axes.
      nodes: their places; the first axis goes with the first coordinate.
      area: of a cell.
    """

    axis: Float[np.ndarray, "side"]
    nodes: Float[np.ndarray, "side side 2"]
    area: float


class Known(NamedTuple):
    """What quadrature tells of one level's energy.

    Attributes:
      log_p: log-density at the nodes, normalised [nats].
      log_q: the true one.
      log_normaliser: log Z, log of the integral of exp(F) [nats].
      kl: KL(q ‖ p), the true density q from the learned p [nats].
      edge: mass of p along the edge of the grid.
    """

    log_p: Float[np.ndarray, "side side"]
    log_q: Float[np.ndarray, "side side"]
    log_normaliser: float
    kl: float
    edge: float


def square(half_width: float = HALF_WIDTH, side: int = SIDE) -> Grid:
    """Returns the grid of side² nodes on [-half_width, half_width]²."""
    axis = np.linspace(-half_width, half_width, side)
    nodes = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    return Grid(axis, nodes, float((axis[1] - axis[0]) ** 2))


def evaluate(F: LevelFn, t: int, grid: Grid) -> Float[np.ndarray, "side side"]:
    """Returns F(·, t) at the nodes, in float64."""
    nodes = grid.nodes.reshape(-1, 2).astype(np.float32)
    # The last batch is filled up, so that it needs no program of its own.
    filled = np.pad(nodes, ((0, -len(nodes) % BATCH), (0, 0)), mode="edge")
    level = jnp.full(BATCH, t)
    parts = [F(jnp.asarray(x), level) for x in filled.reshape(-1, BATCH, 2)]
    values = np.concatenate([np.asarray(part, np.float64) for part in parts])
    return values[: len(nodes)].reshape(grid.nodes.shape[:2])


def log_integral(log_density: Float[np.ndarray, "side side"], grid: Grid) -> float:
    """Returns log of the integral of exp(log_density) [nats]."""
    greatest = log_density.max()
    return float(greatest + np.log(np.sum(np.exp(log_density - greatest)) * grid.area))


def kl_divergence(
    log_q: Float[np.ndarray, "side side"], log_p: Float[np.ndarray, "side side"], grid: Grid
) -> float:
    """Returns KL(q ‖ p) of two normalised densities [nats]."""
    return float(np.sum(np.exp(log_q) * (log_q - log_p)) * grid.area)


def edge_mass(log_p: Float[np.ndarray, "side side"], grid: Grid) -> float:
    """Returns the mass of a density along the edge of the grid."""
    inside = (1 - EDGE) * grid.axis[-1]
    edge = np.abs(grid.nodes).max(axis=-1) > inside
    return float(np.sum(np.exp(log_p[edge])) * grid.area)


def compare(F: LevelFn, exact: LevelFn, t: int, grid: Grid) -> Known:
    """Compares an energy with the true one at one level.

    Args:
      F: the log-density of the levels, up to a constant each.
      exact: the true one, normalised.
      t: level.
      grid: on which both are smooth and inside which they lie.
    """
    learned, log_q = evaluate(F, t, grid), evaluate(exact, t, grid)
    log_normaliser = log_integral(learned, grid)
    log_p = learned - log_normaliser
    kl = kl_divergence(log_q, log_p, grid)
    return Known(log_p, log_q, log_normaliser, kl, edge_mass(log_p, grid))


def shown_levels(schedule: NoiseSchedule, n: int) -> list[int]:
    """Returns at most n levels, from the top to 0, closer together towards the data.

    All, where there are no more than n; else the square root of their noise falls about evenly.
    """
    if n >= schedule.T:
        return list(reversed(range(schedule.T)))
    roots = np.asarray(schedule.sigma_bar[:-1], np.float64) ** 0.5
    wanted = np.linspace(roots[-1], roots[0], n)
    nearest = {int(np.abs(roots - root).argmin()) for root in wanted}
    return sorted(nearest, reverse=True)


def two_sample_test(
    rng: np.random.Generator,
    x: Float[np.ndarray, "n 2"],
    y: Float[np.ndarray, "n 2"],
    permutations: int = 999,
) -> float:
    """Returns the p-value of x and y having one distribution.

    The statistic is the kernel distance E k(x, x') + E k(y, y') - 2 E k(x, y) (Gretton et al.
    2012), zero for equal distributions alone; k is a sum of Gaussian kernels, so that it sees
    how wide a line is and how much lies where. How great it is among those of random
    divisions of all points in two gives a p-value that is at most α with probability at most
    α where the distributions are equal, exactly and for any n.
    """
    n = len(x)
    both = np.concatenate([x, y]).astype(np.float32)
    squares = np.square(both[:, None] - both).sum(axis=-1)
    kernel = sum(np.exp(squares / np.float32(-2 * h**2)) for h in BANDWIDTHS)
    signs = np.repeat(np.array([1, -1], np.float32), n)
    divisions = np.stack([signs, *(rng.permutation(signs) for _ in range(permutations))])
    statistic = np.sum(divisions @ kernel * divisions, axis=1, dtype=np.float64)
    # Division and mirror image are the same to all but rounding.
    found, *others = np.asarray(statistic).tolist()
    at_least = sum(other >= found - 1e-6 * abs(found) for other in others)
    return (1 + at_least) / (1 + permutations)
