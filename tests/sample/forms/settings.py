"""Settings of the sample project: everything that differs between servers comes from the environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

BASE_DIR = Path(__file__).resolve().parent.parent


def database() -> dict[str, Any]:
    """Return the default database: PostgreSQL, or SQLite when the engine says so."""
    env = os.environ
    engine = env.get("DEFAULT_DB_ENGINE", "django.db.backends.postgresql")
    name = env.get("DEFAULT_DB_NAME", "gforms-db")
    if engine.endswith(".sqlite3"):
        # A transaction that takes its write lock at once waits for it; one that asks later fails at once.
        options = {"transaction_mode": "IMMEDIATE", "timeout": 20}
        return {"ENGINE": engine, "NAME": name, "OPTIONS": options}
    return {
        "ENGINE": engine,
        "NAME": name,
        "HOST": env.get("DEFAULT_DB_HOST", "localhost"),
        "PORT": env.get("DEFAULT_DB_PORT", "5432"),
        "USER": env.get("DEFAULT_DB_USER", "postgres"),
        "PASSWORD": env.get("DEFAULT_DB_PASSWORD", ""),
    }


def cache() -> dict[str, Any]:
    """Return the default cache: Redis when REDIS_URL is set, else the memory of each worker."""
    url = os.environ.get("REDIS_URL")
    if url:
        return {"BACKEND": "django.core.cache.backends.redis.RedisCache", "LOCATION": url}
    return {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}


SECRET_KEY = os.environ.get("SECRET_KEY", "")
DEBUG = os.environ.get("DEBUG", "False") == "True"
ALLOWED_HOSTS = [
    host.strip() for host in os.environ.get("ALLOWED_HOSTS", "").split(",") if host.strip()
]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "accounts",
    "formsApp",
]
MIDDLEWARE = [
    # First, so that a redirect or an error made by the others names its release too.
    "formsApp.release.ReleaseMiddleware",
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]
ROOT_URLCONF = "forms.urls"
WSGI_APPLICATION = "forms.wsgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
                "formsApp.release.release",
            ]
        },
    }
]

DATABASES = {"default": database()}
CACHES = {"default": cache()}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
AUTH_USER_MODEL = "accounts.User"
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]

STATIC_URL = "/static/"
STATIC_ROOT = BASE_DIR / "staticfiles"
MEDIA_URL = "/media/"
MEDIA_ROOT = BASE_DIR / "media"
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.ManifestStaticFilesStorage"},
}

# TLS ends at the proxy, which says so in this header. HTTPS=False is for a site that has none.
HTTPS = os.environ.get("HTTPS", str(not DEBUG)) == "True"
SECURE_PROXY_SSL_HEADER = ("HTTP_X_FORWARDED_PROTO", "https")
SECURE_SSL_REDIRECT = HTTPS
SESSION_COOKIE_SECURE = HTTPS
CSRF_COOKIE_SECURE = HTTPS
SECURE_HSTS_SECONDS = 31_536_000 if HTTPS else 0
SECURE_HSTS_INCLUDE_SUBDOMAINS = HTTPS
SECURE_HSTS_PRELOAD = HTTPS

# Without DEBUG Django keeps its errors to itself; here they go where gunicorn's own do.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}},
    "root": {"handlers": ["console"], "level": "WARNING"},
}
