"""The Hub's JSON API: who am I, repositories, their contents, commits and references."""

import base64

from . import card
from .commits import apply, parse
from .store import Commit, Entry, HubError, PullRequest, Repository, belongs_in_lfs, check_path, check_ref_name, now
from .wire import Reply, Request, route

DISCUSSIONS_PER_PAGE = 10


@route("GET", "/api/whoami-v2")
def whoami(hub, request: Request) -> Reply:
    user = hub.user(request)
    if user is None or user.role == "publisher":  # who is nobody
        raise HubError(401, "Invalid username or password.")
    organizations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in user.organizations]
    token = {"displayName": "loopback", "role": user.role}
    if user.role == "fineGrained":
        reading = {"entity": {"type": "user", "name": user.name}, "permissions": ["repo.content.read"]}
        writing = [
            {"entity": {"type": "model" if "/" in name else "user", "name": name}, "permissions": ["repo.write"]}
            for name in user.writes_to
        ]
        token["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": [reading, *writing]}
    auth = {"type": "access_token", "accessToken": token}
    return Reply.json({"type": "user", "name": user.name, "fullname": user.name, "orgs": organizations, "auth": auth})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub, request: Request) -> Reply:
    errors, warnings = card.problems(request.json().get("content", ""))
    messages = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return Reply.json(messages, 400 if errors else 200)


