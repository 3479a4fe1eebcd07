"""Who may read a file of keys."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from service.auth import key_files

SOMEBODY = 10001


@pytest.mark.parametrize(
    ("owner", "we_are", "mode", "is_accepted"),
    [
        (SOMEBODY, SOMEBODY, 0o600, True),
        (SOMEBODY, SOMEBODY, 0o640, False),
        (0, 0, 0o640, False),
        # A Secret in a pod.
        (0, SOMEBODY, 0o440, True),
        (0, SOMEBODY, 0o460, False),
        (0, SOMEBODY, 0o444, False),
    ],
)
def test_private(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, owner: int, we_are: int, mode: int, is_accepted: bool
) -> None:
    """A key belongs to its owner alone, or to root, who may let a group read it."""
    path = tmp_path / "key"
    monkeypatch.setattr(
        Path, "stat", lambda self: SimpleNamespace(st_mode=0o100000 | mode, st_uid=owner, st_size=1, st_rdev=0)
    )
    monkeypatch.setattr(os, "geteuid", lambda: we_are)
    if is_accepted:
        key_files.check_private(path)
    else:
        with pytest.raises(ValueError, match="owner only"):
            key_files.check_private(path)
