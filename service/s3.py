"""The verbs of `storage.py` on S3, and nothing else: call them through `storage.py`.

Listings always ask the store (s3fs's listing cache is off), and a write is conditional by the store's own headers
(If-None-Match, If-Match), so that processes on different nodes agree. Credentials, region and endpoint come from the
usual AWS_* environment and files; none is ever printed. s3fs is imported at the first call, because importing it costs
more than the command line's whole start.

A store that is away is noticed within seconds where it refuses connections, within `ANSWER_S` where it only keeps silent.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from service.domain import FileEntry
from service.errors import ConfigError, ConflictError, LorayError, NotFoundError, StorageError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

ANSWER_S = 30.0  # for one request with its repetitions, beside the time for its bytes
SLOWEST_BYTES_PER_S = 2**18  # a link that is slower than this counts as broken
SINGLE_PUT_BYTES = 32 * 2**20  # larger bodies go up in parts
_PART_BYTES = 8 * 2**20
_BUFFER_BYTES = 2**20  # of a stream; what is read at once in larger pieces goes past the buffer
_PARALLEL_PARTS = 4
_MOST_PARTS = 10_000  # S3's limit
BATCH_KEYS = 1000  # S3's limit for a page of a listing and for one DeleteObjects
_OF_THE_BUCKET = ("list_objects_v2", "delete_objects")
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

    with _reported(uri, "read"):
        content: tuple[bytes, str] = _sync(_get, uri)
        return content


def read_range(uri: str, start: int, length: int) -> bytes:
    """So many of the object's bytes from `start` on."""
    with _reported(uri, "read"):
        content: bytes = _sync(_get, uri, Range=f"bytes={start}-{start + length - 1}")[0]
    return content


def read_chunks(uri: str, num_bytes: int) -> Iterator[bytes]:
    """The object's first so many bytes in pieces; ConflictError if another takes its place meanwhile."""
    etag, size = (_facts(uri)[fact] for fact in ("ETag", "ContentLength"))
    end = min(num_bytes, int(size))
    for start in range(0, end, _PART_BYTES):
        yield _range(uri, etag, start, min(start + _PART_BYTES, end))


def open_read(uri: str) -> BinaryIO:
    """The object as a stream that can seek, in memory only a part at a time; ConflictError if another takes its place."""
    facts = _facts(uri)
    stream: BinaryIO = io.BufferedReader(_Object(uri, facts["ETag"], int(facts["ContentLength"])), _BUFFER_BYTES)
    return stream


class _Object(io.RawIOBase):
    """One content of an object, read where it is asked for."""

    def __init__(self, uri: str, etag: str, size: int) -> None:
        self._uri, self._etag, self._size, self._at = uri, etag, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        into = memoryview(buffer)
        stop = min(self._at + min(len(into), _PART_BYTES), self._size)
        data = _range(self._uri, self._etag, self._at, stop) if self._at < stop else b""
        into[: len(data)] = data
        self._at += len(data)
        return len(data)


def put(uri: str, data: bytes, **conditions: str) -> None:
    """One PUT whose sha256 the store checks, or parts whose MD5 it checks; visible when all has arrived.

    `conditions`: IfNoneMatch="*" or IfMatch=etag, for one PUT; failed, ConflictError.
    """
    if len(data) > SINGLE_PUT_BYTES and not conditions:
        put_chunks(uri, [data])
        return
    checksum = base64.b64encode(hashlib.sha256(data).digest()).decode()
    with _reported(uri, "written"):
        _call("put_object", uri, Body=data, ChecksumSHA256=checksum, **conditions)


def put_chunks(uri: str, chunks: Sequence[bytes | memoryview]) -> None:
    """The same for one object that is not in one piece; never more than a few parts of it are copied at a time."""
    total = sum(len(chunk) for chunk in chunks)
    if total <= SINGLE_PUT_BYTES:
        put(uri, b"".join(chunks))
    else:
        _put_parts(uri, _in_parts(chunks, _part_bytes(total)))


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
    with local.open("rb") as stream:
        if entry.bytes > SINGLE_PUT_BYTES:
            _put_parts(uri, _unchanged(stream, local, entry))
        else:
            put(uri, b"".join(_unchanged(stream, local, entry)))


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
            answer = _call("delete_objects", uri, Delete={"Objects": batch})
            if answer.get("Errors"):
                first = answer["Errors"][0]
                raise StorageError(f"{uri}: {len(answer['Errors'])} objects could not be deleted, the first is "
                                   f"{first.get('Key')}: {first.get('Code')}. Check the bucket's policy.")  # fmt: skip


