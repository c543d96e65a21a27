# SPDX-License-Identifier: BSD-3-Clause
"""``python -m rtap`` is the ``rtap`` command."""

from rtap.cli import main

raise SystemExit(main())
