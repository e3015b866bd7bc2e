"""What the API server says of a document: its schema, where a field that the schema does not know is an error too.

The server would prune such a field in silence. Objects of Kubernetes itself go by kubernetes-validate, KubeRay's by their CRDs,
and what no schema says of a ConfigMap's and a Secret's keys by the rule of IsConfigMapKey in
staging/src/k8s.io/apimachinery/pkg/util/validation/validation.go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import kubernetes_validate
from jsonschema import Draft7Validator

from tests.k8s.objects import Manifest, called

KUBERNETES = "1.34"
KEY = re.compile(r"(?!\.\.|\.$)[-._a-zA-Z0-9]{1,253}")  # of a ConfigMap or a Secret
# Of other operators, whose schemas no package brings: only their references are checked.
OTHERS = {
    "monitoring.coreos.com/v1": {"ServiceMonitor", "PodMonitor", "PrometheusRule"},
    "kueue.x-k8s.io/v1beta1": {"ResourceFlavor", "ClusterQueue", "LocalQueue"},
}


def problems(document: Manifest, crds: Mapping[str, Any]) -> Iterator[str]:
    """A line for each thing that is wrong."""
    version, kind = document["apiVersion"], document["kind"]
    if version == "ray.io/v1":
        validator = Draft7Validator(closed(crds[kind]))
        for error in validator.iter_errors(document):
            yield f"{called(document)}: {'.'.join(map(str, error.absolute_path))}: {error.message[:300]}"
    elif kind not in OTHERS.get(version, ()):
        try:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            yield f"{called(document)}: {error}"
    if kind in ("ConfigMap", "Secret"):
        for key in (key for field in ("data", "binaryData", "stringData") for key in document.get(field) or ()):
            if not KEY.fullmatch(key):
                yield f"{called(document)}: the key {key!r} is not 1 to 253 of the characters -._a-zA-Z0-9"


def closed(schema: Any, *, root: bool = True) -> Any:
    """The schema, refusing what the API server would prune. An object's own metadata is the server's business."""
    if isinstance(schema, list):
        return [closed(part, root=False) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: ({name: closed(part, root=False) for name, part in value.items()} if key == "properties" else closed(value, root=False))
        for key, value in schema.items()
    }  # fmt: skip
    if root:
        made["properties"] = {**made["properties"], "metadata": {"type": "object"}}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made
