"""A run's folder: the recipe as run, where it ran, what it measured."""

import json
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from deitfast.config import recipe as recipes
from deitfast.config.recipe import RESUME_SAFE_FIELDS, Recipe, differences
from deitfast.environment import environment
from pipelines.errors import DeitfastError, UserError
from pipelines.files import write_text
from pipelines.spec import STRICT
from pipelines.workers import local_world_size, world_size

EPOCHS = "train.epochs"
"""The field in which a resumed run may have more than before."""


START = {"file", "kind", "blake2b", "fitted"}
"""What run.json says of the weights that a run began with."""


def _is_whole(start: dict[str, str]) -> dict[str, str]:
    if start and not start.keys() >= START:
        raise ValueError(f"must have {', '.join(sorted(START))}")
    return start


@checked_dataclass(frozen=True, config=STRICT)
class RunInfo:
    """What a run was made of besides its recipe (`run.json`)."""

    data: str
    """Folder of the data set, as an absolute path."""
    dataset: str
    """Kind of the data set."""
    fingerprint: str
    """Fingerprint of the data set."""
    classes: tuple[str, ...]
    """Class names in label order: what the heads' outputs mean."""
    command: tuple[str, ...]
    """The command line."""
    start: Annotated[dict[str, str], AfterValidator(_is_whole)] = Field(default_factory=dict)
    """Weights that the run began with, as `init_from_pretrained` describes them; empty where they were drawn."""


_INFO = TypeAdapter(RunInfo)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that --resume continues from, and that evaluation and teachers read."""
        return self.path / "checkpoint.pt"

    @property
    def best(self) -> Path:
        """The weights of the best validation top-1 so far; see `deitfast.weights.checkpoint`."""
        return self.path / "checkpoint_best.pt"

    @property
    def evaluation(self) -> Path:
        """The last evaluation in full: every head's figures and confusion matrix."""
        return self.path / "evaluation.json"

    @property
    def log(self) -> Path:
        """Every message of the run."""
        return self.path / "log.txt"

    def resume_command(self) -> str:
        """Return the line to type to resume this run: the one that started it, with what it lacks."""
        try:
            command = self.info().command
        except DeitfastError:
            command = ()
        return resume_command(self.path, command)

    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "recipe.toml").is_file()

    def create(self, recipe: Recipe, info: RunInfo) -> None:
        """Write the recipe, what else the run was made of, and the environment."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "run.json", json.dumps(asdict(info), indent=1))
        write_text(self.path / "environment.json", json.dumps(environment(), indent=1))
        write_text(self.path / "recipe.toml", recipes.dump(recipe))

    def check(self, recipe: Recipe, info: RunInfo, *, resume: bool) -> int:
        """Make sure that a run may start here, or that the one to be resumed is the one that is there.

        Returns:
            The epochs that it had, where it is to have more of them now (`lengthen`); else 0.

        Raises:
            UserError: there is a run, and it is not to be resumed, or not of this recipe, data set or start.
        """
        if not self.exists():
            return 0
        if not resume:
            raise UserError(
                f"{self.path} already holds a run", remedy="continue it with --resume, or give another --out"
            )
        changed = differences(self.recipe(), recipe)
        before, now = changed.get(EPOCHS, (0, 0))
        if now > before:
            del changed[EPOCHS]
        if changed := {key: both for key, both in changed.items() if not key.startswith(RESUME_SAFE_FIELDS)}:
            raise UserError(
                f"--resume with another recipe than {self.path} was started with",
                found=", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items()),
                remedy="leave the options out, or start a new run with another --out",
            )
        begun = self.info()
        if begun.fingerprint != info.fingerprint:
            raise UserError(
                f"--resume on another data set than {self.path} was started on",
                expected=f"fingerprint {begun.fingerprint}",
                found=f"{info.fingerprint} in {info.data}",
            )
        return before

    def lengthen(self, recipe: Recipe) -> None:
        """Write the recipe of a run that is to have more epochs."""
        write_text(self.path / "recipe.toml", recipes.dump(recipe))

    def check_start(self, info: RunInfo) -> None:
        """Make sure that a resumed run that is to start over starts with the weights that it began with."""
        before = self.info().start
        if info.start and info.start != before:
            raise UserError(
                f"{info.start['file']} is not what {self.path} was started from",
                expected=f"blake2b {before.get('blake2b')}",
                found=info.start["blake2b"],
                remedy="start a new run with another --out",
            )

    def recipe(self) -> Recipe:
        """Return the recipe as run.

        Raises:
            UserError: there is no run in this folder.
        """
        if not self.exists():
            raise UserError(f"there is no run in {self.path}", expected="a folder that `deitfast train` wrote")
        return recipes.load(str(self.path / "recipe.toml"))

    def info(self) -> RunInfo:
        """Return what the run was made of."""
        try:
            return _INFO.validate_json((self.path / "run.json").read_bytes(), strict=True)
        except FileNotFoundError:
            raise UserError(
                f"there is no run in {self.path}", expected="a folder that `deitfast train` wrote"
            ) from None
        except (OSError, ValidationError) as error:
            first = error.errors()[0] if isinstance(error, ValidationError) else {}
            raise DeitfastError(
                f"{self.path / 'run.json'} is damaged",
                expected="what `deitfast train` wrote",
                found=f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error),
                remedy="copy it again from where it is whole: without it the data and classes of the run are unknown",
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, a dict an epoch, leaving out lines cut short by a crash."""
        return read_rows(self.path / "metrics.jsonl")[0]

    def finished(self) -> bool:
        """Whether the run's last epoch is in metrics.jsonl."""
        rows = self.metrics()
        return bool(rows) and rows[-1]["epoch"] >= self.recipe().train.epochs

    def append(self, row: dict[str, Any]) -> None:
        """Put an epoch's row in place; rows of this and later epochs, from a run resumed before them, are replaced."""
        rows = [old for old in self.metrics() if old["epoch"] < row["epoch"]]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in [*rows, row]))


