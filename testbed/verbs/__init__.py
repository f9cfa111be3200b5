# SPDX-License-Identifier: Apache-2.0
"""The verbs of the command line, by what they are about. They parse, call, print; no more."""
