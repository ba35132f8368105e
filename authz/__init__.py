"""Envoy ext_authz: who is this, and may they use this?"""
