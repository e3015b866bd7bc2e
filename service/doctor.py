"""Is this cluster fit for a run? Asked of every node, before anything is spent: `loray doctor`, `jobs/doctor.py`.

Uses Ray's tasks and actors only, and leaves nothing behind: what it writes to the shared storage, it deletes.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path
from typing import Any

from rich.table import Table

from service import storage
from service.config import ScaleBlock
from service.errors import LorayError
from service.settings import Settings

PACKAGES = ("loray", "torch", "ray", "transformers", "peft", "numpy", "safetensors")
OPTIONAL = ("deepspeed", "bitsandbytes")
# What the smallest real runs were seen to need; a plan says what a given run needs.
MIN_DISK_BYTES = 5 * 2**30
MIN_MEMORY_BYTES = 2 * 2**30
MIN_SHARED_MEMORY_BYTES = 64 * 2**20  # Docker's default, which NCCL outgrows
MIN_BYTES_PER_S = 50e6  # half of a gigabit network: a full model's gradients would take minutes a step below it
MESSAGE_BYTES = 16 * 2**20
MAX_PAIRS = 28  # all pairs of eight nodes; of more nodes the first ones
ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Check:
    """One thing looked at. `found` says what was seen, `remedy` what to do where it is not good."""

    name: str
    where: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class NodeFacts:
    """What one node says of itself. Sizes in bytes."""

    node: str
    versions: dict[str, str]
    disk_free: int
    memory_free: int
    shared_memory: int
    read: str  # what it read from the shared storage, or why it could not
    written: str | None  # why it could not write there


def examine(settings: Settings, workers: int) -> list[Check]:
    """Every check, on the connected cluster. Raises ClusterError when Ray itself does not answer."""
    token = secrets.token_hex(16)
    silent: dict[str, Check] = {}
    place = storage.join(settings.home, "doctor", token)
    try:
        storage.write_bytes(storage.join(place, "driver"), token.encode())
        facts, silent = _facts_of_all_nodes(settings, place)
        checks = [*silent.values(), *_versions(facts), *_storage(facts, settings.home, place, token), *_sizes(facts)]
    except LorayError as error:
        checks = [
            Check("shared storage", "driver", False, str(error), "Set LORAY_HOME to storage that all nodes share.")
        ]
    finally:
        storage.delete_tree(place)
    return [*checks, _room(workers), *_bandwidths(without=silent.keys())]


def as_table(checks: Sequence[Check]) -> Table:
    """For a person."""
    table = Table("", "check", "where", "found", "what to do")
    for check in checks:
        table.add_row("[green]ok" if check.ok else "[red]no", check.name, check.where, check.found, check.remedy)
    return table


def _facts_of_all_nodes(settings: Settings, place: str) -> tuple[list[NodeFacts], dict[str, Check]]:
    """What the nodes say, and by its id a problem for each that says nothing."""
    import ray
    import ray.exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0)(_look_around)
    nodes = _nodes()
    answers = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(
            settings.home, str(settings.cache), place
        )
        for node in nodes
    ]
    ray.wait(answers, num_returns=len(answers), timeout=ANSWER_TIMEOUT_S)  # for all of them together
    facts: list[NodeFacts] = []
    silent: dict[str, Check] = {}
    for node, answer in zip(nodes, answers, strict=True):
        try:
            facts.append(ray.get(answer, timeout=0))
        except ray.exceptions.RayError as error:
            late = isinstance(error, ray.exceptions.GetTimeoutError)
            found = f"no answer within {ANSWER_TIMEOUT_S:g} s" if late else f"{type(error).__name__}: {error}"[:300]
            remedy = "Look at the node and at Ray's logs there (raylet.out), or remove it from the cluster."
            silent[node.id] = Check("answer", node.name, False, found, remedy)
            ray.cancel(answer, force=True)
    return facts, silent


@dataclass(frozen=True)
class Node:
    """A node as Ray knows it."""

    id: str
    host: str
    gpus: int

    @property
    def name(self) -> str:
        """For people; several nodes may be on one host."""
        return f"{self.host} {self.id[:6]}"


def _nodes() -> list[Node]:
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [Node(n["NodeID"], n["NodeManagerHostname"], int(n["Resources"].get("GPU", 0))) for n in alive]


def _look_around(home: str, cache: str, place: str) -> NodeFacts:
    """Runs on the node that is asked."""
    name = f"{socket.gethostname()}-{os.getpid()}"
    try:
        read, written = storage.read_bytes(storage.join(place, "driver")).decode(), None
        storage.write_bytes(storage.join(place, name), name.encode())
    except LorayError as error:
        read, written = str(error), str(error)
    directory = Path(cache)
    directory.mkdir(parents=True, exist_ok=True)
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0  # noqa: S108 - only its size
    return NodeFacts(name, _installed(), shutil.disk_usage(directory).free, _memory_free(), shm, read, written)


def _installed() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in (*PACKAGES, *OPTIONAL):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def _memory_free() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def _versions(facts: list[NodeFacts]) -> Iterator[Check]:
    here = _installed()
    for node in facts:
        # Without the build's name (+cpu, +cu128): a driver on a node without a GPU may have another one.
        odd = {p: (v, node.versions[p]) for p, v in here.items() if _public(node.versions[p]) != _public(v)}
        found = ", ".join(f"{p} {there} (driver: {ours})" for p, (ours, there) in odd.items())
        missing = [p for p in PACKAGES if node.versions[p] == "absent"]
        good = ", ".join(f"{p} {here[p]}" for p in ("python", "torch", "ray", *OPTIONAL))
        remedy = "Install the same versions on every node; one image for all is the simplest." if odd or missing else ""
        yield Check("versions", node.node, not odd and not missing, found or good, remedy)


def _public(version: str) -> str:
    return version.partition("+")[0]


def _storage(facts: list[NodeFacts], home: str, place: str, token: str) -> Iterator[Check]:
    remedy = f"Set LORAY_HOME, which is {home}, to an s3:// URI or a directory that every node mounts at the same path."
    for node in facts:
        ok = node.read == token and node.written is None
        if ok:
            try:
                ok = storage.read_bytes(storage.join(place, node.node)).decode() == node.node
            except LorayError:
                ok = False  # it wrote to a directory of its own that has the same name
        found = f"{home} read and written" if ok else f"{home} is not the driver's: {node.read}"
        yield Check("shared storage", node.node, ok, found, "" if ok else remedy)


def _sizes(facts: list[NodeFacts]) -> Iterator[Check]:
    for node in facts:
        for name, seen, wanted, remedy in (
            ("disk", node.disk_free, MIN_DISK_BYTES, "Free some, or put LORAY_CACHE on a larger disk."),
            ("memory", node.memory_free, MIN_MEMORY_BYTES, "Stop what else runs there."),
            ("shared memory", node.shared_memory, MIN_SHARED_MEMORY_BYTES, "Mount a larger /dev/shm (--shm-size)."),
        ):
            found = f"{seen / 2**30:.1f} GiB free" if name != "shared memory" else f"{seen / 2**30:.2f} GiB"
            yield Check(name, node.node, seen >= wanted, found, "" if seen >= wanted else remedy)


def _room(workers: int) -> Check:
    from service.training.placement import Cluster, room_for, share_of

    cluster = Cluster.current()
    share = share_of(cluster, ScaleBlock(workers=workers))
    room = room_for(cluster, share)
    each = " and ".join(f"{amount:g} {kind}" for kind, amount in share.items())
    found = f"{room} worker(s) with {each} each can be placed now, {workers} are wanted"
    return Check(
        "workers", "cluster", room >= workers, found, "" if room >= workers else "Add nodes, or ask for fewer."
    )


def _bandwidths(without: Collection[str]) -> Iterator[Check]:
    """All-reduce between pairs of nodes: NCCL where both have a GPU, else gloo. `without`: ids of nodes that do not answer."""
    nodes = [node for node in _nodes() if node.id not in without]
    for left, right, gpu in islice(pairs(nodes), MAX_PAIRS):
        where = f"{left.name} - {right.name}"
        try:
            rate, backend = _rate(left.id, right.id, gpu=gpu)
        except Exception as error:  # whatever a network does: the check's answer is that it did
            yield Check(
                "collectives", where, False, f"{type(error).__name__}: {error}"[:300], "Open all ports between them."
            )
            continue
        found = f"{rate / 1e6:,.0f} MB/s all-reduce of {MESSAGE_BYTES >> 20} MiB ({backend})"
        remedy = "" if rate >= MIN_BYTES_PER_S else "Look at the network between these nodes."
        if gpu and backend != "nccl":
            remedy = "Ray counts GPUs there that torch cannot use: install a torch for CUDA, and look at nvidia-smi."
        yield Check("collectives", where, not remedy, found, remedy)


def pairs(nodes: Sequence[Node]) -> Iterator[tuple[Node, Node, bool]]:
    """The nodes that will talk to each other in a run, and whether over their GPUs; the only one with itself.

    Where some have GPUs, those are where workers go, and a head without one is left out.
    """
    able = [node for node in nodes if node.gpus] or list(nodes)
    if len(able) == 1:
        yield able[0], able[0], able[0].gpus >= 2
    for left, right in combinations(able, 2):
        yield left, right, left.gpus > 0


def _rate(left: str, right: str, *, gpu: bool) -> tuple[float, str]:
    """Bytes per second, and by which backend."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    peer = ray.remote(num_cpus=0, num_gpus=1 if gpu else 0)(_Peer)
    both = [
        peer.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in (left, right)
    ]
    try:
        address = ray.get(both[0].address.remote(), timeout=ANSWER_TIMEOUT_S)
        asked = [p.all_reduce.remote(rank, address, gpu=gpu) for rank, p in enumerate(both)]
        answers: list[tuple[float, str]] = ray.get(asked, timeout=ANSWER_TIMEOUT_S)
    finally:
        for actor in both:
            ray.kill(actor)
    return min(answers)


class _Peer:
    """One of two processes that exchange tensors."""

    def address(self) -> str:
        import ray

        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def all_reduce(self, rank: int, address: str, *, gpu: bool) -> tuple[float, str]:
        """Bytes per second, the best of three, and the backend: gloo also where torch finds no GPU."""
        import torch
        import torch.distributed as dist

        cuda = gpu and torch.cuda.is_available()
        backend = "nccl" if cuda else "gloo"
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=2)
        tensor: Any = torch.ones(MESSAGE_BYTES // 4, device="cuda" if cuda else "cpu")
        best = float("inf")
        for _ in range(4):  # the first one connects
            started = time.monotonic()
            dist.all_reduce(tensor)
            float(tensor[0])  # on a GPU, wait for it
            best = min(best, time.monotonic() - started)
        dist.destroy_process_group()
        return MESSAGE_BYTES / best, backend
