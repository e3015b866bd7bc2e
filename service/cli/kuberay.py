"""Runs on Kubernetes: `loray k8s render` prints the objects of a run file, `loray train --kuberay` creates and follows them."""

from __future__ import annotations

from service.cli.terminal import console, say
from service.config import ResolvedRun
from service.errors import TrainingError
from service.runs import new_id
from service.settings import Settings


def render(resolved: ResolvedRun, settings: Settings) -> str:
    """The objects of a new run, as YAML."""
    from service.kuberay.manifests import as_yaml

    return as_yaml(_planned(resolved, settings)[1])


def train_on_kubernetes(resolved: ResolvedRun, settings: Settings, *, detach: bool) -> None:
    """Create a run's objects and follow it to its end; Ctrl-C leaves it running. Raises TrainingError when it failed."""
    from service.kuberay.api import Kubernetes, follow

    namespace = resolved.config.kubernetes.namespace
    cluster = Kubernetes(namespace)  # before anything is planned: a missing cluster is told at once
    run_id, objects = _planned(resolved, settings)
    config_map, policy, job = objects
    name = cluster.create(config_map, policy, job)
    say(f"Created RayJob {name} in {namespace}, for run {run_id}")
    if detach:
        say(f"Follow it: kubectl -n {namespace} get rayjob {name} --watch    Stop it: loray runs stop {run_id}")
        return
    try:
        status = follow(cluster, name, lambda text: console.print(text, end="", markup=False, soft_wrap=True))
    except KeyboardInterrupt:
        say(f"\nDetached; the run goes on. See it: kubectl -n {namespace} get rayjob {name}")
        return
    if status.outcome != "SUCCEEDED":
        raise TrainingError(f"RayJob {name} ended {status}, Ray's job {status.outcome or 'never began'}.")


def _planned(resolved: ResolvedRun, settings: Settings) -> tuple[str, list[dict[str, object]]]:
    """A new run's id and objects, with the sizes of its plan."""
    from service.kuberay.manifests import manifests, size_pods
    from service.training.driver import run_name
    from service.training.plan import make_run_plan, memory_on_cluster

    plan = make_run_plan(resolved, settings)
    memory = memory_on_cluster(plan, resolved, settings)
    base_bytes = sum(file.stat().st_size for file in plan.base.path.iterdir() if file.is_file())
    pods = size_pods(resolved, memory, plan.trainable_weight_bytes, base_bytes)
    run_id = new_id(settings.home, run_name(resolved))
    return run_id, manifests(resolved, run_id, pods)
