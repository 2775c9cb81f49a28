"""Trusted publishers: an identity token of a CI for a token of the Hub that belongs to no user."""

from .store import HubError
from .wire import Reply, Request, route


@route("POST", "/oauth/token")
def exchange(hub, request: Request) -> Reply:
    asked = request.json()
    token = hub.publishers.get((asked.get("resource"), asked.get("subject_token")))
    if token is None or "token-exchange" not in asked.get("grant_type", ""):
        raise HubError(400, "invalid_grant", body={"error": "invalid_grant"})
    return Reply.json({"access_token": token, "token_type": "bearer", "expires_in": 3600})
