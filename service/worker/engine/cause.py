"""Explains in one line why an engine failed and what to do about it, from its processes' messages. No I/O.

`RULES` match the messages of vLLM 0.32 and the libraries under it. tests/e2e/test_failed_start.py provokes those that
a machine without a GPU can produce; unit tests have the exact texts of the others (memory, driver, NCCL).
"""

import re
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from logging import ERROR

MAX_TEXT = 300
MAX_KEY = 200


@dataclass(frozen=True)
class Cause:
    """Why an engine failed. `text` and `advice` are one line each, without secrets.

    `key` identifies the kind of failure: the text without numbers and paths. `recurs`: every start with these settings
    fails so, whatever else changes but what is installed. That is not known of what depends on files, on memory or on
    other machines.
    """

    text: str
    # What to do about it; "" if unknown.
    advice: str = ""
    key: str = ""
    recurs: bool = False

    @classmethod
    def of(cls, text: str, advice: str = "", recurs: bool = False) -> "Cause":
        """Makes a cause from a text of any length and shape."""
        line = _one_line(text)
        return cls(_cut(line, MAX_TEXT), advice, _key(line), recurs)

    def __str__(self) -> str:
        return f"{self.text} ({self.advice})" if self.advice else self.text


@dataclass(frozen=True)
class Failure:
    """An exception: its type's name and its text."""

    type: str
    text: str


@dataclass(frozen=True)
class Note:
    """A message of an engine process: a log record of level WARNING or above, or an exception that ended it."""

    pid: int
    process: str
    level: int
    message: str
    # The exception and its causes, outermost first.
    failures: tuple[Failure, ...] = ()
    # Exit codes of the processes that this one started, by name; -N if signal N killed it.
    exit_codes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class _Rule:
    """Matches a failure as "Type: text". The advice may use the pattern's groups, `model` and `holders`."""

    # Not compiled here: the engine's processes import this module too, and never use it.
    pattern: str
    advice: str | Callable[[Mapping[str, str]], str]
    is_about_model: bool = False
    # As in `Cause`.
    recurs: bool = False

    def match(self, failure: Failure) -> re.Match[str] | None:
        return re.search(self.pattern, f"{failure.type}: {failure.text}", re.DOTALL)

    def advise(self, groups: Mapping[str, str]) -> str:
        return self.advice.format_map(groups) if isinstance(self.advice, str) else self.advice(groups)


# Exceptions that only refer to another process's exception.
_POINTERS = (
    r"Engine core initialization failed|Frontend process failed during engine core initialization"
    r"|EngineCore encountered an issue|WorkerProc initialization failed due to an exception in a background process"
    r"|Worker failed with error|^Executor failed|^cancelled$"
)
# How vLLM logs an exception that ends a process; the process survived any other.
_FATAL = r"failed to start|fatal error|WorkerProc failed|uncaught exception"
_DIED = r"Worker proc (?P<name>\S+) died unexpectedly \(exit code: (?P<code>-?\d+)\)"
_NO_EXTENSION = r"'_OpNamespace' '_\w+' object has no attribute|No module named 'vllm\._"
_NOT_LOADED = r"Failed to import from (?P<module>vllm\.\w+):? (?:with )?(?P<why>.*)"
# How argparse begins a message about arguments that it does not know.
_UNRECOGNIZED = "unrecognized arguments:"
_FLAG = r"--[A-Za-z][\w.-]*|-[A-Za-z]{1,3}"
_NUMBER = r"[\d.]+"
# Not part of the arguments, but often copied with them.
_COMMAND = ("vllm", "serve")
# Types whose name adds nothing to the text.
_PLAIN_TYPES = {"Exception", "RuntimeError", "ValueError", "OSError", "ValidationError", "DistNetworkError"}

_UNKNOWN = "the engine's processes ended without an error message"
_SEE_LOG = "The worker's log has the last messages of the engine's processes."
_PACKAGES = {"libnuma": "libnuma1", "libgomp": "libgomp1", "libGL": "libgl1", "libstdc++": "libstdc++6"}
_SIGNALS: Mapping[int, str] = {
    signal.SIGKILL: "If memory ran out (check dmesg | grep -i oom), use a smaller model or a smaller KV cache.",
    signal.SIGBUS: "Usually /dev/shm is full: df -h /dev/shm; in a container raise --shm-size.",
    signal.SIGILL: "This build of vLLM needs instructions that the CPU lacks: on x86, at least AVX2.",
}


