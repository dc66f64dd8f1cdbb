"""Scoring of losses and generated answers."""
