"""The client as users install it: a wheel in a virtual environment with its dependencies and nothing else."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def build_wheel(folder: Path) -> Path:
    """Builds the wheel from a copy of the sources, with the installed tools. Returns its path."""
    source = folder / "source"
    shutil.copytree(ROOT / "client", source / "client", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    _pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(folder), str(source))
    [wheel] = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path, *also: str) -> Path:
    """Creates a virtual environment with the wheel, its dependencies and `also`. Returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    python = folder / "bin" / "python"
    _pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    [site] = folder.glob("lib/python*/site-packages")
    [metadata] = site.glob("vllm_batch-*.dist-info/METADATA")
    wanted = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata.read_text(), re.MULTILINE)
    _link(site, [*wanted, *also], set())
    # Fails if a dependency is missing or has the wrong version.
    _pip("--python", str(python), "check")
    return python


def _link(site: Path, requirements: list[str], seen: set[str]) -> None:
    """Symlinks installed distributions and their dependencies into `site`."""
    for name in (Requirement(text).name for text in requirements):
        found = distribution(name)
        if found.name in seen:
            continue
        seen.add(found.name)
        for file in found.files or ():
            if file.parts[0] != ".." and "__pycache__" not in file.parts:
                target = site.joinpath(*file.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(Path(str(found.locate_file(file))))
        needed = [Requirement(text) for text in found.requires or ()]
        _link(site, [need.name for need in needed if not need.marker or need.marker.evaluate({"extra": ""})], seen)


def _pip(*arguments: str) -> None:
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments], env=env, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stdout + done.stderr
