"""Several processes that are the devices of one run: started once, they do one thing after the other together."""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

LIMIT = 120  # seconds for one thing


class Ranks:
    """As many processes as any call has wanted. What is given to them must be importable."""

    def __init__(self) -> None:
        self.context = get_context("spawn")
        self.pipes: list[Any] = []
        self.processes: list[Any] = []

    def start_one(self) -> None:
        here, there = self.context.Pipe()
        process = self.context.Process(target=serve, args=(len(self.pipes), there), daemon=True)
        process.start()
        self.pipes.append(here)
        self.processes.append(process)

    def run(self, n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What `function` returns in each of n processes, which may form a process group in it."""
        while len(self.pipes) < n:
            self.start_one()
        port = free_port()
        for pipe in self.pipes[:n]:
            pipe.send((n, port, function, args))
        answers = []
        for rank, pipe in enumerate(self.pipes[:n]):
            assert pipe.poll(LIMIT), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        for rank, (failed, answer) in enumerate(answers):
            assert not failed, f"rank {rank}: {answer}"
        return [answer for _, answer in answers]

    def end(self) -> None:
        for process in self.processes:
            process.kill()


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        return listening.getsockname()[1]


def serve(rank: int, pipe: Connection) -> None:
    # before anything is imported that looks at it
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "OMP_NUM_THREADS": "1"}
    import torch

    torch.set_num_threads(1)
    while True:
        n, port, function, args = pipe.recv()
        os.environ |= {"WORLD_SIZE": str(n), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        try:
            pipe.send((False, function(*args)))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
