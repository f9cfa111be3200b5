# SPDX-License-Identifier: Apache-2.0
"""What people know of a real machine (lspci, NCCL, hwloc, nvidia-smi) to a topology that boots."""