def _unchanged(stream: BinaryIO, local: Path, entry: FileEntry) -> Iterator[bytes]:
    """The file's parts; StorageError at the end if together they were not what `entry` says."""
    digest = hashlib.sha256()
    while part := stream.read(_part_bytes(entry.bytes)):
        digest.update(part)
        yield part
    if digest.hexdigest() != entry.sha256:
        raise StorageError(f"{local} changed while it was being read. Wait until its writer is done, then repeat.")


def _in_parts(chunks: Sequence[bytes | memoryview], size: int) -> Iterator[bytes]:
    part = bytearray()
    for whole in chunks:
        chunk, start = memoryview(whole), 0
        while start < len(chunk):
            piece = chunk[start : start + size - len(part)]
            part += piece
            start += len(piece)
            if len(part) == size:
                yield bytes(part)
                part.clear()
    if part:
        yield bytes(part)


def _part_bytes(total: int) -> int:
    return max(_PART_BYTES, -(-total // _MOST_PARTS))


def _put_parts(uri: str, parts: Iterable[bytes]) -> None:
    """A multipart upload. One that is cut short is invisible; a process that is killed leaves its parts to the bucket's lifecycle."""
    with _reported(uri, "written"):
        upload = _call("create_multipart_upload", uri)["UploadId"]
        try:
            sent = _sync(_send_parts, uri, upload, parts)
            _call("complete_multipart_upload", uri, UploadId=upload, MultipartUpload={"Parts": sent})
        except BaseException as error:
            try:
                _call("abort_multipart_upload", uri, UploadId=upload)
            except Exception as another:
                error.add_note(f"The parts sent so far stay in the store: {another}")
            raise


async def _send_parts(uri: str, upload: str, parts: Iterable[bytes]) -> list[dict[str, Any]]:
    """`_PARALLEL_PARTS` at a time, each with its MD5; what S3 wants to hear of them at the end."""
    turns = asyncio.Semaphore(_PARALLEL_PARTS)
    tasks: list[asyncio.Task[dict[str, Any]]] = []

    async def send(number: int, part: bytes) -> dict[str, Any]:
        md5 = base64.b64encode(hashlib.md5(part, usedforsecurity=False).digest()).decode()
        options = {"UploadId": upload, "PartNumber": number, "ContentMD5": md5, "Body": part}
        try:
            answer = await _request("upload_part", uri, in_flight=_PARALLEL_PARTS * len(part), **options)
        finally:
            turns.release()
        return {"PartNumber": number, "ETag": answer["ETag"]}

    try:
        async with asyncio.TaskGroup() as group:
            for number, part in enumerate(parts, start=1):
                await turns.acquire()
                tasks.append(group.create_task(send(number, part)))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _range(uri: str, etag: str, start: int, stop: int) -> bytes:
    with _reported(uri, "read"):  # HTTP's ranges name their last byte
        data: bytes = _sync(_get, uri, Range=f"bytes={start}-{stop - 1}", IfMatch=etag)[0]
    return data


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
    page: dict[str, Any] = _call("list_objects_v2", uri, Prefix=_prefix(uri), **{"MaxKeys": BATCH_KEYS, **options})
    return page


def _prefix(uri: str) -> str:
    key = bucket_and_key(uri)[1]
    return f"{key}/" if key else ""


def _remote(uri: str) -> str:
    return "/".join(bucket_and_key(uri))


def _call(method: str, uri: str, **options: Any) -> Any:
    return _sync(_request, method, uri, in_flight=len(options.get("Body", b"")), **options)


async def _request(method: str, uri: str, in_flight: int = 0, **options: Any) -> Any:
    """One request; s3fs and botocore repeat it, within a time that is long enough for `in_flight` bytes on a slow link."""
    bucket, key = bucket_and_key(uri)
    if method not in _OF_THE_BUCKET:
        options["Key"] = key
    limit_s = ANSWER_S + in_flight / SLOWEST_BYTES_PER_S
    try:
        async with asyncio.timeout(limit_s) as limit:
            return await _filesystem()._call_s3(method, Bucket=bucket, **options)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise ConnectionError(f"no answer within {limit_s:.0f} s") from error


def _sync(coroutine: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Run it on the thread where s3fs does all its work."""
    from fsspec.asyn import sync

    return sync(_filesystem().loop, coroutine, *arguments, **options)


async def _get(uri: str, **options: Any) -> tuple[bytes, str]:
    answer = await _request("get_object", uri, **options)
    async with answer["Body"] as body:
        return await body.read(), answer["ETag"]


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
    absent = code in _ABSENT or (isinstance(error, FileNotFoundError) and code != "NoSuchBucket")
    # A write that finds nothing has lost its multipart upload or met a proxy; only If-Match asks for what is there.
    if absent and (verb != "written" or code == "NoSuchKey"):
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
    return "Check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the network, then repeat."
