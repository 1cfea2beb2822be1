"""Labels and classifier-free guidance: f and g for the class of each example.

Guidance with weight w makes samples more typical of their class (Ho and Salimans 2022; for
energies, Zhu et al. 2024):

    f_w(x, t, label) = (1 + w) f(x, t, label) - w f(x, t, none)

and likewise for g. Label 0 is none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from drl_jax.networks.energy import Params

NAME = "condition"  # of the condition among the parameters of a model


class Condition(NamedTuple):
    """What samples are conditioned on.

    Attributes:
      label: the class of each example, in 1..classes, or 0 for none; or one for all examples.
      guidance: the weight w; None: 0, with which f(x, t, none) need not be evaluated.
    """

    label: Int[Array, "B"] | Int[Array, ""]
    guidance: Float[Array, ""] | None = None


def with_condition(params: Params, condition: Condition) -> Params:
    """Returns the parameters with another condition, which `conditioned` applies."""
    return {**params, NAME: condition}


def with_labels(params: Params, labels: Int[Array, "B"]) -> Params:
    """Returns the parameters with a label for each example, and their guidance unchanged."""
    condition = params.get(NAME, Condition(labels))
    return with_condition(params, condition._replace(label=labels))


def conditioned(
    network: Callable[..., Float[Array, "B *D"]],
    params: Params,
    label: Int[Array, "B"] | None = None,
) -> Callable[..., Float[Array, "B *D"]]:
    """Returns f or g as a function of (x [B, ...], t [B]) alone.

    Args:
      network: f or g with its parameters, which takes (x, t), and a `label` by keyword.
      params: parameters of the model, which can contain a condition.
      label: the class of each example, which replaces the condition with its guidance.
    """
    condition: Any = params.get(NAME)
    if label is not None:
        condition = Condition(label)
    if condition is None:
        return network

    def conditional(x, t):
        of_label = network(x, t, label=jnp.broadcast_to(condition.label, t.shape))
        if condition.guidance is None:
            return of_label
        return of_label + condition.guidance * (of_label - network(x, t))

    return conditional
