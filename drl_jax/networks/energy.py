"""A network f(x, t) as pure functions of its parameters.

f is the *negative* energy: higher means more probable. `recovery` turns it into a log-density
F.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Key

from drl_jax.errors import UserError
from drl_jax.networks import spectral

Params = dict[str, Any]  # nested by flax module; the leaves are arrays
Vectors = dict[str, Float[Array, "_"]]  # of the power iterations, by the path of their kernel


class Energy(NamedTuple):
    """A network, separate from its parameters.

    Attributes:
      init: key -> (params, vectors): raw parameters, and the vectors of the power iterations.
      normalise: (params, vectors) -> (params, vectors): applies spectral normalisation, once
        per training step, to raw parameters.
      f: (params, x [B, ...], t [B], keys [B] or None, label [B] or None) -> [B]: evaluates the
        network with normalised parameters. Training passes one random key per example, for
        dropout; without keys there is no dropout. A label is a class in 1..classes, or 0 for
        none; None is 0 for all. f raises a UserError if there are labels but the network has
        no classes. `keys` and `label` are keywords that can be left out.
      shape: shape of one example.
      name: name of the network.
      classes: number of classes of the labels; 0 if there are none.
    """

    init: Callable[[Key[Array, ""]], tuple[Params, Vectors]]
    normalise: Callable[[Params, Vectors], tuple[Params, Vectors]]
    f: Callable[..., Float[Array, "B"]]
    shape: tuple[int, ...]
    name: str = "custom"
    classes: int = 0


# (x [B, ...], U(x, t), t [B]) -> f [B]
Form = Callable[
    [Float[Array, "B *D"], Float[Array, "B *U"], Int[Array, "B"]], Float[Array, "B"]
]


def inner_product(
    x: Float[Array, "B *D"], u: Float[Array, "B *D"], t: Int[Array, "B"]
) -> Float[Array, "B"]:
    """Returns <x, U>."""
    del t
    return jnp.sum(x * u, axis=range(1, x.ndim))


def squared_distance(
    x: Float[Array, "B *D"], u: Float[Array, "B *D"], t: Int[Array, "B"]
) -> Float[Array, "B"]:
    """Returns (|x|² - |x - U|²) / 2 = <x, U> - |U|² / 2.

    This is -|x - U|² / 2, except that the log-density's quadratic term is left to its reference
    (`recovery.Parameterisation`).
    """
    del t
    return jnp.sum((x - u / 2) * u, axis=range(1, x.ndim))


# Values of config.energy.form. `recovery.mixture` is another one, which depends on the levels.
FORMS: dict[str, Form] = {
    "inner_product": inner_product,
    "squared_distance": squared_distance,
}


def from_network(
    network: nn.Module,
    shape: tuple[int, ...],
    rule: spectral.Rule,
    levels: Float[Array, "T"] | None = None,
) -> Energy:
    """Returns the energy of a flax module.

    Args:
      network: maps (x [B, ...], t [B]) to [B]. If it has classes, it takes a `label` [B], and
        if it has dropout, `keys` [B] or None.
      shape: shape of one example x.
      rule: which kernels are spectrally normalised, and how.
      levels: input of the network for each level t in 0..T-1; None passes t itself.
    """

    def init(key):
        params_key, vectors_key = jax.random.split(key)
        x, t = jnp.zeros((1, *shape)), jnp.zeros((1,), jnp.int32)
        if levels is not None:
            t = levels[:1]
        params = network.init(params_key, x, t)["params"]
        return params, spectral.init_vectors(vectors_key, params, rule)

    def normalise(params, vectors):
        return spectral.normalise(params, vectors, rule)

    def f(params, x, t, keys=None, label=None):
        if levels is not None:
            t = level_input(levels, t, x)
        more = label_argument(network, label)
        if getattr(network, "dropout", 0.0):
            more["keys"] = keys
        return network.apply({"params": params}, x, t, **more)

    classes = getattr(network, "classes", 0)
    return Energy(init, normalise, f, shape, type(network).__name__, classes)


def from_image_to_image(
    network: nn.Module, shape: tuple[int, ...], form: Form, levels: Float[Array, "T"]
) -> Energy:
    """Returns the energy of a network U that maps examples to arrays of their shape.

    f is a function of x and U(x, t), and its gradient is that of the whole expression, through
    U. So the model stays an energy, unlike a denoiser (Salimans and Ho 2021; Du et al. 2023).
    There is no spectral normalisation.

    Args:
      network: maps (x [B, ...], level [B], keys [B] or None) to U, in the dtype in which f is
        summed; if it has classes, it takes a label [B] too.
      shape: shape of one example x.
      form: how f follows from x and U.
      levels: input of the network for each level t in 0..T-1.
    """

    def init(key):
        x = jnp.zeros((1, *shape))
        return network.init(key, x, levels[:1])["params"], {}

    def normalise(params, vectors):
        return params, vectors

    def f(params, x, t, keys=None, label=None):
        level, labels = level_input(levels, t, x), label_argument(network, label)
        u: Any = network.apply({"params": params}, x, level, keys, **labels)
        return form(x, u, t)

    classes = getattr(network, "classes", 0)
    return Energy(init, normalise, f, shape, type(network).__name__, classes)


def level_input(
    levels: Float[Array, "T"], t: Int[Array, "B"], x: Float[Array, "B *D"]
) -> Float[Array, "B"]:
    """Returns the network's input for levels t, in the more precise of both dtypes."""
    return levels[t].astype(jnp.promote_types(levels.dtype, x.dtype))


def label_argument(network: nn.Module, label: Int[Array, "B"] | None) -> dict[str, Any]:
    """Returns the keyword argument that passes labels to a network; none if label is None.

    Raises:
      UserError: if there are labels but the network has no classes.
    """
    require_classes(network, label)
    return {} if label is None else {"label": label}


def require_classes(network: nn.Module, label: Int[Array, "B"] | None) -> None:
    """Checks that labels are only given to a network that has classes.

    Raises:
      UserError: if there are labels but the network has no classes.
    """
    if label is not None and not getattr(network, "classes", 0):
        raise UserError(
            f"labels are given to a {type(network).__name__} without classes: give no labels, "
            "or a network that was trained with classes"
        )


def with_dtype(dtype: DTypeLike, energy: Energy) -> Energy:
    """Returns the energy with f computed in `dtype`.

    f casts x to `dtype` and its result back to x's dtype, so that the gradient in x, the
    log-density F, the chains and their noise keep x's dtype. Parameters and their gradients
    keep theirs: a network multiplies in the dtype of its images and accumulates in that of its
    parameters.
    """

    def f(params, x, t, keys=None, label=None):
        labels = {} if label is None else {"label": label}
        return energy.f(params, x.astype(dtype), t, keys, **labels).astype(x.dtype)

    return energy._replace(f=f)
