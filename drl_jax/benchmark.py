"""How near the training step is to what the machine can do.

    python -m drl_jax.benchmark [--config=configs/cifar10.py] [--batch_size=16] [--json=PATH]

The floor of a program is the time of its convolutions' and dense layers' FLOPs at the speed
of a 2048³ float32 matrix product on the same device: one forward pass, 2 for a chain step
(a gradient with respect to the images), 2K + 6 for a training step (K chain steps, then the
gradient with respect to the parameters for data and chain ends together). Efficiency is
floor / time: 1 is the floor. Every repeat measures the product again, just before and just
after, because machines change their speed.

Without --config it measures the paper's network with N = 2 blocks a resolution, 9 million
parameters, at batch 16: what fits a small computer.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from drl_jax import config as config_lib
from drl_jax import flops, method, noise, parallel, train_state, train_step
from drl_jax.errors import UserError

SIDE = 2048  # of the matrices whose product is the yardstick
LEAST_SECONDS = 0.1  # a quicker program is called again until so much time has gone

_CONFIG = flags.DEFINE_string("config", None, "A file of configs/.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Instead of the config's.", 1)
_K = flags.DEFINE_integer("K", None, "Chain steps, instead of the config's.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each program.", 1)
_QUICK = flags.DEFINE_bool("quick", False, "At most K = 5 and 2 repeats.")
_JSON = flags.DEFINE_string("json", None, "Where to write the numbers as JSON.")


class Row(NamedTuple):
    """What was measured of one program.

    Attributes:
      name: of the program.
      flops: of one call.
      compile_seconds: tracing, lowering and compilation.
      seconds: of one call, a repeat.
      efficiency: floor / time, a repeat.
    """

    name: str
    flops: float
    compile_seconds: float
    seconds: list[float]
    efficiency: list[float]


def default_config() -> ConfigDict:
    """Returns the paper's 32x32 network with N = 2, at batch 16: 9 million parameters."""
    config = config_lib.default()
    config.energy.N = 2
    config.train.batch_size = 16
    return config


def measure(config: ConfigDict, repeats: int) -> dict[str, Any]:
    """Measures the configuration's programs on the devices at hand.

    Returns a dictionary of plain values: the device, the matrix product's FLOP/s in every
    repeat, and a `Row` a program.
    """
    mesh = parallel.make_mesh(**config.mesh)
    B, K, parts = config.train.batch_size, config.mcmc.K, config.train.parts
    parallel.require_divisible(B, mesh, "train.batch_size", parts)
    learned = method.from_config(config)
    optimiser = train_state.optimiser(config)
    split = parallel.by_example(mesh)

    key = jax.random.key(config.seed)
    create = jax.jit(
        lambda key: train_state.create(key, learned.energy, optimiser),
        out_shardings=train_state.shardings(learned.energy, optimiser, mesh),
    )
    state = create(key)
    params, _ = jax.jit(learned.energy.normalise)(state.params, state.vectors)
    rng = np.random.default_rng(config.seed)
    x = rng.uniform(-1, 1, (B, *learned.energy.shape)).astype(np.float32)
    x, t = jax.device_put((x, np.arange(B) % config.diffusion.T), split)
    keys = jax.device_put(noise.example_keys(key, jnp.arange(B)), split)

    chain_steps = min(K, 5)
    short = learned._replace(sampler=learned.sampler._replace(K=chain_steps))

    def negatives(params, examples):
        keys, x, t = examples
        return train_step.negatives(keys, params, x, t, short)

    def chain(params, keys, x, t):
        return parallel.over_examples(negatives, mesh)(params, (keys, x, t))

    step = train_step.compile_for(mesh, learned, optimiser, config.optim.ema_decay, parts)

    def train(*_):
        nonlocal state
        state, metrics = compiled_step(state, x, key)
        return metrics

    forward = B * flops.forward(config)
    bar = tqdm(total=3 + 3 * repeats, disable=None, leave=False)
    compiled_f, f_compile = compiled(jax.jit(learned.energy.f), params, x, t)
    bar.update()
    compiled_chain, chain_compile = compiled(jax.jit(chain), params, keys, x, t)
    bar.update()
    compiled_step, step_compile = compiled(step, state, x, key)
    bar.update()
    programs: list[tuple[Row, Callable, int]] = [
        (Row("forward pass", forward, f_compile, [], []), lambda: compiled_f(params, x, t), 1),
        (
            Row("chain step", 2 * forward, chain_compile, [], []),
            lambda: compiled_chain(params, keys, x, t),
            chain_steps,
        ),
        (
            Row("training step", B * flops.training_step(config), step_compile, [], []),
            train,
            1,
        ),
    ]
    for _, call, _ in programs:
        jax.block_until_ready(call())
    peaks = []
    for _ in range(repeats):
        for row, call, steps in programs:
            before = matmul_flops_per_second()
            seconds = seconds_a_call(call) / steps
            peak = max(before, matmul_flops_per_second())
            peaks.append(peak)
            row.seconds.append(seconds)
            row.efficiency.append(row.flops / (peak * mesh.size) / seconds)
            bar.update()
    bar.close()
    return {
        "device": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "config": config_lib.to_json(config),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "matmul_flops_per_second": peaks,
        "programs": [row._asdict() for row, _, _ in programs],
    }


