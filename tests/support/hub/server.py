"""`LoopbackHub`: the Hub look-alike on 127.0.0.1, started and stopped by a `with` block."""

import secrets
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import api, jobs, keyless, transfer  # noqa: F401  (importing them registers their routes)
from .connection import Recorded, Server
from .faults import Fault, Faults
from .store import Entry, HubError, Repository, Store, belongs_in_lfs, check_path
from .wire import Reply, Request, route_of


@dataclass(frozen=True)
class User:
    """Who a token stands for.

    `role` is "write", "read", "fineGrained", or "publisher" for a trusted one, which is no user.
    """

    name: str
    role: str
    organizations: tuple[str, ...] = ()
    writes_to: tuple[str, ...] = ()  # of a fine-grained token: users, organizations, repositories

    def owns(self, repository_id: str) -> bool:
        return repository_id.split("/")[0] in (self.name, *self.organizations)


class LoopbackHub:
    """A Hugging Face Hub on loopback for tests, for the real client to talk to.

    Args:
        folder: where file contents are kept; made if it is missing.
        tokens: ``{token: {"name": user, "role": "write" | "read" | "fineGrained", "orgs": [...]}}``;
            the role is "write" unless given, organizations are optional. A fine-grained token may write to what
            its "writes_to" names, such as ["ann", "ann/model"].
        port: 0 for any free one.

    Example:
        >>> with LoopbackHub(tmp_path, tokens={"hf_ann": {"name": "ann"}}) as hub:
        ...     HfApi(endpoint=hub.url, token="hf_ann").create_repo("ann/model")

    Attributes:
        url: the endpoint.
        requests: a `Recorded` for every request so far, in the order of their answers.
        jobs: the jobs that were started, and how they go.
        publishers: (repository, identity token) -> the token that a trusted publisher gets for it.
    """

    def __init__(self, folder: str | Path, tokens: dict[str, dict] | None = None, *, port: int = 0):
        self.store = Store(Path(folder))
        self.users = {
            token: User(
                who["name"], who.get("role", "write"), tuple(who.get("orgs", ())), tuple(who.get("writes_to", ()))
            )
            for token, who in (tokens or {}).items()
        }
        self.secret = secrets.token_bytes(16)
        self.jobs = jobs.Jobs()
        self.publishers: dict[tuple[str, str], str] = {}
        self.requests: list[Recorded] = []
        self.faults = Faults()
        self.stopping = threading.Event()
        self._server = Server(port, hub=self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.drop_connections()

    # -- for tests: the environment of a client, and faults

    @property
    def env(self) -> dict[str, str]:
        """What a client's environment needs before its first import, without a token."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def env_for(self, token: str, home: str | Path | None = None) -> dict[str, str]:
        """The same with a token, and with a cache folder of its own if `home` is given."""
        return self.env | {"HF_TOKEN": token} | ({"HF_HOME": str(home)} if home else {})

    def fault(
        self,
        pattern: str,
        *,
        status: int | None = None,
        reset: bool = False,
        stall: float = 0.0,
        times: int = 1,
        after: bool = False,
        cut: int | None = None,
        first: Callable[[], object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Let something go wrong with the next `times` requests.

        Args:
            pattern: a regular expression to find in "METHOD /path".
            status: answer this instead.
            reset: break the connection instead of answering.
            stall: wait this many seconds first.
            cut: break the connection after so many bytes of the answer.
            after: do what was asked before the answer goes wrong, so that the client cannot know.
            first: what somebody else does before anything else happens.
            headers: of the answer with that status, such as Retry-After.
        """
        self.faults.add(Fault(pattern, status, reset, stall, times, after, cut, first, headers))

    # -- for tests: the state, read and changed behind the client's back

    def repo(self, repo_id: str, repo_type: str = "model") -> Repository:
        """The repository, with its branches, tags, pull requests and commits; KeyError if there is none."""
        repository = self.store.find(repo_type, repo_id)
        if repository is None:
            raise KeyError(f"no {repo_type} {repo_id}")
        return repository

    def files(self, repo_id: str, rev: str = "main", repo_type: str = "model") -> dict[str, int]:
        """Sizes of the files at a revision, by path. A new repository has a .gitattributes."""
        return {path: entry.size for path, entry in self.commit_files(repo_id, rev, repo_type).items()}

    def read(self, repo_id: str, path: str, rev: str = "main", repo_type: str = "model") -> bytes:
        """The content of a file; KeyError if it is not there."""
        return self.store.blobs.read(self.commit_files(repo_id, rev, repo_type)[path].sha256)

    def commits(self, repo_id: str, rev: str = "main", repo_type: str = "model") -> list[str]:
        """The commit ids up to a revision, newest first."""
        return [commit.oid for commit in self.repo(repo_id, repo_type).resolve(rev).history()]

    def commit_files(self, repo_id: str, commit: str, repo_type: str = "model") -> dict[str, Entry]:
        """The files of a commit, each with its `size`, `sha256`, git `oid` and whether it is in `lfs`."""
        return dict(self.repo(repo_id, repo_type).resolve(commit).files)

    def put(
        self,
        repo_id: str,
        files: dict[str, bytes | None],
        message: str = "put",
        *,
        rev: str = "main",
        repo_type: str = "model",
        private: bool = False,
    ) -> str:
        """Commit `files` (None deletes) and return the commit id; the repository is made if it is missing."""
        with self.store.lock:
            repository = self.store.find(repo_type, repo_id)
            repository = repository or self.store.create(repo_type, repo_id, private=private)
            head = repository.resolve(rev)
            snapshot = dict(head.files)
            for path, content in files.items():
                if content is None:
                    del snapshot[path]
                elif belongs_in_lfs(check_path(path), len(content), content[:512]):
                    snapshot[path] = self.store.add_object(repository, [content])
                else:
                    snapshot[path] = self.store.add_regular(content)
            commit = repository.add_commit(head, snapshot, title=message, author=repository.owner)
            repository.move(rev, commit)
            return commit.oid

    # -- for handlers: who asks, and what they may see and change

    def user(self, request: Request) -> User | None:
        """Whose token came with the request; None without one, 401 for one that nobody has."""
        header = request.headers.get("Authorization")
        if header is None:
            return None
        user = self.users.get(header.removeprefix("Bearer ").strip())
        if user is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return user

    def find(self, request: Request, kind: str, repo_id: str) -> Repository:
        """A repository that the asker may see; others are as good as missing."""
        user, repository = self.user(request), self.store.find(kind, repo_id)
        if repository is None or (repository.private and not (user and user.owns(repository.id))):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def repository(self, request: Request, *, write: bool | str = False) -> Repository:
        """The repository in the request's path, if the asker may read it, or `write` to it.

        `write="pull_request"` asks for any user who may write somewhere, not for the owner.
        """
        repository = self.find(request, _kind(request), request.args["repo"])
        if write:
            self._check_writer(request, None if write == "pull_request" else repository.id)
        return repository

    def named_repository(self, request: Request) -> Repository | None:
        """The repository in the request's path, whoever asks."""
        return self.store.find(_kind(request), request.args["repo"])

    def named_in(self, request: Request, body: dict) -> str:
        """The repository id that a request to create or delete means; its asker must own it."""
        user = self.user(request)
        repo_id = f"{body.get('organization') or (user and user.name)}/{body.get('name')}"
        self._check_writer(request, repo_id)
        return repo_id

    def _check_writer(self, request: Request, repo_id: str | None) -> None:
        user = self.user(request)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        granted = repo_id is None or {repo_id, repo_id.split("/")[0]} & {*user.writes_to}
        if user.role == "read" or (user.role == "fineGrained" and not granted):
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if repo_id is not None and not user.owns(repo_id):
            raise HubError(403, f"Forbidden: {user.name} has no rights to write to {repo_id}")

    def answer(self, request: Request) -> Reply:
        """Do what the request asks, one after the other but for streamed uploads."""
        try:
            route = route_of(request)
            if route.streams:
                return route.handler(self, request)
            request.load()
            with self.store.lock:
                return route.handler(self, request)
        except HubError as error:
            return Reply.error(error)
        except ConnectionError:
            raise
        except Exception:
            traceback.print_exc()
            return Reply.error(HubError(500, "Internal error of the test hub, see its standard error"))


def _kind(request: Request) -> str:
    return request.args.get("kind", "models").removesuffix("s")
