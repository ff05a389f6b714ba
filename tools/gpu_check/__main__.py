"""Measures deitfast on this machine's GPU, or all of it in miniature on the CPU. See deitfast/docs/gpu-check.md."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tools.gpu_check.wheels import OPTIONAL, REQUIRED, missing, unpack

USAGE = 2


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--data", type=Path, help="a converted data set of ImageNet-size JPEGs")
    parser.add_argument("--images", type=Path, help="a folder or a tar of JPEGs instead; default: drawn ones")
    parser.add_argument("--cifar", type=Path, help="a converted CIFAR-10 or the like; default: noise of that size")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels for what this Python lacks; needs no pip")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="sections, out of the table's")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no section after so many")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="where all samples go; rewritten")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dry-run", action="store_true", help="every section in miniature, on the CPU")
    return parser.parse_args(arguments)


def say(text: str) -> None:
    """Write a line to standard error: rich may be among what is missing."""
    sys.stderr.write(f"gpu_check: {text}\n")


def main() -> int:
    """Run the command and return its exit status: 1 if a section failed, 2 where nothing can run."""
    options = parsed(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        if options.wheels:
            try:
                taken = unpack(options.wheels, Path(scratch) / "wheels")
            except (OSError, ValueError) as error:
                say(f"--wheels: {error}")
                return USAGE
            names = ", ".join("-".join(name.split("-")[:2]) for name in taken)
            say(f"unpacked {names or 'nothing: no wheel there fits and is not installed'}")
        if lacks := missing(REQUIRED):
            say(f"nothing runs without {', '.join(lacks)}; install them, or give wheels of them with --wheels FOLDER")
            return USAGE
        lacks = missing(OPTIONAL)
        if lacks:
            say(f"not installed: {', '.join(lacks)}")
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")  # the decoder's share is measured, not remembered
        if options.dry_run:
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        return measured(options, lacks, Path(scratch))


def measured(options: argparse.Namespace, lacks: tuple[str, ...], scratch: Path) -> int:
    """Run the sections, print their tables, and write the record."""
    from rich.console import Console

    from deitfast.config.recipe import TrainSpec
    from deitfast.progress import start_logging
    from deitfast.runtime import start
    from pipelines.errors import DeitfastError
    from tools.gpu_check.lab import DRY, FULL, QUICK, Given, Lab
    from tools.gpu_check.record import load
    from tools.gpu_check.session import PARTS, Session, Wish, left_out
    from tools.gpu_check.table import sentences, table

    out = Console(width=None if sys.stdout.isatty() else 160)
    if unknown := set(options.only) - set(PARTS):
        say(f"there is no section {', '.join(sorted(unknown))}; there are: {', '.join(PARTS)}")
        return USAGE
    start_logging(Console(stderr=True))
    scale = DRY if options.dry_run else QUICK if options.quick else FULL
    given = Given() if options.dry_run else Given(options.data, options.images, options.cifar)
    wish = Wish(tuple(options.only), options.minutes, tuple(sys.argv), options.dry_run)
    try:
        with start(TrainSpec(), "cpu" if options.dry_run else options.device) as runtime:
            trace = options.json.with_suffix(".trace.json.gz")
            lab = Lab(runtime, scale, given, scratch, trace)
            for name, part in PARTS.items():
                if reason := left_out(part, lacks, cuda=lab.cuda, late=False):
                    say(f"{name} will be left out: {reason}")
            record = Session(lab, wish, lacks, options.json, lambda section: out.print(table(section))).run()
            load(options.json)  # it is what its schema says
    except DeitfastError as error:
        say(str(error))
        return error.exit_code
    for sentence in sentences(record):
        out.print(sentence)
    out.print(f"all samples: {options.json}" + (f"; trace: {trace}" if trace.exists() else ""))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
