"""Measures the speed of training and sampling relative to the hardware's matrix products.

    python -m drl_jax.tools.benchmark [--config=configs/cifar10.py] [--batch_size=16]
    python -m drl_jax.tools.benchmark --unet [--config=configs/digits.py] [--batch_size=64]
    python -m drl_jax.tools.benchmark --input --config=configs/cifar10.py
    python -m drl_jax.tools.benchmark --startup --config=configs/digits_t6.py

By default it times the network's forward pass, one step of the Markov chain, one training
step and the generation of samples. The efficiency of a program is t_ideal / t, where t is the
measured time, and t_ideal is the time that the FLOPs of its convolutions and dense layers would
take at the speed of a 2048x2048x2048 float32 matrix product on the same device. FLOPs are
counted analytically (`tools.flops`): with Langevin chains of K steps, a chain step costs as
much as 2 forward passes, and a training step as much as 2K + 6. The efficiency can exceed 1,
because Winograd's algorithm needs fewer products than are counted. The speed of shared machines
varies, so the matrix product is timed immediately before and after every measurement.

Without --config it measures the paper's 32x32 network with N = 2 blocks per resolution (9
million parameters) at batch size 16, which fits on a small computer. Generation is measured
for the configured method and for T1k; in either case at most 5 chain steps per sample are
timed.

With --unet, the network is replaced by a small U-Net with 1000 levels, trained by denoising
(`UNET`), for images of the configuration's size. A training step then costs as much as 6
forward passes: it is the gradient of a gradient, without a chain.

With --input, it instead measures how many batches per second the data pipeline delivers. The
images are random PNG images in a TFDS data set, stored as ArrayRecord; their size and the batch
size are those of the configuration.

With --startup, it instead measures new processes: the time that --help takes, and the time
until the first training step is reported, first without and then with the compiled programs in
the cache.

--json=PATH also writes the results as JSON.
"""

import contextlib
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
from drl_jax import method as method_lib
from drl_jax import noise
from drl_jax.data import pipeline, sources
from drl_jax.errors import UserError
from drl_jax.model import Model
from drl_jax.runtime import cpu_devices, sharding
from drl_jax.runtime.progress import Progress
from drl_jax.sampling import ladder
from drl_jax.storage.atomic import write_json
from drl_jax.tools import flops
from drl_jax.training import state as train_state
from drl_jax.training import step as train_step

MATMUL_SIZE = 2048  # rows and columns of the matrices whose product is timed
MIN_SECONDS = 0.1  # a program is called repeatedly until this much time has passed
INPUT_IMAGES = 20_000  # in the data set that --input reads
INPUT_BATCHES = 60  # per measurement of --input
CHAIN_STEPS = 5  # maximum number of chain steps to time

# Changes that turn a T6 configuration into T1k, as in configs/cifar10_t1k.py.
T1K = {
    "diffusion.T": 1000,
    "energy.parameterisation": "noise",
    "mcmc.sampler": "langevin",
    "mcmc.start": "posterior",
    "mcmc.denoise": "no",
    "energy.form": "inner_product",
    "initialiser.network": "none",
    "initialiser.attention": (),
    "mcmc.K": 0,
    "train.objective": "denoising",
}

# Changes that turn any configuration for images into a small U-Net, trained by denoising.
UNET = T1K | {
    "energy.network": "unet",
    "energy.ch": 32,
    "energy.mult": (1, 2),
    "energy.N": 1,
    "energy.dropout": 0.1,
    "energy.dtype": "float32",
}

