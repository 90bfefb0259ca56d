"""Judging: annotator, judge, the endpoint that both may ask, agreement with people."""
