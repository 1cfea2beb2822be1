"""Long-run chains watched: what they start from, what they show, and going on where they were.

At each level, chains on p(y | x_tilde) go on for thousands of steps. Chains of one x_tilde,
`chains.SHARING` or more, sample one distribution and are compared with each other (R-hat,
effective sample size); x_tilde is data of the level above, so that together they should look
like data of their own level (energy, displacement, Fréchet distance). At the top, T - 1, there
is no condition: all chains sample the marginal, from white noise.

The whole ladder then makes as many samples for each total of steps N, with N / T steps at
each level, from the same noise.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, ArrayLike, Float, Int, Key

from drl_jax import diffusion, noise, recovery
from drl_jax.errors import Interrupted, UserError
from drl_jax.metrics import diagnostics
from drl_jax.metrics.frechet import Normal, fit, frechet_distance
from drl_jax.model import Model
from drl_jax.runtime import preemption, processes
from drl_jax.runtime.progress import Progress
from drl_jax.sampling import chains as long_run
from drl_jax.sampling import ladder
from drl_jax.sampling.chains import Chains, Seen
from drl_jax.storage import snapshots
from drl_jax.storage.snapshots import Snapshot

log = logging.getLogger(__name__)

COLUMNS = 10  # chains in a picture
REFERENCE = 1000  # images at most that stand for the data in a Fréchet distance
CALL = 1.0  # seconds that a call of the compiled program should take
SAVE = 60.0  # seconds between two saves


class Setting(NamedTuple):
    """What chains start from and are compared with. Chain i of the l-th level is row l C + i.

    Attributes:
      levels: to be watched.
      t: level of each chain.
      x_tilde: condition of each chain.
      distribution: number of the distribution that each chain samples.
      start: pictures of x_t of the data that the conditions were made of.
      reference: data diffused to each level.
      data: what draws of the data would show in the chains' place: 'log_density',
        'displacement' and 'frechet' (of C images), a number a level.
      images: data as they are.
      images_frechet: the distance of L C others from them.
    """

    levels: Int[np.ndarray, "L"]
    t: Int[np.ndarray, "n"]
    x_tilde: Float[np.ndarray, "n H W C"]
    distribution: Int[np.ndarray, "n"]
    start: Float[np.ndarray, "L columns H W C"]
    reference: list[Normal]
    data: dict[str, list[float]]
    images: Normal
    images_frechet: float


class Rung(NamedTuple):
    """A ladder on its way down.

    Attributes:
      total: steps of the ladder in all.
      level: whose chain is running; -1 when all is done.
      x_tilde: its condition.
      chains: of this level; None before its first step.
    """

    total: int
    level: int
    x_tilde: Float[np.ndarray, "n H W C"]
    chains: Chains | None


@dataclasses.dataclass
class Story:
    """All that happened so far.

    Attributes:
      chains: of the conditionals.
      records: numbers at each of the recorded steps.
      pictures: and what the first chains looked like there, [L, columns, H, W, C] each.
      rungs: numbers of each finished ladder.
      rung_pictures: and its first samples, [columns, H, W, C] each.
      rung: the unfinished ladder.
    """

    chains: Chains
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pictures: list[np.ndarray] = dataclasses.field(default_factory=list)
    rungs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rung_pictures: list[np.ndarray] = dataclasses.field(default_factory=list)
    rung: Rung | None = None


def prepare(
    model: Model,
    key: Key[Array, ""],
    truth: Float[np.ndarray, "N H W C"],
    levels: Int[np.ndarray, "L"],
    num_chains: int,
) -> Setting:
    """Diffuses images: some into conditions, some into what the chains are compared with.

    No image is used for two of these, so that no distance is too good.

    Raises:
      UserError: if there are too few images.
    """
    schedule = model.method.schedule
    shared = long_run.shared_conditions(num_chains)
    conditions, n = shared.max() + 1, num_chains * len(levels)
    if len(truth) < conditions + 2 * n:
        raise UserError(
            f"the data have {len(truth)} images, too few to compare {n} chains with: lower "
            "--num_chains or name fewer --levels"
        )
    order_key, noise_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(order_key, len(truth)))
    truth = truth[order[: conditions + n + REFERENCE]]
    of_conditions, others = slice(conditions), slice(conditions, conditions + n)
    rest = slice(conditions + n, None)
    diffuse_pair = jax.jit(diffusion.diffuse_pair)
    x_tildes, distributions, starts, references = [], [], [], []
    data: dict[str, list[float]] = {"log_density": [], "displacement": [], "frechet": []}
    for number, level in enumerate(levels):
        keys = noise.example_keys(jax.random.fold_in(noise_key, level), jnp.arange(len(truth)))
        t = jnp.full((len(truth),), level)
        x_t, x_tilde = (np.asarray(x) for x in diffuse_pair(keys, truth, t, schedule))
        if level == schedule.T - 1:
            x_tildes.append(np.asarray(noise.normal(keys[:num_chains], truth.shape[1:])))
            distributions.append(np.full(num_chains, number * num_chains))
        else:
            x_tildes.append(x_tilde[of_conditions][shared])
            distributions.append(number * num_chains + shared)
        starts.append(x_t[of_conditions][shared[:COLUMNS]])
        same = slice(conditions, conditions + num_chains)
        references.append(fit(_flat(x_t[rest])))
        y = schedule.a_y(level) * x_t[same]
        data["log_density"].append(_mean(model.log_density(y, t[same])))
        data["displacement"].append(_mean(recovery.displacement(y, jnp.asarray(x_tilde[same]))))
        data["frechet"].append(distance(x_t[same], references[-1]))
    plain = fit(_flat(truth[rest]))
    return Setting(
        levels,
        np.repeat(levels, num_chains),
        np.concatenate(x_tildes),
        np.concatenate(distributions),
        np.stack(starts),
        references,
        data,
        plain,
        distance(truth[others], plain),
    )


def run(
    model: Model,
    key: Key[Array, ""],
    setting: Setting,
    num_steps: int,
    folder: epath.Path,
    settings: dict[str, Any],
) -> Story:
    """Makes all steps, or those that are left of an earlier start; returns what was seen.

    Args:
      model: with a sampler that makes chains.
      key: of all noise of the chains.
      setting: of the chains.
      num_steps: of the conditionals' chains, and of the longest ladder in all.
      folder: for the unfinished work.
      settings: by name, what must be the same when a later start goes on from here.

    Raises:
      UserError: if the unfinished work is damaged, or was begun with other settings.
      Interrupted: a signal asked for the end; all is saved.
    """
    path = folder / "chains.snapshot"
    snapshot = snapshots.read(path, settings)
    # Compiles all there is, before a signal would have to wait for it.
    chains, _ = model.long_run(key, setting.x_tilde, setting.t, 0)
    ladder_chains, _ = model.long_run(key, setting.x_tilde, setting.t, 0, points=0)
    story = Story(chains)
    if snapshot:
        story = told(snapshot, chains, ladder_chains)
        log.info("going on from step %d of %d", story.chains.step[0], num_steps)
    T = model.method.schedule.T
    with (
        preemption.stop_on_signal() as stop,
        Progress(left(story, num_steps, T), "step") as progress,
    ):
        saved = time.monotonic()

        def pause(steps: int) -> None:
            """Comes between two calls of the compiled program, when nothing is half done."""
            nonlocal saved
            progress.add(steps)
            signum = stop()
            if signum or time.monotonic() - saved > SAVE:
                snapshots.write(path, snapshot_of(story), settings)
                saved = time.monotonic()
            if signum:
                raise Interrupted(signum, int(story.chains.step[0]))

        watch_conditionals(story, model, key, setting, num_steps, pause)
        watch_ladders(story, model, key, setting, num_steps, pause)
        snapshots.write(path, snapshot_of(story), settings)
    return story


def watch_conditionals(
    story: Story,
    model: Model,
    key: Key[Array, ""],
    setting: Setting,
    num_steps: int,
    pause: Callable[[int], None],
) -> None:
    """Takes the conditionals' chains to their last step, and records what they show."""
    done = story.records[-1]["step"] if story.records else -1
    for last in (step for step in long_run.recorded_steps(num_steps) if step > done):
        first = int(story.chains.step[0])
        for step in strides(first, last):
            chains, seen = model.long_run(key, setting.x_tilde, setting.t, step, story.chains)
            made = int(chains.step[0]) - first
            first += made
            if step == last:
                story.records.append(record(chains, seen, setting, first - max(done, 0)))
                story.pictures.append(_by_level(seen.x, setting)[:, :COLUMNS])
                chains = chains._replace(accepted=0 * chains.accepted)
                done = first
            story.chains = chains
            pause(made)


