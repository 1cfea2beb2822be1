"""Runs long chains on the conditionals of several levels, and records their statistics.

At each of these levels, chains sample p(y | x_tilde) for thousands of steps. At least
`chains.MIN_SHARING` chains have the same condition x_tilde, and therefore the same target
distribution: R-hat and the effective sample size compare them with each other. The conditions
are data diffused to the level above. So if the model is exact, all chains of a level together
are distributed like data diffused to that level; the log-density, the displacement and the
Fréchet distance show whether they are. At level T - 1 there is no condition: all chains start
from white noise and sample the marginal.

With `marginal`, the chains sample the marginals p(y_t) instead, and start from data: nothing
but the energy keeps them close to images.

Otherwise, samples are then generated through all levels (`sampling.ladder`) with N steps in
total, N / T per level, for growing N, always from the same white noise. Here, a *ladder* is the
generation of one such set of samples.
"""

import functools
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key

from drl_jax import diffusion, noise, recovery
from drl_jax.errors import UserError
from drl_jax.metrics import diagnostics
from drl_jax.metrics import levels as levels_lib
from drl_jax.metrics.classifier import Classifier
from drl_jax.metrics.frechet import Normal, fit, frechet_distance
from drl_jax.model import Model
from drl_jax.runtime import processes
from drl_jax.runtime.progress import Progress
from drl_jax.sampling import chains as chains_lib
from drl_jax.sampling import ladder
from drl_jax.sampling.chains import Chains, Observation
from drl_jax.standardisation import Standardisation
from drl_jax.storage.snapshots import Autosave, Snapshot
from drl_jax.tasks import common

log = logging.getLogger(__name__)

COLUMNS = 10  # chains shown per level
MAX_REFERENCE = 1000  # maximum number of images to which a reference distribution is fitted
CALL_SECONDS = 1.0  # target for the duration of a call of the compiled program


class Experiment(NamedTuple):
    """The conditionals to sample, and the data to compare the chains with.

    There are L levels with C chains each, n = L C chains in total. Row l C + i of an array is
    chain i of the l-th level, both counted from 0.

    Attributes:
      levels: levels whose conditionals are sampled.
      t: level of each chain.
      x_tilde: condition of each chain.
      distribution: index of the distribution that each chain samples; equal for chains with the
        same condition.
      condition_images: x_t of the images whose x_{t+1} are the conditions of the first chains.
      reference: for each level, a normal distribution fitted to data diffused to it.
      data: for each level, 'log_density' [nats], 'displacement', 'frechet' and, if there is a
        classifier, 'feature_frechet' of C images diffused to it: the values of exact samples.
      image_reference: a normal distribution fitted to data without noise.
      image_frechet: Fréchet distance between it and n other images.
      resolution: resolution of F at each level in float32 [nats] (`levels.resolution`).
      exact: x_t of these C images.
      marginal: whether the chains sample the marginals, and `x_tilde` is where they start.
      features: compares images with the data in the features of a classifier, if there is one.
    """

    levels: Int[np.ndarray, "L"]
    t: Int[np.ndarray, "n"]
    x_tilde: Float[np.ndarray, "n *D"]
    distribution: Int[np.ndarray, "n"]
    condition_images: Float[np.ndarray, "L columns *D"]
    reference: list[Normal]
    data: dict[str, list[float]]
    image_reference: Normal
    image_frechet: float
    resolution: list[float]
    exact: Float[np.ndarray, "L chains *D"]
    marginal: bool = False
    features: "Features | None" = None


class Features(NamedTuple):
    """Compares images with training images in the features of a classifier.

    Attributes:
      classifier: a classifier of the data.
      reference: a normal distribution fitted to the features of training images.
      to_images: (x_t, top=t) -> images: completes the generation from level t.
      standardisation: turns these into data.
    """

    classifier: Classifier
    reference: Normal
    to_images: Callable[..., Float[np.ndarray, "n *D"]]
    standardisation: Standardisation

    def distance(self, x_t: Float[np.ndarray, "n *D"], level: int) -> float:
        """Returns the squared Fréchet distance from the training images.

        Raises:
          UserError: if a completed image is not finite.
        """
        images = self.standardisation.invert(self.to_images(x_t, top=level))
        common.require_finite(images, f"images completed from level {level}")
        features, _ = self.classifier(images)
        return frechet_distance(fit(features), self.reference)


