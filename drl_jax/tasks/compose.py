"""The task `compose`: samples a product or a mixture of models."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float

from drl_jax import method as method_lib
from drl_jax.method import METROPOLIS
from drl_jax.metrics import plane
from drl_jax.model import Model
from drl_jax.plots import figures, images
from drl_jax.storage import exported, results, runs
from drl_jax.storage.atomic import write_json
from drl_jax.storage.runs import Run
from drl_jax.tasks import common, sample

log = logging.getLogger(__name__)

STEPS = 20  # of MALA on each level of a product
LOG_Z_SIDE = 101  # nodes per side of the grid that finds log Z of every level


class Part(NamedTuple):
    """One of the models that are combined.

    Attributes:
      name: its name in the figure.
      run: the trained model, of its class.
    """

    name: str
    run: Run


def run(
    run: Run,
    workdir: epath.Path,
    model: str | None,
    others: Sequence[str],
    labels: Sequence[int],
    rule: str,
    weights: Sequence[float],
    temperature: float,
    num_samples: int,
    seed: int,
) -> None:
    """Combines models, or classes of one model (`drl_jax.compose`), and draws samples.

    A product is sampled by chains on the marginals of its levels: those of `config.mcmc` if
    they are MALA or HMC, otherwise `STEPS` steps of MALA. A mixture is sampled as its first
    model is. For points in the plane, log Z of every level of the models is found by
    quadrature, so that the shares of the models are the weights. Otherwise they are not, and
    differ between levels: from Python, `Model.mixture` takes log Z.

    Writes to `workdir`/compositions/step_STEP_seed_SEED_RULE, or to a folder with a number
    after this name if there are results with other settings (`storage.results.folder`):
      settings.json: everything on which the results depend.
      samples.npy, 000000.png, ..., grid.png: the samples, as those of the task `sample`.
      compose.png: for points in the plane, the density of each model and of their combination
        at level 0, and the samples. Otherwise, samples of each model and of the combination.
      metrics.json, with the fields:
        step: number of training steps of the first model.
        acceptance: mean acceptance probability of MALA or HMC after their warm-up.
        mean_log_density: for each model, the mean of F at level 0 over the samples [nats].
        kl_of_samples, kl_of_exact_samples: for points in the plane, KL(samples ‖ density) over
          cells, and the mean of the same for as many exact samples
          (`plane.divergence_of_samples`).

    Args:
      run: the first model.
      workdir: folder of the results.
      model: the name by which it was loaded; None for the model of `workdir`.
      others: the other models (`runs.load`). Their samplers are not used, except for the figure
        of images.
      labels: class of each model, 0 for none; empty: none. If there are no others, the first
        model is combined with itself, once per label.
      rule: 'product' or 'mixture'.
      weights: one per model; empty: ones.
      temperature: number by which the weights of a product are divided.
      num_samples: number of samples.
      seed: random seed.

    Raises:
      UserError: if a model cannot be loaded or has no such class, the models cannot be combined
        (`Model.product`, `Model.mixture`), the folder cannot be written to, or a sample is not
        finite.
    """
    parts = _parts(run, model or str(workdir), others, labels)
    given = list(weights) or [1.0] * len(parts)
    combined = _combined(parts, rule, np.divide(given, temperature))
    settings = common.result_settings(
        combined,
        "compose",
        seed,
        rule=rule,
        weights=given,
        temperature=temperature,
        labels=list(labels),
        others=[
            common.resume_settings(part.run.config, ("diffusion.", "energy."))
            for part in parts[1:]
        ],
        num_samples=num_samples,
    )
    path = workdir / "compositions" / f"step_{run.step}_seed_{seed}_{rule}"
    with results.folder(path, settings) as folder:
        in_plane = run.model.shape == (2,)
        if in_plane and rule == "mixture":
            log_Z = [_log_Z(part.run.model) for part in parts]
            combined = _combined(parts, rule, given, log_Z)
        key = common.task_key("compose", seed)
        sampled, warm_up = common.warmed_up(combined)
        x = np.concatenate(list(common.draw(sampled.model, key, num_samples)))
        sample.write(folder, [x], num_samples, run.model.shape)
        metrics: dict[str, Any] = {"step": run.step}
        if warm_up:
            metrics["acceptance"] = float(np.mean(warm_up.acceptance))
        metrics["mean_log_density"] = [
            float(np.mean(_log_density(part.run.model, x))) for part in parts
        ]
        title = _title([part.name for part in parts], rule, np.divide(given, temperature))
        if in_plane:
            models = {part.name: part.run.model for part in parts} | {title: combined.model}
            grid = plane.square_grid()
            densities = {
                name: plane.log_density_of_level_0(model, grid)
                for name, model in models.items()
            }
            figures.write_composition(folder / "compose.png", densities, x, grid)
            metrics["kl_of_samples"], metrics["kl_of_exact_samples"] = (
                plane.divergence_of_samples(
                    np.random.default_rng(seed), x, densities[title], grid
                )
            )
        else:
            rows = {part.name: _samples(part.run, seed, num_samples) for part in parts}
            pictures = {
                name: images.picture(x[: _shown(run.model)], common.COLUMNS)
                for name, x in (rows | {title: x}).items()
            }
            figures.write_rows(folder / "compose.png", pictures)
        write_json(folder / "metrics.json", metrics)
        log.info("%s: %s", title, metrics)


def _parts(run: Run, name: str, others: Sequence[str], labels: Sequence[int]) -> list[Part]:
    """Returns the models, of their classes, with distinct names.

    Raises:
      UserError: if a model cannot be loaded, or has no such class.
    """
    names = [name, *others] if others else [name] * max(1, len(labels))
    loaded = [run, *map(runs.load, others)] if others else [run] * len(names)
    parts = []
    for i, (name, each) in enumerate(zip(names, loaded, strict=True)):
        label = labels[i] if labels else 0
        if each is not run:
            config = copy.deepcopy(each.config)
            config.evaluation.update(run.config.evaluation)
            config.mcmc.levels = run.config.mcmc.levels
            each = runs.reconfigure(each, config)
        if label:
            each = each._replace(model=each.model.given(label))
        stem = epath.Path(name).name.removesuffix(exported.SUFFIX)
        words = [stem] if others or not label else []
        words += [f"class {label}"] if label else []
        parts.append(Part(" ".join(words), each))
    known = [part.name for part in parts]
    if len(set(known)) < len(known):
        parts = [part._replace(name=f"{part.name} ({i})") for i, part in enumerate(parts, 1)]
    return parts


def _combined(
    parts: Sequence[Part],
    rule: str,
    weights: Sequence[float] | Float[np.ndarray, "n"],
    log_Z: Sequence[Float[np.ndarray, "T"]] | None = None,
) -> Run:
    """Returns the combination, with the sampler that draws from it.

    Raises:
      UserError: if the models cannot be combined.
    """
    first = parts[0].run
    models = [part.run.model for part in parts]
    if rule == "mixture":
        return first._replace(model=Model.mixture(models, weights, log_Z))
    product = Model.product(models, weights)
    method, config = product.method, first.config
    if config.mcmc.sampler not in METROPOLIS:
        config = copy.deepcopy(config)
        config.mcmc.update(sampler="mala", K=STEPS)
        method = method_lib.with_sampler(method, sampler="mala", K=STEPS)
    method = method_lib.marginals(method)
    chains = Model.create(method, product.params, product.mesh, product.engine.batch_size)
    return Run(config, chains, first.step)


def _log_Z(model: Model) -> Float[np.ndarray, "T"]:
    """Returns log of the integral of exp(F) over the plane at every level [nats]."""
    grid = plane.square_grid(side=LOG_Z_SIDE)
    values = plane.evaluate(model.method.F, model.params, range(model.T), grid, model.mesh)
    return np.array([plane.log_integral(log_p, grid) for log_p in values])


def _log_density(model: Model, x: Float[np.ndarray, "n *D"]) -> Float[np.ndarray, "n"]:
    """Returns F of points or images x_0 at level 0 [nats]."""
    a = np.float32(model.method.schedule.y_scale(jnp.array(0)))
    batches = model.engine.split(x)
    return np.concatenate([model.log_density(a * x, np.zeros(len(x), int)) for x in batches])


def _shown(model: Model) -> int:
    """Returns the number of samples of each model in the figure: images of two rows."""
    return 2 * common.COLUMNS if images.are_images(model.shape) else 2000


def _samples(part: Run, seed: int, n: int) -> Float[np.ndarray, "n *D"]:
    """Returns samples of one model for the figure, with its own sampler."""
    key = jax.random.fold_in(common.task_key("compose", seed), 0)
    return common.adapted(part).model.sample(key, min(n, _shown(part.model)))


def _title(names: Sequence[str], rule: str, weights: Float[np.ndarray, "n"]) -> str:
    """Returns the combination as a formula, such as 'moons - 0.3 rings'."""
    if rule == "mixture":
        shares = weights / np.sum(weights)
        return " or ".join(f"{w:.2g} {name}" for w, name in zip(shares, names, strict=True))
    terms = [
        f"{'-' if w < 0 else '+'} " + (f"{abs(w):.3g} " if abs(w) != 1 else "") + name
        for w, name in zip(weights, names, strict=True)
    ]
    return " ".join(terms).removeprefix("+ ")
