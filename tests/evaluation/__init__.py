"""Metrics, reference sets, reports and the evaluation of variants."""