class LadderProgress(NamedTuple):
    """A ladder (one generation of samples) that has been started and not finished.

    Attributes:
      steps: number of steps of the whole ladder.
      level: level whose chains are running; -1 after the last one.
      x_tilde: conditions of these chains; after the last level, the samples.
      chains: state of these chains; None before their first step.
    """

    steps: int
    level: int
    x_tilde: Float[np.ndarray, "n *D"]
    chains: Chains | None


@dataclass
class State:
    """State of an experiment: everything that is needed to continue it.

    Attributes:
      chains: the chains on the conditionals.
      records: statistics of the chains at each recorded step (`chain_statistics`).
      pictures: for each recorded step, x_t of the first chains of each level,
        [L, columns, H, W, C].
      ladders: for each finished ladder, its steps, steps_per_level and frechet.
      ladder_pictures: for each finished ladder, its first samples, [columns, H, W, C].
      ladder: the ladder in progress, if there is one.
    """

    chains: Chains
    records: list[dict[str, Any]] = field(default_factory=list)
    pictures: list[np.ndarray] = field(default_factory=list)
    ladders: list[dict[str, Any]] = field(default_factory=list)
    ladder_pictures: list[np.ndarray] = field(default_factory=list)
    ladder: LadderProgress | None = None


def prepare(
    model: Model,
    key: Key[Array, ""],
    images: Float[np.ndarray, "N *D"],
    levels: Int[np.ndarray, "L"],
    num_chains: int,
    marginal: bool = False,
) -> Experiment:
    """Splits images at random into conditions, exact samples and references, and diffuses them.

    The three sets are disjoint: otherwise the Fréchet distances would be too small.

    Args:
      model: the model.
      key: random key of the split and of the noise.
      images: data; images in [-1, 1].
      levels: levels whose conditionals are sampled.
      num_chains: number of chains per level.
      marginal: whether the chains sample the marginals.

    Raises:
      UserError: if there are fewer than two chains per level, or too few images.
    """
    schedule = model.method.schedule
    condition_index = chains_lib.shared_conditions(num_chains)
    if marginal:  # all chains sample the same distribution, each from its own start
        condition_index = np.arange(num_chains)
    num_conditions, n = condition_index.max() + 1, num_chains * len(levels)
    if len(images) < num_conditions + 2 * n:
        raise UserError(
            f"the data set has {len(images)} images, and {n} chains need at least "
            f"{num_conditions + 2 * n}: lower --num_chains or give fewer --levels"
        )
    order_key, noise_key = jax.random.split(key)
    order = np.asarray(jax.random.permutation(order_key, len(images)))
    images = images[order[: num_conditions + n + MAX_REFERENCE]]
    to_data = model.standardisation.invert
    images = model.standardisation.apply(images)
    conditions = slice(num_conditions)
    exact = slice(num_conditions, num_conditions + num_chains)  # one image per chain of a level
    all_exact = slice(num_conditions, num_conditions + n)  # one image per chain of all levels
    reference = slice(num_conditions + n, None)
    diffuse_pair = jax.jit(diffusion.diffuse_pair)
    x_tildes, distributions, condition_images, references = [], [], [], []
    exact_images = []
    data: dict[str, list[float]] = {"log_density": [], "displacement": [], "frechet": []}
    temperature = np.asarray(model.method.parameterisation.temperature)
    resolutions = []
    for i, level in enumerate(levels):
        level_key = jax.random.fold_in(noise_key, level)
        keys = noise.example_keys(level_key, jnp.arange(len(images)))
        t = jnp.full((len(images),), level)
        x_t, x_tilde = (np.asarray(x) for x in diffuse_pair(keys, images, t, schedule))
        y_t = np.asarray(schedule.y_scale(jnp.asarray(level))) * x_t
        if marginal:
            x_tildes.append(y_t[conditions])
            distributions.append(np.full(num_chains, i * num_chains))
        elif level == schedule.T - 1:
            x_tildes.append(np.asarray(noise.normal(keys[:num_chains], images.shape[1:])))
            distributions.append(np.full(num_chains, i * num_chains))
        else:
            x_tildes.append(x_tilde[conditions][condition_index])
            distributions.append(i * num_chains + condition_index)
        condition_images.append(x_t[conditions][condition_index[:COLUMNS]])
        references.append(fit(_flatten(x_t[reference])))
        y = y_t[exact]
        f = np.asarray(model.f(to_data(y), t[exact]))
        resolutions.append(levels_lib.resolution(f, temperature[level]))
        data["log_density"].append(_mean(model.log_density(to_data(y), t[exact])))
        start = y_t[conditions] if marginal else x_tilde[exact]
        displacement = recovery.displacement(jnp.asarray(y), jnp.asarray(start))
        data["displacement"].append(_mean(displacement))
        data["frechet"].append(distance(x_t[exact], references[-1]))
        exact_images.append(x_t[exact])
    image_reference = fit(_flatten(images[reference]))
    return Experiment(
        levels=levels,
        t=np.repeat(levels, num_chains),
        x_tilde=np.concatenate(x_tildes),
        distribution=np.concatenate(distributions),
        condition_images=np.stack(condition_images),
        reference=references,
        data=data,
        image_reference=image_reference,
        image_frechet=distance(images[all_exact], image_reference),
        resolution=resolutions,
        exact=np.stack(exact_images),
        marginal=marginal,
    )


