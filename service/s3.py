"""The verbs of `storage.py` on S3, and nothing else: call them through `storage.py`.

Listings always ask the store (s3fs's listing cache is off), and a write is conditional by the store's own headers
(If-None-Match, If-Match), so that processes on different nodes agree. Credentials, region and endpoint come from the
usual AWS_* environment and files; none is ever printed. s3fs is imported at the first call, because importing it costs
more than the command line's whole start.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from service.domain import FileEntry
from service.errors import ConfigError, ConflictError, LorayError, NotFoundError, StorageError

SINGLE_PUT_BYTES = (
    32 * 2**20
)  # larger files go up in parts, which S3 cannot check against one sha256: they are read back
_PART_BYTES = 16 * 2**20
BATCH_KEYS = 1000  # S3's limit for a page of a listing and for one DeleteObjects
_ABSENT = {"NoSuchKey", "404", "NotFound"}
_CONDITION_FAILED = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_LOCAL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


def bucket_and_key(uri: str) -> tuple[str, str]:
    """`s3://bucket/a/b` -> (`bucket`, `a/b`). Credentials inside the URI are refused, without repeating them."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if "@" in bucket or ":" in bucket:
        raise ConfigError("The s3:// URI holds credentials. Put them into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    if not bucket:
        raise ConfigError(f"{uri!r} names no bucket. Write s3://bucket/prefix.")
    return bucket, key.strip("/")


def exists(uri: str) -> bool:
    """An object of this name, or any object below it."""
    with _reported(uri, "looked up"):
        return bool(_head(uri)) or bool(_page(uri, MaxKeys=1).get("KeyCount"))


def size(uri: str) -> int:
    """Bytes of the object; NotFoundError when there is none."""
    return int(_facts(uri)["ContentLength"])


def tag(uri: str) -> str:
    """The object's ETag; NotFoundError when there is none."""
    return str(_facts(uri)["ETag"])


def read_tagged(uri: str) -> tuple[bytes, str]:
    """Content and ETag from one and the same answer."""
    from fsspec.asyn import sync

    bucket, key = bucket_and_key(uri)
    fs = _filesystem()

    async def get() -> tuple[bytes, str]:
        answer = await fs._call_s3("get_object", Bucket=bucket, Key=key)
        async with answer["Body"] as body:
            return await body.read(), answer["ETag"]

    with _reported(uri, "read"):
        content: tuple[bytes, str] = sync(fs.loop, get)
        return content


def put(uri: str, data: bytes, **conditions: str) -> None:
    """One PUT whose sha256 the store checks. `conditions`: IfNoneMatch="*" or IfMatch=etag; failed, ConflictError."""
    checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
    with _reported(uri, "written"):
        _call("put_object", uri, Body=data, ChecksumSHA256=checksum, **conditions)


def list_names(uri: str) -> list[str]:
    """Names directly below `uri`, of objects and of prefixes."""
    start = len(_prefix(uri))
    names: set[str] = set()
    with _reported(uri, "listed"):
        for page in _pages(uri, Delimiter="/"):
            names.update(entry["Key"][start:] for entry in page.get("Contents", ()))
            names.update(entry["Prefix"][start:].rstrip("/") for entry in page.get("CommonPrefixes", ()))
    return sorted(names - {""})


def put_file(local: Path, uri: str, entry: FileEntry) -> None:
    """Uploads `local`, whose size and sha256 are `entry`, and makes sure that just that has arrived."""
    if entry.bytes <= SINGLE_PUT_BYTES:
        data = local.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise StorageError(f"{local} changed while it was being read. Wait until its writer is done, then repeat.")
        put(uri, data)
        return
    with _reported(uri, "written"):
        _filesystem().put_file(str(local), _remote(uri), chunksize=_PART_BYTES)
    arrived = _sha256(uri)
    if arrived != entry:
        raise StorageError(f"{uri} has {arrived.bytes} bytes, sha256 {arrived.sha256}; {local} had {entry.bytes}, "
                           f"sha256 {entry.sha256}. Upload it again.")  # fmt: skip


def get_file(uri: str, local: Path) -> None:
    """Downloads to `local`, unverified: `storage.fetch_file` verifies and renames."""
    with _reported(uri, "read"):
        _filesystem().get_file(_remote(uri), str(local))


def delete_tree(uri: str) -> None:
    """Deletes the object and everything below it. Repeating it is harmless."""
    with _reported(uri, "deleted"):
        _call("delete_object", uri)
        keys = [entry["Key"] for page in _pages(uri) for entry in page.get("Contents", ())]
        for start in range(0, len(keys), BATCH_KEYS):
            batch = [{"Key": key} for key in keys[start : start + BATCH_KEYS]]
            answer = _filesystem().call_s3("delete_objects", Bucket=bucket_and_key(uri)[0], Delete={"Objects": batch})
            if answer.get("Errors"):
                first = answer["Errors"][0]
                raise StorageError(f"{uri}: {len(answer['Errors'])} objects could not be deleted, the first is "
                                   f"{first.get('Key')}: {first.get('Code')}. Check the bucket's policy.")  # fmt: skip


def _sha256(uri: str) -> FileEntry:
    digest, count = hashlib.sha256(), 0
    with _reported(uri, "read back"), _filesystem().open(_remote(uri), "rb", block_size=_PART_BYTES) as stream:
        while chunk := stream.read(_PART_BYTES):
            digest.update(chunk)
            count += len(chunk)
    return FileEntry(bytes=count, sha256=digest.hexdigest())


def _facts(uri: str) -> dict[str, Any]:
    with _reported(uri, "looked up"):
        head = _head(uri)
    if head is None:
        raise NotFoundError(f"{uri} does not exist.")
    return head


def _head(uri: str) -> dict[str, Any] | None:
    if not bucket_and_key(uri)[1]:
        return None
    try:
        head: dict[str, Any] = _call("head_object", uri)
    except FileNotFoundError:
        return None
    return head


def _pages(uri: str, **options: Any) -> Iterator[dict[str, Any]]:
    page = _page(uri, **options)
    yield page
    while page.get("IsTruncated"):
        page = _page(uri, ContinuationToken=page["NextContinuationToken"], **options)
        yield page


def _page(uri: str, **options: Any) -> dict[str, Any]:
    page: dict[str, Any] = _filesystem().call_s3(
        "list_objects_v2", Bucket=bucket_and_key(uri)[0], Prefix=_prefix(uri), **{"MaxKeys": BATCH_KEYS, **options}
    )
    return page


def _prefix(uri: str) -> str:
    key = bucket_and_key(uri)[1]
    return f"{key}/" if key else ""


def _remote(uri: str) -> str:
    return "/".join(bucket_and_key(uri))


def _call(method: str, uri: str, **options: Any) -> Any:
    bucket, key = bucket_and_key(uri)
    return _filesystem().call_s3(method, Bucket=bucket, Key=key, **options)


def _filesystem() -> Any:
    # Keyed by process, because s3fs is not fork-safe, and by environment, because the endpoint is read at connection.
    return _connect(os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@lru_cache(maxsize=4)
def _connect(pid: int, environment: tuple[tuple[str, str], ...]) -> Any:
    import s3fs

    return s3fs.S3FileSystem(
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={"retries": {"mode": "standard", "max_attempts": 2}},  # s3fs repeats on top of it, five times
    )


@contextmanager
def _reported(uri: str, verb: str) -> Iterator[None]:
    try:
        yield
    except LorayError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _LOCAL_DISK:
            raise  # `storage.py` names the path
        _raise_as_ours(error, uri, verb)


def _raise_as_ours(error: Exception, uri: str, verb: str) -> NoReturn:
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    if code in _ABSENT or (isinstance(error, FileNotFoundError) and code != "NoSuchBucket"):
        raise NotFoundError(f"{uri} does not exist.") from error
    if code in _CONDITION_FAILED:
        raise ConflictError(f"{uri} was written by somebody else meanwhile. Read it again, then repeat.") from error
    raise StorageError(f"{uri} could not be {verb}: {_redacted(error, code)}. {_advice(error, code)}") from error


def _redacted(error: Exception, code: str) -> str:
    text = f"{code}: {error}" if code else f"{type(error).__name__}: {error}"
    for variable in _SECRETS:
        if value := os.environ.get(variable):
            text = text.replace(value, "***")
    return text.rstrip(". ")


def _advice(error: Exception, code: str) -> str:
    if code == "NoSuchBucket":
        return "Create the bucket, or correct the URI."
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return "Check the AWS_* credentials and the bucket's policy."
    return "Check AWS_ENDPOINT_URL, AWS_REGION and the network, then repeat."
