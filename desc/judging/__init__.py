"""Judging: an annotator names errors, and a judge rates replies.

Either is a local model or one behind an endpoint. Both are held against what people say."""
