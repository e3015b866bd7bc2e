"""Puts an endpoint on Ray Serve: `build` for `serve run serve.app:build model=NAME`, `start` and `stop` for Python.

    url = start(load_serve("serve.yaml"), load_settings())     # http://127.0.0.1:8000, ready for requests
    stop("default")                                            # the endpoint's name, as the file gives it

What can be known to be wrong (config, base model, adapters, port, resources) is found before anything is deployed; what
fails later is deleted again. Without API keys it listens on loopback only. The two deployments are `gateway.py` and `replica.py`.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, BackpressureConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from serve.adapter_uris import AdapterUris, checked_root
from serve.api_keys import VARIABLE, ApiKey, load_keys
from serve.desired import Base, EndpointFiles
from serve.engine_router import STATS_EVERY_S, EngineRouter
from serve.gateway import Gateway
from serve.lines import FULL_LINES, line_rows
from serve.patience import patiently
from serve.registration import default_label, from_uri, is_uri, register, registrable
from serve.replica import EngineReplica
from serve.routing import Registered
from service import launcher
from service.base_models import BUNDLED, resolve_base_model
from service.config import EngineBlock, ServeConfig, read_text, validated
from service.errors import ClusterError, ConfigError, LorayError, StorageError
from service.registry import Registry
from service.render import load_renderer
from service.settings import Settings, load_settings
from service.versions import skew

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_PREFIX = "loray-"
# Reservations, not limits: gateway and engine fit on a machine of 1 CPU, and PyTorch takes `engine.threads` of them.
_GATEWAY_CPUS = 0.1
_ENGINE_CPUS = 0.5
_GATEWAYS = 1  # each has a stream to a replica, which Serve counts as a request
_START_LIMIT_S = 1800.0  # reading a 70B model from a network disk
_ROUTE_LIMIT_S = 60.0
_PORT_LIMIT_S = 30.0
_STEP_S = 0.1  # a stream that gets fewer than 10 tokens a second may be cut when the endpoint ends
_KILL_LIMIT_S = 60.0  # Serve kills what has not ended in time, and says so
_LOOK_EVERY_S = 0.2
_STARTS = 1  # what may pass is waited for in the constructor; what is wrong would be wrong again
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
_DEPLOY_ERRORS = (RayError, RayServeException, RuntimeError, TimeoutError)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A config whose base model and adapters exist and fit together. `adapters` are to be registered, by label."""

    config: ServeConfig
    settings: Settings
    base: Base
    files: EndpointFiles
    adapters: dict[str, Registered]
    keys: tuple[ApiKey, ...]
    uris: AdapterUris


def build(args: Mapping[str, Any] | ServeConfig) -> ray_serve.Application:
    """The application of a serve config. Roots come from the environment; the port is that of the Serve it runs on.

    Connects to Ray where that was not done: `serve run` builds before it connects, and what the application may take and
    where it would listen is in the cluster. Storage or a hub that is away for a moment is waited for (`patience.py`).
    """
    if differing := skew():
        _log.warning(differing)
    config = args if isinstance(args, ServeConfig) else validated(ServeConfig, _typed(args), "arguments")
    settings = load_settings()
    prepared = patiently(lambda: prepare(config, settings), "preparing the endpoint")
    if not ray.is_initialized():
        launcher.connect()
    _check_listening(None, prepared.keys)
    patiently(lambda: register(prepared.files, prepared.adapters), "registering the adapters")
    return application(prepared)


