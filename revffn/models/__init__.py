"""Hugging Face models made reversible, and back.

serving.py          what vLLM and llama.cpp want of an exported folder
architectures.py    what differs from family to family, a row each
modules.py          which class every module gets, and which models are refused
layers.py           decoder layers and the final norm in a walk
conversion.py       convert and export
router_choices.py   what routers choose, told after each forward call
loading.py          a model from its files, every tensor looked at
losses.py           linear cross-entropy, never the full logits
known.py            public models whose configs are known without a network
configs/            those configs
upcycle.py          a dense model -> a small real Mixture of Experts
upcycle_command.py  `revffn upcycle`
"""
