# SPDX-License-Identifier: Apache-2.0
"""PCIe devices written in Python, served to QEMU over vfio-user."""
