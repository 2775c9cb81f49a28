"""One atomic commit that brings a repository to what it should hold, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import HubError
from pipeline.hub.auth import keyless
from pipeline.hub.retry import retry_or_explain, say
from pipeline.hub.tree import CARD, LINEAGE, Content, Copy, Lineage, LocalFile, Tree, read_tree, size_of
from pipeline.publishing.upload import Progress, send

Render = Callable[[Tree], Mapping[str, Content]]


@dataclass(frozen=True)
class Change:
    """What a commit has to do."""

    add: dict[str, Content]
    delete: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


NOTHING = Change({}, ())


@dataclass(frozen=True)
class Commit:
    """What `publish` did: the head after it, and the files it changed (none: nothing had to be sent).

    `pull_request` is the number of the pull request that holds it, where it is not on the main branch.
    """

    oid: str
    url: str
    sent: tuple[str, ...]
    deleted: tuple[str, ...]
    sent_bytes: int
    pull_request: int | None = None


def publish(
    repo: str,
    render: Render,
    message: str,
    *,
    progress: Progress = lambda done, total, what: None,
    create_pr: bool = False,
    pull_request: int | None = None,
    check: Callable[[Tree], None] = lambda tree: None,
    advice: str = "run again to publish what is missing",
) -> Commit:
    """Bring a repository to the files that `render` makes, in one commit, or in none if they are there already.

    Args:
        render: all files that are ours, by path in the repository, for the tree that the commit will change.
            Called again when the head has moved, and for a pull request. A README.md of its making has to keep
            what people wrote into the one that is there; any other file that is there and not ours is refused.
        create_pr: commit to a pull request instead of the main branch: to the open one that this user gave the
            title `message`, or a new one.
        pull_request: number of the pull request to update, if it is still open and whatever its title.
        check: looks at the main branch before each attempt, and raises where nothing is to be done on top of that.
        advice: what people can do where the Hub stays away.

    Raises:
        HubError: where another run's release or a file of somebody else's is in the way, or after a bounded
            number of attempts; the repository is then as it was.
    """
    tried = [NOTHING]

    def attempt() -> Commit:
        branch = _choose(repo, render, message, create_pr, pull_request, check)
        if not branch.change:
            return _done(repo, branch.tree.head, tried[-1], branch.number)  # not nothing where the answer was lost
        _check_card(repo, branch.change)
        operations = _operations(repo, branch, progress)
        tried.append(branch.change)
        return _commit(repo, branch, operations, message)

    return retry_or_explain(repo, attempt, advice=advice)


@dataclass(frozen=True)
class _Branch:
    """Where a commit goes, and what it has to do there: to main, to pull request `number`, or to a new one."""

    tree: Tree
    change: Change
    number: int | None = None
    opens: bool = False

    @property
    def revision(self) -> str | None:
        return None if self.number is None else f"refs/pr/{self.number}"


def _choose(
    repo: str, render: Render, title: str, create_pr: bool, known: int | None, check: Callable[[Tree], None]
) -> _Branch:
    """The main branch, or where something has to change and only a proposal is wanted, a pull request."""
    tree = read_tree(repo)
    check(tree)
    change = difference(tree, render(tree))
    if not (change and create_pr):
        return _Branch(tree, change)
    number = _open_pull_request(repo, title, known)
    if number is None:
        return _Branch(tree, change, opens=True)
    tree = read_tree(repo, f"refs/pr/{number}")
    return _Branch(tree, difference(tree, render(tree)), number)


def _operations(repo: str, branch: _Branch, progress: Progress) -> list:
    """Send what is to be added, and say what the commit does."""
    from huggingface_hub import CommitOperationCopy, CommitOperationDelete

    add, delete = branch.change.add, branch.change.delete
    contents = {path: c for path, c in add.items() if not isinstance(c, Copy)}
    copies = {path: c for path, c in add.items() if isinstance(c, Copy)}
    return [
        *send(repo, contents, branch.revision, branch.opens, progress),
        *(CommitOperationCopy(c.path, path, src_revision=c.revision) for path, c in copies.items()),
        *(CommitOperationDelete(path) for path in delete),
    ]


def _commit(repo: str, branch: _Branch, operations: list, message: str) -> Commit:
    from huggingface_hub import HfApi

    made = HfApi().create_commit(
        repo,
        operations,
        commit_message=message,
        parent_commit=branch.tree.head,
        revision=branch.revision,
        create_pr=branch.opens,
    )
    return _done(repo, made.oid, branch.change, made.pr_num if branch.opens else branch.number)


def difference(tree: Tree, wanted: Mapping[str, Content]) -> Change:
    """What has to be done to a tree of the Hub so that it holds `wanted`, and of ours nothing else.

    Raises:
        HubError: where another run's release, or a file that is not ours, is in the way.
    """
    lineage = wanted.get(LINEAGE)
    if isinstance(lineage, bytes):  # and no copy: an older release here may have had another name
        _check_holder(tree, Lineage.parse(lineage))
    foreign = sorted(p for p in (wanted.keys() & tree.files.keys()) - tree.ours if Path(p).name != CARD)
    if foreign:
        raise HubError(f"{tree.repo}: has a {foreign[0]} that tunepress did not put there; choose another repository")
    changed = {p: c for p, c in wanted.items() if p not in tree.files or not tree.files[p].holds(c)}
    return Change(changed, tuple(sorted(tree.ours - wanted.keys())))


def check_destination(repo: str, run: str, mirror_of: str | None = None) -> None:
    """Find out before any work whether a repository can take a run's release; one that is not there yet can.

    Raises:
        HubError: where it holds another run's release, or the Hub does not say.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    def attempt() -> None:
        with contextlib.suppress(RepositoryNotFoundError):
            _check_holder(read_tree(repo), Lineage(run, mirror_of))

    retry_or_explain(repo, attempt)


