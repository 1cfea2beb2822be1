"""Metrics for points in the plane: log Z and KL divergence by quadrature.

Log Z and the KL divergence are integrals over the plane, computed as sums over a grid in
float64. For a density that is smooth on the scale of the grid spacing, such a sum converges
faster than any power of the spacing. It misses the mass outside the grid, of which mass near
the edge of the grid is a sign.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from drl_jax.diffusion import NoiseSchedule
from drl_jax.model import Model
from drl_jax.recovery import LevelFn
from drl_jax.runtime.batching import Engine

HALF_WIDTH = 5.0  # of the grid, centred at the origin; white noise has mass 1e-6 outside
SIDE = 501  # nodes per side, 0.02 apart
EDGE = 0.1  # width of the margin along the grid's edge, relative to the half width
EDGE_MASS = 1e-3  # if the mass in this margin is larger, the grid may be too small
BATCH = 2**14  # nodes per batch
CELL = 8  # nodes along each side of a cell, in which samples are counted
REPEATS = 100  # sets of exact samples whose divergence is averaged
BANDWIDTHS = (0.05, 0.2, 0.8)  # of the two-sample test's Gaussian kernels, in units of the data


class Grid(NamedTuple):
    """Nodes of a square grid.

    Attributes:
      axis: coordinates of the nodes along either axis.
      nodes: coordinates of every node; nodes[i, j] is (axis[i], axis[j]).
      area: area of a grid cell.
    """

    axis: Float[np.ndarray, "side"]
    nodes: Float[np.ndarray, "side side 2"]
    area: float


class Comparison(NamedTuple):
    """Learned and true density of one level, by quadrature.

    Attributes:
      log_p: learned log-density at the nodes, normalised [nats].
      log_q: true log-density at the nodes [nats].
      log_Z: log of the integral of exp(F) [nats].
      kl: KL(q ‖ p), the divergence of the learned density p from the true density q [nats].
      edge_mass: mass of p in the margin along the grid's edge, whose width is `EDGE`.
    """

    log_p: Float[np.ndarray, "side side"]
    log_q: Float[np.ndarray, "side side"]
    log_Z: float
    kl: float
    edge_mass: float


def square_grid(half_width: float = HALF_WIDTH, side: int = SIDE) -> Grid:
    """Returns the grid of side² nodes on [-half_width, half_width]²."""
    axis = np.linspace(-half_width, half_width, side)
    nodes = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1)
    return Grid(axis, nodes, float((axis[1] - axis[0]) ** 2))


def evaluate(
    F: Callable[[Any], LevelFn], params: Any, levels: Sequence[int], grid: Grid, mesh: Mesh
) -> Float[np.ndarray, "L side side"]:
    """Returns F at the nodes for each level t, computed in float32, as float64 [nats].

    Args:
      F: parameters -> log-density of the levels.
      params: any pytree.
      levels: levels to evaluate.
      grid: nodes.
      mesh: devices that share the nodes.
    """
    engine = Engine(mesh, BATCH)

    def program(shared, nodes):
        params, t = shared
        return F(params)(nodes, jnp.full(len(nodes), t))

    compiled = engine.compile(program)
    nodes = grid.nodes.reshape(-1, 2).astype(np.float32)
    values = [
        np.concatenate(list(engine.run(compiled, (params, t), engine.split(nodes))))
        for t in levels
    ]
    return np.asarray(values, np.float64).reshape(len(levels), *grid.nodes.shape[:2])


def log_integral(log_density: Float[np.ndarray, "side side"], grid: Grid) -> float:
    """Returns log of the integral of exp(log_density) [nats]."""
    largest = log_density.max()
    return float(largest + np.log(np.sum(np.exp(log_density - largest)) * grid.area))


def log_density_of_level_0(model: Model, grid: Grid) -> Float[np.ndarray, "side side"]:
    """Returns the normalised log-density of points x_0 of level 0, at the nodes [nats]."""
    a = float(model.method.schedule.y_scale(jnp.array(0)))
    (log_p,) = evaluate(
        lambda params: lambda x, t: model.method.F(params)(a * x, t),
        model.params,
        [0],
        grid,
        model.mesh,
    )
    return log_p - log_integral(log_p, grid)


def kl_divergence(
    log_q: Float[np.ndarray, "side side"], log_p: Float[np.ndarray, "side side"], grid: Grid
) -> float:
    """Returns KL(q ‖ p) of two normalised densities [nats]."""
    return float(np.sum(np.exp(log_q) * (log_q - log_p)) * grid.area)


def divergence_of_samples(
    rng: np.random.Generator,
    x: Float[np.ndarray, "n 2"],
    log_p: Float[np.ndarray, "side side"],
    grid: Grid,
) -> tuple[float, float]:
    """Returns KL(q ‖ p) over square cells, where q are the shares of n samples [nats].

    Its second result is the mean of the same for n exact samples, which are also scattered over
    the cells. A cell has CELL² nodes of the grid. Samples beyond all cells count for the next
    cell.

    Args:
      rng: random number generator of the exact samples.
      x: samples.
      log_p: normalised density [nats].
      grid: its grid.
    """
    cells = len(grid.axis) // CELL
    first = (len(grid.axis) - cells * CELL) // 2  # the cells are in the middle
    nodes = slice(first, first + cells * CELL)
    mass = np.exp(log_p)[nodes, nodes].reshape(cells, CELL, cells, CELL).sum(axis=(1, 3))
    p = np.maximum(mass / mass.sum(), np.finfo(float).tiny).ravel()
    spacing = grid.axis[1] - grid.axis[0]
    places = np.floor((x - grid.axis[first] + spacing / 2) / (CELL * spacing)).astype(int)
    flat = np.ravel_multi_index(tuple(places.T), (cells, cells), mode="clip")
    counts = np.bincount(flat, minlength=cells**2)
    exact = rng.multinomial(len(x), p / p.sum(), size=REPEATS)
    q = np.vstack([counts, exact]) / len(x)
    found, *others = np.sum(q * np.log(np.where(q > 0, q / p, 1.0)), axis=1).tolist()
    return found, float(np.mean(others))


def edge_mass(log_p: Float[np.ndarray, "side side"], grid: Grid) -> float:
    """Returns the mass of a normalised density in the margin along the grid's edge (`EDGE`)."""
    inside = (1 - EDGE) * grid.axis[-1]
    edge = np.abs(grid.nodes).max(axis=-1) > inside
    return float(np.sum(np.exp(log_p[edge])) * grid.area)


