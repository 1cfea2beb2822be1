"""The task `ood`: measures how well a model detects out-of-distribution images and pixels."""

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Key, UInt8
from ml_collections import ConfigDict

from drl_jax.data import arrays, image_files, pipeline, sources
from drl_jax.data.sources import Folder, Source
from drl_jax.errors import UserError
from drl_jax.metrics import anomaly, ood
from drl_jax.metrics.anomaly import Detection
from drl_jax.metrics.ood import Scores
from drl_jax.model import Model
from drl_jax.plots import arrays as arrays_lib
from drl_jax.plots import figures
from drl_jax.plots import images as images_lib
from drl_jax.plots.figures import Histograms
from drl_jax.runtime.progress import bar
from drl_jax.standardisation import IDENTITY, Standardisation
from drl_jax.storage import data_record, results
from drl_jax.storage.atomic import write_json
from drl_jax.storage.runs import Run
from drl_jax.tasks import common

log = logging.getLogger(__name__)

TITLES = {"log_density": "log-density F", "score_norm": "score norm |∇F|"}
MAX_PANELS = 6  # levels per row of histograms.png
SHOWN = 10  # images per set in maps.png,
LINES = 4  # or signals or vectors
BRIGHTEST = 6.0  # value of a map that is shown in white; 0 and below is black
MASKED_PIXELS = 2**22  # maximum number of pixels for the AUROC of pixels
WHITE = 128  # pixel value at and above which a mask file marks an anomaly