_CONFIG = flags.DEFINE_string("config", None, "Configuration file, such as configs/cifar10.py.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Batch size of training (default: the configuration's).", 1
)
_K = flags.DEFINE_integer("K", None, "Steps per chain (default: the configuration's).", 1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Number of measurements of each program.", 1)
_QUICK = flags.DEFINE_bool("quick", False, "Limit K to 5 and --repeats to 2.")
_SAMPLES = flags.DEFINE_integer(
    "samples", 64, "Number of samples to generate at a time; 0 skips generation.", 0
)
_STARTUP = flags.DEFINE_bool("startup", False, "Measure the startup of new processes instead.")
_INPUT = flags.DEFINE_bool("input", False, "Measure the data pipeline instead.")
_UNET = flags.DEFINE_bool("unet", False, "Measure a small U-Net, trained by denoising.")
flags.mark_bool_flags_as_mutual_exclusive(["startup", "input", "unet"])
_JSON = flags.DEFINE_string("json", None, "File to write the results to, as JSON.")


class Program(NamedTuple):
    """A compiled program to measure.

    Attributes:
      name: name of the program.
      flops: FLOPs per step, on all devices together.
      steps: number of steps per call.
      compile_seconds: time taken by tracing, lowering and compilation, with an empty cache.
      cached_compile_seconds: the same with the compiled program in JAX's compilation cache.
      call: executes the program once.
    """

    name: str
    flops: float
    steps: int
    compile_seconds: float
    cached_compile_seconds: float
    call: Callable[[], Any]


class Measurement(NamedTuple):
    """Measurements of one program.

    Attributes:
      name, flops, compile_seconds, cached_compile_seconds: as in `Program`.
      seconds: time per step [s], one value per repeat.
      efficiency: time of the FLOPs at the speed of the matrix product, divided by the time per
        step; one value per repeat.
    """

    name: str
    flops: float
    compile_seconds: float
    cached_compile_seconds: float
    seconds: list[float]
    efficiency: list[float]


def default_config() -> ConfigDict:
    """Returns the paper's 32x32 network with N = 2, at batch size 16: 9 million parameters."""
    config = config_lib.default()
    config.energy.N = 2
    config.train.batch_size = 16
    return config


class Workload:
    """A training state and a batch of random images on the devices, and programs for them.

    Attributes:
      config: the configuration.
      mesh: devices that share the batch.
      num_chips: number by which the FLOPs are divided: the number of accelerators, or 1 on a
        CPU, where a matrix product on one device uses the cores of all devices.
      params: normalised parameters.

    Raises:
      UserError: if the batch size is not divisible by the number of devices.
    """

    def __init__(self, config: ConfigDict):
        self.config = config
        devices = jax.devices()
        is_cpu = devices[0].platform == "cpu"
        if is_cpu and not cpu_devices.set_by_user():  # as many as `drl_jax.main` would use
            devices = devices[: cpu_devices.count(config)]
        self.mesh = sharding.make_mesh(devices, **config.mesh)
        self.num_chips = 1 if is_cpu else self.mesh.size
        self._B = config.train.batch_size
        sharding.require_divisible(
            self._B, self.mesh, "train.batch_size", config.train.accumulate
        )
        self._method = method_lib.from_config(config)
        self._training = train_step.from_config(config)
        self._key = jax.random.key(config.seed)
        energy, split = self._method.energy, sharding.by_example(self.mesh)
        self._state = train_state.create_on(
            self.mesh, self._key, energy, self._training.optimiser
        )
        self.params, _ = jax.jit(energy.normalise)(self._state.params, self._state.vectors)
        rng = np.random.default_rng(config.seed)
        x = rng.uniform(-1, 1, (self._B, *energy.shape)).astype(np.float32)
        self._x, self._t = jax.device_put((x, np.arange(self._B) % config.diffusion.T), split)
        self._batch = {"image": self._x}
        if classes := energy.classes:
            label = rng.integers(1, classes + 1, self._B, np.int32)
            self._batch["label"] = jax.device_put(label, split)
        self._keys = jax.device_put(noise.example_keys(self._key, jnp.arange(self._B)), split)

    def forward_pass(self) -> Program:
        """Compiles f for the batch."""

        def f(params, examples):
            x, t = examples
            return self._method.energy.f(params, x, t)

        jitted = jax.jit(sharding.over_examples(f, self.mesh))
        work = self._B * flops.forward(self.config)
        return compiled("forward pass", jitted, self.params, (self._x, self._t), flops=work)

    def chain_step(self) -> Program:
        """Compiles chains of K or `CHAIN_STEPS` steps, whichever are fewer, for the batch.

        They start at x_tilde, which costs nothing, and make one step at least.
        """
        steps = min(max(1, self.config.mcmc.K), CHAIN_STEPS)
        sampler = self._method.sampler._replace(K=steps, start=ladder.start_at_x_tilde)
        method = self._method._replace(sampler=sampler)

        def negatives(params, examples):
            keys, x, t = examples
            return ladder.sample_conditional(keys, method.conditionals(params), x, t)

        jitted = jax.jit(sharding.over_examples(negatives, self.mesh))
        work = 2 * self._B * flops.forward(self.config)
        examples = self._keys, self._x, self._t
        return compiled("chain step", jitted, self.params, examples, flops=work, steps=steps)

    def training_step(self) -> Program:
        """Compiles the training step. Each call continues the training of the state."""
        step = train_step.compile_step(self.mesh, self._method, self._training)
        return compiled(
            "training step",
            step,
            self._state,
            self._batch,
            self._key,
            flops=self._B * flops.training_step(self.config),
            call=self._train,
        )

    def _train(self, step: Callable) -> Any:
        """Updates the state with one training step and returns the step's metrics."""
        self._state, metrics = step(self._state, self._batch, self._key)
        return metrics

    def generation(self, samples: int) -> Program:
        """Compiles the beginning of generation, from white noise.

        This is the first `CHAIN_STEPS` steps of the highest level; or, if a level has fewer
        steps, all steps of the highest levels, `CHAIN_STEPS` in total at most.

        Args:
          samples: number of samples, rounded up to a multiple of the number of devices.
        """
        samples = -(-samples // self.mesh.size) * self.mesh.size
        T, K = self.config.diffusion.T, self.config.mcmc.K
        levels = min(T, max(1, CHAIN_STEPS // max(1, K)))
        config = with_changes(self.config, {"mcmc.K": min(K, CHAIN_STEPS)})
        method = method_lib.for_generation(self._method, config)
        model = Model.create(method, self.params, self.mesh, samples)

        def descend(keys, conditionals, top, bottom):
            x = ladder.white_noise(keys, model.shape, method.schedule)
            return ladder.descend(keys, conditionals, x, top, bottom)

        indices = jnp.arange(samples)
        shared, examples = model.arguments(self._key, indices, top=T, bottom=T - levels)
        work = samples * flops.sampling(config) * levels / T
        name, jitted = f"generation, T{T}", model.compile(descend)
        return compiled(name, jitted, shared, examples, flops=work)


def compiled(
    name: str,
    jitted: Any,
    *arguments: Any,
    flops: float,
    steps: int = 1,
    call: Callable[[Callable], Any] | None = None,
) -> Program:
    """Compiles a program twice, with an empty cache and then from the cache, and times both.

    Args:
      name: name of the program.
      jitted: result of `jax.jit`.
      *arguments: its arguments.
      flops: FLOPs per step.
      steps: number of steps per call.
      call: function that executes the compiled program, its only argument; by default the
        program is called with `arguments`.
    """

    def compile_once() -> tuple[Callable, float]:
        jax.clear_caches()  # so that the second compilation also begins with tracing
        start = time.perf_counter()
        program = jitted.lower(*arguments).compile()
        return program, time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder, compilation_cache_in(folder):
        _, seconds = compile_once()
        program, cached_seconds = compile_once()
    return Program(
        name=name,
        flops=flops,
        steps=steps,
        compile_seconds=seconds,
        cached_compile_seconds=cached_seconds,
        call=lambda: call(program) if call else program(*arguments),
    )


@contextlib.contextmanager
def compilation_cache_in(folder: str) -> Iterator[None]:
    """Makes JAX cache all compiled programs in this folder and nowhere else."""
    settings = {
        "jax_enable_compilation_cache": True,
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}

    def apply(values: dict[str, Any]) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    apply(settings)
    try:
        yield
    finally:
        apply(before)


def measure_programs(config: ConfigDict, repeats: int, samples: int = 0) -> dict[str, Any]:
    """Measures the programs of a configuration on the available devices.

    Args:
      config: the configuration.
      repeats: number of measurements of each program.
      samples: number of samples to generate at a time; 0 skips generation.

    Returns:
      JSON values: the device, the configuration, the number of parameters, the FLOP/s of the
      matrix product in each repeat, the peak memory use, and a `Measurement` per program.
    """
    workload = Workload(config)
    programs = [workload.forward_pass(), workload.chain_step(), workload.training_step()]
    if samples:
        programs.append(workload.generation(samples))
        if T1K["diffusion.T"] != config.diffusion.T:
            programs.append(Workload(with_changes(config, T1K)).generation(samples))
    with Progress(repeats * len(programs), "measurement") as progress:
        measurements, matmul = measure(programs, repeats, workload.num_chips, progress)
    return {
        "device": f"{workload.mesh.size} x {workload.mesh.devices.flat[0].device_kind}",
        "config": config_lib.to_json(config),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(workload.params)),
        "matmul_flops_per_second": matmul,
        "peak_memory_bytes": peak_memory(),
        "programs": [measurement._asdict() for measurement in measurements],
    }


def measure(
    programs: Sequence[Program], repeats: int, num_chips: int, progress: Progress
) -> tuple[list[Measurement], list[float]]:
    """Measures the programs in turn, `repeats` times.

    Args:
      programs: what to measure.
      repeats: number of measurements of each.
      num_chips: number by which the FLOPs are divided (`Workload.num_chips`).
      progress: counts the measurements.

    Returns:
      the measurements of each program, and the FLOP/s of the matrix product at the time of each
      measurement.
    """
    measurements = [
        Measurement(
            name=program.name,
            flops=program.flops,
            compile_seconds=program.compile_seconds,
            cached_compile_seconds=program.cached_compile_seconds,
            seconds=[],
            efficiency=[],
        )
        for program in programs
    ]
    matmul = []
    for program in programs:
        jax.block_until_ready(program.call())
    for _ in range(repeats):
        for measurement, program in zip(measurements, programs, strict=True):
            before = matmul_flops_per_second()
            seconds = seconds_per_call(program.call) / program.steps
            matmul.append(max(before, matmul_flops_per_second()))
            measurement.seconds.append(seconds)
            measurement.efficiency.append(program.flops / (matmul[-1] * num_chips) / seconds)
            progress.add(1)
    return measurements, matmul


def seconds_per_call(call: Callable[[], Any]) -> float:
    """Returns the mean time per call [s], over as many calls as take `MIN_SECONDS` in total."""
    start = time.perf_counter()
    calls = 0
    while (elapsed := time.perf_counter() - start) < MIN_SECONDS or not calls:
        jax.block_until_ready(call())
        calls += 1
    return elapsed / calls


def matmul_flops_per_second(repeats: int = 5) -> float:
    """Returns the FLOP/s of the fastest of several float32 matrix products on one device."""
    a = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), jnp.float32)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, a))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / best