def with_features(experiment: Experiment, features: Features) -> Experiment:
    """Returns the experiment with distances in the features of a classifier."""
    pairs = zip(experiment.exact, experiment.levels, strict=True)
    distances = [features.distance(x_t, int(level)) for x_t, level in pairs]
    data = experiment.data | {"feature_frechet": distances}
    return experiment._replace(data=data, features=features)


def run(
    model: Model,
    key: Key[Array, ""],
    experiment: Experiment,
    num_steps: int,
    autosave: Autosave,
) -> State:
    """Makes all remaining steps and returns the state after them.

    Args:
      model: the model.
      key: random key of the chains.
      experiment: what is sampled.
      num_steps: number of steps of the chains on the conditionals; also the largest number of
        steps of a ladder.
      autosave: restores the saved state, and saves it regularly and at the end.

    Raises:
      UserError: if the saved state is damaged or has other settings, or cannot be written, or
        a chain has diverged.
      Interrupted: if a signal stopped the chains; the state is saved.
    """
    snapshot = autosave.restore()
    # Compile both programs (with traces, and without for ladders) before signals are caught: a
    # signal that is caught has to wait until the compilation ends.
    chains, _ = model.long_run(key, experiment.x_tilde, experiment.t, num_steps=0)
    ladder_chains, _ = model.long_run(
        key, experiment.x_tilde, experiment.t, num_steps=0, points=0
    )
    state = State(chains)
    if snapshot:
        state = from_snapshot(snapshot, chains, ladder_chains)
        log.info("resuming after step %d of %d", state.chains.step[0], num_steps)
    ladders = [] if experiment.marginal else ladder_steps(num_steps, model.T)
    remaining = remaining_steps(state, num_steps, ladders, model.T)
    with autosave, Progress(remaining, "step") as progress:

        def on_call(steps: int) -> None:
            """Counts the steps of a call of the compiled program; saves if a save is due."""
            progress.add(steps)
            autosave.step(int(state.chains.step[0]), functools.partial(to_snapshot, state))

        run_conditionals(state, model, key, experiment, num_steps, on_call)
        if not experiment.marginal:
            run_ladders(state, model, key, experiment, num_steps, on_call)
        autosave.save(to_snapshot(state))
    return state


