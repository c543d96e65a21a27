# SPDX-License-Identifier: BSD-3-Clause
"""Sphinx configuration."""

from importlib.metadata import version as installed

project = "rtap"
author = "the rtap authors"
copyright = "2026, the rtap authors"  # noqa: A001
release = version = installed("rtap")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
nitpicky = True
html_theme = "alabaster"
html_theme_options = {"page_width": "1000px"}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
