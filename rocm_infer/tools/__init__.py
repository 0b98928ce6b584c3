# SPDX-License-Identifier: Apache-2.0
"""One module per command-line verb beside serving: each has `main(argv) -> exit code`."""
