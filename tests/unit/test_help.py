"""`--help` of the processes and of new_token."""

from collections.abc import Callable, Sequence

import pytest

from service import embedded_postgres
from service.auth import new_token
from service.gateway import __main__ as gateway
from service.http import __main__ as http
from service.worker import lifecycle
from watchdog import __main__ as watchdog


@pytest.mark.parametrize(
    ("main", "command"),
    [
        (gateway.main, "python -m service.gateway"),
        (http.main, "python -m service.http"),
        (lifecycle.main, "python -m service.worker"),
        (watchdog.main, "python -m watchdog"),
        (embedded_postgres.main, "python -m service.embedded_postgres"),
        (new_token.main, "python -m service.auth.new_token"),
    ],
)
def test_help(main: Callable[[Sequence[str]], object], command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` starts nothing, names the command as it is typed and documents its exit statuses."""
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert told.startswith(f"usage: {command} ")
    assert "Exit status: " in told.replace("\n", " ")
