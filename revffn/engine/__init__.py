"""The reversible walk: forward without stored activations, backward that rebuilds every state and checks it.

    routing.py       expert choices, recorded in forward and replayed
    exchange.py      expert parallelism: tokens travel to the ranks that have their experts
    experts.py       experts_implementation="revffn", in transformers' interface
    dense.py         norms, rotary embedding and SwiGLU as fused operations
    captured.py      what transformers captures of modules, as the untiled layer gives it
    recompute.py     a sublayer as it ran in forward, run again in backward on the same code path
    walk.py          one forward call, its tiles and streams, and the way back; what it measured
    nodes.py         the autograd nodes that a walk is made of, but for a coupling's own
    sublayers.py     a decoder layer's own attention and feed-forward, called one by one
    host_weights.py  layers in host memory, two at a time on the device

It knows no coupling and no family of models.
"""
