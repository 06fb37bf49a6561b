"""A command on the tiny pool that runs as several processes of this machine."""

import json
import socket
import subprocess
from pathlib import Path

from tests.command import Command

# Models on four devices each, two at a time: pools, prompts and scores are spread over processes.
MESH = 'config.mesh = {{"pop": {pop}, "data": {data}, "fsdp": {fsdp}, "tensor": {tensor}, '
MESH += '"cpu_devices": {devices}}}'


def mesh(devices: int, pop: int = 8, data: int = 1, fsdp: int = 1, tensor: int = 1) -> str:
    return MESH.format(pop=pop, data=data, fsdp=fsdp, tensor=tensor, devices=devices)


SMALL = mesh(2, pop=4)  # two processes of two devices


class Processes:
    """A command that runs as several processes."""

    def __init__(self, directory: Path, pool: Path, change: str, count: int = 2):
        directory.mkdir(exist_ok=True)
        self.command, self.count = Command(directory, pool, change), count

    def flags(self) -> list[tuple[str, ...]]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            where = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
        count = f"--processes={self.count}"
        return [(where, count, f"--process={i}") for i in range(self.count)]

    def start(self) -> list[subprocess.Popen[str]]:
        return [self.command.start(*flags) for flags in self.flags()]

    def run(self) -> list[tuple[int, str, str]]:
        return [ended(process) for process in self.start()]


def ended(process: subprocess.Popen[str], seconds: float = 600) -> tuple[int, str, str]:
    """Its exit code and what it said; a process that hangs is killed, and the test fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"it hangs:\n{out}\n{err}") from None
    return process.returncode, out, err


def results(command: Command) -> dict:
    return json.loads((command.workdir / "results.json").read_text())
