"""Fixtures of the job's tests: ranks that are started once and serve every module."""

from collections.abc import Iterator

import pytest

from tests.job import ranks


@pytest.fixture(scope="session")
def several() -> Iterator[ranks.Ranks]:
    """A server that runs scenarios on several gloo ranks; see ``tests.job.ranks``."""
    with ranks.started() as server:
        yield server
