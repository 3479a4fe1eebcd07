"""Settings of all processes, from the environment or a `.env` file. Wrong ones are all reported together, at start."""

import hashlib
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import quote

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from service import addresses, database_url, endpoints, machine, variables, webhook_targets
from service.addresses import bare, is_loopback
from service.auth import handshake, key_files
from vllm_batch import small_files

ROOT = Path(__file__).resolve().parent.parent

# A relative path is relative to the checkout.
ENV_FILE = ROOT / (os.environ.get("BATCH_ENV_FILE") or ".env")

# The maximum length of a Unix socket's path; supervisord first creates its socket under a longer name.
MAX_SOCKET_BYTES = 107
LONGEST_SOCKET = "run/supervisor.sock.4194304"

# Variables with our prefix that are not settings of a server process.
OTHER_VARIABLES = {
    "BATCH_EMBEDDED_POSTGRES",
    "BATCH_ENV_FILE",
    "BATCH_FAILPOINT",
    "BATCH_FAILURE_LOG",
    "BATCH_HOST_NAME",
    "BATCH_INCARNATION",
    "BATCH_PROGRAM_LOGS",
    *(f"BATCH_START_{program}" for program in ("GATEWAY", "HTTP", "WORKER", "WATCHDOG")),
    "BATCH_TARGET",
    "BATCH_TOKEN",
    "BATCH_WATCHDOG_TARGET",
}

# Prefixes of the variables by which vLLM and what it uses are set up.
ENGINE_VARIABLES = ("CUDA_", "HF_", "LD_", "NCCL_", "NVIDIA_", "PYTORCH_", "RAY_", "TORCH_", "TRITON_", "VLLM_")

# Flags of vLLM for files that it reads whole.
WHOLE_FILES = ("--chat-template", "--chat_template", "--config")

# What libpq, and the server itself, read from the environment.
LIBPQ_VARIABLE = re.compile("PG[A-Z]+")

# In a URL.
_USER = re.compile(r"://\S*@")

# Postgres counts to 2**63, and its dates begin 4713 BC.
MAX_COUNT = 1 << 60
CENTURY_S = 100 * 366 * 86_400

# The programs of a host, in the order in which they start. The embedded Postgres comes without a DATABASE_URL.
PROGRAMS = ("gateway", "http", "worker", "watchdog")

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Port = Annotated[int, Field(ge=1, le=65_535)]
PortOrNone = Annotated[int, Field(ge=0, le=65_535)]


