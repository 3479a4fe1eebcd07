"""Checks whether the model can be loaded: a complete local folder, or one that we may download from Hugging Face."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path

from scripts.prerequisites import Finding, GiB
from vllm_batch import small_files

HUB_TIMEOUT_S = 10.0
WEIGHTS = (".safetensors", ".bin", ".pt", ".gguf")
# git leaves this instead of a large file if git-lfs is not installed.
LFS_POINTER = b"version https://git-lfs"


class Answer(Enum):
    """The hub's answer."""

    OK = auto()
    GATED = auto()
    NOT_FOUND = auto()
    AWAY = auto()
    OFFLINE = auto()


@dataclass(frozen=True)
class Folder:
    """A local model as found on disk: file sizes, git-lfs pointers, errors in its configuration."""

    path: Path
    exists: bool = True
    sizes: Mapping[str, int] | None = None
    pointers: Sequence[str] = ()
    config_error: str = ""
    shards: Sequence[str] = ()


@dataclass(frozen=True)
class Hub:
    """What is known about a model on the hub."""

    answer: Answer
    detail: str = ""
    is_cached: bool = False
    has_token: bool = False
    download_bytes: int = 0
    free_bytes: int = 0
    cache: str = ""


def is_folder(model: str) -> bool:
    """Returns True if the model is a path, which vLLM prefers to the hub."""
    return model.startswith(("/", "./", "../", "~")) or Path(model).is_dir()


def judge_folder(folder: Folder) -> Finding:
    """Checks configuration, weights, and all weight files that the index names."""
    fix = f"copy the model again into {folder.path}"
    if not folder.exists:
        return Finding("model", problem=f"{folder.path} is not a folder", fix="correct BATCH_MODEL")
    sizes = folder.sizes or {}
    if not any(name.endswith(".gguf") for name in sizes):
        if folder.config_error:
            return Finding("model", problem=f"{folder.path}/config.json: {folder.config_error}", fix=fix)
        missing = [name for name in folder.shards if name not in sizes]
        if missing:
            named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            problem = f"{len(missing)} of {len(folder.shards)} weight files are missing: {named}"
            return Finding("model", problem=problem, fix=fix)
    if folder.pointers:
        problem = f"{folder.pointers[0]} is a git-lfs pointer, not the file"
        return Finding("model", problem=problem, fix=f"git -C {folder.path} lfs pull")
    weights = [name for name in sizes if name.endswith(WEIGHTS)]
    if not weights:
        return Finding("model", problem=f"no weights in {folder.path}", fix=fix)
    empty = [name for name in weights if not sizes[name]]
    if empty:
        return Finding("model", problem=f"{empty[0]} is empty", fix=fix)
    total = sum(sizes[name] for name in weights)
    return Finding("model", f"{folder.path}, {len(weights)} weight files, {total / GiB:.1f} GiB")


def judge_hub(model: str, hub: Hub) -> Finding:
    """Checks that the hub has the model and lets us download it, or that it is cached."""
    cached = " (a copy is in the cache)" if hub.is_cached else ""
    if hub.answer is Answer.GATED:
        asked = "and the account of this HF_TOKEN has no access" if hub.has_token else "and HF_TOKEN is not set"
        fix = f"accept the terms on the Hugging Face page of {model}, then set HF_TOKEN to a token of that account"
        return Finding("model", problem=f"{model} is gated, {asked}", fix=fix, is_blocking=not hub.is_cached)
    if hub.answer is Answer.NOT_FOUND:
        problem = f"Hugging Face has no {model}, or it is private"
        return Finding("model", problem=problem, fix="correct BATCH_MODEL, or set HF_TOKEN if it is private")
    if hub.answer is Answer.OFFLINE and not hub.is_cached:
        problem = f"{model} is not in the cache {hub.cache}, and HF_HUB_OFFLINE forbids a download"
        return Finding("model", problem=problem, fix="unset HF_HUB_OFFLINE, or set BATCH_MODEL to a folder")
    if hub.answer is Answer.AWAY:
        problem = f"Hugging Face does not answer: {hub.detail}{cached}"
        fix = (
            "set HF_HUB_OFFLINE=1 to use the copy"
            if hub.is_cached
            else "check HF_ENDPOINT and proxy, or use a local folder"
        )
        return Finding("model", problem=problem, fix=fix, is_blocking=not hub.is_cached)
    if hub.free_bytes < hub.download_bytes:
        problem = (
            f"{model} takes {hub.download_bytes / GiB:.1f} GiB,"
            f" but {hub.free_bytes / GiB:.1f} are free in the cache {hub.cache}"
        )
        return Finding("model", problem=problem, fix="free some space, or move HF_HOME to a larger disk")
    if hub.answer is Answer.OFFLINE:
        return Finding("model", f"{model}, from the cache")
    size = f", {hub.download_bytes / GiB:.1f} GiB to download" if hub.download_bytes else ""
    return Finding("model", f"{model}, on the hub{size}{cached}")


