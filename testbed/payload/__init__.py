# SPDX-License-Identifier: Apache-2.0
"""Other people's tests: found in their checkout, brought into a guest, run there."""