def compiled(jitted: Any, *args: Any) -> tuple[Callable, float]:
    """Returns the compiled program and the seconds that took."""
    start = time.perf_counter()
    program = jitted.lower(*args).compile()
    return program, time.perf_counter() - start


def seconds_a_call(call: Callable[[], Any]) -> float:
    """Returns the mean time of a call, over calls that fill `LEAST_SECONDS`."""
    start = time.perf_counter()
    calls = 0
    while (passed := time.perf_counter() - start) < LEAST_SECONDS or not calls:
        jax.block_until_ready(call())
        calls += 1
    return passed / calls


def matmul_flops_per_second(times: int = 5) -> float:
    """Returns the best of some float32 products of SIDE³, on one device."""
    a = jnp.ones((SIDE, SIDE), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


def table(result: dict[str, Any]) -> str:
    """Returns the measurements for a person to read."""
    config, peaks = result["config"], result["matmul_flops_per_second"]
    lines = [
        f"{result['device']}, {result['parameters'] / 1e6:.1f}M parameters, "
        f"{config['data']['image_size']}x{config['data']['image_size']}, "
        f"batch {config['train']['batch_size']}, K = {config['mcmc']['K']}",
        f"matrix product: {np.median(peaks) / 1e9:.0f} GFLOP/s "
        f"({min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f})",
        f"{'':15}{'GFLOP':>10}{'compile':>10}{'ms':>10}{'floor / time':>14}   spread",
    ]
    for row in result["programs"]:
        efficiency = row["efficiency"]
        lines.append(
            f"{row['name']:15}{row['flops'] / 1e9:10.4g}{row['compile_seconds']:8.1f} s"
            f"{np.median(row['seconds']) * 1e3:10.4g}{np.median(efficiency):14.3f}"
            f"   {min(efficiency):.3f} to {max(efficiency):.3f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    """Measures what the flags say, prints the table, writes the JSON."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    try:
        config = config_lib.load(_CONFIG.value) if _CONFIG.value else default_config()
        config.train.batch_size = _BATCH_SIZE.value or config.train.batch_size
        config.mcmc.K = _K.value or config.mcmc.K
        repeats = _REPEATS.value
        if _QUICK.value:
            config.mcmc.K, repeats = min(config.mcmc.K, 5), min(repeats, 2)
        config_lib.validate(config)
        result = measure(config, repeats)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(table(result))
    if _JSON.value:
        epath.Path(_JSON.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
