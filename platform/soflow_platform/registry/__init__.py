"""Registered models.

candidate   the checkpoint that a sweep registers
versions    registers versions, finds them by name, alias or number
promotion   the champion alias: gate, promotion, rollback
"""
