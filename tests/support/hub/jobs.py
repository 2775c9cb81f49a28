"""Jobs: started, listed, looked at, and their logs as a stream of events. What they do is the test's to say."""

import json
from dataclasses import dataclass, field

from .store import HubError, now
from .wire import Reply, Request, route


@dataclass
class Jobs:
    """What was asked for, and how the next job goes.

    Attributes:
        started: the body of each request that started one.
        log: lines that a job writes.
        stage: where it is when it was asked after.
    """

    started: list[dict] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    stage: str = "COMPLETED"


@route("POST", "/api/jobs/{namespace}")
def start(hub, request: Request) -> Reply:
    user = hub.user(request)
    if user is None or request.args["namespace"] != user.name or user.role != "write":
        raise HubError(403, "Forbidden: this token may not start jobs")
    hub.jobs.started.append(request.json())
    return Reply.json(_job(hub, len(hub.jobs.started), user.name))


@route("GET", "/api/jobs/{namespace}")
def listed(hub, request: Request) -> Reply:
    stages, labels = request.query.get("stage", []), request.query.get("label", [])
    wanted = [
        _job(hub, number, request.args["namespace"])
        for number, spec in enumerate(hub.jobs.started, start=1)
        if hub.jobs.stage in stages and {f"{k}={v}" for k, v in spec["labels"].items()} >= set(labels)
    ]
    return Reply.json(wanted)


@route("GET", "/api/jobs/{namespace}/{job}")
def inspect(hub, request: Request) -> Reply:
    return Reply.json(_job(hub, int(request.args["job"]), request.args["namespace"]))


@route("GET", "/api/jobs/{namespace}/{job}/logs")
def logs(hub, request: Request) -> Reply:
    events = [{"data": line, "timestamp": now()} for line in ["===== Job started at ... =====", *hub.jobs.log]]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    return Reply(body=body.encode(), headers={"Content-Type": "text/event-stream"})


def _job(hub, number: int, owner: str) -> dict:
    spec = hub.jobs.started[number - 1]
    about = {name: spec.get(name) for name in ("dockerImage", "command", "environment", "flavor", "labels")}
    return {
        "id": str(number),
        "createdAt": now(),
        "owner": {"id": "1", "name": owner, "type": "user"},
        "status": {"stage": hub.jobs.stage, "message": None},
        **about,
    }
