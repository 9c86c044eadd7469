"""Shipped recipes (YAML) and the commands that prepare their public data sets; installed as `dpmed.recipes`."""
