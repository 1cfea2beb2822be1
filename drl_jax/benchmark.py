"""How near the programs of a run are to what the machine can do, and how their time grows.

    python -m drl_jax.benchmark [--config=configs/cifar10.py] [--batch_size=16] [--json=PATH]
    python -m drl_jax.benchmark --growth
    python -m drl_jax.benchmark --input --config=configs/cifar10.py
    python -m drl_jax.benchmark --startup --config=configs/digits.py

The floor of a program is the time of its convolutions' and dense layers' FLOPs at the speed
of a 2048³ float32 matrix product on the same device: one forward pass, 2 for a chain step
(a gradient with respect to the images), 2K + 6 for a training step (K chain steps, then the
gradient with respect to the parameters for data and chain ends). Efficiency is floor / time:
1 is the floor, and more is a program with fewer products than the direct sums have. Every
repeat measures the matrix product again, just before and just after, because machines change
their speed.

Generation, by the configuration and as T1k, is measured through CHAIN_STEPS chain steps of it.

With --growth one size after the other is varied, and the exponent e fitted with which time,
counted in matrix products, goes as FLOPs to the power of e: above 1, it grows faster than them.

With --startup new processes are timed: one that prints --help, and two that train a model from
its start to the first step that is reported, without and with what the first has compiled.

With --input it times the reading of batches: of random images, as PNG files in an ArrayRecord
data set that TFDS has made, of the configuration's size and batch.

Without --config it measures the paper's network with N = 2 blocks a resolution, 9 million
parameters, at batch 16: what fits a small computer.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import (
    cores,
    data,
    flops,
    method,
    model,
    noise,
    parallel,
    sampling,
    train_state,
    train_step,
)
from drl_jax.errors import UserError
from drl_jax.files import write_whole
from drl_jax.progress import Progress

SIDE = 2048  # of the matrices whose product is the yardstick
LEAST_SECONDS = 0.1  # a quicker program is called again until so much time has gone
IMAGES = 20_000  # that --input reads
BATCHES = 60  # in one of its measurements
CHAIN_STEPS = 5  # at most, of the chain that a chain's step is measured in

# What makes T1k of T6: as in configs/cifar10_t1k.py.
T1K = {
    "diffusion.T": 1000,
    "energy.parameterisation": "noise",
    "mcmc.sampler": "normal_approximation",
    "mcmc.K": 1,
}

# What --growth varies: its name, fields of the configuration, values, and of which program.
GROWTH = (
    ("batch", "train.batch_size", (4, 8, 16, 32), "training step"),
    ("image size", "data.image_size", (16, 32, 64), "training step"),
    ("N", "energy.N", (1, 2, 4), "training step"),
    ("K", "mcmc.K", (1, 2, 4, 8), "training step"),
    ("T", "diffusion.T", (2, 4, 8), "generation"),
)

_CONFIG = flags.DEFINE_string("config", None, "A file of configs/.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Instead of the config's.", 1)
_K = flags.DEFINE_integer("K", None, "Chain steps, instead of the config's.", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each program.", 1)
_QUICK = flags.DEFINE_bool("quick", False, "At most K = 5 and 2 repeats.")
_SAMPLES = flags.DEFINE_integer("samples", 64, "Measure the generation of so many.", 0)
_GROWTH = flags.DEFINE_bool("growth", False, "Vary the sizes, at K = 2, instead.")
_STARTUP = flags.DEFINE_bool("startup", False, "Time new processes of --config, instead.")
_INPUT = flags.DEFINE_bool("input", False, "Time the reading of batches, instead.")
flags.mark_bool_flags_as_mutual_exclusive(["growth", "startup", "input"])
_JSON = flags.DEFINE_string("json", None, "Where to write the numbers as JSON.")


class Program(NamedTuple):
    """A compiled program to measure.

    Attributes:
      name: of it.
      flops: of what one of `steps` does.
      steps: how many one call makes.
      compile_seconds: of tracing, lowering and compilation, without and with JAX's cache.
      call: makes one call.
    """

    name: str
    flops: float
    steps: int
    compile_seconds: tuple[float, float]
    call: Callable[[], Any]


class Row(NamedTuple):
    """What was measured of one program.

    Attributes:
      name, flops, compile_seconds: as in `Program`.
      seconds: of one step, a repeat.
      efficiency: floor / time, a repeat.
    """

    name: str
    flops: float
    compile_seconds: tuple[float, float]
    seconds: list[float]
    efficiency: list[float]


def default_config() -> ConfigDict:
    """Returns the paper's 32x32 network with N = 2, at batch 16: 9 million parameters."""
    config = config_lib.default()
    config.energy.N = 2
    config.train.batch_size = 16
    return config


