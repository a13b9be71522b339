"""Distributed training: the processes of a run, DDP and FSDP2."""

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mimkit.nn import PixelHead, TransformerBlock
from recipes import signals
from recipes.engine.errors import LostProcessError, ProcessError, UserError

T = TypeVar("T")

LOADING, COMPUTING = 0, 1  # in the order of a step
HUNG = 124  # exit code, that of `timeout`
_GRACE = 5.0  # seconds within which all processes notice that they wait for another one

# Messages of gloo and NCCL when another process has died.
_CONNECTION_LOST = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|nccl", re.IGNORECASE
)


@dataclass(frozen=True)
class World:
    """The processes of a run, started by `torchrun`.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def total(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, value: T) -> T:
        """Broadcast the main process's value to all processes."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def share(self, make: Callable[[], T]) -> T:
        """Make a value in the main process, and give it to all.

        Raises:
            UserError: If the main process has raised one, in every process.
        """
        if self.size == 1:
            return make()
        box: list[T] = []
        message = None
        if self.is_main:
            try:
                box.append(make())
            except UserError as error:
                message = str(error)
        box, message = self.agree((box, message))
        if message is not None:
            raise UserError(message)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank, in every process."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until all processes have reached this point."""
        if self.size > 1:
            dist.barrier()


def world_from_environment() -> World:
    """Return the processes that `torchrun` set in the environment; without it, this one alone.

    Raises:
        ProcessError: If a variable is missing, or its value does not fit.
    """
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return World()
    size = _number("WORLD_SIZE", 1, 2**31 - 1)
    world = World(_number("RANK", 0, size - 1), size)
    if size > 1:
        _number("MASTER_PORT", 1, 2**16 - 1)
        _text("MASTER_ADDR")
    return world


def _number(name: str, low: int, high: int) -> int:
    text = _text(name)
    is_number = text.isascii() and text.isdigit() and len(text) <= 20
    if not (is_number and low <= int(text) <= high):
        raise ProcessError(
            f"environment variable {name}={text[:40]} must be {low} to {high}: start with "
            "torchrun, which sets it, or unset RANK and WORLD_SIZE for a single process"
        )
    return int(text)


def _text(name: str) -> str:
    text = os.environ.get(name, "")
    if not text:
        given = " and ".join(n for n in ("RANK", "WORLD_SIZE") if n in os.environ)
        raise ProcessError(
            f"environment variable {given} is set, and {name} is not: start with torchrun, which "
            "sets all it needs, or unset RANK and WORLD_SIZE for a single process"
        )
    return text


@contextlib.contextmanager
def join(device: str, *, timeout: float) -> Iterator[World]:
    """Join the process group: NCCL on GPUs, gloo on CPUs.

    Args:
        device: "cuda" or "cpu".
        timeout: Seconds to wait for another process.

    Raises:
        ProcessError: If the processes cannot find each other, or this one has no GPU.
        LostProcessError: If another process dies.
    """
    world = world_from_environment()
    if world.size == 1:
        yield world
        return
    if device == "cuda":
        torch.cuda.set_device(_number("LOCAL_RANK", 0, torch.cuda.device_count() - 1))
    _meet(world, "nccl" if device == "cuda" else "gloo", timeout)
    try:
        yield world
    except signals.Stopped:  # all processes have
        dist.destroy_process_group()
        raise
    except RuntimeError as error:
        if not _CONNECTION_LOST.search(str(error)):
            raise
        raise LostProcessError(
            f"process {world.rank} of {world.size} has lost another process of the job: start the "
            "same command again, which continues from the last complete checkpoint"
        ) from error
    # A process that fails keeps its connections until it ends: the others go on waiting, so nothing
    # ends it before it has said why.
    dist.destroy_process_group()


