"""Whether images are unlike the data, told by each level's log-density and score."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict
from tqdm import tqdm

from drl_jax import data, figures
from drl_jax.errors import UserError
from drl_jax.evaluation import ood
from drl_jax.evaluation.ood import Scores
from drl_jax.figures import Histograms
from drl_jax.files import make_writable
from drl_jax.modes import parts
from drl_jax.modes.parts import Revise

log = logging.getLogger(__name__)

WORDS = {"log_density": "log-density F", "score_norm": "score norm |∇F|"}
SHOWN = 6  # levels at most that histograms are drawn of


def run(
    workdir: epath.Path, revise: Revise, model: str | None, against: Sequence[str], seed: int
) -> None:
    """Writes how well a model tells its data from other images: ood.json and histograms.png.

    In-distribution is what `config.data` names, which is what the model was trained on unless
    the command line changes it, another split for one. Of each set at most
    `config.evaluation.num_data` images are scored, in its own order.

    Args:
      workdir: for the results, and of the run if no other model is named.
      revise: changes the configuration.
      model: a work directory, an exported file, or a model that comes with the package.
      against: sets of images: names of `ood.UNLIKE`, 'folder:/path', 'digits', or TFDS data
        sets, of which `config.data` has the split and the place.
      seed: of all noise, and of the unlike images.

    Raises:
      UserError: if there is no model or no data, a set is unknown, unreadable or made of other
        channels, or the folder cannot be written to.
    """
    against = list(dict.fromkeys(against))
    if not against:
        raise UserError(f"--against names no images: give some of {', '.join(ood.UNLIKE)}")
    config, trained, step = parts.load(workdir, revise, model)
    parts.require_images(trained, "ood")
    inside = data.open_source(config)
    others = {name: other_data(config, name) for name in against if name not in ood.UNLIKE}
    limit = config.evaluation.num_data
    # All are read before anything is written: one may turn out unreadable.
    x = np.stack(list(data.all_images(config, limit)))
    files = {name: np.stack(list(data.all_images(c, limit))) for name, c in others.items()}
    folder = workdir / "ood" / f"step_{step}_seed_{seed}"
    make_writable(folder)

    scorer = ood.Scorer(trained, config.evaluation.batch_size)
    key, unlike_key = jax.random.split(jax.random.key(seed))

    def scores(name: str, images: Iterable[Float[np.ndarray, "H W C"]], n: int) -> Scores:
        log.info("scoring %d images: %s", n, name)
        return scorer(key, tqdm(images, name, n, unit="image", disable=None, leave=False))

    of_data = scores(config.data.name, x, len(x))
    of_others = {}
    for name in against:
        unlike = ood.unlike_images(name, unlike_key, x) if name in ood.UNLIKE else files[name]
        of_others[name] = scores(name, unlike, len(files.get(name, x)))
    found = {name: ood.aurocs(of_data, of_other) for name, of_other in of_others.items()}
    figures.write_histograms(
        folder / "histograms.png",
        [short(config.data.name), *map(short, against)],
        histograms(scorer.levels, [of_data, *of_others.values()], list(found.values())),
        notes="numbers: AUROC",
    )
    results = {
        "step": step,
        "seed": seed,
        "model": model or str(workdir),
        "levels": scorer.levels,
        "in": {"name": config.data.name, "identity": inside.identity, **summary(of_data)},
        "against": {
            name: {**summary(of_other), "auroc": found[name]}
            for name, of_other in of_others.items()
        },
    }
    parts.write_json(folder / "ood.json", results)
    for line in table(scorer.levels, short(config.data.name), found):
        log.info("%s", line)
    log.info("ood.json and histograms.png are in %s", folder)


def other_data(config: ConfigDict, name: str) -> ConfigDict:
    """Returns the configuration with other data, prepared as the model's own.

    Raises:
      UserError: where they cannot be read, or have other channels.
    """
    config = config.copy_and_resolve_references()
    config.data.name = name
    try:
        data.open_source(config)
    except UserError as error:
        raise UserError(
            f"--against={name} is none of {', '.join(ood.UNLIKE)}, and as data: {error}"
        ) from error
    return config


def summary(scores: Scores) -> dict[str, Any]:
    """Returns how many images there are, and the median of their scores at each level."""
    medians = {
        name: np.median(of_level, axis=1).tolist()
        for name, of_level in scores._asdict().items()
    }
    return {"num_images": scores.log_density.shape[1], "median": medians}


def short(name: str) -> str:
    """Returns the last part of a folder's path, and other names whole."""
    is_folder = name.startswith("folder:")
    return epath.Path(name.removeprefix("folder:")).name if is_folder else name


def table(
    levels: Sequence[int], inside: str, aurocs: Mapping[str, dict[str, list[float]]]
) -> list[str]:
    """Returns the lines of a table: a row a set and score, a column a level."""
    title = f"AUROC of {inside} against"
    wide = max(map(len, [title, *map(short, aurocs)]))
    lines = [f"{title:{wide}}  {'at level':15}" + "".join(f"{t:7d}" for t in levels)]
    for name, of_scores in aurocs.items():
        for score, words in WORDS.items():
            row = "".join(f"{value:7.3f}" for value in of_scores[score])
            lines.append(f"{short(name):{wide}}  {words:15}{row}")
    return lines


def histograms(
    levels: Sequence[int],
    of_all: Sequence[Scores],
    aurocs: Sequence[dict[str, list[float]]],
) -> list[Histograms]:
    """Returns a row of panels for each score, a panel for each level shown.

    Args:
      levels: of the scores.
      of_all: scores of the data, then of the other sets.
      aurocs: of these others.
    """
    shown = np.unique(np.linspace(0, len(levels) - 1, SHOWN).round().astype(int))
    return [
        Histograms(
            title,
            [f"level {levels[i]}" for i in shown],
            [[getattr(scores, name)[i] for scores in of_all] for i in shown],
            [[f"{found[name][i]:.2f}" for found in aurocs] for i in shown],
        )
        for name, title in WORDS.items()
    ]
