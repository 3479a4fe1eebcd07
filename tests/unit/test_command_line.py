"""The command's own part: what it refuses before any call, and the standard streams that a shell has closed."""

import io
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from unittest.mock import Mock

import grpc
import pytest
from click.testing import CliRunner
from rich.progress import DownloadColumn

from vllm_batch import CallError, Client
from vllm_batch.cli import batches, main, overview, results, submit, terminal
from vllm_batch.cli.options import OUTPUT_FILE
from vllm_batch.cli.status import hosts_text
from vllm_batch.v1 import batch_service_pb2 as pb
from vllm_batch.v1 import host_service_pb2 as hpb

CLI = Path(sys.executable).parent / "vllm-batch"


def closed(*numbers: int) -> Callable[[], None]:
    """What closes these descriptors in the child, as `>&-` in a shell does."""

    def close() -> None:
        for number in numbers:
            os.close(number)

    return close


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "batch.jsonl"
    path.write_text("{}\n")
    return str(path)


@pytest.mark.parametrize("number", ["nan", "-nan", "inf", "-1", "1e300", "0"])
@pytest.mark.parametrize("option", ["--window", "--patience"])
def test_what_is_no_number_of_seconds(file: str, option: str, number: str) -> None:
    """NaN and numbers out of range are usage errors, whatever they are compared with."""
    command = {"--window": ["submit", file, option, number], "--patience": [option, number, "submit", "--help"]}[option]
    is_refused = option == "--window" or number in ("nan", "-nan", "-1")
    assert CliRunner().invoke(main, command).exit_code == (2 if is_refused else 0)


@pytest.mark.parametrize("command", [["submit", "FILE", "--wait"], ["results", "batch_1"]])
def test_an_output_without_a_name(file: str, command: list[str]) -> None:
    """An empty name, as of a variable that is not set, is a usage error and not the working directory."""
    given = [file if argument == "FILE" else argument for argument in command]
    found = CliRunner().invoke(main, [*given, "-o", ""])
    assert (found.exit_code, "must not be empty" in found.output) == (2, True)


@pytest.mark.parametrize("kind", ["same", "symlink", "link", "stdin"])
def test_an_output_is_not_the_input(file: str, tmp_path: Path, kind: str) -> None:
    """Results never replace the requests that they are for, under whichever name."""
    other = tmp_path / "other"
    if kind == "symlink":
        other.symlink_to(file)
    elif kind == "link":
        other.hardlink_to(file)
    output = str(other) if kind.endswith("link") else file
    with open(file, "rb") as stdin:
        command = [CLI, "submit", "-" if kind == "stdin" else file, "--wait", "-o", output]
        done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "is the file that is submitted" in done.stderr) == (2, True)
    assert Path(file).read_text() == "{}\n"


def test_an_output_in_a_folder_that_is_not_there(file: str, tmp_path: Path) -> None:
    """What ends with a slash is no file: none of that name is made."""
    found = CliRunner().invoke(main, ["submit", file, "--wait", "-o", f"{tmp_path}/results/"])
    assert (found.exit_code, "names a folder" in found.output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["batch.jsonl"]


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "FILE"])
def test_an_output_that_is_stdout(file: str, tmp_path: Path, name: str) -> None:
    """Results follow what others have written to the file behind stdout, and what others write then follows them."""
    program = (
        "import sys; from vllm_batch.cli import options, results; "
        "results._write_file(options.OUTPUT_FILE.convert(sys.argv[1], None, None), [b'2\\n', b'3\\n'])"
    )
    with open(file, "wb") as stdout:
        stdout.write(b"1\n")
        stdout.flush()
        command = [sys.executable, "-c", program, name.replace("FILE", file)]
        subprocess.run(command, stdout=stdout, cwd=tmp_path, check=True, timeout=60)
        stdout.seek(0, os.SEEK_CUR)
        os.write(stdout.fileno(), b"4\n")
    assert Path(file).read_bytes() == b"1\n2\n3\n4\n"
    assert [path.name for path in tmp_path.iterdir()] == ["batch.jsonl"]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "😀" * 63])
