# SPDX-License-Identifier: Apache-2.0
"""Verdicts and their forms: record, KTAP, JUnit."""
