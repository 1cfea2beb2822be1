"""Code that several tasks share."""

import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from ml_collections import ConfigDict

from drl_jax import config as config_lib
from drl_jax import diffusion, noise
from drl_jax.data import sources
from drl_jax.data.sources import Source
from drl_jax.errors import UserError
from drl_jax.method import METROPOLIS
from drl_jax.model import Model
from drl_jax.plots import images
from drl_jax.runtime.progress import Progress
from drl_jax.sampling.ladder import Adapted
from drl_jax.storage import results
from drl_jax.storage.runs import Run

log = logging.getLogger(__name__)

COLUMNS = 10  # a grid of samples has at most 10 x 10 images

# What to do if results are not finite (`require_finite`): those that depend on chains, and
# others.
CHAINS_DIVERGED = (
    "lower --config.mcmc.b_squared, with which chains diverge if it is too large, or train "
    "with a lower --config.optim.learning_rate"
)
PARAMETERS_DIVERGED = (
    "the training has diverged: train with a lower --config.optim.learning_rate"
)

# Numbers that are folded into the key of a seed, one per task. Never change a number, and never
# give a number that has been removed to another task: equal seeds would give other results.
KEY_NUMBERS = {
    "adapt": 1,
    "sample": 2,
    "evaluate": 3,
    "interpolate": 4,
    "inpaint": 5,
    "long_run": 6,
    "likelihood": 7,
    "ood": 8,
    "restore": 9,
    "compose": 10,
}
# Added to these numbers. Key i of `jax.random.split(key, n)` is `fold_in(key, i)`, so a task's
# number must exceed the number of keys that are split off a seed elsewhere: three in training
# (`training.loop.run_keys`), and one per point of a data set.
FIRST_KEY = 2**30


def task_key(task: str, seed: int) -> Key[Array, ""]:
    """Returns the random key of a task.

    At equal seeds, different tasks have different keys, which also differ from those of
    training. So the random numbers of tasks and training are independent.

    Args:
      task: one of `KEY_NUMBERS`.
      seed: random seed.
    """
    return jax.random.fold_in(jax.random.key(seed), FIRST_KEY + KEY_NUMBERS[task])


def require_images(model: Model, flag: str) -> None:
    """Checks that the model is one of images, for a flag that is not defined for others.

    Args:
      model: the model.
      flag: the flag, for the message.

    Raises:
      UserError: if the model is one of points, other vectors, signals or volumes.
    """
    if not images.are_images(model.shape):
        raise UserError(
            f"{flag} is for models of images, but the examples of this model have the shape "
            f"{model.shape}: omit it"
        )


def with_noise_of_level_0(
    model: Model, key: Key[Array, ""], x: Float[np.ndarray, "n *D"]
) -> Float[np.ndarray, "n *D"]:
    """Returns data diffused to level 0, as samples are unless they are denoised."""
    keys, there = noise.example_keys(key, jnp.arange(len(x))), model.standardisation
    t = jnp.zeros(len(x), jnp.int32)
    x_0 = diffusion.diffuse(keys, jnp.asarray(there.apply(x)), t, model.method.schedule)
    return np.asarray(there.invert(np.asarray(x_0)))


def adapted(run: Run, guidance: float = 0.0) -> Run:
    """Returns the first result of `warmed_up`."""
    return warmed_up(run, guidance)[0]


def warmed_up(run: Run, guidance: float = 0.0) -> tuple[Run, Adapted | None]:
    """Adapts the step sizes of MALA or HMC in a warm-up, and logs them.

    Logs the acceptance and the remaining correlation of each level, too (`ladder.Adapted`).

    Args:
      run: the trained model.
      guidance: weight of guidance of samples of each class in turn.

    Returns:
      a run whose model uses the adapted step sizes, and the result of the warm-up. For other
      samplers, whose step sizes are not adapted, `run` itself and None.
    """
    mcmc = run.config.mcmc
    if mcmc.sampler not in METROPOLIS:
        return run, None
    model, warm_up = run.model.adapt(
        key=task_key("adapt", run.config.seed),
        num_steps=mcmc.warmup_steps,
        target=mcmc.target_acceptance,
        guidance=guidance,
    )
    log.info("%s step sizes after the warm-up:", mcmc.sampler)
    for group in diffusion.level_groups(model.T):
        t = group[0]
        log.info(
            "  level %d: %.3g, acceptance %.2f, correlation of start and end %.2f",
            t,
            warm_up.step_size[t],
            warm_up.acceptance[t],
            warm_up.correlation[t],
        )
    return run._replace(model=model), warm_up


