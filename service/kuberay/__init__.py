"""Runs as RayJobs of KubeRay: what they are made of (`manifests.py`), and how they are applied and followed (`api.py`)."""
