"""Preference pairs: the journal of judgments, import and export, splits, data health, and summaries."""
