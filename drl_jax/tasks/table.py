"""All tasks of `drl_jax.main` and all of their flags, as one table.

The flags, `--help`, the checks of the command line and the call of the task are derived from
this table (`tasks.command_line`). Importing it loads neither JAX nor NumPy.

To add a task, add an entry to `TASKS` and a module `drl_jax/tasks/NAME.py` whose function `run`
takes the arguments `Task.arguments`, by keyword.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flag:
    """One command-line flag, --name=value.

    Attributes:
      name: the name, without dashes.
      help: what the value means, without a full stop: --help appends the default.
      type: type of the value: `str`, `int`, `float` or `bool`; or `list[str]`, `list[int]` or
        `list[float]`, whose elements are separated by commas.
      default: the value if the flag is not given; None if the program chooses one.
      default_help: description of the default in --help, if its value does not describe
        itself; a mapping from names of tasks to descriptions if tasks differ.
      minimum: smallest value of an integer.
      maximum: largest value of an integer; JAX counts in 32 bits.
      choices: permitted values; empty if every value of the type is permitted.
      implied: for some values of the flag, the fields of the configuration that this value of
        the flag sets. A field with the value None keeps its value from training.
        --config.FIELD=VALUE must not give any of these fields another value.
      metavar: placeholder for the value in --help.
      is_path: whether the value may be a path, in which ~ is expanded and file:///PATH is
        accepted.
    """

    name: str
    help: str
    type: Any = str
    default: Any = None
    default_help: str | Mapping[str, str] = dataclasses.field(default="", hash=False)
    minimum: int | None = None
    maximum: int = 2**31 - 1
    choices: tuple[str, ...] = ()
    implied: Mapping[str, Mapping[str, Any]] = dataclasses.field(
        default_factory=dict, hash=False
    )
    metavar: str = "N"
    is_path: bool = False


# (values of all flags by name, names of the flags that the user gave) -> an error message, or
# None if the values are valid.
Check = Callable[[Mapping[str, Any], Collection[str]], str | None]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task, run by the module of `drl_jax.tasks` that has its name.

    Attributes:
      name: the value of --mode.
      help: one sentence for --help.
      flags: flags in addition to `COMMON`.
      required: names of the flags that must be given.
      trained: whether the task works on a trained model, which `main` loads from --model or
        --workdir; otherwise on a configuration, which `main` loads from --config.
      changeable: fields of the configuration, or sections such as "mcmc.", that
        --config.FIELD=VALUE may change; "" is all of them.
      fixed: fields or sections of `changeable` that it may not change.
      creates_workdir: whether `main` chooses a new work directory if none is given.
      distributed: whether several processes can share the task.
      check: checks combinations of values.
    """

    name: str
    help: str
    flags: tuple[Flag, ...] = ()
    required: tuple[str, ...] = ("workdir",)
    trained: bool = True
    changeable: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    creates_workdir: bool = False
    distributed: bool = True
    check: Check = lambda values, given: None

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the flags that `run` takes, besides `workdir` and `run` or `config`."""
        return tuple(flag.name for flag in self.flags if flag is not CONFIG)

    def may_change(self, field: str) -> bool:
        """Whether --config.FIELD=VALUE may change this field of the configuration."""
        return field.startswith(self.changeable) and not field.startswith(self.fixed)


CONFIG = Flag(
    "config",
    "Configuration: a Python file, or the name of one that comes with the package, such as "
    "digits for configs/digits.py",
    default_help={
        "import_original": "the paper's settings for CIFAR-10",
        "import_cdrl": "the paper's for CIFAR-10; CDRL's for networks, levels and sampler",
        "prepare": "the paper's settings, with which --config.data.name=NAME suffices",
    },
    metavar="FILE",
    is_path=True,
)
IMAGE_SIZE = Flag(
    "image_size",
    "Height and width of the images that the network was trained on",
    type=int,
    minimum=1,
)
MODEL = Flag(
    "model",
    "Trained model: a work directory, an exported file, or the name of a model that comes "
    "with the package, such as digits",
    default_help="the model in --workdir",
    metavar="MODEL",
    is_path=True,
)
IMAGES = Flag(
    "images",
    "Image files; for interpolate, pairs FIRST,LAST,...",
    type=list[str],
    default=(),
    default_help={
        "interpolate": "samples",
        "inpaint": "the first images of the data set",
        "restore": "the first images of the data set, held-out ones if there are any",
    },
    metavar="FILE,...",
    is_path=True,
)
LABEL = Flag(
    "label",
    "Class of the images, from 1; 0: none; all (sample, evaluate): each class in turn",
    default_help={
        **dict.fromkeys(("sample", "evaluate"), "all, if the model has classes"),
        **dict.fromkeys(
            ("interpolate", "inpaint", "restore", "long_run", "likelihood", "ood"), "none"
        ),
    },
    metavar="N",
)
GUIDANCE = Flag(
    "guidance",
    "Weight of guidance: the larger it is, the more typical samples are of their class",
    type=float,
    default=0.0,
    metavar="N",
)
CONDITION = (LABEL, GUIDANCE)
NUM_SAMPLES = Flag("num_samples", "Number of samples", type=int, default=100, minimum=1)
SEED = Flag("seed", "Random seed", type=int, default=0, minimum=0, maximum=2**32 - 1)

# Fields that may change after training: how the model is sampled and evaluated, on which data.
AFTER_TRAINING = (
    "mcmc.",
    "evaluation.",
    "likelihood.",
    "data.name",
    "data.data_dir",
    "data.strict",
    "data.split",
)

# The same for tasks that measure on `evaluation.split`. They need to know the split that was
# trained on, so `data.split` must not change.
MEASURED_ON_HELD_OUT = AFTER_TRAINING[:-1]


# What --protocol=paper sets. The README of the authors' program (ruiqigao/recovery_likelihood)
# computes FID with `main.py --eval --noise_scale=0.99` and the settings of training.
PAPER = {
    "mcmc.noise_scale": 0.99,
    "mcmc.sampler": None,
    "mcmc.K": None,
    "mcmc.start": None,
    "mcmc.denoise": None,
    "mcmc.b_squared": None,
    "evaluation.num_samples": 50_000,
    "evaluation.num_data": 10**9,  # more than any data set has
    "data.split": None,
}


def _check_condition(values: Mapping[str, Any], given: Collection[str]) -> str | None:
    """Returns an error message if the label or the guidance cannot be used, or None."""
    label = values["label"]
    if label not in (None, "all") and not label.isdecimal():
        return f"--label={label}: give a whole number, or all"
    return None


def _check_one_label(values: Mapping[str, Any], given: Collection[str]) -> str | None:
    """Like `_check_condition`, for tasks that do not take --label=all."""
    if values["label"] == "all":
        return "--label=all is for --mode=sample and --mode=evaluate: give one label"
    if values["guidance"] and values["label"] is None:
        return "--guidance needs a --label"
    return _check_condition(values, given)


def _check_ood(values: Mapping[str, Any], given: Collection[str]) -> str | None:
    """Returns an error message if the values of `ood` cannot be used, or None."""
    if not 0 < values["false_alarm_rate"] < 1:
        return (
            f"--false_alarm_rate={values['false_alarm_rate']:g}: give a number between 0 and 1"
        )
    return _check_one_label(values, given)


def _check_interpolate(values: Mapping[str, Any], given: Collection[str]) -> str | None:
    """Returns an error message if the values of `interpolate` cannot be used, or None."""
    if len(values["images"]) % 2:
        number = len(values["images"])
        return f"--images names an odd number of images, {number}: give pairs, FIRST,LAST,..."
    if values["images"] and "pairs" in given:
        return "--pairs is the number of pairs of samples: omit it or --images"
    return _check_one_label(values, given)


def _check_compose(values: Mapping[str, Any], given: Collection[str]) -> str | None:
    """Returns an error message if the values of `compose` cannot be used, or None."""
    parts = 1 + len(values["others"]) if values["others"] else max(1, len(values["labels"]))
    for name in ("labels", "weights"):
        number = len(values[name])
        if number not in (0, parts):
            return f"--{name} has {number} elements for {parts} models: give one per model"
    temperature = values["temperature"]
    if temperature <= 0:
        return f"--temperature={temperature:g}: give a positive number"
    if values["rule"] == "mixture" and temperature != 1:
        return "--temperature is for --rule=product: omit it"
    return None


def _check_restore(values: Mapping[str, Any], given: Collection[str]) -> str | None:
    """Returns an error message if the values of `restore` cannot be used, or None."""
    if values["images"] and values["observations"]:
        return "--images and --observations exclude each other: omit one"
    runs = values["evidence_runs"]
    if runs and (runs == 1 or not values["particles"]):
        return f"--evidence_runs={runs}: give 2 or more, with --particles"
    return _check_one_label(values, given)


_TASKS = (
    Task(
        "train",
        "Trains a model, or resumes its training, and evaluates it.",
        flags=(
            CONFIG,
            Flag(
                "resume_with_changes",
                "Whether to resume although the configuration changes the training steps, such "
                "as the optimiser, the seed, the sampler or the data",
                type=bool,
                default=False,
            ),
            Flag(
                "init_from",
                "Work directory of another run; a new run starts from the parameters of its "
                "newest checkpoint, or of that of STEP",
                default_help="random parameters",
                metavar="DIR[:STEP]",
                is_path=True,
            ),
        ),
        required=("config",),
        trained=False,
        changeable=("",),
        creates_workdir=True,
    ),
    Task(
        "sample",
        "Draws samples.",
        flags=(
            NUM_SAMPLES,
            *CONDITION,
            SEED,
        ),
        changeable=AFTER_TRAINING,
        check=_check_condition,
    ),
    Task(
        "evaluate",
        "Compares samples with the data set.",
        flags=(
            Flag(
                "protocol",
                "How to compute FID: paper (as Gao et al. 2021: 50,000 samples, all training "
                "images, Langevin noise scaled by 0.99), or default (numbers of samples and "
                "images from config.evaluation)",
                default="default",
                choices=("default", "paper"),
                implied={"paper": PAPER},
                metavar="NAME",
            ),
            *CONDITION,
        ),
        changeable=AFTER_TRAINING,
        check=_check_condition,
    ),
    Task(
        "interpolate",
        "Interpolates between pairs of samples or of images.",
        flags=(
            IMAGES,
            Flag("pairs", "Number of pairs of samples", type=int, default=8, minimum=1),
            Flag(
                "frames",
                "Number of images per pair, including both ends",
                type=int,
                default=9,
                minimum=3,
            ),
            Flag(
                "level",
                "Noise level at which to interpolate, 1 to T",
                type=int,
                default_help="between images, a third of T; between samples, a level at which "
                "they are mostly noise",
            ),
            *CONDITION,
            SEED,
        ),
        changeable=AFTER_TRAINING,
        check=_check_interpolate,
    ),
    Task(
        "inpaint",
        "Completes images that are partly hidden.",
        flags=(
            Flag(
                "mask",
                "Which pixels are hidden: centre, left, right, top, bottom, checkerboard, "
                "random:0.5, or a PNG file in which they are white",
                default="centre",
                metavar="MASK",
                is_path=True,
            ),
            IMAGES,
            Flag(
                "completions",
                "Number of completions per image",
                type=int,
                default=6,
                minimum=2,
            ),
            Flag(
                "rounds",
                "Number of times each level is sampled; with more, the completions agree "
                "better with the known pixels",
                type=int,
                default=10,
                minimum=1,
            ),
            *CONDITION,
            SEED,
        ),
        changeable=AFTER_TRAINING,
        check=_check_one_label,
    ),
    Task(
        "restore",
        "Samples images given noisy or incomplete observations of them.",
        flags=(
            MODEL,
            Flag(
                "operator",
                "What is observed of an image: mask:centre, downsample:2, blur:1, grayscale, "
                "and last noise:0.1 (standard deviation), or several of these, in this order",
                metavar="NAME:VALUE,...",
            ),
            IMAGES,
            Flag(
                "observations",
                "Files with observations, .npy or images, instead of images",
                type=list[str],
                default=(),
                default_help="simulated ones",
                metavar="FILE,...",
                is_path=True,
            ),
            Flag("samples", "Number of samples per image", type=int, default=64, minimum=2),
            Flag(
                "particles",
                "Number of weighted particles per image from which samples are drawn, which "
                "become exact as it grows, at least --samples; 0: approximate samples",
                type=int,
                default=0,
                minimum=0,
            ),
            Flag(
                "evidence_runs",
                "Runs per image and of the model alone, 2 or more, whose spread is the error "
                "of the evidence p(observed), with --particles; 0: no evidence",
                type=int,
                default=0,
                minimum=0,
            ),
            *CONDITION,
            SEED,
        ),
        required=("workdir", "operator"),
        changeable=MEASURED_ON_HELD_OUT,
        check=_check_restore,
    ),
    Task(
        "compose",
        "Samples a product or a mixture of models, or of classes of a model.",
        flags=(
            MODEL,
            Flag(
                "others",
                "Further models to combine with --model, named in the same ways",
                type=list[str],
                default=(),
                default_help="none",
                metavar="MODEL,...",
                is_path=True,
            ),
            Flag(
                "labels",
                "Class of each model, from 1; 0: none. Without --others, --model is combined "
                "with itself, once per label",
                type=list[int],
                default=(),
                default_help="none",
                minimum=0,
                metavar="N,...",
            ),
            Flag(
                "rule",
                "What to sample: product (of the densities, to the power of their weights), or "
                "mixture (their weighted sum; for lack of log Z, the shares of the models are "
                "the weights only for points in the plane)",
                default="product",
                choices=("product", "mixture"),
                metavar="NAME",
            ),
            Flag(
                "weights",
                "Weight of each model; in a product, it may be negative",
                type=list[float],
                default=(),
                default_help="ones",
                metavar="N,...",
            ),
            Flag(
                "temperature",
                "Number by which all weights of a product are divided",
                type=float,
                default=1.0,
                metavar="N",
            ),
            NUM_SAMPLES,
            SEED,
        ),
        changeable=AFTER_TRAINING,
        check=_check_compose,
    ),
    Task(
        "long_run",
        "Runs long MCMC chains and reports their convergence.",
        flags=(
            Flag("num_steps", "Number of steps per chain", type=int, default=1000, minimum=1),
            Flag(
                "num_chains",
                "Number of chains per level",
                type=int,
                default_help="as many as fit into one batch",
                minimum=1,
            ),
            Flag(
                "levels",
                "Levels at which chains are run, such as 0,3,5",
                type=list[int],
                default=(),
                default_help="all levels, or ten if there are more",
                minimum=0,
                metavar="N,...",
            ),
            Flag(
                "marginal",
                "Whether chains sample the marginals p(y_t), starting from data, instead of "
                "the conditionals",
                type=bool,
                default=False,
            ),
            *CONDITION,
            SEED,
        ),
        changeable=AFTER_TRAINING,
        check=_check_one_label,
    ),
    Task(
        "likelihood",
        "Bounds log Z and the log-likelihood of the data (held-out data if there are any).",
        flags=(MODEL, *CONDITION, SEED),
        changeable=MEASURED_ON_HELD_OUT,
        check=_check_one_label,
    ),
    Task(
        "ood",
        "Measures how well a model detects out-of-distribution images.",
        flags=(
            MODEL,
            Flag(
                "against",
                "Out-of-distribution images: shuffled or inverted (images of the data set with "
                "their pixels in random order or negated), patch (with a square of random "
                "pixels), uniform (random pixels), folder:PATH, or the name of a TFDS data set",
                type=list[str],
                default=("shuffled", "inverted", "uniform"),
                metavar="NAME,...",
            ),
            Flag(
                "ood_masks",
                "Folder of PNG files that are white where the images of folder:PATH in "
                "--against are anomalous; each has the name of its image",
                default_help="only patch has masks",
                metavar="DIR",
                is_path=True,
            ),
            Flag(
                "false_alarm_rate",
                "Share of the images of the data that may exceed the threshold of the detector",
                type=float,
                default=0.05,
            ),
            *CONDITION,
            SEED,
        ),
        changeable=MEASURED_ON_HELD_OUT,
        check=_check_ood,
    ),
    Task(
        "export",
        "Writes a trained model as one file, for drl_jax.load.",
        flags=(
            Flag(
                "dtype",
                "Precision of the parameters in the file; float16 halves its size",
                choices=("float32", "float16"),
                default="float32",
                metavar="NAME",
            ),
        ),
    ),
    Task(
        "import_original",
        "Converts a checkpoint of the authors' TensorFlow program.",
        flags=(
            Flag(
                "tf_checkpoint",
                "Prefix of the checkpoint's files, such as DIR/ckpt-iter5000",
                metavar="PREFIX",
                is_path=True,
            ),
            IMAGE_SIZE,
            CONFIG,
        ),
        required=("tf_checkpoint", "image_size", "workdir"),
        trained=False,
        changeable=("",),
        fixed=(  # determined by the checkpoint
            "energy.",
            "initialiser.",
            "data.channels",
            "data.axes",
            "data.classes",
            "data.image_size",
        ),
    ),
    Task(
        "import_cdrl",
        "Converts a checkpoint of the authors' PyTorch program for CDRL.",
        flags=(
            Flag(
                "checkpoint",
                "File with the weights of both networks, such as best.pth.tar",
                metavar="FILE",
                is_path=True,
            ),
            IMAGE_SIZE,
            CONFIG,
        ),
        required=("checkpoint", "image_size", "workdir"),
        trained=False,
        changeable=("",),
        fixed=(  # determined by the checkpoint and the method
            "energy.",
            "initialiser.",
            "diffusion.",
            "mcmc.",
            "data.channels",
            "data.axes",
            "data.classes",
            "data.image_size",
        ),
    ),
    Task(
        "prepare",
        "Downloads the TFDS data set config.data.name and prepares it for training.",
        flags=(CONFIG,),
        required=(),
        trained=False,
        changeable=("",),
        distributed=False,
    ),
    Task(
        "plan",
        "Estimates the memory and time that training and sampling take on other devices.",
        flags=(
            CONFIG,
            Flag(
                "topology",
                "Devices to plan for, which need not be present, such as v5e:16x16 or h100:8",
                metavar="CHIP:SHAPE",
            ),
            Flag(
                "find_largest_batch",
                "Whether to search for the largest batch size that fits, which compiles the "
                "training step up to four more times",
                type=bool,
                default=False,
            ),
        ),
        required=("config", "topology"),
        trained=False,
        changeable=("",),
        distributed=False,
    ),
)

TASKS = {task.name: task for task in _TASKS}

MODE = Flag("mode", "Task to run", default="train", choices=tuple(TASKS), metavar="TASK")
WORKDIR = Flag(
    "workdir",
    "Directory of the run and of all results, local or in a bucket (gs://...)",
    default_help={
        "train": "a new one in runs/",
        "plan": "none: the plan is only printed",
        "prepare": "none: it is not used",
    },
    metavar="DIR",
    is_path=True,
)

# How the processes of one job find each other (`runtime.processes.Job`).
JOB = (
    Flag(
        "distributed",
        "Whether this is one of several processes",
        type=bool,
        default_help="what Slurm or the TPU pod reports",
    ),
    Flag(
        "coordinator_address",
        "Address of process 0",
        default_help="what the cluster reports",
        metavar="HOST:PORT",
    ),
    Flag(
        "num_processes",
        "Number of processes",
        type=int,
        default_help="what the cluster reports",
        minimum=1,
    ),
    Flag(
        "process_id",
        "Number of this process, from 0",
        type=int,
        default_help="what the cluster reports",
        minimum=0,
    ),
    Flag(
        "timeout",
        "Seconds without contact after which another process counts as lost",
        type=int,
        default=100,
        minimum=10,
    ),
)

# Flags of every task.
COMMON = (MODE, WORKDIR, *JOB)


def tasks_of(flag: Flag) -> tuple[str, ...]:
    """Returns the names of the tasks that take this flag, which must not be in `COMMON`."""
    return tuple(task.name for task in TASKS.values() if flag in task.flags)


def all_flags() -> dict[str, Flag]:
    """Returns every flag by its name, the common ones first."""
    flags = (*COMMON, *(flag for task in TASKS.values() for flag in task.flags))
    return {flag.name: flag for flag in flags}