def _library(groups: Mapping[str, str]) -> str:
    library = groups["library"]
    if library.startswith("libcuda.so"):
        return "Install the NVIDIA driver; in a container, give it the GPUs (--gpus all)."
    package = _PACKAGES.get(library.split(".so")[0])
    return f"apt-get install {package}" if package else f"Install the package of {library}: apt-file search {library}"


def _gpu_memory(groups: Mapping[str, str]) -> str:
    amounts = f"{groups['needed']} needed, {groups['free']} free of {groups['total']}"
    held = f"; held by {groups['holders']}" if groups["holders"] else ""
    return (
        f"{amounts}{held}. Free it, or lower --gpu-memory-utilization, --max-model-len or --max-num-seqs,"
        " or spread the model with --tensor-parallel-size."
    )


def _gpu_share(groups: Mapping[str, str]) -> str:
    held = f" Held by {groups['holders']}." if groups["holders"] else ""
    share = int(100 * float(groups["free"]) / float(groups["total"])) / 100
    amounts = f"{groups['free']} of {groups['total']} GiB are free"
    return f"{amounts}.{held} Free it, or set --gpu-memory-utilization below {share}."


def _driver(groups: Mapping[str, str]) -> str:
    found = int(groups["found"] or 0)
    version = f" (it supports CUDA {found // 1000}.{found % 1000 // 10})" if found else ""
    return f"Update the NVIDIA driver{version} to one for the CUDA version of this vLLM: nvidia-smi shows both."


