"""What runs in the two sandboxes of a program: the worker, the tests, and the data between them.

This file is handed to Python as text (`python -c`), so it may import the standard library only.

`work` runs the program and answers calls of its entry point. `judge` runs the tests, in which
`candidate` is the entry point: a call sends the arguments to the worker and gets a value or an
exception back. Both speak JSON, one message a line. The worker is not trusted: whatever it sends is
at worst a wrong value, which the tests compare by themselves.
"""

from __future__ import annotations

import functools
import json
import math
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

_OF_THE_WORKER = ("program", "entry_point", "limits")  # never the tests
_SMALL = 2**63  # greater integers are written in base 16, which is read in linear time
# Exceptions of the program that tests see as what they are. Without StopIteration, which would end
# a loop over calls early as if all were well.
_EXCEPTIONS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        LookupError,
        MemoryError,
        NameError,
        NotImplementedError,
        OSError,
        OverflowError,
        RecursionError,
        RuntimeError,
        SyntaxError,
        TypeError,
        ValueError,
        ZeroDivisionError,
    )
}


class NotPlain(Exception):
    """A value that cannot be sent, or a message that is no value."""


def encode(value: Any) -> Any:
    """Plain data as JSON can hold it: what JSON has no form for becomes `{tag: ...}`.

    Raises:
        NotPlain: the value is, or holds, something else than None, bool, int, float, complex, str,
            bytes, list, tuple, set, dict or range.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value) if -_SMALL < value < _SMALL else {"int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": float.__repr__(value)}
    if isinstance(value, list):
        return [encode(each) for each in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in value.items()]}
    if isinstance(value, tuple | set | frozenset):
        tag = next(kind for kind in (tuple, set, frozenset) if isinstance(value, kind)).__name__
        return {tag: [encode(each) for each in value]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, range):
        return {"range": [encode(each) for each in (value.start, value.stop, value.step)]}
    raise NotPlain(f"a value of type {type(value).__name__}, which is no plain data")


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda digits: int(digits, 16),
    "float": lambda name: {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[name],
    "dict": lambda pairs: {decode(key): decode(each) for key, each in pairs},
    "tuple": lambda values: tuple(decode(each) for each in values),
    "set": lambda values: {decode(each) for each in values},
    "frozenset": lambda values: frozenset(decode(each) for each in values),
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*(decode(each) for each in parts)),
    "range": lambda bounds: range(*(decode(each) for each in bounds)),
}


def decode(data: Any) -> Any:
    """The value that `encode` wrote: of built-in types only, never of a subclass.

    Raises:
        NotPlain: nothing that `encode` writes.
    """
    if isinstance(data, list):
        return [decode(each) for each in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1 or not data.keys() <= _DECODERS.keys():
        raise NotPlain("a message that is no plain data")
    ((tag, content),) = data.items()
    try:
        return _DECODERS[tag](content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NotPlain("a message that is no plain data") from error


def limit(limits: dict[str, int]) -> None:
    """Bounds this process and those it starts; no limit can be raised again."""
    bounds = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory_bytes"],
        resource.RLIMIT_FSIZE: limits["file_bytes"],
        resource.RLIMIT_NPROC: limits["processes"] + 1,  # bubblewrap's own is in there too
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, bound in bounds.items():
        _, hard = resource.getrlimit(kind)
        least = bound if hard == resource.RLIM_INFINITY else min(bound, hard)
        resource.setrlimit(kind, (least, least))


def _streams() -> tuple[BinaryIO, BinaryIO]:
    """Standard input and output under other descriptors; the standard ones lead nowhere now."""
    source, sink = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.close(nowhere)
    return source, sink


def _send(sink: BinaryIO, message: Any) -> None:
    sink.write(json.dumps(message).encode() + b"\n")
    sink.flush()


def work() -> None:
    """Loads the program of the first message, then calls its entry point once a message."""
    source, sink = _streams()
    _send(sink, {"ready": True})
    job = json.loads(source.readline())
    limit(job["limits"])
    module = types.ModuleType("program")  # a real module: dataclasses and typing look theirs up
    sys.modules["program"] = module

    def load() -> None:
        exec(compile(job["program"], "<program>", "exec", dont_inherit=True), module.__dict__)
        getattr(module, job["entry_point"])

    _answer(sink, load, job["limits"]["reply_bytes"])
    while line := source.readline():
        arguments, keywords = decode(json.loads(line))
        entry_point = getattr(module, job["entry_point"])
        call = functools.partial(entry_point, *arguments, **keywords)
        _answer(sink, call, job["limits"]["reply_bytes"])


def _answer(sink: BinaryIO, call: Callable[[], Any], most: int) -> None:
    """Sends what a call returns or raises."""
    try:
        message = {"value": encode(call())}
        if len(json.dumps(message)) > most:
            message = {"refused": f"more than {most} bytes"}
    except NotPlain as error:
        message = {"refused": str(error)}
    except BaseException as error:  # SystemExit too: the tests go on
        kinds = [kind.__name__ for kind in type(error).__mro__]
        message = {"raised": kinds[:20], "text": f"{error}"[:200]}
    _send(sink, message)


class Candidate:
    """The program's entry point as the tests have it.

    Args:
        source: where the worker's answers come from.
        sink: where the worker's orders go to.
        most: bytes that an answer may have.
        verdict: ends the tests: (passed, why not).
    """

    def __init__(
        self,
        source: BinaryIO,
        sink: BinaryIO,
        most: int,
        verdict: Callable[[bool, str], NoReturn],
    ):
        self._source, self._sink, self._most, self._verdict = source, sink, most, verdict

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.ask(encode((arguments, keywords)))

    def ask(self, message: Any) -> Any:
        """Sends a message and waits for the answer, a value or an exception.

        What is no answer ends the tests, so that no test can take it for an exception.
        """
        try:
            _send(self._sink, message)
            line = self._source.readline(self._most + 1000)
        except BrokenPipeError:
            line = b""
        if not line:
            self._verdict(False, "the program's process ended: by itself, or at a limit")
        try:
            answer = json.loads(line)
            if "value" in answer:
                return decode(answer["value"])
            refused, raised = answer.get("refused"), _raised(answer)
        except (AttributeError, NotPlain, RecursionError, TypeError, ValueError):
            self._verdict(False, "the program's answer is no plain data, or too long")
        if refused:
            self._verdict(False, f"the program returned {refused}")
        raise raised


def _raised(answer: dict[str, Any]) -> Exception:
    """The exception that the program raised, as one that tests can know."""
    kinds, text = [str(kind) for kind in answer.get("raised", ())], str(answer.get("text", ""))
    known = [kind for kind in kinds if kind in _EXCEPTIONS]
    if known[:1] == kinds[:1] != []:
        return _EXCEPTIONS[known[0]](text)
    return _EXCEPTIONS[(*known, "RuntimeError")[0]](f"{kinds[0] if kinds else ''}: {text}")


def judge() -> None:
    """Runs the tests of the job on standard input; says on standard output how they went."""
    source, sink = _streams()
    job = json.load(source)
    limit(job["limits"])

    def verdict(passed: bool, what: str) -> NoReturn:
        _send(sink, {"passed": passed, "what": what})
        os._exit(0)

    from_worker, to_worker = os.fdopen(job["from_worker"], "rb"), os.fdopen(job["to_worker"], "wb")
    if json.loads(from_worker.readline() or "null") != {"ready": True}:
        os._exit(1)
    sink.write(b"\n")  # both have started
    sink.flush()
    candidate = Candidate(from_worker, to_worker, job["limits"]["reply_bytes"], verdict)
    try:
        candidate.ask({name: job[name] for name in _OF_THE_WORKER})
    except BaseException as error:
        verdict(False, f"the program does not load: {_say(error)}")
    try:
        tests = compile(job["tests"], "<tests>", "exec", dont_inherit=True)
        exec(tests, {"__name__": "tests", "candidate": candidate})
    except BaseException as error:
        verdict(False, _where(error, job["tests"]) + _say(error))
    verdict(True, "")


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _where(error: BaseException, tests: str) -> str:
    """The line of the tests that failed."""
    line, trace = 0, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<tests>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{tests.splitlines()[line - 1].strip()}: " if line else ""
