"""Settings of all processes, from the environment or a `.env` file. Wrong ones are all reported together, at start."""

import ipaddress
import os
import shlex
import socket
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service import key_files

ROOT = Path(__file__).resolve().parent.parent

# Variables with our prefix that are not settings of a server process.
OTHER_VARIABLES = {
    "BATCH_EMBEDDED_POSTGRES",
    "BATCH_ENV_FILE",
    "BATCH_FAILPOINT",
    "BATCH_INCARNATION",
    "BATCH_TARGET",
    "BATCH_TOKEN",
    "BATCH_WATCHDOG_TARGET",
}

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Port = Annotated[int, Field(ge=1, le=65_535)]
PortOrNone = Annotated[int, Field(ge=0, le=65_535)]


class Settings(BaseSettings):
    """Every setting with its default. In the environment a name has the prefix `BATCH_` unless another is given."""

    model_config = SettingsConfigDict(
        env_prefix="BATCH_",
        env_file=os.environ.get("BATCH_ENV_FILE", ROOT / ".env"),
        extra="ignore",
        env_ignore_empty=True,
        frozen=True,
    )

    # Where state lives and who listens where.
    home: Path = ROOT / "var"
    host: str = "127.0.0.1"
    gateway_port: Port = 50051
    worker_port: Port = 50052
    watchdog_port: Port = 50053
    # Prometheus metrics; port 0: none.
    metrics_host: str = "127.0.0.1"
    gateway_metrics_port: PortOrNone = 50061
    worker_metrics_port: PortOrNone = 50062
    watchdog_metrics_port: PortOrNone = 50063
    # Where spans go, an OTLP/gRPC collector. Unset: no tracing.
    otlp_endpoint: str | None = Field(
        default=None, validation_alias=AliasChoices("OTEL_EXPORTER_OTLP_ENDPOINT", "otlp_endpoint")
    )
    database_url: SecretStr | None = Field(default=None, validation_alias=AliasChoices("DATABASE_URL", "database_url"))
    sentry_dsn: SecretStr | None = Field(default=None, validation_alias=AliasChoices("SENTRY_DSN", "sentry_dsn"))
    environment: str = Field(default="production", validation_alias=AliasChoices("ENVIRONMENT", "environment"))
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    # Who may call: TLS of the three ports, certificates asked of clients, tokens.
    server_cert: Path | None = None
    server_key: Path | None = None
    client_ca: Path | None = None
    token_hashes: Path | None = None
    allow_insecure: bool = False
    reflection: bool = True
    # Calls that one client may make, by its token or else its address; 0: any number.
    rate_limit_per_s: Annotated[float, Field(ge=0, le=1e6)] = 1000
    # As whom the gateway is in Postgres; unset: as everybody.
    gateway_database_url: SecretStr | None = None

    # How the gateway calls workers, and how the scripts call what they have started.
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str = ""
    token_file: Path | None = None

    # The engine.
    engine: Literal["vllm", "simulated"] = "vllm"
    model: str | None = None
    engine_args: str = ""
    window: Annotated[int, Field(ge=1, le=100_000)] | None = None

    # Heartbeat, leases, results.
    heartbeat_interval_s: Seconds = 5
    heartbeat_timeout_s: Seconds = 60
    lease_s: Seconds = 60
    result_group_interval_s: Seconds = 0.05
    database_timeout_s: Seconds = 10
    drain_timeout_s: Seconds = 60

    # What one client may ask for.
    max_requests_per_batch: Annotated[int, Field(ge=1, le=2_000_000_000)] = 5_000_000
    max_line_bytes: Annotated[int, Field(ge=1, le=256 << 20)] = 8 << 20
    max_batch_bytes: Annotated[int, Field(ge=1)] = 50 << 30
    max_queued_requests: Annotated[int, Field(ge=1)] = 50_000_000
    max_open_batches: Annotated[int, Field(ge=1)] = 10_000
    # Finished batches are removed after this long; 0: never.
    retention_s: Annotated[float, Field(ge=0)] = 30 * 86_400

    # Recovery.
    check_interval_s: Seconds = 30
    max_restarts_per_hour: Annotated[int, Field(ge=0, le=1000)] = 10
    restart_backoff_max_s: Seconds = 300
    load_timeout_s: Seconds = 1800
    probe_timeout_s: Seconds = 5
    stop_timeout_s: Seconds = 90

    # The simulated engine.
    simulated_request_s: Annotated[float, Field(ge=0)] = 0.02
    simulated_load_s: Annotated[float, Field(ge=0)] = 0.1
    simulated_window: Annotated[int, Field(ge=1)] = 64

    @field_validator(
        "home", "server_cert", "server_key", "client_ca", "token_hashes", "tls_ca", "tls_cert", "tls_key", "token_file"
    )
    @classmethod
    def _is_absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else Path(os.path.abspath(path))

    @model_validator(mode="after")
    def _fits_together(self) -> "Settings":
        wrong = []
        if self.heartbeat_timeout_s < 2 * self.heartbeat_interval_s:
            wrong.append("BATCH_HEARTBEAT_TIMEOUT_S must be at least twice BATCH_HEARTBEAT_INTERVAL_S")
        if self.lease_s < 2 * self.heartbeat_interval_s:
            wrong.append("BATCH_LEASE_S must be at least twice BATCH_HEARTBEAT_INTERVAL_S, which renews it")
        metrics_ports = [self.gateway_metrics_port, self.worker_metrics_port, self.watchdog_metrics_port]
        ports = [self.gateway_port, self.worker_port, self.watchdog_port, *filter(None, metrics_ports)]
        if len(set(ports)) < len(ports):
            wrong.append(
                "BATCH_{GATEWAY,WORKER,WATCHDOG}_PORT and BATCH_{GATEWAY,WORKER,WATCHDOG}_METRICS_PORT must differ"
            )
        try:
            shlex.split(self.engine_args)
        except ValueError as error:
            wrong.append(f"BATCH_ENGINE_ARGS cannot be split like a shell would: {error}")
        if len(str(self.run_dir / "supervisor.sock")) > 100:
            wrong.append("BATCH_HOME is too long for a Unix socket in it: at most 80 characters")
        wrong += self._wrong_security()
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _wrong_security(self) -> list[str]:
        wrong = []
        if (self.server_cert is None) != (self.server_key is None):
            wrong.append("BATCH_SERVER_CERT and BATCH_SERVER_KEY go together")
        if (self.tls_cert is None) != (self.tls_key is None):
            wrong.append("BATCH_TLS_CERT and BATCH_TLS_KEY go together")
        if self.client_ca and not self.server_cert:
            wrong.append("BATCH_CLIENT_CA needs BATCH_SERVER_CERT: clients show certificates within TLS alone")
        if self.server_cert and not self.tls_ca:
            wrong.append("BATCH_TLS_CA is needed with BATCH_SERVER_CERT: by it the gateway knows the workers")
        if self.client_ca and not self.tls_cert:
            wrong.append("BATCH_TLS_CERT is needed with BATCH_CLIENT_CA: the gateway shows it to the workers")
        if not is_loopback(self.host) and not (self.server_cert and self.token_hashes) and not self.allow_insecure:
            wrong.append(
                f"BATCH_HOST={self.host} can be reached from other machines: set BATCH_SERVER_CERT and"
                " BATCH_TOKEN_HASHES, or BATCH_ALLOW_INSECURE=true if something else keeps strangers away"
            )
        return wrong

    @property
    def run_dir(self) -> Path:
        """Folder of the sockets, mode 0700."""
        return self.home / "run"

    @property
    def log_dir(self) -> Path:
        """Folder of the logs."""
        return self.home / "log"

    @property
    def postgres_url(self) -> str:
        """Where Postgres is: `DATABASE_URL`, or the embedded one through its socket in `BATCH_HOME`."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"postgresql:///batch?host={self.run_dir / 'pg'}&user=postgres"

    @property
    def gateway_postgres_url(self) -> str:
        """As whom the gateway is in Postgres: `BATCH_GATEWAY_DATABASE_URL`, or as the others."""
        url = self.gateway_database_url
        return self.postgres_url if url is None else url.get_secret_value()

    @property
    def own_host(self) -> str:
        """The address at which processes of this host reach each other."""
        return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}.get(self.host, self.host)

    @property
    def advertised_host(self) -> str:
        """The address at which gateways of all hosts reach this one: its name, if it listens on every address."""
        if self.own_host == self.host:
            return self.host
        name = socket.gethostname()
        try:
            socket.getaddrinfo(name, None)
        except OSError:
            return self.own_host
        return name

    @property
    def client_environment(self) -> dict[str, str]:
        """What tells `vllm_batch.channel` how to call this stack: settings may be in `.env` alone."""
        files = {"TLS_CA": self.tls_ca, "TLS_CERT": self.tls_cert, "TLS_KEY": self.tls_key}
        given = {name: str(path or "") if self.server_cert else "" for name, path in files.items()}
        given |= {"TLS_SERVER_NAME": self.tls_server_name, "TOKEN_FILE": str(self.token_file or "")}
        return {f"BATCH_{name}": value for name, value in given.items()}

    @property
    def probe_sockets(self) -> bool:
        """True when workers answer the watchdog on a Unix socket of their own.

        With TLS: a certificate that has expired or a wrong CA must never make a worker look dead.
        """
        return self.server_cert is not None

    def probe_address(self, process_name: str) -> str:
        """The socket of a worker by its name in supervisord."""
        return f"unix:{self.run_dir / process_name}.sock"

    @property
    def supervisor_url(self) -> str:
        """Where supervisord's XML-RPC is, as `supervisor.xmlrpc.SupervisorTransport` writes it."""
        return f"unix://{self.run_dir / 'supervisor.sock'}"

    @property
    def worker_id(self) -> str:
        """Identity of the worker in this process: `<host>:<supervisord process>`."""
        return f"{socket.gethostname()}:{process_name()}"


