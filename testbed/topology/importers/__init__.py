# SPDX-License-Identifier: Apache-2.0
"""What people know of a real machine (lspci, NCCL, hwloc, nvidia-smi) to a topology that boots.

What the command line needs for its help stands here, so that help loads nothing else.
"""

# The formats, as `testbed import` names them.
FORMATS = ("lspci", "nccl", "hwloc", "nvidia")

# How many devices are kept: more than most machines have, and few enough to boot without KVM
# (measured on a busy host: 30 devices in 37 s, 60 in 149 s, and 100 not at all).
DEFAULT_MOST = 48
