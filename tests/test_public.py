"""The public faces: what `from pipelines import ...` and `from deitfast import ...` promise."""

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PACKAGES = ("pipelines", "deitfast")
NAMES = [(package, name) for package in PACKAGES for name in import_module(package).__all__ if name[0] != "_"]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_public_name_is_documented_and_typed(package: str, name: str) -> None:
    thing = getattr(import_module(package), name)
    assert (thing.__doc__ or "").strip()
    assert name in dir(import_module(package))
    own = [name for name in vars(thing) if name[0] != "_"] if inspect.isclass(thing) else []
    for function in [member for name in own if callable(member := getattr(thing, name))] or [thing]:
        assert function.__doc__, function
        if inspect.isclass(function):
            continue  # its fields are typed, as pyright's strict mode checks
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, function
        for parameter in signature.parameters.values():
            assert parameter.name == "self" or parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_that_it_is_typed_and_names_what_it_has_not(package: str) -> None:
    module = import_module(package)
    assert (Path(str(module.__file__)).parent / "py.typed").exists()
    assert module.__all__ == sorted(module.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = module.nonsense


def test_importing_the_packages_imports_nothing_else() -> None:
    program = "import sys, deitfast, pipelines; sys.exit(bool({'torch', 'numpy', 'pydantic'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
