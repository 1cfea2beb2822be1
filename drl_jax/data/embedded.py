"""Tables and signals that come with packages, or are synthesised, by `config.data.name`.

- 'wine' and 'breast_cancer': tables of scikit-learn, with the kind of wine or tumour as labels.
- 'mnist1d': signals of length 40 that look like digits, synthesised by the package mnist1d
  (Greydanus 2020), with labels.
- 'heartbeats' and 'premature_beats': synthetic electrocardiograms of one beat (`beats`).
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float

from drl_jax.data.arrays import Arrays
from drl_jax.errors import not_installed

BEATS = 4000, 1000  # number of beats to train on, and to test with
LENGTH = 64  # of the signal of a beat
STEPS = 512  # at which the differential equation is solved, per beat

# The waves P, Q, R, S and T of a normal beat (McSharry et al. 2003, table I): the angle of each
# wave's centre [radians], its strength, and its width [radians].
ANGLE = np.array([-1 / 3, -1 / 12, 0, 1 / 12, 1 / 2]) * np.pi
STRENGTH = np.array([1.2, -5, 30, -7.5, 0.75])
WIDTH = np.array([0.25, 0.1, 0.1, 0.1, 0.4])

# Factors of strength and width for a premature beat: it has no P wave, a broad QRS complex and
# an inverted T wave. The numbers are our choice.
PREMATURE_STRENGTH = np.array([0, 0.3, 0.3, 0.6, -2])
PREMATURE_WIDTH = np.array([1, 2, 2.5, 2, 1])

SPREAD = 0.1  # standard deviation of the logarithms of strength, width and period
SHIFT = 0.03  # standard deviation of the angles [radians]
RESPIRATION = 0.15  # amplitude of the baseline's movement with the breath [mV]
BREATHS = 0.25  # frequency of the breath [Hz]
NOISE = 0.02  # standard deviation of the noise of the electrodes [mV]
RANGE = -0.4, 1.2  # of a normal beat without noise and breath [mV]


@functools.cache
def table(load: str) -> Arrays:
    """Returns a table of scikit-learn, given the name of its function in sklearn.datasets."""
    from sklearn import datasets  # imported here because it takes a second

    found: Any = getattr(datasets, load)()
    names = [str(name) for name in found.feature_names]
    return Arrays(found.data.astype(np.float32), found.target, columns=names)


@functools.cache
def mnist1d() -> Arrays:
    """Returns the 4,000 and 1,000 signals of MNIST-1D's default settings, [40, 1].

    Raises:
      UserError: if the package is not installed.
    """
    try:
        from mnist1d import data
    except ImportError as error:
        raise not_installed("config.data.name 'mnist1d'", "mnist1d") from error
    state = np.random.get_state()
    found = data.make_dataset()  # which seeds the global random generator of NumPy
    np.random.set_state(state)
    x, x_test = (found[name].astype(np.float32)[..., None] for name in ("x", "x_test"))
    return Arrays(x, found["y"], x_test, found["y_test"])


@functools.cache
def heartbeats(premature: bool = False) -> Arrays:
    """Returns synthetic beats to train on and to test with, each [64, 1], in mV.

    Args:
      premature: whether the beats are premature ones, instead of normal ones.
    """
    rng = np.random.default_rng(int(premature))
    x, x_test = (beats(rng, n, premature) for n in BEATS)
    return Arrays(x, x_test=x_test)


def beats(rng: np.random.Generator, n: int, premature: bool) -> Float[np.ndarray, "n 64 1"]:
    """Synthesises electrocardiograms of one beat (McSharry et al. 2003, eq. 1) [mV].

        dz/dt = -Σ_i a_i Δ_i exp(-Δ_i² / (2 b_i²)) - (z - z_0),   Δ_i = θ - θ_i mod 2π

    The angle θ goes from -π to π in one period. The equation is linear in z and its input
    periodic, so the periodic solution follows from the Fourier series of the input. Strengths
    a_i, widths b_i, angles θ_i and the period vary from beat to beat. The baseline z_0 moves
    with the breath.

    Args:
      rng: random generator.
      n: number of beats.
      premature: whether the beats are premature ones.
    """
    strength = STRENGTH * PREMATURE_STRENGTH if premature else STRENGTH
    width = WIDTH * PREMATURE_WIDTH if premature else WIDTH
    period = np.exp(SPREAD * rng.normal(size=(n, 1)))  # about one second
    a = strength * np.exp(SPREAD * rng.normal(size=(n, 5)))
    b = width * np.exp(SPREAD * rng.normal(size=(n, 5)))
    centre = ANGLE + SHIFT * rng.normal(size=(n, 5))
    z = _solution(a, b, centre, period)
    low, high = _normal_range()
    z = RANGE[0] + (RANGE[1] - RANGE[0]) * (z - low) / (high - low)
    time = period * np.arange(LENGTH) / LENGTH
    phase = rng.uniform(0, 2 * np.pi, (n, 1))
    breath = RESPIRATION * np.sin(2 * np.pi * BREATHS * time + phase)
    return (z + breath + NOISE * rng.normal(size=z.shape)).astype(np.float32)[..., None]


@functools.cache
def _normal_range() -> tuple[float, float]:
    """Returns the extremes of the solution for a normal beat of average shape."""
    z = _solution(STRENGTH[None], WIDTH[None], ANGLE[None], np.ones((1, 1)))
    return float(z.min()), float(z.max())


def _solution(
    a: Float[np.ndarray, "n 5"],
    b: Float[np.ndarray, "n 5"],
    centre: Float[np.ndarray, "n 5"],
    period: Float[np.ndarray, "n 1"],
) -> Float[np.ndarray, "n 64"]:
    """Returns the periodic solution of `beats` for z_0 = 0, at equally spaced times."""
    angle = 2 * np.pi * np.arange(STEPS) / STEPS - np.pi
    delta = (angle - centre[..., None] + np.pi) % (2 * np.pi) - np.pi
    b = b[..., None]
    force = -np.sum(a[..., None] * delta * np.exp(-((delta / b) ** 2) / 2), axis=1)
    frequency = 2j * np.pi * np.arange(STEPS // 2 + 1) / period
    z = np.fft.irfft(np.fft.rfft(force) / (1 + frequency), STEPS)
    return z[:, :: STEPS // LENGTH]


DATA: dict[str, Callable[[], Arrays]] = {
    "wine": functools.partial(table, "load_wine"),
    "breast_cancer": functools.partial(table, "load_breast_cancer"),
    "mnist1d": mnist1d,
    "heartbeats": heartbeats,
    "premature_beats": functools.partial(heartbeats, premature=True),
}
