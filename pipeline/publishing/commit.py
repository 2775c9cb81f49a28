"""One atomic commit that brings a repository to the files it should hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import HubError
from pipeline.hub.auth import keyless
from pipeline.hub.client import sent_bytes
from pipeline.hub.retry import retry_or_explain, say
from pipeline.hub.tree import CARD, LINEAGE, Content, Copy, Lineage, LocalFile, Tree, read_tree, size_of
from pipeline.publishing.removal import NO_REMOVAL, Removal
from pipeline.publishing.upload import Progress, send
from pipeline.system.libraries import is_installed

Render = Callable[[Tree], Mapping[str, Content]]


@dataclass(frozen=True)
class Change:
    """The files that a commit adds or replaces, and those that it deletes."""

    add: dict[str, Content]
    delete: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.add or self.delete)


NOTHING = Change({}, ())


@dataclass(frozen=True)
class Commit:
    """The head after `publish`, and the files that changed.

    Attributes:
        sent: paths of the files that were added or replaced; empty if the repository held them already.
        sent_bytes: bytes that were really sent, because the Hub may have some contents already. With Xet that is not
            known, and these are the sizes of the files.
        pull_request: number of the pull request that holds the commit; None if the main branch holds it.
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
    progress: Progress = lambda done, total, text: None,
    create_pr: bool = False,
    pull_request: int | None = None,
    check: Callable[[Tree], None] = lambda tree: None,
    removal: Removal = NO_REMOVAL,
    advice: str = "run again to publish what is missing",
) -> Commit:
    """Bring a repository to the files that `render` returns, in one commit. If it holds them, commit nothing.

    Args:
        render: returns all our files by path, for the tree that the commit will change. It is called again after
            the head has moved, and for a pull request. Its README.md files must keep the text of people; any other
            file of people is refused.
        create_pr: commit to a pull request instead of the main branch: the open one that this user gave the title
            `message`, or a new one.
        pull_request: number of the pull request to update if it is still open, whatever its title.
        check: called with the main branch before each attempt; raises if the commit must not be made on top of it.
        removal: an adapter of other people that it names is removed, too.
        advice: the next step to suggest if the Hub does not answer.

    Raises:
        HubError: if another run's release or a file of people is in the way, or after the last retry. The repository
            is then unchanged.
    """
    tried = [NOTHING]

    def attempt() -> Commit:
        branch = _choose(repo, render, message, create_pr, pull_request, check, removal)
        if not branch.change:
            return _done(
                repo, branch.tree.head, tried[-1], branch.number
            )  # if the Hub's answer was lost, the commit is there already
        _check_card(repo, branch.change)
        operations = _operations(repo, branch, progress)
        tried.append(branch.change)
        return _commit(repo, branch, operations, message)

    before = sent_bytes()
    commit = retry_or_explain(repo, attempt, advice=advice)
    if not commit.sent or uses_xet():
        return commit
    return replace(commit, sent_bytes=sent_bytes() - before)


def uses_xet() -> bool:
    """Return True if large files are sent by Xet, which sends only the parts that the Hub lacks."""
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and is_installed("hf_xet")


@dataclass(frozen=True)
class _Branch:
    """The target of a commit (main, pull request `number`, or a new one), and the change that it needs."""

    tree: Tree
    change: Change
    number: int | None = None
    opens: bool = False

    @property
    def revision(self) -> str | None:
        return None if self.number is None else f"refs/pr/{self.number}"


def _choose(
    repo: str,
    render: Render,
    title: str,
    create_pr: bool,
    known: int | None,
    check: Callable[[Tree], None],
    removal: Removal,
) -> _Branch:
    """Return the main branch, or a pull request if one is wanted and something has to change."""
    tree = read_tree(repo)
    check(tree)
    change = difference(tree, render(tree), removal)
    if not (change and create_pr):
        return _Branch(tree, change)
    number = _open_pull_request(repo, title, known)
    if number is None:
        return _Branch(tree, change, opens=True)
    tree = read_tree(repo, f"refs/pr/{number}")
    return _Branch(tree, difference(tree, render(tree), removal), number)


def _operations(repo: str, branch: _Branch, progress: Progress) -> list:
    """Upload the files to add, and return the operations of the commit."""
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