def test_an_output_with_the_longest_name(tmp_path: Path, name: str) -> None:
    """A name may be as long as the file system takes it, although a longer one stands for it until it is complete."""
    results._write_file(OUTPUT_FILE.convert(str(tmp_path / name), None, None), [b"{}\n"])
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"{}\n")]


def test_a_stdin_that_was_partly_read(file: str) -> None:
    """What another command has read of a file behind stdin is not submitted."""
    Path(file).write_bytes(b"a\nb\nc\n")
    with open(file, "rb", buffering=0) as raw:
        raw.read(2)
        with open(raw.fileno(), "rb", closefd=False) as stdin, submit._seekable(stdin) as (source, size):
            source.seek(0)
            assert (source.read(), size) == (b"b\nc\n", 4)


def test_a_full_disk_for_temporary_files(tmp_path: Path) -> None:
    """A pipe that does not fit there ends with one line that names the folder and the variable."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    env = os.environ | {"TMPDIR": str(tmp_path)}
    command = [CLI, "submit", "-"]
    done = subprocess.run(command, input=b"x" * 1_000_000, capture_output=True, env=env, preexec_fn=limit, timeout=60)
    assert done.returncode == 5
    assert done.stderr.decode().startswith(f"{tmp_path}: File too large: <stdin> is copied there first; TMPDIR can")


def test_a_file_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several files, the line says which one failed."""
    monkeypatch.setattr(Client, "submit", lambda _, file, **__: file.read())
    found = CliRunner().invoke(main, ["submit", "/proc/self/mem"])
    assert (found.exit_code, found.stderr) == (5, "/proc/self/mem: Input/output error\n")


