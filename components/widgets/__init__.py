"""Components that compute in the browser: `gr.HTML` subclasses, each with its script and style sheet beside it."""

from __future__ import annotations

from gradio import component_meta

# Gradio writes a stub file beside the source of every component class that is not its own, and type checkers would
# then read that one.
component_meta.create_or_modify_pyi = lambda *_: None