def start(config: ServeConfig, settings: Settings) -> str:
    """Deploy and wait until it answers; the base URL. Connects to Ray, or starts a local one, if that was not done.

    Raises LorayError; nothing of the endpoint is left then, in the cluster or in its desired state, and what others serve
    there is not touched. So `stop` belongs to a start that has returned.
    """
    prepared = prepare(config, settings)
    launcher.connect()
    serve_was_running = _check_free(config, prepared.keys)
    name = f"{_PREFIX}{config.endpoint}"
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    registration = register(prepared.files, prepared.adapters)  # the replicas read it when they start
    try:
        ray_serve.start("HeadOnly", {"host": config.host, "port": config.port}, logging_config=_QUIET)
        target = ray_serve.RunTarget(application(prepared), name=name, route_prefix="/", logging_config=_QUIET)
        ray_serve.run_many([target], wait_for_applications_running=False)
        _await_running(name)
        return _await_route(name, config.host, config.port)
    except BaseException as error:
        try:
            registration.take_back()
        except StorageError as second:  # the first error is the one to tell
            _log.warning("the adapters of endpoint %r stay registered: %s", config.endpoint, second)
        _take_off(name, shut_down=not serve_was_running)
        if isinstance(error, LorayError) or not isinstance(error, _DEPLOY_ERRORS):
            raise
        raise ClusterError(f"endpoint {config.endpoint!r} could not be deployed: {error}") from error


def stop(endpoint: str) -> None:
    """Let running requests finish and take this endpoint off the cluster; other applications and Ray keep running."""
    if ray.is_initialized():
        _take_off(f"{_PREFIX}{endpoint}", shut_down=True)


def _take_off(name: str, *, shut_down: bool) -> None:
    """Delete one application, and with `shut_down` Serve too where no other application needs it."""
    if name in ray_serve.status().applications:
        limit_s = _graceful_s(name) + _KILL_LIMIT_S
        ray_serve.delete(name, _blocking=False)  # else it raises TimeoutError after 60 s, whatever still runs
        _await_gone(name, limit_s)
    if shut_down and not ray_serve.status().applications:
        _shut_down()


def _graceful_s(name: str) -> float:
    """For how long Serve lets the requests of an application's deployments go on when it is deleted."""
    deployments = _client().get_serve_details()["applications"][name]["deployments"].values()
    return max((float(d["deployment_config"]["graceful_shutdown_timeout_s"]) for d in deployments), default=0.0)


def _await_gone(name: str, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while name in ray_serve.status().applications:
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{name} could not be taken off Ray Serve within {limit_s:g} s. Look at `serve status`, or end the cluster."
            )
        time.sleep(_LOOK_EVERY_S)


def _shut_down() -> None:
    """Shut Serve down and wait until its proxy has let the port go, so that the next start finds it free."""
    options = _http_options()
    ray_serve.shutdown()
    deadline = time.monotonic() + _PORT_LIMIT_S
    while options is not None and _taken(options.host, options.port) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)


def prepare(config: ServeConfig, settings: Settings) -> Prepared:
    """Resolve and check keys, base model and adapters. Writes nothing, needs no Ray."""
    keys = load_keys(os.environ, config.keys)
    if config.host not in LOOPBACK and not keys:
        raise ConfigError(
            f"host is {config.host}, where others can reach it, and there are no API keys. Set {VARIABLE} or keys: FILE "
            "(`loray keys new` makes one), or leave host out."
        )
    resolved = resolve_base_model(config.model.id, settings.cache, config.model.revision, settings.home)
    template = config.model.chat_template
    template = None if template is None else read_text(template, "model.chat_template")
    base = Base(
        name=_public_name(config.model.id),
        source=_source(config.model.id, resolved.path),
        revision=config.model.revision,
        chat_template=template,
        digest=resolved.digest,
        renderer_digest=load_renderer(resolved.path, template).digest,
    )
    files = EndpointFiles(settings.home, config.endpoint)
    uris = AdapterUris(_roots(config), config.adapter_max_bytes)
    return Prepared(config, settings, base, files, _adapters(config, base, Registry(settings.home), uris), keys, uris)


