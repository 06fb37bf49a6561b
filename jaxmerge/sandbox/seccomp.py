"""The system calls that are refused in a sandbox, as a filter for the kernel.

Namespaces hide the machine and resource limits bound one process. What is left are calls that get
memory which no limit counts (shared memory, files in memory), that reach other processes or the
host (ptrace, sockets, keys), and parts of the kernel that no judged program needs.
"""

from __future__ import annotations

import errno
import platform
import struct

from jaxmerge.errors import JaxmergeError

# The number of a call on x86_64 and on aarch64 (from Linux' asm/unistd.h); None: it has no such.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # memory that no resource limit counts
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    # other processes, the network and the host
    "socket": (41, 198),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "syslog": (103, 116),
    # namespaces and mounts
    "unshare": (272, 97),
    "setns": (308, 268),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # parts of the kernel with a history of holes
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "fanotify_init": (300, 262),
    "personality": (135, 92),
    "modify_ldt": (154, None),
    "ioperm": (173, None),
    "iopl": (172, None),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "quotactl": (179, 60),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "move_pages": (279, 239),
    "migrate_pages": (256, 238),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
}
# Of each machine: its number in the audit of the kernel, its column above, clone and clone3.
_MACHINES = {"x86_64": (0xC000003E, 0, 56, 435), "aarch64": (0xC00000B7, 1, 220, 435)}
_NEW_NAMESPACE = 0x7E020080  # every CLONE_NEW* flag
_X32 = 0x40000000  # x86_64: calls of the 32-bit pointer interface have this bit

# Offsets in struct seccomp_data, and the instructions of classic BPF that are needed.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


def filter_program(machine: str = "") -> bytes:
    """The filter in the kernel's form, as `bwrap --seccomp` reads it.

    A refused call fails with EPERM; `clone3`, whose flags no filter can see, with ENOSYS, on which
    the C library takes `clone`. Calls of another architecture end the process.

    Args:
        machine: as `uname -m` says it; "": this one.

    Raises:
        JaxmergeError: the call numbers of this machine are not known here.
    """
    machine = machine or platform.machine()
    if machine not in _MACHINES:
        raise JaxmergeError(
            "programs can't be sandboxed on this machine",
            expected=" or ".join(_MACHINES),
            found=machine,
        )
    architecture, column, clone, clone3 = _MACHINES[machine]
    refused = [numbers[column] for numbers in _REFUSED.values()]
    program = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_EQUAL, architecture, true=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_AT_LEAST, _X32, false=1),
        _instruction(_RETURN, _KILL),
        *_when(clone3, _REFUSE | errno.ENOSYS),
    ]
    for number in refused:
        if number is not None:
            program += _when(number, _REFUSE | errno.EPERM)
    program += [
        _instruction(_EQUAL, clone, false=3),
        _instruction(_LOAD, _FIRST_ARGUMENT),
        _instruction(_ANY_BIT, _NEW_NAMESPACE, false=1),
        _instruction(_RETURN, _REFUSE | errno.EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _when(number: int, answer: int) -> list[bytes]:
    """Answers the call of this number, and goes on with any other."""
    return [_instruction(_EQUAL, number, false=1), _instruction(_RETURN, answer)]


def _instruction(code: int, operand: int, *, true: int = 0, false: int = 0) -> bytes:
    """One instruction; `true` and `false` are how many to skip after a comparison."""
    return struct.pack("<HBBI", code, true, false, operand)
