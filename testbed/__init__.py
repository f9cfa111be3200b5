# SPDX-License-Identifier: Apache-2.0
"""A virtual multi-GPU rack from one YAML file; peer-to-peer DMA through a real vIOMMU, judged.

Importing this package costs nothing: the command line and the rack keeper start from here.
"""

__version__ = "0.1.0"
