# SPDX-License-Identifier: Apache-2.0
"""The contracts: one file per op, its reference body is the CPU backend. `Ops(backend)` binds them all."""
