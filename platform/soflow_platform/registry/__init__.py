"""Registered models.

candidate      an evaluation of a sweep, to be registered
card           a version's description as JSON values, and its card in Markdown
tags           names of the tags of a version
versions       registers versions, finds them by name, alias or number
stored_scores  compares two versions by the scores that their sweeps stored
version_list   all versions of all models, with what their tags say
gate           compares a candidate with the champion, and decides
promotion      the champion alias: moved, with the decision kept, and moved back
"""
