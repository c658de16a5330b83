"""The admin route `/sere/policy` of a serving application, from elsewhere."""

from typing import Any

import httpx

from sere_dist.config import ADMIN_TOKEN, environment_secrets

POLICY_PATH = "/sere/policy"
SECONDS = 60.0  # the server waits for its replicas before it answers


class AdminError(RuntimeError):
    """The policy could not be read or changed; it is as it was, unless the connection broke after it was sent."""


def policy(url: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the policy in force at the application at `url`, its revision and its replicas; changes it before.

    The token is that of this environment, `SERE_ADMIN_TOKEN` or the file `SERE_ADMIN_TOKEN_FILE`.

    Raises:
        AdminError: there is no token, no such route, or the server refuses; the message is the server's.
    """
    try:
        tokens = environment_secrets(ADMIN_TOKEN)
    except ValueError as error:
        raise AdminError(str(error)) from error
    if not tokens:
        raise AdminError(f"set {ADMIN_TOKEN} or {ADMIN_TOKEN}_FILE to the token that the server started with")
    address = url.rstrip("/").removesuffix("/v1") + POLICY_PATH
    headers = {"Authorization": f"Bearer {tokens[0]}"}
    try:
        if changes is None:
            answer = httpx.get(address, headers=headers, timeout=SECONDS)
        else:
            answer = httpx.patch(address, json=changes, headers=headers, timeout=SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise AdminError(f"no answer from {address}: {error}") from error
    try:
        body = answer.json()
        if answer.is_success:
            return body
        message = body["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = "that is not a sere_dist application, or the address is not its own"
    raise AdminError(f"{address} answered {answer.status_code}: {message}")