def fails_alone() -> bool:
    """Whether this process of several fails, and the main one does not, or is the only one.

    If all fail, the line of the main process is enough. Whether they do is known after seconds.
    """
    world = world_from_environment()
    if world.size == 1:
        return False
    if not dist.is_initialized():
        # They have not met. What has started the job ends it once the main process has failed.
        time.sleep(0 if world.is_main else _GRACE)
        return not world.is_main
    store, grace = dist.distributed_c10d._get_default_store(), timedelta(seconds=_GRACE)
    keys = [f"mimkit/failed/{rank}" for rank in range(world.size)]
    try:
        if world.is_main:
            store.set(keys[0], "")
            store.wait(keys, grace)
        else:
            store.wait(keys[:1], grace)
            store.set(keys[world.rank], "")
    except RuntimeError:  # in time, or at all
        return True
    return False


def _meet(world: World, backend: str, timeout: float) -> None:
    """Start the process group.

    Raises:
        ProcessError: If that fails, or takes longer than the timeout.
    """
    at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    _check_address(world, timeout)
    # A watchdog, which can name the process, comes first.
    later = timedelta(seconds=timeout + 2 * _GRACE)
    try:
        store, rank, size = next(rendezvous("env://", timeout=later))
        store = PrefixStore(name_of_start(store, world, timeout), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=later)
    except RuntimeError as error:
        joined = re.search(r"\d+/\d+ clients joined", str(error))
        if joined:
            fault = f"{joined[0].split('/')[0]} of them have joined within --timeout {timeout:g}"
        else:
            fault = f"process {world.rank} cannot join: {' '.join(str(error).split())[:200]}"
        raise ProcessError(
            f"the {world.size} processes of the job do not meet at {at}: {fault}; check "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT of every process"
        ) from error


def name_of_start(store: Store, world: World, timeout: float) -> str:
    """Agree on a name for this start of the job, which no earlier start has used.

    `torchrun --max-restarts` keeps one store for all starts. Without names, processes of the second
    start find the addresses of the first one in it, and wait for what has ended.

    Raises:
        RuntimeError: If not all processes come within the timeout.
    """
    own = uuid4().hex
    if not world.is_main:
        store.set(f"mimkit/here/{world.rank}", own)
        name: str = store.get(f"mimkit/start/{own}").decode()
        store.set(f"mimkit/joined/{name}/{world.rank}", "")
        return name
    missing, end = set(range(1, world.size)), time.monotonic() + timeout
    while missing:
        for rank in sorted(missing):
            if store.check([f"mimkit/joined/{own}/{rank}"]):
                missing.remove(rank)
            elif store.check([f"mimkit/here/{rank}"]):  # it may be of an earlier start
                store.set(f"mimkit/start/{store.get(f'mimkit/here/{rank}').decode()}", own)
        if missing and time.monotonic() > end:
            raise RuntimeError(f"{world.size - len(missing)}/{world.size} clients joined")
        time.sleep(0.02)
    return own