def watch_ladders(
    story: Story,
    model: Model,
    key: Key[Array, ""],
    setting: Setting,
    num_steps: int,
    pause: Callable[[int], None],
) -> None:
    """Makes samples with more and more steps in all, as many samples as there are chains."""
    schedule, n = model.method.schedule, len(setting.t)
    done = story.rungs[-1]["steps"] if story.rungs else 0
    for total in (total for total in ladder_totals(num_steps, schedule.T) if total > done):
        if story.rung is None or story.rung.total != total:
            keys = noise.example_keys(key, jnp.arange(n))
            x_T = np.asarray(ladder.white_noise(keys, model.method.energy.shape, schedule))
            story.rung = Rung(total, schedule.T - 1, x_T, None)
        K = total // schedule.T
        while story.rung.level >= 0:
            _, level, x_tilde, chains = story.rung
            t = np.full(n, level)
            first = int(chains.step[0]) if chains else 0
            for step in strides(first, K):
                chains, seen = model.long_run(key, x_tilde, t, step, chains, points=0)
                if step < K:
                    story.rung = Rung(total, level, x_tilde, chains)
                else:
                    story.rung = Rung(total, level - 1, np.asarray(seen.x), None)
                made, first = step - first, step
                pause(made)
        x = story.rung.x_tilde
        frechet = distance(x, setting.images)
        story.rungs.append({"steps": total, "steps_a_level": K, "frechet": frechet})
        story.rung_pictures.append(x[:COLUMNS])
        story.rung = None


