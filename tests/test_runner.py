import io
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from PIL import Image

from drl_jax import model
from drl_jax.metrics.frechet import fit
from drl_jax.sampling import ladder
from drl_jax.tasks.long_run import runner

ASKED = {"num_steps": 20, "num_chains": 8}
HMC = [
    "--config.mcmc.sampler=hmc",
    "--config.mcmc.leapfrog=(2,)",
    "--config.mcmc.warmup_steps=5",
    "--levels=0",
]


@pytest.fixture
def workdir(tmp_path):
    return tiny.trained(copy=epath.Path(tmp_path) / "run")


def start(workdir, *args, **asked):
    flags = [f"--{name}={value}" for name, value in (ASKED | asked).items()]
    return tiny.main("--mode=long_run", f"--workdir={workdir}", *flags, *args)


def folder(workdir, sampler="langevin"):
    return workdir / "long_run" / f"step_{tiny.STEPS}_{sampler}_seed_0"


def results(workdir, sampler="langevin"):
    """The bytes of every file but the chains'."""
    found = {path.name: path.read_bytes() for path in folder(workdir, sampler).iterdir()}
    del found["chains.snapshot"]
    return found


def numbers(workdir):
    def refuse(text):
        raise ValueError(text)  # NaN and Infinity are no JSON

    text = (folder(workdir) / "long_run.json").read_text()
    return json.loads(text, parse_constant=refuse)


def test_what_is_written_is_what_the_chains_show(workdir, caplog):
    assert start(workdir) == 0
    found = numbers(workdir)
    T = 6
    assert [r["step"] for r in found["records"]] == [0, 1, 2, 5, 10, 20]
    first, *_, last = found["records"]
    assert first["displacement"] == [0.0] * T
    assert first["acceptance"] == first["r_hat"] == [None] * T
    assert last["acceptance"] == [1.0] * T
    assert last["draws"] == [8 * 10] * T
    # The start is data of one level too noisy: its distance shows it.
    for level in range(1, T - 1):
        assert first["frechet"][level] > found["data"]["frechet"][level]
    assert [r["steps_a_level"] for r in found["ladder"]["rungs"]] == [1, 3]
    for name in ("ladder.png", *(f"level_{level}.png" for level in range(T))):
        png = np.asarray(Image.open(io.BytesIO((folder(workdir) / name).read_bytes())))
        rows, columns = (2, 10) if name == "ladder.png" else (7, 8)
        assert png.shape == (8 * (9 * rows + 1), 8 * (9 * columns + 1))
    assert (folder(workdir) / "curves.png").exists()
    assert len([line for line in caplog.messages if "R-hat" in line]) == T
    # More steps go on from here, and the ones before stay as they are.
    assert start(workdir, num_steps=50) == 0
    assert "going on from step 20 of 50" in caplog.text
    longer = numbers(workdir)
    assert longer["records"][:6] == found["records"]
    assert longer["records"][6]["step"] == 50
    assert [r["steps"] for r in longer["ladder"]["rungs"]] == [10, 20, 50]


def test_the_ladder_with_the_steps_of_training_draws_the_samples(workdir):
    K, T, n = tiny.CONFIG["mcmc.K"], 6, 8
    trained, key = model.load_run(workdir).model, jax.random.key(3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(n))
    x = ladder.white_noise(keys, (8, 8, 1), trained.method.schedule)
    for level in reversed(range(T)):
        _, seen = trained.long_run(key, x, np.full(n, level), K, points=0)
        x = seen.x
    error = np.abs(x - trained.sample(key, n)).max(axis=(1, 2, 3))
    assert np.mean(error < 1e-4) > 0.8  # two programs round differently, a chain may tip
    assert trained._advance._cache_size() == 1


