"""Published models: immutable versions, and the aliases that point at them.

    models/<project>/<name>/<version>/claim.json      who took the number; stays for ever, so no number is used twice
                                      <files>         PEFT's adapter format, or a full model in transformers' format
                                      manifest.json   written last: a version without one is not there
    models/<project>/<name>/aliases.json              {"production": 3}, changed by compare-and-swap
    endpoints/<name>/desired.json                     read here only, to refuse the deletion of what is served

A deleted version keeps claim.json, and a manifest.json that says `deleted_at`: that one object decides between a slow
publisher and a garbage collection, whoever writes it first. Whether a model is any good is not asked here: see
`training/gate.py`. What a directory must hold is in `publishable.py`, the nouns are in `domain.py`, the verbs on bytes in
`storage.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import random
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from service import storage
from service.domain import FileEntry, Manifest, ModelRef, check_name
from service.domain import ManifestDraft as ManifestDraft  # what `publish` takes
from service.errors import ConfigError, ConflictError, NotFoundError, StorageError
from service.publishable import REGISTRY_FILES, name_problem, publishable_files

DEFAULT_ALIAS = "production"
_ATTEMPTS = 200  # of losing a race: each loss means that somebody else has won one


def model_digest(files: Mapping[str, FileEntry]) -> str:
    """The Model's identity: sha256 over the sorted lines `name:sha256` of its files."""
    lines = "".join(f"{name}:{files[name].sha256}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def cached_copy(target: Path, files: Mapping[str, FileEntry], fetch: Callable[[str, Path, FileEntry], None]) -> Path:
    """`target`, a directory with just these files: made once, however many ask at once, and whole or not at all.

    `fetch` brings one of them to a path and raises if it is not what its entry says.
    """
    with storage.locked(target):
        if not _is_complete(target, files):
            aside = target.parent / f".{target.name}.{secrets.token_hex(6)}"
            try:
                for name, entry in files.items():
                    fetch(name, aside / name, entry)
                storage.delete_tree(str(target))
                aside.rename(target)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return target


class Registry:
    """The models below one LORAY_HOME. Holds no state: every call asks the store."""

    def __init__(self, home: str) -> None:
        self.home = home

    def publish(
        self,
        family: str,
        source: Path,
        manifest: ManifestDraft,
        progress: Callable[[str, FileEntry], None] = lambda name, entry: None,
    ) -> Manifest:
        """Publishes the directory `source` as the family's next version. `progress` hears of each uploaded file.

        ModelError, before anything is written, lists all that is wrong with the directory. Two at once get two numbers.
        """
        model = _family(family)
        names = publishable_files(source, manifest.kind)
        ref = model.at(self._claim(model))
        files: dict[str, FileEntry] = {}
        for name in names:
            files[name] = storage.put_file(source / name, storage.join(self._directory(ref), name))
            progress(name, files[name])
        written = Manifest(
            ref=str(ref), digest=model_digest(files), files=files, created_at=_now(), **manifest.model_dump()
        )
        self._write_manifest(ref, written)
        return written

    def resolve(self, ref: ModelRef) -> ModelRef:
        """`ref` with a version that exists. A bare name means its alias `production`, never the latest version."""
        version = ref.version
        if version is None:
            version = self.aliases(ref.family).get(ref.alias or DEFAULT_ALIAS)
        if version is None or self._manifest_text(ref.at(version)) is None:
            raise self._not_found(ref)
        return ref.at(version)

    def manifest(self, ref: ModelRef) -> Manifest:
        """The manifest of what `ref` resolves to."""
        resolved = self.resolve(ref)
        text = self._manifest_text(resolved)
        if text is None:
            raise self._not_found(ref)
        return _parse_manifest(text, storage.join(self._directory(resolved), "manifest.json"))

    def fetch(self, ref: ModelRef, cache: Path) -> Path:
        """A verified local copy, downloaded once however many ask at once.

        `cache/adapters/<digest>/` for an adapter, `cache/base_models/<digest>/` for a full model.
        """
        manifest = self.manifest(ref)
        target = cache / ("adapters" if manifest.kind == "adapter" else "base_models") / manifest.digest
        uri = self._directory(ModelRef.parse(manifest.ref))
        if model_digest(manifest.files) != manifest.digest or any(map(name_problem, manifest.files)):
            raise StorageError(
                f"{uri}/manifest.json contradicts itself: its digest or a file name is wrong. Publish again."
            )
        return cached_copy(
            target, manifest.files, lambda name, local, entry: storage.fetch_file(storage.join(uri, name), local, entry)
        )

    def models(self) -> list[str]:
        """The families with at least one version, sorted."""
        refs = [
            ModelRef(project, name)
            for project in storage.list_names(storage.join(self.home, "models"))
            for name in storage.list_names(storage.join(self.home, "models", project))
        ]
        return sorted(ref.family for ref in refs if self.versions(ref.family))

    def versions(self, family: str) -> list[int]:
        """The versions that can be used, ascending; [] for an unknown family."""
        model = _family(family)
        return [version for version in self._claimed(model) if self._manifest_text(model.at(version)) is not None]

    def aliases(self, family: str) -> dict[str, int]:
        """Alias -> version; {} when there are none."""
        return self._read_aliases(_family(family))[0]

    def aliases_of(self, families: Sequence[str]) -> dict[str, dict[str, int]]:
        """`aliases` of each family."""
        return dict(zip(families, storage.read_together(self.aliases, families, self.home), strict=True))

    def set_alias(self, family: str, alias: str, version: int) -> None:
        """Points the alias at an existing version. Of concurrent calls each takes effect, one after the other."""
        model = _family(family)
        check_name(alias, "alias")
        if alias.isdigit():
            raise ConfigError(
                f"alias {alias!r} would read as a version. Use a name with a letter, such as 'production'."
            )
        self.resolve(model.at(version))
        before = self._change_aliases(model, lambda now: {**now, alias: version})
        if self._manifest_text(model.at(version)) is None:  # deleted between the look and the write
            self._change_aliases(model, lambda now: _undone(now, before, alias, version))
            raise self._not_found(model.at(version))

    def delete_alias(self, family: str, alias: str) -> None:
        """Removes the alias; NotFoundError if there is none of this name."""
        model = _family(family)

        def without(now: dict[str, int]) -> dict[str, int]:
            if alias not in now:
                raise self._not_found(ModelRef(model.project, model.name, alias))
            return {name: version for name, version in now.items() if name != alias}

        self._change_aliases(model, without)

    def delete(self, ref: ModelRef) -> None:
        """Deletes a version's files; its number stays taken. ConflictError names every alias and endpoint using it."""
        resolved = self.resolve(ref)
        manifest = self._manifest_text(resolved)
        self._refuse_if_used(resolved)
        uri = storage.join(self._directory(resolved), "manifest.json")
        storage.write_bytes(uri, _tombstone())
        try:
            self._refuse_if_used(resolved)  # an alias may have been set since: `set_alias` looks again, too
        except ConflictError:
            if manifest is not None:
                storage.write_bytes(uri, manifest)
            raise
        self._delete_files(resolved)

    def unfinished(self, older_than_s: float = 0.0) -> list[str]:
        """Directories that hold files of no version: a publisher or deletion was killed, or is still at work.

        `older_than_s` leaves out those claimed more recently: their publisher may well be alive.
        """
        found = []
        for project in storage.list_names(storage.join(self.home, "models")):
            for name in storage.list_names(storage.join(self.home, "models", project)):
                model = ModelRef(project, name)
                refs = [model.at(v) for v in self._claimed(model)]
                found += [
                    self._directory(ref)
                    for ref in refs
                    if self._is_unfinished(ref) and self._claim_age_s(ref) >= older_than_s
                ]
        return found

    def discard(self, uri: str) -> None:
        """Deletes the files of a directory that `unfinished` named; a publisher still at work gets ConflictError."""
        project, name, version = uri.rstrip("/").split("/")[-3:]
        ref = ModelRef(project, name, version)
        try:
            storage.create_exclusive(storage.join(self._directory(ref), "manifest.json"), _tombstone())
        except ConflictError:
            if self._manifest_text(ref) is not None:
                raise ConflictError(
                    f"{ref} has been published meanwhile. Delete it as a model, if it must go."
                ) from None
        self._delete_files(ref)

    def _directory(self, ref: ModelRef) -> str:
        return storage.join(self.home, "models", ref.project, ref.name, ref.selector or "")

    def _claimed(self, model: ModelRef) -> list[int]:
        names = storage.list_names(storage.join(self.home, "models", model.project, model.name))
        return sorted(int(name) for name in names if name.isascii() and name.isdigit())

    def _claim(self, model: ModelRef) -> int:
        claim = json.dumps({"created_at": _now(), "nonce": secrets.token_hex(16)}).encode()
        for _ in range(_ATTEMPTS):
            version = max(self._claimed(model), default=0) + 1
            uri = storage.join(self._directory(model.at(version)), "claim.json")
            try:
                storage.create_exclusive(uri, claim)
            except ConflictError:
                if not storage.exists(uri) or storage.read_bytes(uri) != claim:
                    continue  # somebody else's; our own it is when an answer was lost and the client repeated itself
            return version
        raise ConflictError(f"{model} got no version number in {_ATTEMPTS} attempts. Publish again when it is calmer.")

    def _write_manifest(self, ref: ModelRef, manifest: Manifest) -> None:
        uri = storage.join(self._directory(ref), "manifest.json")
        data = manifest.model_dump_json(indent=2).encode()
        try:
            storage.create_exclusive(uri, data)
        except ConflictError as error:
            if storage.read_bytes(uri) != data:
                self._delete_files(ref)
                raise ConflictError(
                    f"{ref} was discarded by a clean-up while it was uploaded. Publish again."
                ) from error

    def _manifest_text(self, ref: ModelRef) -> bytes | None:
        try:
            text = storage.read_bytes(storage.join(self._directory(ref), "manifest.json"))
        except NotFoundError:
            return None
        return None if text.startswith(_TOMBSTONE_START) else text

    def _read_aliases(self, model: ModelRef) -> tuple[dict[str, int], str | None]:
        uri = storage.join(self.home, "models", model.project, model.name, "aliases.json")
        try:
            text, tag = storage.read_tagged(uri)
        except NotFoundError:
            return {}, None
        try:
            return {str(alias): int(version) for alias, version in json.loads(text).items()}, tag
        except (ValueError, AttributeError, TypeError) as error:
            raise StorageError(f'{uri} is no object such as {{"production": 3}}: {text[:80]!r}. Restore it.') from error

    def _change_aliases(self, model: ModelRef, change: Callable[[dict[str, int]], dict[str, int]]) -> dict[str, int]:
        uri = storage.join(self.home, "models", model.project, model.name, "aliases.json")
        for attempt in range(_ATTEMPTS):
            before, tag = self._read_aliases(model)
            try:
                storage.compare_and_swap(uri, json.dumps(change(before), sort_keys=True).encode(), tag)
                return before
            except ConflictError:
                time.sleep(random.uniform(0, 0.005 * min(attempt + 1, 20)))
        raise ConflictError(f"{uri} kept changing during {_ATTEMPTS} attempts. Repeat when it is calmer.")

    def _refuse_if_used(self, ref: ModelRef) -> None:
        users = [f"alias {model_alias!r}" for model_alias, v in self.aliases(ref.family).items() if v == ref.version]
        users += [f"endpoint {name!r}" for name in self._endpoints_of(ref)]
        users += [f"{model} (it is its base model)" for model in self._built_on(ref)]
        if users:
            raise ConflictError(
                f"{ref} cannot be deleted: {', '.join(users)} points at it. Move or remove that first, then repeat."
            )

    def _built_on(self, base: ModelRef) -> list[str]:
        refs = [_family(family).at(version) for family in self.models() for version in self.versions(family)]
        return [str(ref) for ref in refs if _is_named(self.manifest(ref).base_model, base)]

    def _endpoints_of(self, ref: ModelRef) -> list[str]:
        endpoints = storage.join(self.home, "endpoints")
        return [name for name in storage.list_names(endpoints) if ref in _served(storage.join(endpoints, name))]

    def _is_unfinished(self, ref: ModelRef) -> bool:
        if self._manifest_text(ref) is not None:
            return False
        names = set(storage.list_names(self._directory(ref)))
        return "manifest.json" not in names or bool(names - set(REGISTRY_FILES))

    def _claim_age_s(self, ref: ModelRef) -> float:
        claim = json.loads(storage.read_bytes(storage.join(self._directory(ref), "claim.json")))
        if "created_at" not in claim:  # written by hand or by another program: nobody is at work on it
            return math.inf
        return (datetime.now(UTC) - datetime.fromisoformat(claim["created_at"])).total_seconds()

    def _delete_files(self, ref: ModelRef) -> None:
        for name in storage.list_names(self._directory(ref)):
            if name not in REGISTRY_FILES:
                storage.delete_tree(storage.join(self._directory(ref), name))

    def _not_found(self, ref: ModelRef) -> NotFoundError:
        versions, aliases = self.versions(ref.family), self.aliases(ref.family)
        if not versions:
            known = self.models()
            nearest = difflib.get_close_matches(ref.family, known, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            return NotFoundError(f"No model is named {ref.family}.{hint} Known models: {', '.join(known) or 'none'}.")
        pointers = ", ".join(f"{alias} -> {version}" for alias, version in aliases.items()) or "none"
        wanted = f"{ref}" if ref.selector else f"{ref} (a bare name means its alias {DEFAULT_ALIAS!r})"
        return NotFoundError(
            f"No model answers to {wanted}. Versions of {ref.family}: {', '.join(map(str, versions))}; "
            f"aliases: {pointers}. Name one of these, or set the alias."
        )


_TOMBSTONE_START = b'{"deleted_at"'


def _tombstone() -> bytes:
    return json.dumps({"deleted_at": _now()}).encode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _family(text: str) -> ModelRef:
    ref = ModelRef.parse(text)
    if ref.selector is not None:
        raise ConfigError(f"{text!r} names a version or alias, and a family is wanted. Write {ref.family!r}.")
    return ref


def _is_named(base_model: str, ref: ModelRef) -> bool:
    try:
        named = ModelRef.parse(base_model)
    except ConfigError:
        return False  # a path or a URI
    return (named.family, named.version) == (ref.family, ref.version)


def _parse_manifest(text: bytes, uri: str) -> Manifest:
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise StorageError(f"{uri} is no manifest: {error}. Restore it, or publish again.") from error


def _is_complete(directory: Path, files: Mapping[str, FileEntry]) -> bool:
    """Sizes only: the sha256 was verified before the directory got its name."""
    if not directory.is_dir():
        return False
    sizes = {entry.name: entry.stat().st_size for entry in directory.iterdir()}
    return sizes == {name: entry.bytes for name, entry in files.items()}


def _undone(now: dict[str, int], before: dict[str, int], alias: str, version: int) -> dict[str, int]:
    if now.get(alias) != version:
        return now  # somebody has moved it on already
    rest = {name: number for name, number in now.items() if name != alias}
    return {**rest, alias: before[alias]} if alias in before else rest


def _served(endpoint: str) -> set[ModelRef]:
    uri = storage.join(endpoint, "desired.json")
    try:
        adapters = json.loads(storage.read_bytes(uri)).get("adapters", {})
        return {ModelRef.parse(adapter["model"]) for adapter in adapters.values()}
    except NotFoundError:
        return set()
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise StorageError(
            f"{uri} is no desired state, so nobody knows what it serves: {error}. Restore it."
        ) from error