@route("POST", "/api/repos/create")
def create_repo(hub, request: Request) -> Reply:
    body = request.json()
    kind, repo_id = body.get("type") or "model", hub.named_in(request, body)
    if existing := hub.store.find(kind, repo_id):
        url = f"{hub.url}/{existing.page}"
        raise HubError(409, f"You already created this {kind} repo", body={"url": url})
    private = bool(body.get("private")) or body.get("visibility") == "private"
    repository = hub.store.create(kind, repo_id, private=private)
    return Reply.json({"url": f"{hub.url}/{repository.page}", "name": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(hub, request: Request) -> Reply:
    body = request.json()
    repository = hub.find(request, body.get("type") or "model", hub.named_in(request, body))
    hub.store.delete(repository)
    return Reply()


@route("PUT", "/api/{kind}/{repo}/settings")
def change_settings(hub, request: Request) -> Reply:
    repository, body = hub.repository(request, write=True), request.json()
    if "private" in body or "visibility" in body:
        repository.private = bool(body.get("private")) or body.get("visibility") == "private"
    return Reply.json({"private": repository.private, "gated": False})


@route("GET", "/api/{kind}/{repo}/auth-check[/{write}]")
def auth_check(hub, request: Request) -> Reply:
    hub.repository(request, write="write" in request.args)
    return Reply.json({})


@route("GET", "/api/{kind}/{repo}[/revision/{rev}]")
def info(hub, request: Request) -> Reply:
    repository = hub.repository(request)
    commit = repository.resolve(request.args.get("rev", "main"))
    readme = commit.files.get("README.md")
    metadata = card.metadata(hub.store.blobs.read(readme.sha256).decode(errors="replace")) if readme else {}
    tags = metadata.get("tags")
    program = {"host": repository.host, "sdk": repository.sdk} if repository.kind == "space" else {}
    return Reply.json(
        program
        | {
            "id": repository.id,
            "author": repository.owner,
            "sha": commit.oid,
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "createdAt": repository.created,
            "lastModified": commit.date,
            "tags": tags if isinstance(tags, list) else [],
            "cardData": metadata,
            "siblings": [_sibling(path, entry, request.flag("blobs")) for path, entry in commit.files.items()],
            "usedStorage": repository.used_storage(),
            "downloads": 0,
            "likes": 0,
        }
    )


def _sibling(path: str, entry: Entry, with_blobs: bool) -> dict:
    item = {"rfilename": path}
    if with_blobs:
        item |= {"size": entry.size, "blobId": entry.oid}
        if entry.lfs:
            item["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return item


@route("GET", "/api/{kind}/{repo}/tree/{rev}[/{path}]")
def tree(hub, request: Request) -> Reply:
    commit = hub.repository(request).resolve(request.args["rev"])
    folder = request.args.get("path", "").strip("/")
    prefix = check_path(folder) + "/" if folder else ""
    inside = [path for path in commit.files if path.startswith(prefix)]
    if folder and not inside:
        raise HubError(404, f"{folder} does not exist on {request.args['rev']}", "EntryNotFound")
    paths = {parent for path in inside for parent in _parents(path) if parent.startswith(prefix)} | set(inside)
    if not request.flag("recursive"):
        paths = {path for path in paths if "/" not in path[len(prefix) :]}
    return Reply.json([_item(commit, path, request.flag("expand")) for path in sorted(paths)])


@route("POST", "/api/{kind}/{repo}/paths-info/{rev}")
def paths_info(hub, request: Request) -> Reply:
    commit = hub.repository(request).resolve(request.args["rev"])
    form = request.form()
    expand = form.get("expand", ["false"])[0].lower() == "true"
    known = set(commit.files) | {parent for path in commit.files for parent in _parents(path)}
    asked = [path.strip("/") for path in form.get("paths", [])]
    return Reply.json([_item(commit, path, expand) for path in asked if path in known])


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _item(commit: Commit, path: str, expand: bool) -> dict:
    """A file or a folder as tree and paths-info list it."""
    entry = commit.files.get(path)
    if entry is None:
        item = {"type": "directory", "path": path, "size": 0, "oid": commit.folder_oid(path)}
    else:
        item = {"type": "file", "path": path, "size": entry.size, "oid": entry.oid}
        if entry.lfs:
            item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    if expand:
        changed = commit.last_change(path)
        item["lastCommit"] = {"id": changed.oid, "title": changed.title, "date": changed.date}
    return item


@route("POST", "/api/{kind}/{repo}/preupload/{rev}")
def preupload(hub, request: Request) -> Reply:
    """Say how each file has to be uploaded, and what is there now under its name."""
    repository = hub.repository(request, write="pull_request" if request.flag("create_pr") else True)
    commit = repository.resolve(request.args["rev"])
    answers = []
    for file in request.json().get("files", []):
        path, sample = check_path(file.get("path")), base64.b64decode(file.get("sample", ""))
        mode = "lfs" if belongs_in_lfs(path, file.get("size", 0), sample) else "regular"
        answer = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in commit.files:
            answer["oid"] = commit.files[path].etag
        answers.append(answer)
    return Reply.json({"files": answers, "commitOid": commit.oid})


@route("POST", "/api/{kind}/{repo}/commit/{rev}")
def create_commit(hub, request: Request) -> Reply:
    """Apply one atomic commit, to a branch or as a new pull request.

    A commit that changes nothing is made all the same, as the Hub does; it is the
    client that leaves unchanged files out. A pull request starts from the parent
    commit that the header names, any other commit needs it to be the head.
    """
    opens_pr, rev = request.flag("create_pr"), request.args["rev"]
    repository = hub.repository(request, write="pull_request" if opens_pr else True)
    header, operations = parse(request.body)
    expected = header.get("parentCommit")
    base = repository.resolve(rev)
    if opens_pr:
        base = repository.resolve(expected) if expected else base
    elif repository.head(rev) is None:
        raise HubError(400, f"Commits go to a branch or a pull request; {rev} is neither")
    elif expected is not None and expected != base.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = apply(hub.store, repository, dict(base.files), operations)
    commit = repository.add_commit(
        base, files, title=header["summary"], message=header.get("description", ""), author=hub.user(request).name
    )
    page = f"{hub.url}/{repository.page}"
    answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{page}/commit/{commit.oid}", "hookOutput": ""}
    if opens_pr:
        answer["pullRequestUrl"] = f"{page}/discussions/{repository.open_pull_request(base, commit)}"
    else:
        repository.move(rev, commit)
    return Reply.json(answer)


@route("GET", "/api/{kind}/{repo}/discussions")
def discussions(hub, request: Request) -> Reply:
    """Pull requests, newest first, in pages; there are no other discussions here."""
    repository = hub.repository(request)
    status, kind = (request.query.get(name, ["all"])[0] for name in ("status", "type"))
    author, page = request.query.get("author", [None])[0], int(request.query.get("p", ["0"])[0])
    found = [
        _discussion(repository, number)
        for number, proposal in sorted(repository.discussions.items(), reverse=True)
        if kind != "discussion" and author in (None, proposal.author) and status in ("all", _shown(proposal))
    ]
    start = page * DISCUSSIONS_PER_PAGE
    shown = found[start : start + DISCUSSIONS_PER_PAGE]
    return Reply.json({"discussions": shown, "count": len(found), "start": start})


@route("GET", "/api/{kind}/{repo}/discussions/{number}")
def discussion(hub, request: Request) -> Reply:
    repository, number = _numbered(hub, request)
    more = {"events": [], "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "diff": ""}
    return Reply.json(_discussion(repository, number) | more)


@route("POST", "/api/{kind}/{repo}/discussions/{number}/status")
def change_status(hub, request: Request) -> Reply:
    repository, number = _numbered(hub, request, write=True)
    proposal, status = repository.discussions[number], request.json().get("status")
    proposal.status = status
    event = {"id": f"{number}", "type": "status-change", "createdAt": now(), "data": {"status": status}}
    return Reply.json({"newStatus": event | {"author": {"name": hub.user(request).name}}})


@route("POST", "/api/{kind}/{repo}/discussions/{number}/merge")
def merge(hub, request: Request) -> Reply:
    repository, number = _numbered(hub, request, write=True)
    if repository.discussions[number].status != "open":
        raise HubError(400, "This pull request is not open")
    repository.merge(number, hub.user(request).name)
    return Reply.json({})


def _numbered(hub, request: Request, write: bool = False) -> tuple[Repository, int]:
    repository, number = hub.repository(request, write=write), int(request.args["number"])
    if number not in repository.discussions:
        raise HubError(404, f"No discussion {number}", "EntryNotFound")
    return repository, number


def _shown(proposal: PullRequest) -> str:
    """The status as the listing filters by it, where merged is closed."""
    return "open" if proposal.status == "open" else "closed"


def _discussion(repository: Repository, number: int) -> dict:
    proposal = repository.discussions[number]
    return {
        "num": number,
        "title": proposal.title,
        "author": {"name": proposal.author},
        "createdAt": proposal.created,
        "status": proposal.status,
        "isPullRequest": True,
        "repo": {"name": repository.id, "type": repository.kind},
    }


@route("GET", "/api/{kind}/{repo}/commits/{rev}")
def commits(hub, request: Request) -> Reply:
    history = list(hub.repository(request).resolve(request.args["rev"]).history())
    items = [
        {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in history
    ]
    return Reply.json(items, **{"X-Total-Count": str(len(items))})


@route("GET", "/api/{kind}/{repo}/refs")
def refs(hub, request: Request) -> Reply:
    repository = hub.repository(request)

    def listed(prefix: str, names: dict) -> list[dict]:
        return [{"name": str(n), "ref": f"refs/{prefix}/{n}", "targetCommit": oid} for n, oid in names.items()]

    found = {"branches": listed("heads", repository.branches), "tags": listed("tags", repository.tags), "converts": []}
    if request.flag("include_prs"):
        found["pullRequests"] = listed("pr", repository.pull_requests)
    return Reply.json(found)


@route("POST", "/api/{kind}/{repo}/tag/{rev}")
def create_tag(hub, request: Request) -> Reply:
    repository = hub.repository(request, write=True)
    target, name = repository.resolve(request.args["rev"]), check_ref_name(request.json().get("tag"))
    return _add_ref(repository.tags, name, target, "Tag")


@route("DELETE", "/api/{kind}/{repo}/tag/{name}")
def delete_tag(hub, request: Request) -> Reply:
    return _remove_ref(hub.repository(request, write=True).tags, request.args["name"])


@route("POST", "/api/{kind}/{repo}/branch/{name}")
def create_branch(hub, request: Request) -> Reply:
    repository, name = hub.repository(request, write=True), check_ref_name(request.args["name"])
    target = repository.resolve(request.json().get("startingPoint") or "main")
    return _add_ref(repository.branches, name, target, "Branch")


@route("DELETE", "/api/{kind}/{repo}/branch/{name}")
def delete_branch(hub, request: Request) -> Reply:
    repository = hub.repository(request, write=True)
    if request.args["name"] == "main":
        raise HubError(403, "The main branch cannot be deleted")
    return _remove_ref(repository.branches, request.args["name"])


@route("GET", "/api/spaces/{repo}/variables")
def variables(hub, request: Request) -> Reply:
    repository = hub.find(request, "space", request.args["repo"])
    return Reply.json({key: {"value": value} for key, value in repository.variables.items()})


@route("POST", "/api/spaces/{repo}/variables")
def set_variable(hub, request: Request) -> Reply:
    request.args["kind"] = "spaces"
    repository, told = hub.repository(request, write=True), request.json()
    repository.variables[told["key"]] = told["value"]
    return variables(hub, request)


def _add_ref(refs: dict[str, str], name: str, target: Commit, what: str) -> Reply:
    if name in refs:
        raise HubError(409, f"{what} {name} already exists")
    refs[name] = target.oid
    return Reply()


def _remove_ref(refs: dict[str, str], name: str) -> Reply:
    if name not in refs:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    del refs[name]
    return Reply()