def peak_memory() -> int:
    """Returns the peak memory use [bytes] of the first device, or on CPUs, of this process."""
    if stats := jax.local_devices()[0].memory_stats():
        return stats["peak_bytes_in_use"]
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure_startup(config: str) -> dict[str, float]:
    """Measures new processes of `drl_jax.main`.

    Args:
      config: path of a configuration file.

    Returns:
      times [s] by name: "help", until `--help` has finished; "first step, cold" and "first
      step, cached", until the first training step is reported, by a process that compiles
      its programs and by one that finds them in the cache.

    Raises:
      UserError: if training ends before its first step.
    """
    main = [sys.executable, "-m", "drl_jax.main"]
    start = time.perf_counter()
    subprocess.run([*main, "--help"], stdout=subprocess.DEVNULL, check=True)
    times = {"help": time.perf_counter() - start}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for name in ("cold", "cached"):
            command = [*main, f"--config={config}", "--config.train.num_steps=1"]
            command += ["--config.log.every_steps=1", f"--workdir={folder}/{name}"]
            times[f"first step, {name}"] = seconds_to_first_step(command, environment)
    return times


def seconds_to_first_step(command: Sequence[str], environment: dict[str, str]) -> float:
    """Starts a training process and returns the time until it reports its first step [s].

    The process is then killed.

    Raises:
      UserError: if the process ends before that.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        line = ""
        for line in process.stdout or ():
            if line.startswith("step 1/1 "):
                seconds = time.perf_counter() - start
                process.kill()
                return seconds
    raise UserError(f"training ended before its first step; its last output: {line.strip()}")


def measure_input(
    config: ConfigDict, repeats: int, images: int = INPUT_IMAGES
) -> dict[str, Any]:
    """Measures how fast the data pipeline reads a TFDS data set of random images.

    Args:
      config: uses data and train.batch_size.
      repeats: number of measurements.
      images: number of images in the data set.

    Returns:
      JSON values: the batch size, the shape of an image, and the batches per second in each
      repeat.

    Raises:
      UserError: if the configuration is not for images.
    """
    shape = config_lib.example_shape(config)
    if len(shape) != 3:
        raise UserError(
            f"--input measures images, but examples have the shape {shape}: set "
            "--config.data.axes=2 and a network for images"
        )
    speeds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        random_config = with_changes(config, random_image_data(folder, shape, images))
        source = sources.open_source(random_config)
        batches = pipeline.training_batches(random_config, source)
        with Progress(repeats, "measurement") as progress:
            for repeat in range(1 + repeats):  # the first is not counted: it fills the buffers
                start = time.perf_counter()
                for _ in range(INPUT_BATCHES):
                    next(batches)
                if repeat:
                    speeds.append(INPUT_BATCHES / (time.perf_counter() - start))
                    progress.add(1)
    return {
        "batch_size": config.train.batch_size,
        "shape": shape,
        "batches_per_second": speeds,
    }


def random_image_data(folder: str, shape: tuple[int, ...], images: int) -> dict[str, str]:
    """Writes a TFDS data set of random PNG images; returns the config fields that select it."""
    import tensorflow_datasets as tfds  # imported here because it takes seconds

    class Builder(tfds.dataset_builders.AdhocBuilder):
        url_infos = None  # prevents TFDS from importing a package that it does not require

    rng = np.random.default_rng(0)
    pixels = (rng.integers(256, size=shape, dtype=np.uint8) for _ in range(images))
    name, split = "random_images", "train"
    tfds.disable_progress_bar()
    Builder(
        name=name,
        version="1.0.0",
        features=tfds.features.FeaturesDict({"image": tfds.features.Image(shape=shape)}),
        split_datasets={split: enumerate({"image": image} for image in pixels)},
        data_dir=folder,
    ).download_and_prepare(file_format="array_record")
    return {"data.name": name, "data.split": split, "data.data_dir": folder}


def with_changes(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Returns a copy of the configuration with other values of some fields."""
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict(changes)
    config_lib.validate(other)
    return other


