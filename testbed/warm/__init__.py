# SPDX-License-Identifier: Apache-2.0
"""Saved machines: booted once, and restored instead of booted again."""
