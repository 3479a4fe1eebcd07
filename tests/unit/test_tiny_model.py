"""The tiny model is made once, also by workers that start together."""

from pathlib import Path

import pytest

from service.worker.engine import tiny_model


def test_another_process_makes_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose model another has just made uses that one, and leaves nothing of its own."""
    path = tmp_path / "tiny"

    def make(new: Path) -> None:
        (new / "weights").write_text("mine")
        path.mkdir()
        (path / "weights").write_text("theirs")

    monkeypatch.setattr(tiny_model, "_make", make)
    assert tiny_model.ensure(path) == path
    assert (path / "weights").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while it is made is raised, and nothing is left for the next start to take for a model."""

    def make(new: Path) -> None:
        (new / "weights").write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(tiny_model, "_make", make)
    with pytest.raises(OSError, match="disk full"):
        tiny_model.ensure(tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []
