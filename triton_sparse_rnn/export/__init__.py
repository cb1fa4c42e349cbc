"""Converted layers as plain C."""
