"""The endpoint's own description, `GET /openapi.json`: every route with what it takes and all that it answers, OpenAPI 3.1.

Request bodies are made of the tables by which they are read (`openai_api.CHAT` and `TEXT`, `splits.SPLIT`,
`registration.ADAPTER`), reports and splits of their pydantic models; only the shapes that `openai_answers.py` and
`gateway.py` write out are written down again here, closed (`additionalProperties: false`), so that tests against a real
endpoint find whatever differs. Pure.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import BaseModel

from serve.adapters import AdapterState
from serve.api_keys import SCOPES
from serve.desired import AdapterReport, ReplicaReport
from serve.endpoint_state import SHOWN_OF_REPLICA
from serve.field_kinds import NAME_SCHEMA, object_schema
from serve.http_body import LONGEST_WAIT_S, MAX_BODY_BYTES, WAITS
from serve.openai_api import CHAT, MAX_NAME, TEXT
from serve.registration import ADAPTER_SCHEMA
from serve.routing import Split
from serve.splits import SPLIT
from service.inference.engine import FinishReason

Schema = dict[str, Any]

_STATUSES = {
    400: "The request cannot be served as it stands; `param` is the field at fault.",
    401: "No API key, or an unknown one.",
    403: "The API key lacks the scope.",
    404: "Nothing answers to this name.",
    408: "The body did not arrive in time.",
    409: "Somebody else was first, or something still needs what was to change.",
    413: f"The body is larger than {MAX_BODY_BYTES} bytes.",
    415: "The body is not declared as application/json.",
    429: "The endpoint is full. Try again after `retry-after` seconds.",
    500: "An error inside the server, logged there under the id in `code`.",
    503: "The engine or the store does not answer. Try again after `retry-after` seconds.",
    504: "What was waited for has not come; it goes on.",
}
_OF_A_BODY = (408, 413, 415)
_STRING: Schema = {"type": "string"}
_INTEGER: Schema = {"type": "integer"}
_NUMBER: Schema = {"type": "number"}
_NULL: Schema = {"type": "null"}


def document(endpoint: str, *, with_keys: bool) -> dict[str, Any]:
    """The whole document of the endpoint of this name, with API keys or without any."""
    components: dict[str, Any] = {"schemas": _schemas(), "responses": _errors()}
    if with_keys:
        components["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer", "description": f"Scopes: {', '.join(SCOPES)}."}
        }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "loray",
            "version": importlib.metadata.version("loray"),
            "description": "OpenAI's API beside the adapters and splits of an endpoint. Fields that a body is not known "
            "to have are ignored and named in `x-loray-ignored`; `x-loray-strict: true` makes them an error. Integers are "
            "written without a point.",
        },
        "paths": _paths(endpoint, with_keys),
        "components": components,
    }


def _paths(endpoint: str, with_keys: bool) -> dict[str, Any]:
    def operation(
        name: str,
        summary: str,
        scope: str | None,
        answers: Mapping[int, Schema],
        errors: tuple[int, ...] = (),
        body: str | None = None,
        parameters: tuple[Schema, ...] = (),
    ) -> Schema:
        keys = (401, 403) if with_keys and scope else ()
        statuses = sorted({400, 429, 500, 503, *keys, *errors, *(_OF_A_BODY if body else ())})
        responses = {str(status): answer for status, answer in answers.items()}
        responses |= {str(status): {"$ref": f"#/components/responses/{status}"} for status in statuses}
        made: Schema = {"operationId": name, "summary": summary, "responses": responses}
        if with_keys:
            made["security"] = [{"key": [scope]}] if scope else []
        if parameters:
            made["parameters"] = list(parameters)
        if body:
            made["requestBody"] = {"required": True, "content": {"application/json": {"schema": _ref(body)}}}
        return made

    ignored, by_model = ("x-loray-ignored",), ("x-loray-ignored", "x-loray-model", "x-loray-split", "x-loray-arm")
    adapter = _parameter("path", "name", {"type": "string", "minLength": 1, "maxLength": MAX_NAME})
    here, split = _parameter("path", "endpoint", {"enum": [endpoint]}), _parameter("path", "name", NAME_SCHEMA)
    strict = _parameter("header", "x-loray-strict", {"enum": ["true", "false"]}, "true: unknown fields are an error")
    key = _parameter("header", "x-loray-key", _STRING, "the key by which a split chooses, where it names no other")
    waiting = (
        _parameter(
            "query", "wait", {"enum": list(WAITS)}, "answer when the adapter is resident: on a replica, or on all"
        ),
        _parameter(
            "query",
            "timeout",
            {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_WAIT_S},
            "seconds; only with wait",
        ),
    )
    explained = (
        _parameter("query", "model", {"type": "string", "minLength": 1}, required=True),
        _parameter("query", "key", _STRING, "the key itself, whatever the headers say"),
        key,
    )
    return {
        "/openapi.json": {"get": operation("openapi", "This document.", "infer", {200: _json({"type": "object"})})},
        "/healthz": {
            "get": operation("healthz", "Whether a replica of the engine is alive.", None, {200: _json(_ref("Health"))})
        },
        "/metrics": {
            "get": operation(
                "metrics", "Numbers for Prometheus.", "infer", {200: _answer({"text/plain": {"schema": _STRING}})}
            )
        },
        "/v1/models": {
            "get": operation("models", "Every name that answers.", "infer", {200: _json(_ref("ModelList"))})
        },
        "/v1/chat/completions": {
            "post": operation(
                "chat",
                "Answers to a conversation, streamed or whole.",
                "infer",
                {200: _generated("ChatCompletion", by_model)},
                (404, 409),
                "ChatRequest",
                (strict, key),
            )
        },
        "/v1/completions": {
            "post": operation(
                "text",
                "Continuations of texts, streamed or whole.",
                "infer",
                {200: _generated("TextCompletion", by_model)},
                (404, 409),
                "TextRequest",
                (strict, key),
            )
        },
        "/v1/adapters": {
            "get": operation(
                "adapters", "Every adapter and its state on every replica.", "admin", {200: _json(_ref("AdapterList"))}
            )
        },
        "/v1/adapters/{name}": {
            "get": operation(
                "adapter",
                "One adapter and its state on every replica.",
                "admin",
                {200: _json(_ref("Adapter"))},
                (404,),
                parameters=(adapter,),
            ),
            "put": operation(
                "put_adapter",
                "Register a Model under a name, or swap what the name means.",
                "admin",
                {
                    200: _json(_ref("Adapter"), "It is resident.", ignored),
                    202: _json(_ref("Adapter"), "It is registered, and being loaded.", ignored),
                },
                (404, 409, 504),
                "AdapterRequest",
                (adapter, *waiting, strict),
            ),
            "delete": operation(
                "delete_adapter",
                "Withdraw a name: new requests get 404 at once, running ones finish.",
                "admin",
                {200: _json(_ref("DeletedAdapter"))},
                (404, 409),
                parameters=(adapter,),
            ),
        },
        "/v1/resolve": {
            "get": operation(
                "resolve",
                "Who would answer to a name, and why.",
                "infer",
                {200: _json(_ref("Resolution"))},
                (404,),
                parameters=explained,
            )
        },
        "/v1/endpoints/{endpoint}/splits": {
            "get": operation(
                "splits",
                "Every split of live traffic.",
                "admin",
                {200: _json(_ref("SplitList"))},
                (404,),
                parameters=(here,),
            )
        },
        "/v1/endpoints/{endpoint}/splits/{name}": {
            "put": operation(
                "put_split",
                "Divide the traffic of a public name between versions.",
                "admin",
                {200: _json(_ref("Split"), headers=ignored)},
                (404, 409),
                "SplitRequest",
                (here, split, strict),
            ),
            "delete": operation(
                "delete_split",
                "End a split; its arms' versions stay registered.",
                "admin",
                {200: _json(_ref("DeletedSplit"))},
                (404, 409),
                parameters=(here, split),
            ),
        },
    }


def _schemas() -> dict[str, Schema]:
    report = _of_model(AdapterReport)
    adapter = {
        "object": _const("adapter"),
        "model": _STRING,
        "digest": _STRING,
        "uri": _nullable(_STRING),
        "follows": _nullable(_STRING),
        "state": {"enum": [str(state) for state in AdapterState]},
        "detail": _STRING,
        "replicas": _map(_only(report, set(report["properties"]) - {"model"})),
    }
    serving = _array(_STRING)
    split = _of_model(Split)
    arm = split.pop("$defs")["Arm"]
    split = {**split, **_object(object=_const("split"), name=_STRING, **split["properties"])}
    return {
        "Error": _object(
            error=_object(message=_STRING, type=_STRING, param=_nullable(_STRING), code=_nullable(_STRING))
        ),
        "ChatRequest": object_schema(CHAT),
        "TextRequest": object_schema(TEXT),
        "AdapterRequest": ADAPTER_SCHEMA,
        "SplitRequest": object_schema(SPLIT),
        "Health": _object(status=_const("ok"), base_model=_STRING, replicas=_INTEGER),
        "ModelList": _list(
            _object(
                id=_STRING,
                object=_const("model"),
                created=_INTEGER,
                owned_by=_const("loray"),
                loray=_object(model_digest=_STRING),
            )
        ),
        "AdapterList": _list(
            {
                "anyOf": [
                    _ref("Adapter"),
                    {**_object(**adapter, name=_NULL), "description": "registered no more, finishing what runs"},
                ]
            },
            epoch=_INTEGER,
            replicas=_map(_only(_of_model(ReplicaReport), SHOWN_OF_REPLICA)),
        ),
        "Adapter": _object(**adapter, name=_STRING, serving=serving),
        "DeletedAdapter": _object(object=_const("adapter"), name=_STRING, model=_STRING, deleted=_const(True)),
        "Resolution": _object(
            object=_const("resolution"),
            name=_STRING,
            model=_STRING,
            digest=_STRING,
            by=_STRING,
            epoch=_INTEGER,
            split=_nullable(_STRING),
            arm=_nullable(_STRING),
        ),
        "Arm": arm,
        "Split": split,
        "SplitList": _list(_ref("Split"), epoch=_INTEGER),
        "DeletedSplit": _object(object=_const("split"), name=_STRING, deleted=_const(True)),
        **_generation_schemas(),
    }


def _generation_schemas() -> dict[str, Schema]:
    """What `openai_answers.Answer` writes."""
    token = {"token": _STRING, "logprob": _nullable(_NUMBER), "bytes": _array(_INTEGER)}
    chat_logprobs = _nullable(
        _object(content=_array(_object(**token, top_logprobs=_array(_object(**token)))), refusal=_NULL)
    )
    text_logprobs = _nullable(
        _object(
            tokens=_array(_STRING),
            token_logprobs=_array(_nullable(_NUMBER)),
            top_logprobs=_array(_nullable(_map(_NUMBER))),
            text_offset=_array(_INTEGER),
        )
    )
    reasons = [reason for reason in get_args(FinishReason) if reason in ("stop", "length")]
    end: Schema = {"enum": reasons}
    end_or_not_yet: Schema = {"enum": [*reasons, None]}
    usage = _object(
        prompt_tokens=_INTEGER,
        completion_tokens=_INTEGER,
        total_tokens=_INTEGER,
        prompt_tokens_details=_object(cached_tokens=_INTEGER),
    )
    by = _object(_optional={"split": _STRING, "arm": _STRING}, model_digest=_STRING)

    def answer(
        kind: str, choice: Schema, usage: Schema | None = None, or_not: Mapping[str, Schema] | None = None
    ) -> Schema:
        head = {"id": _STRING, "object": _const(kind), "created": _INTEGER, "model": _STRING, "loray": by}
        return _object(_optional=or_not, **head, choices=_array(choice), **({"usage": usage} if usage else {}))

    message = _object(role=_const("assistant"), content=_STRING, refusal=_NULL)
    delta = _object(_optional={"role": _const("assistant"), "content": _STRING})
    chat = {"index": _INTEGER, "logprobs": chat_logprobs}
    text = {"index": _INTEGER, "logprobs": text_logprobs, "text": _STRING}
    maybe = {"usage": _nullable(_ref("Usage"))}
    return {
        "Usage": usage,
        "ChatCompletion": answer("chat.completion", _object(**chat, message=message, finish_reason=end), _ref("Usage")),
        "ChatCompletionChunk": answer(
            "chat.completion.chunk", _object(**chat, delta=delta, finish_reason=end_or_not_yet), or_not=maybe
        ),
        "TextCompletion": answer("text_completion", _object(**text, finish_reason=end), _ref("Usage")),
        "TextCompletionChunk": answer("text_completion", _object(**text, finish_reason=end_or_not_yet), or_not=maybe),
    }


def _errors() -> dict[str, Schema]:
    """Every error status, in OpenAI's shape. 429 and 503 may come from Ray Serve's proxy as well, as plain text."""
    by_proxy = {"text/plain": {"schema": _STRING}}
    headers = {401: ("www-authenticate",), 429: ("retry-after",), 503: ("retry-after",)}
    return {
        str(status): _answer(
            {"application/json": {"schema": _ref("Error")}, **(by_proxy if status in (429, 503) else {})},
            text,
            headers.get(status, ()),
        )
        for status, text in _STATUSES.items()
    }


def _generated(whole: str, headers: tuple[str, ...]) -> Schema:
    """A completion; with `stream: true` events of `whole`Chunk, of an Error where one comes on the way, then [DONE]."""
    chunk = {"anyOf": [_ref(f"{whole}Chunk"), _ref("Error")]}
    data = {"anyOf": [_const("[DONE]"), {"contentMediaType": "application/json", "contentSchema": chunk}]}
    event = {"type": "object", "properties": {"data": {**_STRING, **data}}, "required": ["data"]}
    events = {"text/event-stream": {"schema": event}}
    return _answer({"application/json": {"schema": _ref(whole)}, **events}, "The answers.", headers)


def _json(schema: Schema, description: str = "Done.", headers: tuple[str, ...] = ()) -> Schema:
    return _answer({"application/json": {"schema": schema}}, description, headers)


def _answer(content: Schema, description: str = "Done.", headers: tuple[str, ...] = ()) -> Schema:
    shown = {"headers": {name: {"schema": _STRING} for name in headers}} if headers else {}
    return {"description": description, "content": content, **shown}


def _parameter(place: str, name: str, schema: Schema, description: str = "", *, required: bool = False) -> Schema:
    more = {"description": description} if description else {}
    return {"name": name, "in": place, "required": required or place == "path", "schema": schema, **more}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(*, _optional: Mapping[str, Schema] | None = None, **properties: Schema) -> Schema:
    """An object of exactly these; those of `_optional` may be absent."""
    shown = {**properties, **(_optional or {})}
    return {"type": "object", "properties": shown, "required": list(properties), "additionalProperties": False}


def _list(item: Schema, **more: Schema) -> Schema:
    return _object(object=_const("list"), data=_array(item), **more)


def _array(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _map(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _nullable(schema: Schema) -> Schema:
    return {"anyOf": [schema, _NULL]}


def _const(value: Any) -> Schema:
    return {"const": value}


def _of_model(model: type[BaseModel]) -> Schema:
    """As it is written: what has a default is there as well."""
    return model.model_json_schema(mode="serialization", ref_template="#/components/schemas/{model}")


def _only(schema: Schema, names: set[str]) -> Schema:
    return _object(**{name: value for name, value in schema["properties"].items() if name in names})
