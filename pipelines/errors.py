"""The errors deitfast raises on purpose: what was expected, what was found, what to do."""

INTERRUPTED = 130
"""Exit code of a command that was asked to stop: 128 and the number of SIGINT, as shells have it."""


def pluralize(count: float, thing: str) -> str:
    """Return a number of things in words: 1 thread, 2 classes, 3 batches, 4 epochs, 5,000 images."""
    plural = "es" if thing.endswith(("s", "tch")) else "s"
    return f"{count:,.15g} {thing}{plural if count != 1 else ''}"


class DeitfastError(Exception):
    """Something outside the user's command went wrong (damaged file, full disk). The CLI exits with `exit_code`.

    Args:
        problem: one line saying what is wrong, naming the file, field or value.
        expected: what would have been right, where the problem line does not say it.
        found: what was there instead.
        remedy: what the user can do now.
    """

    exit_code = 1

    def __init__(self, problem: str, *, expected: str = "", found: str = "", remedy: str = "") -> None:
        self.problem, self.expected, self.found, self.remedy = problem, expected, found, remedy
        details = (("expected", expected), ("found", found), ("hint", remedy))
        super().__init__("\n".join([problem, *(f"  {name}: {text}" for name, text in details if text)]))


class UserError(DeitfastError):
    """The user asked for something impossible (a missing folder, an unknown key, the wrong teacher)."""

    exit_code = 2
