# SPDX-License-Identifier: Apache-2.0
"""What runs tests: the pytest plugin, racks under test, sessions, the runner."""