def run(
    run: Run,
    workdir: epath.Path,
    model: str | None,
    against: Sequence[str],
    ood_masks: str | None,
    false_alarm_rate: float,
    seed: int,
    label: str | None,
    guidance: float,
) -> None:
    """Scores in-distribution and other images at every level, and computes the AUROC.

    Also fits a detector that combines the levels (`metrics.anomaly`). For this, the
    in-distribution images are divided at random into three equal parts: the first and the
    second are the two sets that the detector needs, and only the third is compared with other
    images. Of synthetic images, too, only those made from the third part are. If a part has
    fewer than `anomaly.LEAST` images, there is no detector, which is logged.

    The in-distribution images are held out from training where there are such images
    (`sources.open_held_out`). At most `config.evaluation.num_data` images of each set are
    scored, in their order.

    Writes to `workdir`/ood/step_STEP_seed_SEED, or to a folder with a number after this name if
    there are results with other settings (`storage.results.folder`):
      settings.json: everything on which the scores depend.
      histograms.png: histograms of both scores at several levels.
      maps.png: for each set, images, and below them their maps (white: anomalous) and, if there
        are any, their masks. Signals and (standardised) vectors are lines, and their maps
        (red) lie behind.
      ood.json, with the fields:
        step: training steps of the model.
        seed: the random seed.
        model: the name by which the model was loaded, or else the work directory.
        levels: the levels at which the images are scored.
        in: name, identity and split of the in-distribution data, held_out, num_images, and
          median: the median of each of the `ood.Scores` at each level.
        against: per set of other images, split (if it is a data set), num_images, median, and
          auroc: for each of the scores, the AUROC at each level.
          detector: detected, the share of images above the threshold; auroc; and with masks,
            pixel_auroc: that of the `map`, and of the z-scores `gradient` and `residual` at
            each level. Higher values are expected at masked pixels, compared with the other
            pixels of the same set.
        detector: false_alarm_rate, threshold, num_fitted, num_calibration and num_images (the
          sizes of the three parts), false_alarms (the share of the third part above the
          threshold), weights (`Detector.weights`) and images_per_second (without compilation).
          Without a detector, this and the field `detector` of each set are null.

    Args:
      run: the trained model.
      workdir: where the results go.
      model: the name by which the model was loaded; None for the model of `workdir`.
      against: sets of other images: names in `ood.SYNTHETIC`, 'folder:/path', 'digits', or
        TFDS data sets, which use `config.evaluation.split` and `config.data.data_dir`.
      ood_masks: folder of the masks of the one set in `against` that is a folder
        (`load_masks`); None: only 'patch' has masks.
      false_alarm_rate: share of in-distribution images that may exceed the threshold.
      label: class of the density; None: none.
      guidance: weight of guidance (`Model.given`).
      seed: random seed of the noise and of the synthetic images.

    Raises:
      UserError: if the data cannot be used, a set is unknown, cannot be read or has another
        number of channels, a score is not finite, there are too few images for the rate or
        for masks, a mask cannot be used, or the folder cannot be written to.
    """
    run = common.given(run, label, guidance)
    config = run.config
    against = list(dict.fromkeys(against))
    if not against:
        raise UserError(f"--against is empty: give one or more of {', '.join(ood.SYNTHETIC)}")
    source = common.of_label(sources.open_held_out(config), label)
    data_record.warn_if_changed(model or workdir, source)
    others = {name: open_other(config, name) for name in against if name not in ood.SYNTHETIC}
    # All images are read before anything is written, because one may be unreadable.
    limit = config.evaluation.num_data
    x = read(config, source, limit)
    other_images = {name: read(config, other, limit) for name, other in others.items()}
    masks = {}
    if ood_masks is not None:
        folders = [name for name in others if name.startswith("folder:")]
        if len(folders) != 1:
            raise UserError(
                f"--ood_masks={ood_masks} are those of one folder of images, but --against has "
                f"{len(folders) or 'none'}: give one as folder:PATH"
            )
        (name,) = folders
        masks[name] = load_masks(config, others[name], epath.Path(ood_masks), limit)
    parts = np.array_split(np.random.default_rng(seed).permutation(len(x)), 3)
    has_detector = len(parts[-1]) >= anomaly.LEAST or bool(masks)
    if has_detector:
        anomaly.require_enough(len(parts[-1]))
        anomaly.require_rate(false_alarm_rate, len(parts[1]))
    else:
        log.warning(
            "no detector is fitted: this needs %d or more images of the data, and there are %d",
            3 * anomaly.LEAST,
            len(x),
        )
    settings = common.result_settings(
        run,
        "ood",
        seed,
        **common.condition(label, guidance),
        against=against,
        images=[results.digest(images) for images in (x, *other_images.values())],
        masks=results.digest(list(masks.values())),
        false_alarm_rate=false_alarm_rate,
    )
    path = workdir / "ood" / f"step_{run.step}_seed_{seed}"
    with results.folder(path, settings) as folder:
        scorer = ood.Scorer(run.model)
        key, synthetic_key, detector_key = jax.random.split(common.task_key("ood", seed), 3)

        def score(name: str, images: Iterable[Float[np.ndarray, "*D"]], n: int) -> Scores:
            log.info("images to score: %d (%s)", n, name)
            shown = bar(iterable=images, desc=name, total=n, unit="image", leave=False)
            scores = scorer(key, iter(shown))  # a bar has a length, but can be read only once
            common.require_finite(np.stack(scores).T, "scores", common.PARAMETERS_DIVERGED)
            return scores

        data_scores = score(f"{config.data.name}, {source.described_split()}", x, len(x))
        other_scores = {}
        for name in against:
            if name in ood.SYNTHETIC:
                there = run.model.standardisation
                made = ood.synthetic_images(name, synthetic_key, there.apply(x))
                images = there.invert(np.stack(list(made)))
                other_scores[name] = score(name, images, len(x))
                other_images[name] = images[parts[2]]
                if name == "patch":
                    differs = other_images[name] != x[parts[2]]
                    masks[name] = np.any(differs, axis=-1) if x.ndim > 2 else differs
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
        detector: dict[str, Any] | None = None
        detected: Mapping[str, Any] = dict.fromkeys(against)
        if has_detector:
            detector, detected = detect(
                run.model,
                detector_key,
                [x[part] for part in parts],
                {name: other_images[name] for name in against},
                masks,
                false_alarm_rate,
                folder / "maps.png",
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
                    "detector": detected[name],
                }
                for name, scores in other_scores.items()
            },
            "detector": detector,
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


def read(config: ConfigDict, source: Source, limit: int) -> Float[np.ndarray, "n *D"]:
    """Reads the first images of a source, prepared as for training.

    Raises:
      UserError: naming an image that cannot be read.
    """
    return pipeline.load_examples(config, source, limit)


