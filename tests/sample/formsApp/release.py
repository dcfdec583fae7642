"""Which release answers: in a header of every response, and in every page."""

from __future__ import annotations

from collections.abc import Callable

from django.http import HttpRequest, HttpResponse

from formsApp.version import VERSION


class ReleaseMiddleware:
    """Adds the header X-Release to every response."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        response = self.get_response(request)
        response.headers["X-Release"] = VERSION
        return response


def release(request: HttpRequest) -> dict[str, str]:
    """Give every template the variable `release`."""
    return {"release": VERSION}
