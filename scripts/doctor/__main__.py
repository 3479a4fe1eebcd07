"""Checks everything that a start depends on, one line each: ok, or what is wrong and what to type."""

import argparse
import os
import sys
from collections.abc import Sequence

from scripts import prerequisites
from scripts.doctor import database, gpus, models, neighbours, stack
from scripts.prerequisites import Finding
from service.config import Settings


def quick(settings: Settings) -> list[Finding]:
    """Runs the checks that take at most a second or two and contact nothing but Postgres."""
    nvidia = prerequisites.probe_nvidia()
    given = {
        # A host without a worker does without vLLM.
        "BATCH_ENGINE": settings.engine if "worker" in settings.runs else "simulated",
        "BATCH_MODEL": settings.model or "",
        "BATCH_ENGINE_ARGS": settings.engine_args,
    }
    findings = prerequisites.machine_checks(prerequisites.plan(nvidia, given), nvidia)
    findings += stack.quick(settings)
    for setting, url in (
        ("DATABASE_URL", settings.database_url),
        ("BATCH_GATEWAY_DATABASE_URL", settings.gateway_database_url),
    ):
        if url is not None:
            found = database.probe(url.get_secret_value(), settings.synchronous_commit)
            findings.append(database.judge(found, setting))
    findings += neighbours.check(settings)
    return findings + (gpus.check(settings) if "worker" in settings.runs else [])


def examine(*, is_quick: bool) -> list[Finding]:
    """Returns all findings, the settings first: if they are invalid, nothing else is checked."""
    settings, findings = stack.load_settings()
    if settings is None:
        return findings
    findings += quick(settings)
    if settings.engine == "vllm" and "worker" in settings.runs:
        findings += models.check(settings.model, asks_hub=not is_quick)
        if not is_quick:
            findings.append(prerequisites.load_engine())
    return findings


def line(finding: Finding) -> str:
    """Formats a finding as one line."""
    if not finding.problem:
        return f"ok      {finding.name}: {finding.fact}"
    return f"{'WRONG' if finding.is_blocking else 'note ':5}   {prerequisites.shown(finding)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if the stack can start, else 1."""
    parser = argparse.ArgumentParser(prog="scripts/doctor.sh", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="skip Hugging Face and loading vLLM: takes a second, not ten"
    )
    parser.add_argument("--wrong", action="store_true", help="show only what is wrong")
    options = parser.parse_args(arguments)
    findings = examine(is_quick=options.quick)
    for finding in findings:
        if finding.is_wrong or not options.wrong:
            print(line(finding), file=sys.stderr if options.wrong else sys.stdout, flush=True)
    return 1 if any(finding.is_wrong for finding in findings) else 0


if __name__ == "__main__":
    # vLLM's log lines would interleave with ours; its errors are in the finding.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    sys.exit(main())
