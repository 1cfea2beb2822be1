"""What float32 and bfloat16 do to energies, gradients and chains, against float64.

    python -m drl_jax.precision [--model=digits] [--images=128] [--K=30] [--json=PATH]

Data of the model, diffused to each level, meet the same network in three precisions:

- float64: everything, on the CPU, in this process (`jax.enable_x64`). What the others miss
  is counted against it.
- float32: everything, as the package computes.
- bfloat16: the products of f alone (`config.energy.dtype`); their sums, and what is made of
  f, its gradient, the chain and its noise in float32.

Where the lowest level's noise is near bfloat16's spacing, 0.004 for pixels near 1, rounding
the images alone loses the gradient. All three meet the same noise (`noise.normal`). Of each
level, the columns are

- f, grad f: root mean square of the error over root mean square of the value;
  grad F is grad f over a number;
- F: root mean square error in nats. F is f over a temperature far below one, so that few
  digits of f are many nats;
- step of F: of F(y') - F(y), y' a Langevin step's noise s_t z away, in nats: what is common
  to both errors goes. This is what a Metropolis step feels;
- path: of the end of K Langevin steps from x_{t+1}, the root mean square difference of a
  pixel from the float64 chain's, over that chain's displacement; beside it over the noise
  in the chain, s_t sqrt(K). Chains of one noise that part may still draw from one
  distribution;
- mean F: over the ends, F in float64 of both: how far it is from that of the float64 chains,
  in standard deviations of F among the ends of chains from one x_{t+1}, and the standard
  error of that. This is what tells that the chains draw from another distribution;
- other: of K steps of HMC from positions of the float64 chain, with a step size adapted to
  the usual acceptance, the share of accept decisions that come out otherwise;
- accepts: the mean acceptance of those steps.

Below the table stands the error of a whole log-weight: the gains of annealed importance
sampling (`likelihood`) from level to level, of data diffused to each level, added up exactly.

XLA:CPU has no bfloat16 arithmetic here: it multiplies and adds in float32 what was rounded on
its way into a convolution or a matrix product (seen in the compiled program, and tested).
Accelerators add up in float32 too, so this is near what they would give, but it is not measured
on one. There, mind that float32 itself is another thing unless `jax_default_matmul_precision`
is 'highest': TPUs multiply it in bfloat16, GPUs in TF32. The row of float32 shows what it does
on the devices at hand; the reference stays on the CPU.
"""

import json
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
from tqdm import tqdm

from drl_jax import data, diffusion, exported, likelihood, noise, recovery, sampling, train_step
from drl_jax import method as method_lib
from drl_jax.energies.energy import Params
from drl_jax.errors import UserError
from drl_jax.evaluation import frechet
from drl_jax.mcmc.log_density import value_and_gradient
from drl_jax.method import Method
from drl_jax.model import Model, Run
from drl_jax.sampling import Sampler

REPEATS = 4  # Langevin chains of each image
WARM_UP_CHAINS = 16  # of which HMC's step size is adapted

# What a use of the energies bears, at its worst level, before the verdict warns of it.
MEAN_SHIFT = 0.1  # of Langevin chains, in standard deviations of F, and 3 standard errors
DECISIONS = 0.01  # of accept steps, the share that come out otherwise
NATS = 0.1  # of log-weights, where 0.1 nats are 10%


class Way(NamedTuple):
    """A precision to compute in.

    Attributes:
      name: of it.
      dtype: of all but the network.
      method: with the network, the noise levels and step sizes in this precision.
      params: of the network.
    """

    name: str
    dtype: DTypeLike
    method: Method
    params: Params


def ways(run: Run) -> list[Way]:
    """Returns float64, the reference, and then the others."""

    def method(dtype):
        config = run.config.copy_and_resolve_references()
        config.energy.dtype = dtype
        return method_lib.from_config(config)

    single, half = method("float32"), method("bfloat16")
    with _x64(np.float64):
        double = method("float32")  # of arrays in float64, float64

    def way(name, dtype, method):
        cast = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), run.model.params)
        return Way(name, dtype, method, cast)

    return [
        way("float64", np.float64, double),
        way("float32", np.float32, single),
        way("bfloat16", np.float32, half),
    ]


