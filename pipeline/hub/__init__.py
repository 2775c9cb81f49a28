"""The Hub: what a repository holds, what must change, one atomic commit.

`publish` compares by hash, sends what differs, deletes by name what tunepress had put
there and no longer does, and touches nothing else. When somebody else's commit comes in
between, everything is read, rendered and compared again, so that what a commit says is
true of the very tree that it makes.
"""

from pipeline.hub.auth import check_access, check_token, could_be_token, create
from pipeline.hub.retry import HubAway
from pipeline.hub.tree import CARD, LINEAGE, Content, Copy, Lineage, LocalFile, RemoteFile, Tree, read_tree
from pipeline.publishing.commit import Commit, check_destination, check_root, publish
from pipeline.publishing.tags import Release, release_of, releases, tag_release

__all__ = [
    "CARD",
    "LINEAGE",
    "Commit",
    "Content",
    "Copy",
    "HubAway",
    "Lineage",
    "LocalFile",
    "Release",
    "RemoteFile",
    "Tree",
    "check_access",
    "check_destination",
    "check_root",
    "check_token",
    "could_be_token",
    "create",
    "publish",
    "read_tree",
    "release_of",
    "releases",
    "tag_release",
]
