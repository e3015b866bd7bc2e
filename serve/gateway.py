"""All HTTP of an endpoint: a Ray Serve ingress that unpacks a request, makes one call, and answers in OpenAI's shapes.

It holds no model. Bodies are checked in `openai_api.py`, names resolved in `routing.py`, adapters changed by writing the
desired state (`desired.py`), answers made by the engine deployment (`replica.py`). Errors become answers in
`http_errors.py` and nowhere else. It listens where `app.py` says: on loopback.
"""

# No `from __future__ import annotations`: ray_serve.ingress rebuilds these methods, and FastAPI must see real types.
import asyncio
import functools
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray.serve as ray_serve
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from serve import endpoint_state, http_body
from serve.adapter_uris import AdapterUris
from serve.api_keys import ApiKey
from serve.desired import Base, Desired, EndpointFiles, ReplicaReport, live
from serve.engine_calls import EngineCalls
from serve.http_errors import HANDLERS, status_of
from serve.last_known import LastKnown
from serve.metrics import Metrics
from serve.openai_answers import models_body
from serve.openai_api import Ask, parse_chat, parse_text
from serve.openai_fields import parse_object
from serve.openapi import document
from serve.registration import Registration, follow, from_uri, parse_wanted, register, registrable, withdrawn
from serve.responder import Responder
from serve.routing import Registered, Routes, Target, UnknownModelError, resolve
from serve.splits import check_split_name, key_of, parse_split, resolved_arms, split_body, with_split, without_split
from service.domain import ModelRef
from service.errors import ClusterError, ModelError, NotFoundError, RequestError
from service.registry import Registry

ROUTES_AGE_S = 2.0  # they are read every second
_WAIT_EVERY_S = 0.1
_PARSED_HERE_BYTES = 65_536
# `ingress` copies this and the methods below as the module stands at that line: all they use is defined above or imported.
http = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, exception_handlers=HANDLERS)


def _resolved(name: str, routes: Routes, headers: Mapping[str, str], about: Mapping[str, str]) -> Target:
    """`resolve` with the key that the name's split looks for."""
    split = routes.splits.get(name)
    return resolve(name, routes, key_of(split.key, headers, about) if split else None)


