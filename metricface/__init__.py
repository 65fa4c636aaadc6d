"""metricface."""
