"""The commit request: newline-delimited JSON in, a new snapshot of the repository out."""

import base64
import binascii
import json

from .card import problems
from .store import LARGEST_REGULAR_FILE, Entry, HubError, Repository, Store, check_path


def parse(body: bytes) -> tuple[dict, list[tuple[str, dict]]]:
    """Split a request into its header and its operations ``(key, value)``, in order."""
    try:
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        items = [(line["key"], line["value"]) for line in lines]
    except (ValueError, KeyError, TypeError):
        raise HubError(400, "A commit is one JSON object with key and value per line") from None
    if not items or items[0][0] != "header" or not items[0][1].get("summary"):
        raise HubError(400, "A commit begins with a header that has a summary")
    return items[0][1], items[1:]


def apply(store: Store, repository: Repository, files: dict[str, Entry], operations) -> dict[str, Entry]:
    """The snapshot that results from doing `operations`, in order, to `files`.

    Raises:
        HubError: an operation is unknown, malformed, names a file that is not there,
            or refers to an LFS object that was not uploaded. Nothing was changed then.
    """
    files = dict(files)
    for key, value in operations:
        if key not in _OPERATIONS:
            raise HubError(400, f"Unknown operation: {key!r}")
        try:
            _OPERATIONS[key](store, repository, files, value)
        except (KeyError, TypeError) as error:
            raise HubError(400, f"Malformed operation {key!r}: {error!r}") from None
    for path in files:
        parts = path.split("/")
        for depth in range(1, len(parts)):
            if "/".join(parts[:depth]) in files:
                raise HubError(400, f"{'/'.join(parts[:depth])} cannot be a file and a folder")
    return files


def _add_file(store, repository, files, value):
    path = check_path(value["path"])
    try:
        content = value["content"]
        content = base64.b64decode(content, validate=True) if value.get("encoding") == "base64" else content.encode()
    except (binascii.Error, AttributeError):
        raise HubError(400, f"The content of {path} is not what its encoding says") from None
    if len(content) > LARGEST_REGULAR_FILE:
        raise HubError(400, f"{path} is larger than 10 MiB: it has to be uploaded through LFS")
    if path == "README.md" and (errors := problems(content.decode(errors="replace"))[0]):
        raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    files[path] = store.add_regular(content)


def _add_lfs_file(store, repository, files, value):
    path, oid = check_path(value["path"]), value["oid"]
    if value.get("algo", "sha256") != "sha256":
        raise HubError(400, f"Unknown hash algorithm: {value['algo']!r}")
    held = repository.objects.get(oid)
    if held is None:
        raise HubError(400, f"LFS pointer of {path} points to an object that was not uploaded: {oid}")
    if value.get("size", held) != held:
        raise HubError(400, f"LFS object {oid} has {held} bytes, not {value['size']}")
    files[path] = Entry.of_lfs(oid, held)


def _delete_file(store, repository, files, value):
    if check_path(value["path"]) not in files:
        raise _missing(value["path"])
    del files[value["path"]]


def _delete_folder(store, repository, files, value):
    folder = check_path(value["path"].removesuffix("/"))
    inside = [path for path in files if path.startswith(folder + "/")]
    if not inside:
        raise _missing(folder)
    for path in inside:
        del files[path]


def _copy_file(store, repository, files, value):
    source, path = check_path(value["srcPath"]), check_path(value["path"])
    revision = value.get("srcRevision")
    origin = repository.resolve(revision).files if revision else files
    if source not in origin:
        raise _missing(source)
    files[path] = origin[source]


def _missing(path: str) -> HubError:
    return HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")


_OPERATIONS = {
    "file": _add_file,
    "lfsFile": _add_lfs_file,
    "deletedFile": _delete_file,
    "deletedFolder": _delete_folder,
    "copyFile": _copy_file,
}