def check_root(tree: Tree) -> None:
    """Refuse a repository whose last release has a model at its root, which one of variants alone would remove.

    Raises:
        HubError: naming it.
    """
    if any("/" not in path and path.endswith(".safetensors") for path in tree.ours):
        raise HubError(
            f"{tree.repo}: holds {_named(tree.lineage)} with a model at the root, and this has variants alone; "
            "ask that run for them (quantize.variants), or use another repository"
        )


def _check_holder(tree: Tree, wanted: Lineage) -> None:
    """Refuse a repository that holds another run's release, which ours would replace without a trace."""
    there = tree.lineage
    if there.run is None or (there.run, there.mirror_of) == (wanted.run, wanted.mirror_of):
        return
    raise HubError(
        f"{tree.repo}: holds {_named(there)}, and this is {_named(wanted)}; use another repository"
        + (", or give this run the same name" if there.mirror_of == wanted.mirror_of else "")
    )


def _named(lineage: Lineage) -> str:
    return f"run {lineage.run!r}" + (f" as a mirror of {lineage.mirror_of}" if lineage.mirror_of else "")


def _open_pull_request(repo: str, title: str, known: int | None) -> int | None:
    """The open pull request to go on with."""
    from huggingface_hub import HfApi

    api = HfApi()
    me = None if keyless() else api.whoami()["name"]  # and then only by its number: others may use the title too
    found = list(api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open"))
    numbers = [d.num for d in found if d.author == me and d.title == title]
    return known if known in [d.num for d in found] else max(numbers, default=None)


def _check_card(repo: str, change: Change) -> None:
    """Let the Hub look at the card's metadata before gigabytes are sent, and not after."""
    from huggingface_hub import constants
    from huggingface_hub.errors import BadRequestError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    card = change.add.get(CARD)
    if not isinstance(card, (bytes, LocalFile)):
        return
    text = (card if isinstance(card, bytes) else card.path.read_bytes()).decode(errors="replace")
    # Not by the client's own function, which stumbles where there is no answer.
    body, headers = {"repoType": "model", "content": text}, {"Accept": "text/plain"}
    try:
        answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body, headers=headers)
        hf_raise_for_status(answer)
    except BadRequestError as error:
        told = error.response.text if error.response is not None else str(error)
        raise HubError(f"{repo}: the Hub refuses the metadata of {CARD} ({say(told)}); mend it there") from None


def _done(repo: str, head: str, change: Change, pull_request: int | None) -> Commit:
    from huggingface_hub import constants

    place = f"discussions/{pull_request}" if pull_request is not None else f"tree/{head}"
    sent = sum(size_of(c) for c in change.add.values() if not isinstance(c, Copy))
    url = f"{constants.ENDPOINT}/{repo}/{place}"
    return Commit(head, url, tuple(sorted(change.add)), change.delete, sent, pull_request)
