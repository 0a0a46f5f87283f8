"""Everything about the package is declared in `pyproject.toml`; this file lets old and new tools build it alike."""

from setuptools import setup

setup()
