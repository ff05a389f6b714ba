"""The tests that need a GPU, by pytest in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from deitfast.bench.record import Figure
from tools.gpu_check.context import Context, Note

ROOT = Path(__file__).parents[2]
MARK = "pytest.mark.gpu"


def tests(context: Context) -> Iterator[Figure | Note]:
    """Every test marked `gpu`; without a GPU they are skipped."""
    files = [path for path in sorted((ROOT / "tests").rglob(context.scale.tests)) if MARK in path.read_text()]
    report = context.scratch / "tests.xml"
    options = ["-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}", "--tb=short"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if not report.exists():
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    outcomes = read(report)
    named = {
        outcome: [name for name, (found, _) in outcomes.items() if found == outcome]
        for outcome in ("passed", "failed", "skipped")
    }
    for outcome, names in named.items():
        yield Figure(f"tests {outcome}", "count", (len(names),), most=0 if outcome == "failed" else None)
    yield Note("tests", {name: found if not text else f"{found}: {text}" for name, (found, text) in outcomes.items()})
    if named["failed"]:
        raise RuntimeError(f"failed: {', '.join(named['failed'])}")


def read(report: Path) -> dict[str, tuple[str, str]]:
    """Return every test of a JUnit file with its outcome (passed, failed, skipped) and its message."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        found[name] = ("passed", "")
        for child in case:
            if child.tag in ("failure", "error"):
                found[name] = ("failed", (child.text or child.get("message") or "").strip())
            elif child.tag == "skipped":
                found[name] = ("skipped", child.get("message") or "")
    return found
