"""Root cause, one-line text and advice for the errors of vLLM, torch, CUDA and Hugging Face.

GPU errors cannot be provoked without a GPU: the tests have their exact texts from torch, CUDA, NCCL and vLLM.
"""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.worker.engine import cause
from service.worker.engine.cause import MAX_TEXT, Cause, Failure, Note

FRONT_END = (
    Failure(
        "RuntimeError",
        "Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}",
    ),
)
WORKERS_FAILED = Failure(
    "Exception",
    "WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.",
)
CONSERVING = "See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
MAX_SEQ_LEN = (
    "To serve at least one request with the model's max seq len (40960), (4.38 GiB KV cache is needed, which is larger"
    " than the available KV cache memory (1.5 GiB). Based on the available memory, the estimated maximum model length"
    " is 14016. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the CPU backend) or"
    f" decreasing `max_model_len` when initializing the engine. {CONSERVING}"
)
OUT_OF_GPU_MEMORY = (
    "CUDA out of memory. Tried to allocate 786.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 140.75 MiB is"
    " free. Process 3270336 has 78.96 GiB memory in use. Of the allocated memory 68.83 GiB is allocated by PyTorch,"
    " with 660.00 MiB allocated in private pools (e.g., CUDA Graphs), and 331.08 MiB is reserved by PyTorch but"
    " unallocated. If reserved but unallocated memory is large try setting"
    " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
NO_PYTHON_HEADERS = (
    "CppCompileError: C++ compile error\n\nCommand:\ng++ /root/.cache/vllm/x.main.cpp -D TORCH_INDUCTOR_CPP_WRAPPER"
    f" {'-I/opt/include ' * 200}\n\nOutput:\n/{'x' * 400}/x.main.cpp:80:10: fatal error: Python.h: No such file or"
    " directory\n   80 | #include <Python.h>\n      |          ^~~~~~~~~~\ncompilation terminated.\n"
)
DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading"
    " and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to:"
    " https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
GATED = (
    "You are trying to access a gated repo.\nMake sure to have access to it at"
    " https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct.\n401 Client Error. (Request ID: Root=1-695139c1-20c)\n\n"
    "Cannot access gated repo for url https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct/resolve/main/config.json."
    "\nAccess to model meta-llama/Llama-3.2-1B-Instruct is restricted. Please log in."
)
NOT_LISTED = (
    "Qwen/Qwen9 is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'\n"
    "If this is a private repository, make sure to pass a token having permission to this repo either by logging in"
    " with `hf auth login` or by passing `token=<your_token>`"
)
NO_SUCH_FOLDER = (
    "1 validation error for ModelConfig\n  Value error, Invalid repository ID or local directory specified: '/models/q'"
    ".\nPlease verify the following requirements:\n1. Provide a valid Hugging Face repository ID.\n2. Specify a local"
    " directory that contains a recognized configuration file.\n [type=value_error, input_value=ArgsKwargs((),"
    " {'model': ..., 'hf_token': 'x'}), input_type=ArgsKwargs]\n    For further information visit https://errors.pydantic.dev/2/v"
)

# Type and text of an exception, words of the cause, words of the advice.
KNOWN = {
    "missing library": (
        ("ImportError", "libGL.so.1: cannot open shared object file: No such file or directory"),
        "libGL.so.1",
        "apt-get install libgl1",
    ),
    "missing library of an unknown package": (
        ("OSError", "libfoo.so.3: cannot open shared object file: No such file or directory"),
        "libfoo.so.3",
        "apt-file search libfoo.so.3",
    ),
    "missing driver": (
        ("ImportError", "libcuda.so.1: cannot open shared object file: No such file or directory"),
        "libcuda.so.1",
        "Install the NVIDIA driver",
    ),
    "no C++ compiler": (
        (
            "InductorError",
            "InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')",
        ),
        "No working C++ compiler found",
        "or add --enforce-eager",
    ),
    "no C compiler": (
        (
            "RuntimeError",
            "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl.",
        ),
        "Failed to find C compiler",
        "apt-get install g++",
    ),
    "no Python headers": (
        ("InductorError", NO_PYTHON_HEADERS),
        "InductorError: CppCompileError: C++ compile error fatal error: Python.h: No such file or directory",
        "python3-dev",
    ),
    "no Python headers for Triton": (
        (
            "CalledProcessError",
            "Command '['/usr/bin/gcc', '/tmp/tmpw1/cuda_utils.c', '-O3', '-shared', '-fPIC', '-o',"
            " '/tmp/tmpw1/cuda_utils.so']' returned non-zero exit status 1.",
        ),
        "cuda_utils.c",
        "python3-dev",
    ),
    "model not found": (("ValidationError", NO_SUCH_FOLDER), "'/models/q'", "must be a folder with config.json"),
    "model not on the hub": (
        ("OSError", NOT_LISTED),
        "Qwen/Qwen9 is not a local folder",
        "the spelling of BATCH_MODEL",
    ),
    "hub unreachable": (
        (
            "OSError",
            "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the cached"
            " files.\nCheck your internet connection or see how to run the library in offline mode at"
            " 'https://huggingface.co/docs/transformers/installation#offline-mode'.",
        ),
        "org/model: We couldn't connect",
        "Hugging Face cannot be reached",
    ),
    "hub offline": (
        (
            "LocalEntryNotFoundError",
            "Cannot find an appropriate cached snapshot folder for the specified revision on the local disk and"
            " outgoing traffic has been disabled. To enable repo look-ups and downloads online, pass"
            " 'local_files_only=False' as input.",
        ),
        "org/model: LocalEntryNotFoundError",
        "hf download org/model",
    ),
    "gated": (("OSError", GATED), "gated repo", "set HF_TOKEN"),
    "wrong token": (("OSError", "401 Client Error. Invalid user token."), "Invalid user token", "a valid token"),
    "incomplete model": (("RuntimeError", "Cannot find any model weights with `/models/q`"), "/models/q", "download"),
    "out of GPU memory": (
        ("OutOfMemoryError", OUT_OF_GPU_MEMORY),
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 786.00 MiB",
        "786.00 MiB needed, 140.75 MiB free of 79.11 GiB; held by GPU 0: 70.0 GiB by python3 (pid 4711). Free it",
    ),
    "GPU memory of others": (
        (
            "ValueError",
            "Free memory on device cuda:0 (9.3/79.11 GiB) on startup is less than desired GPU memory utilization (0.92,"
            " 72.78 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        ),
        "Free memory on device cuda:0",
        "9.3 of 79.11 GiB are free. Held by GPU 0: 70.0 GiB by python3 (pid 4711). Free it, or set"
        " --gpu-memory-utilization below 0.11.",
    ),
    "out of GPU memory, without amounts": (
        ("RuntimeError", "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        "CUDA error: out of memory",
        "nvidia-smi",
    ),
    "no memory for the cache": (
        (
            "ValueError",
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the"
            " engine (this flag also controls CPU memory reservation on the CPU backend, despite its name).",
        ),
        "No available memory for the cache blocks",
        "raise --gpu-memory-utilization",
    ),
    "out of CPU memory": (
        (
            "ValueError",
            "Available memory on node 0 (8.63/9.84 GiB) on kv cache allocation is less than requested memory for kv"
            " (4000.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by"
            " other processes.",
        ),
        "4000.0 GiB",
        "8.63 GiB are free: set VLLM_CPU_KVCACHE_SPACE",
    ),
    "CPU share": (
        (
            "ValueError",
            "Available memory on node 0 (3.1/23.4 GiB) on startup is less than desired CPU memory utilization (0.92,"
            " 21.5 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction of CPU memory",
        ),
        "desired CPU memory utilization",
        "3.1 GiB are free",
    ),
    "allocation": (
        (
            "RuntimeError",
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
            " allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)",
        ),
        "can't allocate memory",
        "free -h",
    ),
    "max-model-len over the cache": (
        ("ValueError", MAX_SEQ_LEN),
        "max seq len (40960)",
        "Add --max-model-len 14016 (or less) to BATCH_ENGINE_ARGS",
    ),
    "max-model-len over the cache, nothing fits": (
        ("ValueError", MAX_SEQ_LEN.replace("estimated maximum model length", "x")),
        "max seq len (40960)",
        "Lower --max-model-len",
    ),
    "driver too old": (("RuntimeError", DRIVER), "driver on your system is too old", "it supports CUDA 12.2"),
    "driver too old for the runtime": (
        ("RuntimeError", "CUDA driver version is insufficient for CUDA runtime version"),
        "insufficient",
        "Update the NVIDIA driver",
    ),
    "no GPU": (("RuntimeError", "No CUDA GPUs are available"), "No CUDA GPUs", "--gpus all"),
    "no GPU seen by vLLM": (
        (
            "RuntimeError",
            "Failed to infer device type, please set the environment variable `VLLM_LOGGING_LEVEL=DEBUG` to turn on"
            " verbose logging to help debug the issue.",
        ),
        "Failed to infer device type",
        "nvidia-smi must work",
    ),
    "GPU too old": (
        ("AcceleratorError", "CUDA error: no kernel image is available for execution on the device"),
        "no kernel image",
        "too old",
    ),
    "small /dev/shm": (
        (
            "RuntimeError",
            "Insufficient space in /dev/shm for shared-memory allocation: 160 MiB required, 64 MiB free. Increase"
            " /dev/shm (e.g. --shm-size or --ipc=host).",
        ),
        "160 MiB required",
        "--shm-size=2g",
    ),
    "small /dev/shm for NCCL": (
        (
            "DistBackendError",
            "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, unhandled system error (run with"
            " NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclSystemError: System call (e.g. socket, malloc) or"
            " external library call failed or device error.\nLast error:\nError while creating shared memory segment"
            " /dev/shm/nccl-a1b2c3 (size 9637888)",
        ),
        "NCCL error",
        "/dev/shm",
    ),
    "disk full": (
        ("OSError", "[Errno 28] No space left on device: '/root/.cache/vllm/x'"),
        "No space left",
        "df -h /root/.cache/vllm/x",
    ),
    "disk full, anywhere": (
        ("SafetensorError", "Error while serializing: I/O error: No space left on device (os error 28)"),
        "No space left",
        "A disk is full",
    ),
    "port of torch": (
        (
            "DistNetworkError",
            "The server socket has failed to listen on any local network address. port: 56065, useIpv6: false, code:"
            " -98, name: EADDRINUSE, message: address already in use",
        ),
        "EADDRINUSE",
        "ss -ltnp 'sport = :56065'",
    ),
    "port of ours": (
        ("RuntimeError", "Failed to bind to address 127.0.0.1:50052; set GRPC_VERBOSITY=debug environment variable"),
        "Failed to bind",
        "ss -ltnp 'sport = :50052'",
    ),
    "port, unknown": (("OSError", "[Errno 98] Address already in use"), "Address already in use", "ss -ltnp"),
    "unsupported model": (
        (
            "ValidationError",
            "Value error, Model architectures ['X'] are not supported for now. Supported: dict_keys([])",
        ),
        "['X']",
        "supported_models",
    ),
}


def note(process: str, message: str, *failures: Failure, level: int = logging.ERROR, **exit_codes: int) -> Note:
    """A note as an engine process writes it."""
    return Note(1, process, level, message, failures, exit_codes)


@pytest.mark.parametrize("kind", KNOWN)
def test_known_causes_have_advice(kind: str) -> None:
    """Each known error becomes one short line that keeps the essentials, and its advice uses the amounts named."""
    (name, text), words, advice = KNOWN[kind]
    holders = "GPU 0: 70.0 GiB by python3 (pid 4711)"
    found = cause.explain([Failure(name, text)], model="org/model", gpu_holders=lambda: holders)
    assert words in found.text
    assert advice in found.advice
    assert len(found.text) <= MAX_TEXT
    assert "\n" not in found.text + found.advice


@pytest.mark.parametrize("kind", KNOWN)
def test_what_recurs(kind: str) -> None:
    """Only what settings and the installed vLLM decide alone recurs; files, memory and machines may be others later."""
    assert cause.explain([Failure(*KNOWN[kind][0])]).recurs is (kind in ("unsupported model", "length over the model"))


def test_unknown_cause_is_told_without_advice() -> None:
    """An unknown error is passed on as it is, prefixed with its type where that adds information."""
    assert cause.explain([Failure("IndexError", "list index out of range")]) == Cause.of(
        "IndexError: list index out of range"
    )
    assert cause.explain([Failure("ValueError", "something new")]).text == "something new"


def test_library_is_named_by_an_earlier_warning() -> None:
    """vLLM only warns when its extension does not load and fails later because of it: the warning names the cause."""
    warning = note(
        "EngineCore",
        "Failed to import from vllm._C: ImportError('libnuma.so.1: cannot open shared object file: No such file')",
        level=logging.WARNING,
    )
    failed = Failure("AttributeError", "'_OpNamespace' '_C' object has no attribute 'init_cpu_memory_env'")
    found = cause.explain([failed], [warning])
    assert found.text.startswith("ImportError: vllm._C does not load: libnuma.so.1: cannot open shared object file")
    assert found.advice == "apt-get install libnuma1"
    assert "import vllm._C" in cause.explain([failed], []).advice


def test_cause_of_a_cause_is_known_too() -> None:
    """Advice is also found for an exception beneath the one that was raised."""
    found = cause.explain(
        [Failure("BackendError", "it broke"), Failure("OSError", "[Errno 28] No space left on device")]
    )
    assert (found.text, found.advice[:14]) == ("[Errno 28] No space left on device", "A disk is full")


def test_what_the_front_end_raises_itself_is_the_root() -> None:
    """An error that the front end raises before any process starts is the root cause itself."""
    raised = (Failure("OSError", GATED),)
    assert cause.root([note("EngineCore", "EngineCore failed to start.", Failure("X", "y"))], raised, {}) == raised


def test_root_is_the_cores_exception() -> None:
    """When the front end points to the core, the root is the exception that ended the core, not one it survived."""
    notes = [
        note("EngineCore", "Failed to load plugin x", Failure("ImportError", "no x")),
        note("EngineCore", "EngineCore failed to start.", Failure("ValueError", MAX_SEQ_LEN)),
    ]
    assert cause.root(notes, FRONT_END, {}) == (Failure("ValueError", MAX_SEQ_LEN),)


def test_root_is_the_first_workers_exception() -> None:
    """When the core points to its workers, the first worker's exception is the root; the others fail in its wake."""
    first, second = Failure("OutOfMemoryError", OUT_OF_GPU_MEMORY), Failure("DistBackendError", "NCCL: remote is gone")
    notes = [
        note("VllmWorker-1", "WorkerProc failed to start.", first),
        note("VllmWorker-0", "WorkerProc failed to start.", second),
        note("EngineCore", "EngineCore failed to start.", WORKERS_FAILED),
    ]
    assert cause.root(notes, FRONT_END, {"EngineCore": 1}) == (first,)


def test_root_of_a_later_death_is_the_exception_that_the_core_names() -> None:
    """When a running engine dies, an earlier failure that it survived is not taken for the cause."""
    old, new = Failure("ValueError", "no such adapter"), Failure("RuntimeError", "CUDA error: an illegal memory access")
    pointer = Failure(
        "RuntimeError", f"Worker failed with error '{new.text}', please check the stack trace above for the root cause"
    )
    notes = [
        note("VllmWorker-0", "WorkerProc hit an exception.", old),
        note("VllmWorker-0", "WorkerProc hit an exception.", new),
        note("EngineCore", "EngineCore encountered a fatal error.", pointer),
    ]
    assert cause.root(notes, (), {}) == (new,)


ENDED = {"VllmWorker-1": -15, "VllmWorker-0": -9}
DIED = "Worker proc VllmWorker-0 died unexpectedly (exit code: -9), shutting down executor."
SURVIVED = note("EngineCore", "Invocation of add_lora method failed", Failure("ValueError", "long ago"))


@pytest.mark.parametrize(
    ("notes", "exit_codes", "name"),
    [
        ([], {"EngineCore": -9}, "EngineCore"),
        (
            [note("EngineCore", "EngineCore failed to start.", WORKERS_FAILED, **ENDED)],
            {"EngineCore": 1},
            "VllmWorker-0",
        ),
        ([note("EngineCore", DIED)], {"EngineCore": 1}, "VllmWorker-0"),
        ([SURVIVED], {"EngineCore": -9}, "EngineCore"),
    ],
)
def test_killed_process_is_named(notes: list[Note], exit_codes: dict[str, int], name: str) -> None:
    """A process killed by a signal is named with the signal, not the processes that vLLM terminated afterwards."""
    root = cause.root(notes, FRONT_END, exit_codes)
    assert root is not None
    found = cause.explain(root, notes)
    assert found.text == f"{name} was killed by signal 9 (out of memory?)"
    assert "dmesg" in found.advice


@pytest.mark.parametrize(
    ("number", "name", "advice"), [(7, "SIGBUS", "/dev/shm"), (4, "SIGILL", "AVX2"), (6, "SIGABRT", "log")]
)
def test_other_signals(number: int, name: str, advice: str) -> None:
    """SIGBUS points to a full /dev/shm, SIGILL to missing CPU instructions, and other signals to the log."""
    root = cause.root([], FRONT_END, {"EngineCore": -number})
    assert root is not None
    found = cause.explain(root)
    assert f"signal {number} ({name})" in found.text
    assert advice in found.advice


def test_nothing_known() -> None:
    """Without any message or exit code there is no root cause, and the advice points to the log."""
    assert cause.root([], FRONT_END, {"EngineCore": 1}) is None
    assert "log" in cause.explain(FRONT_END).advice
    assert "log" in cause.explain(()).advice


def test_unknown_flag_suggests_the_nearest() -> None:
    """A misspelt engine flag is answered with the flag that was probably meant."""
    found = cause.wrong_arguments(
        "unrecognized arguments: --max-model-length 1024", ["--max-model-len", "--model", "--seed"]
    )
    assert found.text == "BATCH_ENGINE_ARGS: unrecognized arguments: --max-model-length 1024"
    assert found.advice.startswith("Did you mean --max-model-len? ")
    assert found.recurs
    assert "Did you mean" not in cause.wrong_arguments("unrecognized arguments: --xyzzy", ["--model"]).advice
    assert "Did you mean" not in cause.wrong_arguments("argument --seed: invalid int value: 'x'", ["--seed"]).advice


def test_same_failure_has_the_same_key() -> None:
    """Numbers, paths and pids do not make two failures different; other words do."""

    def key(text: str) -> str:
        return cause.explain([Failure("RuntimeError", text)]).key

    assert key(OUT_OF_GPU_MEMORY) == key(OUT_OF_GPU_MEMORY.replace("3270336", "17").replace("786.00", "1572.0"))
    assert key("no weights in /a/b1: pid 12, 0x7f3a") == key("no weights in /tmp/x_2/c: pid 3456, 0x11")
    assert key("no weights in /a/b") != key("no tokenizer in /a/b")


def test_secrets_are_not_told() -> None:
    """Tokens and passwords never appear in a cause."""
    text = (
        "token hf_AbCdEfGhIjKlMn refused; Authorization: Bearer abc.def-123; api_key=sk-123456; 'password': 'pw1';"
        " postgresql://me:hunter2@db/x"
    )
    found = cause.explain([Failure("RuntimeError", text)])
    for secret in ("AbCdEf", "abc.def", "sk-123456", "pw1", "hunter2"):
        assert secret not in found.text + found.key
    assert "hf_token" not in cause.explain([Failure("ValidationError", NO_SUCH_FOLDER)]).text


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ("unrecognized arguments: --api-key S3 --max-batched-tokens 5", "--api-key *** --max-batched-tokens 5"),
        ("unrecognized arguments: --api-key S3 S3-4 --seed=1", "--api-key *** *** --seed=1"),
        ("unrecognized arguments: --api-key=S3", "--api-key=***"),
        ("unrecognized arguments: --api-key 123456", "--api-key ***"),
        ("unrecognized arguments: --hf-tokne S3", "--hf-tokne ***"),
        ("unrecognized arguments: --hf-tokne='a S3'", "--hf-tokne=*** ***"),
        ("unrecognized arguments: --redis redis://:S3@h/0", "--redis ***"),
        ("unrecognized arguments: vllm serve S3 --port 1", "vllm serve *** --port 1"),
        # The rest of a value, also of a flag that vLLM knows, which is then not named.
        ("unrecognized arguments: S3", "arguments: *** (A value with blanks needs quotes."),
        ("unrecognized arguments: S3 --port 1 123456 -S3-4 -tpp 2", "*** --port 1 *** *** -tpp 2"),
        ("ambiguous option: --token=a S3 could match --tokenizer", "--token=*** could match --tokenizer"),
        ("argument --hf-token: invalid str value: 'a S3'", "argument --hf-token: ***"),
        ("argument --tokenizer-mode: invalid choice: 'x' (choose from 'auto')", "choice: 'x' (choose from 'auto')"),
        ('argument --api-key/-S: ignored explicit argument "it\'s S3"', "argument --api-key"),
        ("ambiguous option: --token=S3 could match --tokenizer", "--token=*** could match --tokenizer"),
        ('argument -sc: Value {"api_key": ["S3", "b S3"] cannot be converted', '"api_key": *** cannot be'),
        ('argument -sc: Value {"password": "a S3"} cannot be converted', '"password": ***} cannot be'),
        ("argument --seed: invalid int value: 'https://u:S/3@h@h/x'", "'https://***@h/x'"),
        (
            "argument --kv-transfer-config: 1 validation error for KVTransferConfig\npassword\n  Unexpected keyword"
            " argument [type=unexpected_keyword_argument, input_value='S3', input_type=str]\n    For",
            "password Unexpected keyword argument",
        ),
    ],
)
def test_secrets_in_flags_are_not_told(told: str, shown: str) -> None:
    """Secrets among refused flags never appear, while the flags' names and plain numbers do."""
    found = cause.wrong_arguments(told, ["--hf-token"])
    assert shown in str(found)
    for secret in ("S3", "S/3", "123456"):
        assert secret not in f"{found} {found.key}"


@pytest.mark.parametrize(
    "text",
    [
        "['ray', 'start', '--hf-token', 'S3', '--redis-password=S3']",
        "vllm serve --api-key 'a S3' --hf-token S3",
        r"{\"api_key\": \"S3\"}",
        "{'api_key': ['S3', 'a S3'], 'x': 1}",
        "Authorization: Basic S3==; authorization=Bearer S3",
        "password='a S3' passphrase: S3 AWS_SECRET_ACCESS_KEY=S3",
        "redis://:S3@h/0, https://S3@h/x, http://u:a/S3@h",
    ],
)
def test_secrets_in_any_form_are_not_told(text: str) -> None:
    """Secrets in lists of arguments, in JSON within strings, in headers and in URLs never appear in a cause."""
    found = cause.explain([Failure("RuntimeError", text)])
    assert "***" in found.text
    assert "S3" not in found.text + found.key


def test_what_only_looks_like_a_secret_is_told() -> None:
    """Flags about tokens and the address of a model stay readable."""
    text = "--max-num-batched-tokens 5 --tokenizer a/b https://huggingface.co/a/b/resolve/main/c@1.json tcp://h:1/x"
    assert cause.explain([Failure("RuntimeError", text)]).text == text


@given(st.lists(st.tuples(st.text(max_size=20), st.text()), max_size=3))
def test_any_text_is_one_bounded_line(failures: list[tuple[str, str]]) -> None:
    """Whatever a process prints becomes one printable line of bounded length."""
    found = cause.explain([Failure(name, text) for name, text in failures])
    assert len(found.text) <= MAX_TEXT
    for line in (found.text, found.advice, found.key):
        assert line.isprintable()
