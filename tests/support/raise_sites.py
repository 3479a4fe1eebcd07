"""Where vLLM's request validators raise errors: found in its source, and seen in the errors' tracebacks."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pydantic

# Not the backends of structured output: these functions report their errors in their own words.
READ = ("vllm.entrypoints", "vllm.sampling_params", "vllm.tasks")


@dataclass(frozen=True)
class Site:
    """A `raise` statement, with its lines."""

    file: str
    first: int
    last: int
    name: str

    def holds(self, file: str, line: int) -> bool:
        return file == self.file and self.first <= line <= self.last


def in_validators(types: Iterable[pydantic.TypeAdapter[Any]]) -> set[Site]:
    """The sites in all validators of these types, however nested, and in the functions that they call."""
    found: set[Site] = set()
    seen: set[Any] = set()
    for adapter in types:
        for function in _validators(adapter.core_schema, set()):
            found.update(_in_function(function, seen))
    return found


def in_class(kind: type) -> set[Site]:
    """The sites in a class's own methods, and in the functions that they call."""
    seen: set[Any] = set()
    return {site for member in vars(kind).values() for site in _in_function(member, seen)}


def raised(error: BaseException) -> Iterator[tuple[str, int]]:
    """(file, line) of every frame that an error, the errors it wraps and its causes passed through."""
    nested = []
    if isinstance(error, pydantic.ValidationError):
        nested = [detail["ctx"]["error"] for detail in error.errors() if "error" in detail.get("ctx", {})]
    for part in (error.__cause__, error.__context__, *nested):
        if isinstance(part, BaseException):
            yield from raised(part)
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next


def _validators(node: Any, seen: set[int]) -> Iterator[Callable[..., Any]]:
    """vLLM's functions in a schema of pydantic's core."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, dict):
        function = node.get("function")
        if isinstance(function, dict):
            function = function.get("function")
        if str(node.get("type")).startswith("function-") and inspect.isroutine(function):
            yield function
        if node.get("post_init") is True:
            yield node["cls"].__post_init__
        for value in node.values():
            yield from _validators(value, seen)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _validators(value, seen)


def _in_function(function: Any, seen: set[Any]) -> Iterator[Site]:
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not inspect.isfunction(function) or function in seen or not function.__module__.startswith(READ):
        return
    seen.add(function)
    lines, first = inspect.getsourcelines(function)
    try:
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except SyntaxError:
        # A lambda in the middle of an expression, which contains no raise statement.
        return
    file = inspect.getsourcefile(function) or ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            name = f"{function.__qualname__}: {' '.join(ast.unparse(node).split())[:160]}"
            yield Site(file, first + node.lineno - 1, first + (node.end_lineno or node.lineno) - 1, name)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called = _named(function, node.func.id, tree)
            if inspect.isfunction(called):
                yield from _in_function(called, seen)


def _named(function: Any, name: str, tree: ast.AST) -> Any:
    """What a name refers to in a function: something it imports itself, or a global of its module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            module = __import__(node.module or "", fromlist=[name])
            return getattr(module, name, None)
    return function.__globals__.get(name)