def measure(run: Run, images: int, K: int, samples: int, seed: int = 0) -> dict[str, Any]:
    """Compares the precisions on a model's own data.

    Args:
      run: a trained model.
      images: of the data, at most, and so many chains a level.
      K: steps of the chains.
      samples: to generate in each precision; 0 for none.
      seed: of all noise.

    Returns:
      plain values: `levels`, a row for each level and precision, and `samples`, the Fréchet
      distances of raw pixels.

    Raises:
      UserError: if the data cannot be read.
    """
    key, levels_key = jax.random.split(jax.random.key(seed))
    x = np.stack(list(data.all_images(run.config, images)))
    programs = [Programs(way, run, K) for way in ways(run)]
    T = run.model.method.schedule.T
    levels = [group[0] for group in train_step.level_groups(T)]
    rows = []
    bar = tqdm(total=len(levels) + (3 if samples else 0), disable=None, leave=False)
    for level in levels:
        rows += level_rows(programs, jax.random.fold_in(levels_key, level), x, level)
        bar.update()
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "images": len(x),
        "K": K,
        "levels": rows,
        "log_weight": log_weight_errors(programs, levels_key, x),
    }
    if samples:
        others = [each.way for each in programs[1:]]
        result["samples"] = _sampled(run, others, key, samples, bar.update)
    bar.close()
    return result


def level_rows(
    programs: "Sequence[Programs]",
    key: Key[Array, ""],
    x: Float[np.ndarray, "B *D"],
    level: int,
) -> list[dict[str, Any]]:
    """Compares the precisions at one level.

    Args:
      programs: of float64, of float32, and of what else there is.
      key: of all noise.
      x: data, without noise.
      level: in 0..T-1.

    Returns:
      the errors of each but the first, by name.
    """
    reference, single, *_ = programs
    keys = noise.example_keys(key, jnp.arange(len(x)))
    draw_keys, chain_keys, hmc_keys = (noise.fold(keys, purpose) for purpose in range(3))
    t = np.full(len(x), level, np.int32)
    start = single.start(draw_keys, x, t)
    few = slice(WARM_UP_CHAINS)
    step_size = single.adapt(hmc_keys[few], start.x_tilde[few], t[few])
    visited, accepted = reference.visit(hmc_keys, start.x_tilde, t, step_size)

    truth = reference.see(chain_keys, start, t)
    F_end = reference.F_of(truth.end, t)
    # Among chains of one image, as p(y | x_tilde) varies: over all images F varies more.
    spread = np.sqrt(np.mean(np.var(F_end, axis=0, ddof=1)))
    moved = _rms(truth.end - start.x_tilde)

    rows = []
    for each in programs[1:]:
        seen = each.see(chain_keys, start, t)
        decided, acceptance = each.decide(hmc_keys, visited, start.x_tilde, t, step_size)
        apart = _rms(seen.end - truth.end)
        shift = reference.F_of(seen.end, t) - F_end
        rows.append(
            {
                "level": level,
                "precision": each.way.name,
                **errors(truth, seen),
                "path_by_displacement": apart / moved,
                "path_by_noise": apart / float(each.s[level] * np.sqrt(each.K)),
                "mean_F": float(np.mean(shift) / spread),
                "mean_F_error": float(np.std(shift) / np.sqrt(shift.size) / spread),
                "spread_of_F": float(spread),
                "other_decisions": float(np.mean(decided != accepted)),
                "acceptance": float(np.mean(acceptance)),
            }
        )
    return rows


def log_weight_errors(
    programs: "Sequence[Programs]", key: Key[Array, ""], x: Float[np.ndarray, "B *D"]
) -> dict[str, float]:
    """Returns the root mean square error of log-weights in each but the first [nats]."""
    single = programs[1]
    schedule = single.way.method.schedule
    keys = noise.example_keys(key, jnp.arange(len(x)))
    levels = np.arange(1, schedule.T + 1, dtype=np.int32)  # those that chains come from

    @jax.jit
    def diffused(t):
        return diffusion.diffuse(
            noise.fold(keys, t), jnp.asarray(x), jnp.full(len(x), t), schedule
        )

    x_t = np.stack([diffused(t) for t in levels])
    truth, *others = (np.sum(np.float64(each.gains(x_t, levels)), axis=0) for each in programs)
    names = (each.way.name for each in programs[1:])
    return {name: _rms(log_w - truth) for name, log_w in zip(names, others, strict=True)}


