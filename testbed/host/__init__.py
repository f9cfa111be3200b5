# SPDX-License-Identifier: Apache-2.0
"""What this machine can do: probes, tool root, images, kernels."""
