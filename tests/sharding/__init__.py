"""Tests of distopt.sharding."""