class Settings(BaseSettings):
    """Every setting with its default. In the environment a name has the prefix `BATCH_` unless another is given."""

    model_config = SettingsConfigDict(
        env_prefix="BATCH_",
        env_file=ENV_FILE,
        env_file_encoding=variables.ENCODING,
        extra="ignore",
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,
    )

    # Which programs this host runs.
    programs: str = ",".join(PROGRAMS)
    # Where state lives and who listens where.
    home: Path = ROOT / "var"
    host: str = "127.0.0.1"
    gateway_port: Port = 50051
    worker_port: Port = 50052
    watchdog_port: Port = 50053
    http_port: Port = 50054
    # Prometheus metrics; port 0: none.
    metrics_host: str = "127.0.0.1"
    gateway_metrics_port: PortOrNone = 50061
    worker_metrics_port: PortOrNone = 50062
    watchdog_metrics_port: PortOrNone = 50063
    http_metrics_port: PortOrNone = 50064
    # Where spans go, an OTLP/gRPC collector. Unset: no tracing.
    otlp_endpoint: str | None = Field(
        default=None, validation_alias=AliasChoices("OTEL_EXPORTER_OTLP_ENDPOINT", "otlp_endpoint")
    )
    database_url: SecretStr | None = Field(default=None, validation_alias=AliasChoices("DATABASE_URL", "database_url"))
    sentry_dsn: SecretStr | None = Field(default=None, validation_alias=AliasChoices("SENTRY_DSN", "sentry_dsn"))
    environment: str = Field(default="production", validation_alias=AliasChoices("ENVIRONMENT", "environment"))
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    # Who may call: TLS of the four ports, certificates asked of clients, tokens.
    server_cert: Path | None = None
    server_key: Path | None = None
    client_ca: Path | None = None
    token_hashes: Path | None = None
    # Limits and shares of tenants.
    tenants_file: Path | None = None
    allow_insecure: bool = False
    reflection: bool = True
    # Networks that are not public, to which webhooks may go all the same, also by http.
    webhook_networks: str = ""
    # Calls that one client may make, by its token or else its address; 0: any number.
    rate_limit_per_s: Annotated[float, Field(ge=0, le=1e6)] = 1000
    # The Postgres URL for the gateway's own role; unset: the common one.
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
    # To Postgres and TCP these are whole milliseconds, of which 0 means for ever.
    database_timeout_s: Annotated[float, Field(ge=0.1, le=3600)] = 10
    # What commits wait for, so that they survive a failover; unset: as Postgres is configured.
    synchronous_commit: Literal["remote_write", "on", "remote_apply"] | None = None
    drain_timeout_s: Seconds = 60

    # What one client may ask for.
    max_requests_per_batch: Annotated[int, Field(ge=1, le=2_000_000_000)] = 50_000_000
    max_line_bytes: Annotated[int, Field(ge=1, le=256 << 20)] = 8 << 20
    max_batch_bytes: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 50 << 30
    max_queued_requests: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 50_000_000
    max_open_batches: Annotated[int, Field(ge=1, le=MAX_COUNT)] = 10_000
    # Finished batches are removed after this long; 0: never.
    retention_s: Annotated[float, Field(ge=0, le=CENTURY_S)] = 30 * 86_400

    # A host of which nothing was seen for this long is forgotten.
    host_forgotten_s: Annotated[float, Field(ge=60, le=CENTURY_S)] = 7 * 86_400

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
    # Serves so many models more, as vLLM serves LoRA adapters.
    simulated_adapters: Annotated[int, Field(ge=0)] = 0
    # Fails its start with this text.
    simulated_load_failure: str = ""

    @field_validator(
        "home",
        "server_cert",
        "server_key",
        "client_ca",
        "token_hashes",
        "tenants_file",
        "tls_ca",
        "tls_cert",
        "tls_key",
        "token_file",
    )
    @classmethod
    def _is_absolute(cls, path: Path | None) -> Path | None:
        # abspath keeps two leading slashes, and gRPC would read the first folder as a host.
        return None if path is None else Path("/" + os.path.abspath(ROOT / path).lstrip("/"))

    @field_validator("programs")
    @classmethod
    def _are_programs(cls, programs: str) -> str:
        names = [name.strip() for name in programs.split(",")]
        unknown = sorted({name for name in names if name not in PROGRAMS})
        if unknown:
            raise ValueError(f"{', '.join(map(repr, unknown))}: must be some of {', '.join(PROGRAMS)}, with commas")
        return ",".join(name for name in PROGRAMS if name in names)

    @field_validator("host", "metrics_host")
    @classmethod
    def _is_host(cls, host: str) -> str:
        if problem := addresses.problem(host):
            raise ValueError(problem)
        return host

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The usual sources, without variables that Kubernetes sets under names of ours."""
        for source in named.values():
            if isinstance(source, DotEnvSettingsSource) and isinstance(source.env_file, Path):
                # pydantic-settings would expand ${NAME} in single quotes too.
                read, _ = variables.read_file(source.env_file)
                source.env_vars = {name.lower(): value for name, value in read.items() if value}
            if isinstance(source, EnvSettingsSource):
                kept = {n: v for n, v in source.env_vars.items() if not variables.is_link(n.upper(), v or "")}
                source.env_vars = kept
        return (*sources, *named.values())

    @field_validator("database_url", "gateway_database_url")
    @classmethod
    def _is_for_libpq(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            database_url.parse(url.get_secret_value())
        return url

    @field_validator("webhook_networks")
    @classmethod
    def _are_networks(cls, text: str) -> str:
        webhook_targets.networks(text)
        return text

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_collector(cls, endpoint: str | None) -> str | None:
        if endpoint is not None:
            endpoints.check_collector(endpoint)
        return endpoint

    @field_validator("sentry_dsn")
    @classmethod
    def _is_dsn(cls, dsn: SecretStr | None) -> SecretStr | None:
        if dsn is not None:
            endpoints.check_sentry(dsn.get_secret_value())
        return dsn

    @model_validator(mode="after")
    def _fits_together(self) -> "Settings":
        wrong = []
        if self.heartbeat_timeout_s < 2 * self.heartbeat_interval_s:
            wrong.append("BATCH_HEARTBEAT_TIMEOUT_S must be at least twice BATCH_HEARTBEAT_INTERVAL_S")
        if self.lease_s < 2 * self.heartbeat_interval_s:
            wrong.append("BATCH_LEASE_S must be at least twice BATCH_HEARTBEAT_INTERVAL_S, which renews it")
        if self.host_forgotten_s < max(self.heartbeat_timeout_s, self.lease_s):
            wrong.append(
                "BATCH_HOST_FORGOTTEN_S must be at least BATCH_HEARTBEAT_TIMEOUT_S and BATCH_LEASE_S: until then the"
                " host may be alive"
            )
        metrics_ports = [
            *(self.gateway_metrics_port, self.worker_metrics_port, self.watchdog_metrics_port, self.http_metrics_port)
        ]
        ports = [
            *(self.gateway_port, self.worker_port, self.watchdog_port, self.http_port),
            *filter(None, metrics_ports),
        ]
        if len(set(ports)) < len(ports):
            wrong.append(
                "BATCH_{GATEWAY,WORKER,WATCHDOG,HTTP}_PORT and BATCH_{GATEWAY,WORKER,WATCHDOG,HTTP}_METRICS_PORT must"
                " differ"
            )
        try:
            shlex.split(self.engine_args)
        except ValueError as error:
            wrong.append(f"BATCH_ENGINE_ARGS cannot be split like a shell would: {error}")
        if self.synchronous_commit and self.database_url is None:
            wrong.append("BATCH_SYNCHRONOUS_COMMIT needs DATABASE_URL: the embedded Postgres has no standby")
        if self.database_url is None and "gateway" not in self.runs:
            wrong.append(
                f"BATCH_PROGRAMS={self.programs} needs DATABASE_URL: other hosts cannot reach the embedded Postgres"
            )
        wrong += self._wrong_home()
        wrong += self._wrong_security()
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _wrong_home(self) -> list[str]:
        home = str(self.home)
        if not home.isprintable():
            return ["BATCH_HOME has control characters, or is not UTF-8"]
        wrong = []
        size, most = len(os.fsencode(home)), MAX_SOCKET_BYTES - len(LONGEST_SOCKET) - 1
        if size > most:
            wrong.append(f"BATCH_HOME is too long for a Unix socket in it: {size} bytes, and at most {most} can be")
        if "," in home and self.database_url is None:
            wrong.append("BATCH_HOME has a comma, which Postgres' clients take for the end of a path")
        return wrong

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
    def runs(self) -> frozenset[str]:
        """The programs that this host runs, of PROGRAMS."""
        return frozenset(self.programs.split(","))

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
        """The URL of Postgres: `DATABASE_URL`, or the embedded server's socket in `BATCH_HOME`."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"postgresql:///batch?host={quote(str(self.run_dir / 'pg'))}&user=postgres"

    @property
    def gateway_postgres_url(self) -> str:
        """The Postgres URL for the gateway's role: `BATCH_GATEWAY_DATABASE_URL`, or the common one."""
        url = self.gateway_database_url
        return self.postgres_url if url is None else url.get_secret_value()

    @property
    def own_host(self) -> str:
        """The address at which processes of this host reach each other."""
        if addresses.is_any(self.host):
            return "[::1]" if ":" in self.host else "127.0.0.1"
        return self.host

    def own_address(self, port: int) -> str:
        """`host:port` at which processes of this host reach each other."""
        return addresses.joined(self.own_host, port)

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
    def advertised_loopback(self) -> str:
        """The advertised host if only this host reaches it: on loopback, or a name that is so here; else ""."""
        host = bare(self.advertised_host)
        if is_loopback(host):
            return host
        # Who listens on every address is reached at whatever others find for the name.
        here = addresses.loopback_here(host) if self.own_host == self.host else ""
        return f"{host}, which is {here} on this host" if here else ""

    def advertised_address(self, port: int) -> str:
        """`host:port` at which gateways of all hosts reach this one."""
        return addresses.joined(self.advertised_host, port)

    @property
    def client_environment(self) -> dict[str, str]:
        """The variables by which `vllm_batch.channel` calls this stack: the settings may be in `.env` only."""
        files = {"TLS_CA": self.tls_ca, "TLS_CERT": self.tls_cert, "TLS_KEY": self.tls_key}
        given = {name: str(path or "") if self.server_cert else "" for name, path in files.items()}
        given |= {"TLS_SERVER_NAME": self.tls_server_name, "TOKEN_FILE": str(self.token_file or "")}
        # This machine needs no proxy. The variable replaces no_proxy, which may name the gateway on another host.
        excluded = [os.environ[name] for name in ("no_grpc_proxy", "no_proxy") if name in os.environ]
        no_proxy = ",".join(filter(None, (*excluded[:1], bare(self.own_host))))
        return {f"BATCH_{name}": value for name, value in given.items()} | {"no_grpc_proxy": no_proxy}

    def probe_address(self, process_name: str) -> str:
        """The socket at which a worker or gateway answers the watchdog, by its name in supervisord."""
        # gRPC reads it as a URI.
        return f"unix:{quote(str(self.run_dir / process_name))}.sock"

    @property
    def supervisor_url(self) -> str:
        """The URL of supervisord's XML-RPC, in the form that `supervisor.xmlrpc.SupervisorTransport` expects."""
        return f"unix://{self.run_dir / 'supervisor.sock'}"

    @property
    def fingerprint(self) -> str:
        """Changes with the settings that may decide whether a worker starts, and with the variables that vLLM reads.

        A hash that leaves out the passwords in URLs, because they could be guessed from it.
        """
        given = {name: str(value) for name, value in self if not isinstance(value, SecretStr)}
        # As a process that starts now would read them: `.env` may have changed since this one took variables from it.
        file, _ = variables.read_file(ENV_FILE)
        now = file | {name: value for name, value in os.environ.items() if name not in _taken}
        given |= {name: value for name, value in now.items() if name.startswith(ENGINE_VARIABLES)}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:16]

    def own_id(self, program: str) -> str:
        """Identity of a program of this host: `<host>:<supervisord process>`."""
        return f"{machine.host_name()}:{process_name(program)}"

    @property
    def worker_id(self) -> str:
        """Identity of the worker in this process: `<host>:<supervisord process>`."""
        return f"{machine.host_name()}:{process_name()}"


