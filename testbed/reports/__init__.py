# SPDX-License-Identifier: Apache-2.0
"""Bug reports as files: read one, make it happen again, say whether it did (docs/reports.md)."""
