"""A note of the files that we wrote into a folder that somebody named: what it does not list is never replaced."""

from __future__ import annotations

from pathlib import Path

from qflux.errors import UserError
from qflux.io.json_files import strict_read
from qflux.io.places import printable


def noted(note: Path) -> set[str]:
    """The names in a note, a JSON list, none where there is no note; UserError where it is not as we write it."""
    try:
        names = strict_read(note) if note.is_file() else []
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {note} cannot be read ({printable(error)}); move it away") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"--out: {note} was altered: expected a list of file names; move it away")
    return set(names)
