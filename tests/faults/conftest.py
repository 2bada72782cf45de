"""The same projects on the tiny model as in tests/tiny."""

from __future__ import annotations

from tiny_project import project, shared_cache, tiny_data  # noqa: F401 (fixtures)
