"""A trained model: evaluates log-densities and draws samples. Images are in [-1, 1]."""

import dataclasses
import functools
import logging
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int, Shaped

from drl_jax import compose, noise
from drl_jax import method as method_lib
from drl_jax import standardisation as standardisation_lib
from drl_jax.errors import UserError
from drl_jax.method import Method
from drl_jax.networks import guidance as guidance_lib
from drl_jax.networks.energy import Params
from drl_jax.networks.guidance import Condition
from drl_jax.noise import AnyKey
from drl_jax.runtime import sharding
from drl_jax.runtime.batching import Engine
from drl_jax.runtime.matmul_precision import full_precision
from drl_jax.sampling import annealing, inpainting, interpolation, ladder, masks
from drl_jax.sampling import chains as chains_lib
from drl_jax.sampling import smc as smc_lib
from drl_jax.sampling.chains import Chains, LabelFn, Observation
from drl_jax.sampling.ladder import Adapted
from drl_jax.sampling.smc import LogLikelihood, Posterior
from drl_jax.standardisation import Standardisation, with_standardisation

log = logging.getLogger(__name__)

PIXEL_TOLERANCE = 1e-5  # by which pixels may lie outside [-1, 1], as resizing can cause
MAX_CORRELATION = 0.5  # of the start and the end of a chain, without a warning

_sample_strips = jax.jit(interpolation.sample_strips, static_argnames="frames")
_image_strips = jax.jit(interpolation.image_strips, static_argnames="frames")


