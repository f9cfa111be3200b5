# SPDX-License-Identifier: Apache-2.0
"""Runs inside the machine: observes and acts, never judges. Standard library only."""