@ray_serve.ingress(http)
class Gateway:
    """One replica of it is enough: it only moves bytes."""

    def __init__(
        self, base: Base, files: EndpointFiles, keys: tuple[ApiKey, ...], uris: AdapterUris, engine: Any
    ) -> None:
        self._base, self._files, self._keys, self._uris = base, files, keys, uris
        self._registry = Registry(files.home)
        self._created = int(time.time())
        self._document = document(files.endpoint, with_keys=bool(keys))
        self._metrics = Metrics()
        self._responder = Responder(EngineCalls(engine), self._metrics)
        self._routes = LastKnown(self._read_routes, "adapters")
        self._routes.follow()  # an alias that moves while nobody asks is loaded by the time somebody does
        self._reports = LastKnown(self._read_reports, "replicas")
        self._hashing = ThreadPoolExecutor(1, "loray-uris")  # whole adapters: the other threads stay free for requests
        self._behind: dict[str, str] = {}  # why a label has not followed its alias

    @http.get("/openapi.json")
    async def openapi(self, request: Request) -> Response:
        """What every route takes and answers, as OpenAPI 3.1."""
        http_body.allow(request, self._keys, "infer")
        return JSONResponse(self._document)

    @http.get("/healthz")
    async def healthz(self, request: Request) -> Response:
        """200 while at least one replica's heart beats."""
        http_body.allow(request, self._keys, None)
        replicas = await self._live()
        if not replicas:
            raise ClusterError(
                "no replica of the engine is alive. It may be starting: try again, then look at its logs."
            )
        return JSONResponse({"status": "ok", "base_model": self._base.name, "replicas": len(replicas)})

    @http.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """Every name that answers."""
        http_body.allow(request, self._keys, "infer")
        routes, _ = await self._routes.get(0.0)
        return JSONResponse(models_body(routes.names(), self._created))

    @http.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """Answers to a conversation, streamed or whole."""
        return await self._generate(parse_chat, request)

    @http.post("/v1/completions")
    async def text(self, request: Request) -> Response:
        """Continuations of texts, streamed or whole; with `echo` and `logprobs`, what the model makes of a prompt."""
        return await self._generate(parse_text, request)

    async def _generate(self, parse: Callable[[bytes], Ask], request: Request) -> Response:
        since = self._metrics.now()
        try:
            http_body.allow(request, self._keys, "infer")
            raw = await http_body.read(request)
            # A large one was seen to take half a second, in which no other stream would get on.
            ask = parse(raw) if len(raw) <= _PARSED_HERE_BYTES else await asyncio.to_thread(parse, raw)
            headers = http_body.ignored(request, ask.ignored)
        except Exception as error:
            self._metrics.refused(status_of(error))
            raise
        return await self._responder.respond(
            ask, lambda: self._target(ask.model, request.headers, ask.about), headers, since
        )

    @http.get("/metrics")
    async def metrics(self, request: Request) -> Response:
        """For Prometheus: requests, tokens, errors and latencies by version and arm; slots and adapters by replica."""
        http_body.allow(request, self._keys, "infer")
        return Response(self._metrics.text(await self._live()), media_type="text/plain; version=0.0.4")

    @http.get("/v1/adapters")
    async def adapters(self, request: Request) -> Response:
        """Every registered adapter with its state on every live replica, and those that drain."""
        http_body.allow(request, self._keys, "admin")
        await self._routes.get(0.0)  # names follow their aliases
        return JSONResponse(await asyncio.to_thread(self._state))

    @http.get("/v1/adapters/{name:path}")
    async def adapter(self, name: str, request: Request) -> Response:
        """One registered adapter with its state on every live replica."""
        http_body.allow(request, self._keys, "admin")
        await self._routes.get(0.0)  # names follow their aliases
        return JSONResponse(await self._adapter(name, f"adapter {name[:100]!r} is not registered. PUT it."))

    @http.put("/v1/adapters/{name:path}")
    async def put_adapter(self, name: str, request: Request) -> Response:
        """Register a Model, or the adapter at a URI, under a name, or swap what the name means."""
        http_body.allow(request, self._keys, "admin")
        wanted = parse_wanted(parse_object(await http_body.read(request)))
        headers = http_body.ignored(request, wanted.ignored)
        wait = http_body.wait_of(request)
        await asyncio.to_thread(self._files.read)  # storage that is away is 503, whatever models it seems to have
        if wanted.uri is None:
            entry = await asyncio.to_thread(registrable, name, str(wanted.model), self._base, self._registry)
        else:
            pin = functools.partial(from_uri, name, wanted.uri, wanted.base_model, self._base, self._uris)
            entry = await asyncio.get_running_loop().run_in_executor(self._hashing, pin)
        entry = entry.model_copy(update={"pin": wanted.pin})
        registration = await asyncio.to_thread(register, self._files, {name: entry})
        self._routes.changed()
        if wait is not None:
            await self._wait_resident(name, registration, wait)
        mine = await self._adapter(name, f"adapter {name!r} was deleted by somebody else meanwhile. PUT it again.")
        return JSONResponse(mine, status_code=200 if mine["state"] == "resident" else 202, headers=headers)

    @http.delete("/v1/adapters/{name:path}")
    async def delete_adapter(self, name: str, request: Request) -> Response:
        """Withdraw a name: new requests get 404 at once, running ones finish."""
        http_body.allow(request, self._keys, "admin")
        gone: dict[str, Registered] = {}

        def without(desired: Desired) -> Desired:
            gone["entry"] = withdrawn(desired, name)
            left = {label: entry for label, entry in desired.adapters.items() if label != name}
            return desired.model_copy(update={"adapters": left})

        await asyncio.to_thread(self._files.change, without)
        self._routes.changed()
        return JSONResponse({"object": "adapter", "name": name, "model": gone["entry"].model, "deleted": True})

    @http.get("/v1/resolve")
    async def resolve(self, request: Request) -> Response:
        """Who would answer to `?model=NAME` with this request's headers (and `&key=`, the key itself), and why."""
        http_body.allow(request, self._keys, "infer")
        name, key = request.query_params.get("model"), request.query_params.get("key")
        if not name:
            raise RequestError("model: which name is to be explained? Write /v1/resolve?model=NAME.", "model")
        routes, epoch = await self._routes.get(0.0)
        target = resolve(name, routes, key) if key else _resolved(name, routes, request.headers, {})
        known = {"name": name, "model": target.model, "digest": target.digest, "by": target.by, "epoch": epoch}
        return JSONResponse({"object": "resolution", **known, "split": target.split, "arm": target.arm})

    @http.get("/v1/endpoints/{endpoint}/splits")
    async def splits(self, endpoint: str, request: Request) -> Response:
        """Every split of live traffic."""
        http_body.allow(request, self._keys, "admin")
        self._check_endpoint(endpoint)
        desired = await asyncio.to_thread(self._files.read)
        data = [split_body(name, split) for name, split in sorted(desired.splits.items())]
        return JSONResponse({"object": "list", "epoch": desired.epoch, "data": data})

    @http.put("/v1/endpoints/{endpoint}/splits/{name}")
    async def put_split(self, endpoint: str, name: str, request: Request) -> Response:
        """Divide the traffic of a public name between versions, or change how it is divided."""
        http_body.allow(request, self._keys, "admin")
        self._check_endpoint(endpoint)
        check_split_name(name, self._base)
        wanted = parse_split(parse_object(await http_body.read(request)))
        headers = http_body.ignored(request, wanted.ignored)
        known = (await asyncio.to_thread(self._files.read)).adapters
        arms = await asyncio.to_thread(resolved_arms, wanted, self._base, self._registry, known)
        desired = await asyncio.to_thread(self._files.change, lambda desired: with_split(desired, name, wanted, arms))
        self._routes.changed()
        return JSONResponse(split_body(name, desired.splits[name]), headers=headers)

    @http.delete("/v1/endpoints/{endpoint}/splits/{name}")
    async def delete_split(self, endpoint: str, name: str, request: Request) -> Response:
        """End a split; its arms' versions stay registered."""
        http_body.allow(request, self._keys, "admin")
        self._check_endpoint(endpoint)
        await asyncio.to_thread(self._files.change, lambda desired: without_split(desired, name))
        self._routes.changed()
        return JSONResponse({"object": "split", "name": name, "deleted": True})

    def _check_endpoint(self, name: str) -> None:
        if name != self._files.endpoint:
            raise NotFoundError(f"this is endpoint {self._files.endpoint!r}; there is no endpoint {name[:100]!r} here.")

    async def _wait_resident(self, name: str, registration: Registration, wait: http_body.Wait) -> None:
        """Until a live replica has it resident, or all have; a refusal takes the registration back and is raised."""
        entry, deadline = registration.written[name], time.monotonic() + wait.timeout_s
        while True:
            reports = await asyncio.to_thread(self._files.live_reports, time.time())
            seen = [r.adapters.get(entry.digest) for r in reports if r.epoch >= registration.desired.epoch]
            states = [report.state if report else "registered" for report in seen]
            reason = next((report.detail for report in seen if report and report.state == "refused"), None)
            if reason is not None:
                await asyncio.to_thread(registration.take_back)
                self._routes.changed()
                raise ModelError(f"{entry.model} cannot be served as {name!r}: {reason}")
            everywhere = len(states) == len(reports) and set(states) == {"resident"}
            if entry.follows and (now := (await asyncio.to_thread(self._files.read)).adapters.get(name)):
                entry = now  # its alias may have moved
            if everywhere if wait.everywhere else "resident" in states:
                return
            if time.monotonic() > deadline:
                shown = "; ".join(f"{r.state} {r.detail}".strip() for r in seen if r) or "seen by no replica yet"
                raise TimeoutError(
                    f"adapter {name!r} is not resident after {wait.timeout_s:g} s: {shown}. It stays registered."
                )
            await asyncio.sleep(_WAIT_EVERY_S)

    async def _adapter(self, name: str, absent: str) -> dict[str, Any]:
        """The entry of a name. NotFoundError that says `absent`."""
        state = await asyncio.to_thread(self._state)
        mine: dict[str, Any] | None = next((a for a in state["data"] if a["name"] == name), None)
        if mine is None:
            raise NotFoundError(absent)
        return mine

    def _state(self) -> dict[str, Any]:
        return endpoint_state.adapters_body(self._files.read(), self._files.live_reports(time.time()), self._behind)

    async def _target(self, name: str, headers: Mapping[str, str], about: Mapping[str, str]) -> tuple[Target, int]:
        """Who answers to `name`, and the epoch that says so. A name not known yet is looked up afresh before it is 404."""
        routes, epoch = await self._routes.get(ROUTES_AGE_S)
        try:
            return _resolved(name, routes, headers, about), epoch
        except UnknownModelError:
            routes, epoch = await self._routes.get(0.0)
            return _resolved(name, routes, headers, about), epoch

    async def _live(self) -> list[ReplicaReport]:
        """The replicas whose hearts beat. While the store does not answer, those that did when it last did: they serve on."""
        reports, read_at_s = await self._reports.get(0.0)
        return live(reports, read_at_s)

    def _read_reports(self) -> tuple[list[ReplicaReport], float]:
        self._files.read()  # or a mount that is away would look like one without replicas
        return self._files.reports(), time.time()

    def _read_routes(self) -> tuple[Routes, int]:
        """What is registered, after every name that follows an alias has taken over where that points now."""
        desired = self._files.read()
        families = {ModelRef.parse(entry.model).family for entry in desired.adapters.values() if not entry.source}
        aliases = self._registry.aliases_of(sorted(families))
        desired, self._behind = follow(self._files, desired, aliases, self._base, self._registry)
        return Routes(self._base.name, self._base.digest, desired.adapters, aliases, desired.splits), desired.epoch
