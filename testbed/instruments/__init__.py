# SPDX-License-Identifier: Apache-2.0
"""What a test or a measurement holds in its hands on a running rack; nothing here starts one."""