def run_conditionals(
    state: State,
    model: Model,
    key: Key[Array, ""],
    experiment: Experiment,
    num_steps: int,
    on_call: Callable[[int], None],
) -> None:
    """Advances the chains on the conditionals to step `num_steps`, recording statistics.

    Args:
      state: state of the experiment, updated in place.
      model: the model.
      key: random key of the chains.
      experiment: what is sampled.
      num_steps: total number of steps, including those already made.
      on_call: called after each call of the compiled program, when `state` is consistent, with
        the number of steps that the call made.
    """
    recorded = state.records[-1]["step"] if state.records else -1
    for last in (step for step in chains_lib.recorded_steps(num_steps) if step > recorded):
        done = int(state.chains.step[0])
        for step in call_ends(done, last):
            chains, observation = model.long_run(
                key, experiment.x_tilde, experiment.t, step, state.chains
            )
            made, done = int(chains.step[0]) - done, int(chains.step[0])
            if step == last:
                require_finite(observation.x, made_before=max(recorded, 0), step=done)
                steps = done - max(recorded, 0)
                state.records.append(chain_statistics(chains, observation, experiment, steps))
                state.pictures.append(_by_level(observation.x, experiment)[:, :COLUMNS])
                # Each record has the acceptance since the previous one.
                chains = chains._replace(accepted=0 * chains.accepted)
                recorded = done
            state.chains = chains
            on_call(made)


def run_ladders(
    state: State,
    model: Model,
    key: Key[Array, ""],
    experiment: Experiment,
    num_steps: int,
    on_call: Callable[[int], None],
) -> None:
    """Runs the ladders of `ladder_steps`; each generates as many samples as there are chains.

    Args:
      state: state of the experiment, updated in place.
      model: the model.
      key: random key of the white noise and the chains.
      experiment: what the samples are compared with.
      num_steps: largest number of steps of a ladder.
      on_call: called after each call of the compiled program, when `state` is consistent, with
        the number of steps that the call made.
    """
    T, n = model.T, len(experiment.t)
    finished = state.ladders[-1]["steps"] if state.ladders else 0
    for steps in (steps for steps in ladder_steps(num_steps, T) if steps > finished):
        if state.ladder is None or state.ladder.steps != steps:
            keys = noise.example_keys(key, jnp.arange(n))
            x_T = np.asarray(ladder.white_noise(keys, model.shape, model.method.schedule))
            state.ladder = LadderProgress(steps, T - 1, x_T, None)
        steps_per_level = steps // T
        while state.ladder.level >= 0:
            _, level, x_tilde, chains = state.ladder
            t = np.full(n, level)
            done = int(chains.step[0]) if chains else 0
            for step in call_ends(done, steps_per_level):
                chains, observation = model.long_run(key, x_tilde, t, step, chains, points=0)
                if step < steps_per_level:
                    state.ladder = LadderProgress(steps, level, x_tilde, chains)
                else:
                    x_t = np.asarray(observation.x)
                    common.require_finite(x_t, f"chains of level {level}")
                    state.ladder = LadderProgress(steps, level - 1, x_t, None)
                made, done = step - done, step
                on_call(made)
        x = state.ladder.x_tilde
        results = {
            "steps": steps,
            "steps_per_level": steps_per_level,
            "frechet": distance(x, experiment.image_reference),
        }
        if experiment.features:
            results["feature_frechet"] = experiment.features.distance(x, 0)
        state.ladders.append(results)
        state.ladder_pictures.append(x[:COLUMNS])
        state.ladder = None


def ladder_steps(num_steps: int, T: int) -> list[int]:
    """Returns the number of steps of each ladder: the recorded steps that are at least T."""
    return [steps for steps in chains_lib.recorded_steps(num_steps) if steps >= T]


