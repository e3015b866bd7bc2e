"""Serving on plain PyTorch: one base model, many LoRA adapters, continuous batching over fixed slots.

`engine.py` is the protocol and its values; `torch_engine.py` the engine that runs everywhere. Nothing below this
package knows Ray, HTTP or the registry: `serve/` puts it behind a gateway, `loray eval` calls it in its own process.
"""
