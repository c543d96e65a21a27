# SPDX-License-Identifier: BSD-3-Clause
"""The generic device layer: states, the ops table, events, figures, names."""
