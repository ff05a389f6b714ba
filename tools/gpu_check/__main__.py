"""Measures deitfast on this machine's GPU, or all of it in miniature on the CPU. See deitfast/docs/gpu-check.md."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tools.gpu_check.wheels import OPTIONAL, REQUIRED, install, missing

USAGE = 2


def parse(arguments: list[str]) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--data", type=Path, help="a converted data set of ImageNet-size JPEGs")
    parser.add_argument("--images", type=Path, help="a folder or a tar of JPEGs instead; default: drawn ones")
    parser.add_argument("--cifar", type=Path, help="a converted CIFAR-10 or the like; default: noise of that size")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels of what this Python lacks; no network is used")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="sections, by their names in the docs")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin no section after so many minutes")
    parser.add_argument("--json", type=Path, default=Path("gpu_check.json"), help="where every sample is written")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dry-run", action="store_true", help="every section in miniature, on the CPU")
    return parser.parse_args(arguments)


def say(text: str) -> None:
    """Write a line to standard error: rich may be among what is missing."""
    sys.stderr.write(f"gpu_check: {text}\n")


def main() -> int:
    """Run the command and return its exit status: 1 if a section failed, 2 where nothing can run."""
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        if options.wheels:
            try:
                names = install(options.wheels, Path(scratch) / "wheels")
            except (OSError, ValueError) as error:
                say(f"--wheels: {error}")
                return USAGE
            say(f"installed for this call: {', '.join(names) or 'nothing, all of it is here'}")
        if lacks := missing(REQUIRED):
            say(f"nothing runs without {', '.join(lacks)}; install them, or give wheels of them with --wheels FOLDER")
            return USAGE
        lacks = missing(OPTIONAL)
        if lacks:
            say(f"not installed: {', '.join(lacks)}")
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")  # the decoder's share is measured, not remembered
        if options.dry_run:
            os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        return run(options, lacks, Path(scratch))


def run(options: argparse.Namespace, lacks: tuple[str, ...], scratch: Path) -> int:
    """Run the sections, print their tables, and write the record."""
    from rich.console import Console

    from deitfast.bench.record import load
    from deitfast.bench.tables import section_sentences, section_table
    from deitfast.config.recipe import TrainSpec
    from deitfast.progress import start_logging
    from deitfast.runtime import start
    from pipelines.errors import DeitfastError
    from tools.gpu_check.context import DRY, FULL, QUICK, Context, InputPaths
    from tools.gpu_check.runner import SECTIONS, Runner, why_left_out

    out = Console(width=None if sys.stdout.isatty() else 160)
    if unknown := set(options.only) - set(SECTIONS):
        say(f"no section is called {', '.join(sorted(unknown))}; sections: {', '.join(SECTIONS)}")
        return USAGE
    start_logging(Console(stderr=True))
    scale = DRY if options.dry_run else QUICK if options.quick else FULL
    paths = InputPaths() if options.dry_run else InputPaths(options.data, options.images, options.cifar)
    trace = options.json.with_suffix(".trace.json.gz")
    sections = {name: section for name, section in SECTIONS.items() if not options.only or name in options.only}
    try:
        with start(TrainSpec(), "cpu" if options.dry_run else options.device) as runtime:
            context = Context(runtime, scale, paths, scratch, trace)
            for name, section in sections.items():
                if reason := why_left_out(section, lacks, cuda=context.cuda, late=False):
                    say(f"{name} will be left out: {reason}")
            runner = Runner(context, sections, lacks, options.json, tuple(sys.argv), minutes=options.minutes)
            record = runner.run(lambda section: out.print(section_table(section)))
            load(options.json)  # it reads back
    except DeitfastError as error:
        say(str(error))
        return error.exit_code
    for sentence in section_sentences(record, dry=options.dry_run):
        out.print(sentence)
    out.print(f"all samples: {options.json}" + (f"; trace: {trace}" if trace.exists() else ""))
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
