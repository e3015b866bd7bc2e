"""The Kubernetes API, as much of it as a run needs: create its objects, follow it, read its log. The only file that imports
the official client (`pip install 'loray[k8s]'`), which finds the cluster as kubectl does.

The RayJob is created first and owns the others, so that they go when it goes; its pods wait for the ConfigMap meanwhile.
A run needs nothing of who follows it, and following outlives what passes: an API server that is away, a log that breaks off.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from service.errors import ClusterError
from service.kuberay.manifests import Manifest

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
SUBMITTER = "ray-job-submitter"  # the operator's container in the head's pod, which prints the driver's log
ENDED = ("Complete", "Failed", "ValidationFailed")
LOOK_EVERY_S = 2.0
TIMEOUT_S = (10.0, 30.0)  # to connect, and to wait for bytes
QUIET_S = 60.0  # of a log that prints nothing, which may also be a connection that was dropped
PATIENCE_S = 300.0  # with an API server that does not answer
LAST_LOOKS = 5  # at a log that broke off, after the end
SETTLE_S = 120.0  # for the operator to notice that a driver has ended
PASSING = (429, 500, 502, 503, 504)  # answers that say nothing of what was asked
REFUSALS = (401, 403)


class NoAnswerError(ClusterError):
    """The API server is away or overloaded: asking again may help."""


class RefusedError(ClusterError):
    """Whoever asks may not. An API server that has just begun says so too, for a moment, to those who may."""


@dataclass(frozen=True)
class JobStatus:
    """A RayJob as the operator sees it: `state` of the deployment, `outcome` of Ray's job, and why."""

    state: str
    outcome: str
    reason: str
    cluster: str  # of the running attempt; "" before

    @property
    def ended(self) -> bool:
        """Whether there will be no further attempt."""
        return self.state in ENDED

    def __str__(self) -> str:
        return self.state + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class Submitter:
    """The container that has begun to print an attempt's log, by its pod."""

    pod: str
    exit_code: int | None  # None while it runs; 1 where Ray's job has failed, else 0, stopped or not


