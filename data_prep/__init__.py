"""Builds, indexes and verifies the tar shards that ummim trains on: ``python -m data_prep --help``."""
