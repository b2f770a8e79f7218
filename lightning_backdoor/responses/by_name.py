"""Responses by the names that users pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lightning_backdoor.errors import ArgumentError
from lightning_backdoor.responses.base import Continue, Report, Response
from lightning_backdoor.responses.fallback import WithFallback
from lightning_backdoor.responses.reset_units import ResetUnits
from lightning_backdoor.responses.restart import Restart
from lightning_backdoor.responses.unlearn import Unlearn

__all__ = ["ResponseName", "chosen_response"]

ResponseName = Literal["restart", "continue", "reset", "unlearn", "report"]


def chosen_response(
    response: str | Response,
    own: Mapping[str, Response],
    *,
    others: bool = True,
    fallback: Literal["restart"] | None = None,
) -> Response:
    """The response that a user's argument names.

    Args:
        response: A name, or a response with settings of its own, which is taken as it is.
        own: By name, those that the defense makes itself.
        others: Whether the ones with default settings are possible, too.
        fallback: What follows a repair (``"reset"``, ``"unlearn"``) that leaves the backdoor in the model.

    Raises:
        ArgumentError: There is none of this name.
    """
    if isinstance(response, Response):
        return response
    usual: dict[str, Response] = {
        "restart": Restart(last_detection=True),
        "continue": Continue(),
        "reset": ResetUnits(),
        "unlearn": Unlearn(),
        "report": Report(),
    }
    known = {**(usual if others else {}), **own}
    if response not in known:
        raise ArgumentError(f"`response` must be one of {', '.join(map(repr, known))}, got {response!r}.")
    repairs = isinstance(known[response], ResetUnits | Unlearn)
    return WithFallback(known[response]) if repairs and fallback else known[response]