class Programs(NamedTuple):
    """The compiled programs of a model, shared by all models derived from it.

    Attributes:
      f: (params, x, t, label) -> f(x, t, label).
      F: (params, x, t, label) -> F(x, t, label).
      propose: (params, x_tilde, t, label) -> the initialiser's prediction, if there is one.
      classify: (params, x, t, log_prior) -> log p(label | x).
      generate, descend, complete, inpaint, start_chains, advance_chains, smc: the functions of
        `sampling`, compiled by `Model.compile`.
    """

    f: Callable
    F: Callable
    propose: Callable
    classify: Callable
    generate: Callable
    descend: Callable
    complete: Callable
    inpaint: Callable
    start_chains: Callable
    advance_chains: Callable
    smc: Callable


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A network with its parameters, on the devices of a mesh. Immutable.

    Use `Model.create`, `drl_jax.load` or `storage.runs.load` to make one. Its methods take the
    keys of `jax.random.key` and of `jax.random.PRNGKey`.

    If the data are standardised, the methods take and return examples in the units of the data:
    x_t in these units is mean + std x_t. Only `descend` and `long_run`, which go from one noise
    level to another, are in the units of the levels, those of `standardisation.apply(x)`.

    Attributes:
      method: network, noise levels and sampler.
      params: normalised parameters, and the condition of `given`, if there is one.
      engine: runs programs in batches on the devices.
      programs: compiled programs, none of which depends on the values of the parameters or
        of the sampler's tuning.
      labelled: whether `long_run` records labels (`with_labels`).
    """

    method: Method
    params: Params
    engine: Engine
    programs: Programs
    labelled: bool = False

    @classmethod
    def create(
        cls, method: Method, params: Params, mesh: Mesh, batch_size: int = 256
    ) -> "Model":
        """Returns the model of a method with these parameters.

        Args:
          method: network, noise levels and sampler.
          params: normalised parameters.
          mesh: devices that share each batch.
          batch_size: largest number of chains to run at once, rounded up to a multiple of the
            number of devices.
        """
        engine = Engine(mesh, batch_size)
        propose: Any = method.propose  # returns None without an initialiser

        def classify(params, x, t, log_prior):
            F = functools.partial(method.F, params)
            labels = 1 + jnp.arange(method.energy.classes)
            values = jax.lax.map(lambda label: F(label=jnp.full(len(x), label))(x, t), labels)
            return jax.nn.log_softmax(values.T + log_prior, axis=1)

        programs = Programs(
            f=jax.jit(
                full_precision(
                    lambda params, x, t, label=None: method.f(params, label=label)(x, t)
                )
            ),
            F=jax.jit(
                full_precision(
                    lambda params, x, t, label=None: method.F(params, label=label)(x, t)
                )
            ),
            propose=jax.jit(
                full_precision(
                    lambda params, x, t, label=None: propose(params, label=label)(x, t)
                )
            ),
            classify=jax.jit(full_precision(classify)),
            generate=_compile(
                engine,
                method,
                lambda keys, conditionals: ladder.generate(
                    keys, conditionals, method.energy.shape
                ),
            ),
            descend=_compile(engine, method, ladder.descend),
            complete=_compile(engine, method, ladder.complete),
            inpaint=_compile(engine, method, inpainting.inpaint),
            start_chains=_compile(engine, method, chains_lib.start),
            advance_chains=_compile(engine, method, chains_lib.advance),
            smc=_compile(
                engine,
                method_lib.with_exact_kernel(method),
                functools.partial(_descend_particles, shape=method.energy.shape),
            ),
        )
        return cls(method, params, engine, programs)

    @classmethod
    def product(
        cls, models: Sequence["Model"], weights: compose.Numbers | None = None
    ) -> "Model":
        """Returns the model with F(y, t) = Σ_i w_i F_i(y, t).

        `a + b`, `a - b`, `2 * a` and `-a` are short for products. Models can be those of a
        class (`given`). Samples are those of the product only if chains with an exact sampler
        run on the `marginals` of its levels: `compose` explains why, and how.

        Other weights, parameters and classes need no new compilation. To change those of a
        model with another sampler, pass it the parameters of a product of the same models:
        `model.with_params(Model.product([a, b], [1, 2]).params)`.

        Args:
          models: one or more models of equal shape, noise levels and devices. The sampler and
            the batch size are those of the first one, except that chains which start from an
            initialiser start from the posterior instead, and samples are not denoised.
          weights: w_i, also negative; None: ones.

        Raises:
          UserError: if there are no models, their shapes, noise levels or devices differ, or
            there is not one finite weight per model.
        """
        return _combined(compose.product, models, compose.weights(weights, len(models)))

    @classmethod
    def mixture(
        cls,
        models: Sequence["Model"],
        weights: compose.Numbers | None = None,
        log_Z: compose.Numbers | None = None,
    ) -> "Model":
        """Returns the model with F(y, t) = log Σ_i exp(log w_i - log Z_i[t] + F_i(y, t)).

        F_i is known only up to a constant per level. The shares of the models in the samples
        are the weights only if `log_Z` is given. As for `product`, other weights and log Z need
        no new compilation.

        Args:
          models: as for `product`, but samples are denoised if those of the first model are.
          weights: w_i, positive, of which only the ratios matter; None: equal.
          log_Z: log Z_i[t], logarithm of the integral of exp(F_i(y, t)), of shape [n, T]
            [nats]; None: zeros. For level 0, `metrics.density.log_partition` estimates it.

        Raises:
          UserError: as for `product`, or if a weight is not positive, or `log_Z` does not have
            this shape or is not finite.
        """
        T = models[0].T if models else 0
        offsets = compose.offsets(weights, log_Z, len(models), T)
        return _combined(compose.mixture, models, offsets)

    def tempered(self, temperature: float) -> "Model":
        """Returns the model with F(y, t) / temperature, as a `product`.

        Raises:
          UserError: if the temperature is not positive and finite.
        """
        if not (math.isfinite(temperature) and temperature > 0):
            raise UserError(f"the temperature is {temperature}: give a positive number")
        return (1 / temperature) * self

    def __add__(self, other: "Model") -> "Model":
        """Returns the `product` of both."""
        if not isinstance(other, Model):
            return NotImplemented
        return Model.product((self, other))

    def __sub__(self, other: "Model") -> "Model":
        """Returns the `product` with the weights 1 and -1."""
        if not isinstance(other, Model):
            return NotImplemented
        return Model.product((self, other), (1, -1))

    def __mul__(self, weight: float) -> "Model":
        """Returns the `product` of this model alone, with a weight."""
        return Model.product((self,), (weight,))

    __rmul__ = __mul__

    def __neg__(self) -> "Model":
        """Returns the `product` of this model alone, with the weight -1."""
        return -1 * self

    def __repr__(self) -> str:
        trained = {k: v for k, v in self.params.items() if k != guidance_lib.NAME}
        number = sum(leaf.size for leaf in jax.tree.leaves(trained))
        sampler = self.method.sampler
        parts = ["one draw per level"] * (sampler.start is not ladder.start_at_x_tilde)
        if sampler.K:
            parts.append(f"{sampler.kernel.__module__.rpartition('.')[2]} (K={sampler.K})")
        return (
            f"Model(shape={self.shape}, levels={self.T}, network={self.method.energy.name}, "
            f"parameters={number:,},\n"
            f"      sampler={', then '.join(parts)}, devices={self.mesh.size})"
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example: [D] (vector), [L, C] (signal), [H, W, C] (image), ..."""
        return self.method.energy.shape

    @property
    def classes(self) -> int:
        """Number of classes of the labels; 0 if the model takes none."""
        return self.method.energy.classes

    @property
    def T(self) -> int:
        """Number of energies; the noise levels are 0..T."""
        return self.method.schedule.T

    @property
    def mesh(self) -> Mesh:
        """Devices that share each batch."""
        return self.engine.mesh

    @property
    def step_size(self) -> Float[np.ndarray, "T"]:
        """Step size of the sampler at every level t in 0..T-1."""
        return np.asarray(self.method.sampler.tuning["step_size"])

    @property
    def standardisation(self) -> Standardisation:
        """Turns data into the units of the noise levels, and back."""
        return standardisation_lib.of(self.params)

    def with_params(self, params: Params) -> "Model":
        """Returns a model with other (normalised) parameters. Nothing is compiled again."""
        return dataclasses.replace(self, params=params)

    def given(self, label: Shaped[ArrayLike, "..."], guidance: float = 0.0) -> "Model":
        """Returns the model of a class: the density p(x | label), and its samples.

        All methods of the result use this label and this weight, unless they are given another
        label, which replaces both. `classify` uses neither. Other labels and weights need no
        new compilation.

        Args:
          label: a class in 1..classes, or 0 for none.
          guidance: weight w of classifier-free guidance (`networks.guidance`); 0: none. With
            w > 0, samples are more typical of their class than those of p(x | label).

        Raises:
          UserError: if the model has no classes, the label does not exist, the weight is not
            finite, or there is a weight but no label.
        """
        if np.ndim(label):
            raise UserError(f"the label is {np.asarray(label).tolist()}: give one label")
        (checked,) = self._labels(np.reshape(label, (1,)), 1)
        condition = Condition(checked, _weight(guidance, bool(checked)))
        return self.with_params(guidance_lib.with_condition(self.params, condition))

    def with_step_size(self, step_size: Float[ArrayLike, "T"]) -> "Model":
        """Returns a model with other step sizes. Nothing is compiled again.

        Raises:
          UserError: if there is not one per level.
        """
        sampler, step_size = self.method.sampler, jnp.asarray(step_size)
        if step_size.shape != (self.T,):
            raise UserError(
                f"the step sizes have shape {step_size.shape}: give {self.T}, one per level"
            )
        tuning = sampler.tuning | {"step_size": step_size}
        method = self.method._replace(sampler=sampler._replace(tuning=tuning))
        return dataclasses.replace(self, method=method)

    def f(
        self,
        x: Float[ArrayLike, "B *D"],
        t: Int[ArrayLike, "B"],
        label: Int[ArrayLike, "B"] | None = None,
    ) -> Float[Array, "B"]:
        """Returns the network's output at levels t in 0..T-1, for labels in 0..classes.

        Label 0 stands for none; None gives all the label of `given`, or none. While JAX traces
        a function, as in `jax.jit`, the values of traced levels and labels are unknown. They
        are not checked then, and one that does not exist gives a wrong result.

        Raises:
          UserError: if the arrays do not fit the model or each other, x are integers, such as
            8-bit images, a level is not in 0..T-1, or a label is not in 0..classes.
        """
        return self._evaluate(self.programs.f, x, t, label)

    def log_density(
        self,
        x: Float[ArrayLike, "B *D"],
        t: Int[ArrayLike, "B"],
        label: Int[ArrayLike, "B"] | None = None,
    ) -> Float[Array, "B"]:
        """Returns F(x, t), the log-density of level t in 0..T-1 up to a constant [nats].

        The constant depends on the level and the label; with standardised data, it contains
        Σ log std (`Standardisation.log_volume`). Labels are those of `f`. As for `f`, traced
        values are not checked.

        Raises:
          UserError: for the same reasons as `f`.
        """
        return self._evaluate(self.programs.F, x, t, label)

    def log_density_fn(self, level: int) -> Callable[[Float[Array, "*D"]], Float[Array, ""]]:
        """Returns x -> log q_t(x), for one example x of data at this level, up to a constant.

        The function is pure: other libraries can differentiate, compile and vectorise it. x is
        x_t without the factor a_{t+1} of `log_density`: log q_t(x) = F(a_{t+1} x, t) plus a
        constant (`sampling.annealing`). So samples of level 0 are what `sample` returns,
        without the final denoising. Level T is white noise. The label is that of `given`, or
        none.

        Args:
          level: noise level t, in 0..T.

        Raises:
          UserError: if the level is not in 0..T. The function raises it if x is not one example
            of floating-point numbers.
        """
        if not isinstance(level, numbers.Integral) or not 0 <= level <= self.T:
            raise UserError(f"level {level} does not exist: give one in 0..{self.T}")
        F, schedule, t = self.method.F(self.params), self.method.schedule, np.array([level])
        to_levels = self.standardisation.apply

        @full_precision
        def log_density(x: Shaped[Array | np.ndarray, "..."]) -> Float[Array, ""]:
            x = jnp.asarray(x)[None]
            require_examples(x, self.shape)
            return annealing.level_log_density(F, to_levels(x), jnp.asarray(t), schedule)[0]

        return log_density

    def classify(
        self,
        x: Float[ArrayLike, "B *D"],
        t: Int[ArrayLike, "B"],
        log_prior: Float[ArrayLike, "classes"] | None = None,
    ) -> Float[Array, "B classes"]:
        """Returns log p(label | x) for labels 1..classes, at levels t in 0..T-1.

            p(label | x) ∝ exp(F(x, t, label) + log_prior[label - 1])

        F is known up to a constant for each label, so a classifier needs values of `log_prior`
        that make up for them (`metrics.energy_classifier.fit_prior`).

        Args:
          x: data at level t, times a_{t+1} (1 at t = T - 1), like y in the docs.
          t: levels.
          log_prior: logarithm of the prior, minus log Z of every label; None: zeros.

        Raises:
          UserError: for the same reasons as `f`, or if the model has no classes.
        """
        classes = self.classes
        self._require_classes()
        prior = np.zeros(classes) if log_prior is None else np.asarray(log_prior)
        if prior.shape != (classes,):
            raise UserError(
                f"log_prior has shape {prior.shape}: give {classes} numbers, one per class"
            )
        return self._evaluate(
            self.programs.classify, x, t, shape=(classes,), log_prior=jnp.float32(prior)
        )

    def propose(
        self,
        x_tilde: Float[ArrayLike, "B *D"],
        t: Int[ArrayLike, "B"],
        label: Int[ArrayLike, "B"] | None = None,
    ) -> Float[Array, "B *D"]:
        """Returns the initialiser's prediction of y for x_tilde = x_{t+1}, at levels t.

        Labels are those of `f`. As for `f`, traced values are not checked.

        Raises:
          UserError: for the same reasons as `f`, or if the model has no initialiser.
        """
        if self.method.initialiser is None:
            raise UserError(
                "this model has no initialiser: train one with config.initialiser.network"
            )
        y = self._evaluate(self.programs.propose, x_tilde, t, label, shape=self.shape)
        return self.standardisation.invert(y)

    def each_label(self, n: int) -> Int[np.ndarray, "n"] | None:
        """Returns n labels, each class in turn; None if the model has no classes."""
        return 1 + np.arange(n) % self.classes if self.classes else None

    def sample(
        self,
        key: AnyKey,
        n: int,
        label: Shaped[ArrayLike, "..."] | None = None,
        guidance: float = 0.0,
    ) -> Float[np.ndarray, "n *D"]:
        """Draws n samples. The i-th depends only on the key, its label and i, not on n.

        For equal batch sizes, this is true bit for bit. Another batch size needs another
        compiled program, with other rounding errors, which a chain can amplify to visible
        differences.

        Args:
          key: random key.
          n: number of samples.
          label: class of all samples, or one per sample; 0: none. By default, the label of
            `given` or, without it, each class in turn, if the model has classes.
          guidance: weight of guidance, with labels (`given`).

        Raises:
          UserError: if n < 0, `key` is not a random key, or the labels or the weight cannot be
            used (`given`).
        """
        return np.concatenate(list(self.sample_batches(key, n, label, guidance)))

    def sample_batches(
        self,
        key: AnyKey,
        n: int,
        label: Shaped[ArrayLike, "..."] | None = None,
        guidance: float = 0.0,
    ) -> Iterator[Float[np.ndarray, "B *D"]]:
        """Draws n samples batch by batch, so that the memory needed does not grow with n.

        The arguments and errors are those of `sample`.
        """
        require_at_least(0, n=n)
        model, labels = self._with_default_labels(label, guidance, n)
        batches = model.run(self.programs.generate, key, np.arange(n), labels=labels)
        return map(self.standardisation.invert, batches)

    def descend(
        self, key: AnyKey, x: Float[ArrayLike, "n *D"], top: int, bottom: int
    ) -> Float[np.ndarray, "n *D"]:
        """Draws x_bottom given x = x_top, level by level (`ladder.descend`).

        `descend(key, x_T, top=T, bottom=0)` generates samples from white noise x_T, without the
        final denoising of `config.mcmc.denoise`. Stopping at levels in between gives the same
        samples.

        Raises:
          UserError: if not 0 <= bottom <= top <= T, or x does not fit the model.
        """
        if not 0 <= bottom <= top <= self.T:
            raise UserError(
                f"cannot descend from level {top} to level {bottom}: levels go from "
                f"{self.T} (white noise) down to 0"
            )
        x = np.asarray(x)
        require_examples(x, self.shape)
        indices, x = np.arange(len(x)), x.astype(np.float32)
        return _concatenate(
            self.run(self.programs.descend, key, indices, x, top=top, bottom=bottom)
        )

    def interpolate(
        self,
        key: AnyKey,
        pairs: int,
        frames: int,
        level: int | None = None,
        label: Shaped[ArrayLike, ""] | None = None,
        guidance: float = 0.0,
    ) -> Float[np.ndarray, "pairs frames *D"]:
        """Interpolates between samples through a noise level (`interpolation.sample_strips`).

        The first frames are `sample(key, pairs)`, with `label=0` if the model has classes and
        no label is given.

        Args:
          key: random key.
          pairs: number of pairs of samples.
          frames: number of images per strip, including both ends.
          level: noise level at which the pairs are interpolated, in 1..T; by default
            `interpolation.sample_level`.
          label: class of all samples; None: that of `given`, or none.
          guidance: weight of guidance, with a label (`given`).

        Raises:
          UserError: if the level is not in 1..T, pairs < 0, frames < 1, or the label or the
            weight cannot be used (`given`).
        """
        model = self._of_class(label, guidance)
        require_key(key)
        require_at_least(0, pairs=pairs)
        require_at_least(1, frames=frames)
        keys = noise.example_keys(key, jnp.arange(2 * pairs))
        schedule = self.method.schedule
        level = interpolation.sample_level(schedule) if level is None else level
        interpolation.require_level(level, schedule.T)
        x_T = ladder.white_noise(keys, self.shape, schedule)
        ends = model.descend(key, x_T, schedule.T, level)
        strips = _sample_strips(ends[:pairs], ends[pairs:], frames)
        return model._recover_strips(key, strips, level)

    def interpolate_images(
        self,
        key: AnyKey,
        first: ArrayLike,
        last: ArrayLike,
        frames: int,
        level: int,
        label: Shaped[ArrayLike, ""] | None = None,
        guidance: float = 0.0,
    ) -> Float[np.ndarray, "pairs frames *D"]:
        """Interpolates between given images, or other examples, through a noise level.

        See `interpolation.image_strips`.

        Args:
          key: random key.
          first: examples [pairs, ...] at the start of the strips; images in [-1, 1].
          last: examples [pairs, ...] at the end of the strips.
          frames: number of images per strip, including both ends.
          level: noise level in 1..T at which the images are interpolated. At 1 they hardly
            change; at T nothing of them is left.
          label: class of the images in between; None: that of `given`, or none.
          guidance: weight of guidance, with a label (`given`).

        Raises:
          UserError: if the images do not fit the model, the level is not in 1..T, frames < 1,
            or the label or the weight cannot be used (`given`).
        """
        model = self._of_class(label, guidance)
        require_key(key)
        require_at_least(1, frames=frames)
        schedule = self.method.schedule
        starts, ends = map(self.as_examples, (first, last))
        if len(starts) != len(ends):
            raise UserError(
                f"{len(starts)} first examples and {len(ends)} last ones cannot be paired: "
                "give equal numbers"
            )
        interpolation.require_level(level, schedule.T)
        keys = noise.example_keys(key, jnp.arange(len(starts)))
        strips = _image_strips(keys, starts, ends, frames, level, schedule)
        return model._recover_strips(key, strips, level)

    def inpaint(
        self,
        key: AnyKey,
        x: ArrayLike,
        known: ArrayLike,
        completions: int = 1,
        rounds: int = 10,
        label: Shaped[ArrayLike, "..."] | None = None,
        guidance: float = 0.0,
    ) -> Float[np.ndarray, "n completions *D"]:
        """Draws the unknown values of examples given the known ones (`inpainting.inpaint`).

        Args:
          key: random key.
          x: examples [n, ...], images in [-1, 1]; their unknown values have no effect, but
            must be finite.
          known: mask of bool, true where a value is known: of the shape of an example, or with
            a last axis of length 1 for all channels; see `masks.named`.
          completions: number of completions per example.
          rounds: number of times that each level is drawn; see `inpainting`.
          label: class of all images, or one per image; None: that of `given`, or none.
          guidance: weight of guidance, with a label (`given`).

        Returns:
          examples that are equal to x at known values.

        Raises:
          UserError: if the images or the mask do not fit the model, completions < 0,
            rounds < 1, or the labels or the weight cannot be used (`given`).
        """
        require_at_least(0, completions=completions)
        require_at_least(1, rounds=rounds)
        examples, known = self.as_examples(x), np.asarray(known)
        masks.require_mask(known, self.shape)
        model, labels = self._conditioned(label, guidance, len(examples))
        n = len(examples) * completions
        completed = _concatenate(
            model.run(
                self.programs.inpaint,
                key,
                np.arange(n),
                np.repeat(examples, completions, axis=0),
                np.broadcast_to(known, (n, *known.shape)),
                labels=None if labels is None else np.repeat(labels, completions),
                rounds=rounds,
            )
        )
        completed = completed.reshape(len(examples), completions, *self.shape)
        if self.standardisation.is_identity:
            return completed
        given = np.asarray(x, np.float32)[:, None]
        return np.where(known, given, self.standardisation.invert(completed))

    def posterior(
        self,
        key: AnyKey,
        log_likelihood: LogLikelihood,
        n: int,
        particles: int = 0,
        width: float = smc_lib.WIDTH,
    ) -> Float[np.ndarray, "n *D"]:
        """Draws samples of p(x | observed) ∝ exp(F(x, 0)) p(observed | x) (`sampling.smc`).

        By default, samples are approximate: if several modes of the data explain an
        observation, they get wrong weights. Samples descend side by side, and share only the
        step sizes and the variance of the proposals, for which at least `smc.LEAST` descend.
        With particles, samples are drawn from this number of weighted particles, and become
        exact as it grows; but with few particles they resemble each other.

        Another likelihood needs no new compilation if it is of the same kind, a
        `jax.tree_util.Partial` of the same function with arrays of the same shapes, such as
        `operators.likelihood`.

        Args:
          key: random key.
          log_likelihood: (x [m, ...]) -> log p(observed | x) [m], a JAX function.
          n: number of samples.
          particles: 0, or the number of weighted particles, a multiple of that of the devices.
          width: as for `smc`.

        Raises:
          UserError: as `smc` does, or if n < 0.
        """
        require_at_least(0, n=n, particles=particles)
        tree = smc_lib.as_pytree(log_likelihood)
        problems = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], tree)
        if particles:
            result = self.smc(key, problems, 1, particles, width)
            u = jax.random.uniform(jax.random.fold_in(key, particles), (1,))
            return smc_lib.draws(result, n, np.asarray(u))[:, 0]
        number = smc_lib.unweighted(n, self.mesh.size)
        result = self.smc(key, problems, 1, number, width, corrected=False)
        return np.asarray(result.x[:n, 0])

    def smc(
        self,
        key: AnyKey,
        log_likelihoods: LogLikelihood,
        problems: int,
        particles: int = smc_lib.PARTICLES,
        width: float = smc_lib.WIDTH,
        strength: float = 1.0,
        bridges: int | None = None,
        corrected: bool = True,
    ) -> Posterior:
        """Runs sequential Monte Carlo on several problems, each with its own observation.

        Moves are those of the model's sampler if it is MALA or HMC, K per bridge, otherwise one
        step of MALA. The result of a problem depends only on the key, its likelihood, its
        number and the number of particles, not on the other problems.

        Args:
          key: random key.
          log_likelihoods: (x [m, ...]) -> log p(observed | x) [m], a pytree whose arrays have
            one entry per problem along their first axis (`operators.stack`).
          problems: number of problems.
          particles: number of particles of each problem, a multiple of the number of devices.
          width: standard deviation that the likelihood leaves to pixels: std of the noise, if
            it is Gaussian, in the units of the levels. A wrong one makes results less precise.
          strength: factor of the log-likelihood; with 0, weights estimate Z of the model.
          corrected: whether particles have weights and are resampled. Otherwise they are
            samples of an approximation (`posterior`).
          bridges: bridges per level (`sampling.smc`); by default 1, or more with fewer than
            `smc.BRIDGES` levels.

        Returns:
          weighted particles, as numpy arrays.

        Raises:
          UserError: if a number cannot be used, or a likelihood has another shape than [m] or
            is not a number.
        """
        require_key(key)
        require_at_least(1, problems=problems, particles=particles)
        if particles % self.mesh.size:
            raise UserError(
                f"{particles} particles cannot be divided among {self.mesh.size} devices: use "
                f"{-(-particles // self.mesh.size) * self.mesh.size}"
            )
        if not 0 < width < math.inf:
            raise UserError(f"width is {width}: give a finite number above 0")
        if bridges is None:
            bridges = -(-smc_lib.BRIDGES // self.T)
        require_at_least(1, bridges=bridges)
        log_likelihoods = smc_lib.as_pytree(log_likelihoods)
        for leaf in jax.tree.leaves(log_likelihoods):
            if np.shape(leaf)[:1] != (problems,):
                raise UserError(
                    f"an array of the likelihoods has the shape {np.shape(leaf)}: give one "
                    f"entry for each of {problems} problems along its first axis "
                    "(operators.stack)"
                )
        self._require_likelihood(log_likelihoods)
        standardisation = self.standardisation
        if not standardisation.is_identity:
            repeated = (jnp.stack([jnp.asarray(a)] * problems) for a in standardisation)
            log_likelihoods = Partial(_in_units_of_levels, log_likelihoods, *repeated)
        exact = dataclasses.replace(self, method=method_lib.with_exact_kernel(self.method))
        at_once = max(1, min(problems, self.engine.batch_size // particles))

        def descend(indices):
            shared, particle_numbers = exact.arguments(
                key,
                np.arange(particles),
                problems=indices,
                problem_keys=noise.example_keys(jax.random.fold_in(key, particles), indices),
                log_likelihood=jax.tree.map(lambda leaf: leaf[indices], log_likelihoods),
                width=np.float32(width),
                variance=smc_lib.VARIANCE["weighted" if corrected else "approximate"],
                strength=np.float32(strength),
                bridges=bridges,
                correction=np.float32(corrected),
            )
            # All particles at once, since they interact.
            return next(self.engine.run(self.programs.smc, shared, [particle_numbers]))

        results = [  # all of the same size, so that they are compiled once
            descend(np.minimum(first + np.arange(at_once), problems - 1))
            for first in range(0, problems, at_once)
        ]
        result = jax.tree.map(lambda *v: np.concatenate(v, axis=1)[:, :problems], *results)
        for problem, values in enumerate(result.log_likelihood.T):
            if np.isnan(values).any():
                raise UserError(
                    f"the log-likelihood of image {problem} is not a number (NaN): check its "
                    "observation; if that is finite, the chains have diverged"
                )
        return result._replace(x=standardisation.invert(result.x))

    def evidence(
        self,
        key: AnyKey,
        log_likelihood: LogLikelihood,
        particles: int = smc_lib.PARTICLES,
        runs: int = 8,
        width: float = smc_lib.WIDTH,
    ) -> tuple[float, float]:
        """Estimates log p(observed), the log of the mean likelihood under the model [nats].

        `smc.log_evidence` explains how.

        Args:
          key: random key.
          log_likelihood: as for `posterior`.
          particles: number of particles, a multiple of the number of devices.
          runs: number of independent runs of either kind, at least 2.
          width: as for `smc`.

        Raises:
          UserError: as `smc` does, or if runs < 2.

        Returns:
          the estimate, and its standard error from the spread of the runs.
        """
        require_at_least(2, runs=runs)
        tree = smc_lib.as_pytree(log_likelihood)
        repeated = jax.tree.map(lambda leaf: jnp.stack([leaf] * runs), tree)
        posterior, prior = (
            self.smc(
                jax.random.fold_in(key, i), repeated, runs, particles, width, strength=float(i)
            )
            for i in (1, 0)
        )
        log_evidence, error = smc_lib.log_evidence(posterior, prior, problems=1)
        return float(log_evidence[0]), float(error[0])

    def _require_likelihood(self, log_likelihoods: LogLikelihood) -> None:
        """Checks the shape of what a likelihood returns.

        Raises:
          UserError: with both shapes.
        """
        one = jax.tree.map(lambda leaf: leaf[0], log_likelihoods)
        m = 2
        found = jax.eval_shape(one, jax.ShapeDtypeStruct((m, *self.shape), jnp.float32))
        if getattr(found, "shape", None) != (m,):
            raise UserError(
                f"the log-likelihood of {m} examples is {found}: it must return an array [{m}]"
            )

    def long_run(
        self,
        key: AnyKey,
        x_tilde: Float[ArrayLike, "n *D"],
        t: Int[ArrayLike, "n"],
        num_steps: int,
        chains: Chains | None = None,
        points: int = chains_lib.POINTS,
        label: Shaped[ArrayLike, "..."] | None = None,
        guidance: float = 0.0,
    ) -> tuple[Chains, Observation]:
        """Runs chains on p(y | x_tilde) up to step `num_steps`.

        Given chains from an earlier call, it continues them; the result is bit-identical to
        that of a single call. Levels and numbers of steps are traced values, so other values
        need no new compilation.

        Args:
          key: random key.
          x_tilde: conditions x_{t+1}, which are white noise at t = T - 1.
          t: level of each chain, in 0..T-1.
          num_steps: total number of steps, including those made before.
          chains: chains to continue; None starts new ones.
          points: maximum length of a new chain's trace, even; 0 for no trace.
          label: class of all chains, or one per chain; None: that of `given`, or none.
          guidance: weight of guidance, with a label (`given`).

        Returns:
          the chains with their traces, and their present positions, as numpy arrays.

        Raises:
          UserError: if the arrays do not fit the model or each other, a level is not in
            0..T-1, or the labels or the weight cannot be used (`given`).
        """
        x_tilde, t = np.asarray(x_tilde), np.asarray(t)
        require_examples(x_tilde, self.shape)
        self._require_levels(t, len(x_tilde))
        x_tilde, t = x_tilde.astype(np.float32), t.astype(np.int32)
        indices = np.arange(len(t))
        model, labels = self._conditioned(label, guidance, len(t))
        if chains is None:
            columns = chains_lib.SCALARS + self.labelled
            trace = np.zeros((len(t), points, columns), np.float32)
            chains = _concatenate(
                model.run(
                    self.programs.start_chains, key, indices, x_tilde, t, trace, labels=labels
                )
            )
        first = int(np.max(chains.step, initial=0))  # the same for all chains
        return _concatenate(
            model.run(
                self.programs.advance_chains,
                key,
                indices,
                chains,
                x_tilde,
                t,
                labels=labels,
                first=first,
                last=max(first, num_steps),
            )
        )

    def with_sampler(
        self,
        name: str,
        K: int | None = None,
        leapfrog: int | Sequence[int] | None = None,
        noise_scale: float = 1.0,
        key: AnyKey | None = None,
        target: float | None = None,
        levels: int | None = None,
    ) -> "Model":
        """Returns a model that draws its samples with another sampler. Compiles new programs.

        The step sizes of MALA and HMC are adapted (`adapt`), those of Langevin dynamics follow
        from b². Settings that are not given are those of the model's configuration.

        Args:
          name: 'langevin', 'mala' or 'hmc', or another value of `config.mcmc.sampler`.
          K: number of steps per level.
          leapfrog: number of leapfrog steps of HMC, the same for all levels or one per level.
          noise_scale: factor of the noise of Langevin dynamics.
          key: random key of the adaptation, by default `jax.random.key(0)`.
          target: mean acceptance probability to reach in the adaptation.
          levels: number of noise levels, evenly spaced among the model's.

        Raises:
          UserError: if there is no such sampler, or a setting cannot be used.
        """
        given: dict[str, Any] = {"K": K, "target_acceptance": target, "levels": levels}
        if leapfrog is not None:
            given["leapfrog"] = (leapfrog,) if isinstance(leapfrog, int) else tuple(leapfrog)
        settings = {name: value for name, value in given.items() if value is not None}
        method = method_lib.with_sampler(
            self.method, sampler=name, noise_scale=noise_scale, **settings
        )
        model = Model.create(method, self.params, self.mesh, self.engine.batch_size)
        if name not in method_lib.METROPOLIS:
            return model
        key = jax.random.key(0) if key is None else key
        mcmc = method.mcmc
        return model.adapt(key, mcmc.warmup_steps, mcmc.target_acceptance)[0]

    def marginals(self) -> "Model":
        """Returns a model whose chains sample the marginals p(y_t). Compiles new programs.

        Its `long_run` ignores the value of x_tilde, except that chains start there. The step
        sizes of MALA and HMC have to be adapted again (`adapt`).
        """
        method = method_lib.marginals(self.method)
        return Model.create(method, self.params, self.mesh, self.engine.batch_size)

    def with_labels(self, label: LabelFn) -> "Model":
        """Returns a model whose `long_run` also records labels. Compiles one program again.

        Args:
          label: (data without noise) -> the class of each; see `chains.advance`.
        """
        there = self.standardisation

        def label_of(x):
            return label(there.invert(x))

        advance = self.compile(functools.partial(chains_lib.advance, label=label_of))
        programs = self.programs._replace(advance_chains=advance)
        return dataclasses.replace(self, programs=programs, labelled=True)

    def adapt(
        self,
        key: AnyKey,
        num_steps: int = 100,
        target: float = 0.65,
        chains: int = 16,
        guidance: float = 0.0,
    ) -> tuple["Model", Adapted]:
        """Adapts the step sizes of MALA or HMC, on chains that are then discarded.

        The chains have the labels of `sample`.

        Every device runs the same chains, so the number of devices does not affect the result.
        Warns if chains of K steps keep more than `MAX_CORRELATION` of their starting points.

        Args:
          key: random key.
          num_steps: number of steps per level.
          target: mean acceptance probability to reach.
          chains: number of chains.
          guidance: weight of guidance, with labels (`given`).

        Returns:
          the model with adapted step sizes, and the step size, the mean acceptance probability
          and the remaining correlation at each level, as numpy arrays (`ladder.warm_up`).

        Raises:
          UserError: if `key` is not a random key.
        """
        require_key(key)

        conditioned, labels = self._with_default_labels(None, guidance, chains)

        @functools.partial(jax.jit, out_shardings=sharding.replicated(self.mesh))
        @full_precision
        def program(params, key):
            keys = noise.example_keys(key, jnp.arange(chains))
            if labels is not None:
                params = guidance_lib.with_labels(params, jnp.asarray(labels))
            conditionals = self.method.conditionals(params)
            return ladder.warm_up(keys, conditionals, self.shape, num_steps, target)

        adapted = jax.tree.map(np.asarray, program(conditioned.params, key))
        worst = int(np.argmax(np.abs(adapted.correlation)))
        from_x_tilde = self.method.sampler.start is ladder.start_at_x_tilde
        tied = bool(jnp.isfinite(self.method.schedule.sigma).all())  # not on `marginals`
        if from_x_tilde and tied and abs(adapted.correlation[worst]) > MAX_CORRELATION:
            log.warning(
                "K = %d is too few steps per level: the correlation of start and end is %.2f "
                "at level %d, and such errors add up over the levels; increase K",
                self.method.sampler.K,
                adapted.correlation[worst],
                worst,
            )
        return self.with_step_size(adapted.step_size), adapted

    def compile(self, program: Callable) -> Callable:
        """Compiles a program for the devices, to be passed to `run`.

        Args:
          program: (keys [B], conditionals, *arrays [B, ...], **settings) -> arrays [B, ...];
            it must treat every example independently of the others.
        """
        return _compile(self.engine, self.method, program)

    def run(
        self,
        compiled: Callable,
        key: AnyKey,
        indices: Int[np.ndarray, "n"],
        *arrays: Any,
        labels: Int[np.ndarray, "n"] | None = None,
        **settings: Any,
    ) -> Iterator[Any]:
        """Runs a compiled program on n examples and yields its results batch by batch.

        Args:
          compiled: program from `compile`.
          key: random key.
          indices: numbers that are folded into the key, one per example.
          *arrays: trees of arrays with the examples along the first axis.
          labels: one label per example; None: that of `given`, or none.
          **settings: trees of numbers, the same for all examples. They are traced, so other
            values need no new compilation.

        Raises:
          UserError: if `key` is not a random key.
        """
        require_key(key)
        shared, examples = self.arguments(key, indices, *arrays, labels=labels, **settings)
        return self.engine.run(compiled, shared, self.engine.split(examples))

    def arguments(
        self, key: AnyKey, indices: Any, *arrays: Any, labels: Any = None, **settings: Any
    ) -> tuple[Any, Any]:
        """Returns the two arguments of a compiled program: shared values, and examples.

        The arguments of this method are those of `run`.
        """
        shared = self.params, self.method.sampler.tuning, key, settings
        return shared, (indices, labels, arrays)

    def _evaluate(
        self,
        program: Callable,
        x: Shaped[ArrayLike, "..."],
        t: Shaped[ArrayLike, "..."],
        label: Shaped[ArrayLike, "..."] | None = None,
        shape: tuple[int, ...] = (),
        **others: Any,
    ) -> Float[Array, "B *D"]:
        """Evaluates a program, whose result for one example has the given shape.

        Raises:
          UserError: if they do not fit the model or each other.
        """
        array = jnp.asarray(x)
        require_examples(array, self.shape)
        if not isinstance(t, jax.core.Tracer):
            t = np.asarray(t)  # `jnp.asarray` would trace it inside `jax.jit`
        self._require_levels(t, len(array))
        if label is not None:
            others["label"] = self._labels(label, len(array))
        if not len(array):
            return jnp.zeros((0, *shape), array.dtype)
        return program(self.params, self.standardisation.apply(array), t, **others)

    def as_examples(self, x: ArrayLike) -> Float[np.ndarray, "n *D"]:
        """Checks that x contains data of the model; returns them in the units of the levels.

        Raises:
          UserError: naming the dtype, the shape or, for images that are not standardised, the
            range that is wrong, or an example that is not finite.
        """
        if len(self.shape) == 3 and self.standardisation.is_identity:
            return as_images(x, self.shape)
        array = np.asarray(x)
        require_examples(array, self.shape)
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
        if not finite.all():
            raise UserError(f"example {np.argmin(finite)} is not finite: give finite numbers")
        return self.standardisation.apply(array.astype(np.float32))

    def _conditioned(
        self, label: Shaped[ArrayLike, "..."] | None, guidance: float, n: int
    ) -> tuple["Model", Int[np.ndarray, "n"] | None]:
        """Returns the model of one label and None, or this one and n labels.

        Raises:
          UserError: if the labels or the weight of guidance cannot be used (`given`).
        """
        if label is None:
            condition = self.params.get(guidance_lib.NAME)
            if guidance and condition is not None:
                return self.given(condition.label, guidance), None
            _weight(guidance, labelled=False)
            return self, None
        if np.ndim(label) == 0:
            return self.given(label, guidance), None
        labels = self._labels(label, n)
        weight = _weight(guidance, labelled=bool(np.any(labels)))
        condition = Condition(jnp.int32(0), weight)  # `run` replaces the label
        params = guidance_lib.with_condition(self.params, condition)
        return self.with_params(params), np.asarray(labels)

    def _with_default_labels(
        self, label: Shaped[ArrayLike, "..."] | None, guidance: float, n: int
    ) -> tuple["Model", Int[np.ndarray, "n"] | None]:
        """Like `_conditioned`, but without any label, each class has its turn."""
        if label is None and guidance_lib.NAME not in self.params:
            label = self.each_label(n)
        return self._conditioned(label, guidance, n)

    def _of_class(self, label: Shaped[ArrayLike, ""] | None, guidance: float) -> "Model":
        """Returns the model of one label; None keeps that of `given`, or none.

        Raises:
          UserError: if the label or the weight of guidance cannot be used (`given`).
        """
        if label is None:
            return self._conditioned(None, guidance, 0)[0]
        return self.given(label, guidance)

    def _require_classes(self) -> None:
        """Raises a UserError if the model has no classes."""
        if not self.classes:
            if "parts" in self.params:
                raise UserError("a combination of models takes no label: give its parts labels")
            raise UserError("this model was trained without labels: give no label")

    def _require_levels(self, t: Shaped[Array | np.ndarray, "..."], n: int) -> None:
        """Checks that t contains n levels in 0..T-1; the values of traced levels are unknown.

        Raises:
          UserError: with the shape, the dtype or the level that is wrong.
        """
        if t.shape != (n,):
            raise UserError(
                f"the levels are an array of shape {t.shape}: give one per example, {n}"
            )
        if not jnp.issubdtype(t.dtype, jnp.integer):
            raise UserError(f"the levels are of dtype {t.dtype}: give integers")
        if not isinstance(t, jax.core.Tracer):
            chains_lib.require_levels(np.asarray(t), self.T)

    def _labels(self, label: Shaped[ArrayLike, "..."], n: int) -> Int[Array, "n"]:
        """Returns n labels in 0..classes; the values of traced labels are not checked.

        Raises:
          UserError: with the shape, the dtype or the label that is wrong, or if the model has
            no classes.
        """
        self._require_classes()
        classes = self.classes
        array = label if isinstance(label, jax.core.Tracer) else np.asarray(label)
        if array.shape != (n,) or not jnp.issubdtype(array.dtype, jnp.integer):
            raise UserError(
                f"the labels are an array of shape {array.shape} and dtype {array.dtype}: give "
                f"one integer per example, {n}"
            )
        if isinstance(array, np.ndarray):
            wrong = array[(array < 0) | (array > classes)]
            if len(wrong):
                raise UserError(
                    f"label {wrong[0]} does not exist: give 1 to {classes}, or 0 for no label"
                )
        return jnp.asarray(array, jnp.int32)

    def _recover_strips(
        self, key: AnyKey, strips: Float[Array, "pairs frames *D"], level: int
    ) -> Float[np.ndarray, "pairs frames *D"]:
        """Recovers data from strips of x_level; the frames of a strip share their noise."""
        pairs, frames, *shape = strips.shape
        x = np.asarray(strips).reshape(-1, *shape)
        indices = np.repeat(np.arange(pairs), frames)
        completed = _concatenate(self.run(self.programs.complete, key, indices, x, top=level))
        return self.standardisation.invert(completed).reshape(strips.shape)


def _in_units_of_levels(log_likelihood, mean, std, z):
    """Returns the log-likelihood of standardised examples z."""
    return log_likelihood(Standardisation(mean, std).invert(z))


def _weight(guidance: float, labelled: bool) -> Float[Array, ""] | None:
    """Returns the weight of guidance as an array, or None if it is 0.

    Raises:
      UserError: if it is not finite, or not 0 without a label.
    """
    if not isinstance(guidance, numbers.Real) or not math.isfinite(guidance):
        raise UserError(f"guidance is {guidance}: give a finite number")
    if guidance and not labelled:
        raise UserError(
            f"guidance is {guidance:g}, but there is no label: give one, or omit it"
        )
    return jnp.float32(guidance) if guidance else None


def require_key(key: Any) -> None:
    """Checks that this is a key of `jax.random.key` or `jax.random.PRNGKey`.

    Raises:
      UserError: with the value, or with the dtype and the shape of an array.
    """
    is_array = isinstance(key, jax.Array | np.ndarray)
    if is_array and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
        return
    if not is_array or key.dtype != np.uint32 or key.ndim != 1:
        found = f"an array of {key.dtype}, shape {key.shape}" if is_array else repr(key)
        raise UserError(f"the random key is {found}: give jax.random.key(SEED)")


def require_at_least(minimum: int, **counts: int) -> None:
    """Checks that numbers are whole and not smaller than the minimum.

    Raises:
      UserError: with the name and value of one that is not.
    """
    for name, number in counts.items():
        if not isinstance(number, numbers.Integral) or number < minimum:
            raise UserError(f"{name} is {number}: it must be a whole number, {minimum} or more")


def require_examples(x: Shaped[Array | np.ndarray, "..."], shape: tuple[int, ...]) -> None:
    """Checks that x contains examples of this shape, as floating-point numbers.

    Raises:
      UserError: with the dtype, or with both shapes.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):  # such images are not scaled to [-1, 1]
        raise UserError(
            f"the examples are of dtype {x.dtype}: give floating-point numbers; convert 8-bit "
            "images by x / 127.5 - 1"
        )
    if x.ndim != 1 + len(shape) or x.shape[1:] != shape:
        given, wanted = ("x".join(map(str, shape)) for shape in (x.shape, shape))
        raise UserError(f"the examples are an array of shape {given}: give nx{wanted}")


def as_images(x: ArrayLike, shape: tuple[int, ...]) -> Float[np.ndarray, "n H W C"]:
    """Checks that x contains images of this shape [H, W, C] in [-1, 1]; returns it in float32.

    Raises:
      UserError: naming the dtype, shape or range that is wrong.
    """
    x = np.asarray(x)
    require_examples(x, shape)
    x = x.astype(np.float32)
    if not np.abs(x).max(initial=0) <= 1 + PIXEL_TOLERANCE:  # also true of NaN
        raise UserError(
            f"the images' pixels lie in [{x.min():g}, {x.max():g}]: scale or clip them to "
            "[-1, 1]"
        )
    return x


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What is combined, as a key of a cache: equal programs have equal methods.

    Attributes:
      programs: compiled programs of each model.
      methods: their methods, whose tuning can differ from those of equal programs.
      engine: engine of the first model.
    """

    programs: tuple[Programs, ...]
    methods: tuple[Method, ...] = dataclasses.field(compare=False)
    engine: Engine = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=64)
def _combination(rule: compose.Rule, parts: _Parts) -> Model:
    """Returns the combination of models, without parameters."""
    engine = parts.engine
    return Model.create(compose.method(rule, parts.methods), {}, engine.mesh, engine.batch_size)


def _combined(
    rule: compose.Rule, models: Sequence[Model], coefficients: Float[Array, "n *T"]
) -> Model:
    """Returns the combination of models, with its compiled programs of earlier calls.

    Raises:
      UserError: if their shapes, noise levels, standardisations or devices differ.
    """
    meshes = [model.mesh for model in models]
    if any(mesh != meshes[0] for mesh in meshes):
        raise UserError(
            f"models on {', '.join(str(mesh.size) for mesh in meshes)} devices cannot be "
            "combined: load them onto the same devices"
        )
    first = models[0].standardisation
    for model in models:
        if not all(map(np.array_equal, first, model.standardisation)):
            raise UserError(
                "models with different standardisations cannot be combined: train all of them "
                "on one file of arrays, or without config.data.standardise"
            )
    methods = tuple(model.method for model in models)
    parts = _Parts(tuple(model.programs for model in models), methods, models[0].engine)
    combination = _combination(rule, parts)
    tuning = methods[0].sampler.tuning
    sampler = combination.method.sampler._replace(tuning=tuning)
    params = compose.params([model.params for model in models], coefficients)
    return dataclasses.replace(
        combination,
        method=combination.method._replace(sampler=sampler),
        params=params if first.is_identity else with_standardisation(params, first),
    )


def _compile(engine: Engine, method: Method, program: Callable) -> Callable:
    """Compiles a program; the result takes the two arguments of `Model.arguments`."""

    def on_device(shared, examples):
        params, tuning, key, settings = shared
        indices, labels, arrays = examples
        keys = noise.example_keys(key, indices)
        if labels is not None:
            params = guidance_lib.with_labels(params, labels)
        conditionals = method.conditionals(params, tuning)
        return program(keys, conditionals, *arrays, **settings)

    return engine.compile(on_device)


def _descend_particles(
    keys, conditionals, problems, problem_keys, log_likelihood, shape, **settings
):
    """Runs `smc.descend` on this device's share of the particles, whose keys are given."""
    per_problem = jax.vmap(jax.random.fold_in, (None, 0))
    return smc_lib.descend(
        jax.vmap(per_problem, (0, None))(keys, problems),
        problem_keys,
        conditionals,
        log_likelihood,
        shape,
        share=smc_lib.Share(sharding.gather_examples, sharding.own_examples),
        **settings,
    )


def _concatenate(batches: Iterator[Any]) -> Any:
    """Concatenates batches of the same tree of arrays."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
