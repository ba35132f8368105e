"""
What the model servers offer: asked in the background, kept, and shown to those who may use it.

The servers are asked through Envoy, at a socket of ours (`run/catalog.sock`): along the routes that
requests take, to the hosts that Envoy holds for well. See docs/decisions/0026.
"""
