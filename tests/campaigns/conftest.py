"""Seeded campaigns: many damaged, edited or interrupted inputs. Some dozens by default; `--cases N` tries N."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --cases."""
    parser.addoption("--cases", type=int, default=0, help="cases of each campaign in tests/campaigns")


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> int:
    """Cases to try."""
    return request.config.getoption("--cases", default=0) or 60
