"""A trained model in the hand: energies and samples, as arrays in [-1, 1]."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key
from ml_collections import ConfigDict

from drl_jax import (
    checkpoints,
    images,
    inpainting,
    interpolation,
    masks,
    method,
    noise,
    parallel,
    recovery,
    sampling,
    train_state,
)
from drl_jax.energies.energy import Energy, Params
from drl_jax.errors import UserError
from drl_jax.files import told
from drl_jax.long_run import chains as long_run
from drl_jax.long_run.chains import Chains, Seen
from drl_jax.method import Method

_sample_strips = jax.jit(interpolation.sample_strips, static_argnames="frames")
_image_strips = jax.jit(interpolation.image_strips, static_argnames="frames")


class Model:
    """A network with its parameters, compiled for the devices at hand.

    Attributes:
      method: the network, the noise levels and the sampler.
      params: spectrally normalised parameters, replaced freely: nothing recompiles.
      tuning: of the sampler, a number a level (`sampling.Sampler`), replaced as freely.
      mesh: the devices.
    """

    def __init__(self, method: Method, params: Params, mesh: Mesh, batch_size: int = 256):
        """Binds the parameters; at most about `batch_size` chains run at a time."""
        self.method = method
        self.params = params
        self.tuning = method.sampler.tuning
        self.mesh = mesh
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._f = jax.jit(method.energy.f)
        self.generate = self.compile(
            lambda keys, F, sampler: sampling.generate(
                keys, F, method.energy.shape, method.schedule, sampler
            )
        )
        self._descend = self.compile(
            lambda keys, F, sampler, x, top, bottom: sampling.descend(
                keys, F, x, top, bottom, method.schedule, sampler
            )
        )
        self._inpaint = self.compile(
            lambda keys, F, sampler, x, known, rounds: inpainting.inpaint(
                keys, F, x, known, rounds, method.schedule, sampler
            )
        )
        self._start = self.compile(
            lambda keys, F, sampler, x_tilde, t, trace: long_run.start(
                F, x_tilde, t, method.schedule, sampler, trace
            )
        )
        self._advance = self.compile(
            lambda keys, F, sampler, chains, x_tilde, t, first, last: long_run.advance(
                keys, F, chains, x_tilde, t, first, last, method.schedule, sampler
            )
        )

    def f(self, x: Float[Array, "B H W C"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        """Returns the network's output for images x at levels t in 0..T-1."""
        return self._f(self.params, x, t)

    def log_density(self, x: Float[Array, "B H W C"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        """Returns F(x, t), the log-density of level t up to a constant [nats]."""
        return recovery.log_density(self.f, self.method.parameterisation)(x, t)

    def sample(self, key: Key[Array, ""], n: int) -> Float[np.ndarray, "n H W C"]:
        """Draws n images. The i-th depends on the key and on i alone.

        To the bit for equal batches; another batch size is another program, which rounds
        otherwise, and a chain may turn a rounding into a visible difference.
        """
        return np.concatenate(list(self.sample_batches(key, n)))

    def sample_batches(
        self, key: Key[Array, ""], n: int
    ) -> Iterator[Float[np.ndarray, "B H W C"]]:
        """Draws n images, a batch at a time: memory does not grow with n."""
        return self.batches(self.generate, key, np.arange(n))

    def descend(
        self, key: Key[Array, ""], x: Float[ArrayLike, "n H W C"], top: int, bottom: int
    ) -> Float[np.ndarray, "n H W C"]:
        """Draws x_bottom from x = x_top, level by level (`sampling.descend`).

        From white noise, `descend(key, x, T, 0)` generates, and with stops on the way makes
        the same images.

        Raises:
          UserError: if not 0 <= bottom <= top <= T.
        """
        T = self.method.schedule.T
        if not 0 <= bottom <= top <= T:
            raise UserError(
                f"no way down from level {top} to {bottom}: levels are {T}, white noise, to 0"
            )
        x = np.asarray(x, np.float32)
        levels = {"top": top, "bottom": bottom}
        return np.concatenate(
            list(self.batches(self._descend, key, np.arange(len(x)), x, **levels))
        )

    def interpolate(
        self, key: Key[Array, ""], pairs: int, frames: int, level: int | None = None
    ) -> Float[np.ndarray, "pairs frames H W C"]:
        """Draws strips between samples, through their noise (`interpolation.sample_strips`).

        Each starts at the sample of its number: the first frames are `sample(key, pairs)`.

        Args:
          key: of all noise.
          pairs: how many strips.
          frames: of a strip.
          level: where the strips start, in 1..T; None for `interpolation.sample_level`.

        Raises:
          UserError: another level.
        """
        keys = noise.example_keys(key, jnp.arange(2 * pairs))
        schedule = self.method.schedule
        level = interpolation.sample_level(schedule) if level is None else level
        interpolation.require_level(level, schedule.T)
        x_T = sampling.white_noise(keys, self.method.energy.shape, schedule)
        ends = self.descend(key, x_T, schedule.T, level)
        strips = _sample_strips(ends[:pairs], ends[pairs:], frames)
        return self._recover_strips(key, strips, level)

    def interpolate_images(
        self,
        key: Key[Array, ""],
        first: Float[ArrayLike, "pairs H W C"],
        last: Float[ArrayLike, "pairs H W C"],
        frames: int,
        level: int,
    ) -> Float[np.ndarray, "pairs frames H W C"]:
        """Draws strips between images, through a noise level (`interpolation.image_strips`).

        Args:
          key: of all noise.
          first: images in [-1, 1], where the strips start.
          last: images in [-1, 1], where they end.
          frames: of a strip.
          level: the noise level in 1..T, from little change to none of the images left.

        Raises:
          UserError: other images, or another level.
        """
        energy, schedule = self.method.energy, self.method.schedule
        first, last = (images.as_images(x, energy.shape) for x in (first, last))
        if len(first) != len(last):
            raise UserError(f"{len(first)} and {len(last)} images make no pairs: give as many")
        interpolation.require_level(level, schedule.T)
        keys = noise.example_keys(key, jnp.arange(len(first)))
        strips = _image_strips(keys, first, last, frames, level, schedule)
        return self._recover_strips(key, strips, level)

    def inpaint(
        self,
        key: Key[Array, ""],
        x: Float[ArrayLike, "n H W C"],
        known: Bool[ArrayLike, "H W 1"],
        completions: int = 1,
        rounds: int = 10,
    ) -> Float[np.ndarray, "n completions H W C"]:
        """Draws completions of images of which some pixels are known (`inpainting.inpaint`).

        Args:
          key: of all noise.
          x: images in [-1, 1]; what they hold at unknown pixels is without effect.
          known: the mask, true where a pixel is known, such as `masks.named` gives.
          completions: of each image.
          rounds: how often each level is drawn.

        Returns:
          images that equal x where it is known, to the bit.

        Raises:
          UserError: other images, another mask, or no rounds.
        """
        x, known = images.as_images(x, self.method.energy.shape), np.asarray(known)
        masks.require_mask(known, self.method.energy.shape)
        if rounds < 1:
            raise UserError(f"rounds is {rounds}: every level must be drawn once or more")
        n = len(x) * completions
        every_x = np.repeat(x, completions, axis=0)
        every_known = np.broadcast_to(known, (n, *known.shape))
        batches = self.batches(
            self._inpaint, key, np.arange(n), every_x, every_known, rounds=rounds
        )
        return np.concatenate(list(batches)).reshape(len(x), completions, *x.shape[1:])

    def long_run(
        self,
        key: Key[Array, ""],
        x_tilde: Float[ArrayLike, "n H W C"],
        t: Int[ArrayLike, "n"],
        num_steps: int,
        chains: Chains | None = None,
        points: int = long_run.POINTS,
    ) -> tuple[Chains, Seen]:
        """Takes chains on p(y | x_tilde), which start from x_tilde, to step `num_steps`.

        Given its own chains it goes on with them, to the bit as if it had never stopped.
        Levels and steps are data: nothing compiles again for others.

        Args:
          key: of all noise.
          x_tilde: the conditions, x_{t+1}; white noise at t = T - 1.
          t: level of each chain, 0..T-1.
          num_steps: to be made in all, those made before included.
          chains: as it returned them; None starts new ones.
          points: of a new chain's trace, at most, and even; 0 for no trace.

        Returns:
          the chains, their traces with them, and where they are, both of numpy arrays.

        Raises:
          UserError: other levels, or a sampler that makes no chain.
        """
        x_tilde, t = np.asarray(x_tilde, np.float32), np.asarray(t, np.int32)
        long_run.require_levels(t, self.method.schedule.T)
        long_run.require_chain(self.method.sampler)
        indices = np.arange(len(t))
        if chains is None:
            trace = np.zeros((len(t), points, 1 + long_run.PROJECTIONS), np.float32)
            begun = self.batches(self._start, key, indices, x_tilde, t, trace)
            chains = _concatenated(begun)
        first = int(chains.step[0])
        steps = {"first": first, "last": max(first, num_steps)}
        return _concatenated(
            self.batches(self._advance, key, indices, chains, x_tilde, t, **steps)
        )

    def adapt(
        self, key: Key[Array, ""], num_steps: int = 100, target: float = 0.65, chains: int = 16
    ) -> tuple[Float[np.ndarray, "T"], Float[np.ndarray, "T"]]:
        """Adapts the step size of MALA or HMC at every level, on chains thrown away.

        Every device makes the same chains, so the result does not depend on their number.

        Returns:
          step size and acceptance of every level (`sampling.warm_up`).
        """
        method = self.method

        @functools.partial(jax.jit, out_shardings=parallel.replicated(self.mesh))
        def program(params, key):
            keys = noise.example_keys(key, jnp.arange(chains))
            return sampling.warm_up(
                *(keys, method.F(params), method.energy.shape, method.schedule),
                *(method.sampler, num_steps, target),
            )

        step_size, acceptance = program(self.params, key)
        self.tuning = self.tuning | {"step_size": step_size}
        return np.asarray(step_size), np.asarray(acceptance)

    def _recover_strips(
        self, key: Key[Array, ""], strips: Float[Array, "pairs frames H W C"], level: int
    ) -> Float[np.ndarray, "pairs frames H W C"]:
        """Makes images of strips of x_level; the frames of a strip share their noise."""
        pairs, frames, *shape = strips.shape
        x = np.asarray(strips).reshape(-1, *shape)
        indices = np.repeat(np.arange(pairs), frames)
        batches = self.batches(self._descend, key, indices, x, top=level, bottom=0)
        return np.concatenate(list(batches)).reshape(strips.shape)

    def compile(self, program: Callable) -> Callable:
        """Makes program(keys, F, sampler, *arrays, **settings) run on all devices.

        Of the result, (params, tuning, key, indices, arrays, settings) -> arrays, each device
        holds a block of the examples that `indices` number. Settings are
        numbers by name, or trees of them, whole on every device; others are no other program.
        """
        method, mesh = self.method, self.mesh

        def on_device(shared, examples):
            params, tuning, settings = shared
            keys, arrays = examples
            sampler = method.sampler._replace(tuning=tuning)
            return program(keys, method.F(params), sampler, *arrays, **settings)

        whole, split = parallel.replicated(mesh), parallel.by_example(mesh)

        @functools.partial(
            jax.jit,
            in_shardings=(whole, whole, whole, split, split, whole),
            out_shardings=split,
        )
        def compiled(params, tuning, key, indices, arrays, settings):
            keys = noise.example_keys(key, indices)
            shared = params, tuning, settings
            return parallel.over_examples(on_device, mesh)(shared, (keys, arrays))

        return compiled

    def batches(
        self,
        compiled: Callable,
        key: Key[Array, ""],
        indices: Int[np.ndarray, "n"],
        *arrays: Any,
        **settings: Any,
    ) -> Iterator[Any]:
        """Runs a compiled program on the examples of these numbers, a batch at a time.

        Arrays go in and come out in any tree, an example a row of each. The last batch is
        filled up with copies, so that it needs no program of its own. While the caller has a
        batch in hand the devices are at work on the next, so that no writing stalls them.
        """
        n = len(indices)
        size = min(self._batch_size, -(-n // self.mesh.size) * self.mesh.size)
        split = parallel.by_example(self.mesh)

        def begun(start: int) -> tuple[int, Any]:
            rows = np.minimum(np.arange(start, start + size), n - 1)
            batch = jax.tree.map(lambda array: array[rows], (indices, arrays))
            numbers, examples = parallel.place(batch, split)
            out = compiled(self.params, self.tuning, key, numbers, examples, settings)
            return n - start, out

        batches = map(begun, range(0, n, size))
        pending = next(batches, None)
        while pending:
            (left, out), pending = pending, next(batches, None)  # which begins the next one
            yield jax.tree.map(lambda x, left=left: x[:left], parallel.fetch(out))


def _concatenated(batches: Iterator[Any]) -> Any:
    """Returns batches of one tree of arrays as one batch."""
    return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)


class Run(NamedTuple):
    """What a work directory holds.

    Attributes:
      config: of its training.
      model: with the averaged parameters of the newest readable checkpoint.
      step: training steps behind them.
    """

    config: ConfigDict
    model: Model
    step: int


def load_run(
    workdir: str | epath.Path,
    revise: Callable[[ConfigDict], ConfigDict] = lambda config: config,
) -> Run:
    """Loads a work directory.

    Args:
      workdir: of a run.
      revise: changes the configuration in what can change after training, such as the
        sampler; what was learned stays as it was.

    Raises:
      UserError: if it holds no readable checkpoint.
    """
    workdir = epath.Path(workdir)
    mesh = parallel.make_mesh()
    restored = None
    with told(f"cannot read {workdir}"):
        found = (workdir / "checkpoints").exists()
    if found:
        with checkpoints.Checkpoints(workdir) as manager:
            restored = manager.restore(abstract_state, lambda _: parallel.replicated(mesh))
    if restored is None:
        raise UserError(
            f"no checkpoint to read in {workdir}: train there first (--mode=train), or "
            "give the --workdir of a trained model"
        )
    config, state = restored
    built = method.from_config(config)
    config = revise(config)
    model = Model(
        generating(built, config.mcmc),
        generating_params(built.energy, state, mesh),
        mesh,
        config.evaluation.batch_size,
    )
    return Run(config, model, int(state.step))


def generating(learned: Method, mcmc: ConfigDict) -> Method:
    """Returns the method with the sampler, and its noise scale, of `config.mcmc`."""
    return learned._replace(
        sampler=method.make_sampler(mcmc, learned.schedule, mcmc.noise_scale)
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def generating_params(energy: Energy, state: train_state.TrainState, mesh: Mesh) -> Params:
    """Returns what images are generated with: the averaged parameters, normalised."""
    return energy.normalise(parallel.gather(state.ema, mesh), state.vectors)[0]


def abstract_state(config: ConfigDict) -> train_state.TrainState:
    """Returns the shapes of the training state that the configuration asks for."""
    return train_state.abstract(
        method.from_config(config).energy, train_state.optimiser(config)
    )
