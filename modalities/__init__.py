"""Kinds of observations."""
