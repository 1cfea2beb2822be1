"""Combinations of models: products, mixtures and powers of their densities.

    product:  F(y, t) = Σ_i w_i F_i(y, t)
    mixture:  F(y, t) = log Σ_i exp(c_i[t] + F_i(y, t)),   c_i[t] = log w_i - log Z_i[t]

where Z_i[t] is the integral of exp(F_i(y, t)) over y. A negative weight w_i makes probable
what model i finds improbable; one model with the weight 1 / temperature is a tempered model
(Hinton 2002; Du, Li, Mordatch 2020).

The levels of a product are not those of one diffused density: the sum of the log-densities of
noisy data is not the log-density of the noisy product. So a draw from the conditional
p(y | x_{t+1}), even an exact one, does not lead from level t + 1 of a product to level t, and
`Model.sample` does not sample the product. Chains on the marginals do (Du et al. 2023): with
enough steps of MALA or HMC, each level is exact, whatever the chains start from. The levels
above only bring the chains to all of its modes.

    model = (a + b).with_sampler("mala", K=20).marginals()
    model, adapted = model.adapt(key)
    x = model.sample(key, 100)  # level 0 of the product

Level 0 of a product contains the noise of level 0 of its models. It is not a noisy version of
one density, so samples are not denoised (`config.mcmc.denoise`) at the end. With negative
weights, exp(F) need not have a finite integral; chains on the marginals may then diverge.

The levels of a mixture are those of the diffused mixture, exactly so if every log Z_i[t] is
known. Energies are known only up to one constant per level. Without log Z, the mixture has the
weights w_i Z_i[t], which differ between levels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Shaped
from ml_collections import FrozenConfigDict

from drl_jax import recovery
from drl_jax.errors import UserError
from drl_jax.method import Method
from drl_jax.networks.energy import Energy, Params
from drl_jax.recovery import Parameterisation
from drl_jax.sampling import ladder

Numbers = Shaped[ArrayLike, "..."] | Sequence[Any]  # an array, or nested sequences

# (coefficients, F_i [n, B], t [B]) -> F [B]
Rule = Callable[[Any, Float[Array, "n B"], Int[Array, "B"]], Float[Array, "B"]]


def product(
    weights: Float[Array, "n"], F: Float[Array, "n B"], t: Int[Array, "B"]
) -> Float[Array, "B"]:
    """Returns Σ_i w_i F_i."""
    del t
    return jnp.sum(weights[:, None] * F, axis=0)


def mixture(
    offsets: Float[Array, "n T"], F: Float[Array, "n B"], t: Int[Array, "B"]
) -> Float[Array, "B"]:
    """Returns log Σ_i exp(c_i[t] + F_i)."""
    return jax.nn.logsumexp(offsets[:, t] + F, axis=0)


def method(rule: Rule, methods: Sequence[Method]) -> Method:
    """Returns the method whose F combines those of other methods; its parameters are `params`.

    Sampler and noise levels are those of the first method. Where its chains start from an
    initialiser, they start from the posterior instead. A product does not denoise its samples.
    The result has no classes.

    Args:
      rule: `product` or `mixture`.
      methods: one or more methods.

    Raises:
      UserError: if their shapes or noise levels differ.
    """
    first, *others = methods
    for other in others:
        _require_alike(first, other)

    def f(params, y, t, keys=None):
        parts = zip(methods, params["parts"], strict=True)
        values = jnp.stack([method.F(part, keys)(y, t) for method, part in parts])
        return rule(params["coefficients"], values, t)

    def init(key):
        raise UserError("a combination of models cannot be trained: train each model")

    names = ", ".join(method.energy.name for method in methods)
    energy = Energy(
        init=init,
        normalise=lambda params, vectors: (params, vectors),
        f=f,
        shape=first.energy.shape,
        name=f"{rule.__name__}({names})",
    )
    one = Parameterisation(jnp.ones(first.schedule.T), recovery.no_reference)
    sampler, mcmc = first.sampler, first.mcmc
    if sampler.start is ladder.start_from_initialiser:
        sampler = sampler._replace(start=ladder.start_from_posterior)
        mcmc = FrozenConfigDict({**mcmc, "start": "posterior"})
    if rule is product:
        sampler = sampler._replace(denoise=0.0)
        mcmc = FrozenConfigDict({**mcmc, "denoise": "no"})
    return Method(energy, first.schedule, one, sampler, mcmc)


def params(parts: Sequence[Params], coefficients: Float[Array, "n *T"]) -> Params:
    """Returns the parameters of a combination.

    Args:
      parts: the parameters of each model, with its condition, if it has one.
      coefficients: weights of a `product`, or offsets of a `mixture`.
    """
    return {"parts": tuple(parts), "coefficients": coefficients}


def weights(given: Numbers | None, n: int) -> Float[Array, "n"]:
    """Returns the weights of a product of n models; None: all are 1.

    Raises:
      UserError: if n is 0, there are not n of them, or one is not finite.
    """
    return jnp.asarray(_weights(given, n))


def offsets(
    given: Numbers | None,
    log_Z: Numbers | None,
    n: int,
    T: int,
) -> Float[Array, "n T"]:
    """Returns c_i[t] = log w_i - log Z_i[t] of a mixture of n models.

    Args:
      given: w_i, positive; they are divided by their sum. None: they are equal.
      log_Z: log Z_i[t] at levels t in 0..T-1 [nats]; None: zeros.
      n: number of models.
      T: number of levels.

    Raises:
      UserError: if n is 0, there are not n weights, one is not positive and finite, or log_Z
        does not have the shape [n, T] or is not finite.
    """
    w = _weights(given, n)
    if not np.all(w > 0):
        raise UserError(f"the weights of a mixture are {w.tolist()}: give positive numbers")
    log_Z = np.zeros((n, T)) if log_Z is None else np.asarray(log_Z, np.float64)
    if log_Z.shape != (n, T):
        raise UserError(
            f"log_Z has shape {log_Z.shape}: give {(n, T)}, one number per model and level"
        )
    if not np.all(np.isfinite(log_Z)):
        raise UserError("log_Z contains infinite numbers or NaN: give finite numbers")
    return jnp.asarray(np.log(w / np.sum(w))[:, None] - log_Z, jnp.float32)


def _weights(given: Numbers | None, n: int) -> Float[np.ndarray, "n"]:
    """Returns n weights, by default ones.

    Raises:
      UserError: if n is 0, there are not n of them, or one is not finite.
    """
    if not n:
        raise UserError("there are no models to combine: give one or more")
    found = np.ones(n, np.float32) if given is None else np.asarray(given, np.float32)
    if found.shape != (n,):
        raise UserError(f"the weights have shape {found.shape}: give {n}, one per model")
    if not np.all(np.isfinite(found)):
        raise UserError(f"the weights are {found.tolist()}: give finite numbers")
    return found


def _require_alike(first: Method, other: Method) -> None:
    """Checks that two methods have the same shape of examples and the same noise levels.

    Raises:
      UserError: with both shapes, numbers of levels, or noise of the level that differs.
    """
    shapes = first.energy.shape, other.energy.shape
    if shapes[0] != shapes[1]:
        raise UserError(
            f"models of examples of shape {shapes[0]} and {shapes[1]} cannot be combined: "
            "give models of one shape"
        )
    levels = first.schedule.T, other.schedule.T
    if levels[0] != levels[1]:
        raise UserError(
            f"models with {levels[0]} and {levels[1]} levels cannot be combined: give models "
            "with the same config.diffusion"
        )
    differs = np.zeros(levels[0] + 1, bool)
    for mine, theirs in zip(
        jax.tree.leaves(first.schedule), jax.tree.leaves(other.schedule), strict=True
    ):
        differs |= np.asarray(mine) != np.asarray(theirs)
    if differs.any():
        raise UserError(
            f"models whose noise differs at level {np.argmax(differs)} cannot be combined: "
            "give models with the same config.diffusion, and `marginals` of all or none"
        )