class Start(NamedTuple):
    """Where a level is looked at, in float32: every precision can hold it.

    Attributes:
      y: a_{t+1} x_t of the data.
      near: y with the noise of one Langevin step.
      x_tilde: x_{t+1} of the data, where chains start.
    """

    y: Float[np.ndarray, "B *D"]
    near: Float[np.ndarray, "B *D"]
    x_tilde: Float[np.ndarray, "B *D"]


class Energies(NamedTuple):
    """The energies of a level at some positions.

    Attributes:
      f, grad_f: of the network.
      F: the log-density [nats].
    """

    f: Float[np.ndarray, "B"]
    grad_f: Float[np.ndarray, "B *D"]
    F: Float[np.ndarray, "B"]


class Seen(NamedTuple):
    """What one precision makes of a level.

    Attributes:
      at: the energies at y.
      increment: of F, from y to the position near it [nats].
      end: of the Langevin chains, `REPEATS` of each image.
    """

    at: Energies
    increment: Float[np.ndarray, "B"]
    end: Float[np.ndarray, "R B *D"]


class Programs:
    """The programs of one precision, compiled once for all levels.

    Attributes:
      way: the precision.
      s: step s_t of the Langevin chains at every level.
      K: steps of all chains.
      chain: (keys, x_tilde, t) -> the ends of Langevin chains.
      adapt: (keys, x_tilde, t) -> HMC's step size at the level t.
      visit: (keys, x_tilde, t, step size) -> the positions [K, B, ...] from which a chain of
        HMC makes its steps, and whether it accepts them [K, B].
      decide: (keys, positions, x_tilde, t, step size) -> whether the same steps from these
        positions are accepted, and with what probability.
      gains: (positions [L, B, ...], levels [L]) -> what a move from each level to the one below
        adds to the log-weight [L, B].
    """

    def __init__(self, way: Way, run: Run, K: int):
        """Binds the parameters; chains make K steps."""
        self.way = way
        mcmc = run.config.mcmc.copy_and_resolve_references()
        method, F = way.method, way.method.F

        def sampler(name: str) -> Sampler:
            mcmc.sampler, mcmc.K = name, K
            return method_lib.make_sampler(mcmc, method.schedule)

        with _x64(way.dtype):
            langevin, hmc = sampler("langevin"), sampler("hmc")
        self.s, self.K = langevin.tuning["step_size"], K

        def energies(params, y, t):
            f, grad_f = value_and_gradient(lambda y: method.energy.f(params, y, t), y)
            return f, grad_f, F(params)(y, t)

        def chain(params, keys, x_tilde, t):
            return sampling.sample_conditional(
                keys, F(params), x_tilde, t, method.schedule, langevin
            )[0]

        def hmc_step(params, keys, x_tilde, t, step_size):
            tuning = hmc.tuning | {"step_size": jnp.full_like(self.s, step_size)}
            density = _conditional(method, params, x_tilde, t)
            stepper = sampling.chain_step(keys, hmc._replace(tuning=tuning), density, t)
            return density, stepper

        def visit(params, keys, x_tilde, t, step_size):
            density, step = hmc_step(params, keys, x_tilde, t, step_size)

            def body(state, k):
                end, info = step(state, k)
                return end, (state.position, info.accepted)

            return jax.lax.scan(body, hmc.init(x_tilde, density), jnp.arange(K))[1]

        def decide(params, keys, visited, x_tilde, t, step_size):
            density, step = hmc_step(params, keys, x_tilde, t, step_size)

            def body(_, at):
                k, y = at
                info = step(hmc.init(y, density), k)[1]
                return None, (info.accepted, info.acceptance)

            return jax.lax.scan(body, None, (jnp.arange(K), visited))[1]

        def adapt(params, keys, x_tilde, t):
            return sampling.adapt_step_size(
                *(keys, hmc, _conditional(method, params, x_tilde, t), x_tilde, t[0]),
                *(self.s[t[0]], mcmc.warmup_steps, mcmc.target_acceptance),
            )[0]

        def gains(params, x, levels):
            def gain(_, at):
                x, level = at
                below, above = (
                    likelihood.level_log_density(
                        F(params), x, jnp.full(len(x), t), method.schedule
                    )
                    for t in (level - 1, level)
                )
                return None, below - above

            return jax.lax.scan(gain, None, (x, levels))[1]

        self._energies = self._bound(energies)
        self.gains = self._bound(gains)
        self.visit = self._bound(visit)
        self.adapt = self._bound(adapt)
        self.chain = self._bound(chain)
        self.decide = self._bound(decide)

    def energies(self, y: Float[np.ndarray, "B *D"], t: Int[np.ndarray, "B"]) -> Energies:
        """Returns the energies of level t at the positions y."""
        return Energies(*self._energies(y, t))

    def start(
        self, keys: Key[Array, "B"], x: Float[np.ndarray, "B *D"], t: Int[np.ndarray, "B"]
    ) -> Start:
        """Draws where to look at the level."""
        schedule = self.way.method.schedule
        positive_keys, step_keys = noise.fold(keys, 0), noise.fold(keys, 1)
        y, x_tilde = train_step.positives(
            positive_keys, jnp.asarray(x), jnp.asarray(t), schedule
        )
        z = noise.normal(step_keys, x.shape[1:])
        near = y + noise.per_example(self.s[t], z) * z
        return Start(np.asarray(y), np.asarray(near), np.asarray(x_tilde))

    def see(
        self,
        keys: Key[Array, "B"],
        start: Start,
        t: Int[np.ndarray, "B"],
    ) -> Seen:
        """Returns what this precision makes of a level."""
        at = self.energies(start.y, t)
        increment = self.energies(start.near, t).F - at.F
        repeats = [noise.fold(keys, i) for i in range(REPEATS)]
        end = np.stack([self.chain(each, start.x_tilde, t) for each in repeats])
        return Seen(at, increment, end)

    def F_of(
        self, y: Float[np.ndarray, "R B *D"], t: Int[np.ndarray, "B"]
    ) -> Float[np.ndarray, "R B"]:
        """Returns F of level t at the ends of chains."""
        return np.stack([self.energies(each, t).F for each in y])

    def _bound(self, program: Callable) -> Callable[..., Any]:
        """Compiles program(params, *arrays), and makes it take and give numpy's."""
        compiled = jax.jit(program)
        dtype = self.way.dtype

        def cast(array):
            floating = isinstance(array, np.ndarray) and array.dtype.kind == "f"
            return array.astype(dtype) if floating else array

        def call(*arrays):
            with _x64(dtype):
                out = compiled(self.way.params, *map(cast, arrays))
                return jax.tree.map(np.asarray, out)

        return call


