import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from typing import NamedTuple

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from helpers.runs import assert_same, state_of, steps, wait_until
from ml_collections import ConfigDict
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drl_jax.errors import Interrupted, UserError
from drl_jax.runtime import preemption
from drl_jax.training import loop
from drl_jax.training.step import Metrics

LIMITS = ConfigDict({"loss_limit": 100.0, "energy_limit": 1e4})


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path) / "run"


# --- one run, started five times ---


class Record(NamedTuple):
    """A run that was killed or stopped four times before it finished."""

    workdir: epath.Path
    terminal: str  # output of the second start, on a terminal
    logs: list[str]  # output of each of the others, into a file
    stopped: list[tuple[int, float]]  # exit status and seconds after each SIGTERM
    compiled: set[str]  # programs that were not in the compilation cache


def compiled():
    return {path.name for path in tiny.COMPILED.iterdir()}


def stop(process):
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    return process.wait(timeout=60), time.monotonic() - begun


def on_a_terminal(args, until):
    """Runs the program on a terminal, with another thread logging, until it is stopped."""
    chatter = """
import logging, sys, threading, time
def talk():
    while True:
        logging.getLogger("drl_jax.other").warning("a line of its own")
        time.sleep(0.05)
threading.Thread(target=talk, daemon=True).start()
from drl_jax import main
sys.exit(main.main(sys.argv))
"""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    written = []

    def read():
        try:
            while chunk := os.read(ours, 4096):
                written.append(chunk)
        except OSError:  # the terminal has been closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    process = subprocess.Popen(
        [sys.executable, "-c", chatter, *args],
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        wait_until(until, process)
        stopped = stop(process)
    finally:
        process.kill()
        process.wait()
        reader.join()
        os.close(ours)
    return b"".join(written).decode(), stopped


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    tiny.trained()  # compiles every program
    found = compiled()
    folder = tmp_path_factory.mktemp("record")
    workdir = epath.Path(folder) / "run"
    args = tiny.training(workdir)
    logs, stopped = [], []

    def names():
        written = workdir / "checkpoints"
        return {path.name for path in written.iterdir()} if written.exists() else set()

    def during_a_write():
        return any("tmp" in name for name in names())

    def after_a_new_checkpoint():
        before = {name for name in names() if name.isdecimal()}
        return lambda: {name for name in names() if name.isdecimal()} - before

    def run(until, end):
        with (folder / f"log_{len(logs)}").open("w+") as log:
            process = tiny.start(*args, stdout=log, stderr=log)
            try:
                wait_until(until, process)
                end(process)
            finally:
                process.kill()
                process.wait()
            log.seek(0)
            logs.append(log.read())

    run(during_a_write, subprocess.Popen.kill)
    terminal, status = on_a_terminal(args, after_a_new_checkpoint())
    stopped.append(status)
    run(after_a_new_checkpoint(), subprocess.Popen.kill)
    run(after_a_new_checkpoint(), lambda process: stopped.append(stop(process)))
    run(lambda: True, lambda process: process.wait(timeout=300))
    return Record(workdir, terminal, logs, stopped, compiled() - found)


@pytest.mark.slow
def test_a_run_that_was_killed_and_stopped_equals_an_uninterrupted_one_to_the_bit(record):
    assert_same(state_of(record.workdir), state_of(tiny.trained()))
    for name in ("metrics.json", "samples.png"):
        assert (record.workdir / name).read_bytes() == (tiny.trained() / name).read_bytes()
    assert [
        path.name for path in (record.workdir / "checkpoints").iterdir() if "." in path.name
    ] == []


@pytest.mark.slow
def test_sigterm_saves_and_ends_within_seconds_with_status_143(record):
    for text, (status, seconds) in zip(
        (record.terminal, record.logs[2]), record.stopped, strict=True
    ):
        assert status == 143
        assert seconds < 10
        assert re.search(
            r"^stopped by signal 15; step \d+ is saved: the same command resumes from here\r?$",
            text,
            re.MULTILINE,
        )
    resumed = [re.search(r"resuming from step (\d+) of 300", log) for log in record.logs]
    assert resumed[0] is None
    starts = [int(found[1]) for found in resumed[1:]]
    assert starts == sorted(set(starts))
    saved = [
        re.search(r"step (\d+) is saved", text)[1] for text in (record.terminal, record.logs[2])
    ]
    assert [int(step) for step in saved] == [
        starts[0],
        starts[2],
    ]  # the next start resumes there


@pytest.mark.slow
def test_log_lines_do_not_break_the_progress_bar_on_a_terminal(record):
    bars = re.findall(
        r"(\d+)/300 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+step/s, loss=-?\d+\.\d{4}\]", record.terminal
    )
    assert len(set(bars)) > 2
    shown = [
        line.rpartition("\r")[2] for line in record.terminal.replace("\r\n", "\n").split("\n")
    ]
    assert shown.count("a line of its own") > 5
    others = {line for line in shown if "a line of its own" in line} - {"a line of its own"}
    assert not others
    assert "step 50/300" not in record.terminal  # that is for logs