def _check_address(world: World, timeout: float) -> None:
    """Check the address at which processes meet, before PyTorch tries for long.

    Raises:
        ProcessError: If the host is unknown, or its port is taken by another program.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise ProcessError(
            f"environment variable MASTER_ADDR={host} names no host that can be found: "
            "give the name or address of the first node"
        ) from error
    # torchrun itself listens there, or else process 0.
    if not world.is_main or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _wait_for_listener(host, port, timeout)
    else:
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise ProcessError(
                f"environment variable MASTER_PORT={port}: {reason}; choose another port, the same "
                "in every process"
            ) from error


def _wait_for_listener(host: str, port: int, timeout: float) -> None:
    """Wait in silence: PyTorch prints pages while it does."""
    end = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((host, port), timeout=timeout).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise ProcessError(
                    f"nothing listens at {host}:{port} within --timeout {timeout:g}: "
                    "start process 0, and check MASTER_ADDR and MASTER_PORT of every process"
                ) from error
            time.sleep(0.2)


class Watchdog:
    """Ends a process that waits for another one for too long, and says for which.

    Each process notes what it does; that takes no time. If nothing new is noted for too long, a
    thread tells the others by the job's store what was noted last. If some say nothing, those hang.
    If all say something, those hang whose step is the earliest.

    Args:
        world: The processes.
        seconds: How long to wait.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self.world = world
        self.seconds = seconds
        self.note(0, LOADING)
        self._end = threading.Event()

    def note(self, step: int, doing: int) -> None:
        """Note that this process has begun to load (`LOADING`) or compute (`COMPUTING`) a step."""
        self._last = (time.monotonic(), step, doing)

    def __enter__(self) -> "Watchdog":
        self.note(*self._last[1:])
        if self.world.size > 1:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()

    def _watch(self) -> None:
        while not self._end.wait(min(self.seconds / 10, 1.0)):
            since, step, doing = self._last
            if time.monotonic() - since > self.seconds:
                self._give_up(step, doing)

    def _give_up(self, step: int, doing: int) -> None:
        told: dict[int, tuple[int, int]] = {}
        # The store does not answer if the process that keeps it hangs.
        asking = threading.Thread(target=self._compare, args=(step, doing, told), daemon=True)
        asking.start()
        asking.join(2 * _GRACE)
        if self._end.is_set():  # it went on after all
            return
        if self.world.rank == min(told, default=self.world.rank):
            line = f"error: {self._describe(step, dict(told))}\n"
            os.write(2, line.encode())
        os._exit(HUNG)

    def _compare(self, step: int, doing: int, told: dict[int, tuple[int, int]]) -> None:
        """Tell the others what this process did last, and read what they tell."""
        store = dist.distributed_c10d._get_default_store()
        store.set(f"mimkit/last/{self.world.rank}", f"{step} {doing}")
        time.sleep(_GRACE)  # they may have begun to wait a little later
        for rank in range(self.world.size):
            key = f"mimkit/last/{rank}"
            if store.check([key]):
                of_step, did = store.get(key).split()
                told[rank] = (int(of_step), int(did))

    def _describe(self, step: int, told: dict[int, tuple[int, int]]) -> str:
        size, wait = self.world.size, f"--timeout {self.seconds:g} seconds"
        again = "start the same command again, which continues from the last complete checkpoint"
        silent = [rank for rank in range(size) if rank not in told] if told else [0]
        late = [rank for rank, last in told.items() if last < max(told.values())]
        if silent:
            return (
                f"process {_listed(silent)} of {size} hangs: no answer for {wait}, while process "
                f"{self.world.rank} waits in step {step + 1}; {again}"
            )
        if late:
            return (
                f"process {_listed(late)} of {size} hangs: it has been loading the images of step "
                f"{told[late[0]][0] + 1} for {wait}; {again}"
            )
        return (
            f"all {size} processes have been in step {step + 1} for {wait}: give a longer "
            f"--timeout if a step can take that long; {again}"
        )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")


def check_shares(batch_size: int, world: World, *, accumulate: int = 1) -> None:
    """Check that a batch can be divided evenly among processes and accumulation steps.

    Raises:
        UserError: If it cannot.
    """
    parts = world.size * accumulate
    if batch_size % parts:
        raise UserError(
            f"a batch of {batch_size} cannot be divided evenly among {world.size} processes with "
            f"--accumulate {accumulate}: choose a multiple of {parts}"
        )


def check_shard(shard: bool) -> None:
    """Check that there are several processes for `--shard`.

    Raises:
        UserError: If there is only one.
    """
    if shard and world_from_environment().size == 1:
        raise UserError(
            "--shard needs several processes, and there is only one: start with "
            "torchrun --nproc-per-node 2 or more"
        )


def distribute(model: nn.Module, world: World, *, shard: bool) -> nn.Module:
    """Wrap a model in DDP, or shard its weights with FSDP2."""
    if shard:
        for module in model.modules():
            if isinstance(module, TransformerBlock | PixelHead):
                fully_shard(module)
        fully_shard(model)
        return model
    if world.size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(model: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Synchronize gradients in this backward pass, or only in a later one."""
    if isinstance(model, DistributedDataParallel) and not enabled:
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
    yield


def whole(value: Tensor) -> Tensor:
    """Return the full tensor of a sharded one."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_weights(model: nn.Module, *, everywhere: bool = False) -> dict[str, Tensor]:
    """Return the full state dict, under the names of the unwrapped model.

    Args:
        model: The model, copied or sharded.
        everywhere: Whether every process gets the weights, on its device. Otherwise only the main
            process does, on the CPU, and the others get an empty dictionary.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=not everywhere)
    return dict(get_model_state_dict(model, options=options))  # type: ignore[arg-type]
