"""API keys: known by their hash only, refused with all reasons, and no secret in any message."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from starlette.exceptions import HTTPException
from starlette.requests import Request
from typer.testing import CliRunner

from serve import http_body
from serve.api_keys import ApiKey, key_for, load_keys, new_key
from service.cli.app import app as command_line
from service.config import ServeConfig
from service.errors import ConfigError
from service.settings import Settings

SECRET, OTHER = "correct-horse-battery", "staple-staple-staple"


def test_keys_of_the_environment_are_found_by_their_secret_alone() -> None:
    keys = load_keys({"LORAY_API_KEYS": f"infer:{SECRET}, infer+train:{OTHER}"}, None)
    found = key_for(f"Bearer {OTHER}", keys)
    assert found is not None and found.scopes == {"infer", "train"}
    assert found.may("train") and not found.may("admin")
    for header in (None, "", "Bearer", "Bearer ", f"Basic {SECRET}", f"Bearer {SECRET}x", SECRET, "Bearer \ud800"):
        assert key_for(header, keys) is None
    assert SECRET not in repr(keys) and OTHER not in repr(keys)


def test_a_new_key_works_from_its_file(tmp_path: Path) -> None:
    done = CliRunner().invoke(command_line, ["keys", "new", "ops", "--scope", "admin"])
    assert done.exit_code == 0, done.output
    secret = done.output.splitlines()[0].rsplit(" ", 1)[1]
    (tmp_path / "keys.yaml").write_text(done.output)
    keys = load_keys({}, str(tmp_path / "keys.yaml"))
    found = key_for(f"bearer {secret}", keys)
    assert found is not None and found.name == "ops" and found.may("infer")  # admin may do everything
    assert secret not in yaml.safe_dump(yaml.safe_load(done.output))
    with pytest.raises(ConfigError, match="wizard"):
        new_key("x", ("wizard",))


def test_everything_wrong_with_keys_is_told_at_once_and_without_secrets(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    rows = [
        {"name": "a", "scopes": ["fly"], "sha256": "0" * 64},
        {"name": "b", "scopes": ["infer"], "sha256": "short"},
        {"name": "c", "scopes": "infer", "sha256": "0" * 64},
        {"name": "d", "secret": SECRET},
        "e",
        {"name": "a", "scopes": [], "sha256": "0" * 64},
    ]
    file.write_text(yaml.safe_dump(rows))
    with pytest.raises(ConfigError) as caught:
        load_keys({"LORAY_API_KEYS": f"{SECRET},infer:short,fly:{OTHER},{SECRET}:infer"}, str(file))
    said = str(caught.value)
    for words in ("key 1: has no scopes", "key 2: the secret has 5", "key 3: has an unknown scope", "key 1: scopes are fly",
                  "key 2: sha256", "key 3: scopes must be a list", "key 4: has name, secret", "key 5: has str",
                  "key 6: scopes are missing", "'a' stands twice"):  # fmt: skip
        assert words in said
    assert SECRET not in said and OTHER not in said


@pytest.mark.parametrize("text", ["", "a: 1", "- [", "[]"])
def test_a_file_that_is_no_list_of_keys_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.yaml"):
        load_keys({}, str(tmp_path / "keys.yaml"))


def _request(**headers: str) -> Request:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": raw})


def _status(request: Request, keys: tuple[ApiKey, ...], scope: str | None) -> int:
    try:
        http_body.allow(request, keys, scope)
    except HTTPException as error:
        return error.status_code
    return 200


def test_a_request_needs_a_key_and_its_scope() -> None:
    keys = load_keys({"LORAY_API_KEYS": f"infer:{SECRET}"}, None)
    shown = _request(authorization=f"Bearer {SECRET}", host="example.com")
    assert _status(shown, keys, "infer") == 200
    assert _status(shown, keys, "admin") == 403
    assert _status(_request(host="localhost"), keys, "infer") == 401
    assert _status(_request(authorization="Bearer nonsense"), keys, "infer") == 401
    assert _status(_request(host="example.com"), keys, None) == 200


def test_without_keys_only_this_machines_own_names_pass() -> None:
    for host in ("127.0.0.1", "localhost:8000", "[::1]:8000"):
        assert _status(_request(host=host), (), "admin") == 200
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "localhost:80x", "", "[::1]x"):
        assert _status(_request(host=host), (), None) == 400


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")  # importing ray.serve 2.60
def test_an_address_that_others_can_reach_needs_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serve import app

    monkeypatch.delenv("LORAY_API_KEYS", raising=False)
    config = ServeConfig.model_validate({"model": "nobody", "host": "0.0.0.0"})  # noqa: S104
    with pytest.raises(ConfigError, match=r"no API keys\. Set LORAY_API_KEYS"):
        app.prepare(config, Settings(str(tmp_path), tmp_path))