def programs_table(result: dict[str, Any]) -> str:
    """Formats the result of `measure_programs`."""
    config, matmul = result["config"], result["matmul_flops_per_second"]
    shape = "x".join(map(str, config_lib.example_shape(ConfigDict(config))))
    lines = [
        f"{result['device']}, {result['parameters'] / 1e6:.1f}M parameters, "
        f"{shape}, batch size {config['train']['batch_size']}, K = {config['mcmc']['K']}",
        f"matrix product: {np.median(matmul) / 1e9:.0f} GFLOP/s "
        f"({min(matmul) / 1e9:.0f} to {max(matmul) / 1e9:.0f}); "
        f"peak memory: {result['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"{'':18}{'GFLOP':>10}{'compile':>10}{'cached':>10}{'ms':>10}{'efficiency':>12}"
        "   range",
    ]
    for row in result["programs"]:
        efficiency = row["efficiency"]
        lines.append(
            f"{row['name']:18}{row['flops'] / 1e9:10.4g}{row['compile_seconds']:8.1f} s"
            f"{row['cached_compile_seconds']:8.1f} s{np.median(row['seconds']) * 1e3:10.4g}"
            f"{np.median(efficiency):12.3f}   {min(efficiency):.3f} to {max(efficiency):.3f}"
        )
    return "\n".join(lines)


