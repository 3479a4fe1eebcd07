"""Settings of all processes, from the environment or a `.env` file. Wrong ones are all reported together, at start."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ROOT = Path(__file__).resolve().parent.parent

# Variables with our prefix that are not settings of a server process.
OTHER_VARIABLES = {
    "BATCH_EMBEDDED_POSTGRES",
    "BATCH_ENV_FILE",
    "BATCH_FAILPOINT",
    "BATCH_INCARNATION",
    "BATCH_TARGET",
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

    @field_validator("home")
    @classmethod
    def _is_absolute(cls, home: Path) -> Path:
        return Path(os.path.abspath(home))

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
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

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
    def supervisor_url(self) -> str:
        """Where supervisord's XML-RPC is, as `supervisor.xmlrpc.SupervisorTransport` writes it."""
        return f"unix://{self.run_dir / 'supervisor.sock'}"

    @property
    def worker_id(self) -> str:
        """Identity of the worker in this process: `<host>:<supervisord process>`."""
        return f"{socket.gethostname()}:{os.environ.get('SUPERVISOR_PROCESS_NAME', 'worker')}"


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
    if wrong:
        _refuse(wrong)
    return settings


def _refuse(wrong: list[str]) -> NoReturn:
    sys.stderr.write("wrong settings:\n" + "".join(f"  {line}\n" for line in wrong))
    raise SystemExit(2)
