# SPDX-License-Identifier: Apache-2.0
"""From a topology file to a placement: what stands where on which PCI bus. No I/O past loading."""
