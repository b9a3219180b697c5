"""Vectors of numbers and of classes."""
