"""Whether those who made a pod and what is in it are of one version. Imports nothing but the standard library."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping

ANNOTATION = "loray.io/version"  # of a pod: the loray that wrote its manifest
_IN_POD = "LORAY_MANIFEST_VERSION"  # the same, as the manifests pass it on to the container


def skew(environ: Mapping[str, str] = os.environ) -> str | None:
    """A sentence about manifest and image, where they differ; None in agreement and outside of pods."""
    manifest, image = environ.get(_IN_POD), importlib.metadata.version("loray")
    if not manifest or manifest == image:
        return None
    return (
        f"This pod was asked for by loray {manifest}, and its image has loray {image}: keys and defaults may differ. "
        f"Take an image of {manifest} (images: in the kustomization, kubernetes.image in a run file), or manifests of {image}."
    )
