"""Sounds: waveforms."""