def load_masks(
    config: ConfigDict, source: Source, folder: epath.Path, limit: int
) -> Bool[np.ndarray, "n H W"]:
    """Reads the masks of the first images of a folder, true where a pixel is anomalous.

    The mask of NAME.SUFFIX is NAME.png, white at anomalous pixels, of the same size as the
    image. It is cropped and resized like the image.

    Args:
      config: uses data.
      source: the `Folder` of the images.
      folder: the folder of the masks.
      limit: maximum number of images.

    Raises:
      UserError: if a mask is missing, unreadable or of another size than its image, or if all
        pixels of all masks have the same value.
    """
    assert isinstance(source, Folder)
    masks: list[Bool[np.ndarray, "H W"]] = []
    for index, name in enumerate(source.names):
        if len(masks) == limit:
            break
        (image,) = source.read([index])
        if image is None:
            continue
        path = (folder / name).with_suffix(".png")
        if not path.exists():
            raise UserError(f"--ood_masks={folder}: there is no mask {path} of image {name}")
        mask = image_files.read_image(path, channels=1)
        if mask.shape[:2] != image.shape[:2]:
            sizes = ["x".join(map(str, each.shape[1::-1])) for each in (mask, image)]
            raise UserError(
                f"--ood_masks={folder}: the mask {path} is {sizes[0]}, but its image is "
                f"{sizes[1]}: give a mask of the same size"
            )
        white = np.where(mask >= WHITE, 255.0, 0.0)
        resized = pipeline.prepare(white, config.data.image_size, config.data.crop, 255.0)
        masks.append(resized[..., 0] >= 0)
    found = np.stack(masks)
    if found.all() or not found.any():
        raise UserError(
            f"--ood_masks={folder}: the masks mark {'all' if found.any() else 'no'} pixels; "
            "give PNG files that are white where an image is anomalous and black elsewhere"
        )
    return found