def compare(
    model: Model, exact: LevelFn, levels: Sequence[int], grid: Grid
) -> dict[int, Comparison]:
    """Compares a model's density with the true density at each of the levels.

    Args:
      model: model of points in the plane.
      exact: true, normalised log-density [nats].
      levels: levels to compare.
      grid: grid that contains both densities, and whose spacing resolves them.

    Returns:
      the comparison of each level.
    """
    learned = evaluate(model.method.F, model.params, levels, grid, model.mesh)
    true = evaluate(lambda _: exact, (), levels, grid, model.mesh)
    comparisons = {}
    for t, log_f, log_q in zip(levels, learned, true, strict=True):
        log_Z = log_integral(log_f, grid)
        log_p = log_f - log_Z
        comparisons[t] = Comparison(
            log_p=log_p,
            log_q=log_q,
            log_Z=log_Z,
            kl=kl_divergence(log_q, log_p, grid),
            edge_mass=edge_mass(log_p, grid),
        )
    return comparisons


def shown_levels(schedule: NoiseSchedule, n: int) -> list[int]:
    """Returns at most n levels for a figure, from level T - 1 down to level 0.

    With more than n levels, they are those closest to an even spacing of the square root of
    sigma_bar, which puts more of them at low noise.
    """
    if n >= schedule.T:
        return list(reversed(range(schedule.T)))
    roots = np.asarray(schedule.sigma_bar[:-1], np.float64) ** 0.5
    targets = np.linspace(roots[-1], roots[0], n)
    nearest = {int(np.abs(roots - root).argmin()) for root in targets}
    return sorted(nearest, reverse=True)