_COMPILER = "apt-get install g++ python3-dev"
_MODEL = "BATCH_MODEL must be a folder with config.json and weights, or a name on Hugging Face such as Qwen/Qwen3-0.6B."
_PORT = "Another process uses the port: ss -ltnp 'sport = :{port}' shows which."
_AGAIN = "The model folder is incomplete or damaged: download the model again."
# The first match counts.
RULES = (
    # Libraries and compilers.
    _Rule(r"(?P<library>lib[\w.+-]+?\.so[\w.]*): cannot open shared object file", _library),
    _Rule(_NO_EXTENSION, "vLLM's compiled extension does not load: python -c 'import vllm._C' shows why."),
    _Rule(r"Python\.h: No such file", _COMPILER + " (the headers of the Python that runs vLLM)"),
    _Rule(
        r"No working C\+\+ compiler found|InvalidCxxCompiler",
        _COMPILER + "; or add --enforce-eager to BATCH_ENGINE_ARGS (slower, compiles nothing).",
    ),
    _Rule(r"Failed to find C compiler|Compiler: \S+ is not found", _COMPILER),
    _Rule(
        r"CppCompileError|Command '?\[?'[^' ]*(?:gcc|g\+\+|cc|clang\+*)\b.*returned non-zero exit status",
        "Compiling failed, usually because part of the compiler or Python's headers is missing: " + _COMPILER,
    ),
    # The model.
    _Rule(
        r"gated repo|is gated|Access to model \S+ is restricted",
        "Request access on the model's Hugging Face page, and set HF_TOKEN in the worker's environment.",
        is_about_model=True,
    ),
    _Rule(
        r"not a valid model identifier|Repository Not Found",
        "Check the spelling of BATCH_MODEL; if the model is private, set HF_TOKEN in the worker's environment.",
        is_about_model=True,
    ),
    _Rule(
        r"Invalid user token|Invalid username or password|\b40[13] (?:Client Error|Unauthorized|Forbidden)",
        "Set HF_TOKEN to a valid token of an account with access to the model.",
        is_about_model=True,
    ),
    _Rule(
        r"outgoing traffic has been disabled|Cannot reach \S+ offline mode is enabled|OfflineModeIsEnabled",
        "HF_HUB_OFFLINE is set and the model is not in the cache: unset it, download the model first (hf download"
        " {model}), or set BATCH_MODEL to a folder.",
        is_about_model=True,
    ),
    _Rule(
        r"couldn't connect to '\S+' to load|cannot find the requested files in the local cache",
        "Hugging Face cannot be reached and the model is not in the cache: check network and proxy, or download the"
        " model elsewhere and set BATCH_MODEL to its folder.",
        is_about_model=True,
    ),
    _Rule(r"Repo id must |Invalid repository ID or local directory specified|HFValidationError", _MODEL, True),
    _Rule(
        r"Cannot find any model weights|does not appear to have (?:a file|files) named|not a valid JSON file"
        r"|Error while deserializing|incomplete metadata|PytorchStreamReader",
        _AGAIN,
        is_about_model=True,
    ),
    _Rule(
        r"Model architectures \[.*?\] are not supported|does not recognize this architecture",
        "This version of vLLM cannot run the model: https://docs.vllm.ai/en/latest/models/supported_models.html",
        recurs=True,
    ),
    # Memory.
    _Rule(
        r"out of memory\. Tried to allocate (?P<needed>[\d.]+ \w+)\. GPU \d+ has a total capacity of"
        r" (?P<total>[\d.]+ \w+) of which (?P<free>[\d.]+ \w+) is free",
        _gpu_memory,
    ),
    _Rule(
        r"Free memory on device \S+ \((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup is less than desired GPU",
        _gpu_share,
    ),
    _Rule(
        r"(?:CUDA|HIP) (?:error: )?out of memory",
        "Free GPU memory (nvidia-smi shows what uses it), or lower --gpu-memory-utilization.",
    ),
    _Rule(
        r"No available memory for the cache blocks",
        "The model leaves no memory for the KV cache: raise --gpu-memory-utilization, use a smaller or quantized"
        " model, or spread it with --tensor-parallel-size.",
    ),
    _Rule(
        r"Available memory on node \d+ \((?P<free>[\d.]+)/.*less than requested memory for kv",
        "{free} GiB are free: set VLLM_CPU_KVCACHE_SPACE (GiB) well below that.",
    ),
    _Rule(
        r"Available memory on node \d+ \((?P<free>[\d.]+)/.*less than desired CPU memory utilization",
        "{free} GiB are free: set VLLM_CPU_KVCACHE_SPACE (GiB) well below that, or lower --gpu-memory-utilization.",
    ),
    _Rule(
        r"can't allocate memory|MemoryError|Cannot allocate memory",
        "The machine has too little free memory (free -h): use a smaller model or a smaller KV cache.",
    ),
    _Rule(
        r"To serve at least one request with the model's max seq len .*estimated maximum model length is (?P<most>\d+)",
        "Add --max-model-len {most} (or less) to BATCH_ENGINE_ARGS, or give the KV cache more memory"
        " (--gpu-memory-utilization; on a CPU, VLLM_CPU_KVCACHE_SPACE).",
    ),
    _Rule(
        r"To serve at least one request with the model's max seq len",
        "Lower --max-model-len, or give the KV cache more memory (--gpu-memory-utilization; on a CPU,"
        " VLLM_CPU_KVCACHE_SPACE).",
    ),
    _Rule(
        r"User-specified max_model_len \(\d+\) is greater than the derived max_model_len \(\w+=(?P<most>\d+)",
        "The model supports at most {most} tokens: lower --max-model-len.",
        recurs=True,
    ),
    # Driver and GPUs.
    _Rule(r"driver on your system is too old(?: \(found version (?P<found>\d+)\))?", _driver),
    _Rule(
        r"driver version is insufficient",
        "Update the NVIDIA driver to one for the CUDA version of this vLLM: nvidia-smi shows both.",
    ),
    _Rule(
        r"no kernel image is available",
        "This build of vLLM does not support the GPU: it is too old or too new.",
    ),
    _Rule(
        r"Found no NVIDIA driver|No CUDA GPUs are available|Failed to infer device type|NVML Shared Library Not Found",
        "No GPU is visible: nvidia-smi must work for the worker's user; in a container, give it the GPUs (--gpus all).",
    ),
    # Ray.
    _Rule(
        r"Cannot provide a placement group|Current node has no \w+ available",
        "The Ray cluster has too few free GPUs: ray status shows what is used. This host needs at least one.",
    ),
    # Shared memory before disk: both report that no space is left.
    _Rule(
        r"space in /dev/shm|/dev/shm/\S*.*(?:No space left|size \d+)|(?:No space left).*/dev/shm",
        "Enlarge /dev/shm (mount -o remount,size=2g /dev/shm; in a container --shm-size=2g).",
    ),
    _Rule(
        r"NCCL error.*unhandled system error",
        "Often /dev/shm is too small: df -h /dev/shm; in a container --shm-size=2g. NCCL_DEBUG=INFO logs more.",
    ),
    _Rule(
        r"No space left on device: '(?P<path>[^']+)'",
        "The disk is full: df -h {path}",
    ),
    _Rule(
        r"No space left on device|StorageFull",
        "A disk is full: check BATCH_HOME, ~/.cache (models, compiled code) and /tmp with df -h.",
    ),
    _Rule(r"Disk quota exceeded", "The disk quota of the worker's user is used up."),
    # Ports.
    _Rule(r"port: (?P<port>\d+).*EADDRINUSE", _PORT),
    _Rule(r"Failed to bind to address \S*:(?P<port>\d+)", _PORT),
    _Rule(
        r"EADDRINUSE|[Aa]ddress already in use",
        "Another process uses a port that the worker needs: ss -ltnp shows which.",
    ),
)


