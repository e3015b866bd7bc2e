"""The Kubernetes API, as much of it as a run needs: create its objects, follow it, read its log. The only file that imports
the official client (`pip install 'loray[k8s]'`), which finds the cluster as kubectl does.

The RayJob is created first and owns the others, so that they go when it goes; its pods wait for the ConfigMap meanwhile.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from service.errors import ClusterError
from service.kuberay.manifests import Manifest

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
SUBMITTER = "ray-job-submitter"  # the operator's container in the head's pod, which prints the driver's log
ENDED = ("Complete", "Failed", "ValidationFailed")
LOOK_EVERY_S = 2.0


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


class Kubernetes:
    """One cluster and namespace. Every method raises ClusterError."""

    def __init__(self, namespace: str) -> None:
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise ClusterError(f"--kuberay needs the Kubernetes client: pip install 'loray[k8s]' ({error})") from error
        try:
            named = os.environ.get("KUBECONFIG")  # the client itself reads it when it is imported
            config.load_config(**({"config_file": named} if named else {}))
        except config.ConfigException as error:
            raise ClusterError(
                f"no Kubernetes cluster is configured: {error} Set KUBECONFIG, or see that `kubectl get rayjobs` works."
            ) from error
        self._namespace = namespace
        self._core, self._networking = client.CoreV1Api(), client.NetworkingV1Api()
        self._custom = client.CustomObjectsApi()

    def create(self, config_map: Manifest, policy: Manifest, job: Manifest) -> str:
        """Create a run's objects; the RayJob's name. Where the others cannot be created, it is deleted again."""
        with _answers("creating the RayJob"):
            made = self._custom.create_namespaced_custom_object(GROUP, VERSION, self._namespace, PLURAL, job)
        metadata = made["metadata"]
        name = str(metadata["name"])
        owner = {"apiVersion": f"{GROUP}/{VERSION}", "kind": "RayJob", "name": name, "uid": metadata["uid"]}
        for owned in (config_map, policy):
            owned["metadata"]["ownerReferences"] = [owner]
        try:
            with _answers("creating the run's ConfigMap and NetworkPolicy"):
                self._networking.create_namespaced_network_policy(self._namespace, policy)
                self._core.create_namespaced_config_map(self._namespace, config_map)
        except ClusterError:
            with _answers("deleting the RayJob again"):
                self._custom.delete_namespaced_custom_object(GROUP, VERSION, self._namespace, PLURAL, name)
            raise
        return name

    def status(self, name: str) -> JobStatus:
        """How a RayJob is now."""
        with _answers(f"asking for RayJob {name}"):
            job = self._custom.get_namespaced_custom_object(GROUP, VERSION, self._namespace, PLURAL, name)
        status = job.get("status") or {}
        waiting = "Suspended" if job["spec"].get("suspend") else "New"
        return JobStatus(
            state=status.get("jobDeploymentStatus") or waiting,
            outcome=status.get("jobStatus") or "",
            reason=": ".join(part for part in (status.get("reason"), status.get("message")) if part),
            cluster=status.get("rayClusterName") or "",
        )

    def log(self, cluster: str) -> Iterator[str]:
        """What the driver on a Ray cluster prints, until it ends; nothing where it has not begun yet."""
        selector = f"ray.io/cluster={cluster},ray.io/node-type=head"
        with _answers(f"looking for the head of {cluster}"):
            pods = self._core.list_namespaced_pod(self._namespace, label_selector=selector).items
        for pod in pods[:1]:
            if not any(status.name == SUBMITTER and _begun(status) for status in pod.status.container_statuses or ()):
                continue
            with _answers(f"reading the log of pod {pod.metadata.name}"):
                stream = self._core.read_namespaced_pod_log(
                    pod.metadata.name, self._namespace, container=SUBMITTER, follow=True, _preload_content=False
                )
                for part in stream.stream():
                    yield part.decode(errors="replace")


def follow(cluster: Kubernetes, name: str, echo: Callable[[str], None]) -> JobStatus:
    """Tell of a RayJob's states and print its driver's log, attempt after attempt, until it ends; how it ended."""
    told, printed = "", ""
    while True:
        status = cluster.status(name)
        if str(status) != told:
            echo(f"RayJob {name}: {status}\n")
            told = str(status)
        if status.cluster and status.cluster != printed:
            try:
                for text in cluster.log(status.cluster):
                    printed = status.cluster
                    echo(text)
            except ClusterError as error:
                printed = status.cluster
                echo(f"\n{error} The run goes on; its log is in the run's directory too.\n")
        if status.ended:
            return status
        time.sleep(LOOK_EVERY_S)


def _begun(status: Any) -> bool:
    return status.state is not None and (status.state.running or status.state.terminated) is not None


@contextmanager
def _answers(what: str) -> Iterator[None]:
    """ClusterError for whatever the client raises."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise ClusterError(f"{what}: Kubernetes answered {error.status} {error.reason}: {_message(error)}") from error
    except HTTPError as error:
        raise ClusterError(f"{what}: the Kubernetes API cannot be reached: {error}") from error


def _message(error: Any) -> str:
    """What the API server says; its answers are Status objects."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return str(error.body)
