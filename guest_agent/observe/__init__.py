# SPDX-License-Identifier: Apache-2.0
"""What the guest kernel says, as values."""
