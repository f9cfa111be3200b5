# SPDX-License-Identifier: Apache-2.0
"""What is measured here, in turns with what it is compared with."""