def is_supervised() -> bool:
    """True in a process that supervisord has started."""
    return "SUPERVISOR_PROCESS_NAME" in os.environ


def process_name(otherwise: str = "worker") -> str:
    """This process's name in supervisord; `otherwise` without supervisord."""
    return os.environ.get("SUPERVISOR_PROCESS_NAME", otherwise)


def fingerprint_now() -> str:
    """The fingerprint of the settings as a process that starts now would have them; empty when they are wrong."""
    try:
        return _settings().fingerprint
    except (OSError, ValueError):
        return ""


def variable(name: str) -> str:
    """A setting's environment variable."""
    alias = Settings.model_fields[name].validation_alias
    return str(alias.choices[0]) if isinstance(alias, AliasChoices) else f"BATCH_{name.upper()}"


def judge_variables() -> variables.Judgement:
    """Which variables in the environment and in `.env` have wrong names, and which are not ours."""
    file, wrong = variables.read_file(ENV_FILE)
    if os.environ.get("BATCH_ENV_FILE") and not ENV_FILE.exists():
        wrong.append(f"there is no {ENV_FILE}")
    judgement = variables.judge(os.environ, file, known_variables())
    named = "BATCH_ENV_FILE: " if os.environ.get("BATCH_ENV_FILE") else ""
    judgement.wrong[:0] = [f"{named}{line}" for line in wrong]
    return judgement


