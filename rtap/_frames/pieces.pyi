# SPDX-License-Identifier: BSD-3-Clause
# Native kernels only; nothing here is callable from Python.
