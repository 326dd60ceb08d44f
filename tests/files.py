"""Writing a file, and what refuses to read it: helpers of several tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from whet.errors import TaskError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(TaskError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)
