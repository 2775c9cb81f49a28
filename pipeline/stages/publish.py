"""Bring the repository to the release with the given variants, in one commit."""

from __future__ import annotations

from pipeline.config import Config
from pipeline.events import STAGES, Events, read_events
from pipeline.stages import Outcome
from pipeline.stages.document import contents, depends, render, write
from pipeline.workspace import Workspace

__all__ = ["depends", "parameters", "run"]


def parameters(config: Config, variant: str | None) -> dict:
    return {"repo": config.publish.repo}


def run(config: Config, workspace: Workspace, events: Events, variants: tuple[str, ...]) -> Outcome:
    from pipeline import hub

    repo = config.publish.repo
    events.progress(0, 1, f"asking the Hub about {repo}")
    hub.check_access(repo)
    hub.create(repo, config.publish.private)
    documents = render(config, workspace, variants)
    paths = write(workspace, documents, variants)
    carried = ", ".join(variants) or "no variants yet"
    message = f"{config.name}: fine-tuned model, {carried}"
    events.progress(0, 1, f"sending what changed to {repo}")
    commit = hub.publish(repo, contents(workspace, variants, documents), message)
    about = {"url": commit.url, "commit": commit.oid, "repo": repo}
    for verb, variant in [("train", None), ("merge", None), ("evaluate", None), *(("quantize", v) for v in variants)]:
        if not _is_pushed(workspace, verb, variant, repo):
            events.emit(verb, "pushed", variant, **about)
    if "README.md" in commit.sent or not _is_pushed(workspace, "publish", None, repo):
        events.emit("publish", "pushed", **about)
    summary = {
        **about,
        "files_sent": len(commit.sent),
        "files_deleted": len(commit.deleted),
        "bytes_sent": commit.sent_bytes,
        "variants": ",".join(variants),
    }
    return Outcome(tuple(paths), summary)


def _is_pushed(workspace: Workspace, verb: str, variant: str | None, repo: str) -> bool:
    """Was what this stage made last already reported as being on the Hub?"""
    stage, pushed = STAGES[verb]
    is_there = False
    for record in read_events(workspace.events_path)[0]:
        if record.get("stage") == stage and record.get("variant") == variant:
            if record["event"] == f"{stage}_completed" and verb != "publish":
                is_there = False
            elif record["event"] == pushed and record.get("repo") == repo:
                is_there = True
    return is_there