def errors(truth: Seen, seen: Seen) -> dict[str, float]:
    """Returns what a precision misses of the truth, in float64, by name."""
    ours, theirs = seen.at, truth.at
    return {
        "f": _rms(ours.f - theirs.f) / _rms(theirs.f),
        "grad_f": _rms(ours.grad_f - theirs.grad_f) / _rms(theirs.grad_f),
        "F": _rms(ours.F - theirs.F),
        "increment": _rms(seen.increment - truth.increment),
    }


def _sampled(
    run: Run, others: Sequence[Way], key: Key[Array, ""], n: int, done: Callable[[], Any]
) -> dict[str, float]:
    """Returns Fréchet distances of raw pixels: between precisions, of each to the data.

    Two precisions are compared on other noise, as two draws of the first are: what equal
    distributions give.
    """
    first, second = jax.random.split(key)
    held = np.stack(list(data.all_images(run.config, run.config.evaluation.num_data)))
    truth = frechet.fit(held.reshape(len(held), -1))

    def draw(way, key):
        method = way.method._replace(sampler=run.model.method.sampler)
        model = Model(method, way.params, run.model.mesh, run.config.evaluation.batch_size)
        drawn = frechet.fit(model.sample(key, n).reshape(n, -1))
        done()
        return drawn

    single, half = others
    ours, again = draw(single, first), draw(single, second)
    low = draw(half, second)
    return {
        "n": n,
        "float32_to_data": frechet.frechet_distance(ours, truth),
        "bfloat16_to_data": frechet.frechet_distance(low, truth),
        "float32_to_float32": frechet.frechet_distance(ours, again),
        "float32_to_bfloat16": frechet.frechet_distance(ours, low),
    }


def _conditional(method: Method, params: Params, x_tilde: Array, t: Array):
    return lambda y: recovery.conditional_log_density(
        method.F(params), y, x_tilde, t, method.schedule
    )


@contextmanager
def _x64(dtype: DTypeLike) -> Iterator[None]:
    """Lets JAX have float64, on the CPU, where that is the dtype."""
    if dtype != np.float64:
        yield
        return
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(values, np.float64)))))


