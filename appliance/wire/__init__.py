"""Connections before they are requests: when one has arrived whole, and who may keep us waiting for how long."""