@pytest.mark.parametrize("others", [(), (0,), (2,), (0, 2)])
@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_a_closed_stdout_is_an_error(argument: str, others: tuple[int, ...]) -> None:
    """Without a stdout a command that prints there ends with 5 and one line: not with 0, nor with a traceback."""
    done = subprocess.run([CLI, argument], preexec_fn=closed(1, *others), stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 5
    assert done.stderr == (b"" if 2 in others else b"Bad file descriptor\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_stdout_is_an_error_of_help_too(unbuffered: str) -> None:
    """What is printed before any command runs may fail like the rest, also where Python keeps it in a buffer."""
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        done = subprocess.run([CLI, "--help"], stdout=full, stderr=subprocess.PIPE, timeout=60, env=env)
    assert (done.returncode, done.stderr) == (5, b"No space left on device\n")


@pytest.mark.parametrize("numbers", [(0,), (1,), (2,), (0, 1, 2)])
def test_nothing_takes_the_place_of_a_closed_stream(tmp_path: Path, numbers: tuple[int, ...]) -> None:
    """A file that is opened later does not get the number of a stream that was closed, to which libraries write."""
    program = (
        "import sys; from vllm_batch.cli.terminal import restore_streams; restore_streams(); "
        "file = open(sys.argv[1], 'w'); file.write(str(file.fileno()))"
    )
    made = tmp_path / "number"
    subprocess.run([sys.executable, "-c", program, made], preexec_fn=closed(*numbers), check=True, timeout=60)
    assert int(made.read_text()) > 2


def test_two_commands_that_write_the_same_output(tmp_path: Path) -> None:
    """Each output is complete, of whichever command: what is under the name can be trusted at any moment."""
    output = tmp_path / "out.jsonl"

    def lines() -> Iterator[bytes]:
        yield b"a1\n"
        results._write_file(output, [b"b1\n", b"b2\n"])
        assert output.read_bytes() == b"b1\nb2\n"
        yield b"a2\n"

    results._write_file(output, lines())
    assert output.read_bytes() == b"a1\na2\n"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_an_output_that_is_broken_off_by_a_signal(tmp_path: Path, ending: signal.Signals) -> None:
    """`timeout`, a scheduler or a terminal that is closed leave nothing of a file that is not complete."""
    program = (
        "import sys; from pathlib import Path; from vllm_batch.cli import results; "
        "results._write_file(Path(sys.argv[1]), iter(lambda: (print(flush=True), input().encode())[1], b'end'))"
    )
    command = [sys.executable, "-c", program, tmp_path / "out.jsonl"]

    def heed() -> None:
        # Under nohup it is ignored.
        signal.signal(ending, signal.SIG_DFL)

    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=heed) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(ending)
        assert process.wait(30) == 128 + ending
    assert list(tmp_path.iterdir()) == []


def test_an_output_over_a_link(tmp_path: Path) -> None:
    """The file behind a link is written, also one that is not there yet, and the link stays."""
    for name in ("old", "new"):
        link, there = tmp_path / f"link to {name}", tmp_path / "folder" / name
        there.parent.mkdir(exist_ok=True)
        link.symlink_to(there)
        found = OUTPUT_FILE.convert(str(link), None, None)
        results._write_file(found, [f"{name}\n".encode()])
        assert (link.is_symlink(), there.read_text()) == (True, f"{name}\n")
        assert list(there.parent.glob("*.part")) == []


def test_an_output_keeps_who_may_read_it(tmp_path: Path) -> None:
    """A file that others may not read is replaced by one that they may not read either, from its first byte on."""
    output = tmp_path / "out.jsonl"
    output.touch(0o600)

    def lines() -> Iterator[bytes]:
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
        yield b"secret\n"

    results._write_file(output, lines())
    assert (output.read_bytes(), output.stat().st_mode & 0o777) == (b"secret\n", 0o600)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_stdout_does_not_have(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is printed with escapes for what the terminal's encoding lacks, and no command fails of it."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    terminal.restore_streams()
    terminal.Terminal().print("k 🚀")
    sys.stdout.flush()
    assert raw.getvalue() == b"k \\U0001f680\n"


@pytest.mark.parametrize(
    "command", [["get", "\udcff"], ["list", "--tenant", "a\udcff"], ["result", "batch_1", "\udce9"]]
)
def test_arguments_that_are_not_utf8(command: list[str]) -> None:
    """What cannot be sent is a usage error that shows it."""
    done = subprocess.run([CLI, "--patience", "0", *command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"Error: {command[-1]!r} is not UTF-8\n")


def test_an_interrupt_during_the_imports(tmp_path: Path) -> None:
    """Ctrl-C before the command has begun ends it by the signal, without a traceback."""
    (tmp_path / "click.py").write_text("import sys; print('here', flush=True); sys.stdin.read()")
    command = [sys.executable, "-c", "from vllm_batch.command import main; main()"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (-signal.SIGINT, b"")


def test_a_file_whose_name_looks_like_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is shown as it is, and does not end the upload."""
    shown = io.StringIO()
    monkeypatch.setattr(terminal, "err", terminal.Terminal(file=shown, force_terminal=True, width=200))
    with terminal.progress_bar(DownloadColumn()) as progress:
        progress.add_task("uploading a[/b].jsonl", total=1)
    assert "uploading a[/b].jsonl" in shown.getvalue()


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    found = [tmp_path / f"{number}.jsonl" for number in range(4)]
    for path in found:
        path.write_text("{}\n")
    return [str(path) for path in found]


def test_files_are_opened_one_by_one(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many files are given, and however few a process may have open, each is closed before the next is read."""
    taken: list[BinaryIO] = []

    def take(_: Client, file: BinaryIO, **__: object) -> pb.Batch:
        assert all(before.closed for before in taken)
        taken.append(file)
        return pb.Batch(id=f"batch_{len(taken)}")

    monkeypatch.setattr(Client, "submit", take)
    found = CliRunner().invoke(main, ["submit", *files])
    assert (found.exit_code, found.stdout) == (0, "batch_1\nbatch_2\nbatch_3\nbatch_4\n")
    found = CliRunner().invoke(main, ["submit", *files, "missing.jsonl"])
    assert (found.exit_code, "'missing.jsonl' does not exist" in found.stderr, len(taken)) == (2, True, 4)


class Unanswered(grpc.RpcError):
    """What gRPC raises where nobody answers."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "no connection"

    def trailing_metadata(self) -> None:
        return None


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (CallError(Unanswered()), 4)])
def test_what_may_be_stored_can_be_submitted_again(
    files: list[str], error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A submission or retry that is broken off or unanswered names the key under which it is stored once; of several
    files it says which are stored."""
    keys: list[str] = []

    def fail(_: Client, given: object, request_id: str = "", **__: object) -> pb.Batch:
        keys.append(request_id)
        if len(keys) == 2:
            raise error
        return pb.Batch(id="batch_1")

    monkeypatch.setattr(Client, "submit", fail)
    monkeypatch.setattr(Client, "retry", fail)
    found = CliRunner().invoke(main, ["submit", *files])
    assert (found.exit_code, found.stdout, len(set(keys))) == (status, "batch_1\n", 2)
    assert f"{files[1]} may or may not be stored: repeat it with --request-id {keys[1]}," in found.stderr
    assert f"1 of 4 files are stored for certain; those after {files[1]} were not sent" in found.stderr
    keys[:] = [""]
    found = CliRunner().invoke(main, ["retry", "batch_1"])
    assert found.exit_code == status
    assert f"the new batch may or may not be stored: repeat it with --request-id {keys[1]}," in found.stderr


@pytest.mark.parametrize("found", [CallError(Unanswered()), [hpb.Host(name="one", state=hpb.HOST_STATE_ALIVE)]])
def test_status_says_nothing_of_one_host(found: CallError | list[hpb.Host], monkeypatch: pytest.MonkeyPatch) -> None:
    """`status` has no line on hosts for callers that may not ask for them, nor where there is only one."""
    monkeypatch.setattr(Client, "hosts", Mock(side_effect=[found]))
    monkeypatch.setattr(sys.modules["vllm_batch.cli.status"], "ask_gateway", Mock(return_value=overview.Gateway()))
    monkeypatch.setattr(sys.modules["vllm_batch.cli.status"], "ask_watchdog", Mock(return_value=overview.Watchdog()))
    shown = CliRunner().invoke(main, ["status"])
    assert (shown.exit_code, "hosts" in shown.stdout, "accepts new work" in shown.stdout) == (0, False, True)


def test_status_names_few_of_many_hosts() -> None:
    """Hosts that are lost or were stopped are named, of many the first ones."""
    lost = [hpb.Host(name=f"l{number}", state=hpb.HOST_STATE_LOST) for number in range(7)]
    others = [hpb.Host(name="a", state=hpb.HOST_STATE_ALIVE), hpb.Host(name="s", state=hpb.HOST_STATE_STOPPED)]
    text = hosts_text([*others, *lost])
    assert text == "1 of 9 there; lost: l0, l1, l2, l3, l4 and 2 more; stopped: s (vllm-batch hosts)"


def test_an_interrupt_outside_of_calls(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a command with 130 at any moment, also where it calls nobody."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "get", lambda *_: pb.Batch())
    monkeypatch.setattr(Client, "cancel", lambda *_: pb.Batch())
    monkeypatch.setattr(batches, "details", interrupt)
    monkeypatch.setattr(batches, "print_batch", lambda *_: None)
    found = CliRunner().invoke(main, ["get", "batch_1"])
    assert (found.exit_code, found.output) == (130, "")
    monkeypatch.setattr(Client, "close", interrupt)
    found = CliRunner().invoke(main, ["cancel", "batch_1"])
    assert (found.exit_code, found.output) == (130, "")


def test_interrupted_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while results are read says how to read them again, also of a batch that has ended."""

    def interrupt(*_: object, **__: object) -> Iterator[bytes]:
        yield b"{}\n"
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "result_bytes", interrupt)
    found = CliRunner().invoke(main, ["results", "batch_1"])
    assert (found.exit_code, found.stdout) == (130, "{}\n")
    assert found.stderr == "\ninterrupted; the results stay stored: vllm-batch results batch_1 -o FILE\n"


def test_no_answer_names_tls() -> None:
    """Where nothing answers the advice names TLS: a server that requires it closes the connection without a word."""
    command = [CLI, "--target", "127.0.0.1:1", "--patience", "0", "list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "--tls-ca" in done.stderr) == (terminal.EXIT_UNAVAILABLE, True), done.stderr