@pytest.mark.slow
def test_a_log_file_has_only_plain_lines(record):
    known = [
        r"resuming from step \d+ of 300",
        r"step \d+/300  [\d.]+ steps/s  \d\d:\d\d:\d\d left  loss -?\d\.\d{5}",
        r"stopped by signal 15; step \d+ is saved: .*",
        r"pixel Fréchet distance .*",
        r"samples\.png and metrics\.json are in .*",
    ]
    for log in record.logs:
        for line in log.splitlines():
            assert any(re.fullmatch(pattern, line) for pattern in known), line
    assert "step 300/300" in record.logs[-1]


@pytest.mark.slow
def test_later_starts_use_the_compilation_cache(record):
    assert any(name.startswith("jit_step-") for name in compiled())
    again = {name for name in record.compiled if name.startswith(("jit_step-", "jit_program-"))}
    assert not again


# --- tests in this process ---


def test_a_checkpoint_holds_its_step_and_more_steps_may_be_asked_for(workdir, tmp_path):
    assert tiny.main(*tiny.training(workdir, train__num_steps=100)) == 0
    copy = tiny.trained(copy=tmp_path / "copy")
    assert_same(state_of(workdir), state_of(copy, step=100))
    assert tiny.main(*tiny.training(workdir)) == 0
    assert_same(state_of(workdir), state_of(tiny.trained()))


def test_the_last_checkpoints_are_kept_and_every_nth():
    assert steps(tiny.trained()) == [100, 200, 260, 280, 300]


def test_scalars_and_images_are_written_for_tensorboard():
    import tensorflow as tf

    events = EventAccumulator(str(tiny.trained()), size_guidance={"tensors": 0})
    events.Reload()
    levels = [
        f"{name}/level_{t}" for name in ("f_pos", "f_neg", "displacement") for t in range(6)
    ]
    for tag in ["loss", "grad_norm", "steps_per_second", *levels]:
        found = events.Tensors(tag)
        assert [event.step for event in found] == [50, 100, 150, 200, 250, 300]
        assert all(np.isfinite(tf.make_ndarray(event.tensor_proto)) for event in found)
    (grid,) = events.Tensors("samples")
    assert grid.step == 150
    *_, png = tf.make_ndarray(grid.tensor_proto)
    file = np.asarray(Image.open(tiny.trained() / "grids" / "00000150.png"))
    np.testing.assert_array_equal(tf.io.decode_png(png).numpy()[..., 0], file)


@pytest.mark.parametrize("rate", [1.0, 1e3, 1e30])
def test_a_run_that_diverges_ends_with_one_line_and_keeps_only_sound_states(
    workdir, capsys, caplog, rate
):
    changes = {"optim__learning_rate": rate, "optim__warmup_steps": 0, "optim__decay_steps": 0}
    changes |= {"checkpoint__every_steps": 1, "log__every_steps": 1000}
    assert tiny.main(*tiny.training(workdir, **changes)) == 1
    *_, line = capsys.readouterr().err.splitlines()
    found = re.fullmatch(
        r"error: training diverged at step (\d+): .*learning_rate.*mcmc\.K.*", line
    )
    bad = int(found[1])
    assert 0 < bad < tiny.STEPS
    # Every state before the bad one was tried by the step after it, and saved; that one not.
    assert steps(workdir)[-3:] == list(range(1, bad))[-3:]
    if bad > 1:
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(state_of(workdir)))


def make_metrics(**changes):
    nan = np.float32(np.nan)  # level 1 met no example
    values = {
        "loss": 0.1,
        "grad_norm": 1.0,
        "f_pos": [1.0, nan],
        "f_neg": [-2.0, nan],
        "displacement": [0.5, nan],
        "acceptance": [1.0, nan],
    }
    values |= changes
    return Metrics(**{name: np.asarray(value, np.float32) for name, value in values.items()})


def test_metrics_within_the_limits_are_sound():
    loop.require_sound(7, make_metrics(), LIMITS)
    loop.require_sound(7, make_metrics(loss=-99.0, f_neg=[-9e3, 9e3]), LIMITS)


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": np.nan},
        {"loss": 101.0},
        {"loss": -101.0},
        {"loss": -np.inf},
        {"grad_norm": np.inf},
        {"grad_norm": np.nan},
        {"f_pos": [2e4, np.nan], "f_neg": [2e4, np.nan]},  # which the loss does not show
        {"f_neg": [np.nan, -2e4]},
        {"f_neg": [1.0, -np.inf]},
        {"loss": np.nan, "f_pos": [np.nan, np.nan], "f_neg": [np.nan, np.nan]},
    ],
)
def test_an_exploding_or_unreal_loss_energy_or_gradient_is_refused(changes):
    with pytest.raises(UserError, match=r"diverged at step 7: [^\n]*$"):
        loop.require_sound(7, make_metrics(**changes), LIMITS)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_handlers_are_restored(signum):
    before = signal.getsignal(signum)
    with preemption.stop_on_signal() as stop:
        assert stop() is None
        os.kill(os.getpid(), signum)
        wait = time.monotonic() + 10
        while not stop() and time.monotonic() < wait:
            time.sleep(0.001)
        assert stop() == signum
    assert signal.getsignal(signum) is before
    assert str(Interrupted(15, 3)) == "stopped by signal 15; step 3 is saved"


def test_the_mean_over_steps_leaves_out_what_is_nan():
    values = np.array([[1.0, np.nan, np.nan], [3.0, 5.0, np.nan]])
    np.testing.assert_array_equal(loop.nan_mean(values), [2.0, 5.0, np.nan])
