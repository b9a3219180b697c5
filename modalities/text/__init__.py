"""Texts: sentences of an environment, and bytes that are told to be text."""
