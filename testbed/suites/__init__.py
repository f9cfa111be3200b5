# SPDX-License-Identifier: Apache-2.0
"""The conformance suites, as ordinary pytest modules, and their fixtures."""
