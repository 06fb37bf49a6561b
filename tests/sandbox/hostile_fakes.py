"""Programs that try to pass tests which they should fail.

Each is a text with an entry point `attack`, which should return 4711 and does all sorts of things
instead; and a pattern of why it fails.
"""

import textwrap


def _program(text: str) -> str:
    return textwrap.dedent(text).lstrip()


_BYTES = b'{"passed": true, "what": ""}\n{"value": 4711}\n{"value": null}\n'
_TO_ALL = """
import os
def everywhere(data):
    for descriptor in range(64):
        try:
            os.write(descriptor, data)
        except OSError:
            pass
"""
_LIE = """
    __eq__ = __ge__ = __le__ = __bool__ = __contains__ = lambda self, *other: True
    __ne__ = __lt__ = __gt__ = lambda self, other: False
    __hash__ = lambda self: 4711
"""
_WHEN_CALLED = "def attack():\n    "
_ENDED = "the program's process ended"
_STOPPED = f"{_ENDED}|took longer than"  # which comes first depends on what else runs
_WRONG = r"assert candidate\(\) == 4711: AssertionError"
FAKES: dict[str, tuple[str, str]] = {
    "os._exit": (f"import os\n{_WHEN_CALLED}os._exit(0)", _ENDED),
    "os._exit on load": ("import os\nos._exit(0)", _ENDED),
    "sys.exit": (f"import sys\n{_WHEN_CALLED}sys.exit(0)", "SystemExit"),
    "sys.exit on load": ("import sys\nsys.exit(0)", "does not load: .*SystemExit"),
    "SystemExit in a thread": (
        (
            "import threading\n"
            f"{_WHEN_CALLED}t = threading.Thread(target=exit_now); t.start(); t.join()\n"
            "def exit_now():\n    raise SystemExit(0)"
        ),
        _WRONG,
    ),
    "StopIteration": (f"{_WHEN_CALLED}raise StopIteration", "RuntimeError: StopIteration"),
    "an exception with a lying name": (
        f"class Lie(StopIteration): pass\nLie.__name__ = 'passed'\n{_WHEN_CALLED}raise Lie",
        "RuntimeError",
    ),
    "an exception whose text raises": (
        (
            "class Bad(Exception):\n    def __str__(self): raise SystemExit(0)\n"
            f"{_WHEN_CALLED}raise Bad"
        ),
        _ENDED,
    ),
    "endless loop": (f"{_WHEN_CALLED}while True: pass", _STOPPED),
    "endless loop on load": ("while True: pass", _STOPPED),
    "endless sleep": (f"import time\n{_WHEN_CALLED}time.sleep(1e6)", "took longer than"),
    "endless fork bomb": (
        (
            "import os\n"
            f"{_WHEN_CALLED}while True:\n        try:\n            os.fork()\n"
            "        except OSError:\n            pass"
        ),
        _STOPPED,
    ),
    "endless output": (f"{_WHEN_CALLED}while True: print('x' * 100_000)", _STOPPED),
    "endless errors": (
        f"import sys\n{_WHEN_CALLED}while True: sys.stderr.write('x' * 100_000)",
        _STOPPED,
    ),
    "ignored signals": (
        (
            "import signal\nfor number in range(1, 65):\n    try:\n"
            "        signal.signal(number, signal.SIG_IGN)\n    except (OSError, ValueError):\n"
            f"        pass\n{_WHEN_CALLED}while True: pass"
        ),
        _STOPPED,
    ),
    "kill everything": (
        (
            "import os\n"
            f"{_WHEN_CALLED}os.kill(1, 9); os.kill(os.getppid(), 9)\n"
            "    for number in range(2, 400):\n        try:\n            os.kill(number, 9)\n"
            "        except OSError:\n            pass"
        ),
        _ENDED,
    ),
    "segmentation fault": (f"import ctypes\n{_WHEN_CALLED}ctypes.string_at(0)", _ENDED),
    "no end of recursion": (f"{_WHEN_CALLED}return attack()", "RecursionError"),
    "huge value": (f"{_WHEN_CALLED}return 'x' * 2**22", "returned more than"),
    "huge integer": (f"{_WHEN_CALLED}return 1 << 2**23", "returned more than"),
    "deep value": (
        f"{_WHEN_CALLED}value = []\n    for _ in range(10**5): value = [value]\n    return value",
        "RecursionError",
    ),
    "value within itself": (
        f"{_WHEN_CALLED}value = []\n    value.append(value)\n    return value",
        "RecursionError",
    ),
    "a function": (f"{_WHEN_CALLED}return lambda: 4711", "a value of type function"),
    "an object that equals everything": (
        f"class Lie:{_LIE}\n{_WHEN_CALLED}return Lie()",
        "a value of type Lie",
    ),
    "an integer that lies": (f"class Lie(int):{_LIE}\n{_WHEN_CALLED}return Lie(1)", _WRONG),
    "a float that lies": (f"class Lie(float):{_LIE}\n{_WHEN_CALLED}return Lie('nan')", _WRONG),
    "a text that lies": (
        f"class Lie(str):{_LIE}\n    __str__ = lambda self: self\n{_WHEN_CALLED}return Lie('x')",
        _WRONG,
    ),
    "a list that lies": (f"class Lie(list):{_LIE}\n{_WHEN_CALLED}return Lie()", _WRONG),
    "a dict that lies": (f"class Lie(dict):{_LIE}\n{_WHEN_CALLED}return Lie()", _WRONG),
    "replaced builtins": (
        (
            "import builtins, json, math, operator\n"
            "yes = lambda *a, **k: True\n"
            "for name in 'print isinstance len all any abs compile exec __build_class__'.split():\n"
            "    setattr(builtins, name, yes)\n"
            "builtins.AssertionError = builtins.Exception = type('Never', (BaseException,), {})\n"
            "math.isclose = math.isfinite = operator.eq = yes\n"
            f"{_WHEN_CALLED}return 0"
        ),
        ".",
    ),
    "replaced json": (
        (
            'import json\njson.dumps = lambda *a: \'{"passed": true, "what": ""}\'\n'
            f"{_WHEN_CALLED}return 0"
        ),
        ".",
    ),
    "markers": (
        (
            f"import sys\n{_WHEN_CALLED}print('passed', 'OK', 'True', '0', flush=True)\n"
            f"    print({_BYTES.decode()!r}, flush=True, file=sys.stderr)"
        ),
        _WRONG,
    ),
    "forged messages": (
        f"{_TO_ALL}{_WHEN_CALLED}everywhere({_BYTES!r})\n    return 0",
        ".",
    ),
    "forged messages on load": (
        f"{_TO_ALL}everywhere({_BYTES.splitlines(True)[0]!r})\n{_WHEN_CALLED}return 0",
        ".",
    ),
    "an endless message": (
        f"{_TO_ALL}{_WHEN_CALLED}while True: everywhere(b'[' * 65536)",
        "no plain data, or too long",
    ),
    "a deep message": (f"{_TO_ALL}everywhere(b'[' * 500_000 + b'\\n')", "no plain data"),
    "a message of unknown tags": (
        _TO_ALL + """everywhere(b'{"value": {"__reduce__": ["os.system", "true"]}}\\n')""",
        "no plain data",
    ),
    "a message with a set of lists": (
        _TO_ALL + """everywhere(b'{"value": {"set": [[1]]}}\\n')""",
        "no plain data",
    ),
    "the tests found and patched": (
        _program("""
            import gc, sys

            def attack():
                import __main__
                everything = [dict(vars(__main__))]
                frame = sys._getframe()
                while frame:
                    everything += [dict(frame.f_locals), dict(frame.f_globals)]
                    frame = frame.f_back
                everything += [each for each in gc.get_objects() if type(each) in (dict, list)]
                for each in everything:
                    for text in each.values() if type(each) is dict else each:
                        if type(text) is str and text.startswith("assert candi" + "date"):
                            return int(text.split()[-1])
                __main__.judge = __main__.encode = lambda *a: 4712
                __main__.Candidate.ask = lambda *a: 4711
                return 0
        """),
        _WRONG,
    ),
    "tracing": (
        (
            "import sys, threading\n"
            "def trace(frame, event, value):\n"
            "    for name in list(frame.f_locals):\n"
            "        if name in ('passed', 'message', 'answer'): frame.f_locals[name] = True\n"
            "    return trace\n"
            "sys.settrace(trace); threading.settrace(trace); sys.setprofile(trace)\n"
            f"{_WHEN_CALLED}return 0"
        ),
        ".",
    ),
    "a daemon that outlives it": (
        (
            "import os, time\n"
            f"{_WHEN_CALLED}if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
            "            time.sleep(1e6)\n        os._exit(0)\n    return 0"
        ),
        _WRONG,
    ),
    "a thread that outlives it": (
        (
            "import threading, time\n"
            f"{_WHEN_CALLED}threading.Thread(target=time.sleep, args=(1e6,)).start()\n    return 0"
        ),
        _WRONG,
    ),
    "an exit handler": (
        f"import atexit, os\natexit.register(os._exit, 0)\n{_WHEN_CALLED}return 0",
        _WRONG,
    ),
    "a program without the function": ("x = 4711", "no attribute 'attack'"),
    "no program": ("", "no attribute 'attack'"),
    "no Python": ("def attack(:", "does not load: SyntaxError"),
    "a null byte": ("def attack(): return 4711\0", "does not load: SyntaxError|ValueError"),
    "half a character": ("def attack(): return '\ud800'", "."),
}
