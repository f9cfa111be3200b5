# SPDX-License-Identifier: Apache-2.0
"""One JSON line a call: a fixed table of methods, checked parameters, errors as values.

A request is ``{"id": 1, "method": "pci.tree", "params": {…}}``; the answer, in order, is
``{"id": 1, "result": …}`` or ``{"id": 1, "error": {"type", "message", "errno", "where"}}``.
There is no way to reach anything that is not in the table.
"""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any, NoReturn

    Method = Callable[..., Any]

MAX_LINE_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 12  # for more, Python would ask the kernel to map memory, in each call
_TEXT_LIMIT = 200


class ParameterError(ValueError):
    """A parameter is unknown, missing, of the wrong type or out of its range; names it."""


class ProtocolError(ValueError):
    """A line that is no request: not JSON, too long, or without its parts."""


class UnknownMethodError(LookupError):
    """A method that is not in the table."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_float(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and all(_is_int(item) for item in value)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


# A parameter's annotation, as text, decides how it is checked and what the error says.
_KINDS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "int": (_is_int, "an integer ≥ 0"),
    "float": (_is_float, "a number ≥ 0"),
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "str": (lambda value: isinstance(value, str), "a string"),
    "list[int]": (_is_numbers, "a list of integers ≥ 0"),
    "list[str]": (_is_names, "a list of strings"),
    "list[dict[str, Any]]": (_is_objects, "a list of objects"),
    "dict[str, Any]": (lambda value: isinstance(value, dict), "an object"),
}


def check(name: str, value: object, kind: str) -> None:
    """Raise ParameterError unless ``value`` is of ``kind`` (one of the annotations above)."""
    if kind.endswith(" | None"):
        if value is None:
            return
        kind = kind.removesuffix(" | None")
    accepts, wanted = _KINDS[kind]
    if not accepts(value):
        raise ParameterError(f"{name}: expected {wanted}, not {_short(value)}")


def check_parts(
    name: str, value: Mapping[str, Any], required: Mapping[str, str], optional: Mapping[str, str]
) -> None:
    """Check the parts of an object parameter: each known, present if required, well typed."""
    for part in value:
        if part not in required and part not in optional:
            raise ParameterError(f"{name}.{part}: unknown")
    for part, kind in required.items():
        if part not in value:
            raise ParameterError(f"{name}.{part}: missing")
        check(f"{name}.{part}", value[part], kind)
    for part, kind in optional.items():
        if part in value:
            check(f"{name}.{part}", value[part], kind)


class Registry:
    """The table of methods. A method takes keyword-only parameters, and ``self`` at most before."""

    def __init__(self) -> None:
        self._methods: dict[str, tuple[Method, dict[str, str], frozenset[str]]] = {}
        self._areas: dict[str, str] = {}

    def area(self, prefix: str, module: str) -> None:
        """Methods ``prefix.*`` are in ``module``, which is loaded when one is first called."""
        self._areas[prefix] = module

    def method(self, name: str) -> Callable[[Method], Method]:
        """Decorate the function that answers ``name``.

        :raises TypeError: at import, if the name is taken or a parameter's annotation is not one
            that calls can be checked against.
        """

        def add(function: Method) -> Method:
            code = function.__code__
            first = code.co_argcount
            names = code.co_varnames[first : first + code.co_kwonlyargcount]
            kinds = {each: str(function.__annotations__.get(each)) for each in names}
            for each, kind in kinds.items():
                if kind.removesuffix(" | None") not in _KINDS:
                    raise TypeError(f"{name}: parameter {each} has no checkable type: {kind}")
            if name in self._methods:
                raise TypeError(f"{name}: two methods of one name")
            required = frozenset(kinds) - frozenset(function.__kwdefaults__ or ())
            self._methods[name] = (function, kinds, required)
            return function

        return add

    def names(self) -> list[str]:
        """All methods, sorted; loads every area."""
        for prefix in list(self._areas):
            self._load(prefix)
        return sorted(self._methods)

    def call(self, name: str, params: Mapping[str, object], *before: object) -> Any:
        """Check ``params`` and call; ``before`` are the method's positional arguments."""
        if name not in self._methods:
            self._load(name.partition(".")[0])
        found = self._methods.get(name)
        if found is None:
            raise UnknownMethodError(f"no method {_short(name)}")
        function, kinds, required = found
        for each, value in params.items():
            if each not in kinds:
                known = ", ".join(kinds) or "none"
                raise ParameterError(f"{_short(each)}: unknown to {name}, which takes {known}")
            check(each, value, kinds[each])
        for each in kinds:
            if each in required and each not in params:
                raise ParameterError(f"{each}: missing")
        return function(*before, **params)

    def _load(self, prefix: str) -> None:
        module = self._areas.get(prefix)
        if module is not None:
            __import__(module)
            del self._areas[prefix]


