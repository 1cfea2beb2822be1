"""Two processes of four devices each, on one machine, against one process."""

import contextlib
import http.server
import importlib.machinery
import importlib.util
import json
import re
import signal
import socket
import subprocess
import threading
import time

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from helpers.runs import assert_same, state_of, steps, wait_until

from drl_jax.runtime import processes

TIMEOUT = 10  # seconds for which a process may be silent, in these tests
SHORT = {
    "train__num_steps": 5,
    "log__every_steps": 5,
    "log__sample_every_steps": 2,
    "checkpoint__every_steps": 2,
    "evaluation__num_samples": 20,
}


def start(*args, devices=1):
    """Starts the program with so many CPU devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
        return tiny.start(*args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port():
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def start_pair(args, args_of_second=None):
    """Starts the program as two processes of four devices."""
    job = [f"--coordinator_address=localhost:{free_port()}", f"--timeout={TIMEOUT}"]
    return [
        start(*each, *job, "--num_processes=2", f"--process_id={i}", devices=4)
        for i, each in enumerate((args, args_of_second or args))
    ]


def ended(*started):
    """The exit statuses, and what was said."""
    said = [process.communicate(timeout=200)[0] for process in started]
    return [process.returncode for process in started], said


def ours(said):
    """What was said without the lines of JAX's runtime."""
    return [line for line in said.splitlines() if not line.startswith("[Gloo]")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A run of two processes, and what they said."""
    workdir = epath.Path(tmp_path_factory.mktemp("pair") / "run")
    statuses, said = ended(*start_pair(tiny.training(workdir, **SHORT)))
    assert statuses == [0, 0], said
    return workdir, said


@pytest.mark.parametrize("devices", [1, 8])
def test_two_processes_learn_what_one_learns(pair, tmp_path, devices):
    """On 2 x 4 devices, on 8, and on 1."""
    workdir, _ = pair
    alone = epath.Path(tmp_path) / "run"
    (status,), said = ended(start(*tiny.training(alone, **SHORT), devices=devices))
    assert status == 0, said
    state, wanted = state_of(workdir), state_of(alone)
    assert state.step == wanted.step == 5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), state, wanted
    )
    found, expected = (
        json.loads((run / "metrics.json").read_text()) for run in (workdir, alone)
    )
    assert found["pixel_frechet"] == pytest.approx(expected["pixel_frechet"], rel=1e-3)


def test_one_of_them_speaks_and_writes(pair):
    workdir, (first, second) = pair
    assert "step 5/5" in first
    assert "metrics.json are in" in first
    assert ours(second) == []
    names = {path.name for path in workdir.iterdir()}
    (events,) = (name for name in names if name.startswith("events"))
    assert names == {events, "checkpoints", "grids", "metrics.json", "samples.png"}
    assert steps(workdir) == [2, 4, 5]


def test_what_two_have_learned_is_sampled_by_one_or_by_two(pair):
    workdir, _ = pair
    args = "--mode=sample", f"--workdir={workdir}", "--num_samples=10"
    folder = workdir / "samples" / "step_5_seed_0"
    found = []
    for begin in (start_pair, lambda args: [start(*args, devices=8)]):
        statuses, said = ended(*begin(args))
        assert set(statuses) == {0}, said
        found.append(np.load(folder / "samples.npy"))
        assert len(list(folder.iterdir())) == 12
        folder.rmtree()
    np.testing.assert_allclose(*found, atol=1e-4)


LONGER = SHORT | {"train__num_steps": 60, "log__sample_every_steps": 1000}


@pytest.fixture(scope="module")
def unstopped(tmp_path_factory):
    """The state that two processes reach when nothing stops them."""
    workdir = epath.Path(tmp_path_factory.mktemp("unstopped") / "run")
    statuses, said = ended(*start_pair(tiny.training(workdir, **LONGER)))
    assert statuses == [0, 0], said
    return state_of(workdir)


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_saves_for_both_and_together_they_go_on(tmp_path, unstopped, signalled):
    """To the bit as if nothing had been."""
    workdir = epath.Path(tmp_path) / "run"
    args = tiny.training(workdir, **LONGER)
    pair = start_pair(args)
    wait_until(lambda: (workdir / "checkpoints" / "2").exists(), pair[0])
    pair[signalled].send_signal(signal.SIGTERM)
    statuses, said = ended(*pair)
    assert statuses == [143, 143], said
    *_, newest = steps(workdir)
    assert 2 <= newest < 60
    assert f"step {newest} is saved" in said[0]
    statuses, said = ended(*start_pair(args))
    assert statuses == [0, 0], said
    assert_same(state_of(workdir), unstopped)


def test_a_run_that_eight_devices_began_four_finish(tmp_path):
    """With the same batches and noise: equal to 1e-5 of the greatest entry of each array."""
    stopped, whole = (tiny.trained(tmp_path / name) for name in ("stopped", "whole"))
    changes = SHORT | {"log__sample_every_steps": 100_000, "checkpoint__every_steps": 5}

    def go_on(workdir, num_steps, devices):
        return start(
            *tiny.training(workdir, **changes | {"train__num_steps": num_steps}),
            devices=devices,
        )

    interrupted = go_on(stopped, 100_000, 8)
    wait_until((stopped / "checkpoints" / str(tiny.STEPS + 5)).exists, interrupted)
    interrupted.send_signal(signal.SIGTERM)
    statuses, said = ended(interrupted)
    assert statuses == [143], said
    *_, newest = steps(stopped)
    for workdir, devices in ((stopped, 4), (whole, 8)):
        statuses, said = ended(go_on(workdir, newest + 5, devices))
        assert statuses == [0], said
    state, wanted = state_of(stopped), state_of(whole)
    assert state.step == wanted.step == newest + 5
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_partner_is_told_in_a_clear_line_and_does_not_hang(tmp_path, lost, signum):
    changes = SHORT | {"train__num_steps": 100_000, "log__sample_every_steps": 1000}
    pair = start_pair(tiny.training(epath.Path(tmp_path) / "run", **changes))
    wait_until(lambda: (tmp_path / "run" / "checkpoints" / "2").exists(), pair[0])
    pair[lost].send_signal(signum)
    begun = time.monotonic()
    (status,), (said,) = ended(pair[1 - lost])
    took = time.monotonic() - begun
    pair[lost].kill()
    pair[lost].communicate()
    assert status != 0
    assert took < 6 * TIMEOUT
    *_, last = said.splitlines()
    assert re.fullmatch(
        rf"error: the other processes .* silent for {TIMEOUT} seconds.*", last
    ), said


def test_processes_that_were_told_different_things_are_refused(tmp_path):
    args, others = (
        tiny.training(tmp_path / "run", optim__learning_rate=rate) for rate in (1e-3, 2e-3)
    )
    statuses, said = ended(*start_pair(args, others))
    assert statuses == [1, 1]
    first, second = map(ours, said)
    assert first == ["error: process 1 of 2 was started with other flags: give all the same"]
    (line,) = second
    assert re.fullmatch(
        r"error: process 1 was .*optim\.learning_rate is 0\.001, here 0\.002\).*", line
    )
    assert not (tmp_path / "run").exists()


def test_a_coordinator_that_does_not_answer_is_one_line(tmp_path):
    address = f"localhost:{free_port()}"
    job = [f"--coordinator_address={address}", "--num_processes=2", "--process_id=1"]
    begun = time.monotonic()
    (status,), (said,) = ended(
        start(*tiny.training(tmp_path / "run"), *job, f"--timeout={TIMEOUT}")
    )
    assert status == 1
    assert time.monotonic() - begun < 3 * TIMEOUT
    assert re.fullmatch(rf"error: --coordinator_address is '{address}', and nobody.*\n", said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_processes=2"], "--coordinator_address and --process_id missing"),
        (["--coordinator_address=a:1", "--num_processes=2", "--process_id=2"], "last is 1"),
        (["--coordinator_address=a", "--num_processes=2", "--process_id=0"], "HOST:PORT"),
        (
            [
                "--nodistributed",
                "--coordinator_address=a:1",
                "--num_processes=2",
                "--process_id=0",
            ],
            "--nodistributed is for one process",
        ),
        (["--num_processes=0"], "num_processes"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(tmp_path, capsys, flags, words):
    assert tiny.main(*tiny.training(tmp_path / "run"), *flags) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]*\n", told)
    assert words in told
    assert not (tmp_path / "run").exists()


def test_several_processes_need_a_workdir(capsys):
    job = ["--coordinator_address=a:1", "--num_processes=2", "--process_id=0"]
    assert tiny.main(f"--config={tiny.DIGITS}", *job) == 1
    assert "needs the --workdir that they share" in capsys.readouterr().err


def job(**changes):
    values = dict.fromkeys(processes.Job._fields) | {"timeout": TIMEOUT} | changes
    return processes.Job(**values)


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node[1-2]"}, True),
        ({"SLURM_NTASKS": "8"}, False),  # in the batch script, outside srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host-0,host-1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_slurm_and_tpu_pods_are_seen_and_flags_overrule_them(monkeypatch, variables, several):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert job().has_others is several
    assert job(distributed=False).has_others is False
    assert job(distributed=True).has_others is True


@pytest.mark.parametrize(
    ("workers", "several"),
    [(b"unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3", True), (b"::10.0.0.2", False)],
)
def test_a_cloud_tpu_of_several_hosts_is_seen(monkeypatch, workers, several):
    """As its metadata server lists them; where libtpu is not installed it is not asked."""
    asked = []

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(workers)

    for name in ("SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("localhost", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
        for is_there in (True, False):
            found = importlib.machinery.ModuleSpec("libtpu", None) if is_there else None
            monkeypatch.setattr(importlib.util, "find_spec", lambda _, found=found: found)
            assert job().has_others is (several and is_there)
        server.shutdown()
    attribute = "/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    assert asked == [(attribute, "Google")]


def test_outside_a_cluster_a_process_does_not_know_the_others(tmp_path):
    (status,), (said,) = ended(start(*tiny.training(tmp_path / "run"), "--distributed"))
    assert status == 1
    assert re.fullmatch(r"error: this is one of several .* does not say which: [^\n]*\n", said)
    assert not (tmp_path / "run").exists()
