# SPDX-License-Identifier: Apache-2.0
"""Django in one module: settings, URLs, views and the WSGI application."""

from __future__ import annotations

import sys

import units
from django.http import HttpRequest, JsonResponse
from django.urls import path

SECRET_KEY = "only for tests"
DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = __name__
WSGI_APPLICATION = f"{__name__}.application"
INSTALLED_APPS: list[str] = []
MIDDLEWARE: list[str] = []
DATABASES: dict[str, object] = {}
USE_TZ = True


def work(request: HttpRequest, name: str) -> JsonResponse:
    return JsonResponse(units.synchronous(name))


def other(request: HttpRequest, name: str) -> JsonResponse:
    return JsonResponse(units.synchronous(name))


urlpatterns = [path("work/<str:name>", work), path("other/<str:name>", other)]


def __getattr__(name: str) -> object:
    # Not at import: as the settings module it is imported while Django is not set up yet.
    if name == "application":
        from django.core.wsgi import get_wsgi_application

        return get_wsgi_application()
    raise AttributeError(name)


if __name__ == "__main__":
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)
