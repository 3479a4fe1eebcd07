"""Builds deploy/Containerfile into a folder and runs it there: a stand-in for the container engine that is not here.

Knows the few instructions that the file uses. A container has its own mounts and processes; the network is the host's.
"""

import json
import re
import shlex
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from tests.fresh.roots import ROOT, Root

CONTAINERFILE = ROOT / "deploy/Containerfile"


@dataclass
class Image:
    """What an image says about how it is run."""

    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Containerfile and their arguments, without comments, continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines()) if name]


def build(root: Root, **arguments: str) -> Image:
    """Carries out the instructions in a Debian that is installed already, and returns how to run it."""
    image = Image()
    for name, rest in instructions(CONTAINERFILE.read_text()):
        if name == "ARG":
            key, _, default = rest.partition("=")
            arguments.setdefault(key, default)
        elif name == "ENV":
            image.environment |= dict(word.split("=", 1) for word in shlex.split(rest))
        elif name == "WORKDIR":
            image.workdir = rest
        elif name == "USER":
            image.user = rest
        elif name == "COPY":
            assert rest.split()[0] == "."
            root.copy_checkout(rest.split()[1])
        elif name == "RUN":
            given = " ".join(shlex.quote(f"{key}={value}") for key, value in (arguments | image.environment).items())
            command = f"cd {image.workdir} && export {given} && {rest}"
            done = root.run(command, user="root", timeout_s=2400)
            assert done.returncode == 0, rest
        elif name == "ENTRYPOINT":
            image.entrypoint = json.loads(rest)
        else:
            assert name in ("FROM", "EXPOSE"), name
    return image


def start(
    root: Root, image: Image, home: Path | None, environment: dict[str, str], *, user: str, shm: str, shared: Path
) -> "subprocess.Popen[str]":
    """Starts a container with a read-only root: its entry point is process 1 of a process namespace of its own.

    `home` is the volume at BATCH_HOME, if any; `shared` is a folder of the host that it sees under the same path.
    """
    base = shlex.quote(str(root.path))
    lines = [f"mount --bind {base} {base}", f"mkdir -p {base}{shared}", f"mount --bind {shared} {base}{shared}"]
    lines += [f"mount --rbind /dev {base}/dev", f"mount -t tmpfs -o mode=1777,size={shm} tmpfs {base}/dev/shm"]
    lines += [f"mount -t tmpfs -o mode=1777 tmpfs {base}/tmp"] if not shared.is_relative_to("/tmp") else []
    if home is not None:
        lines.append(f"mount --bind {shlex.quote(str(home))} {base}{image.environment['BATCH_HOME']}")
    lines += [f"mount -o remount,bind,ro {base}", f"mount -t proc proc {base}/proc", f"mount --rbind /sys {base}/sys"]
    given = " ".join(
        shlex.quote(f"{name}={value}")
        for name, value in ({"PATH": "/usr/local/bin:/usr/bin:/bin"} | image.environment | environment).items()
    )
    command = f"cd {image.workdir}; exec {shlex.join(image.entrypoint)}"
    # Without --groups, chroot would look the user up.
    lines.append(f"exec chroot --userspec={user} --groups= {base} env -i {given} bash -c {shlex.quote(command)}")
    namespaces = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    return subprocess.Popen(
        ["unshare", *namespaces, "bash", "-euc", "\n".join(lines)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
