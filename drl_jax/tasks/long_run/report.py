"""What is written of long-run chains: pictures, curves, numbers, and lines in the log."""

import json
import logging
import math
from typing import Any

import numpy as np
from etils import epath

from drl_jax.plots import figures, images
from drl_jax.plots.figures import Panel
from drl_jax.storage.atomic import write_whole
from drl_jax.tasks.long_run.runner import Setting, Story

log = logging.getLogger(__name__)


def write(folder: epath.Path, story: Story, setting: Setting, T: int) -> None:
    """Writes a picture a level and one of the ladder, curves.png and long_run.json."""
    for number, level in enumerate(setting.levels):
        rows = [setting.start[number], *(p[number] for p in story.pictures)]
        write_rows(folder / f"level_{level}.png", rows)
    if story.rung_pictures:
        write_rows(folder / "ladder.png", story.rung_pictures)
    else:
        log.info("no ladder has a step for each of %d levels: ask for more --num_steps", T)
    figures.write_curves(folder / "curves.png", panels(story, setting))
    numbers = {
        "levels": setting.levels.tolist(),
        "chains_a_level": len(setting.t) // len(setting.levels),
        "data": setting.data,
        "records": story.records,
        "ladder": {
            "samples": len(setting.t),
            "data": {"frechet": setting.images_frechet},
            "rungs": story.rungs,
        },
    }
    write_whole(
        folder / "long_run.json", (json.dumps(_plain(numbers), indent=2) + "\n").encode()
    )
    end = story.records[-1]
    log.info("after %d steps (in brackets: of data):", end["step"])
    for i, level in enumerate(setting.levels):
        log.info(
            "  level %d: F %.1f (%.1f), moved %.2f (%.2f), acceptance %.2f, Fréchet %.3f "
            "(%.3f), R-hat %.3f, %.0f effective draws",
            level,
            *(end["log_density"][i], setting.data["log_density"][i]),
            *(end["displacement"][i], setting.data["displacement"][i]),
            end["acceptance"][i],
            *(end["frechet"][i], setting.data["frechet"][i]),
            *(_known(end["r_hat"][i]), _known(end["effective_sample_size"][i])),
        )
    for rung in story.rungs:
        log.info(
            "  ladder of %d steps, %d a level: Fréchet %.3f (%.3f)",
            *(rung["steps"], rung["steps_a_level"], rung["frechet"], setting.images_frechet),
        )
    log.info(
        "pictures (rows: data, then steps %s), curves.png and long_run.json are in %s",
        *(", ".join(str(r["step"]) for r in story.records), folder),
    )


def write_rows(path: epath.Path, rows: list[np.ndarray]) -> None:
    """Writes images in rows of equal length."""
    images.write_png(path, images.grid(np.concatenate(rows), columns=len(rows[0])))


def panels(story: Story, setting: Setting) -> list[Panel]:
    """Returns the curves of all that was recorded; dotted lines are of data."""
    names = [f"level {level}" for level in setting.levels]
    steps = [r["step"] for r in story.records]

    def panel(title: str, scale: str, of: str, relative: bool = False) -> Panel:
        values = np.array([[_known(v) for v in r[of]] for r in story.records]).T
        marks = setting.data.get(of, [])
        if relative:
            values, marks = values - np.array(marks)[:, None], [0.0]
        curves = dict(zip(names, values.tolist(), strict=True))
        return Panel(title, scale, curves, dict(zip(names, marks, strict=False)), steps)

    ladder = {"whole ladder": [r["frechet"] for r in story.rungs]}
    return [
        panel("log-density less that of data [nats]", "symlog", "log_density", relative=True),
        panel("displacement |y - x_tilde| (dotted: of data)", "linear", "displacement"),
        panel("acceptance since the point before", "linear", "acceptance"),
        panel("Fréchet distance on pixels (dotted: of data)", "log", "frechet"),
        panel("split R-hat, median over conditions", "log", "r_hat"),
        panel("effective sample size, all chains", "log", "effective_sample_size"),
        Panel(
            "Fréchet distance of samples, against steps in all",
            "log",
            ladder,
            {"whole ladder": setting.images_frechet},
            [r["steps"] for r in story.rungs],
        ),
    ]


def _known(value: float | None) -> float:
    """NaN for what is not known."""
    return math.nan if value is None else value


def _plain(value: Any) -> Any:
    """Replaces what JSON has no number for by None."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