# Of the table: a column's title, and its numbers in a row.
COLUMNS = (
    ("f", "{f:9.1e}"),
    ("grad f", "{grad_f:9.1e}"),
    ("F [nats]", "{F:10.2g}"),
    ("step of F", "{increment:11.2g}"),
    ("path/moved", "{path_by_displacement:12.1e}"),
    ("path/noise", "{path_by_noise:12.1e}"),
    ("mean F", "{mean_F:+10.0e} ± {mean_F_error:.0e}"),
    ("other", "{other_decisions:9.2%}"),
    ("accepts", "{acceptance:9.2f}"),
)


def table(result: dict[str, Any]) -> str:
    """Returns the measurements for a person to read, and the verdicts."""
    lines = [f"{result['device']}, {result['images']} images, chains of {result['K']} steps"]
    for row in result["levels"]:
        cells = [f"{row['level']:5}", f" {row['precision']:8}"]
        cells += [form.format(**row) for _, form in COLUMNS]
        if len(lines) == 1:
            titles = ("level", "", *(title for title, _ in COLUMNS))
            wide = zip(titles, cells, strict=True)
            lines.append("".join(f"{title:>{len(cell)}}" for title, cell in wide))
        lines.append("".join(cells))
    lines.append(
        "log-weights of annealing through all levels, off by [nats]: "
        + ", ".join(f"{name} {error:.2g}" for name, error in result["log_weight"].items())
    )
    if "samples" in result:
        lines.append(
            "pixel Fréchet distance of {n} samples to the data: float32 {float32_to_data:.3f}, "
            "bfloat16 {bfloat16_to_data:.3f};\nfrom float32 to bfloat16 "
            "{float32_to_bfloat16:.3f}, between two draws of float32 "
            "{float32_to_float32:.3f}".format(**result["samples"])
        )
    return "\n".join([*lines, *(verdict(result, name) for name in ("float32", "bfloat16"))])


def verdict(result: dict[str, Any], precision: str) -> str:
    """Returns what a precision will do for, in a line: for each use, the levels that fail."""
    rows = [row for row in result["levels"] if row["precision"] == precision]
    judged = []
    for use, name, limit, said in (
        ("Langevin chains", "mean_F", MEAN_SHIFT, "mean F off by {:.2g} std, {:g} allowed"),
        ("accept steps", "other_decisions", DECISIONS, "{:.2%} otherwise, {:.0%} allowed"),
    ):
        failing = [
            str(row["level"])
            for row in rows
            if not abs(row[name]) <= max(limit, 3 * row.get(f"{name}_error", 0.0))
        ]
        worst = max(abs(row[name]) for row in rows)
        where = "" if len(failing) == len(rows) else f" at level {', '.join(failing)}"
        answer = f"no{where}" if failing else "yes"
        judged.append(f"{use} {answer} ({said.format(worst, limit)})")
    off = result["log_weight"][precision]
    answer = "yes" if off <= NATS else "no"
    judged.append(f"log-weights {answer} (off by {off:.2g} nats, {NATS:g} allowed)")
    return f"{precision}: " + "; ".join(judged)


def define_flags() -> flags.FlagValues:
    """Returns this program's flags, unparsed: a set of their own, as those of `main`."""
    values = flags.FlagValues()
    flags.DEFINE_string(
        "model", "digits", "A work directory, an exported file, or a name.", flag_values=values
    )
    for name, default, at_least, text in (
        ("images", 128, 2, "Of the data, and chains a level."),
        ("K", 30, 1, "Steps of the chains."),
        ("samples", 500, 0, "To generate in each precision; 0 for none."),
    ):
        flags.DEFINE_integer(name, default, text, at_least, flag_values=values)
    flags.DEFINE_string("json", None, "Where to write the numbers as JSON.", flag_values=values)
    return values


def main(argv: Sequence[str]) -> int:
    """Measures what the flags say, prints the table, writes the JSON; the exit status."""
    try:
        values = define_flags()
        if {"--help", "-help", "-h"}.intersection(argv):
            print(__doc__, *(f"--{name:8} {values[name].help}" for name in values), sep="\n")
            return 0
        try:
            rest = values(list(argv))
        except flags.Error as error:
            raise UserError(str(error)) from error
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}: every option is --name=value")
        run = exported.load(values.model)
        result = measure(run, values.images, values.K, values.samples)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(result))
    if values.json:
        epath.Path(values.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
