"""Database URLs: accepts exactly what libpq and psql accept. No message from here quotes any part of a URL."""

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2.extensions import parse_dsn

from vllm_batch import small_files

SCHEMES = ("postgresql://", "postgres://")
# A host that cannot exist: libpq checks all parameters, then fails here without using the network.
NOWHERE = "/dev/null/none"
TOO_FEW_HOSTS = "could not match"

# Parameters that name files, which libpq opens whatever they are; each has a variable too. It looks at passfile itself.
FILES = ("servicefile", "sslcert", "sslcrl", "sslkey", "sslrootcert")

# Parameters of other drivers, safe to name: an unknown one may be part of a password that was not encoded.
FOREIGN = frozenset(
    {
        *("charset", "connection_limit", "currentSchema", "encoding", "pgbouncer", "pool_max_conns", "pool_mode"),
        *("pool_size", "pool_timeout", "prepareThreshold", "prepared_statement_cache_size", "prepared_statements"),
        *("schema", "search_path", "socket_timeout", "sslaccept", "ssl_mode", "statement_cache_size"),
        *("statement_timeout", "supa", "timezone"),
    }
)
ENCODE = "a password with any of @ : / ? # % in it must have them percent-encoded"
FORM = 'it must begin with postgresql:// or postgres://, or be a string like "host=db dbname=batch"'

# libpq's errors about an invalid string, and ours in their place, because libpq's quote the string.
_WRONG_STRINGS = (
    (r"percent-encoded", f"it has a % that encodes nothing: write %25, and note that {ENCODE}"),
    (r"IPv6|unexpected character", "its IPv6 address must be in brackets, as in [::1], with a port or / after it"),
    (r"key/value separator", "each of its parameters must be written NAME=VALUE"),
    (r"unterminated quoted", "a ' in it is not closed"),
)


class UrlError(ValueError):
    """The URL cannot be used. The text says why without quoting it."""


def parse(url: str) -> dict[str, str]:
    """Parses a URL or connection string into libpq's parameters. Raises UrlError if psql would refuse it too."""
    is_url = url.startswith(SCHEMES)
    if is_url and re.search(r"\s", url):
        raise UrlError("there is a blank or the end of a line in it")
    if not is_url and re.match(r"\s*[\w+.:-]+://", url):
        raise UrlError(FORM)
    try:
        given: dict[str, str] = parse_dsn(url)
    except (psycopg2.Error, ValueError) as error:
        raise UrlError(_reason(str(error), is_url)) from None
    if is_url:
        _check_encoded(url, given)
    if "replication" in given:
        raise UrlError("a connection for replication takes no batches")
    _check_files(given)
    _check_values(given)
    return given


def _reason(told: str, is_url: bool) -> str:
    option = re.search(r'invalid (?:URI query parameter|connection option)s?:? "([^"]*)"', told)
    if option is not None:
        named = f": {option[1]}" if option[1] in FOREIGN else ""
        return f"it has a parameter that libpq does not have{named}"
    if is_url:
        return next((text for pattern, text in _WRONG_STRINGS if re.search(pattern, told)), "libpq cannot read it")
    return next((text for pattern, text in _WRONG_STRINGS[3:] if re.search(pattern, told)), FORM)


def _check_encoded(url: str, given: Mapping[str, str]) -> None:
    """Detects a password that was not encoded: it ends early, and its rest turns up as a host or database name."""
    is_encoded = "%40" in url
    if not is_encoded and any("@" in given.get(name, "") for name in ("host", "dbname")):
        raise UrlError(ENCODE)


def _check_files(given: Mapping[str, str]) -> None:
    """Refuses what libpq would wait for: no deadline ends that."""
    for name in FILES:
        variable = f"PG{name.upper()}"
        path = given.get(name) or os.environ.get(variable, "")
        try:
            problem = small_files.problem(Path(path)) if path else ""
        except (OSError, ValueError):
            # It need not be there: `system` names no file, and what is missing libpq reports.
            continue
        if problem:
            raise UrlError(f"its {name} {problem}" if name in given else f"{variable} {problem}")


def _check_values(given: Mapping[str, str]) -> None:
    """Has libpq check the values that it checks before it connects."""
    for address in filter(None, given.get("hostaddr", "").split(",")):
        try:
            ipaddress.ip_address(address)
        except ValueError:
            raise UrlError("its hostaddr is no IP address") from None
    hosts = max(given.get(name, "").count(",") for name in ("host", "hostaddr")) + 1
    tried: dict[str, Any] = {**given, "host": ",".join([NOWHERE] * hosts), "hostaddr": ""}
    try:
        psycopg2.connect(**tried)
    except (psycopg2.Error, ValueError) as error:
        told = str(error)
    if NOWHERE in told or (TOO_FEW_HOSTS in told and not given.keys() & {"host", "hostaddr"}):
        return
    if TOO_FEW_HOSTS in told:
        raise UrlError("it has another number of ports than of hosts")
    if "integer value" in told or "port number" in told:
        raise UrlError(f"its port is no number from 1 to 65535; {ENCODE}")
    if "service" in told:
        raise UrlError("its service is not in the connection service file, or that is not there")
    # The first word is libpq's own name of the parameter, and contains nothing of the value.
    option = re.search(r'invalid "?(\w+)"? value', told)
    raise UrlError(f"libpq takes no such value for {option[1]}" if option else "libpq refuses it")
