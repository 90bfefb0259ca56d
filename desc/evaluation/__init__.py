"""Evaluation: systems answer test dialogues, their answers are scored, and tables and a report page
show the scores."""
