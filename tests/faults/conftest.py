"""The same projects on the tiny model as in tests/tiny."""

from __future__ import annotations

from cached_pictures import made, place  # noqa: F401 (fixtures)
from faults.forked import forked  # noqa: F401 (a fixture)
from tiny_project import project, shared_cache, tiny_data  # noqa: F401 (fixtures)