@pytest.mark.parametrize(
    ("sampler", "args", "steps", "every"), [("langevin", [], 20, 16), ("hmc", HMC, 6, 8)]
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    workdir, sampler, args, steps, every, monkeypatch, caplog
):
    asked = [*args, f"--num_steps={steps}"]
    assert start(workdir, *asked) == 0
    whole = results(workdir, sampler)
    folder(workdir, sampler).rmtree()
    monkeypatch.setattr(runner, "CALL", 0)  # one step a call, and so other calls
    add, calls = runner.Progress.add, []

    def stop_now_and_then(self, steps):
        add(self, steps)
        calls.append(steps)
        if len(calls) % every == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner.Progress, "add", stop_now_and_then)
    while (status := start(workdir, *asked)) == 128 + signal.SIGTERM:
        assert "the same command goes on from here" in caplog.messages[-1]
    assert status == 0
    of_ladders = sum(N // 6 * 6 for N in runner.ladder_totals(steps, 6))
    assert sum(calls) == steps + of_ladders  # no step is made twice
    assert max(calls) == 1
    assert len(calls) > every
    assert results(workdir, sampler) == whole
    if sampler == "langevin":
        assert start(workdir, *asked) == 0  # with nothing left to do
        assert results(workdir, sampler) == whole


def test_wrong_commands_are_one_clear_line(workdir, capsys):
    for args, words in (
        (["--num_chains=1"], "1 chains a level: R-hat compares chains"),
        (["--levels=6"], "level 6 is out of range: the model has levels 0 to 5"),
        (["--levels=0,a"], "'a' is no level"),
        (["--levels=-1"], "'-1' is no level"),
        (["--num_steps=0"], "num_steps=0"),
        (["--num_chains=20"], "200 images, too few to compare 120 chains"),
        (["--config.data.name=folder:nonesuch"], "no such folder"),
    ):
        asked = {name: v for name, v in ASKED.items() if f"--{name}" not in args[0]}
        flags = [f"--{name}={value}" for name, value in asked.items()]
        assert tiny.main("--mode=long_run", f"--workdir={workdir}", *flags, *args) == 1
        err = capsys.readouterr().err.splitlines()[-1]
        assert re.search(f"^error: .*{words}", err)
        assert not (workdir / "long_run").exists()


def test_chains_of_other_settings_or_damaged_ones_are_refused(workdir, capsys):
    few = {"num_steps": 2, "levels": "0,3"}
    assert start(workdir, **few) == 0
    before = results(workdir)
    capsys.readouterr()
    assert start(workdir, **few, num_chains=4) == 1
    assert start(workdir, **(few | {"levels": "0"})) == 1
    assert start(workdir, "--config.mcmc.noise_scale=0.5", **few) == 1
    for err, words in zip(
        [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")],
        (
            r"num_chains was 8, now 4\)",
            r"levels was \[0, 3\], now \[0\]",
            r"config.mcmc.noise_scale was 1.0, now 0.5",
        ),
        strict=True,
    ):
        assert re.search(f"{words}.*give another --seed or the old values$", err)
    path = folder(workdir) / "chains.snapshot"
    path.write_bytes(path.read_bytes()[:-1])
    assert start(workdir, **few) == 1
    assert re.search(r"error: .*chains.snapshot is damaged: .*\n$", capsys.readouterr().err)
    assert results(workdir) == before


def test_the_default_levels_and_chains_fill_a_batch(workdir):
    assert tiny.main("--mode=long_run", f"--workdir={workdir}", "--num_steps=1") == 0
    found = numbers(workdir)
    assert found["levels"] == list(range(6))
    assert found["chains_a_level"] == 64 // 6 // 4 * 4
    assert found["ladder"]["rungs"] == []
    assert len(diffusion.level_groups(1000)) == 10


def test_chains_that_ran_away_are_told_without_numbers():
    x = np.ones((8, 2, 2, 1))
    reference = fit(np.ones((9, 4)))
    assert runner.distance(x, reference) == pytest.approx(0)
    x[3, 0] = np.inf
    assert np.isnan(runner.distance(x, reference))
