"""The public pages, and three addresses that exist for the tests of a deployment."""

from __future__ import annotations

import time

from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render

from formsApp.models import Form, Response
from formsApp.version import VERSION


def index(request: HttpRequest) -> HttpResponse:
    """List the forms."""
    return render(request, "formsApp/index.html", {"forms": Form.objects.all()})


def form(request: HttpRequest, slug: str) -> HttpResponse:
    """Show a form; take an answer to it."""
    shown = get_object_or_404(Form, slug=slug)
    text = request.POST.get("text", "").strip()
    if text:
        shown.responses.create(text=text)
        return redirect("index")
    return render(request, "formsApp/form.html", {"form": shown})


def ping(request: HttpRequest) -> HttpResponse:
    """Write a response, and answer with the number of them: the database takes writes and reads."""
    shown, _ = Form.objects.get_or_create(slug="ping", defaults={"title": "Ping"})
    with transaction.atomic():
        shown.responses.create(text="ping")
        return HttpResponse(str(Response.objects.count()), content_type="text/plain")


def late(request: HttpRequest) -> HttpResponse:
    """Answer with the release of the code, and of a module that is imported only now."""
    from formsApp import late as module

    return HttpResponse(f"{VERSION} {module.VERSION}", content_type="text/plain")


def slow(request: HttpRequest, milliseconds: int) -> HttpResponse:
    """Answer after a while: a request that is still running when its worker is told to stop."""
    time.sleep(min(milliseconds, 60_000) / 1000)
    return HttpResponse(VERSION, content_type="text/plain")