class Subject:
    """A configuration on the devices at hand: its state, a batch, and its programs.

    Raises:
      UserError: if the devices cannot share the batch.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        devices = jax.devices()
        is_cpu = devices[0].platform == "cpu"
        if is_cpu and not cores.are_given():  # as many as `drl_jax.main` would have
            devices = devices[: cores.devices(config)]
        self.mesh = parallel.make_mesh(devices, **config.mesh)
        # A CPU's devices are parts of it: the product that one of them makes has all its cores.
        self.chips = 1 if is_cpu else self.mesh.size
        self.B = config.train.batch_size
        parallel.require_divisible(self.B, self.mesh, "train.batch_size", config.train.parts)
        self.method = method.from_config(config)
        self.optimiser = train_state.optimiser(config)
        self.key = jax.random.key(config.seed)
        energy, split = self.method.energy, parallel.by_example(self.mesh)
        self.state = train_state.create_on(self.mesh, self.key, energy, self.optimiser)
        self.params, _ = jax.jit(energy.normalise)(self.state.params, self.state.vectors)
        rng = np.random.default_rng(config.seed)
        x = rng.uniform(-1, 1, (self.B, *energy.shape)).astype(np.float32)
        self.x, self.t = jax.device_put((x, np.arange(self.B) % config.diffusion.T), split)
        self.keys = jax.device_put(noise.example_keys(self.key, jnp.arange(self.B)), split)

    def forward_pass(self) -> Program:
        """Returns f of the batch."""
        f = self.method.energy.f
        passed = parallel.over_examples(
            lambda params, examples: f(params, *examples), self.mesh
        )
        args = self.params, (self.x, self.t)
        program, seconds = compiled(jax.jit(passed), *args)
        work = self.B * flops.forward(self.config)
        return Program("forward pass", work, 1, seconds, lambda: program(*args))

    def chain_step(self) -> Program:
        """Returns a chain of the batch, of which a step is to be measured."""
        steps = min(self.config.mcmc.K, CHAIN_STEPS)
        short = self.method._replace(sampler=self.method.sampler._replace(K=steps))

        def negatives(params, examples):
            keys, x, t = examples
            return train_step.negatives(keys, params, x, t, short)

        chain = jax.jit(parallel.over_examples(negatives, self.mesh))
        args = self.params, (self.keys, self.x, self.t)
        program, seconds = compiled(chain, *args)
        work = 2 * self.B * flops.forward(self.config)
        return Program("chain step", work, steps, seconds, lambda: program(*args))

    def training_step(self) -> Program:
        """Returns the step that training runs; each call trains the state on."""
        config = self.config
        step = train_step.compile_for(
            *(self.mesh, self.method, self.optimiser),
            *(config.optim.ema_decay, config.train.parts),
        )
        program, seconds = compiled(step, self.state, self.x, self.key)

        def call():
            self.state, metrics = program(self.state, self.x, self.key)
            return metrics

        work = self.B * flops.training_step(config)
        return Program("training step", work, 1, seconds, call)

    def generation(self, samples: int, whole: bool = False) -> Program:
        """Returns the program that draws samples from white noise, or some of its steps.

        They are the first CHAIN_STEPS, of a level that has so many, or of several levels.

        Args:
          samples: how many, filled up to a multiple of the devices.
          whole: whether to make all steps of all levels.
        """
        config, T = self.config, self.config.diffusion.T
        samples, levels = -(-samples // self.mesh.size) * self.mesh.size, T
        if not whole:
            levels = min(T, max(1, CHAIN_STEPS // config.mcmc.K))
            config = varied(config, {"mcmc.K": min(config.mcmc.K, CHAIN_STEPS)})
        learned = model.generating(self.method, config.mcmc)
        drawn = model.Model(learned, self.params, self.mesh, samples)

        def descend(keys, F, sampler, top, bottom):
            x = sampling.white_noise(keys, learned.energy.shape, learned.schedule)
            return sampling.descend(keys, F, x, top, bottom, learned.schedule, sampler)

        indices, settings = jnp.arange(samples), {"top": T, "bottom": T - levels}
        args: Any = (self.params, drawn.tuning, self.key, indices, (), settings)
        program, seconds = compiled(drawn.compile(descend), *args)
        work = samples * flops.sampling(config) * levels / T
        return Program(f"generation, T{T}", work, 1, seconds, lambda: program(*args))


def measure(config: ConfigDict, repeats: int, samples: int = 0) -> dict[str, Any]:
    """Measures the configuration's programs on the devices at hand.

    Returns a dictionary of plain values: the device, the matrix product's FLOP/s in every
    repeat, the peak of memory in bytes, and a `Row` a program.

    Args:
      config: of the run.
      repeats: of every measurement.
      samples: to generate in one program, by the configuration and as T1k; 0: none.
    """
    subject = Subject(config)
    programs = [subject.forward_pass(), subject.chain_step(), subject.training_step()]
    if samples:
        programs.append(subject.generation(samples))
        if T1K["diffusion.T"] != config.diffusion.T:
            programs.append(Subject(varied(config, T1K)).generation(samples))
    with Progress(repeats * len(programs), "measurement") as progress:
        rows, peaks = timed(programs, repeats, subject.chips, progress)
    return {
        "device": f"{subject.mesh.size} x {subject.mesh.devices.flat[0].device_kind}",
        "config": config_lib.to_json(config),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(subject.params)),
        "matmul_flops_per_second": peaks,
        "peak_memory": peak_memory(),
        "programs": [row._asdict() for row in rows],
    }


def growth(config: ConfigDict, repeats: int) -> list[dict[str, Any]]:
    """Varies one size after the other and fits how time grows with the FLOPs.

    Returns of each a dictionary of plain values: what was varied, a `Row` a value, and the
    exponent of the time, counted in matrix products, in the FLOPs.
    """
    found = []
    total = repeats * sum(len(values) for _, _, values, _ in GROWTH)
    with Progress(total, "measurement") as progress:
        for name, field, values, kind in GROWTH:
            rows: list[Row] = []
            for value in values:
                subject = Subject(varied(config, {field: value}))
                generates = kind == "generation"
                program = (
                    subject.generation(subject.B, whole=True)
                    if generates
                    else subject.training_step()
                )
                rows += timed([program], repeats, subject.chips, progress)[0]
            work = np.log([row.flops for row in rows])
            products = work - np.log([np.median(row.efficiency) for row in rows])
            found.append(
                {
                    "name": name,
                    "values": list(values),
                    "exponent": float(np.polyfit(work, products, 1)[0]),
                    "programs": [row._asdict() for row in rows],
                }
            )
    return found


def startup(config: str) -> dict[str, float]:
    """Times new processes of `drl_jax.main`: returns the seconds of each.

    "help" is until it has ended, "first step, cold" and "first step, cached" are until the
    first training step is reported, compiled by this process or by the one before it.

    Args:
      config: path of a file of configs/.

    Raises:
      UserError: if training ended before its first step.
    """
    main = [sys.executable, "-m", "drl_jax.main"]
    start = time.perf_counter()
    subprocess.run([*main, "--help"], stdout=subprocess.DEVNULL, check=True)
    found = {"help": time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for name in ("cold", "cached"):
            command = [*main, f"--config={config}", "--config.train.num_steps=1"]
            command += ["--config.log.every_steps=1", f"--workdir={folder}/{name}"]
            start = time.perf_counter()
            process = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            with process:
                said = ""
                for said in process.stdout or ():
                    if said.startswith("step 1/1 "):
                        found[f"first step, {name}"] = time.perf_counter() - start
                        process.kill()
                        break
                else:
                    raise UserError(f"training ended before its first step: {said.strip()}")
    return found


def reading(config: ConfigDict, repeats: int, images: int = IMAGES) -> dict[str, Any]:
    """Times the reading of batches out of an ArrayRecord data set of random images.

    Returns of every repeat the batches read a second, with the batch and the images' shape.
    """
    import tensorflow_datasets as tfds  # seconds, which only this needs

    rng = np.random.default_rng(config.seed)
    shape = (config.data.image_size, config.data.image_size, config.data.channels)
    pixels = (rng.integers(256, size=shape, dtype=np.uint8) for _ in range(images))
    name, split = "random_images", "train"

    class Builder(tfds.dataset_builders.AdhocBuilder):
        url_infos = None  # else it looks for them, by a package that it does not require

    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        Builder(
            name=name,
            version="1.0.0",
            features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=shape)}),
            split_datasets={split: enumerate({"image": image} for image in pixels)},
            data_dir=folder,
        ).download_and_prepare(file_format="array_record")
        where = {"data.name": name, "data.split": split, "data.data_dir": folder}
        batches = data.training_batches(varied(config, where))
        found = []
        with Progress(repeats, "measurement") as progress:
            for _ in range(1 + repeats):  # the first to fill the buffers
                start = time.perf_counter()
                for _ in range(BATCHES):
                    next(batches)
                found.append(BATCHES / (time.perf_counter() - start))
                progress.add(len(found) > 1)
    return {"batch": config.train.batch_size, "shape": shape, "batches_a_second": found[1:]}


def peak_memory() -> int:
    """Returns the most bytes that the first device, or on a CPU this process, has held."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def varied(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Returns the configuration with other values of some fields."""
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    config_lib.validate(other)
    return other