def detect(
    model: Model,
    key: Key[Array, ""],
    parts: Sequence[Float[np.ndarray, "_ *D"]],
    others: Mapping[str, Float[np.ndarray, "_ *D"]],
    masks: Mapping[str, Bool[np.ndarray, "_ *E"]],
    rate: float,
    figure: epath.Path,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Fits a detector, and applies it to in-distribution and other images.

    Args:
      model: the model.
      key: random key.
      parts: the first and the second set of the detector, and in-distribution images to detect
        among the others.
      others: sets of other images.
      masks: masks of some of these sets.
      rate: false-alarm rate.
      figure: path of the figure of the maps.

    Returns:
      `detector` of ood.json, and for each set of other images its own `detector`.

    Raises:
      UserError: if a score is not finite, or the figure cannot be written.
    """
    detector = anomaly.fit(model, key, parts[0], parts[1])
    threshold = detector.threshold(rate)
    start, shown = time.perf_counter(), []

    def apply(name: str, images: Float[np.ndarray, "n *D"]) -> Detection:
        pixels = math.prod(images.shape[1:-1]) if images.ndim > 2 else images.shape[1]
        keep = MASKED_PIXELS // pixels if name in masks else SHOWN
        found, n = [], 0
        for batch in detector(images):
            common.require_finite(batch.score, "scores", common.PARAMETERS_DIVERGED)
            kept = max(keep - n, 0)  # of large arrays, only those that are used
            found.append(
                Detection(
                    score=batch.score,
                    map=batch.map[:kept].copy(),
                    z=jax.tree.map(lambda v, kept=kept: v[:kept].copy(), batch.z),
                )
            )
            n += len(batch.score)
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
        shown.append((name, images[:SHOWN], whole.map[:SHOWN], masks.get(name)))
        return whole

    inside = apply("", parts[2])
    found = {name: apply(name, images) for name, images in others.items()}
    seconds = time.perf_counter() - start
    images_lib.write_png(figure, sheet(shown, model.standardisation))
    n = len(parts[2]) + sum(map(len, others.values()))
    result = {
        "false_alarm_rate": rate,
        "threshold": threshold,
        "num_fitted": detector.num_fitted,
        "num_calibration": len(detector.calibration),
        "num_images": len(parts[2]),
        "false_alarms": float(np.mean(inside.score > threshold)),
        "weights": {name: weights.tolist() for name, weights in detector.weights.items()},
        "images_per_second": n / seconds,
    }
    log.info(
        "false alarms: %.3f of %d images of the data, at a rate of %g; %.0f images per second",
        result["false_alarms"],
        len(parts[2]),
        rate,
        result["images_per_second"],
    )
    detected: dict[str, dict[str, Any]] = {}
    for name, other in found.items():
        detected[name] = {
            "detected": float(np.mean(other.score > threshold)),
            "auroc": ood.auroc(-inside.score, -other.score),
        }
        if name in masks:
            detected[name]["pixel_auroc"] = pixel_aurocs(other, masks[name][: len(other.map)])
        log.info("%s: %s", short_name(name), described(detected[name]))
    return result, detected


def pixel_aurocs(
    found: Detection, masks: Bool[np.ndarray, "n *E"]
) -> dict[str, float | list[float]]:
    """Returns the AUROC with which masked pixels have higher values than the others.

    It is 1 if every masked pixel has a higher value than every other pixel of all images.

    Args:
      found: results for n images.
      masks: true at anomalous pixels.

    Returns:
      the AUROC of `map`, and those of `gradient` and `residual` at each level.
    """

    def auroc(values: Float[np.ndarray, "n *E"]) -> float:
        return ood.auroc(-values[~masks], -values[masks])

    levels = {
        name: [auroc(values) for values in np.moveaxis(getattr(found.z, name), 1, 0)]
        for name in ("gradient", "residual")
    }
    return {"map": auroc(found.map), **levels}


def described(detected: Mapping[str, Any]) -> str:
    """Returns the results of a detector for one set of images as text."""
    parts = [
        f"detected {detected['detected']:.3f}",
        f"AUROC of all levels together {detected['auroc']:.3f}",
    ]
    if "pixel_auroc" in detected:
        parts.append(f"of pixels {detected['pixel_auroc']['map']:.3f}")
    return ", ".join(parts)


def sheet(
    sets: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]],
    standardisation: Standardisation = IDENTITY,
) -> UInt8[np.ndarray, "h w C"]:
    """Returns a picture of examples and their maps.

    Args:
      sets: name ('' for the data), examples, maps and, if there are any, masks of each set.
      standardisation: of the data; vectors are shown standardised.
    """
    _, first, _, _ = sets[0]
    if first.ndim < 4:
        titles, lines, maps = [], [], []
        for name, examples, found, _ in sets:
            n = min(len(examples), LINES)
            titles += [short_name(name) or "data"] * n
            lines.append(examples[:n])
            maps.append(np.clip(found[:n] / BRIGHTEST, 0, 1))
        parts = {"examples": np.concatenate(lines)[:, None]}
        background = np.concatenate(maps)[:, None]
        parts["map"] = background[..., None] if first.ndim == 3 else background
        return arrays_lib.panels(parts, titles, standardisation)
    rows: list[np.ndarray] = []
    for _, examples, found, marked in sets:
        brightness = np.clip(found[..., None] * 2 / BRIGHTEST - 1, -1, 1)
        if examples.ndim == 5:  # of volumes, the middle slices
            middle = examples.shape[1] // 2
            examples, brightness = images_lib.slices(examples), brightness[:, middle]
            marked = None if marked is None else marked[:, middle]
        rows.extend([examples, brightness])
        if marked is not None:
            rows.append(np.where(marked, 1.0, -1.0)[..., None])
    height, width, _ = rows[0].shape[1:]
    channels = max(row.shape[-1] for row in rows)
    tiles = np.zeros((len(rows), SHOWN, height, width, channels), np.float32)
    for tile, row in zip(tiles, rows, strict=True):
        tile[: len(row)] = row[:SHOWN]
    return images_lib.grid(tiles.reshape(-1, height, width, channels), columns=SHOWN)


def summarise(scores: Scores) -> dict[str, Any]:
    """Returns the number of images, and the median of each score at each level."""
    medians = {
        name: np.median(values, axis=1).tolist() for name, values in scores._asdict().items()
    }
    return {"num_images": scores.log_density.shape[1], "median": medians}


def short_name(name: str) -> str:
    """Returns the last part of the path of a folder or file, and other names unchanged."""
    has_path = name.startswith("folder:") or arrays.is_name(name)
    return epath.Path(name.partition(":")[2]).name if has_path else name


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
