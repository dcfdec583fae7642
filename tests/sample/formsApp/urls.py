"""The public addresses."""

from django.urls import path

from formsApp import views

urlpatterns = [
    path("", views.index, name="index"),
    path("forms/<slug:slug>/", views.form, name="form"),
    path("ping/", views.ping, name="ping"),
    path("late/", views.late, name="late"),
    path("slow/<int:milliseconds>/", views.slow, name="slow"),
]