def timed(
    programs: Sequence[Program], repeats: int, chips: int, progress: Progress
) -> tuple[list[Row], list[float]]:
    """Returns the measurements of programs, in turns, and the product's FLOP/s beside them."""
    rows = [Row(p.name, p.flops, p.compile_seconds, [], []) for p in programs]
    peaks = []
    for program in programs:
        jax.block_until_ready(program.call())
    for _ in range(repeats):
        for row, program in zip(rows, programs, strict=True):
            before = matmul_flops_per_second()
            seconds = seconds_a_call(program.call) / program.steps
            peaks.append(max(before, matmul_flops_per_second()))
            row.seconds.append(seconds)
            row.efficiency.append(row.flops / (peaks[-1] * chips) / seconds)
            progress.add(1)
    return rows, peaks


def compiled(jitted: Any, *args: Any) -> tuple[Callable, tuple[float, float]]:
    """Returns the compiled program, and the seconds of that without and with JAX's cache."""

    def anew() -> tuple[Callable, float]:
        jax.clear_caches()  # of traces: the second time, too, is from the beginning
        start = time.perf_counter()
        program = jitted.lower(*args).compile()
        return program, time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder, cached_in(folder):
        _, cold = anew()
        program, cached = anew()
    return program, (cold, cached)


@contextlib.contextmanager
def cached_in(folder: str) -> Iterator[None]:
    """Has JAX keep every compiled program in this folder, and no other."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def use(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(settings)
    try:
        yield
    finally:
        use(before)


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
        f"({min(peaks) / 1e9:.0f} to {max(peaks) / 1e9:.0f}); "
        f"peak of memory: {result['peak_memory'] / 2**30:.2f} GiB",
        f"{'':18}{'GFLOP':>10}{'compile':>10}{'cached':>10}{'ms':>10}"
        f"{'floor / time':>14}   spread",
    ]
    for row in result["programs"]:
        efficiency, (cold, cached) = row["efficiency"], row["compile_seconds"]
        lines.append(
            f"{row['name']:18}{row['flops'] / 1e9:10.4g}{cold:8.1f} s{cached:8.1f} s"
            f"{np.median(row['seconds']) * 1e3:10.4g}{np.median(efficiency):14.3f}"
            f"   {min(efficiency):.3f} to {max(efficiency):.3f}"
        )
    return "\n".join(lines)


def growth_table(found: list[dict[str, Any]]) -> str:
    """Returns how time grows for a person to read."""
    lines = [f"{'':22}{'GFLOP':>10}{'ms':>10}{'floor / time':>14}{'exponent':>10}"]
    for each in found:
        for value, row in zip(each["values"], each["programs"], strict=True):
            last = f"{each['exponent']:10.3f}" if value == each["values"][-1] else ""
            lines.append(
                f"{each['name'] + ' = ' + str(value):22}{row['flops'] / 1e9:10.4g}"
                f"{np.median(row['seconds']) * 1e3:10.4g}"
                f"{np.median(row['efficiency']):14.3f}{last}"
            )
    return "\n".join(lines)


def startup_table(found: dict[str, float]) -> str:
    """Returns the times of new processes for a person to read."""
    return "\n".join(f"{name:20}{seconds:8.2f} s" for name, seconds in found.items())


def reading_table(found: dict[str, Any]) -> str:
    """Returns how fast batches are read for a person to read."""
    speeds, shape = found["batches_a_second"], "x".join(map(str, found["shape"]))
    return (
        f"batches of {found['batch']} images of {shape}: {np.median(speeds):.1f} a second "
        f"({min(speeds):.1f} to {max(speeds):.1f})"
    )


def main(argv: Sequence[str]) -> None:
    """Measures what the flags say, prints the table, writes the JSON."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    if not cores.are_given():
        jax.config.update("jax_num_cpu_devices", cores.devices())
    try:
        config = config_lib.load(_CONFIG.value) if _CONFIG.value else default_config()
        config.train.batch_size = _BATCH_SIZE.value or config.train.batch_size
        config.mcmc.K = _K.value or config.mcmc.K
        repeats = _REPEATS.value
        if _QUICK.value:
            config.mcmc.K, repeats = min(config.mcmc.K, 5), min(repeats, 2)
        if _GROWTH.value:
            config.mcmc.K = _K.value or 2
        config_lib.validate(config)
        result: Any
        if _STARTUP.value:
            if not _CONFIG.value:
                raise UserError("--startup needs a --config, such as configs/digits.py")
            result = startup(_CONFIG.value)
            print(startup_table(result))
        elif _INPUT.value:
            result = reading(config, repeats)
            print(reading_table(result))
        elif _GROWTH.value:
            result = growth(config, repeats)
            print(growth_table(result))
        else:
            result = measure(config, repeats, _SAMPLES.value)
            print(table(result))
        if _JSON.value:
            text = json.dumps(result, indent=2) + "\n"
            write_whole(epath.Path(_JSON.value), text.encode())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
