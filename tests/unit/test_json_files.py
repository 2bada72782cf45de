from __future__ import annotations

import pytest

from qflux.errors import UserError
from qflux.io.json_files import read_object


def test_objects_are_read_and_everything_else_is_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1]}')
    assert read_object(path, "key") == {"a": [1]}
    for content in (b"{", b"", b"[1]", b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^key: .*a\.json cannot be read: .+; fetch it again$"):
            read_object(path, "key")
    with pytest.raises(UserError, match="No such file"):
        read_object(tmp_path / "none.json", "key")
