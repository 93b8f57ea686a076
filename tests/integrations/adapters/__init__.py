"""Adapters to other trainers, with the real packages."""
