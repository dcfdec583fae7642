"""A form, and what people answered."""

from django.db import models


class Form(models.Model):
    """A question that is open to everyone."""

    title = models.CharField(max_length=200)
    slug = models.SlugField(unique=True)
    description = models.TextField(blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["title"]

    def __str__(self) -> str:
        return self.title


class Response(models.Model):
    """One answer to a form."""

    form = models.ForeignKey(Form, on_delete=models.CASCADE, related_name="responses")
    text = models.TextField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at"]

    def __str__(self) -> str:
        return self.text[:50]
