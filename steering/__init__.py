"""Activation edits, SpARE profiles and the tool gate."""