def call_ends(first: int, last: int) -> Iterator[int]:
    """Yields the step at which each call of the compiled program ends; the final one is `last`.

    The number of steps per call is adapted so that a call takes about `CALL_SECONDS`; the time
    of a call is that from one yield to the next. The chains do not depend on how their steps
    are divided into calls.

    Args:
      first: number of steps made already.
      last: total number of steps to make.
    """
    step, stride = first, 1
    while True:
        start = time.monotonic()
        step = min(last, step + stride)
        yield step
        if step == last:
            return
        # All processes must make the same calls, so all use the time of process 0.
        seconds = processes.broadcast_from_first(time.monotonic() - start)
        if seconds < CALL_SECONDS / 2:
            stride *= 2
        elif seconds > 2 * CALL_SECONDS:
            stride = max(1, stride // 2)


def chain_statistics(
    chains: Chains, observation: Observation, experiment: Experiment, steps: int
) -> dict[str, Any]:
    """Returns the statistics of the chains of each level, as JSON values.

    They are 'step', and lists with one value per level: 'log_density' [nats], 'displacement',
    'acceptance', 'frechet', the fields of `diagnostics.Convergence` and, if there is a
    classifier, 'feature_frechet' and the fields of `diagnostics.Mixing`. A value that is not
    defined yet is None.

    Args:
      chains: the chains.
      observation: their present positions.
      experiment: what they sample.
      steps: number of steps over which `chains.accepted` is summed.
    """
    by_level = functools.partial(_by_level, experiment=experiment)
    x = by_level(observation.x)
    draws = by_level(chains_lib.draws_after_warm_up(chains))
    distribution = by_level(experiment.distribution)
    levels = list(zip(draws, distribution, strict=True))
    convergence = [
        diagnostics.convergence(level_draws[..., : chains_lib.SCALARS], level_distribution)
        for level_draws, level_distribution in levels
    ]
    statistics: dict[str, Any] = {
        "step": int(chains.step[0]),
        "log_density": [_mean(v) for v in by_level(observation.log_density)],
        "displacement": [_mean(v) for v in by_level(observation.displacement)],
        "acceptance": [_mean(v) / steps if steps else None for v in by_level(chains.accepted)],
        "frechet": [
            distance(level_x, reference)
            for level_x, reference in zip(x, experiment.reference, strict=True)
        ],
    }
    if experiment.features:
        statistics["feature_frechet"] = [
            experiment.features.distance(level_x, int(level))
            for level_x, level in zip(x, experiment.levels, strict=True)
        ]
        mixing = [
            diagnostics.mixing(level_draws[..., chains_lib.SCALARS], level_distribution)
            for level_draws, level_distribution in levels
        ]
        for name in diagnostics.Mixing._fields:
            statistics[name] = [getattr(m, name) if m else None for m in mixing]
    for name in diagnostics.Convergence._fields:
        statistics[name] = [getattr(c, name) if c else None for c in convergence]
    return statistics


def steps_to_forget(chains: Chains, experiment: Experiment) -> list[int | None]:
    """Returns, for each level, the number of steps after which a chain forgets its start.

    It is a multiple of the distance between the points of the trace. The start is any step of
    the second half of the run: the projections of the position are compared with those some
    steps later (`diagnostics.draws_to_forget`). None if the run is too short to tell.
    """
    # Without the log-density and the label.
    draws = chains_lib.draws_after_warm_up(chains)[..., 1 : chains_lib.SCALARS]
    lags = [
        diagnostics.draws_to_forget(draws=level_draws, distribution=level_distribution)
        for level_draws, level_distribution in zip(
            _by_level(draws, experiment),
            _by_level(experiment.distribution, experiment),
            strict=True,
        )
    ]
    every = int(chains_lib.thinning(max(1, int(chains.step[0])), chains.trace.shape[1]))
    return [lag and lag * every for lag in lags]


def require_finite(x: ArrayLike, made_before: int, step: int) -> None:
    """Checks that no chain on a conditional has diverged.

    Args:
      x: positions of the chains.
      made_before: number of steps after which they were recorded before.
      step: number of steps made.

    Raises:
      UserError: if any value is infinite or not a number.
    """
    advice = common.CHAINS_DIVERGED
    if made_before:
        advice += f"; --num_steps={made_before} reports the steps before"
    common.require_finite(np.asarray(x), f"chains after step {step}", advice)


def distance(x: Float[np.ndarray, "n *D"], reference: Normal) -> float:
    """Returns the squared Fréchet distance on pixels.

    Args:
      x: images, to whose pixels a normal distribution is fitted.
      reference: the distribution to compare it with.
    """
    return frechet_distance(fit(_flatten(x)), reference)


def to_snapshot(state: State) -> Snapshot:
    """Returns the state in the form in which it is saved; `from_snapshot` is the inverse."""
    numbers: dict[str, Any] = {"records": state.records, "ladders": state.ladders}
    arrays = _named_leaves("chains", state.chains)
    arrays |= {"pictures": np.array(state.pictures)}
    arrays |= {"ladder_pictures": np.array(state.ladder_pictures)}
    if state.ladder:
        numbers |= {"steps": state.ladder.steps, "level": state.ladder.level}
        arrays |= {"x_tilde": state.ladder.x_tilde}
        if state.ladder.chains:
            arrays |= _named_leaves("ladder", state.ladder.chains)
    return Snapshot(numbers, arrays)


def from_snapshot(snapshot: Snapshot, chains: Chains, ladder_chains: Chains) -> State:
    """Returns the state that was saved.

    Args:
      snapshot: the result of `to_snapshot`.
      chains: any chains with the pytree structure of those on the conditionals.
      ladder_chains: any chains with the pytree structure of those of a ladder.
    """
    numbers, arrays = snapshot
    progress = None
    if "level" in numbers:
        running = "ladder_0" in arrays
        progress = LadderProgress(
            steps=numbers["steps"],
            level=numbers["level"],
            x_tilde=arrays["x_tilde"],
            chains=_from_named_leaves("ladder", arrays, ladder_chains) if running else None,
        )
    return State(
        chains=_from_named_leaves("chains", arrays, chains),
        records=numbers["records"],
        pictures=list(arrays["pictures"]),
        ladders=numbers["ladders"],
        ladder_pictures=list(arrays["ladder_pictures"]),
        ladder=progress,
    )


def remaining_steps(state: State, num_steps: int, ladders: list[int], T: int) -> int:
    """Returns the number of steps to be made, on the conditionals and in all ladders together.

    Args:
      state: the present state.
      num_steps: total number of steps of the chains.
      ladders: number of steps of each ladder, including the finished ones.
      T: number of levels.
    """
    remaining = num_steps - int(state.chains.step[0])
    finished = state.ladders[-1]["steps"] if state.ladders else 0
    remaining += sum(N // T * T for N in ladders if finished < N)
    if state.ladder:
        within_level = int(state.ladder.chains.step[0]) if state.ladder.chains else 0
        finished_levels = T - 1 - state.ladder.level
        remaining -= finished_levels * (state.ladder.steps // T) + within_level
    return max(0, remaining)


def _by_level(x: ArrayLike, experiment: Experiment) -> np.ndarray:
    """Splits the chains by their levels: reshapes [n, ...] to [L, C, ...]."""
    x, L = np.asarray(x), len(experiment.levels)
    return x.reshape(L, len(x) // L, *x.shape[1:])


def _flatten(x: np.ndarray) -> np.ndarray:
    """Reshapes [n, ...] to [n, d]."""
    return x.reshape(len(x), -1)


def _mean(x: Any) -> float:
    """Returns the mean of all elements, computed in float64."""
    return float(np.mean(np.asarray(x, np.float64)))


def _named_leaves(name: str, tree: Any) -> dict[str, np.ndarray]:
    """Returns the leaves of a pytree with the names NAME_0, NAME_1, ..."""
    return {f"{name}_{i}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _from_named_leaves(name: str, arrays: dict[str, np.ndarray], like: Any) -> Any:
    """Returns a pytree with the structure of `like`: the inverse of `_named_leaves`."""
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [arrays[f"{name}_{i}"] for i in range(len(leaves))])