def application(prepared: Prepared) -> ray_serve.Application:
    """The two deployments, bound. Limits are explicit: what exceeds them is answered 429, not queued for ever."""
    config = prepared.config
    places, limit_s = FULL_LINES * line_rows(config.engine.slots), drain_s(config.engine)
    num_gpus = 1 if _cluster_total("GPU") >= config.min_replicas else 0
    engine = ray_serve.deployment(
        name="Engine",
        **_scale(config),
        ray_actor_options={
            "num_cpus": _ENGINE_CPUS,
            "num_gpus": num_gpus,
            "runtime_env": {"env_vars": launcher.ALLOCATOR},
        },
        # Nearly all are let in, because there each adapter has a line of its own (`lines.py`); Serve's are first come, first served.
        max_ongoing_requests=places + _GATEWAYS,
        request_router_config=RequestRouterConfig(
            request_router_class=EngineRouter, request_routing_stats_period_s=STATS_EVERY_S
        ),
        max_queued_requests=places,
        graceful_shutdown_timeout_s=limit_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=_STARTS,
        logging_config=_QUIET,
    )(EngineReplica)
    gateway = ray_serve.deployment(
        name="Gateway",
        ray_actor_options={"num_cpus": _GATEWAY_CPUS},
        max_ongoing_requests=10_000,
        max_queued_requests=1_000,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        graceful_shutdown_timeout_s=limit_s,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=_STARTS,
        logging_config=_QUIET,
    )(Gateway)
    replicas = engine.bind(
        prepared.base, prepared.files, prepared.settings.cache, config.precision, prepared.config.engine, prepared.uris
    )
    return gateway.bind(prepared.base, prepared.files, prepared.keys, prepared.uris, replicas)


def drain_s(engine: EngineBlock) -> float:
    """How long what a replica has taken may go on when the endpoint ends: a full line of answers, each as long as the context."""
    turns = math.ceil(line_rows(engine.slots) / engine.slots)
    return turns * engine.max_context * _STEP_S


def _scale(config: ServeConfig) -> dict[str, Any]:
    """How many engine replicas, as Serve's deployments take it."""
    wanted = config.replicas
    if isinstance(wanted, int):
        return {"num_replicas": wanted}
    scaling = AutoscalingConfig(
        min_replicas=wanted.min,
        max_replicas=wanted.max,
        target_ongoing_requests=(wanted.ongoing or config.engine.slots) + _GATEWAYS,
        upscale_delay_s=wanted.upscale_delay_s,
        downscale_delay_s=wanted.downscale_delay_s,
    )
    return {"autoscaling_config": scaling}


def _roots(config: ServeConfig) -> tuple[str, ...]:
    """The config's adapter roots, absolute, or ConfigError with all that is wrong with them."""
    problems, roots = [], []
    for root in config.adapter_roots:
        try:
            roots.append(checked_root(root))
        except LorayError as error:
            problems.append(f"adapter_roots: {error}")
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(roots)


def _adapters(config: ServeConfig, base: Base, registry: Registry, uris: AdapterUris) -> dict[str, Registered]:
    """The config's adapters by label, or ConfigError with all that is wrong with them."""
    problems: list[str] = []
    wanted: dict[str, Registered] = {}
    for model in config.adapters:
        try:
            label = default_label(model)
            if label in wanted:
                raise ConfigError(f"{model} and {wanted[label].model} would both be called {label!r}. PUT one later.")
            if is_uri(model):
                wanted[label] = from_uri(label, model, None, base, uris)
            else:
                wanted[label] = registrable(label, model, base, registry)
        except StorageError:
            raise  # it may pass, and says nothing of the config
        except LorayError as error:
            problems.append(f"  adapters: {error}")
    if problems:
        raise ConfigError("\n".join([f"endpoint {config.endpoint!r} cannot start with these adapters:", *problems]))
    return wanted


def _typed(args: Mapping[str, Any]) -> dict[str, Any]:
    """`serve run` passes every value as text: whole numbers become numbers again, for the keys that are numbers."""
    numbers = {"port", "replicas"}
    return {k: int(v) if k in numbers and isinstance(v, str) and v.isdecimal() else v for k, v in args.items()}


def _is_directory(name: str) -> bool:
    return name not in BUNDLED and not name.startswith("s3://") and Path(name).expanduser().is_dir()


def _public_name(name: str) -> str:
    """What clients call the base: a bundled name or hub id as it is, a directory by its last part, not its path."""
    return Path(name).expanduser().resolve().name if _is_directory(name) else name.removeprefix("s3://").rstrip("/")


