"""Envoy access-log service: what was used?"""
