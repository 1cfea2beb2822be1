"""The method as one value: network, noise levels, parameterisation and sampler."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, Shaped
from ml_collections import ConfigDict, FrozenConfigDict

from drl_jax import config as config_lib
from drl_jax import diffusion, noise, recovery, standardisation
from drl_jax.data import mixtures
from drl_jax.data.mixtures import Mixture
from drl_jax.diffusion import NoiseSchedule
from drl_jax.errors import UserError
from drl_jax.mcmc import hmc, langevin, mala
from drl_jax.networks import guidance, image_mlp, initialiser, mlp, resnet, unet
from drl_jax.networks.energy import (
    FORMS,
    Energy,
    Form,
    Params,
    Vectors,
    from_image_to_image,
    with_dtype,
)
from drl_jax.networks.image_mlp import ImageMLP
from drl_jax.networks.initialiser import Initialiser
from drl_jax.recovery import LevelFn, Parameterisation
from drl_jax.sampling import ladder
from drl_jax.sampling.ladder import STARTS, Conditionals, ProposeFn, Sampler

# Name among the parameters of the mixture that is fitted for `config.FITTED`. Training does not
# change it.
MIXTURE = "mixture"

# Values of config.mcmc.sampler that accept or reject, and whose step sizes are adapted.
METROPOLIS = ("mala", "hmc")

# Values of config.mcmc.denoise, and the factor of the step of Tweedie's formula.
DENOISE = {"no": 0.0, "tweedie": 1.0, "cdrl_program": 2.0}


class Method(NamedTuple):
    """An energy-based model without its parameters.

    Attributes:
      energy: network f.
      schedule: noise levels.
      parameterisation: how the log-density F is computed from f.
      sampler: Markov chain Monte Carlo kernel for the conditionals, with its settings.
      mcmc: the section `mcmc` of the configuration that describes the sampler.
      initialiser: predicts where chains end, so that they can start there; None: there is none.
    """

    energy: Energy
    schedule: NoiseSchedule
    parameterisation: Parameterisation
    sampler: Sampler
    mcmc: FrozenConfigDict = FrozenConfigDict(config_lib.default().mcmc)
    initialiser: Initialiser | None = None

    def f(
        self,
        params: Params,
        keys: Key[Array, "B"] | None = None,
        label: Int[Array, "B"] | None = None,
    ) -> LevelFn:
        """Returns the network f as a function of (x, t).

        Args:
          params: parameters of the network, spectrally normalised. They can contain a condition
            (`guidance.with_condition`).
          keys: one random key per example, for dropout in training; None: no dropout.
          label: the class of each example, instead of the condition's.
        """
        f = functools.partial(self.energy.f, params)
        if keys is not None:
            f = functools.partial(f, keys=keys)
        return guidance.conditioned(f, params, label)

    def F(
        self,
        params: Params,
        keys: Key[Array, "B"] | None = None,
        label: Int[Array, "B"] | None = None,
    ) -> LevelFn:
        """Returns the log-density of every level, up to a constant, as a function of (y, t).

        The arguments are those of `f`.
        """
        f = self.f(params, keys, label)
        if MIXTURE not in params:
            return recovery.log_density(f, self.parameterisation)
        mixture = Mixture(**jax.lax.stop_gradient(params[MIXTURE]))
        exact = mixtures.exact_F(mixture, self.schedule)
        tau = self.parameterisation.temperature
        correction = self.parameterisation.reference

        def reference(y, t):
            return exact(y.reshape(len(y), -1), t) + correction(y, t)

        parameterisation = Parameterisation(tau, reference)
        return recovery.log_density(recovery.limited(f, tau), parameterisation)

    def propose(
        self,
        params: Params,
        keys: Key[Array, "B"] | None = None,
        label: Int[Array, "B"] | None = None,
    ) -> ProposeFn | None:
        """Returns the initialiser's prediction g of y as a function of (x_tilde, t).

        The result is None without an initialiser. The arguments are those of `f`.
        """
        if self.initialiser is None:
            return None
        g = functools.partial(self.initialiser.g, params[initialiser.NAME])
        if keys is not None:
            g = functools.partial(g, keys=keys)
        return guidance.conditioned(g, params, label)

    def conditionals(
        self,
        params: Params,
        tuning: dict[str, Shaped[Array, "T"]] | None = None,
        label: Int[Array, "B"] | None = None,
    ) -> Conditionals:
        """Returns the conditionals of all levels.

        Args:
          params: parameters of the networks, as for `f`.
          tuning: settings of the kernel that replace those of `sampler`, if given.
          label: the class of each example, instead of the condition's.
        """
        sampler = self.sampler if tuning is None else self.sampler._replace(tuning=tuning)
        F, propose = self.F(params, label=label), self.propose(params, label=label)
        return Conditionals(F, self.schedule, sampler, propose)


def with_mixture(params: Params, mixture: Mixture) -> Params:
    """Returns the parameters with another mixture."""
    return {**params, MIXTURE: mixture._asdict()}


def from_config(config: ConfigDict) -> Method:
    """Builds the method that a configuration describes, with the sampler used in training.

    Raises:
      UserError: if the noise schedule does not support T, a network cannot halve the images
        often enough or has no such sizes for attention, the leapfrog steps are given for
        another number of levels, or chains start from an initialiser and there is none.
    """
    schedule = diffusion.schedule(
        config.diffusion.T, config.diffusion.schedule, config.diffusion.min_noise
    )
    energy = make_energy(config, schedule, config.energy.dtype)
    proposal = make_initialiser(config, schedule, config.energy.dtype)
    _require_start(config.mcmc, proposal)
    if config.energy.parameterisation == "step":
        s = recovery.step_sizes(schedule, config.mcmc.b_squared)
        parameterisation = Parameterisation(s**2, recovery.no_reference)
    elif config.energy.parameterisation == "unit":
        parameterisation = Parameterisation(jnp.ones(schedule.T), recovery.white_noise)
    else:
        half_width = 1 + config.data.dequantise / 2
        reference = {
            "noise": recovery.white_noise,
            "uniform": recovery.uniform_pixels(schedule, half_width),
            # `Method.F` adds the log-density of the fitted mixture.
            "gaussians": recovery.no_reference,
            "bounded_gaussians": recovery.bounded_pixels(schedule, half_width),
        }[config.energy.parameterisation]
        parameterisation = Parameterisation(_noise_of_data(config, schedule), reference)
    sampler = make_sampler(config.mcmc, schedule)
    mcmc = FrozenConfigDict(config.mcmc)
    return Method(energy, schedule, parameterisation, sampler, mcmc, proposal)


def _require_start(mcmc: ConfigDict, proposal: Initialiser | None) -> None:
    """Raises a UserError if chains start from an initialiser and there is none."""
    if mcmc.start == "initialiser" and proposal is None:
        raise UserError(
            "config.mcmc.start is 'initialiser', but this model has none: use 'x_tilde' or "
            "'posterior', or train with config.initialiser.network"
        )


def _noise_of_data(config: ConfigDict, schedule: NoiseSchedule) -> Float[Array, "T"]:
    """Returns the standard deviation of all noise in levels 0..T-1.

    Dequantised data contain uniform noise, of variance width² / 12.
    """
    width = config.data.dequantise / math.sqrt(12)
    return jnp.hypot(schedule.sigma_bar[:-1], schedule.a_bar[:-1] * width)


def for_generation(method: Method, config: ConfigDict) -> Method:
    """Returns the method as it is used after training.

    The sampler and its noise scale are those of `config.mcmc`, and the network multiplies in
    `config.evaluation.dtype`. The parameterisation stays the one of training.

    Raises:
      UserError: if the sampler cannot be used with this model.
    """
    energy = make_energy(config, method.schedule, config.evaluation.dtype)
    proposal = make_initialiser(config, method.schedule, config.evaluation.dtype)
    method = method._replace(energy=energy, initialiser=proposal)
    return _with_mcmc(with_levels(method, config.mcmc.levels), config.mcmc)


def with_levels(method: Method, T: int) -> Method:
    """Returns the method with T of its noise levels (`diffusion.thinned`).

    Each energy keeps its density: it depends on y = a_{t+1} x_t, and a step to the next level
    now has another a. The method has no initialiser, which predicts chains of single steps.

    Args:
      method: the method with all levels, not one from `marginals`.
      T: number of levels; 0 for all.

    Raises:
      UserError: if the method does not have T levels.
    """
    old = method.schedule
    if T in (0, old.T):
        return method
    schedule, chosen = diffusion.thinned(old, T)
    levels = jnp.asarray(chosen)
    scale = old.y_scale(levels) / schedule.y_scale(jnp.arange(T))
    f, (temperature, reference) = method.energy.f, method.parameterisation

    def rescaled(y, t):
        return noise.per_example(scale[t], y) * y

    return method._replace(
        energy=method.energy._replace(
            f=lambda params, y, t, *keys, **given: f(
                params, rescaled(y, t), levels[t], *keys, **given
            )
        ),
        schedule=schedule,
        parameterisation=Parameterisation(
            temperature[levels], lambda y, t: reference(rescaled(y, t), levels[t])
        ),
        initialiser=None,
    )


def with_sampler(method: Method, **settings: Any) -> Method:
    """Returns the method with other settings of its sampler, by their names in `config.mcmc`.

    Raises:
      UserError: if `config.validate` rejects the settings, the leapfrog steps are given for
        another number of levels, or as `with_levels` does.
    """
    config = config_lib.default()
    config.diffusion.T = method.schedule.T
    config.mcmc = ConfigDict({**method.mcmc, **settings})
    config_lib.validate(config)
    return _with_mcmc(with_levels(method, config.mcmc.levels), config.mcmc)


def with_exact_kernel(method: Method) -> Method:
    """Returns the method with an exact kernel: its own if it is one, or one step of MALA."""
    if method.mcmc.sampler in METROPOLIS:
        return method
    sampler = Sampler(mala.init, mala.kernel, {"step_size": jnp.ones(method.schedule.T)}, K=1)
    return method._replace(sampler=sampler)


def marginals(method: Method) -> Method:
    """Returns the method whose conditionals are the marginals of the levels, exp(F(y, t)) / Z.

    With infinite sigma_{t+1}, nothing ties y to x_tilde, where the chains start.
    """
    infinite = jnp.full_like(method.schedule.sigma, jnp.inf)
    schedule = dataclasses.replace(method.schedule, sigma=infinite)
    sampler = method.sampler._replace(start=ladder.start_at_x_tilde)
    mcmc = FrozenConfigDict({**method.mcmc, "start": "x_tilde"})
    return method._replace(schedule=schedule, sampler=sampler, mcmc=mcmc)


def _with_mcmc(method: Method, mcmc: ConfigDict) -> Method:
    """Returns the method with the sampler of `config.mcmc` and its noise scale.

    Raises:
      UserError: as `_require_start` and `make_sampler` do.
    """
    _require_start(mcmc, method.initialiser)
    sampler = make_sampler(mcmc, method.schedule, mcmc.noise_scale)
    return method._replace(sampler=sampler, mcmc=FrozenConfigDict(mcmc))


def make_energy(config: ConfigDict, schedule: NoiseSchedule, dtype: str) -> Energy:
    """Builds the network that `config.energy` describes.

    If there is an initialiser, its parameters are among those of the result.

    Args:
      config: configuration; `config.energy.dtype` is not used.
      schedule: noise levels.
      dtype: name of the dtype in which the network multiplies.

    Raises:
      UserError: if the network cannot halve the examples often enough, or has no such lengths
        for attention.
    """
    shape = config_lib.example_shape(config)
    size, channels, axes = config.data.image_size, config.data.channels, len(shape) - 1
    ch, mult, N = config.energy.ch, config.energy.mult, config.energy.N
    form = FORMS.get(config.energy.form) or _mixture(config, schedule)
    levels, classes = schedule.conditioning[:-1], config.data.classes
    outputs = 2 if config.energy.form == "mixture" else 1
    if config.energy.network == "mlp":
        energy = mlp.energy(channels, ch, N, config.diffusion.T, config.energy.dropout, classes)
    elif config.energy.network == "image_mlp":
        energy = image_mlp.energy(
            shape=shape,
            width=ch,
            depth=N,
            dropout=config.energy.dropout,
            form=form,
            levels=levels,
            outputs=outputs,
            classes=classes,
        )
    elif config.energy.network == "unet":
        network = make_unet(config, outputs)
        energy = from_image_to_image(network, shape, form, levels)
    elif config.energy.network == "cdrl_resnet":
        energy = resnet.cdrl_energy(size, channels, ch, mult, N, levels, classes, axes)
    else:
        energy = resnet.energy(size, channels, ch, mult, N, axes)
    if config.energy.parameterisation in config_lib.FITTED:
        energy = _with_entry(energy, MIXTURE, _white_mixture(energy, config.energy.components))
    if config.data.standardise:
        unfitted = standardisation.unfitted(channels)
        energy = _with_entry(energy, standardisation.NAME, unfitted._asdict())
    if proposal := make_initialiser(config, schedule, dtype):
        energy = initialiser.joined(energy, proposal)
    return with_dtype(jnp.bfloat16, energy) if dtype == "bfloat16" else energy


def make_unet(config: ConfigDict, outputs: int = 1) -> unet.UNet:
    """Builds the U-Net that `config.energy` describes, with this number of outputs.

    Raises:
      UserError: as `unet.network` does.
    """
    settings = config.energy
    return unet.network(
        config.data.image_size,
        settings.ch,
        settings.mult,
        settings.N,
        settings.attention,
        settings.dropout,
        patch=settings.patch,
        outputs=outputs,
        classes=config.data.classes,
    )


def make_initialiser(
    config: ConfigDict, schedule: NoiseSchedule, dtype: str
) -> Initialiser | None:
    """Builds the initialiser that `config.initialiser` describes; None if there is none.

    The arguments and errors are those of `make_energy`.
    """
    own, data = config.initialiser, config.data
    levels = schedule.conditioning[1:]
    if own.network == "none":
        return None
    if own.network == "mlp":
        network: nn.Module = ImageMLP(
            width=own.ch, depth=own.N, dropout=own.dropout, classes=data.classes
        )
    else:
        network = unet.network(
            data.image_size,
            own.ch,
            own.mult,
            own.N,
            own.attention,
            own.dropout,
            own.groups,
            classes=data.classes,
        )
    shape = config_lib.example_shape(config)
    return initialiser.from_network(network, shape, levels, jnp.dtype(dtype))


def _with_entry(energy: Energy, name: str, value: dict[str, ArrayLike]) -> Energy:
    """Returns the energy with another entry among its initial parameters."""

    def init(key: Key[Array, ""]) -> tuple[Params, Vectors]:
        params, vectors = energy.init(key)
        return params | {name: jax.tree.map(jnp.asarray, value)}, vectors

    return energy._replace(init=init)


def _white_mixture(energy: Energy, K: int) -> dict[str, ArrayLike]:
    """Returns a mixture that is not fitted yet: its K components are white noise."""
    D = math.prod(energy.shape)
    white = mixtures.mixture(np.full(K, 1 / K), np.zeros((K, D)), np.tile(np.eye(D), (K, 1, 1)))
    return white._asdict()


def _mixture(config: ConfigDict, schedule: NoiseSchedule) -> Form:
    """Returns the form of f with black pixels."""
    half_width = 1 + config.data.dequantise / 2
    return recovery.mixture(schedule, _noise_of_data(config, schedule), half_width)


def make_sampler(
    mcmc: ConfigDict, schedule: NoiseSchedule, noise_scale: float = 1.0
) -> Sampler:
    """Builds the sampler that `config.mcmc` describes.

    Args:
      mcmc: the section `mcmc` of a configuration.
      schedule: noise levels.
      noise_scale: factor of the noise of Langevin dynamics and of its starting points.

    Raises:
      UserError: if the leapfrog steps are given for another number of levels.
    """
    T = schedule.T
    tuning = {"step_size": recovery.step_sizes(schedule, mcmc.b_squared)}
    module: Any = langevin
    if mcmc.sampler == "mala":
        module = mala
    elif mcmc.sampler == "langevin":
        tuning["noise_scale"] = jnp.full((T,), noise_scale)
    elif len(mcmc.leapfrog) in (1, T):
        module, tuning["leapfrog"] = hmc, jnp.broadcast_to(jnp.asarray(mcmc.leapfrog), (T,))
    else:
        raise UserError(
            f"config.mcmc.leapfrog is {mcmc.leapfrog}: give one number for all levels, or "
            f"{T} numbers, one per level"
        )
    start = STARTS[mcmc.start]
    denoise = DENOISE[mcmc.denoise]
    return Sampler(module.init, module.kernel, tuning, mcmc.K, start, denoise)