def wrong_arguments(message: str, known: Collection[str]) -> Cause:
    """Returns the cause for flags that vLLM's parser refused, suggesting the flags closest to unknown ones."""
    message = _without_input(message)
    before, refused, after = message.partition(_UNRECOGNIZED)
    words = after.split()
    if refused:
        message = f"{before}{refused} {_without_values(words)}"
    # argparse puts quotes around all other values, of which those of flags for secrets are not told.
    message = re.sub(r"(ambiguous option: [^\s=]+=).*(?= could match )", r"\1***", message, flags=re.DOTALL)
    if re.match(rf"(?i)argument \S*{_NAMES}[:/]", message):
        message = re.sub(r"""(["']).*\1""", "***", message, flags=re.DOTALL)
    unknown = re.findall(r"--[\w-]+", after)
    near = [match for flag in unknown for match in get_close_matches(flag, known, n=1)]
    hint = f"Did you mean {' '.join(near)}? " if near else ""
    if words and not words[0].startswith("-"):
        # Most often the rest of a known flag's value.
        hint += "A value with blanks needs quotes. "
    advice = hint + "vLLM's flags: https://docs.vllm.ai/en/latest/cli/serve.html"
    return Cause.of(f"BATCH_ENGINE_ARGS: {message}", advice, recurs=True)


def _without_values(words: Sequence[str]) -> str:
    """Returns refused arguments with flags and, right after a flag, numbers. Everything else may be a secret's.

    An unknown flag may be a misspelt one for a secret, and a word without a flag the rest of a known flag's value.
    """
    shown = []
    for before, word in zip(("", *words), words, strict=False):
        flag, equals, value = word.partition("=")
        if re.fullmatch(_FLAG, flag):
            shown.append(word if not equals or re.fullmatch(_NUMBER, value) else f"{flag}=***")
        else:
            is_number = re.fullmatch(_NUMBER, word) and re.fullmatch(_FLAG, before)
            shown.append(word if is_number or word in _COMMAND else "***")
    return " ".join(shown)


def root(notes: Sequence[Note], raised: Sequence[Failure], exit_codes: Mapping[str, int]) -> tuple[Failure, ...] | None:
    """Returns the root exception and its causes, outermost first; None if nothing is known yet.

    `raised` is the front end's exception. If it only reports that another process failed, the engine core's exception
    counts; if that only refers to the workers, theirs.
    """
    if raised and not _is_pointer(raised):
        return tuple(raised)
    failed = [note for note in notes if note.failures and note.level >= ERROR and not _is_pointer(note.failures)]
    fatal = [note for note in failed if re.search(_FATAL, note.message)]
    core = [note for note in fatal if note.process.startswith("EngineCore")]
    if core:
        return core[-1].failures
    # The first worker to fail shows the reason; the others fail because it is gone. But if the core quotes an
    # exception, that one counts.
    named = " ".join(failure.text for note in notes for failure in note.failures if _is_pointer((failure,)))
    quoted = [note for note in failed if note.failures[0].text and note.failures[0].text in named]
    if quoted or fatal:
        return (quoted[-1] if quoted else fatal[0]).failures
    return _killed(notes, exit_codes) or (failed[-1].failures if failed else None)


def killed(process: str, number: int) -> Failure:
    """Returns the failure of a process that a signal ended."""
    guess = "out of memory?" if number == signal.SIGKILL else _signal_name(number)
    return Failure("Signal", f"{process} was killed by signal {number} ({guess})")


def explain(
    failures: Sequence[Failure],
    notes: Sequence[Note] = (),
    model: str = "",
    gpu_holders: Callable[[], str] = lambda: "",
) -> Cause:
    """Explains an exception and its causes (outermost first) in one line, with advice if the cause is known.

    `notes` may contain a warning with more detail. `gpu_holders` is called only when GPU memory ran out.
    """
    failures = [_with_warning(failure, notes) for failure in failures] or [Failure("Exception", _UNKNOWN)]
    for failure in failures:
        text = _text(failure)
        for rule in RULES:
            if (match := rule.match(failure)) is None:
                continue
            groups = {name: value or "" for name, value in match.groupdict().items()}
            holders = gpu_holders() if rule.advice in (_gpu_memory, _gpu_share) else ""
            about = f"{model}: " if rule.is_about_model and model and model not in text else ""
            return Cause.of(about + text, rule.advise(groups | {"model": model, "holders": holders}), rule.recurs)
        if failure.type == "Signal":
            number = int(re.findall(r"signal (\d+)", failure.text)[0])
            return Cause.of(text, _SIGNALS.get(number, _SEE_LOG))
    is_told = failures[0].text != _UNKNOWN and not _is_pointer(failures)
    return Cause.of(_text(failures[0]), "" if is_told else _SEE_LOG)


