"""A client of `/sere/`, the admin routes of a serving application."""

import time
from typing import Any

import httpx

from sere_dist.environment import ADMIN_TOKEN, environment_secrets

ADMIN_PATH = "/sere/"
SETTINGS_PATH, TRIAL_PATH, CONTROL_PATH, ACTIVITY_PATH = (
    f"{ADMIN_PATH}{name}" for name in ("settings", "trial", "control", "activity")
)
SECONDS = 60.0  # the server waits for its replicas before it answers
FOLLOW_SECONDS = 120.0  # for replicas that were busy then


class AdminError(RuntimeError):
    """The settings could not be read or changed. They are as they were, unless the connection broke after sending."""


def request_settings(url: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the settings in force at the application at `url`, their revision, its replicas, and what they measured.

    With `changes`, changes them first.

    Raises:
        AdminError: as `ask`.
    """
    return ask(url, "GET" if changes is None else "PATCH", SETTINGS_PATH, changes)


def change_settings(url: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Changes settings, and returns the same as `request_settings` as soon as every replica runs them.

    Raises:
        AdminError: a replica does not follow, or as `ask`.
    """
    state, deadline = request_settings(url, changes), time.monotonic() + FOLLOW_SECONDS
    while state["pending"] or not state["replicas"]:
        if time.monotonic() > deadline:
            raise AdminError(f"replicas that don't follow: {', '.join(state['pending']) or 'none is there'}")
        time.sleep(1)
        state = request_settings(url)
    return state


def request_trial(url: str, trial: dict[str, Any] | None) -> dict[str, Any]:
    """Starts a trial of settings, of the fields that the reference names, or with None ends the one that there is.
    Returns the same as `request_settings`.

    Raises:
        AdminError: as `ask`.
    """
    return ask(url, "DELETE" if trial is None else "PUT", TRIAL_PATH, trial)


def pin_price(url: str, pinned: bool) -> dict[str, Any]:
    """Stops the controller at the price in force, or lets it go on. Returns the same as `request_settings`.

    Raises:
        AdminError: as `ask`.
    """
    return ask(url, "PUT", CONTROL_PATH, {"pinned": pinned})


def ask(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what an admin route of the application at `url` answers.

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
    address = url.rstrip("/").removesuffix("/v1") + path
    headers = {"Authorization": f"Bearer {tokens[0]}"}
    try:
        answer = httpx.request(method, address, json=body, headers=headers, timeout=SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise AdminError(f"no answer from {address}: {error}") from error
    try:
        answered = answer.json()
        if answer.is_success:
            return answered
        message = answered["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = "that is not a sere_dist application, or the address is not its own"
    raise AdminError(f"{address} answered {answer.status_code}: {message}")
