"""Makes a Debian with nothing but Python in a folder, using debootstrap; mounts exist only while a command runs in it.

The settings by which pip and apt reach their registries are passed as environment and read-only mounts, never stored.
"""

import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "python3,python3-venv,ca-certificates"
USER = "somebody"
CHECKOUT = f"/home/{USER}/vllm-batch"
# Variables that tell programs how to reach the network from here.
NETWORK_VARIABLES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
CERTIFICATES = "/etc/ssl/certs"


class Root:
    """A Debian in a folder."""

    def __init__(self, path: Path, python: Path | None = None) -> None:
        self.path = path
        self._pip, self._mounts = pip_settings()
        self._mounts.append(Path(CERTIFICATES))
        if python is not None:
            # The whole installation that bin/python3 belongs to.
            self._pip["PYTHON"] = str(python)
            self._mounts.append(python.parent.parent)

    def make(self, suite: str) -> None:
        """Installs Debian with Python, creates a user, and copies the checkout."""
        self.install(suite, PACKAGES)
        self.run(f"useradd --create-home --shell /bin/bash {USER}", user="root")
        self.copy_checkout()
        self.run(f"chown -R {USER}: {CHECKOUT}", user="root")

    def install(self, suite: str, packages: str) -> None:
        """Installs Debian with these packages."""
        # debootstrap mounts /proc in the folder, and leaves it mounted when it fails.
        namespace = ["unshare", "--mount", "--propagation", "private"]
        command = [*namespace, "debootstrap", "--variant=minbase", f"--include={packages}", suite, str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        shutil.copy("/etc/resolv.conf", self.path / "etc" / "resolv.conf")
        (self.path / "etc" / "hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")

    def remove(self) -> None:
        """Deletes the folder, unless something is mounted in it."""
        mounts = Path("/proc/self/mounts").read_text()
        assert f" {self.path}" not in mounts, f"something is mounted in {self.path}"
        shutil.rmtree(self.path.parent)

    def copy_checkout(self, to: str = CHECKOUT) -> None:
        """Copies the files that git tracks or would add, as they are now."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            timeout=60,
        )
        target = self.path / to.lstrip("/")
        for name in listed.stdout.decode().split("\0"):
            if name and (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)

    def run(
        self, command: str, *, user: str = USER, has_network: bool = True, timeout_s: float = 120
    ) -> "subprocess.CompletedProcess[str]":
        """Runs a shell command in the checkout as after a login. Prints its output as it comes, and returns it.

        Mounts and processes live in namespaces of their own, which the kernel removes at the end, whatever happens.
        """
        namespaces = ["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
        namespaces += [] if has_network else ["--net"]
        outer = ["unshare", *namespaces, "bash", "-euc", self._script(command, user)]
        process = subprocess.Popen(
            outer, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace"
        )
        said = []
        try:
            assert process.stdout is not None
            killer = _kill_after(process, timeout_s)
            for line in process.stdout:
                said.append(line)
                sys.stdout.write(f"  {line}")
                sys.stdout.flush()
            killer.cancel()
            return subprocess.CompletedProcess(command, process.wait(timeout=30), "".join(said), "")
        finally:
            process.kill()
            process.wait(timeout=30)

    def _script(self, command: str, user: str) -> str:
        root = shlex.quote(str(self.path))
        home = "/root" if user == "root" else f"/home/{user}"
        environment = {
            "HOME": home,
            "USER": user,
            "LANG": "C.UTF-8",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            **{name: os.environ[name] for name in NETWORK_VARIABLES if name in os.environ},
            **self._pip,
        }
        lines = [
            f"mount --bind {root} {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /sys {root}/sys",
            f"mount --rbind /dev {root}/dev",
            f"mount -t tmpfs -o mode=1777,size=2G tmpfs {root}/dev/shm",
        ]
        for path in self._mounts:
            inside = shlex.quote(str(self.path) + str(path))
            make = f"mkdir -p {inside}" if path.is_dir() else f"mkdir -p $(dirname {inside}); touch {inside}"
            lines += [make, f"mount --bind {shlex.quote(str(path))} {inside}", f"mount -o remount,bind,ro {inside}"]
        given = " ".join(shlex.quote(f"{name}={value}") for name, value in environment.items())
        inner = f"cd {CHECKOUT} 2>/dev/null || cd /\n{command}"
        lines.append(f"chroot --userspec={user}:{user} {root} env -i {given} bash -c {shlex.quote(inner)}")
        # A last command keeps bash as the first process: it reaps orphans, and dies with unshare, which a process that
        # has changed its user would not.
        lines.append("true")
        return "\n".join(lines) + "\n"


def pip_settings() -> tuple[dict[str, str], list[Path]]:
    """pip's settings on this machine as environment variables, and the files and folders that they name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True, timeout=60
    )
    variables: dict[str, str] = {}
    paths: set[Path] = set()
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        value = value.strip().strip("'")
        variable = "PIP_" + name.split(".", 1)[1].upper().replace("-", "_")
        # As in pip itself, the environment takes precedence over its files.
        value = os.environ.get(variable, value)
        variables[variable] = value
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.exists():
                # An index refers to files beside it.
                paths.add(path.parent if word.startswith("file://") else path)
    return variables, sorted(path for path in paths if not str(path).startswith(CERTIFICATES))


def _kill_after(process: "subprocess.Popen[str]", timeout_s: float) -> threading.Timer:
    timer = threading.Timer(timeout_s, process.kill)
    timer.daemon = True
    timer.start()
    return timer
