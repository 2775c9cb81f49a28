"""Checks before anything is sent: a token that may write, and a repository to write to."""

from __future__ import annotations

import os

from pipeline.errors import HubError
from pipeline.hub.retry import HubAway, retry_or_explain, status_of
from pipeline.system.command_names import login, other_token

ANSWER_SECONDS = 10.0
ATTEMPTS = 5  # somebody waits for the first stage to begin


def check_access(repo: str, create_pr: bool = False) -> None:
    """Raise an error unless there is a token that may write to `repo`.

    Args:
        create_pr: only pull requests will be opened, which others than the owner may do.

    Raises:
        HubError: saying which of these it is not, and what to do.
    """
    if keyless() is None:
        check_token(repo, None if create_pr else repo.split("/")[0])
    else:
        _check_keyless(repo)


def keyless() -> str | None:
    """Return the one repository that this process may write to as a trusted publisher, or None.

    In CI, `HF_OIDC_RESOURCE` lets the Hub's client exchange the identity of the job for a token of one hour. That token
    belongs to no user. The settings of the repository decide what it may do.
    """
    return os.environ.get("HF_OIDC_RESOURCE") or None


def _check_keyless(repo: str) -> None:
    from huggingface_hub import get_token
    from huggingface_hub.errors import OIDCError

    if keyless() != repo:
        raise HubError(
            f"{repo}: the keyless login is for another repository ({keyless()}). Try: HF_OIDC_RESOURCE={repo}"
        )
    try:
        retry_or_explain(repo, get_token)
    except OIDCError as error:
        raise HubError(f"{repo}: the keyless login failed ({error})") from None
    except HubAway:
        raise
    except HubError as error:
        problem = str(error).partition(". Try: ")[0]
        raise HubError(f"{problem}. Try: add this workflow to the repository's Trusted Publishers on the Hub") from None


def check_token(place: str, owner: str | None, attempts: int = ATTEMPTS) -> str:
    """Return the token if it may write to what belongs to `owner`.

    Args:
        place: what it is for; errors begin with it.
        owner: a user or an organization; None for anybody's.

    Returns:
        The token.

    Raises:
        HubAway: if the Hub cannot be asked.
        HubError: saying what is wrong with the token, and what to do.
    """
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        raise HubError(f"{place}: no Hub token. Try: set HF_TOKEN, or {login()}")
    who = retry_or_explain(place, lambda: who_is(place, token), attempts=attempts)
    names = [who.get("name"), *(o.get("name") for o in who.get("orgs", []))]
    if owner is not None and owner.casefold() not in [str(name).casefold() for name in names]:
        raise HubError(f"{place}: the Hub token of {names[0]} cannot write to {owner}/. Try: {other_token()}")
    about = who.get("auth", {}).get("accessToken", {})
    if about.get("role") == "read":
        raise HubError(f"{place}: the Hub token can only read. Try: create a token that can write, and {other_token()}")
    if not may_write(about, place, owner):
        raise HubError(f"{place}: the Hub token has no permission to write here. Try: add repo.write to the token")
    return token


def may_write(about: dict, place: str = "", owner: str | None = None) -> bool:
    """Return True if a token may write to what `owner` has or to the repository `place`; without both, to anything.

    Args:
        about: what the Hub says of the token.
    """
    if about.get("role") != "fineGrained":
        return about.get("role") != "read"
    granted = about.get("fineGrained", {})
    names = {str(name).casefold() for name in (owner, *place.split()[-1:]) if name}
    return any(
        "repo.write" in scope.get("permissions", ())
        and (owner is None or str(scope.get("entity", {}).get("name")).casefold() in names)
        for scope in granted.get("scoped", ())
    )


def who_is(place: str, token: str) -> dict:
    """Return whose token it is and what it may do. The Hub is asked once.

    Raises:
        HubError: if it has invalid characters, or if the Hub does not know it.
        HubAway: if the server is not the Hub.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    if not could_be_token(token):
        raise HubError(f"{place}: the Hub token contains invalid characters. Try: {other_token()}")
    # Not through the client's own function, which waits for an answer for ever.
    address, headers = f"{constants.ENDPOINT}/api/whoami-v2", build_hf_headers(token=token)
    answer = get_session().get(address, headers=headers, timeout=ANSWER_SECONDS)
    try:
        hf_raise_for_status(answer)
    except Exception as error:
        if status_of(error) in (401, 403):
            raise HubError(f"{place}: the Hub does not know this token. Try: {other_token()}") from None
        raise
    try:
        return dict(answer.json())
    except (ValueError, TypeError):
        raise HubAway(f"{place}: the server is not the Hub ({constants.ENDPOINT}). Try: check HF_ENDPOINT") from None


def could_be_token(text: str) -> bool:
    """Return True if a text can stand in a header: blanks and other characters mean that it was copied wrongly."""
    return text.isascii() and text.isprintable() and " " not in text


def create(repo: str, private: bool) -> bool:
    """Create the repository if it does not exist; an existing one keeps its visibility.

    Returns:
        Whether it is private.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    def attempt() -> bool:
        api = HfApi()
        try:
            return bool(api.model_info(repo).private)
        except RepositoryNotFoundError:
            api.create_repo(repo, private=private, exist_ok=True)
            return private

    return retry_or_explain(repo, attempt)
