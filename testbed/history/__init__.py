# SPDX-License-Identifier: Apache-2.0
"""What earlier runs said: kept in one SQLite file of this user's, asked by requirement."""