def resume_command(folder: Path, command: tuple[str, ...]) -> str:
    """Return the line to type to resume the run in `folder` that `command`, as in sys.argv, started."""
    program, *arguments = command or ("deitfast",)
    if arguments[:1] != ["train"]:  # it was not started by `deitfast train`, but by another command or as a library
        program, arguments = "deitfast", ["train"]
    start = "python -m deitfast" if Path(program).name == "__main__.py" else Path(program).name
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ranks = local_world_size()
        nodes = world_size() // ranks
        more = f" --nnodes={nodes} ..." if nodes > 1 else ""
        start = f"torchrun --nproc-per-node={ranks}{more} -m deitfast"
    if not any(argument.partition("=")[0] == "--out" for argument in arguments):
        arguments += ["--out", str(folder)]
    return " ".join([start, shlex.join(arguments), *["--resume"] * ("--resume" not in arguments)])


@checked_dataclass(frozen=True)
class _Row:
    """What a line of metrics.jsonl must have, and of which types; the rest of it is read by who shows it."""

    epoch: Annotated[int, Field(ge=1)]
    loss: float
    seconds: float = 0.0
    val: dict[str, dict[str, float]] = Field(default_factory=dict)
    val_ema: dict[str, dict[str, float]] = Field(default_factory=dict)


_ROW = TypeAdapter(_Row)


def read_rows(file: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a metrics.jsonl that are whole, and a sentence on those that are not ("" without any).

    Raises:
        DeitfastError: it is a folder.
    """
    rows, damaged = [], 0
    if file.is_dir():
        raise DeitfastError(
            f"{file} is a folder", expected="a file", remedy="remove it: the epochs to come are written"
        )
    for line in file.read_bytes().splitlines() if file.exists() else ():
        try:
            _ROW.validate_json(line, strict=True)
            rows.append(json.loads(line))
        except ValueError:
            damaged += 1
    lines, are = ("1 line", "is") if damaged == 1 else (f"{damaged} lines", "are")
    return rows, f"{lines} of {file.name} could not be read and {are} left out." if damaged else ""
