# SPDX-License-Identifier: Apache-2.0
"""QEMU: its command line, its process, its control socket. Nothing else here knows QEMU's words."""
