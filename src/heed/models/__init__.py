"""Whole models, one to a file, named after what they were published for."""
