"""Envoy rate-limit service: is there room for this?"""