class Kubernetes:
    """One cluster and namespace. Every method raises ClusterError."""

    def __init__(self, namespace: str) -> None:
        try:
            from kubernetes import client, config
            from urllib3 import Retry
        except ImportError as error:
            raise ClusterError(f"--kuberay needs the Kubernetes client: pip install 'loray[k8s]' ({error})") from error
        settings = client.Configuration()
        # Not urllib3's three: they come at once, make each timeout four, and print a warning. read=False: such errors come as
        # they are, not as a MaxRetryError.
        settings.retries = Retry(0, read=False)
        named, usual = os.environ.get("KUBECONFIG"), "~/.kube/config"
        try:
            if named or Path(usual).expanduser().exists():
                config.load_kube_config(named or usual, client_configuration=settings)
            else:  # config.load_config does the same, and prints that it does
                config.load_incluster_config(client_configuration=settings)
        except config.ConfigException as error:
            raise ClusterError(
                f"no Kubernetes cluster is configured: {error} Set KUBECONFIG, or see that `kubectl get rayjobs` works."
            ) from error
        self.namespace = namespace
        api = client.ApiClient(settings)
        self._core, self._networking = client.CoreV1Api(api), client.NetworkingV1Api(api)
        self._custom = client.CustomObjectsApi(api)

    def create(self, config_map: Manifest, policy: Manifest, job: Manifest) -> str:
        """Create a run's objects; the RayJob's name. Where the others cannot be created, it is deleted again."""
        with _answers("creating the RayJob"):
            made = self._custom.create_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, job, _request_timeout=TIMEOUT_S
            )
        metadata = made["metadata"]
        name = str(metadata["name"])
        owner = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "RayJob", "name": name, "uid": metadata["uid"]}
        for owned in (config_map, policy):
            owned["metadata"]["ownerReferences"] = [owner]
        try:
            with _answers("creating the run's ConfigMap and NetworkPolicy"):
                self._networking.create_namespaced_network_policy(self.namespace, policy, _request_timeout=TIMEOUT_S)
                self._core.create_namespaced_config_map(self.namespace, config_map, _request_timeout=TIMEOUT_S)
        except ClusterError:
            with _answers("deleting the RayJob again"):
                self._custom.delete_namespaced_custom_object(
                    GROUP, VERSION, self.namespace, PLURAL, name, _request_timeout=TIMEOUT_S
                )
            raise
        return name

    def status(self, name: str) -> JobStatus:
        """How a RayJob is now."""
        with _answers(f"asking for RayJob {name}"):
            job = self._custom.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, name, _request_timeout=TIMEOUT_S
            )
        status = job.get("status") or {}
        waiting = "Suspended" if job["spec"].get("suspend") else "New"
        return JobStatus(
            state=status.get("jobDeploymentStatus") or waiting,
            outcome=status.get("jobStatus") or "",
            reason=": ".join(part for part in (status.get("reason"), status.get("message")) if part),
            cluster=status.get("rayClusterName") or "",
        )

    def submitter(self, cluster: str) -> Submitter | None:
        """The submitter on a Ray cluster; None where it has not begun yet."""
        selector = f"ray.io/cluster={cluster},ray.io/node-type=head"
        with _answers(f"looking for the head of {cluster}"):
            pods = self._core.list_namespaced_pod(
                self.namespace, label_selector=selector, _request_timeout=TIMEOUT_S
            ).items
        for pod in pods[:1]:
            for container in pod.status.container_statuses or ():
                if container.name == SUBMITTER and container.state is not None:
                    if container.state.terminated is not None:
                        return Submitter(pod.metadata.name, container.state.terminated.exit_code)
                    if container.state.running is not None:
                        return Submitter(pod.metadata.name, None)
        return None

    def log(self, submitter: Submitter) -> Iterator[str]:
        """What the driver printed from its beginning on, and prints, until it ends or is quiet for QUIET_S."""
        from urllib3.exceptions import ReadTimeoutError

        decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may come in two parts
        with _answers(f"reading the log of pod {submitter.pod}"):
            try:
                stream = self._core.read_namespaced_pod_log(
                    submitter.pod,
                    self.namespace,
                    container=SUBMITTER,
                    follow=True,
                    _preload_content=False,
                    _request_timeout=(TIMEOUT_S[0], QUIET_S),
                )
                for part in stream.stream():
                    yield decoder.decode(part)
            except ReadTimeoutError:
                if submitter.exit_code is not None:  # all of it is there: it came to a halt on the way
                    raise


def follow(cluster: Kubernetes, name: str, echo: Callable[[str], None]) -> JobStatus:
    """Tell of a RayJob's states and print its driver's log, attempt after attempt, until it ends; how it ended.

    In SidecarMode the operator looks at the submitter only once all pods were ready, and a submitter that has ended keeps the
    head's from being so: the job stays Initializing until preRunningDeadlineSeconds. After SETTLE_S of that, the outcome is the
    driver's. (https://github.com/ray-project/kuberay/issues/4199 and 4945)
    """
    told, attempt = "", _Attempt("")
    while True:
        status = _status(cluster, name, echo, answered=bool(told))
        if str(status) != told:
            echo(f"RayJob {name}: {status}\n")
            told = str(status)
        if status.cluster != attempt.cluster:
            attempt = _Attempt(status.cluster)
        attempt.print_log(cluster, echo)
        if status.ended:
            attempt.print_the_rest(cluster, echo)
            return status
        if status.state == "Initializing" and time.monotonic() - attempt.ended_at >= SETTLE_S:
            ended = f"the driver has ended, its submitter with exit code {attempt.exit_code}"
            echo(
                f"RayJob {name}: {ended}. The operator has not noticed yet, because not all worker pods are there. See them: "
                f"kubectl -n {cluster.namespace} get pods -l ray.io/cluster={attempt.cluster}\n"
            )
            return replace(status, outcome=attempt.outcome, reason=ended)
        time.sleep(LOOK_EVERY_S)


