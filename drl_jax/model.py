"""A trained model in the hand: energies and samples, as arrays in [-1, 1]."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key
from ml_collections import ConfigDict

from drl_jax import checkpoints, method, noise, parallel, recovery, sampling, train_state
from drl_jax.energies.energy import Energy, Params
from drl_jax.errors import UserError
from drl_jax.method import Method


class Model:
    """A network with its parameters, compiled for the devices at hand.

    Attributes:
      method: the network, the noise levels and the chain.
      params: spectrally normalised parameters, replaced freely: nothing recompiles.
      mesh: the devices.
    """

    def __init__(
        self,
        method: Method,
        params: Params,
        mesh: Mesh,
        batch_size: int = 256,
        noise_scale: float = 1.0,
    ):
        """Binds the parameters; `batch_size` images at a time are generated."""
        self.method = method
        self.params = params
        self.mesh = mesh
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._generate = compile_generator(method, mesh, noise_scale)
        self._f = jax.jit(method.energy.f)

    def f(self, x: Float[Array, "B H W C"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        """Returns the network's output for images x at levels t in 0..T-1."""
        return self._f(self.params, x, t)

    def log_density(self, x: Float[Array, "B H W C"], t: Int[Array, "B"]) -> Float[Array, "B"]:
        """Returns F(x, t) = f / s_t², the log-density of level t up to a constant [nats]."""
        return recovery.log_density(self.f, x, t, self.method.s)

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
        size = min(self._batch_size, -(-n // self.mesh.size) * self.mesh.size)
        for start in range(0, n, size):
            x = self._generate(self.params, key, jnp.arange(start, start + size))
            yield np.asarray(x)[: n - start]


def compile_generator(
    method: Method, mesh: Mesh, noise_scale: float
) -> Callable[[Params, Key[Array, ""], Int[Array, "B"]], Float[Array, "B *D"]]:
    """Returns (params, key, indices) -> samples: one program, one block a device."""

    def generate(params, keys):
        def f(x, t):
            return method.energy.f(params, x, t)

        x, _ = sampling.generate(
            keys, f, method.energy.shape, method.schedule, method.s, method.K, noise_scale
        )
        return x

    whole, split = parallel.replicated(mesh), parallel.by_example(mesh)

    @functools.partial(jax.jit, in_shardings=(whole, whole, split), out_shardings=split)
    def program(params, key, indices):
        keys = noise.example_keys(key, indices)
        return parallel.over_examples(generate, mesh)(params, keys)

    return program


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


def load_run(workdir: str | epath.Path) -> Run:
    """Loads a work directory.

    Raises:
      UserError: if it holds no readable checkpoint.
    """
    workdir = epath.Path(workdir)
    mesh = parallel.make_mesh()
    restored = None
    if (workdir / "checkpoints").exists():
        with checkpoints.Checkpoints(workdir) as manager:
            restored = manager.restore(abstract_state, parallel.replicated(mesh))
    if restored is None:
        raise UserError(
            f"no checkpoint to read in {workdir}: train there first (--mode=train), or "
            "give the --workdir of a trained model"
        )
    config, state = restored
    built = method.from_config(config)
    params = generating_params(built.energy, state)
    model = Model(built, params, mesh, config.evaluation.batch_size, config.mcmc.noise_scale)
    return Run(config, model, int(state.step))


@functools.partial(jax.jit, static_argnums=0)
def generating_params(energy: Energy, state: train_state.TrainState) -> Params:
    """Returns what images are generated with: the averaged parameters, normalised."""
    return energy.normalise(state.ema, state.vectors)[0]


def abstract_state(config: ConfigDict) -> train_state.TrainState:
    """Returns the shapes of the training state that the configuration asks for."""
    energy = method.from_config(config).energy
    create = functools.partial(
        train_state.create, energy=energy, optimiser=train_state.optimiser(config)
    )
    return jax.eval_shape(create, jax.random.key(0))
