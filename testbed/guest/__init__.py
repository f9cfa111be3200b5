# SPDX-License-Identifier: Apache-2.0
"""The link into a machine: SSH, and the agent's client. Nothing else here knows SSH."""
