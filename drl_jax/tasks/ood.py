"""The task `ood`: measures how well a model detects out-of-distribution images."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from drl_jax.data import pipeline, sources
from drl_jax.data.sources import Source
from drl_jax.errors import UserError
from drl_jax.metrics import ood
from drl_jax.metrics.ood import Scores
from drl_jax.plots import figures
from drl_jax.plots.figures import Histograms
from drl_jax.runtime.progress import bar
from drl_jax.storage import data_record, results
from drl_jax.storage.atomic import write_json
from drl_jax.storage.runs import Run
from drl_jax.tasks import common

log = logging.getLogger(__name__)

TITLES = {"log_density": "log-density F", "score_norm": "score norm |∇F|"}
MAX_PANELS = 6  # levels per row of histograms.png


def run(
    run: Run,
    workdir: epath.Path,
    model: str | None,
    against: Sequence[str],
    seed: int,
    label: str | None,
    guidance: float,
) -> None:
    """Scores in-distribution and other images at every level, and computes the AUROC.

    The in-distribution images are held out from training where there are such images
    (`sources.open_held_out`). At most `config.evaluation.num_data` images of each set are
    scored, in their order.

    Writes to `workdir`/ood/step_STEP_seed_SEED, or to a folder with a number after this name if
    there are results with other settings (`storage.results.folder`):
      settings.json: everything on which the scores depend.
      histograms.png: histograms of both scores at several levels.
      ood.json, with the fields:
        step: training steps of the model.
        seed: the random seed.
        model: the name by which the model was loaded, or else the work directory.
        levels: the levels at which the images are scored.
        in: name, identity and split of the in-distribution data, held_out, num_images, and
          median: the median of each of the `ood.Scores` at each level.
        against: per set of other images, split (if it is a data set), num_images, median, and
          auroc: for each of the scores, the AUROC at each level.

    Args:
      run: the trained model.
      workdir: where the results go.
      model: the name by which the model was loaded; None for the model of `workdir`.
      against: sets of other images: names in `ood.SYNTHETIC`, 'folder:/path', 'digits', or
        TFDS data sets, which use `config.evaluation.split` and `config.data.data_dir`.
      label: class of the density; None: none.
      guidance: weight of guidance (`Model.given`).
      seed: random seed of the noise and of the synthetic images.

    Raises:
      UserError: if the data cannot be used, a set is unknown, cannot be read or has another
        number of channels, a score is not finite, or the folder cannot be written to.
    """
    run = common.given(run, label, guidance)
    config = run.config
    against = list(dict.fromkeys(against))
    if not against:
        raise UserError(f"--against is empty: give one or more of {', '.join(ood.SYNTHETIC)}")
    common.require_images(run.model, "ood")
    source = common.of_label(sources.open_held_out(config), label)
    data_record.warn_if_changed(model or workdir, source)
    others = {name: open_other(config, name) for name in against if name not in ood.SYNTHETIC}
    # All images are read before anything is written, because one may be unreadable.
    limit = config.evaluation.num_data
    x = read(config, source, limit)
    other_images = {name: read(config, other, limit) for name, other in others.items()}
    settings = common.result_settings(
        run,
        "ood",
        seed,
        **common.condition(label, guidance),
        against=against,
        images=[results.digest(images) for images in (x, *other_images.values())],
    )
    path = workdir / "ood" / f"step_{run.step}_seed_{seed}"
    with results.folder(path, settings) as folder:
        scorer = ood.Scorer(run.model)
        key, synthetic_key = jax.random.split(common.task_key("ood", seed))

        def score(name: str, images: Iterable[Float[np.ndarray, "H W C"]], n: int) -> Scores:
            log.info("images to score: %d (%s)", n, name)
            shown = bar(iterable=images, desc=name, total=n, unit="image", leave=False)
            scores = scorer(key, iter(shown))  # a bar has a length, but can be read only once
            common.require_finite(np.stack(scores).T, "scores", common.PARAMETERS_DIVERGED)
            return scores

        data_scores = score(f"{config.data.name}, {source.described_split()}", x, len(x))
        other_scores = {}
        for name in against:
            if name in ood.SYNTHETIC:
                synthetic = ood.synthetic_images(name, synthetic_key, x)
                other_scores[name] = score(name, synthetic, len(x))
            else:
                other_scores[name] = score(name, other_images[name], len(other_images[name]))
        aurocs = {
            name: ood.aurocs(data_scores, scores) for name, scores in other_scores.items()
        }
        figures.write_histograms(
            folder / "histograms.png",
            [short_name(config.data.name), *map(short_name, against)],
            histograms(
                scorer.levels, [data_scores, *other_scores.values()], list(aurocs.values())
            ),
            notes="numbers: AUROC",
        )
        values = {
            "step": run.step,
            "seed": seed,
            "model": model or str(workdir),
            "levels": scorer.levels,
            "in": {
                "name": config.data.name,
                "identity": source.identity,
                "split": source.split,
                "held_out": source.held_out,
                **summarise(data_scores),
            },
            "against": {
                name: {
                    **({"split": others[name].split} if name in others else {}),
                    **summarise(scores),
                    "auroc": aurocs[name],
                }
                for name, scores in other_scores.items()
            },
        }
        write_json(folder / "ood.json", values)
        title = f"{short_name(config.data.name)} ({source.described_split()})"
        for line in table(scorer.levels, title, aurocs):
            log.info("%s", line)


def open_other(config: ConfigDict, name: str) -> Source:
    """Opens another data set with the settings of `config.data`.

    Raises:
      UserError: if it cannot be read, or has another number of channels.
    """
    config = config.copy_and_resolve_references()
    config.data.name = name
    config.data.test_fraction = 0.0  # training used none of its images
    try:
        return sources.open_held_out(config)
    except UserError as error:
        raise UserError(
            f"--against={name} is not one of {', '.join(ood.SYNTHETIC)}, and cannot be used as "
            f"a data set: {error}"
        ) from error


def read(config: ConfigDict, source: Source, limit: int) -> Float[np.ndarray, "n H W C"]:
    """Reads the first images of a source, prepared as for training.

    Raises:
      UserError: naming an image that cannot be read.
    """
    return pipeline.load_examples(config, source, limit)


def summarise(scores: Scores) -> dict[str, Any]:
    """Returns the number of images, and the median of each score at each level."""
    medians = {
        name: np.median(values, axis=1).tolist() for name, values in scores._asdict().items()
    }
    return {"num_images": scores.log_density.shape[1], "median": medians}


def short_name(name: str) -> str:
    """Returns the last part of the path of a 'folder:', and other names unchanged."""
    is_folder = name.startswith("folder:")
    return epath.Path(name.removeprefix("folder:")).name if is_folder else name


def table(
    levels: Sequence[int], data: str, aurocs: Mapping[str, dict[str, list[float]]]
) -> list[str]:
    """Returns the lines of a table of AUROCs.

    There is one row per set of images and score, and one column per level.

    Args:
      levels: the levels.
      data: name of the in-distribution data and of their split.
      aurocs: per set of other images, the result of `ood.aurocs`.
    """
    sets = [f"{data} against {short_name(name)}" for name in aurocs]
    width = max(map(len, sets))
    lines = [f"{'AUROC of':{width}}  {'at level':15}" + "".join(f"{t:7d}" for t in levels)]
    for title, by_score in zip(sets, aurocs.values(), strict=True):
        for score, score_title in TITLES.items():
            row = "".join(f"{value:7.3f}" for value in by_score[score])
            lines.append(f"{title:{width}}  {score_title:15}{row}")
    return lines


def histograms(
    levels: Sequence[int],
    scores: Sequence[Scores],
    aurocs: Sequence[dict[str, list[float]]],
) -> list[Histograms]:
    """Returns one row of panels per score, with one panel per shown level.

    Args:
      levels: levels of the scores.
      scores: of the data, and of each set of other images.
      aurocs: of each set of other images.
    """
    shown = np.unique(np.linspace(0, len(levels) - 1, MAX_PANELS).round().astype(int))
    return [
        Histograms(
            title=title,
            panels=[f"level {levels[i]}" for i in shown],
            values=[[getattr(s, name)[i] for s in scores] for i in shown],
            notes=[[f"{auroc[name][i]:.2f}" for auroc in aurocs] for i in shown],
        )
        for name, title in TITLES.items()
    ]
