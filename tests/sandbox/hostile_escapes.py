"""Programs that try to break out of the sandbox.

Each is a text with an entry point `attack`, which returns "won" when it got what it was after, else
how it was stopped; and the pattern of what that is.
"""

import textwrap


def _program(text: str) -> str:
    return textwrap.dedent(text).lstrip()


def _attempt(statement: str, imports: str = "os") -> str:
    """Wins when the statement does not raise; else the name of the error."""
    return (
        f"import {imports}, errno\n\ndef attack():\n    try:\n        {statement}\n"
        "    except OSError as error:\n        return errno.errorcode[error.errno]\n"
        '    return "won"\n'
    )


def _call(expression: str) -> str:
    """Wins when the call of the C library does not fail; else the name of the error."""
    return (
        "import ctypes, errno\nlibc = ctypes.CDLL(None, use_errno=True)\n\n"
        f"def attack():\n    answer = {expression}\n"
        '    return "won" if answer >= 0 else errno.errorcode[ctypes.get_errno()]\n'
    )


# PORT, ABSTRACT, HOME, CHECKOUT, SECRET and HOST_PID are filled in by the test.
ESCAPES: dict[str, tuple[str, str]] = {
    "fork bomb": (
        _program("""
            import errno, os, time

            def attack():
                for children in range(50):
                    try:
                        if os.fork() == 0:
                            time.sleep(60)
                    except OSError as error:
                        return f"{children} children, then {errno.errorcode[error.errno]}"
                return "won"
        """),
        r"[1-4] children, then EAGAIN",
    ),
    "thread bomb": (
        _program("""
            import threading, time

            def attack():
                for _ in range(50):
                    try:
                        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                    except RuntimeError as error:
                        return str(error)
                return "won"
        """),
        "can't start new thread",
    ),
    "memory bomb": (
        _program("""
            def attack():
                blocks = []
                try:
                    while len(blocks) < 64:
                        blocks.append(bytearray(2**24))
                except MemoryError:
                    return f"{len(blocks)} blocks"
                return "won"
        """),
        r"\d blocks",
    ),
    "many processes with memory": (
        _program("""
            import os

            def hog():
                blocks = []
                try:
                    while len(blocks) < 64:
                        blocks.append(bytearray(2**24))
                except MemoryError:
                    return len(blocks)
                return len(blocks)

            def attack():
                source, sink = os.pipe()
                try:
                    for _ in range(50):
                        if os.fork() == 0:
                            os.write(sink, bytes([hog()]))
                            os._exit(0)
                except OSError:
                    pass
                os.write(sink, bytes([hog()]))
                os.close(sink)
                total = 0
                while byte := os.read(source, 1):
                    total += byte[0]
                return "won" if total > 32 else f"{total} blocks in all"
        """),
        r"\d+ blocks in all",
    ),
    "shared memory": (_call("libc.shmget(0, ctypes.c_size_t(2**30), 0o1600)"), "EPERM"),
    "file in memory": (_call("libc.memfd_create(b'x', 0)"), "EPERM"),
    "raised limits": (
        _program("""
            import resource

            def attack():
                kinds = (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU)
                for kind in kinds:
                    try:
                        resource.setrlimit(kind, (-1, -1))
                        return "won"
                    except ValueError as error:
                        told = str(error)
                return told
        """),
        "not allowed to raise maximum limit",
    ),
    "write to home": (_attempt("open('HOME/jaxmerge_was_here', 'w')"), "ENOENT|EROFS"),
    "write to the checkout": (_attempt("open('CHECKOUT/was_here', 'w')"), "ENOENT|EROFS"),
    "write to /etc": (_attempt("open('/etc/was_here', 'w')"), "EROFS"),
    "write to /": (_attempt("open('/was_here', 'w')"), "EROFS"),
    "write to /dev/shm": (_attempt("open('/dev/shm/was_here', 'w')"), "EROFS"),
    "write to the library": (_attempt("open(os.__file__, 'a')"), "EROFS|EACCES"),
    "read the checkout": (_attempt("os.listdir('CHECKOUT')"), "ENOENT"),
    "read /etc": (_attempt("open('/etc/passwd')"), "ENOENT"),
    "read the answers": (
        _program("""
            import os, sys

            def attack():
                for top, _, names in os.walk("/"):
                    if any("HumanEval" in name or "human_eval" in name for name in names):
                        return "won"
                packages = os.path.dirname(os.__file__) + "/site-packages"
                return "won" if os.path.exists(packages) and os.listdir(packages) else "no packages"
        """),
        "no packages",
    ),
    "symlink out": (
        _attempt("os.symlink('/etc/passwd', '/tmp/way'); open('/tmp/way')"),
        "ENOENT",
    ),
    "a full /tmp": (
        _program("""
            import errno

            def attack():
                for megabytes in range(100):
                    try:
                        with open(f"/tmp/{megabytes}", "wb") as file:
                            file.write(bytes(2**20))
                    except OSError as error:
                        return f"{megabytes} MB, then {errno.errorcode[error.errno]}"
                return "won"
        """),
        r"1\d MB, then ENOSPC",
    ),
    "a huge file": (_attempt("os.truncate(os.open('/tmp/x', os.O_CREAT), 2**33)"), "E.*"),
    "a huge file, written": (
        _attempt("f = open('/tmp/x', 'wb'); f.seek(2**33); f.write(b'x'); f.flush()"),
        "EFBIG",
    ),
    "read the environment": (
        _program("""
            import ctypes, os

            def attack():
                environ = ctypes.POINTER(ctypes.c_char_p).in_dll(ctypes.CDLL(None), "environ")
                entries, i = [], 0
                while environ[i]:
                    entries.append(environ[i].decode())
                    i += 1
                text = repr((entries, dict(os.environ)))
                return "won" if "SECRET" in text else "only " + " ".join(sorted(os.environ))
        """),
        "only LC_CTYPE PWD PYTHONHASHSEED PYTHONHOME",
    ),
    "read /proc": (_attempt("open('/proc/HOST_PID/environ')"), "ENOENT"),
    "mount /proc": (_call("libc.mount(b'proc', b'/tmp', b'proc', 0, None)"), "EPERM"),
    "mount a file system": (_call("libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)"), "EPERM"),
    "remount": (_call("libc.mount(None, b'/', None, 32 | 4096, None)"), "EPERM"),
    "a user namespace": (_call("libc.unshare(0x10000000)"), "EPERM"),
    "a user namespace by clone": (
        _call("libc.syscall(220 if 'arm' in __import__('os').uname().machine else 56, 0x10000011)"),
        "EPERM",
    ),
    "ptrace": (_call("libc.ptrace(16, 1, 0, 0)"), "EPERM"),
    "write to another process": (_call("libc.process_vm_writev(1, 0, 0, 0, 0, 0)"), "EPERM"),
    "tcp": (
        _attempt("socket.create_connection(('127.0.0.1', PORT), timeout=1)", "socket"),
        "EPERM",
    ),
    "abstract socket": (
        _attempt("socket.socket(socket.AF_UNIX).connect('\\0ABSTRACT')", "socket"),
        "EPERM",
    ),
    "become root": (_attempt("os.setuid(0)" + "; os.setresuid(0, 0, 0)"), "EPERM|EINVAL"),
    "give a file away": (
        _attempt("os.close(os.open('/tmp/x', os.O_CREAT)); os.chown('/tmp/x', 0, 1)"),
        "EPERM|EINVAL",
    ),
    "kill the host's processes": (_attempt("os.kill(HOST_PID, 9)"), "ESRCH"),
}