def _status(cluster: Kubernetes, name: str, echo: Callable[[str], None], *, answered: bool) -> JobStatus:
    """How a RayJob is, from an API server that may not answer for up to PATIENCE_S, or refuse where it has `answered` before."""
    passing = (NoAnswerError, RefusedError) if answered else NoAnswerError
    since = math.inf
    while True:
        try:
            return cluster.status(name)
        except passing as error:
            if since == math.inf:
                since = time.monotonic()
                echo(f"{error}; trying again\n")
            if time.monotonic() - since >= PATIENCE_S:
                raise ClusterError(
                    f"{error}. It was asked for {PATIENCE_S / 60:.0f} minutes. The run itself goes on. Follow it: kubectl -n "
                    f"{cluster.namespace} get rayjob {name} --watch; `loray runs show` reads the run's directory."
                ) from error
        time.sleep(LOOK_EVERY_S)


@dataclass
class _Attempt:
    """One attempt, by its Ray cluster: how much of its log was printed, and how its driver ended."""

    cluster: str  # "" before there is one
    printed: int = 0  # characters
    complete: bool = False
    broken: bool = False  # told once
    exit_code: int | None = None
    ended_at: float = math.inf  # by our clock, when it was first seen
    tail: str = ""  # the last letters

    @property
    def outcome(self) -> str:
        """Of a submitter that has ended, as Ray names it; its last words tell success from a stop."""
        return "FAILED" if self.exit_code else "SUCCEEDED" if "succeeded" in self.tail else "STOPPED"

    def print_the_rest(self, kubernetes: Kubernetes, echo: Callable[[str], None]) -> None:
        """After the end: the log to its end, where it has broken off on the way."""
        for _ in range(LAST_LOOKS if self.broken or self.printed else 0):
            if self.complete:
                return
            time.sleep(LOOK_EVERY_S)
            self.print_log(kubernetes, echo)

    def print_log(self, kubernetes: Kubernetes, echo: Callable[[str], None]) -> None:
        """Print what is new in the driver's log, until that ends, breaks off or is quiet; to be called again.

        The API gives it from its beginning each time, and what was printed is skipped: no line comes twice. A log that is shorter
        than what was printed was rotated by the kubelet (at 10 MiB): what it has is passed over, and told to be.
        """
        if self.complete or not self.cluster:
            return
        try:
            submitter = kubernetes.submitter(self.cluster)
            if submitter is None:
                return
            if submitter.exit_code is not None and self.exit_code is None:
                self.exit_code, self.ended_at = submitter.exit_code, time.monotonic()
            sent = 0
            for text in kubernetes.log(submitter):
                new = text[max(0, self.printed - sent) :]
                sent += len(text)
                if new:
                    echo(new)
                    self.printed, self.tail = sent, (self.tail + new)[-500:]
            if sent < self.printed:
                echo("\n... the log was rotated: lines are missing here, the run's directory has them ...\n")
                self.printed = sent
            self.complete = submitter.exit_code is not None  # the stream of a running one may end on the way
        except ClusterError as error:
            if not self.broken:
                echo(f"\n{error} The run goes on; its log is in the run's directory too.\n")
            self.broken = True


@contextmanager
def _answers(what: str) -> Iterator[None]:
    """ClusterError for whatever the client raises; NoAnswerError and RefusedError where that may pass."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        passing, refusal = error.status in PASSING, error.status in REFUSALS
        kind = NoAnswerError if passing else RefusedError if refusal else ClusterError
        raise kind(f"{what}: Kubernetes answered {error.status} {error.reason}: {_message(error)}") from error
    except HTTPError as error:
        raise NoAnswerError(f"{what}: the Kubernetes API cannot be reached: {error}") from error


def _message(error: Any) -> str:
    """What the API server says; its answers are Status objects."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.body)