def serve(registry: Registry, target: object, read_fd: int, write_fd: int) -> None:
    """Answer calls on ``target`` until ``read_fd`` ends.

    :raises OSError: the other side is gone (BrokenPipeError) or a descriptor fails.
    """
    for line in _lines(read_fd):
        answer = _answer(registry, target, line)
        view = memoryview(answer)
        while view:
            view = view[os.write(write_fd, view) :]


def _lines(fd: int) -> Iterator[bytes | None]:
    """Each whole line; None for one that was too long and is dropped without being kept."""
    kept = bytearray()
    dropping = False
    while chunk := os.read(fd, _CHUNK_BYTES):
        *ended, rest = chunk.split(b"\n")
        for piece in ended:
            kept += piece
            yield None if dropping or len(kept) > MAX_LINE_BYTES else bytes(kept)
            kept.clear()
            dropping = False
        if not dropping:
            kept += rest
            dropping = len(kept) > MAX_LINE_BYTES
        if dropping:
            kept.clear()


def _answer(registry: Registry, target: object, line: bytes | None) -> bytes:
    call_id: object = None
    try:
        request = _parse(line)
        call_id = request.get("id")
        method, params = _request_parts(request)
        result = registry.call(method, params, target)
        reply = _encode({"id": call_id, "result": result})
        if len(reply) > MAX_LINE_BYTES:
            raise ProtocolError(f"the result of {method} is {len(reply)} bytes: too long")
    except Exception as error:  # every failure of a call is the caller's to see
        reply = _encode({"id": call_id, "error": describe(error)})
    return reply


def _parse(line: bytes | None) -> dict[str, Any]:
    if line is None:
        raise ProtocolError(f"a line longer than {MAX_LINE_BYTES} bytes")
    try:
        request = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {error}") from None
    if not isinstance(request, dict):
        raise ProtocolError(f"a request is an object, not {_short(request)}")
    return request


def _request_parts(request: dict[str, Any]) -> tuple[str, dict[str, object]]:
    for part in request:
        if part not in ("id", "method", "params"):
            raise ProtocolError(f"{_short(part)} is no part of a request")
    if not _is_int(request.get("id")):
        raise ProtocolError("a request's id is an integer ≥ 0")
    method = request.get("method")
    if not isinstance(method, str):
        raise ProtocolError("a request's method is a string")
    params = request.get("params", {})
    if not isinstance(params, dict):
        raise ProtocolError("a request's params are an object")
    return method, params


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _encode(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def describe(error: Exception) -> dict[str, object]:
    """An exception as the protocol's error value; ``where`` is the innermost frame of ours."""
    where = ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if "guest_agent" in code.co_filename:
            file = code.co_filename.rpartition("/")[2]
            where = f"{file}:{trace.tb_lineno} {code.co_name}"
        trace = trace.tb_next
    return {
        "type": type(error).__name__,
        "message": str(error),
        "errno": error.errno if isinstance(error, OSError) else None,
        "where": where,
    }


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _TEXT_LIMIT else text[:_TEXT_LIMIT] + "…"
