"""Measures the errors of float32 and bfloat16 relative to float64.

    python -m drl_jax.tools.precision [--model=digits_t6] [--images=128] [--K=30] [--json=PATH]

The model's data, diffused to each noise level, are passed through the same network in three
precisions:

- float64, the reference: all computations, on the CPU of this process (`jax.enable_x64`).
- float32: all computations, as everywhere else in the package.
- bfloat16: only the products in the network f (`config.energy.dtype`). Their sums, and
  everything computed from f (its gradient, the chain and its noise), are float32. If the
  positions of the chain were rounded as well, its steps would be lost at level 0, where the
  noise is about as small as the spacing of bfloat16 numbers (0.004 for pixels near 1).

All three use the same random noise (`noise.normal`). The columns of the table, per level:

- f, grad f: root-mean-square error relative to the root mean square of the value. The relative
  errors of grad F are those of grad f.
- F: root-mean-square error [nats]. F is f divided by a temperature far below 1, so a small
  relative error of f can be many nats.
- dF: the same for F(y') - F(y), where y' is y plus the noise of one Langevin step. Errors that
  F(y) and F(y') have in common cancel. Accept decisions of MALA and HMC depend on such a
  difference.
- end/moved, end/noise: root-mean-square difference per pixel between the end of a chain of K
  Langevin steps from x_{t+1} and its end in float64. It is relative to the distance that the
  float64 chain moved, or to the noise added along the chain, s_t sqrt(K). Two chains with the
  same noise can diverge and still sample the same distribution.
- mean F: difference of the mean of F (evaluated in float64) over the ends of the chains, in
  standard deviations of F among chains that start from the same x_{t+1}, with its standard
  error. A significant difference shows that the chains sample another distribution.
- changed: share of HMC's accept decisions that differ from those in float64. Each of the K
  steps starts from the same position in every precision: that of a float64 chain, whose step
  size was adapted to the target acceptance.
- accept: mean acceptance probability of these steps.

The line below the table gives the root-mean-square error of log-weights of annealed importance
sampling (`sampling.annealing`) through all levels. A log-weight is the sum, in float64, of the
increments from each level to the one below, evaluated at data diffused to each level.

XLA:CPU has no bfloat16 arithmetic: it rounds the inputs of convolutions and matrix products
to bfloat16, then multiplies and adds in float32, as the tests verify. Accelerators also add
in float32, so the results should be similar there, but this has not been measured. On
accelerators, float32 products are less precise than on CPUs unless
`jax_default_matmul_precision` is 'highest': by default TPUs multiply in bfloat16 and GPUs in
TF32. The float32 rows show the precision on the available devices; the reference is always
computed on the CPU.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jaxtyping import Array, DTypeLike, Float, Int, Key

from drl_jax import diffusion, noise, recovery
from drl_jax import method as method_lib
from drl_jax.data import pipeline, sources
from drl_jax.mcmc.log_density import value_and_gradient
from drl_jax.method import Method
from drl_jax.metrics import frechet
from drl_jax.model import Model
from drl_jax.networks.energy import Params
from drl_jax.runtime.progress import Progress
from drl_jax.sampling import annealing, ladder
from drl_jax.sampling.ladder import Sampler
from drl_jax.storage import runs
from drl_jax.storage.atomic import write_json
from drl_jax.storage.runs import Run
from drl_jax.tools import command

CHAINS_PER_IMAGE = 4  # Langevin chains
WARM_UP_CHAINS = 16  # chains that adapt the step size of HMC

# Largest errors, at any level, for which the verdict is "accurate".
MAX_MEAN_F_SHIFT = 0.1  # standard deviations of F; shifts below 3 standard errors are ignored
MAX_CHANGED_DECISIONS = 0.01  # share of accept decisions
MAX_LOG_WEIGHT_ERROR = 0.1  # nats, which is an error of 10% in a weight


class Precision(NamedTuple):
    """A model in one numerical precision.

    Attributes:
      name: 'float64', 'float32' or 'bfloat16'.
      dtype: dtype of everything but the products in the network.
      method: network, noise levels and step sizes in this precision.
      params: parameters of the network in `dtype`.
    """

    name: str
    dtype: DTypeLike
    method: Method
    params: Params


class Positions(NamedTuple):
    """Positions at which the precisions are compared: float32, so exact in all three.

    Attributes:
      y: a_{t+1} x_t of the data.
      y_near: y plus the noise of one Langevin step.
      x_tilde: x_{t+1} of the data, where the chains start.
    """

    y: Float[np.ndarray, "B *D"]
    y_near: Float[np.ndarray, "B *D"]
    x_tilde: Float[np.ndarray, "B *D"]


class Energies(NamedTuple):
    """The network and the log-density of a level at some positions.

    Attributes:
      f: the network's output.
      grad_f: its gradient with respect to the position.
      F: the log-density, up to a constant [nats].
    """

    f: Float[np.ndarray, "B"]
    grad_f: Float[np.ndarray, "B *D"]
    F: Float[np.ndarray, "B"]


class Results(NamedTuple):
    """Results of one precision at one level.

    Attributes:
      energies: at y.
      delta_F: F(y_near) - F(y) [nats].
      ends: last positions of the Langevin chains, C = `CHAINS_PER_IMAGE` per image.
    """

    energies: Energies
    delta_F: Float[np.ndarray, "B"]
    ends: Float[np.ndarray, "C B *D"]


class Programs:
    """The computations to be compared, in one precision. Each is compiled once for all levels.

    Attributes:
      precision: the precision.
      step_size: Langevin step size of every level.
      K: number of steps of all chains.
      langevin: (keys, x_tilde, t) -> ends of Langevin chains.
      adapt_hmc: (keys, x_tilde, t) -> step size of HMC at the level t.
      hmc_chain: (keys, x_tilde, t, step_size) -> positions [K, B, ...] before each step of an
        HMC chain, and whether each step is accepted [K, B].
      hmc_decisions: (keys, positions, x_tilde, t, step_size) -> whether the same steps from the
        given positions are accepted, and their acceptance probabilities [K, B].
      log_weight_increments: (positions [L, B, ...], levels [L]) -> change of the log-weight
        from each level to the one below [L, B].
    """

    def __init__(self, precision: Precision, run: Run, K: int):
        """Defines the programs; chains make K steps."""
        self.precision, self.K = precision, K
        mcmc = run.config.mcmc.copy_and_resolve_references()
        method = precision.method

        def sampler(name: str) -> Sampler:
            mcmc.sampler, mcmc.start, mcmc.K = name, "x_tilde", K
            return method_lib.make_sampler(mcmc, method.schedule)

        with _x64(precision.dtype):
            langevin, hmc = sampler("langevin"), sampler("hmc")
        self.step_size = langevin.tuning["step_size"]

        def energies(params, y, t):
            f, grad_f = value_and_gradient(lambda y: method.energy.f(params, y, t), y)
            return f, grad_f, method.F(params)(y, t)

        def langevin_chain(params, keys, x_tilde, t):
            conditionals = method.conditionals(params)._replace(sampler=langevin)
            ends, _ = ladder.sample_conditional(keys, conditionals, x_tilde, t)
            return ends

        def log_density_fn(params, x_tilde, t):
            return method.conditionals(params).log_density_fn(x_tilde, t)

        def hmc_step(params, keys, x_tilde, t, step_size):
            """Returns the log-density and the kernel of step k: (state, k) -> (state, info)."""
            log_density = log_density_fn(params, x_tilde, t)
            tuning = hmc.tuning | {"step_size": jnp.full_like(self.step_size, step_size)}
            at_t = hmc._replace(tuning=tuning).tuning_at(t)

            def step(state, k):
                return hmc.kernel(noise.fold(keys, k), state, log_density, **at_t)

            return log_density, step

        def hmc_chain(params, keys, x_tilde, t, step_size):
            log_density, step = hmc_step(params, keys, x_tilde, t, step_size)

            def body(state, k):
                next_state, info = step(state, k)
                return next_state, (state.position, info.accepted)

            _, visited = jax.lax.scan(body, hmc.init(x_tilde, log_density), jnp.arange(K))
            return visited

        def hmc_decisions(params, keys, positions, x_tilde, t, step_size):
            log_density, step = hmc_step(params, keys, x_tilde, t, step_size)

            def body(_, k_and_y):
                k, y = k_and_y
                _, info = step(hmc.init(y, log_density), k)
                return None, (info.accepted, info.acceptance)

            _, decisions = jax.lax.scan(body, None, (jnp.arange(K), positions))
            return decisions

        def adapt_hmc(params, keys, x_tilde, t):
            step_size, _, _ = ladder.adapt_step_size(
                keys=keys,
                sampler=hmc,
                log_density_fn=log_density_fn(params, x_tilde, t),
                position=x_tilde,
                t=t[0],
                step_size=self.step_size[t[0]],
                num_steps=mcmc.warmup_steps,
                target=mcmc.target_acceptance,
                max_step_size=ladder.quarter_turn(hmc, method.schedule)[t[0]],
            )
            return step_size

        def log_weight_increments(params, x, levels):
            def increment(_, x_and_level):
                x, level = x_and_level
                below, above = (
                    annealing.level_log_density(
                        method.F(params), x, jnp.full(len(x), t), method.schedule
                    )
                    for t in (level - 1, level)
                )
                return None, below - above

            return jax.lax.scan(increment, None, (x, levels))[1]

        self._energies = self._compile(energies)
        self.langevin = self._compile(langevin_chain)
        self.adapt_hmc = self._compile(adapt_hmc)
        self.hmc_chain = self._compile(hmc_chain)
        self.hmc_decisions = self._compile(hmc_decisions)
        self.log_weight_increments = self._compile(log_weight_increments)

    def energies(self, y: Float[np.ndarray, "B *D"], t: Int[np.ndarray, "B"]) -> Energies:
        """Returns the energies of level t at the positions y."""
        return Energies(*self._energies(y, t))

    def positions(
        self, keys: Key[Array, "B"], x: Float[np.ndarray, "B *D"], t: Int[np.ndarray, "B"]
    ) -> Positions:
        """Draws the positions at which to compare the precisions at level t."""
        schedule = self.precision.method.schedule
        positive_keys, step_keys = noise.fold(keys, 0), noise.fold(keys, 1)
        y, x_tilde = recovery.positives(positive_keys, jnp.asarray(x), jnp.asarray(t), schedule)
        z = noise.normal(step_keys, x.shape[1:])
        y_near = y + noise.per_example(self.step_size[t], z) * z
        return Positions(np.asarray(y), np.asarray(y_near), np.asarray(x_tilde))

    def results(
        self, keys: Key[Array, "B"], positions: Positions, t: Int[np.ndarray, "B"]
    ) -> Results:
        """Returns the energies at the positions and the ends of the Langevin chains."""
        energies = self.energies(positions.y, t)
        delta_F = self.energies(positions.y_near, t).F - energies.F
        chain_keys = [noise.fold(keys, i) for i in range(CHAINS_PER_IMAGE)]
        ends = np.stack([self.langevin(each, positions.x_tilde, t) for each in chain_keys])
        return Results(energies, delta_F, ends)

    def F(
        self, y: Float[np.ndarray, "C B *D"], t: Int[np.ndarray, "B"]
    ) -> Float[np.ndarray, "C B"]:
        """Returns the log-density of level t at the ends of chains [nats]."""
        return np.stack([self.energies(each, t).F for each in y])

    def _compile(self, program: Callable) -> Callable[..., Any]:
        """Compiles program(params, *arrays); the result takes and returns numpy arrays."""
        jitted = jax.jit(program)
        dtype = self.precision.dtype

        def cast(array):
            is_float = isinstance(array, np.ndarray) and array.dtype.kind == "f"
            return array.astype(dtype) if is_float else array

        def call(*arrays):
            with _x64(dtype):
                results = jitted(self.precision.params, *map(cast, arrays))
                return jax.tree.map(np.asarray, results)

        return call


def precisions(run: Run) -> list[Precision]:
    """Returns the model in float64 (the reference), float32 and bfloat16."""

    def method(dtype):
        config = run.config.copy_and_resolve_references()
        config.energy.dtype = dtype
        return method_lib.from_config(config)

    single, half = method("float32"), method("bfloat16")
    with _x64(np.float64):
        double = method("float32")  # this network computes in the precision of its images

    def precision(name, dtype, method):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), run.model.params)
        return Precision(name, dtype, method, params)

    return [
        precision("float64", np.float64, double),
        precision("float32", np.float32, single),
        precision("bfloat16", np.float32, half),
    ]


def compare(run: Run, images: int, K: int, samples: int, seed: int = 0) -> dict[str, Any]:
    """Compares the precisions on a model's own data.

    Args:
      run: a trained model.
      images: maximum number of images of the data set. Every level has as many HMC chains, and
        `CHAINS_PER_IMAGE` times as many Langevin chains.
      K: number of steps per chain.
      samples: number of samples to generate in each precision; 0 skips generation.
      seed: random seed.

    Returns:
      JSON values: `levels`, a row per level and precision; `log_weight_error`, by precision
      [nats]; and `samples`, Fréchet distances of raw pixels.

    Raises:
      UserError: if the data cannot be read.
    """
    key, levels_key = jax.random.split(jax.random.key(seed))
    source = sources.open_source(run.config)
    x = pipeline.load_examples(run.config, source, images)
    programs = [Programs(precision, run, K) for precision in precisions(run)]
    levels = [group[0] for group in diffusion.level_groups(run.model.T)]
    rows = []
    with Progress(len(levels) + (3 if samples else 0), "measurement") as progress:
        for level in levels:
            rows += compare_level(programs, jax.random.fold_in(levels_key, level), x, level)
            progress.add(1)
        result: dict[str, Any] = {
            "device": jax.devices()[0].device_kind,
            "images": len(x),
            "K": K,
            "levels": rows,
            "log_weight_error": log_weight_errors(programs, levels_key, x),
        }
        if samples:
            _, single, half = (each.precision for each in programs)
            data = pipeline.load_examples(run.config, source, run.config.evaluation.num_data)
            result["samples"] = sample_distances(
                run, single, half, data, key, samples, progress
            )
    return result


def compare_level(
    programs: Sequence[Programs],
    key: Key[Array, ""],
    x: Float[np.ndarray, "B *D"],
    level: int,
) -> list[dict[str, Any]]:
    """Compares the precisions at one level.

    Args:
      programs: of float64, of float32, and of any other precisions.
      key: random key.
      x: data.
      level: level in 0..T-1.

    Returns:
      the errors by name, for each precision but float64.
    """
    reference, single, *_ = programs
    keys = noise.example_keys(key, jnp.arange(len(x)))
    position_keys, chain_keys, hmc_keys = (noise.fold(keys, purpose) for purpose in range(3))
    t = np.full(len(x), level, np.int32)
    positions = single.positions(position_keys, x, t)
    x_tilde, few = positions.x_tilde, slice(WARM_UP_CHAINS)
    step_size = single.adapt_hmc(hmc_keys[few], x_tilde[few], t[few])
    visited, accepted = reference.hmc_chain(hmc_keys, x_tilde, t, step_size)

    truth = reference.results(chain_keys, positions, t)
    F_truth = reference.F(truth.ends, t)
    # Standard deviation under p(y | x_tilde): it excludes the variance between images.
    std_F = np.sqrt(np.mean(np.var(F_truth, axis=0, ddof=1)))
    moved = _rms(truth.ends - x_tilde)

    rows = []
    for each in programs[1:]:
        results = each.results(chain_keys, positions, t)
        decisions, acceptance = each.hmc_decisions(hmc_keys, visited, x_tilde, t, step_size)
        difference = _rms(results.ends - truth.ends)
        shift = reference.F(results.ends, t) - F_truth
        rows.append(
            {
                "level": level,
                "precision": each.precision.name,
                **energy_errors(truth, results),
                "end_error_by_displacement": difference / moved,
                "end_error_by_noise": difference
                / float(each.step_size[level] * np.sqrt(each.K)),
                "mean_F_shift": float(np.mean(shift) / std_F),
                "mean_F_shift_error": float(np.std(shift) / np.sqrt(shift.size) / std_F),
                "std_F": float(std_F),
                "changed_decisions": float(np.mean(decisions != accepted)),
                "acceptance": float(np.mean(acceptance)),
            }
        )
    return rows


def energy_errors(truth: Results, results: Results) -> dict[str, float]:
    """Returns the errors of the energies by name."""
    energies, reference = results.energies, truth.energies
    return {
        "f_error": _rms(energies.f - reference.f) / _rms(reference.f),
        "grad_f_error": _rms(energies.grad_f - reference.grad_f) / _rms(reference.grad_f),
        "F_error": _rms(energies.F - reference.F),
        "delta_F_error": _rms(results.delta_F - truth.delta_F),
    }


def log_weight_errors(
    programs: Sequence[Programs], key: Key[Array, ""], x: Float[np.ndarray, "B *D"]
) -> dict[str, float]:
    """Returns the root-mean-square error of the log-weights of annealing [nats].

    Args:
      programs: of float64, and of other precisions, whose errors are returned by name.
      key: random key.
      x: data.
    """
    schedule = programs[1].precision.method.schedule
    keys = noise.example_keys(key, jnp.arange(len(x)))
    levels = np.arange(1, schedule.T + 1, dtype=np.int32)  # where the increments start

    @jax.jit
    def diffused(t):
        return diffusion.diffuse(
            noise.fold(keys, t), jnp.asarray(x), jnp.full(len(x), t), schedule
        )

    x_t = np.stack([diffused(t) for t in levels])
    truth, *others = (
        np.sum(np.float64(each.log_weight_increments(x_t, levels)), axis=0) for each in programs
    )
    names = (each.precision.name for each in programs[1:])
    return {name: _rms(log_w - truth) for name, log_w in zip(names, others, strict=True)}


def sample_distances(
    run: Run,
    single: Precision,
    half: Precision,
    data: Float[np.ndarray, "N *D"],
    key: Key[Array, ""],
    n: int,
    progress: Progress,
) -> dict[str, float]:
    """Returns Fréchet distances of raw pixels between precisions, and of each to the data.

    The samples in bfloat16 are compared with float32 samples that are drawn with another key.
    For comparison, the distance between two sets of float32 samples with different keys shows
    what equal distributions give.

    Args:
      run: the trained model.
      single: float32.
      half: bfloat16.
      data: images to compare with.
      key: random key.
      n: number of samples per set.
      progress: counts the three sets.
    """
    first, second = jax.random.split(key)
    batch_size = run.config.evaluation.batch_size
    truth = frechet.fit(data.reshape(len(data), -1))

    def draw(precision, key):
        method = precision.method._replace(sampler=run.model.method.sampler)
        model = Model.create(method, precision.params, run.model.mesh, batch_size)
        normal = frechet.fit(model.sample(key, n).reshape(n, -1))
        progress.add(1)
        return normal

    ours, again = draw(single, first), draw(single, second)
    low = draw(half, second)
    return {
        "n": n,
        "float32_to_data": frechet.frechet_distance(ours, truth),
        "bfloat16_to_data": frechet.frechet_distance(low, truth),
        "float32_to_float32": frechet.frechet_distance(ours, again),
        "float32_to_bfloat16": frechet.frechet_distance(ours, low),
    }


@contextmanager
def _x64(dtype: DTypeLike) -> Iterator[None]:
    """If the dtype is float64, enables it and computes on the CPU."""
    if dtype != np.float64:
        yield
        return
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def _rms(values: np.ndarray) -> float:
    """Returns the root mean square, computed in float64."""
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


# Title and format of each column of the table.
COLUMNS = (
    ("f", "{f_error:9.1e}"),
    ("grad f", "{grad_f_error:9.1e}"),
    ("F [nats]", "{F_error:10.2g}"),
    ("dF [nats]", "{delta_F_error:11.2g}"),
    ("end/moved", "{end_error_by_displacement:12.1e}"),
    ("end/noise", "{end_error_by_noise:12.1e}"),
    ("mean F", "{mean_F_shift:+10.0e} ± {mean_F_shift_error:.0e}"),
    ("changed", "{changed_decisions:9.2%}"),
    ("accept", "{acceptance:9.2f}"),
)


def table(result: dict[str, Any]) -> str:
    """Formats the result of `compare` as a table with a verdict per precision."""
    lines = [f"{result['device']}, {result['images']} images, chains of {result['K']} steps"]
    for row in result["levels"]:
        cells = [f"{row['level']:5}", f" {row['precision']:8}"]
        cells += [form.format(**row) for _, form in COLUMNS]
        if len(lines) == 1:
            titles = ("level", "", *(title for title, _ in COLUMNS))
            padded = zip(titles, cells, strict=True)
            lines.append("".join(f"{title:>{len(cell)}}" for title, cell in padded))
        lines.append("".join(cells))
    errors = ", ".join(f"{name} {v:.2g}" for name, v in result["log_weight_error"].items())
    lines.append(f"error of the log-weights of annealing through all levels [nats]: {errors}")
    if "samples" in result:
        lines.append(
            "pixel Fréchet distance of {n} samples to the data: float32 {float32_to_data:.3f}, "
            "bfloat16 {bfloat16_to_data:.3f};\nfrom float32 to bfloat16 "
            "{float32_to_bfloat16:.3f}, between two sets of float32 samples "
            "{float32_to_float32:.3f}".format(**result["samples"])
        )
    return "\n".join([*lines, *(verdict(result, name) for name in ("float32", "bfloat16"))])


def verdict(result: dict[str, Any], precision: str) -> str:
    """Returns a line that says for which uses a precision is accurate, and at which levels."""
    rows = [row for row in result["levels"] if row["precision"] == precision]
    verdicts = []
    for use, name, limit, text in (
        (
            "Langevin chains",
            "mean_F_shift",
            MAX_MEAN_F_SHIFT,
            "mean F shifted by {:.2g} standard deviations, limit {:g}",
        ),
        (
            "accept decisions",
            "changed_decisions",
            MAX_CHANGED_DECISIONS,
            "{:.2%} changed, limit {:.0%}",
        ),
    ):
        inaccurate = [
            str(row["level"])
            for row in rows
            if not abs(row[name]) <= max(limit, 3 * row.get(f"{name}_error", 0.0))
        ]
        largest = max(abs(row[name]) for row in rows)
        where = "" if len(inaccurate) == len(rows) else f" at level {', '.join(inaccurate)}"
        answer = f"not accurate{where}" if inaccurate else "accurate"
        verdicts.append(f"{use} {answer} ({text.format(largest, limit)})")
    error = result["log_weight_error"][precision]
    answer = "accurate" if error <= MAX_LOG_WEIGHT_ERROR else "not accurate"
    verdicts.append(
        f"log-weights {answer} (error {error:.2g} nats, limit {MAX_LOG_WEIGHT_ERROR:g})"
    )
    return f"{precision}: " + "; ".join(verdicts)


def define_flags() -> flags.FlagValues:
    """Returns this program's flags, unparsed and separate from those of `drl_jax.main`."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "model",
        "digits_t6",
        "Work directory, exported file or name of the model (default: digits_t6).",
        flag_values=values,
    )
    for name, default, minimum, text in (
        ("images", 128, 2, "Maximum number of images (default: 128)."),
        ("K", 30, 1, "Number of steps per chain (default: 30)."),
        ("samples", 500, 0, "Samples per precision; 0 skips generation (default: 500)."),
    ):
        flags.DEFINE_integer(name, default, text, minimum, flag_values=values)
    flags.DEFINE_string(
        "json", None, "File to write the results to, as JSON.", flag_values=values
    )
    return values


def main(argv: Sequence[str]) -> int:
    """Prints the table, writes the JSON and returns the exit status."""
    values = define_flags()

    def tool() -> None:
        run = runs.load(values.model)
        result = compare(run, values.images, values.K, values.samples)
        print(table(result))
        if values.json:
            write_json(epath.Path(values.json), result)

    return command.execute(tool, values, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
