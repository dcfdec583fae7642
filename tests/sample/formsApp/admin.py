"""Forms and responses in the admin site."""

from django.contrib import admin

from formsApp.models import Form, Response


@admin.register(Form)
class FormAdmin(admin.ModelAdmin):
    """Forms by title; the slug follows it."""

    list_display = ["title", "slug", "created_at"]
    prepopulated_fields = {"slug": ["title"]}


@admin.register(Response)
class ResponseAdmin(admin.ModelAdmin):
    """Responses, newest first."""

    list_display = ["form", "text", "created_at"]
    list_filter = ["form"]