def _source(name: str, path: Path) -> str:
    """What the replicas resolve: a relative path means nothing in their working directory."""
    return str(path) if _is_directory(name) else name


def _check_free(config: ServeConfig, keys: tuple[ApiKey, ...]) -> bool:
    """Port, name and CPUs, before anything is written or deployed. Whether Serve runs already."""
    taken = [name for name in ray_serve.status().applications if name.startswith(_PREFIX)]
    if taken:
        raise ClusterError(
            f"this cluster serves endpoint {taken[0].removeprefix(_PREFIX)!r} already, and it holds one endpoint. "
            "Stop it first, or register adapters there: PUT /v1/adapters/NAME."
        )
    running = _check_listening(config, keys)
    if not running:
        reason = _taken(config.host, config.port)
        if reason:
            raise ClusterError(f"port {config.port} of {config.host} is taken: {reason}. Set another port in the file.")
    needed, total = _GATEWAY_CPUS + config.min_replicas * _ENGINE_CPUS, _cluster_total("CPU")
    if total < needed:
        raise ClusterError(
            f"{config.min_replicas} replicas need {needed:g} CPUs and the cluster has {total:g}. Lower replicas."
        )
    return running


def _check_listening(config: ServeConfig | None, keys: tuple[ApiKey, ...]) -> bool:
    """Whether Serve runs already; ClusterError if it listens to the world without keys, or elsewhere than configured."""
    options = _http_options()
    if options is None:
        return False
    if options.host not in LOOPBACK and not keys:
        raise ClusterError(
            f"Ray Serve listens on {options.host} in this cluster, and there are no API keys. Set {VARIABLE} or keys: FILE, "
            "or shut Serve down (serve shutdown) and start it with host 127.0.0.1."
        )
    if config is not None and (options.host, options.port) != (config.host, config.port):
        raise ClusterError(
            f"Ray Serve runs in this cluster already, at {options.host}:{options.port}, not {config.host}:{config.port}. "
            f"Set host: {options.host} and port: {options.port}."
        )
    return True


def _http_options() -> Any:
    """Serve's host and port, or None where it does not run. It keeps those of whoever started it, and only warns."""
    client = _client()
    return None if client is None else client.http_config


def _client() -> Any:
    """Serve's own client, or None where it does not run; for what no public call tells."""
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def _taken(host: str, port: int) -> str:
    """Why the port cannot be had; empty if it can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _cluster_total(resource: str) -> float:
    return float(ray.cluster_resources().get(resource, 0.0))


def _await_running(name: str) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while True:
        overview = ray_serve.status().applications.get(name)
        state = overview.status.value if overview else "NOT_STARTED"
        if state == "RUNNING":
            return
        if overview and state in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise ClusterError(f"the endpoint did not start: {_cause(overview)}")
        if time.monotonic() > deadline:
            raise ClusterError(f"the endpoint is still {state} after {_START_LIMIT_S:g} s: {_cause(overview)}")
        time.sleep(_LOOK_EVERY_S)


def _cause(overview: Any) -> str:
    """What Serve says about it: the deployments' own messages, which carry the constructor's error."""
    messages = [d.message for d in overview.deployments.values() if d.message] if overview else []
    return " ".join(messages) or (overview.message if overview else "Serve does not know it") or "no message"


def _await_route(name: str, host: str, port: int) -> str:
    """The base URL, once the proxy sends requests to this application."""
    reached = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    url, deadline = f"http://{reached}:{port}", time.monotonic() + _ROUTE_LIMIT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/-/routes", timeout=5) as response:  # noqa: S310 - our own http URL
                if name in response.read().decode():
                    return url
        except OSError as error:  # URLError is one: the proxy is not up yet
            _log.debug("%s does not answer yet: %s", url, error)
        time.sleep(_LOOK_EVERY_S)
    raise ClusterError(
        f"the HTTP proxy at {url} does not know {name} after {_ROUTE_LIMIT_S:g} s. Look at `serve status`."
    )
