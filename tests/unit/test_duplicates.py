"""What Postgres reports about a repeated custom_id, in any server language."""

import pytest

from service.worker.intake import _COPY_ROW, _DUPLICATE


@pytest.mark.parametrize(
    ("context", "detail"),
    [
        ("COPY requests, line 37", "Key (batch_id, custom_id)=(12, {0}) already exists."),
        ("COPY requests, Zeile 37", "Schlüssel »(batch_id, custom_id)=(12, {0})« existiert bereits."),
        ("COPY requests, ligne 37", "La clé « (batch_id, custom_id)=(12, {0}) » existe déjà."),
        ("COPY requests, 行 37", "キー (batch_id, custom_id)=(12, {0}) はすでに存在します。"),
        ("COPY requests, 37번째 줄", "(batch_id, custom_id)=(12, {0}) 키가 이미 있습니다."),
    ],
)
@pytest.mark.parametrize("custom_id", ["c1", "a (b) c", "x) already exists.", "two\nlines"])
def test_line_and_name_are_found(context: str, detail: str, custom_id: str) -> None:
    """The line and custom_id reported to the client do not depend on lc_messages."""
    row, key = _COPY_ROW.search(context), _DUPLICATE.search(detail.format(custom_id))
    assert row is not None
    assert key is not None
    assert (row[1], key[1]) == ("37", custom_id)
