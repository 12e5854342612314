"""Tests, in the order of the floors and packages they test."""
