# SPDX-License-Identifier: Apache-2.0
"""The peer-to-peer protocol logic."""
