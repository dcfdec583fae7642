"""Tests on a whole booted server: systemd, sshd, nginx, Docker with Compose, PostgreSQL and Redis."""
