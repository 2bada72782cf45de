"""A project on the tiny model for each test; data and cache are made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_project import Data, Project, write_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Data sets that tests read and never write."""
    return write_data(tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests that do not look at caching itself."""
    return tmp_path_factory.mktemp("tiny_cache")


@pytest.fixture
def project(
    tmp_path: Path, tiny_model: Path, tiny_data: Data, shared_cache: Path, capfd: pytest.CaptureFixture[str]
) -> Project:
    """A config in an empty folder, and runs of it."""
    return Project(tmp_path, tiny_model, tiny_data, shared_cache, capfd)
