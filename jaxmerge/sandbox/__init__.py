"""Runs Python that a model under test wrote, where it can neither do harm nor fake a success.

The program is in one bubblewrap sandbox, the tests are in another. All that passes between them is
plain data, so nothing the program does to its own process reaches the tests.

| module | what it knows |
|---|---|
| `check` | one program and its tests to a verdict |
| `container` | a Python process in bubblewrap: what it sees, and how all of it is ended |
| `seccomp` | the system calls that are refused |
| `inside` | what runs in the sandboxes: the worker, the tests, and the data between them |
"""

from jaxmerge.sandbox.check import Limits, Verdict, check_program, require

__all__ = ["Limits", "Verdict", "check_program", "require"]
