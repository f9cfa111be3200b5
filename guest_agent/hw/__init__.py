# SPDX-License-Identifier: Apache-2.0
"""Devices driven from user space, behind one small interface."""
