# SPDX-License-Identifier: Apache-2.0
"""The protocols of :mod:`guest_agent.p2p` on real devices: VFIO, the GPU and NIC models, RAM."""
