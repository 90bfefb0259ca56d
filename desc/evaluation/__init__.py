"""Evaluation: systems, scores, tables, text overlap, the report page and its figures."""
