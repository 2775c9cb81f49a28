"""Before anything is sent: a token that may write, and a repository to write to."""

from __future__ import annotations

from pipeline.errors import HubError, is_unreachable
from pipeline.hub.trouble import persist, say, status_of


def check_access(repo: str, create_pr: bool = False) -> None:
    """Is there a token, and may it write to `repo`?

    Args:
        create_pr: only pull requests will be opened, which others than the owner may do.

    Raises:
        HubError: saying which of these it is not, and what to do.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if get_token() is None:
        raise HubError(f"{repo}: no Hub token; set HF_TOKEN or run: hf auth login")
    try:
        who = HfApi().whoami()
    except HfHubHTTPError as error:
        reason = "the Hub does not know this token; log in again with: hf auth login"
        raise HubError(f"{repo}: {reason if status_of(error) in (401, 403) else say(error)}") from None
    except Exception as error:
        if not is_unreachable(error):
            raise
        raise HubError(f"{repo}: the Hub cannot be reached: {say(error)}") from None
    owner = repo.split("/")[0]
    names = [who.get("name"), *(o.get("name") for o in who.get("orgs", []))]
    if owner not in names and not create_pr:
        raise HubError(f"{repo}: this token belongs to {names[0]}, who cannot write to {owner}/")
    role = who.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(f"{repo}: the token may only read; make one that may write")


def create(repo: str, private: bool) -> bool:
    """Make the repository if there is none; the visibility of an existing one stays as it is.

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

    return persist(repo, attempt)
