"""What the two environment variables may say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from service.errors import ConfigError
from service.settings import load_settings


def test_the_defaults_lie_in_the_home_directory() -> None:
    settings = load_settings({"HOME": "/home/ada", "LORAY_HOME": ""})
    assert settings.home == "/home/ada/.loray"
    assert settings.cache == Path("/home/ada/.cache/loray")


def test_a_bucket_keeps_its_scheme_and_loses_the_trailing_slash() -> None:
    assert load_settings({"LORAY_HOME": "s3://bucket/prefix/"}).home == "s3://bucket/prefix"


def test_relative_and_file_uris_become_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings({"LORAY_HOME": "here/", "LORAY_CACHE": f"file://{tmp_path}/a%20b"})
    assert settings.home == str(tmp_path / "here")
    assert settings.cache == tmp_path / "a b"


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"LORAY_HOME": "gs://bucket/x", "LORAY_CACHE": "s3://bucket/cache"})
    assert "gs://" in str(caught.value) and "LORAY_CACHE" in str(caught.value)


def test_a_file_is_no_root(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"LORAY_HOME is .*a file"):
        load_settings({"LORAY_HOME": str(tmp_path / "file"), "LORAY_CACHE": str(tmp_path)})


def test_credentials_in_the_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings({"LORAY_HOME": "s3://key:hunter2@bucket/x"})
    assert "hunter2" not in str(caught.value)


def test_importing_the_storage_side_imports_no_heavy_library() -> None:
    code = (
        "import sys, service.registry, service.runs, service.settings;"
        "print([m for m in ('torch', 'ray', 'transformers', 's3fs', 'fsspec', 'botocore') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("home", ["", "~/.loray", "/home/loray/.loray"])
def test_a_pods_own_home_directory_is_refused_because_it_would_vanish(home: str) -> None:
    pod = {"KUBERNETES_SERVICE_HOST": "10.96.0.1", "HOME": "/home/loray"}
    with pytest.raises(
        ConfigError, match=r"LORAY_HOME is (~|/home/loray)/\.loray, and this is a Kubernetes pod.*s3://bucket/prefix"
    ):
        load_settings({**pod, "LORAY_HOME": home})
    assert load_settings({**pod, "LORAY_HOME": "s3://loray/home"}).home == "s3://loray/home"
    assert load_settings({**pod, "LORAY_HOME": "/mnt/shared"}).home == "/mnt/shared"
