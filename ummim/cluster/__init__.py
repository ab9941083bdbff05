"""Hosts of a job: who they are, whether they are fit for it, and what of it runs on them. No torch at import."""
