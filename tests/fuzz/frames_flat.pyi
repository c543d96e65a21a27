# SPDX-License-Identifier: BSD-3-Clause
# Native code only; nothing here is callable from Python.