def probe_folder(path: Path) -> Folder:
    """Inspects the folder of a model."""
    if not path.is_dir():
        return Folder(path, exists=False)
    files = [file for file in path.iterdir() if file.is_file()]
    sizes = {file.name: file.stat().st_size for file in files}
    pointers = sorted(
        file.name
        for file in files
        if file.name.endswith(WEIGHTS) and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER)
    )
    config_error = ""
    try:
        json.loads(small_files.read(path / "config.json"))
    except FileNotFoundError:
        config_error = "missing"
    except (OSError, ValueError) as error:
        config_error = str(error)
    return Folder(path, True, sizes, pointers, config_error, _shards(path))


def _shards(path: Path) -> list[str]:
    named: set[str] = set()
    for index in filter(Path.is_file, path.glob("*.index.json")):
        try:
            named |= set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            # Leave it to vLLM, which knows whether it needs this index.
            continue
    return sorted(named)


def probe_hub(model: str) -> Hub:
    """Queries the hub about a model, with the user's token."""
    from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    token = get_token()
    cache = constants.HF_HUB_CACHE
    is_cached = isinstance(try_to_load_from_cache(model, "config.json"), str)
    known = Hub(Answer.OK, is_cached=is_cached, has_token=token is not None, free_bytes=_free(Path(cache)), cache=cache)
    try:
        api = HfApi()
        info = api.model_info(model, files_metadata=True, timeout=HUB_TIMEOUT_S)
        if info.gated:
            api.auth_check(model)
    except GatedRepoError:
        return replace(known, answer=Answer.GATED)
    except (RepositoryNotFoundError, HFValidationError):
        return replace(known, answer=Answer.NOT_FOUND)
    except OfflineModeIsEnabled:
        return replace(known, answer=Answer.OFFLINE)
    except Exception as error:  # noqa: BLE001 - any other failure means that we cannot reach it
        detail = next(iter(str(error).splitlines()), type(error).__name__)
        return replace(known, answer=Answer.AWAY, detail=detail)
    files = [file for file in info.siblings or () if file.rfilename.endswith(WEIGHTS)]
    # vLLM downloads only one kind of weights.
    preferred = [file for file in files if file.rfilename.endswith(".safetensors")] or files
    size = 0 if is_cached else sum(file.size or 0 for file in preferred)
    return replace(known, download_bytes=size)


def _free(path: Path) -> int:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    space = os.statvfs(existing)
    return space.f_bavail * space.f_frsize


def check(model: str | None, *, asks_hub: bool) -> list[Finding]:
    """Returns the finding about a model; none for a model on the hub unless `asks_hub`."""
    if model is None:
        return [Finding("model", "the built-in tiny model")]
    if is_folder(model):
        return [judge_folder(probe_folder(Path(model).expanduser()))]
    return [judge_hub(model, probe_hub(model))] if asks_hub else []
