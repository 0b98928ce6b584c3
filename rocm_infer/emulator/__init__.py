# SPDX-License-Identifier: Apache-2.0
"""Executes gfx942 and gfx950 machine code on a CPU: see docs/emulator.md."""
