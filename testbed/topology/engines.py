# SPDX-License-Identifier: Apache-2.0
"""The copy engines of GPUs and NICs by name; apart, as every verb's help wants them."""

ENGINES = ("model", "igb", "edu")