def startup_table(times: dict[str, float]) -> str:
    """Formats the result of `measure_startup`."""
    return "\n".join(f"{name:20}{seconds:8.2f} s" for name, seconds in times.items())


def input_table(result: dict[str, Any]) -> str:
    """Formats the result of `measure_input`."""
    speeds, shape = result["batches_per_second"], "x".join(map(str, result["shape"]))
    return (
        f"batches of {result['batch_size']} images of {shape}: "
        f"{np.median(speeds):.1f} per second ({min(speeds):.1f} to {max(speeds):.1f})"
    )


def load_config() -> ConfigDict:
    """Returns the configuration that the flags select.

    Raises:
      UserError: if it cannot be read or is invalid.
    """
    config = config_lib.load(_CONFIG.value) if _CONFIG.value else default_config()
    if _UNET.value:
        config = with_changes(config, UNET)
    config.train.batch_size = _BATCH_SIZE.value or config.train.batch_size
    config.mcmc.K = _K.value or config.mcmc.K
    if _QUICK.value:
        config.mcmc.K = min(config.mcmc.K, 5)
    config_lib.validate(config)
    return config


def main(argv: Sequence[str]) -> None:
    """Runs the measurement that the flags select, prints its table and writes the JSON."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    if not cpu_devices.set_by_user():
        jax.config.update("jax_num_cpu_devices", cpu_devices.count())
    repeats = min(_REPEATS.value, 2) if _QUICK.value else _REPEATS.value
    result: Any
    try:
        config = load_config()
        if _STARTUP.value:
            if not _CONFIG.value:
                raise UserError("--startup requires --config, for example configs/digits_t6.py")
            result = measure_startup(_CONFIG.value)
            print(startup_table(result))
        elif _INPUT.value:
            result = measure_input(config, repeats)
            print(input_table(result))
        else:
            result = measure_programs(config, repeats, _SAMPLES.value)
            print(programs_table(result))
        if _JSON.value:
            write_json(epath.Path(_JSON.value), result)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
