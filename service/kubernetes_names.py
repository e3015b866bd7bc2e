"""What Kubernetes takes for names, labels, images and numbers. Each function returns what it was given, or raises ValueError."""

from __future__ import annotations

import re
from typing import Any

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"  # namespaces and queues
INT32 = 2**31 - 1  # what the RayJob's numbers hold
_HOST = r"[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?"  # one part of it
_PATH = r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(  # [host[:port]/]path[:tag][@digest], github.com/distribution/reference: regexp.go
    rf"((\[[a-fA-F0-9:]+\]|{_HOST}(\.{_HOST})*)(:[0-9]+)?/)?{_PATH}(/{_PATH})*"
    r"(:[A-Za-z0-9_][-A-Za-z0-9_.]{0,127})?(@[a-z0-9]+([-_+.][a-z0-9]+)*:[0-9a-fA-F]{32,})?"
)
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_DOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


def image(value: str) -> str:
    """A reference to an image, https://github.com/distribution/reference."""
    if not _IMAGE.fullmatch(value):
        raise ValueError(
            "must be an image such as registry.example.com/team/loray:0.1.0, in small letters up to the tag"
        )
    return value


def quoted(value: Any) -> str:
    """Text, where YAML may have read something else into what was meant as text."""
    if not isinstance(value, str):
        raise ValueError('must be text, in quotes ("true", "1")')
    return value


def label_key(value: str) -> str:
    """A label's name, https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/."""
    prefix, slash, name = value.rpartition("/")
    if not _LABEL.fullmatch(name) or (slash and not _DOMAIN.fullmatch(prefix)):
        raise ValueError(
            "must be a label's name such as topology.kubernetes.io/zone: at most 63 letters, digits, '-', '_' and '.', before "
            "them a domain and '/' where it has one"
        )
    return value


def label_value(value: str) -> str:
    """A label's value, by the same rules."""
    if value and not _LABEL.fullmatch(value):
        raise ValueError(
            "must be a label's value: at most 63 letters, digits, '-', '_' and '.', a letter or digit at both ends"
        )
    return value