def known_variables() -> set[str]:
    """All variable names that we know."""
    return {variable(name) for name in Settings.model_fields} | OTHER_VARIABLES


def home() -> Path:
    """`BATCH_HOME` from the environment or `.env`, even if other settings are wrong: the stack must be stoppable."""
    given = {name.upper(): value for name, value in variables.read_file(ENV_FILE)[0].items()}
    return Path(os.path.abspath(ROOT / (os.environ.get("BATCH_HOME") or given.get("BATCH_HOME") or "var")))


def problems(error: ValidationError) -> list[str]:
    """One line per wrong setting, with its environment variable but without its value, which may be secret."""
    lines = []
    for item in error.errors(include_url=False, include_input=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        if name.islower():
            name = f"BATCH_{name.upper()}"
        lines.append(f"{name}: {item['msg']}" if name else item["msg"].removeprefix("Value error, "))
    return lines


def load(*, warns: bool = True, is_check: bool = False, **given: Any) -> Settings:
    """Returns the settings, or exits with status 2 after printing everything that is wrong with them to stderr.

    Variables that are not ours are printed there too, once per process, unless `warns` is false. Variables in `.env`
    that are for libraries, such as HF_TOKEN, are put into the environment. `is_check` also checks that this machine can
    listen at the hosts, that the certificates are accepted, and that webhooks can be signed. Processes do not check
    that at start: a DNS outage or an expired certificate must not keep a worker down.
    """
    settings, judgement = examine(**given)
    if settings is not None and is_check:
        judgement.wrong += wrong_hosts(settings) + wrong_certificates(settings) + wrong_webhooks(settings)
    if settings is None or judgement.wrong:
        _refuse(judgement.wrong)
    if warns:
        sys.stderr.write("".join(f"warning: {line}\n" for line in judgement.foreign))
    _take_from_file()
    leave_out_libpq(settings)
    return settings


def examine(**given: Any) -> tuple[Settings | None, variables.Judgement]:
    """The settings, None when they cannot be read, and everything to report about their variables.

    A URL in it has no user and no password, whichever setting it was put in.
    """
    judgement = judge_variables()
    settings = None
    try:
        settings = _settings(**given)
        judgement.wrong += wrong_files(settings)
    except ValidationError as error:
        judgement.wrong += problems(error)
    except (OSError, UnicodeDecodeError):
        # About the file, which has been reported already.
        pass
    judgement.wrong = [_USER.sub("://…@", line) for line in judgement.wrong]
    return settings, judgement


def _settings(**given: Any) -> Settings:
    """The settings. Raises ValidationError, or OSError for a `.env` that cannot be read."""
    if problem := variables.problem(ENV_FILE):
        # pydantic-settings would read it too, and wait for whoever writes into a pipe.
        raise OSError(problem)
    return Settings(**given)


# Variables that this process took from `.env`.
_taken: set[str] = set()


def _take_from_file() -> None:
    """Puts variables for libraries from `.env` into the environment. Settings stay: they are read again on change."""
    fields = {variable(name) for name in Settings.model_fields}
    for name, value in variables.read_file(ENV_FILE)[0].items():
        if name.upper() not in fields and name not in os.environ:
            os.environ[name] = value
            _taken.add(name)


def leave_out_libpq(settings: Settings) -> None:
    """Removes libpq's variables, such as PGPORT or PGSERVICE, for the embedded Postgres: they are meant for another.

    Its URL cannot override all of them.
    """
    if settings.database_url is not None:
        return
    for name in [name for name in os.environ if LIBPQ_VARIABLE.fullmatch(name)]:
        del os.environ[name]


def wrong_hosts(settings: Settings) -> list[str]:
    """One line per host at which this machine cannot listen."""
    hosts = {"BATCH_HOST": settings.host}
    if any(
        (
            *(settings.gateway_metrics_port, settings.worker_metrics_port),
            *(settings.watchdog_metrics_port, settings.http_metrics_port),
        )
    ):
        hosts["BATCH_METRICS_HOST"] = settings.metrics_host
    return [f"{name}: {problem}" for name, host in hosts.items() if (problem := addresses.cannot_listen(host))]


def wrong_certificates(settings: Settings) -> list[str]:
    """Why the gateway's calls to a worker would be refused, if both have the certificates of these settings."""
    certificate, key, authorities = settings.server_cert, settings.server_key, settings.tls_ca
    if certificate is None or key is None or authorities is None:
        return []
    client = (settings.tls_cert, settings.tls_key) if settings.tls_cert and settings.tls_key else None
    # Which name a server on all addresses is called by depends on who calls it.
    name = settings.tls_server_name or ("" if addresses.is_any(settings.host) else bare(settings.host))
    try:
        why = handshake.problem((certificate, key), authorities, name, client, settings.client_ca)
    except (OSError, ValueError):
        # Of a file, about which something is said already.
        return []
    return [f"BATCH_SERVER_CERT, BATCH_TLS_CA, BATCH_TLS_CERT, BATCH_CLIENT_CA: {why}"] if why else []


def wrong_webhooks(settings: Settings) -> list[str]:
    """Why webhooks could not be signed, or would go nowhere."""
    path = settings.tenants_file
    if path is None:
        return []
    try:
        quotas = key_files.read_quotas(path)
    except (OSError, ValueError):
        # Something is said about the file already.
        return []
    try:
        key_files.check_webhook_secrets(quotas)
    except (OSError, ValueError) as error:
        return [f"BATCH_TENANTS_FILE: {error}"]
    allowed = webhook_targets.networks(settings.webhook_networks)
    urls = {name: quota.webhook.url for name, quota in quotas.named.items() if quota.webhook is not None}
    problems = {name: webhook_targets.problem(url, allowed) for name, url in urls.items() if url is not None}
    return [f"BATCH_TENANTS_FILE: tenants.{name}.webhook.url: {told}" for name, told in problems.items() if told]


def wrong_files(settings: Settings) -> list[str]:
    """One line per file of keys, certificates, tokens or flags that cannot be used."""
    checks: list[tuple[str, Path | None, Callable[[Path], object]]] = [
        ("BATCH_CLIENT_CA", settings.client_ca, key_files.check_authorities),
        ("BATCH_TLS_CA", settings.tls_ca, key_files.check_authorities),
        ("BATCH_TOKEN_FILE", settings.token_file, key_files.check_token),
        ("BATCH_TOKEN_HASHES", settings.token_hashes, key_files.read_tokens),
        ("BATCH_TENANTS_FILE", settings.tenants_file, key_files.read_quotas),
    ]
    for name, certificate, key in (
        ("BATCH_SERVER_CERT, BATCH_SERVER_KEY", settings.server_cert, settings.server_key),
        ("BATCH_TLS_CERT, BATCH_TLS_KEY", settings.tls_cert, settings.tls_key),
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
    return wrong + _wrong_engine_files(settings)


def _wrong_engine_files(settings: Settings) -> list[str]:
    """One line per flag with a pipe or a device, or with a huge file where vLLM reads all of it at once.

    The worker would load for ever. A folder or a large file may be right for other flags; a socket cannot be opened.
    """
    wrong, flag = [], ""
    for word in shlex.split(settings.engine_args):
        value = word
        if word.startswith("-"):
            flag, _, value = word.partition("=")
        try:
            path = ROOT / value
            problem = small_files.problem(path)
            is_wrong = flag in WHOLE_FILES or small_files.kind(path) in ("a pipe", "a device")
        except (OSError, ValueError):
            # It is no path.
            continue
        if value and problem and is_wrong:
            # The value may be a secret.
            wrong.append(f"BATCH_ENGINE_ARGS: the file of {flag or 'an argument'} {problem}")
    return wrong


def _refuse(wrong: list[str]) -> NoReturn:
    sys.stderr.write("wrong settings:\n" + "".join(f"  {line}\n" for line in wrong))
    raise SystemExit(2)
