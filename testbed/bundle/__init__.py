# SPDX-License-Identifier: Apache-2.0
"""A run as one file that someone else can read, look at and replay."""