def _is_pointer(failures: Sequence[Failure]) -> bool:
    return bool(failures and re.search(_POINTERS, failures[0].text))


def _killed(notes: Sequence[Note], exit_codes: Mapping[str, int]) -> tuple[Failure] | None:
    """Returns the process that a signal ended; one that vLLM itself ended (SIGTERM) only if there is no other."""
    codes: dict[str, int] = {}
    for note in notes:
        if died := re.match(_DIED, note.message):
            codes[died["name"]] = int(died["code"])
        codes |= note.exit_codes
    by_signal = {name: -code for name, code in [*codes.items(), *exit_codes.items()] if code < 0}
    for name, number in sorted(by_signal.items(), key=lambda item: item[1] == signal.SIGTERM):
        return (killed(name, number),)
    return None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "real-time"


def _with_warning(failure: Failure, notes: Sequence[Note]) -> Failure:
    """Replaces an error about the extension by vLLM's warning, which alone names the missing library."""
    if re.search(_NO_EXTENSION, failure.text):
        for note in reversed(notes):
            if not_loaded := re.match(_NOT_LOADED, note.message, re.DOTALL):
                why = re.sub(r"^\w+\('(.*)'\)$", r"\1", not_loaded["why"])
                return Failure("ImportError", f"{not_loaded['module']} does not load: {why}")
    return failure


def _without_input(text: str) -> str:
    # pydantic appends the input, which may contain anything, and a URL.
    return re.sub(r"\s*\[type=\w+, input_value=.*", "", text, flags=re.DOTALL)


def _text(failure: Failure) -> str:
    text = _without_input(failure.text.strip())
    text = re.sub(r"^\d+ validation errors? for \w+\s+(?:Value error, )?", "", text)
    # inductor's compiler errors begin with a command of many lines and name a file with a long path.
    text = re.sub(r"Command:.*?Output:\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"\S+:\d+:\d+: (?=(?:fatal )?error:)", "", text)
    if failure.type in _PLAIN_TYPES or failure.type == "Signal":
        return text or failure.type
    return f"{failure.type}: {text}" if text else failure.type


_NAMES = r"(?:(?:api|access|private)[_-]?key|token|passw(?:or)?d|passphrase|secret|credentials?|authorization)"
# In quotes, also escaped ones; a list; or one word.
_VALUE = r"""(?:\\*"[^"]*"?|\\*'[^']*'?|\[[^\]]*\]?|[^\s"',;&]+)"""
_SECRETS = (
    (r"\bhf_\w{8,}", "hf_***"),
    (r"(?i)\b(bearer +)[\w.~+/-]+=*", r"\1***"),
    (rf"""(?i)({_NAMES}[\\"']*\s*[:=]\s*)(?:(?:bearer|basic|token)\s+)?{_VALUE}""", r"\1***"),
    # A flag's value follows after a blank; in a list of arguments, after a comma.
    (rf"""(?i)(--[\w-]*{_NAMES}["']?[\s,]+)(?!["']?-){_VALUE}""", r"\1***"),
    (r"""//(?:[^\s/@:"']*:[^\s"']*|[^\s/"']+)@""", "//***@"),
)


def _one_line(text: str) -> str:
    for pattern, instead in _SECRETS:
        text = re.sub(pattern, instead, text)
    # Drop terminal escapes and characters that jsonb does not accept.
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def _cut(line: str, length: int) -> str:
    return line if len(line) <= length else line[: length - 1] + "…"


def _key(line: str) -> str:
    line = re.sub(r"(?<![\w/])(?:~|\.{1,2})?/[^\s'\",:;)\]]+", "PATH", line)
    line = re.sub(r"0x[0-9a-fA-F]+|\b[0-9a-f]{12,}\b", "N", line)
    return re.sub(r"\d+(?:\.\d+)?", "N", line)[:MAX_KEY]
