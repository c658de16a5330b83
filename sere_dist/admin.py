"""A client of `/sere/settings`, the admin route of a serving application."""

from typing import Any

import httpx

from sere_dist.environment import ADMIN_TOKEN, environment_secrets

SETTINGS_PATH = "/sere/settings"
SECONDS = 60.0  # the server waits for its replicas before it answers


class AdminError(RuntimeError):
    """The settings could not be read or changed. They are as they were, unless the connection broke after sending."""


def request_settings(url: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the settings in force at the application at `url`, their revision, and its replicas.

    With `changes`, changes them first.

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
    address = url.rstrip("/").removesuffix("/v1") + SETTINGS_PATH
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
