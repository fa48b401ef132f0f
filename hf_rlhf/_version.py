"""Versions of the package and of the plugin API."""

__version__ = "0.1.0"

API_VERSION = "1.0"
"""Version of what plugins build on: see docs/api.md. It is independent of the package's version."""