def process_name() -> str:
    """What supervisord calls this process."""
    return os.environ.get("SUPERVISOR_PROCESS_NAME", "worker")


def is_loopback(host: str) -> bool:
    """True for an address that other machines cannot reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """Variables of our prefix that no setting has: nearly always a typing error."""
    known = {f"BATCH_{name.upper()}" for name in Settings.model_fields} | OTHER_VARIABLES
    return sorted(name for name in environ if name.startswith("BATCH_") and name not in known)


def problems(error: ValidationError) -> list[str]:
    """One line per wrong setting, with the name it has in the environment; values are left out, they may be secret."""
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        if name.islower():
            name = f"BATCH_{name.upper()}"
        lines.append(f"{name}: {item['msg']}" if name else item["msg"].removeprefix("Value error, "))
    return lines


def load(**given: Any) -> Settings:
    """The settings, or the end of the process with status 2 and all that is wrong with them on stderr."""
    wrong = [f"{name}: no such setting" for name in unknown_variables(os.environ)]
    try:
        settings = Settings(**given)
    except ValidationError as error:
        _refuse(wrong + problems(error))
    wrong += wrong_files(settings)
    if wrong:
        _refuse(wrong)
    return settings


def wrong_files(settings: Settings) -> list[str]:
    """One line per file of keys, certificates or tokens that cannot be used."""
    checks: list[tuple[str, Path | None, Callable[[Path], object]]] = [
        ("BATCH_CLIENT_CA", settings.client_ca, key_files.check_authorities),
        ("BATCH_TLS_CA", settings.tls_ca, key_files.check_authorities),
        ("BATCH_TOKEN_FILE", settings.token_file, key_files.check_private),
        ("BATCH_TOKEN_HASHES", settings.token_hashes, key_files.read_tokens),
    ]
    for name, certificate, key in (
        ("BATCH_SERVER_KEY", settings.server_cert, settings.server_key),
        ("BATCH_TLS_KEY", settings.tls_cert, settings.tls_key),
    ):
        if certificate is not None:
            checks.append((name, key, partial(key_files.check_pair, certificate)))
    wrong = []
    for name, path, check in checks:
        try:
            if path is not None:
                check(path)
        except (OSError, ValueError) as error:
            wrong.append(f"{name}: {error}")
    return wrong


def _refuse(wrong: list[str]) -> NoReturn:
    sys.stderr.write("wrong settings:\n" + "".join(f"  {line}\n" for line in wrong))
    raise SystemExit(2)