def given(run: Run, label: str | None, guidance: float) -> Run:
    """Returns the run with the model of one class (`Model.given`).

    Without a label, or with 'all', it is `run` itself.

    Raises:
      UserError: if the model has no such class, or cannot be guided without a label.
    """
    if label in (None, "all"):
        return run
    return run._replace(model=run.model.given(int(label), guidance))


def of_label(source: Source, label: str | None) -> Source:
    """Returns the examples of a class (`sources.of_class`); without a label, all examples.

    Raises:
      UserError: if there are none of this class.
    """
    return sources.of_class(source, int(label)) if label and int(label) else source


def condition(label: str | None, guidance: float) -> dict[str, Any]:
    """Returns the settings of a label and its guidance; nothing without a label."""
    if label is None:
        return {}
    return {"label": label if label == "all" else int(label), "guidance": guidance}


def label_of_samples(model: Model, label: str | None, guidance: float) -> str | None:
    """Returns the label of samples: by default 'all', if the model has classes.

    Raises:
      UserError: if the model has no classes, but there is a label or a weight of guidance.
    """
    if label is None and not model.classes:
        if guidance:
            raise UserError("this model was trained without labels: omit --guidance")
        return None
    if label in (None, "all"):
        model.given(1, guidance)  # which checks the model and the weight
        return "all"
    return label


def draw(
    model: Model, key: Key[Array, ""], n: int, guidance: float = 0.0
) -> Iterator[Float[np.ndarray, "B *D"]]:
    """Yields n samples in batches (`Model.sample_batches`), and shows the progress.

    Args:
      model: the model.
      key: random key.
      n: number of samples.
      guidance: weight of guidance of samples of each class in turn.

    Raises:
      UserError: if a sample is not finite.
    """
    with Progress(n, "sample") as progress:
        for batch in model.sample_batches(key, n, guidance=guidance):
            require_finite(batch, "samples")
            yield batch
            progress.add(len(batch))


def require_finite(
    x: Float[np.ndarray, "n *D"], what: str, advice: str = CHAINS_DIVERGED
) -> None:
    """Checks that neither a model nor its chains have diverged.

    Args:
      x: results of the model.
      what: names them in the message, in the plural.
      advice: what to do, for the message.

    Raises:
      UserError: if any value is infinite or not a number.
    """
    diverged = np.count_nonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))
    if diverged:
        verb = "is" if diverged == 1 else "are"
        raise UserError(f"{diverged} of {len(x)} {what} {verb} not finite: {advice}")


def result_settings(run: Run, task: str, seed: int, **others: Any) -> dict[str, Any]:
    """Returns everything on which the results of a task depend, for `storage.results.folder`.

    Args:
      run: the trained model.
      task: the value of --mode.
      seed: random seed.
      **others: settings of this task.
    """
    sections = ("data.", "diffusion.", "energy.", "mcmc.")
    fields = resume_settings(run.config, ("seed", *sections, "evaluation.dtype"))
    parameters = results.digest(run.model.params)
    shared = {"mode": task, "step": run.step, "parameters": parameters, "seed": seed}
    return shared | others | fields


def resume_settings(config: ConfigDict, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Returns the fields of the configuration that must not change while work is unfinished.

    The place of the data, `data.data_dir` or the path of a folder, may change.

    Args:
      config: the configuration.
      prefixes: names of these fields, or of whole sections, such as 'mcmc.'.
    """
    fields = dict(config_lib.flatten(config))
    fields.pop("data.data_dir", None)
    if str(fields.get("data.name")).startswith("folder:"):
        fields["data.name"] = "folder"
    return {
        f"config.{name}": value for name, value in fields.items() if name.startswith(prefixes)
    }
