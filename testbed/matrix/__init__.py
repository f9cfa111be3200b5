# SPDX-License-Identifier: Apache-2.0
"""Many runs: what a matrix file means, where its cells run, and the one table they make."""