def ladder_totals(num_steps: int, T: int) -> list[int]:
    """Returns the numbers of steps of whole ladders: those that give every level a step."""
    return [total for total in long_run.recorded_steps(num_steps) if total >= T]


def strides(first: int, last: int) -> Iterator[int]:
    """Yields steps to go to, the last one at the end, so that each takes about `CALL` [s].

    By the clock: where chains stop on their way is without effect on them.
    """
    step, stride = first, 1
    while True:
        began = time.monotonic()
        step = min(last, step + stride)
        yield step
        if step == last:
            return
        took = processes.from_first(time.monotonic() - began)
        if took < CALL / 2:
            stride *= 2
        elif took > 2 * CALL:
            stride = max(1, stride // 2)


def record(chains: Chains, seen: Seen, setting: Setting, steps: int) -> dict[str, Any]:
    """Returns what chains show, a number a level, given the steps since the record before.

    None stands for what is not known yet.
    """
    draws = _by_level(long_run.kept_draws(chains), setting)
    by_level = [_by_level(x, setting) for x in (*seen, chains.accepted, setting.distribution)]
    x, log_density, displacement, accepted, distribution = by_level
    found = [diagnostics.convergence(*pair) for pair in zip(draws, distribution, strict=True)]
    numbers: dict[str, Any] = {
        "step": int(chains.step[0]),
        "log_density": [_mean(v) for v in log_density],
        "displacement": [_mean(v) for v in displacement],
        "acceptance": [_mean(v) / steps if steps else None for v in accepted],
        "frechet": [distance(*pair) for pair in zip(x, setting.reference, strict=True)],
    }
    for name in diagnostics.Convergence._fields:
        numbers[name] = [getattr(c, name) if c else None for c in found]
    return numbers


def distance(x: Float[np.ndarray, "n H W C"], reference: Normal) -> float:
    """Returns the Fréchet distance on raw pixels; NaN if chains have run away."""
    return frechet_distance(fit(_flat(x)), reference) if np.isfinite(x).all() else math.nan


def snapshot_of(story: Story) -> Snapshot:
    """Returns the story so far as what can be kept; `told` is its inverse."""
    numbers: dict[str, Any] = {"records": story.records, "rungs": story.rungs}
    arrays = _named("chains", story.chains)
    arrays |= {"pictures": np.array(story.pictures)}
    arrays |= {"rung_pictures": np.array(story.rung_pictures)}
    if story.rung:
        numbers |= {"total": story.rung.total, "level": story.rung.level}
        arrays |= {"x_tilde": story.rung.x_tilde}
        if story.rung.chains:
            arrays |= _named("rung", story.rung.chains)
    return Snapshot(numbers, arrays)


def told(snapshot: Snapshot, chains: Chains, ladder_chains: Chains) -> Story:
    """Returns the story that was kept, given chains of the same sampler as its two kinds."""
    numbers, arrays = snapshot
    rung = None
    if "level" in numbers:
        running = _unnamed("rung", arrays, ladder_chains) if "rung_0" in arrays else None
        rung = Rung(numbers["total"], numbers["level"], arrays["x_tilde"], running)
    return Story(
        _unnamed("chains", arrays, chains),
        numbers["records"],
        list(arrays["pictures"]),
        numbers["rungs"],
        list(arrays["rung_pictures"]),
        rung,
    )


def left(story: Story, num_steps: int, T: int) -> int:
    """Returns how many steps are still to be made, of all chains at once."""
    steps = num_steps - int(story.chains.step[0])
    done = story.rungs[-1]["steps"] if story.rungs else 0
    steps += sum(N // T * T for N in ladder_totals(num_steps, T) if done < N)
    if story.rung:
        within = int(story.rung.chains.step[0]) if story.rung.chains else 0
        steps -= (T - 1 - story.rung.level) * (story.rung.total // T) + within
    return max(0, steps)


def _by_level(x: ArrayLike, setting: Setting) -> np.ndarray:
    x, L = np.asarray(x), len(setting.levels)
    return x.reshape(L, len(x) // L, *x.shape[1:])


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


def _mean(x: Any) -> float:
    return float(np.mean(np.asarray(x, np.float64)))


def _named(name: str, tree: Any) -> dict[str, np.ndarray]:
    return {f"{name}_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _unnamed(name: str, arrays: dict[str, np.ndarray], like: Any) -> Any:
    names = iter(f"{name}_{i}" for i in range(len(jax.tree.leaves(like))))
    return jax.tree.map(lambda _: arrays[next(names)], like)
