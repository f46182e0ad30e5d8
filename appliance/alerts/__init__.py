"""Telling people what is wrong, once when it begins and once when it is over."""
