"""Bytes in and out: downloads by resolve URL, and uploads through the LFS protocol."""

import hashlib
import hmac
import re
from urllib.parse import quote

from .store import HubError, Repository, check_path
from .wire import Reply, Request, byte_range, route

LFS_JSON = {"Content-Type": "application/vnd.git-lfs+json"}


@route("GET", "/[{kind}/]{repo}/resolve/{rev}/{path}")
def resolve(hub, request: Request) -> Reply:
    """A file at a revision, whole or in part."""
    path = check_path(request.args["path"])
    repository = hub.repository(request)
    user = hub.user(request)
    if repository.gated and not (user and user.owns(repository.id)):
        raise HubError(403, f"Access to {repository.id} is restricted", "GatedRepo")
    commit = repository.resolve(request.args["rev"])
    headers = {"X-Repo-Commit": commit.oid}
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
    entry = commit.files[path]
    headers |= {"ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
    status, start, length = 200, 0, entry.size
    if part := byte_range(request.headers.get("Range"), entry.size):
        status, (start, length) = 206, part
        headers["Content-Range"] = f"bytes {start}-{start + length - 1}/{entry.size}"
    return Reply(status, b"", headers, hub.store.blobs.path(entry.sha256), start, length)


@route("POST", "/[{kind}/]{repo}.git/info/lfs/objects/batch")
def lfs_batch(hub, request: Request) -> Reply:
    """Say which objects have to be uploaded, and where to; those already held need nothing.

    Without a ref the objects are for a pull request, which others than the owner may open.
    """
    body = request.json()
    repository = hub.repository(request, write=True if body.get("ref") else "pull_request")
    answers = []
    for item in body.get("objects", []):
        oid, size = item.get("oid"), item.get("size")
        answer = {"oid": oid, "size": size}
        held = repository.objects.get(oid)
        if not re.fullmatch("[0-9a-f]{64}", str(oid)) or not isinstance(size, int) or held not in (None, size):
            answer["error"] = {"code": 422, "message": f"Invalid object: {oid} of {size} bytes"}
        elif held is None:
            answer["actions"] = {
                "upload": {"href": _upload_url(hub, repository, oid, size)},
                "verify": {"href": f"{hub.url}/{repository.page}.git/info/lfs/objects/verify"},
            }
        answers.append(answer)
    return Reply.json({"transfer": "basic", "objects": answers}, **LFS_JSON)


@route("PUT", "/lfs-storage/{kind}/{repo}/{oid}", streams=True)
def lfs_upload(hub, request: Request) -> Reply:
    """Take an object whose sha256 and size are the announced ones.

    The request carries no token; that it was invited shows in the signature of its URL.
    """
    repository = hub.named_repository(request)
    oid, size = request.args["oid"], request.query.get("size", [""])[0]
    signature = request.query.get("signature", [""])[0]
    if repository is None or not hmac.compare_digest(signature, _signature(hub, repository, oid, size)):
        raise HubError(403, "This upload was not invited")
    hub.store.add_object(repository, request.chunks(), sha256=oid, size=int(size))
    return Reply()


@route("POST", "/[{kind}/]{repo}.git/info/lfs/objects/verify")
def lfs_verify(hub, request: Request) -> Reply:
    body = request.json()
    repository = hub.repository(request, write="pull_request")
    if repository.objects.get(body.get("oid")) != body.get("size", -1):
        raise HubError(404, f"Object {body.get('oid')} of {body.get('size')} bytes is not held")
    return Reply.json({}, **LFS_JSON)


def _upload_url(hub, repository: Repository, oid: str, size: int) -> str:
    signature = _signature(hub, repository, oid, str(size))
    return f"{hub.url}/lfs-storage/{repository.kind}s/{quote(repository.id)}/{oid}?size={size}&signature={signature}"


def _signature(hub, repository: Repository, oid: str, size: str) -> str:
    return hmac.new(hub.secret, f"{repository.page} {oid} {size}".encode(), hashlib.sha256).hexdigest()