def difference(tree: Tree, wanted: Mapping[str, Content], removal: Removal = NO_REMOVAL) -> Change:
    """Return the change after which `wanted` are the only files of ours in a tree of the Hub.

    Raises:
        HubError: if another run's release, or a file that is not ours, is in the way.
    """
    lineage = wanted.get(LINEAGE)
    if isinstance(lineage, bytes):  # a copy is of an older release here, whose run may have had another name
        _check_holder(tree, Lineage.parse(lineage))
    foreign = sorted(p for p in (wanted.keys() & tree.files.keys()) - tree.ours if Path(p).name != CARD)
    if foreign:
        raise HubError(f"{tree.repo}: tunepress did not put {foreign[0]} there. Try: another repository")
    changed = {p: c for p, c in wanted.items() if p not in tree.files or not tree.files[p].holds(c)}
    unwanted = (tree.ours | removal.adapter_files(tree)) - wanted.keys()
    return Change(changed, tuple(sorted(unwanted)))


def check_destination(
    repo: str,
    run: str,
    mirror_of: str | None = None,
    asked: Collection[str] | None = None,
    removal: Removal = NO_REMOVAL,
) -> None:
    """Raise if a repository cannot take a run's release. A repository that does not exist yet can.

    Args:
        asked: the variants of the configuration; None if they are not checked.
        removal: variants and files that may be removed.

    Raises:
        HubError: if the repository holds another run's release, or would lose variants, or has an adapter of other
            people at its root; or if the Hub does not answer.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    def attempt() -> None:
        with contextlib.suppress(RepositoryNotFoundError):
            tree = read_tree(repo)
            _check_holder(tree, Lineage(run, mirror_of))
            if asked is not None:
                removal.check_variants(tree, asked)
                removal.check_adapter(tree)

    retry_or_explain(repo, attempt)


def check_root(tree: Tree) -> None:
    """Raise if the last release has a model at the root, which a release of variants alone would remove.

    Raises:
        HubError: with the name of that release.
    """
    if any("/" not in path and path.endswith(".safetensors") for path in tree.ours):
        raise HubError(
            f"{tree.repo}: holds {_named(tree.lineage)} with a model at the root, and this release has variants only. "
            "Try: add them to that run (quantize.variants), or another repository"
        )


def _check_holder(tree: Tree, wanted: Lineage) -> None:
    """Raise if the repository holds another run's release, which ours would replace without a trace."""
    there = tree.lineage
    if there.run is None or (there.run, there.mirror_of) == (wanted.run, wanted.mirror_of):
        return
    raise HubError(
        f"{tree.repo}: holds {_named(there)}, and this is {_named(wanted)}. Try: another repository"
        + (", or the same name for this run" if there.mirror_of == wanted.mirror_of else "")
    )


def _named(lineage: Lineage) -> str:
    return f"run {lineage.run!r}" + (f" as a mirror of {lineage.mirror_of}" if lineage.mirror_of else "")


def _open_pull_request(repo: str, title: str, known: int | None) -> int | None:
    """Return the number of the open pull request to update; None if a new one is needed."""
    from huggingface_hub import HfApi

    api = HfApi()
    me = None if keyless() else api.whoami()["name"]  # others may use the title too
    found = list(api.get_repo_discussions(repo, discussion_type="pull_request", discussion_status="open"))
    numbers = [d.num for d in found if d.author == me and d.title == title]
    return known if known in [d.num for d in found] else max(numbers, default=None)


def _check_card(repo: str, change: Change) -> None:
    """Have the Hub check the card's metadata before gigabytes are uploaded."""
    from huggingface_hub import constants
    from huggingface_hub.errors import BadRequestError
    from huggingface_hub.utils import get_session, hf_raise_for_status

    card = change.add.get(CARD)
    if not isinstance(card, (bytes, LocalFile)):
        return
    text = (card if isinstance(card, bytes) else card.path.read_bytes()).decode(errors="replace")
    # The client's own function fails if the Hub does not answer.
    body, headers = {"repoType": "model", "content": text}, {"Accept": "text/plain"}
    try:
        answer = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body, headers=headers)
        hf_raise_for_status(answer)
    except BadRequestError as error:
        told = error.response.text if error.response is not None else str(error)
        raise HubError(f"{repo}: the Hub refuses the metadata of {CARD} ({say(told)}). Try: correct it there") from None


def _done(repo: str, head: str, change: Change, pull_request: int | None) -> Commit:
    from huggingface_hub import constants

    place = f"discussions/{pull_request}" if pull_request is not None else f"tree/{head}"
    sent = sum(size_of(c) for c in change.add.values() if not isinstance(c, Copy))
    url = f"{constants.ENDPOINT}/{repo}/{place}"
    return Commit(head, url, tuple(sorted(change.add)), change.delete, sent, pull_request)
